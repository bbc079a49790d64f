//! Losses against their definitions in f64, their gradients against finite differences, and CDPQ's against the authors'
//! code.

use std::path::Path;

use merganser_onnx::gradient::{Forward, GradientError, Tape, Value, losses};
use ndarray::{ArrayD, IxDyn};
use safetensors::SafeTensors;

use super::support::{Feeds, Numbers, Running, Small};
use crate::support::test_data;

type Loss = fn(&mut Tape, &Value, &Value) -> Result<Value, GradientError>;

/// A graph whose output is its input `student`, with another input `teacher`.
fn pair(student: &[usize], teacher: &[usize]) -> (Forward, Value, Value) {
    let mut forward =
        Small::new(17).input("student", student).node("Identity", &["student"], vec![]).forward();
    let teacher = forward.add_input("teacher", teacher).unwrap();
    let y = forward.value("y").unwrap();
    (forward, y, teacher)
}

/// Returns the loss and its gradient with respect to the student.
fn evaluate(loss: Loss, student: &ArrayD<f32>, teacher: &ArrayD<f32>) -> (f64, ArrayD<f32>) {
    let (mut forward, y, t) = pair(student.shape(), teacher.shape());
    let loss = loss(forward.tape(), &y, &t).unwrap();
    let mut running = Running::new(forward.differentiate(&loss, &["student"], &[]).unwrap());
    let feeds: Feeds = vec![("student".to_owned(), student.clone()), ("teacher".to_owned(), teacher.clone())];
    let outputs = running.run(&feeds);
    let value = *outputs[running.graph.loss()].iter().next().unwrap();
    (f64::from(value), running.gradient(&outputs, "student"))
}

fn softmax(row: &[f64]) -> Vec<f64> {
    let largest = row.iter().copied().fold(f64::MIN, f64::max);
    let exps: Vec<f64> = row.iter().map(|z| (z - largest).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|e| e / sum).collect()
}

fn rows(x: &ArrayD<f32>) -> Vec<Vec<f64>> {
    let width = *x.shape().last().unwrap();
    x.as_slice().unwrap().chunks(width).map(|row| row.iter().map(|&v| f64::from(v)).collect()).collect()
}

/// Compares with a definition in f64, whose differences are the gradient.
fn check(
    loss: Loss,
    student: &ArrayD<f32>,
    teacher: &ArrayD<f32>,
    definition: impl Fn(&[Vec<f64>], &[Vec<f64>]) -> f64,
) {
    let (value, gradient) = evaluate(loss, student, teacher);
    let (mut s, t) = (rows(student), rows(teacher));
    let expected = definition(&s, &t);
    assert!((value - expected).abs() <= 1e-5 * expected.abs().max(0.1), "{value} for {expected}");
    let width = s[0].len();
    for (i, &g) in gradient.iter().enumerate() {
        let mut at = |step: f64| {
            s[i / width][i % width] += step;
            let value = definition(&s, &t);
            s[i / width][i % width] -= step;
            value
        };
        let expected = (at(1e-4) - at(-1e-4)) / 2e-4;
        assert!((f64::from(g) - expected).abs() < 1e-5, "gradient {i}: {g} for {expected}");
    }
}

fn logits() -> ArrayD<f32> {
    Numbers(5).array(&[3, 4]) * 4.0
}

#[test]
fn cross_entropy() {
    let mut targets = ArrayD::zeros(IxDyn(&[3, 4]));
    targets[[0, 2]] = 1.0;
    targets[[1, 0]] = 1.0;
    (targets[[2, 1]], targets[[2, 3]]) = (0.25, 0.75);
    check(losses::cross_entropy, &logits(), &targets, |z, t| {
        let row = |(z, t): (&Vec<f64>, &Vec<f64>)| -> f64 {
            softmax(z).iter().zip(t).map(|(p, t)| -t * p.ln()).sum()
        };
        z.iter().zip(t).map(row).sum::<f64>() / z.len() as f64
    });
}

#[test]
fn entropy() {
    let loss: Loss = |tape, logits, _| losses::entropy(tape, logits);
    check(loss, &logits(), &logits(), |z, _| {
        let row = |z: &Vec<f64>| -> f64 { softmax(z).iter().map(|p| -p * p.ln()).sum() };
        z.iter().map(row).sum::<f64>() / z.len() as f64
    });
}

#[test]
fn divergence_of_logits() {
    let teacher = Numbers(6).array(&[3, 4]) * 3.0;
    let loss: Loss = |tape, s, t| losses::logits_divergence(tape, s, t, 2.5);
    check(loss, &logits(), &teacher, |z, t| {
        let heat = |row: &[f64]| softmax(&row.iter().map(|v| v / 2.5).collect::<Vec<_>>());
        let row = |(z, t): (&Vec<f64>, &Vec<f64>)| -> f64 {
            heat(t).iter().zip(heat(z)).map(|(p, q)| p * (p / q).ln()).sum()
        };
        2.5 * 2.5 * z.iter().zip(t).map(row).sum::<f64>() / z.len() as f64
    });
}

#[test]
fn squared_error_and_weights() {
    let loss: Loss = |tape, s, t| {
        let error = losses::mean_squared_error(tape, s, t)?;
        let entropy = losses::entropy(tape, s)?;
        Ok(losses::weighted_sum(tape, &[(0.5, error), (2.0, entropy)]))
    };
    check(loss, &logits(), &Numbers(6).array(&[3, 4]), |z, t| {
        let square: f64 = z.iter().flatten().zip(t.iter().flatten()).map(|(a, b)| (a - b).powi(2)).sum();
        let entropy: f64 = z.iter().flat_map(|z| softmax(z)).map(|p| -p * p.ln()).sum();
        0.5 * square / 12.0 + 2.0 * entropy / 3.0
    });
}

/// [classes, features]
const HEAD: [[f32; 4]; 5] = [
    [0.5, -1.0, 2.0, 0.25],
    [1.5, 0.75, -0.5, -1.0],
    [-2.0, 0.5, 0.5, 1.0],
    [0.1, 0.2, 0.3, 0.4],
    [-0.7, 1.1, 0.0, -0.9],
];
const BIAS: [f32; 5] = [0.1, -0.2, 0.3, 0.0, -0.5];

#[test]
fn linear_heads() {
    let mut targets = ArrayD::zeros(IxDyn(&[3, 5]));
    (targets[[0, 4]], targets[[1, 0]], targets[[2, 2]]) = (1.0, 1.0, 1.0);
    let loss = |normalize: bool| {
        move |features: &[Vec<f64>], targets: &[Vec<f64>]| {
            let row = |(x, t): (&Vec<f64>, &Vec<f64>)| -> f64 {
                let norm = if normalize { x.iter().map(|x| x * x).sum::<f64>().sqrt() } else { 1.0 };
                let product = |w: &[f32; 4]| -> f64 { w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum() };
                let logits: Vec<f64> =
                    HEAD.iter().zip(BIAS).map(|(w, b)| product(w) / norm + f64::from(b)).collect();
                softmax(&logits).iter().zip(t).map(|(p, t)| -t * p.ln()).sum()
            };
            features.iter().zip(targets).map(row).sum::<f64>() / features.len() as f64
        }
    };
    let plain: Loss = |tape, x, t| {
        let logits = losses::linear_head(tape, x, HEAD.as_flattened(), &BIAS, false)?;
        losses::cross_entropy(tape, &logits, t)
    };
    check(plain, &logits(), &targets, loss(false));
    let normalized: Loss = |tape, x, t| {
        let logits = losses::linear_head(tape, x, HEAD.as_flattened(), &BIAS, true)?;
        losses::cross_entropy(tape, &logits, t)
    };
    check(normalized, &logits(), &targets, loss(true));
    let (mut forward, y, _) = pair(&[2, 3], &[1]);
    let error =
        losses::linear_head(forward.tape(), &y, HEAD.as_flattened(), &BIAS, true).unwrap_err().to_string();
    assert_eq!(error, "values of shapes [2, 3] and [5, 4] cannot be compared by a linear head");
}

#[test]
fn tokens_become_maps() {
    let (mut forward, y, _) = pair(&[2, 5, 3], &[1]);
    assert_eq!(losses::tokens_as_map(forward.tape(), &y).unwrap().shape, [2, 3, 5, 1]);
    let (mut forward, y, _) = pair(&[2, 5], &[1]);
    assert!(losses::tokens_as_map(forward.tape(), &y).is_err());
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let (mut forward, y, t) = pair(&[2, 5], &[2, 4]);
    let error = losses::cross_entropy(forward.tape(), &y, &t).unwrap_err().to_string();
    assert_eq!(error, "values of shapes [2, 5] and [2, 4] cannot be compared by cross-entropy");
    let (mut forward, y, t) = pair(&[1, 3, 4, 4], &[1, 2, 4, 4]);
    assert!(losses::affinity(forward.tape(), &y, &t).is_err());
}

fn tensor(tensors: &SafeTensors<'_>, name: &str) -> ArrayD<f32> {
    let view = tensors.tensor(name).unwrap();
    let values = match view.dtype() {
        safetensors::Dtype::F32 => {
            view.data().as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect()
        }
        safetensors::Dtype::F64 => {
            view.data().as_chunks::<8>().0.iter().map(|c| f64::from_le_bytes(*c) as f32).collect()
        }
        other => panic!("{name} has type {other:?}"),
    };
    ArrayD::from_shape_vec(IxDyn(view.shape()), values).unwrap()
}

fn check_cdpq(folder: &Path, case: &str, kind: &str, loss: Loss, tolerance: f64) {
    let folder = folder.join("goldens/public/cdpq");
    let meta: serde_json::Value =
        serde_json::from_slice(&fs_err::read(folder.join("meta.json")).unwrap()).unwrap();
    let bytes = fs_err::read(folder.join("tensors.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let get = |what: &str| tensor(&tensors, &format!("{case}|{what}"));
    let (value, gradient) = evaluate(loss, &get("student"), &get("teacher"));
    let expected = &meta["cases"][case][kind]["loss_f64"];
    if expected == "nan" {
        assert!(value.is_nan(), "{case} {kind}: {value}");
        return;
    }
    let expected = expected.as_f64().unwrap();
    assert!((value - expected).abs() <= tolerance * expected, "{case} {kind}: {value} for {expected}");
    let truth = get(&format!("grad_{kind}_f64"));
    let norm = |x: &ArrayD<f32>| x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    let error = norm(&(&gradient - &truth));
    assert!(
        error <= tolerance * norm(&truth),
        "{case} {kind}: gradient off by {error:e} of {:e}",
        norm(&truth)
    );
}

#[test]
fn losses_of_cdpq_equal_their_authors() {
    let Some(data) = test_data("losses_of_cdpq_equal_their_authors") else { return };
    for case in ["small", "medium", "pooled", "pooled_uneven", "zero_channel", "single_pixel"] {
        check_cdpq(&data, case, "layer", losses::layer_statistics, 1e-5);
        // Of a single pixel the student's gradient is exactly zero: normalized, every value is ±1.
        check_cdpq(&data, case, "affinity", losses::affinity, 1e-5);
    }
}
