//! `ties`: trim, elect sign, merge what agrees.
//!
//! The authors trim over the whole task vector and keep every entry that is at least as large as their threshold; mergekit trims tensor by
//! tensor to an exact number of entries. Thresholds are exact in both cases, found by counting, not by sorting.

use crate::StageError;
use crate::merge::aggregation::{Consensus, Together, majority};
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::{Merge, Method, Rule};
use crate::merge::pieces::{Piece, each_piece, merge_pieces, pass, stretches};
use crate::merge::ranges::Ranges;
use crate::merge::selection::{Cut, exact_cuts, global_cuts};
use crate::merge::weights::TaskWeights;
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use merganser_tensors::kernels::linear;
use merganser_tensors::{Result, Scratch};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ops::Range;

pub(super) struct Ties;

#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TiesParams {
    /// K, the share of entries that survive the trim, largest magnitudes first; above 0, at most 1.
    #[serde(default = "usual_density")]
    pub density: f64,
    /// Where the largest are looked for: in the `global` task vector, all tensors that share these parameters together (the authors), or in
    /// each `tensor` by itself (mergekit).
    #[serde(default)]
    pub scope: Scope,
    /// What becomes of the entries that have the elected sign: their `mean`, `sum`, or the `max` in magnitude.
    #[serde(default)]
    pub agg: Agg,
    /// What a mean divides by: the `count` of agreeing entries (the authors), or the sum of their `weights` (mergekit's `normalize`).
    #[serde(default)]
    pub mean_by: MeanBy,
    /// The sign where the trimmed task vectors add up to exactly zero: that of the `majority` of all entries (the authors), or
    /// `positive` (mergekit).
    #[serde(default)]
    pub tie: Tie,
    /// λ, the factor of the merged task vector.
    #[serde(default = "one")]
    pub scale: f64,
    /// `uniform`, or a weight per task; entries are weighted after the trim, before the election.
    #[serde(default)]
    pub weights: TaskWeights,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Scope {
    #[default]
    Global,
    Tensor,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Agg {
    #[default]
    Mean,
    Sum,
    Max,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum MeanBy {
    #[default]
    Count,
    Weights,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Tie {
    #[default]
    Majority,
    Positive,
}

fn usual_density() -> f64 {
    0.2
}

fn one() -> f64 {
    1.0
}

impl Method for Ties {
    fn id(&self) -> &'static str {
        "ties"
    }

    fn summary(&self) -> &'static str {
        "keeps the largest entries of each task vector, elects a sign per parameter, merges what agrees with it"
    }

    fn formula(&self) -> &'static str {
        "τ̂_t = top_K(τ_t); γ = sign(Σ_t w_t τ̂_t); θ = θ₀ + λ mean{w_t τ̂_t : sign τ̂_t = γ}"
    }

    fn source(&self) -> &'static str {
        "Yadav et al., TIES-Merging, arXiv:2306.01708, §4; per tensor as in mergekit"
    }

    fn schema(&self) -> Schema {
        schema_for!(TiesParams)
    }

    fn parse(&self, params: &Params<'_>) -> std::result::Result<Box<dyn Merge>, Vec<Problem>> {
        let parsed: TiesParams = parse(params)?;
        Ranges::of(params).share("density", parsed.density).factor("scale", parsed.scale).finish()?;
        Ok(Box::new(parsed))
    }
}

impl Merge for TiesParams {
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
        Ok(Box::new(TiesRule::new(self, inputs, operands)?))
    }
}

/// The thresholds, and how what is left is merged.
pub(super) struct TiesRule {
    cuts: Cuts,
    consensus: Consensus,
    scale: f32,
}

enum Cuts {
    /// Of each task.
    Global(Vec<Cut>),
    /// Of each tensor and task.
    Tensor(HashMap<usize, Vec<Cut>>),
}

impl TiesParams {
    /// The authors' rule with the sum of what agrees, as it is.
    pub(super) fn summing(density: f64) -> Self {
        Self {
            density,
            scope: Scope::Global,
            agg: Agg::Sum,
            mean_by: MeanBy::Count,
            tie: Tie::Majority,
            scale: 1.0,
            weights: TaskWeights::Uniform,
        }
    }
}

impl TiesRule {
    pub(super) fn new(
        params: &TiesParams,
        inputs: &MergeInputs<'_>,
        operands: &[&Operand<'_>],
    ) -> std::result::Result<Self, StageError> {
        let cuts = match params.scope {
            Scope::Global => Cuts::Global(global_cuts(operands, params.density)?),
            Scope::Tensor => {
                // never none at all, as mergekit
                let count = |n: usize| vec![((n as f64 * params.density) as usize).max(1)];
                let cuts = exact_cuts(operands, count)?.into_iter();
                let first = |cuts: Vec<Vec<Cut>>| cuts.into_iter().map(|own| own[0]).collect();
                Cuts::Tensor(operands.iter().map(|operand| operand.index).zip(cuts.map(first)).collect())
            }
        };
        let weights = params.weights.of(inputs, operands)?;
        let together = match (params.agg, params.mean_by) {
            (Agg::Sum, _) => Together::Sum,
            (Agg::Max, _) => Together::Largest,
            (Agg::Mean, MeanBy::Count) => Together::MeanByCount,
            (Agg::Mean, MeanBy::Weights) => Together::MeanByWeight,
        };
        let weights = weights.into_iter().map(|weight| weight as f32).collect();
        let consensus = Consensus { together, tie: 1.0, weights };
        let mut rule = Self { cuts, consensus, scale: params.scale as f32 };
        if params.tie == Tie::Majority {
            rule.consensus.tie = rule.majority_sign(operands)?;
        }
        Ok(rule)
    }

    /// The sign that most sums of trimmed entries have.
    fn majority_sign(&self, operands: &[&Operand<'_>]) -> Result<f32> {
        let (balances, _) = pass(
            &stretches(operands, |_| 1),
            || (),
            |(), stretch, scratch| {
                let mut balance = 0;
                each_piece(stretch.operand, 1, stretch.range.clone(), scratch, |piece, scratch| {
                    self.trim(stretch.operand, piece);
                    balance += majority(piece, scratch);
                    Ok(())
                })?;
                Ok(balance)
            },
        )?;
        Ok(balances.iter().sum::<i64>().signum() as f32)
    }

    /// Sets to zero what the trim removes, and what does not agree with the elected sign: what is left of each task vector.
    pub(super) fn select(&self, operand: &Operand<'_>, piece: &mut Piece<'_>, scratch: &mut Scratch) {
        self.trim(operand, piece);
        self.consensus.keep_agreeing(piece, scratch);
    }

    /// Sets to zero what the trim removes and weighs the rest.
    fn trim(&self, operand: &Operand<'_>, piece: &mut Piece<'_>) {
        let cuts = match &self.cuts {
            Cuts::Global(cuts) => cuts,
            Cuts::Tensor(cuts) => &cuts[&operand.index],
        };
        let range = piece.range.clone();
        for ((values, cut), weight) in piece.tasks_mut().zip(cuts).zip(&self.consensus.weights) {
            cut.trim(&range, values);
            linear::scale(values, *weight);
        }
    }
}

impl Rule for TiesRule {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        merge_pieces(operand, 1, range, out, scratch, |piece, out, scratch| {
            self.trim(operand, piece);
            self.consensus.merge(piece, out, scratch);
            linear::scale(out, self.scale);
            Ok(())
        })
    }
}
