//! `tsv-m`: task singular vectors, orthogonalized against each other.
//!
//! Of each task's matrix the ⌊r/T⌋ largest singular triplets are kept (r = min(rows, columns)); their vectors, side by side, are
//! replaced by the nearest orthonormal ones, so that tasks do not interfere:
//!
//! U = [U₁ … U_T], V = [V₁ … V_T], Δ = P(U)·diag(σ)·P(V)ᵀ with P(X) = X·(XᵀX)^(-1/2), the polar factor.
//!
//! Triplets with σ = 0 are left out. The authors' code keeps the arbitrary vectors that an SVD returns for them, which then take
//! part in the orthogonalization; only task vectors of a lower rank than ⌊r/T⌋ can tell the difference.

use crate::StageError;
use crate::decomposition::Decomposition;
use crate::filter::NameGlob;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::matrices::{self, Matrices, MatrixMethod};
use crate::merge::method::{Merge, Method, Rule};
use crate::merge::numbers;
use crate::params::{Params, Problem, parse, to_value};
use merganser_algebra::{self as algebra, Backend, Svd};
use merganser_cache::Value;
use ndarray::{Array1, Array2, s};
use rayon::prelude::*;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

pub(super) struct TsvM;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TsvMParams {
    /// α, the factor of the merged task vector. The authors search it on validation data; 1 is close to the best.
    #[serde(default = "one", deserialize_with = "numbers::finite")]
    scale: f64,
    /// Keeps all triplets of every task instead of a T-th of them.
    #[serde(default)]
    lossless: bool,
    /// How the nearest orthonormal vectors are computed; the same up to rounding.
    #[serde(default)]
    orthogonalization: Orthogonalization,
    /// Matrices that are averaged, as vectors and scalars are.
    #[serde(default = "matrices::text_projection")]
    averaged: Vec<NameGlob>,
    /// Who computes the decompositions.
    #[serde(default)]
    backend: Decomposition,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Orthogonalization {
    /// From the eigenvectors of the Gram matrix.
    #[default]
    Eigh,
    /// From the singular vectors of the vectors side by side.
    Svd,
}

fn one() -> f64 {
    1.0
}

impl Method for TsvM {
    fn id(&self) -> &'static str {
        "tsv-m"
    }

    fn summary(&self) -> &'static str {
        "the largest singular triplets of every task, made orthogonal to those of the others"
    }

    fn formula(&self) -> &'static str {
        "θ = θ₀ + α U⊥ Σ V⊥ᵀ, U⊥ = U (UᵀU)^(-1/2), U = [U₁ … U_T] of τ_t ≈ U_t Σ_t V_tᵀ with ⌊r/T⌋ triplets; V⊥ likewise; not a matrix: α · mean"
    }

    fn source(&self) -> &'static str {
        "Gargiulo et al., Task Singular Vectors, arXiv:2412.00081, §3.4"
    }

    fn schema(&self) -> Schema {
        schema_for!(TsvMParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        Ok(Box::new(parse::<TsvMParams>(params)?))
    }
}

impl Merge for TsvMParams {
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

impl MatrixMethod for &TsvMParams {
    fn treats(&self, operand: &Operand<'_>) -> bool {
        matrices::is_matrix(operand, &self.averaged)
    }

    fn merge(&self, operand: &Operand<'_>, out: &mut [f32]) -> Result<(), StageError> {
        let backend = self.backend.backend();
        let (rows, columns) = operand.as_matrix().unwrap_or_default();
        let rank = rows.min(columns);
        let kept = if self.lossless { rank } else { rank / operand.n_tasks() };
        let triplets = (0..operand.n_tasks())
            .into_par_iter()
            .map(|task| {
                let matrix = matrices::read(operand, task)?;
                largest_triplets(&matrix, kept, backend).map_err(matrices::refused(operand))
            })
            .collect::<Result<Vec<Svd>, StageError>>()?;
        let merged = orthogonalized(triplets, self.orthogonalization, backend);
        matrices::store(out, &merged.map_err(matrices::refused(operand))?, self.scale);
        Ok(())
    }
}

/// The `k` largest triplets, without those that are exactly 0.
pub(super) fn largest_triplets<T: algebra::Element>(
    matrix: &Array2<T>,
    k: usize,
    backend: Backend,
) -> algebra::Result<Svd> {
    let all = 3 * k > matrix.nrows().min(matrix.ncols());
    let svd = if all {
        algebra::thin_svd(matrix.view(), backend)?.truncated(k)
    } else {
        algebra::truncated_svd(matrix.view(), k, backend)?
    };
    let largest = svd.values.first().copied().unwrap_or(0.0);
    let rank = svd.values.iter().take_while(|value| **value > largest * 1e-14).count();
    Ok(svd.truncated(rank))
}

fn orthogonalized(
    triplets: Vec<Svd>,
    by: Orthogonalization,
    backend: Backend,
) -> algebra::Result<Array2<f64>> {
    let mut values: Vec<f64> = Vec::new();
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for Svd { u, values: own, v } in triplets {
        values.extend(own);
        left.push(u);
        right.push(v);
    }
    let orthonormal = |parts: &[Array2<f64>]| {
        let vectors = matrices::side_by_side(parts);
        match by {
            Orthogonalization::Eigh => {
                Ok(algebra::polar_factor(vectors.view(), matrices::DEPENDENT, backend)?.factor)
            }
            Orthogonalization::Svd => {
                let svd = algebra::thin_svd(vectors.view(), backend)?;
                let largest = svd.values.first().copied().unwrap_or(0.0);
                let rank =
                    svd.values.iter().take_while(|value| **value > largest * matrices::DEPENDENT).count();
                Ok(algebra::product(svd.u.slice(s![.., ..rank]), svd.v.slice(s![.., ..rank]).t()))
            }
        }
    };
    let (u, v) = rayon::join(|| orthonormal(&left), || orthonormal(&right));
    Ok(algebra::product((u? * &Array1::from(values)).view(), v?.t()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::test_support::{Case, naive};
    use crate::testing::{Suite, Tolerance};
    use serde_json::json;

    fn reference(deltas: &[Array2<f64>], kept: usize) -> Array2<f64> {
        let (mut left, mut right, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for delta in deltas {
            let (u, s, v) = naive::svd(delta);
            left.push(u.slice(s![.., ..kept]).to_owned());
            right.push(v.slice(s![.., ..kept]).to_owned());
            values.extend(s.iter().take(kept).copied());
        }
        let (u, v) = (matrices::side_by_side(&left), matrices::side_by_side(&right));
        (naive::polar(&u) * &Array1::from(values)).dot(&naive::polar(&v).t())
    }

    #[test]
    fn matrices_of_every_shape_equal_the_formula() {
        for (rows, columns, tasks) in [(1, 1, 1), (6, 6, 1), (9, 7, 3), (7, 9, 2), (12, 5, 5), (3, 8, 4)] {
            let case = Case::new(rows, columns, tasks);
            let merged = case.merge(&json!({ "method": "tsv-m", "scale": 0.7 }));
            case.check(&merged, &(0.7 * reference(&case.deltas(), rows.min(columns) / tasks)), 1e-5);
            let svd = json!({ "method": "tsv-m", "scale": 0.7, "orthogonalization": "svd" });
            case.check(
                &case.merge(&svd),
                &(0.7 * reference(&case.deltas(), rows.min(columns) / tasks)),
                1e-5,
            );
            let lossless = case.merge(&json!({ "method": "tsv-m", "lossless": true }));
            case.check(&lossless, &reference(&case.deltas(), rows.min(columns)), 1e-5);
        }
    }

    #[test]
    fn special_tensors_are_defined() {
        let with_mean = |case: &Case| {
            case.check_others(&json!({ "method": "tsv-m", "scale": 0.5 }), |mean, _| 0.5 * mean);
        };
        with_mean(&Case::new(4, 3, 2));
        let zero = Case::of(&[Array2::zeros((5, 4)), Array2::zeros((5, 4))]);
        zero.check(&zero.merge(&json!({ "method": "tsv-m" })), &Array2::zeros((5, 4)), 0.0);
        // A task that did not change this tensor does not disturb the other.
        let single = Case::new(6, 4, 1);
        let with_zero = Case::of(&[single.deltas()[0].clone(), Array2::zeros((6, 4))]);
        let merged = with_zero.merge(&json!({ "method": "tsv-m", "lossless": true }));
        with_zero.check(&merged, &single.deltas()[0], 1e-5);
        let constant = Case::of(&[Array2::from_elem((4, 4), 0.5), Array2::from_elem((4, 4), 0.5)]);
        assert!(constant.merge(&json!({ "method": "tsv-m" })).iter().all(|value| value.is_finite()));
    }

    #[test]
    fn nan_is_refused_by_name_and_threads_do_not_count() {
        Case::refuses_nan(&json!({ "method": "tsv-m" }));
        Case::new(40, 33, 3).same_on_all_threads(&json!({ "method": "tsv-m" }));
    }

    #[test]
    fn merges_equal_the_authors_values() {
        let Some(suite) = Suite::open("tsv_m_merges_equal_the_authors_values") else { return };
        // The authors' code in f32 is up to 2e-5 off its own f64 run.
        let tolerance = Tolerance { relative_l2: 3e-5, norm: 2e-6 };
        for orthogonalization in ["eigh", "svd"] {
            let parameters = json!({ "method": "tsv-m", "orthogonalization": orthogonalization });
            suite.check(&parameters, "tsvm", "tsvm_alpha1", tolerance);
        }
        let parameters = json!({ "method": "tsv-m" });
        // Their eigh variant takes inverse roots of f32 Gram matrices: 0.5 % off its own f64 run, which is ours.
        let merged = suite.merge(&parameters)[0].1;
        suite.compare_norms(merged, "actmat", "tsv", 2e-6);
        suite.compare_norms(merged, "tsvm", "tsvm2_eigh_alpha1", 1e-3);
        let lossless = suite.merge(&json!({ "method": "tsv-m", "lossless": true }))[0].1;
        suite.compare_norms(lossless, "tsvm", "tsvm_lossless_alpha1", 1e-5);
    }
}
