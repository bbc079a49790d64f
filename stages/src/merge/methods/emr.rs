//! `emr`: elect one vector for all tasks, mask it and rescale it for each.
//!
//! Elect: γ = +1 where Σ τ > 0 and −1 elsewhere; the unified entry is γ times the largest |τ_t| among the tasks with that sign, 0 if there is
//! none. All in `f32`; sums are taken in the order of the collection. The sums of magnitudes that the rescaler divides accumulate in `f64` (the
//! authors' in `f32`: the two differ in the last digits).

use crate::StageError;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::{Localized, Merge, Method, Outcome, Parts, Rule};
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use merganser_tensors::Scratch;
use merganser_tensors::kernels::reduce::chunk_sum_of_magnitudes;
use merganser_tensors::source::check_finite;
use merganser_tensors::stream::blocks;
use rayon::prelude::*;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::ops::Range;

pub(super) struct Emr;

/// What the masked vector is brought in line with the task vector by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Rescaler {
    /// The ratio of the sums, over the tensors, of each tensor's mean magnitude: a small tensor counts as much as a large one.
    #[default]
    TensorMeans,
    /// The ratio of the mean magnitudes over all entries.
    GlobalMeans,
    /// None: the factor is 1.
    None,
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct EmrParams {
    /// λ_t as a ratio of sums of per-tensor mean magnitudes (`tensor-means`: the code of the paper's main experiments), as the ratio of mean
    /// magnitudes over all entries (`global-means`: the authors' code for 30 tasks), or 1 (`none`).
    #[serde(default)]
    rescaler: Rescaler,
    /// Whether to make one model for all tasks instead, θ₀ + u: the elected vector without masks and factors.
    #[serde(default)]
    unified: bool,
}

impl Method for Emr {
    fn id(&self) -> &'static str {
        "emr"
    }

    fn summary(&self) -> &'static str {
        "a model per task: one elected vector, a mask and a factor for each"
    }

    fn formula(&self) -> &'static str {
        "θ̂_t = θ₀ + λ_t (mask_t ⊙ u), where u = γ max_t {|τ_t| : τ_t γ > 0}, γ = sign(Σ_t τ_t), mask_t = [τ_t γ > 0], λ_t = Σ_n mean|τ_t,n| / Σ_n mean|mask_t ⊙ u|_n over tensors n; stored: u once, and a bit per entry and task"
    }

    fn source(&self) -> &'static str {
        "Huang et al., EMR-Merging, arXiv:2405.17461, §3; harveyhuang18/EMR_Merging main_emr_merging.py and main_emr_30_vits.py"
    }

    fn schema(&self) -> Schema {
        schema_for!(EmrParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        Ok(Box::new(parse::<EmrParams>(params)?))
    }
}

impl Merge for EmrParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn outcome(&self) -> Outcome {
        if self.unified { Outcome::One } else { Outcome::PerTask }
    }

    fn stores_parts(&self) -> bool {
        !self.unified
    }

    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        operands: &[&Operand<'a>],
    ) -> Result<Box<dyn Rule + 'a>, StageError> {
        let mut elected = Elected { task: inputs.task.unwrap_or(0), scale: 1.0 };
        if self.unified {
            return Ok(Box::new(Unified(elected)));
        }
        if self.rescaler != Rescaler::None {
            let found: Vec<Result<(f64, f64), StageError>> = operands
                .par_iter()
                .map(|operand| {
                    if (inputs.job.cancelled)() {
                        return Err(StageError::Cancelled);
                    }
                    Ok(elected.magnitudes(operand)?)
                })
                .collect();
            let (mut own, mut shared) = (0.0f64, 0.0f64);
            for (operand, found) in operands.iter().zip(found) {
                let divisor = match self.rescaler {
                    Rescaler::TensorMeans => operand.n_elements().max(1) as f64,
                    _ => 1.0,
                };
                let found = found?;
                own += found.0 / divisor;
                shared += found.1 / divisor;
            }
            // A mask without entries has nothing to rescale.
            elected.scale = if shared == 0.0 { 1.0 } else { (own / shared) as f32 };
        }
        Ok(Box::new(Localized(elected)))
    }
}

/// The unified vector, and what a task takes of it.
struct Elected {
    task: usize,
    scale: f32,
}

/// The unified vector for all tasks.
struct Unified(Elected);

impl Rule for Unified {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        let mut mask = scratch.take(range.len());
        self.0.block(operand, range, out, &mut mask, scratch)?;
        scratch.give_back(mask);
        Ok(())
    }
}

impl Elected {
    /// Σ|τ_t| and Σ|mask_t ⊙ u| of a tensor.
    fn magnitudes(&self, operand: &Operand<'_>) -> merganser_tensors::Result<(f64, f64)> {
        let ranges: Vec<Range<usize>> = blocks(operand.n_elements()).collect();
        let found: Vec<merganser_tensors::Result<(f64, f64)>> = ranges
            .into_par_iter()
            .map_init(
                || (Scratch::new(), Vec::new(), Vec::new()),
                |(scratch, unified, mask), range| {
                    unified.resize(range.len(), 0.0);
                    mask.resize(range.len(), 0.0);
                    self.block(operand, range.clone(), unified, mask, scratch)?;
                    unified.iter_mut().zip(&*mask).for_each(|(u, m)| *u *= m);
                    let shared = chunk_sum_of_magnitudes(unified);
                    operand.read(self.task, range, unified, scratch)?;
                    Ok((chunk_sum_of_magnitudes(unified), shared))
                },
            )
            .collect();
        found.into_iter().try_fold((0.0, 0.0), |sum, block| {
            let block = block?;
            Ok((sum.0 + block.0, sum.1 + block.1))
        })
    }
}

impl Parts for Elected {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        vector: &mut [f32],
        mask: &mut [f32],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        let n = range.len();
        // The largest entry of either sign, so that one pass over the tasks is enough.
        let [mut sum, mut positive, mut negative, mut values] = [(); 4].map(|()| scratch.take(n));
        for buffer in [&mut sum, &mut positive, &mut negative] {
            buffer.fill(0.0);
        }
        for task in 0..operand.n_tasks() {
            operand.read(task, range.clone(), &mut values, scratch)?;
            check_finite(operand.name(), range.start, &values)?;
            let rows = sum.iter_mut().zip(&mut positive).zip(&mut negative).zip(&values);
            for (((sum, positive), negative), &value) in rows {
                *sum += value;
                *positive = if value > *positive { value } else { *positive };
                *negative = if value < *negative { value } else { *negative };
            }
            if task == self.task {
                mask.copy_from_slice(&values);
            }
        }
        check_finite(operand.name(), range.start, &sum)?;
        let rows = vector.iter_mut().zip(mask).zip(&sum).zip(positive.iter().zip(&negative));
        for (((unified, mask), &sum), (&positive, &negative)) in rows {
            let is_up = sum > 0.0;
            *unified = if is_up { positive } else { negative };
            *mask = f32::from(u8::from(if is_up { *mask > 0.0 } else { *mask < 0.0 }));
        }
        for buffer in [sum, positive, negative, values] {
            scratch.give_back(buffer);
        }
        Ok(())
    }

    fn scale(&self) -> f32 {
        self.scale
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Input, Suite, Tolerance, Workbench, sha256};
    use blake3::Hash;
    use merganser_tensors::Manifest;
    use merganser_tensors::manifest::Layout;
    use proptest::prelude::*;
    use serde_json::json;

    /// The models of some tasks whose task vectors have two tensors.
    fn models(
        base: &[Vec<f32>; 2],
        tuned: &[[Vec<f32>; 2]],
        rescaler: &str,
    ) -> (Workbench, Vec<(String, Hash)>) {
        let bench = Workbench::new();
        let shapes = [[base[0].len()], [base[1].len()]];
        let write = |name: &str, values: &[Vec<f32>; 2]| {
            bench.checkpoint(name, &[("v", &shapes[0], &values[0]), ("w", &shapes[1], &values[1])])
        };
        let base = write("base", base);
        let names = ["a", "b", "c"];
        let deltas: Vec<(&str, Hash)> = names
            .iter()
            .zip(tuned)
            .map(|(name, values)| (*name, bench.diff(base, write(name, values))))
            .collect();
        let inputs = [Input::One("base", base), Input::Members("vectors", &deltas)];
        let found = bench.run("merge", &json!({ "method": "emr", "rescaler": rescaler }), &inputs).unwrap();
        (bench, found)
    }

    /// From the formula, in f64: λ·mask·u by tensor.
    fn reference(deltas: &[[Vec<f64>; 2]], task: usize, rescaler: &str) -> [Vec<f64>; 2] {
        let unified = [0, 1].map(|tensor| {
            (0..deltas[0][tensor].len())
                .map(|i| {
                    let values: Vec<f64> = deltas.iter().map(|delta| delta[tensor][i]).collect();
                    let sign = if values.iter().sum::<f64>() > 0.0 { 1.0 } else { -1.0 };
                    sign * values.iter().map(|value| (value * sign).max(0.0)).fold(0.0, f64::max)
                })
                .collect::<Vec<f64>>()
        });
        let masked = [0, 1].map(|tensor| {
            let own = deltas[task][tensor].iter();
            let sums = (0..own.len()).map(|i| deltas.iter().map(|delta| delta[tensor][i]).sum::<f64>());
            let keeps = own.zip(sums).map(|(own, sum)| if sum > 0.0 { *own > 0.0 } else { *own < 0.0 });
            unified[tensor]
                .iter()
                .zip(keeps)
                .map(|(u, keep)| if keep { *u } else { 0.0 })
                .collect::<Vec<f64>>()
        });
        let total = |values: &[Vec<f64>; 2]| {
            [0, 1].map(|tensor| values[tensor].iter().map(|value: &f64| value.abs()).sum::<f64>())
        };
        let (own, shared) = (total(&deltas[task]), total(&masked));
        let n = [0, 1].map(|tensor| masked[tensor].len().max(1) as f64);
        let scale = match rescaler {
            "tensor-means" => (own[0] / n[0] + own[1] / n[1]) / (shared[0] / n[0] + shared[1] / n[1]),
            "global-means" => (own[0] + own[1]) / (shared[0] + shared[1]),
            _ => 1.0,
        };
        let scale = if shared[0] + shared[1] == 0.0 { 1.0 } else { scale };
        masked.map(|values| values.iter().map(|value| value * scale).collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn models_follow_the_formula(
            rows in prop::collection::vec(prop::collection::vec(prop_oneof![Just(0.0f32), Just(0.5), Just(-0.5), -1f32..1.0], 3), 1..200),
            split in 0usize..200,
            n_tasks in 1usize..4,
            rescaler in prop::sample::select(vec!["tensor-means", "global-means", "none"]),
        ) {
            let split = split.min(rows.len());
            let base = [vec![0.0; split], vec![0.0; rows.len() - split]];
            let tuned: Vec<[Vec<f32>; 2]> = (0..n_tasks)
                .map(|task| {
                    let values: Vec<f32> = rows.iter().map(|row| row[task]).collect();
                    [values[..split].to_vec(), values[split..].to_vec()]
                })
                .collect();
            let deltas: Vec<[Vec<f64>; 2]> =
                tuned.iter().map(|tensors| tensors.clone().map(|values| values.into_iter().map(f64::from).collect())).collect();
            // Sums in f32 may have another sign than in f64 where they cancel: such rows decide nothing here.
            let cancels = |row: &Vec<f32>| {
                let sum: f64 = row[..n_tasks].iter().map(|value| f64::from(*value)).sum();
                sum != 0.0 && sum.abs() < 1e-6
            };
            prop_assume!(!rows.iter().any(cancels));
            let (bench, found) = models(&base, &tuned, rescaler);
            prop_assert_eq!(found.len(), n_tasks);
            for (task, (_, model)) in found.iter().enumerate() {
                let expected = reference(&deltas, task, rescaler);
                for (name, expected) in ["v", "w"].iter().zip(&expected) {
                    for (actual, expected) in bench.values(*model, name).iter().zip(expected) {
                        prop_assert!((f64::from(*actual) - expected).abs() < 1e-5, "{} {}", actual, expected);
                    }
                }
            }
        }
    }

    #[test]
    fn a_single_task_is_rebuilt_and_nothing_stays_nothing() {
        let base = [vec![1.0, 2.0], vec![]];
        let (bench, found) = models(&base, &[[vec![1.5, 2.0], vec![]]], "tensor-means");
        assert_eq!(bench.values(found[0].1, "v"), [1.5, 2.0]);
        let (bench, found) = models(&base, &[base.clone(), base.clone()], "tensor-means");
        assert_eq!(bench.values(found[1].1, "v"), [1.0, 2.0]);
        assert_eq!(bench.values(found[1].1, "w"), [0.0; 0]);
    }

    #[test]
    fn artifacts_are_the_same_for_any_number_of_threads() {
        let n = 140_003;
        let values = |seed: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * 7919 + seed * 131) % 1009) as f32 / 500.0 - 1.0).collect()
        };
        let base = [values(0), vec![0.5]];
        let tuned = [[values(1), vec![1.0]], [values(2), vec![-1.0]], [values(3), vec![2.0]]];
        let artifacts = [1, 2, 8].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| models(&base, &tuned, "global-means").1)
        });
        assert!(artifacts.iter().all(|found| *found == artifacts[0]));
    }

    #[test]
    fn unified_vector_masks_and_rescalers_equal_the_authors() {
        let Some(suite) = Suite::open("unified_vector_masks_and_rescalers_equal_the_authors") else { return };
        let meta = suite.golden_json("emr/meta.json");
        for (rescaler, key) in
            [("tensor-means", "rescalers"), ("global-means", "rescalers_flat_variant_30vits")]
        {
            for (task, model) in suite.merge(&json!({ "method": "emr", "rescaler": rescaler })) {
                let manifest = Manifest::from_json(suite.bench.manifest(model).as_bytes()).unwrap();
                let Layout::Masked { scales, .. } = manifest.layout() else { panic!("a masked view") };
                let expected = meta[key][&task].as_f64().unwrap();
                // The authors add up in f32.
                assert!(
                    (f64::from(scales[0]) / expected - 1.0).abs() < 1e-5,
                    "{task}: {} {expected}",
                    scales[0]
                );
                let bits = Suite::packed_bits(&*suite.bench.open(&manifest.views()[1]));
                assert_eq!(sha256(&bits), meta["mask_packbits_sha256"][&task].as_str().unwrap(), "{task}");
                if rescaler == "tensor-means" {
                    let tolerance = Tolerance { relative_l2: 1e-5, norm: 1e-5 };
                    suite.compare(model, "emr", &format!("reconstructed_{task}"), tolerance);
                }
            }
        }
        let unified = suite.merge(&json!({ "method": "emr", "unified": true })).remove(0).1;
        suite.compare(unified, "emr", "unified", Tolerance { relative_l2: 1e-6, norm: 1e-6 });
    }
}
