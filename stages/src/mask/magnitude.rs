//! `magnitude`: the largest entries of each task vector.

use super::inputs::MaskInputs;
use super::method::{Masking, Method, Prepared, Voting};
use super::select::{largest, magnitude};
use crate::StageError;
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use merganser_tensors::Scratch;
use rayon::prelude::*;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::ops::Range;

pub(super) struct Magnitude;

/// What entries are compared with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Scope {
    /// All entries of the task vector: some tensors keep more than others.
    #[default]
    Global,
    /// Those of the same tensor: every tensor keeps the same share.
    Tensor,
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct MagnitudeParams {
    /// The share of entries that is kept, 0 to 1: those of largest magnitude, rounded to the nearest number, at least one unless it is 0.
    /// Entries as large as the last of them are kept too, zeros never.
    keep: f64,
    /// Whether an entry is compared with all entries of its task vector (`global`) or with those of its tensor (`tensor`).
    #[serde(default)]
    scope: Scope,
}

impl Method for Magnitude {
    fn id(&self) -> &'static str {
        "magnitude"
    }

    fn summary(&self) -> &'static str {
        "the entries of largest magnitude of each task vector"
    }

    fn formula(&self) -> &'static str {
        "mask_t = |τ_t| ≥ s_t and τ_t ≠ 0, where s_t is the m-th largest |τ_t| and m = max(1, round(keep·n))"
    }

    fn source(&self) -> &'static str {
        "the baseline of Wang et al., Localizing Task Information, arXiv:2405.07813, §5; the trimming of TIES, arXiv:2306.01708"
    }

    fn schema(&self) -> Schema {
        schema_for!(MagnitudeParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Masking>, Vec<Problem>> {
        let parsed: MagnitudeParams = parse(params)?;
        if !(0.0..=1.0).contains(&parsed.keep) {
            let span = params.table.get("keep").map_or(params.span, |entry| entry.node.span);
            let message = format!("`keep` must be 0 to 1, got {}", parsed.keep);
            return Err(vec![Problem::new("bad-value", message).at(span)]);
        }
        Ok(Box::new(parsed))
    }
}

impl MagnitudeParams {
    fn kept(&self, n: u64) -> u64 {
        if self.keep == 0.0 || n == 0 {
            return 0;
        }
        ((self.keep * n as f64).round() as u64).clamp(1, n)
    }
}

impl Masking for MagnitudeParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self, _: Option<&str>) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn prepare<'a>(&'a self, inputs: &'a MaskInputs<'a>) -> Result<Prepared<'a>, StageError> {
        let sizes: Vec<u64> = inputs.tensors.iter().map(|info| info.n_elements() as u64).collect();
        let all: Vec<usize> = (0..sizes.len()).collect();
        let mut thresholds = vec![Vec::with_capacity(inputs.asked.len()); sizes.len()];
        for &task in &inputs.asked {
            let of_tensors: Vec<u32> = match self.scope {
                Scope::Global => {
                    vec![largest(inputs, task, &all, self.kept(sizes.iter().sum()))?; sizes.len()]
                }
                Scope::Tensor => {
                    let found: Vec<_> = all
                        .par_iter()
                        .map(|tensor| largest(inputs, task, &[*tensor], self.kept(sizes[*tensor])))
                        .collect();
                    found.into_iter().collect::<merganser_tensors::Result<_>>()?
                }
            };
            for (list, threshold) in thresholds.iter_mut().zip(of_tensors) {
                list.push(threshold);
            }
        }
        Ok(Prepared::new(inputs, Box::new(Largest { inputs, thresholds })))
    }
}

struct Largest<'a> {
    inputs: &'a MaskInputs<'a>,
    /// The bits of the smallest magnitude that is kept, by tensor and task.
    thresholds: Vec<Vec<u32>>,
}

impl Voting for Largest<'_> {
    fn vote(
        &self,
        tensor: usize,
        range: Range<usize>,
        votes: &mut [f32],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        let mut values = scratch.take(range.len());
        for (&task, threshold) in self.inputs.asked.iter().zip(&self.thresholds[tensor]) {
            self.inputs.read(task, tensor, range.clone(), &mut values, scratch)?;
            let smallest = (*threshold).max(1);
            for (vote, value) in votes.iter_mut().zip(&values) {
                *vote += f32::from(u8::from(magnitude(*value) >= smallest));
            }
        }
        scratch.give_back(values);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Input, Workbench};
    use proptest::prelude::*;
    use serde_json::json;

    fn masks(tensors: &[(&str, &[usize], &[f32])], keep: f64, scope: &str) -> Vec<Vec<f32>> {
        let bench = Workbench::new();
        let zeros: Vec<(&str, &[usize], Vec<f32>)> =
            tensors.iter().map(|(name, shape, values)| (*name, *shape, vec![0.0; values.len()])).collect();
        let zeros: Vec<(&str, &[usize], &[f32])> =
            zeros.iter().map(|(name, shape, values)| (*name, *shape, &values[..])).collect();
        let deltas = bench.diff(bench.checkpoint("base", &zeros), bench.checkpoint("tuned", tensors));
        let parameters = json!({ "method": "magnitude", "keep": keep, "scope": scope });
        let mask = bench.one("mask", &parameters, &[Input::One("deltas", deltas)]);
        tensors.iter().map(|(name, _, _)| bench.values(mask, name)).collect()
    }

    /// By sorting.
    fn expected(values: &[f32], among: &[f32], keep: f64) -> Vec<f32> {
        let mut sorted: Vec<f64> = among.iter().map(|value| f64::from(value.abs())).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let m = if keep == 0.0 { 0 } else { ((keep * sorted.len() as f64).round() as usize).max(1) };
        let threshold = if m == 0 || sorted.is_empty() { f64::INFINITY } else { sorted[m - 1] };
        let is_kept = |value: &f32| *value != 0.0 && f64::from(value.abs()) >= threshold;
        values.iter().map(|value| f32::from(u8::from(is_kept(value)))).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn the_largest_are_kept(
            a in prop::collection::vec(prop_oneof![Just(0.0f32), -1f32..1.0, -1e-40f32..1e-40, prop::sample::select(vec![0.5f32, -0.5])], 1..80),
            b in prop::collection::vec(-2f32..2.0, 1..700),
            keep in prop_oneof![Just(0.0), Just(1.0), 0.0..1.0],
        ) {
            let tensors: [(&str, &[usize], &[f32]); 2] = [("a", &[a.len()], &a), ("b", &[b.len()], &b)];
            let all: Vec<f32> = a.iter().chain(&b).copied().collect();
            let global = masks(&tensors, keep, "global");
            prop_assert_eq!(&global[0], &expected(&a, &all, keep));
            prop_assert_eq!(&global[1], &expected(&b, &all, keep));
            let by_tensor = masks(&tensors, keep, "tensor");
            prop_assert_eq!(&by_tensor[0], &expected(&a, &a, keep));
            prop_assert_eq!(&by_tensor[1], &expected(&b, &b, keep));
        }
    }

    #[test]
    fn scalars_keep_themselves_and_empty_tensors_nothing() {
        let found = masks(&[("empty", &[0, 3], &[]), ("one", &[], &[-2.0]), ("zero", &[1], &[0.0])], 0.1, "tensor");
        assert_eq!(found, [vec![], vec![1.0], vec![0.0]]);
    }

    #[test]
    fn equal_entries_are_kept_together() {
        assert_eq!(masks(&[("w", &[4], &[1.0, -1.0, 1.0, 0.5])], 0.25, "global"), [[1.0, 1.0, 1.0, 0.0]]);
    }
}
