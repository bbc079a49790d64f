//! Images of one size in one block of memory, as the formats that are a single array give them.

use std::path::PathBuf;

use super::error::DatasetError;
use super::image_type::Image;
use super::registry::{Dataset, DatasetSpec};

/// Images of one size with their labels.
pub(super) struct Stack {
    /// What messages name.
    pub path: PathBuf,
    pub height: usize,
    pub width: usize,
    /// 1 or 3.
    pub channels: usize,
    /// `[image][row][column][channel]`
    pub pixels: Vec<u8>,
    pub labels: Vec<u32>,
    pub classes: Option<Vec<String>>,
}

impl Stack {
    /// Keeps the first images if there is a limit, and checks what every dataset promises: some images, and labels below the number of
    /// classes.
    pub(super) fn checked(mut self, spec: &DatasetSpec) -> Result<Box<dyn Dataset>, DatasetError> {
        if self.labels.is_empty() || self.height == 0 || self.width == 0 {
            return Err(DatasetError::Empty { path: self.path });
        }
        let n = spec.limit.map_or(self.labels.len(), |limit| limit.min(self.labels.len()));
        self.labels.truncate(n);
        self.pixels.truncate(n * self.height * self.width * self.channels);
        self.pixels.shrink_to_fit();
        check_labels(&self.path, &self.labels, self.classes.as_deref())?;
        Ok(Box::new(self))
    }
}

/// Fails when a label has no class.
pub(super) fn check_labels(
    path: &std::path::Path,
    labels: &[u32],
    classes: Option<&[String]>,
) -> Result<(), DatasetError> {
    let Some(classes) = classes.map(<[String]>::len) else { return Ok(()) };
    match labels.iter().position(|&label| label as usize >= classes) {
        None => Ok(()),
        Some(index) => {
            let (path, label) = (path.to_owned(), labels[index]);
            Err(DatasetError::LabelOutOfRange { path, index, label, classes })
        }
    }
}

impl Dataset for Stack {
    fn labels(&self) -> &[u32] {
        &self.labels
    }

    fn image(&self, index: usize) -> Result<Image, DatasetError> {
        let bytes = self.height * self.width * self.channels;
        let pixels = self
            .pixels
            .chunks_exact(bytes)
            .nth(index)
            .ok_or(DatasetError::IndexOutOfRange { index, len: self.labels.len() })?;
        Ok(Image::new(self.height, self.width, self.channels, pixels.to_vec()))
    }

    fn classes(&self) -> Option<&[String]> {
        self.classes.as_deref()
    }

    fn describe(&self, index: usize) -> String {
        format!("image {index} of `{}`", self.path.display())
    }
}
