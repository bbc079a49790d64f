//! `dare`: drops entries of each task vector at random and rescales the rest.
//!
//! Which entries are dropped is a function of the seed, the task's name, the tensor's name and the element's position
//! ([`merganser_tensors::kernels::random`]): not of threads, blocks, other tasks or other tensors.

use crate::StageError;
use crate::merge::aggregation::{Aggregation, Consensus, combine};
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::{Merge, Method, Rule};
use crate::merge::pieces::{Piece, each_piece, merge_pieces, sums};
use crate::merge::ranges::Ranges;
use crate::merge::weights::TaskWeights;
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use merganser_tensors::kernels::random::{Stream, threshold};
use merganser_tensors::kernels::{linear, reduce};
use merganser_tensors::{Result, Scratch};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ops::Range;

/// Tensors whose magnitudes add up to less are not rescaled by their norm, as in mergekit.
const SMALLEST_NORM: f64 = 1e-7;

pub(super) struct Dare;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct DareParams {
    /// p, the probability that an entry is dropped; from 0, below 1.
    #[serde(default = "usual_drop")]
    drop: f64,
    /// How what is left is scaled up: by `inverse-density`, 1/(1 − p) (the paper); by `l1`, so that each tensor's sum of magnitudes is what it
    /// was (mergekit); or `none`.
    #[serde(default)]
    rescale: Rescale,
    /// What becomes of the entries that are left: their `sum`, or by sign election `ties-sum` or `ties-mean`.
    #[serde(default)]
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

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Rescale {
    #[default]
    InverseDensity,
    L1,
    None,
}

fn usual_drop() -> f64 {
    0.5
}

fn one() -> f64 {
    1.0
}

impl Method for Dare {
    fn id(&self) -> &'static str {
        "dare"
    }

    fn summary(&self) -> &'static str {
        "drops entries of each task vector at random, scales up the rest, adds them up"
    }

    fn formula(&self) -> &'static str {
        "θ = θ₀ + λ Σ_t w_t m_t ⊙ τ_t / (1 − p), m_t ~ Bernoulli(1 − p)"
    }

    fn source(&self) -> &'static str {
        "Yu et al., Language Models are Super Mario (DARE), arXiv:2311.03099, §3.2; `l1` as in mergekit"
    }

    fn schema(&self) -> Schema {
        schema_for!(DareParams)
    }

    fn parse(&self, params: &Params<'_>) -> std::result::Result<Box<dyn Merge>, Vec<Problem>> {
        let parsed: DareParams = parse(params)?;
        Ranges::of(params)
            .number("drop", parsed.drop, (0.0..1.0).contains(&parsed.drop), "at least 0 and below 1")
            .factor("scale", parsed.scale)
            .finish()?;
        Ok(Box::new(parsed))
    }
}

impl Merge for DareParams {
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
        let kept = 1.0 - self.drop;
        let factors = match self.rescale {
            Rescale::InverseDensity => {
                Factors::Same(weights.iter().map(|weight| (f64::from(*weight) / kept) as f32).collect())
            }
            Rescale::None => Factors::Same(weights.clone()),
            Rescale::L1 => {
                let drop = |operand: &Operand<'_>, piece: &mut Piece<'_>| {
                    self.drop_entries(inputs, operand, piece);
                    Ok(())
                };
                Factors::Tensor(norm_factors(operands, |_| 1, &weights, drop)?)
            }
        };
        let consensus = self.aggregation.consensus(&weights);
        Ok(Box::new(Dropped { params: self, inputs, factors, consensus }))
    }
}

impl DareParams {
    fn drop_entries(&self, inputs: &MergeInputs<'_>, operand: &Operand<'_>, piece: &mut Piece<'_>) {
        if self.drop == 0.0 {
            return;
        }
        // Of the 2³² words, those up to this one keep; a comparison of 32 bits vectorizes.
        let Some(last) = threshold(1.0 - self.drop).checked_sub(1).map(|last| last as u32) else {
            return piece.tasks_mut().for_each(|values| values.fill(0.0));
        };
        let mut words = vec![0; piece.len()];
        let start = piece.range.start;
        for (values, member) in piece.tasks_mut().zip(&inputs.vectors) {
            Stream::new(self.seed, &[&member.name, operand.name()]).fill(start, &mut words);
            for (value, word) in values.iter_mut().zip(&words) {
                *value = if *word <= last { *value } else { 0.0 };
            }
        }
    }
}

/// What each task's entries are multiplied by: weight and rescaling.
pub(super) enum Factors {
    Same(Vec<f32>),
    /// By tensor.
    Tensor(HashMap<usize, Vec<f32>>),
}

impl Factors {
    pub(super) fn of(&self, operand: &Operand<'_>) -> &[f32] {
        match self {
            Self::Same(factors) => factors,
            Self::Tensor(factors) => &factors[&operand.index],
        }
    }
}

/// For each tensor and task, the weight times the sum of magnitudes before entries were dropped by the sum after.
pub(super) fn norm_factors(
    operands: &[&Operand<'_>],
    grain: impl Fn(&Operand<'_>) -> usize + Sync,
    weights: &[f32],
    drop: impl Fn(&Operand<'_>, &mut Piece<'_>) -> Result<()> + Sync,
) -> Result<HashMap<usize, Vec<f32>>> {
    let zero = vec![(0.0, 0.0); weights.len()];
    let norms = sums(
        operands,
        &grain,
        &zero,
        |stretch, scratch| {
            let operand = stretch.operand;
            let mut norms = zero.clone();
            each_piece(operand, grain(operand), stretch.range.clone(), scratch, |piece, _| {
                for (values, norm) in piece.tasks().zip(&mut norms) {
                    norm.0 += reduce::chunk_sum_of_magnitudes(values);
                }
                drop(operand, piece)?;
                for (values, norm) in piece.tasks().zip(&mut norms) {
                    norm.1 += reduce::chunk_sum_of_magnitudes(values);
                }
                Ok(())
            })?;
            Ok(norms)
        },
        |sum, part| {
            for (sum, part) in sum.iter_mut().zip(part) {
                sum.0 += part.0;
                sum.1 += part.1;
            }
        },
    )?;
    let factor = |(weight, (before, after)): (&f32, &(f64, f64))| {
        let is_small = *before < SMALLEST_NORM || *after < SMALLEST_NORM;
        let ratio = if is_small { 1.0 } else { before / after };
        (f64::from(*weight) * ratio) as f32
    };
    let of_tensor = |norms: Vec<(f64, f64)>| weights.iter().zip(&norms).map(factor).collect();
    Ok(operands.iter().map(|operand| operand.index).zip(norms.into_iter().map(of_tensor)).collect())
}

struct Dropped<'a> {
    params: &'a DareParams,
    inputs: &'a MergeInputs<'a>,
    factors: Factors,
    consensus: Option<Consensus>,
}

impl Rule for Dropped<'_> {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let factors = self.factors.of(operand);
        merge_pieces(operand, 1, range, out, scratch, |piece, out, scratch| {
            self.params.drop_entries(self.inputs, operand, piece);
            for (values, factor) in piece.tasks_mut().zip(factors) {
                linear::scale(values, *factor);
            }
            combine(self.consensus.as_ref(), self.params.scale as f32, piece, out, scratch);
            Ok(())
        })
    }
}
