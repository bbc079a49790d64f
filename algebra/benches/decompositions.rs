//! Times of decompositions at the sizes of a ViT-B/32: `cargo bench -p merganser-algebra`.
//!
//! Set `RAYON_NUM_THREADS=1` to see one core. The values are noise, the worst case for whatever profits from decaying singular
//! values.

#![allow(clippy::print_stdout, reason = "a program for people")]

use merganser_algebra::{
    Backend, RandomizedOptions, gram, polar_factor, product, product_f32, randomized_svd, symmetric_eigen,
    thin_svd, truncated_svd,
};
use ndarray::Array2;
use std::hint::black_box;
use std::time::Instant;

const SHAPES: [(usize, usize); 4] = [(768, 768), (2304, 768), (3072, 768), (768, 3072)];

fn main() {
    let backends = [Backend::Faer, Backend::Lapack];
    for (rows, columns) in SHAPES {
        let mut state = 1u64;
        let a = Array2::from_shape_simple_fn((rows, columns), || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) as f32 / 2f32.powi(30) - 1.0) * 1e-3
        });
        let square = Array2::from_shape_fn((columns, 768), |(row, column)| a[[row % rows, column % columns]]);
        time(rows, columns, "gram, f64", || gram(a.view()));
        time(rows, columns, "product with 768 columns, f64", || product(a.view(), square.view()));
        time(rows, columns, "product with 768 columns, f32", || product_f32(a.view(), square.view()));
        let small = if rows < columns { gram(a.t()) } else { gram(a.view()) };
        for backend in backends.into_iter().filter(|backend| backend.is_available()) {
            let named = |what: &str| format!("{what}, {backend:?}");
            time(rows, columns, &named("symmetric_eigen of the Gram matrix"), || {
                symmetric_eigen(small.view(), backend)
            });
            time(rows, columns, &named("truncated_svd, 96 triplets"), || {
                truncated_svd(a.view(), 96, backend)
            });
            let options = RandomizedOptions { rank: 96, oversampling: 10, power_iterations: 2, seed: 1 };
            time(rows, columns, &named("randomized_svd, 96 triplets"), || {
                randomized_svd(a.view(), options, backend)
            });
            time(rows, columns, &named("polar_factor"), || polar_factor(a.view(), 1e-4, backend));
            time(rows, columns, &named("thin_svd"), || thin_svd(a.view(), backend));
        }
    }
}

fn time<R>(rows: usize, columns: usize, what: &str, work: impl Fn() -> R) {
    let fastest = (0..3)
        .map(|_| {
            let started = Instant::now();
            black_box(work());
            started.elapsed()
        })
        .min()
        .unwrap_or_default();
    println!("{rows:>5} x {columns:<5} {what:<50} {:>8.1} ms", fastest.as_secs_f64() * 1e3);
}
