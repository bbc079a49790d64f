//! `pcb`: parameter competition balancing. Entries compete within their task by magnitude and between tasks by agreement; losers drop out.
//!
//! The authors publish two versions that compute different things; both are here. What is clamped, normalized and cut is each whole task
//! vector (all tensors that share the parameters), with exact order statistics found by counting.
//!
//! Differences from the authors' code: a range of zero (a constant task vector) normalizes to 0 instead of dividing by zero; with more than 80
//! tasks, the exponentials are scaled down by one constant, which the normalization removes again, instead of overflowing.

use crate::StageError;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::{Merge, Method, Rule};
use crate::merge::pieces::{Piece, Stretch, each_piece, merge_pieces, stretches};
use crate::merge::ranges::Ranges;
use crate::merge::selection::{Feed, TaskVectors, statistics};
use crate::merge::weights::TaskWeights;
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use merganser_tensors::kernels::elementary::{exp, tanh};
use merganser_tensors::kernels::linear;
use merganser_tensors::kernels::select::{Order, Statistic};
use merganser_tensors::{Result, Scratch};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The least that a sum of scores divides by.
const SMALLEST_SUM: f32 = 1e-12;

/// Exponents up to this fit in f32 with room for a sum.
const LARGEST_EXPONENT: f64 = 80.0;

pub(super) struct Pcb;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct PcbParams {
    /// The share of entries of each task that win, highest scores first; above 0, at most 1.
    #[serde(default = "usual_ratio")]
    ratio: f64,
    /// Which of the authors' two programs: `root` (`pcb-merging.py`) clamps the extreme 0.01 % of magnitudes and compares τ_t with Σ_j τ_j; `vision`
    /// (`vision_source_code/pcb.py`) clamps 1 % and compares with the sum of normalized task vectors.
    #[serde(default)]
    version: Version,
    /// λ, the factor of the merged task vector.
    #[serde(default = "usual_scale")]
    scale: f64,
    /// `uniform` (every task counts 1), or a factor per task of its entries (the authors' λ_t).
    #[serde(default)]
    weights: TaskWeights,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Version {
    #[default]
    Root,
    Vision,
}

impl Version {
    /// The share of magnitudes at either end that is clamped.
    fn clamped(self) -> f64 {
        match self {
            Self::Root => 0.0001,
            Self::Vision => 0.01,
        }
    }
}

fn usual_ratio() -> f64 {
    0.1
}

fn usual_scale() -> f64 {
    1.2
}

impl Method for Pcb {
    fn id(&self) -> &'static str {
        "pcb"
    }

    fn summary(&self) -> &'static str {
        "weighs entries by competition within their task and agreement between tasks; only the best scores count"
    }

    fn formula(&self) -> &'static str {
        "s_t = exp(T·norm(|τ_t|)²) · tanh(τ_t Σ_j τ_j); ŝ_t = norm(top_ratio(s_t)); θ = θ₀ + λ Σ_t ŝ_t w_t τ_t / Σ_t ŝ_t"
    }

    fn source(&self) -> &'static str {
        "Du et al., Parameter Competition Balancing for Model Merging, arXiv:2410.02396, §3"
    }

    fn schema(&self) -> Schema {
        schema_for!(PcbParams)
    }

    fn parse(&self, params: &Params<'_>) -> std::result::Result<Box<dyn Merge>, Vec<Problem>> {
        let parsed: PcbParams = parse(params)?;
        Ranges::of(params).share("ratio", parsed.ratio).factor("scale", parsed.scale).finish()?;
        Ok(Box::new(parsed))
    }
}

impl Merge for PcbParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> std::result::Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn weights(&self) -> Option<&TaskWeights> {
        Some(&self.weights)
    }

    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        operands: &[&Operand<'a>],
    ) -> std::result::Result<Box<dyn Rule + 'a>, StageError> {
        let stretches = stretches(operands, |_| 1);
        let n_tasks = inputs.vectors.len();
        let n: u64 = stretches.iter().map(|stretch| stretch.range.len() as u64).sum();
        let ends = |low: f64, high: f64| vec![rank(n, low, 0.0), rank(n, 1.0 - high, 1.0)];
        let range_of = |order: Order, ranks: Vec<u64>, feed: &dyn Feed| -> Result<Vec<Limits>> {
            let found = statistics(&stretches, order, &vec![ranks; n_tasks], feed)?;
            let limits =
                |own: Vec<Statistic>| Limits { low: order.value(own[0].key), high: order.value(own[1].key) };
            Ok(found.into_iter().map(limits).collect())
        };
        let clamped = self.version.clamped();
        let magnitudes = range_of(Order::Magnitude, ends(clamped, clamped), &TaskVectors)?;
        let scores = Scores { version: self.version, magnitudes };
        let winners = range_of(Order::Value, ends(1.0 - self.ratio, 0.0), &scores)?;
        let weights = self.weights.of(inputs, operands)?;
        let factors = weights.into_iter().map(|weight| weight as f32).collect();
        Ok(Box::new(Balanced { scores, winners, factors, scale: self.scale as f32 }))
    }
}

/// `int(n·share − less)`, as the authors compute positions in sorted values, within them.
fn rank(n: u64, share: f64, less: f64) -> u64 {
    ((n as f64 * share - less).max(0.0) as u64).min(n.saturating_sub(1))
}

/// What values of a task are clamped to and normalized by.
#[derive(Clone, Copy, Debug)]
struct Limits {
    low: f32,
    high: f32,
}

impl Limits {
    fn clamp(self, value: f32) -> f32 {
        value.max(self.low).min(self.high)
    }

    /// A clamped value, as a share of the range; 0 if there is none.
    fn normalize(self, value: f32) -> f32 {
        let range = self.high - self.low;
        if range > 0.0 { (self.clamp(value) - self.low) / range } else { 0.0 }
    }
}

/// How entries compete.
struct Scores {
    version: Version,
    /// Of each task.
    magnitudes: Vec<Limits>,
}

impl Scores {
    /// Calls `work` with each task's values and their scores.
    fn each_task(
        &self,
        piece: &Piece<'_>,
        scratch: &mut Scratch,
        mut work: impl FnMut(usize, &[f32], &[f32]),
    ) {
        let (mut sums, mut scores) = (scratch.take(piece.len()), scratch.take(piece.len()));
        sums.fill(0.0);
        for (values, limits) in piece.tasks().zip(&self.magnitudes) {
            match self.version {
                Version::Root => linear::add_scaled(&mut sums, 1.0, values),
                Version::Vision => {
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum += sign(*value) * limits.normalize(value.abs());
                    }
                }
            }
        }
        let n_tasks = self.magnitudes.len() as f64;
        let reduce = (n_tasks - LARGEST_EXPONENT).max(0.0);
        for (task, (values, limits)) in piece.tasks().zip(&self.magnitudes).enumerate() {
            for ((score, value), sum) in scores.iter_mut().zip(values).zip(&sums) {
                let share = limits.normalize(value.abs());
                let within = exp(f64::from(self.magnitudes.len() as f32 * (share * share)) - reduce) as f32;
                let between = tanh(f64::from(value * sum)) as f32;
                *score = within * between;
            }
            work(task, values, &scores);
        }
        scratch.give_back(sums);
        scratch.give_back(scores);
    }
}

fn sign(value: f32) -> f32 {
    if value == 0.0 { 0.0 } else { value.signum() }
}

impl Feed for Scores {
    fn feed(
        &self,
        stretch: &Stretch<'_, '_>,
        _: &Range<usize>,
        scratch: &mut Scratch,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        each_piece(stretch.operand, 1, stretch.range.clone(), scratch, |piece, scratch| {
            self.each_task(piece, scratch, |task, _, scores| sink(task, scores));
            Ok(())
        })
    }
}

struct Balanced {
    scores: Scores,
    /// The scores of each task that count.
    winners: Vec<Limits>,
    factors: Vec<f32>,
    scale: f32,
}

impl Rule for Balanced {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        merge_pieces(operand, 1, range, out, scratch, |piece, out, scratch| {
            let mut totals = scratch.take(piece.len());
            totals.fill(0.0);
            out.fill(0.0);
            self.scores.each_task(piece, scratch, |task, values, scores| {
                let (limits, winners) = (self.scores.magnitudes[task], self.winners[task]);
                let factor = self.factors[task];
                let merged = out.iter_mut().zip(&mut totals);
                for (((out, total), value), score) in merged.zip(values).zip(scores) {
                    let share = winners.normalize(*score);
                    *out += sign(*value) * limits.clamp(value.abs()) * factor * share;
                    *total += share;
                }
            });
            for (out, total) in out.iter_mut().zip(&totals) {
                *out /= total.max(SMALLEST_SUM);
            }
            linear::scale(out, self.scale);
            scratch.give_back(totals);
            Ok(())
        })
    }
}
