//! Why a unit could not do its work.

use crate::images::dataset::DatasetError;
use crate::images::metrics::MetricsError;
use crate::images::preprocess::PreprocessError;
use crate::segmentation::SegmentationError;
use blake3::Hash;
use std::error::Error as _;
use std::path::PathBuf;

/// What went wrong; the caller adds the stage's name.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    #[error(transparent)]
    Tensors(merganser_tensors::Error),
    #[error(transparent)]
    Cache(merganser_cache::Error),
    #[error(transparent)]
    Graph(#[from] merganser_onnx::GraphError),
    #[error(transparent)]
    Runtime(#[from] merganser_onnx::RuntimeError),
    #[error(transparent)]
    Provision(#[from] merganser_onnx::provision::ProvisionError),
    #[error(transparent)]
    Weights(#[from] merganser_onnx::WeightsError),
    #[error(transparent)]
    Gradient(Box<merganser_onnx::gradient::GradientError>),
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error(transparent)]
    Preprocess(#[from] PreprocessError),
    #[error(transparent)]
    Segmentation(Box<SegmentationError>),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("`{parameter}`: no such file or folder: `{}`", path.display())]
    MissingFile { parameter: String, path: PathBuf },
    /// Inputs that do not fit each other or the parameters; the text names tensors, expected and actual.
    #[error("{message}")]
    Input { message: String, help: Option<String> },
    #[error("stored inputs are damaged: {}", artifacts.iter().map(|hash| hash.to_hex()[..12].to_owned()).collect::<Vec<_>>().join(", "))]
    DamagedInputs { artifacts: Vec<Hash> },
    #[error("interrupted")]
    Cancelled,
    #[error("internal error: {0}; please report this")]
    Internal(String),
}

impl StageError {
    /// Inputs that do not fit.
    pub fn input(message: impl Into<String>) -> Self {
        Self::Input { message: message.into(), help: None }
    }

    /// Inputs that do not fit, and what to do about it.
    pub fn input_help(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self::Input { message: message.into(), help: Some(help.into()) }
    }

    /// What to do about it, if we know.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Input { help, .. } => help.clone(),
            Self::MissingFile { .. } => {
                Some("relative paths are relative to the file they are written in".to_owned())
            }
            Self::Io(error) | Self::Tensors(merganser_tensors::Error::Io(error))
                if error.kind() == std::io::ErrorKind::StorageFull =>
            {
                Some("free some space, or choose another cache folder with `--cache DIR`".to_owned())
            }
            _ => None,
        }
    }

    /// The stable code under which it is reported when it is found before a run.
    pub fn code(&self) -> &'static str {
        match self {
            Self::MissingFile { .. } => "missing-file",
            Self::Io(_)
            | Self::Tensors(_)
            | Self::Dataset(_)
            | Self::Segmentation(_)
            | Self::Preprocess(_)
            | Self::Graph(_) => "unreadable-file",
            _ => "bad-input",
        }
    }

    /// The message with its causes: `what: why: why`.
    pub fn with_causes(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let message = error.to_string();
            if !text.ends_with(&message) {
                text = format!("{text}: {message}");
            }
            cause = error.source();
        }
        text
    }
}

impl From<merganser_onnx::gradient::GradientError> for StageError {
    fn from(error: merganser_onnx::gradient::GradientError) -> Self {
        Self::Gradient(Box::new(error))
    }
}

impl From<SegmentationError> for StageError {
    fn from(error: SegmentationError) -> Self {
        Self::Segmentation(Box::new(error))
    }
}

impl From<merganser_cache::Error> for StageError {
    fn from(error: merganser_cache::Error) -> Self {
        match error {
            merganser_cache::Error::Cancelled { .. } => Self::Cancelled,
            other => Self::Cache(other),
        }
    }
}

impl From<merganser_tensors::Error> for StageError {
    fn from(error: merganser_tensors::Error) -> Self {
        match error {
            merganser_tensors::Error::Cancelled => Self::Cancelled,
            other => Self::Tensors(other),
        }
    }
}

impl From<crate::params::NotAKey> for StageError {
    fn from(error: crate::params::NotAKey) -> Self {
        Self::Internal(error.to_string())
    }
}
