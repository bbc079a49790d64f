//! Whole models: every tensor's gradient as PyTorch's autograd computes it (see `tests/gradients/make_golden.py`).

use std::path::{Path, PathBuf};

use merganser_onnx::gradient::{Forward, TensorGradients, losses};
use merganser_onnx::{Binding, Input, Prepared, SessionOptions};
use ndarray::{ArrayD, IxDyn};
use serde_json::Value;

use super::support::splitmix64;
use crate::support::{Fixture, runtime, test_data};

/// Of a tensor's gradient, relative to its norm.
const TOLERANCE: f64 = 1e-4;
/// Noise of tensors whose true gradient is (almost) zero, as biases of keys, relative to the model's largest gradient.
const NOISE: f64 = 1e-6;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join("gradients")
}

/// Returns Σ ±g with the signs of sum `j` (make_golden.py says which).
fn signed_sum(g: &[f32], j: u64) -> f64 {
    let sign = |i: usize| {
        let mut state = (j << 32).wrapping_add(i as u64);
        if splitmix64(&mut state) >> 63 == 1 { -1.0 } else { 1.0 }
    };
    g.iter().enumerate().map(|(i, &g)| sign(i) * f64::from(g)).sum()
}

/// Compares all gradients of a graph; `frozen` tensors get none.
fn check(fixture: &Fixture, frozen: &[&str]) {
    let label = format!("{}", fixture.onnx().display());
    let family = fixture.folder.file_name().unwrap().to_str().unwrap().to_owned();
    let all: Value = serde_json::from_slice(&fs_err::read(goldens().join("golden.json")).unwrap()).unwrap();
    let golden = &all[format!("{family}/{}", fixture.graph)];
    let (graph, base, model, io) = (fixture.load(), fixture.base(), fixture.perturbed(), fixture.io());
    let binding = Binding::find(&graph, &base).unwrap();
    let prepared = Prepared::new(&graph, &binding).unwrap();
    let names: Vec<String> = graph.inputs().iter().map(|p| p.name.clone()).collect();
    let feeds = io.inputs(&names);
    let shapes: Vec<(&str, &[usize])> = feeds
        .iter()
        .map(|(name, input)| match input {
            Input::F32(array) => (*name, array.shape()),
            Input::I64(array) => (*name, array.shape()),
        })
        .collect();
    let scratch = tempfile::tempdir().unwrap();
    let mut forward = Forward::new(runtime(), &prepared, &shapes, &[], scratch.path()).unwrap();
    let outputs: Vec<_> = forward.outputs().iter().map(|o| forward.value(o).unwrap()).collect();
    let tape = forward.tape();
    let squares: Vec<_> = outputs
        .iter()
        .map(|y| {
            let square = tape.mul(y, y);
            (1.0, tape.mean(&square))
        })
        .collect();
    let loss = losses::weighted_sum(tape, &squares);
    let is_frozen = |sources: Vec<&str>| sources.iter().any(|s| frozen.contains(s));
    let weights: Vec<String> =
        forward.weights().iter().filter(|s| !is_frozen(s.source.tensors())).map(|s| s.name.clone()).collect();
    let weights: Vec<&str> = weights.iter().map(String::as_str).collect();
    let differentiated =
        forward.differentiate(&loss, &weights, &[]).unwrap_or_else(|e| panic!("{label}: {e}"));
    let mut session =
        runtime().session(differentiated.prepared(), &model, SessionOptions::default()).unwrap();
    let trained: Vec<(&str, ArrayD<f32>)> = differentiated
        .trained_weights()
        .iter()
        .map(|s| {
            let values = s.values(&model).unwrap();
            (s.name.as_str(), ArrayD::from_shape_vec(IxDyn(&s.shape), values).unwrap())
        })
        .collect();
    let mut inputs = feeds;
    inputs.extend(trained.iter().map(|(name, array)| (*name, Input::from(array.view()))));
    let outputs: std::collections::HashMap<_, _> = session.run(&inputs).unwrap().into_iter().collect();
    let loss = f64::from(*outputs[differentiated.loss()].iter().next().unwrap());
    let expected = golden["loss"].as_f64().unwrap();
    assert!((loss - expected).abs() <= 1e-5 * expected.abs(), "{label}: loss {loss}, expected {expected}");
    let mut sums = TensorGradients::default();
    for gradient in differentiated.gradients() {
        let Some(output) = &gradient.output else { continue };
        let slot = differentiated.trained_weights().iter().find(|s| s.name == gradient.variable).unwrap();
        sums.add(slot, outputs[output].as_slice().unwrap(), &model).unwrap();
    }
    compare(&label, golden, &sums, frozen);
}

fn compare(label: &str, golden: &Value, sums: &TensorGradients, frozen: &[&str]) {
    let tensors = golden["tensors"].as_object().unwrap();
    let norm = |tensor: &Value| tensor["norm"].as_f64().unwrap();
    let largest = tensors.values().map(norm).fold(0.0, f64::max);
    let mut n_compared = 0;
    for (name, tensor) in tensors.iter().filter(|(name, _)| !frozen.contains(&name.as_str())) {
        let Some(actual) = sums.tensors.get(name) else {
            // A parameter that does not reach this graph's outputs may have a gradient of zeros in PyTorch.
            assert!(norm(tensor) == 0.0, "{label}: no gradient of {name}");
            continue;
        };
        let allowed = TOLERANCE * norm(tensor) + NOISE * largest;
        // The mean square of random signed sums of an error is the square of its norm.
        let signed = tensor["sums"].as_array().unwrap();
        let square: f64 = signed
            .iter()
            .enumerate()
            .map(|(j, sum)| (signed_sum(actual, j as u64) - sum.as_f64().unwrap()).powi(2))
            .sum();
        let error = (square / signed.len() as f64).sqrt();
        assert!(error <= allowed, "{label}: {name} is off by {error:e} of {:e}", norm(tensor));
        if let Some(values) = tensor["values"].as_array() {
            assert_eq!(values.len(), actual.len(), "{label}: {name}");
            for (value, actual) in values.iter().zip(actual) {
                let error = (value.as_f64().unwrap() - f64::from(*actual)).abs();
                assert!(error <= allowed, "{label}: {name} has {actual} for {value}");
            }
        }
        n_compared += 1;
    }
    assert_eq!(n_compared, sums.tensors.len(), "{label}: gradients of tensors that PyTorch gives none");
    assert!(n_compared * 10 >= tensors.len() * 7, "{label}: {n_compared} of {} compared", tensors.len());
}

fn check_exports(folder: &str, graph: &str) {
    for exporter in ["ts17", "ts17raw", "dyn18"] {
        check(&Fixture::new(folder, graph, exporter), &[]);
    }
}

#[test]
fn clip_vision() {
    check_exports("clip_hf", "vision");
}

#[test]
fn clip_text() {
    check_exports("clip_hf", "text");
}

#[test]
fn clip_with_both_towers_and_the_logit_scale() {
    check(&Fixture::new("clip_hf", "model", "dyn18"), &[]);
    let test = "clip_with_both_towers_and_the_logit_scale";
    check_others(test, "clip_hf", "model", &["ts17", "ts17raw"], &[]);
}

#[test]
fn deit_of_timm() {
    check_exports("deit_timm", "model");
}

#[test]
fn deit_of_transformers() {
    check_exports("deit_hf", "model");
}

#[test]
fn exports_of_opset_14() {
    for (folder, graph) in [("clip_hf", "vision"), ("clip_hf", "text"), ("deit_timm", "model")] {
        check(&Fixture::new(folder, graph, "ts14"), &[]);
    }
}

fn check_others(test: &str, folder: &str, graph: &str, exporters: &[&str], frozen: &[&str]) {
    let Some(data) = test_data(test) else { return };
    for exporter in exporters {
        let folder = data.join("onnx-fixtures").join(folder);
        let (graph, exporter) = (graph.to_owned(), (*exporter).to_owned());
        check(&Fixture { folder, graph, exporter }, frozen);
    }
}

#[test]
fn clip_of_open_clip() {
    for graph in ["vision", "text"] {
        check_others("clip_of_open_clip", "clip_open", graph, &["ts17", "ts17raw", "dyn18"], &[]);
    }
}

#[test]
fn sam2_encoder_of_transformers() {
    let exporters = ["ts17", "ts17raw", "dyn18raw"];
    check_others("sam2_encoder_of_transformers", "sam2_hf", "vision_encoder", &exporters, &[]);
}

#[test]
fn sam2_decoder_of_transformers() {
    let exporters = ["ts17", "ts17raw", "dyn18raw"];
    let graph = "prompt_encoder_mask_decoder";
    check_others("sam2_decoder_of_transformers", "sam2_hf", graph, &exporters, &[]);
}

#[test]
fn sam2_encoder_of_meta() {
    check_others("sam2_encoder_of_meta", "sam2_meta", "encoder", &["ts17", "ts17raw", "dyn18raw"], &[]);
}

#[test]
fn sam2_decoder_of_meta() {
    check_others("sam2_decoder_of_meta", "sam2_meta", "decoder", &["ts17", "ts17raw", "dyn18raw"], &[]);
}
