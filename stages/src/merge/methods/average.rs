//! `average`: the mean of the fine-tuned checkpoints.

use crate::StageError;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::linear::{Linear, Rescale};
use crate::merge::method::{Merge, Method, Need, Rule};
use crate::merge::weights::TaskWeights;
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

pub(super) struct Average;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct AverageParams {
    /// `uniform`, a weight per task, `{ performance = … }` or `{ cluster = … }`; they are divided by their sum.
    #[serde(default)]
    weights: TaskWeights,
}

impl Method for Average {
    fn id(&self) -> &'static str {
        "average"
    }

    fn summary(&self) -> &'static str {
        "weight averaging: the (weighted) mean of the fine-tuned checkpoints"
    }

    fn formula(&self) -> &'static str {
        "θ = θ₀ + (Σ_t w_t τ_t) / (Σ_t w_t); with port `masks`, mask_t ⊙ τ_t in place of τ_t"
    }

    fn source(&self) -> &'static str {
        "Wortsman et al., Model soups, arXiv:2203.05482"
    }

    fn schema(&self) -> Schema {
        schema_for!(AverageParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        Ok(Box::new(parse::<AverageParams>(params)?))
    }
}

impl Merge for AverageParams {
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
            return Err(Problem::new("bad-value", "the weights of an average must not add up to 0"));
        }
        Ok(())
    }

    fn masks(&self) -> Need {
        Need::Optional
    }

    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        operands: &[&Operand<'a>],
    ) -> Result<Box<dyn Rule + 'a>, StageError> {
        let weights = self.weights.of(inputs, operands)?;
        let sum: f64 = weights.iter().sum();
        Ok(Box::new(Linear::new(inputs, &weights, Rescale::Divide(sum as f32))?))
    }
}
