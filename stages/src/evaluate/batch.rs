//! How many images go through the graph at once: given, or found out by a short probe.
//!
//! The number enters the key, because a matrix product may add in another order for another number of rows. So the probe chooses only among
//! sizes whose logits are those of [`REFERENCE`] bit by bit on the images that it tries, and the key names that size: what was measured
//! decides how long it takes, never what comes out.

use crate::StageError;
use ndarray::{Array2, ArrayView4, Axis, concatenate, s};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::ops::Range;
use std::time::Duration;

/// The default, and the size whose logits are the right ones when the size is found out.
pub(super) const REFERENCE: usize = 64;

/// What the probe tries; all divide [`PROBE_IMAGES`], and [`REFERENCE`] is a multiple or a divisor of each.
const CANDIDATES: [usize; 4] = [REFERENCE, 16, 32, 128];

/// Images that every candidate is tried on.
pub(super) const PROBE_IMAGES: usize = 128;

/// A probe costs about as much as six times [`PROBE_IMAGES`]; for fewer images than this it is not worth it.
pub(super) const LEAST_IMAGES: usize = 64 * PROBE_IMAGES;

/// The parameter `batch_size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BatchSize {
    Given(u32),
    Auto,
}

impl Default for BatchSize {
    fn default() -> Self {
        Self::Given(REFERENCE as u32)
    }
}

impl BatchSize {
    /// The size whose logits these are.
    pub(super) fn reference(self) -> usize {
        match self {
            Self::Given(size) => size as usize,
            Self::Auto => REFERENCE,
        }
    }
}

/// Cuts images into batches of `size` as far as whole batches of `reference` go, and the rest as `reference` would.
pub(super) fn batches(images: Range<usize>, size: usize, reference: usize) -> Vec<Range<usize>> {
    let whole = images.len() / size.max(reference) * size.max(reference);
    let middle = images.start + whole;
    let cut = |range: Range<usize>, size: usize| {
        let end = range.end;
        range.step_by(size).map(move |start| start..(start + size).min(end))
    };
    cut(images.start..middle, size).chain(cut(middle..images.end, reference)).collect()
}

/// Finds the fastest size whose logits on `images` are those of [`REFERENCE`].
pub(super) fn probe(
    images: &ArrayView4<'_, f32>,
    clock: &dyn Fn() -> Duration,
    mut infer: impl FnMut(&ArrayView4<'_, f32>) -> Result<Array2<f32>, StageError>,
) -> Result<usize, StageError> {
    // The first batch of a size allocates its memory, which is not what is measured.
    let mut run = |size: usize| -> Result<(Array2<f32>, Duration), StageError> {
        infer(&images.slice(s![..size, .., .., ..]))?;
        let started = clock();
        let parts = batches(0..images.len_of(Axis(0)), size, size)
            .into_iter()
            .map(|range| infer(&images.slice(s![range, .., .., ..])))
            .collect::<Result<Vec<_>, _>>()?;
        let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
        let all = concatenate(Axis(0), &views).map_err(|error| StageError::Internal(error.to_string()))?;
        Ok((all, clock().saturating_sub(started)))
    };
    let (expected, mut least) = run(REFERENCE)?;
    let mut best = REFERENCE;
    for size in CANDIDATES.into_iter().filter(|size| *size != REFERENCE) {
        let (found, took) = run(size)?;
        let same = found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
        if same && found.dim() == expected.dim() && took < least {
            (best, least) = (size, took);
        }
    }
    Ok(best)
}

impl Serialize for BatchSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.reference() as u32)
    }
}

impl<'de> Deserialize<'de> for BatchSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(BatchSizeVisitor)
    }
}

struct BatchSizeVisitor;

impl Visitor<'_> for BatchSizeVisitor {
    type Value = BatchSize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of images, at least 1, or `auto`")
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<BatchSize, E> {
        match u32::try_from(value) {
            Ok(size) if size > 0 => Ok(BatchSize::Given(size)),
            _ => Err(E::invalid_value(Unexpected::Signed(value), &self)),
        }
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<BatchSize, E> {
        if text == "auto" { Ok(BatchSize::Auto) } else { Err(E::unknown_variant(text, &["auto"])) }
    }
}

impl JsonSchema for BatchSize {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "batch-size".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "integer", "minimum": 1 }, { "enum": ["auto"] }] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array4;
    use std::cell::Cell;

    #[test]
    fn batches_end_as_those_of_the_reference_do() {
        assert_eq!(batches(0..10, 4, 4), [0..4, 4..8, 8..10]);
        assert_eq!(batches(0..0, 4, 4), [0..0; 0]);
        assert_eq!(batches(5..8, 4, 4).first(), Some(&(5..8)));
        for (n, size) in [(1000, 16), (1000, 128), (63, 128), (64, 32), (128, 128), (1, 16)] {
            let all = batches(7..7 + n, size, REFERENCE);
            assert_eq!(all.iter().map(Range::len).sum::<usize>(), n);
            assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start));
            let last = batches(7..7 + n, REFERENCE, REFERENCE).pop().unwrap();
            assert!(last.len() == REFERENCE || *all.last().unwrap() == last, "{n} {size}: {all:?}");
        }
    }

    /// A clock that runs on by what a batch costs.
    fn probed(cost: fn(usize) -> u64, logit: fn(usize) -> f32) -> usize {
        let now = Cell::new(0);
        let clock = || Duration::from_millis(now.get());
        let images = Array4::<f32>::zeros((PROBE_IMAGES, 1, 1, 1));
        probe(&images.view(), &clock, |batch| {
            let size = batch.len_of(Axis(0));
            now.set(now.get() + cost(size));
            Ok(Array2::from_elem((size, 2), logit(size)))
        })
        .unwrap()
    }

    #[test]
    fn the_fastest_size_with_the_same_logits_is_taken() {
        let per_call = |size: usize| 10 + size as u64;
        assert_eq!(probed(per_call, |_| 1.0), 128);
        assert_eq!(probed(|size| (size * size) as u64, |_| 1.0), 16);
        // Faster, but its last bits are others.
        let odd = |size: usize| if size == 128 { 1.000_000_1 } else { 1.0 };
        assert_eq!(probed(per_call, odd), 64);
        assert_eq!(probed(per_call, |_| f32::NAN), 128, "bits are compared, not numbers");
        assert_eq!(probed(|_| 0, |_| 1.0), REFERENCE, "of equally fast ones the reference stays");
    }
}
