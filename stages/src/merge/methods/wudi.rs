//! `wudi`: the merged matrix interferes least with what each task vector itself responds to.
//!
//! The loss L(M) = Σ_t ‖(M − τ_t)·τ_tᵀ‖² / ‖τ_t‖² is quadratic. With C_t = τ_tᵀ·τ_t, A = Σ_t C_t/‖τ_t‖² and B = Σ_t τ_t·C_t/‖τ_t‖² its
//! gradient is 2(M·A − B). The authors' code takes 300 steps of Adam from M = Σ_t τ_t; at their learning rate that is not far from where
//! it started, so steps and learning rate are parameters. `solver = "exact"` gives the minimizer B·A⁺, of all minimizers the one of the
//! least norm, which can be much further away.
//!
//! Only matrices of the numbered layers are merged; everything else stays the base's. The gradient is computed in f64 once and then
//! kept up to date by adding 2(M' − M)·A, whose products are in f32: errors are relative to a step, not to M. A task vector that is 0
//! in a tensor does not count there.

use crate::StageError;
use crate::decomposition::Decomposition;
use crate::merge::activations::{self, Attention, Groups, Moments, Part};
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::layers;
use crate::merge::matrices::{self, Matrices, MatrixMethod};
use crate::merge::method::{Merge, Method, Rule};
use crate::merge::numbers;
use crate::params::{Params, Problem, parse, to_value};
use merganser_algebra as algebra;
use merganser_cache::Value;
use ndarray::{Array2, Zip};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

pub(super) struct Wudi;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct WudiParams {
    /// The factor of the merged task vector.
    #[serde(default = "one", deserialize_with = "numbers::finite")]
    scale: f64,
    /// How the loss is minimized.
    #[serde(default)]
    solver: Solver,
    /// Steps of `adam`.
    #[serde(default = "usual_steps")]
    steps: u32,
    /// Learning rate of `adam`; every entry moves by about that much in each of the first steps.
    #[serde(default = "usual_rate", deserialize_with = "numbers::positive")]
    learning_rate: f64,
    /// Of `exact`: eigenvalues at or below `rtol` times the largest count as zero (default: columns · 2⁻²³).
    #[serde(
        default,
        deserialize_with = "numbers::optional_below_one",
        skip_serializing_if = "Option::is_none"
    )]
    rtol: Option<f64>,
    /// What to do with the projections of queries, keys and values: each tensor as it is, or three matrices, or one.
    #[serde(default)]
    mha: Attention,
    /// Who computes the decompositions of `exact`.
    #[serde(default)]
    backend: Decomposition,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Solver {
    /// The authors': a number of steps of Adam.
    #[default]
    Adam,
    /// The minimizer itself.
    Exact,
}

fn one() -> f64 {
    1.0
}

fn usual_steps() -> u32 {
    300
}

fn usual_rate() -> f64 {
    1e-5
}

impl Method for Wudi {
    fn id(&self) -> &'static str {
        "wudi"
    }

    fn summary(&self) -> &'static str {
        "minimizes how much the merged matrix interferes with each task vector"
    }

    fn formula(&self) -> &'static str {
        "θ = θ₀ + α argmin_M Σ_t ‖(M − τ_t) τ_tᵀ‖² / ‖τ_t‖², from M = Σ_t τ_t by Adam, or exactly; only matrices of the layers"
    }

    fn source(&self) -> &'static str {
        "Cheng et al., Whoever Started the Interference Should End It, arXiv:2503.08099"
    }

    fn schema(&self) -> Schema {
        schema_for!(WudiParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        Ok(Box::new(parse::<WudiParams>(params)?))
    }
}

impl Merge for WudiParams {
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
        _: &'a MergeInputs<'a>,
        operands: &[&Operand<'a>],
    ) -> Result<Box<dyn Rule + 'a>, StageError> {
        let method = Minimization { params: self, groups: Groups::new(self.mha, operands) };
        Ok(Box::new(Matrices { method, others: matrices::nothing() }))
    }
}

struct Minimization<'a> {
    params: &'a WudiParams,
    groups: Groups<'a>,
}

impl MatrixMethod for Minimization<'_> {
    fn treats(&self, operand: &Operand<'_>) -> bool {
        operand.as_matrix().is_some() && layers::layer_of(operand.name()).is_some()
    }

    fn merge(&self, operand: &Operand<'_>, out: &mut [f32]) -> Result<(), StageError> {
        activations::merge_parts(&self.groups, operand, out, self.params.scale, |part| {
            self.params.solve(part)
        })
    }
}

impl WudiParams {
    fn solve(&self, part: &Part) -> algebra::Result<Array2<f64>> {
        let weight = |squares: f64| if squares > 0.0 { 1.0 / squares } else { 0.0 };
        let moments = activations::moments(part, Clone::clone, weight);
        match self.solver {
            Solver::Adam => Ok(self.adam(&matrices::sum(&part.deltas), &moments)),
            Solver::Exact => activations::minimizer(&moments, self.rtol, self.backend.backend()),
        }
    }

    /// Kingma and Ba, arXiv:1412.6980, algorithm 1, with its usual constants.
    fn adam(&self, start: &Array2<f64>, moments: &Moments) -> Array2<f64> {
        const BETA1: f64 = 0.9;
        const BETA2: f64 = 0.999;
        const EPSILON: f64 = 1e-8;
        let total = moments.total.mapv(|value| value as f32);
        let mut merged = start.clone();
        let mut gradient = (algebra::product(start.view(), moments.total.view()) - &moments.weighted) * 2.0;
        let (mut first, mut second) = (Array2::<f64>::zeros(start.dim()), Array2::<f64>::zeros(start.dim()));
        for step in 1..=self.steps {
            let bias1 = 1.0 - BETA1.powi(step as i32);
            let bias2 = (1.0 - BETA2.powi(step as i32)).sqrt();
            let mut moved = Array2::<f32>::zeros(start.dim());
            Zip::from(&mut merged).and(&mut first).and(&mut second).and(&gradient).and(&mut moved).for_each(
                |merged, first, second, gradient, moved| {
                    *first = BETA1 * *first + (1.0 - BETA1) * gradient;
                    *second = BETA2 * *second + (1.0 - BETA2) * gradient * gradient;
                    // What is added is what the gradient is told of.
                    *moved =
                        (-self.learning_rate * (*first / bias1) / (second.sqrt() / bias2 + EPSILON)) as f32;
                    *merged += f64::from(*moved);
                },
            );
            let change = algebra::product_f32(moved.view(), total.view());
            gradient.zip_mut_with(&change, |gradient, change| *gradient += 2.0 * f64::from(*change));
        }
        merged
    }
}

#[cfg(test)]
mod tests {
    use crate::merge::test_support::{Case, naive};
    use crate::testing::{Suite, Tolerance};
    use ndarray::Array2;
    use serde_json::json;

    fn squares(delta: &Array2<f64>) -> f64 {
        delta.iter().map(|value| value * value).sum()
    }

    fn gradient(merged: &Array2<f64>, deltas: &[Array2<f64>]) -> Array2<f64> {
        deltas.iter().fold(Array2::zeros(merged.dim()), |sum, delta| {
            sum + (merged - delta).dot(&delta.t().dot(delta)) * (2.0 / squares(delta))
        })
    }

    fn adam(deltas: &[Array2<f64>], steps: i32, rate: f64) -> Array2<f64> {
        let mut merged = deltas.iter().fold(Array2::zeros(deltas[0].dim()), |sum, delta| sum + delta);
        let (mut m, mut v) = (Array2::<f64>::zeros(merged.dim()), Array2::<f64>::zeros(merged.dim()));
        for step in 1..=steps {
            let g = gradient(&merged, deltas);
            m = m * 0.9 + &g * 0.1;
            v = v * 0.999 + &g * &g * 0.001;
            let hat = &m / (1.0 - 0.9f64.powi(step));
            let root = (&v / (1.0 - 0.999f64.powi(step))).mapv(f64::sqrt) + 1e-8;
            merged = merged - hat / root * rate;
        }
        merged
    }

    #[test]
    fn adam_takes_the_steps_of_its_definition() {
        for (rows, columns, tasks) in [(1, 1, 2), (6, 6, 1), (9, 7, 3), (4, 15, 2)] {
            let case = Case::new(rows, columns, tasks);
            for steps in [0, 1, 50] {
                let parameters = json!({ "method": "wudi", "steps": steps, "learning_rate": 0.002 });
                let found = case.merge(&parameters);
                if tasks > 1 {
                    case.check(&found, &adam(&case.deltas(), steps, 0.002), 1e-4);
                } else {
                    // The sum is the minimum already: what is left of the gradient is round-off.
                    case.check(&found, &case.deltas()[0], 0.15);
                }
            }
        }
    }

    #[test]
    fn the_exact_solution_has_no_gradient() {
        for (rows, columns, tasks) in [(1, 1, 1), (6, 6, 1), (9, 7, 3), (4, 15, 2)] {
            let case = Case::new(rows, columns, tasks);
            let found = case.merge(&json!({ "method": "wudi", "solver": "exact" }));
            let deltas = case.deltas();
            case.check(&gradient(&found, &deltas), &Array2::zeros((rows, columns)), 1e-5);
            let total = deltas.iter().fold(Array2::zeros((columns, columns)), |sum, delta| {
                sum + delta.t().dot(delta) / squares(delta)
            });
            let weighted = deltas.iter().fold(Array2::zeros((rows, columns)), |sum, delta| {
                sum + delta.dot(&delta.t().dot(delta)) / squares(delta)
            });
            let expected = weighted.dot(&naive::pseudo_inverse(&total, 1e-6));
            case.check(&found, &expected, 1e-5);
        }
    }

    #[test]
    fn special_tensors_are_defined() {
        for solver in ["adam", "exact"] {
            let parameters = json!({ "method": "wudi", "solver": solver });
            Case::new(4, 3, 2).check_others(&parameters, |_, _| 0.0);
            let zero = Case::of(&[Array2::zeros((5, 4)), Array2::zeros((5, 4))]);
            zero.check(&zero.merge(&parameters), &Array2::zeros((5, 4)), 0.0);
            let outside = Case::new(4, 3, 2).named("projection.weight");
            outside.check(&outside.merge(&parameters), &Array2::zeros((4, 3)), 0.0);
        }
    }

    #[test]
    fn nan_is_refused_by_name_and_threads_do_not_count() {
        Case::refuses_nan(&json!({ "method": "wudi" }));
        Case::new(40, 33, 3).same_on_all_threads(&json!({ "method": "wudi" }));
    }

    #[test]
    fn merges_equal_the_authors_values() {
        let Some(suite) = Suite::open("wudi_merges_equal_the_authors_values") else { return };
        let tolerance = Tolerance { relative_l2: 1e-5, norm: 1e-6 };
        suite.check(&json!({ "method": "wudi" }), "wudi", "split_300it", tolerance);
        suite.check(&json!({ "method": "wudi", "steps": 1 }), "wudi", "split_1it", tolerance);
        suite.check(&json!({ "method": "wudi", "mha": "fused" }), "wudi", "fused_300it", tolerance);
        let start = suite.merge(&json!({ "method": "wudi", "steps": 0 }))[0].1;
        suite.compare_norms(start, "wudi", "split_0it", 1e-6);
    }
}
