//! Some images of a dataset.

use rayon::prelude::*;

use super::error::DatasetError;
use super::image_type::Image;
use super::registry::Dataset;

/// Images of another dataset by their positions there.
pub(super) struct Chosen {
    whole: Box<dyn Dataset>,
    indices: Vec<usize>,
    labels: Vec<u32>,
}

impl Chosen {
    pub(super) fn new(whole: Box<dyn Dataset>, indices: Vec<usize>) -> Self {
        let labels = indices.iter().map(|&index| whole.label(index)).collect();
        Self { whole, indices, labels }
    }
}

impl Dataset for Chosen {
    fn labels(&self) -> &[u32] {
        &self.labels
    }

    fn image(&self, index: usize) -> Result<Image, DatasetError> {
        let out_of_range = DatasetError::IndexOutOfRange { index, len: self.indices.len() };
        self.whole.image(*self.indices.get(index).ok_or(out_of_range)?)
    }

    fn classes(&self) -> Option<&[String]> {
        self.whole.classes()
    }

    fn describe(&self, index: usize) -> String {
        match self.indices.get(index) {
            Some(&index) => self.whole.describe(index),
            None => format!("image {index}"),
        }
    }
}

/// An image that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// What [`Dataset::describe`] calls it.
    pub image: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Leaves out the images that cannot be decoded. Decodes all of them once, on the current rayon pool; a file that is missing or cannot be read
/// is an error. Once `cancelled`, nothing more is decoded: whoever cancelled has to look.
pub fn readable(
    whole: Box<dyn Dataset>,
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<(Box<dyn Dataset>, Vec<Skipped>), DatasetError> {
    let reason = |index: usize| match (!cancelled()).then(|| whole.image(index)) {
        None | Some(Ok(_)) => Ok(None),
        Some(Err(DatasetError::Decode { source, .. })) => Ok(Some(source.to_string())),
        Some(Err(error)) => Err(error),
    };
    let reasons: Vec<Result<Option<String>, DatasetError>> =
        (0..whole.len()).into_par_iter().map(reason).collect();
    let (mut indices, mut skipped) = (Vec::new(), Vec::new());
    for (index, reason) in reasons.into_iter().enumerate() {
        match reason? {
            None => indices.push(index),
            Some(reason) => skipped.push(Skipped { image: whole.describe(index), reason }),
        }
    }
    if skipped.is_empty() {
        return Ok((whole, skipped));
    }
    Ok((Box::new(Chosen::new(whole, indices)), skipped))
}

#[cfg(test)]
mod tests {
    use super::super::registry::{DatasetSpec, open};
    use super::*;

    #[test]
    fn broken_images_are_left_out_and_told() {
        let folder = tempfile::tempdir().unwrap();
        for (name, value) in [("a/1.png", 1), ("a/2.png", 2), ("b/3.png", 3)] {
            let path = folder.path().join(name);
            fs_err::create_dir_all(path.parent().unwrap()).unwrap();
            image::GrayImage::from_pixel(2, 2, image::Luma([value])).save(path).unwrap();
        }
        let spec = DatasetSpec {
            format: "folder".into(),
            paths: [("path".to_owned(), folder.path().to_owned())].into(),
            ..DatasetSpec::default()
        };
        let (all, skipped) = readable(open(&spec).unwrap(), &|| false).unwrap();
        assert_eq!((all.len(), skipped.len()), (3, 0));

        fs_err::write(folder.path().join("a/2.png"), b"\xff\xd8\xff\xd9").unwrap();
        let (rest, skipped) = readable(open(&spec).unwrap(), &|| false).unwrap();
        assert_eq!((rest.labels(), rest.classes().unwrap().len()), (&[0, 1][..], 2));
        assert_eq!((rest.image(1).unwrap().pixels()[0], skipped.len()), (3, 1));
        assert!(skipped[0].image.ends_with("a/2.png`") && rest.describe(1).ends_with("b/3.png`"));
        assert_eq!(skipped[0].reason, "it is damaged: it holds no image");

        let open = open(&spec).unwrap();
        fs_err::remove_file(folder.path().join("b/3.png")).unwrap();
        let gone = readable(open, &|| false).err().unwrap().to_string();
        assert!(gone.contains("b/3.png"), "{gone}");
    }
}
