//! Layers of a library are found in graphs with what they give out: products with their biases.

use std::collections::BTreeSet;

use merganser_onnx::{Binding, Layout, Module, Prepared, SessionOptions};

use crate::support::{Fixture, runtime, test_data};

/// Every output of a layer is W·x + b, with the bias that the checkpoint has beside the weight.
fn check(fixture: &Fixture) {
    let what = fixture.onnx().display().to_string();
    let model = fixture.perturbed();
    let binding = Binding::find(&fixture.load(), &fixture.base()).unwrap();
    let prepared = Prepared::new(&fixture.load(), &binding).unwrap();
    let modules = Module::find(&prepared, &binding).unwrap();
    let values: Vec<&str> =
        modules.iter().flat_map(|module| [module.weight.activation.as_str(), &module.output]).collect();
    let (tapped, names) = prepared.with_outputs(&values).unwrap();
    let mut session = runtime().session(&tapped, &model, SessionOptions::default()).unwrap();
    let io = fixture.io();
    let inputs: Vec<String> = session.input_names().map(str::to_owned).collect();
    let outputs = session.run(&io.inputs(&inputs)).unwrap();
    let value = |name: &str| outputs.iter().find(|(output, _)| output == name).unwrap().1.clone();
    let mut biased = BTreeSet::new();
    for (module, names) in modules.iter().zip(names.chunks_exact(2)) {
        let layer = &module.weight;
        let vectors = layer.layout.vectors(&value(&names[0]).view(), layer.n_inputs()).unwrap();
        let given = value(&names[1]);
        let channels = if module.channels == Layout::Channels { 1 } else { given.ndim() - 1 };
        let n_channels = given.shape()[channels];
        let given = module.channels.vectors(&given.view(), n_channels).unwrap();
        assert_eq!(given.nrows(), vectors.nrows(), "{what} {layer:?}");
        let weight = &model.0[&layer.tensor].1;
        let bias = layer.tensor.replace("weight", "bias");
        let bias = model.0.get(&bias).filter(|_| bias != layer.tensor).map(|(_, values)| values);
        if modules.iter().filter(|other| other.output == module.output).count() > 1 {
            // Several weights side by side: which of the channels are whose, the binding knows.
            continue;
        }
        let mut largest = 0f64;
        let mut worst = 0f64;
        for (x, y) in vectors.outer_iter().zip(given.outer_iter()) {
            for row in 0..layer.n_rows {
                let weights = &weight[(layer.first_row + row) * layer.columns..][..layer.columns];
                let product: f64 = x.iter().zip(weights).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                let bias = bias.map_or(0.0, |bias| f64::from(bias[layer.first_row + row]));
                largest = largest.max((product + bias).abs());
                worst = worst.max((f64::from(y[row]) - product - bias).abs());
            }
        }
        assert!(worst <= 1e-5 * largest, "{what} {layer:?}: {worst} of {largest}");
        biased.extend(bias.map(|_| layer.tensor.clone()));
    }
    assert!(biased.len() * 2 >= modules.len(), "{what}: {} of {} have a bias", biased.len(), modules.len());
}

#[test]
fn layers_of_clip_and_deit() {
    for (folder, graph) in [("clip_hf", "vision"), ("deit_timm", "model"), ("deit_hf", "model")] {
        for exporter in ["ts17", "ts17raw", "dyn18"] {
            check(&Fixture::new(folder, graph, exporter));
        }
    }
}

#[test]
fn layers_of_sam2() {
    let Some(data) = test_data("layers_of_sam2") else { return };
    for (folder, graph) in [("sam2_hf", "vision_encoder"), ("sam2_meta", "encoder")] {
        let folder = data.join("onnx-fixtures").join(folder);
        check(&Fixture { folder, graph: graph.to_owned(), exporter: "ts17".to_owned() });
    }
}

#[test]
fn they_come_in_the_order_of_computation() {
    let fixture = Fixture::new("deit_timm", "model", "ts17");
    let binding = Binding::find(&fixture.load(), &fixture.base()).unwrap();
    let prepared = Prepared::new(&fixture.load(), &binding).unwrap();
    let modules = Module::find(&prepared, &binding).unwrap();
    let names: Vec<&str> = modules.iter().take(5).map(|module| module.weight.tensor.as_str()).collect();
    let expected = [
        "patch_embed.proj",
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
    ];
    assert_eq!(names, expected.map(|name| format!("{name}.weight")));
    assert!(modules.iter().all(|module| module.owns_activation || module.weight.tensor.starts_with("head")));
    let qkv = &modules[1];
    assert_eq!(prepared.values_named(&qkv.output).unwrap(), [qkv.output.as_str()]);
    assert_eq!(prepared.values_named(&qkv.weight.node).unwrap(), [qkv.weight.output.as_str()]);
    assert!(prepared.values_named("no such value").unwrap().is_empty());
}
