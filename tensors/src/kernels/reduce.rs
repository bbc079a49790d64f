//! Reductions whose results do not depend on the number of threads.
//!
//! A slice is cut into chunks of [`CHUNK`] elements. Within a chunk, element `i` goes to accumulator `i mod 16`
//! and the accumulators are added in a fixed tree; chunk results are combined serially, in order. Sums accumulate in
//! `f64`: with chunks this long the error is below `2^-40` relative to the sum of magnitudes.
//! The block functions (`chunk_…`) let a streamed tensor be reduced block by block with the same result
//! as a slice, provided that its blocks are chunks (see [`crate::stream`]).

use rayon::prelude::*;

/// Elements per chunk.
pub const CHUNK: usize = 64 * 1024;

const LANES: usize = 16;

/// Smallest and largest value; of nothing, `+∞` and `−∞`. NaN is ignored: check for it with [`super::finite`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MinMax {
    pub min: f32,
    pub max: f32,
}

impl MinMax {
    pub const EMPTY: Self = Self { min: f32::INFINITY, max: f32::NEG_INFINITY };

    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        Self { min: self.min.min(other.min), max: self.max.max(other.max) }
    }

    pub fn is_empty(self) -> bool {
        self.min > self.max
    }

    /// Largest magnitude; of nothing, 0.
    pub fn max_abs(self) -> f32 {
        if self.is_empty() { 0.0 } else { self.min.abs().max(self.max.abs()) }
    }
}

/// Size of values that are finite, and how many are not.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Norms {
    pub sum_of_squares: f64,
    pub max_abs: f64,
    pub n_non_finite: u64,
}

impl Norms {
    /// Adds the next chunk. Call it in the order of the chunks.
    #[must_use]
    pub fn merge(self, next: Self) -> Self {
        Self {
            sum_of_squares: self.sum_of_squares + next.sum_of_squares,
            max_abs: self.max_abs.max(next.max_abs),
            n_non_finite: self.n_non_finite + next.n_non_finite,
        }
    }

    pub fn l2(&self) -> f64 {
        self.sum_of_squares.sqrt()
    }
}

/// How far two slices are apart where both are finite, and how many of their elements differ. Two NaN do not differ.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distance {
    pub sum_of_squares: f64,
    pub max_abs: f64,
    pub n_different: u64,
}

impl Distance {
    /// Adds the next chunk. Call it in the order of the chunks.
    #[must_use]
    pub fn merge(self, next: Self) -> Self {
        Self {
            sum_of_squares: self.sum_of_squares + next.sum_of_squares,
            max_abs: self.max_abs.max(next.max_abs),
            n_different: self.n_different + next.n_different,
        }
    }

    pub fn l2(&self) -> f64 {
        self.sum_of_squares.sqrt()
    }
}

/// Sum in `f64`.
pub fn sum(values: &[f32]) -> f64 {
    values.par_chunks(CHUNK).map(chunk_sum).collect::<Vec<_>>().into_iter().sum()
}

/// Sum of squares in `f64`.
pub fn sum_of_squares(values: &[f32]) -> f64 {
    values.par_chunks(CHUNK).map(chunk_sum_of_squares).collect::<Vec<_>>().into_iter().sum()
}

/// Sum of magnitudes in `f64`.
pub fn sum_of_magnitudes(values: &[f32]) -> f64 {
    values.par_chunks(CHUNK).map(chunk_sum_of_magnitudes).collect::<Vec<_>>().into_iter().sum()
}

/// Inner product in `f64`; the slices have the same length.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "operands have the same length");
    let chunks = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK));
    chunks.map(|(a, b)| chunk_dot(a, b)).collect::<Vec<_>>().into_iter().sum()
}

/// Smallest and largest value.
pub fn min_max(values: &[f32]) -> MinMax {
    values.par_chunks(CHUNK).map(chunk_min_max).reduce(|| MinMax::EMPTY, MinMax::merge)
}

/// [`sum`] of one chunk.
pub fn chunk_sum(values: &[f32]) -> f64 {
    accumulate(values, f64::from)
}

/// [`sum_of_squares`] of one chunk.
pub fn chunk_sum_of_squares(values: &[f32]) -> f64 {
    accumulate(values, |x| f64::from(x) * f64::from(x))
}

/// [`sum_of_magnitudes`] of one chunk.
pub fn chunk_sum_of_magnitudes(values: &[f32]) -> f64 {
    accumulate(values, |x| f64::from(x.abs()))
}

/// [`dot`] of one chunk.
pub fn chunk_dot(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "operands have the same length");
    let mut lanes = [0f64; LANES];
    let (a_rows, a_rest) = a.as_chunks::<LANES>();
    let (b_rows, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_rows.iter().zip(b_rows) {
        for (lane, (&x, &y)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += f64::from(x) * f64::from(y);
        }
    }
    for (lane, (&x, &y)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += f64::from(x) * f64::from(y);
    }
    add_lanes(lanes)
}

/// [`min_max`] of one chunk.
pub fn chunk_min_max(values: &[f32]) -> MinMax {
    let mut low = [f32::INFINITY; LANES];
    let mut high = [f32::NEG_INFINITY; LANES];
    let (rows, rest) = values.as_chunks::<LANES>();
    let mut take = |row: &[f32]| {
        for ((low, high), &x) in low.iter_mut().zip(&mut high).zip(row) {
            // Not `f32::min`: its NaN rule takes three instructions instead of one.
            *low = if x < *low { x } else { *low };
            *high = if x > *high { x } else { *high };
        }
    };
    for row in rows {
        take(row);
    }
    take(rest);
    let pairs = low.into_iter().zip(high).map(|(min, max)| MinMax { min, max });
    pairs.fold(MinMax::EMPTY, MinMax::merge)
}

/// [`Norms`] of one chunk.
pub fn chunk_norms<T: Copy + Into<f64>>(values: &[T]) -> Norms {
    let (mut sums, mut largest, mut n_non_finite) = ([0f64; LANES], [0f64; LANES], 0u64);
    let (rows, rest) = values.as_chunks::<LANES>();
    let mut take = |row: &[T]| {
        for ((sum, largest), &x) in sums.iter_mut().zip(&mut largest).zip(row) {
            let x: f64 = x.into();
            let magnitude = if x.is_finite() { x.abs() } else { 0.0 };
            n_non_finite += u64::from(!x.is_finite());
            *sum += magnitude * magnitude;
            *largest = if magnitude > *largest { magnitude } else { *largest };
        }
    };
    for row in rows {
        take(row);
    }
    take(rest);
    Norms { sum_of_squares: add_lanes(sums), max_abs: largest.into_iter().fold(0.0, f64::max), n_non_finite }
}

/// [`Distance`] of one chunk; the slices have the same length.
pub fn chunk_distance<T: Copy + Into<f64>>(a: &[T], b: &[T]) -> Distance {
    assert_eq!(a.len(), b.len(), "operands have the same length");
    let (mut sums, mut largest, mut n_different) = ([0f64; LANES], [0f64; LANES], 0u64);
    let (a_rows, a_rest) = a.as_chunks::<LANES>();
    let (b_rows, b_rest) = b.as_chunks::<LANES>();
    let mut take = |a: &[T], b: &[T]| {
        for ((sum, largest), (&x, &y)) in sums.iter_mut().zip(&mut largest).zip(a.iter().zip(b)) {
            let (x, y): (f64, f64) = (x.into(), y.into());
            let finite = x.is_finite() && y.is_finite();
            let apart = if finite { (y - x).abs() } else { 0.0 };
            n_different += u64::from(x != y && !(x.is_nan() && y.is_nan()));
            *sum += apart * apart;
            *largest = if apart > *largest { apart } else { *largest };
        }
    };
    for (a, b) in a_rows.iter().zip(b_rows) {
        take(a, b);
    }
    take(a_rest, b_rest);
    Distance {
        sum_of_squares: add_lanes(sums),
        max_abs: largest.into_iter().fold(0.0, f64::max),
        n_different,
    }
}

#[inline]
fn accumulate(values: &[f32], term: impl Fn(f32) -> f64) -> f64 {
    let mut lanes = [0f64; LANES];
    let (rows, rest) = values.as_chunks::<LANES>();
    for row in rows {
        for (lane, &x) in lanes.iter_mut().zip(row) {
            *lane += term(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += term(x);
    }
    add_lanes(lanes)
}

fn add_lanes(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [usize; 9] = [0, 1, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5];

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 % 10_007) as f32 - 5000.0) * 1.3e-3).collect()
    }

    #[track_caller]
    fn assert_close(actual: f64, expected: f64, magnitude: f64) {
        assert!((actual - expected).abs() <= magnitude * 2f64.powi(-40), "{actual} against {expected}");
    }

    #[test]
    fn sums_match_a_naive_f64_reference() {
        for n in SIZES {
            let x = values(n);
            let y: Vec<f32> = x.iter().rev().copied().collect();
            let wide = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
            let (wx, wy) = (wide(&x), wide(&y));
            let magnitude: f64 = wx.iter().map(|v| v.abs()).sum();
            let squares: f64 = wx.iter().map(|v| v * v).sum();
            assert_close(sum(&x), wx.iter().sum(), magnitude);
            assert_close(sum_of_magnitudes(&x), magnitude, magnitude);
            assert_close(sum_of_squares(&x), squares, squares);
            assert_close(dot(&x, &y), wx.iter().zip(&wy).map(|(a, b)| a * b).sum(), squares);
        }
    }

    #[test]
    fn min_max_matches_a_naive_reference() {
        for n in SIZES {
            let x = values(n);
            let expected = x.iter().fold(MinMax::EMPTY, |m, &v| m.merge(MinMax { min: v, max: v }));
            assert_eq!(min_max(&x), expected);
        }
        assert!(min_max(&[]).is_empty());
        assert_eq!(min_max(&[]).max_abs(), 0.0);
        assert_eq!(min_max(&[-3.0, 2.0, f32::NAN]).max_abs(), 3.0);
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let x = values(5 * CHUNK + 77);
        let with_threads = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| (sum(&x).to_bits(), sum_of_squares(&x).to_bits(), dot(&x, &x).to_bits()))
        };
        let one = with_threads(1);
        assert_eq!(with_threads(2), one);
        assert_eq!(with_threads(8), one);
    }
}
