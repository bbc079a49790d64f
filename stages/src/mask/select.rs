//! Exact order statistics of magnitudes, without sorting and without holding a tensor: two counting passes over the bits.
//!
//! The magnitudes of finite floats are ordered as their bits are. The first pass counts the upper 15 bits, which tells where the magnitude
//! that is looked for lies; the second counts the lower 16 bits of those that lie there. Counts are whole numbers, so the result does not
//! depend on the number of threads.

use super::inputs::MaskInputs;
use merganser_tensors::stream::blocks;
use merganser_tensors::{Result, Scratch};
use rayon::prelude::*;
use std::ops::Range;

/// Parts into which a pass is cut; each has counters of its own.
const PARTS: usize = 32;

const LOW_BITS: u32 = 16;
const N_HIGH: usize = 1 << 15;
const N_LOW: usize = 1 << LOW_BITS;

/// The bits of a value's magnitude.
pub(super) fn magnitude(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}

/// Returns the bits of the `rank`-th largest magnitude (from 1) of a task vector over some tensors. Beyond what there is, more than any
/// magnitude has if `rank` is 0, and 0 if it is too large.
pub(super) fn largest(inputs: &MaskInputs<'_>, task: usize, tensors: &[usize], rank: u64) -> Result<u32> {
    if rank == 0 {
        return Ok(u32::MAX);
    }
    let high = count(inputs, task, tensors, N_HIGH, |bits| Some(bits >> LOW_BITS))?;
    let Some((upper, rank)) = descend(&high, rank) else { return Ok(0) };
    let low = count(inputs, task, tensors, N_LOW, |bits| {
        (bits >> LOW_BITS == upper).then_some(bits & (N_LOW as u32 - 1))
    })?;
    Ok(descend(&low, rank).map_or(0, |(lower, _)| upper << LOW_BITS | lower))
}

/// The largest bin of which and of those above `rank` are counted, and which of its own that is.
fn descend(counts: &[u64], rank: u64) -> Option<(u32, u64)> {
    let mut left = rank;
    for (bin, count) in counts.iter().enumerate().rev() {
        if *count >= left {
            return Some((bin as u32, left));
        }
        left -= count;
    }
    None
}

/// How often each bin comes up; of several bad values, the first in the order of the tensors is reported.
fn count(
    inputs: &MaskInputs<'_>,
    task: usize,
    tensors: &[usize],
    n_bins: usize,
    bin: impl Fn(u32) -> Option<u32> + Sync,
) -> Result<Vec<u64>> {
    let all: Vec<(usize, Range<usize>)> = tensors
        .iter()
        .flat_map(|tensor| blocks(inputs.tensors[*tensor].n_elements()).map(move |range| (*tensor, range)))
        .collect();
    let parts: Vec<Result<Vec<u64>>> = all
        .par_chunks(all.len().div_ceil(PARTS).max(1))
        .map(|part| {
            let mut counts = vec![0; n_bins];
            let (mut scratch, mut values) = (Scratch::new(), Vec::new());
            for (tensor, range) in part {
                values.resize(range.len(), 0.0);
                inputs.read(task, *tensor, range.clone(), &mut values, &mut scratch)?;
                for value in &values {
                    if let Some(bin) = bin(magnitude(*value)) {
                        counts[bin as usize] += 1;
                    }
                }
            }
            Ok(counts)
        })
        .collect();
    let mut total = vec![0; n_bins];
    for part in parts {
        total.iter_mut().zip(part?).for_each(|(total, count): (&mut u64, u64)| *total += count);
    }
    Ok(total)
}
