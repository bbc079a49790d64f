use super::trainer::{Training, shuffled};
use super::{ADAPTER, CONFIG, TRAINING};
use crate::checkpoint::{LOGITS, read_logits};
use crate::testing::{Input, Workbench};
use blake3::Hash;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn quickstart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../pipelines/quickstart")
}

/// The quickstart's DeiT and images that it was not tested on.
fn parameters(extra: Value) -> Value {
    let (data, deit) = (quickstart().join("data/calib"), quickstart().join("deit"));
    let mut all = json!({
        "graph": deit.join("deit.onnx"),
        "dataset": { "digits": {
            "format": "idx",
            "images": data.join("digits-images.idx.gz"),
            "labels": data.join("digits-labels.idx.gz"),
        } },
    });
    let Value::Object(extra) = extra else { panic!("parameters are an object") };
    all.as_object_mut().unwrap().extend(extra);
    all
}

fn deit(bench: &Workbench) -> Hash {
    bench.load(&quickstart().join("deit/model.safetensors"))
}

fn finetune(bench: &Workbench, model: Hash, extra: Value) -> (Hash, Training) {
    let mut extra = extra;
    extra.as_object_mut().unwrap().insert("method".to_owned(), json!("finetune"));
    let inputs = [Input::One("model", model), Input::One("origin", model)];
    let trained = bench.one("distill", &parameters(extra), &inputs);
    (trained, Training::from_json(&bench.blob(trained, TRAINING)).unwrap())
}

/// What training the bias of the classifier alone comes to, from the formulas in f64: a model's logits move by what its bias moves.
struct Naive {
    bias: Vec<f64>,
    losses: Vec<f64>,
    norms: Vec<f64>,
}

#[expect(clippy::too_many_arguments, reason = "the parameters of a run")]
fn naive(
    logits: &[Vec<f64>],
    labels: &[usize],
    start: &[f64],
    (epochs, batch, seed): (u64, usize, u64),
    (rate, warm_up, decay): (f64, f64, f64),
    clip: f64,
    sgd: bool,
    smoothing: f64,
) -> Naive {
    let classes = start.len();
    let mut found = Naive { bias: start.to_vec(), losses: Vec::new(), norms: Vec::new() };
    let per_epoch = labels.len().div_ceil(batch);
    let total = per_epoch as f64 * epochs as f64;
    let (mut m, mut v) = (vec![0.0; classes], vec![0.0; classes]);
    for epoch in 0..epochs {
        for samples in shuffled(labels.len(), seed, epoch).chunks(batch) {
            let step = found.losses.len() as f64;
            let mut gradient = vec![0.0; classes];
            let mut loss = 0.0;
            for &sample in samples {
                let z: Vec<f64> =
                    (0..classes).map(|c| logits[sample][c] + found.bias[c] - start[c]).collect();
                let sum: f64 = z.iter().map(|z| z.exp()).sum();
                for c in 0..classes {
                    let hit = if c == labels[sample] { 1.0 - smoothing } else { 0.0 };
                    let target = hit + smoothing / classes as f64;
                    let p = z[c].exp() / sum;
                    loss -= target * p.ln() / samples.len() as f64;
                    gradient[c] += (p - target) / samples.len() as f64;
                }
            }
            let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
            found.losses.push(loss);
            found.norms.push(norm);
            if clip > 0.0 && norm > clip {
                for g in &mut gradient {
                    *g *= clip / norm;
                }
            }
            let rise = (warm_up * total).round();
            let rate = if step < rise {
                rate * (step + 1.0) / rise
            } else {
                rate * 0.5 * (1.0 + (std::f64::consts::PI * (step - rise) / (total - rise)).cos())
            };
            for c in 0..classes {
                let (w, g) = (&mut found.bias[c], gradient[c]);
                if sgd {
                    let g = g + decay * *w;
                    m[c] = if step == 0.0 { g } else { 0.9 * m[c] + g };
                    *w -= rate * m[c];
                    continue;
                }
                *w *= 1.0 - rate * decay;
                m[c] = 0.9 * m[c] + 0.1 * g;
                v[c] = 0.999 * v[c] + 0.001 * g * g;
                let (m, v) =
                    (m[c] / (1.0 - 0.9f64.powf(step + 1.0)), v[c] / (1.0 - 0.999f64.powf(step + 1.0)));
                *w -= rate * m / (v.sqrt() + 1e-8);
            }
        }
    }
    found
}

/// The logits of a model on the images of [`parameters`], and their labels.
fn logits(bench: &Workbench, model: Hash) -> (Vec<Vec<f64>>, Vec<usize>) {
    let inputs = [Input::One("model", model), Input::One("origin", model)];
    let scores = bench.one("evaluate", &parameters(json!({})), &inputs);
    let path = bench.folder().join(LOGITS);
    fs_err::write(&path, bench.blob(scores, LOGITS)).unwrap();
    let (logits, labels) = read_logits(&path).unwrap();
    let rows = logits.outer_iter().map(|row| row.iter().map(|&z| f64::from(z)).collect()).collect();
    (rows, labels.into_iter().map(|label| label as usize).collect())
}

fn close(what: &str, actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!((f64::from(*a) - e).abs() <= tolerance, "{what} {i}: {a}, expected {e}");
    }
}

#[test]
fn training_a_bias_is_what_the_formulas_say() {
    let bench = Workbench::new();
    let model = deit(&bench);
    let (logits, labels) = logits(&bench, model);
    let start: Vec<f64> = bench.values(model, "head.bias").into_iter().map(f64::from).collect();
    // 200 images in steps of 48: the last of an epoch has 8. Micro-batches of 20 cut 48 into 20, 20 and 8.
    let common = |extra: Value| {
        let mut all = json!({ "only": ["head.bias"], "epochs": 3, "batch_size": 48, "learning_rate": 0.05,
            "warm_up": 0.2, "weight_decay": 0.1, "seed": 5 });
        all.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        all
    };
    let cases = [
        (json!({ "clip": 0.02 }), 0.02, false, 0.0),
        (json!({ "clip": 0, "micro_batch": 20 }), 0.0, false, 0.0),
        (json!({ "clip": 0, "optimizer": "sgd", "label_smoothing": 0.1 }), 0.0, true, 0.1),
    ];
    for (extra, clip, sgd, smoothing) in cases {
        let (trained, record) = finetune(&bench, model, common(extra.clone()));
        let expected = naive(&logits, &labels, &start, (3, 48, 5), (0.05, 0.2, 0.1), clip, sgd, smoothing);
        let what = extra.to_string();
        close(&what, &record.losses, &expected.losses, 2e-5);
        close(&what, &record.gradient_norms, &expected.norms, 2e-5);
        close(&what, &bench.values(trained, "head.bias"), &expected.bias, 5e-5);
        let same = |name: &str| bench.values(trained, name) == bench.values(model, name);
        assert!(same("head.weight") && same("blocks.2.attn.qkv.weight"), "what is not trained stays");
        assert_eq!((record.images, record.trained_values), (200, 10));
        assert_eq!(record.epochs.iter().map(|epoch| epoch.steps).collect::<Vec<_>>(), [5, 10, 15]);
    }
}

#[test]
fn all_weights_learn_and_the_best_epoch_is_kept() {
    let bench = Workbench::new();
    let model = deit(&bench);
    let (trained, record) = finetune(
        &bench,
        model,
        json!({ "epochs": 4, "batch_size": 40, "learning_rate": 0.002, "schedule": "constant", "warm_up": 0,
            "patience": 1, "validation": { "n": 40, "balanced": true } }),
    );
    assert_eq!((record.images, record.validation_images), (160, 40));
    assert_eq!(record.frozen_values, 0);
    let (first, last) = (record.epochs[0].loss, record.epochs.last().unwrap().loss);
    assert!(last < first, "{first} to {last}");
    let best = record.epochs.iter().min_by(|a, b| {
        let loss = |epoch: &super::Epoch| epoch.validation.unwrap().loss;
        loss(a).total_cmp(&loss(b))
    });
    assert_eq!(record.kept, best.unwrap().epoch);
    let moved = |name: &str| bench.values(trained, name) != bench.values(model, name);
    assert!(moved("patch_embed.proj.weight") && moved("pos_embed") && moved("head.weight"));
}

#[test]
fn a_teacher_alone_teaches_its_answers() {
    let bench = Workbench::new();
    let teacher = deit(&bench);
    // A student that has forgotten: a model whose classifier is zero.
    let forgotten = |name: &str| bench.values(teacher, name).iter().map(|_| 0.0).collect::<Vec<f32>>();
    let source = bench.tensors(teacher);
    let tensors: Vec<(&str, &[usize], Vec<f32>)> = source
        .tensors()
        .iter()
        .map(|info| {
            let name = info.name.as_str();
            let values =
                if name.starts_with("head.") { forgotten(name) } else { bench.values(teacher, name) };
            (name, info.shape.as_slice(), values)
        })
        .collect();
    let listed: Vec<(&str, &[usize], &[f32])> =
        tensors.iter().map(|(name, shape, values)| (*name, *shape, values.as_slice())).collect();
    let zeros = bench.checkpoint("forgotten", &listed);
    let inputs = [Input::One("model", zeros), Input::One("origin", teacher), Input::One("teacher", teacher)];
    let extra = json!({ "method": "finetune", "only": ["head.*"], "teacher_weight": 1.0, "epochs": 30,
        "batch_size": 50, "learning_rate": 0.02, "weight_decay": 0 });
    let student = bench.one("distill", &parameters(extra), &inputs);
    let record = Training::from_json(&bench.blob(student, TRAINING)).unwrap();
    let (first, last) = (record.losses[0], *record.losses.last().unwrap());
    assert!(last < 0.1 * first, "{first} to {last}");
    let answers = |model: Hash| {
        let inputs = [Input::One("model", model), Input::One("origin", teacher)];
        let scores = bench.one("evaluate", &parameters(json!({})), &inputs);
        let path = bench.folder().join(LOGITS);
        fs_err::write(&path, bench.blob(scores, LOGITS)).unwrap();
        let (logits, _) = read_logits(&path).unwrap();
        let best =
            logits.outer_iter().map(|row| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap());
        best.collect::<Vec<_>>()
    };
    let same = answers(student).iter().zip(answers(teacher)).filter(|(a, b)| **a == *b).count();
    assert!(same >= 190, "{same} of 200");
}

fn refused(extra: Value) -> String {
    let bench = Workbench::new();
    let model = deit(&bench);
    let inputs = [Input::One("model", model), Input::One("origin", model)];
    bench.run("distill", &parameters(extra), &inputs).unwrap_err().to_string()
}

#[test]
fn mistakes_are_told_with_what_is_possible() {
    let with = |extra: Value| {
        let mut all = json!({ "method": "finetune" });
        all.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        refused(all)
    };
    assert_eq!(refused(json!({ "method": "fintune" })), "unknown method `fintune`");
    assert_eq!(with(json!({ "epochs": 0 })), "`epochs` must be at least 1, got 0");
    assert_eq!(with(json!({ "warm_up": 5 })), "`warm_up` is a share of all steps, from 0 to 1, got 5");
    assert_eq!(with(json!({ "patience": 3 })), "`patience` needs images for `validation`");
    assert_eq!(with(json!({ "validation": {} })), "`validation` names no images");
    let both = with(json!({ "validation": { "n": 5, "split": "val" } }));
    assert!(both.contains("either `n` images"), "{both}");
    assert_eq!(
        with(json!({ "validation": { "n": 200 } })),
        "dataset `digits` has 200 images: `validation` leaves none to train on"
    );
    assert_eq!(
        with(json!({ "only": ["nothing"] })),
        "no tensor that the graph computes with is to be trained"
    );
    assert_eq!(with(json!({ "temperature": 0 })), "`temperature` must be above zero, got 0");
}

#[test]
fn a_loss_that_is_no_number_is_told_with_its_step() {
    let message = refused(json!({ "method": "finetune", "learning_rate": 1e30, "clip": 0, "warm_up": 0 }));
    assert!(message.contains("step 2"), "{message}");
}

fn lora(bench: &Workbench, model: Hash, origin: Hash, extra: Value) -> Hash {
    let mut extra = extra;
    extra.as_object_mut().unwrap().insert("method".to_owned(), json!("lora"));
    let inputs = [Input::One("model", model), Input::One("origin", origin)];
    bench.one("distill", &parameters(extra), &inputs)
}

/// The tensors of an adapter under the names in the file.
fn adapter(bench: &Workbench, trained: Hash) -> Hash {
    let path = bench.folder().join(format!("{trained}.safetensors"));
    fs_err::write(&path, bench.blob(trained, ADAPTER)).unwrap();
    bench.one("load", &json!({ "path": path, "strip_prefix": "" }), &[])
}

#[test]
fn the_first_step_of_factors_follows_the_gradient_of_the_weight() {
    let bench = Workbench::new();
    let model = deit(&bench);
    let step = |extra: Value| {
        let mut all = json!({ "max_steps": 1, "batch_size": 40, "micro_batch": 25, "optimizer": "sgd",
            "momentum": 0, "weight_decay": 0, "clip": 0, "warm_up": 0, "learning_rate": 100.0, "seed": 2 });
        all.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        all
    };
    let targets = ["blocks.0.attn.qkv.weight", "blocks.2.attn.proj.weight", "patch_embed.proj.weight"];
    let (tuned, record) = finetune(&bench, model, step(json!({ "only": targets })));
    let factors = lora(&bench, model, model, step(json!({ "targets": targets, "rank": 3, "alpha": 6 })));
    let of_factors = Training::from_json(&bench.blob(factors, TRAINING)).unwrap();
    assert!((of_factors.losses[0] - record.losses[0]).abs() < 1e-6, "the model begins as it is");
    let files = adapter(&bench, factors);
    for target in targets {
        let module = format!("base_model.model.{}", target.strip_suffix(".weight").unwrap());
        let a = bench.values(files, &format!("{module}.lora_A.weight"));
        let b = bench.values(files, &format!("{module}.lora_B.weight"));
        let (before, after) = (bench.values(model, target), bench.values(tuned, target));
        // W₁ = W₀ − η·dW; B₁ = −η·s·dW·Aᵀ with s = alpha / r = 2, as B₀ = 0; A₁ = A₀.
        let (inputs, outputs) = (a.len() / 3, b.len() / 3);
        let moved = |row: usize, column: usize| {
            f64::from(after[row * inputs + column]) - f64::from(before[row * inputs + column])
        };
        let largest = b.iter().fold(0.0f32, |most, b| most.max(b.abs()));
        assert!(largest > 0.0);
        for row in 0..outputs {
            for p in 0..3 {
                let sum: f64 = (0..inputs).map(|i| moved(row, i) * f64::from(a[p * inputs + i])).sum();
                let error = (f64::from(b[row * 3 + p]) - 2.0 * sum).abs();
                assert!(error < 1e-4 * f64::from(largest), "{target} {row} {p}: {}", b[row * 3 + p]);
            }
        }
    }
}

#[test]
fn adapters_go_out_and_come_back_as_the_same_model() {
    let bench = Workbench::new();
    let model = deit(&bench);
    let extra = json!({ "rank": 4, "dropout": 0.1, "epochs": 2, "batch_size": 64, "learning_rate": 0.003,
        "validation": { "n": 20 } });
    let trained = lora(&bench, model, model, extra.clone());
    assert_eq!(trained, lora(&bench, model, model, extra), "a function of its parameters");
    let files = bench.one(
        "export",
        &json!({ "format": "peft", "to": "out", "base": "org/name" }),
        &[Input::One("model", trained)],
    );
    let folder = bench.folder().join("adapter");
    fs_err::create_dir(&folder).unwrap();
    for name in [ADAPTER, CONFIG] {
        fs_err::write(folder.join(name), bench.blob(files, name)).unwrap();
    }
    let config: Value = serde_json::from_slice(&bench.blob(files, CONFIG)).unwrap();
    assert_eq!(config["base_model_name_or_path"], "org/name");
    assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(4), &json!(8.0)));
    assert_eq!(config["target_modules"].as_array().unwrap().len(), 8);
    let vectors = bench.load(&folder);
    let inputs = [Input::One("base", model), Input::One("vectors", vectors)];
    let merged = bench.one("merge", &json!({ "method": "task-arithmetic", "scale": 1.0 }), &inputs);
    for info in bench.tensors(trained).tensors() {
        let (a, b) = (bench.values(trained, &info.name), bench.values(merged, &info.name));
        assert!(a == b, "{}", info.name);
        let moved = a != bench.values(model, &info.name);
        assert_eq!(moved, info.name.contains(".attn.") && info.name.ends_with("weight"), "{}", info.name);
    }
}

#[test]
fn a_packed_base_stays_packed_and_a_new_classifier_is_trained_whole() {
    let bench = Workbench::new();
    let model = deit(&bench);
    let keep: Vec<Value> =
        ["*.bias", "*norm*", "head.*"].map(|glob| json!({ "match": glob, "keep": true })).into();
    let scheme = json!({ "scheme": "nf4", "double_quantization": true, "rules": keep });
    let packed = bench.one("quantize", &scheme, &[Input::One("tensors", model)]);
    let extra = json!({ "train": ["head.*"], "epochs": 1, "batch_size": 50, "learning_rate": 0.01 });
    let trained = lora(&bench, packed, model, extra);
    let manifest = bench.manifest(trained);
    assert!(manifest.contains(&packed.to_hex().to_string()), "the base is referred to");
    let files = adapter(&bench, trained);
    for name in ["head.weight", "head.bias"] {
        let value = bench.values(trained, name);
        assert!(value != bench.values(model, name));
        assert!(value == bench.values(files, &format!("base_model.model.{name}")), "{name}");
    }
    let config: Value = serde_json::from_slice(&bench.blob(trained, CONFIG)).unwrap();
    assert_eq!(config["modules_to_save"], json!(["head"]));
    let name = "blocks.1.mlp.fc1.weight";
    assert!(
        bench.values(trained, name) == bench.values(packed, name),
        "what has no factors is the packed base's"
    );
    let inputs = [Input::One("model", trained), Input::One("origin", model)];
    bench.one("evaluate", &parameters(json!({})), &inputs);
    let plain = json!({ "format": "peft", "to": "out" });
    let error = bench.run("export", &plain, &[Input::One("model", packed)]).unwrap_err();
    assert_eq!(error.to_string(), "the model on port `model` has no adapter");
}

#[test]
fn targets_that_cannot_have_factors_are_told() {
    let with = |extra: Value| {
        let mut all = json!({ "method": "lora" });
        all.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        refused(all)
    };
    assert_eq!(with(json!({ "rank": 0 })), "`rank` must be at least 1, got 0");
    assert_eq!(with(json!({ "dropout": 1 })), "`dropout` must be at least 0 and below 1, got 1");
    let none = with(json!({ "targets": ["attn"] }));
    assert_eq!(none, "no weight that the graph computes with is a target of factors");
    let vector = with(json!({ "targets": ["head.bias"] }));
    assert!(vector.contains("`head.bias` has shape [10]"), "{vector}");
    let kernel = with(json!({ "targets": ["patch_embed.proj.weight"], "dropout": 0.1 }));
    assert!(kernel.contains("(Conv) uses it too"), "{kernel}");
}
