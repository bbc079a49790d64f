//! How far values are from others that stand for them, in one pass.
//!
//! Of every 256 elements, element `i` goes to accumulator `i mod 16`, in f32; those are added to accumulators in f64, which are added in their order
//! at the end. Squares that are lost in f32 (of values below 1e−19) are added up in f64 from the start.

use crate::kernels::wide::{Kernel, wide};

const LANES: usize = 16;

/// Elements whose sums are f32.
const GROUP: usize = 256;

/// Sums over pairs of a value `x` and what stands for it, `y`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Differences {
    /// Σ|y − x|.
    pub error: f64,
    /// Σ(y − x)².
    pub squared_error: f64,
    /// Largest |y − x|.
    pub largest: f64,
    /// Σ|x|.
    pub magnitude: f64,
    /// Σx².
    pub square: f64,
    /// How many x are 0.
    pub zeros_before: u64,
    /// How many y are 0.
    pub zeros: u64,
}

impl Differences {
    /// Of at most 2³² values, and as many that stand for them.
    pub fn of(values: &[f32], stand_ins: &[f32]) -> Self {
        assert_eq!(values.len(), stand_ins.len(), "operands have the same length");
        wide(Pairs { values, stand_ins })
    }

    /// Adds what comes next. Call it in the order of the elements.
    pub fn merge(&mut self, next: &Self) {
        self.error += next.error;
        self.squared_error += next.squared_error;
        self.largest = self.largest.max(next.largest);
        self.magnitude += next.magnitude;
        self.square += next.square;
        self.zeros_before += next.zeros_before;
        self.zeros += next.zeros;
    }
}

/// Accumulators over groups.
#[derive(Default)]
struct Lanes {
    error: [f64; LANES],
    squared_error: [f64; LANES],
    magnitude: [f64; LANES],
    square: [f64; LANES],
    largest: [f32; LANES],
    zeros_before: [u32; LANES],
    zeros: [u32; LANES],
}

/// [`Differences::of`].
struct Pairs<'a> {
    values: &'a [f32],
    stand_ins: &'a [f32],
}

impl Kernel for Pairs<'_> {
    type Output = Differences;

    #[inline(always)]
    fn run(self) -> Differences {
        let Self { values, stand_ins } = self;
        let mut lanes = Lanes::default();
        let (groups, rest) = values.as_chunks::<GROUP>();
        let (other_groups, other_rest) = stand_ins.as_chunks::<GROUP>();
        for (x, y) in groups.iter().zip(other_groups) {
            lanes.add(x, y);
        }
        // Zeros that stand for zeros change nothing but the number of zeros.
        let (mut x, mut y) = ([0f32; GROUP], [0f32; GROUP]);
        x[..rest.len()].copy_from_slice(rest);
        y[..rest.len()].copy_from_slice(other_rest);
        lanes.add(&x, &y);
        let padding = (GROUP - rest.len()) as u64;
        let count = |lanes: &[u32; LANES]| lanes.iter().map(|n| u64::from(*n)).sum::<u64>() - padding;
        Differences {
            error: lanes.error.iter().sum(),
            squared_error: lanes.squared_error.iter().sum(),
            largest: lanes.largest.iter().fold(0.0, |largest, x| largest.max(f64::from(*x))),
            magnitude: lanes.magnitude.iter().sum(),
            square: lanes.square.iter().sum(),
            zeros_before: count(&lanes.zeros_before),
            zeros: count(&lanes.zeros),
        }
    }
}

impl Lanes {
    #[inline(always)]
    fn add(&mut self, values: &[f32; GROUP], stand_ins: &[f32; GROUP]) {
        let (mut error, mut squared_error) = ([0f32; LANES], [0f32; LANES]);
        let (rows, _) = values.as_chunks::<LANES>();
        let (other_rows, _) = stand_ins.as_chunks::<LANES>();
        for (x, y) in rows.iter().zip(other_rows) {
            for i in 0..LANES {
                let off = (y[i] - x[i]).abs();
                error[i] += off;
                squared_error[i] += off * off;
                self.largest[i] = if off > self.largest[i] { off } else { self.largest[i] };
                self.zeros[i] += u32::from(y[i] == 0.0);
            }
        }
        // A loop of its own: accumulators of both do not fit in the registers.
        let (mut magnitude, mut square) = ([0f32; LANES], [0f32; LANES]);
        for x in rows {
            for i in 0..LANES {
                magnitude[i] += x[i].abs();
                square[i] += x[i] * x[i];
                self.zeros_before[i] += u32::from(x[i] == 0.0);
            }
        }
        let mut lost = false;
        for i in 0..LANES {
            lost |= is_lost(error[i], squared_error[i]) | is_lost(magnitude[i], square[i]);
            self.error[i] += f64::from(error[i]);
            self.magnitude[i] += f64::from(magnitude[i]);
        }
        if lost {
            for (x, y) in values.iter().zip(stand_ins) {
                self.squared_error[0] += (f64::from(*y) - f64::from(*x)).powi(2);
                self.square[0] += f64::from(*x).powi(2);
            }
        } else {
            for i in 0..LANES {
                self.squared_error[i] += f64::from(squared_error[i]);
                self.square[i] += f64::from(square[i]);
            }
        }
    }
}

/// Whether f32 is too narrow for squares of numbers with this sum of magnitudes.
#[inline(always)]
fn is_lost(magnitude: f32, square: f32) -> bool {
    magnitude > 0.0 && !(f32::MIN_POSITIVE..=f32::MAX).contains(&square)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_match_a_naive_reference() {
        for n in [0usize, 1, 15, 16, 17, 255, 256, 257, 1000] {
            for scale in [1.0f32, 1e-3, 1e-25, 1e-44, 1e25, 0.0] {
                let x: Vec<f32> =
                    (0..n).map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 504.0 * scale).collect();
                let y: Vec<f32> =
                    x.iter().enumerate().map(|(i, x)| if i % 3 == 0 { 0.0 } else { x * 1.25 }).collect();
                let found = Differences::of(&x, &y);
                let pairs = || x.iter().zip(&y).map(|(x, y)| (f64::from(*x), f64::from(*y)));
                let close = |actual: f64, expected: f64| {
                    assert!((actual - expected).abs() <= 1e-5 * expected, "{actual} against {expected}");
                };
                close(found.error, pairs().map(|(x, y)| (y - x).abs()).sum());
                close(found.squared_error, pairs().map(|(x, y)| (y - x).powi(2)).sum());
                close(found.largest, pairs().map(|(x, y)| (y - x).abs()).fold(0.0, f64::max));
                close(found.magnitude, pairs().map(|(x, _)| x.abs()).sum());
                close(found.square, pairs().map(|(x, _)| x * x).sum());
                assert_eq!(found.zeros_before, x.iter().filter(|x| **x == 0.0).count() as u64);
                assert_eq!(found.zeros, y.iter().filter(|y| **y == 0.0).count() as u64);
            }
        }
    }

    #[test]
    fn parts_add_up() {
        let x: Vec<f32> = (0..2000).map(|i| (i as f32).sin()).collect();
        let y: Vec<f32> = x.iter().map(|x| (x * 8.0).round() / 8.0).collect();
        let mut sum = Differences::of(&x[..1024], &y[..1024]);
        sum.merge(&Differences::of(&x[1024..], &y[1024..]));
        let whole = Differences::of(&x, &y);
        assert!((sum.squared_error - whole.squared_error).abs() < 1e-12);
        assert_eq!((sum.largest, sum.zeros), (whole.largest, whole.zeros));
    }
}
