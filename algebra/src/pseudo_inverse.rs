//! Pseudo-inverses with a stated cut-off.
//!
//! As in `torch.linalg.pinv`, singular values σ ≤ `cut_off`·σ₁ count as zero. On matrices that are nearly singular the result
//! depends on the cut-off far more than on round-off; [`default_cut_off`] is that of torch for a matrix of f32, although the
//! arithmetic here is f64.

use crate::backend::Backend;
use crate::eigen::symmetric_eigen;
use crate::element::Element;
use crate::error::Result;
use crate::products::product;
use crate::svd::thin_svd;
use ndarray::{Array2, ArrayView2, s};

/// max(rows, columns)·ε, with the ε of f32.
pub fn default_cut_off(rows: usize, columns: usize) -> f64 {
    rows.max(columns) as f64 * f64::from(f32::EPSILON)
}

/// A⁺, columns × rows.
pub fn pseudo_inverse<T: Element>(
    a: ArrayView2<'_, T>,
    cut_off: f64,
    backend: Backend,
) -> Result<Array2<f64>> {
    let svd = thin_svd(a, backend)?;
    let largest = svd.values.first().copied().unwrap_or(0.0);
    let rank = svd.values.iter().take_while(|value| **value > cut_off * largest).count();
    let scaled = &svd.v.slice(s![.., ..rank]) / &svd.values.slice(s![..rank]);
    Ok(product(scaled.view(), svd.u.slice(s![.., ..rank]).t()))
}

/// B·C⁺ and what the cut-off did.
#[derive(Clone, Debug, PartialEq)]
pub struct Divided {
    pub quotient: Array2<f64>,
    /// Eigenvalues of C above the cut-off.
    pub rank: usize,
}

/// B·C⁺ of a symmetric C, without forming C⁺; eigenvalues with |λ| ≤ `cut_off`·max|λ| count as zero.
pub fn divide_by_symmetric(
    b: ArrayView2<'_, f64>,
    c: ArrayView2<'_, f64>,
    cut_off: f64,
    backend: Backend,
) -> Result<Divided> {
    assert_eq!(b.ncols(), c.nrows(), "columns of the dividend must be rows of the divisor");
    let eigen = symmetric_eigen(c, backend)?;
    let largest = eigen.values.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
    let kept: Vec<usize> =
        (0..eigen.values.len()).filter(|index| eigen.values[*index].abs() > cut_off * largest).collect();
    let vectors = eigen.vectors.select(ndarray::Axis(1), &kept);
    let values = eigen.values.select(ndarray::Axis(0), &kept);
    let coordinates = product(b, vectors.view()) / &values;
    Ok(Divided { quotient: product(coordinates.view(), vectors.t()), rank: kept.len() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::products::gram;
    use crate::testing::{largest_difference, matrix, naive_product, on_threads, with_singular_values};
    use proptest::prelude::*;

    /// The four conditions of Penrose that define A⁺.
    fn check(a: ArrayView2<'_, f64>, inverse: &Array2<f64>, tolerance: f64) {
        let left = naive_product(a, inverse.view());
        let right = naive_product(inverse.view(), a);
        assert!(largest_difference(&naive_product(left.view(), a), &a.to_owned()) < tolerance);
        let back = naive_product(right.view(), inverse.view());
        assert!(largest_difference(&back, inverse) < tolerance * 100.0);
        assert!(largest_difference(&left, &left.t().to_owned()) < tolerance);
        assert!(largest_difference(&right, &right.t().to_owned()) < tolerance);
    }

    #[test]
    fn the_conditions_of_penrose_hold() {
        let deficient = with_singular_values(12, 7, &[2.0, 1.0, 0.1], 3);
        for a in [
            matrix(1, 1, 1),
            matrix(9, 4, 1),
            matrix(4, 9, 1),
            deficient,
            Array2::ones((3, 5)),
            Array2::zeros((3, 2)),
        ] {
            check(a.view(), &pseudo_inverse(a.view(), 1e-10, Backend::Faer).unwrap(), 1e-10);
        }
        assert_eq!(pseudo_inverse(matrix(0, 3, 1).view(), 1e-10, Backend::Faer).unwrap().dim(), (3, 0));
    }

    #[test]
    fn what_is_below_the_cut_off_counts_as_zero() {
        let a = with_singular_values(9, 9, &[1.0, 1e-3, 1e-6], 4);
        let cut = with_singular_values(9, 9, &[1.0, 1e-3, 0.0], 4);
        let inverse = pseudo_inverse(a.view(), 1e-4, Backend::Faer).unwrap();
        check(cut.view(), &inverse, 1e-5);
        assert!((default_cut_off(128, 512) - 6.103_515_625e-5).abs() < 1e-18);
    }

    #[test]
    fn dividing_is_multiplying_by_the_pseudo_inverse() {
        for (rows, n, rank) in [(1, 1, 1), (5, 8, 8), (8, 5, 2), (3, 6, 0), (0, 4, 2), (3, 0, 0)] {
            let values: Vec<f64> = (0..rank).map(|i| 1.0 / (1.0 + f64::from(i))).collect();
            let c = gram(with_singular_values(n.max(rank as usize), n, &values, 7).view());
            let b = matrix(rows, n, 8);
            let found = divide_by_symmetric(b.view(), c.view(), 1e-12, Backend::Faer).unwrap();
            let inverse = pseudo_inverse(c.view(), 1e-12, Backend::Faer).unwrap();
            assert!(largest_difference(&found.quotient, &naive_product(b.view(), inverse.view())) < 1e-9);
            assert_eq!(found.rank, rank as usize);
        }
    }

    #[test]
    fn bytes_do_not_depend_on_the_number_of_threads() {
        let (b, c) = (matrix(300, 200, 1), gram(matrix(210, 200, 2).view()));
        let all = on_threads(|| divide_by_symmetric(b.view(), c.view(), 1e-9, Backend::Faer).unwrap());
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    }

    proptest! {
        #[test]
        fn dividing_by_an_invertible_matrix_undoes_multiplying(rows in 1usize..12, n in 1usize..12, seed in 0u64..1000) {
            let c = gram(matrix(n, n, seed).view()) + Array2::<f64>::eye(n);
            let b = matrix(rows, n, seed + 1);
            let found = divide_by_symmetric(naive_product(b.view(), c.view()).view(), c.view(), 1e-12, Backend::Faer).unwrap();
            prop_assert!(largest_difference(&found.quotient, &b) < 1e-9);
        }
    }
}
