//! Polar factors: the nearest matrix with orthonormal columns (or rows).
//!
//! A = U·diag(σ)·Vᵀ has the polar factor P = U·Vᵀ = A·(AᵀA)^(-1/2), for which no singular vectors have to be computed: one
//! eigendecomposition of the smaller Gram matrix is enough. Directions of A whose σ vanishes have no counterpart in P, which then
//! is a partial isometry; an SVD would fill them with arbitrary orthonormal vectors.
//!
//! The Gram matrix squares the condition: P comes out with an error of about ε·(σ₁/σ_min)². Below [`GRAM_LIMIT`] the singular
//! value decomposition takes over, which also finds the rank reliably.

use crate::backend::Backend;
use crate::dense::refuse_not_finite;
use crate::eigen::symmetric_eigen;
use crate::element::Element;
use crate::error::Result;
use crate::products::{gram, product};
use crate::svd::{GRAM_LIMIT, thin_svd};
use ndarray::{Array2, ArrayView2, s};

/// A polar factor, and what falls out on the way.
#[derive(Clone, Debug, PartialEq)]
pub struct Polar {
    /// U·Vᵀ over the directions that were kept.
    pub factor: Array2<f64>,
    /// Σσ, which is ⟨P, A⟩.
    pub nuclear_norm: f64,
    /// Directions that were kept.
    pub rank: usize,
}

/// The polar factor of `a`; directions with σ ≤ `cut_off`·σ₁ are left out.
pub fn polar_factor<T: Element>(a: ArrayView2<'_, T>, cut_off: f64, backend: Backend) -> Result<Polar> {
    backend.require()?;
    refuse_not_finite(a)?;
    if a.nrows() < a.ncols() {
        let polar = polar_of_tall(a.reversed_axes(), cut_off, backend)?;
        return Ok(Polar { factor: polar.factor.reversed_axes().as_standard_layout().into_owned(), ..polar });
    }
    polar_of_tall(a, cut_off, backend)
}

fn polar_of_tall<T: Element>(a: ArrayView2<'_, T>, cut_off: f64, backend: Backend) -> Result<Polar> {
    let n = a.ncols();
    // Symmetric to the bit, and as its transposed it lies in memory as decompositions like it.
    let eigen = symmetric_eigen(gram(a).t(), backend)?;
    let (Some(largest), Some(smallest)) = (eigen.values.first(), eigen.values.last()) else {
        return Ok(Polar { factor: Array2::zeros(a.raw_dim()), nuclear_norm: 0.0, rank: 0 });
    };
    let limit = GRAM_LIMIT.max(cut_off);
    if *smallest <= largest * limit * limit {
        let svd = thin_svd(a, backend)?;
        let largest = svd.values[0];
        let rank = svd.values.iter().take_while(|value| **value > largest * cut_off).count();
        let factor = product(svd.u.slice(s![.., ..rank]), svd.v.slice(s![.., ..rank]).t());
        return Ok(Polar { factor, nuclear_norm: svd.values.sum(), rank });
    }
    let roots = eigen.values.mapv(f64::sqrt);
    let inverse_root = product((&eigen.vectors / &roots).view(), eigen.vectors.t());
    Ok(Polar { factor: product(a, inverse_root.view()), nuclear_norm: roots.sum(), rank: n })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::testing::{
        departure_from_orthonormal, largest_difference, matrix, naive_product, naive_singular_values, narrow,
        on_threads, with_singular_values,
    };
    use proptest::prelude::*;

    const CUT_OFF: f64 = 1e-9;

    #[test]
    fn the_factor_is_orthonormal_and_what_is_left_is_symmetric_and_positive() {
        for (rows, columns) in [(1, 1), (7, 1), (1, 7), (20, 13), (13, 20), (40, 40)] {
            let a = matrix(rows, columns, 2);
            let polar = polar_factor(a.view(), CUT_OFF, Backend::Faer).unwrap();
            assert_eq!(polar.rank, rows.min(columns));
            let (factor, tall) =
                if rows >= columns { (polar.factor.view(), a.view()) } else { (polar.factor.t(), a.t()) };
            assert!(departure_from_orthonormal(factor) < 1e-8);
            let rest = naive_product(factor.t(), tall);
            assert!(largest_difference(&rest, &rest.t().to_owned()) < 1e-8);
            assert!((rest.diag().sum() - polar.nuclear_norm).abs() < 1e-8);
            let singular: f64 = naive_singular_values(a.view()).iter().sum();
            assert!((singular - polar.nuclear_norm).abs() < 1e-8);
        }
    }

    #[test]
    fn rank_deficient_matrices_give_a_partial_isometry() {
        for values in [&[3.0, 2.0][..], &[1.0, 1e-3, 1e-6], &[]] {
            let a = with_singular_values(15, 9, values, 5);
            for a in [a.view(), a.t()] {
                let polar = polar_factor(a, CUT_OFF, Backend::Faer).unwrap();
                assert_eq!(polar.rank, values.len());
                let singular = naive_singular_values(polar.factor.view());
                for (index, value) in singular.iter().enumerate() {
                    let expected = f64::from(u8::from(index < values.len()));
                    assert!((value - expected).abs() < 1e-7, "{singular:?}");
                }
            }
        }
        let cut = with_singular_values(15, 9, &[1.0, 1e-3, 1e-6], 5);
        assert_eq!(polar_factor(cut.view(), 1e-2, Backend::Faer).unwrap().rank, 1);
    }

    #[test]
    fn a_constant_matrix_has_the_direction_of_its_constant() {
        let polar = polar_factor(Array2::from_elem((4, 9), -0.5f32).view(), CUT_OFF, Backend::Faer).unwrap();
        assert_eq!(polar.rank, 1);
        assert!(largest_difference(&polar.factor, &Array2::from_elem((4, 9), -1.0 / 6.0)) < 1e-14);
    }

    #[test]
    fn empty_matrices_are_fine_and_nan_is_refused() {
        for shape in [(0, 0), (0, 5), (5, 0)] {
            let polar = polar_factor(Array2::<f32>::zeros(shape).view(), CUT_OFF, Backend::Faer).unwrap();
            assert_eq!((polar.factor.dim(), polar.rank), (shape, 0));
        }
        let nan = Array2::from_elem((2, 2), f32::NAN);
        let expected = Err(Error::NotFinite { row: 0, column: 0 });
        assert_eq!(polar_factor(nan.view(), CUT_OFF, Backend::Faer), expected);
    }

    #[test]
    fn bytes_do_not_depend_on_the_number_of_threads() {
        let a = narrow(matrix(400, 200, 1).view());
        let all = on_threads(|| polar_factor(a.view(), CUT_OFF, Backend::Faer).unwrap());
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[cfg(feature = "lapack")]
    #[test]
    fn the_backends_agree() {
        for (rows, columns) in [(60, 25), (25, 60), (33, 33)] {
            let a = matrix(rows, columns, 6);
            let ours = polar_factor(a.view(), CUT_OFF, Backend::Faer).unwrap();
            let theirs = polar_factor(a.view(), CUT_OFF, Backend::Lapack).unwrap();
            assert!(largest_difference(&ours.factor, &theirs.factor) < 1e-9);
        }
    }

    proptest! {
        #[test]
        fn the_factor_of_the_transposed_is_the_factor_transposed(rows in 1usize..25, columns in 1usize..25, seed in 0u64..1000) {
            let a = matrix(rows, columns, seed);
            let one = polar_factor(a.view(), CUT_OFF, Backend::Faer).unwrap();
            let other = polar_factor(a.t(), CUT_OFF, Backend::Faer).unwrap();
            prop_assert!(largest_difference(&one.factor, &other.factor.t().to_owned()) < 1e-6);
        }

        #[test]
        fn scaling_does_not_change_the_factor(scale in 1e-6f64..1e6, seed in 0u64..1000) {
            let a = matrix(12, 8, seed);
            let one = polar_factor(a.view(), CUT_OFF, Backend::Faer).unwrap();
            let other = polar_factor((&a * scale).view(), CUT_OFF, Backend::Faer).unwrap();
            prop_assert!(largest_difference(&one.factor, &other.factor) < 1e-7);
        }
    }
}
