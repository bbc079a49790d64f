//! Float tensors as graph files hold them, and the checkpoint tensors they are compared with.
//!
//! Everything is compared and swapped as `f32`: half-precision values widen exactly, so that the bytes of the
//! widened values identify a tensor whatever it is stored as. An `f64` graph constant is narrowed; it can only
//! match a checkpoint tensor when that loses nothing, because the narrowed value is what would be injected.

use std::borrow::Cow;

use half::{bf16, f16};
use prost::bytes::Bytes;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::GraphError;
use crate::proto::{DataType, TensorProto};

/// A checkpoint's float tensors, as the crate that reads checkpoints offers them.
///
/// Integer buffers (`position_ids`) are left out: no evaluation depends on swapping them.
pub trait Weights: Sync {
    /// Returns the names of all float tensors, in any order, without duplicates.
    fn names(&self) -> Vec<String>;
    /// Returns the shape of a float tensor, or nothing if there is none of that name.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;
    /// Returns a tensor's values in row-major order, widened to `f32`; as many as its shape says.
    fn values(&self, name: &str) -> Result<Vec<f32>, WeightsError>;
}

/// Why a checkpoint tensor could not be read; the reader's own error is kept as it is.
#[derive(Debug, thiserror::Error)]
#[error("cannot read tensor `{tensor}`")]
pub struct WeightsError {
    pub tensor: String,
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// The float element types that a tensor may be bound in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatType {
    F16,
    Bf16,
    F32,
    F64,
}

impl FloatType {
    /// Returns the type for a `TensorProto.data_type`, or nothing if that is not a float type handled here.
    pub fn from_onnx(data_type: i32) -> Option<Self> {
        match DataType::try_from(data_type).ok()? {
            DataType::Float16 => Some(Self::F16),
            DataType::Bfloat16 => Some(Self::Bf16),
            DataType::Float => Some(Self::F32),
            DataType::Double => Some(Self::F64),
            _ => None,
        }
    }

    pub fn size_bytes(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// Rounds values to this type and widens them again: what a graph of this type holds of a tensor.
    pub fn round(self, values: &mut [f32]) {
        match self {
            Self::F16 => values.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32()),
            Self::Bf16 => values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
            Self::F32 | Self::F64 => {}
        }
    }
}

impl std::fmt::Display for FloatType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::F32 => "float32",
            Self::F64 => "float64",
        })
    }
}

/// The values of a float tensor of a graph; `Raw` shares the bytes of the file.
#[derive(Clone, Debug)]
pub(crate) enum TensorData {
    Raw(Bytes),
    F32(Vec<f32>),
    F64(Vec<f64>),
    /// half-precision values stored one per `int32_data` entry
    Bits16(Vec<u16>),
}

impl TensorData {
    /// Returns the values as `f32`, borrowing where the file holds them so.
    pub(crate) fn values(&self, element: FloatType) -> Cow<'_, [f32]> {
        match self {
            Self::F32(values) => Cow::Borrowed(values),
            Self::F64(values) => Cow::Owned(values.iter().map(|&v| v as f32).collect()),
            Self::Bits16(bits) => Cow::Owned(bits.iter().map(|&b| widen16(b, element)).collect()),
            Self::Raw(bytes) => match element {
                // The file is little-endian; the cast fails where the field lies unaligned in the file.
                // The cast fails where the field lies unaligned in the file.
                FloatType::F32 => match bytemuck::try_cast_slice(bytes) {
                    Ok(values) if cfg!(target_endian = "little") => Cow::Borrowed(values),
                    _ => Cow::Owned(chunks::<4>(bytes).map(|c| f32::from_le_bytes(*c)).collect()),
                },
                FloatType::F64 => {
                    Cow::Owned(chunks::<8>(bytes).map(|c| f64::from_le_bytes(*c) as f32).collect())
                }
                FloatType::F16 | FloatType::Bf16 => {
                    Cow::Owned(chunks::<2>(bytes).map(|c| widen16(u16::from_le_bytes(*c), element)).collect())
                }
            },
        }
    }
}

/// Returns shape, element type and values of a float tensor; nothing for other element types.
///
/// `tensor` must have its external data inlined already (see `external`).
pub(crate) fn float_tensor(
    name: &str,
    tensor: &TensorProto,
) -> Result<Option<(Vec<usize>, FloatType, TensorData)>, GraphError> {
    let Some(element) = tensor.data_type.and_then(FloatType::from_onnx) else { return Ok(None) };
    let shape = shape_of(name, &tensor.dims)?;
    let n_values = element_count(name, &shape)?;
    let data = if let Some(raw) = &tensor.raw_data {
        let expected = n_values.checked_mul(element.size_bytes()).ok_or_else(|| too_large(name))?;
        if raw.len() != expected {
            return Err(GraphError::TensorSize {
                tensor: name.to_owned(),
                what: format!("{shape:?} of {element} needs {expected} bytes"),
                actual: raw.len(),
            });
        }
        return Ok(Some((shape, element, TensorData::Raw(raw.clone()))));
    } else {
        match element {
            FloatType::F32 => TensorData::F32(tensor.float_data.clone()),
            FloatType::F64 => TensorData::F64(tensor.double_data.clone()),
            FloatType::F16 | FloatType::Bf16 => {
                TensorData::Bits16(tensor.int32_data.iter().map(|&v| v as u16).collect())
            }
        }
    };
    let actual = match &data {
        TensorData::F32(v) => v.len(),
        TensorData::F64(v) => v.len(),
        TensorData::Bits16(v) => v.len(),
        TensorData::Raw(_) => n_values,
    };
    if actual != n_values {
        return Err(GraphError::TensorSize {
            tensor: name.to_owned(),
            what: format!("{shape:?} of {element} needs {n_values} values"),
            actual,
        });
    }
    Ok(Some((shape, element, data)))
}

/// Checks the dimensions that a file claims and returns them as sizes.
pub(crate) fn shape_of(name: &str, dims: &[i64]) -> Result<Vec<usize>, GraphError> {
    dims.iter()
        .map(|&d| {
            usize::try_from(d)
                .map_err(|_| GraphError::BadShape { tensor: name.to_owned(), dims: dims.to_vec() })
        })
        .collect()
}

pub(crate) fn element_count(name: &str, shape: &[usize]) -> Result<usize, GraphError> {
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(|| too_large(name))
}

/// Returns the transpose of a row-major `rows` × `columns` matrix; blocked, in parallel over output rows.
pub(crate) fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    const BLOCK: usize = 32;
    assert_eq!(values.len(), rows * columns, "the matrix holds rows × columns values");
    let mut out = vec![0.0f32; values.len()];
    if out.is_empty() {
        return out;
    }
    out.par_chunks_mut(rows * BLOCK).enumerate().for_each(|(block_idx, block)| {
        let first_column = block_idx * BLOCK;
        for first_row in (0..rows).step_by(BLOCK) {
            let last_row = (first_row + BLOCK).min(rows);
            for (offset, out_row) in block.chunks_exact_mut(rows).enumerate() {
                let column = first_column + offset;
                for row in first_row..last_row {
                    out_row[row] = values[row * columns + column];
                }
            }
        }
    });
    out
}

/// Returns the digest of the values' little-endian bytes.
pub(crate) fn digest(values: &[f32]) -> blake3::Hash {
    if cfg!(target_endian = "little") {
        return blake3::hash(bytemuck::cast_slice(values));
    }
    let mut hasher = blake3::Hasher::new();
    for value in values {
        hasher.update(&value.to_le_bytes());
    }
    hasher.finalize()
}

fn widen16(bits: u16, element: FloatType) -> f32 {
    if element == FloatType::Bf16 { bf16::from_bits(bits).to_f32() } else { f16::from_bits(bits).to_f32() }
}

fn chunks<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = &[u8; N]> {
    bytes.as_chunks::<N>().0.iter()
}

fn too_large(name: &str) -> GraphError {
    GraphError::TooLarge { tensor: name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_transpose(rows: usize, columns: usize) {
        let values: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
        let out = transpose(&values, rows, columns);
        for r in 0..rows {
            for c in 0..columns {
                assert_eq!(out[c * rows + r], values[r * columns + c], "{rows}×{columns} at {r},{c}");
            }
        }
    }

    #[test]
    fn transposes_every_size_around_the_block() {
        for rows in [0, 1, 2, 31, 32, 33, 65] {
            for columns in [0, 1, 2, 31, 32, 33, 65] {
                check_transpose(rows, columns);
            }
        }
    }

    #[test]
    fn reads_every_way_of_storing_the_same_values() {
        let expected = [1.0f32, -0.5, 0.25, 3.0];
        let base = |data_type: DataType| TensorProto {
            dims: vec![2, 2],
            data_type: Some(data_type as i32),
            ..TensorProto::default()
        };
        let raw = |bytes: Vec<u8>| Some(Bytes::from(bytes));
        let cases = [
            TensorProto { float_data: expected.to_vec(), ..base(DataType::Float) },
            TensorProto {
                raw_data: raw(expected.iter().flat_map(|v| v.to_le_bytes()).collect()),
                ..base(DataType::Float)
            },
            TensorProto { double_data: expected.map(f64::from).to_vec(), ..base(DataType::Double) },
            TensorProto {
                raw_data: raw(expected.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect()),
                ..base(DataType::Double)
            },
            TensorProto {
                int32_data: expected.map(|v| i32::from(f16::from_f32(v).to_bits())).to_vec(),
                ..base(DataType::Float16)
            },
            TensorProto {
                raw_data: raw(expected.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()),
                ..base(DataType::Bfloat16)
            },
        ];
        for case in cases {
            let (shape, element, data) = float_tensor("t", &case).unwrap().unwrap();
            assert_eq!(shape, [2, 2]);
            assert_eq!(data.values(element).as_ref(), expected, "{element}");
        }
    }

    #[test]
    fn refuses_a_shape_that_its_data_does_not_fill() {
        let tensor = |dims: Vec<i64>| TensorProto {
            dims,
            data_type: Some(DataType::Float as i32),
            raw_data: Some(Bytes::from_static(&[0; 16])),
            ..TensorProto::default()
        };
        assert!(float_tensor("t", &tensor(vec![2, 2])).unwrap().is_some());
        for dims in [vec![3, 2], vec![-1, 4], vec![i64::MAX, i64::MAX], vec![1 << 62, 1]] {
            assert!(float_tensor("t", &tensor(dims)).is_err());
        }
    }
}
