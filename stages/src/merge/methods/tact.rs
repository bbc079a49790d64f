//! `tact`: `actmat` with activations estimated from the largest entries of each task vector.
//!
//! C_t = τ̂_tᵀ·τ̂_t of the trimmed τ̂_t, which keeps the ⌊d·density⌋ largest magnitudes of the tensor's d entries (and ties with the last
//! of them); what is averaged is the untrimmed τ_t. For the cut-off `rtol` see `actmat`.

use super::actmat::LONGEST_SIDE;
use crate::StageError;
use crate::decomposition::Decomposition;
use crate::filter::NameGlob;
use crate::merge::activations::{self, Attention, Groups};
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::matrices::{self, Matrices, MatrixMethod};
use crate::merge::method::{Merge, Method, Rule};
use crate::merge::numbers;
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use ndarray::Array2;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

pub(super) struct Tact;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TactParams {
    /// The factor of the merged task vector; the method needs none.
    #[serde(default = "one", deserialize_with = "numbers::finite")]
    scale: f64,
    /// Eigenvalues of Σ C_t at or below `rtol` times the largest count as zero (default: columns · 2⁻²³, torch's for a matrix of f32).
    #[serde(
        default,
        deserialize_with = "numbers::optional_below_one",
        skip_serializing_if = "Option::is_none"
    )]
    rtol: Option<f64>,
    /// The part of the entries that C_t is estimated from, above 0 and at most 1.
    #[serde(default = "half", deserialize_with = "numbers::share")]
    density: f64,
    /// What to do with the projections of queries, keys and values: each tensor as it is, or three matrices, or one.
    #[serde(default)]
    mha: Attention,
    /// Matrices that are averaged, as vectors and scalars are.
    #[serde(default = "matrices::text_projection")]
    averaged: Vec<NameGlob>,
    /// Who computes the decompositions.
    #[serde(default)]
    backend: Decomposition,
}

fn one() -> f64 {
    1.0
}

fn half() -> f64 {
    0.5
}

impl Method for Tact {
    fn id(&self) -> &'static str {
        "tact"
    }

    fn summary(&self) -> &'static str {
        "least squares on activations estimated from the largest entries of the task vectors"
    }

    fn formula(&self) -> &'static str {
        "θ = θ₀ + α (Σ_t τ_t C_t) (Σ_t C_t)⁺, C_t = τ̂_tᵀ τ̂_t, τ̂_t = the largest half of the entries of τ_t; not a matrix: α · mean"
    }

    fn source(&self) -> &'static str {
        "TACT, arXiv:2604.01329"
    }

    fn schema(&self) -> Schema {
        schema_for!(TactParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        Ok(Box::new(parse::<TactParams>(params)?))
    }
}

impl Merge for TactParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn multiplies_matrices(&self) -> bool {
        true
    }

    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        operands: &[&Operand<'a>],
    ) -> Result<Box<dyn Rule + 'a>, StageError> {
        let others = matrices::scaled_mean(inputs.vectors.len(), self.scale);
        let method = LeastSquares { params: self, groups: Groups::new(self.mha, operands) };
        Ok(Box::new(Matrices { method, others }))
    }
}

struct LeastSquares<'a> {
    params: &'a TactParams,
    groups: Groups<'a>,
}

impl MatrixMethod for LeastSquares<'_> {
    fn treats(&self, operand: &Operand<'_>) -> bool {
        matrices::is_matrix(operand, &self.params.averaged)
            && operand.shape().iter().all(|side| *side < LONGEST_SIDE)
    }

    fn merge(&self, operand: &Operand<'_>, out: &mut [f32]) -> Result<(), StageError> {
        activations::merge_parts(&self.groups, operand, out, self.params.scale, |part| {
            let moments = activations::moments(part, |delta| trimmed(delta, self.params.density), |_| 1.0);
            activations::minimizer(&moments, self.params.rtol, self.params.backend.backend())
        })
    }
}

/// Keeps the largest magnitudes.
fn trimmed(delta: &Array2<f32>, density: f64) -> Array2<f32> {
    let kept = (delta.len() as f64 * density) as usize;
    if kept == 0 {
        return Array2::zeros(delta.dim());
    }
    let mut magnitudes: Vec<f32> = delta.iter().map(|value| value.abs()).collect();
    let (_, threshold, _) = magnitudes.select_nth_unstable_by(delta.len() - kept, f32::total_cmp);
    let threshold = *threshold;
    delta.mapv(|value| if value.abs() >= threshold { value } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use super::trimmed;
    use crate::merge::test_support::{Case, naive};
    use crate::testing::{Suite, Tolerance};
    use ndarray::Array2;
    use serde_json::json;

    fn reference(deltas: &[Array2<f64>], moments: &[Array2<f64>]) -> Array2<f64> {
        let n = deltas[0].ncols();
        let total = moments.iter().fold(Array2::zeros((n, n)), |sum, c| sum + c);
        let weighted = deltas
            .iter()
            .zip(moments)
            .fold(Array2::zeros(deltas[0].dim()), |sum, (delta, c)| sum + delta.dot(c));
        weighted.dot(&naive::pseudo_inverse(&total, n as f64 * f64::from(f32::EPSILON)))
    }

    #[test]
    fn matrices_of_every_shape_equal_the_formula() {
        for (rows, columns, tasks) in [(2, 1, 1), (6, 6, 1), (9, 7, 3), (4, 15, 2), (12, 5, 5)] {
            let case = Case::new(rows, columns, tasks);
            let deltas = case.deltas();
            let moments: Vec<_> = deltas
                .iter()
                .map(|delta| {
                    let trimmed = trimmed(&delta.mapv(|value| value as f32), 0.5).mapv(f64::from);
                    trimmed.t().dot(&trimmed)
                })
                .collect();
            let expected = reference(&deltas, &moments) * 0.9;
            case.check(&case.merge(&json!({ "method": "tact", "scale": 0.9 })), &expected, 1e-5);
        }
    }

    #[test]
    fn trimming_keeps_the_largest_magnitudes() {
        let delta = ndarray::array![[1.0f32, -4.0, 2.0], [0.0, 3.0, -2.0]];
        let half = ndarray::array![[0.0f32, -4.0, 2.0], [0.0, 3.0, -2.0]];
        assert_eq!(trimmed(&delta, 0.5), half);
        assert_eq!(trimmed(&delta, 1.0), delta);
        assert_eq!(trimmed(&delta, 0.1), Array2::<f32>::zeros((2, 3)));
    }

    #[test]
    fn special_tensors_are_defined() {
        Case::new(4, 3, 2).check_others(&json!({ "method": "tact", "scale": 0.5 }), |mean, _| 0.5 * mean);
        let zero = Case::of(&[Array2::zeros((5, 4)), Array2::zeros((5, 4))]);
        zero.check(&zero.merge(&json!({ "method": "tact" })), &Array2::zeros((5, 4)), 0.0);
        let constant = Case::of(&[Array2::ones((4, 4)), Array2::ones((4, 4))]);
        constant.check(&constant.merge(&json!({ "method": "tact" })), &Array2::ones((4, 4)), 1e-6);
    }

    #[test]
    fn nan_is_refused_by_name_and_threads_do_not_count() {
        Case::refuses_nan(&json!({ "method": "tact" }));
        Case::new(40, 33, 3).same_on_all_threads(&json!({ "method": "tact" }));
    }

    #[test]
    fn merges_equal_the_authors_values() {
        let Some(suite) = Suite::open("tact_merges_equal_the_authors_values") else { return };
        // f64 arithmetic with the cut-off of f32: all that is left is that task vectors are differences rounded to f32.
        let tolerance = Tolerance { relative_l2: 2e-6, norm: 2e-6 };
        suite.check(&json!({ "method": "tact" }), "actmat_rtol", "tact_f64_rtol_f32", tolerance);
    }
}
