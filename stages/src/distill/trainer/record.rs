//! What training has to tell: kept beside the result as `training.json`.

use crate::StageError;
use merganser_cache::{Blob, Staging};
use serde::{Deserialize, Serialize};
use std::io::Write;

/// The name of the blob.
pub const TRAINING: &str = "training.json";

/// A gradient norm above this counts as exploding.
const EXPLODING: f64 = 100.0;

/// A gradient norm below this counts as vanishing.
const VANISHING: f64 = 1e-6;

/// A training run, step by step and epoch by epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Images that were trained on, and those for validation.
    pub images: u64,
    pub validation_images: u64,
    /// Values that were trained, and those of the tensors that were not.
    pub trained_values: u64,
    pub frozen_values: u64,
    /// By step: the loss, the learning rate, and the norm of all gradients together before it was clipped.
    pub losses: Vec<f32>,
    pub rates: Vec<f32>,
    pub gradient_norms: Vec<f32>,
    /// Before the first step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial: Option<Validation>,
    pub epochs: Vec<Epoch>,
    /// The epoch whose weights were kept.
    pub kept: u64,
    /// Whether it ended because validation did not get better.
    pub stopped_early: bool,
    pub gradients: GradientSummary,
}

/// One pass over the images.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Epoch {
    /// From 1.
    pub epoch: u64,
    /// Steps until its end.
    pub steps: u64,
    /// Mean over its images.
    pub loss: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<Validation>,
}

/// How good a model is on images that are not trained on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Validation {
    pub loss: f64,
    pub accuracy: f64,
}

/// The norms of gradients over all steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GradientSummary {
    pub mean: f64,
    pub std: f64,
    pub min: f64,
    pub max: f64,
    /// Steps with a norm above 100.
    pub exploding: u64,
    /// Steps with a norm below 1e-6.
    pub vanishing: u64,
    /// 1 / (1 + std / mean): 1 if all are equal.
    pub stability: f64,
}

impl GradientSummary {
    pub(super) fn of(norms: &[f32]) -> Self {
        if norms.is_empty() {
            return Self::default();
        }
        let values = || norms.iter().map(|&norm| f64::from(norm));
        let n = norms.len() as f64;
        let mean = values().sum::<f64>() / n;
        let std = (values().map(|norm| (norm - mean).powi(2)).sum::<f64>() / n).sqrt();
        Self {
            mean,
            std,
            min: values().fold(f64::INFINITY, f64::min),
            max: values().fold(0.0, f64::max),
            exploding: values().filter(|norm| *norm > EXPLODING).count() as u64,
            vanishing: values().filter(|norm| *norm < VANISHING).count() as u64,
            stability: if mean > 0.0 { 1.0 / (1.0 + std / mean) } else { 0.0 },
        }
    }
}

impl Training {
    /// Reads the blob; `None` if it is not one.
    pub fn from_json(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }

    pub(crate) fn write(&self, staging: &Staging) -> Result<Blob, StageError> {
        let mut writer = staging.writer(TRAINING)?;
        writer.write_all(&serde_json::to_vec(self).expect("numbers can be written"))?;
        Ok(writer.finish()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_are_summed_up() {
        let found = GradientSummary::of(&[1.0, 3.0, 200.0, 0.0]);
        assert_eq!((found.mean, found.min, found.max), (51.0, 0.0, 200.0));
        let std = ((2500.0 + 2304.0 + 22201.0 + 2601.0) / 4.0f64).sqrt();
        assert!((found.std - std).abs() < 1e-12);
        assert_eq!((found.exploding, found.vanishing), (1, 1));
        assert!((found.stability - 51.0 / (51.0 + std)).abs() < 1e-12);
        assert_eq!(GradientSummary::of(&[2.0; 5]).stability, 1.0);
        assert_eq!(GradientSummary::of(&[]), GradientSummary::default());
    }
}
