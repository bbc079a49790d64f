//! `svd-hybrid`: a model from coefficients of a basis; or every expert, one model per task.
//!
//! The merged difference is a sum of directions. Where the directions are a view over the task vectors, so is the sum: one combination of
//! task vectors per region and parameter, computed in one pass over them. Where they are stored, nothing but base, basis and coefficients is
//! read.
//!
//! U spans all task vectors. With coefficients that are not rounded, uniform weights and everything kept, the result *is* the average;
//! what makes a difference is what is dropped, shrunk, scaled or weighted. The diagnostics say how far it went.

mod diagnose;
#[cfg(test)]
mod goldens;
mod model;
mod rule;
#[cfg(test)]
mod tests;

use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::{Merge, Method, Need, Outcome, Rule};
use crate::merge::weights::TaskWeights;
use crate::params::{Params, Problem, parse, to_value};
use crate::{Content, StageError};
use merganser_cache::Value;
use model::Model;
use rule::HybridRule;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

pub(super) struct SvdHybrid;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SvdHybridParams {
    /// `uniform`, a weight per task, `{ performance = … }` or `{ cluster = … }`; they are divided by their sum.
    #[serde(default)]
    weights: TaskWeights,
    /// λ, the factor of the whole difference.
    #[serde(default = "one")]
    scale: f64,
    /// The factor of the noise region of a merged model; reconstructed experts have all of it.
    #[serde(default = "usual_noise_shrink")]
    noise_shrink: f64,
    /// Whether low-energy coefficients count: `keep` or `drop`.
    #[serde(default)]
    low: Low,
    /// `merged`: one model; `per-task`: each expert, reconstructed from its own coefficients.
    #[serde(default)]
    output: Output,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Low {
    #[default]
    Keep,
    Drop,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Output {
    #[default]
    Merged,
    PerTask,
}

fn one() -> f64 {
    1.0
}

fn usual_noise_shrink() -> f64 {
    0.5
}

impl Method for SvdHybrid {
    fn id(&self) -> &'static str {
        "svd-hybrid"
    }

    fn summary(&self) -> &'static str {
        "merges, or reconstructs, models from coefficients of shared directions"
    }

    fn formula(&self) -> &'static str {
        "θ = θ₀ + λ(U_high c̄_high + U_low c̄_low + μ), c̄ = (Σ_t w_t c_t)/(Σ_t w_t), the noise region times noise_shrink; per task t: c̄ = c_t, the noise region whole"
    }

    fn source(&self) -> &'static str {
        "SVD-Hybrid, mgradyn/SVD-Quantization-Task-Merging, src/svd_hybrid/merge.py"
    }

    fn schema(&self) -> Schema {
        schema_for!(SvdHybridParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        let parsed: SvdHybridParams = parse(params)?;
        let mut problems = Vec::new();
        for (key, value) in [("scale", parsed.scale), ("noise_shrink", parsed.noise_shrink)] {
            if !(value as f32).is_finite() {
                let span = params.table.get(key).map_or(params.span, |entry| entry.node.span);
                let message = format!("`{key}` must be a finite number, got {value}");
                problems.push(Problem::new("bad-value", message).at(span));
            }
        }
        if problems.is_empty() { Ok(Box::new(parsed)) } else { Err(problems) }
    }
}

impl Merge for SvdHybridParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn weights(&self) -> Option<&TaskWeights> {
        Some(&self.weights)
    }

    fn check(&self, _: &[String]) -> Result<(), Problem> {
        if self.weights.given_sum() == Some(0.0) {
            return Err(Problem::new("bad-value", "the weights of `svd-hybrid` must not add up to 0"));
        }
        Ok(())
    }

    fn outcome(&self) -> Outcome {
        match self.output {
            Output::Merged => Outcome::One,
            Output::PerTask => Outcome::PerTask,
        }
    }

    fn reads_own_vector(&self) -> bool {
        self.output == Output::PerTask
    }

    fn vectors(&self) -> Content {
        Content::Coefficients
    }

    fn deltas(&self) -> Need {
        Need::Optional
    }

    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        operands: &[&Operand<'a>],
    ) -> Result<Box<dyn Rule + 'a>, StageError> {
        let model = Model::open(inputs, self.low == Low::Keep)?;
        model.check_base(inputs)?;
        let (weights, noise_shrink) = if let Some(task) = inputs.task {
            let own = |other: usize| f64::from(u8::from(other == task));
            ((0..inputs.vectors.len()).map(own).collect(), 1.0)
        } else {
            let weights = self.weights.with_grams(inputs, || Ok(model.gram()))?;
            let sum: f64 = weights.iter().sum();
            (weights.into_iter().map(|weight| weight / sum).collect::<Vec<f64>>(), self.noise_shrink)
        };
        Ok(Box::new(HybridRule::new(inputs, model, operands, weights, self.scale, noise_shrink)?))
    }
}
