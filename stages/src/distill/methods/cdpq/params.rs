//! The parameters of `cdpq`, with the authors' defaults.

use super::confidence::{Confidence, Policy};
use crate::filter::{NameFilter, NameGlob};
use crate::params::Problem;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The widths that `quantize` knows for signed codes, less the widest.
const WIDTHS: std::ops::RangeInclusive<u8> = 2..=8;

#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CdpqParams {
    /// Which layers are quantized, by the tensors of their weights: `{ skip = ["head.*"] }` (default: all that are linear or convolutions).
    #[serde(default)]
    pub(super) layers: NameFilter,
    /// Whether queries, keys and values of a fused projection have widths of their own.
    #[serde(default)]
    pub(super) split_qkv: bool,
    /// The width that all layers begin with, 2 to 8.
    #[serde(default = "usual_start")]
    pub(super) start_bits: u8,
    /// The width that no layer falls below.
    #[serde(default = "usual_min")]
    pub(super) min_bits: u8,
    /// No more bits are taken once this is the average over the weights of quantized layers (default: as far as the loss allows).
    #[serde(default)]
    pub(super) target_bits: Option<f64>,
    /// Epochs from one reduction to the next.
    #[serde(default = "usual_interval")]
    pub(super) reduce_every: u32,
    /// Epochs at the end without a reduction, in which the student gets used to its widths.
    #[serde(default)]
    pub(super) settle: u32,
    /// What makes a layer a candidate for one bit less: its losses' mean (`baseline`), also their `variance`, or their `trend`.
    #[serde(default)]
    pub(super) confidence: Confidence,
    /// The largest mean of a candidate's losses.
    #[serde(default = "usual_layer_threshold")]
    pub(super) layer_threshold: f64,
    /// The largest variance, of `confidence = "variance"`.
    #[serde(default = "usual_variance_threshold")]
    pub(super) variance_threshold: f64,
    /// By which share of their mean losses may rise per step, of `confidence = "trend"`.
    #[serde(default)]
    pub(super) slope_threshold: f64,
    /// By which share of itself the loss of the student may grow when a layer loses a bit; else the bit comes back.
    #[serde(default = "usual_impact_threshold")]
    pub(super) impact_threshold: f64,
    /// What names of candidates begin with (default: anything).
    #[serde(default)]
    pub(super) target_roots: Vec<String>,
    /// Added to the loss per bit of the average over layers, where a reduction is decided.
    #[serde(default)]
    pub(super) bit_penalty: f64,
    /// Added to the loss per bit of the average over weights, which is what bytes follow.
    #[serde(default)]
    pub(super) byte_penalty: f64,
    /// What student and teacher are compared by: the first so many layers, `all` layers, or a list of layers (globs), nodes and values of the
    /// graph. Only layers that are compared can lose bits.
    #[serde(default)]
    pub(super) features: Features,
    /// How they are compared.
    #[serde(default)]
    pub(super) losses: LossParams,
    /// Round what layers multiply, too, in steps that are learned: `{ bits = 8 }` (default: activations stay floats).
    #[serde(default)]
    pub(super) activations: Option<ActivationParams>,
}

/// How activations are rounded.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ActivationParams {
    /// Bits per activation, 2 to 8.
    #[serde(default = "usual_start")]
    pub(super) bits: u8,
    /// Only of layers whose name matches one of these globs (default: all that are quantized).
    #[serde(default)]
    pub(super) only: Vec<NameGlob>,
    /// Not of layers whose name matches one of these globs.
    #[serde(default)]
    pub(super) skip: Vec<NameGlob>,
}

/// What is compared.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum Features {
    First(usize),
    Choice(FeatureChoice),
    Named(Vec<String>),
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum FeatureChoice {
    All,
}

impl Default for Features {
    fn default() -> Self {
        Self::First(8)
    }
}

/// How student and teacher are compared; a loss of weight 0 is not computed.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LossParams {
    /// Weight of the statistics of features: squared errors of means and variances over space.
    #[serde(default = "usual_statistics")]
    pub(super) statistics: f64,
    /// Weight of the affinity between channels.
    #[serde(default)]
    pub(super) affinity: f64,
    /// Weight of the squared error of features.
    #[serde(default)]
    pub(super) features: f64,
    /// Weight of the divergence of logits.
    #[serde(default)]
    pub(super) logits: f64,
    /// Temperature of the divergence.
    #[serde(default = "usual_temperature")]
    pub(super) temperature: f64,
    /// Weights of single features: `[{ match = "blocks.5.*", weight = 2.0 }]`; the first that matches counts.
    #[serde(default)]
    pub(super) weights: Vec<FeatureWeight>,
}

#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct FeatureWeight {
    /// A glob over names of features.
    #[serde(rename = "match")]
    name: NameGlob,
    weight: f64,
}

impl Default for LossParams {
    fn default() -> Self {
        Self {
            statistics: usual_statistics(),
            affinity: 0.0,
            features: 0.0,
            logits: 0.0,
            temperature: usual_temperature(),
            weights: Vec::new(),
        }
    }
}

fn usual_start() -> u8 {
    8
}

fn usual_min() -> u8 {
    4
}

fn usual_interval() -> u32 {
    1
}

fn usual_layer_threshold() -> f64 {
    0.1
}

fn usual_variance_threshold() -> f64 {
    0.05
}

fn usual_impact_threshold() -> f64 {
    0.3
}

fn usual_statistics() -> f64 {
    1.0
}

fn usual_temperature() -> f64 {
    1.0
}

impl LossParams {
    /// What the losses of a feature are multiplied with.
    pub(super) fn weight(&self, feature: &str) -> f32 {
        self.weights.iter().find(|rule| rule.name.matches(feature)).map_or(1.0, |rule| rule.weight as f32)
    }
}

impl ActivationParams {
    pub(super) fn admits(&self, layer: &str) -> bool {
        let filter = NameFilter { only: self.only.clone(), skip: self.skip.clone() };
        filter.admits(layer)
    }
}

impl CdpqParams {
    /// What is wrong with the values, with the key.
    pub(super) fn problems(&self) -> Vec<(&'static str, Problem)> {
        let mut problems = Vec::new();
        let mut bad = |key: &'static str, message: String| {
            problems.push((key, Problem::new("bad-value", message)));
        };
        for (key, bits) in [("start_bits", self.start_bits), ("min_bits", self.min_bits)] {
            if !WIDTHS.contains(&bits) {
                bad(key, format!("`{key}` must be 2 to 8, got {bits}"));
            }
        }
        if let Some(bits) = self.activations.as_ref().map(|a| a.bits).filter(|bits| !WIDTHS.contains(bits)) {
            bad("activations", format!("`activations.bits` must be 2 to 8, got {bits}"));
        }
        if self.min_bits > self.start_bits {
            let message =
                format!("`min_bits` is {}, above `start_bits`, which is {}", self.min_bits, self.start_bits);
            bad("min_bits", message);
        }
        if self.target_bits.is_some_and(|bits| !(bits.is_finite() && bits > 0.0)) {
            bad("target_bits", "`target_bits` must be above zero".to_owned());
        }
        if self.reduce_every == 0 {
            bad("reduce_every", "`reduce_every` must be at least 1, got 0".to_owned());
        }
        let LossParams { statistics, affinity, features, logits, temperature, weights } = &self.losses;
        let numbers = [
            ("layer_threshold", self.layer_threshold),
            ("variance_threshold", self.variance_threshold),
            ("impact_threshold", self.impact_threshold),
            ("bit_penalty", self.bit_penalty),
            ("byte_penalty", self.byte_penalty),
            ("losses", *statistics),
            ("losses", *affinity),
            ("losses", *features),
            ("losses", *logits),
        ];
        let numbers = numbers.into_iter().chain(weights.iter().map(|rule| ("losses", rule.weight)));
        for (key, value) in numbers.filter(|(_, value)| !(value.is_finite() && *value >= 0.0)) {
            bad(key, format!("numbers of `{key}` must be zero or more, got {value}"));
        }
        if !self.slope_threshold.is_finite() {
            bad(
                "slope_threshold",
                format!("`slope_threshold` must be a number, got {}", self.slope_threshold),
            );
        }
        if !(temperature.is_finite() && *temperature > 0.0) {
            bad("losses", format!("`losses.temperature` must be above zero, got {temperature}"));
        }
        if [statistics, affinity, features].iter().all(|weight| **weight == 0.0) {
            bad(
                "losses",
                "one of `statistics`, `affinity` and `features` must count: layers are trusted by them"
                    .to_owned(),
            );
        }
        problems
    }

    pub(super) fn policy(&self) -> Policy {
        Policy {
            confidence: self.confidence,
            layer_threshold: self.layer_threshold,
            variance_threshold: self.variance_threshold,
            slope_threshold: self.slope_threshold,
            impact_threshold: self.impact_threshold,
            min_bits: self.min_bits,
            target_roots: self.target_roots.clone(),
            bit_penalty: self.bit_penalty,
            byte_penalty: self.byte_penalty,
            target_bits: self.target_bits,
        }
    }
}
