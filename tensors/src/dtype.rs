//! Element types and what is known about a tensor without reading it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Element type, under the name that safetensors gives it.
///
/// INVARIANT: declared in the order of `safetensors::Dtype`; the canonical tensor order of a file depends on it
/// (descending, so that wider types come first and every tensor is aligned). The sub-byte types (`F4`, `F6_…`) are
/// not supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[expect(non_camel_case_types, reason = "the names of the file format")]
pub enum DType {
    BOOL,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    F8_E8M0,
    F8_E4M3FNUZ,
    F8_E5M2FNUZ,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    C64,
    F64,
    I64,
    U64,
}

impl DType {
    pub const ALL: [Self; 19] = [
        Self::BOOL,
        Self::U8,
        Self::I8,
        Self::F8_E5M2,
        Self::F8_E4M3,
        Self::F8_E8M0,
        Self::F8_E4M3FNUZ,
        Self::F8_E5M2FNUZ,
        Self::I16,
        Self::U16,
        Self::F16,
        Self::BF16,
        Self::I32,
        Self::U32,
        Self::F32,
        Self::C64,
        Self::F64,
        Self::I64,
        Self::U64,
    ];

    /// Returns the type that safetensors calls `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            Self::BOOL => "BOOL",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::F8_E5M2 => "F8_E5M2",
            Self::F8_E4M3 => "F8_E4M3",
            Self::F8_E8M0 => "F8_E8M0",
            Self::F8_E4M3FNUZ => "F8_E4M3FNUZ",
            Self::F8_E5M2FNUZ => "F8_E5M2FNUZ",
            Self::I16 => "I16",
            Self::U16 => "U16",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::F32 => "F32",
            Self::C64 => "C64",
            Self::F64 => "F64",
            Self::I64 => "I64",
            Self::U64 => "U64",
        }
    }

    /// Bytes per element.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::BOOL
            | Self::U8
            | Self::I8
            | Self::F8_E5M2
            | Self::F8_E4M3
            | Self::F8_E8M0
            | Self::F8_E4M3FNUZ
            | Self::F8_E5M2FNUZ => 1,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::C64 | Self::F64 | Self::I64 | Self::U64 => 8,
        }
    }

    /// Whether elements are real floating-point numbers, which can be read as `f32`.
    pub fn is_float(self) -> bool {
        match self {
            Self::F8_E5M2
            | Self::F8_E4M3
            | Self::F8_E8M0
            | Self::F8_E4M3FNUZ
            | Self::F8_E5M2FNUZ
            | Self::F16
            | Self::BF16
            | Self::F32
            | Self::F64 => true,
            Self::BOOL
            | Self::U8
            | Self::I8
            | Self::I16
            | Self::U16
            | Self::I32
            | Self::U32
            | Self::C64
            | Self::I64
            | Self::U64 => false,
        }
    }
}

impl From<DType> for safetensors::Dtype {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::BOOL => Self::BOOL,
            DType::U8 => Self::U8,
            DType::I8 => Self::I8,
            DType::F8_E5M2 => Self::F8_E5M2,
            DType::F8_E4M3 => Self::F8_E4M3,
            DType::F8_E8M0 => Self::F8_E8M0,
            DType::F8_E4M3FNUZ => Self::F8_E4M3FNUZ,
            DType::F8_E5M2FNUZ => Self::F8_E5M2FNUZ,
            DType::I16 => Self::I16,
            DType::U16 => Self::U16,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            DType::I32 => Self::I32,
            DType::U32 => Self::U32,
            DType::F32 => Self::F32,
            DType::C64 => Self::C64,
            DType::F64 => Self::F64,
            DType::I64 => Self::I64,
            DType::U64 => Self::U64,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Name, element type and shape of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Number of elements; 1 for rank 0. The product does not overflow in any tensor that this crate hands out.
    pub fn n_elements(&self) -> usize {
        n_elements(&self.shape).unwrap_or(usize::MAX)
    }

    /// Size of the tensor in its element type.
    pub fn size_bytes(&self) -> u64 {
        byte_size(self.dtype, &self.shape).unwrap_or(u64::MAX)
    }
}

/// Returns the number of elements, unless it overflows.
pub(crate) fn n_elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent))
}

/// Returns the size in bytes, unless it overflows what a file or a slice can hold.
pub(crate) fn byte_size(dtype: DType, shape: &[usize]) -> Option<u64> {
    let bytes = n_elements(shape)?.checked_mul(dtype.size_bytes())?;
    isize::try_from(bytes).ok().map(|bytes| bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_safetensors_crate_on_names_sizes_and_order() {
        let theirs = DType::ALL.map(safetensors::Dtype::from);
        assert!(theirs.is_sorted());
        assert!(DType::ALL.is_sorted());
        for (ours, theirs) in DType::ALL.iter().zip(theirs) {
            assert_eq!(ours.size_bytes() * 8, theirs.bitsize(), "{ours}");
            assert_eq!(DType::from_name(ours.name()), Some(*ours));
            assert_eq!(serde_json::to_string(&theirs).unwrap(), format!("\"{ours}\""));
            assert_eq!(serde_json::to_string(ours).unwrap(), format!("\"{ours}\""));
        }
        assert_eq!(DType::from_name("F4"), None);
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(byte_size(DType::F32, &[]), Some(4));
        assert_eq!(byte_size(DType::F32, &[3, 0]), Some(0));
        assert_eq!(byte_size(DType::F32, &[usize::MAX, 2]), None);
        assert_eq!(byte_size(DType::F64, &[usize::MAX / 4]), None);
    }
}
