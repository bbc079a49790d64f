//! How the bytes of a stored tensor stand for its values.
//!
//! An [`Encoding`] is what a manifest says; a [`Form`] with [`Tables`] of scales is what codes and decodes. Where one scale serves a whole tensor, it
//! is part of the encoding; scales of groups lie in the file, behind the codes, and are read with them (`tables`).

mod form;
mod tables;
#[cfg(test)]
mod tests;

pub use form::{Code, Form, Scale};
pub use tables::{Table, Tables};

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::DType;
use crate::kernels::pack::{Bits, enclosing_groups, packed_len};
use crate::kernels::quantize::{CodeMap, QuantizeError};
use crate::kernels::reduce::MinMax;

/// Most stages that codes have.
pub const MAX_STAGES: usize = 4;

/// Encoding of one tensor. Quantized tensors stand for `f32` values; see [`crate::kernels::quantize`] and [`crate::kernels::codebook`]
/// for the formulas and [`crate::kernels::pack`] for the layout of the codes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Encoding {
    /// The tensor's own elements, little-endian, row-major.
    Plain,
    /// Unsigned codes under one scale: `x = (q − zero_point)/scale`.
    Affine { bits: Bits, granularity: Whole, scale: [f32; 1], zero_point: [f32; 1] },
    /// Signed codes stored as `q + 2^(bits−1)` under one scale: `x = q/scale`. At least 2 bits.
    Absmax { bits: Bits, granularity: Whole, scale: [f32; 1] },
    /// Several codes per element, each stage coding what those before it left over: `x = Σ_s (q_s − zero_point_s)/scale_s`, added in
    /// `f32` in the order of the stages. The codes of a packing group lie together, stage by stage.
    Residual { bits: Bits, stages: Vec<AffineStage> },
    /// Codes with a scale per group of neighbours; the scales lie behind the codes.
    Grouped(Grouped),
}

/// One stage of residual codes: one scale and zero point for the whole tensor.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AffineStage {
    pub scale: f32,
    pub zero_point: f32,
}

/// All elements of the tensor share a scale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Whole {
    #[default]
    #[serde(rename = "tensor")]
    Tensor,
}

/// Codes whose scales are stored behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grouped {
    pub bits: Bits,
    /// How a code stands for a value.
    pub code: Code,
    /// Every `elements` neighbours in row-major order share a scale, the last group possibly being shorter. Output channels (rows) are
    /// groups of one row, a whole tensor is one group.
    pub elements: usize,
    /// How the scales are stored.
    #[serde(default, skip_serializing_if = "Scales::is_single")]
    pub scales: Scales,
    /// Codes per element, each coding what those before it left over. The codes of a packing group lie together, stage by stage.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub stages: usize,
}

fn one() -> usize {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn is_one(stages: &usize) -> bool {
    *stages == 1
}

/// How the scales of groups are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scales {
    /// In f32.
    #[default]
    Single,
    /// Quantized themselves, as bitsandbytes does it: what they exceed their mean by, in dynamic codes of groups of 256.
    Double,
}

impl Scales {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
    fn is_single(&self) -> bool {
        *self == Self::Single
    }
}

impl Encoding {
    /// Affine codes under one scale for values within `range`; an empty range counts as zero.
    pub fn affine(bits: Bits, range: MinMax) -> Result<Self, QuantizeError> {
        let map = affine_map(bits, range)?;
        Ok(Self::Affine {
            bits,
            granularity: Whole::Tensor,
            scale: [map.scale],
            zero_point: [map.zero_point],
        })
    }

    /// Absmax codes under one scale for values within `range`.
    pub fn absmax(bits: Bits, range: MinMax) -> Result<Self, QuantizeError> {
        let map = CodeMap::absmax(range.max_abs(), bits)?;
        Ok(Self::Absmax { bits, granularity: Whole::Tensor, scale: [map.scale] })
    }

    /// The same encoding with the scales that were chosen, where they are part of it.
    #[must_use]
    pub fn with_tables(self, tables: &Tables) -> Self {
        let number = |values: &[f32]| [values.first().copied().unwrap_or_default()];
        match (self, tables.0.as_slice()) {
            (Self::Affine { bits, granularity, .. }, [table]) => Self::Affine {
                bits,
                granularity,
                scale: number(&table.scale),
                zero_point: number(&table.zero_point),
            },
            (Self::Absmax { bits, granularity, .. }, [table]) => {
                Self::Absmax { bits, granularity, scale: number(&table.scale) }
            }
            (Self::Residual { bits, .. }, tables) => {
                let stage = |table: &Table| {
                    let ([scale], [zero_point]) = (number(&table.scale), number(&table.zero_point));
                    AffineStage { scale, zero_point }
                };
                Self::Residual { bits, stages: tables.iter().map(stage).collect() }
            }
            (other, _) => other,
        }
    }

    /// Number of bits of a code; none when the elements are stored as they are.
    pub fn bits(&self) -> Option<Bits> {
        match self {
            Self::Plain => None,
            Self::Affine { bits, .. }
            | Self::Absmax { bits, .. }
            | Self::Residual { bits, .. }
            | Self::Grouped(Grouped { bits, .. }) => Some(*bits),
        }
    }

    /// Number of codes per element; 0 when the elements are stored as they are.
    pub fn n_codes(&self) -> usize {
        match self {
            Self::Plain => 0,
            Self::Affine { .. } | Self::Absmax { .. } => 1,
            Self::Residual { stages, .. } => stages.len(),
            Self::Grouped(grouped) => grouped.stages,
        }
    }

    /// What codes and decodes a tensor of `n` elements; `None` when the elements are stored as they are.
    pub fn form(&self, n: usize) -> Option<Form> {
        let (code, elements) = match self {
            Self::Plain => return None,
            Self::Affine { .. } | Self::Residual { .. } => (Code::Affine, n.max(1)),
            Self::Absmax { .. } => (Code::Absmax, n.max(1)),
            Self::Grouped(grouped) => (grouped.code, grouped.elements),
        };
        Some(Form { bits: self.bits()?, code, elements, stages: self.n_codes(), n })
    }

    /// The scales that are part of the encoding; `None` when they lie in the file, or when there are none.
    pub fn tables(&self) -> Option<Tables> {
        let table = |scale: f32, zero_point: Option<f32>| Table {
            first: 0,
            scale: vec![scale],
            zero_point: zero_point.into_iter().collect(),
            coded_by: Vec::new(),
        };
        match self {
            Self::Plain | Self::Grouped(_) => None,
            Self::Affine { scale: [scale], zero_point: [zero_point], .. } => {
                Some(Tables(vec![table(*scale, Some(*zero_point))]))
            }
            Self::Absmax { scale: [scale], .. } => Some(Tables(vec![table(*scale, None)])),
            Self::Residual { stages, .. } => {
                let stages = stages.iter().map(|stage| table(stage.scale, Some(stage.zero_point)));
                Some(Tables(stages.collect()))
            }
        }
    }

    /// Bytes of all codes of `n` elements of `dtype`, or of the elements.
    pub fn codes_len(&self, dtype: DType, n: usize) -> u64 {
        match self.bits() {
            None => n as u64 * dtype.size_bytes() as u64,
            Some(bits) => (packed_len(n, bits) as u64).saturating_mul(self.n_codes() as u64),
        }
    }

    /// Bytes of the scales that lie behind the codes of `n` elements.
    pub fn tables_len(&self, n: usize) -> u64 {
        match self {
            Self::Grouped(grouped) => grouped.tables_len(n),
            _ => 0,
        }
    }

    /// Returns how many bytes `n` elements of `dtype` take in a file: codes, and the scales behind them.
    pub fn stored_len(&self, dtype: DType, n: usize) -> u64 {
        self.codes_len(dtype, n).saturating_add(self.tables_len(n))
    }

    /// Bytes of the scales of `n` elements, wherever they are kept.
    pub fn scale_bytes(&self, n: usize) -> u64 {
        match self {
            Self::Plain => 0,
            Self::Affine { .. } => 8,
            Self::Absmax { .. } => 4,
            Self::Residual { stages, .. } => 8 * stages.len() as u64,
            Self::Grouped(grouped) => grouped.tables_len(n),
        }
    }

    /// Fails with the reason when the parameters do not suit a tensor of `n` elements.
    pub(crate) fn check(&self, dtype: DType, n: usize) -> Result<(), String> {
        let (code, bits) = match self {
            Self::Plain => return Ok(()),
            Self::Affine { bits, .. } | Self::Residual { bits, .. } => (Code::Affine, *bits),
            Self::Absmax { bits, .. } => (Code::Absmax, *bits),
            Self::Grouped(grouped) => (grouped.code, grouped.bits),
        };
        if dtype != DType::F32 {
            return Err(format!("codes stand for F32 values, not {dtype}"));
        }
        code.check(bits)?;
        if let Self::Grouped(grouped) = self {
            return grouped.check(n);
        }
        let tables = self.tables().unwrap_or_default();
        if tables.0.is_empty() {
            return Err("it has no stages".to_owned());
        }
        tables.check(code)
    }

    /// Returns the elements that must be decoded together to get `range` of a tensor of `n` elements, and the bytes
    /// that hold their codes.
    pub(crate) fn enclosing(&self, range: &Range<usize>, n: usize) -> Option<(Range<usize>, Range<usize>)> {
        self.bits().map(|bits| {
            let (elements, bytes) = enclosing_groups(range, n, bits);
            (elements, bytes.start * self.n_codes()..bytes.end * self.n_codes())
        })
    }
}

fn affine_map(bits: Bits, range: MinMax) -> Result<CodeMap, QuantizeError> {
    let (min, max) = if range.is_empty() { (0.0, 0.0) } else { (range.min, range.max) };
    CodeMap::affine(min, max, bits)
}
