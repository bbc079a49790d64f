//! `iso-cts`: a common space of all tasks and a space of each task's own, with a flat spectrum.
//!
//! The k largest singular triplets of Σ_t τ_t are common; of each task, the n largest triplets of what the common left vectors do not
//! explain, τ_t − U_c·U_cᵀ·τ_t, are added. All vectors together are replaced by the nearest orthonormal ones, and every singular value
//! by the mean of those kept:
//!
//! Δ = mean(σ)·P(\[U₁ … U_T U_c\])·P(\[V₁ … V_T V_c\])ᵀ.
//!
//! n = round((r − ⌊f·r⌋)/T), halves to even as the authors' Python rounds, and k = r − n·T, with r = min(rows, columns).

use super::tsv_m::largest_triplets;
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
use ndarray::Array2;
use rayon::prelude::*;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

pub(super) struct IsoCts;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct IsoCtsParams {
    /// α, the factor of the merged task vector. The authors search it on validation data between 1 and 3; 1.5 is usual for eight tasks.
    #[serde(default = "one", deserialize_with = "numbers::finite")]
    scale: f64,
    /// f, the part of the directions that is common to all tasks, above 0 and at most 1.
    #[serde(default = "usual_fraction", deserialize_with = "numbers::share")]
    common_space_fraction: f64,
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

fn usual_fraction() -> f64 {
    0.8
}

impl Method for IsoCts {
    fn id(&self) -> &'static str {
        "iso-cts"
    }

    fn summary(&self) -> &'static str {
        "common and task-specific directions, made orthogonal, with a flat spectrum"
    }

    fn formula(&self) -> &'static str {
        "θ = θ₀ + α mean(σ) U⊥ V⊥ᵀ, U = [U₁ … U_T U_c]: U_c of the k largest triplets of Σ_t τ_t, U_t of the n largest of τ_t − U_c U_cᵀ τ_t; not a matrix: α · mean"
    }

    fn source(&self) -> &'static str {
        "Marczak et al., No Task Left Behind: Isotropic Model Merging, arXiv:2502.04959, §4.2"
    }

    fn schema(&self) -> Schema {
        schema_for!(IsoCtsParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        Ok(Box::new(parse::<IsoCtsParams>(params)?))
    }
}

impl Merge for IsoCtsParams {
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

impl MatrixMethod for &IsoCtsParams {
    fn treats(&self, operand: &Operand<'_>) -> bool {
        matrices::is_matrix(operand, &self.averaged)
    }

    fn merge(&self, operand: &Operand<'_>, out: &mut [f32]) -> Result<(), StageError> {
        let deltas = matrices::read_all(operand)?;
        let merged = self.merged(&deltas).map_err(matrices::refused(operand))?;
        matrices::store(out, &merged, self.scale);
        Ok(())
    }
}

impl IsoCtsParams {
    fn merged(&self, deltas: &[Array2<f32>]) -> algebra::Result<Array2<f64>> {
        let backend = self.backend.backend();
        let rank = deltas[0].nrows().min(deltas[0].ncols());
        let (n_common, n_own) = self.space(rank, deltas.len());
        let common = largest_triplets(&matrices::sum(deltas), n_common, backend)?;
        let own = deltas
            .par_iter()
            .map(|delta| {
                let explained = algebra::product(common.u.t(), delta.view());
                let rest = delta.mapv(f64::from) - algebra::product(common.u.view(), explained.view());
                largest_triplets(&rest, n_own, backend)
            })
            .collect::<algebra::Result<Vec<_>>>()?;
        let (mut left, mut right, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for triplets in own.into_iter().chain([common]) {
            left.push(triplets.u);
            right.push(triplets.v);
            values.extend(triplets.values);
        }
        let orthonormal = |parts: &[Array2<f64>]| {
            algebra::polar_factor(matrices::side_by_side(parts).view(), matrices::DEPENDENT, backend)
        };
        let (u, v) = rayon::join(|| orthonormal(&left), || orthonormal(&right));
        // Directions that were left out because σ = 0 count in the mean.
        let mean = values.iter().sum::<f64>() / (n_common + n_own * deltas.len()) as f64;
        Ok(algebra::product(u?.factor.view(), v?.factor.t()) * mean)
    }

    /// Directions in common, and of each task.
    fn space(&self, rank: usize, n_tasks: usize) -> (usize, usize) {
        let first = (rank as f64 * self.common_space_fraction) as usize;
        let own = ((rank - first) as f64 / n_tasks as f64).round_ties_even() as usize;
        // Rounding up must not take more than there is.
        let own = own.min(rank / n_tasks);
        (rank - own * n_tasks, own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::test_support::{Case, naive};
    use crate::testing::{Suite, Tolerance};
    use ndarray::s;
    use serde_json::json;

    fn reference(deltas: &[Array2<f64>], n_common: usize, n_own: usize) -> Array2<f64> {
        let sum = deltas.iter().fold(Array2::zeros(deltas[0].dim()), |sum, delta| sum + delta);
        let (u, values, v) = naive::svd(&sum);
        let common = u.slice(s![.., ..n_common]).to_owned();
        let (mut left, mut right, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        for delta in deltas {
            let (u, values, v) = naive::svd(&(delta - &common.dot(&common.t().dot(delta))));
            left.push(u.slice(s![.., ..n_own]).to_owned());
            right.push(v.slice(s![.., ..n_own]).to_owned());
            kept.extend(values.iter().take(n_own).copied());
        }
        left.push(common);
        right.push(v.slice(s![.., ..n_common]).to_owned());
        kept.extend(values.iter().take(n_common).copied());
        let mean = kept.iter().sum::<f64>() / kept.len() as f64;
        let (u, v) = (matrices::side_by_side(&left), matrices::side_by_side(&right));
        naive::polar(&u).dot(&naive::polar(&v).t()) * mean
    }

    #[test]
    fn matrices_of_every_shape_equal_the_formula() {
        for (rows, columns, tasks, common, own) in
            [(1, 1, 1, 0, 1), (6, 6, 1, 4, 2), (10, 17, 2, 8, 1), (14, 9, 2, 7, 1), (12, 5, 5, 5, 0)]
        {
            let case = Case::new(rows, columns, tasks);
            let expected = reference(&case.deltas(), common, own) * 1.5;
            case.check(&case.merge(&json!({ "method": "iso-cts", "scale": 1.5 })), &expected, 1e-5);
        }
    }

    #[test]
    fn the_spaces_are_divided_as_the_authors_do() {
        let params = |fraction| IsoCtsParams {
            scale: 1.0,
            common_space_fraction: fraction,
            averaged: Vec::new(),
            backend: Decomposition::Faer,
        };
        for (fraction, rank, tasks, expected) in [
            (0.8, 128, 6, (104, 4)),
            (0.8, 17, 6, (11, 1)),
            (0.8, 768, 8, (616, 19)),
            (1.0, 10, 3, (10, 0)),
            (0.1, 2, 4, (2, 0)),
            (0.05, 3, 2, (1, 1)),
        ] {
            let (common, own) = params(fraction).space(rank, tasks);
            assert!(common + own * tasks <= rank);
            assert_eq!((common, own), expected, "{fraction} {rank} {tasks}");
        }
    }

    #[test]
    fn special_tensors_are_defined() {
        Case::new(4, 3, 2).check_others(&json!({ "method": "iso-cts", "scale": 0.5 }), |mean, _| 0.5 * mean);
        let zero = Case::of(&[Array2::zeros((5, 4)), Array2::zeros((5, 4))]);
        zero.check(&zero.merge(&json!({ "method": "iso-cts" })), &Array2::zeros((5, 4)), 0.0);
        let constant = Case::of(&[Array2::ones((4, 4)), Array2::ones((4, 4))]);
        let merged = constant.merge(&json!({ "method": "iso-cts" }));
        // σ = 8 once, over four directions: 2 in the constant's direction.
        constant.check(&merged, &Array2::from_elem((4, 4), 0.5), 1e-6);
    }

    #[test]
    fn nan_is_refused_by_name_and_threads_do_not_count() {
        Case::refuses_nan(&json!({ "method": "iso-cts" }));
        Case::new(40, 33, 3).same_on_all_threads(&json!({ "method": "iso-cts" }));
    }

    #[test]
    fn merges_equal_the_authors_values() {
        let Some(suite) = Suite::open("iso_cts_merges_equal_the_authors_values") else { return };
        // The authors' code in f32 is up to 1.3e-5 off its own f64 run.
        let tolerance = Tolerance { relative_l2: 2e-5, norm: 2e-6 };
        suite.check(&json!({ "method": "iso-cts" }), "iso", "iso_cts_alpha1.0", tolerance);
        let scaled = suite.merge(&json!({ "method": "iso-cts", "scale": 1.5 }))[0].1;
        suite.compare_norms(scaled, "iso", "iso_cts_alpha1.5", 2e-6);
    }
}
