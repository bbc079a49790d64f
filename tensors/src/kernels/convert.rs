//! Conversions between stored element types and `f32`.
//!
//! Widening f16, bf16 and the 8-bit floats is exact. `f64` is rounded to the nearest `f32`, ties to even; magnitudes above
//! `f32::MAX` become infinite, which the checks in [`super::finite`] then report. Narrowing rounds to nearest, ties to even.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::DType;

/// Converts raw little-endian elements of a float type to `f32`. Returns false, and leaves `out` alone, when
/// the type is not a float. `bytes` holds `out.len()` elements and is aligned for its type.
pub fn widen(dtype: DType, bytes: &[u8], out: &mut [f32]) -> bool {
    assert_eq!(bytes.len(), out.len() * dtype.size_bytes(), "one value per stored element");
    match dtype {
        DType::F32 => out.copy_from_slice(bytemuck::cast_slice(bytes)),
        DType::F16 => bytemuck::cast_slice::<u8, f16>(bytes).convert_to_f32_slice(out),
        DType::BF16 => {
            for (x, &stored) in out.iter_mut().zip(bytemuck::cast_slice::<u8, u16>(bytes)) {
                *x = f32::from_bits(u32::from(stored) << 16);
            }
        }
        DType::F64 => {
            for (x, &stored) in out.iter_mut().zip(bytemuck::cast_slice::<u8, f64>(bytes)) {
                *x = stored as f32;
            }
        }
        DType::F8_E5M2 => look_up(&F8_E5M2, bytes, out),
        DType::F8_E4M3 => look_up(&F8_E4M3, bytes, out),
        DType::F8_E8M0 => look_up(&F8_E8M0, bytes, out),
        DType::F8_E4M3FNUZ => look_up(&F8_E4M3FNUZ, bytes, out),
        DType::F8_E5M2FNUZ => look_up(&F8_E5M2FNUZ, bytes, out),
        _ => return false,
    }
    true
}

/// Rounds to f16, ties to even; magnitudes from 65520 become infinite.
pub fn narrow_f16(values: &[f32], out: &mut [f16]) {
    out.convert_from_f32_slice(values);
}

/// Rounds to bf16, ties to even; magnitudes above bf16's largest by half a unit become infinite.
pub fn narrow_bf16(values: &[f32], out: &mut [bf16]) {
    assert_eq!(values.len(), out.len(), "one stored element per value");
    for (stored, x) in out.iter_mut().zip(values) {
        let bits = x.to_bits();
        // Adding just under half a unit (half when the kept part is odd) carries exactly when rounding up.
        // Only NaN can carry out of the top, and NaN is replaced below.
        let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
        let is_nan = bits & 0x7FFF_FFFF > 0x7F80_0000;
        *stored = bf16::from_bits(if is_nan { bits >> 16 | 0x40 } else { rounded } as u16);
    }
}

fn look_up(table: &[f32; 256], bytes: &[u8], out: &mut [f32]) {
    for (x, &byte) in out.iter_mut().zip(bytes) {
        *x = table[byte as usize];
    }
}

/// What the codes at the edges of an 8-bit float mean.
#[derive(Clone, Copy)]
enum Special {
    /// The top exponent holds infinities and NaN (IEEE 754).
    Ieee,
    /// Only all ones is NaN, no infinities ("FN").
    AllOnesNan,
    /// Negative zero is NaN, no infinities ("FNUZ").
    NegativeZeroNan,
}

static F8_E5M2: [f32; 256] = table(2, 15, Special::Ieee);
static F8_E4M3: [f32; 256] = table(3, 7, Special::AllOnesNan);
static F8_E4M3FNUZ: [f32; 256] = table(3, 8, Special::NegativeZeroNan);
static F8_E5M2FNUZ: [f32; 256] = table(2, 16, Special::NegativeZeroNan);
static F8_E8M0: [f32; 256] = powers_of_two();

const fn table(mantissa_bits: u32, bias: i32, special: Special) -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut code = 0usize;
    while code < 256 {
        values[code] = decode(code as u32, mantissa_bits, bias, special);
        code += 1;
    }
    values
}

const fn decode(code: u32, mantissa_bits: u32, bias: i32, special: Special) -> f32 {
    let sign = if code & 0x80 != 0 { -1.0 } else { 1.0 };
    let top_exponent = 0x7F >> mantissa_bits;
    let exponent = (code & 0x7F) >> mantissa_bits;
    let mantissa = code & ((1 << mantissa_bits) - 1);
    match special {
        Special::Ieee if exponent == top_exponent => {
            return if mantissa == 0 { sign * f32::INFINITY } else { f32::NAN };
        }
        Special::AllOnesNan if code & 0x7F == 0x7F => return f32::NAN,
        Special::NegativeZeroNan if code == 0x80 => return f32::NAN,
        _ => {}
    }
    let (significand, exponent) =
        if exponent == 0 { (mantissa, 1) } else { (mantissa | 1 << mantissa_bits, exponent) };
    sign * significand as f32 * power_of_two(exponent as i32 - bias - mantissa_bits as i32)
}

/// Exact for normal powers, −126 to 127.
const fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// E8M0 is a bare exponent: `2^(code − 127)`, 255 is NaN.
const fn powers_of_two() -> [f32; 256] {
    let mut values = [f32::NAN; 256];
    values[0] = power_of_two(-126) / 2.0;
    let mut code = 1;
    while code < 255 {
        values[code] = power_of_two(code as i32 - 127);
        code += 1;
    }
    values
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn eight_bit_floats_have_the_published_landmarks() {
        assert_eq!(F8_E4M3[0x7E], 448.0);
        assert_eq!(F8_E4M3[0x01], 2f32.powi(-9));
        assert!(F8_E4M3[0x7F].is_nan() && F8_E4M3[0xFF].is_nan());
        assert_eq!(F8_E5M2[0x7B], 57344.0);
        assert_eq!(F8_E5M2[0x01], 2f32.powi(-16));
        assert_eq!(F8_E5M2[0xFC], f32::NEG_INFINITY);
        assert_eq!(F8_E4M3FNUZ[0x7F], 240.0);
        assert!(F8_E4M3FNUZ[0x80].is_nan());
        assert_eq!(F8_E5M2FNUZ[0x7F], 57344.0);
        assert_eq!(F8_E8M0[127], 1.0);
        assert_eq!(F8_E8M0[0], 2f32.powi(-127));
        assert_eq!(F8_E4M3[0xB8], -1.0);
    }

    #[test]
    fn every_half_value_widens_exactly() {
        let codes: Vec<u16> = (0..=u16::MAX).collect();
        let mut out = vec![0.0; codes.len()];
        assert!(widen(DType::F16, bytemuck::cast_slice(&codes), &mut out));
        assert!(codes.iter().zip(&out).all(|(&c, &x)| {
            let expected = f16::from_bits(c).to_f64();
            f64::from(x) == expected || (x.is_nan() && expected.is_nan())
        }));
        assert!(widen(DType::BF16, bytemuck::cast_slice(&codes), &mut out));
        assert!(codes.iter().zip(&out).all(|(&c, &x)| {
            let expected = bf16::from_bits(c).to_f64();
            f64::from(x) == expected || (x.is_nan() && expected.is_nan())
        }));
        let mut back = vec![bf16::ZERO; codes.len()];
        narrow_bf16(&out, &mut back);
        assert!(
            codes
                .iter()
                .zip(&back)
                .all(|(&c, b)| b.to_bits() == c || bf16::from_bits(c).is_nan() && b.is_nan())
        );
    }

    #[test]
    fn integers_are_not_floats() {
        for dtype in DType::ALL {
            let bytes = vec![0u64; 3];
            let mut out = [1.0; 3];
            let bytes = &bytemuck::cast_slice(&bytes)[..3 * dtype.size_bytes()];
            assert_eq!(widen(dtype, bytes, &mut out), dtype.is_float(), "{dtype}");
        }
    }

    proptest! {
        #[test]
        fn narrowing_matches_the_half_crate(bits in prop::collection::vec(any::<u32>(), 0..70)) {
            let values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            let mut ours = vec![bf16::ZERO; values.len()];
            narrow_bf16(&values, &mut ours);
            let mut halves = vec![f16::ZERO; values.len()];
            narrow_f16(&values, &mut halves);
            for ((x, ours), half) in values.iter().zip(ours).zip(halves) {
                prop_assert_eq!(ours.to_bits(), bf16::from_f32(*x).to_bits());
                prop_assert!(half.to_bits() == f16::from_f32(*x).to_bits() || x.is_nan() && half.is_nan());
            }
        }

        #[test]
        fn doubles_round_to_the_nearest_float(values in prop::collection::vec(any::<f64>(), 0..70)) {
            let mut out = vec![0.0; values.len()];
            prop_assert!(widen(DType::F64, bytemuck::cast_slice(&values), &mut out));
            prop_assert!(values.iter().zip(out).all(|(&v, x)| x == v as f32 || x.is_nan()));
        }
    }
}
