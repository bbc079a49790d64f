//! `nf4`: bitsandbytes' 4-bit codes for normally distributed values.

use super::scheme::{Granularity, Scheme};
use merganser_tensors::encoding::Code;

pub(super) struct Nf4;

impl Scheme for Nf4 {
    fn id(&self) -> &'static str {
        "nf4"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "bitsandbytes: 16 quantiles of the normal distribution in blocks of 64"
    }

    fn formula(&self) -> &'static str {
        "a = max|x| of the block, q = nearest of 16 quantiles to x/a, x̂ = book[q]·a; double quantization: a itself in 8-bit dynamic codes of a − mean(a), in blocks of 256"
    }

    fn source(&self) -> &'static str {
        "Dettmers et al., QLoRA, arXiv:2305.14314, §3; bitsandbytes quantize_4bit on a CPU"
    }

    fn code(&self) -> Code {
        Code::Nf4
    }

    fn widths(&self) -> &'static [u8] {
        &[4]
    }

    fn granularity(&self) -> Granularity {
        Granularity::Group(64)
    }
}
