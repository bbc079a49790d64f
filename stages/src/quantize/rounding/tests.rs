//! Against GPTQ as its paper writes it, against exhaustive search, and the promises about the error.

use super::*;
use ndarray::array;
use proptest::prelude::*;

/// Values in −1 to 1, a function of (seed, element) only.
fn made_up(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    Array2::from_shape_simple_fn((rows, columns), || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    })
}

/// Correlated inputs: random vectors through a random mixing matrix.
fn moments(n: usize, seed: u64) -> Array2<f64> {
    let vectors = made_up(3 * n + 1, n, seed).dot(&(made_up(n, n, seed + 1) + Array2::<f64>::eye(n)));
    vectors.t().dot(&vectors) / vectors.nrows() as f64
}

/// Whole multiples of a step, between ±`levels`.
fn grid(step: f64, levels: f64) -> impl Fn(usize, usize, f64) -> f64 + Sync {
    move |_, _, value| (value / step).round_ties_even().clamp(-levels, levels) * step
}

/// Algorithm 1 of the GPTQ paper with the permutation of `act_order`: the inverse of H, its upper Cholesky factor, and updates of all
/// weights that are left. Naive linear algebra by Gauss–Jordan and the definition of the factor.
fn gptq_of_the_paper(
    weights: &Array2<f64>,
    moments: &Array2<f64>,
    damping: f64,
    nearest: &dyn Fn(usize, usize, f64) -> f64,
) -> Array2<f64> {
    let n = moments.nrows();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| moments[[b, b]].total_cmp(&moments[[a, a]]).then(a.cmp(&b)));
    let mean = (0..n).map(|i| moments[[i, i]]).sum::<f64>() / n as f64;
    let h = Array2::from_shape_fn((n, n), |(i, j)| {
        moments[[order[i], order[j]]] + if i == j { damping * mean } else { 0.0 }
    });
    let mut left = h;
    let mut inverse = Array2::<f64>::eye(n);
    for pivot in 0..n {
        let scale = left[[pivot, pivot]];
        for column in 0..n {
            left[[pivot, column]] /= scale;
            inverse[[pivot, column]] /= scale;
        }
        for row in (0..n).filter(|row| *row != pivot) {
            let factor = left[[row, pivot]];
            for column in 0..n {
                left[[row, column]] -= factor * left[[pivot, column]];
                inverse[[row, column]] -= factor * inverse[[pivot, column]];
            }
        }
    }
    // H⁻¹ = Uᵀ·U
    let mut upper = Array2::<f64>::zeros((n, n));
    for i in 0..n {
        for j in i..n {
            let sum: f64 = (0..i).map(|k| upper[[k, i]] * upper[[k, j]]).sum();
            let rest = inverse[[i, j]] - sum;
            upper[[i, j]] = if i == j { rest.sqrt() } else { rest / upper[[i, i]] };
        }
    }
    let mut rounded = Array2::zeros(weights.dim());
    for row in 0..weights.nrows() {
        let mut open: Vec<f64> = order.iter().map(|&input| weights[[row, input]]).collect();
        for (i, &input) in order.iter().enumerate() {
            let value = nearest(row, input, open[i]);
            rounded[[row, input]] = value;
            let error = (open[i] - value) / upper[[i, i]];
            for (j, open) in open.iter_mut().enumerate().skip(i + 1) {
                *open -= error * upper[[i, j]];
            }
        }
    }
    rounded
}

fn rounded(
    rounding: Rounding,
    weights: &Array2<f64>,
    curvature: &Curvature,
    nearest: &(dyn Fn(usize, usize, f64) -> f64 + Sync),
) -> Array2<f64> {
    let mut out = weights.clone();
    round(rounding, &mut out, curvature, nearest);
    out
}

fn errors(weights: &Array2<f64>, rounded: &Array2<f64>, curvature: &Curvature) -> Vec<f64> {
    (0..weights.nrows()).map(|row| curvature.error(weights.row(row), rounded.row(row))).collect()
}

#[test]
fn error_feedback_is_gptq() {
    for (rows, n) in [(1, 1), (3, 2), (4, 17), (5, 40)] {
        let (weights, moments) = (made_up(rows, n, 5), moments(n, 11));
        let nearest = grid(0.21, 3.0);
        let curvature = Curvature::new(moments.view(), 0.01).unwrap();
        let found = rounded(Rounding::Gptq, &weights, &curvature, &nearest);
        assert_eq!(found, gptq_of_the_paper(&weights, &moments, 0.01, &nearest), "{rows} × {n}");
        let plain = rounded(Rounding::Nearest, &weights, &curvature, &nearest);
        assert!(n < 17 || found != plain, "errors are really fed back");
    }
}

#[test]
fn descent_ends_where_no_single_weight_can_do_better() {
    let (weights, moments) = (made_up(6, 9, 1), moments(9, 2));
    let nearest = grid(0.3, 2.0);
    let curvature = Curvature::new(moments.view(), 0.01).unwrap();
    let found = rounded(Rounding::Descent, &weights, &curvature, &nearest);
    let least = errors(&weights, &found, &curvature);
    for (row, least) in least.iter().enumerate() {
        for input in 0..9 {
            for code in -2..=2 {
                let mut other = found.clone();
                other[[row, input]] = f64::from(code) * 0.3;
                let error = curvature.error(weights.row(row), other.row(row));
                assert!(error >= least * (1.0 - 1e-9), "row {row}, input {input}, code {code}");
            }
        }
    }
}

#[test]
fn descent_comes_near_the_best_of_all_codes() {
    let (weights, moments) = (made_up(8, 6, 3), moments(6, 4));
    let nearest = grid(0.5, 2.0);
    let curvature = Curvature::new(moments.view(), 0.01).unwrap();
    let found = errors(&weights, &rounded(Rounding::Descent, &weights, &curvature, &nearest), &curvature);
    let plain = errors(&weights, &rounded(Rounding::Nearest, &weights, &curvature, &nearest), &curvature);
    let best = |row: usize| {
        let codes = (0..5usize.pow(6)).map(|index| {
            let codes: Vec<f64> = (0..6).map(|i| ((index / 5usize.pow(i)) % 5) as f64 * 0.5 - 1.0).collect();
            curvature.error(weights.row(row), ArrayView1::from(&codes))
        });
        codes.fold(f64::INFINITY, f64::min)
    };
    let (mut sum, mut sum_of_best) = (0.0, 0.0);
    for (row, found) in found.iter().enumerate() {
        assert!(*found >= best(row) * (1.0 - 1e-9), "nothing is better than the best");
        sum += found;
        sum_of_best += best(row);
    }
    assert!(
        sum < 1.3 * sum_of_best && sum < 0.8 * plain.iter().sum::<f64>(),
        "{sum} {sum_of_best} {plain:?}"
    );
}

proptest! {
    #[test]
    fn descent_is_never_worse_than_either_start(
        rows in 1usize..4,
        n in 1usize..24,
        seed in 1u64..10_000,
        step in 0.05f64..0.8,
        levels in 1u8..8,
        damping in 1e-4f64..0.5,
    ) {
        let (weights, moments) = (made_up(rows, n, seed), moments(n, seed + 7));
        let nearest = grid(step, f64::from(levels));
        let curvature = Curvature::new(moments.view(), damping).unwrap();
        let found = errors(&weights, &rounded(Rounding::Descent, &weights, &curvature, &nearest), &curvature);
        for start in [Rounding::Nearest, Rounding::Gptq] {
            let start = errors(&weights, &rounded(start, &weights, &curvature, &nearest), &curvature);
            for (found, start) in found.iter().zip(start) {
                prop_assert!(*found <= start * (1.0 + 1e-12) + 1e-15);
            }
        }
    }
}

#[test]
fn independent_inputs_are_rounded_to_the_nearest() {
    let weights = made_up(4, 12, 9);
    let nearest = grid(0.1, 7.0);
    let curvature = Curvature::new((Array2::<f64>::eye(12) * 3.0).view(), 0.01).unwrap();
    let plain = rounded(Rounding::Nearest, &weights, &curvature, &nearest);
    for rounding in [Rounding::Gptq, Rounding::Descent] {
        assert_eq!(rounded(rounding, &weights, &curvature, &nearest), plain);
    }
}

#[test]
fn inputs_that_are_never_excited_and_always_equal_ones_are_fine() {
    // Rank one, and a dead input.
    let moments = array![[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]];
    let curvature = Curvature::new(moments.view(), 0.01).unwrap();
    let weights = array![[0.4, 0.4, 0.4]];
    let found = rounded(Rounding::Descent, &weights, &curvature, &grid(1.0, 3.0));
    assert_eq!(found.sum(), 1.0, "0.4 + 0.4 is nearer to 1 than to 0");
    assert!(Curvature::new(Array2::zeros((3, 3)).view(), 0.01).is_none());
    assert!(Curvature::new(Array2::zeros((0, 0)).view(), 0.01).is_none());
    assert!(Curvature::new(array![[f64::NAN]].view(), 0.01).is_none());
    // Rounded to f32, moments may be a little indefinite.
    let indefinite = array![[1.0, 1.0 + 1e-6], [1.0 + 1e-6, 1.0]];
    assert!(Curvature::new(indefinite.view(), 1e-12).is_some());
}

#[test]
fn codes_do_not_depend_on_the_number_of_threads() {
    let (weights, moments) = (made_up(50, 30, 5), moments(30, 6));
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let curvature = Curvature::new(moments.view(), 0.01).unwrap();
            rounded(Rounding::Descent, &weights, &curvature, &grid(0.2, 3.0))
        })
    };
    let one = on(1);
    assert_eq!(one, on(2));
    assert_eq!(one, on(8));
}
