//! What can be wrong with a preprocessing configuration, or with an image it is applied to.

use super::super::dataset::DatasetError;

/// Why a configuration is refused or an image cannot be preprocessed.
#[derive(Debug, thiserror::Error)]
pub enum PreprocessError {
    /// The message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("`{origin}` is not valid JSON")]
    Json { origin: String, source: serde_json::Error },
    #[error("`{origin}`: `{field}` must be {expected}, found {found}")]
    Field { origin: String, field: String, expected: String, found: String },
    #[error("`{origin}`: `{field}` = {found} is not supported; it would change the pixels")]
    Unsupported { origin: String, field: &'static str, found: String },

    #[error("`{field}` must be {expected}, found {found}")]
    Config { field: &'static str, expected: &'static str, found: String },
    #[error("{image} has {actual} channels, `{field}` has {expected} values")]
    Channels { image: String, field: &'static str, expected: usize, actual: usize },
    #[error("{image} would be resized to {height}x{width} pixels; the most is {most} pixels")]
    TooLarge { image: String, height: usize, width: usize, most: usize },
    #[error(
        "{image} becomes {actual} (channels x height x width), others in the batch {expected}; \
         set an exact size or a crop"
    )]
    Ragged { image: String, expected: String, actual: String },
    #[error("images {start}..{end} were asked for, the dataset holds {len}")]
    Range { start: usize, end: usize, len: usize },
    #[error(transparent)]
    Dataset(#[from] DatasetError),
}
