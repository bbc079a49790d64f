//! Singular value decompositions, in f64.
//!
//! [`thin_svd`] is exact to round-off. [`truncated_svd`] takes the largest eigenpairs of the smaller Gram matrix, which squares the
//! condition: a singular value σ comes out with a relative error of about ε·(σ₁/σ)², ε the round-off of f64. Where that would matter
//! (σ_k below [`GRAM_LIMIT`]·σ₁, as of matrices of low rank) it falls back to the thin decomposition.

use crate::backend::{Backend, lapack_svd};
use crate::dense::{refuse_not_finite, to_array, to_mat};
use crate::eigen::largest_eigenpairs;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::products::{gram, product};
use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::{Mat, Par, Spec};
use ndarray::{Array1, Array2, ArrayView2, Axis, s};

/// Singular values below this part of the largest one are not taken from a Gram matrix: relative errors stay below 1e-8.
pub(crate) const GRAM_LIMIT: f64 = 1e-4;

/// A = U·diag(σ)·Vᵀ; U and V have orthonormal columns. The signs of pairs of columns are arbitrary, but always the same.
#[derive(Clone, Debug, PartialEq)]
pub struct Svd {
    pub u: Array2<f64>,
    /// In descending order.
    pub values: Array1<f64>,
    pub v: Array2<f64>,
}

impl Svd {
    /// The `k` largest triplets.
    #[must_use]
    pub fn truncated(self, k: usize) -> Self {
        let k = k.min(self.values.len());
        Self {
            u: self.u.slice(s![.., ..k]).to_owned(),
            values: self.values.slice(s![..k]).to_owned(),
            v: self.v.slice(s![.., ..k]).to_owned(),
        }
    }

    /// U·diag(σ)·Vᵀ.
    pub fn reconstructed(&self) -> Array2<f64> {
        product((&self.u * &self.values).view(), self.v.t())
    }

    fn transposed(self) -> Self {
        Self { u: self.v, values: self.values, v: self.u }
    }
}

/// All min(rows, columns) triplets.
pub fn thin_svd<T: Element>(a: ArrayView2<'_, T>, backend: Backend) -> Result<Svd> {
    backend.require()?;
    refuse_not_finite(a)?;
    let (rows, columns) = a.dim();
    let size = rows.min(columns);
    if size == 0 {
        return Ok(Svd {
            u: Array2::zeros((rows, 0)),
            values: Array1::zeros(0),
            v: Array2::zeros((columns, 0)),
        });
    }
    if backend == Backend::Lapack {
        let (u, values, vt) = lapack_svd(&a.mapv(Element::widen))?;
        return Ok(Svd { u, values, v: vt.reversed_axes() });
    }
    let mut values = Diag::<f64>::zeros(size);
    let (mut u, mut v) = (Mat::<f64>::zeros(rows, size), Mat::<f64>::zeros(columns, size));
    let vectors = ComputeSvdVectors::Thin;
    let mut memory =
        MemBuffer::new(svd_scratch::<f64>(rows, columns, vectors, vectors, Par::Seq, Spec::default()));
    svd(
        to_mat(a).as_ref(),
        values.as_mut(),
        Some(u.as_mut()),
        Some(v.as_mut()),
        Par::Seq,
        MemStack::new(&mut memory),
        Spec::default(),
    )
    .map_err(|_| Error::NoConvergence { what: "singular value decomposition", rows, columns })?;
    Ok(Svd {
        u: to_array(u.as_ref(), size),
        values: values.column_vector().iter().copied().collect(),
        v: to_array(v.as_ref(), size),
    })
}

/// The `k` largest triplets, or all if there are fewer.
pub fn truncated_svd<T: Element>(a: ArrayView2<'_, T>, k: usize, backend: Backend) -> Result<Svd> {
    backend.require()?;
    refuse_not_finite(a)?;
    if a.nrows() < a.ncols() {
        return Ok(truncated_tall(a.reversed_axes(), k, backend)?.transposed());
    }
    truncated_tall(a, k, backend)
}

fn truncated_tall<T: Element>(a: ArrayView2<'_, T>, k: usize, backend: Backend) -> Result<Svd> {
    let k = k.min(a.ncols());
    // Symmetric to the bit, and as its transposed it lies in memory as decompositions like it.
    let eigen = largest_eigenpairs(gram(a).t(), k, backend)?;
    let smallest_allowed = eigen.values.first().map_or(0.0, |largest| largest * GRAM_LIMIT * GRAM_LIMIT);
    if eigen.values.last().is_some_and(|smallest| *smallest <= smallest_allowed) {
        return Ok(thin_svd(a, backend)?.truncated(k));
    }
    // σ_i·u_i = A·v_i
    let mut u = product(a, eigen.vectors.view());
    let values: Array1<f64> =
        u.axis_iter(Axis(1)).map(|column| column.iter().map(|x| x * x).sum::<f64>().sqrt()).collect();
    u /= &values;
    Ok(Svd { u, values, v: eigen.vectors })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{
        departure_from_orthonormal, largest_difference, matrix, naive_singular_values, narrow, on_threads,
        with_singular_values,
    };
    use proptest::prelude::*;

    fn check(a: &Array2<f64>, found: &Svd, tolerance: f64) {
        assert!(departure_from_orthonormal(found.u.view()) < 1e-7);
        assert!(departure_from_orthonormal(found.v.view()) < 1e-7);
        let expected = naive_singular_values(a.view());
        for (value, expected) in found.values.iter().zip(&expected) {
            assert!((value - expected).abs() <= tolerance * expected.max(1e-3), "{value} {expected}");
        }
        // The best approximation of its rank (Eckart and Young).
        let rest: f64 = expected[found.values.len()..].iter().map(|value| value * value).sum();
        let difference = a - &found.reconstructed();
        let found_rest: f64 = difference.iter().map(|value| value * value).sum();
        assert!((found_rest.sqrt() - rest.sqrt()).abs() < tolerance * 10.0, "{found_rest} {rest}");
    }

    #[test]
    fn wide_tall_and_square_matrices_are_decomposed() {
        for (rows, columns) in [(1, 1), (1, 9), (9, 1), (17, 17), (40, 12), (12, 40), (130, 31)] {
            let a = matrix(rows, columns, 8);
            check(&a, &thin_svd(a.view(), Backend::Faer).unwrap(), 1e-12);
            for k in [0, 1, rows.min(columns) / 4, rows.min(columns), 99] {
                check(&a, &truncated_svd(a.view(), k, Backend::Faer).unwrap(), 1e-8);
            }
        }
    }

    #[test]
    fn empty_zero_constant_and_rank_deficient_matrices_are_fine() {
        for (rows, columns) in [(0, 0), (0, 3), (3, 0)] {
            let a = Array2::<f64>::zeros((rows, columns));
            assert_eq!(thin_svd(a.view(), Backend::Faer).unwrap().reconstructed(), a);
            assert_eq!(truncated_svd(a.view(), 2, Backend::Faer).unwrap().reconstructed(), a);
        }
        let deficient = with_singular_values(20, 9, &[5.0, 1.0, 1e-7], 3);
        for a in [Array2::zeros((6, 4)), Array2::from_elem((5, 8), 0.25), deficient] {
            check(&a, &thin_svd(a.view(), Backend::Faer).unwrap(), 1e-12);
            for k in [1, 3, 4] {
                check(&a, &truncated_svd(a.view(), k, Backend::Faer).unwrap(), 1e-8);
            }
        }
    }

    #[test]
    fn single_precision_is_widened_first() {
        let a = narrow(matrix(50, 20, 5).view());
        let wide = a.mapv(f64::from);
        let (single, double) = (
            truncated_svd(a.view(), 5, Backend::Faer).unwrap(),
            truncated_svd(wide.view(), 5, Backend::Faer).unwrap(),
        );
        assert_eq!(single, double);
        assert_eq!(thin_svd(a.view(), Backend::Faer).unwrap(), thin_svd(wide.view(), Backend::Faer).unwrap());
    }

    #[test]
    fn infinities_are_refused() {
        let mut a = matrix(3, 2, 1);
        a[[1, 0]] = f64::INFINITY;
        let expected = Err(Error::NotFinite { row: 1, column: 0 });
        assert_eq!(thin_svd(a.view(), Backend::Faer), expected);
        assert_eq!(truncated_svd(a.view(), 1, Backend::Faer), expected);
    }

    #[test]
    fn bytes_do_not_depend_on_the_number_of_threads() {
        let a = narrow(matrix(420, 210, 1).view());
        let all = on_threads(|| {
            let thin = thin_svd(a.view(), Backend::Faer).unwrap();
            (thin, truncated_svd(a.t(), 20, Backend::Faer).unwrap())
        });
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[cfg(feature = "lapack")]
    #[test]
    fn the_backends_agree() {
        for (rows, columns) in [(60, 25), (25, 60), (33, 33)] {
            let a = matrix(rows, columns, 6);
            check(&a, &thin_svd(a.view(), Backend::Lapack).unwrap(), 1e-12);
            check(&a, &truncated_svd(a.view(), 7, Backend::Lapack).unwrap(), 1e-8);
        }
    }

    proptest! {
        #[test]
        fn nothing_is_lost_by_decomposing(rows in 1usize..30, columns in 1usize..30, seed in 0u64..1000) {
            let a = matrix(rows, columns, seed);
            let found = thin_svd(a.view(), Backend::Faer).unwrap();
            prop_assert!(largest_difference(&found.reconstructed(), &a) < 1e-12);
        }

        #[test]
        fn truncation_keeps_the_most(rows in 1usize..30, columns in 1usize..30, k in 0usize..12, seed in 0u64..1000) {
            let a = matrix(rows, columns, seed);
            check(&a, &truncated_svd(a.view(), k, Backend::Faer).unwrap(), 1e-7);
        }
    }
}
