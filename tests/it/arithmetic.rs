//! What stages compute, against plain arithmetic on exported tensors.

use crate::tensors::{Floats, assert_same, combine, read, read_stored};
use crate::util::{Lab, copy};
use serde_json::Value;
use std::path::Path;

/// Runs what is needed for a unit, exports it and reads it.
fn exported(lab: &Lab, unit: &str) -> Floats {
    let stage = unit.split('[').next().unwrap();
    lab.run(&["--stage", stage]);
    lab.ok(["export", "pipeline.toml", unit, "out", "--overwrite"]);
    let name = unit.replace('[', "-").replace(']', "");
    read(&lab.path(format!("out/{name}.safetensors")))
}

fn checkpoint(lab: &Lab, name: &str) -> Floats {
    read(&lab.path(format!("data/{name}.safetensors")))
}

fn difference(lab: &Lab, task: &str) -> Floats {
    combine(&[&checkpoint(lab, &format!("ft_{task}")), &checkpoint(lab, "base")], |v| v[0] - v[1])
}

#[test]
fn a_difference_is_exported_as_the_difference_in_single_precision() {
    let lab = Lab::small();
    for task in ["digits", "negative"] {
        assert_same(&exported(&lab, &format!("deltas[{task}]")), &difference(&lab, task));
    }
    let stored = read_stored(&lab.path("out/deltas-digits.safetensors"));
    assert!(stored.values().all(|tensor| tensor.dtype == safetensors::Dtype::F32));
}

#[test]
fn a_loaded_checkpoint_is_exported_as_it_is_stored() {
    let lab = Lab::small();
    exported(&lab, "base");
    assert_eq!(
        read_stored(&lab.path("out/base.safetensors")),
        read_stored(&lab.path("data/base.safetensors"))
    );
}

#[test]
fn combine_is_plain_arithmetic() {
    let lab = Lab::small();
    lab.edit(
        "pipeline.toml",
        "tasks = [\"digits\", \"negative\"]",
        "tasks = [\"digits\", \"negative\", \"parity\"]",
    );
    lab.append("pipeline.toml", crate::util::PARITY);
    lab.append(
        "pipeline.toml",
        r#"
[stage.negated]
kind = "combine"
from = { vectors = "deltas" }
scale = { vectors = -1.0 }

[stage.scaled]
kind = "combine"
from = { vectors = "deltas[parity]" }
scale = { vectors = 0.3 }

[stage.analogy]
kind = "combine"
from = { c = "deltas[parity]", b = "deltas[negative]", a = "deltas[digits]" }
scale = { a = -1.0 }

[stage.total]
kind = "combine"
from = { vectors = "deltas" }
reduce = true
weights = { negative = 0.5, parity = -0.25 }

[stage.pairs]
kind = "combine"
from = { one = "deltas", other = "packed" }
scale = { one = 1.0, other = -1.0 }
"#,
    );
    let [digits, negative, parity] = ["digits", "negative", "parity"].map(|task| difference(&lab, task));
    assert_same(&exported(&lab, "negated[negative]"), &combine(&[&negative], |v| -v[0]));
    assert_same(&exported(&lab, "scaled"), &combine(&[&parity], |v| 0.3 * v[0]));
    assert_same(
        &exported(&lab, "analogy"),
        &combine(&[&parity, &negative, &digits], |v| v[0] + v[1] + -v[2]),
    );
    assert_same(
        &exported(&lab, "total"),
        &combine(&[&digits, &negative, &parity], |v| v[0] + 0.5 * v[1] + -0.25 * v[2]),
    );
    // What quantization took away is at most half a step of each tensor.
    for (name, (_, values)) in exported(&lab, "pairs[digits]") {
        let (min, max) = digits[&name]
            .1
            .iter()
            .fold((f32::MAX, f32::MIN), |(min, max), value| (min.min(*value), max.max(*value)));
        let step = (max - min) / 15.0;
        assert!(values.iter().all(|value| value.abs() <= 0.501 * step + 1e-7), "{name}");
    }
}

#[test]
fn forgetting_a_task_by_its_negated_vector_lowers_its_accuracy() {
    let lab = Lab::small();
    lab.append(
        "pipeline.toml",
        r#"
[stage.negated]
kind = "combine"
from = { vectors = "deltas[digits]" }
scale = { vectors = -1.0 }

[stage.forgetful]
kind = "merge"
from = { base = "base", vectors = "negated" }
method = "task-arithmetic"
scale = 1

[stage.forgetful_scores]
kind = "evaluate"
from = { model = "forgetful", origin = "base" }
graph = "data/clip_vision.onnx"
dataset = "${datasets}"
"#,
    );
    let run = lab.run(&["--set", "limit=200"]);
    let correct = run.correct();
    let of = |stage: &str| correct[&(stage.to_owned(), String::new(), "digits".to_owned())].0;
    assert!(of("forgetful_scores") + 20 < of("base_scores"), "{correct:?}");
    // θ₀ − τ = 2·θ₀ − θ, up to the rounding of τ.
    let expected = combine(&[&checkpoint(&lab, "base"), &difference(&lab, "digits")], |v| v[0] + -v[1]);
    assert_same(&exported(&lab, "forgetful"), &expected);
}

#[test]
fn a_merge_is_plain_arithmetic() {
    let lab = Lab::small();
    lab.edit("pipeline.toml", "vectors = \"packed\"", "vectors = \"deltas\"");
    lab.edit(
        "pipeline.toml",
        "scale = \"${scale}\"",
        "scale = 0.5\nweights = { digits = 1.0, negative = -2.0 }\nskip = [\"*.bias\"]",
    );
    let merged = exported(&lab, "merged");
    let base = checkpoint(&lab, "base");
    let expected = combine(&[&base, &difference(&lab, "digits"), &difference(&lab, "negative")], |v| {
        v[0] + 0.5 * (v[1] - 2.0 * v[2])
    });
    for (name, (_, values)) in &merged {
        let expected = if is_bias(name) { &base[name].1 } else { &expected[name].1 };
        let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let off = values.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off <= 1e-6 * largest, "{name} is off by {off}");
        assert!(!is_bias(name) || off == 0.0, "{name} is not the base's");
    }
}

fn is_bias(name: &str) -> bool {
    name.rsplit('.').next() == Some("bias")
}

const EXPORTS: &str = r#"
[stage.single]
kind = "export"
from = "merged"
to = "models/single"
include = ["data/preprocessor_config.json"]

[stage.sharded]
kind = "export"
from = "merged"
to = "models/sharded"
max_shard_bytes = 300000

[stage.half]
kind = "export"
from = "merged"
to = "models/half"
dtype = "f16"

[stage.brain]
kind = "export"
from = "merged"
to = "models/brain"
dtype = "bf16"

[stage.experts]
kind = "export"
from = "deltas"
to = "models/experts"
only = ["*.fc1.weight"]
"#;

#[test]
fn exported_models_are_complete_and_load_again() {
    let lab = Lab::small();
    lab.append("pipeline.toml", EXPORTS);
    let run = lab.run(&[]);
    let merged = exported(&lab, "merged");

    assert_same(&read(&lab.path("models/single/model.safetensors")), &merged);
    assert_eq!(
        fs_err::read(lab.path("models/single/preprocessor_config.json")).unwrap(),
        fs_err::read(lab.path("data/preprocessor_config.json")).unwrap()
    );
    assert_same(&shards(&lab.path("models/sharded"), 300_000), &merged);
    let half = combine(&[&merged], |v| half::f16::from_f32(v[0]).to_f32());
    assert_same(&read(&lab.path("models/half/model.safetensors")), &half);
    let brain = combine(&[&merged], |v| half::bf16::from_f32(v[0]).to_f32());
    assert_same(&read(&lab.path("models/brain/model.safetensors")), &brain);
    let expert = read(&lab.path("models/experts/digits/model.safetensors"));
    assert_eq!(expert.len(), 4);
    let digits = difference(&lab, "digits");
    assert!(expert.iter().all(|(name, tensor)| digits[name] == *tensor));

    // Loading what was exported gives the scores of what was exported.
    let mut again = lab_with_models(&lab);
    again.cache.clone_from(&lab.cache);
    let reloaded = again.run(&[]);
    let scores = |run: &crate::util::Run, stage: &str| -> Vec<Value> {
        let of_stage = run.scores.iter().filter(|score| score["stage"] == stage);
        of_stage
            .map(|score| serde_json::json!([score["task"], score["metric"], score["value"], score["n"]]))
            .collect()
    };
    let expected = scores(&run, "scores");
    assert_eq!(expected.len(), 4);
    for model in ["single", "sharded"] {
        assert_eq!(scores(&reloaded, &format!("{model}_scores")), expected);
    }
    // Half precision rounds, so answers may differ where two classes are close.
    assert_eq!(scores(&reloaded, "half_scores").len(), 4);

    // A second run writes nothing new and changes nothing.
    let before = fs_err::metadata(lab.path("models/single/model.safetensors")).unwrap();
    lab.run(&[]).ran_exactly(&[]);
    let after = fs_err::metadata(lab.path("models/single/model.safetensors")).unwrap();
    assert_eq!(before.modified().unwrap(), after.modified().unwrap());
    // A copy that was deleted comes back without computing anything.
    fs_err::remove_dir_all(lab.path("models")).unwrap();
    lab.run(&[]).ran_exactly(&[]);
    assert_same(&read(&lab.path("models/single/model.safetensors")), &merged);
    assert_same(&shards(&lab.path("models/sharded"), 300_000), &merged);
}

/// Reads a sharded model by its index, as others do.
fn shards(folder: &Path, limit: u64) -> Floats {
    let index: Value =
        serde_json::from_slice(&fs_err::read(folder.join("model.safetensors.index.json")).unwrap()).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    let mut files: Vec<&str> = map.values().map(|file| file.as_str().unwrap()).collect();
    files.sort_unstable();
    files.dedup();
    assert!(files.len() > 3);
    let mut all = Floats::new();
    let mut total = 0;
    for file in files {
        let tensors = read(&folder.join(file));
        let bytes: u64 = tensors.values().map(|(_, values)| 4 * values.len() as u64).sum();
        assert!(bytes <= limit || tensors.len() == 1, "{file} holds {bytes} bytes");
        total += bytes;
        for (name, tensor) in tensors {
            assert_eq!(map[&name], file);
            assert!(all.insert(name, tensor).is_none());
        }
    }
    assert_eq!(all.len(), map.len());
    assert_eq!(index["metadata"]["total_size"], total);
    all
}

/// Another folder, whose pipeline loads the exported models.
fn lab_with_models(from: &Lab) -> Lab {
    let lab = Lab::small();
    for entry in ["single", "sharded", "half"] {
        fs_err::create_dir_all(lab.path("models").join(entry)).unwrap();
        for file in fs_err::read_dir(from.path("models").join(entry)).unwrap().map(Result::unwrap) {
            copy(&file.path(), &lab.path("models").join(entry).join(file.file_name()));
        }
    }
    for model in ["single", "sharded", "half"] {
        lab.append(
            "pipeline.toml",
            &format!(
                "\n[stage.{model}]\nkind = \"load\"\npath = \"models/{model}\"\n\
                 [stage.{model}_scores]\nkind = \"evaluate\"\nfrom = {{ model = \"{model}\", origin = \"base\" }}\n\
                 graph = \"data/clip_vision.onnx\"\ndataset = \"${{datasets}}\"\n"
            ),
        );
    }
    lab
}

#[test]
fn values_that_do_not_fit_half_precision_are_refused_by_name() {
    let lab = Lab::small();
    lab.edit("pipeline.toml", "scale = \"${scale}\"", "scale = 1e7");
    lab.append(
        "pipeline.toml",
        "\n[stage.half]\nkind = \"export\"\nfrom = \"merged\"\nto = \"models\"\ndtype = \"f16\"\n",
    );
    let outcome = lab.try_run("pipeline.toml", &["--stage", "half"]);
    assert_eq!(outcome.code, 1, "{outcome}");
    outcome.tells(&["FAILED  half", "does not fit F16", "vision_model."]);
    assert!(!lab.path("models").exists());
}

#[test]
fn a_destination_that_cannot_be_written_is_named_and_the_model_is_kept() {
    let lab = Lab::small();
    lab.write("models", "a file where the folder should be");
    lab.append("pipeline.toml", "\n[stage.single]\nkind = \"export\"\nfrom = \"merged\"\nto = \"models\"\n");
    let outcome = lab.try_run("pipeline.toml", &["--stage", "single"]);
    assert_eq!(outcome.code, 1, "{outcome}");
    outcome.tells(&[&lab.path("models").display().to_string()]);
    assert_eq!(outcome.run().units["single"].status, "ran");
    fs_err::remove_file(lab.path("models")).unwrap();
    lab.run(&["--stage", "single"]).ran_exactly(&[]);
    assert_eq!(read(&lab.path("models/model.safetensors")).len(), 72);
}
