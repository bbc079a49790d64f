//! `symmetric`: signed codes in steps of each output channel, as CDPQ quantizes weights and as ONNX `DequantizeLinear` reads them.
//!
//! Where `absmax` has a multiplier and divides, this has a step and multiplies.

use super::scheme::{Granularity, SIGNED, Scheme};
use merganser_tensors::encoding::Code;

pub(super) struct Symmetric;

impl Scheme for Symmetric {
    fn id(&self) -> &'static str {
        "symmetric"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "CDPQ: a step per output channel from its largest magnitude"
    }

    fn formula(&self) -> &'static str {
        "Δ = max|x|/(2^(b−1) − 1), q = clamp(round(x/Δ), ±(2^(b−1) − 1)), x̂ = q·Δ"
    }

    fn source(&self) -> &'static str {
        "jaein4722/sam2_adaptive_qat, weight-only fake quantization per output channel"
    }

    fn code(&self) -> Code {
        Code::Symmetric
    }

    fn widths(&self) -> &'static [u8] {
        SIGNED
    }

    fn granularity(&self) -> Granularity {
        Granularity::Channel
    }
}
