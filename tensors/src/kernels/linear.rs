//! Element-wise linear combinations, `f32` throughout, product and sum rounded separately.

use crate::kernels::wide::{Kernel, wide};

/// `out[i] = out[i] + c·x[i]`; `c = ±1` adds or subtracts exactly.
pub fn add_scaled(out: &mut [f32], coefficient: f32, values: &[f32]) {
    assert_eq!(out.len(), values.len(), "operands have the same length");
    let pairs = out.iter_mut().zip(values);
    if coefficient == 1.0 {
        pairs.for_each(|(sum, x)| *sum += x);
    } else if coefficient == -1.0 {
        pairs.for_each(|(sum, x)| *sum -= x);
    } else {
        pairs.for_each(|(sum, x)| *sum += coefficient * x);
    }
}

/// `out[i] = out[i] + c·(a[i] + d·b[i])`: the same as adding `d·b` to `a` and that to `out`, in one pass over memory.
pub fn add_scaled_sum(out: &mut [f32], c: f32, a: &[f32], d: f32, b: &[f32]) {
    assert_eq!(out.len(), a.len(), "operands have the same length");
    assert_eq!(out.len(), b.len(), "operands have the same length");
    for ((sum, a), b) in out.iter_mut().zip(a).zip(b) {
        *sum += c * (a + d * b);
    }
}

/// `out[i] = c·out[i]`.
pub fn scale(out: &mut [f32], coefficient: f32) {
    if coefficient != 1.0 {
        for x in out {
            *x *= coefficient;
        }
    }
}

/// `out[row, i] = Σ_t weights[i, t]·vectors[t, row]`, in the order of t: all sums of a row while its elements are at hand. All three are row-major.
pub fn combine(weights: &[f32], vectors: &[f32], n_vectors: usize, out: &mut [f32]) {
    assert_eq!(weights.len() / n_vectors * (vectors.len() / n_vectors), out.len(), "a column per sum");
    wide(Combine { weights, vectors, n_vectors, out });
}

/// [`combine`].
struct Combine<'a> {
    weights: &'a [f32],
    vectors: &'a [f32],
    n_vectors: usize,
    out: &'a mut [f32],
}

impl Kernel for Combine<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        /// Rows that are combined at once: what the compiler keeps in registers.
        const LANES: usize = 16;
        let Self { weights, vectors, n_vectors, out } = self;
        let (width, n_rows) = (weights.len() / n_vectors, vectors.len() / n_vectors);
        for first in (0..n_rows).step_by(LANES) {
            let n_lanes = LANES.min(n_rows - first);
            for (index, weights) in weights.chunks_exact(n_vectors).enumerate() {
                let mut sums = [0f32; LANES];
                for (weight, vector) in weights.iter().zip(vectors.chunks_exact(n_rows)) {
                    let vector = &vector[first..first + n_lanes];
                    // A length that is known makes vector instructions; the arithmetic is the same.
                    if let Ok(vector) = <&[f32; LANES]>::try_from(vector) {
                        for lane in 0..LANES {
                            sums[lane] += weight * vector[lane];
                        }
                    } else {
                        for (sum, x) in sums.iter_mut().zip(vector) {
                            *sum += weight * x;
                        }
                    }
                }
                let rows = out[first * width..].chunks_exact_mut(width);
                for (row, sum) in rows.zip(&sums[..n_lanes]) {
                    row[index] = *sum;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn combinations_are_the_sums_of_the_definition(
            (n_vectors, width, n_rows) in (1usize..6, 1usize..8, 0usize..70),
            numbers in prop::collection::vec(-2f32..2.0, 500),
        ) {
            let (weights, vectors) = (&numbers[..width * n_vectors], &numbers[40..40 + n_vectors * n_rows]);
            let mut out = vec![f32::NAN; n_rows * width];
            combine(weights, vectors, n_vectors, &mut out);
            for (row, found) in out.chunks_exact(width).enumerate() {
                for (index, found) in found.iter().enumerate() {
                    let term = |t: usize| {
                        f64::from(weights[index * n_vectors + t]) * f64::from(vectors[t * n_rows + row])
                    };
                    let exact: f64 = (0..n_vectors).map(term).sum();
                    prop_assert!((f64::from(*found) - exact).abs() < 1e-5);
                }
            }
        }

        #[test]
        fn matches_the_formula(
            pairs in prop::collection::vec((-1e3f32..1e3, -1e3f32..1e3), 0..100),
            c in prop_oneof![Just(1.0f32), Just(-1.0), -2f32..2.0],
            d in prop_oneof![Just(1.0f32), Just(-1.0), -2f32..2.0],
        ) {
            let (x, y): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let mut out = x.clone();
            add_scaled(&mut out, c, &y);
            for i in 0..x.len() {
                prop_assert_eq!(out[i], x[i] + c * y[i]);
                let exact = f64::from(x[i]) + f64::from(c) * f64::from(y[i]);
                // two roundings, each half an ulp of a value below 3e3
                prop_assert!((f64::from(out[i]) - exact).abs() <= 2.5e-4);
            }
            let mut twice = y.clone();
            add_scaled(&mut twice, d, &x);
            let mut apart = x.clone();
            add_scaled(&mut apart, c, &twice);
            let mut at_once = x.clone();
            add_scaled_sum(&mut at_once, c, &y, d, &x);
            prop_assert!(at_once.iter().zip(&apart).all(|(a, b)| a.to_bits() == b.to_bits()));
            let mut scaled = x.clone();
            scale(&mut scaled, c);
            prop_assert!(scaled.iter().zip(&x).all(|(s, x)| *s == c * x));
        }
    }
}
