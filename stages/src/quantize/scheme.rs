//! What a scheme is, and how a tensor is coded under it.

use merganser_tensors::encoding::{Code, MAX_STAGES, Scales, Whole};
use merganser_tensors::{Bits, Encoding, Grouped, TensorInfo};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A way to turn values into codes.
pub(crate) trait Scheme: Sync {
    /// What `scheme = "…"` says.
    fn id(&self) -> &'static str;

    /// Raised whenever the scheme's numbers change.
    fn version(&self) -> u32;

    fn summary(&self) -> &'static str;

    fn formula(&self) -> &'static str;

    fn source(&self) -> &'static str;

    /// How a code stands for a value.
    fn code(&self) -> Code;

    /// The widths it is defined for; one that has a single width need not be told.
    fn widths(&self) -> &'static [u8];

    /// Which elements share a scale unless parameters say otherwise.
    fn granularity(&self) -> Granularity {
        Granularity::Tensor
    }

    /// Whether the members of a collection are coded together.
    fn is_shared(&self) -> bool {
        false
    }
}

/// Widths of unsigned codes.
pub(super) const UNSIGNED: &[u8] = &[1, 2, 3, 4, 5, 6, 7, 8, 16];

/// Widths of signed codes: at one bit the only code would be zero.
pub(super) const SIGNED: &[u8] = &[2, 3, 4, 5, 6, 7, 8, 16];

/// Which elements share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Granularity {
    /// All elements of a tensor.
    Tensor,
    /// Those of an output channel, which is what the first axis counts; tensors of one axis count as one channel.
    Channel,
    /// Every so many neighbours in row-major order.
    Group(usize),
}

/// How one tensor is to be coded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Setting {
    pub(super) code: Code,
    pub(super) bits: Bits,
    pub(super) granularity: Granularity,
    pub(super) stages: usize,
    pub(super) scales: Scales,
    pub(super) clip: super::clip::Clip,
}

impl Setting {
    /// The encoding without its numbers: where one scale serves the tensor, that scale is 1.
    pub(super) fn encoding(&self, info: &TensorInfo) -> Encoding {
        let Self { code, bits, granularity, stages, scales, .. } = *self;
        let n = info.n_elements();
        if granularity == Granularity::Tensor && scales == Scales::Single {
            let (granularity, scale, zero_point) = (Whole::Tensor, [1.0], [0.0]);
            match (code, stages) {
                (Code::Affine, 1) => return Encoding::Affine { bits, granularity, scale, zero_point },
                (Code::Affine, _) => {
                    let stage = merganser_tensors::AffineStage { scale: 1.0, zero_point: 0.0 };
                    return Encoding::Residual { bits, stages: vec![stage; stages] };
                }
                (Code::Absmax, 1) => return Encoding::Absmax { bits, granularity, scale },
                _ => {}
            }
        }
        let elements = match granularity {
            Granularity::Channel if info.shape.len() > 1 => info.shape[1..].iter().product(),
            Granularity::Tensor | Granularity::Channel => n,
            Granularity::Group(elements) => elements,
        };
        let stages = stages.min(MAX_STAGES);
        Encoding::Grouped(Grouped { bits, code, elements: elements.max(1), scales, stages })
    }
}
