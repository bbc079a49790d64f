//! What can go wrong with a graph file.

use std::path::PathBuf;

use crate::tensor::WeightsError;

/// An ONNX file that cannot be used, or a binding that does not belong to it.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    /// The message of `fs-err` names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("`{path}` is not a readable ONNX file: {reason}")]
    NotOnnx { path: PathBuf, reason: String },
    #[error("`{path}`: {source}")]
    InFile {
        path: PathBuf,
        #[source]
        source: Box<GraphError>,
    },
    #[error("tensor `{tensor}` holds {actual}, but {what}")]
    TensorSize { tensor: String, what: String, actual: usize },
    #[error("tensor `{tensor}` has impossible dimensions {dims:?}")]
    BadShape { tensor: String, dims: Vec<i64> },
    #[error("tensor `{tensor}` claims more values than any memory holds")]
    TooLarge { tensor: String },
    #[error("tensor `{tensor}` is stored in `{location}`, which is outside the folder of the graph")]
    ExternalEscape { tensor: String, location: String },
    #[error("tensor `{tensor}` has a broken reference to external data: {reason}")]
    ExternalReference { tensor: String, reason: String },
    #[error("tensor `{tensor}` ends at byte {end} of `{path}`, which has {actual} bytes")]
    ExternalTooShort { tensor: String, path: PathBuf, end: u64, actual: u64 },
    #[error("it uses operator set {version}; a model can be written for {oldest} or later")]
    OldOpset { version: i64, oldest: i64 },
    #[error("the binding belongs to another graph: it was made for {expected}, this one is {actual}")]
    OtherGraph { expected: String, actual: String },
    #[error("the binding names tensor `{tensor}`, which the graph does not have")]
    NoSuchTensor { tensor: String },
    #[error("the graph has no value `{value}`")]
    NoSuchValue { value: String },
    #[error(transparent)]
    Weights(#[from] WeightsError),
}
