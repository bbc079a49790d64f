//! `tsv-c`: every task's own matrices, compressed to their largest singular triplets. One model per task.
//!
//! Δ_t = U_k·diag(σ_k)·V_kᵀ of τ_t, by default with k = ⌊r/T⌋, so that all T tasks together take the room of one. Everything that is
//! not a matrix is the task's own.

use super::tsv_m::largest_triplets;
use crate::StageError;
use crate::decomposition::Decomposition;
use crate::filter::NameGlob;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::linear::{Linear, Rescale};
use crate::merge::matrices::{self, Matrices, MatrixMethod};
use crate::merge::method::{Merge, Method, Outcome, Rule};
use crate::merge::numbers;
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

pub(super) struct TsvC;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TsvCParams {
    /// The factor of the task vector.
    #[serde(default = "one", deserialize_with = "numbers::finite")]
    scale: f64,
    /// The part of all triplets that is kept, above 0 and at most 1 (default: 1/T).
    #[serde(default, deserialize_with = "numbers::optional_share", skip_serializing_if = "Option::is_none")]
    keep: Option<f64>,
    /// Matrices that are kept as they are, as vectors and scalars are.
    #[serde(default = "matrices::text_projection")]
    uncompressed: Vec<NameGlob>,
    /// Who computes the decompositions.
    #[serde(default)]
    backend: Decomposition,
}

fn one() -> f64 {
    1.0
}

impl Method for TsvC {
    fn id(&self) -> &'static str {
        "tsv-c"
    }

    fn summary(&self) -> &'static str {
        "every task's own matrices, compressed to their largest singular triplets; one model per task"
    }

    fn formula(&self) -> &'static str {
        "θ_t = θ₀ + α U_k Σ_k V_kᵀ, the k = ⌊r/T⌋ largest singular triplets of τ_t; not a matrix: α τ_t"
    }

    fn source(&self) -> &'static str {
        "Gargiulo et al., Task Singular Vectors, arXiv:2412.00081, §3.3"
    }

    fn schema(&self) -> Schema {
        schema_for!(TsvCParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        Ok(Box::new(parse::<TsvCParams>(params)?))
    }
}

impl Merge for TsvCParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn outcome(&self) -> Outcome {
        Outcome::PerTask
    }

    fn multiplies_matrices(&self) -> bool {
        true
    }

    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        _: &[&Operand<'a>],
    ) -> Result<Box<dyn Rule + 'a>, StageError> {
        let task = inputs.task.ok_or_else(|| StageError::Internal("tsv-c without a task".to_owned()))?;
        let mut coefficients = vec![0.0; inputs.vectors.len()];
        coefficients[task] = 1.0;
        let others =
            Linear { coefficients, rescale: Rescale::Multiply(self.scale as f32), masks: Vec::new() };
        Ok(Box::new(Matrices { method: Compression { params: self, task }, others }))
    }
}

struct Compression<'a> {
    params: &'a TsvCParams,
    task: usize,
}

impl MatrixMethod for Compression<'_> {
    fn treats(&self, operand: &Operand<'_>) -> bool {
        matrices::is_matrix(operand, &self.params.uncompressed)
    }

    fn merge(&self, operand: &Operand<'_>, out: &mut [f32]) -> Result<(), StageError> {
        let (rows, columns) = operand.as_matrix().unwrap_or_default();
        let rank = rows.min(columns);
        let kept = match self.params.keep {
            Some(share) => (share * rank as f64) as usize,
            None => rank / operand.n_tasks(),
        };
        let matrix = matrices::read(operand, self.task)?;
        let svd = largest_triplets(&matrix, kept, self.params.backend.backend());
        let merged = svd.map_err(matrices::refused(operand))?.reconstructed();
        matrices::store(out, &merged, self.params.scale);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::merge::test_support::{Case, naive};
    use ndarray::{Array2, s};
    use serde_json::json;

    fn reference(delta: &Array2<f64>, kept: usize) -> Array2<f64> {
        let (u, values, v) = naive::svd(delta);
        let scaled = &u.slice(s![.., ..kept]) * &values.slice(s![..kept]);
        scaled.dot(&v.slice(s![.., ..kept]).t())
    }

    #[test]
    fn every_task_gets_its_own_best_approximation() {
        for (rows, columns, tasks) in [(1, 1, 1), (9, 7, 3), (7, 20, 2), (3, 8, 4)] {
            let case = Case::new(rows, columns, tasks);
            let rank = rows.min(columns);
            let merged = case.merge_tasks(&json!({ "method": "tsv-c", "scale": 0.7 }));
            let all = case.merge_tasks(&json!({ "method": "tsv-c", "keep": 1.0 }));
            assert_eq!((merged.len(), all.len()), (tasks, tasks));
            for (task, delta) in case.deltas().iter().enumerate() {
                case.check(&merged[task], &(0.7 * reference(delta, rank / tasks)), 1e-5);
                case.check(&all[task], delta, 1e-5);
            }
        }
    }

    #[test]
    fn nan_is_refused_by_name_and_threads_do_not_count() {
        Case::refuses_nan(&json!({ "method": "tsv-c" }));
        Case::new(40, 33, 3).same_on_all_threads(&json!({ "method": "tsv-c" }));
    }
}
