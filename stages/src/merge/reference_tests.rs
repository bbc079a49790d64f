//! Element-wise methods against naive f64 references written from the formulas: whole vectors, sorts, no blocks.
//!
//! Values lie on a grid that f32 holds exactly, coarse enough that equal magnitudes meet at thresholds and sums cancel.

use crate::StageError;
use crate::testing::{Input, Workbench};
use merganser_tensors::kernels::random::{Stream, happens, threshold};
use serde_json::{Value, json};

const TASKS: [&str; 3] = ["one", "two", "three"];

/// Names and shapes: a scalar, nothing, one element, odd sizes, rows, more than a block.
const SHAPES: [(&str, &[usize]); 7] = [
    ("blocks.0.w", &[5, 33]),
    ("blocks.1.filter", &[3, 2, 5]),
    ("blocks.2.large", &[70_001]),
    ("bias", &[7]),
    ("empty", &[0, 4]),
    ("one", &[1]),
    ("scale", &[]),
];

/// One set of parameters of every method and variant.
fn all_parameters() -> Vec<Value> {
    vec![
        json!({ "method": "ties" }),
        json!({ "method": "ties", "scope": "tensor", "agg": "sum", "tie": "positive" }),
        json!({ "method": "ties", "scope": "tensor", "agg": "max" }),
        json!({ "method": "ties", "density": 1.0, "mean_by": "weights" }),
        json!({ "method": "dare", "drop": 0.3 }),
        json!({ "method": "dare", "rescale": "l1", "aggregation": "ties-mean" }),
        json!({ "method": "della" }),
        json!({ "method": "della", "rescale": "l1", "aggregation": "sum" }),
        json!({ "method": "breadcrumbs", "density": 0.4, "gamma": 0.1 }),
        json!({ "method": "breadcrumbs", "density": 0.4, "gamma": 0.1, "scope": "tensor", "aggregation": "ties-sum" }),
        json!({ "method": "lines" }),
        json!({ "method": "lines", "on": "ties" }),
        json!({ "method": "lines", "on": "single-task" }),
        json!({ "method": "pcb" }),
        json!({ "method": "pcb", "version": "vision" }),
        json!({ "method": "sce" }),
        json!({ "method": "sce", "select_topk": 0.5 }),
        json!({ "method": "model-stock" }),
        json!({ "method": "model-stock", "filter_wise": true, "mean_of": "angle" }),
        json!({ "method": "slerp", "t": 0.3 }),
        json!({ "method": "slerp", "between": "task-vectors" }),
        json!({ "method": "karcher" }),
        json!({ "method": "karcher", "between": "task-vectors" }),
    ]
}

fn n_elements(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// Grid values: multiples of 2⁻¹², up to 2⁻⁴ in magnitude.
fn delta(task: usize, tensor: usize, element: usize) -> f32 {
    let mut x = (task * 7919 + tensor * 104_729 + element) as u32;
    x = x.wrapping_mul(2_654_435_761) ^ (x >> 13);
    x = x.wrapping_mul(2_246_822_519) ^ (x >> 16);
    ((x % 513) as f32 - 256.0) / 4096.0
}

fn base(tensor: usize, element: usize) -> f32 {
    ((tensor * 31 + element * 17) % 129) as f32 / 64.0 - 1.0
}

/// A bench with a base and task vectors.
struct Case {
    bench: Workbench,
    base: blake3::Hash,
    vectors: Vec<(&'static str, blake3::Hash)>,
}

impl Case {
    fn new(n_tasks: usize, delta: impl Fn(usize, usize, usize) -> f32) -> Self {
        let bench = Workbench::new();
        let write = |name: &str, value: &dyn Fn(usize, usize) -> f32| {
            let values: Vec<Vec<f32>> = SHAPES
                .iter()
                .enumerate()
                .map(|(t, (_, shape))| (0..n_elements(shape)).map(|i| value(t, i)).collect())
                .collect();
            let tensors: Vec<(&str, &[usize], &[f32])> = SHAPES
                .iter()
                .zip(&values)
                .map(|((name, shape), values)| (*name, *shape, &values[..]))
                .collect();
            bench.checkpoint(name, &tensors)
        };
        let theta = write("base", &base);
        let vectors = TASKS[..n_tasks]
            .iter()
            .enumerate()
            .map(|(task, name)| {
                let tuned = write(name, &|t, i| base(t, i) + delta(task, t, i));
                (*name, bench.diff(theta, tuned))
            })
            .collect();
        Self { bench, base: theta, vectors }
    }

    fn run(&self, parameters: &Value) -> Result<Vec<(String, blake3::Hash)>, StageError> {
        let n = if parameters["method"] == "slerp" { 2.min(self.vectors.len()) } else { self.vectors.len() };
        let inputs = [Input::One("base", self.base), Input::Members("vectors", &self.vectors[..n])];
        self.bench.run("merge", parameters, &inputs)
    }

    /// The values of all tensors of the (first) merged model.
    fn merged(&self, parameters: &Value) -> Vec<Vec<f32>> {
        let merged = self.run(parameters).unwrap_or_else(|error| panic!("{parameters}: {error}"));
        SHAPES.iter().map(|(name, _)| self.bench.values(merged[0].1, name)).collect()
    }

    /// Compares with the base plus `expected`, a merged task vector by tensor.
    #[track_caller]
    fn check(&self, parameters: &Value, expected: &[Vec<f64>]) {
        let merged = self.merged(parameters);
        for (t, (name, _)) in SHAPES.iter().enumerate() {
            assert_eq!(merged[t].len(), expected[t].len());
            for (i, (actual, expected)) in merged[t].iter().zip(&expected[t]).enumerate() {
                let expected = f64::from(base(t, i)) + expected;
                let off = (f64::from(*actual) - expected).abs();
                assert!(off <= 2e-7, "{parameters}: `{name}` element {i} is {actual}, not {expected}");
            }
        }
    }
}

/// Task vectors by task and tensor.
fn vectors(n_tasks: usize) -> Vec<Vec<Vec<f64>>> {
    let tensor = |task: usize, t: usize, shape: &[usize]| {
        (0..n_elements(shape)).map(|i| f64::from(delta(task, t, i))).collect()
    };
    (0..n_tasks)
        .map(|task| SHAPES.iter().enumerate().map(|(t, (_, shape))| tensor(task, t, shape)).collect())
        .collect()
}

/// The positions of the values from the largest magnitude to the smallest; of equal ones, the first first.
fn by_magnitude(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].abs().total_cmp(&values[*a].abs()).then(a.cmp(b)));
    order
}

/// Keeps only some positions.
fn keep(values: &[f64], kept: &[usize]) -> Vec<f64> {
    let mut out = vec![0.0; values.len()];
    for i in kept {
        out[*i] = values[*i];
    }
    out
}

/// Merges element by element: `merge` gets the tasks' values of one element.
fn each(tasks: &[Vec<Vec<f64>>], merge: impl Fn(&[f64]) -> f64) -> Vec<Vec<f64>> {
    let element = |t: usize, i: usize| -> Vec<f64> { tasks.iter().map(|task| task[t][i]).collect() };
    (0..SHAPES.len()).map(|t| (0..tasks[0][t].len()).map(|i| merge(&element(t, i))).collect()).collect()
}

fn agreeing(values: &[f64], tie: f64) -> Vec<f64> {
    let sum: f64 = values.iter().sum();
    let sign = if sum == 0.0 { tie } else { sum.signum() };
    values.iter().copied().filter(|value| value * sign > 0.0).collect()
}

#[test]
fn ties_over_the_whole_vector_matches_a_naive_reference() {
    let case = Case::new(3, delta);
    for density in [0.2, 0.5] {
        let trimmed: Vec<Vec<Vec<f64>>> = vectors(3)
            .iter()
            .map(|task| {
                let mut all: Vec<f64> = task.iter().flatten().map(|value| value.abs()).collect();
                all.sort_by(f64::total_cmp);
                let least = all[all.len() - (all.len() as f64 * density) as usize - 1];
                let trim = |value: &f64| if value.abs() >= least { *value } else { 0.0 };
                task.iter().map(|tensor| tensor.iter().map(trim).collect()).collect()
            })
            .collect();
        let signs = each(&trimmed, |values| {
            let sum: f64 = values.iter().sum();
            if sum == 0.0 { 0.0 } else { sum.signum() }
        });
        let majority = signs.iter().flatten().sum::<f64>().signum();
        let mean = each(&trimmed, |values| {
            let kept = agreeing(values, majority);
            kept.iter().sum::<f64>() / kept.len().max(1) as f64
        });
        case.check(&json!({ "method": "ties", "density": density }), &mean);
        let sum = each(&trimmed, |values| agreeing(values, majority).iter().sum::<f64>() * 0.3);
        case.check(&json!({ "method": "ties", "density": density, "agg": "sum", "scale": 0.3 }), &sum);
        let max = each(&trimmed, |values| {
            agreeing(values, majority).iter().fold(0.0, |a: f64, b| if b.abs() > a.abs() { *b } else { a })
        });
        case.check(&json!({ "method": "ties", "density": density, "agg": "max" }), &max);
    }
}

/// The beginnings of blocks hold other values than the rest.
#[test]
fn thresholds_do_not_depend_on_where_large_values_lie() {
    let delta = |_: usize, tensor: usize, element: usize| {
        let small = ((tensor * 7 + element * 31) % 1009 + 1) as f32 / 1_048_576.0;
        if tensor == 2 && element % 16_384 < 1_024 { small * 16.0 } else { small }
    };
    let case = Case::new(1, delta);
    let values = |t: usize| (0..n_elements(SHAPES[t].1)).map(move |i| delta(0, t, i));
    let mut all: Vec<f32> = (0..SHAPES.len()).flat_map(values).collect();
    all.sort_by(f32::total_cmp);
    let least = all[all.len() - (all.len() as f64 * 0.2) as usize - 1];
    let trim = |x: f32| if x >= least { f64::from(x) } else { 0.0 };
    let expected: Vec<Vec<f64>> = (0..SHAPES.len()).map(|t| values(t).map(trim).collect()).collect();
    case.check(&json!({ "method": "ties" }), &expected);
}

#[test]
fn selection_by_tensor_keeps_exactly_the_first_of_equals() {
    let case = Case::new(3, delta);
    let trimmed: Vec<Vec<Vec<f64>>> = vectors(3)
        .iter()
        .map(|task| {
            let trim = |tensor: &Vec<f64>| {
                let n = tensor.len();
                let count = ((n as f64 * 0.3) as usize).max(1).min(n);
                keep(tensor, &by_magnitude(tensor)[..count])
            };
            task.iter().map(trim).collect()
        })
        .collect();
    let parameters = json!({
        "method": "ties", "scope": "tensor", "density": 0.3, "agg": "mean", "mean_by": "weights", "tie": "positive",
        "weights": { "one": 1.0, "two": 0.5, "three": 2.0 },
    });
    let weights = [1.0, 0.5, 2.0];
    let mean = each(&trimmed, |values| {
        let weighted: Vec<f64> = values.iter().zip(&weights).map(|(value, weight)| value * weight).collect();
        let sum: f64 = weighted.iter().sum();
        let sign = if sum >= 0.0 { 1.0 } else { -1.0 };
        let agree = || weighted.iter().zip(&weights).filter(|(value, _)| *value * sign > 0.0);
        let total: f64 = agree().map(|(_, weight)| weight).sum();
        agree().map(|(value, _)| value).sum::<f64>() / if total == 0.0 { 1.0 } else { total }
    });
    case.check(&parameters, &mean);
}

#[test]
fn breadcrumbs_matches_a_naive_reference() {
    let case = Case::new(3, delta);
    let (density, gamma) = (0.4, 0.1);
    let by_row: Vec<Vec<Vec<f64>>> = vectors(3)
        .iter()
        .map(|task| {
            let band = |(tensor, (_, shape)): (&Vec<f64>, &(&str, &[usize]))| {
                let Some(columns) = shape.last() else { return tensor.clone() };
                let (top, kept) = ((*columns as f64 * gamma) as usize, (*columns as f64 * density) as usize);
                tensor
                    .chunks(*columns)
                    .flat_map(|row| keep(row, &by_magnitude(row)[top..(top + kept).min(row.len())]))
                    .collect()
            };
            task.iter().zip(&SHAPES).map(band).collect()
        })
        .collect();
    let parameters = json!({ "method": "breadcrumbs", "density": density, "gamma": gamma, "scale": 0.5 });
    case.check(&parameters, &each(&by_row, |values| values.iter().sum::<f64>() * 0.5));
    let by_tensor: Vec<Vec<Vec<f64>>> = vectors(3)
        .iter()
        .map(|task| {
            let band = |tensor: &Vec<f64>| {
                let n = tensor.len();
                let (top, kept) = ((n as f64 * gamma) as usize, (n as f64 * density) as usize);
                keep(tensor, &by_magnitude(tensor)[top..top + kept])
            };
            task.iter().map(band).collect()
        })
        .collect();
    let parameters =
        json!({ "method": "breadcrumbs", "density": density, "gamma": gamma, "scope": "tensor" });
    case.check(&parameters, &each(&by_tensor, |values| values.iter().sum()));
}

/// The random word of an element, asked for by itself.
fn word(seed: u64, task: usize, tensor: usize, element: usize) -> u32 {
    let mut word = [0];
    Stream::new(seed, &[TASKS[task], SHAPES[tensor].0]).fill(element, &mut word);
    word[0]
}

#[test]
fn dare_matches_a_naive_reference_with_the_same_mask() {
    let case = Case::new(3, delta);
    let mut dropped = vectors(3);
    for (task, tensors) in dropped.iter_mut().enumerate() {
        for (t, values) in tensors.iter_mut().enumerate() {
            for (i, value) in values.iter_mut().enumerate() {
                if !happens(word(9, task, t, i), threshold(0.25)) {
                    *value = 0.0;
                }
            }
        }
    }
    let sum = each(&dropped, |values| values.iter().sum::<f64>() * 0.5 / 0.25);
    case.check(&json!({ "method": "dare", "drop": 0.75, "scale": 0.5, "seed": 9 }), &sum);
    let mut by_norm = dropped.clone();
    for (tensors, originals) in by_norm.iter_mut().zip(vectors(3)) {
        for (values, original) in tensors.iter_mut().zip(originals) {
            let norm = |values: &[f64]| values.iter().map(|value| value.abs()).sum::<f64>();
            let after = norm(values);
            let ratio = if after < 1e-7 { 1.0 } else { norm(&original) / after };
            for value in values {
                *value *= ratio;
            }
        }
    }
    let mean = each(&by_norm, |values| {
        let kept = agreeing(values, 1.0);
        kept.iter().sum::<f64>() / kept.len().max(1) as f64
    });
    let parameters =
        json!({ "method": "dare", "drop": 0.75, "rescale": "l1", "aggregation": "ties-mean", "seed": 9 });
    // the sign of a sum of rescaled f32 values may differ from that of f64 ones only where it cancels
    let merged = case.merged(&parameters);
    let (mut n_off, mut n) = (0, 0);
    for (t, expected) in mean.iter().enumerate() {
        for (i, expected) in expected.iter().enumerate() {
            n += 1;
            n_off += usize::from((f64::from(merged[t][i]) - f64::from(base(t, i)) - expected).abs() > 5e-7);
        }
    }
    assert!(n_off * 100 < n, "{n_off} of {n}");
}

#[test]
fn della_matches_a_naive_reference_with_the_same_mask() {
    let case = Case::new(3, delta);
    let (density, epsilon) = (0.6, 0.2);
    let mut dropped = vectors(3);
    for (task, tensors) in dropped.iter_mut().enumerate() {
        for (t, values) in tensors.iter_mut().enumerate() {
            let shape = SHAPES[t].1;
            let columns = if shape.len() < 2 { n_elements(shape) } else { n_elements(&shape[1..]) };
            for (row, values) in values.chunks_mut(columns.max(1)).enumerate() {
                let order = by_magnitude(values);
                for (place, column) in order.iter().enumerate() {
                    let rank = (columns - 1 - place) as f64;
                    let part = if columns == 1 { 0.5 } else { rank / (columns - 1) as f64 };
                    let kept = density - epsilon + 2.0 * epsilon * part;
                    let happens = happens(word(0, task, t, row * columns + column), threshold(kept));
                    values[*column] = if happens { values[*column] / kept } else { 0.0 };
                }
            }
        }
    }
    let sum = each(&dropped, |values| values.iter().sum());
    let parameters =
        json!({ "method": "della", "density": density, "epsilon": epsilon, "aggregation": "sum" });
    case.check(&parameters, &sum);
}

#[test]
fn lines_matches_its_formula() {
    let case = Case::new(3, delta);
    // blocks 0 to 2, and what lies outside
    let factors = [0.25, 0.5, 0.75, 0.25, 0.25, 0.25, 0.25];
    let mut sum = each(&vectors(3), |values| values.iter().sum());
    for (values, factor) in sum.iter_mut().zip(factors) {
        for value in values {
            *value *= factor;
        }
    }
    case.check(&json!({ "method": "lines", "alpha": 0.25, "beta": 0.5 }), &sum);
    let merged = case.run(&json!({ "method": "lines", "on": "single-task", "beta": 0.5 })).unwrap();
    let names: Vec<&str> = merged.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, TASKS);
    let last = case.bench.values(merged[2].1, "blocks.2.large");
    assert!((0..last.len()).all(|i| last[i] == base(2, i) + delta(2, 2, i)), "the last layer is unchanged");
}

#[test]
fn pcb_matches_a_naive_reference() {
    let case = Case::new(3, delta);
    let flat: Vec<Vec<f64>> =
        vectors(3).into_iter().map(|task| task.into_iter().flatten().collect()).collect();
    let n = flat[0].len();
    let clamp = |values: &[f64], low: usize, high: usize| {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (sorted[low], sorted[high]);
        let normal = move |x: f64| (x.clamp(low, high) - low) / (high - low);
        (low, high, normal)
    };
    let magnitude = |values: &[f64]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
    let sign = |x: f64| if x == 0.0 { 0.0 } else { x.signum() };
    for (version, share) in [("root", 0.0001), ("vision", 0.01)] {
        let ends = ((n as f64 * share) as usize, (n as f64 * (1.0 - share) - 1.0) as usize);
        let limits: Vec<_> = flat.iter().map(|values| clamp(&magnitude(values), ends.0, ends.1)).collect();
        let total = |i: usize| -> f64 {
            let terms = flat.iter().zip(&limits).map(|(values, limits)| match version {
                "root" => values[i],
                _ => sign(values[i]) * limits.2(values[i].abs()),
            });
            terms.sum()
        };
        let scores: Vec<Vec<f64>> = flat
            .iter()
            .zip(&limits)
            .map(|(values, limits)| {
                let score = |i: usize| {
                    (3.0 * limits.2(values[i].abs()).powi(2)).exp() * (values[i] * total(i)).tanh()
                };
                (0..n).map(score).collect()
            })
            .collect();
        let winners: Vec<_> = scores.iter().map(|own| clamp(own, (n as f64 * 0.8) as usize, n - 1)).collect();
        let merged: Vec<f64> = (0..n)
            .map(|i| {
                let (mut sum, mut weight) = (0.0, 0.0);
                for t in 0..3 {
                    let share = winners[t].2(scores[t][i]);
                    sum += share * sign(flat[t][i]) * flat[t][i].abs().clamp(limits[t].0, limits[t].1);
                    weight += share;
                }
                sum / weight.max(1e-12)
            })
            .collect();
        let actual: Vec<f32> = case
            .merged(&json!({ "method": "pcb", "version": version, "ratio": 0.2, "scale": 1.0 }))
            .into_iter()
            .flatten()
            .collect();
        let bases: Vec<f32> = SHAPES
            .iter()
            .enumerate()
            .flat_map(|(t, (_, shape))| (0..n_elements(shape)).map(move |i| base(t, i)))
            .collect();
        // Next to its threshold, a score's share is rounding; who has nothing else then has all or nothing.
        let is_off = |i: &usize| (f64::from(actual[*i] - bases[*i]) - merged[*i]).abs() > 1e-5;
        let n_off = (0..n).filter(is_off).count();
        assert!(n_off * 1000 <= n, "{version}: {n_off} of {n}");
    }
}

#[test]
fn sce_matches_a_naive_reference() {
    let case = Case::new(3, delta);
    let tasks = vectors(3);
    let expected: Vec<Vec<f64>> = (0..SHAPES.len())
        .map(|t| {
            let n = tasks[0][t].len();
            let variance = |i: usize| {
                let mean = tasks.iter().map(|task| task[t][i]).sum::<f64>() / 3.0;
                let squares = tasks.iter().map(|task| (task[t][i] - mean).powi(2)).sum::<f64>();
                f64::from((squares / 3.0) as f32)
            };
            let variances: Vec<f64> = (0..n).map(variance).collect();
            let n_nonzero = variances.iter().filter(|variance| **variance > 0.0).count();
            let kept = &by_magnitude(&variances)[..(n_nonzero as f64 * 0.5) as usize];
            let masked: Vec<Vec<f64>> = tasks.iter().map(|task| keep(&task[t], kept)).collect();
            let energy = |values: &Vec<f64>| values.iter().map(|x| x * x).sum::<f64>() / n.max(1) as f64;
            let energies: Vec<f64> = masked.iter().map(energy).collect();
            let total: f64 = energies.iter().sum();
            let weight = |own: &f64| if total < 1e-6 { 1.0 / 3.0 } else { own / total };
            let weights: Vec<f64> = energies.iter().map(weight).collect();
            let merge = |i: usize| {
                let sum: f64 = masked.iter().map(|values| values[i]).sum();
                let sign = if sum >= 0.0 { 1.0 } else { -1.0 };
                let agree = || masked.iter().zip(&weights).filter(|(values, _)| values[i] * sign > 0.0);
                let total: f64 = agree().map(|(_, weight)| *weight).sum();
                agree().map(|(values, weight)| values[i] * weight).sum::<f64>() / total.max(1e-6)
            };
            (0..n).map(merge).collect()
        })
        .collect();
    case.check(&json!({ "method": "sce", "select_topk": 0.5 }), &expected);
}

#[test]
fn task_vectors_of_zeros_leave_the_base_as_it_is() {
    for n_tasks in [2, 3] {
        let case = Case::new(n_tasks, |_, _, _| 0.0);
        for parameters in all_parameters() {
            let merged = case.merged(&parameters);
            for (t, values) in merged.iter().enumerate() {
                for (i, value) in values.iter().enumerate() {
                    assert!((value - base(t, i)).abs() <= 1.2e-7, "{parameters}: {} {i}", SHAPES[t].0);
                }
            }
        }
    }
}

#[test]
fn a_single_task_is_merged_by_every_method_that_takes_one() {
    let case = Case::new(1, delta);
    for parameters in all_parameters() {
        let id = parameters["method"].as_str().unwrap();
        let outcome = case.run(&parameters);
        match id {
            "slerp" | "model-stock" => {
                let message = outcome.unwrap_err().to_string();
                assert!(message.contains("2 task vectors, got 1"), "{message}");
            }
            _ => assert_eq!(outcome.unwrap().len(), 1, "{parameters}"),
        }
    }
    for parameters in [json!({ "method": "karcher" }), json!({ "method": "ties", "density": 1.0 })] {
        let merged = case.merged(&parameters);
        let exact = |t: usize| (0..merged[t].len()).all(|i| merged[t][i] == base(t, i) + delta(0, t, i));
        assert!((0..SHAPES.len()).all(exact), "{parameters}: the model itself");
    }
}

#[test]
fn constant_task_vectors_are_merged() {
    let case = Case::new(3, |task, _, _| (task + 1) as f32 / 64.0);
    for parameters in all_parameters() {
        case.merged(&parameters);
    }
}

#[test]
fn values_that_are_not_finite_are_refused_by_name() {
    for bad in [f32::NAN, f32::INFINITY] {
        let case = Case::new(3, |task, tensor, element| {
            if (task, tensor, element) == (1, 2, 66_000) { bad } else { delta(task, tensor, element) }
        });
        for parameters in all_parameters() {
            if parameters["on"] == "single-task" {
                continue;
            }
            let message = case.run(&parameters).unwrap_err().to_string();
            let named = message.contains("`blocks.2.large`") && message.contains("`two`");
            assert!(named && message.contains("66000"), "{parameters}: {message}");
        }
    }
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let bits = |threads: usize| -> Vec<Vec<u32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let case = Case::new(3, |task, tensor, element| delta(task, tensor, element) * 1.000_1);
            let all = all_parameters();
            let values = all.iter().map(|parameters| case.merged(parameters));
            values.map(|tensors| tensors.iter().flatten().map(|value| value.to_bits()).collect()).collect()
        })
    };
    let one = bits(1);
    for threads in [2, 8] {
        for (parameters, (a, b)) in all_parameters().iter().zip(one.iter().zip(bits(threads))) {
            assert!(*a == b, "{parameters} with {threads} threads");
        }
    }
}

#[test]
fn numbers_out_of_range_are_refused_with_what_was_expected() {
    let case = Case::new(3, delta);
    for (parameters, expected) in [
        (json!({ "method": "ties", "density": 0.0 }), "`density` must be above 0 and at most 1, got 0"),
        (json!({ "method": "ties", "density": 1.5 }), "`density` must be above 0 and at most 1, got 1.5"),
        (json!({ "method": "ties", "scale": 1e300 }), "`scale` must be a finite number"),
        (json!({ "method": "dare", "drop": 1.0 }), "`drop` must be at least 0 and below 1, got 1"),
        (
            json!({ "method": "della", "density": 0.9 }),
            "`density` must be above 0.15 and below 0.85, got 0.9",
        ),
        (
            json!({ "method": "breadcrumbs", "gamma": -0.1 }),
            "`gamma` must be at least 0 and below 1, got -0.1",
        ),
        (
            json!({ "method": "sce", "select_topk": 0.0 }),
            "`select_topk` must be above 0 and at most 1, got 0",
        ),
        (json!({ "method": "pcb", "ratio": 2.0 }), "`ratio` must be above 0 and at most 1, got 2"),
        (json!({ "method": "lines", "density": 0.0 }), "`density` must be above 0 and at most 1, got 0"),
        (json!({ "method": "slerp", "t": 1.5 }), "`t` must be from 0 to 1, got 1.5"),
        (json!({ "method": "karcher", "tol": 0.0 }), "`tol` must be above 0, got 0"),
    ] {
        let message = case.run(&parameters).unwrap_err().to_string();
        assert!(message.contains(expected), "{parameters}: {message}");
    }
    let inputs = [Input::One("base", case.base), Input::Members("vectors", &case.vectors)];
    let message = case.bench.run("merge", &json!({ "method": "slerp" }), &inputs).unwrap_err().to_string();
    assert!(message.contains("`slerp` interpolates between 2 task vectors, got 3"), "{message}");
}
