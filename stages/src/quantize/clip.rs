//! Ranges that are smaller than the values': what lies beyond becomes the nearest end.
//!
//! * percentile p: of signed codes and code books, the ⌈p/100·n⌉-th smallest magnitude; of affine codes, the ⌈p/100·n⌉-th smallest and the
//!   ⌈p/100·n⌉-th largest value. Exact order statistics, not estimates.
//! * mse: of 41 ranges, those of the values shrunk about their middle (signed codes and code books: about zero) to 100 %, 98 %, … 20 %, the one
//!   under which the sum of squared errors is smallest; of equal ones the widest. So it is never worse than no clipping.

use super::choose::left_over;
use super::values::Values;
use merganser_tensors::Result;
use merganser_tensors::encoding::{Form, Table, Tables};
use merganser_tensors::kernels::reduce::MinMax;
use merganser_tensors::kernels::select::{HighCounts, LowCounts, Order, nth_key};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Ranges that are compared by their squared error, and the share by which each is smaller than the one before.
const CANDIDATES: usize = 41;
const SHRINKAGE: f32 = 0.02;

/// Which range is coded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Clip {
    /// That of the values.
    #[default]
    None,
    /// Between order statistics, in percent: above 50, at most 100.
    Percentile(f64),
    /// That of the least squared error.
    Mse,
}

impl Clip {
    /// What is wrong with it.
    pub(super) fn problem(self) -> Option<String> {
        match self {
            Self::Percentile(p) if !(p > 50.0 && p <= 100.0) => {
                Some(format!("`percentile` must be above 50 and at most 100, got {p}"))
            }
            _ => None,
        }
    }
}

/// Replaces the ranges of all groups by those that are coded, for a stage after those of `tables`.
pub(super) fn shrink(
    clip: Clip,
    form: &Form,
    values: &Values<'_>,
    tables: &Tables,
    ranges: &mut [MinMax],
) -> Result<()> {
    match clip {
        Clip::None => Ok(()),
        Clip::Percentile(percent) => {
            let share = percent / 100.0;
            if form.code.has_zero_point() {
                let above = statistics(form, values, tables, Order::Value, share, false)?;
                let below = statistics(form, values, tables, Order::Value, share, true)?;
                for ((range, max), min) in ranges.iter_mut().zip(above).zip(below) {
                    *range = min.zip(max).map_or(*range, |(min, max)| MinMax { min, max });
                }
            } else {
                let largest = statistics(form, values, tables, Order::Magnitude, share, false)?;
                for (range, largest) in ranges.iter_mut().zip(largest) {
                    *range = largest.map_or(*range, |max| MinMax { min: -max, max });
                }
            }
            Ok(())
        }
        Clip::Mse => least_error(form, values, tables, ranges),
    }
}

/// The ⌈share·n⌉-th value of every group in an order, or in its reverse; of an empty group, none.
fn statistics(
    form: &Form,
    values: &Values<'_>,
    tables: &Tables,
    order: Order,
    share: f64,
    from_above: bool,
) -> Result<Vec<Option<f32>>> {
    let rank = |n: usize| {
        let rank = ((share * n as f64).ceil() as usize).clamp(1, n.max(1)) - 1;
        if from_above { n.saturating_sub(1) - rank.min(n.saturating_sub(1)) } else { rank }
    };
    if form.n_groups() == 1 {
        // of any size, in two passes
        let rank = rank(form.n) as u64;
        let counted = values.blocks(|range, values| {
            let mut counts = HighCounts::default();
            counts.add(order, &left_over(form, tables, range.start, values));
            Ok(counts)
        })?;
        let mut high = HighCounts::default();
        for counts in &counted {
            high.merge(counts);
        }
        let Some(bucket) = high.find(rank) else { return Ok(vec![None]) };
        let counted = values.blocks(|range, values| {
            let mut counts = LowCounts::new(bucket);
            counts.add(order, &left_over(form, tables, range.start, values));
            Ok(counts)
        })?;
        let mut low = LowCounts::new(bucket);
        for counts in &counted {
            low.merge(counts);
        }
        return Ok(vec![low.find(rank).map(|found| order.value(found.key))]);
    }
    // Groups are small; those that two blocks share are put together first.
    let looks = values.blocks(|range, values| {
        let left = left_over(form, tables, range.start, values);
        let start = range.start;
        let keys = |(group, part): (usize, Range<usize>)| {
            let part = &left[part.start - start..part.end - start];
            (group, part.iter().map(|value| order.key(*value)).collect::<Vec<u32>>())
        };
        let mut groups: Vec<(usize, Vec<u32>)> = form.split(range).map(keys).collect();
        // all but the outermost are complete: their statistic is enough
        let complete = 1..groups.len().saturating_sub(1);
        for (_, keys) in groups.get_mut(complete).into_iter().flatten() {
            let n = keys.len();
            let found = nth_key(keys, rank(n)).map(|found| found.key);
            *keys = found.into_iter().collect();
        }
        Ok(groups)
    })?;
    let mut by_group: Vec<Vec<u32>> = vec![Vec::new(); form.n_groups()];
    for (group, keys) in looks.into_iter().flatten() {
        by_group[group].extend(keys);
    }
    let statistic = |mut keys: Vec<u32>| {
        let n = keys.len();
        nth_key(&mut keys, rank(n)).map(|found| order.value(found.key))
    };
    Ok(by_group.into_iter().map(statistic).collect())
}

/// Chooses the range of the least squared error for every group.
fn least_error(form: &Form, values: &Values<'_>, tables: &Tables, ranges: &mut [MinMax]) -> Result<()> {
    let one_stage = Form { stages: 1, ..*form };
    let given: &[MinMax] = ranges;
    let errors = values.blocks(|range, values| {
        let left = left_over(form, tables, range.start, values);
        let groups = form.groups(&range);
        // by candidate, then by group
        let mut errors = vec![vec![0f64; groups.len()]; CANDIDATES];
        let mut rounded = vec![0.0; left.len()];
        for (candidate, errors) in errors.iter_mut().enumerate() {
            let mut table = Table { first: groups.start, ..Table::default() };
            for range in &given[groups.clone()] {
                // Ranges that cannot be coded are reported when the scales are made.
                let scale = form.code.scale(shrunk(form, *range, candidate), form.bits);
                table.scale.push(scale.map_or(1.0, |scale| scale.scale));
                if form.code.has_zero_point() {
                    table.zero_point.push(scale.map_or(0.0, |scale| scale.zero_point));
                }
            }
            rounded.copy_from_slice(&left);
            one_stage.round(range.start, &mut rounded, &Tables(vec![table]));
            for (group, part) in form.split(range.clone()) {
                let part = part.start - range.start..part.end - range.start;
                let pairs = left[part.clone()].iter().zip(&rounded[part]);
                errors[group - groups.start] =
                    pairs.map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum::<f64>();
            }
        }
        Ok((groups.start, errors))
    })?;
    let mut sums = vec![[0f64; CANDIDATES]; ranges.len()];
    for (first, errors) in errors {
        for (candidate, errors) in errors.iter().enumerate() {
            for (sums, error) in sums[first..].iter_mut().zip(errors) {
                sums[candidate] += error;
            }
        }
    }
    for (range, sums) in ranges.iter_mut().zip(sums) {
        let mut best = 0;
        for candidate in 1..CANDIDATES {
            if sums[candidate] < sums[best] {
                best = candidate;
            }
        }
        *range = shrunk(form, *range, best);
    }
    Ok(())
}

fn shrunk(form: &Form, range: MinMax, candidate: usize) -> MinMax {
    if candidate == 0 || range.is_empty() {
        return range;
    }
    let share = 1.0 - SHRINKAGE * candidate as f32;
    if form.code.has_zero_point() {
        let (middle, half) = (range.min / 2.0 + range.max / 2.0, share * (range.max / 2.0 - range.min / 2.0));
        MinMax { min: middle - half, max: middle + half }
    } else {
        let largest = share * range.max_abs();
        MinMax { min: -largest, max: largest }
    }
}
