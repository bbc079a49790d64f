//! Everything that can go wrong, with the file, the tensor, and expected against actual.

use std::io;
use std::path::PathBuf;

use crate::DType;
use crate::formats::FormatProblem;
use crate::kernels::quantize::QuantizeError;
use crate::keymap::KeymapError;
use crate::lora::LoraProblem;
use crate::manifest::ManifestProblem;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The message of the system, which names the path.
    #[error(transparent)]
    Io(#[from] io::Error),

    #[error("checkpoint `{}` cannot be used: {problem}", path.display())]
    Format { path: PathBuf, problem: Box<FormatProblem> },

    #[error("cannot read {length} bytes at offset {offset} of `{file}`{}", why_read_failed(*file_size, *offset, *length))]
    Read {
        file: String,
        offset: u64,
        length: u64,
        file_size: u64,
        #[source]
        source: io::Error,
    },

    #[error("`{file}` changed while it was being read: {change}")]
    SourceChanged { file: String, change: String },

    #[error("the description of an artifact is not valid: {0}")]
    Manifest(#[from] Box<ManifestProblem>),

    #[error("tensor `{tensor}` holds {dtype} values, which are not read as f32")]
    NotFloat { tensor: String, dtype: DType },

    #[error("tensor `{tensor}` has {available} {unit}, asked for {start} to {end}")]
    OutOfBounds { tensor: String, unit: &'static str, start: u64, end: u64, available: u64 },

    #[error("tensor `{tensor}` is not finite: element {element} is {value}")]
    NotFinite { tensor: String, element: usize, value: f32 },

    #[error("tensor `{tensor}` does not fit {dtype}: element {element} is {value}")]
    DoesNotFit { tensor: String, dtype: DType, element: usize, value: f32 },

    #[error("LoRA adapter `{}` cannot be used: {problem}", path.display())]
    Adapter { path: PathBuf, problem: Box<LoraProblem> },

    /// Names that cannot be mapped.
    #[error(transparent)]
    Keymap(#[from] Box<KeymapError>),

    #[error("tensor `{tensor}` cannot be quantized: {problem}")]
    Quantize { tensor: String, problem: QuantizeError },

    #[error("tensor `{tensor}` cannot be written: {problem}")]
    Output { tensor: String, problem: OutputProblem },

    #[error("the header for {tensors} tensors takes {bytes} bytes, more than readers accept: {limit}")]
    OutputHeaderTooLarge { tensors: usize, bytes: usize, limit: u64 },

    #[error("cancelled")]
    Cancelled,
}

/// Why a list of output tensors is refused before anything is written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OutputProblem {
    #[error("the name appears twice")]
    DuplicateName,
    #[error("the name is reserved by the file format")]
    ReservedName,
    #[error("its shape {0:?} has more elements than can be addressed")]
    TooLarge(Vec<usize>),
    #[error("computed values are stored as F32, F16 or BF16, not as {0}")]
    NotStorable(DType),
    #[error("{0}")]
    Encoding(String),
}

impl Error {
    /// A finding about the adapter at `path`.
    pub(crate) fn adapter(path: impl Into<PathBuf>, problem: LoraProblem) -> Self {
        Self::Adapter { path: path.into(), problem: Box::new(problem) }
    }

    /// A finding about the checkpoint at `path`.
    pub(crate) fn format(path: impl Into<PathBuf>, problem: FormatProblem) -> Self {
        Self::Format { path: path.into(), problem: Box::new(problem) }
    }
}

impl From<KeymapError> for Error {
    fn from(problem: KeymapError) -> Self {
        Self::Keymap(Box::new(problem))
    }
}

impl From<ManifestProblem> for Error {
    fn from(problem: ManifestProblem) -> Self {
        Self::Manifest(Box::new(problem))
    }
}

fn why_read_failed(file_size: u64, offset: u64, length: u64) -> String {
    if offset.saturating_add(length) > file_size {
        format!(", which has only {file_size}")
    } else {
        String::new()
    }
}
