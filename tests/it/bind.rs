//! `merganser bind`: every export of the fixtures, as people and scripts see its binding.

use crate::tensors::{change, read, read_stored, write_stored};
use crate::util::{Lab, Outcome, test_data};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("onnx/tests/fixtures")
}

fn bind(lab: &Lab, graph: &Path, origin: &Path, model: Option<&Path>) -> (i32, Value) {
    let mut args = vec!["bind".to_owned(), graph.display().to_string(), origin.display().to_string()];
    args.extend(model.map(|model| model.display().to_string()));
    args.push("--json".to_owned());
    let outcome = lab.call(&args);
    (outcome.code, outcome.json())
}

/// The exports in which the exporter has computed constants from weights.
const COMPUTED: [&str; 4] = [
    "sam2_hf/prompt_encoder_mask_decoder.dyn18",
    "sam2_hf/vision_encoder.dyn18",
    "sam2_meta/decoder.dyn18",
    "sam2_meta/encoder.dyn18",
];

#[test]
fn of_all_fixture_graphs_four_are_refused_and_say_why() {
    let Some(data) = test_data("of_all_fixture_graphs_four_are_refused_and_say_why") else { return };
    let lab = Lab::empty();
    let mut n_graphs = 0;
    for folder in fs_err::read_dir(data.join("onnx-fixtures")).unwrap().map(|entry| entry.unwrap().path()) {
        let Ok(files) = fs_err::read_dir(&folder) else { continue };
        let (origin, model) = (folder.join("base.safetensors"), folder.join("perturbed.safetensors"));
        for graph in files.map(|entry| entry.unwrap().path()) {
            if graph.extension().is_none_or(|extension| extension != "onnx") {
                continue;
            }
            let name = graph.strip_prefix(data.join("onnx-fixtures")).unwrap().with_extension("");
            let name = name.to_str().unwrap();
            n_graphs += 1;
            let (code, report) = bind(&lab, &graph, &origin, Some(&model));
            assert!(!report["tensors"].as_array().unwrap().is_empty(), "{name}");
            let refusals = report["refusals"].as_array().unwrap();
            if COMPUTED.contains(&name) {
                assert_eq!((code, &report["binds"]), (1, &Value::Bool(false)), "{name}");
                let first: String = refusals.iter().map(|refusal| refusal.as_str().unwrap()).collect();
                assert!(
                    first.contains("pos") && first.contains("computed constants from it"),
                    "{name}: {first}"
                );
                // What has not changed is no reason to refuse.
                let (code, _) = bind(&lab, &graph, &origin, Some(&origin));
                assert_eq!(code, 0, "{name}");
            } else {
                assert_eq!((code, refusals.len()), (0, 0), "{name}: {refusals:?}");
            }
            // Without a model any tensor that cannot be injected counts.
            assert_eq!(bind(&lab, &graph, &origin, None).0, i32::from(COMPUTED.contains(&name)), "{name}");
        }
    }
    assert_eq!(n_graphs, 37);
}

#[test]
fn a_binding_is_shown_as_a_table() {
    let folder = fixtures().join("clip_hf");
    let args = ["bind", "vision.ts17.onnx", "base.safetensors", "perturbed.safetensors"];
    let args =
        args.map(|arg| if arg == "bind" { arg.into() } else { folder.join(arg).display().to_string() });
    let text = Lab::empty().ok(args).stdout;
    for line in
        ["transposed", "vision_model.encoder.layers.0.mlp.fc1.weight", "this model can be run in this graph"]
    {
        assert!(text.contains(line), "{text}");
    }
    let last: Vec<&str> = text.lines().rev().take(2).collect();
    assert!(last[1].starts_with("40 constants take the values of 40 tensors; 38 tensors are not"), "{text}");
    assert!(last[1].contains("logit_scale"), "{text}");
}

#[test]
fn the_report_agrees_with_the_ground_truth() {
    let folder = fixtures().join("deit_timm");
    let truth: Value =
        serde_json::from_slice(&fs_err::read(folder.join("model.ts17.binding.json")).unwrap()).unwrap();
    let (code, report) =
        bind(&Lab::empty(), &folder.join("model.ts17.onnx"), &folder.join("base.safetensors"), None);
    assert_eq!((code, &report["binds"], &report["coverage"]), (0, &Value::Bool(true), &Value::from(1.0)));
    let rows = report["tensors"].as_array().unwrap();
    for row in rows {
        let expected = &truth["tensors"][row["name"].as_str().unwrap()];
        assert_eq!((&row["how"], &row["shape"]), (&expected["how"], &expected["shape"]), "{row}");
    }
    let bound = truth["tensors"].as_object().unwrap().values();
    let bound = bound.filter(|tensor| tensor["how"] != "not from the checkpoint as stored").count();
    assert_eq!(rows.len(), bound);
}

#[test]
fn names_of_another_library_bind() {
    let lab = Lab::small();
    let graph = lab.path("data/clip_vision.onnx");
    let origin = lab.path("data/base.safetensors");
    write_stored(&lab.path("renamed.safetensors"), &crate::names::as_open_clip(&read(&origin)));
    let (code, report) = bind(&lab, &graph, &origin, Some(&lab.path("renamed.safetensors")));
    assert_eq!(code, 0, "{report:#}");
    assert!(report["mapped"].as_str().unwrap().contains("open-clip"), "{report:#}");
}

#[test]
fn what_cannot_be_run_is_said_with_exit_code_one_and_mistakes_with_two() {
    let lab = Lab::small();
    let (graph, origin) = (lab.path("data/clip_vision.onnx"), lab.path("data/base.safetensors"));
    let model = lab.path("data/ft_digits.safetensors");
    change(&model, |tensors| {
        tensors.remove("visual_projection.weight").unwrap();
    });
    let (code, report) = bind(&lab, &graph, &origin, Some(&model));
    assert_eq!(code, 1, "{report:#}");
    let refusal = report["refusals"][0].as_str().unwrap();
    assert!(refusal.contains("the model has no tensor `visual_projection.weight`"), "{refusal}");
    // A graph of another checkpoint.
    let (code, report) = bind(&lab, &graph, &lab.path("data/ft_negative.safetensors"), None);
    assert_eq!(code, 1);
    assert!(report["refusals"][0].as_str().unwrap().contains("exported from another checkpoint"));

    fs_err::write(lab.path("none.onnx"), "no graph").unwrap();
    let says = |args: &[&str], text: &str| {
        let outcome: Outcome = lab.call(args);
        assert_eq!(outcome.code, 2, "{outcome}");
        outcome.tells(&[text]);
    };
    says(&["bind", "missing.onnx", "data/base.safetensors"], "`missing.onnx` does not exist");
    says(&["bind", "none.onnx", "data/base.safetensors"], "none.onnx");
    says(&["bind", "data/clip_vision.onnx", "missing.safetensors"], "`missing.safetensors` does not exist");
    assert!(read_stored(&origin).contains_key("visual_projection.weight"));
}
