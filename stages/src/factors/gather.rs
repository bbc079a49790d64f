//! Entries of a region, gathered from a tensor and put back.
//!
//! A stored basis has a row per entry of its region, not per element of the tensor. To find the rows of some elements, the index keeps
//! how many entries lie before every [`STEP`]th element.

use super::Region;
use merganser_tensors::stream::{BLOCK_ELEMENTS, over_blocks};
use merganser_tensors::{Result, TensorSource};
use std::ops::Range;

/// Elements per entry of the index.
pub(crate) const STEP: usize = 1024;

const _: () = assert!(BLOCK_ELEMENTS.is_multiple_of(STEP), "blocks begin where the index does");

/// Where the entries of the regions of one parameter lie.
#[derive(Clone, Debug, Default)]
pub(crate) struct MaskIndex {
    n_elements: usize,
    /// Signal entries before element `STEP·i`, one more than there are steps; empty without a mask: all elements are signal.
    before: Vec<usize>,
}

impl MaskIndex {
    /// Reads the masks of some tensors, given by position and size; `None` stands for a full mask.
    pub(crate) fn of(masks: &dyn TensorSource, tensors: &[(Option<usize>, usize)]) -> Result<Vec<Self>> {
        let sizes: Vec<usize> = tensors.iter().map(|(mask, n)| if mask.is_some() { *n } else { 0 }).collect();
        let counts = over_blocks(&sizes, |index, range, scratch, values: &mut Vec<f32>| {
            let Some(tensor) = tensors[index].0 else { return Ok(Vec::new()) };
            values.resize(range.len(), 0.0);
            masks.read_f32(tensor, range, values, scratch)?;
            Ok(values
                .chunks(STEP)
                .map(|part| part.iter().filter(|kept| **kept != 0.0).count())
                .collect::<Vec<_>>())
        })?;
        Ok(tensors
            .iter()
            .zip(counts)
            .map(|((mask, n_elements), counts)| {
                if mask.is_none() {
                    return Self::full(*n_elements);
                }
                let mut before = vec![0];
                let mut total = 0;
                for count in counts.into_iter().flatten() {
                    total += count;
                    before.push(total);
                }
                Self { n_elements: *n_elements, before }
            })
            .collect())
    }

    pub(crate) fn full(n_elements: usize) -> Self {
        Self { n_elements, before: Vec::new() }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.before.is_empty()
    }

    /// Entries of a region before an element that is a multiple of [`STEP`] or the end.
    pub(crate) fn entries_before(&self, region: Region, element: usize) -> usize {
        let signal = match self.before.get(element.div_ceil(STEP)) {
            None if self.is_full() => element,
            None => self.before.last().copied().unwrap_or(0),
            Some(count) => *count,
        };
        match region {
            Region::Signal => signal,
            Region::Noise => element - signal,
        }
    }

    /// The smallest range of elements, cut at the index, that holds the entries `entries` of a region; and how many entries of the
    /// region lie in it before the first one asked for.
    pub(crate) fn elements_of(&self, region: Region, entries: &Range<usize>) -> (Range<usize>, usize) {
        if self.is_full() || entries.is_empty() {
            return (entries.clone(), 0);
        }
        let n_steps = self.before.len() - 1;
        let at = |step: usize| self.entries_before(region, (step * STEP).min(self.n_elements));
        let first = partition(n_steps, |step| at(step + 1) <= entries.start);
        let last = partition(n_steps, |step| at(step) < entries.end);
        let elements = first * STEP..(last * STEP).min(self.n_elements);
        (elements, entries.start - at(first))
    }
}

/// The first of `0..n` for which a monotonic condition no longer holds.
fn partition(n: usize, holds: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, n);
    while low < high {
        let middle = low + (high - low) / 2;
        if holds(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Workbench;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn entries_are_found_where_they_lie(n in 0usize..6000, every in 1usize..3000, a in 0usize..6000, b in 0usize..6000) {
            let mask: Vec<f32> = (0..n).map(|i| f32::from(u8::from(i % every == 0))).collect();
            let bench = Workbench::new();
            let artifact = bench.checkpoint("mask", &[("w", &[n], &mask)]);
            let index = MaskIndex::of(&*bench.tensors(artifact), &[(Some(0), n)]).unwrap().remove(0);
            for region in Region::ALL {
                let places: Vec<usize> = (0..n).filter(|i| (mask[*i] != 0.0) == (region == Region::Signal)).collect();
                prop_assert_eq!(index.entries_before(region, n), places.len());
                let (a, b) = (a % (places.len() + 1), b % (places.len() + 1));
                let asked = a.min(b)..a.max(b);
                let (elements, skip) = index.elements_of(region, &asked);
                let inside: Vec<usize> = places.iter().copied().filter(|place| elements.contains(place)).collect();
                prop_assert!(asked.is_empty() || inside[skip..].starts_with(&places[asked]));
            }
        }
    }
}
