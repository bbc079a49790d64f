//! Orthonormal bases of column spaces.

use crate::dense::to_array;
use crate::error::Result;
use crate::{Element, dense};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj,
};
use faer::linalg::qr::no_pivoting::factor::{qr_in_place, qr_in_place_scratch, recommended_block_size};
use faer::{Conj, Mat, Par};
use ndarray::{Array2, ArrayView2};

/// Q of a QR decomposition by Householder reflections: min(rows, columns) orthonormal columns whose span contains that of the
/// columns of `a`, whatever its rank.
pub fn orthonormal_basis<T: Element>(a: ArrayView2<'_, T>) -> Result<Array2<f64>> {
    dense::refuse_not_finite(a)?;
    let (rows, columns) = a.dim();
    let size = rows.min(columns);
    if size == 0 {
        return Ok(Array2::zeros((rows, 0)));
    }
    let block = recommended_block_size::<f64>(rows, columns);
    let mut factors = dense::to_mat(a);
    let mut reflections = Mat::<f64>::zeros(block, size);
    let scratch = qr_in_place_scratch::<f64>(rows, columns, block, Par::Seq, Default::default());
    let mut memory = MemBuffer::new(scratch);
    qr_in_place(
        factors.as_mut(),
        reflections.as_mut(),
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    );
    let mut q = Mat::from_fn(rows, size, |row, column| if row == column { 1.0 } else { 0.0 });
    let scratch = apply_block_householder_sequence_on_the_left_in_place_scratch::<f64>(rows, block, size);
    let mut memory = MemBuffer::new(scratch);
    apply_block_householder_sequence_on_the_left_in_place_with_conj(
        factors.as_ref().subcols(0, size),
        reflections.as_ref(),
        Conj::No,
        q.as_mut(),
        Par::Seq,
        MemStack::new(&mut memory),
    );
    Ok(to_array(q.as_ref(), size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{
        departure_from_orthonormal, largest_difference, matrix, naive_product, with_singular_values,
    };

    #[test]
    fn the_basis_is_orthonormal_and_spans_the_columns() {
        let deficient = with_singular_values(30, 12, &[1.0, 0.5], 2);
        for a in [
            matrix(1, 1, 1),
            matrix(40, 7, 1),
            matrix(7, 40, 1),
            matrix(33, 33, 1),
            deficient,
            Array2::zeros((5, 2)),
        ] {
            let q = orthonormal_basis(a.view()).unwrap();
            assert_eq!(q.dim(), (a.nrows(), a.nrows().min(a.ncols())));
            assert!(departure_from_orthonormal(q.view()) < 1e-13);
            let projected = naive_product(q.view(), naive_product(q.t(), a.view()).view());
            assert!(largest_difference(&projected, &a) < 1e-13);
        }
        assert_eq!(orthonormal_basis(matrix(4, 0, 1).view()).unwrap().dim(), (4, 0));
        assert_eq!(orthonormal_basis(matrix(0, 4, 1).view()).unwrap().dim(), (0, 0));
    }
}
