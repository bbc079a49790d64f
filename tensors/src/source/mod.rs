//! Reading the tensors of an artifact, whatever its layout.
//!
//! [`open`] turns a [`Manifest`] into a [`TensorSource`]. Nothing is read until a block is asked for, and only into the caller's
//! buffers and [`Scratch`]. Views over views are followed recursively; artifacts and files that several of them refer to are opened
//! once, and within a block each region is read once (see [`Scratch`]).

use std::ops::Range;
use std::sync::Arc;

use blake3::Hash;

use crate::dtype::TensorInfo;
use crate::encoding::{Encoding, Form, Tables};
use crate::error::{Error, Result};
use crate::kernels::{finite, linear};
use crate::manifest::{FileRef, Manifest};
use crate::read_at::ReadAt;
use crate::scratch::Scratch;

mod open;
mod stored;

pub use open::open;

/// Tensors that can be read in blocks, from several threads at once.
pub trait TensorSource: Send + Sync {
    /// Sorted by name. `read_…` take positions in this list.
    fn tensors(&self) -> &[TensorInfo];

    fn index_of(&self, name: &str) -> Option<usize> {
        self.tensors().binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()
    }

    /// Writes the elements `range` of a tensor as `f32`. Halves and 8-bit floats are widened exactly, `f64` is rounded to nearest;
    /// other types are refused. Values may be NaN or infinite: see [`read_finite_f32`].
    fn read_f32(
        &self,
        tensor: usize,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()>;

    /// Hands the elements `range` of a tensor to `work`, as [`Self::read_f32`] would write them.
    fn with_f32(
        &self,
        tensor: usize,
        range: Range<usize>,
        scratch: &mut Scratch,
        work: &mut dyn FnMut(&[f32]),
    ) -> Result<()> {
        let mut values = scratch.take(range.len());
        let result = self.read_f32(tensor, range, &mut values, scratch);
        if result.is_ok() {
            work(&values);
        }
        scratch.give_back(values);
        result
    }

    /// `out[i] += coefficient·x[i]` for the elements `range` of a tensor.
    fn add_scaled(
        &self,
        tensor: usize,
        range: Range<usize>,
        coefficient: f32,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        assert_eq!(range.len(), out.len(), "the buffer holds exactly the range");
        self.with_f32(tensor, range, scratch, &mut |values| linear::add_scaled(out, coefficient, values))
    }

    /// Writes the bytes `range` of a tensor in its own type, little-endian. Stored elements come out verbatim; of a tensor that
    /// is computed or decoded, these are the bytes of its `f32` values.
    fn read_bytes(
        &self,
        tensor: usize,
        range: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()>;

    /// How a tensor is stored as codes; nothing if its elements are stored as they are, or computed.
    fn encoding(&self, _tensor: usize) -> Option<&Encoding> {
        None
    }

    /// Writes the stored bytes `range` of a tensor that has an [`Self::encoding`]: its codes, and the scales behind them.
    fn read_encoded(&self, tensor: usize, range: Range<u64>, out: &mut [u8]) -> Result<()> {
        check_bounds(&self.tensors()[tensor], "encoded bytes", range.start, range.end, 0, out.len() as u64)
    }

    /// The codes of a tensor and their scales, when it is stored as such; `None` for plain elements and for views.
    fn packed(&self, _tensor: usize) -> Result<Option<PackedCodes>> {
        Ok(None)
    }

    /// Bytes of the store's objects that this artifact itself needs; 0 for a view.
    fn stored_bytes(&self) -> u64;

    /// Fails when a file that this reads may have changed since it was opened.
    fn check_unchanged(&self) -> Result<()>;
}

/// A quantized tensor as it is stored, without being decoded: for what goes on working with codes.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedCodes {
    pub form: Form,
    /// All codes, packed; [`Form::unpack`] takes them apart.
    pub codes: Vec<u8>,
    /// The scales of all groups.
    pub tables: Tables,
}

/// Finds what manifests refer to.
pub trait Resolver {
    /// Opens a file by its digest.
    fn file(&self, file: &FileRef) -> Result<Arc<dyn ReadAt>>;

    /// Loads the manifest of another artifact.
    fn manifest(&self, artifact: &Hash) -> Result<Manifest>;
}

/// [`TensorSource::read_f32`], failing with the tensor's name and the element when a value is NaN or infinite.
pub fn read_finite_f32(
    source: &dyn TensorSource,
    tensor: usize,
    range: Range<usize>,
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    let start = range.start;
    source.read_f32(tensor, range, out, scratch)?;
    check_finite(&source.tensors()[tensor].name, start, out)
}

/// Fails with the tensor's name and the element when a value is NaN or infinite; `values` begin at element `start`.
pub fn check_finite(tensor: &str, start: usize, values: &[f32]) -> Result<()> {
    match finite::first_non_finite(values) {
        None => Ok(()),
        Some(i) => Err(Error::NotFinite { tensor: tensor.to_owned(), element: start + i, value: values[i] }),
    }
}

/// Bytes of the `f32` values of a tensor that is not stored as such.
pub fn read_computed_bytes(
    source: &dyn TensorSource,
    tensor: usize,
    range: Range<u64>,
    out: &mut [u8],
    scratch: &mut Scratch,
) -> Result<()> {
    check_byte_range(&source.tensors()[tensor], &range, out.len())?;
    let (start, end) = (range.start as usize, range.end as usize);
    let elements = start / 4..end.div_ceil(4);
    let mut values = scratch.take(elements.len());
    let result = source.read_f32(tensor, elements.clone(), &mut values, scratch);
    let bytes: &[u8] = bytemuck::cast_slice(&values);
    out.copy_from_slice(&bytes[start - elements.start * 4..][..end - start]);
    scratch.give_back(values);
    result
}

pub(crate) fn check_range(info: &TensorInfo, range: &Range<usize>, buffer: usize) -> Result<()> {
    let available = info.n_elements() as u64;
    check_bounds(info, "elements", range.start as u64, range.end as u64, available, buffer as u64)
}

pub(crate) fn check_byte_range(info: &TensorInfo, range: &Range<u64>, buffer: usize) -> Result<()> {
    check_bounds(info, "bytes", range.start, range.end, info.size_bytes(), buffer as u64)
}

pub(crate) fn check_bounds(
    info: &TensorInfo,
    unit: &'static str,
    start: u64,
    end: u64,
    available: u64,
    buffer: u64,
) -> Result<()> {
    if start > end || end > available {
        return Err(Error::OutOfBounds { tensor: info.name.clone(), unit, start, end, available });
    }
    assert_eq!(end - start, buffer, "the buffer holds exactly the range");
    Ok(())
}

#[cfg(test)]
mod tests;
