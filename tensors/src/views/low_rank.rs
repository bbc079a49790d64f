//! Products of two thin matrices, computed where they are read.
//!
//! For `left` of `m × r` and `right` of `r × n` the element `(i, j)` is
//!
//! ```text
//! f32( scale · Σ_{p = 0}^{r−1} f64(left[i, p]) · f64(right[p, j]) )
//! ```
//!
//! with the factors as `f32`, products and sums in `f64` in ascending `p`, and one rounding to `f32` at the end. Every element is
//! computed by itself in this order, so values do not depend on blocks, tiles or threads, and no fused multiply-add is used, so not on
//! the machine either.
//!
//! Tiles bound the working memory: at most `TILE` elements of each factor, and as many sums, are held, whatever the rank (a tile
//! never holds less than one row or column).

use std::ops::Range;
use std::sync::Arc;

use super::{LowRankTensor, TILE};
use crate::dtype::{TensorInfo, n_elements};
use crate::error::Result;
use crate::scratch::Scratch;
use crate::source::{TensorSource, check_range, read_computed_bytes};

/// A view of products over an opened artifact that holds the factors.
pub(crate) struct LowRankSource {
    infos: Vec<TensorInfo>,
    products: Vec<Product>,
    source: Arc<dyn TensorSource>,
}

/// Factors as the output sees them: it is `rows × columns`, row-major.
struct Product {
    /// Gives the rows of the output, with the rank as its other axis.
    rows: Factor,
    /// Gives its columns.
    columns: Factor,
    rank: usize,
    scale: f64,
}

#[derive(Clone, Copy)]
struct Factor {
    tensor: usize,
    /// Rows (or columns) of the output that it gives.
    extent: usize,
    /// Whether the rank is the first axis of the stored tensor.
    rank_first: bool,
}

impl LowRankSource {
    /// Looks up and checks every factor. The error says what does not fit, without the tensor's name.
    pub(crate) fn new(
        infos: Vec<TensorInfo>,
        tensors: &[LowRankTensor],
        source: Arc<dyn TensorSource>,
    ) -> Result<Self, (usize, String)> {
        let products = infos.iter().zip(tensors).enumerate().map(|(index, (info, tensor))| {
            Product::new(info, tensor, &*source).map_err(|reason| (index, reason))
        });
        Ok(Self { products: products.collect::<Result<_, _>>()?, infos, source })
    }
}

impl Product {
    fn new(info: &TensorInfo, tensor: &LowRankTensor, source: &dyn TensorSource) -> Result<Self, String> {
        let find = |name: &str| {
            let index = source.index_of(name).ok_or_else(|| format!("its factor `{name}` is not there"))?;
            let found = &source.tensors()[index];
            match found.shape.split_first() {
                _ if !found.dtype.is_float() => Err(format!("its factor `{name}` is {}", found.dtype)),
                Some((&first, rest)) if !rest.is_empty() => {
                    Ok((index, first, n_elements(rest).unwrap_or(usize::MAX)))
                }
                _ => Err(format!("its factor `{name}` has shape {:?}, which is not a matrix", found.shape)),
            }
        };
        let (left, m, rank) = find(&tensor.left)?;
        let (right, right_rank, n) = find(&tensor.right)?;
        if rank != right_rank {
            return Err(format!(
                "its factors `{}` and `{}` have ranks {rank} and {right_rank}",
                tensor.left, tensor.right
            ));
        }
        if m.checked_mul(n) != Some(info.n_elements()) {
            return Err(format!(
                "shape {:?} does not have the {m} × {n} elements of `{}` · `{}`",
                info.shape, tensor.left, tensor.right
            ));
        }
        let left = Factor { tensor: left, extent: m, rank_first: false };
        let right = Factor { tensor: right, extent: n, rank_first: true };
        let (rows, columns) = if tensor.transposed { (right, left) } else { (left, right) };
        Ok(Self { rows, columns, rank, scale: tensor.scale })
    }

    /// Computes the elements `range` of the product.
    fn compute(
        &self,
        source: &dyn TensorSource,
        range: &Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let width = self.columns.extent;
        let (first_row, last_row) = (range.start / width, (range.end - 1) / width);
        let needed = if first_row == last_row {
            range.start - first_row * width..range.end - first_row * width
        } else {
            0..width
        };
        let step = (TILE / self.rank.max(1)).max(1);
        let (mut by_row, mut by_rank, mut sums) = (Vec::new(), Vec::new(), Vec::new());
        for left in needed.clone().step_by(step) {
            let columns = left..needed.end.min(left + step);
            self.columns.read(source, self.rank, &columns, Order::RankFirst, &mut by_rank, scratch)?;
            for top in (first_row..=last_row).step_by(step) {
                let rows = top..(last_row + 1).min(top + step);
                self.rows.read(source, self.rank, &rows, Order::RankLast, &mut by_row, scratch)?;
                for row in rows.clone() {
                    // The part of this row and tile that was asked for.
                    let begin = row * width;
                    let low = (begin + columns.start).max(range.start);
                    let high = (begin + columns.end).min(range.end);
                    if low >= high {
                        continue;
                    }
                    sums.clear();
                    sums.resize(high - low, 0.0f64);
                    let skip = low - begin - columns.start;
                    let coefficients = &by_row[(row - top) * self.rank..][..self.rank];
                    for (p, &coefficient) in coefficients.iter().enumerate() {
                        let values = &by_rank[p * columns.len() + skip..][..sums.len()];
                        for (sum, &value) in sums.iter_mut().zip(values) {
                            *sum += f64::from(coefficient) * f64::from(value);
                        }
                    }
                    let out = &mut out[low - range.start..high - range.start];
                    for (out, &sum) in out.iter_mut().zip(&sums) {
                        *out = (self.scale * sum) as f32;
                    }
                }
            }
        }
        Ok(())
    }
}

/// In which order a factor's elements are wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    RankFirst,
    RankLast,
}

impl Factor {
    /// Reads the rows (or columns) `wanted` of the output into `into`, in the order asked for.
    fn read(
        self,
        source: &dyn TensorSource,
        rank: usize,
        wanted: &Range<usize>,
        order: Order,
        into: &mut Vec<f32>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let count = wanted.len();
        into.resize(rank * count, 0.0);
        let in_order = self.rank_first == (order == Order::RankFirst);
        let mut stored = if in_order { Vec::new() } else { vec![0.0; rank * count] };
        let buffer = if in_order { &mut into[..] } else { &mut stored[..] };
        if self.rank_first && count != self.extent {
            for (p, row) in buffer.chunks_exact_mut(count).enumerate() {
                let start = p * self.extent;
                source.read_f32(self.tensor, start + wanted.start..start + wanted.end, row, scratch)?;
            }
        } else {
            // All of it, or whole rows: contiguous either way.
            source.read_f32(self.tensor, wanted.start * rank..wanted.end * rank, buffer, scratch)?;
        }
        if !in_order {
            let (n_rows, n_columns) = if self.rank_first { (rank, count) } else { (count, rank) };
            for i in 0..n_rows {
                for j in 0..n_columns {
                    into[j * n_rows + i] = stored[i * n_columns + j];
                }
            }
        }
        Ok(())
    }
}

impl TensorSource for LowRankSource {
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
        scratch.below(|scratch| self.products[tensor].compute(&*self.source, &range, out, scratch))
    }

    fn read_bytes(
        &self,
        tensor: usize,
        range: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        read_computed_bytes(self, tensor, range, out, scratch)
    }

    fn stored_bytes(&self) -> u64 {
        0
    }

    fn check_unchanged(&self) -> Result<()> {
        self.source.check_unchanged()
    }
}
