//! Matrix products and Gram matrices.
//!
//! Transposed operands are transposed views (`a.t()`). Every panel of [`PANEL`] output rows is computed by one thread in one order,
//! whatever the number of threads.

use crate::dense::{Widened, borrow, borrow_mut};
use crate::element::Element;
use faer::linalg::matmul::matmul;
use faer::{Accum, Par};
use ndarray::parallel::prelude::*;
use ndarray::{Array2, ArrayView2, Axis, s};

/// Rows of the output that one thread computes.
const PANEL: usize = 192;

/// Rows of the argument that a Gram matrix takes in at a time: what is widened stays in the cache.
const DEPTH: usize = 384;

/// A·B in f64.
pub fn product<A: Element, B: Element>(a: ArrayView2<'_, A>, b: ArrayView2<'_, B>) -> Array2<f64> {
    assert_eq!(a.ncols(), b.nrows(), "columns of the left factor must be rows of the right one");
    let b = Widened::of(b);
    let mut out = Array2::zeros((a.nrows(), b.matrix().ncols()));
    out.axis_chunks_iter_mut(Axis(0), PANEL).into_par_iter().enumerate().for_each(|(index, mut panel)| {
        let rows = panel.nrows();
        let a = Widened::of(a.slice(s![index * PANEL..index * PANEL + rows, ..]));
        matmul(borrow_mut(&mut panel), Accum::Replace, a.matrix(), b.matrix(), 1.0, Par::Seq);
    });
    out
}

/// A·B in f32 arithmetic: for products that are the last step and not decomposed any more.
///
/// The relative error grows with the square root of the inner dimension: about 1e-6 at 1000.
pub fn product_f32(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> Array2<f32> {
    assert_eq!(a.ncols(), b.nrows(), "columns of the left factor must be rows of the right one");
    let (a, b) = (a.as_standard_layout(), b.as_standard_layout());
    let right = borrow(b.view()).expect("a standard layout has no gaps");
    let mut out = Array2::zeros((a.nrows(), b.ncols()));
    out.axis_chunks_iter_mut(Axis(0), PANEL).into_par_iter().enumerate().for_each(|(index, mut panel)| {
        let rows = panel.nrows();
        let left = borrow(a.view()).expect("a standard layout has no gaps").subrows(index * PANEL, rows);
        matmul(borrow_mut(&mut panel), Accum::Replace, left, right, 1.0, Par::Seq);
    });
    out
}

/// AᵀA in f64, exactly symmetric.
pub fn gram<T: Element>(a: ArrayView2<'_, T>) -> Array2<f64> {
    let (rows, n) = a.dim();
    let mut out = Array2::zeros((n, n));
    for start in (0..rows).step_by(DEPTH) {
        // Widened once for all panels.
        let part = Widened::of(a.slice(s![start..(start + DEPTH).min(rows), ..]));
        let part = part.matrix();
        out.axis_chunks_iter_mut(Axis(0), PANEL).into_par_iter().enumerate().for_each(
            |(index, mut panel)| {
                let from = index * PANEL;
                let to = from + panel.nrows();
                // Only what lies on and below the diagonal blocks.
                let target = borrow_mut(&mut panel).subcols_mut(0, to);
                let left = part.subcols(from, to - from).transpose();
                matmul(target, Accum::Add, left, part.subcols(0, to), 1.0, Par::Seq);
            },
        );
    }
    for row in 0..n {
        for column in 0..row {
            out[[column, row]] = out[[row, column]];
        }
    }
    out
}

/// ‖A‖_F² in f64: rows one after the other, each from left to right.
pub fn frobenius_squared<T: Element>(a: ArrayView2<'_, T>) -> f64 {
    let row = |row: ndarray::ArrayView1<'_, T>| row.iter().map(|value| value.widen().powi(2)).sum::<f64>();
    a.rows().into_iter().map(row).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{largest_difference, matrix, naive_product, narrow, on_threads};
    use proptest::prelude::*;

    #[test]
    fn all_transposed_variants_match_the_sums_of_the_definition() {
        for (m, k, n) in
            [(0, 3, 2), (1, 1, 1), (3, 0, 2), (5, 7, 3), (191, 5, 1), (193, 64, 9), (2, 391, 200)]
        {
            let (a, b) = (matrix(m, k, 1), matrix(k, n, 2));
            let (at, bt) = (a.t().as_standard_layout().to_owned(), b.t().as_standard_layout().to_owned());
            let expected = naive_product(a.view(), b.view());
            for (left, right) in
                [(a.view(), b.view()), (at.t(), b.view()), (a.view(), bt.t()), (at.t(), bt.t())]
            {
                assert!(largest_difference(&product(left, right), &expected) < 1e-12, "{m} {k} {n}");
                let (left, right) = (narrow(left), narrow(right));
                let single = product_f32(left.view(), right.view()).mapv(f64::from);
                assert!(largest_difference(&single, &expected) < 2e-5, "{m} {k} {n}");
                let wide = product(left.view(), right.view());
                let same = naive_product(left.mapv(f64::from).view(), right.mapv(f64::from).view());
                assert!(largest_difference(&wide, &same) < 1e-12, "{m} {k} {n}");
            }
        }
    }

    #[test]
    fn gaps_and_reversed_rows_are_fine() {
        let a = matrix(9, 8, 3);
        let gaps = a.slice(s![..;2, 1..;3]);
        let reversed = a.slice(s![..;-1, ..]);
        let b = matrix(3, 4, 4);
        assert!(largest_difference(&product(gaps, b.view()), &naive_product(gaps, b.view())) < 1e-13);
        assert!(largest_difference(&gram(reversed), &naive_product(reversed.t(), reversed)) < 1e-13);
    }

    #[test]
    fn a_gram_matrix_is_symmetric_to_the_bit() {
        for (rows, n) in [(0, 3), (3, 0), (1, 1), (400, 5), (7, 200), (385, 193)] {
            let a = matrix(rows, n, 5);
            let found = gram(a.view());
            assert_eq!(found, found.t());
            assert!(largest_difference(&found, &naive_product(a.t(), a.view())) < 1e-11);
            let small = narrow(a.view());
            let small_gram = gram(small.view());
            let wide = small.mapv(f64::from);
            assert!(largest_difference(&small_gram, &naive_product(wide.t(), wide.view())) < 1e-11);
        }
    }

    #[test]
    fn bytes_do_not_depend_on_the_number_of_threads() {
        let (a, b) = (narrow(matrix(500, 410, 6).view()), narrow(matrix(410, 300, 7).view()));
        let all = on_threads(|| {
            (product(a.view(), b.view()), gram(a.view()), gram(a.t()), product_f32(a.view(), b.view()))
        });
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    }

    proptest! {
        #[test]
        fn a_product_transposed_is_the_product_of_the_transposed(m in 0usize..40, k in 0usize..40, n in 0usize..40, seed in 0u64..100) {
            let (a, b) = (matrix(m, k, seed), matrix(k, n, seed + 1000));
            let difference = largest_difference(&product(a.view(), b.view()), &product(b.t(), a.t()).t().to_owned());
            prop_assert!(difference < 1e-12);
        }
    }
}
