//! `absmax`: symmetric codes scaled by the largest magnitude of each tensor.

use super::Scheme;
use merganser_tensors::kernels::quantize::QuantizeError;
use merganser_tensors::kernels::reduce::MinMax;
use merganser_tensors::{Bits, Encoding, Granularity};
use std::ops::RangeInclusive;

pub(super) struct Absmax;

impl Scheme for Absmax {
    fn id(&self) -> &'static str {
        "absmax"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "symmetric: scale from the largest magnitude of each tensor"
    }

    fn formula(&self) -> &'static str {
        "s = (2^(b−1) − 1)/max|x|, q = round(s·x), x̂ = q/s"
    }

    fn source(&self) -> &'static str {
        "AIM-SKKU/TVQ absmax_quantization"
    }

    fn bits(&self) -> RangeInclusive<u8> {
        // At one bit the only code would be zero.
        2..=8
    }

    fn encoding(&self, bits: Bits, range: MinMax) -> Result<Encoding, QuantizeError> {
        Encoding::absmax(bits, Granularity::Tensor, &[range])
    }
}
