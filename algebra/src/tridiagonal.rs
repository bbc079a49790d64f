//! The largest eigenpairs of a symmetric tridiagonal matrix T, without the others.
//!
//! Eigenvalues by bisection on Sturm counts (the number of negative pivots of T − xI is the number of eigenvalues below x),
//! [`LANES`] at a time; eigenvectors by inverse iteration, each made orthogonal to those of its cluster. For k of n that costs
//! O(nk + nk²) where divide and conquer costs O(n³). Inverse iteration can fail where eigenvalues crowd, so what comes out is
//! checked, and nothing is returned if it is not as good as it has to be: the caller then computes all eigenpairs.
//!
//! See Demmel, Applied Numerical Linear Algebra, 5.3.4, and LAPACK's `dstebz` and `dstein`, which do the same one by one.

/// Eigenvalues that are bisected together, so that the compiler can use vector registers.
const LANES: usize = 8;

/// Eigenvalues that are closer than this, relative to the norm of T, form a cluster. Further apart, vectors from separate inverse
/// iterations are orthogonal to about the unit round-off divided by this.
const CLUSTER: f64 = 1e-5;

/// Larger departures from orthogonality, or larger residuals relative to the norm of T, are failures.
const ORTHOGONALITY: f64 = 1e-9;
const RESIDUAL: f64 = 1e-12;

/// Solves per vector; two are enough unless the start was unlucky.
const SOLVES: usize = 5;

/// A symmetric tridiagonal matrix.
pub(crate) struct Tridiagonal {
    pub(crate) diagonal: Vec<f64>,
    /// One shorter than the diagonal.
    pub(crate) beside: Vec<f64>,
}

impl Tridiagonal {
    /// The `k` largest eigenvalues in descending order with their eigenvectors; nothing if the check fails.
    pub(crate) fn largest(&self, k: usize) -> Option<(Vec<f64>, Vec<Vec<f64>>)> {
        let norm = self.norm();
        if k == 0 {
            return Some((Vec::new(), Vec::new()));
        }
        if norm == 0.0 || !norm.is_finite() {
            return None;
        }
        let unit = Self {
            diagonal: self.diagonal.iter().map(|value| value / norm).collect(),
            beside: self.beside.iter().map(|value| value / norm).collect(),
        };
        let values = unit.largest_values(k);
        let vectors = unit.vectors(&values);
        unit.is_good(&values, &vectors)
            .then(|| (values.into_iter().map(|value| value * norm).collect(), vectors))
    }

    /// The largest row sum of absolute values.
    fn norm(&self) -> f64 {
        let beside =
            |index: Option<usize>| index.and_then(|index| self.beside.get(index)).map_or(0.0, |v| v.abs());
        (0..self.diagonal.len())
            .map(|i| self.diagonal[i].abs() + beside(i.checked_sub(1)) + beside(Some(i)))
            .fold(0.0, f64::max)
    }

    /// How many eigenvalues lie below each `x`; of a matrix of norm 1.
    fn count_below(&self, squares: &[f64], x: [f64; LANES]) -> [u32; LANES] {
        // A pivot that vanishes is replaced by a tiny negative one: the count then is that of a neighbouring matrix.
        const TINY: f64 = 1e-292;
        let mut below = [0u32; LANES];
        let mut pivot = [1.0f64; LANES];
        for (diagonal, square) in self.diagonal.iter().zip(squares) {
            for lane in 0..LANES {
                let next = diagonal - x[lane] - square / pivot[lane];
                pivot[lane] = if next.abs() < TINY { -TINY } else { next };
                below[lane] += u32::from(pivot[lane] < 0.0);
            }
        }
        below
    }

    /// Of a matrix of norm 1.
    fn largest_values(&self, k: usize) -> Vec<f64> {
        let n = self.diagonal.len();
        let squares: Vec<f64> =
            std::iter::once(0.0).chain(self.beside.iter().map(|value| value * value)).collect();
        let mut values = Vec::with_capacity(k);
        let mut ceiling = 1.0 + 1e-10;
        for first in (0..k).step_by(LANES) {
            let mut low = [-1.0 - 1e-10; LANES];
            let mut high = [ceiling; LANES];
            // From a width of 2 to the round-off of values of order 1.
            for _ in 0..54 {
                let middle: [f64; LANES] = std::array::from_fn(|lane| f64::midpoint(low[lane], high[lane]));
                let below = self.count_below(&squares, middle);
                for lane in 0..LANES {
                    // Lanes beyond the last eigenvalue repeat it.
                    let rank = (first + lane).min(k - 1);
                    if below[lane] as usize >= n - rank {
                        high[lane] = middle[lane];
                    } else {
                        low[lane] = middle[lane];
                    }
                }
            }
            let found = low.iter().zip(&high).map(|(low, high)| f64::midpoint(*low, *high));
            values.extend(found.take(k - first));
            ceiling = values[values.len() - 1] + 1e-10;
        }
        // Bisections end within one round-off of each other's order.
        values.sort_by(|a, b| b.total_cmp(a));
        values
    }

    fn vectors(&self, values: &[f64]) -> Vec<Vec<f64>> {
        let n = self.diagonal.len();
        let mut vectors: Vec<Vec<f64>> = Vec::with_capacity(values.len());
        let mut cluster = 0;
        let mut shift = f64::INFINITY;
        for (index, value) in values.iter().enumerate() {
            while values[cluster] - value > CLUSTER {
                cluster += 1;
            }
            // Equal eigenvalues would give equal factorizations: the shifts are kept apart.
            shift = value.min(shift - 4.0 * f64::EPSILON);
            let factors = Shifted::factorize(self, shift);
            let mut x: Vec<f64> = (0..n).map(|element| start(index, element)).collect();
            for solve in 0..SOLVES {
                factors.solve(&mut x);
                let grown = normalize(&mut x);
                for earlier in &vectors[cluster..index] {
                    let along = dot(&x, earlier);
                    x.iter_mut().zip(earlier).for_each(|(x, y)| *x -= along * y);
                }
                normalize(&mut x);
                // The growth is the reciprocal of the residual.
                if solve >= 1 && grown > 1e13 / (n as f64).sqrt() {
                    break;
                }
            }
            vectors.push(x);
        }
        vectors
    }

    fn is_good(&self, values: &[f64], vectors: &[Vec<f64>]) -> bool {
        let n = self.diagonal.len();
        let residual = |value: f64, x: &[f64]| {
            let row = |i: usize| {
                let before = if i > 0 { self.beside[i - 1] * x[i - 1] } else { 0.0 };
                let after = if i + 1 < n { self.beside[i] * x[i + 1] } else { 0.0 };
                before + after + (self.diagonal[i] - value) * x[i]
            };
            (0..n).map(|i| row(i).powi(2)).sum::<f64>().sqrt()
        };
        let straight = vectors.iter().enumerate().all(|(index, x)| {
            let lengths = (dot(x, x) - 1.0).abs() < ORTHOGONALITY;
            lengths && vectors[..index].iter().all(|earlier| dot(x, earlier).abs() < ORTHOGONALITY)
        });
        straight
            && values.iter().zip(vectors).all(|(value, x)| residual(*value, x) < RESIDUAL * (n as f64).sqrt())
    }
}

/// T − shift·I as P·L·U, with partial pivoting.
struct Shifted {
    /// The rows of U: diagonal, first and second above it.
    upper: Vec<[f64; 3]>,
    /// Multiplier of a row, and whether the rows were swapped first.
    lower: Vec<(f64, bool)>,
}

impl Shifted {
    fn factorize(matrix: &Tridiagonal, shift: f64) -> Self {
        // What a pivot that vanishes is replaced by: the perturbation is of the order of round-off.
        const SMALLEST: f64 = f64::EPSILON;
        let n = matrix.diagonal.len();
        let beside = |i: usize| matrix.beside.get(i).copied().unwrap_or(0.0);
        let mut upper = Vec::with_capacity(n);
        let mut lower = Vec::with_capacity(n);
        let mut row = [matrix.diagonal[0] - shift, beside(0), 0.0];
        for i in 0..n - 1 {
            let next = [beside(i), matrix.diagonal[i + 1] - shift, beside(i + 1)];
            let swap = next[0].abs() > row[0].abs();
            let (mut pivot, other) = if swap { (next, row) } else { (row, next) };
            if pivot[0].abs() < SMALLEST {
                pivot[0] = SMALLEST;
            }
            let factor = other[0] / pivot[0];
            row = [other[1] - factor * pivot[1], other[2] - factor * pivot[2], 0.0];
            upper.push(pivot);
            lower.push((factor, swap));
        }
        if row[0].abs() < SMALLEST {
            row[0] = SMALLEST;
        }
        upper.push(row);
        Self { upper, lower }
    }

    fn solve(&self, x: &mut [f64]) {
        for (i, (factor, swap)) in self.lower.iter().enumerate() {
            if *swap {
                x.swap(i, i + 1);
            }
            x[i + 1] -= factor * x[i];
        }
        for i in (0..x.len()).rev() {
            let first = x.get(i + 1).copied().unwrap_or(0.0);
            let second = x.get(i + 2).copied().unwrap_or(0.0);
            let [pivot, above, further] = self.upper[i];
            x[i] = (x[i] - above * first - further * second) / pivot;
        }
    }
}

/// Returns the length before.
fn normalize(x: &mut [f64]) -> f64 {
    let length = dot(x, x).sqrt();
    if length > 0.0 {
        for value in x.iter_mut() {
            *value /= length;
        }
    }
    length
}

/// In eight parts, so that the compiler can use vector registers; always in the same order.
fn dot(x: &[f64], y: &[f64]) -> f64 {
    let mut parts = [0.0; 8];
    let (x_blocks, y_blocks) = (x.chunks_exact(8), y.chunks_exact(8));
    let rest: f64 = x_blocks.remainder().iter().zip(y_blocks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in x_blocks.zip(y_blocks) {
        for lane in 0..8 {
            parts[lane] += x[lane] * y[lane];
        }
    }
    parts.iter().sum::<f64>() + rest
}

/// A made-up start that has no reason to be orthogonal to an eigenvector.
fn start(vector: usize, element: usize) -> f64 {
    let mut z = (((vector as u64) << 32) + element as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (z >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Eigenvalues 2 − 2 cos(π j / (n + 1)), known in closed form.
    fn second_differences(n: usize) -> Tridiagonal {
        Tridiagonal { diagonal: vec![2.0; n], beside: vec![-1.0; n - 1] }
    }

    #[test]
    fn finds_the_known_eigenvalues_of_second_differences() {
        for (n, k) in [(1, 1), (2, 1), (2, 2), (9, 3), (100, 17), (300, 300)] {
            let (values, vectors) = second_differences(n).largest(k).unwrap();
            assert_eq!((values.len(), vectors.len()), (k, k));
            for (rank, value) in values.iter().enumerate() {
                let angle = std::f64::consts::PI * (n - rank) as f64 / (n + 1) as f64;
                assert!((value - (2.0 - 2.0 * angle.cos())).abs() < 1e-14 * 4.0, "{n} {rank}");
            }
        }
    }

    #[test]
    fn equal_eigenvalues_get_orthogonal_vectors() {
        let identity = Tridiagonal { diagonal: vec![3.0; 20], beside: vec![0.0; 19] };
        let (values, vectors) = identity.largest(7).unwrap();
        assert!(values.iter().all(|value| (value - 3.0).abs() < 1e-14));
        assert!(identity.is_good(&values, &vectors));
        // Wilkinson's matrix: pairs that agree to the last digits.
        let wilkinson = Tridiagonal {
            diagonal: (0..21).map(|i| (f64::from(i) - 10.0).abs()).collect(),
            beside: vec![1.0; 20],
        };
        let (values, _) = wilkinson.largest(6).unwrap();
        assert!((values[0] - 10.746_194_182_903_393).abs() < 1e-13, "{values:?}");
        assert!((values[1] - 10.746_194_182_903_322).abs() < 1e-13, "{values:?}");
    }

    #[test]
    fn nothing_and_zero_are_left_to_the_caller() {
        assert_eq!(second_differences(3).largest(0), Some((Vec::new(), Vec::new())));
        assert_eq!(Tridiagonal { diagonal: vec![0.0; 4], beside: vec![0.0; 3] }.largest(2), None);
    }

    proptest! {
        #[test]
        fn what_is_returned_are_eigenpairs(diagonal in prop::collection::vec(-1e3f64..1e3, 1..60), seed in 0usize..50, k in 1usize..60) {
            let n = diagonal.len();
            let beside = (1..n).map(|i| 100.0 * start(seed, i)).collect();
            let matrix = Tridiagonal { diagonal, beside };
            if let Some((values, vectors)) = matrix.largest(k.min(n)) {
                let norm = matrix.norm();
                prop_assert!(values.windows(2).all(|pair| pair[0] >= pair[1]));
                for (value, x) in values.iter().zip(&vectors) {
                    for i in 0..n {
                        let mut sum = (matrix.diagonal[i] - value) * x[i];
                        if i > 0 { sum += matrix.beside[i - 1] * x[i - 1]; }
                        if i + 1 < n { sum += matrix.beside[i] * x[i + 1]; }
                        prop_assert!(sum.abs() < 1e-11 * norm);
                    }
                }
            }
        }
    }
}
