//! Code books: values, divided by the largest magnitude of their group, become the nearest of a few fixed numbers.
//!
//! As bitsandbytes defines them, to the bit of its CPU path (0.50.2; `quantize_4bit`, `quantize_blockwise`):
//!
//! * `nf4`: 16 quantiles of the normal distribution (Dettmers et al., QLoRA, arXiv:2305.14314). `v = clamp(x·(1/a), ±1)` with `a = max|x|` of
//!   the group, and `x/a` in a last group that is shorter; the code is the number of midpoints between neighbours that are below `v`.
//! * `fp4`: a sign, two exponent bits, one mantissa bit, the same way. Code 8 is a zero like code 0 (what positive values below the smallest
//!   midpoint become), and decodes to +0.
//! * `dynamic`: 256 numbers whose exponents take as many bits as they need (Dettmers, arXiv:1511.04561). The nearest is looked up in a table of
//!   65 536 entries over [−1, 1], at `(v + 1)·½·65535 + ½`; an all-zero group has codes 0.
//!
//! Decoding is `book[q]·a`. A group of zeros decodes to zeros, whatever its codes are. Groups whose magnitudes are below 1e−38 are coded
//! as if that were their largest: their error is at most `a`.

use std::sync::LazyLock;

use crate::kernels::lookup::{PART, exchange, levels, pick, ranks};
use crate::kernels::pack::Word;
use crate::kernels::quantize::ROUNDER;

/// Values of the codes of NF4, ascending.
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Values of the codes of FP4.
pub const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_3,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_3,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

/// The codes of FP4 in ascending order of what they stand for. Of the two zeros the one that decodes from what is not above 0 comes first.
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

/// Groups are coded as if their largest magnitude were not below this.
const SMALLEST: f32 = 1e-38;

/// Entries of the table that finds dynamic codes.
const TABLE: usize = 1 << 16;

/// Values of the dynamic codes, ascending.
pub fn dynamic() -> &'static [f32; 256] {
    static BOOK: LazyLock<[f32; 256]> = LazyLock::new(|| {
        // Fractions between 0.1 and 1, evenly spaced in f32 as torch.linspace spaces them (one rounding per boundary), times
        // powers of ten; 2^i of them for exponent i − 6. And 0 and 1.
        let (low, high) = (0.1f32, 1.0f32);
        let mut book = vec![0.0, 1.0];
        for exponent in 0..7i32 {
            let n = 1usize << exponent;
            let step = f64::from((high - low) / n as f32);
            let boundary = |i: usize| {
                if i < n.div_ceil(2) {
                    (step * i as f64 + f64::from(low)) as f32
                } else {
                    (f64::from(high) - step * (n - i) as f64) as f32
                }
            };
            let power = 10f64.powi(exponent - 6) as f32;
            for i in 0..n {
                let value = power * f32::midpoint(boundary(i), boundary(i + 1));
                book.extend([value, -value]);
            }
        }
        book.sort_by(f32::total_cmp);
        book.try_into().expect("2 + 2·(1 + 2 + … + 64) values")
    });
    &BOOK
}

#[inline(always)]
fn clamp(v: f32) -> f32 {
    let v = if v > -1.0 { v } else { -1.0 };
    if v < 1.0 { v } else { 1.0 }
}

/// Writes the NF4 codes of values of one group, whose largest magnitude is `largest`; `is_short` says that it is a last group of fewer
/// elements than the others.
#[inline(always)]
pub fn quantize_nf4<W: Word>(values: &[f32], largest: f32, is_short: bool, codes: &mut [W]) {
    divided::<W, Nf4>(values, largest, is_short, codes);
}

/// [`quantize_nf4`] for FP4.
#[inline(always)]
pub fn quantize_fp4<W: Word>(values: &[f32], largest: f32, is_short: bool, codes: &mut [W]) {
    divided::<W, Fp4>(values, largest, is_short, codes);
}

/// A book of sixteen. A trait, because closures need not be inlined (see [`wide`](super::wide)).
trait Book {
    /// Midpoints between neighbours.
    const MIDPOINTS: [[f32; 8]; 4];

    /// Makes codes of the numbers of midpoints that values are above.
    fn codes(ranks: &mut [u32; PART]);
}

struct Nf4;

impl Book for Nf4 {
    // Values beyond ±1 are beyond all midpoints: nothing has to be clamped.
    const MIDPOINTS: [[f32; 8]; 4] = levels(&midpoints(&NF4));

    #[inline(always)]
    fn codes(_: &mut [u32; PART]) {}
}

struct Fp4;

impl Book for Fp4 {
    const MIDPOINTS: [[f32; 8]; 4] = levels(&midpoints(&ascending()));

    #[inline(always)]
    fn codes(ranks: &mut [u32; PART]) {
        exchange(&FP4_ORDER, ranks);
    }
}

/// The code whose value is nearest, for evenly spaced values from −1 to 1.
fn nearest_dynamic() -> &'static [u8] {
    static NEAREST: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let book = dynamic();
        let mut code = 0usize;
        let nearest = (0..TABLE).map(|i| {
            let value = -1.0 + (2.0 * i as f32) / (TABLE - 1) as f32;
            while code < 255 && 0.5 * (book[code] + book[code + 1]) < value {
                code += 1;
            }
            code as u8
        });
        nearest.collect()
    });
    &NEAREST
}

/// Writes the dynamic codes of values of one group, whose largest magnitude is `largest`.
#[inline(always)]
pub fn quantize_dynamic<W: Word>(values: &[f32], largest: f32, codes: &mut [W]) {
    assert_eq!(values.len(), codes.len(), "one code per value");
    if largest == 0.0 {
        return codes.fill(W::default());
    }
    let nearest: &[u8; TABLE] = nearest_dynamic().try_into().expect("the table has this many entries");
    // bitsandbytes divides by the magnitude as it is; where the inverse of a subnormal one would be infinite, the largest number stands in
    let inverse = (1.0 / largest).min(f32::MAX);
    let mut positions = [0u32; PART];
    for (values, codes) in values.chunks(PART).zip(codes.chunks_mut(PART)) {
        for (position, &x) in positions.iter_mut().zip(values) {
            let exact = (clamp(x * inverse) + 1.0) * 0.5 * (TABLE - 1) as f32 + 0.5;
            // Rounded down: to the nearest whole number first, and one less where that is above.
            let rounded = exact + ROUNDER;
            *position = rounded.to_bits() - u32::from(rounded - ROUNDER > exact);
        }
        for (code, position) in codes.iter_mut().zip(&positions) {
            *code = W::from_bits(nearest[usize::from(*position as u16)].into());
        }
    }
}

/// Writes `book[q]·scale` for every code.
#[inline(always)]
pub fn dequantize_16<W: Word>(codes: &[W], book: &[f32; 16], scale: f32, out: &mut [f32]) {
    assert_eq!(codes.len(), out.len(), "one value per code");
    let scaled = book.map(|value| value * scale);
    let (parts, rest) = codes.as_chunks::<PART>();
    let (picked, last) = out.as_chunks_mut::<PART>();
    for (out, codes) in picked.iter_mut().zip(parts) {
        let mut indices = [0u32; PART];
        for (index, code) in indices.iter_mut().zip(codes) {
            *index = code.index() as u32;
        }
        pick(&scaled, &indices, out);
    }
    for (x, code) in last.iter_mut().zip(rest) {
        *x = scaled[code.index() & 15];
    }
}

/// [`dequantize_16`] for dynamic codes.
#[inline(always)]
pub fn dequantize_dynamic<W: Word>(codes: &[W], scale: f32, out: &mut [f32]) {
    assert_eq!(codes.len(), out.len(), "one value per code");
    let book = dynamic();
    for (x, code) in out.iter_mut().zip(codes) {
        *x = book[code.index() & 255] * scale;
    }
}

/// Midpoints between neighbours of an ascending list.
const fn midpoints(ascending: &[f32; 16]) -> [f32; 15] {
    let mut midpoints = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        midpoints[i] = f32::midpoint(ascending[i], ascending[i + 1]);
        i += 1;
    }
    midpoints
}

/// Values of the codes of FP4 in their order.
const fn ascending() -> [f32; 16] {
    let mut values = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        values[i] = FP4[FP4_ORDER[i] as usize];
        i += 1;
    }
    values
}

/// Writes the codes of values divided by their group's largest magnitude.
#[inline(always)]
fn divided<W: Word, B: Book>(values: &[f32], largest: f32, is_short: bool, codes: &mut [W]) {
    assert_eq!(values.len(), codes.len(), "one code per value");
    let divisor = largest.max(SMALLEST);
    let inverse = 1.0 / divisor;
    // Whole parts have lengths that the compiler knows; the last one is coded among zeros.
    let (parts, rest) = values.as_chunks::<PART>();
    let (coded, last) = codes.as_chunks_mut::<PART>();
    for (values, codes) in parts.iter().zip(coded) {
        let mut quotients = [0f32; PART];
        if is_short {
            for (quotient, x) in quotients.iter_mut().zip(values) {
                *quotient = x / divisor;
            }
        } else {
            for (quotient, x) in quotients.iter_mut().zip(values) {
                *quotient = x * inverse;
            }
        }
        coded_part::<W, B>(&quotients, codes);
    }
    if !rest.is_empty() {
        let (mut quotients, mut codes) = ([0f32; PART], [W::default(); PART]);
        for (quotient, x) in quotients.iter_mut().zip(rest) {
            *quotient = if is_short { x / divisor } else { x * inverse };
        }
        coded_part::<W, B>(&quotients, &mut codes);
        last.copy_from_slice(&codes[..last.len()]);
    }
}

#[inline(always)]
fn coded_part<W: Word, B: Book>(quotients: &[f32; PART], codes: &mut [W; PART]) {
    // Codes are found in words as wide as values, and narrowed in a loop of their own: in one loop, compilers narrow every comparison.
    let mut words = [0u32; PART];
    ranks(&B::MIDPOINTS, quotients, &mut words);
    B::codes(&mut words);
    for (code, word) in codes.iter_mut().zip(&words) {
        *code = W::from_bits(*word);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type RoundTrip<'a> = &'a dyn Fn(&mut [u8; 3], &mut [f32; 3]);

    fn ramp(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 504.0).collect()
    }

    /// The nearest value of a book, by comparing all distances in f64.
    fn distance_to_nearest(book: &[f32], v: f64) -> f64 {
        book.iter().map(|value| (f64::from(*value) - v).abs()).fold(f64::INFINITY, f64::min)
    }

    #[test]
    fn codes_are_the_nearest_of_their_book() {
        for n in [0, 1, 15, 16, 17, 1009] {
            let values = ramp(n);
            for scale in [1.0f32, 1e-20, 3e37] {
                let scaled: Vec<f32> = values.iter().map(|x| x * scale).collect();
                let largest = scaled.iter().fold(0f32, |a, x| a.max(x.abs()));
                let mut codes = vec![99u8; n];
                let mut out = vec![0.0; n];
                let check = |what: &str, book: &[f32], out: &[f32], slack: f64| {
                    for (x, y) in scaled.iter().zip(out) {
                        let best = distance_to_nearest(book, f64::from(*x) / f64::from(largest).max(1e-300));
                        let error = (f64::from(*x) - f64::from(*y)).abs() / f64::from(largest).max(1e-300);
                        assert!(error <= best + slack, "{what}: {x} became {y}");
                    }
                };
                for is_short in [false, true] {
                    quantize_nf4(&scaled, largest, is_short, &mut codes);
                    dequantize_16(&codes, &NF4, largest, &mut out);
                    check("nf4", &NF4, &out, 1e-6);
                    quantize_fp4(&scaled, largest, is_short, &mut codes);
                    dequantize_16(&codes, &FP4, largest, &mut out);
                    check("fp4", &FP4, &out, 1e-6);
                }
                quantize_dynamic(&scaled, largest, &mut codes);
                dequantize_dynamic(&codes, largest, &mut out);
                // the table has steps of 2/65535
                check("dynamic", dynamic(), &out, 4e-5);
            }
        }
    }

    /// The number of midpoints below `v`, by comparing with each; of FP4, the code in that place of the order of values.
    fn naive_code(book: &[f32; 16], v: f32) -> u8 {
        let mut order: Vec<u8> = (0..16).collect();
        // of the two zeros of FP4, code 0 comes first
        order.sort_by(|a, b| book[usize::from(*a)].total_cmp(&book[usize::from(*b)]));
        let values: Vec<f32> = order.iter().map(|code| book[usize::from(*code)]).collect();
        let below = values.windows(2).filter(|pair| 0.5 * (pair[0] + pair[1]) < v.clamp(-1.0, 1.0)).count();
        order[below]
    }

    #[test]
    fn codes_at_and_beside_every_midpoint_are_those_of_the_definition() {
        let beside =
            |v: f32| (-3i32..=3).map(move |ulps| f32::from_bits(v.to_bits().wrapping_add_signed(ulps)));
        let mut values: Vec<f32> = vec![0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1.5, -1.5, f32::MAX, f32::MIN];
        for book in [NF4, FP4] {
            for pair in book.iter().flat_map(|a| book.iter().map(move |b| 0.5 * (a + b))) {
                values.extend(beside(pair).filter(|v| v.is_finite()));
            }
        }
        values.extend(ramp(1000));
        let mut codes = vec![99u8; values.len()];
        for is_short in [false, true] {
            quantize_nf4(&values, 1.0, is_short, &mut codes);
            for (v, code) in values.iter().zip(&codes) {
                assert_eq!(*code, naive_code(&NF4, *v), "nf4 of {v:e}");
            }
            quantize_fp4(&values, 1.0, is_short, &mut codes);
            for (v, code) in values.iter().zip(&codes) {
                assert_eq!(*code, naive_code(&FP4, *v), "fp4 of {v:e}");
            }
        }
        // a table of 65536 entries, looked up as it is described: the position is rounded down
        for position in 0..TABLE {
            let v = (position as f32 / 65535.0) * 2.0 - 1.0;
            for v in beside(v) {
                quantize_dynamic(&[v], 1.0, &mut codes[..1]);
                let place =
                    ((f64::from(v).clamp(-1.0, 1.0) as f32 + 1.0) * 0.5 * 65535.0 + 0.5).floor() as usize;
                assert_eq!(codes[0], nearest_dynamic()[place], "dynamic of {v:e}");
            }
        }
    }

    #[test]
    fn zeros_and_tiny_values_decode_to_something_finite_and_small() {
        for largest in [0.0f32, 1e-45, 1e-39] {
            let values = [largest, 0.0, -largest];
            let mut codes = [0u8; 3];
            let mut out = [9.0; 3];
            let decoded: [RoundTrip<'_>; 3] = [
                &|codes, out| {
                    quantize_nf4(&values, largest, false, codes);
                    dequantize_16(codes, &NF4, largest, out);
                },
                &|codes, out| {
                    quantize_fp4(&values, largest, true, codes);
                    dequantize_16(codes, &FP4, largest, out);
                },
                &|codes, out| {
                    quantize_dynamic(&values, largest, codes);
                    dequantize_dynamic(codes, largest, out);
                },
            ];
            for decode in decoded {
                decode(&mut codes, &mut out);
                for (x, y) in values.iter().zip(out) {
                    assert!((x - y).abs() <= largest, "{x} became {y}");
                }
            }
        }
    }

    #[test]
    fn the_dynamic_book_is_symmetric_but_for_one() {
        let book = dynamic();
        assert!(book.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!((book[127], book[255]), (0.0, 1.0));
        for i in 0..127 {
            assert_eq!(book[i], -book[254 - i]);
        }
    }
}
