//! `int8-block`: bitsandbytes' block-wise 8-bit codes, 256 numbers of a dynamic exponent times the largest magnitude of a block.

use super::scheme::{Granularity, Scheme};
use merganser_tensors::encoding::Code;

pub(super) struct Int8Block;

impl Scheme for Int8Block {
    fn id(&self) -> &'static str {
        "int8-block"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "bitsandbytes: 8-bit dynamic codes in blocks of 4096"
    }

    fn formula(&self) -> &'static str {
        "a = max|x| of the block, q = nearest of 256 dynamic numbers to x/a, x̂ = book[q]·a"
    }

    fn source(&self) -> &'static str {
        "Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861; bitsandbytes quantize_blockwise on a CPU"
    }

    fn code(&self) -> Code {
        Code::Dynamic
    }

    fn widths(&self) -> &'static [u8] {
        &[8]
    }

    fn granularity(&self) -> Granularity {
        Granularity::Group(4096)
    }
}
