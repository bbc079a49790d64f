//! Elementary functions with the same bits on every machine, branch-free so that they vectorize.
//!
//! The system's own `exp` and `tanh` differ in their last bits from one C library to the next, and so would whatever is derived from them. These
//! compute in f64 with a few ulp of error, so the f32 next to the true value comes out but for rare halfway cases.

/// The largest magnitude of an exponent: beyond, results saturate.
const LIMIT: f64 = 700.0;

/// Adding and subtracting it rounds to the nearest whole number.
const ROUND: f64 = 6_755_399_441_055_744.0;

/// ln 2 in two parts; products of the first with whole numbers below 2¹¹ are exact.
const LN_2: [f64; 2] = [0.693_147_180_369_123_8, 1.908_214_929_270_587_7e-10];

/// 1/n! from the highest power down.
const TAYLOR: [f64; 13] = [
    1.0 / 479_001_600.0,
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// eˣ for |x| ≤ 700.
#[inline]
pub fn exp(x: f64) -> f64 {
    let x = x.clamp(-LIMIT, LIMIT);
    let shifted = x * std::f64::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = (x - whole * LN_2[0]) - whole * LN_2[1];
    let mut sum = 0.0;
    for coefficient in TAYLOR {
        sum = sum * rest + coefficient;
    }
    // The low bits of `shifted` are the whole number: as an exponent, it is 2 to its power.
    let power = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    sum * power
}

/// tanh x.
#[inline]
pub fn tanh(x: f64) -> f64 {
    let square = x * x;
    let small = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))));
    let fall = exp(-2.0 * x.abs());
    let large = ((1.0 - fall) / (1.0 + fall)).copysign(x);
    // Near zero, the difference from 1 has lost the digits that count.
    if x.abs() < 0.03 { small } else { large }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agree_with_the_library(x in prop_oneof![-100f64..100.0, -1f64..1.0, -1e-3f64..1e-3, -1e-12f64..1e-12]) {
            prop_assert!((exp(x) / x.exp() - 1.0).abs() < 1e-14, "exp {x}: {} {}", exp(x), x.exp());
            prop_assert!((tanh(x) - x.tanh()).abs() <= 1e-12 * x.tanh().abs(), "tanh {x}: {}", tanh(x));
        }
    }

    #[test]
    fn ends_and_zero() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(1e9), exp(700.0));
        assert_eq!(exp(-1e9), exp(-700.0));
        assert!(exp(700.0).is_finite() && exp(-700.0) > 0.0);
        assert_eq!(tanh(0.0), 0.0);
        assert_eq!((tanh(400.0), tanh(-400.0)), (1.0, -1.0));
        assert_eq!(tanh(1e30), 1.0);
    }
}
