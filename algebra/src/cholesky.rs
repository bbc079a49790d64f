//! Cholesky factors of symmetric positive definite matrices: A = L·Lᵀ with a lower triangular L, in f64; and quotients by them.

use crate::dense::{refuse_not_finite, to_mat};
use crate::error::{Error, Result};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltRegularization, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::cholesky::llt::solve::{solve_in_place, solve_in_place_scratch};
use faer::{Mat, Par, Spec};
use ndarray::{Array2, ArrayView2};

/// L in standard layout, with zeros above its diagonal. Only the lower triangle of the argument is read.
pub fn cholesky(matrix: ArrayView2<'_, f64>) -> Result<Array2<f64>> {
    let n = matrix.nrows();
    let factor = factored(matrix)?;
    Ok(Array2::from_shape_fn((n, n), |(row, column)| if column <= row { factor[(row, column)] } else { 0.0 }))
}

/// B·C⁻¹ of a symmetric positive definite C, by its factor: for a C that is far from singular, many times as fast as by its eigenvalues.
pub fn divide_by_positive_definite(b: ArrayView2<'_, f64>, c: ArrayView2<'_, f64>) -> Result<Array2<f64>> {
    assert_eq!(b.ncols(), c.nrows(), "columns of the dividend must be rows of the divisor");
    refuse_not_finite(b)?;
    let factor = factored(c)?;
    // C·Xᵀ = Bᵀ
    let mut solution = to_mat(b.t());
    let mut memory =
        MemBuffer::new(solve_in_place_scratch::<f64>(factor.nrows(), solution.ncols(), Par::Seq));
    solve_in_place(factor.as_ref(), solution.as_mut(), Par::Seq, MemStack::new(&mut memory));
    Ok(Array2::from_shape_fn(b.dim(), |(row, column)| solution[(column, row)]))
}

/// L in the lower triangle.
fn factored(matrix: ArrayView2<'_, f64>) -> Result<Mat<f64>> {
    assert_eq!(matrix.nrows(), matrix.ncols(), "a symmetric matrix is square");
    refuse_not_finite(matrix)?;
    let n = matrix.nrows();
    let mut factor = to_mat(matrix);
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f64>(n, Par::Seq, Spec::default()));
    cholesky_in_place(
        factor.as_mut(),
        LltRegularization::default(),
        Par::Seq,
        MemStack::new(&mut memory),
        Spec::default(),
    )
    .map_err(|_| Error::NotPositiveDefinite { rows: n })?;
    Ok(factor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::products::gram;
    use crate::testing::{largest_difference, matrix, naive_product, on_threads};

    #[test]
    fn the_factor_times_its_transpose_is_the_matrix() {
        for n in [0, 1, 2, 7, 64, 65, 150] {
            let a = gram(matrix(n + 5, n, 3).view()) + Array2::<f64>::eye(n) * 1e-3;
            let l = cholesky(a.view()).unwrap();
            assert!(
                largest_difference(&naive_product(l.view(), l.t()), &a) < 1e-12 * (n as f64 + 1.0),
                "{n}"
            );
            assert!(l.indexed_iter().all(|((row, column), value)| column <= row || *value == 0.0));
            assert!((0..n).all(|i| l[[i, i]] > 0.0));
        }
    }

    #[test]
    fn dividing_undoes_multiplying() {
        for (rows, n) in [(0, 3), (3, 0), (1, 1), (5, 7), (7, 5), (64, 65), (3, 150)] {
            let c = gram(matrix(n + 5, n, 3).view()) + Array2::<f64>::eye(n);
            let b = matrix(rows, n, 4);
            let product = naive_product(b.view(), c.view());
            let found = divide_by_positive_definite(product.view(), c.view()).unwrap();
            assert!(largest_difference(&found, &b) < 1e-9, "{rows} × {n}");
        }
        let indefinite = ndarray::array![[1.0, 2.0], [2.0, 1.0]];
        let refused = divide_by_positive_definite(indefinite.view(), indefinite.view());
        assert_eq!(refused, Err(Error::NotPositiveDefinite { rows: 2 }));
    }

    #[test]
    fn what_has_no_factor_is_refused() {
        let indefinite = ndarray::array![[1.0, 2.0], [2.0, 1.0]];
        assert_eq!(cholesky(indefinite.view()), Err(Error::NotPositiveDefinite { rows: 2 }));
        let zero = Array2::zeros((3, 3));
        assert_eq!(cholesky(zero.view()), Err(Error::NotPositiveDefinite { rows: 3 }));
        let broken = ndarray::array![[1.0, 0.0], [f64::NAN, 1.0]];
        assert_eq!(cholesky(broken.view()), Err(Error::NotFinite { row: 1, column: 0 }));
    }

    #[test]
    fn bytes_do_not_depend_on_the_number_of_threads() {
        let a = gram(matrix(210, 200, 2).view());
        let all = on_threads(|| cholesky(a.view()).unwrap());
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
        let b = matrix(33, 200, 3);
        let all = on_threads(|| divide_by_positive_definite(b.view(), a.view()).unwrap());
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
