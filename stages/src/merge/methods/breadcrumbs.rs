//! `breadcrumbs`: drops the largest outliers and the small tail of each task vector.
//!
//! The authors choose row by row (a row is what the last dimension counts); mergekit over each tensor. Of equal magnitudes, the one that comes
//! first counts as the larger; the authors' `topk` leaves that open. A row shorter than 1/density keeps nothing, one shorter than
//! 1/gamma loses no outlier, as in the authors' code; a scalar is kept as it is where rows are asked for.

use crate::StageError;
use crate::merge::aggregation::{Aggregation, Consensus, combine};
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::{Merge, Method, Rule};
use crate::merge::pieces::{Piece, merge_pieces};
use crate::merge::ranges::Ranges;
use crate::merge::selection::{Cut, exact_cuts, row_key};
use crate::merge::weights::TaskWeights;
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use merganser_tensors::kernels::linear;
use merganser_tensors::stream::BLOCK_ELEMENTS;
use merganser_tensors::{Result, Scratch};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ops::Range;

pub(super) struct Breadcrumbs;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct BreadcrumbsParams {
    /// The share of entries that are kept; above 0, at most 1.
    #[serde(default = "usual_density")]
    density: f64,
    /// γ, the share of the largest entries that are dropped first; from 0, below 1.
    #[serde(default = "usual_gamma")]
    gamma: f64,
    /// What shares are taken of: each `row` (the authors), or each `tensor` (mergekit).
    #[serde(default)]
    scope: Scope,
    /// What becomes of the kept entries: their `sum`, or by sign election `ties-sum` or `ties-mean`.
    #[serde(default)]
    aggregation: Aggregation,
    /// α, the factor of the merged task vector.
    #[serde(default = "one")]
    scale: f64,
    /// `uniform` (every task counts 1), or a weight per task.
    #[serde(default)]
    weights: TaskWeights,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Scope {
    #[default]
    Row,
    Tensor,
}

fn usual_density() -> f64 {
    0.1
}

fn usual_gamma() -> f64 {
    0.01
}

fn one() -> f64 {
    1.0
}

impl Method for Breadcrumbs {
    fn id(&self) -> &'static str {
        "breadcrumbs"
    }

    fn summary(&self) -> &'static str {
        "adds task vectors without their largest outliers and without their small tail"
    }

    fn formula(&self) -> &'static str {
        "θ = θ₀ + α Σ_t w_t m_t ⊙ τ_t; m_t keeps the next largest share `density` after the largest share γ of |τ_t|"
    }

    fn source(&self) -> &'static str {
        "Davari and Belilovsky, Model Breadcrumbs, arXiv:2312.06795, §3; per tensor as in mergekit"
    }

    fn schema(&self) -> Schema {
        schema_for!(BreadcrumbsParams)
    }

    fn parse(&self, params: &Params<'_>) -> std::result::Result<Box<dyn Merge>, Vec<Problem>> {
        let parsed: BreadcrumbsParams = parse(params)?;
        let gamma = parsed.gamma;
        Ranges::of(params)
            .share("density", parsed.density)
            .number("gamma", gamma, (0.0..1.0).contains(&gamma), "at least 0 and below 1")
            .factor("scale", parsed.scale)
            .finish()?;
        Ok(Box::new(parsed))
    }
}

impl BreadcrumbsParams {
    /// How many of `n` elements are dropped from the top, and how many of the next are kept.
    fn counts(&self, n: usize) -> (usize, usize) {
        let (top, kept) = ((n as f64 * self.gamma) as usize, (n as f64 * self.density) as usize);
        match self.scope {
            Scope::Row => (top, kept.min(n - top)),
            // mergekit drops fewer outliers rather than keep less than the density
            Scope::Tensor => (top.min(n - kept), kept),
        }
    }
}

impl Merge for BreadcrumbsParams {
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
        let weights = self.weights.of(inputs, operands)?;
        let weights: Vec<f32> = weights.into_iter().map(|weight| weight as f32).collect();
        let mut bands = HashMap::new();
        if self.scope == Scope::Tensor {
            let counts = |n: usize| {
                let (top, kept) = self.counts(n);
                vec![top, top + kept]
            };
            bands.extend(operands.iter().map(|operand| operand.index).zip(exact_cuts(operands, counts)?));
        }
        let consensus = self.aggregation.consensus(&weights);
        Ok(Box::new(Band { params: self, bands, consensus, weights, scale: self.scale as f32 }))
    }
}

struct Band<'a> {
    params: &'a BreadcrumbsParams,
    /// Per tensor and task, the cut of what is dropped from the top and that of what is kept or dropped from the top.
    bands: HashMap<usize, Vec<Vec<Cut>>>,
    consensus: Option<Consensus>,
    weights: Vec<f32>,
    scale: f32,
}

impl Band<'_> {
    /// The length of a row; 1, pieces of any length, where rows do not matter.
    fn grain(&self, operand: &Operand<'_>) -> usize {
        match self.params.scope {
            Scope::Row => operand.shape().last().copied().unwrap_or(1),
            Scope::Tensor => 1,
        }
    }

    fn merge(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let grain = self.grain(operand);
        let mut keys = Vec::new();
        merge_pieces(operand, grain, range, out, scratch, |piece, out, scratch| {
            match self.params.scope {
                Scope::Tensor => trim(&self.bands[&operand.index], piece),
                Scope::Row if operand.shape().is_empty() => (),
                Scope::Row => {
                    let (top, kept) = self.params.counts(grain);
                    for values in piece.tasks_mut() {
                        values.chunks_exact_mut(grain).for_each(|row| trim_row(row, top, kept, &mut keys));
                    }
                }
            }
            for (values, weight) in piece.tasks_mut().zip(&self.weights) {
                linear::scale(values, *weight);
            }
            combine(self.consensus.as_ref(), self.scale, piece, out, scratch);
            Ok(())
        })
    }
}

/// Keeps, of each task, what lies between its two cuts.
fn trim(bands: &[Vec<Cut>], piece: &mut Piece<'_>) {
    let range = piece.range.clone();
    for (values, cuts) in piece.tasks_mut().zip(bands) {
        cuts[1].trim(&range, values);
        cuts[0].drop_from(&range, values);
    }
}

impl Rule for Band<'_> {
    fn needs_whole(&self, operand: &Operand<'_>) -> bool {
        // Every block of a longer row would look at the whole row.
        self.grain(operand) > BLOCK_ELEMENTS
    }

    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.merge(operand, range, out, scratch)
    }

    fn tensor(&self, operand: &Operand<'_>, out: &mut [f32]) -> std::result::Result<(), StageError> {
        Ok(self.merge(operand, 0..out.len(), out, &mut Scratch::new())?)
    }
}

/// Keeps, of a row, the `kept` largest magnitudes after the `top` largest.
fn trim_row(row: &mut [f32], top: usize, kept: usize, keys: &mut Vec<u64>) {
    if kept == 0 {
        return row.fill(0.0);
    }
    if top == 0 && kept >= row.len() {
        return;
    }
    keys.clear();
    keys.extend(row.iter().enumerate().map(|(column, value)| row_key(column, *value)));
    let n = keys.len();
    let upper = if top == 0 { u64::MAX } else { *keys.select_nth_unstable(n - top).1 };
    let lower = *keys[..n - top].select_nth_unstable(n - top - kept).1;
    for (column, value) in row.iter_mut().enumerate() {
        let own = row_key(column, *value);
        *value = if own >= lower && own < upper { *value } else { 0.0 };
    }
}
