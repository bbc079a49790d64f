//! `sce`: select the entries in which tasks differ most, weigh tasks by their energy there, erase minority signs.
//!
//! All per tensor. A tensor whose selected entries are so small that their energies add up to less than 10⁻⁶ weighs its tasks alike, and sums of
//! weights are not divided by less than 10⁻⁶: both as in mergekit.

use crate::StageError;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::{Merge, Method, Rule};
use crate::merge::pieces::{Piece, Stretch, blocks_of, each_piece, merge_pieces, pass};
use crate::merge::ranges::Ranges;
use crate::merge::selection::{Cut, Feed, exact_cut, statistics};
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use merganser_tensors::kernels::select::Order;
use merganser_tensors::kernels::{linear, reduce};
use merganser_tensors::stream::BLOCK_ELEMENTS;
use merganser_tensors::{Result, Scratch};
use rayon::prelude::*;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ops::Range;

/// Energies that add up to less are no basis for weights.
const SMALLEST_ENERGY: f64 = 1e-6;

/// The least that a sum of weights divides by.
const SMALLEST_WEIGHT: f32 = 1e-6;

pub(super) struct Sce;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SceParams {
    /// The share of entries that are selected, of those in which tasks differ at all, largest variance over the tasks first; above 0, at most 1 (all).
    #[serde(default = "one")]
    select_topk: f64,
    /// λ, the factor of the merged task vector.
    #[serde(default = "one")]
    scale: f64,
}

fn one() -> f64 {
    1.0
}

impl Method for Sce {
    fn id(&self) -> &'static str {
        "sce"
    }

    fn summary(&self) -> &'static str {
        "selects entries by their variance over tasks, weighs tasks by their energy, erases minority signs"
    }

    fn formula(&self) -> &'static str {
        "m = top_k(Var_t τ_t); w_t ∝ mean((m⊙τ_t)²); θ = θ₀ + λ Σ_t w_t a_t ⊙ m ⊙ τ_t / Σ_t w_t a_t; a_t = [sign τ_t = sign Σ τ]"
    }

    fn source(&self) -> &'static str {
        "Wan et al., FuseChat, arXiv:2408.07990, §3.3; as in mergekit"
    }

    fn schema(&self) -> Schema {
        schema_for!(SceParams)
    }

    fn parse(&self, params: &Params<'_>) -> std::result::Result<Box<dyn Merge>, Vec<Problem>> {
        let parsed: SceParams = parse(params)?;
        Ranges::of(params).share("select_topk", parsed.select_topk).factor("scale", parsed.scale).finish()?;
        Ok(Box::new(parsed))
    }
}

impl Merge for SceParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> std::result::Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn prepare<'a>(
        &'a self,
        _: &'a MergeInputs<'a>,
        operands: &[&Operand<'a>],
    ) -> std::result::Result<Box<dyn Rule + 'a>, StageError> {
        // Small tensors side by side; large ones one after another, their blocks in parallel.
        let is_small = |operand: &Operand<'_>| operand.n_elements() <= BLOCK_ELEMENTS;
        let small: Vec<Result<Option<Selected>>> = operands
            .par_iter()
            .map(|operand| if is_small(operand) { self.select(operand).map(Some) } else { Ok(None) })
            .collect();
        let mut tensors = HashMap::new();
        for (operand, small) in operands.iter().zip(small) {
            let selected = match small? {
                Some(selected) => selected,
                None => self.select(operand)?,
            };
            tensors.insert(operand.index, selected);
        }
        Ok(Box::new(Fuse { tensors, scale: self.scale as f32 }))
    }
}

/// What is selected of a tensor, and how much each task counts in it.
struct Selected {
    /// By variance; none of a tensor that is taken whole.
    cut: Option<Cut>,
    weights: Vec<f32>,
}

impl SceParams {
    fn select(&self, operand: &Operand<'_>) -> Result<Selected> {
        let stretches = blocks_of(operand);
        let cut = if self.select_topk < 1.0 { Some(self.cut(operand, &stretches)?) } else { None };
        let (parts, _) = pass(
            &stretches,
            || (),
            |(), stretch, scratch| {
                let mut energies = vec![0.0; operand.n_tasks()];
                each_piece(operand, 1, stretch.range.clone(), scratch, |piece, scratch| {
                    keep(cut.as_ref(), piece, scratch);
                    for (energy, values) in energies.iter_mut().zip(piece.tasks()) {
                        *energy += reduce::chunk_sum_of_squares(values);
                    }
                    Ok(())
                })?;
                Ok(energies)
            },
        )?;
        let n = operand.n_elements().max(1) as f64;
        let energies: Vec<f64> =
            (0..operand.n_tasks()).map(|t| parts.iter().map(|part| part[t]).sum::<f64>() / n).collect();
        let total: f64 = energies.iter().sum();
        let weights = energies.iter().map(|energy| {
            (if total < SMALLEST_ENERGY { 1.0 / energies.len() as f64 } else { energy / total }) as f32
        });
        Ok(Selected { cut, weights: weights.collect() })
    }

    /// The cut of the variances that keeps the wanted share of those that are not zero.
    fn cut(&self, operand: &Operand<'_>, stretches: &[Stretch<'_, '_>]) -> Result<Cut> {
        let n = operand.n_elements();
        let wanted = |n_nonzero: usize| (n_nonzero as f64 * self.select_topk) as usize;
        let rank = |count: usize| n.saturating_sub(count.max(1)) as u64;
        // Usually no variance is zero: guess so, and look again only if that was wrong.
        let ranks = vec![vec![0, rank(wanted(n))]];
        let found = statistics(stretches, Order::Magnitude, &ranks, &Variances)?;
        let smallest = found[0][0];
        let n_zeros = if smallest.key == 0 { smallest.equal as usize } else { 0 };
        let count = wanted(n - n_zeros);
        let last = if n_zeros == 0 {
            found[0][1]
        } else {
            statistics(stretches, Order::Magnitude, &[vec![rank(count)]], &Variances)?[0][0]
        };
        exact_cut(stretches, n, count, last, 0, &Variances)
    }
}

/// The variances over the tasks, as one series.
struct Variances;

impl Feed for Variances {
    fn feed(
        &self,
        stretch: &Stretch<'_, '_>,
        _: &Range<usize>,
        scratch: &mut Scratch,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        each_piece(stretch.operand, 1, stretch.range.clone(), scratch, |piece, scratch| {
            let mut variances = scratch.take(piece.len());
            variances_of(piece, &mut variances);
            sink(0, &variances);
            scratch.give_back(variances);
            Ok(())
        })
    }
}

/// The variance over the tasks of each element, computed in f64.
fn variances_of(piece: &Piece<'_>, out: &mut [f32]) {
    const STRIP: usize = 256;
    let n_tasks = piece.tasks().len() as f64;
    for (strip, out) in out.chunks_mut(STRIP).enumerate() {
        let own = strip * STRIP..strip * STRIP + out.len();
        let (mut means, mut squares) = ([0f64; STRIP], [0f64; STRIP]);
        for values in piece.tasks() {
            for (mean, value) in means.iter_mut().zip(&values[own.clone()]) {
                *mean += f64::from(*value);
            }
        }
        for mean in &mut means {
            *mean /= n_tasks;
        }
        for values in piece.tasks() {
            for ((square, mean), value) in squares.iter_mut().zip(&means).zip(&values[own.clone()]) {
                let difference = f64::from(*value) - mean;
                *square += difference * difference;
            }
        }
        out.iter_mut().zip(&squares).for_each(|(out, square)| *out = (square / n_tasks) as f32);
    }
}

/// Sets to zero what is not selected.
fn keep(cut: Option<&Cut>, piece: &mut Piece<'_>, scratch: &mut Scratch) {
    let Some(cut) = cut else { return };
    let mut kept = scratch.take(piece.len());
    variances_of(piece, &mut kept);
    for (offset, kept) in kept.iter_mut().enumerate() {
        *kept = f32::from(u8::from(cut.holds(piece.range.start + offset, *kept)));
    }
    for values in piece.tasks_mut() {
        values.iter_mut().zip(&kept).for_each(|(value, kept)| *value *= kept);
    }
    scratch.give_back(kept);
}

struct Fuse {
    tensors: HashMap<usize, Selected>,
    scale: f32,
}

impl Rule for Fuse {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Selected { cut, weights } = &self.tensors[&operand.index];
        merge_pieces(operand, 1, range, out, scratch, |piece, out, scratch| {
            keep(cut.as_ref(), piece, scratch);
            let (mut sums, mut totals) = (scratch.take(piece.len()), scratch.take(piece.len()));
            sums.fill(0.0);
            totals.fill(0.0);
            out.fill(0.0);
            piece.tasks().for_each(|values| linear::add_scaled(&mut sums, 1.0, values));
            for (values, weight) in piece.tasks().zip(weights) {
                let merged = out.iter_mut().zip(&mut totals);
                for (((out, total), value), sum) in merged.zip(values).zip(&sums) {
                    let agrees = if *sum >= 0.0 { *value > 0.0 } else { *value < 0.0 };
                    *out += if agrees { value * weight } else { 0.0 };
                    *total += if agrees { *weight } else { 0.0 };
                }
            }
            for (out, total) in out.iter_mut().zip(&totals) {
                *out /= total.max(SMALLEST_WEIGHT);
            }
            linear::scale(out, self.scale);
            scratch.give_back(sums);
            scratch.give_back(totals);
            Ok(())
        })
    }
}
