//! Students of the quickstart's DeiT.

use super::{BitReductions, FLOAT_STUDENT, PROGRESS};
use crate::checkpoint::{LOGITS, read_logits};
use crate::distill::{TRAINING, Training};
use crate::testing::{Input, Workbench};
use blake3::Hash;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

fn quickstart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../pipelines/quickstart")
}

fn with(extra: &Value) -> Value {
    let (data, deit) = (quickstart().join("data/calib"), quickstart().join("deit"));
    let mut all = json!({
        "graph": deit.join("deit.onnx"),
        "dataset": { "digits": {
            "format": "idx",
            "images": data.join("digits-images.idx.gz"),
            "labels": data.join("digits-labels.idx.gz"),
        } },
    });
    all.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    all
}

/// A short run with a rate that moves weights, whose candidates lose bits.
fn short(extra: &Value) -> Value {
    let mut all = json!({
        "method": "cdpq", "epochs": 2, "batch_size": 50, "learning_rate": 0.0001, "warm_up": 0, "weight_decay": 0,
        "start_bits": 4, "min_bits": 2, "layer_threshold": 100.0, "impact_threshold": 0.5, "features": 3,
    });
    all.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    with(&all)
}

fn deit(bench: &Workbench) -> Hash {
    bench.load(&quickstart().join("deit/model.safetensors"))
}

fn student(bench: &Workbench, model: Hash, extra: &Value) -> (Hash, BitReductions) {
    let inputs = [Input::One("model", model), Input::One("origin", model)];
    let student = bench.one("distill", &short(extra), &inputs);
    (student, BitReductions::from_json(&bench.blob(student, PROGRESS)).unwrap())
}

fn logits(bench: &Workbench, model: Hash, origin: Hash) -> Vec<f64> {
    let inputs = [Input::One("model", model), Input::One("origin", origin)];
    let scores = bench.one("evaluate", &with(&json!({})), &inputs);
    let path = bench.folder().join(LOGITS);
    fs_err::write(&path, bench.blob(scores, LOGITS)).unwrap();
    read_logits(&path).unwrap().0.iter().map(|&z| f64::from(z)).collect()
}

/// The formula of scheme `symmetric`, one rounding per operation, for every row.
fn rounded(values: &[f32], columns: usize, bits: u8) -> Vec<f32> {
    let levels = ((1u32 << (bits - 1)) - 1) as f32;
    let row = |row: &[f32]| -> Vec<f32> {
        let largest = row.iter().fold(0f32, |most, x| most.max(x.abs()));
        if largest == 0.0 {
            return row.to_vec();
        }
        let step = largest / levels;
        row.iter().map(|x| (x / step).round_ties_even() * step).collect()
    };
    values.chunks(columns).flat_map(row).collect()
}

/// Floats of a student, and what it is as an artifact.
fn floats(bench: &Workbench, student: Hash) -> HashMap<String, Vec<f32>> {
    let path = bench.folder().join(FLOAT_STUDENT);
    fs_err::write(&path, bench.blob(student, FLOAT_STUDENT)).unwrap();
    let floats = bench.load(&path);
    let names = bench.tensors(floats).tensors().iter().map(|info| info.name.clone()).collect::<Vec<_>>();
    names.into_iter().map(|name| (name.clone(), bench.values(floats, &name))).collect()
}

/// Every tensor of the artifact is the float student's, rounded where a layer has a width.
fn check_packed(bench: &Workbench, student: Hash, found: &BitReductions) {
    let floats = floats(bench, student);
    for info in bench.tensors(student).tensors() {
        let own = &floats[&info.name];
        let columns: usize = info.shape.get(1..).unwrap_or_default().iter().product();
        let mut expected = Vec::new();
        for layer in found.layers.iter().filter(|layer| layer.tensor == info.name) {
            let rows = &own[expected.len()..][..layer.rows as usize * columns];
            assert_eq!(layer.weights, rows.len() as u64);
            expected.extend(rounded(rows, columns, layer.bits));
        }
        let expected = if expected.is_empty() { own.clone() } else { expected };
        assert_eq!(bench.values(student, &info.name), expected, "{}", info.name);
    }
}

/// The loss of the graph in training is that of the artifact in an evaluation: with logits as the only feature, the squared error of the
/// student's logits, in two places that share no code.
#[test]
fn what_was_trained_is_what_is_stored() {
    let bench = Workbench::new();
    let model = deit(&bench);
    let (student, found) = student(&bench, model, &json!({ "features": ["head"], "epochs": 3 }));
    check_packed(&bench, student, &found);
    let (ours, theirs) = (logits(&bench, student, model), logits(&bench, model, model));
    let squares: f64 = ours.iter().zip(&theirs).map(|(a, b)| (a - b).powi(2)).sum();
    let expected = squares / ours.len() as f64;
    assert!(expected > 0.0);
    assert!((found.loss - expected).abs() <= 1e-4 * expected, "{} for {expected}", found.loss);
    // Only the head is compared, so only the head can lose bits, while all layers are rounded and learn.
    let bits: Vec<(&str, u8)> = found.layers.iter().map(|l| (l.name.as_str(), l.bits)).collect();
    assert_eq!(bits.len(), 18);
    assert!(bits.iter().all(|(name, bits)| *bits == 4 || *name == "head"), "{bits:?}");
    let training = Training::from_json(&bench.blob(student, TRAINING)).unwrap();
    assert_eq!((training.images, training.losses.len()), (200, 12));
    let moved = |name: &str| bench.values(student, name) != bench.values(model, name);
    assert!(moved("blocks.0.mlp.fc1.bias") && moved("head.bias"));
}

/// Bits that are told to be taken are taken, in the order in which it is told, and those of rejected attempts are not.
#[test]
fn the_log_leads_to_the_widths() {
    let bench = Workbench::new();
    let model = deit(&bench);
    let (student, found) = student(
        &bench,
        model,
        &json!({ "features": "all", "losses": { "affinity": 0.5 }, "validation": { "n": 20 } }),
    );
    check_packed(&bench, student, &found);
    let mut bits: HashMap<&str, u8> = found.layers.iter().map(|layer| (layer.name.as_str(), 4)).collect();
    for (index, epoch) in found.epochs.iter().enumerate() {
        let reduction = epoch.reduction.as_ref().unwrap();
        assert_eq!(epoch.epoch, index as u64 + 1);
        assert_eq!(reduction.candidates.len(), bits.values().filter(|bits| **bits > 2).count());
        for attempt in &reduction.attempts {
            assert_eq!((attempt.from, attempt.to), (bits[attempt.layer.as_str()], attempt.from - 1));
            assert_eq!(attempt.accepted, attempt.increase.unwrap() <= 0.5);
            if attempt.accepted {
                bits.insert(&attempt.layer, attempt.to);
            }
        }
        let parts: f64 = epoch.contributions.values().sum();
        assert!((parts - epoch.loss).abs() <= 1e-5 * epoch.loss, "{parts} of {}", epoch.loss);
        assert_eq!(epoch.contributions.len(), 18);
        let average = bits.values().map(|bits| f64::from(*bits)).sum::<f64>() / bits.len() as f64;
        assert!((epoch.average_bits - average).abs() < 1e-12);
    }
    assert!(found.layers.iter().all(|layer| layer.bits == bits[layer.name.as_str()]));
    assert!(found.average_bits < 4.0, "no layer lost a bit");
}

#[test]
fn queries_keys_and_values_have_widths_of_their_own() {
    let bench = Workbench::new();
    let model = deit(&bench);
    // Only values may lose bits.
    let extra = json!({ "split_qkv": true, "features": ["blocks.0.attn.qkv.?"], "target_roots": ["blocks.0.attn.qkv.v"],
        "impact_threshold": 1000, "validation": { "n": 20 } });
    let (student, found) = student(&bench, model, &extra);
    check_packed(&bench, student, &found);
    let bits: Vec<u8> =
        found.layers.iter().filter(|l| l.tensor == "blocks.0.attn.qkv.weight").map(|l| l.bits).collect();
    assert_eq!(bits, [4, 4, 2]);
    // In a package all is packed as it was, but for the tensor that is put together when it is read.
    let package = bench.one("export", &json!({ "format": "package" }), &[Input::One("model", student)]);
    let (before, after) = (bench.tensors(student), bench.tensors(package));
    for (tensor, info) in before.tensors().iter().enumerate() {
        assert_eq!(bench.values(package, &info.name), bench.values(student, &info.name), "{}", info.name);
        let bits = after
            .encoding(tensor)
            .and_then(merganser_tensors::Encoding::bits)
            .map(merganser_tensors::Bits::get);
        let layer = found.layers.iter().find(|layer| layer.tensor == info.name);
        let expected = layer.map(|layer| layer.bits);
        let is_fused = info.name.contains("qkv.weight");
        assert_eq!(bits, expected.filter(|_| !is_fused), "{}", info.name);
    }
}

#[test]
fn steps_of_activations_are_learned() {
    let bench = Workbench::new();
    let model = deit(&bench);
    let extra = |rate: f64| {
        json!({ "features": "all", "target_bits": 4.0, "learning_rate": rate, "epochs": 3, "batch_size": 25, "validation": { "n": 20 },
            "activations": { "bits": 4, "skip": ["patch_embed*"] } })
    };
    let (_, still) = student(&bench, model, &extra(1e-12));
    let (_, learned) = student(&bench, model, &extra(1e-4));
    assert_eq!(learned.activations.len(), 17);
    for (before, after) in still.activations.iter().zip(&learned.activations) {
        assert_eq!((&before.value, &before.layers, before.bits), (&after.value, &after.layers, 4));
        assert!(after.step > 0.0 && before.step != after.step, "{}", after.value);
    }
    assert!(learned.loss < still.loss, "{} with learned steps, {} with the first", learned.loss, still.loss);
}

#[test]
fn without_gradients_that_pass_through_nothing_would_be_learned() {
    let bench = Workbench::new();
    let model = deit(&bench);
    let extra = json!({ "features": "all", "target_bits": 4.0, "epochs": 3, "start_bits": 3, "batch_size": 25,
        "validation": { "n": 20 }, "only": ["*.weight"] });
    let (student, found) = student(&bench, model, &extra);
    let training = Training::from_json(&bench.blob(student, TRAINING)).unwrap();
    let (first, last) = (training.losses[0], *training.losses.last().unwrap());
    assert!(last < 0.5 * first, "{first} to {last}");
    assert!(found.epochs.iter().all(|epoch| epoch.reduction.as_ref().unwrap().attempts.is_empty()));
    let kept = |name: &str| bench.values(student, name) == bench.values(model, name);
    assert!(kept("blocks.0.mlp.fc1.bias") && kept("norm.bias"));
}

fn refused(extra: &Value) -> String {
    let bench = Workbench::new();
    let model = deit(&bench);
    let inputs = [Input::One("model", model), Input::One("origin", model)];
    bench.run("distill", &short(extra), &inputs).unwrap_err().to_string()
}

#[test]
fn mistakes_are_told() {
    assert_eq!(refused(&json!({ "start_bits": 9 })), "`start_bits` must be 2 to 8, got 9");
    assert_eq!(refused(&json!({ "min_bits": 5 })), "`min_bits` is 5, above `start_bits`, which is 4");
    assert_eq!(
        refused(&json!({ "impact_threshold": -1 })),
        "numbers of `impact_threshold` must be zero or more, got -1"
    );
    let nothing = refused(&json!({ "losses": { "statistics": 0, "logits": 1 } }));
    assert!(nothing.contains("must count"), "{nothing}");
    let layers = refused(&json!({ "layers": { "only": ["nothing"] } }));
    assert_eq!(layers, "no layer of the graph is to be quantized");
    let features = refused(&json!({ "features": ["blocks.7.*"] }));
    assert_eq!(features, "`features`: there is no layer, node or value `blocks.7.*` in the graph");
    let activations = refused(&json!({ "activations": { "only": ["nothing"] } }));
    assert!(activations.starts_with("`activations`: no layer"), "{activations}");
}
