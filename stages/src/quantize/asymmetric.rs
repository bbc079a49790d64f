//! `asymmetric`: the quantizer of TVQ, one scale and zero point per tensor (or channel, or group); with `residual_stages`, several of
//! them after each other.
//!
//! Values of zero range, which the original divides by, are coded exactly; a range so small that its scale would overflow f32 has the
//! largest finite scale. So every stage decodes to finite values, also where an earlier one has left nothing.

use super::scheme::{Scheme, UNSIGNED};
use merganser_tensors::encoding::Code;

pub(super) struct Asymmetric;

impl Scheme for Asymmetric {
    fn id(&self) -> &'static str {
        "asymmetric"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "TVQ: scale and zero point from the extremes of each tensor"
    }

    fn formula(&self) -> &'static str {
        "s = (2^b − 1)/(max − min), z = −round(s·min), q = clamp(round(s·x + z), 0, 2^b − 1), x̂ = (q − z)/s; residual stages: x̂ = x̂₁ + x̂₂ + …, stage i codes x − x̂₁ − … − x̂ᵢ₋₁"
    }

    fn source(&self) -> &'static str {
        "Kim et al., Task Vector Quantization for Memory-Efficient Model Merging, arXiv:2503.06921, §4; AIM-SKKU/TVQ asymmetric_quantization"
    }

    fn code(&self) -> Code {
        Code::Affine
    }

    fn widths(&self) -> &'static [u8] {
        UNSIGNED
    }
}
