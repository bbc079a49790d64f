//! Selection by magnitude: exact thresholds of task vectors, over all tensors together or tensor by tensor.
//!
//! Two streaming passes count keys ([`merganser_tensors::kernels::select`]); nothing is sorted or held. Looking once at all values with a bracket
//! around a sampled threshold was tried: collecting what lies in the bracket cost more than the pass it saved. Where exactly k elements are wanted
//! and equal magnitudes straddle the threshold, the elements that come first in the tensor are taken.

use super::inputs::Operand;
use super::pieces::{Stretch, blocks_of, pass, stretches};
use merganser_tensors::kernels::select::{
    Bucket, HighCounts, LowCounts, Order, Statistic, magnitude_key, nth_key,
};
use merganser_tensors::source::check_finite;
use merganser_tensors::stream::BLOCK_ELEMENTS;
use merganser_tensors::{Result, Scratch};
use rayon::prelude::*;
use std::ops::Range;

/// What the counts of all threads together may take.
const COUNTS_BYTES: usize = 256 << 20;

/// What one thread's counts of one rank of one series take.
const BYTES_PER_RANK: usize = 8 << 16;

/// The largest magnitudes of a tensor down to a threshold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// The key of the smallest magnitude that is in.
    key: u32,
    /// Elements of just this magnitude are in only before this position.
    until: usize,
}

impl Cut {
    /// Everything.
    pub(super) const ALL: Self = Self { key: 0, until: usize::MAX };
    /// Nothing: no finite value has such a key.
    pub(super) const NONE: Self = Self { key: u32::MAX, until: usize::MAX };

    /// The ranges of `range`, which begins at an element of the tensor, and the smallest key that is in there.
    pub(super) fn parts(&self, range: &Range<usize>) -> [(Range<usize>, u32); 2] {
        let middle = self.until.clamp(range.start, range.end) - range.start;
        [(0..middle, self.key), (middle..range.len(), self.key.saturating_add(1))]
    }

    /// Sets to zero what is in: the opposite of [`Self::trim`].
    pub(super) fn drop_from(&self, range: &Range<usize>, values: &mut [f32]) {
        for (part, floor) in self.parts(range) {
            for value in &mut values[part] {
                *value = if magnitude_key(*value) >= floor { 0.0 } else { *value };
            }
        }
    }

    /// Whether an element is in.
    #[inline]
    pub(super) fn holds(&self, element: usize, value: f32) -> bool {
        let key = magnitude_key(value);
        key > self.key || (key == self.key && element < self.until)
    }

    /// Sets to zero what is not in; the values begin at `range.start`.
    pub(super) fn trim(&self, range: &Range<usize>, values: &mut [f32]) {
        for (part, floor) in self.parts(range) {
            for value in &mut values[part] {
                *value = if magnitude_key(*value) >= floor { *value } else { 0.0 };
            }
        }
    }
}

/// A key by which an element of a row compares by magnitude, and as the larger of equal ones if it comes first.
#[inline]
pub(super) fn row_key(column: usize, value: f32) -> u64 {
    (u64::from(magnitude_key(value)) << 32) | u64::from(u32::MAX - column as u32)
}

/// The column that a [`row_key`] is of.
#[inline]
pub(super) fn column_of(key: u64) -> usize {
    (u32::MAX - key as u32) as usize
}

/// Hands the values of some series for a stretch to a sink, in one or several calls each.
pub(super) trait Feed: Sync {
    fn feed(
        &self,
        stretch: &Stretch<'_, '_>,
        series: &Range<usize>,
        scratch: &mut Scratch,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()>;
}

/// The task vectors themselves: series t is task t.
pub(super) struct TaskVectors;

impl Feed for TaskVectors {
    fn feed(
        &self,
        stretch: &Stretch<'_, '_>,
        series: &Range<usize>,
        scratch: &mut Scratch,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let Stretch { operand, range } = stretch;
        let mut values = scratch.take(range.len());
        let result = series.clone().try_for_each(|task| {
            operand.read(task, range.clone(), &mut values, scratch)?;
            check_finite(operand.name(), range.start, &values)?;
            sink(task, &values);
            Ok(())
        });
        scratch.give_back(values);
        result
    }
}

/// The values at the given ranks (0 is the smallest) of each series over all stretches. A rank beyond the last value means the last; of no
/// values, it is that of key 0.
pub(super) fn statistics(
    stretches: &[Stretch<'_, '_>],
    order: Order,
    ranks: &[Vec<u64>],
    feed: &dyn Feed,
) -> Result<Vec<Vec<Statistic>>> {
    let n: u64 = stretches.iter().map(|stretch| stretch.range.len() as u64).sum();
    if n == 0 {
        return Ok(ranks.iter().map(|ranks| vec![Statistic::default(); ranks.len()]).collect());
    }
    let ranks: Vec<Vec<u64>> =
        ranks.iter().map(|ranks| ranks.iter().map(|rank| (*rank).min(n - 1)).collect()).collect();
    if n <= BLOCK_ELEMENTS as u64 {
        return of_few(stretches, order, &ranks, feed);
    }
    let mut found = Vec::with_capacity(ranks.len());
    let ranks_each = ranks.iter().map(Vec::len).max().unwrap_or(0).max(1);
    // How many series a pass counts decides about passes and memory, never about the result.
    let at_once = (COUNTS_BYTES / (BYTES_PER_RANK * ranks_each * rayon::current_num_threads())).max(1);
    for first in (0..ranks.len()).step_by(at_once) {
        let series = first..ranks.len().min(first + at_once);
        found.extend(of_many(stretches, order, &ranks[series.clone()], feed, &series)?);
    }
    Ok(found)
}

/// So few values that their keys can be held.
fn of_few(
    stretches: &[Stretch<'_, '_>],
    order: Order,
    ranks: &[Vec<u64>],
    feed: &dyn Feed,
) -> Result<Vec<Vec<Statistic>>> {
    let mut scratch = Scratch::new();
    let mut keys: Vec<Vec<u32>> = vec![Vec::new(); ranks.len()];
    for stretch in stretches {
        feed.feed(stretch, &(0..ranks.len()), &mut scratch, &mut |series, values| {
            keys[series].extend(values.iter().map(|value| order.key(*value)));
        })?;
    }
    let each = keys.iter_mut().zip(ranks);
    Ok(each
        .map(|(keys, ranks)| {
            ranks.iter().map(|rank| nth_key(keys, *rank as usize).unwrap_or_default()).collect()
        })
        .collect())
}

fn of_many(
    stretches: &[Stretch<'_, '_>],
    order: Order,
    ranks: &[Vec<u64>],
    feed: &dyn Feed,
    series: &Range<usize>,
) -> Result<Vec<Vec<Statistic>>> {
    let none = || series.clone().map(|_| HighCounts::default()).collect::<Vec<_>>();
    let (_, counted) = pass(stretches, none, |counts, stretch, scratch| {
        feed.feed(stretch, series, scratch, &mut |own, values| {
            if series.contains(&own) {
                counts[own - series.start].add(order, values);
            }
        })
    })?;
    let high = add_up(counted, |sum: &mut HighCounts, part| sum.merge(part));
    let buckets: Vec<Vec<Bucket>> = ranks
        .iter()
        .zip(&high)
        .map(|(ranks, counts)| ranks.iter().filter_map(|rank| counts.find(*rank)).collect())
        .collect();
    drop(high);
    let none = || -> Vec<Vec<LowCounts>> {
        buckets.iter().map(|own| own.iter().map(|bucket| LowCounts::new(*bucket)).collect()).collect()
    };
    let (_, counted) = pass(stretches, none, |counts, stretch, scratch| {
        feed.feed(stretch, series, scratch, &mut |own, values| {
            if series.contains(&own) {
                counts[own - series.start].iter_mut().for_each(|counts| counts.add(order, values));
            }
        })
    })?;
    let low = add_up(counted, |sum: &mut Vec<LowCounts>, part| {
        sum.iter_mut().zip(part).for_each(|(sum, part)| sum.merge(part));
    });
    let found = ranks.iter().zip(&low).map(|(ranks, counts)| {
        ranks.iter().zip(counts).map(|(rank, counts)| counts.find(*rank).unwrap_or_default()).collect()
    });
    Ok(found.collect())
}

/// Adds the states of all threads, series by series.
fn add_up<T>(states: Vec<Vec<T>>, mut add: impl FnMut(&mut T, &T)) -> Vec<T> {
    let mut states = states.into_iter();
    let mut sums = states.next().unwrap_or_default();
    for state in states {
        sums.iter_mut().zip(&state).for_each(|(sum, part)| add(sum, part));
    }
    sums
}

/// For each task the cut of the whole task vector that the authors of TIES make with `kthvalue`: of n elements, whatever is at least as large
/// in magnitude as the (n − int(density·n))-th smallest. That is one element more than int(density·n), and all that equal the threshold.
pub(super) fn global_cuts(operands: &[&Operand<'_>], density: f64) -> Result<Vec<Cut>> {
    let n_tasks = operands.first().map_or(0, |operand| operand.n_tasks());
    let n: u64 = operands.iter().map(|operand| operand.n_elements() as u64).sum();
    let n_kept = (n as f64 * density) as u64;
    if n_kept >= n {
        return Ok(vec![Cut::ALL; n_tasks]);
    }
    let ranks = vec![vec![n - n_kept - 1]; n_tasks];
    let found = statistics(&stretches(operands, |_| 1), Order::Magnitude, &ranks, &TaskVectors)?;
    Ok(found.into_iter().map(|found| Cut { key: found[0].key, until: usize::MAX }).collect())
}

/// For each tensor and task, the cuts that keep exactly the given numbers of largest elements. `counts` of a tensor of n elements gives these
/// numbers, the same for every task.
pub(super) fn exact_cuts(
    operands: &[&Operand<'_>],
    counts: impl Fn(usize) -> Vec<usize> + Sync,
) -> Result<Vec<Vec<Vec<Cut>>>> {
    let one = |operand: &&Operand<'_>| exact_cuts_of(&blocks_of(operand), &counts(operand.n_elements()));
    // Small tensors side by side; large ones after another, their blocks in parallel, so that the counts of only one are held.
    let is_small = |operand: &Operand<'_>| operand.n_elements() <= BLOCK_ELEMENTS;
    let small: Vec<Result<Option<Vec<Vec<Cut>>>>> = operands
        .par_iter()
        .map(|operand| if is_small(operand) { one(operand).map(Some) } else { Ok(None) })
        .collect();
    operands
        .iter()
        .zip(small)
        .map(|(operand, small)| match small? {
            Some(cuts) => Ok(cuts),
            None => one(operand),
        })
        .collect()
}

/// [`exact_cuts`] of a part of one tensor; positions count from the beginning of the tensor.
pub(super) fn exact_cuts_of(stretches: &[Stretch<'_, '_>], counts: &[usize]) -> Result<Vec<Vec<Cut>>> {
    let n: usize = stretches.iter().map(|stretch| stretch.range.len()).sum();
    let n_tasks = stretches.first().map_or(0, |stretch| stretch.operand.n_tasks());
    let ranks: Vec<u64> = counts.iter().map(|count| n.saturating_sub((*count).max(1)) as u64).collect();
    let found = statistics(stretches, Order::Magnitude, &vec![ranks; n_tasks], &TaskVectors)?;
    let of_task = |(task, found): (usize, &Vec<Statistic>)| {
        let cuts = counts.iter().zip(found);
        cuts.map(|(count, found)| exact_cut(stretches, n, *count, *found, task, &TaskVectors)).collect()
    };
    found.iter().enumerate().map(of_task).collect()
}

/// The cut that keeps `count` of the `n` values of a series, given the statistic at rank `n - count`.
pub(super) fn exact_cut(
    stretches: &[Stretch<'_, '_>],
    n: usize,
    count: usize,
    found: Statistic,
    series: usize,
    feed: &dyn Feed,
) -> Result<Cut> {
    if count == 0 {
        return Ok(Cut::NONE);
    }
    let n_from_key = n - found.below as usize;
    // Whether a zero is kept makes no difference.
    let until = if count >= n_from_key || found.key == 0 {
        usize::MAX
    } else {
        let missing = (count - (n_from_key - found.equal as usize)) as u64;
        place(stretches, Order::Magnitude, found.key, missing, series, feed)?
    };
    Ok(Cut { key: found.key, until })
}

/// The position after the `count`-th element whose key is `key`, from the beginning of the tensor.
pub(super) fn place(
    stretches: &[Stretch<'_, '_>],
    order: Order,
    key: u32,
    count: u64,
    series: usize,
    feed: &dyn Feed,
) -> Result<usize> {
    let mut scratch = Scratch::new();
    let mut seen = 0;
    let mut found = None;
    for stretch in stretches {
        let mut position = stretch.range.start;
        feed.feed(stretch, &(series..series + 1), &mut scratch, &mut |own, values| {
            if own != series || found.is_some() {
                return;
            }
            for (offset, value) in values.iter().enumerate() {
                seen += u64::from(order.key(*value) == key);
                if seen == count {
                    found = Some(position + offset + 1);
                    return;
                }
            }
            position += values.len();
        })?;
        if let Some(found) = found {
            return Ok(found);
        }
    }
    Ok(usize::MAX)
}
