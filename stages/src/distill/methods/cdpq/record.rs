//! What a progressive reduction did, decision by decision: kept beside the student as `cdpq.json`.

use super::activations::QuantizedActivation;
use super::confidence::Reduction;
use crate::StageError;
use merganser_cache::{Blob, Staging};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;

/// The name of the blob.
pub const PROGRESS: &str = "cdpq.json";

/// The blob of the student in floats.
pub const FLOAT_STUDENT: &str = "student.safetensors";

/// A run of `cdpq`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BitReductions {
    /// The layers with the widths that they ended with, in the order of computation.
    pub layers: Vec<LayerWidth>,
    /// The average width of layers, whatever their sizes.
    pub average_bits: f64,
    /// The average width of the weights of these layers.
    pub bits_per_weight: f64,
    /// The student's loss on the images for validation, in the end.
    pub loss: f64,
    /// Activations that were rounded, too, while it was trained.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub activations: Vec<QuantizedActivation>,
    pub epochs: Vec<EpochWidths>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerWidth {
    pub name: String,
    pub tensor: String,
    pub bits: u8,
    /// Rows of the tensor; parts of one tensor follow each other.
    pub rows: u64,
    pub weights: u64,
}

/// One pass over the images, and the reduction after it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EpochWidths {
    /// From 1.
    pub epoch: u64,
    /// Mean over its images.
    pub loss: f64,
    /// What the mean is made of: by feature, weighted, and `logits`.
    pub contributions: BTreeMap<String, f64>,
    /// Nothing where there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reduction: Option<Reduction>,
    /// After the reduction.
    pub average_bits: f64,
    pub bits_per_weight: f64,
}

impl BitReductions {
    /// Reads the blob; `None` if it is not one.
    pub fn from_json(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }

    pub(super) fn write(&self, staging: &Staging) -> Result<Blob, StageError> {
        let mut writer = staging.writer(PROGRESS)?;
        writer.write_all(&serde_json::to_vec(self).expect("numbers can be written"))?;
        Ok(writer.finish()?)
    }
}
