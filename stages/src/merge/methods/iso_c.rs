//! `iso-c`: the sum of the task vectors with all singular values replaced by their mean.
//!
//! With Δ = Σ_t τ_t = U·diag(σ)·Vᵀ the result is mean(σ)·U·Vᵀ. No singular vector is needed: U·Vᵀ is the polar factor P of Δ, and
//! the mean is ⟨P, Δ⟩/r. Directions whose σ is round-off of f32 are left out, where an SVD would return arbitrary ones; the mean is
//! over all r = min(rows, columns) of them in either case.

use crate::StageError;
use crate::decomposition::Decomposition;
use crate::filter::NameGlob;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::matrices::{self, Matrices, MatrixMethod};
use crate::merge::method::{Merge, Method, Rule};
use crate::merge::numbers;
use crate::params::{Params, Problem, parse, to_value};
use merganser_algebra as algebra;
use merganser_cache::Value;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

pub(super) struct IsoC;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct IsoCParams {
    /// α, the factor of the merged task vector. The authors search it on validation data between 1 and 3; 1.5 is usual for eight tasks.
    #[serde(default = "one", deserialize_with = "numbers::finite")]
    scale: f64,
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

impl Method for IsoC {
    fn id(&self) -> &'static str {
        "iso-c"
    }

    fn summary(&self) -> &'static str {
        "the sum of the task vectors with a flat spectrum: all singular values equal their mean"
    }

    fn formula(&self) -> &'static str {
        "θ = θ₀ + α mean(σ) U Vᵀ, Σ_t τ_t = U diag(σ) Vᵀ; not a matrix: α · mean"
    }

    fn source(&self) -> &'static str {
        "Marczak et al., No Task Left Behind: Isotropic Model Merging, arXiv:2502.04959, §4.1"
    }

    fn schema(&self) -> Schema {
        schema_for!(IsoCParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        Ok(Box::new(parse::<IsoCParams>(params)?))
    }
}

impl Merge for IsoCParams {
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
        _: &[&Operand<'a>],
    ) -> Result<Box<dyn Rule + 'a>, StageError> {
        let others = matrices::scaled_mean(inputs.vectors.len(), self.scale);
        Ok(Box::new(Matrices { method: self, others }))
    }
}

impl MatrixMethod for &IsoCParams {
    fn treats(&self, operand: &Operand<'_>) -> bool {
        matrices::is_matrix(operand, &self.averaged)
    }

    fn merge(&self, operand: &Operand<'_>, out: &mut [f32]) -> Result<(), StageError> {
        let (rows, columns) = operand.as_matrix().unwrap_or_default();
        let sum = matrices::sum(&matrices::read_all(operand)?);
        let polar = algebra::polar_factor(sum.view(), matrices::noise(operand), self.backend.backend());
        let polar = polar.map_err(matrices::refused(operand))?;
        let mean = polar.nuclear_norm / rows.min(columns) as f64;
        matrices::store(out, &polar.factor, self.scale * mean);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::merge::test_support::{Case, naive};
    use crate::testing::{Suite, Tolerance};
    use ndarray::Array2;
    use serde_json::json;

    #[test]
    fn matrices_of_every_shape_equal_the_formula() {
        for (rows, columns, tasks) in [(1, 1, 1), (6, 6, 1), (9, 7, 3), (7, 9, 2), (12, 5, 5)] {
            let case = Case::new(rows, columns, tasks);
            let sum = case.deltas().iter().fold(Array2::zeros((rows, columns)), |sum, delta| sum + delta);
            let (u, values, v) = naive::svd(&sum);
            let expected = u.dot(&v.t()) * (1.5 * values.mean().unwrap());
            case.check(&case.merge(&json!({ "method": "iso-c", "scale": 1.5 })), &expected, 1e-5);
        }
    }

    #[test]
    fn special_tensors_are_defined() {
        Case::new(4, 3, 2).check_others(&json!({ "method": "iso-c", "scale": 0.5 }), |mean, _| 0.5 * mean);
        let zero = Case::of(&[Array2::zeros((5, 4)), Array2::zeros((5, 4))]);
        zero.check(&zero.merge(&json!({ "method": "iso-c" })), &Array2::zeros((5, 4)), 0.0);
        // Rank 1 and σ = 4: the one direction that there is gets the mean over all four.
        let constant = Case::of(&[Array2::ones((4, 4))]);
        constant.check(
            &constant.merge(&json!({ "method": "iso-c" })),
            &Array2::from_elem((4, 4), 0.25),
            1e-6,
        );
    }

    #[test]
    fn nan_is_refused_by_name_and_threads_do_not_count() {
        Case::refuses_nan(&json!({ "method": "iso-c" }));
        Case::new(40, 33, 3).same_on_all_threads(&json!({ "method": "iso-c" }));
    }

    #[test]
    fn merges_equal_the_authors_values() {
        let Some(suite) = Suite::open("iso_c_merges_equal_the_authors_values") else { return };
        // The authors' code in f32 is up to 2.7e-6 off its own f64 run; the merged parameters are rounded to f32 on top.
        let tolerance = Tolerance { relative_l2: 5e-6, norm: 2e-6 };
        suite.check(&json!({ "method": "iso-c" }), "iso", "iso_c_alpha1.0", tolerance);
        let scaled = suite.merge(&json!({ "method": "iso-c", "scale": 1.5 }))[0].1;
        suite.compare_norms(scaled, "iso", "iso_c_alpha1.5", 2e-6);
    }
}
