//! Stretches of tensors with the values of all tasks, in bounded memory: what element-wise methods work on.
//!
//! A block is cut into pieces so short that the values of all tasks stay in a core's cache, whatever the number of tasks. Pieces begin and end
//! at multiples of a grain (1, or the length of a row). [`pass`] goes over many tensors in parallel before the merge, for thresholds and
//! norms. Values that are not finite are refused wherever they are read here: a trimmed or dropped one would not show in the result.

use super::inputs::Operand;
use merganser_tensors::source::check_finite;
use merganser_tensors::stream::{BLOCK_ELEMENTS, blocks};
use merganser_tensors::{Error, Result, Scratch};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Values of all tasks that a piece holds: 512 KiB.
const PIECE_VALUES: usize = 128 << 10;

/// Pieces are cut at whole packing groups where the grain allows.
const SMALLEST_PIECE: usize = 1 << 10;

/// The values of all tasks for a stretch of a tensor, task after task.
pub(super) struct Piece<'v> {
    /// The elements of the tensor.
    pub range: Range<usize>,
    values: &'v mut [f32],
}

impl Piece<'_> {
    pub(super) fn len(&self) -> usize {
        self.range.len()
    }

    pub(super) fn tasks(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.values.chunks_exact(self.range.len())
    }

    pub(super) fn tasks_mut(&mut self) -> impl ExactSizeIterator<Item = &mut [f32]> {
        let length = self.range.len();
        self.values.chunks_exact_mut(length)
    }
}

/// Reads `range` of all tasks piece by piece; `range` lies within the tensor, `grain` divides its length.
pub(super) fn each_piece(
    operand: &Operand<'_>,
    grain: usize,
    range: Range<usize>,
    scratch: &mut Scratch,
    mut work: impl FnMut(&mut Piece<'_>, &mut Scratch) -> Result<()>,
) -> Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    let n_tasks = operand.n_tasks();
    let length = piece_length(n_tasks, grain);
    let first = range.start / grain * grain;
    let last = range.end.div_ceil(grain) * grain;
    let mut buffer = scratch.take(n_tasks * length.min(last - first));
    let mut result = Ok(());
    for start in (first..last).step_by(length) {
        let piece = start..(start + length).min(last);
        let values = &mut buffer[..n_tasks * piece.len()];
        result = read_all(operand, piece.clone(), values, scratch)
            .and_then(|()| work(&mut Piece { range: piece, values }, scratch));
        if result.is_err() {
            break;
        }
    }
    scratch.give_back(buffer);
    result
}

/// Merges `range` piece by piece: `work` writes as many values as a piece is long.
pub(super) fn merge_pieces(
    operand: &Operand<'_>,
    grain: usize,
    range: Range<usize>,
    out: &mut [f32],
    scratch: &mut Scratch,
    mut work: impl FnMut(&mut Piece<'_>, &mut [f32], &mut Scratch) -> Result<()>,
) -> Result<()> {
    each_piece(operand, grain, range.clone(), scratch, |piece, scratch| {
        let own = piece.range.start.max(range.start)..piece.range.end.min(range.end);
        let target = &mut out[own.start - range.start..own.end - range.start];
        if own == piece.range {
            return work(piece, target, scratch);
        }
        let mut merged = scratch.take(piece.len());
        let result = work(piece, &mut merged, scratch);
        let start = own.start - piece.range.start;
        target.copy_from_slice(&merged[start..start + target.len()]);
        scratch.give_back(merged);
        result
    })
}

fn piece_length(n_tasks: usize, grain: usize) -> usize {
    let wanted = (PIECE_VALUES / n_tasks.max(1)).clamp(SMALLEST_PIECE, BLOCK_ELEMENTS);
    if grain == 1 { wanted / SMALLEST_PIECE * SMALLEST_PIECE } else { (wanted / grain).max(1) * grain }
}

fn read_all(
    operand: &Operand<'_>,
    range: Range<usize>,
    values: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    for (task, out) in values.chunks_exact_mut(range.len()).enumerate() {
        operand.read(task, range.clone(), out, scratch)?;
        check_finite(operand.name(), range.start, out)?;
    }
    Ok(())
}

/// A part of a tensor that is looked at at once.
#[derive(Clone)]
pub(super) struct Stretch<'o, 'a> {
    pub operand: &'o Operand<'a>,
    pub range: Range<usize>,
}

/// Cuts tensors into stretches of about a block, at multiples of a grain that depends on the tensor.
pub(super) fn stretches<'o, 'a>(
    operands: &[&'o Operand<'a>],
    grain: impl Fn(&Operand<'a>) -> usize,
) -> Vec<Stretch<'o, 'a>> {
    let cut = |operand: &&'o Operand<'a>| {
        let (operand, grain) = (*operand, grain(operand).max(1));
        let length = (BLOCK_ELEMENTS / grain).max(1) * grain;
        let n = operand.n_elements();
        (0..n.div_ceil(length)).map(move |i| Stretch { operand, range: i * length..n.min((i + 1) * length) })
    };
    operands.iter().flat_map(cut).collect()
}

/// The stretches of one tensor: its blocks.
pub(super) fn blocks_of<'o, 'a>(operand: &'o Operand<'a>) -> Vec<Stretch<'o, 'a>> {
    blocks(operand.n_elements()).map(|range| Stretch { operand, range }).collect()
}

/// Calls `work` for every stretch, in parallel, with a state that only one thread has at a time. Returns the results in the order of the
/// stretches and the states in no order: what they hold must add up in any order. The first stretch's error wins.
pub(super) fn pass<S: Send, R: Send>(
    stretches: &[Stretch<'_, '_>],
    new_state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, &Stretch<'_, '_>, &mut Scratch) -> Result<R> + Sync,
) -> Result<(Vec<R>, Vec<S>)> {
    let idle: Mutex<Vec<(S, Scratch)>> = Mutex::default();
    let results: Vec<Result<R>> = stretches
        .par_iter()
        .map(|stretch| {
            if (stretch.operand.inputs().job.cancelled)() {
                return Err(Error::Cancelled);
            }
            let own = idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let (mut state, mut scratch) = own.unwrap_or_else(|| (new_state(), Scratch::new()));
            let result = work(&mut state, stretch, &mut scratch);
            idle.lock().unwrap_or_else(PoisonError::into_inner).push((state, scratch));
            result
        })
        .collect();
    let states = idle.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok((results.into_iter().collect::<Result<_>>()?, states.into_iter().map(|(state, _)| state).collect()))
}

/// Adds up what a pass found, stretch by stretch in order, separately for each tensor; `add` is told the tensor's position in the list that
/// the stretches were cut from.
pub(super) fn sums<T: Clone + Send>(
    operands: &[&Operand<'_>],
    grain: impl Fn(&Operand<'_>) -> usize,
    zero: &T,
    work: impl Fn(&Stretch<'_, '_>, &mut Scratch) -> Result<T> + Sync,
    add: impl Fn(&mut T, &T),
) -> Result<Vec<T>> {
    let stretches = stretches(operands, grain);
    let (parts, _) = pass(&stretches, || (), |(), stretch, scratch| work(stretch, scratch))?;
    let mut totals = vec![zero.clone(); operands.len()];
    let mut position = 0;
    for (stretch, part) in stretches.iter().zip(&parts) {
        while operands[position].index != stretch.operand.index {
            position += 1;
        }
        add(&mut totals[position], part);
    }
    Ok(totals)
}
