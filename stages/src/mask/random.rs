//! `random`: every entry with the same probability, the same ones on every machine.
//!
//! # The generator
//!
//! Element `i` of a tensor is kept if `u_i < keep`, where `u_i` is a number in [0, 1) with 53 bits made from the key of (seed, task, tensor)
//! and `i` alone (a counter-based generator: SplitMix64's finalizer, applied twice with the key added in between). So a mask does not depend
//! on the number of threads, the size of blocks, the order of tensors or the other tasks, and any part of it can be made on its own.

use super::inputs::MaskInputs;
use super::method::{Masking, Method, Prepared, Voting};
use crate::StageError;
use crate::params::{Params, Problem, one_map, parse, to_value};
use merganser_cache::Value;
use merganser_tensors::Scratch;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::ops::Range;

pub(super) struct Random;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RandomParams {
    /// The probability that an entry is kept, 0 to 1: 1 less the drop rate of DARE.
    keep: f64,
    /// Another seed gives other masks, independent of these.
    #[serde(default)]
    seed: u64,
}

impl Method for Random {
    fn id(&self) -> &'static str {
        "random"
    }

    fn summary(&self) -> &'static str {
        "entries drawn at random, independently, by a seed"
    }

    fn formula(&self) -> &'static str {
        "mask_t ~ Bernoulli(keep), by a counter-based generator keyed by (seed, task, tensor)"
    }

    fn source(&self) -> &'static str {
        "Yu et al., Language Models are Super Mario (DARE), arXiv:2311.03099, §3"
    }

    fn schema(&self) -> Schema {
        schema_for!(RandomParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Masking>, Vec<Problem>> {
        let parsed: RandomParams = parse(params)?;
        if !(0.0..=1.0).contains(&parsed.keep) {
            let span = params.table.get("keep").map_or(params.span, |entry| entry.node.span);
            let message = format!("`keep` must be 0 to 1, got {}", parsed.keep);
            return Err(vec![Problem::new("bad-value", message).at(span)]);
        }
        Ok(Box::new(parsed))
    }
}

impl Masking for RandomParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self, task: Option<&str>) -> Result<Value, StageError> {
        let task = Value::map([("task", task.unwrap_or_default())]);
        Ok(one_map([to_value(self)?, task]))
    }

    fn prepare<'a>(&'a self, inputs: &'a MaskInputs<'a>) -> Result<Prepared<'a>, StageError> {
        let keys = inputs
            .tensors
            .iter()
            .map(|info| {
                inputs.asked.iter().map(|task| key(self.seed, inputs.task(*task), &info.name)).collect()
            })
            .collect();
        Ok(Prepared::new(inputs, Box::new(Drawn { keys, keep: self.keep })))
    }
}

/// The key of every tensor and task.
struct Drawn {
    keys: Vec<Vec<u64>>,
    keep: f64,
}

impl Voting for Drawn {
    fn vote(
        &self,
        tensor: usize,
        range: Range<usize>,
        votes: &mut [f32],
        _: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        for key in &self.keys[tensor] {
            for (vote, element) in votes.iter_mut().zip(range.clone()) {
                *vote += f32::from(u8::from(uniform(*key, element as u64) < self.keep));
            }
        }
        Ok(())
    }
}

/// The key of a tensor's mask: equal for equal seed, task and tensor, unrelated otherwise.
fn key(seed: u64, task: &str, tensor: &str) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("merganser 2026-11 random masks v1");
    hasher.update(&seed.to_le_bytes());
    // lengths, so that no two pairs of names are the same bytes
    for name in [task, tensor] {
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// A number in [0, 1) with 53 random bits.
fn uniform(key: u64, counter: u64) -> f64 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let bits = mix(mix(counter.wrapping_mul(GOLDEN) ^ key).wrapping_add(key));
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// The finalizer of `SplitMix64` (Steele, Lea, Flood, OOPSLA 2014; variant 13 of Stafford's): a bijection that spreads every bit.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Input, Workbench};
    use serde_json::json;

    #[test]
    fn the_share_that_is_kept_is_what_was_asked_for_and_tensors_are_independent() {
        let n = 200_000u64;
        let (one, other) = (key(0, "a", "w"), key(0, "a", "v"));
        let (mut kept, mut both) = (0u32, 0u32);
        for i in 0..n {
            let here = uniform(one, i) < 0.3;
            kept += u32::from(here);
            both += u32::from(here && uniform(other, i) < 0.3);
        }
        // five standard deviations of a binomial distribution
        let within = |count: u32, p: f64| {
            (f64::from(count) - p * n as f64).abs() < 5.0 * (p * (1.0 - p) * n as f64).sqrt()
        };
        assert!(within(kept, 0.3) && within(both, 0.09), "{kept} {both}");
    }

    #[test]
    fn neighbours_are_not_correlated() {
        let key = key(7, "t", "w");
        let n = 100_000u64;
        let mean: f64 =
            (0..n).map(|i| (uniform(key, i) - 0.5) * (uniform(key, i + 1) - 0.5)).sum::<f64>() / n as f64;
        // the standard deviation of one product is 1/12
        assert!(mean.abs() < 5.0 / 12.0 / (n as f64).sqrt(), "{mean}");
    }

    #[test]
    fn masks_depend_on_seed_task_and_tensor_and_on_nothing_else() {
        let bench = Workbench::new();
        let zeros = [0.0f32; 300];
        let two = bench.checkpoint("two", &[("v", &[300], &zeros), ("w", &[300], &zeros)]);
        let one = bench.checkpoint("one", &[("w", &[3, 100], &zeros)]);
        let (two, one) = (bench.diff(two, two), bench.diff(one, one));
        let masks = |seed: u64, deltas: &[(&str, blake3::Hash)]| {
            let parameters = json!({ "method": "random", "keep": 0.5, "seed": seed });
            bench.run("mask", &parameters, &[Input::Members("deltas", deltas)]).unwrap()
        };
        let first = masks(1, &[("a", two), ("b", two)]);
        let a = bench.values(first[0].1, "w");
        assert_ne!(a, bench.values(first[0].1, "v"));
        assert_ne!(a, bench.values(first[1].1, "w"));
        assert_ne!(a, bench.values(masks(2, &[("a", two)])[0].1, "w"));
        assert_eq!(a, bench.values(masks(1, &[("c", one), ("a", one)])[1].1, "w"));
    }

    #[test]
    fn nothing_and_everything_can_be_kept() {
        let bench = Workbench::new();
        let base = bench.checkpoint("base", &[("w", &[513], &[0.0; 513])]);
        let deltas = bench.diff(base, base);
        for (keep, expected) in [(0.0, 0.0), (1.0, 1.0)] {
            let parameters = json!({ "method": "random", "keep": keep });
            let mask = bench.one("mask", &parameters, &[Input::One("deltas", deltas)]);
            assert!(bench.values(mask, "w").iter().all(|value| *value == expected));
        }
        let parameters = json!({ "method": "random", "keep": 1.5 });
        let refused = bench.run("mask", &parameters, &[Input::One("deltas", deltas)]).unwrap_err();
        assert_eq!(refused.to_string(), "`keep` must be 0 to 1, got 1.5");
    }
}
