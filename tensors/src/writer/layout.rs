//! What goes where in an output file: the canonical order, the offsets and the header.

use std::ops::Range;

use blake3::Hash;

use crate::DType;
use crate::dtype::{byte_size, n_elements};
use crate::encoding::Encoding;
use crate::error::{Error, OutputProblem, Result};
use crate::formats::safetensors::{MAX_HEADER_BYTES, METADATA_KEY};
use crate::kernels::pack::{Bits, packed_len};
use crate::manifest::{Content, FileRef, Manifest, PackedTensor, Region, TensorEntry};
use crate::stream::blocks;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub payload: Payload,
}

/// What the writer asks for, and what it makes of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Payload {
    /// `f32` values, stored as F32, F16 or BF16 (rounded to nearest, ties to even).
    Values(DType),
    /// Elements in their own type, copied as they are.
    Bytes(DType),
    /// `f32` values, stored as packed codes under an encoding whose scales are part of it.
    Codes(Encoding),
    /// Codes that the caller packs, under an encoding that may depend on values that were not looked at yet: `bits` and `n_codes` of it,
    /// and the bytes of the scales behind the codes. [`Written::encode`] says what the encoding is.
    Packed { bits: Bits, n_codes: usize, tables_len: u64 },
}

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// Size of the file.
    pub size: u64,
    /// Sorted by name.
    pub tensors: Vec<WrittenTensor>,
}

/// Where and how a tensor was written.
#[derive(Clone, Debug, PartialEq)]
pub struct WrittenTensor {
    pub entry: TensorEntry,
    /// Of what the caller packed, [`Encoding::Plain`] until [`Written::encode`].
    pub encoding: Encoding,
    pub offset: u64,
    pub length: u64,
}

impl Written {
    /// Says under which encoding the caller packed a tensor; `encoding` knows those of [`Payload::Packed`].
    #[must_use]
    pub fn encode(mut self, encoding: impl Fn(&str) -> Option<Encoding>) -> Self {
        for tensor in &mut self.tensors {
            if let Some(encoding) = encoding(&tensor.entry.name) {
                tensor.encoding = encoding;
            }
        }
        self
    }

    /// Describes the artifact, now that the digest of the file is known.
    pub fn into_manifest(self, content: Content, file: FileRef) -> Result<Manifest> {
        if self.tensors.iter().all(|tensor| tensor.encoding == Encoding::Plain) {
            let tensors = self.tensors.into_iter().map(|tensor| {
                let (offset, length) = (tensor.offset, tensor.length);
                (tensor.entry, Region { file: 0, offset, length, arrangement: None })
            });
            return Manifest::regions(content, vec![file], tensors.collect());
        }
        let tensors = self.tensors.into_iter().map(|tensor| {
            let WrittenTensor { entry, encoding, offset, length } = tensor;
            (entry, PackedTensor { encoding, offset, length })
        });
        Manifest::packed(content, file, tensors.collect())
    }
}

/// Everything that is known before the first value.
pub(super) struct Plan<'a> {
    pub(super) header: Vec<u8>,
    /// In the order of the file.
    pub(super) tensors: Vec<Planned<'a>>,
}

pub(super) struct Planned<'a> {
    /// Position in the caller's list.
    pub(super) position: usize,
    pub(super) tensor: &'a OutputTensor,
    encoding: &'a Encoding,
    stored_dtype: DType,
    n_elements: usize,
    /// Bytes of the scales behind the codes.
    tables_len: u64,
    /// From the beginning of the data.
    offset: u64,
    length: u64,
}

/// A block to compute.
#[derive(Clone)]
pub(super) struct Job {
    /// Position in the plan.
    pub(super) planned: usize,
    /// Its elements; of the scales behind the codes, none.
    pub(super) range: Range<usize>,
    pub(super) length: usize,
}

impl<'a> Plan<'a> {
    pub(super) fn new(tensors: &'a [OutputTensor], metadata: Option<(&str, &str)>) -> Result<Self> {
        let mut planned = Vec::with_capacity(tensors.len());
        for (position, tensor) in tensors.iter().enumerate() {
            let refuse = |problem| Error::Output { tensor: tensor.name.clone(), problem };
            planned.push(Planned::new(position, tensor).map_err(refuse)?);
        }
        planned.sort_by(|left, right| {
            let by_type = right.stored_dtype.cmp(&left.stored_dtype);
            by_type.then_with(|| left.tensor.name.cmp(&right.tensor.name))
        });
        let mut offset = 0u64;
        for tensor in &mut planned {
            tensor.offset = offset;
            offset = offset.checked_add(tensor.length).ok_or_else(|| Error::Output {
                tensor: tensor.tensor.name.clone(),
                problem: OutputProblem::TooLarge(tensor.tensor.shape.clone()),
            })?;
        }
        let mut names: Vec<&str> = planned.iter().map(|tensor| tensor.tensor.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            let problem = OutputProblem::DuplicateName;
            return Err(Error::Output { tensor: pair[0].to_owned(), problem });
        }
        let header = header(&planned, metadata)?;
        Ok(Self { header, tensors: planned })
    }

    pub(super) fn jobs(&self) -> impl Iterator<Item = Job> {
        self.tensors.iter().enumerate().flat_map(|(planned, tensor)| {
            let elements = blocks(tensor.n_elements).map(move |range| {
                // Blocks are whole packing groups, so the lengths of blocks add up to the tensor's.
                let length = tensor.elements_len(range.len()) as usize;
                Job { planned, range, length }
            });
            let end = tensor.n_elements;
            let length = tensor.tables_len as usize;
            let tables = (length > 0).then_some(Job { planned, range: end..end, length });
            elements.chain(tables)
        })
    }

    pub(super) fn written(&self, digests: Vec<Option<Hash>>) -> Written {
        let data_start = self.header.len() as u64;
        let size = data_start + self.tensors.last().map_or(0, |last| last.offset + last.length);
        let mut tensors: Vec<WrittenTensor> = self
            .tensors
            .iter()
            .zip(digests)
            .map(|(planned, digest)| WrittenTensor {
                entry: TensorEntry {
                    name: planned.tensor.name.clone(),
                    dtype: planned.value_dtype(),
                    shape: planned.tensor.shape.clone(),
                    digest,
                },
                encoding: planned.encoding.clone(),
                offset: data_start + planned.offset,
                length: planned.length,
            })
            .collect();
        tensors.sort_by(|left, right| left.entry.name.cmp(&right.entry.name));
        Written { size, tensors }
    }
}

impl<'a> Planned<'a> {
    fn new(position: usize, tensor: &'a OutputTensor) -> Result<Self, OutputProblem> {
        if tensor.name == METADATA_KEY {
            return Err(OutputProblem::ReservedName);
        }
        let (value_dtype, stored_dtype, encoding) = match &tensor.payload {
            Payload::Values(dtype @ (DType::F32 | DType::F16 | DType::BF16)) => {
                (*dtype, *dtype, &Encoding::Plain)
            }
            Payload::Values(dtype) => return Err(OutputProblem::NotStorable(*dtype)),
            Payload::Bytes(dtype) => (*dtype, *dtype, &Encoding::Plain),
            Payload::Codes(Encoding::Plain) => (DType::F32, DType::F32, &Encoding::Plain),
            Payload::Codes(Encoding::Grouped(_)) => {
                let problem = "scales of groups are packed by whoever chooses them";
                return Err(OutputProblem::Encoding(problem.to_owned()));
            }
            Payload::Codes(encoding) => (DType::F32, DType::U8, encoding),
            Payload::Packed { .. } => (DType::F32, DType::U8, &Encoding::Plain),
        };
        let too_large = || OutputProblem::TooLarge(tensor.shape.clone());
        byte_size(value_dtype, &tensor.shape).ok_or_else(too_large)?;
        let n_elements = n_elements(&tensor.shape).ok_or_else(too_large)?;
        encoding.check(value_dtype, n_elements).map_err(OutputProblem::Encoding)?;
        let tables_len = if let Payload::Packed { tables_len, .. } = tensor.payload { tables_len } else { 0 };
        let mut planned =
            Self { position, tensor, encoding, stored_dtype, n_elements, tables_len, offset: 0, length: 0 };
        planned.length = planned.elements_len(n_elements).checked_add(tables_len).ok_or_else(too_large)?;
        Ok(planned)
    }

    /// Bytes of `n` elements, without the scales behind them.
    fn elements_len(&self, n: usize) -> u64 {
        match self.tensor.payload {
            Payload::Packed { bits, n_codes, .. } => {
                (packed_len(n, bits) as u64).saturating_mul(n_codes as u64)
            }
            _ => self.encoding.stored_len(self.stored_dtype, n),
        }
    }

    pub(super) fn n_elements(&self) -> usize {
        self.n_elements
    }

    fn value_dtype(&self) -> DType {
        match self.tensor.payload {
            Payload::Values(dtype) | Payload::Bytes(dtype) => dtype,
            Payload::Codes(_) | Payload::Packed { .. } => DType::F32,
        }
    }

    /// Codes are a row of bytes to other readers.
    fn stored_shape(&self) -> Vec<usize> {
        match (&self.tensor.payload, self.encoding) {
            (Payload::Packed { .. }, _) => vec![self.length as usize],
            (_, Encoding::Plain) => self.tensor.shape.clone(),
            _ => vec![self.length as usize],
        }
    }
}

/// Header with its length in front, in the canonical form. The reference crate checks and formats it; what it leaves open, the order
/// of the tensors and of several metadata keys, does not arise.
fn header(planned: &[Planned<'_>], metadata: Option<(&str, &str)>) -> Result<Vec<u8>> {
    let entries = planned.iter().map(|tensor| {
        let info = safetensors::tensor::TensorInfo {
            dtype: tensor.stored_dtype.into(),
            shape: tensor.stored_shape(),
            data_offsets: (tensor.offset as usize, (tensor.offset + tensor.length) as usize),
        };
        (tensor.tensor.name.clone(), info)
    });
    let metadata = metadata.map(|(key, value)| [(key.to_owned(), value.to_owned())].into());
    let checked = safetensors::tensor::Metadata::new(metadata, entries.collect())
        .expect("offsets were counted from the shapes, without gaps");
    let mut json = serde_json::to_vec(&checked).expect("names and numbers can be written");
    json.resize(json.len().next_multiple_of(8), b' ');
    if json.len() as u64 > MAX_HEADER_BYTES {
        let (tensors, bytes) = (planned.len(), json.len());
        return Err(Error::OutputHeaderTooLarge { tensors, bytes, limit: MAX_HEADER_BYTES });
    }
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}
