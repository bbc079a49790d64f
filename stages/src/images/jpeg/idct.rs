//! The inverse discrete cosine transform of 8×8 blocks in fixed point, as libjpeg's "islow".
//!
//! Two passes of the one-dimensional transform of Loeffler, Ligtenberg and Moschytz (ICASSP 1989: 12 multiplications, scaled by √8), columns
//! first. Constants have 13 bits after the point; the first pass keeps 2 bits that the second rounds away.

use std::num::Wrapping as W;

const BITS: usize = 13;
const KEPT: usize = 2;

/// A constant with [`BITS`] bits after the point.
const fn fixed(value: f64) -> W<i32> {
    W((value * (1 << BITS) as f64 + 0.5) as i32)
}

/// Dequantizes and transforms a block into rows of 8 samples, `stride` apart.
pub(super) fn transform(block: &[i16; 64], steps: &[i32; 64], out: &mut [u8], stride: usize) {
    if block[1..].iter().all(|&value| value == 0) {
        let flat = (W(i32::from(block[0])) * W(steps[0])) << KEPT;
        let value = sample(rounded(flat, KEPT + 3));
        for row in out.chunks_mut(stride).take(8) {
            row[..8].fill(value);
        }
        return;
    }
    let mut values = [W(0); 64];
    for ((value, &coefficient), &step) in values.iter_mut().zip(block).zip(steps) {
        *value = W(i32::from(coefficient)) * W(step);
    }
    let columns = pass(&values, BITS - KEPT);
    let rows = pass(&transposed(&columns), BITS + KEPT + 3);
    for (index, row) in out.chunks_mut(stride).take(8).enumerate() {
        for (column, value) in row[..8].iter_mut().enumerate() {
            *value = sample(rows[8 * column + index]);
        }
    }
}

/// Transforms every column, and drops `shift` bits.
fn pass(input: &[W<i32>; 64], shift: usize) -> [W<i32>; 64] {
    let mut output = [W(0); 64];
    for column in 0..8 {
        let at = |row: usize| input[8 * row + column];
        // Even part: the rotation of 2 and 6, the sum and the difference of 0 and 4.
        let z1 = (at(2) + at(6)) * fixed(0.541_196_100);
        let t2 = z1 - at(6) * fixed(1.847_759_065);
        let t3 = z1 + at(2) * fixed(0.765_366_865);
        let t0 = (at(0) + at(4)) << BITS;
        let t1 = (at(0) - at(4)) << BITS;
        let (t10, t13, t11, t12) = (t0 + t3, t0 - t3, t1 + t2, t1 - t2);
        // Odd part.
        let (o0, o1, o2, o3) = (at(7), at(5), at(3), at(1));
        let (z1, z2, z3, z4) = (o0 + o3, o1 + o2, o0 + o2, o1 + o3);
        let z5 = (z3 + z4) * fixed(1.175_875_602);
        let z1 = -z1 * fixed(0.899_976_223);
        let z2 = -z2 * fixed(2.562_915_447);
        let z3 = z5 - z3 * fixed(1.961_570_560);
        let z4 = z5 - z4 * fixed(0.390_180_644);
        let o0 = o0 * fixed(0.298_631_336) + z1 + z3;
        let o1 = o1 * fixed(2.053_119_869) + z2 + z4;
        let o2 = o2 * fixed(3.072_711_026) + z2 + z3;
        let o3 = o3 * fixed(1.501_321_110) + z1 + z4;
        let sums = [t10 + o3, t11 + o2, t12 + o1, t13 + o0, t13 - o0, t12 - o1, t11 - o2, t10 - o3];
        for (row, sum) in sums.into_iter().enumerate() {
            output[8 * row + column] = rounded(sum, shift);
        }
    }
    output
}

fn rounded(value: W<i32>, shift: usize) -> W<i32> {
    (value + (W(1) << (shift - 1))) >> shift
}

fn sample(value: W<i32>) -> u8 {
    (value.0.saturating_add(128)).clamp(0, 255) as u8
}

fn transposed(values: &[W<i32>; 64]) -> [W<i32>; 64] {
    std::array::from_fn(|at| values[8 * (at % 8) + at / 8])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition (T.81, A.3.3), in f64.
    fn naive(block: &[i16; 64], steps: &[i32; 64]) -> [f64; 64] {
        let scale = |k: usize| if k == 0 { 0.5_f64.sqrt() } else { 1.0 };
        let cosine = |k: usize, x: usize| ((2 * x + 1) as f64 * k as f64 * std::f64::consts::PI / 16.0).cos();
        std::array::from_fn(|at| {
            let (y, x) = (at / 8, at % 8);
            let mut sum = 0.0;
            for (k, (&value, &step)) in block.iter().zip(steps).enumerate() {
                let (v, u) = (k / 8, k % 8);
                sum += scale(u) * scale(v) * f64::from(value) * f64::from(step) * cosine(u, x) * cosine(v, y);
            }
            (sum / 4.0 + 128.0).clamp(0.0, 255.0)
        })
    }

    #[test]
    fn is_the_transform_within_rounding() {
        let mut state = 1_u32;
        let mut random = |range: i32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as i32).rem_euclid(2 * range + 1) - range
        };
        for trial in 0..200 {
            let mut block = [0_i16; 64];
            for (k, value) in block.iter_mut().enumerate() {
                if k == 0 || k % (1 + trial % 9) == 0 {
                    *value = random(if k == 0 { 60 } else { 12 }) as i16;
                }
            }
            if trial == 0 {
                block = [0; 64];
            }
            let steps = std::array::from_fn(|k| 1 + (k as i32 * 7 + trial as i32) % 16);
            let mut out = [7_u8; 8 * 11];
            transform(&block, &steps, &mut out, 11);
            let exact = naive(&block, &steps);
            for (at, exact) in exact.iter().enumerate() {
                let found = f64::from(out[11 * (at / 8) + at % 8]);
                assert!((found - exact).abs() <= 1.0, "trial {trial}: {found} {exact}");
            }
            assert!(
                out.chunks(11).all(|row| row[8..].iter().all(|&value| value == 7)),
                "stays in its 8 columns"
            );
        }
    }

    #[test]
    fn flat_blocks_are_those_of_the_general_way() {
        for dc in [-1024, -700, -1, 0, 1, 3, 517, 1023] {
            let mut block = [0; 64];
            block[0] = dc;
            let steps = [3; 64];
            let (mut short, mut long) = ([0; 64], [0; 64]);
            transform(&block, &steps, &mut short, 8);
            let mut values = [W(0); 64];
            values[0] = W(i32::from(dc)) * W(3);
            let rows = pass(&transposed(&pass(&values, BITS - KEPT)), BITS + KEPT + 3);
            for (at, value) in long.iter_mut().enumerate() {
                *value = sample(rows[8 * (at % 8) + at / 8]);
            }
            assert_eq!(short, long, "{dc}");
        }
    }
}
