//! Histograms: how often each byte occurs, and values in bins of equal width.

use crate::kernels::reduce::MinMax;
use crate::kernels::wide::{Kernel, wide};

/// Bins that values are counted in.
pub const BINS: usize = 64;

/// Bytes below this are counted in pairs.
const SMALL: usize = 64;

/// Counts bytes, up to 2³² of them.
pub struct Counter {
    /// How many different bytes there are.
    n: usize,
    /// Of bytes below [`SMALL`], how often each pair of neighbours occurs: half as many steps as bytes. Of others, four tables, so that equal
    /// neighbours do not wait for each other.
    counts: Vec<u32>,
    /// Zeros that were paired with a last byte.
    padding: u32,
}

impl Counter {
    /// Of bytes below `n`, at most 256; the others are counted as something below it, or not at all.
    pub fn new(n: usize) -> Self {
        let length = if n <= SMALL { SMALL * SMALL } else { 4 * 256 };
        Self { n, counts: vec![0; length], padding: 0 }
    }

    pub fn add(&mut self, bytes: &[u8]) {
        if self.n <= SMALL {
            self.add_pairs(bytes);
        } else {
            self.add_single(bytes);
        }
    }

    fn add_pairs(&mut self, bytes: &[u8]) {
        const LOW: u64 = 0x003F_003F_003F_003F;
        let counts: &mut [u32; SMALL * SMALL] =
            self.counts.as_mut_slice().try_into().expect("a counter of small bytes has this many counts");
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            let word = u64::from_le_bytes(*word);
            let pairs = (word & LOW) | ((word >> 8) & LOW) << 6;
            for pair in 0..4 {
                counts[(pairs >> (16 * pair)) as usize % (SMALL * SMALL)] += 1;
            }
        }
        for byte in rest {
            counts[usize::from(*byte) % SMALL] += 1;
        }
        self.padding += rest.len() as u32;
    }

    fn add_single(&mut self, bytes: &[u8]) {
        let (tables, _) = self.counts.as_chunks_mut::<256>();
        let (quads, rest) = bytes.as_chunks::<4>();
        for quad in quads {
            for (table, byte) in tables.iter_mut().zip(quad) {
                table[usize::from(*byte)] += 1;
            }
        }
        for byte in rest {
            tables[0][usize::from(*byte)] += 1;
        }
    }

    /// How often each byte occurred.
    pub fn counts(&self) -> Vec<u64> {
        let mut counts = vec![0u64; 256];
        if self.n <= SMALL {
            for (second, row) in self.counts.chunks(SMALL).enumerate() {
                counts[second] += row.iter().map(|count| u64::from(*count)).sum::<u64>();
                for (first, count) in row.iter().enumerate() {
                    counts[first] += u64::from(*count);
                }
            }
            counts[0] -= u64::from(self.padding);
        } else {
            for table in self.counts.chunks(256) {
                counts.iter_mut().zip(table).for_each(|(sum, count)| *sum += u64::from(*count));
            }
        }
        counts.truncate(self.n);
        counts
    }
}

/// Writes the bin of every value, of [`BINS`] of equal width that cover `range`: `⌊(x − min)·BINS/(max − min)⌋`, computed in f32. Where the width is
/// zero or beyond f32 all are in the first.
pub fn bins(range: MinMax, values: &[f32], bins: &mut [u8]) {
    assert_eq!(values.len(), bins.len(), "one bin per value");
    let per_unit = BINS as f32 / (range.max - range.min);
    if per_unit.is_finite() && per_unit > 0.0 {
        wide(Placing { min: range.min, per_unit, values, out: bins });
    } else {
        bins.fill(0);
    }
}

/// [`bins`] of a range that has a width.
struct Placing<'a> {
    min: f32,
    per_unit: f32,
    values: &'a [f32],
    out: &'a mut [u8],
}

impl Kernel for Placing<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        // In a number between 64 and 128 the six bits behind the first are its whole part less 64.
        const OFFSET: f32 = BINS as f32;
        const BELOW_TWICE: f32 = f32::from_bits((2.0 * OFFSET).to_bits() - 1);
        const PART: usize = 256;
        let Self { min, per_unit, values, out } = self;
        let mut words = [0u32; PART];
        for (values, bins) in values.chunks(PART).zip(out.chunks_mut(PART)) {
            for (word, x) in words.iter_mut().zip(values) {
                let position = (x - min) * per_unit + OFFSET;
                let position = if position < BELOW_TWICE { position } else { BELOW_TWICE };
                *word = position.to_bits() >> (f32::MANTISSA_DIGITS - 1 - BINS.ilog2());
            }
            for (bin, word) in bins.iter_mut().zip(&words) {
                *bin = *word as u8 % BINS as u8;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(bytes: &[u8], n: usize) {
        let mut counter = Counter::new(n);
        // in two parts, to see that it adds
        let (first, second) = bytes.split_at(bytes.len() / 3);
        counter.add(first);
        counter.add(second);
        let expected: Vec<u64> =
            (0..n).map(|byte| bytes.iter().filter(|b| usize::from(**b) == byte).count() as u64).collect();
        assert_eq!(counter.counts(), expected);
    }

    proptest! {
        #[test]
        fn counts_are_those_of_counting_one_by_one(bytes in prop::collection::vec(any::<u8>(), 0..300), n in prop::sample::select(&[1usize, 2, 16, 64, 128, 256][..])) {
            let bytes: Vec<u8> = bytes.into_iter().map(|byte| (usize::from(byte) % n) as u8).collect();
            check(&bytes, n);
        }

        /// Against the formula in f64; only a value that is within rounding of a boundary may lie on its other side.
        #[test]
        fn bins_are_those_of_the_formula(x in prop::collection::vec(-1f32..1.0, 1..600), exponent in -100i32..100, offset in -3f32..3.0) {
            let scale = 2f32.powi(exponent);
            let x: Vec<f32> = x.iter().map(|x| (x + offset) * scale).collect();
            let range = crate::kernels::reduce::chunk_min_max(&x);
            let mut found = vec![99; x.len()];
            bins(range, &x, &mut found);
            let (min, max) = (f64::from(range.min), f64::from(range.max));
            for (x, bin) in x.iter().zip(&found) {
                let exact = (f64::from(*x) - min) * BINS as f64 / (max - min);
                let exact = if max > min { exact.min(BINS as f64 - 1e-9) } else { 0.0 };
                let off = (exact - f64::from(*bin)).clamp(0.0, 1.0 - 1e-9);
                prop_assert!((exact - f64::from(*bin) - off).abs() < 1e-4, "{} is in {} of {:?}", x, bin, range);
            }
        }
    }

    #[test]
    fn ends_are_in_the_first_and_the_last_bin_and_no_width_is_one_bin() {
        let of = |range, values: &[f32]| {
            let mut found = vec![99; values.len()];
            bins(range, values, &mut found);
            found
        };
        assert_eq!(of(MinMax { min: -2.0, max: 6.0 }, &[-2.0, 6.0, 2.0, 5.99]), [0, 63, 32, 63]);
        assert_eq!(of(MinMax { min: 0.5, max: 0.5 }, &[0.5, 0.5]), [0, 0]);
        assert_eq!(of(MinMax { min: f32::MIN, max: f32::MAX }, &[1.0]), [0]);
        assert_eq!(of(MinMax { min: 0.0, max: 1e-45 }, &[0.0, 1e-45]), [0, 0]);
        assert!(of(MinMax::EMPTY, &[]).is_empty());
    }
}
