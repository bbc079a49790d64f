//! `fp4`: bitsandbytes' 4-bit floats, a sign, two bits of exponent and one of mantissa.

use super::scheme::{Granularity, Scheme};
use merganser_tensors::encoding::Code;

pub(super) struct Fp4;

impl Scheme for Fp4 {
    fn id(&self) -> &'static str {
        "fp4"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "bitsandbytes: 4-bit floats in blocks of 64"
    }

    fn formula(&self) -> &'static str {
        "a = max|x| of the block, q = nearest of 0, ±1/192, ±1/6, ±1/4, ±1/3, ±1/2, ±2/3, ±1 to x/a, x̂ = book[q]·a; double quantization as nf4"
    }

    fn source(&self) -> &'static str {
        "bitsandbytes quantize_4bit on a CPU"
    }

    fn code(&self) -> Code {
        Code::Fp4
    }

    fn widths(&self) -> &'static [u8] {
        &[4]
    }

    fn granularity(&self) -> Granularity {
        Granularity::Group(64)
    }
}
