//! Between `ndarray` and faer: borrowing where the memory allows it, copying in memory order where it does not.

use crate::element::Element;
use crate::error::{Error, Result};
use faer::{Mat, MatMut, MatRef};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, ShapeBuilder};
use std::borrow::Cow;

/// A view in f64, in its memory order; a copy only where it has to be.
pub(crate) struct Widened<'a> {
    values: Cow<'a, [f64]>,
    rows: usize,
    columns: usize,
    row_major: bool,
}

impl<'a> Widened<'a> {
    pub(crate) fn of<T: Element>(view: ArrayView2<'a, T>) -> Self {
        let (rows, columns) = view.dim();
        let row_major = view.strides()[1] == 1 || view.strides()[0] != 1;
        let ordered = if row_major { view } else { view.reversed_axes() };
        let values = ordered.to_slice().map_or_else(|| gathered(ordered), T::widen_all);
        Self { values, rows, columns, row_major }
    }

    pub(crate) fn matrix(&self) -> MatRef<'_, f64> {
        if self.row_major {
            MatRef::from_row_major_slice(&self.values, self.rows, self.columns)
        } else {
            MatRef::from_column_major_slice(&self.values, self.rows, self.columns)
        }
    }
}

/// The values of a view that has gaps.
fn gathered<'a, T: Element>(view: ArrayView2<'_, T>) -> Cow<'a, [f64]> {
    let mut values = Vec::with_capacity(view.len());
    for lane in view.rows() {
        match lane.to_slice() {
            Some(lane) => values.extend(lane.iter().map(|value| value.widen())),
            None => values.extend(lane.iter().map(|value| value.widen())),
        }
    }
    values.into()
}

/// The memory of a view as a matrix, if it has no gaps.
pub(crate) fn borrow<T>(view: ArrayView2<'_, T>) -> Option<MatRef<'_, T>> {
    let (rows, columns) = view.dim();
    if let Some(values) = view.to_slice() {
        return Some(MatRef::from_row_major_slice(values, rows, columns));
    }
    view.reversed_axes().to_slice().map(|values| MatRef::from_column_major_slice(values, rows, columns))
}

/// A standard-layout part of an array as a matrix to write to.
pub(crate) fn borrow_mut<'a, T>(view: &'a mut ArrayViewMut2<'_, T>) -> MatMut<'a, T> {
    let (rows, columns) = view.dim();
    let values = view.as_slice_mut().expect("panels of rows of an array in standard layout are contiguous");
    MatMut::from_row_major_slice_mut(values, rows, columns)
}

/// The first `columns` columns, column by column in memory.
pub(crate) fn to_array(matrix: MatRef<'_, f64>, columns: usize) -> Array2<f64> {
    let rows = matrix.nrows();
    let mut values = Vec::with_capacity(rows * columns);
    for column in 0..columns {
        values.extend(matrix.col(column).iter());
    }
    Array2::from_shape_vec((rows, columns).f(), values).expect("every column has all rows")
}

/// A copy that faer's decompositions like: column by column.
pub(crate) fn to_mat<T: Element>(view: ArrayView2<'_, T>) -> Mat<f64> {
    let (rows, columns) = view.dim();
    let mut out = Mat::zeros(rows, columns);
    out.copy_from(Widened::of(view).matrix());
    out
}

/// Decompositions of NaN loop forever or return nonsense; they are refused before.
pub(crate) fn refuse_not_finite<T: Element>(view: ArrayView2<'_, T>) -> Result<()> {
    // The common case is one pass over memory, without a branch per element.
    let all_finite = |values: &[T]| values.iter().fold(true, |all, value| all & value.widen().is_finite());
    if view.as_slice_memory_order().is_some_and(all_finite) {
        return Ok(());
    }
    match view.indexed_iter().find(|(_, value)| !value.widen().is_finite()) {
        None => Ok(()),
        Some(((row, column), _)) => Err(Error::NotFinite { row, column }),
    }
}
