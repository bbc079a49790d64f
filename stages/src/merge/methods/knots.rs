//! `knots`: TIES or DARE-TIES in the common basis of all task vectors of a matrix.
//!
//! The task vectors side by side, \[τ₁ … τ_T\] = U·diag(σ)·\[V₁ … V_T\]ᵀ, share the basis U; task t has the coordinates
//! X_t = diag(σ)·V_tᵀ = Uᵀ·τ_t in it, which line up across tasks where the weights themselves do not. They are merged by TIES: of each
//! task's coordinates (of all matrices together) only the largest magnitudes are kept, the sign of the sum is elected, and the values of
//! that sign are averaged. Then Δ = scale·U·X. Directions with σ ≤ `cut_off` are dropped. Everything that is not a matrix stays the
//! base's.
//!
//! U comes from the eigenvectors of Σ_t τ_t·τ_tᵀ, in f64; it is kept in f32 between the passes, so that memory grows with the number
//! of matrices but not with the number of tasks. Coordinates are recomputed in each pass: two that count magnitudes (their bits, first
//! the upper then the lower half) and one that merges.

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
use ndarray::{Array2, Axis, Slice};
use rayon::prelude::*;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

pub(super) struct Knots;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct KnotsParams {
    /// The factor of the merged task vector. The authors search it on validation data; 0.6 is theirs for `ties`, 0.7 for `dare-ties`.
    #[serde(default = "usual_scale", deserialize_with = "numbers::finite")]
    scale: f64,
    /// How coordinates are merged.
    #[serde(default)]
    aggregation: Aggregation,
    /// The part of each task's coordinates that is kept, by magnitude, above 0 and at most 1.
    #[serde(default = "usual_density", deserialize_with = "numbers::share")]
    density: f64,
    /// Of `dare-ties`: the probability that a coordinate is dropped before, at least 0 and below 1; what is left is divided by 1 − `drop`.
    #[serde(default = "usual_drop", deserialize_with = "numbers::below_one")]
    drop: f64,
    /// Of `dare-ties`: which coordinates are dropped; another seed drops others.
    #[serde(default)]
    seed: u64,
    /// Directions with singular values at or below it are dropped.
    #[serde(default = "usual_cut_off", deserialize_with = "numbers::below_one")]
    cut_off: f64,
    /// Matrices that stay the base's, as vectors and scalars do.
    #[serde(default = "matrices::text_projection")]
    unmerged: Vec<NameGlob>,
    /// Who computes the decompositions.
    #[serde(default)]
    backend: Decomposition,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Aggregation {
    /// Trim, elect a sign, average what has it.
    #[default]
    Ties,
    /// The same after coordinates were dropped at random.
    DareTies,
}

fn usual_scale() -> f64 {
    0.6
}

fn usual_density() -> f64 {
    0.2
}

fn usual_drop() -> f64 {
    0.5
}

fn usual_cut_off() -> f64 {
    1e-5
}

impl Method for Knots {
    fn id(&self) -> &'static str {
        "knots"
    }

    fn summary(&self) -> &'static str {
        "TIES or DARE-TIES in the common basis of the task vectors of each matrix"
    }

    fn formula(&self) -> &'static str {
        "θ = θ₀ + λ U · ties(Uᵀ τ_1, …, Uᵀ τ_T), [τ_1 … τ_T] = U Σ [V_1 … V_T]ᵀ; only matrices"
    }

    fn source(&self) -> &'static str {
        "Stoica et al., Model merging with SVD to tie the KnOTS, arXiv:2410.19735"
    }

    fn schema(&self) -> Schema {
        schema_for!(KnotsParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        Ok(Box::new(parse::<KnotsParams>(params)?))
    }
}

impl Merge for KnotsParams {
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
        let operands: Vec<&Operand<'a>> =
            operands.iter().copied().filter(|operand| matrices::is_matrix(operand, &self.unmerged)).collect();
        let bases = operands
            .par_iter()
            .with_max_len(1)
            .map(|operand| {
                if (inputs.job.cancelled)() {
                    return Err(StageError::Cancelled);
                }
                Ok((operand.index, self.basis(operand)?))
            })
            .collect::<Result<BTreeMap<usize, Array2<f32>>, StageError>>()?;
        let tasks = inputs.vectors.iter().map(|vector| vector.name.clone()).collect();
        let mut method = CommonBasis { params: self, bases, tasks, thresholds: Vec::new() };
        method.thresholds = (0..inputs.vectors.len())
            .map(|task| method.threshold(&operands, task))
            .collect::<Result<_, StageError>>()?;
        Ok(Box::new(Matrices { method, others: matrices::nothing() }))
    }
}

impl KnotsParams {
    /// U, as many columns as singular values above the cut-off.
    fn basis(&self, operand: &Operand<'_>) -> Result<Array2<f32>, StageError> {
        let (rows, _) = operand.as_matrix().unwrap_or_default();
        let mut gram = Array2::<f64>::zeros((rows, rows));
        for task in 0..operand.n_tasks() {
            gram += &algebra::gram(matrices::read(operand, task)?.t());
        }
        let eigen = algebra::symmetric_eigen(gram.view(), self.backend.backend());
        let eigen = eigen.map_err(matrices::refused(operand))?;
        let smallest = self.cut_off * self.cut_off;
        let rank = eigen.values.iter().take_while(|value| **value > smallest).count();
        Ok(eigen.vectors.slice_axis(Axis(1), Slice::from(..rank)).mapv(|value| value as f32))
    }
}

/// What is known of all matrices before the first is merged.
struct CommonBasis<'a> {
    params: &'a KnotsParams,
    /// U, by the index of the operand.
    bases: BTreeMap<usize, Array2<f32>>,
    tasks: Vec<String>,
    /// The smallest magnitude that is kept, by task.
    thresholds: Vec<f32>,
}

impl CommonBasis<'_> {
    /// X_t = Uᵀ·τ_t, with what DARE drops.
    fn coordinates(&self, operand: &Operand<'_>, task: usize) -> Result<Array2<f32>, StageError> {
        let basis = &self.bases[&operand.index];
        let delta = matrices::read(operand, task)?;
        let mut coordinates = algebra::product(basis.t(), delta.view()).mapv(|value| value as f32);
        if self.params.aggregation == Aggregation::DareTies {
            let generator = Generator::new(self.params.seed, &self.tasks[task], operand.name());
            let factor = (1.0 / (1.0 - self.params.drop)) as f32;
            for (index, value) in coordinates.iter_mut().enumerate() {
                *value =
                    if generator.uniform(index as u64) < self.params.drop { 0.0 } else { *value * factor };
            }
        }
        Ok(coordinates)
    }

    /// The magnitude of the (⌊d·density⌋ + 1)-th largest of a task's d coordinates, as the authors of TIES count; 0 if that is more
    /// than there are.
    fn threshold(&self, operands: &[&Operand<'_>], task: usize) -> Result<f32, StageError> {
        const LOWER_BITS: u32 = 15;
        // Bits of magnitudes are in the order of magnitudes.
        let magnitude = |value: &f32| value.abs().to_bits();
        let count = |bucket: &(dyn Fn(u32) -> Option<usize> + Sync)| {
            let counted = operands.par_iter().with_max_len(1).map(|operand| {
                let mut counts = vec![0u64; 1 << 16];
                for value in &self.coordinates(operand, task)? {
                    if let Some(bucket) = bucket(magnitude(value)) {
                        counts[bucket] += 1;
                    }
                }
                Ok(counts)
            });
            counted.try_reduce(
                || vec![0u64; 1 << 16],
                |mut a, b| {
                    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
                    Ok::<_, StageError>(a)
                },
            )
        };
        let upper = count(&|bits| Some((bits >> LOWER_BITS) as usize))?;
        let total: u64 = upper.iter().sum();
        let wanted = (total as f64 * self.params.density) as u64 + 1;
        if wanted > total {
            return Ok(0.0);
        }
        let (bucket, above) = from_the_top(&upper, wanted);
        let lower = count(&|bits| {
            (bits >> LOWER_BITS == bucket).then_some((bits & ((1 << LOWER_BITS) - 1)) as usize)
        })?;
        let (rest, _) = from_the_top(&lower, wanted - above);
        Ok(f32::from_bits(bucket << LOWER_BITS | rest))
    }
}

/// The bucket that holds the `wanted`-th largest, and how many lie above it.
fn from_the_top(counts: &[u64], wanted: u64) -> (u32, u64) {
    let mut above = 0;
    for (bucket, count) in counts.iter().enumerate().rev() {
        if above + count >= wanted {
            return (bucket as u32, above);
        }
        above += count;
    }
    (0, above)
}

impl MatrixMethod for CommonBasis<'_> {
    fn treats(&self, operand: &Operand<'_>) -> bool {
        self.bases.contains_key(&operand.index)
    }

    fn merge(&self, operand: &Operand<'_>, out: &mut [f32]) -> Result<(), StageError> {
        let tasks = (0..operand.n_tasks())
            .into_par_iter()
            .map(|task| {
                let threshold = self.thresholds[task];
                let keep = |value: f32| if value.abs() >= threshold { value } else { 0.0 };
                Ok(self.coordinates(operand, task)?.mapv_into(keep))
            })
            .collect::<Result<Vec<Array2<f32>>, StageError>>()?;
        let mut sum = Array2::<f64>::zeros(tasks[0].dim());
        for task in &tasks {
            sum.zip_mut_with(task, |sum, value| *sum += f64::from(*value));
        }
        let mut agreeing = Array2::<f64>::zeros(sum.dim());
        let mut counts = Array2::<f64>::zeros(sum.dim());
        for task in &tasks {
            ndarray::Zip::from(&mut agreeing).and(&mut counts).and(&sum).and(task).for_each(
                |agreeing, count, sum, value| {
                    // What cancels exactly elects +, as no sign at all would.
                    let elected = if *sum < 0.0 { *value < 0.0 } else { *value > 0.0 };
                    if elected {
                        *agreeing += f64::from(*value);
                        *count += 1.0;
                    }
                },
            );
        }
        agreeing.zip_mut_with(&counts, |value, count| *value /= count.max(1.0));
        let merged = algebra::product(self.bases[&operand.index].view(), agreeing.view());
        matrices::store(out, &merged, self.params.scale);
        Ok(())
    }
}

/// Uniform numbers by position, so that no order of computation matters.
struct Generator(u64);

impl Generator {
    fn new(seed: u64, task: &str, tensor: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        for text in [task, tensor] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        let digest = hasher.finalize();
        let first: [u8; 8] = std::array::from_fn(|index| digest.as_bytes()[index]);
        Self(u64::from_le_bytes(first))
    }

    /// In 0..1, by splitmix64 (Steele, Lea, Flood 2014).
    fn uniform(&self, index: u64) -> f64 {
        let mut z = self.0.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::test_support::{Case, naive};
    use crate::testing::{Suite, Tolerance};
    use serde_json::json;

    /// `keep(task, element)` says what is not dropped before trimming.
    fn reference(deltas: &[Array2<f64>], density: f64, keep: impl Fn(usize, usize) -> f64) -> Array2<f64> {
        let (u, ..) = naive::svd(&matrices::side_by_side(deltas));
        let coordinates: Vec<Array2<f64>> = deltas
            .iter()
            .enumerate()
            .map(|(task, delta)| {
                let mut x = u.t().dot(delta);
                x.iter_mut().enumerate().for_each(|(element, value)| *value *= keep(task, element));
                let mut magnitudes: Vec<f64> = x.iter().map(|value| value.abs()).collect();
                magnitudes.sort_by(|a, b| b.total_cmp(a));
                let place = (magnitudes.len() as f64 * density) as usize;
                let threshold = magnitudes.get(place).map_or(0.0, |value| value * (1.0 - 1e-6));
                x.mapv(|value| if value.abs() >= threshold { value } else { 0.0 })
            })
            .collect();
        let merged = Array2::from_shape_fn(coordinates[0].dim(), |at| {
            let sum: f64 = coordinates.iter().map(|x| x[at]).sum();
            let agreeing: Vec<f64> = coordinates.iter().map(|x| x[at]).filter(|x| x * sum > 0.0).collect();
            if agreeing.is_empty() { 0.0 } else { agreeing.iter().sum::<f64>() / agreeing.len() as f64 }
        });
        u.dot(&merged)
    }

    #[test]
    fn matrices_of_every_shape_equal_the_formula() {
        for (rows, columns, tasks) in [(1, 1, 1), (6, 6, 1), (9, 7, 3), (7, 9, 2), (12, 5, 4)] {
            let case = Case::new(rows, columns, tasks);
            for density in [0.2, 0.6, 1.0] {
                let merged = case.merge(&json!({ "method": "knots", "scale": 0.5, "density": density }));
                case.check(&merged, &(0.5 * reference(&case.deltas(), density, |_, _| 1.0)), 1e-5);
            }
        }
    }

    #[test]
    fn a_single_task_that_keeps_everything_is_itself() {
        let case = Case::new(8, 5, 1);
        let merged = case.merge(&json!({ "method": "knots", "scale": 1.0, "density": 1.0 }));
        case.check(&merged, &case.deltas()[0], 1e-6);
    }

    #[test]
    fn dropped_coordinates_do_not_count_and_the_rest_makes_up_for_them() {
        // One row: there is one direction, and its sign is free.
        let case = Case::new(1, 40, 2);
        let parameters = json!({ "method": "knots", "scale": 1.0, "density": 1.0, "aggregation": "dare-ties", "drop": 0.3, "seed": 7 });
        let names = ["task0", "task1"];
        let keep = |task: usize, element: usize| {
            let dropped = Generator::new(7, names[task], "layers.0.w").uniform(element as u64) < 0.3;
            if dropped { 0.0 } else { 1.0 / 0.7 }
        };
        case.check(&case.merge(&parameters), &reference(&case.deltas(), 1.0, keep), 1e-5);
        let mut other = parameters.clone();
        other["seed"] = json!(8);
        assert_ne!(case.merge(&parameters), case.merge(&other));
        let mut none = parameters.clone();
        none["drop"] = json!(0.0);
        case.check(&case.merge(&none), &reference(&case.deltas(), 1.0, |_, _| 1.0), 1e-5);
    }

    #[test]
    fn the_generator_drops_at_the_rate_it_is_asked_for() {
        let generator = Generator::new(1, "task", "tensor");
        let dropped = (0..100_000).filter(|index| generator.uniform(*index) < 0.3).count();
        assert!((29_000..31_000).contains(&dropped), "{dropped}");
        assert_ne!(generator.uniform(0), Generator::new(1, "tas", "ktensor").uniform(0));
    }

    #[test]
    fn special_tensors_are_defined() {
        Case::new(4, 3, 2).check_others(&json!({ "method": "knots" }), |_, _| 0.0);
        let zero = Case::of(&[Array2::zeros((5, 4)), Array2::zeros((5, 4))]);
        zero.check(&zero.merge(&json!({ "method": "knots" })), &Array2::zeros((5, 4)), 0.0);
        let constant = Case::of(&[Array2::ones((4, 4)), Array2::ones((4, 4))]);
        let merged = constant.merge(&json!({ "method": "knots", "scale": 1.0, "density": 1.0 }));
        constant.check(&merged, &Array2::ones((4, 4)), 1e-5);
    }

    #[test]
    fn nan_is_refused_by_name_and_threads_do_not_count() {
        Case::refuses_nan(&json!({ "method": "knots" }));
        Case::new(40, 33, 3).same_on_all_threads(&json!({ "method": "knots", "aggregation": "dare-ties" }));
    }

    #[test]
    fn merges_equal_the_authors_values() {
        let Some(suite) = Suite::open("knots_merges_equal_the_authors_values") else { return };
        // Apart from coordinates at the threshold, which may fall on the other side of it.
        let tolerance = Tolerance { relative_l2: 1e-4, norm: 1e-5 };
        let all = json!({ "method": "knots", "unmerged": ["*embedding*"] });
        suite.check(&all, "knots", "knots_ties_top20_scale0.6_all2d", tolerance);
        let attention = json!({ "method": "knots", "only": ["*.self_attn.*"] });
        suite.check(&attention, "knots", "knots_ties_top20_scale0.6_attn_qkvo", tolerance);
    }
}
