//! Everything that can be wrong with a dataset, each with the file it is wrong in.

use std::path::PathBuf;

use super::decode::DecodeError;

/// Why a dataset cannot be opened or one of its images cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    #[error("unknown dataset format `{format}`; known formats: {known}")]
    UnknownFormat { format: String, known: String },
    #[error("dataset `{dataset}`: format `{format}` needs the path `{parameter}`")]
    MissingPath { dataset: String, format: &'static str, parameter: &'static str },
    #[error("dataset `{dataset}`: format `{format}` has no path `{parameter}`; it takes {known}")]
    UnknownPath { dataset: String, format: &'static str, parameter: String, known: String },
    #[error("dataset `{dataset}`: `limit` and `subset.n` must be at least 1")]
    ZeroLimit { dataset: String },
    #[error("dataset `{dataset}`: `limit` and `subset` exclude each other")]
    LimitAndSubset { dataset: String },
    #[error("dataset `{dataset}`: class `{class}` is listed twice")]
    DuplicateClass { dataset: String, class: String },

    /// The message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("cannot read `{}`", path.display())]
    Read { path: PathBuf, source: std::io::Error },

    #[error("`{}` is not an idx file of unsigned bytes: expected it to start with 00 00 08, found {found}", path.display())]
    IdxMagic { path: PathBuf, found: String },
    #[error("idx file `{}` holds {what}: expected {expected} dimensions, found {actual}", path.display())]
    IdxDimensions { path: PathBuf, what: &'static str, expected: &'static str, actual: usize },
    #[error("idx file `{}`: expected images of 1 or 3 channels, found {actual}", path.display())]
    IdxChannels { path: PathBuf, actual: usize },
    #[error("idx file `{}` ends inside its header: expected {expected} bytes, found {actual}", path.display())]
    IdxHeader { path: PathBuf, expected: usize, actual: usize },
    #[error(
        "idx file `{}`: the header {dims:?} claims {expected} bytes of data, the file holds {actual}",
        path.display()
    )]
    IdxSize { path: PathBuf, dims: Vec<u32>, expected: u128, actual: String },
    #[error(
        "`{}` and `{}` do not belong together: {images_count} images, {labels_count} labels",
        images.display(), labels.display()
    )]
    CountMismatch { images: PathBuf, labels: PathBuf, images_count: usize, labels_count: usize },
    #[error("`{}` holds no images", path.display())]
    Empty { path: PathBuf },
    #[error("`{}`: image {index} has label {label}, but there are {classes} classes", path.display())]
    LabelOutOfRange { path: PathBuf, index: usize, label: u32, classes: usize },

    #[error("`{}` has no directory for class {}; found {found}", root.display(), quoted(missing))]
    MissingClasses { root: PathBuf, missing: Vec<String>, found: String },
    #[error("`{}` has directories that are not in `classes`: {}", root.display(), quoted(unknown))]
    UnknownClasses { root: PathBuf, unknown: Vec<String> },
    #[error("`{}` has no class directories", root.display())]
    NoClasses { root: PathBuf },
    #[error("class directory `{}` holds no images", path.display())]
    EmptyClass { path: PathBuf },
    #[error("cannot read `{}`: images with the extension `{extension}` are not supported", path.display())]
    UnsupportedImage { path: PathBuf, extension: String },
    #[error("the name of `{}` is not valid Unicode", path.display())]
    NotUnicode { path: PathBuf },
    #[error("cannot decode {name}")]
    Decode { name: String, source: DecodeError },

    #[error("`split` chooses files of a folder, but `{}` is a file", path.display())]
    SplitOfFile { path: PathBuf },
    #[error("`{}` has no split `{split}`; there is {known}", path.display())]
    UnknownSplit { path: PathBuf, split: String, known: String },
    #[error("there is no file of the split in `{}`", path.display())]
    NoBatches { path: PathBuf },
    #[error("`{}` is not a file of CIFAR-10 (3073 bytes an image) or CIFAR-100 (3074): it has {actual} bytes", path.display())]
    CifarSize { path: PathBuf, actual: u64 },
    #[error("`{}` is not a NumPy archive: {reason}", path.display())]
    NotAnArchive { path: PathBuf, reason: String },
    #[error("array `{member}` of `{}`: {reason}", path.display())]
    Npz { path: PathBuf, member: String, reason: String },
    #[error("parquet file `{}`: {reason}", path.display())]
    Parquet { path: PathBuf, reason: String },

    #[error("list `{}`: {reason}", path.display())]
    List { path: PathBuf, reason: String },
    #[error(
        "`{}`: image {index} has label `{label}`, which is neither the name nor the number of one of the {classes} classes",
        path.display()
    )]
    UnknownLabel { path: PathBuf, index: usize, label: String, classes: usize },
    #[error("shard `{}`: {reason}", path.display())]
    WebDataset { path: PathBuf, reason: String },
    #[error("pattern `{pattern}`: {reason}")]
    Pattern { pattern: String, reason: String },
    #[error("`{}`: {reason}", path.display())]
    Matlab { path: PathBuf, reason: String },

    #[error("`{}` is new in its dataset: it was not there when the run was planned", path.display())]
    Changed { path: PathBuf },

    #[error("image {index} was asked for, the dataset holds {len}")]
    IndexOutOfRange { index: usize, len: usize },
}

fn quoted(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
