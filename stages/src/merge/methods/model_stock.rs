//! `model-stock`: the mean of the models, drawn towards the base as far as their angles say.
//!
//! The paper defines one angle θ for all pairs; for vectors that have several, mergekit averages the cosines and others the angles. Where
//! 1 + (N−1)·cos θ vanishes (the task vectors cancel), the ratio is not defined and the base is kept.

use crate::StageError;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::{Merge, Method, Rule};
use crate::merge::pieces::merge_pieces;
use crate::merge::span::{Between, Coefficients, Gram, Span, grams};
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use merganser_tensors::kernels::linear;
use merganser_tensors::stream::BLOCK_ELEMENTS;
use merganser_tensors::{Result, Scratch};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Products of norms are not divided by less, as in mergekit: pairs of very short vectors count as perpendicular.
const SMALLEST_NORMS: f64 = 1e-6;

/// Denominators below this are zero.
const SMALLEST_DENOMINATOR: f64 = 1e-6;

pub(super) struct ModelStock;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ModelStockParams {
    /// What is averaged over the pairs of task vectors: their `cosine` (mergekit), or their `angle`.
    #[serde(default)]
    mean_of: MeanOf,
    /// A ratio for each row of a tensor (a row is what the last dimension counts) instead of one for the whole tensor.
    #[serde(default)]
    filter_wise: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum MeanOf {
    #[default]
    Cosine,
    Angle,
}

impl Method for ModelStock {
    fn id(&self) -> &'static str {
        "model-stock"
    }

    fn summary(&self) -> &'static str {
        "the mean of the models, drawn towards the base as far as the angles between task vectors say"
    }

    fn formula(&self) -> &'static str {
        "θ = θ₀ + t · mean_t τ_t, t = N cos φ / (1 + (N−1) cos φ), φ the angle between task vectors"
    }

    fn source(&self) -> &'static str {
        "Jang et al., Model Stock, arXiv:2403.19522, §4; mean of cosines as in mergekit"
    }

    fn schema(&self) -> Schema {
        schema_for!(ModelStockParams)
    }

    fn parse(&self, params: &Params<'_>) -> std::result::Result<Box<dyn Merge>, Vec<Problem>> {
        Ok(Box::new(parse::<ModelStockParams>(params)?))
    }
}

impl Merge for ModelStockParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> std::result::Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn check(&self, members: &[String]) -> std::result::Result<(), Problem> {
        if members.len() >= 2 {
            return Ok(());
        }
        let message = format!("`model-stock` needs at least 2 task vectors, got {}", members.len());
        Err(Problem::new("bad-value", message))
    }

    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        operands: &[&Operand<'a>],
    ) -> std::result::Result<Box<dyn Rule + 'a>, StageError> {
        let n = inputs.vectors.len();
        if n < 2 {
            return Err(StageError::input(format!("`model-stock` needs at least 2 task vectors, got {n}")));
        }
        if self.filter_wise {
            return Ok(Box::new(FilterWise { mean_of: self.mean_of }));
        }
        let coefficients = grams(operands, Between::TaskVectors)?.into_iter().map(|gram| {
            let share = ratio(&gram, self.mean_of) / gram.n() as f64;
            Coefficients::new(Between::TaskVectors, &vec![share; gram.n()])
        });
        Ok(Box::new(Span::new(operands, coefficients)))
    }
}

/// t, how far the merged model lies from the base towards the mean.
fn ratio(gram: &Gram, mean_of: MeanOf) -> f64 {
    let n = gram.n();
    let mut sum = 0.0;
    for a in 0..n {
        for b in 0..a {
            let norms = (gram.norm(a) * gram.norm(b)).max(SMALLEST_NORMS);
            let cosine = (gram.dot(a, b) / norms).clamp(-1.0, 1.0);
            sum += if mean_of == MeanOf::Angle { cosine.acos() } else { cosine };
        }
    }
    let mean = sum / (n * (n - 1) / 2) as f64;
    let cosine = if mean_of == MeanOf::Angle { mean.cos() } else { mean };
    let denominator = 1.0 + (n - 1) as f64 * cosine;
    if denominator.abs() < SMALLEST_DENOMINATOR { 0.0 } else { n as f64 * cosine / denominator }
}

struct FilterWise {
    mean_of: MeanOf,
}

impl FilterWise {
    fn row_length(operand: &Operand<'_>) -> usize {
        operand.shape().last().copied().unwrap_or(1)
    }

    fn merge(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let columns = Self::row_length(operand);
        merge_pieces(operand, columns, range, out, scratch, |piece, out, _| {
            let mut rows: Vec<_> = piece.tasks().map(|values| values.chunks_exact(columns)).collect();
            for merged in out.chunks_exact_mut(columns) {
                let row: Vec<&[f32]> = rows.iter_mut().filter_map(Iterator::next).collect();
                let gram = Gram::of_rows(&row);
                let share = (ratio(&gram, self.mean_of) / gram.n() as f64) as f32;
                merged.fill(0.0);
                for values in row {
                    linear::add_scaled(merged, share, values);
                }
            }
            Ok(())
        })
    }
}

impl Rule for FilterWise {
    fn needs_whole(&self, operand: &Operand<'_>) -> bool {
        // Every block of a longer row would look at the whole row.
        Self::row_length(operand) > BLOCK_ELEMENTS
    }

    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.merge(operand, range, out, scratch)
    }

    fn tensor(&self, operand: &Operand<'_>, out: &mut [f32]) -> std::result::Result<(), StageError> {
        Ok(self.merge(operand, 0..out.len(), out, &mut Scratch::new())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ratio_of(rows: &[&[f32]], mean_of: MeanOf) -> f64 {
        ratio(&Gram::of_rows(rows), mean_of)
    }

    #[test]
    fn the_ratio_follows_the_formula() {
        for mean_of in [MeanOf::Cosine, MeanOf::Angle] {
            // equal vectors: the mean itself; perpendicular ones: the base
            assert!((ratio_of(&[&[1.0, 0.0], &[2.0, 0.0]], mean_of) - 1.0).abs() < 1e-12);
            assert!(ratio_of(&[&[1.0, 0.0], &[0.0, 2.0]], mean_of).abs() < 1e-12);
            // 60 degrees: 2·½ / (1 + ½)
            let found = ratio_of(&[&[1.0, 0.0], &[1.0, 3f32.sqrt()]], mean_of);
            assert!((found - 2.0 / 3.0).abs() < 1e-7, "{found}");
        }
    }

    #[test]
    fn means_of_cosines_and_of_angles_differ_for_three() {
        let rows: [&[f32]; 3] = [&[1.0, 0.0], &[1.0, 0.0], &[0.0, 1.0]];
        let stock = |cosine: f64| 3.0 * cosine / (1.0 + 2.0 * cosine);
        assert!((ratio_of(&rows, MeanOf::Cosine) - stock(1.0 / 3.0)).abs() < 1e-12);
        let angle = std::f64::consts::PI / 3.0;
        assert!((ratio_of(&rows, MeanOf::Angle) - stock(angle.cos())).abs() < 1e-12);
    }

    #[test]
    fn opposite_and_zero_vectors_keep_the_base() {
        assert_eq!(ratio_of(&[&[1.0, 1.0], &[-1.0, -1.0]], MeanOf::Cosine), 0.0);
        assert_eq!(ratio_of(&[&[0.0, 0.0], &[0.0, 0.0]], MeanOf::Cosine), 0.0);
    }
}
