//! What the tests of this crate share: made-up matrices, and references from the definitions.

use ndarray::{Array1, Array2, ArrayView2};

/// Values in -1..1, a function of (seed, element) only.
pub(crate) fn matrix(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
    let mut index = 0u64;
    Array2::from_shape_simple_fn((rows, columns), || {
        index += 1;
        let mut z = (seed << 32).wrapping_add(index).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    })
}

/// U·diag(σ)·Vᵀ with orthonormal U and V by Gram-Schmidt.
pub(crate) fn with_singular_values(rows: usize, columns: usize, values: &[f64], seed: u64) -> Array2<f64> {
    let u = gram_schmidt(matrix(rows, values.len(), seed));
    let v = gram_schmidt(matrix(columns, values.len(), seed + 77));
    let scaled = u * &Array1::from(values.to_vec());
    naive_product(scaled.view(), v.t())
}

pub(crate) fn gram_schmidt(mut a: Array2<f64>) -> Array2<f64> {
    for _ in 0..2 {
        for column in 0..a.ncols() {
            for earlier in 0..column {
                let dot = a.column(column).dot(&a.column(earlier));
                let along = a.column(earlier).to_owned() * dot;
                let mut target = a.column_mut(column);
                target -= &along;
            }
            let norm = a.column(column).dot(&a.column(column)).sqrt();
            a.column_mut(column).mapv_inplace(|value| value / norm);
        }
    }
    a
}

pub(crate) fn naive_product(a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>) -> Array2<f64> {
    Array2::from_shape_fn((a.nrows(), b.ncols()), |(i, j)| {
        (0..a.ncols()).map(|k| a[[i, k]] * b[[k, j]]).sum()
    })
}

pub(crate) fn narrow(a: ArrayView2<'_, f64>) -> Array2<f32> {
    a.mapv(|value| value as f32)
}

pub(crate) fn largest_difference(a: &Array2<f64>, b: &Array2<f64>) -> f64 {
    assert_eq!(a.dim(), b.dim());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, |x: f64, y| if y.is_nan() { y } else { x.max(y) })
}

/// ‖QᵀQ − I‖ in the largest entry.
pub(crate) fn departure_from_orthonormal(q: ArrayView2<'_, f64>) -> f64 {
    largest_difference(&naive_product(q.t(), q), &Array2::eye(q.ncols()))
}

/// The same on 1, 2 and 8 threads.
pub(crate) fn on_threads<R: Send>(work: impl Fn() -> R + Sync) -> Vec<R> {
    [1, 2, 8]
        .map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(&work)
        })
        .into()
}

/// Singular values in descending order by one-sided Jacobi rotations: slow, simple, and accurate.
pub(crate) fn naive_singular_values(a: ArrayView2<'_, f64>) -> Vec<f64> {
    let mut a = if a.nrows() >= a.ncols() { a.to_owned() } else { a.t().to_owned() };
    for _ in 0..60 {
        let mut rotated = false;
        for p in 0..a.ncols() {
            for q in p + 1..a.ncols() {
                let (x, y) = (a.column(p).to_owned(), a.column(q).to_owned());
                let (alpha, beta, gamma) = (x.dot(&x), y.dot(&y), x.dot(&y));
                if gamma.abs() <= 1e-16 * (alpha * beta).sqrt() || gamma == 0.0 {
                    continue;
                }
                rotated = true;
                let zeta = (beta - alpha) / (2.0 * gamma);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let c = 1.0 / (1.0 + t * t).sqrt();
                let s = c * t;
                a.column_mut(p).assign(&(&x * c - &y * s));
                a.column_mut(q).assign(&(&x * s + &y * c));
            }
        }
        if !rotated {
            break;
        }
    }
    let mut values: Vec<f64> = a.columns().into_iter().map(|column| column.dot(&column).sqrt()).collect();
    values.sort_by(|x, y| y.total_cmp(x));
    values
}
