//! What the tests of methods for matrices share: small made-up inputs, and references from the definitions.

#![cfg(test)]

use crate::testing::{Input, Workbench};
use ndarray::{Array2, s};
use serde_json::Value;

/// A base with a matrix `layers.0.w`, a vector, a scalar, an empty tensor and one of four dimensions, and made-up task vectors.
pub(crate) struct Case {
    /// Name and shape of the matrix.
    name: &'static str,
    shape: (usize, usize),
    /// Values of the matrix: the base's, and each task's.
    base: Vec<f32>,
    tuned: Vec<Vec<f32>>,
    /// What the second task has as the first entry of the vector.
    bias: Option<f32>,
}

const MATRIX: &str = "layers.0.w";
const OTHERS: [(&str, &[usize]); 4] =
    [("layers.0.bias", &[3]), ("layers.0.scalar", &[]), ("conv", &[2, 2, 1, 1]), ("empty", &[0, 4])];

impl Case {
    pub(crate) fn new(rows: usize, columns: usize, tasks: usize) -> Self {
        let values = |seed| naive::noise(rows * columns, seed);
        let base = values(1);
        // Multiples of 2^-12, so that differences are exact.
        let tuned = (0..tasks)
            .map(|task| {
                base.iter().zip(values(task as u64 + 2)).map(|(base, own)| base + own / 4.0).collect()
            })
            .collect();
        Self { name: MATRIX, shape: (rows, columns), base, tuned, bias: None }
    }

    pub(crate) fn of(deltas: &[Array2<f64>]) -> Self {
        let (rows, columns) = deltas[0].dim();
        let tuned = deltas.iter().map(|delta| delta.iter().map(|value| *value as f32).collect()).collect();
        Self { name: MATRIX, shape: (rows, columns), base: vec![0.0; rows * columns], tuned, bias: None }
    }

    pub(crate) fn named(self, name: &'static str) -> Self {
        Self { name, ..self }
    }

    pub(crate) fn deltas(&self) -> Vec<Array2<f64>> {
        let difference =
            |tuned: &Vec<f32>| tuned.iter().zip(&self.base).map(|(t, b)| f64::from(t - b)).collect();
        self.tuned
            .iter()
            .map(|tuned| Array2::from_shape_vec(self.shape, difference(tuned)).unwrap())
            .collect()
    }

    fn others(task: usize) -> Vec<Vec<f32>> {
        let n = |shape: &[usize]| shape.iter().product();
        OTHERS
            .iter()
            .map(|(_, shape)| {
                naive::noise(n(shape), 100 + task as u64).iter().map(|value| value * 0.5).collect()
            })
            .collect()
    }

    fn checkpoint(&self, bench: &Workbench, name: &str, matrix: &[f32], others: &[Vec<f32>]) -> blake3::Hash {
        let shape = [self.shape.0, self.shape.1];
        let mut tensors: Vec<(&str, &[usize], &[f32])> = vec![(self.name, &shape, matrix)];
        tensors.extend(OTHERS.iter().zip(others).map(|((name, shape), values)| (*name, *shape, &**values)));
        bench.checkpoint(name, &tensors)
    }

    /// Runs the merge; the differences from the base of a tensor, per member of the result.
    fn run(&self, parameters: &Value, tensor: &str) -> Result<Vec<Vec<f64>>, crate::StageError> {
        let bench = Workbench::new();
        let base = self.checkpoint(&bench, "base", &self.base, &Self::others(99));
        let names: Vec<String> = (0..self.tuned.len()).map(|task| format!("task{task}")).collect();
        let deltas: Vec<(&str, blake3::Hash)> = names
            .iter()
            .zip(&self.tuned)
            .enumerate()
            .map(|(task, (name, tuned))| {
                let mut others = Self::others(task);
                others[0][0] = self.bias.filter(|_| task == 1).unwrap_or(others[0][0]);
                let tuned = self.checkpoint(&bench, name, tuned, &others);
                (name.as_str(), bench.diff(base, tuned))
            })
            .collect();
        let inputs = [Input::One("base", base), Input::Members("vectors", &deltas)];
        let merged = bench.run("merge", parameters, &inputs)?;
        let origin = bench.values(base, tensor);
        let difference = |artifact| {
            let values = bench.values(artifact, tensor);
            values.iter().zip(&origin).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect()
        };
        Ok(merged.iter().map(|(_, artifact)| difference(*artifact)).collect())
    }

    /// The merged task vector of the matrix.
    pub(crate) fn merge(&self, parameters: &Value) -> Array2<f64> {
        let mut found = self.merge_tasks(parameters);
        assert_eq!(found.len(), 1);
        found.remove(0)
    }

    pub(crate) fn merge_tasks(&self, parameters: &Value) -> Vec<Array2<f64>> {
        let found = self.run(parameters, self.name).unwrap().into_iter();
        found.map(|values| Array2::from_shape_vec(self.shape, values).unwrap()).collect()
    }

    #[track_caller]
    #[expect(clippy::unused_self, reason = "reads as what is checked")]
    pub(crate) fn check(&self, found: &Array2<f64>, expected: &Array2<f64>, tolerance: f64) {
        assert_eq!(found.dim(), expected.dim());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() <= tolerance, "{found} instead of {expected}");
        }
    }

    /// Everything that is not a matrix: `expected` is asked with the mean and the sum over the tasks.
    #[track_caller]
    pub(crate) fn check_others(&self, parameters: &Value, expected: impl Fn(f64, f64) -> f64) {
        let base = Self::others(99);
        for (index, (name, _)) in OTHERS.iter().enumerate() {
            let found = self.run(parameters, name).unwrap().remove(0);
            assert_eq!(found.len(), base[index].len());
            for (element, found) in found.iter().enumerate() {
                let tasks = (0..self.tuned.len())
                    .map(|task| Self::others(task)[index][element] - base[index][element]);
                let sum: f64 = tasks.map(f64::from).sum();
                let expected = expected(sum / self.tuned.len() as f64, sum);
                assert!((found - expected).abs() < 1e-6, "{name}: {found} instead of {expected}");
            }
        }
    }

    /// A NaN or an infinity in a task vector is refused by the names of tensor and task, also where the tensor is not merged as a matrix.
    #[track_caller]
    pub(crate) fn refuses_nan(parameters: &Value) {
        for value in [f32::NAN, f32::INFINITY] {
            let mut matrix = Self::new(4, 4, 2);
            matrix.tuned[1][5] = value;
            let bias = Self { bias: Some(value), ..Self::new(4, 4, 2) };
            for (case, tensor) in [(matrix, MATRIX), (bias, OTHERS[0].0)] {
                let message = case.run(parameters, MATRIX).unwrap_err().to_string();
                let all = [tensor, "task1", &value.to_string()];
                assert!(all.iter().all(|told| message.contains(told)), "{all:?}: {message}");
            }
        }
    }

    #[track_caller]
    pub(crate) fn same_on_all_threads(&self, parameters: &Value) {
        let results = [1, 2, 8].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| self.merge_tasks(parameters))
        });
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    }
}

/// References in f64 from the definitions.
pub(crate) mod naive {
    use super::{Array2, s};
    use ndarray::Array1;

    /// Multiples of 2^-10 between −1 and 1.
    pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
        (0..n as u64)
            .map(|index| {
                let mut z = (seed << 32).wrapping_add(index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
                (z >> 53) as f32 / 1024.0 - 1.0
            })
            .collect()
    }

    /// U, σ in descending order, V by one-sided Jacobi rotations, without directions of σ = 0.
    pub(crate) fn svd(a: &Array2<f64>) -> (Array2<f64>, Array1<f64>, Array2<f64>) {
        if a.nrows() < a.ncols() {
            let (v, values, u) = svd(&a.t().to_owned());
            return (u, values, v);
        }
        let n = a.ncols();
        let (mut w, mut v) = (a.clone(), Array2::<f64>::eye(n));
        for _ in 0..60 {
            for p in 0..n {
                for q in p + 1..n {
                    let (x, y) = (w.column(p).to_owned(), w.column(q).to_owned());
                    let gamma = x.dot(&y);
                    if gamma.abs() <= 1e-300 {
                        continue;
                    }
                    let zeta = (y.dot(&y) - x.dot(&x)) / (2.0 * gamma);
                    let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                    let c = 1.0 / (1.0 + t * t).sqrt();
                    for matrix in [&mut w, &mut v] {
                        let (x, y) = (matrix.column(p).to_owned(), matrix.column(q).to_owned());
                        matrix.column_mut(p).assign(&(&x * c - &y * (c * t)));
                        matrix.column_mut(q).assign(&(&x * (c * t) + &y * c));
                    }
                }
            }
        }
        let norms: Vec<f64> = w.columns().into_iter().map(|column| column.dot(&column).sqrt()).collect();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|a, b| norms[*b].total_cmp(&norms[*a]));
        order.retain(|index| norms[*index] > 1e-13);
        let values: Array1<f64> = order.iter().map(|index| norms[*index]).collect();
        let u = w.select(ndarray::Axis(1), &order) / &values;
        (u, values, v.select(ndarray::Axis(1), &order))
    }

    /// U·Vᵀ.
    pub(crate) fn polar(a: &Array2<f64>) -> Array2<f64> {
        let (u, _, v) = svd(a);
        u.dot(&v.t())
    }

    /// A⁺ with a cut-off relative to the largest singular value.
    pub(crate) fn pseudo_inverse(a: &Array2<f64>, cut_off: f64) -> Array2<f64> {
        let (u, values, v) = svd(a);
        let kept = values.iter().take_while(|value| **value > cut_off * values[0]).count();
        (&v.slice(s![.., ..kept]) / &values.slice(s![..kept])).dot(&u.slice(s![.., ..kept]).t())
    }
}
