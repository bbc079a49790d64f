//! Affine (asymmetric), absmax and symmetric quantization of `f32` values to codes of 1–8 and 16 bits.
//!
//! # Formulas, all in `f32`, ties to even
//!
//! * affine (TVQ: `asymmetric_quantization`): `s = (2^b − 1)/(max − min)`, `z = −round(s·min)`,
//!   `q = clamp(round(s·x + z), 0, 2^b − 1)`, `x̂ = (q − z)/s`. The scale is a multiplier (the inverse of the step); `z` is an
//!   unclamped whole number.
//! * absmax (TVQ: `absmax_quantization`): `s = (2^(b−1) − 1)/max|x|`, `q = round(s·x)`, `x̂ = q/s`. Signed codes are stored in offset
//!   binary, `q + 2^(b−1)`, so that decoding is the affine formula with `z = 2^(b−1)`, which is exact.
//! * symmetric (CDPQ, ONNX): a step instead of a multiplier, `Δ = max|x|/(2^(b−1) − 1)`, `q = clamp(round(x/Δ), ±(2^(b−1) − 1))`,
//!   `x̂ = q·Δ`, in offset binary too.
//!
//! The divisions that give a multiplier are a reciprocal and a product, as PyTorch divides a number by a tensor. Products and sums are
//! rounded separately (no fused multiply-add), as PyTorch does on a CPU; integer codes, scales, zero points and decoded values equal the
//! original implementations' bit by bit. (At 16 bits the original of affine overflows; ours has unsigned codes.)
//!
//! # Where the originals give NaN
//!
//! * affine, constant tensor (`max == min`): `s = 1`, `z = −min`; every code is 0 and decodes to the constant exactly.
//! * absmax and symmetric, all zeros: `s = 1`; every code is zero and decodes to 0.
//! * a range so small that `s` would overflow: `s = f32::MAX`; the error stays below one step. A step that would underflow: the smallest
//!   positive number.
//! * absmax and symmetric at 1 bit have no code but zero: refused. Affine at 1 bit has the two levels `min` and `max`.
//! * NaN or infinity, or a range so wide that a decoded value would overflow: refused.
//!
//! # Error
//!
//! `|x − x̂|` is at most one step (half from rounding `x`; affine, up to half more at the ends because `z` is rounded) plus a few units in
//! the last place of `max|x|` (the cost of adding `z` when the range is small against its distance from zero).

use crate::kernels::pack::{Bits, Word};

/// Adding this to a whole number in `0..2^23` (after rounding to nearest even, which the addition performs)
/// leaves that number in the low bits: rounding and conversion in one vector instruction, where
/// `round_ties_even` is a library call on baseline x86-64.
pub(crate) const ROUNDER: f32 = 8_388_608.0; // 2^23

/// Why values cannot be quantized.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum QuantizeError {
    #[error("signed codes need 2 bits or more (at 1 bit their only code is zero; use the asymmetric scheme)")]
    SignedAtOneBit,
    #[error("values must be finite to be quantized, found a range of {min} to {max}")]
    NotFinite { min: f32, max: f32 },
    #[error("values from {min} to {max} span more than f32 can decode from {bits}-bit codes", bits = bits.get())]
    RangeTooWide { min: f32, max: f32, bits: Bits },
}

/// What turns codes into values: `x̂ = (q − zero_point)/scale`.
///
/// INVARIANT (of the constructors): `scale` is finite and positive, `zero_point` is finite, and every code of
/// the given width decodes to a finite value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CodeMap {
    /// Multiplier: codes per unit.
    pub scale: f32,
    /// Code of the value zero.
    pub zero_point: f32,
}

impl CodeMap {
    /// Returns the affine map for values between `min` and `max`. An empty tensor has the range 0 to 0.
    pub fn affine(min: f32, max: f32, bits: Bits) -> Result<Self, QuantizeError> {
        if !(min.is_finite() && max.is_finite() && min <= max) {
            return Err(QuantizeError::NotFinite { min, max });
        }
        let map = if min == max {
            Self { scale: 1.0, zero_point: -min }
        } else {
            let scale = divide(bits.max_code(), max - min);
            Self { scale, zero_point: -(scale * min).round_ties_even() }
        };
        let decodes = map.scale > 0.0
            && map.decode(0).is_finite()
            && (min == max || map.decode(bits.max_code()).is_finite());
        if decodes { Ok(map) } else { Err(QuantizeError::RangeTooWide { min, max, bits }) }
    }

    /// Returns the absmax map for values of magnitude up to `max_abs`, for codes in offset binary.
    pub fn absmax(max_abs: f32, bits: Bits) -> Result<Self, QuantizeError> {
        if bits.get() == 1 {
            return Err(QuantizeError::SignedAtOneBit);
        }
        if !max_abs.is_finite() || max_abs < 0.0 {
            return Err(QuantizeError::NotFinite { min: -max_abs, max: max_abs });
        }
        let scale = if max_abs == 0.0 { 1.0 } else { divide(bits.max_code() >> 1, max_abs) };
        let map = Self { scale, zero_point: signed_offset(bits) };
        let decodes = scale > 0.0 && map.decode(bits.max_code()).is_finite();
        if decodes { Ok(map) } else { Err(QuantizeError::RangeTooWide { min: -max_abs, max: max_abs, bits }) }
    }

    /// Decodes one code.
    #[inline(always)]
    pub fn decode(self, code: u16) -> f32 {
        (f32::from(code) - self.zero_point) / self.scale
    }
}

/// `levels/range` as PyTorch evaluates a number divided by a tensor: the reciprocal first. This differs from a division in
/// the last bit, and that bit in a code now and then.
fn divide(levels: u16, range: f32) -> f32 {
    (range.recip() * f32::from(levels)).min(f32::MAX)
}

/// The step of symmetric codes for values of magnitude up to `max_abs`.
pub fn symmetric_step(max_abs: f32, bits: Bits) -> Result<f32, QuantizeError> {
    if bits.get() == 1 {
        return Err(QuantizeError::SignedAtOneBit);
    }
    if !max_abs.is_finite() || max_abs < 0.0 {
        return Err(QuantizeError::NotFinite { min: -max_abs, max: max_abs });
    }
    if max_abs == 0.0 {
        return Ok(1.0);
    }
    let levels = f32::from(bits.max_code() >> 1);
    let step = (max_abs / levels).max(f32::from_bits(1));
    if (levels * step).is_finite() {
        Ok(step)
    } else {
        Err(QuantizeError::RangeTooWide { min: -max_abs, max: max_abs, bits })
    }
}

/// Code of zero in offset binary, `2^(b−1)`.
#[inline(always)]
pub fn signed_offset(bits: Bits) -> f32 {
    f32::from(bits.max_code() / 2 + 1)
}

/// Writes `clamp(round(s·x + z), 0, 2^b − 1)` for every `x`. The values are finite (see [`super::finite`]);
/// a NaN would become code 0.
#[inline(always)]
pub fn quantize_affine<W: Word>(values: &[f32], map: CodeMap, bits: Bits, codes: &mut [W]) {
    assert_eq!(values.len(), codes.len(), "one code per value");
    let max_code = f32::from(bits.max_code());
    for (code, &x) in codes.iter_mut().zip(values) {
        // Rounding after clamping to whole bounds gives the same as clamping after rounding.
        let shifted = clamp(map.scale * x + map.zero_point, 0.0, max_code);
        *code = W::from_bits((shifted + ROUNDER).to_bits());
    }
}

/// Writes `round(s·x) + 2^(b−1)` for every `x`, kept within `±(2^(b−1) − 1)`. The values are finite.
#[inline(always)]
pub fn quantize_absmax<W: Word>(values: &[f32], map: CodeMap, bits: Bits, codes: &mut [W]) {
    quantize_signed(values, bits, codes, |x| map.scale * x);
}

/// Writes `round(x/Δ) + 2^(b−1)` for every `x`, kept within `±(2^(b−1) − 1)`. The values are finite.
#[inline(always)]
pub fn quantize_symmetric<W: Word>(values: &[f32], step: f32, bits: Bits, codes: &mut [W]) {
    quantize_signed(values, bits, codes, |x| x / step);
}

#[inline(always)]
fn quantize_signed<W: Word>(values: &[f32], bits: Bits, codes: &mut [W], scaled: impl Fn(f32) -> f32) {
    assert_eq!(values.len(), codes.len(), "one code per value");
    let levels = f32::from(bits.max_code() >> 1);
    // The offset is even from 2 bits on, so adding it together with the rounder keeps ties to even.
    let rounder = ROUNDER + signed_offset(bits);
    for (code, &x) in codes.iter_mut().zip(values) {
        *code = W::from_bits((clamp(scaled(x), -levels, levels) + rounder).to_bits());
    }
}

/// Writes `(q − z)/s` for every code, of affine and absmax.
#[inline(always)]
pub fn dequantize<W: Word>(codes: &[W], map: CodeMap, out: &mut [f32]) {
    assert_eq!(codes.len(), out.len(), "one value per code");
    for (x, code) in out.iter_mut().zip(codes) {
        *x = (code.to_f32() - map.zero_point) / map.scale;
    }
}

/// Writes `(q − 2^(b−1))·Δ` for every code.
#[inline(always)]
pub fn dequantize_symmetric<W: Word>(codes: &[W], step: f32, bits: Bits, out: &mut [f32]) {
    assert_eq!(codes.len(), out.len(), "one value per code");
    let offset = signed_offset(bits);
    for (x, code) in out.iter_mut().zip(codes) {
        *x = (code.to_f32() - offset) * step;
    }
}

/// `f32::clamp` without its NaN handling, which costs instructions: one `max` and one `min`.
#[inline(always)]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = if x > low { x } else { low };
    if x < high { x } else { high }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::pack::GROUP;

    const WIDTHS: [u8; 9] = [1, 2, 3, 4, 5, 6, 7, 8, 16];

    fn bits(bits: u8) -> Bits {
        Bits::new(bits).unwrap()
    }

    #[test]
    fn codes_match_the_formula_with_library_rounding() {
        for b in WIDTHS {
            let (min, max) = (-0.37f32, 0.81f32);
            let map = CodeMap::affine(min, max, bits(b)).unwrap();
            for n in [0, 1, GROUP - 1, GROUP, GROUP + 1, 3000] {
                let x: Vec<f32> =
                    (0..n).map(|i| min + (max - min) * (i * 7919 % 3001) as f32 / 3000.0).collect();
                let mut codes = vec![0u16; n];
                quantize_affine(&x, map, bits(b), &mut codes);
                let levels = f32::from(bits(b).max_code());
                for (x, code) in x.iter().zip(&codes) {
                    let expected = (map.scale * x + map.zero_point).round_ties_even().clamp(0.0, levels);
                    assert_eq!(f32::from(*code), expected);
                }
                let mut out = vec![0.0; n];
                dequantize(&codes, map, &mut out);
                for (y, code) in out.iter().zip(&codes) {
                    assert_eq!(*y, (f32::from(*code) - map.zero_point) / map.scale);
                }
            }
        }
    }

    #[test]
    fn halves_round_to_even() {
        let identity = CodeMap { scale: 1.0, zero_point: 0.0 };
        let x = [0.5, 1.5, 2.5, 3.5, 254.5, 255.5, -0.5, 0.499_999_97];
        let mut codes = [0u8; 8];
        quantize_affine(&x, identity, bits(8), &mut codes);
        assert_eq!(codes, [0, 2, 2, 4, 254, 255, 0, 0]);
        let signed = CodeMap { scale: 1.0, zero_point: 8.0 };
        let x = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 9.0, -9.0];
        quantize_absmax(&x, signed, bits(4), &mut codes);
        assert_eq!(codes.map(|code| i16::from(code) - 8), [0, 2, 2, 0, -2, -2, 7, -7]);
    }

    #[test]
    fn constants_are_reproduced_exactly() {
        for value in [0.0, -0.0, 1.0, -3.25, 0.1, 1e-45, f32::MAX, f32::MIN] {
            for b in WIDTHS {
                let map = CodeMap::affine(value, value, bits(b)).unwrap();
                let mut codes = [9u16];
                quantize_affine(&[value], map, bits(b), &mut codes);
                assert_eq!(codes, [0]);
                assert_eq!(map.decode(0), value, "{b} bits");
            }
        }
        let map = CodeMap::absmax(0.0, bits(4)).unwrap();
        let mut codes = [0u16];
        quantize_absmax(&[0.0], map, bits(4), &mut codes);
        assert_eq!(map.decode(codes[0]), 0.0);
    }

    #[test]
    fn what_cannot_be_quantized_is_refused() {
        assert_eq!(CodeMap::absmax(1.0, bits(1)), Err(QuantizeError::SignedAtOneBit));
        for (min, max) in [(f32::NAN, 1.0), (0.0, f32::INFINITY), (1.0, 0.0), (0.0, f32::NAN)] {
            assert!(matches!(CodeMap::affine(min, max, bits(4)), Err(QuantizeError::NotFinite { .. })));
        }
        assert!(matches!(CodeMap::absmax(f32::INFINITY, bits(4)), Err(QuantizeError::NotFinite { .. })));
        let error = CodeMap::affine(f32::MIN, f32::MAX, bits(4)).unwrap_err();
        assert!(matches!(error, QuantizeError::RangeTooWide { .. }), "{error}");
    }

    proptest! {
        /// Any finite range, of any magnitude: never NaN, and within a step.
        #[test]
        fn decoding_is_finite_and_within_a_step(
            x in prop::collection::vec(any::<f32>().prop_filter("finite", |x| x.is_finite()), 1..40),
            exponent in -140i32..120,
            b in prop::sample::select(&WIDTHS[..]),
        ) {
            let scale = 2f32.powi(exponent);
            let x: Vec<f32> = x.iter().map(|x| x % 1.0 * scale).collect();
            let (min, max) = x.iter().fold((x[0], x[0]), |(low, high), &x| (low.min(x), high.max(x)));
            let max_abs = min.abs().max(max.abs());
            let affine = CodeMap::affine(min, max, bits(b)).unwrap();
            let absmax = CodeMap::absmax(max_abs, bits(b)).ok();
            let mut codes = vec![0u16; x.len()];
            let mut decoded = vec![0.0; x.len()];
            quantize_affine(&x, affine, bits(b), &mut codes);
            dequantize(&codes, affine, &mut decoded);
            check_bound(&x, &decoded, if min == max { 0.0 } else { 1.0 / f64::from(affine.scale) }, max_abs)?;
            if let Some(absmax) = absmax {
                quantize_absmax(&x, absmax, bits(b), &mut codes);
                dequantize(&codes, absmax, &mut decoded);
                check_bound(&x, &decoded, 1.0 / f64::from(absmax.scale), max_abs)?;
                let step = symmetric_step(max_abs, bits(b)).unwrap();
                quantize_symmetric(&x, step, bits(b), &mut codes);
                dequantize_symmetric(&codes, step, bits(b), &mut decoded);
                // A subnormal step is rounded to 2^-149, and the largest code multiplies that.
                let rounding = f64::from(bits(b).max_code() >> 1) * 2f64.powi(-150);
                check_bound(&x, &decoded, f64::from(step) + rounding, max_abs)?;
            }
        }
    }

    #[test]
    fn a_subnormal_step_adds_its_own_rounding() {
        let x = [2f32.powi(-122) * (2.824_268_6f32 % 1.0)];
        let step = symmetric_step(x[0], bits(16)).unwrap();
        assert!(step > 0.0 && step < f32::MIN_POSITIVE);
        let (mut codes, mut decoded) = ([0u16], [0.0]);
        quantize_symmetric(&x, step, bits(16), &mut codes);
        dequantize_symmetric(&codes, step, bits(16), &mut decoded);
        let error = f64::from(x[0]) - f64::from(decoded[0]);
        assert!(error.abs() > f64::from(step) && error.abs() <= 32767.0 * 2f64.powi(-150), "{error:e}");
    }

    #[test]
    fn symmetric_codes_match_the_formula_and_extremes_are_kept() {
        for b in &WIDTHS[1..] {
            let b = bits(*b);
            let levels = f32::from(b.max_code() >> 1);
            let x: Vec<f32> = (0..700).map(|i| ((i * 7919 % 701) as f32 - 350.0) / 350.0).collect();
            let step = symmetric_step(1.0, b).unwrap();
            assert_eq!(step, 1.0 / levels);
            let mut codes = vec![0u16; x.len()];
            quantize_symmetric(&x, step, b, &mut codes);
            let mut decoded = vec![0.0; x.len()];
            dequantize_symmetric(&codes, step, b, &mut decoded);
            for ((x, code), decoded) in x.iter().zip(&codes).zip(&decoded) {
                let expected = (x / step).round_ties_even().clamp(-levels, levels);
                assert_eq!(f32::from(*code) - signed_offset(b), expected);
                assert_eq!(*decoded, expected * step);
            }
        }
        assert_eq!(symmetric_step(0.0, bits(4)), Ok(1.0));
        assert_eq!(symmetric_step(1e-45, bits(8)), Ok(1e-45));
        assert_eq!(symmetric_step(1.0, bits(1)), Err(QuantizeError::SignedAtOneBit));
        assert!(matches!(symmetric_step(f32::NAN, bits(4)), Err(QuantizeError::NotFinite { .. })));
    }

    fn check_bound(x: &[f32], decoded: &[f32], step: f64, max_abs: f32) -> Result<(), TestCaseError> {
        for (x, y) in x.iter().zip(decoded) {
            prop_assert!(y.is_finite());
            // the subnormal unit covers decoded values too small to be normal
            let bound = step + 4.0 * f64::from(max_abs) * f64::from(f32::EPSILON) + 1.5e-45;
            prop_assert!((f64::from(*x) - f64::from(*y)).abs() <= bound, "{} became {}", x, y);
        }
        Ok(())
    }
}
