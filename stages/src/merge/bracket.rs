//! A quick way to order statistics: guess from a sample between which keys they lie, then look at all values once.
//!
//! The pass counts what is below a bracket of keys and collects what is in it, a few percent. If the wanted rank falls into the bracket, the
//! value found is exact; if not, or if too many values are in it, there is no answer and the caller counts instead. Either way the result is
//! the same, so the sample needs not be random: it is taken at fixed places.

use super::pieces::{Stretch, pass};
use super::selection::Feed;
use merganser_tensors::kernels::select::{Order, Statistic, nth_key};
use merganser_tensors::{Result, Scratch};
use std::ops::Range;

/// Values of a series that the sample aims at.
const SAMPLE: usize = 256 << 10;

/// Places in a stretch that samples are taken from.
const PLACES: usize = 4;

/// The longest sample from one place.
const LONGEST: usize = 1 << 10;

/// How far around the expected place in the sample the bracket reaches: in standard deviations of independent draws (which neighbours are
/// not), and at least this share of the sample.
const DEVIATIONS: f64 = 10.0;
const SMALLEST_SHARE: f64 = 0.005;

/// What the collected keys of all threads and series together may take.
const COLLECTED_BYTES: usize = 128 << 20;

/// Values that are compared at once before any of them is looked at.
const GROUP: usize = 16;

/// Keys from the first to the last, and what lies below them and in them.
struct Bracket {
    low: u32,
    high: u32,
    below: u64,
    keys: Vec<u32>,
    is_full: bool,
}

impl Bracket {
    fn new(low: u32, high: u32) -> Self {
        Self { low, high, below: 0, keys: Vec::new(), is_full: false }
    }

    fn add(&mut self, order: Order, values: &[f32], room: usize) {
        if self.is_full {
            return;
        }
        match order {
            Order::Magnitude => self.add_keys(values, |value| Order::Magnitude.key(value)),
            Order::Value => self.add_keys(values, |value| Order::Value.key(value)),
        }
        self.is_full = self.keys.len() > room;
    }

    #[inline]
    fn add_keys(&mut self, values: &[f32], key: impl Fn(f32) -> u32) {
        let (low, width) = (self.low, self.high - self.low);
        for group in values.chunks(GROUP) {
            let (mut below, mut inside) = (0u32, 0u32);
            for value in group {
                let own = key(*value);
                below += u32::from(own < low);
                inside += u32::from(own.wrapping_sub(low) <= width);
            }
            self.below += u64::from(below);
            if inside > 0 {
                let own = group.iter().map(|value| key(*value));
                self.keys.extend(own.filter(|own| own.wrapping_sub(low) <= width));
            }
        }
    }
}

/// The values at one rank (0 is the smallest) of each of some series, of `n` values each; none if the guess was wrong.
pub(super) fn statistics(
    stretches: &[Stretch<'_, '_>],
    n: u64,
    order: Order,
    ranks: &[u64],
    feed: &dyn Feed,
    series: &Range<usize>,
) -> Result<Option<Vec<Statistic>>> {
    let sample = sample(stretches, order, feed, series)?;
    let guesses: Vec<(u32, u32)> =
        sample.into_iter().zip(ranks).map(|(keys, rank)| guess(keys, *rank as f64 / n as f64)).collect();
    let room = COLLECTED_BYTES / 4 / (series.len().max(1) * rayon::current_num_threads());
    let new = || guesses.iter().map(|(low, high)| Bracket::new(*low, *high)).collect::<Vec<_>>();
    let (_, states) = pass(stretches, new, |brackets, stretch, scratch| {
        feed.feed(stretch, series, scratch, &mut |own, values| {
            if series.contains(&own) {
                brackets[own - series.start].add(order, values, room);
            }
        })
    })?;
    let mut sums = new();
    for state in states {
        for (sum, part) in sums.iter_mut().zip(state) {
            sum.below += part.below;
            sum.is_full |= part.is_full;
            sum.keys.extend(part.keys);
        }
    }
    let found = sums.iter_mut().zip(ranks).map(|(sum, rank)| {
        let inside = rank.checked_sub(sum.below).filter(|_| !sum.is_full)?;
        let found = nth_key(&mut sum.keys, inside as usize)?;
        Some(Statistic { below: sum.below + found.below, ..found })
    });
    Ok(found.collect())
}

/// Keys of some values of each series.
fn sample(
    stretches: &[Stretch<'_, '_>],
    order: Order,
    feed: &dyn Feed,
    series: &Range<usize>,
) -> Result<Vec<Vec<u32>>> {
    let length = (SAMPLE / PLACES / stretches.len().max(1)).clamp(16, LONGEST);
    let every = (stretches.len() * PLACES * length).div_ceil(SAMPLE).max(1);
    let mut places = Vec::new();
    for Stretch { operand, range } in stretches.iter().step_by(every) {
        let distance = (range.len() / PLACES).max(1);
        for start in range.clone().step_by(distance).take(PLACES) {
            let range = start..(start + length.min(distance)).min(range.end);
            places.push(Stretch { operand, range });
        }
    }
    let mut scratch = Scratch::new();
    let mut keys: Vec<Vec<u32>> = vec![Vec::new(); series.len()];
    for place in &places {
        feed.feed(place, series, &mut scratch, &mut |own, values| {
            if series.contains(&own) {
                keys[own - series.start].extend(values.iter().map(|value| order.key(*value)));
            }
        })?;
    }
    Ok(keys)
}

/// Keys that probably enclose the one at a share of all values.
fn guess(mut keys: Vec<u32>, share: f64) -> (u32, u32) {
    let n = keys.len() as f64;
    let reach = (DEVIATIONS * (n * share * (1.0 - share)).sqrt()).max(n * SMALLEST_SHARE) + 1.0;
    let mut at = |place: f64| nth_key(&mut keys, place as usize).map(|found| found.key);
    let (first, last) = (share * n - reach, share * n + reach);
    let low = if first < 0.0 { 0 } else { at(first).unwrap_or(0) };
    (low, at(last).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guess_encloses_the_quantile_and_reaches_the_ends() {
        let keys: Vec<u32> = (0..100_000).map(|i| (i * 7919) % 100_000).collect();
        for (share, key) in [(0.8, 80_000), (0.5, 50_000), (0.001, 100)] {
            let (low, high) = guess(keys.clone(), share);
            assert!(low <= key && key <= high && high - low < 4_000, "{share}: {low} to {high}");
        }
        assert_eq!(guess(keys.clone(), 0.0).0, 0);
        assert_eq!(guess(keys, 1.0).1, u32::MAX);
        assert_eq!(guess(Vec::new(), 0.5), (0, u32::MAX));
    }

    #[test]
    fn a_bracket_counts_what_is_below_and_keeps_what_is_in_it() {
        let values: Vec<f32> = (0..100).map(|i| i as f32 * if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let mut bracket = Bracket::new(Order::Magnitude.key(20.0), Order::Magnitude.key(29.5));
        bracket.add(Order::Magnitude, &values, 1000);
        assert_eq!((bracket.below, bracket.keys.len(), bracket.is_full), (20, 10, false));
        bracket.add(Order::Magnitude, &values, 15);
        assert!(bracket.is_full);
        let mut signed = Bracket::new(Order::Value.key(-3.0), Order::Value.key(2.0));
        signed.add(Order::Value, &values, 1000);
        assert_eq!((signed.below, signed.keys.len()), (48, 4));
    }
}
