//! `lines`: scales a task vector up with depth, so that early layers change least.
//!
//! On many tasks, it scales their merged task vector, and α follows from norms; on one task, each task vector by itself, for one model per
//! task. What lies outside the layers (embeddings, final norms, projections) is scaled by α, as in the authors' code.

use super::ties::{Agg, MeanBy, Scope, Tie, TiesParams, TiesRule};
use crate::StageError;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::layers;
use crate::merge::linear::{Linear, Rescale};
use crate::merge::method::{Merge, Method, Outcome, Rule};
use crate::merge::pieces::{pass, stretches};
use crate::merge::ranges::Ranges;
use crate::merge::weights::TaskWeights;
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use merganser_tensors::kernels::{linear, reduce};
use merganser_tensors::source::check_finite;
use merganser_tensors::{Result, Scratch};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::ops::Range;

pub(super) struct Lines;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct LinesParams {
    /// What is scaled: the merged task vector of `task-arithmetic` or `ties` (sum), or each task's own (`single-task`, one model per task).
    #[serde(default)]
    on: On,
    /// The factor of the first layer. Left out: the norms' ratio ‖Σ_t τ_t‖₁ / ‖τ_merged‖₁ / T; for a single task 1 − β.
    #[serde(default)]
    alpha: Option<f64>,
    /// How much larger the factor of the last layer is.
    #[serde(default = "usual_beta")]
    beta: f64,
    /// K of `ties`, the share of entries that survive the trim of the whole task vector; above 0, at most 1.
    #[serde(default = "usual_density")]
    density: f64,
    /// `uniform` (every task counts 1), or a weight per task; of many tasks.
    #[serde(default)]
    weights: TaskWeights,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum On {
    #[default]
    TaskArithmetic,
    Ties,
    SingleTask,
}

fn usual_beta() -> f64 {
    0.5
}

fn usual_density() -> f64 {
    0.2
}

impl Method for Lines {
    fn id(&self) -> &'static str {
        "lines"
    }

    fn summary(&self) -> &'static str {
        "scales a merged task vector, or each task's own, up with depth"
    }

    fn formula(&self) -> &'static str {
        "θ_l = θ₀_l + (α + β l/(L−1)) τ_l; α = ‖Σ_t τ_t‖₁ / ‖τ‖₁ / T of many tasks, 1 − β of one"
    }

    fn source(&self) -> &'static str {
        "Wang et al., LiNeS: Post-training Layer Scaling, arXiv:2410.17146, §4"
    }

    fn schema(&self) -> Schema {
        schema_for!(LinesParams)
    }

    fn parse(&self, params: &Params<'_>) -> std::result::Result<Box<dyn Merge>, Vec<Problem>> {
        let parsed: LinesParams = parse(params)?;
        Ranges::of(params)
            .factor("alpha", parsed.alpha.unwrap_or(0.0))
            .factor("beta", parsed.beta)
            .share("density", parsed.density)
            .finish()?;
        Ok(Box::new(parsed))
    }
}

impl Merge for LinesParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> std::result::Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn weights(&self) -> Option<&TaskWeights> {
        Some(&self.weights)
    }

    fn outcome(&self) -> Outcome {
        if self.on == On::SingleTask { Outcome::PerTask } else { Outcome::One }
    }

    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        operands: &[&Operand<'a>],
    ) -> std::result::Result<Box<dyn Rule + 'a>, StageError> {
        let weights = self.weights.of(inputs, operands)?;
        let n_tasks = weights.len();
        let is_uniform = weights.iter().all(|weight| *weight == 1.0);
        let coefficients: Vec<f32> = weights.iter().map(|weight| *weight as f32).collect();
        let sum = |coefficients| Linear { coefficients, rescale: Rescale::Multiply(1.0), masks: Vec::new() };
        let (merged, known): (Box<dyn Rule + 'a>, Option<f64>) = match self.on {
            On::TaskArithmetic => {
                // the merged task vector is the sum itself
                (Box::new(sum(coefficients)), is_uniform.then(|| 1.0 / n_tasks as f64))
            }
            On::Ties => {
                let ties = TiesParams {
                    density: self.density,
                    scope: Scope::Global,
                    agg: Agg::Sum,
                    mean_by: MeanBy::Count,
                    tie: Tie::Majority,
                    scale: 1.0,
                    weights: self.weights.clone(),
                };
                (Box::new(TiesRule::new(&ties, inputs, operands)?), None)
            }
            On::SingleTask => {
                let task = inputs.task.unwrap_or(0);
                (Box::new(Single { task }), Some(1.0 - self.beta))
            }
        };
        let alpha = match (self.alpha, known) {
            (Some(alpha), _) | (None, Some(alpha)) => alpha,
            (None, None) => {
                let sum = sum(vec![1.0; n_tasks]);
                let (summed, own) = (norm(operands, &sum)?, norm(operands, &*merged)?);
                // Nothing to scale: any factor will do.
                if own == 0.0 { 1.0 / n_tasks as f64 } else { summed / own / n_tasks as f64 }
            }
        };
        let n_layers = layers::count(inputs.base.tensors().iter().map(|info| info.name.as_str()));
        Ok(Box::new(Scaled { merged, alpha, beta: self.beta, n_layers }))
    }
}

/// ‖Δ‖₁ of what a rule computes.
fn norm(operands: &[&Operand<'_>], rule: &dyn Rule) -> Result<f64> {
    let (parts, _) = pass(
        &stretches(operands, |_| 1),
        || (),
        |(), stretch, scratch| {
            let mut values = scratch.take(stretch.range.len());
            rule.block(stretch.operand, stretch.range.clone(), &mut values, scratch)?;
            check_finite(stretch.operand.name(), stretch.range.start, &values)?;
            let norm = reduce::chunk_sum_of_magnitudes(&values);
            scratch.give_back(values);
            Ok(norm)
        },
    )?;
    Ok(parts.iter().sum())
}

/// One task vector as it is.
struct Single {
    task: usize,
}

impl Rule for Single {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        operand.read(self.task, range, out, scratch)
    }
}

struct Scaled<'a> {
    merged: Box<dyn Rule + 'a>,
    alpha: f64,
    beta: f64,
    n_layers: usize,
}

impl Rule for Scaled<'_> {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.merged.block(operand, range, out, scratch)?;
        linear::scale(out, factor(self.alpha, self.beta, operand.name(), self.n_layers) as f32);
        Ok(())
    }
}

/// α outside the layers, and in a model of one layer; between α and α + β within them.
fn factor(alpha: f64, beta: f64, name: &str, n_layers: usize) -> f64 {
    match layers::layer_of(name) {
        Some(layer) if n_layers > 1 => alpha + beta * (layer as f64 / (n_layers - 1) as f64),
        _ => alpha,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_grow_with_depth_and_are_alpha_outside_the_layers() {
        for (name, expected) in [
            ("blocks.0.w", 0.25),
            ("blocks.2.w", 0.5),
            ("blocks.4.w", 0.75),
            ("patch_embed.w", 0.25),
            ("norm.w", 0.25),
        ] {
            assert_eq!(factor(0.25, 0.5, name, 5), expected, "{name}");
        }
        assert_eq!(factor(0.25, 0.5, "blocks.0.w", 1), 0.25);
    }
}
