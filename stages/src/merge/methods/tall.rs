//! `tall`: for each task, the part of the merged vector that its mask has.

use crate::StageError;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::{Localized, Merge, Method, Need, Outcome, Parts, Rule};
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use merganser_tensors::Scratch;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::ops::Range;

pub(super) struct Tall;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TallParams {
    /// Factor of the masked vector. The paper takes 1.
    #[serde(default = "one")]
    scale: f64,
}

fn one() -> f64 {
    1.0
}

impl Method for Tall {
    fn id(&self) -> &'static str {
        "tall"
    }

    fn summary(&self) -> &'static str {
        "a model per task: the entries of the merged vector that the task's mask has"
    }

    fn formula(&self) -> &'static str {
        "θ̂_t = θ₀ + scale (mask_t ⊙ τ_mt), where τ_mt = Σ_t τ_t, or θ_mt − θ₀ with port `merged`; stored: τ_mt once, and a bit per entry and task"
    }

    fn source(&self) -> &'static str {
        "Wang et al., Localizing Task Information for Improved Model Merging and Compression, arXiv:2405.07813, §4.1"
    }

    fn schema(&self) -> Schema {
        schema_for!(TallParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        let parsed: TallParams = parse(params)?;
        if !(parsed.scale as f32).is_finite() {
            let span = params.table.get("scale").map_or(params.span, |entry| entry.node.span);
            let message = format!("`scale` must be a finite number, got {}", parsed.scale);
            return Err(vec![Problem::new("bad-value", message).at(span)]);
        }
        Ok(Box::new(parsed))
    }
}

impl Merge for TallParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn outcome(&self) -> Outcome {
        Outcome::PerTask
    }

    fn masks(&self) -> Need {
        Need::Required
    }

    fn merged(&self) -> Need {
        Need::Optional
    }

    fn stores_parts(&self) -> bool {
        true
    }

    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        _: &[&Operand<'a>],
    ) -> Result<Box<dyn Rule + 'a>, StageError> {
        let mask = inputs.mask_of(inputs.task.unwrap_or(0))?;
        Ok(Box::new(Localized(Masked { mask, scale: self.scale as f32 })))
    }
}

struct Masked {
    /// Position on port `masks`.
    mask: usize,
    scale: f32,
}

impl Parts for Masked {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        vector: &mut [f32],
        mask: &mut [f32],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        operand.read_merged(range.clone(), vector, scratch)?;
        operand.read_mask(self.mask, range, mask, scratch)
    }

    fn scale(&self) -> f32 {
        self.scale
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Input, Suite, Tolerance, Workbench};
    use serde_json::json;

    #[test]
    fn localized_models_equal_the_authors() {
        let Some(suite) = Suite::open("localized_models_equal_the_authors") else { return };
        let masks = suite.masks(0.4);
        let masks: Vec<(&str, blake3::Hash)> =
            masks.iter().map(|(name, mask)| (name.as_str(), *mask)).collect();
        let inputs = [
            Input::One("base", suite.base),
            Input::Members("vectors", &suite.deltas),
            Input::Members("masks", &masks),
        ];
        let models = suite.bench.run("merge", &json!({ "method": "tall" }), &inputs).unwrap();
        assert_eq!(models.len(), 6);
        for (task, model) in models {
            let tolerance = Tolerance { relative_l2: 1e-6, norm: 1e-6 };
            suite.compare(model, "tall_masks", &format!("localized_{task}"), tolerance);
        }
    }

    #[test]
    fn the_mask_may_be_one_for_all_and_the_merge_another() {
        let bench = Workbench::new();
        let base = bench.checkpoint("base", &[("v", &[], &[1.0]), ("w", &[3], &[1.0, 1.0, 1.0])]);
        let [a, b] = [("a", [2.0, 1.0, 0.0]), ("b", [3.0, 5.0, 1.0])].map(|(name, values)| {
            (name, bench.diff(base, bench.checkpoint(name, &[("v", &[], &[4.0]), ("w", &[3], &values)])))
        });
        let merged = bench.checkpoint("merged", &[("v", &[], &[0.0]), ("w", &[3], &[10.0, 20.0, 30.0])]);
        let parameters = json!({ "method": "magnitude", "keep": 0.5, "scope": "tensor", "only": ["w"] });
        let mask = bench.one("mask", &parameters, &[Input::One("deltas", b.1)]);
        assert_eq!(bench.values(mask, "w"), [1.0, 1.0, 0.0]);
        let models = |extra: Option<Input<'_>>| {
            let deltas = [a, b];
            let mut inputs =
                vec![Input::One("base", base), Input::Members("vectors", &deltas), Input::One("masks", mask)];
            inputs.extend(extra);
            bench.run("merge", &json!({ "method": "tall", "scale": 0.5 }), &inputs).unwrap()
        };
        let sums = models(None);
        assert_eq!(sums[0].1, sums[1].1, "one mask, one model");
        assert_eq!(bench.values(sums[0].1, "w"), [2.5, 3.0, 1.0]);
        // The mask says nothing of `v`: all of it is taken.
        assert_eq!(bench.values(sums[0].1, "v"), [4.0]);
        let others = models(Some(Input::One("merged", merged)));
        assert_eq!(bench.values(others[1].1, "w"), [5.5, 10.5, 1.0]);
    }

    #[test]
    fn artifacts_are_the_same_for_any_number_of_threads() {
        let bench = Workbench::new();
        let n = 140_003;
        let values = |seed: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * 7919 + seed * 131) % 1009) as f32 / 500.0 - 1.0).collect()
        };
        let base = bench.checkpoint("base", &[("w", &[n], &values(0))]);
        let deltas = [("a", 1), ("b", 2)].map(|(name, seed)| {
            (name, bench.diff(base, bench.checkpoint(name, &[("w", &[n], &values(seed))])))
        });
        let vectors = || Input::Members("vectors", &deltas);
        let parameters = json!({ "method": "random", "keep": 0.5 });
        let masks = bench.run("mask", &parameters, &[Input::Members("deltas", &deltas)]).unwrap();
        let masks: Vec<(&str, blake3::Hash)> =
            masks.iter().map(|(name, mask)| (name.as_str(), *mask)).collect();
        for method in ["tall", "consensus", "task-arithmetic", "average"] {
            let inputs = [Input::One("base", base), vectors(), Input::Members("masks", &masks)];
            let artifacts = [1, 2, 8].map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| bench.run("merge", &json!({ "method": method }), &inputs)).unwrap()
            });
            assert!(artifacts.iter().all(|found| *found == artifacts[0]), "{method}");
        }
    }

    #[test]
    fn masks_must_be_those_of_the_tasks() {
        let bench = Workbench::new();
        let base = bench.checkpoint("base", &[("w", &[1], &[0.0])]);
        let delta = bench.diff(base, bench.checkpoint("a", &[("w", &[1], &[1.0])]));
        let mask =
            bench.one("mask", &json!({ "method": "random", "keep": 1.0 }), &[Input::One("deltas", delta)]);
        let (deltas, masks) = ([("a", delta), ("b", delta)], [("a", mask), ("c", mask)]);
        let inputs = |masks| [Input::One("base", base), Input::Members("vectors", &deltas), masks];
        let refused = |inputs: &[Input<'_>]| {
            bench.run("merge", &json!({ "method": "tall" }), inputs).unwrap_err().to_string()
        };
        assert_eq!(refused(&inputs(Input::Members("masks", &masks))), "port `masks` has no member `b`");
        assert_eq!(
            refused(&inputs(Input::Members("masks", &masks))[..2]),
            "method `tall` needs port `masks`"
        );
        let wide = bench.checkpoint("wide", &[("w", &[2], &[0.0, 0.0])]);
        let wide = bench.one(
            "mask",
            &json!({ "method": "random", "keep": 1.0 }),
            &[Input::One("deltas", bench.diff(wide, wide))],
        );
        let message = refused(&inputs(Input::One("masks", wide)));
        assert_eq!(message, "tensor `w` has shape [2] in mask `` and [1] in the base");
    }
}
