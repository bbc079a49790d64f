//! What tuning has to tell: kept beside the merged checkpoint.

use crate::StageError;
use merganser_cache::{Blob, Staging};
use serde::{Deserialize, Serialize};
use std::io::Write;

/// The name of the blob.
pub const ADAPTATION: &str = "adaptation.json";

/// Coefficients that were tuned, and how it went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adaptation {
    pub tasks: Vec<String>,
    /// One entry per tensor, or a single one without a name if coefficients are per task.
    pub coefficients: Vec<TunedTensor>,
    /// By step, the mean entropy of the answers to every task's batch, in nats.
    pub entropies: Vec<Vec<f32>>,
}

/// The coefficients of a tensor, in the order of the tasks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TunedTensor {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensor: Option<String>,
    pub values: Vec<f32>,
}

impl Adaptation {
    /// Reads the blob; `None` if it is not one.
    pub fn from_json(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }

    pub(super) fn write(&self, staging: &Staging) -> Result<Blob, StageError> {
        let mut writer = staging.writer(ADAPTATION)?;
        let json = serde_json::to_vec(self).map_err(|error| StageError::Internal(error.to_string()))?;
        writer.write_all(&json)?;
        Ok(writer.finish()?)
    }
}
