//! `absmax`: signed codes scaled by the largest magnitude of each tensor (or channel, or group).

use super::scheme::{SIGNED, Scheme};
use merganser_tensors::encoding::Code;

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

    fn code(&self) -> Code {
        Code::Absmax
    }

    fn widths(&self) -> &'static [u8] {
        SIGNED
    }
}
