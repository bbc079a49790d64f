//! The chain `svd`, `compress`, `quantize`, `merge` against formulas written out naively, and at its edges.

use crate::diagnostics::Diagnostics;
use crate::testing::{Input, Workbench};
use blake3::Hash;
use proptest::prelude::*;
use serde_json::{Value, json};

/// Task vectors of some parameters over a base of zeros.
struct Tasks {
    bench: Workbench,
    base: Hash,
    deltas: Vec<(&'static str, Hash)>,
}

const NAMES: [&str; 4] = ["one", "two", "three", "four"];

impl Tasks {
    /// `tasks[t]` lists the values of the parameters, whose names and shapes are `parameters`.
    fn new(parameters: &[(&str, &[usize])], tasks: &[Vec<Vec<f32>>]) -> Self {
        let bench = Workbench::new();
        let zeros: Vec<Vec<f32>> =
            parameters.iter().map(|(_, shape)| vec![0.0; shape.iter().product()]).collect();
        let listed = |values: &[Vec<f32>]| -> Vec<(String, Vec<usize>, Vec<f32>)> {
            let both = parameters.iter().zip(values);
            both.map(|((name, shape), values)| ((*name).to_owned(), shape.to_vec(), values.clone())).collect()
        };
        let write = |file: &str, values: &[Vec<f32>]| {
            let listed = listed(values);
            let borrowed: Vec<(&str, &[usize], &[f32])> = listed
                .iter()
                .map(|(name, shape, values)| (name.as_str(), shape.as_slice(), values.as_slice()))
                .collect();
            bench.checkpoint(file, &borrowed)
        };
        let base = write("base", &zeros);
        let deltas = tasks
            .iter()
            .zip(NAMES)
            .map(|(values, name)| (name, bench.diff(base, write(name, values))))
            .collect();
        Self { bench, base, deltas }
    }

    fn svd(&self, parameters: &Value, masks: Option<Hash>) -> Hash {
        let mut inputs = vec![Input::Members("deltas", &self.deltas)];
        inputs.extend(masks.map(|masks| Input::One("masks", masks)));
        self.bench.one("svd", parameters, &inputs)
    }

    fn compress(&self, basis: Hash) -> Vec<(&'static str, Hash)> {
        let inputs = [Input::Members("deltas", &self.deltas), Input::One("basis", basis)];
        let found = self.bench.run("compress", &json!({ "high": "fp32" }), &inputs).unwrap();
        self.deltas.iter().zip(found).map(|((name, _), (_, artifact))| (*name, artifact)).collect()
    }

    fn quantize(
        &self,
        coefficients: &[(&'static str, Hash)],
        bits: u8,
        stages: u8,
    ) -> Vec<(&'static str, Hash)> {
        let parameters = json!({ "bits": bits, "residual_stages": stages });
        let found =
            self.bench.run("quantize", &parameters, &[Input::Members("tensors", coefficients)]).unwrap();
        coefficients.iter().zip(found).map(|((name, _), (_, artifact))| (*name, artifact)).collect()
    }

    fn merge(&self, parameters: &Value, coefficients: &[(&'static str, Hash)]) -> Vec<Hash> {
        let mut parameters = parameters.clone();
        parameters["method"] = json!("svd-hybrid");
        let inputs = [Input::One("base", self.base), Input::Members("vectors", coefficients)];
        let found = self.bench.run("merge", &parameters, &inputs).unwrap();
        found.into_iter().map(|(_, artifact)| artifact).collect()
    }

    fn mask(&self, name: &str, shape: &[usize], values: &[f32]) -> Hash {
        self.bench.as_masks(self.bench.checkpoint("mask", &[(name, shape, values)]))
    }
}

/// Eigenvectors of a symmetric matrix by Jacobi rotations; eigenvalues in descending order.
fn jacobi(matrix: &[Vec<f64>]) -> (Vec<f64>, Vec<Vec<f64>>) {
    let n = matrix.len();
    let mut a = matrix.to_vec();
    let mut v: Vec<Vec<f64>> =
        (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    for _ in 0..60 {
        for p in 0..n {
            for q in p + 1..n {
                if a[p][q] == 0.0 {
                    continue;
                }
                let angle = 0.5 * (2.0 * a[p][q]).atan2(a[q][q] - a[p][p]);
                let (sin, cos) = angle.sin_cos();
                for row in &mut a {
                    (row[p], row[q]) = (cos * row[p] - sin * row[q], sin * row[p] + cos * row[q]);
                }
                let (left, right) = (a[p].clone(), a[q].clone());
                for k in 0..n {
                    a[p][k] = cos * left[k] - sin * right[k];
                    a[q][k] = sin * left[k] + cos * right[k];
                }
                for row in &mut v {
                    (row[p], row[q]) = (cos * row[p] - sin * row[q], sin * row[p] + cos * row[q]);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|x, y| a[*y][*y].total_cmp(&a[*x][*x]));
    let vectors = order.iter().map(|i| v.iter().map(|row| row[*i]).collect()).collect();
    (order.iter().map(|i| a[*i][*i]).collect(), vectors)
}

/// δ of one region, from the formulas: explicit U, projection, weights.
fn reference(taus: &[Vec<f64>], center: bool, energy: f64, weights: &[f64], keep_low: bool) -> Vec<f64> {
    let (n, d) = (taus.len(), taus[0].len());
    let mean: Vec<f64> = (0..d)
        .map(|i| if center { taus.iter().map(|tau| tau[i]).sum::<f64>() / n as f64 } else { 0.0 })
        .collect();
    let m: Vec<Vec<f64>> =
        taus.iter().map(|tau| tau.iter().zip(&mean).map(|(x, mu)| x - mu).collect()).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let gram: Vec<Vec<f64>> = m.iter().map(|a| m.iter().map(|b| dot(a, b)).collect()).collect();
    let (values, vectors) = jacobi(&gram);
    let total: f64 = values.iter().map(|value| value.max(0.0)).sum();
    let mut kept = 0.0;
    let mut delta = mean.clone();
    for (value, vector) in values.iter().zip(&vectors).take(n.min(d)) {
        let is_high = kept < energy * total;
        kept += value.max(0.0);
        if *value <= 1e-10 * total || !(is_high || keep_low) {
            continue;
        }
        let u: Vec<f64> =
            (0..d).map(|i| m.iter().zip(vector).map(|(m, v)| m[i] * v).sum::<f64>() / value.sqrt()).collect();
        let c: f64 = m.iter().zip(weights).map(|(m, w)| w * dot(&u, m)).sum();
        delta.iter_mut().zip(&u).for_each(|(delta, u)| *delta += c * u);
    }
    delta
}

fn close(actual: &[f32], expected: &[f64], tolerance: f64) -> Result<(), TestCaseError> {
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        prop_assert!((f64::from(*a) - e).abs() <= tolerance, "element {}: {} against {}", i, a, e);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn agrees_with_the_formulas(
        n in 1usize..4,
        values in prop::collection::vec(-1f32..1.0, 3 * 40),
        kept in prop::collection::vec(any::<bool>(), 40),
        center in any::<bool>(),
        keep_low in any::<bool>(),
        store in any::<bool>(),
        masked in any::<bool>(),
        weights in prop::collection::vec(0.1f64..1.0, 3),
    ) {
        let taus: Vec<Vec<Vec<f32>>> = (0..n).map(|t| vec![values[t * 40..(t + 1) * 40].to_vec()]).collect();
        let tasks = Tasks::new(&[("w", &[40])], &taus);
        let mask: Vec<f32> = kept.iter().map(|kept| f32::from(u8::from(*kept || !masked))).collect();
        let artifact = masked.then(|| tasks.mask("w", &[mask.len()], &mask));
        let parameters = json!({
            "energy": 0.6, "center": center, "include_noise": true, "min_mask_size": 0,
            "store": if store { "basis" } else { "factors" }, "precision": "fp32",
        });
        let coefficients = tasks.compress(tasks.svd(&parameters, artifact));
        let explicit: serde_json::Map<String, Value> =
            NAMES.iter().zip(&weights).take(n).map(|(name, weight)| ((*name).to_owned(), json!(weight))).collect();
        let merge = json!({
            "weights": explicit, "scale": 1.5, "noise_shrink": 0.25, "low": if keep_low { "keep" } else { "drop" },
        });
        let merged = tasks.merge(&merge, &coefficients);
        let sum: f64 = weights[..n].iter().sum();
        let shares: Vec<f64> = weights[..n].iter().map(|weight| weight / sum).collect();
        let mut expected = vec![0.0; 40];
        for (region, scale) in [(true, 1.5), (false, 1.5 * 0.25)] {
            let places: Vec<usize> = (0..40).filter(|i| (mask[*i] != 0.0) == region).collect();
            if places.is_empty() {
                continue;
            }
            let own: Vec<Vec<f64>> =
                taus.iter().map(|tau| places.iter().map(|i| f64::from(tau[0][*i])).collect()).collect();
            for (place, delta) in places.iter().zip(reference(&own, center, 0.6, &shares, keep_low)) {
                expected[*place] = scale * delta;
            }
        }
        close(&tasks.bench.values(merged[0], "w"), &expected, 2e-5)?;
    }

    /// Without rounding, U spans everything: an expert is its task vector, and the uniform merge is the average.
    #[test]
    fn reconstructs_what_went_in(values in prop::collection::vec(-1f32..1.0, 3 * 30), store in any::<bool>()) {
        let taus: Vec<Vec<Vec<f32>>> = (0..3).map(|t| vec![values[t * 30..(t + 1) * 30].to_vec()]).collect();
        let tasks = Tasks::new(&[("w", &[5, 6])], &taus);
        let basis = tasks.svd(&json!({ "store": if store { "basis" } else { "factors" }, "precision": "fp32" }), None);
        let coefficients = tasks.compress(basis);
        for (artifact, tau) in tasks.merge(&json!({ "output": "per-task" }), &coefficients).iter().zip(&taus) {
            let expected: Vec<f64> = tau[0].iter().map(|x| f64::from(*x)).collect();
            close(&tasks.bench.values(*artifact, "w"), &expected, 1e-5)?;
        }
        let average: Vec<f64> =
            (0..30).map(|i| taus.iter().map(|tau| f64::from(tau[0][i])).sum::<f64>() / 3.0).collect();
        let merged = tasks.merge(&json!({}), &coefficients)[0];
        close(&tasks.bench.values(merged, "w"), &average, 1e-5)?;
        let found = Diagnostics::from_json(&tasks.bench.blob(merged, "diagnostics.json")).unwrap();
        let merged = found.totals.merged.unwrap();
        prop_assert!(merged.from_average < 1e-5 * merged.average_norm, "{:?}", merged);
        prop_assert!(found.totals.tasks.iter().all(|task| task.relative < 1e-5), "{:?}", found.totals);
    }
}

fn wave(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0) * 0.01).collect()
}

#[test]
fn one_task_constants_zeros_scalars_and_equal_tasks_are_defined() {
    let shapes: [(&str, &[usize]); 4] =
        [("constant", &[12]), ("empty", &[0]), ("scalar", &[]), ("zero", &[3, 4])];
    let values = vec![vec![0.5; 12], vec![], vec![-0.25], vec![0.0; 12]];
    for n in [1, 3] {
        let tasks = Tasks::new(&shapes, &vec![values.clone(); n]);
        for (center, store) in [(true, "factors"), (false, "factors"), (true, "basis"), (false, "basis")] {
            let coefficients = tasks.compress(tasks.svd(&json!({ "center": center, "store": store }), None));
            let packed = tasks.quantize(&coefficients, 2, 2);
            let merged = tasks.merge(&json!({}), &packed)[0];
            for ((name, _), expected) in shapes.iter().zip(&values) {
                let found = tasks.bench.values(merged, name);
                assert!(
                    found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-3),
                    "{n} {center} {store} {name}: {found:?}"
                );
            }
        }
    }
}

#[test]
fn a_mask_that_keeps_nothing_or_too_little_leaves_the_base() {
    let tasks = Tasks::new(&[("w", &[30])], &[vec![wave(30, 1)], vec![wave(30, 2)]]);
    let mut few = vec![0.0; 30];
    few[..9].fill(1.0);
    for mask in [vec![0.0; 30], few] {
        for store in ["factors", "basis"] {
            let basis = tasks.svd(&json!({ "store": store }), Some(tasks.mask("w", &[mask.len()], &mask)));
            let merged = tasks.merge(&json!({}), &tasks.compress(basis))[0];
            assert!(tasks.bench.values(merged, "w").iter().all(|x| *x == 0.0));
        }
    }
}

#[test]
fn values_that_are_not_finite_are_refused_by_task_tensor_and_element() {
    let mut bad = wave(30, 2);
    bad[7] = f32::NAN;
    let tasks = Tasks::new(&[("w", &[30])], &[vec![wave(30, 1)], vec![bad]]);
    let error = tasks.bench.run("svd", &json!({}), &[Input::Members("deltas", &tasks.deltas)]).unwrap_err();
    assert_eq!(error.to_string(), "tensor `w` of task vector `two` is not finite: element 7 is NaN");
}

#[test]
fn only_the_low_parts_of_coefficients_are_packed() {
    let tasks = Tasks::new(&[("w", &[300])], &[vec![wave(300, 1)], vec![wave(300, 2)], vec![wave(300, 3)]]);
    let inputs = |basis| [Input::Members("deltas", &tasks.deltas), Input::One("basis", basis)];
    let basis = tasks.svd(&json!({ "max_rank": 1 }), None);
    let half = tasks.bench.run("compress", &json!({}), &inputs(basis)).unwrap();
    let packed = tasks.quantize(&[("one", half[0].1)], 3, 2)[0].1;
    let described: Value = serde_json::from_str(&tasks.bench.manifest(packed)).unwrap();
    assert_eq!(described["tensors"][0]["name"], "w:signal.high");
    assert_eq!(described["tensors"][0]["dtype"], "F16");
    let tensors = &described["layout"]["packed"]["tensors"];
    assert_eq!(tensors[0]["encoding"], "plain");
    assert_eq!(tensors[1]["encoding"]["residual"]["stages"].as_array().unwrap().len(), 2);
    assert_eq!(described["links"][0]["role"], "basis");
}

#[test]
fn models_are_rebuilt_without_the_fine_tuned_checkpoints() {
    let values: Vec<Vec<Vec<f32>>> = (1..4).map(|t| vec![wave(5000, t), wave(77, t + 9)]).collect();
    let tasks = Tasks::new(&[("a", &[50, 100]), ("b", &[77])], &values);
    let mask: Vec<f32> = (0..5000).map(|i| f32::from(u8::from(i % 3 != 0))).collect();
    for parameters in [
        json!({ "store": "basis" }),
        json!({ "store": "basis", "basis_bits": 6, "include_noise": true }),
        json!({ "store": "factors" }),
    ] {
        let basis = tasks.svd(&parameters, Some(tasks.mask("a", &[50, 100], &mask)));
        let packed = tasks.quantize(&tasks.compress(basis), 4, 2);
        let merged = tasks.merge(&json!({}), &packed);
        let experts = tasks.merge(&json!({ "output": "per-task" }), &packed);
        let files: Vec<_> =
            NAMES[..3].iter().map(|name| tasks.bench.folder().join(format!("{name}.safetensors"))).collect();
        for file in &files {
            fs_err::rename(file, file.with_extension("gone")).unwrap();
        }
        if parameters["store"] == "basis" {
            assert_eq!(tasks.merge(&json!({}), &packed), merged);
            assert_eq!(tasks.merge(&json!({ "output": "per-task" }), &packed), experts);
        } else {
            let inputs = [Input::One("base", tasks.base), Input::Members("vectors", &packed)];
            assert!(tasks.bench.run("merge", &json!({ "method": "svd-hybrid" }), &inputs).is_err());
        }
        for file in &files {
            fs_err::rename(file.with_extension("gone"), file).unwrap();
        }
        // what is stored is close to what went in: 6 bits cost most
        for (expert, values) in experts.iter().zip(&values) {
            let found = tasks.bench.values(*expert, "b");
            let off: f64 = found.iter().zip(&values[1]).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            let norm: f64 = values[1].iter().map(|x| f64::from(*x).powi(2)).sum();
            assert!((off / norm).sqrt() < 0.05, "{parameters}: {}", (off / norm).sqrt());
        }
    }
}

#[test]
fn stored_directions_take_task_vectors_that_they_were_not_made_from() {
    let values: Vec<Vec<Vec<f32>>> = (1..4).map(|t| vec![wave(400, t)]).collect();
    let tasks = Tasks::new(&[("w", &[400])], &values);
    let first = [Input::Members("deltas", &tasks.deltas[..2])];
    let other = tasks.deltas[2].1;
    let basis = tasks.bench.one("svd", &json!({ "store": "basis", "precision": "fp32" }), &first);
    let found =
        tasks.bench.one("compress", &json!({}), &[Input::One("deltas", other), Input::One("basis", basis)]);
    // the projection on the span of mean and direction, from the formula
    let (a, b, x) = (&values[0][0], &values[1][0], &values[2][0]);
    let mean: Vec<f64> = a.iter().zip(b).map(|(a, b)| f64::from(a + b) / 2.0).collect();
    let u: Vec<f64> = a.iter().zip(b).map(|(a, b)| f64::from(a - b)).collect();
    let norm = u.iter().map(|x| x * x).sum::<f64>().sqrt();
    let c: f64 = u.iter().zip(x).zip(&mean).map(|((u, x), mu)| u / norm * (f64::from(*x) - mu)).sum();
    let high = tasks.bench.values(found, "w:signal.high")[0];
    assert!((f64::from(high).abs() - c.abs()).abs() < 2e-3 * c.abs(), "{high} {c}");

    let view = tasks.bench.one("svd", &json!({}), &first);
    let inputs = [Input::One("deltas", other), Input::One("basis", view)];
    let error = tasks.bench.run("compress", &json!({}), &inputs).unwrap_err();
    assert!(error.to_string().contains("was not made from this task vector"), "{error}");
}

#[test]
fn outputs_do_not_depend_on_the_number_of_threads() {
    let n = 70_000;
    let values: Vec<Vec<Vec<f32>>> = (1..4).map(|t| vec![wave(n, t), wave(90, t)]).collect();
    let tasks = Tasks::new(&[("a", &[n]), ("b", &[90])], &values);
    let mask: Vec<f32> = (0..n).map(|i| f32::from(u8::from(i % 5 != 0))).collect();
    let mask = tasks.mask("a", &[n], &mask);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut found = Vec::new();
            for (store, bits) in [("factors", None), ("basis", None), ("basis", Some(4))] {
                let mut parameters = json!({ "store": store, "include_noise": true });
                if let Some(bits) = bits {
                    parameters["basis_bits"] = json!(bits);
                }
                let basis = tasks.svd(&parameters, Some(mask));
                let packed = tasks.quantize(&tasks.compress(basis), 3, 2);
                found.push(basis);
                found.extend(packed.iter().map(|(_, artifact)| *artifact));
                found.extend(tasks.merge(&json!({ "weights": { "cluster": 2 } }), &packed));
                found.extend(tasks.merge(&json!({ "output": "per-task" }), &packed));
            }
            found
        })
    };
    let one = run(1);
    assert_eq!(run(2), one);
    assert_eq!(run(8), one);
}

#[test]
fn the_task_vectors_beside_their_coefficients_give_exact_errors() {
    let values: Vec<Vec<Vec<f32>>> = (1..4).map(|t| vec![wave(3000, t)]).collect();
    let tasks = Tasks::new(&[("w", &[3000])], &values);
    let packed = tasks.quantize(&tasks.compress(tasks.svd(&json!({ "max_rank": 1 }), None)), 2, 1);
    let diagnostics = |with_deltas: bool| {
        let mut inputs = vec![Input::One("base", tasks.base), Input::Members("vectors", &packed)];
        if with_deltas {
            inputs.push(Input::Members("deltas", &tasks.deltas));
        }
        let merged = tasks.bench.one("merge", &json!({ "method": "svd-hybrid" }), &inputs);
        Diagnostics::from_json(&tasks.bench.blob(merged, "diagnostics.json")).unwrap()
    };
    let experts = tasks.merge(&json!({ "output": "per-task" }), &packed);
    let (from_factors, measured) = (diagnostics(false), diagnostics(true));
    for (t, expert) in experts.iter().enumerate() {
        let found = tasks.bench.values(*expert, "w");
        let off: Vec<f64> = found.iter().zip(&values[t][0]).map(|(a, b)| f64::from(a - b).abs()).collect();
        let absolute = off.iter().map(|x| x * x).sum::<f64>().sqrt();
        let task = &measured.totals.tasks[t];
        assert!((task.absolute - absolute).abs() < 1e-6 + 1e-4 * absolute, "{task:?} {absolute}");
        assert!((from_factors.totals.tasks[t].absolute - absolute).abs() < 1e-6 + 1e-3 * absolute);
        assert!((task.max.unwrap() - off.iter().fold(0.0, |a, b| b.max(a))).abs() < 1e-7);
        assert!((task.mean_absolute.unwrap() - off.iter().sum::<f64>() / 3000.0).abs() < 1e-7);
        assert!(absolute > 0.0, "two bits leave an error");
    }
    assert!(from_factors.totals.tasks[0].max.is_none());
    assert_eq!(measured.parameters[0].regions[0].rank, 1);
}

#[test]
fn matrices_in_low_rank_are_task_vectors() {
    // rank two, and a vector that is no matrix
    let low = |a: usize| -> Vec<f32> {
        (0..40 * 30)
            .map(|i| (i / 30 + a) as f32 * 0.01 + ((i % 30) as f32 - (i / 30 % 2) as f32) * 0.02)
            .collect()
    };
    let tasks =
        Tasks::new(&[("m", &[40, 30]), ("v", &[9])], &[vec![low(1), wave(9, 1)], vec![low(5), wave(9, 2)]]);
    for algorithm in ["exact", "truncated", "randomized"] {
        let parameters = json!({ "mode": "matrix", "algorithm": algorithm, "max_rank": 4, "energy": 1.0 });
        let found = tasks.bench.run("svd", &parameters, &[Input::Members("deltas", &tasks.deltas)]).unwrap();
        assert_eq!(found.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["one", "two"]);
        let values = tasks.bench.values(found[0].1, "m");
        assert!(values.iter().zip(low(1)).all(|(a, b)| (a - b).abs() < 1e-4), "{algorithm}");
        assert_eq!(tasks.bench.values(found[0].1, "v"), wave(9, 1));
        let diagnostics = Diagnostics::from_json(&tasks.bench.blob(found[0].1, "diagnostics.json")).unwrap();
        assert!(diagnostics.parameters[0].tasks[0].relative < 1e-4);
        assert!(diagnostics.totals.stored_bytes < diagnostics.totals.plain_bytes);
    }
}
