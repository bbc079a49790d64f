//! Cholesky factors of symmetric positive definite matrices: A = L·Lᵀ with a lower triangular L, in f64.

use crate::dense::{refuse_not_finite, to_mat};
use crate::error::{Error, Result};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltRegularization, cholesky_in_place, cholesky_in_place_scratch};
use faer::{Par, Spec};
use ndarray::{Array2, ArrayView2};

/// L in standard layout, with zeros above its diagonal. Only the lower triangle of the argument is read.
pub fn cholesky(matrix: ArrayView2<'_, f64>) -> Result<Array2<f64>> {
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
    Ok(Array2::from_shape_fn((n, n), |(row, column)| if column <= row { factor[(row, column)] } else { 0.0 }))
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
    }
}
