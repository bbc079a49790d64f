//! Images that two datasets share: a test set that was trained on, or used for choosing, tells nothing.
//!
//! Images are compared by what they decode to, so the same image is found in another container, under another name, or with another label.

use std::collections::HashMap;

use rayon::prelude::*;

use super::registry::Dataset;

/// What two datasets share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// Images of the first that are in the second too.
    pub images: usize,
    /// Descriptions of the first such image, in either.
    pub example: Option<(String, String)>,
}

/// Finds images of `scored` that are also in `used`. Decodes all images of both once, on the current rayon pool; what cannot be decoded is shared with
/// nothing. Once `cancelled`, what was found so far.
pub fn overlap(scored: &dyn Dataset, used: &dyn Dataset, cancelled: &(dyn Fn() -> bool + Sync)) -> Overlap {
    let mut places: HashMap<blake3::Hash, usize> = HashMap::new();
    for (index, digest) in digests(used, cancelled).into_iter().enumerate() {
        if let Some(digest) = digest {
            places.entry(digest).or_insert(index);
        }
    }
    let found = digests(scored, cancelled).into_iter().enumerate();
    let shared: Vec<(usize, usize)> =
        found.filter_map(|(index, digest)| Some((index, *places.get(&digest?)?))).collect();
    let example = shared.first().map(|&(a, b)| (scored.describe(a), used.describe(b)));
    Overlap { images: shared.len(), example }
}

fn digests(dataset: &dyn Dataset, cancelled: &(dyn Fn() -> bool + Sync)) -> Vec<Option<blake3::Hash>> {
    let digest = |index| {
        let image = (!cancelled()).then(|| dataset.image(index).ok()).flatten()?;
        let mut hasher = blake3::Hasher::new();
        for size in [image.height(), image.width()] {
            hasher.update(&(size as u64).to_le_bytes());
        }
        // Grey as RGB is the same image.
        if image.channels() == 1 {
            let rgb: Vec<u8> = image.pixels().iter().flat_map(|&value| [value; 3]).collect();
            hasher.update(&rgb);
        } else {
            hasher.update(image.pixels());
        }
        Some(hasher.finalize())
    };
    (0..dataset.len()).into_par_iter().map(digest).collect()
}

#[cfg(test)]
mod tests {
    use super::super::registry::{DatasetSpec, open};
    use super::*;
    use image::{GrayImage, Luma, RgbImage};

    #[test]
    fn the_same_image_is_found_under_another_name_and_in_another_container() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| {
            let path = folder.path().join(name);
            fs_err::create_dir_all(path.parent().unwrap()).unwrap();
            path
        };
        let grey = |value| GrayImage::from_pixel(3, 2, Luma([value]));
        grey(1).save(at("test/a/1.png")).unwrap();
        grey(2).save(at("test/a/2.png")).unwrap();
        grey(2).save(at("test/b/again.png")).unwrap();
        RgbImage::from_pixel(3, 2, image::Rgb([2, 2, 2])).save(at("train/a/x.bmp")).unwrap();
        GrayImage::from_pixel(2, 3, Luma([1])).save(at("train/a/turned.png")).unwrap();
        fs_err::write(at("train/a/zz.png"), "broken").unwrap();
        let spec = |split: &str| DatasetSpec {
            format: "folder".into(),
            paths: [("path".to_owned(), folder.path().to_owned())].into(),
            split: Some(split.to_owned()),
            ..DatasetSpec::default()
        };
        let (test, train) = (open(&spec("test")).unwrap(), open(&spec("train")).unwrap());
        let found = overlap(&*test, &*train, &|| false);
        assert_eq!(found.images, 2);
        let (scored, used) = found.example.unwrap();
        assert!(scored.ends_with("test/a/2.png`") && used.ends_with("train/a/x.bmp`"), "{scored} {used}");
        assert_eq!(overlap(&*test, &*test, &|| true), Overlap { images: 0, example: None });
    }
}
