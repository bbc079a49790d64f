//! `task-arithmetic`: the sum of the task vectors, scaled.

use crate::StageError;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::linear::{Linear, Rescale};
use crate::merge::method::{Merge, Method, Need, Rule};
use crate::merge::weights::TaskWeights;
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

pub(in crate::merge) struct TaskArithmetic;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TaskArithmeticParams {
    /// λ, the factor of the sum. 0.3 is the usual choice for eight tasks; 1 adds a single task vector back.
    #[serde(default = "usual_scale")]
    scale: f64,
    /// `uniform` (every task counts 1), a weight per task, `{ performance = … }` or `{ cluster = … }` (with the mean 1).
    #[serde(default)]
    weights: TaskWeights,
}

fn usual_scale() -> f64 {
    0.3
}

impl Method for TaskArithmetic {
    fn id(&self) -> &'static str {
        "task-arithmetic"
    }

    fn summary(&self) -> &'static str {
        "adds the scaled sum of the task vectors to the base"
    }

    fn formula(&self) -> &'static str {
        "θ = θ₀ + λ Σ_t w_t τ_t; with port `masks`, mask_t ⊙ τ_t in place of τ_t"
    }

    fn source(&self) -> &'static str {
        "Ilharco et al., Editing Models with Task Arithmetic, arXiv:2212.04089, §4"
    }

    fn schema(&self) -> Schema {
        schema_for!(TaskArithmeticParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        let scale_span = params.table.get("scale").map_or(params.span, |entry| entry.node.span);
        let parsed: TaskArithmeticParams = parse(params)?;
        if !(parsed.scale as f32).is_finite() {
            let message = format!("`scale` must be a finite number, got {}", parsed.scale);
            return Err(vec![Problem::new("bad-value", message).at(scale_span)]);
        }
        Ok(Box::new(parsed))
    }
}

impl Merge for TaskArithmeticParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn weights(&self) -> Option<&TaskWeights> {
        Some(&self.weights)
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
        Ok(Box::new(Linear::new(inputs, &weights, Rescale::Multiply(self.scale as f32))?))
    }
}
