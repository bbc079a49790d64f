//! `fisher`: the mean of the fine-tuned weights, each counted by how much its model's answers depend on it.
//!
//! θ = Σ_t c_t·F_t⊙θ_t / Σ_t c_t·F_t maximizes the product of Gaussians around the fine-tuned models whose precisions are the diagonals F_t of
//! their Fisher information. As in the authors' code F_t is at least `floor`, and models count by c_t = w_t/‖F_t‖ (`normalize`), or one whose
//! answers are less sure would outweigh all others. Their code lets the first model have the floor alone, as the target that the others are
//! merged into; here all have it.
//!
//! Of task vectors Δ = Σ_t c_t·F_t⊙τ_t / Σ_t c_t·F_t, in f64, rounded once. Tensors that no task's answers depend on are averaged by w_t.

use crate::StageError;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::{Merge, Method, Need, Rule};
use crate::merge::numbers;
use crate::merge::pieces::sums;
use crate::merge::statistics::TaskStatistics;
use crate::merge::weights::TaskWeights;
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use merganser_tensors::kernels::reduce;
use merganser_tensors::source::{check_finite, read_finite_f32};
use merganser_tensors::{Result, Scratch};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::ops::Range;

pub(super) struct Fisher;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct FisherParams {
    /// The least that an entry of F_t counts as: where no model depends on a weight, it is averaged.
    #[serde(default = "usual_floor", deserialize_with = "numbers::positive")]
    floor: f64,
    /// Whether every F_t is divided by its norm over all tensors that are merged.
    #[serde(default = "yes")]
    normalize: bool,
    /// `uniform`, a weight per task, `{ performance = … }` or `{ cluster = … }`.
    #[serde(default)]
    weights: TaskWeights,
}

fn usual_floor() -> f64 {
    1e-6
}

fn yes() -> bool {
    true
}

impl Method for Fisher {
    fn id(&self) -> &'static str {
        "fisher"
    }

    fn summary(&self) -> &'static str {
        "the mean of the fine-tuned weights by the Fisher information of each"
    }

    fn formula(&self) -> &'static str {
        "θ = Σ_t c_t F_t ⊙ θ_t / Σ_t c_t F_t, F_t = max(E_x E_y[(∂ log p_t(y|x) / ∂θ)²], floor), c_t = w_t / ‖F_t‖"
    }

    fn source(&self) -> &'static str {
        "Matena and Raffel, Merging Models with Fisher-Weighted Averaging, arXiv:2111.09832, §3"
    }

    fn schema(&self) -> Schema {
        schema_for!(FisherParams)
    }

    fn parse(&self, params: &Params<'_>) -> std::result::Result<Box<dyn Merge>, Vec<Problem>> {
        Ok(Box::new(parse::<FisherParams>(params)?))
    }
}

impl Merge for FisherParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> std::result::Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn weights(&self) -> Option<&TaskWeights> {
        Some(&self.weights)
    }

    fn check(&self, _: &[String]) -> std::result::Result<(), Problem> {
        if self.weights.given_sum() == Some(0.0) {
            return Err(Problem::new("bad-value", "the weights of an average must not add up to 0"));
        }
        Ok(())
    }

    fn statistics(&self) -> Need {
        Need::Required
    }

    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        operands: &[&Operand<'a>],
    ) -> std::result::Result<Box<dyn Rule + 'a>, StageError> {
        let statistics = TaskStatistics::open(inputs)?;
        statistics.require_fisher(inputs)?;
        let weights = self.weights.of(inputs, operands)?;
        let mut rule = Weighted { floor: self.floor, statistics, factors: weights.clone(), weights };
        if self.normalize {
            let norms = rule.norms(operands)?;
            if norms.iter().all(|norm| *norm == 0.0) {
                return Err(StageError::input("no answer depends on any of the tensors to merge"));
            }
            // A model that depends on nothing counts by the floor alone.
            let scale = |norm: f64| if norm > 0.0 { 1.0 / norm } else { 1.0 };
            rule.factors.iter_mut().zip(norms).for_each(|(factor, norm)| *factor *= scale(norm));
        }
        Ok(Box::new(rule))
    }
}

struct Weighted {
    floor: f64,
    statistics: TaskStatistics,
    /// c_t.
    factors: Vec<f64>,
    /// w_t.
    weights: Vec<f64>,
}

impl Weighted {
    /// ‖F_t‖ over all operands.
    fn norms(&self, operands: &[&Operand<'_>]) -> Result<Vec<f64>> {
        let squares = sums(
            operands,
            |_| 1,
            &vec![0.0; self.factors.len()],
            |stretch, scratch| {
                let mut values = scratch.take(stretch.range.len());
                let squares = self.statistics.fisher(stretch.operand).into_iter().map(|own| {
                    let Some((source, tensor)) = own else { return Ok(0.0) };
                    read_finite_f32(source, tensor, stretch.range.clone(), &mut values, scratch)?;
                    Ok(reduce::chunk_sum_of_squares(&values))
                });
                let squares = squares.collect::<Result<Vec<f64>>>();
                scratch.give_back(values);
                squares
            },
            |total, part| total.iter_mut().zip(part).for_each(|(total, part)| *total += part),
        )?;
        let mut totals = vec![0.0; self.factors.len()];
        for own in &squares {
            totals.iter_mut().zip(own).for_each(|(total, square)| *total += square);
        }
        Ok(totals.into_iter().map(f64::sqrt).collect())
    }
}

impl Rule for Weighted {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let diagonals = self.statistics.fisher(operand);
        let is_known = diagonals.iter().any(Option::is_some);
        let (mut weighted, mut total) = (vec![0.0f64; out.len()], vec![0.0f64; out.len()]);
        let (mut values, mut diagonal) = (scratch.take(out.len()), scratch.take(out.len()));
        for (task, own) in diagonals.into_iter().enumerate() {
            operand.read(task, range.clone(), &mut values, scratch)?;
            check_finite(operand.name(), range.start, &values)?;
            match own {
                Some((source, tensor)) => {
                    read_finite_f32(source, tensor, range.clone(), &mut diagonal, scratch)?;
                }
                None => diagonal.fill(0.0),
            }
            let factor = self.factors[task];
            for (((weighted, total), value), own) in
                weighted.iter_mut().zip(&mut total).zip(&values).zip(&diagonal)
            {
                let own =
                    if is_known { factor * f64::from(*own).max(self.floor) } else { self.weights[task] };
                *weighted += own * f64::from(*value);
                *total += own;
            }
        }
        scratch.give_back(values);
        scratch.give_back(diagonal);
        out.iter_mut().zip(&weighted).zip(&total).for_each(|((out, weighted), total)| {
            *out = (weighted / total) as f32;
        });
        Ok(())
    }
}
