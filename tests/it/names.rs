//! Checkpoints under names that other libraries gave them, and LoRA adapters, through the whole tool.

use crate::tensors::{Floats, Stored, assert_same, combine, read, read_stored, single, write_stored};
use crate::util::Lab;
use std::collections::BTreeMap;

/// Rewrites a transformers CLIP vision tower as open_clip would store it, in single precision.
pub(crate) fn as_open_clip(theirs: &Floats) -> BTreeMap<String, Stored> {
    let mut ours = BTreeMap::new();
    for (name, (shape, values)) in theirs {
        let name = name.replace("vision_model.encoder.layers.", "visual.transformer.resblocks.");
        let renamed = match name.strip_prefix("vision_model.") {
            Some("embeddings.class_embedding") => "visual.class_embedding".to_owned(),
            Some("embeddings.position_embedding.weight") => "visual.positional_embedding".to_owned(),
            Some("embeddings.patch_embedding.weight") => "visual.conv1.weight".to_owned(),
            Some(rest) => format!("visual.{rest}")
                .replace("pre_layrnorm", "ln_pre")
                .replace("post_layernorm", "ln_post"),
            None if name == "visual_projection.weight" => {
                let [rows, columns] = shape[..] else { panic!("a matrix") };
                let transposed: Vec<f32> = (0..columns)
                    .flat_map(|c| (0..rows).map(move |r| (r, c)))
                    .map(|(r, c)| values[r * columns + c])
                    .collect();
                ours.insert("visual.proj".to_owned(), single(&[columns, rows], &transposed));
                continue;
            }
            None => name.clone(),
        };
        if let Some((before, parameter)) = renamed.split_once(".self_attn.q_proj.") {
            let layer = before.replace("visual.transformer.resblocks.", "vision_model.encoder.layers.");
            let part = |part: &str| theirs[&format!("{layer}.self_attn.{part}_proj.{parameter}")].1.clone();
            let fused = [part("q"), part("k"), part("v")].concat();
            let shape: Vec<usize> = std::iter::once(3 * shape[0]).chain(shape[1..].iter().copied()).collect();
            ours.insert(format!("{before}.attn.in_proj_{parameter}"), single(&shape, &fused));
            continue;
        }
        if renamed.contains(".self_attn.k_proj.") || renamed.contains(".self_attn.v_proj.") {
            continue;
        }
        let renamed = renamed
            .replace(".self_attn.out_proj.", ".attn.out_proj.")
            .replace(".layer_norm1.", ".ln_1.")
            .replace(".layer_norm2.", ".ln_2.")
            .replace(".mlp.fc1.", ".mlp.c_fc.")
            .replace(".mlp.fc2.", ".mlp.c_proj.");
        ours.insert(renamed, single(shape, values));
    }
    ours
}

/// The small pipeline, whose fine-tuned checkpoint `digits` has open_clip's names.
fn lab_with_open_clip() -> Lab {
    let lab = Lab::small();
    let path = lab.path("data/ft_digits.safetensors");
    write_stored(&path, &as_open_clip(&read(&path)));
    lab
}

fn exported(lab: &Lab, unit: &str) -> Floats {
    lab.ok(["export", "pipeline.toml", unit, "out", "--overwrite"]);
    read(&lab.path(format!("out/{}.safetensors", unit.replace('[', "-").replace(']', ""))))
}

#[test]
fn a_difference_between_libraries_is_that_of_the_same_tensors() {
    let (plain, lab) = (Lab::small(), lab_with_open_clip());
    let base = read(&plain.path("data/base.safetensors"));
    let expected = combine(&[&read(&plain.path("data/ft_digits.safetensors")), &base], |v| v[0] - v[1]);
    let outcome = lab.call(["run", "pipeline.toml", "--stage", "deltas"]);
    assert_eq!(outcome.code, 0, "{outcome}");
    outcome.tells(&["it has the names of `open-clip`, the base those of `transformers-clip`"]);
    assert_same(&exported(&lab, "deltas[digits]"), &expected);
    // Everything after it works as if nothing had been the matter.
    lab.run(&["--stage", "merged"]);
    plain.run(&["--stage", "merged"]);
    assert_same(&exported(&lab, "merged"), &exported(&plain, "merged"));
}

#[test]
fn a_model_with_another_librarys_names_scores_the_same() {
    let stage = "\n[stage.direct]\nkind = \"evaluate\"\nfrom = { model = \"tuned\", origin = \"base\" }\n\
                 graph = \"data/clip_vision.onnx\"\ndataset = \"${datasets}\"\n";
    let run = |lab: &Lab| {
        lab.append("pipeline.toml", stage);
        let run = lab.run(&["--stage", "direct"]);
        lab.ok(["export", "pipeline.toml", "direct[digits]", "out"]);
        let mut logits = Vec::new();
        let mut open = vec![lab.path("out")];
        while let Some(folder) = open.pop() {
            for path in fs_err::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                if path.is_dir() {
                    open.push(path);
                } else if path.ends_with("logits.safetensors") {
                    logits.push(read(&path));
                }
            }
        }
        assert_eq!(logits.len(), 1);
        (run, logits)
    };
    let (plain, lab) = (Lab::small(), lab_with_open_clip());
    let ((expected_run, expected), (run, logits)) = (run(&plain), run(&lab));
    assert_eq!(run.scores, expected_run.scores);
    assert_eq!(run.artifacts()["direct[digits]"], expected_run.artifacts()["direct[digits]"]);
    assert_same(&logits[0], &expected[0]);
    assert!(logits[0]["logits"].1.iter().any(|x| *x != 0.0));
}

#[test]
fn load_converts_to_a_family_and_back_without_a_difference() {
    let lab = Lab::small();
    lab.append(
        "pipeline.toml",
        "\n[stage.there]\nkind = \"load\"\npath = \"data/base.safetensors\"\nfamily = \"open-clip\"\n\
         \n[stage.only]\nkind = \"load\"\npath = \"data/base.safetensors\"\nfamily = \"open-clip\"\nonly = [\"*.in_proj_*\"]\n\
         \n[stage.back]\nkind = \"load\"\npath = \"out/there.safetensors\"\nfamily = \"transformers-clip\"\n\
         \n[stage.renamed]\nkind = \"load\"\npath = \"data/base.safetensors\"\nrename = [{ from = \"vision_model.*\", to = \"encoder.*\" }]\n",
    );
    let base = read(&lab.path("data/base.safetensors"));
    // Stages are planned together: what `back` reads must be there.
    lab.edit("pipeline.toml", "out/there.safetensors", "data/base.safetensors");
    lab.run(&["--stage", "there", "--stage", "only", "--stage", "renamed"]);
    let there = exported(&lab, "there");
    let by_hand = as_open_clip(&base);
    assert_eq!(there.keys().collect::<Vec<_>>(), by_hand.keys().collect::<Vec<_>>());
    write_stored(&lab.path("data/by_hand.safetensors"), &by_hand);
    assert_same(&there, &read(&lab.path("data/by_hand.safetensors")));
    let stored = read_stored(&lab.path("out/there.safetensors"));
    assert!(stored.values().all(|tensor| tensor.dtype == safetensors::Dtype::F16), "types stay as stored");
    let only = exported(&lab, "only");
    assert!(!only.is_empty() && only.keys().all(|name| name.contains(".in_proj_")), "{:?}", only.keys());
    let renamed = exported(&lab, "renamed");
    assert!(renamed.contains_key("encoder.embeddings.class_embedding"));
    assert_eq!(renamed.len(), base.len());

    fs_err::copy(lab.path("out/there.safetensors"), lab.path("data/there.safetensors")).unwrap();
    let text = fs_err::read_to_string(lab.path("pipeline.toml")).unwrap();
    let (before, after) = text.split_once("[stage.back]").unwrap();
    let after = after.replacen("data/base.safetensors", "data/there.safetensors", 1);
    lab.write("pipeline.toml", &format!("{before}[stage.back]{after}"));
    lab.run(&["--stage", "back"]);
    assert_same(&exported(&lab, "back"), &base);
}

const ADAPTED: &str = "vision_model.encoder.layers.0.self_attn.q_proj.weight";

/// An adapter of one layer under `data/lora`, and its task vector.
fn write_adapter(lab: &Lab, extra: &str) -> Vec<f32> {
    let folder = lab.path("data/lora");
    fs_err::create_dir_all(&folder).unwrap();
    let config = format!(r#"{{"peft_type":"LORA","r":2,"lora_alpha":3{extra}}}"#);
    fs_err::write(folder.join("adapter_config.json"), config).unwrap();
    let width = read_stored(&lab.path("data/base.safetensors"))[ADAPTED].shape[0];
    let a: Vec<f32> = (0..2 * width).map(|i| (i % 7) as f32 * 0.01 - 0.03).collect();
    let b: Vec<f32> = (0..2 * width).map(|i| (i % 5) as f32 * 0.02 - 0.04).collect();
    let module = format!("base_model.model.{}", ADAPTED.trim_end_matches(".weight"));
    let factors = BTreeMap::from([
        (format!("{module}.lora_A.weight"), single(&[2, width], &a)),
        (format!("{module}.lora_B.weight"), single(&[width, 2], &b)),
    ]);
    write_stored(&folder.join("adapter_model.safetensors"), &factors);
    let element = |i: usize| {
        let (row, column) = (i / width, i % width);
        let sum =
            (0..2).fold(0.0, |sum, p| sum + f64::from(b[row * 2 + p]) * f64::from(a[p * width + column]));
        (1.5 * sum) as f32
    };
    (0..width * width).map(element).collect()
}

const LORA: &str = r#"
[stage.lora]
kind = "load"
path = "data/lora"

[stage.with_lora]
kind = "merge"
from = { base = "base", vectors = "lora" }
method = "task-arithmetic"
scale = 1.0
"#;

#[test]
fn a_lora_adapter_is_a_task_vector() {
    let lab = Lab::small();
    let delta = write_adapter(&lab, "");
    lab.append("pipeline.toml", LORA);
    let first = lab.run(&["--stage", "with_lora"]);
    let vector = exported(&lab, "lora");
    assert_eq!(vector.keys().collect::<Vec<_>>(), [ADAPTED]);
    assert_eq!(vector[ADAPTED].1, delta);
    let (base, merged) = (read(&lab.path("data/base.safetensors")), exported(&lab, "with_lora"));
    for (name, (shape, values)) in &base {
        let expected: Vec<f32> = if name == ADAPTED {
            values.iter().zip(&delta).map(|(value, delta)| value + delta).collect()
        } else {
            values.clone()
        };
        let (merged_shape, merged) = &merged[name];
        assert_eq!(merged_shape, shape);
        // The merge writes the base's type: half precision.
        for (actual, expected) in merged.iter().zip(&expected) {
            assert!(
                (actual - expected).abs() <= expected.abs() * 1e-3 + 1e-6,
                "{name}: {actual} and {expected}"
            );
        }
    }
    // Its configuration is part of what it is.
    write_adapter(&lab, r#","use_rslora":true"#);
    let second = lab.run(&["--stage", "with_lora"]);
    assert_ne!(first.units["lora"].artifact, second.units["lora"].artifact);
    assert_ne!(first.units["with_lora"].artifact, second.units["with_lora"].artifact);
}

#[test]
fn mistakes_about_names_and_adapters_are_found_before_anything_runs() {
    let lab = Lab::small();
    write_adapter(&lab, "");
    lab.append("pipeline.toml", LORA);
    lab.append(
        "pipeline.toml",
        "\n[stage.wrong]\nkind = \"diff\"\nfrom = { base = \"base\", tuned = \"lora\" }\n",
    );
    let outcome = lab.call(["check", "pipeline.toml"]);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&["task vectors"]);

    let lab = Lab::small();
    lab.edit(
        "pipeline.toml",
        "path = \"data/base.safetensors\"",
        "path = \"data/base.safetensors\"\nfamily = \"open-clp\"",
    );
    let outcome = lab.call(["check", "pipeline.toml"]);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&["`open-clp` is not a family of names", "open-clip"]);

    let lab = Lab::small();
    lab.edit(
        "pipeline.toml",
        "path = \"data/base.safetensors\"",
        "path = \"data/base.safetensors\"\nrename = [{ from = \"a.*\", to = \"b\" }]",
    );
    let outcome = lab.call(["check", "pipeline.toml"]);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&["both sides need the same number of `*`"]);

    let lab = Lab::small();
    write_adapter(&lab, r#","use_dora":true"#);
    lab.append("pipeline.toml", LORA);
    let outcome = lab.call(["run", "pipeline.toml", "--stage", "lora"]);
    assert_eq!(outcome.code, 1, "{outcome}");
    outcome.tells(&["`use_dora` is not supported: DoRA"]);
}
