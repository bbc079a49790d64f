//! Randomized singular value decomposition with a stated error.
//!
//! Q = an orthonormal basis of (A·Aᵀ)^q·A·Ω for a Gaussian Ω of k + p columns, orthonormalized after every product; then the exact
//! decomposition of the small QᵀA (Halko, Martinsson, Tropp, SIAM Review 53, 2011, algorithms 4.4 and 5.1). Ω comes from a
//! counter: entry (i, j) is a function of the seed and of (i, j) alone.
//!
//! Two errors are stated. The residual in the Frobenius norm is exact, because ‖A‖_F is known: ‖A − UΣVᵀ‖² = ‖A‖² − Σσ² (to about
//! 1e-8·‖A‖: it is a difference of squares). The spectral norm of what the basis misses is bounded a posteriori by section 4.3
//! there: 10·√(2/π)·max_i ‖(I − QQᵀ)A·ω_i‖ over [`PROBES`] further Gaussian vectors holds with probability 1 − 10^-PROBES.

use crate::backend::Backend;
use crate::dense::refuse_not_finite;
use crate::element::Element;
use crate::error::Result;
use crate::orthonormal::orthonormal_basis;
use crate::products::{frobenius_squared, product};
use crate::svd::{Svd, thin_svd};
use ndarray::{Array2, ArrayView2};

/// Gaussian vectors for the a-posteriori bound.
const PROBES: usize = 10;

/// How a randomized decomposition is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RandomizedOptions {
    /// Triplets to return.
    pub rank: usize,
    /// Further columns of the basis, p; 10 is usual.
    pub oversampling: usize,
    /// q; 1 or 2 if singular values decay slowly.
    pub power_iterations: usize,
    pub seed: u64,
}

/// A decomposition and its errors.
#[derive(Clone, Debug, PartialEq)]
pub struct Randomized {
    pub svd: Svd,
    /// ‖A − UΣVᵀ‖_F.
    pub residual: f64,
    /// ‖A‖_F.
    pub norm: f64,
    /// Bound of the spectral norm of (I − QQᵀ)A, what the basis of `rank` + `oversampling` columns misses.
    pub spectral_bound: f64,
}

/// The `rank` largest triplets, approximately.
pub fn randomized_svd<T: Element>(
    a: ArrayView2<'_, T>,
    options: RandomizedOptions,
    backend: Backend,
) -> Result<Randomized> {
    backend.require()?;
    refuse_not_finite(a)?;
    let (rows, columns) = a.dim();
    let width = options.rank.saturating_add(options.oversampling).min(rows).min(columns);
    let mut basis = orthonormal_basis(product(a, gaussian(columns, width, options.seed, 0).view()).view())?;
    for _ in 0..options.power_iterations {
        let back = orthonormal_basis(product(a.t(), basis.view()).view())?;
        basis = orthonormal_basis(product(a, back.view()).view())?;
    }
    let small = thin_svd(product(basis.t(), a).view(), backend)?.truncated(options.rank);
    let svd = Svd { u: product(basis.view(), small.u.view()), values: small.values, v: small.v };

    let probes = product(a, gaussian(columns, PROBES, options.seed, 1).view());
    let missed = &probes - &product(basis.view(), product(basis.t(), probes.view()).view());
    let largest = missed.columns().into_iter().map(|column| column.dot(&column).sqrt()).fold(0.0, f64::max);
    let norm_squared = frobenius_squared(a);
    let kept: f64 = svd.values.iter().map(|value| value * value).sum();
    Ok(Randomized {
        svd,
        residual: (norm_squared - kept).max(0.0).sqrt(),
        norm: norm_squared.sqrt(),
        spectral_bound: 10.0 * (2.0 / std::f64::consts::PI).sqrt() * largest,
    })
}

/// Independent standard normal entries, each a function of (seed, stream, row, column).
fn gaussian(rows: usize, columns: usize, seed: u64, stream: u64) -> Array2<f64> {
    let key = mixed(seed ^ mixed(stream.wrapping_add(1)));
    Array2::from_shape_fn((rows, columns), |(row, column)| {
        // Box and Muller; the first uniform value is never 0.
        let counter = mixed(key ^ mixed(row as u64)).wrapping_add(column as u64);
        let (first, second) = (mixed(counter), mixed(counter ^ 0xA5A5_5A5A_F00D_CAFE));
        let radius = (-2.0 * (((first >> 11) as f64 + 1.0) / 9_007_199_254_740_993.0).ln()).sqrt();
        radius * (std::f64::consts::TAU * ((second >> 11) as f64 / 9_007_199_254_740_992.0)).cos()
    })
}

/// splitmix64 (Steele, Lea, Flood 2014).
fn mixed(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{
        departure_from_orthonormal, matrix, naive_product, naive_singular_values, narrow, on_threads,
        with_singular_values,
    };
    use proptest::prelude::*;

    fn options(rank: usize) -> RandomizedOptions {
        RandomizedOptions { rank, oversampling: 8, power_iterations: 2, seed: 7 }
    }

    #[test]
    fn a_matrix_of_low_rank_is_found_exactly() {
        let a = with_singular_values(50, 40, &[4.0, 2.0, 1.0], 1);
        let found = randomized_svd(a.view(), options(3), Backend::Faer).unwrap();
        for (value, expected) in found.svd.values.iter().zip([4.0, 2.0, 1.0]) {
            assert!((value - expected).abs() < 1e-12);
        }
        assert!(found.residual < 1e-6 && found.spectral_bound < 1e-10, "{found:?}");
        assert!((found.norm - 21.0f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn stated_errors_hold() {
        let values: Vec<f64> = (0..40).map(|i| 0.8f64.powi(i)).collect();
        let a = with_singular_values(60, 45, &values, 1);
        for power_iterations in 0..3 {
            for seed in 0..5 {
                let options = RandomizedOptions { rank: 6, oversampling: 4, power_iterations, seed };
                let found = randomized_svd(a.view(), options, Backend::Faer).unwrap();
                assert!(departure_from_orthonormal(found.svd.u.view()) < 1e-12);
                assert!(departure_from_orthonormal(found.svd.v.view()) < 1e-12);
                let scaled = &found.svd.u * &found.svd.values;
                let difference = &a - &naive_product(scaled.view(), found.svd.v.t());
                let residual = difference.iter().map(|x| x * x).sum::<f64>().sqrt();
                assert!((residual - found.residual).abs() < 1e-9);
                // What 10 columns miss is no larger than the bound, and no smaller than the 11th singular value.
                let spectral = naive_singular_values(difference.view())[0];
                assert!(spectral <= found.spectral_bound + found.svd.values[5]);
                assert!(found.spectral_bound >= values[10]);
            }
        }
    }

    #[test]
    fn empty_zero_constant_and_full_rank_matrices_are_fine() {
        for (rows, columns) in [(0, 0), (0, 4), (4, 0), (1, 1), (3, 9), (9, 3)] {
            for a in [matrix(rows, columns, 3), Array2::zeros((rows, columns)), Array2::ones((rows, columns))]
            {
                let found = randomized_svd(a.view(), options(100), Backend::Faer).unwrap();
                assert_eq!(found.svd.values.len(), rows.min(columns));
                assert!(found.residual < 1e-6);
                assert!(randomized_svd(a.view(), options(0), Backend::Faer).unwrap().svd.values.is_empty());
            }
        }
    }

    #[test]
    fn the_seed_decides_and_threads_do_not() {
        let a = narrow(matrix(300, 220, 1).view());
        let all = on_threads(|| randomized_svd(a.view(), options(10), Backend::Faer).unwrap());
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
        let other = RandomizedOptions { seed: 8, ..options(10) };
        assert_ne!(all[0], randomized_svd(a.view(), other, Backend::Faer).unwrap());
    }

    #[test]
    fn the_generator_is_standard_normal() {
        let values = gaussian(200, 100, 3, 0);
        let n = values.len() as f64;
        let mean = values.sum() / n;
        let variance = values.mapv(|x| x * x).sum() / n;
        let fourth = values.mapv(|x| x.powi(4)).sum() / n;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05 && (fourth - 3.0).abs() < 0.3);
        assert_eq!(values[[3, 4]], gaussian(4, 5, 3, 0)[[3, 4]]);
        assert_ne!(values[[3, 4]], gaussian(4, 5, 3, 1)[[3, 4]]);
    }

    proptest! {
        #[test]
        fn no_approximation_beats_the_best_one(rows in 1usize..30, columns in 1usize..30, rank in 0usize..10, seed in 0u64..1000) {
            let a = matrix(rows, columns, seed);
            let found = randomized_svd(a.view(), RandomizedOptions { seed, ..options(rank) }, Backend::Faer).unwrap();
            let best: f64 = naive_singular_values(a.view()).iter().skip(rank).map(|value| value * value).sum();
            prop_assert!(found.residual >= best.sqrt() - 1e-6);
            prop_assert!(found.residual <= best.sqrt() * 1.6 + 1e-6);
        }
    }
}
