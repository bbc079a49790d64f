//! Functions that vectorize.
//!
//! Everything is written as fused multiply-additions and bit operations, so the result does not depend on how many lanes a processor has.

/// How many sums are kept beside each other where many values are added. Their order is part of the result.
pub(super) const LANES: usize = 16;

/// eˣ, within 1 unit in the last place where it is a normal number; smaller ones are about 1e-38 instead. NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// Adding it rounds to a whole number, which the lowest bits then hold.
    const ROUND: f32 = 12_582_912.0;
    // `clamp` keeps a NaN.
    let x = x.clamp(-87.3, 88.7);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts, the first with few bits.
    let r = n.mul_add(-0.693_145_75, x);
    let r = n.mul_add(-1.428_606_8e-6, r);
    let p = 1.378_059_4e-3_f32;
    let p = p.mul_add(r, 8.373_124_5e-3);
    let p = p.mul_add(r, 4.166_953e-2);
    let p = p.mul_add(r, 1.666_647_2e-1);
    let p = p.mul_add(r, 0.499_999_85);
    let p = p.mul_add(r, 1.0);
    let p = p.mul_add(r, 1.0);
    // 2ⁿ in two factors, of which each is a normal number.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n - half)
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// The error function, within 1 unit in the last place (after N. Juffa).
#[inline(always)]
pub(super) fn erf(x: f32) -> f32 {
    let t = x.abs();
    let s = x * x;
    let r = (-1.728_534_7e-5_f32).mul_add(t, 3.831_971_3e-4);
    let u = (-3.883_964_4e-3_f32).mul_add(t, 2.425_462_2e-2);
    let r = r.mul_add(s, u);
    let r = r.mul_add(t, -1.067_778_8e-1);
    let r = r.mul_add(t, -6.348_467e-1);
    let r = r.mul_add(t, -1.287_175_1e-1);
    let r = r.mul_add(t, -t);
    let tail = (1.0 - exp(r)).copysign(x);
    let p = -5.967_617e-4_f32;
    let p = p.mul_add(s, 4.991_194_2e-3);
    let p = p.mul_add(s, -2.676_813_5e-2);
    let p = p.mul_add(s, 1.128_199_25e-1);
    let p = p.mul_add(s, -3.761_253_4e-1);
    let p = p.mul_add(s, 1.283_791_7e-1);
    let middle = p.mul_add(x, x);
    if t > 0.927_734_4 { tail } else { middle }
}

/// Adds lanes in pairs.
#[inline(always)]
pub(super) fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    let mut sums = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}
