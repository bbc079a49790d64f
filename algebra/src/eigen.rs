//! Eigenvalues and eigenvectors of symmetric matrices.
//!
//! A = V·diag(λ)·Vᵀ in f64: reduction to tridiagonal form by Householder reflections, then divide and conquer for all eigenpairs
//! ([`symmetric_eigen`]) or bisection and inverse iteration for the largest ones ([`largest_eigenpairs`]), whose vectors alone are
//! transformed back. Absolute errors are of the order of the unit round-off times the largest |λ|.

use crate::backend::{Backend, lapack_eigh};
use crate::dense::{refuse_not_finite, to_array, to_mat};
use crate::error::{Error, Result};
use crate::tridiagonal::Tridiagonal;
use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::tridiag::{tridiag_in_place, tridiag_in_place_scratch};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj,
};
use faer::linalg::qr::no_pivoting::factor::recommended_block_size;
use faer::{Conj, Mat, Par};
use ndarray::{Array1, Array2, ArrayView2, s};

/// The largest eigenpairs are computed alone if they are at most this part of all; beyond, all of them are faster.
const FEW: usize = 3;

/// Eigenvalues in descending order, and their eigenvectors as columns.
#[derive(Clone, Debug, PartialEq)]
pub struct Eigen {
    pub values: Array1<f64>,
    pub vectors: Array2<f64>,
}

/// All eigenpairs of a symmetric matrix, of which only the lower triangle is read.
pub fn symmetric_eigen(matrix: ArrayView2<'_, f64>, backend: Backend) -> Result<Eigen> {
    let n = check(matrix, backend)?;
    if n == 0 {
        return Ok(Eigen { values: Array1::zeros(0), vectors: Array2::zeros((0, 0)) });
    }
    let (values, vectors) = match backend {
        Backend::Faer => all_by_faer(matrix)?,
        Backend::Lapack => lapack_eigh(&matrix.as_standard_layout().into_owned())?,
    };
    Ok(Eigen { values: values.slice(s![..;-1]).to_owned(), vectors: vectors.slice(s![.., ..;-1]).to_owned() })
}

/// The `k` largest eigenvalues (not: the largest in magnitude) with their eigenvectors.
pub fn largest_eigenpairs(matrix: ArrayView2<'_, f64>, k: usize, backend: Backend) -> Result<Eigen> {
    let n = check(matrix, backend)?;
    let k = k.min(n);
    if backend == Backend::Faer && k > 0 && k * FEW <= n {
        if let Some(found) = few_by_faer(matrix, k) {
            return Ok(found);
        }
    }
    let all = symmetric_eigen(matrix, backend)?;
    Ok(Eigen {
        values: all.values.slice(s![..k]).to_owned(),
        vectors: all.vectors.slice(s![.., ..k]).to_owned(),
    })
}

fn check(matrix: ArrayView2<'_, f64>, backend: Backend) -> Result<usize> {
    assert_eq!(matrix.nrows(), matrix.ncols(), "a symmetric matrix is square");
    backend.require()?;
    refuse_not_finite(matrix)?;
    Ok(matrix.nrows())
}

fn all_by_faer(matrix: ArrayView2<'_, f64>) -> Result<(Array1<f64>, Array2<f64>)> {
    let n = matrix.nrows();
    let mut values = Diag::<f64>::zeros(n);
    let mut vectors = Mat::<f64>::zeros(n, n);
    let mut memory = MemBuffer::new(self_adjoint_evd_scratch::<f64>(
        n,
        ComputeEigenvectors::Yes,
        Par::Seq,
        Default::default(),
    ));
    self_adjoint_evd(
        to_mat(matrix).as_ref(),
        values.as_mut(),
        Some(vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    )
    .map_err(|_| Error::NoConvergence { what: "eigendecomposition", rows: n, columns: n })?;
    Ok((values.column_vector().iter().copied().collect(), to_array(vectors.as_ref(), n)))
}

/// Nothing if the vectors of the tridiagonal matrix are not good enough.
fn few_by_faer(matrix: ArrayView2<'_, f64>, k: usize) -> Option<Eigen> {
    let n = matrix.nrows();
    // Below that the last reflection has nothing to reflect.
    if n < 3 {
        return None;
    }
    let block = recommended_block_size::<f64>(n, n);
    let mut reduced = to_mat(matrix);
    let mut reflections = Mat::<f64>::zeros(block, n - 1);
    let mut memory = MemBuffer::new(tridiag_in_place_scratch::<f64>(n, Par::Seq, Default::default()));
    tridiag_in_place(
        reduced.as_mut(),
        reflections.as_mut(),
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    );
    let tridiagonal = Tridiagonal {
        diagonal: (0..n).map(|i| reduced[(i, i)]).collect(),
        beside: (1..n).map(|i| reduced[(i, i - 1)]).collect(),
    };
    let (values, columns) = tridiagonal.largest(k)?;
    let mut vectors = Mat::from_fn(n, k, |row, column| columns[column][row]);
    let mut memory =
        MemBuffer::new(apply_block_householder_sequence_on_the_left_in_place_scratch::<f64>(n - 1, block, k));
    apply_block_householder_sequence_on_the_left_in_place_with_conj(
        reduced.as_ref().submatrix(1, 0, n - 1, n - 1),
        reflections.as_ref(),
        Conj::No,
        vectors.as_mut().subrows_mut(1, n - 1),
        Par::Seq,
        MemStack::new(&mut memory),
    );
    Some(Eigen { values: values.into(), vectors: to_array(vectors.as_ref(), k) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::products::gram;
    use crate::testing::{
        departure_from_orthonormal, largest_difference, matrix, naive_product, naive_singular_values,
        on_threads, with_singular_values,
    };
    use proptest::prelude::*;

    fn check_eigen(a: &Array2<f64>, found: &Eigen) {
        let norm = a.iter().fold(f64::MIN_POSITIVE, |x: f64, y| x.max(y.abs())) * a.nrows() as f64;
        assert!(found.values.windows(2).into_iter().all(|pair| pair[0] >= pair[1]));
        assert!(departure_from_orthonormal(found.vectors.view()) < 1e-9);
        let left = naive_product(a.view(), found.vectors.view());
        assert!(largest_difference(&left, &(&found.vectors * &found.values)) < 1e-12 * norm);
    }

    #[test]
    fn eigenvalues_of_a_gram_matrix_are_squared_singular_values() {
        for (rows, n) in [(1, 1), (5, 2), (4, 3), (3, 9), (80, 60), (20, 130)] {
            let a = matrix(rows, n, 3);
            let g = gram(a.view());
            let found = symmetric_eigen(g.view(), Backend::Faer).unwrap();
            check_eigen(&g, &found);
            for (value, singular) in found.values.iter().zip(naive_singular_values(a.view())) {
                assert!((value - singular * singular).abs() < 1e-11 * n as f64);
            }
        }
    }

    #[test]
    fn the_largest_eigenpairs_are_those_of_the_full_decomposition() {
        for (n, k) in [(3, 1), (7, 2), (60, 20), (61, 0), (200, 25), (129, 43), (50, 40), (5, 9)] {
            let a = matrix(n, n, 9);
            let symmetric = &a + &a.t();
            let all = symmetric_eigen(symmetric.view(), Backend::Faer).unwrap();
            let few = largest_eigenpairs(symmetric.view(), k, Backend::Faer).unwrap();
            check_eigen(&symmetric, &few);
            assert_eq!(few.values.len(), k.min(n));
            let difference = (&few.values - &all.values.slice(s![..k.min(n)])).mapv(f64::abs);
            assert!(difference.iter().all(|difference| *difference < 1e-12 * n as f64));
        }
    }

    #[test]
    fn zero_constant_and_rank_deficient_matrices_have_eigenpairs() {
        let zero = Array2::zeros((40, 40));
        let ones = Array2::ones((40, 40));
        let identity = Array2::eye(40);
        let low_rank = gram(with_singular_values(30, 40, &[3.0, 2.0, 1e-9], 4).view());
        for a in [zero, ones, identity, low_rank] {
            check_eigen(&a, &symmetric_eigen(a.view(), Backend::Faer).unwrap());
            check_eigen(&a, &largest_eigenpairs(a.view(), 5, Backend::Faer).unwrap());
        }
        assert_eq!(symmetric_eigen(Array2::zeros((0, 0)).view(), Backend::Faer).unwrap().values.len(), 0);
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        let mut a = Array2::eye(4);
        a[[2, 1]] = f64::NAN;
        assert_eq!(symmetric_eigen(a.view(), Backend::Faer), Err(Error::NotFinite { row: 2, column: 1 }));
    }

    #[test]
    fn bytes_do_not_depend_on_the_number_of_threads() {
        let a = gram(matrix(310, 300, 1).view());
        let all = on_threads(|| {
            let few = largest_eigenpairs(a.view(), 30, Backend::Faer).unwrap();
            (symmetric_eigen(a.view(), Backend::Faer).unwrap(), few)
        });
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[cfg(feature = "lapack")]
    #[test]
    fn the_backends_agree() {
        let a = gram(matrix(120, 90, 2).view());
        let ours = symmetric_eigen(a.view(), Backend::Faer).unwrap();
        let theirs = symmetric_eigen(a.view(), Backend::Lapack).unwrap();
        check_eigen(&a, &theirs);
        assert!((&ours.values - &theirs.values).iter().all(|difference| difference.abs() < 1e-11));
        check_eigen(&a, &largest_eigenpairs(a.view(), 9, Backend::Lapack).unwrap());
    }

    proptest! {
        #[test]
        fn eigenvalues_add_up_to_the_trace(n in 1usize..50, k in 0usize..20, seed in 0u64..1000) {
            let a = matrix(n, n, seed);
            let symmetric = &a + &a.t();
            let all = symmetric_eigen(symmetric.view(), Backend::Faer).unwrap();
            prop_assert!((all.values.sum() - symmetric.diag().sum()).abs() < 1e-11 * n as f64);
            check_eigen(&symmetric, &largest_eigenpairs(symmetric.view(), k, Backend::Faer).unwrap());
        }
    }
}
