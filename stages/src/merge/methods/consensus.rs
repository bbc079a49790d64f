//! `consensus`: the merged vector, less the entries that only few tasks need.

use crate::StageError;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::{Merge, Method, Need, Rule};
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use merganser_tensors::Scratch;
use merganser_tensors::kernels::linear;
use merganser_tensors::source::check_finite;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::ops::Range;

pub(super) struct Consensus;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ConsensusParams {
    /// How many masks must have an entry: 1 drops what matters to no task, 2 (the paper's) what matters to a single one too; 0 is task
    /// arithmetic, more than there are masks the base.
    #[serde(default = "two")]
    k: u64,
    /// α, the factor of the masked vector. The authors search it between 0.1 and 1 on validation data; 0.3 is usual for eight tasks.
    #[serde(default = "usual_scale")]
    scale: f64,
}

fn two() -> u64 {
    2
}

fn usual_scale() -> f64 {
    0.3
}

impl Method for Consensus {
    fn id(&self) -> &'static str {
        "consensus"
    }

    fn summary(&self) -> &'static str {
        "task arithmetic without the entries that fewer than k masks have"
    }

    fn formula(&self) -> &'static str {
        "θ = θ₀ + α (τ_mt ⊙ [Σ_t mask_t ≥ k]), where τ_mt = Σ_t τ_t, or θ_mt − θ₀ with port `merged`"
    }

    fn source(&self) -> &'static str {
        "Wang et al., Localizing Task Information for Improved Model Merging and Compression, arXiv:2405.07813, §4.2"
    }

    fn schema(&self) -> Schema {
        schema_for!(ConsensusParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        let parsed: ConsensusParams = parse(params)?;
        if !(parsed.scale as f32).is_finite() {
            let span = params.table.get("scale").map_or(params.span, |entry| entry.node.span);
            let message = format!("`scale` must be a finite number, got {}", parsed.scale);
            return Err(vec![Problem::new("bad-value", message).at(span)]);
        }
        Ok(Box::new(parsed))
    }
}

impl Merge for ConsensusParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn masks(&self) -> Need {
        Need::Required
    }

    fn merged(&self) -> Need {
        Need::Optional
    }

    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        _: &[&Operand<'a>],
    ) -> Result<Box<dyn Rule + 'a>, StageError> {
        let n_masks = inputs.masks.len();
        if self.k > n_masks as u64 {
            inputs.job.warn(format!(
                "no entry is kept: it needs {} masks, and there {} {n_masks}",
                self.k,
                if n_masks == 1 { "is" } else { "are" }
            ));
        }
        // Votes are whole numbers, exact in f32 for more tasks than there will ever be.
        Ok(Box::new(Agreed { n_masks, needed: self.k.min(1 << 24) as f32, scale: self.scale as f32 }))
    }
}

struct Agreed {
    n_masks: usize,
    needed: f32,
    scale: f32,
}

impl Rule for Agreed {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        operand.read_merged(range.clone(), out, scratch)?;
        // A NaN must not hide where no entry is kept.
        check_finite(operand.name(), range.start, out)?;
        let (mut votes, mut mask) = (scratch.take(range.len()), scratch.take(range.len()));
        votes.fill(0.0);
        for position in 0..self.n_masks {
            operand.read_mask(position, range.clone(), &mut mask, scratch)?;
            linear::add_scaled(&mut votes, 1.0, &mask);
        }
        out.iter_mut().zip(&votes).for_each(|(x, votes)| *x *= f32::from(u8::from(*votes >= self.needed)));
        linear::scale(out, self.scale);
        scratch.give_back(votes);
        scratch.give_back(mask);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Input, Suite, Tolerance, Workbench};
    use proptest::prelude::*;
    use serde_json::json;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn entries_with_k_masks_are_kept(
            rows in prop::collection::vec((-1f32..1.0, -1f32..1.0, -1f32..1.0, any::<bool>(), any::<bool>()), 1..300),
            k in 0u64..4,
            scale in -1.0..2.0,
        ) {
            let bench = Workbench::new();
            let n = [rows.len()];
            let column = |pick: fn(&(f32, f32, f32, bool, bool)) -> f32| rows.iter().map(pick).collect::<Vec<f32>>();
            let (base, a, b) = (column(|r| r.0), column(|r| r.1), column(|r| r.2));
            let masks = [column(|r| f32::from(u8::from(r.3))), column(|r| f32::from(u8::from(r.4)))];
            let [base_id, a_id, b_id] = [("base", &base), ("a", &a), ("b", &b)].map(|(name, v)| bench.checkpoint(name, &[("w", &n, v)]));
            let deltas = [("a", bench.diff(base_id, a_id)), ("b", bench.diff(base_id, b_id))];
            let folder = bench.folder().join("given");
            fs_err::create_dir_all(&folder).unwrap();
            for (task, mask) in ["a", "b"].iter().zip(&masks) {
                bench.checkpoint(&format!("given/{task}"), &[("w", &n, mask)]);
            }
            let given = json!({ "method": "file", "path": folder.to_str().unwrap() });
            let made = bench.run("mask", &given, &[Input::Members("deltas", &deltas)]).unwrap();
            let made: Vec<(&str, blake3::Hash)> = made.iter().map(|(name, mask)| (name.as_str(), *mask)).collect();
            let inputs = [Input::One("base", base_id), Input::Members("vectors", &deltas), Input::Members("masks", &made)];
            let merged = bench.one("merge", &json!({ "method": "consensus", "k": k, "scale": scale }), &inputs);
            let masked = bench.one("merge", &json!({ "method": "task-arithmetic", "scale": scale }), &inputs);
            let (merged, masked) = (bench.values(merged, "w"), bench.values(masked, "w"));
            for i in 0..rows.len() {
                let [a, b, base] = [a[i], b[i], base[i]].map(f64::from);
                let votes = (masks[0][i] + masks[1][i]) as u64;
                let kept = if votes >= k { a - base + (b - base) } else { 0.0 };
                let expected: f64 = base + scale * kept;
                prop_assert!((f64::from(merged[i]) - expected).abs() < 2e-6);
                // The same masks on task arithmetic take each task's entries from its own vector.
                let own = f64::from(masks[0][i]) * (a - base) + f64::from(masks[1][i]) * (b - base);
                let expected: f64 = base + scale * own;
                prop_assert!((f64::from(masked[i]) - expected).abs() < 2e-6);
            }
        }
    }

    #[test]
    fn merges_by_consensus_equal_the_authors() {
        let Some(suite) = Suite::open("merges_by_consensus_equal_the_authors") else { return };
        let masks = suite.masks(0.4);
        let masks: Vec<(&str, blake3::Hash)> =
            masks.iter().map(|(name, mask)| (name.as_str(), *mask)).collect();
        for (scale, config) in [(0.3, "consensus_ta_k2_alpha0.3"), (1.0, "consensus_ta_k2_alpha1.0")] {
            let merged = suite.bench.one(
                "merge",
                &json!({ "method": "consensus", "k": 2, "scale": scale }),
                &[
                    Input::One("base", suite.base),
                    Input::Members("vectors", &suite.deltas),
                    Input::Members("masks", &masks),
                ],
            );
            suite.compare(merged, "tall_masks", config, Tolerance { relative_l2: 1e-6, norm: 1e-6 });
        }
    }

    #[test]
    fn a_vector_that_is_not_finite_is_refused_even_where_no_mask_has_it() {
        let bench = Workbench::new();
        let base = bench.checkpoint("base", &[("w", &[2], &[0.0, 0.0])]);
        let sound = bench.diff(base, bench.checkpoint("sound", &[("w", &[2], &[1.0, 1.0])]));
        let deltas = [
            ("a", sound),
            ("b", bench.diff(base, bench.checkpoint("bad", &[("w", &[2], &[1.0, f32::NAN])]))),
        ];
        let nothing =
            bench.one("mask", &json!({ "method": "random", "keep": 0.0 }), &[Input::One("deltas", sound)]);
        let inputs =
            [Input::One("base", base), Input::Members("vectors", &deltas), Input::One("masks", nothing)];
        for method in ["consensus", "tall", "task-arithmetic", "average"] {
            let refused = bench.run("merge", &json!({ "method": method }), &inputs).unwrap_err();
            let expected = "tensor `w` of task vector `b` is not finite: element 1 is NaN";
            assert_eq!(refused.to_string(), expected, "{method}");
        }
    }
}
