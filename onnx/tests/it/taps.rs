//! The activation that a weight is found to be multiplied with gives the layer's output.

use std::collections::BTreeSet;

use merganser_onnx::{Binding, Layout, LinearUse, Optimization, Prepared, SessionOptions, Side};
use ndarray::{Array2, ArrayD};

use crate::support::{Checkpoint, Fixture, runtime, test_data};

/// Every matrix of a checkpoint is multiplied, except those that are looked up or added.
fn is_linear(name: &str, shape: &[usize]) -> bool {
    let added = ["position_embed", "positional_embed", "token_embed", "pos_embed", "cls_token", "dist_token"];
    let more = ["class_embedding", "distillation_token"];
    shape.len() >= 2 && !added.iter().chain(&more).any(|part| name.contains(part))
}

struct Captured {
    use_: LinearUse,
    activation: ArrayD<f32>,
    output: ArrayD<f32>,
}

fn capture(fixture: &Fixture, model: &Checkpoint) -> (Binding, Vec<Captured>) {
    let binding = Binding::find(&fixture.load(), &fixture.base()).unwrap();
    let prepared = Prepared::new(&fixture.load(), &binding).unwrap();
    let uses = LinearUse::find(&prepared, &binding).unwrap();
    let values: Vec<&str> = uses.iter().flat_map(|u| [u.activation.as_str(), u.output.as_str()]).collect();
    let (tapped, names) = prepared.with_outputs(&values).unwrap();
    let options = SessionOptions { optimization: Optimization::All, ..SessionOptions::default() };
    let mut session = runtime().session(&tapped, model, options).unwrap();
    let io = fixture.io();
    let inputs: Vec<String> = session.input_names().map(str::to_owned).collect();
    let outputs = session.run(&io.inputs(&inputs)).unwrap();
    let value = |name: &str| outputs.iter().find(|(output, _)| output == name).unwrap().1.clone();
    let pairs = names.chunks_exact(2);
    let captured = uses.into_iter().zip(pairs).map(|(use_, names)| Captured {
        use_,
        activation: value(&names[0]),
        output: value(&names[1]),
    });
    (binding, captured.collect())
}

/// W·x by its definition, in f64; one row per vector.
fn naive_product(use_: &LinearUse, weight: &[f32], vectors: &Array2<f32>) -> Array2<f64> {
    let n_outputs = if use_.inputs == Side::Columns { use_.n_rows } else { use_.columns };
    Array2::from_shape_fn((vectors.nrows(), n_outputs), |(vector, output)| {
        let at = |input: usize| match use_.inputs {
            Side::Columns => (use_.first_row + output) * use_.columns + input,
            Side::Rows => (use_.first_row + input) * use_.columns + output,
        };
        let terms = vectors.row(vector);
        terms.iter().enumerate().map(|(i, x)| f64::from(*x) * f64::from(weight[at(i)])).sum()
    })
}

/// The node's output less W·x must be the same for every vector: the bias.
fn check(fixture: &Fixture) {
    let model = fixture.perturbed();
    let (binding, captured) = capture(fixture, &model);
    let what = fixture.onnx().display().to_string();
    let known: BTreeSet<&str> = binding.tensors.iter().flat_map(|tensor| tensor.source.tensors()).collect();
    let expected: BTreeSet<&str> =
        known.into_iter().filter(|name| is_linear(name, &model.0[*name].0)).collect();
    let found: BTreeSet<&str> = captured.iter().map(|c| c.use_.tensor.as_str()).collect();
    assert_eq!(found, expected, "{what}");
    for Captured { use_, activation, output } in &captured {
        let weight = &model.0[&use_.tensor].1;
        let vectors = use_.layout.vectors(&activation.view(), use_.n_inputs()).unwrap();
        let product = naive_product(use_, weight, &vectors);
        let layout = if matches!(use_.layout, Layout::Windows(_)) { Layout::Channels } else { Layout::Last };
        let outputs = layout.vectors(&output.view(), product.ncols()).unwrap();
        assert_eq!(outputs.nrows(), product.nrows(), "{what} {use_:?}");
        let largest = product.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        for channel in 0..product.ncols() {
            let bias = f64::from(outputs[[0, channel]]) - product[[0, channel]];
            for vector in 0..product.nrows() {
                let error = (f64::from(outputs[[vector, channel]]) - product[[vector, channel]] - bias).abs();
                assert!(error <= 1e-5 * largest, "{what} {use_:?}: {error} of {largest}");
            }
        }
    }
}

#[test]
fn layers_of_every_export_are_found_with_what_they_multiply() {
    for (folder, graph) in
        [("clip_hf", "vision"), ("clip_hf", "text"), ("deit_timm", "model"), ("deit_hf", "model")]
    {
        for exporter in ["ts17", "ts17raw", "dyn18"] {
            check(&Fixture::new(folder, graph, exporter));
        }
    }
}

#[test]
fn layers_are_found_in_exports_of_openclip() {
    let Some(data) = test_data("layers_are_found_in_exports_of_openclip") else { return };
    for graph in ["vision", "text"] {
        for exporter in ["ts17", "ts17raw", "dyn18"] {
            check(&Fixture {
                folder: data.join("onnx-fixtures/clip_open"),
                graph: graph.to_owned(),
                exporter: exporter.to_owned(),
            });
        }
    }
}

#[test]
fn a_value_that_is_not_there_is_named() {
    let fixture = Fixture::new("deit_timm", "model", "ts17");
    let binding = Binding::find(&fixture.load(), &fixture.base()).unwrap();
    let prepared = Prepared::new(&fixture.load(), &binding).unwrap();
    let error = prepared.with_outputs(&["nowhere"]).unwrap_err();
    assert_eq!(error.to_string(), "the graph has no value `nowhere`");
    let (tapped, names) = prepared.with_outputs(&["pixel_values", "pixel_values", "logits"]).unwrap();
    assert_eq!(names, ["pixel_values/tapped", "pixel_values/tapped", "logits"]);
    assert_eq!(tapped.slots(), prepared.slots());
}
