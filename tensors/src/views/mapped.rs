//! Tensors put together from pieces of others, exact to the bit.
//!
//! Rows and wholes are contiguous: a block of the view is one read per piece it touches. Columns (a transpose) are gathered in tiles of
//! `TILE` elements: narrow matrices by whole rows, so that a tile is one read, wide ones row by row, only the columns that are needed.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;

use super::{Part, TILE};
use crate::DType;
use crate::dtype::{TensorInfo, n_elements};
use crate::encoding::Encoding;
use crate::error::Result;
use crate::scratch::Scratch;
use crate::source::{
    PackedCodes, TensorSource, check_bounds, check_byte_range, check_range, read_computed_bytes,
};

/// Columns up to which reading whole rows is cheaper than a read per row: a system call costs about as much as copying 8 KiB.
const NARROW: usize = 2048;

/// Reads the elements of that range of a tensor, as items of which an element has a fixed number.
type Read<'a, T> = &'a mut dyn FnMut(usize, Range<usize>, &mut [T]) -> Result<()>;

/// A mapped view over an opened artifact.
pub(crate) struct MappedSource {
    infos: Vec<TensorInfo>,
    tensors: Vec<Tensor>,
    source: Arc<dyn TensorSource>,
}

struct Tensor {
    pieces: Vec<Piece>,
    /// Whether all pieces have the view's own element type, so that stored bytes can be copied.
    verbatim: bool,
}

/// A part with everything looked up.
struct Piece {
    /// Where it begins in the view's tensor, and how many elements it has.
    start: usize,
    length: usize,
    from: From,
}

enum From {
    /// Contiguous elements of a tensor, from `offset` on.
    Run {
        tensor: usize,
        offset: usize,
    },
    /// Columns of an `n_rows × n_columns` matrix, from `first` on.
    Columns {
        tensor: usize,
        n_rows: usize,
        n_columns: usize,
        first: usize,
    },
    Zeros,
}

impl MappedSource {
    /// Looks up and checks every part. The error says what does not fit, without the tensor's name.
    pub(crate) fn new(
        infos: Vec<TensorInfo>,
        parts: &[Vec<Part>],
        source: Arc<dyn TensorSource>,
    ) -> Result<Self, (usize, String)> {
        let mut tensors = Vec::with_capacity(infos.len());
        for (index, (info, parts)) in infos.iter().zip(parts).enumerate() {
            tensors.push(Tensor::new(info, parts, &*source).map_err(|reason| (index, reason))?);
        }
        Ok(Self { infos, tensors, source })
    }

    /// The tensor that one of the view is, under another name at most.
    fn same(&self, tensor: usize) -> Option<usize> {
        let info = &self.infos[tensor];
        let [Piece { from: From::Run { tensor, offset: 0 }, .. }] = self.tensors[tensor].pieces.as_slice()
        else {
            return None;
        };
        let own = &self.source.tensors()[*tensor];
        (own.shape == info.shape && own.dtype == info.dtype).then_some(*tensor)
    }

    /// Fills `out` with the elements `range` of a tensor, `unit` items of `out` each, through `read`.
    fn gather<T: Pod>(
        &self,
        tensor: usize,
        range: &Range<usize>,
        unit: usize,
        out: &mut [T],
        read: Read<'_, T>,
    ) -> Result<()> {
        let pieces = &self.tensors[tensor].pieces;
        let mut at = range.start;
        let mut next = pieces.partition_point(|piece| piece.start + piece.length <= at);
        while at < range.end {
            // INVARIANT: the pieces cover the tensor without gaps, so there is one that holds `at`.
            let piece = &pieces[next];
            next += 1;
            let end = range.end.min(piece.start + piece.length);
            let within = at - piece.start..end - piece.start;
            let out = &mut out[(at - range.start) * unit..(end - range.start) * unit];
            match piece.from {
                From::Run { tensor, offset } => {
                    read(tensor, offset + within.start..offset + within.end, out)?;
                }
                From::Columns { tensor, n_rows, n_columns, first } => {
                    let matrix = Matrix { tensor, n_rows, n_columns };
                    matrix.gather_columns(first, &within, unit, out, read)?;
                }
                From::Zeros => out.fill(T::zeroed()),
            }
            at = end;
        }
        Ok(())
    }
}

impl Tensor {
    fn new(info: &TensorInfo, parts: &[Part], source: &dyn TensorSource) -> Result<Self, String> {
        let mut pieces = Vec::with_capacity(parts.len());
        let mut start = 0usize;
        let mut verbatim = true;
        for part in parts {
            let (from, length) = look_up(part, source)?;
            if let Some(found) = part.tensor().and_then(|name| source.index_of(name)) {
                let dtype = source.tensors()[found].dtype;
                verbatim &= dtype == info.dtype;
                if dtype != info.dtype && !(dtype.is_float() && info.dtype == DType::F32) {
                    return Err(format!(
                        "it is {}, its part `{}` is {dtype}",
                        info.dtype,
                        source.tensors()[found].name
                    ));
                }
            }
            if length > 0 {
                pieces.push(Piece { start, length, from });
            }
            start = start.checked_add(length).ok_or("its parts have too many elements")?;
        }
        if start != info.n_elements() {
            return Err(format!(
                "shape {:?} has {} elements, its parts have {start}",
                info.shape,
                info.n_elements()
            ));
        }
        Ok(Self { pieces, verbatim })
    }
}

fn look_up(part: &Part, source: &dyn TensorSource) -> Result<(From, usize), String> {
    let find = |name: &str| {
        let index = source.index_of(name).ok_or_else(|| format!("its part `{name}` is not there"))?;
        Ok::<_, String>((index, &source.tensors()[index]))
    };
    let beyond = |name: &str, info: &TensorInfo, start, end| {
        format!("it takes {start} to {end} of `{name}`, whose shape is {:?}", info.shape)
    };
    match part {
        Part::Whole { tensor } => {
            let (index, info) = find(tensor)?;
            Ok((From::Run { tensor: index, offset: 0 }, info.n_elements()))
        }
        Part::Rows { tensor, start, end } => {
            let (index, info) = find(tensor)?;
            let Some((n_rows, rest)) = info.shape.split_first() else {
                return Err(beyond(tensor, info, start, end));
            };
            if start > end || end > n_rows {
                return Err(beyond(tensor, info, start, end));
            }
            let row = n_elements(rest).unwrap_or(usize::MAX);
            // A tensor with an empty axis has no elements, however many rows are asked for.
            let row = if info.n_elements() == 0 { 0 } else { row };
            Ok((From::Run { tensor: index, offset: start * row }, (end - start) * row))
        }
        Part::Columns { tensor, start, end } => {
            let (index, info) = find(tensor)?;
            let &[n_rows, n_columns] = &info.shape[..] else {
                return Err(format!("it transposes `{tensor}`, which is not a matrix: {:?}", info.shape));
            };
            if start > end || *end > n_columns {
                return Err(beyond(tensor, info, start, end));
            }
            Ok((From::Columns { tensor: index, n_rows, n_columns, first: *start }, (end - start) * n_rows))
        }
        Part::Zeros { elements } => Ok((From::Zeros, *elements)),
    }
}

/// A stored matrix, read by columns.
struct Matrix {
    tensor: usize,
    n_rows: usize,
    n_columns: usize,
}

impl Matrix {
    /// Writes the elements `within` of the matrix's columns from `first` on, column after column.
    fn gather_columns<T: Pod>(
        &self,
        first: usize,
        within: &Range<usize>,
        unit: usize,
        out: &mut [T],
        read: Read<'_, T>,
    ) -> Result<()> {
        if within.is_empty() {
            return Ok(());
        }
        let (first_column, last_column) = (within.start / self.n_rows, (within.end - 1) / self.n_rows);
        // A block inside one column needs only some of the rows.
        let rows = if first_column == last_column {
            within.start % self.n_rows..(within.end - 1) % self.n_rows + 1
        } else {
            0..self.n_rows
        };
        let mut tile = Vec::new();
        for start in (first_column..=last_column).step_by(TILE) {
            let columns = start..(last_column + 1).min(start + TILE);
            let needed = first + columns.start..first + columns.end;
            let whole_rows =
                self.n_columns <= NARROW || needed.len() * 4 >= self.n_columns && self.n_columns <= TILE;
            let loaded = if whole_rows { 0..self.n_columns } else { needed.clone() };
            let height = (TILE / loaded.len()).max(1);
            for top in rows.clone().step_by(height) {
                let band = top..rows.end.min(top + height);
                tile.resize(band.len() * loaded.len() * unit, T::zeroed());
                if whole_rows {
                    read(self.tensor, band.start * self.n_columns..band.end * self.n_columns, &mut tile)?;
                } else {
                    for (row, into) in band.clone().zip(tile.chunks_exact_mut(loaded.len() * unit)) {
                        let start = row * self.n_columns;
                        read(self.tensor, start + loaded.start..start + loaded.end, into)?;
                    }
                }
                for column in columns.clone() {
                    // The elements of this column and band that were asked for.
                    let begin = column * self.n_rows;
                    let low = (begin + band.start).max(within.start);
                    let high = (begin + band.end).min(within.end);
                    let position = first + column - loaded.start;
                    for element in low..high {
                        let from = ((element - begin - band.start) * loaded.len() + position) * unit;
                        let to = (element - within.start) * unit;
                        out[to..to + unit].copy_from_slice(&tile[from..from + unit]);
                    }
                }
            }
        }
        Ok(())
    }
}

impl TensorSource for MappedSource {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn read_f32(
        &self,
        tensor: usize,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        check_range(&self.infos[tensor], &range, out.len())?;
        scratch.below(|scratch| {
            let source = &*self.source;
            self.gather(tensor, &range, 1, out, &mut |tensor, range, out| {
                source.read_f32(tensor, range, out, scratch)
            })
        })
    }

    fn read_bytes(
        &self,
        tensor: usize,
        range: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        if !self.tensors[tensor].verbatim {
            return read_computed_bytes(self, tensor, range, out, scratch);
        }
        let info = &self.infos[tensor];
        check_byte_range(info, &range, out.len())?;
        let size = info.dtype.size_bytes();
        let (start, end) = (range.start as usize, range.end as usize);
        let elements = start / size..end.div_ceil(size);
        scratch.below(|scratch| {
            let source = &*self.source;
            let mut read = |tensor: usize, range: Range<usize>, out: &mut [u8]| {
                source.read_bytes(
                    tensor,
                    (range.start * size) as u64..(range.end * size) as u64,
                    out,
                    scratch,
                )
            };
            if elements.len() * size == out.len() {
                return self.gather(tensor, &elements, size, out, &mut read);
            }
            // Nobody cuts elements apart except to test that it works.
            let mut wider = vec![0; elements.len() * size];
            self.gather(tensor, &elements, size, &mut wider, &mut read)?;
            out.copy_from_slice(&wider[start - elements.start * size..][..end - start]);
            Ok(())
        })
    }

    fn encoding(&self, tensor: usize) -> Option<&Encoding> {
        self.source.encoding(self.same(tensor)?)
    }

    fn read_encoded(&self, tensor: usize, range: Range<u64>, out: &mut [u8]) -> Result<()> {
        match self.same(tensor) {
            Some(same) => self.source.read_encoded(same, range, out),
            None => check_bounds(
                &self.infos[tensor],
                "encoded bytes",
                range.start,
                range.end,
                0,
                out.len() as u64,
            ),
        }
    }

    fn packed(&self, tensor: usize) -> Result<Option<PackedCodes>> {
        self.same(tensor).map_or(Ok(None), |same| self.source.packed(same))
    }

    fn stored_bytes(&self) -> u64 {
        0
    }

    fn check_unchanged(&self) -> Result<()> {
        self.source.check_unchanged()
    }
}
