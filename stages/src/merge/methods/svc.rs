//! `svc`: scales down the directions of a merged matrix that several task vectors have counted at once.
//!
//! Of the merged Δ = U·diag(σ)·Vᵀ, direction r has the part a_m = u_rᵀ·Δ; task i has a_i = u_rᵀ·τ_i of it, and s_i = ⟨a_m, a_i⟩/‖a_i‖²
//! says how many times over the merged direction holds the task's. Every σ_r is divided by the mean over the tasks of max(s_i, floor).
//!
//! As a method it corrects task arithmetic; as `post = "svc"` whatever another method merged. Only left singular vectors are needed,
//! from the smaller Gram matrix: the result is U·diag(1/mean_r)·Uᵀ·Δ, in which what is inaccurate about vectors of tiny σ does not
//! matter. A task without any part in a direction counts as `floor` (the authors' 0/0 would be NaN).

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
use ndarray::{Array1, Array2, Axis};
use rayon::prelude::*;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

pub(super) struct Svc;

/// What the method and the step after other methods share.
#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::merge) struct Correction {
    /// The least value of s_i, above 0 (default: 1/T, for sums; 1 for methods that already balance the tasks, such as `tsv-m`).
    #[serde(
        default,
        deserialize_with = "numbers::optional_positive",
        skip_serializing_if = "Option::is_none"
    )]
    floor: Option<f64>,
    /// Matrices that are left as they are.
    #[serde(default = "embeddings")]
    uncorrected: Vec<NameGlob>,
    /// Who computes the decompositions.
    #[serde(default)]
    backend: Decomposition,
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SvcParams {
    /// λ, the factor of the sum of the task vectors before the correction; not a matrix: λ · sum.
    #[serde(default = "usual_scale", deserialize_with = "numbers::finite")]
    scale: f64,
    /// The least value of s_i, above 0 (default: 1/T).
    #[serde(
        default,
        deserialize_with = "numbers::optional_positive",
        skip_serializing_if = "Option::is_none"
    )]
    floor: Option<f64>,
    /// Matrices that are only summed, as vectors and scalars are.
    #[serde(default = "embeddings")]
    uncorrected: Vec<NameGlob>,
    /// Who computes the decompositions.
    #[serde(default)]
    backend: Decomposition,
}

fn usual_scale() -> f64 {
    0.3
}

fn embeddings() -> Vec<NameGlob> {
    matrices::globs(&["*text_projection*", "*embedding*"])
}

impl Method for Svc {
    fn id(&self) -> &'static str {
        "svc"
    }

    fn summary(&self) -> &'static str {
        "task arithmetic whose singular values are corrected for what tasks count twice"
    }

    fn formula(&self) -> &'static str {
        "θ = θ₀ + U diag(σ_r / mean_i max(s_ri, floor)) Vᵀ, λ Σ_t τ_t = U diag(σ) Vᵀ, s_ri = ⟨a_m, a_i⟩ / ‖a_i‖², a_i = u_rᵀ τ_i"
    }

    fn source(&self) -> &'static str {
        "Singular Value Calibration, arXiv:2602.05536"
    }

    fn schema(&self) -> Schema {
        schema_for!(SvcParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        Ok(Box::new(parse::<SvcParams>(params)?))
    }
}

impl Merge for SvcParams {
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
        let others = matrices::scaled_sum(inputs.vectors.len(), self.scale);
        Ok(Box::new(Matrices { method: self, others }))
    }
}

impl MatrixMethod for &SvcParams {
    fn treats(&self, operand: &Operand<'_>) -> bool {
        matrices::is_matrix(operand, &self.uncorrected)
    }

    fn merge(&self, operand: &Operand<'_>, out: &mut [f32]) -> Result<(), StageError> {
        let deltas = matrices::read_all(operand)?;
        let merged = matrices::sum(&deltas) * self.scale;
        let floor = self.floor.unwrap_or(1.0 / deltas.len() as f64);
        let corrected = corrected(&merged, &deltas, floor, self.backend.backend());
        matrices::store(out, &corrected.map_err(matrices::refused(operand))?, 1.0);
        Ok(())
    }
}

impl Correction {
    pub(in crate::merge) fn treats(&self, operand: &Operand<'_>) -> bool {
        matrices::is_matrix(operand, &self.uncorrected)
    }

    /// Corrects a merged task vector.
    pub(in crate::merge) fn correct(
        &self,
        operand: &Operand<'_>,
        merged: &mut [f32],
    ) -> Result<(), StageError> {
        let deltas = matrices::read_all(operand)?;
        let floor = self.floor.unwrap_or(1.0 / deltas.len() as f64);
        let before = matrices::shaped(operand, merged.iter().map(|value| f64::from(*value)).collect());
        let corrected = corrected(&before, &deltas, floor, self.backend.backend());
        matrices::store(merged, &corrected.map_err(matrices::refused(operand))?, 1.0);
        Ok(())
    }
}

fn corrected(
    merged: &Array2<f64>,
    deltas: &[Array2<f32>],
    floor: f64,
    backend: algebra::Backend,
) -> algebra::Result<Array2<f64>> {
    // Directions of merged, as columns, and their parts a_m, as rows.
    let (directions, parts) = if merged.nrows() <= merged.ncols() {
        let u = algebra::symmetric_eigen(algebra::gram(merged.t()).view(), backend)?.vectors;
        let parts = algebra::product(u.t(), merged.view());
        (u, parts)
    } else {
        let v = algebra::symmetric_eigen(algebra::gram(merged.view()).view(), backend)?.vectors;
        let mut u = algebra::product(merged.view(), v.view());
        let lengths: Array1<f64> = u.columns().into_iter().map(|column| column.dot(&column).sqrt()).collect();
        u /= &lengths.mapv(|length| if length > 0.0 { length } else { 1.0 });
        let parts = &v.t() * &lengths.view().insert_axis(Axis(1));
        (u, parts)
    };
    let shares: Vec<Vec<f64>> = deltas
        .par_iter()
        .map(|delta| {
            let own = algebra::product(directions.t(), delta.view());
            let rows = own.rows().into_iter().zip(parts.rows());
            rows.map(|(own, merged)| {
                let squares = own.dot(&own);
                if squares > 0.0 { (own.dot(&merged) / squares).max(floor) } else { floor }
            })
            .collect()
        })
        .collect();
    let divisors: Array1<f64> = (0..parts.nrows())
        .map(|direction| shares.iter().map(|task| task[direction]).sum::<f64>() / deltas.len() as f64)
        .collect();
    Ok(algebra::product((directions / &divisors).view(), parts.view()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::test_support::{Case, naive};
    use crate::testing::{Suite, Tolerance};
    use serde_json::json;

    fn reference(merged: &Array2<f64>, deltas: &[Array2<f64>], floor: f64) -> Array2<f64> {
        let (u, values, v) = naive::svd(merged);
        let factors: Array1<f64> = (0..values.len())
            .map(|r| {
                let a_m = &v.column(r) * values[r];
                let share = |delta: &Array2<f64>| {
                    let a_i = delta.t().dot(&u.column(r));
                    (a_m.dot(&a_i) / a_i.dot(&a_i)).max(floor)
                };
                values[r] / (deltas.iter().map(share).sum::<f64>() / deltas.len() as f64)
            })
            .collect();
        (u * &factors).dot(&v.t())
    }

    #[test]
    fn matrices_of_every_shape_equal_the_formula() {
        for (rows, columns, tasks) in [(1, 1, 1), (6, 6, 1), (9, 7, 3), (7, 9, 2), (12, 5, 5)] {
            let case = Case::new(rows, columns, tasks);
            let deltas = case.deltas();
            let sum = deltas.iter().fold(Array2::zeros((rows, columns)), |sum, delta| sum + delta) * 0.4;
            for floor in [None, Some(1.0)] {
                let mut parameters = json!({ "method": "svc", "scale": 0.4 });
                if let Some(floor) = floor {
                    parameters["floor"] = json!(floor);
                }
                let expected = reference(&sum, &deltas, floor.unwrap_or(1.0 / tasks as f64));
                case.check(&case.merge(&parameters), &expected, 1e-5);
            }
        }
    }

    #[test]
    fn any_method_can_be_corrected_afterwards() {
        let case = Case::new(9, 7, 3);
        let direct = case.merge(&json!({ "method": "svc", "scale": 0.4, "floor": 0.5 }));
        let post = json!({ "method": "svc", "floor": 0.5 });
        let after = case.merge(&json!({ "method": "task-arithmetic", "scale": 0.4, "post": post }));
        case.check(&after, &direct, 1e-5);
        let average = case.merge(&json!({ "method": "average", "post": "svc" }));
        let sum = case.deltas().iter().fold(Array2::zeros((9, 7)), |sum, delta| sum + delta) / 3.0;
        case.check(&average, &reference(&sum, &case.deltas(), 1.0 / 3.0), 1e-5);
        case.check_others(&json!({ "method": "average", "post": "svc" }), |mean, _| mean);
    }

    #[test]
    fn special_tensors_are_defined() {
        Case::new(4, 3, 2).check_others(&json!({ "method": "svc", "scale": 0.5 }), |_, sum| 0.5 * sum);
        let zero = Case::of(&[Array2::zeros((5, 4)), Array2::zeros((5, 4))]);
        zero.check(&zero.merge(&json!({ "method": "svc" })), &Array2::zeros((5, 4)), 0.0);
        // Both tasks are 1/0.6 times contained in 0.3 · (1 + 1).
        let constant = Case::of(&[Array2::ones((4, 4)), Array2::ones((4, 4))]);
        constant.check(
            &constant.merge(&json!({ "method": "svc", "floor": 0.1 })),
            &Array2::ones((4, 4)),
            1e-6,
        );
        // One task did not change this tensor: it counts as the floor.
        let half = Case::of(&[Array2::ones((4, 4)), Array2::zeros((4, 4))]);
        let expected = Array2::from_elem((4, 4), 0.3 / f64::midpoint(0.3, 0.1));
        half.check(&half.merge(&json!({ "method": "svc", "floor": 0.1 })), &expected, 1e-6);
    }

    #[test]
    fn nan_is_refused_by_name_and_threads_do_not_count() {
        Case::refuses_nan(&json!({ "method": "svc" }));
        Case::refuses_nan(&json!({ "method": "average", "post": "svc" }));
        Case::new(40, 33, 3).same_on_all_threads(&json!({ "method": "svc" }));
    }

    #[test]
    fn merges_equal_the_authors_values() {
        let Some(suite) = Suite::open("svc_merges_equal_the_authors_values") else { return };
        // The authors' code in f32 is up to 9e-6 off its own f64 run.
        let tolerance = Tolerance { relative_l2: 1.5e-5, norm: 2e-6 };
        suite.check(&json!({ "method": "svc" }), "svc", "ta_alpha_1_over_T", tolerance);
        suite.check(&json!({ "method": "svc", "floor": 1.0 }), "svc", "ta_alpha_1", tolerance);
        let post = json!({ "method": "svc", "floor": 1.0 });
        let corrected = suite.merge(&json!({ "method": "tsv-m", "post": post }))[0].1;
        // Their TSV-M before it takes inverse roots of f32 Gram matrices.
        suite.compare_norms(corrected, "svc", "tsvm_alpha_1", 1e-4);
    }
}
