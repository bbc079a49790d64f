//! Products of matrices.

use std::cell::RefCell;
use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use ort::Result;
use ort::operator::ComputeContext;

use super::view::{Matrices, View};
use super::{Inputs, Op, boxed, each, expect};

/// α·A′B′ (+ bias for every row), where A′ and B′ are transposes if `transA` and `transB` say so; stacks of matrices have equal leading axes.
///
/// `viewA` and `viewB` (see [`View`]) cut factors out of their inputs before they are transposed. `shape` is that of the output, if it is not that
/// of the product. With `heads`, which is the last axis of the stack, the output has it between rows and columns.
pub(super) static PRODUCT: Op = Op {
    name: "Product",
    inputs: 2,
    optional_inputs: 1,
    outputs: 1,
    kernel: |attributes, threads| {
        let flag = |name| attributes.get::<i64>(name).is_some_and(|on| on != 0);
        // One that makes no sense has no axes, and is refused as what has none.
        let parse =
            |values: Vec<i64>| View::from_attribute(&values).unwrap_or_else(|| View::whole(Vec::new()));
        let view = |name| attributes.get(name).map(parse);
        let product = Product {
            transposed: [flag("transA"), flag("transB")],
            views: [view("viewA"), view("viewB")],
            shape: attributes.get("shape"),
            heads: attributes.get::<i64>("heads").map(|heads| heads.max(1) as usize),
            alpha: attributes.get("alpha").unwrap_or(1.0),
            threads,
        };
        boxed(move |context| product.compute(context))
    },
};

/// How far the inner dimension is walked at a time: what is read again and again then stays in the nearest cache.
///
/// Within a block an element's sum has one order, whatever is computed beside it, so tiles may be cut anywhere.
const DEPTH: usize = 128;

/// The largest tile of an output: it stays in a cache while it is added to.
const TILE: [usize; 2] = [256, 384];

/// Tiles have no smaller edges, unless the output has: faer computes vectors in another order.
const EDGE: usize = 32;

/// Elements in a line of a cache.
const LINE: usize = 16;

/// Multiplications that are worth a tile of their own.
const LEAST_WORK: usize = 1 << 18;

thread_local! {
    /// Where a block of a factor is copied to; kept from tile to tile.
    static COPY: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

struct Product {
    transposed: [bool; 2],
    views: [Option<View>; 2],
    shape: Option<Vec<i64>>,
    heads: Option<usize>,
    alpha: f32,
    threads: usize,
}

/// A part of an output, and what it is the product of.
struct Tile<'a> {
    a: MatRef<'a, f32>,
    b: MatRef<'a, f32>,
    bias: Option<&'a [f32]>,
    output: MatMut<'a, f32>,
}

impl Product {
    fn compute(&self, context: &ComputeContext) -> Result<()> {
        let inputs = Inputs::new(context)?;
        let ((a_shape, a), (b_shape, b)) = (inputs.get(0)?, inputs.get(1)?);
        let bias = inputs.optional(2)?;
        let whole = |shape: &[i64]| View::whole(shape.iter().map(|&n| n as usize).collect());
        let [a_view, b_view] = [(0, a_shape), (1, b_shape)]
            .map(|(i, shape)| self.views[i].clone().unwrap_or_else(|| whole(shape)));
        expect(a_view.shape().len() >= 2, "a product is one of matrices")?;
        let b_matrices = some(b_view.matrices(self.transposed[1]), "a product is one of matrices")?;
        // Rows of a stack times one matrix are the rows of one matrix.
        let rows = match a_view.shape() {
            [stack @ .., columns] if b_matrices.stack().is_empty() && !self.transposed[0] => {
                a_view.reshaped(&[stack.iter().product(), *columns])
            }
            _ => None,
        };
        let a_matrices = some(
            rows.as_ref().unwrap_or(&a_view).matrices(self.transposed[0]),
            "a product is one of matrices",
        )?;
        let ([m, k], [k_b, n]) = (a_matrices.size, b_matrices.size);
        expect(k == k_b && a_matrices.stack() == b_matrices.stack(), "the shapes of the factors do not fit")?;
        expect(bias.is_none_or(|bias| bias.len() == n), "the bias has another length than a row")?;
        let shape = self.shape.clone().unwrap_or_else(|| {
            let leading =
                if rows.is_some() { &a_view.shape()[..a_view.shape().len() - 2] } else { a_matrices.stack() };
            let rows = if rows.is_some() { a_view.shape()[a_view.shape().len() - 2] } else { m };
            leading.iter().copied().chain([rows, n]).map(|n| n as i64).collect()
        });
        let Some(mut output) = context.output(0, shape)? else { return Ok(()) };
        let (_, output) = output.try_extract_tensor_mut::<f32>()?;
        let n_matrices: usize = a_matrices.stack().iter().product();
        let heads = self.heads.unwrap_or(1);
        expect(
            output.len() == n_matrices * m * n && n_matrices.is_multiple_of(heads),
            "the output has another size",
        )?;
        if output.is_empty() {
            return Ok(());
        }
        let steps = self.tile([m, k, n], n_matrices);
        let mut tiles = Vec::new();
        for (i, output) in output.chunks_mut(heads * m * n).enumerate() {
            let mut beside = MatMut::from_row_major_slice_mut(output, m, heads * n);
            for head in 0..heads {
                let (mut below, rest) = beside.split_at_col_mut(n);
                beside = rest;
                let index = i * heads + head;
                let a = some(matrix(a, &a_matrices, index), "the first factor is not where its view says")?;
                let b = some(matrix(b, &b_matrices, index), "the second factor is not where its view says")?;
                for rows in cuts(m, steps[0]) {
                    let (mut right, rest) = below.split_at_row_mut(rows.len());
                    below = rest;
                    for columns in cuts(n, steps[1]) {
                        let (output, rest) = right.split_at_col_mut(columns.len());
                        right = rest;
                        tiles.push(Tile {
                            a: a.subrows(rows.start, rows.len()),
                            b: b.subcols(columns.start, columns.len()),
                            bias: bias.map(|bias| &bias[columns]),
                            output,
                        });
                    }
                }
            }
        }
        each(context, tiles, |tile| tile.compute(self.alpha))
    }

    /// Returns rows and columns of a tile: as large as is good for one thread, smaller if other threads would have nothing to do.
    fn tile(&self, [m, k, n]: [usize; 3], n_matrices: usize) -> [usize; 2] {
        let lengths = [m, n];
        let even = |length: usize, most: usize| length.div_ceil(length.div_ceil(most)).next_multiple_of(EDGE);
        let mut tile = [even(m, TILE[0]), even(n, TILE[1])];
        let count =
            |tile: [usize; 2]| n_matrices * lengths[0].div_ceil(tile[0]) * lengths[1].div_ceil(tile[1]);
        // Tiny products are computed in another order, so a tile must not become one.
        while k >= 8 && count(tile) < 2 * self.threads && self.threads > 1 {
            let longer = usize::from(tile[1].min(n) >= tile[0].min(m));
            if tile[longer] < 2 * EDGE || tile[longer] / 2 * tile[1 - longer] * k < LEAST_WORK {
                break;
            }
            tile[longer] = even(tile[longer], tile[longer].div_ceil(2));
        }
        tile
    }
}

impl Tile<'_> {
    fn compute(self, alpha: f32) {
        let Self { a, b, bias, mut output } = self;
        let (rows, depth) = (a.nrows(), a.ncols());
        let mut accumulate = Accum::Replace;
        if let Some(bias) = bias {
            for row in output.as_mut().row_iter_mut() {
                if let Some(row) = row.try_as_row_major_mut() {
                    row.as_slice_mut().copy_from_slice(bias);
                }
            }
            accumulate = Accum::Add;
        } else if depth == 0 {
            output.fill(0.0);
        }
        // Blocks of about the same depth.
        let step = depth.div_ceil(depth.div_ceil(DEPTH).max(1)).max(1);
        // Columns that are far apart fall on the same lines of the nearest cache; a copy of a block does not.
        let apart = rows + LINE;
        let copies = rows > 1 && a.row_stride() == 1 && a.col_stride() > apart as isize;
        COPY.with_borrow_mut(|copy| {
            if copies && copy.len() < step * apart {
                copy.resize(step * apart, 0.0);
            }
            for start in (0..depth).step_by(step) {
                let n = step.min(depth - start);
                let (mut a, b) = (a.subcols(start, n), b.subrows(start, n));
                if copies {
                    for (column, copy) in a.col_iter().zip(copy.chunks_exact_mut(apart)) {
                        if let Some(column) = column.try_as_col_major() {
                            copy[..rows].copy_from_slice(column.as_slice());
                        }
                    }
                    a = MatRef::from_column_major_slice_with_stride(copy, rows, n, apart);
                }
                matmul(output.as_mut(), accumulate, a, b, alpha, Par::Seq);
                accumulate = Accum::Add;
            }
        });
    }
}

/// Cuts a length into steps; what is left at the end is not smaller than [`EDGE`].
fn cuts(length: usize, step: usize) -> Vec<Range<usize>> {
    let n = if length % step < EDGE { length / step } else { length.div_ceil(step) }.max(1);
    (0..n).map(|i| i * step..if i + 1 == n { length } else { (i + 1) * step }).collect()
}

/// Returns a matrix of a stack, if it lies within the values.
fn matrix<'a>(values: &'a [f32], matrices: &Matrices<'_>, index: usize) -> Option<MatRef<'a, f32>> {
    let ([rows, columns], [row_stride, column_stride]) = (matrices.size, matrices.strides);
    if rows == 0 || columns == 0 {
        return Some(MatRef::from_row_major_slice(&[], rows, columns));
    }
    let values = values.get(matrices.offset(index)..)?;
    let fits = |lines: usize, stride: usize, length: usize| values.len() >= (lines - 1) * stride + length;
    if column_stride == 1 || columns == 1 {
        return fits(rows, row_stride, columns)
            .then(|| MatRef::from_row_major_slice_with_stride(values, rows, columns, row_stride));
    }
    let whole_columns = (row_stride == 1 || rows == 1) && fits(columns, column_stride, rows);
    whole_columns.then(|| MatRef::from_column_major_slice_with_stride(values, rows, columns, column_stride))
}

/// Turns what cannot be missing in a graph of ours into an error all the same: a panic must not reach ONNX Runtime.
fn some<T>(value: Option<T>, what: &str) -> Result<T> {
    value.ok_or_else(|| ort::Error::new(what))
}
