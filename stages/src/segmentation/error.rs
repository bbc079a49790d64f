//! Everything that can be wrong with annotated images, each with the file it is wrong in.

use super::rle::RleError;
use crate::images::dataset::DatasetError;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum SegmentationError {
    /// The message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Image(#[from] DatasetError),
    #[error("unknown format `{format}`; known formats of masks: {known}")]
    UnknownFormat { format: String, known: String },
    #[error("there are no annotated images in `{}`: {expected}", path.display())]
    Nothing { path: PathBuf, expected: &'static str },
    #[error("`{}` is missing: {needed_by} needs it", path.display())]
    Missing { path: PathBuf, needed_by: String },
    #[error(
        "`{}` is a video, which cannot be decoded here: extract its frames to `{}/00000.jpg`, `00001.jpg`, … (24 a second)",
        path.display(),
        path.with_extension("").display()
    )]
    Video { path: PathBuf },
    #[error("`{}`: {reason}", path.display())]
    Annotation { path: PathBuf, reason: String },
    #[error("`{}`: the mask of object `{object}`: {source}", path.display())]
    Mask { path: PathBuf, object: String, source: RleError },
    #[error("`{}`: the mask of object `{object}` is empty: there is nothing to find", path.display())]
    EmptyMask { path: PathBuf, object: String },
    #[error(
        "`{}`: the {what} of object `{object}` lies outside the image of {width}x{height} pixels: {found}",
        path.display()
    )]
    Outside { path: PathBuf, object: String, what: &'static str, width: usize, height: usize, found: String },
    #[error("`{}` is {}x{} pixels, its image {}x{}", path.display(), found.1, found.0, expected.1, expected.0)]
    Size { path: PathBuf, expected: (usize, usize), found: (usize, usize) },
    #[error("cannot decode `{}`", path.display())]
    Png { path: PathBuf, source: png::DecodingError },
}
