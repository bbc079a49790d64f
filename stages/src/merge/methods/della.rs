//! `della`: drops entries at random, small ones more often, and rescales the rest.
//!
//! Within a row, the entry of rank r (0 is the smallest magnitude) of d is kept with probability density − ε + 2ε·r/(d − 1). A row is what
//! belongs to one output: all but the first dimension, so a filter of a convolution is one row (mergekit ranks along the second
//! dimension there, the input channels of each pixel); a vector is one row. Of equal magnitudes, the one that comes first ranks
//! higher. Entries are dropped by the same random streams as in `dare`.

use super::dare::{Factors, Rescale, norm_factors};
use crate::StageError;
use crate::merge::aggregation::{Aggregation, Consensus, combine};
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::{Merge, Method, Rule};
use crate::merge::pieces::{Piece, merge_pieces};
use crate::merge::ranges::Ranges;
use crate::merge::selection::{column_of, row_key};
use crate::merge::weights::TaskWeights;
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use merganser_tensors::kernels::linear;
use merganser_tensors::kernels::random::{Stream, happens, threshold};
use merganser_tensors::stream::BLOCK_ELEMENTS;
use merganser_tensors::{Result, Scratch};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::ops::Range;

pub(super) struct Della;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct DellaParams {
    /// The share of entries that are kept, on average; above ε and below 1 − ε.
    #[serde(default = "usual_density")]
    density: f64,
    /// ε, how much less likely than `density` the smallest entry of a row is kept, and how much more likely the largest.
    #[serde(default = "usual_epsilon")]
    epsilon: f64,
    /// How what is left is scaled up: by `inverse-density`, each entry by its own 1/probability (the paper); by `l1`, so that each tensor's sum of
    /// magnitudes is what it was (mergekit); or `none`.
    #[serde(default)]
    rescale: Rescale,
    /// What becomes of the entries that are left: by sign election `ties-mean` or `ties-sum`, or their `sum`.
    #[serde(default = "usual_aggregation")]
    aggregation: Aggregation,
    /// λ, the factor of the merged task vector.
    #[serde(default = "one")]
    scale: f64,
    /// `uniform` (every task counts 1), or a weight per task.
    #[serde(default)]
    weights: TaskWeights,
    /// Another seed drops other entries.
    #[serde(default)]
    seed: u64,
}

fn usual_density() -> f64 {
    0.5
}

fn usual_epsilon() -> f64 {
    0.15
}

fn usual_aggregation() -> Aggregation {
    Aggregation::TiesMean
}

fn one() -> f64 {
    1.0
}

impl Method for Della {
    fn id(&self) -> &'static str {
        "della"
    }

    fn summary(&self) -> &'static str {
        "drops entries at random, small ones more often, scales up the rest, merges what agrees in sign"
    }

    fn formula(&self) -> &'static str {
        "p = density − ε + 2ε·rank/(d − 1) per row; θ = θ₀ + λ mean{w_t τ_t/p_t : kept, sign elected}"
    }

    fn source(&self) -> &'static str {
        "Deep et al., DELLA-Merging, arXiv:2406.11617, §3; `l1` as in mergekit"
    }

    fn schema(&self) -> Schema {
        schema_for!(DellaParams)
    }

    fn parse(&self, params: &Params<'_>) -> std::result::Result<Box<dyn Merge>, Vec<Problem>> {
        let parsed: DellaParams = parse(params)?;
        let (density, epsilon) = (parsed.density, parsed.epsilon);
        let fits = density - epsilon > 0.0 && density + epsilon < 1.0;
        Ranges::of(params)
            .number("epsilon", epsilon, epsilon >= 0.0, "at least 0")
            .number("density", density, fits, &format!("above {epsilon} and below {}", 1.0 - epsilon))
            .factor("scale", parsed.scale)
            .finish()?;
        Ok(Box::new(parsed))
    }
}

impl Merge for DellaParams {
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
        let factors = match self.rescale {
            Rescale::InverseDensity | Rescale::None => Factors::Same(weights.clone()),
            Rescale::L1 => {
                let drop = |operand: &Operand<'_>, piece: &mut Piece<'_>| {
                    self.drop_entries(inputs, operand, piece);
                    Ok(())
                };
                Factors::Tensor(norm_factors(operands, row_length, &weights, drop)?)
            }
        };
        let consensus = self.aggregation.consensus(&weights);
        Ok(Box::new(Dropped { params: self, inputs, factors, consensus }))
    }
}

/// The number of elements that belong to one output.
fn row_length(operand: &Operand<'_>) -> usize {
    match operand.shape() {
        [] => 1,
        [n] => *n,
        [_, rest @ ..] => rest.iter().product(),
    }
}

impl DellaParams {
    /// Drops entries of whole rows; with `inverse-density`, scales up the rest.
    fn drop_entries(&self, inputs: &MergeInputs<'_>, operand: &Operand<'_>, piece: &mut Piece<'_>) {
        let columns = row_length(operand);
        // by rank: the probability's threshold and what a kept entry is multiplied by
        let chances: Vec<(u64, f32)> = (0..columns)
            .map(|rank| {
                let part = if columns > 1 { rank as f64 / (columns - 1) as f64 } else { 0.5 };
                let kept = self.density - self.epsilon + 2.0 * self.epsilon * part;
                let factor = if self.rescale == Rescale::InverseDensity { 1.0 / kept } else { 1.0 };
                (threshold(kept), factor as f32)
            })
            .collect();
        let mut words = vec![0; piece.len()];
        let mut keys: Vec<u64> = Vec::with_capacity(columns);
        let start = piece.range.start;
        for (values, member) in piece.tasks_mut().zip(&inputs.vectors) {
            Stream::new(self.seed, &[&member.name, operand.name()]).fill(start, &mut words);
            for (row, words) in values.chunks_exact_mut(columns).zip(words.chunks_exact(columns)) {
                keys.clear();
                keys.extend(row.iter().enumerate().map(|(column, value)| row_key(column, *value)));
                keys.sort_unstable();
                for (key, (limit, factor)) in keys.iter().zip(&chances) {
                    let column = column_of(*key);
                    let kept = happens(words[column], *limit);
                    row[column] = if kept { row[column] * factor } else { 0.0 };
                }
            }
        }
    }
}

struct Dropped<'a> {
    params: &'a DellaParams,
    inputs: &'a MergeInputs<'a>,
    factors: Factors,
    consensus: Option<Consensus>,
}

impl Dropped<'_> {
    fn merge(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let factors = self.factors.of(operand);
        merge_pieces(operand, row_length(operand), range, out, scratch, |piece, out, scratch| {
            self.params.drop_entries(self.inputs, operand, piece);
            for (values, factor) in piece.tasks_mut().zip(factors) {
                linear::scale(values, *factor);
            }
            combine(self.consensus.as_ref(), self.params.scale as f32, piece, out, scratch);
            Ok(())
        })
    }
}

impl Rule for Dropped<'_> {
    fn needs_whole(&self, operand: &Operand<'_>) -> bool {
        // Every block of a longer row would sort the whole row.
        row_length(operand) > BLOCK_ELEMENTS
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
