//! Mistakes of all kinds: what is said, the exit code, and what is kept.

use crate::tensors::{change, read_stored, single, write_stored};
use crate::util::{Lab, Outcome};

const TENSOR: &str = "vision_model.encoder.layers.2.mlp.fc1.weight";

/// Runs; the run must fail in a stage, which `texts` on standard error describe.
#[track_caller]
fn fails(lab: &Lab, args: &[&str], texts: &[&str]) -> Outcome {
    let outcome = lab.try_run("pipeline.toml", args);
    assert_eq!(outcome.code, 1, "{outcome}");
    outcome.tells(texts);
    outcome
}

/// Runs; the mistake must be found before anything runs.
#[track_caller]
fn refused(lab: &Lab, args: &[&str], texts: &[&str]) {
    let outcome = lab.try_run("pipeline.toml", args);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(texts);
    assert_eq!(outcome.stdout, "");
    assert!(!outcome.stderr.contains("ran     "), "something ran\n{outcome}");
    assert_eq!(lab.cached_files("objects-v1").len(), 0, "something was stored");
}

/// Fails unless what ran in a failed run is cached in the next.
#[track_caller]
fn is_kept(lab: &Lab, failed: &Outcome, args: &[&str]) {
    let again = lab.try_run("pipeline.toml", args);
    assert_eq!(again.code, failed.code, "{again}");
    let (before, after) = (failed.run(), again.run());
    assert!(!before.ran().is_empty(), "{failed}");
    for unit in before.ran() {
        assert_eq!(after.units[unit].status, "cached", "{unit} was finished");
    }
    assert!(after.ran().is_empty() || args.contains(&"--keep-going"), "{again}");
}

#[test]
fn a_truncated_checkpoint_is_refused_by_name() {
    let lab = Lab::small();
    let path = lab.path("data/ft_negative.safetensors");
    let bytes = fs_err::read(&path).unwrap();
    fs_err::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let [actual, expected] = [bytes.len() - 1, bytes.len()].map(|length| length.to_string());
    let texts = ["FAILED  tuned[negative]", "ft_negative.safetensors", "truncated", &actual, &expected];
    let outcome = fails(&lab, &["--keep-going"], &texts);
    is_kept(&lab, &outcome, &["--keep-going"]);
    for length in [bytes.len() / 2, 100, 4, 0] {
        fs_err::write(&path, &bytes[..length]).unwrap();
        fails(&lab, &["--keep-going"], &texts[..2]);
    }
    fs_err::write(&path, &bytes).unwrap();
    lab.run(&[]);
}

#[test]
fn a_missing_tensor_is_named_with_its_task() {
    let lab = Lab::small();
    change(&lab.path("data/ft_negative.safetensors"), |tensors| {
        tensors.remove(TENSOR).unwrap();
    });
    let outcome = fails(&lab, &[], &["FAILED  deltas[negative]", "lacks", TENSOR]);
    is_kept(&lab, &outcome, &[]);
    // Leaving it out for one task only is refused when merging, with both tasks named.
    lab.edit("pipeline.toml", "kind = \"diff\"", "kind = \"diff\"\nmissing = \"skip\"");
    fails(
        &lab,
        &[],
        &[
            "warning: deltas[negative]",
            "FAILED  merged",
            "task vector `negative` lacks",
            "which task vector `digits` has",
            TENSOR,
        ],
    );
}

#[test]
fn a_misshaped_tensor_is_named_with_both_shapes() {
    let lab = Lab::small();
    change(&lab.path("data/ft_digits.safetensors"), |tensors| {
        tensors.get_mut(TENSOR).unwrap().shape = vec![96, 384];
    });
    let outcome = fails(&lab, &[], &["FAILED  deltas[digits]", TENSOR, "[384, 96]", "[96, 384]"]);
    is_kept(&lab, &outcome, &[]);
}

/// Makes one value of a fine-tuned checkpoint a NaN.
fn put_nan(lab: &Lab, task: &str) {
    change(&lab.path(format!("data/ft_{task}.safetensors")), |tensors| {
        let tensor = tensors.get_mut(TENSOR).unwrap();
        assert_eq!(tensor.dtype, safetensors::Dtype::F16);
        tensor.data[10..12].copy_from_slice(&half::f16::NAN.to_le_bytes());
    });
}

#[test]
fn a_nan_is_named_with_tensor_and_task() {
    let lab = Lab::small();
    put_nan(&lab, "negative");
    let outcome = fails(&lab, &[], &["FAILED  packed[negative]", TENSOR, "NaN"]);
    is_kept(&lab, &outcome, &[]);
}

#[test]
fn a_nan_in_a_tensor_that_is_not_quantized_is_found_too() {
    let lab = Lab::small();
    put_nan(&lab, "negative");
    lab.edit(
        "pipeline.toml",
        "bits = \"${bits}\"",
        "bits = \"${bits}\"\nrules = [{ match = \"*.fc1.weight\", keep = true }]",
    );
    fails(&lab, &[], &["FAILED  packed[negative]", TENSOR, "NaN"]);
}

#[test]
fn a_nan_is_found_when_merging_views_and_names_the_task() {
    let lab = Lab::small();
    put_nan(&lab, "negative");
    lab.edit("pipeline.toml", "vectors = \"packed\"", "vectors = \"deltas\"");
    fails(&lab, &["--stage", "merged"], &["FAILED  merged", TENSOR, "NaN", "negative"]);
}

#[test]
fn a_nan_is_found_when_the_checkpoint_itself_is_evaluated() {
    let lab = Lab::small();
    put_nan(&lab, "negative");
    lab.edit("pipeline.toml", "model = \"merged\"", "model = \"tuned\"");
    fails(&lab, &["--stage", "scores"], &["FAILED  scores[negative]", TENSOR, "NaN"]);
}

#[test]
fn a_head_of_the_wrong_size_is_named_with_expected_and_actual() {
    let lab = Lab::small();
    let head = lab.path("data/head_negative.safetensors");
    change(&head, |tensors| {
        tensors.insert("weight".to_owned(), single(&[10, 63], &[0.5; 630])).unwrap();
    });
    let outcome = fails(
        &lab,
        &["--keep-going"],
        &[
            "FAILED  base_scores[negative]",
            "head_negative.safetensors",
            "expects embeddings of 63 values, the graph gives 64",
        ],
    );
    is_kept(&lab, &outcome, &["--keep-going"]);

    change(&head, |tensors| {
        tensors.insert("weight".to_owned(), single(&[10, 64], &[0.5; 640])).unwrap();
        tensors.insert("bias".to_owned(), single(&[9], &[0.5; 9])).unwrap();
    });
    fails(&lab, &[], &["head_negative.safetensors", "bias", "[9]", "[10]"]);

    change(&head, |tensors| {
        tensors.remove("weight").unwrap();
    });
    fails(&lab, &[], &["head_negative.safetensors", "no tensor `weight`"]);
}

#[test]
fn a_label_out_of_range_is_named_with_the_number_of_classes() {
    let lab = Lab::small();
    change(&lab.path("data/head_digits.safetensors"), |tensors| {
        tensors.insert("weight".to_owned(), single(&[7, 64], &[0.5; 448])).unwrap();
        tensors.insert("bias".to_owned(), single(&[7], &[0.5; 7])).unwrap();
    });
    let outcome =
        fails(&lab, &["--stage", "base_scores"], &["FAILED  base_scores[digits]", "digits", "label", "7"]);
    is_kept(&lab, &outcome, &["--stage", "base_scores"]);
}

#[test]
fn a_graph_that_the_model_cannot_be_bound_into_is_refused_with_tensor_names() {
    let lab = Lab::small();
    // The graph is the base's; every tensor of another origin has other values.
    lab.append("pipeline.toml", "\n[stage.other]\nkind = \"load\"\npath = \"data/ft_parity.safetensors\"\n");
    lab.edit(
        "pipeline.toml",
        "{ model = \"merged\", origin = \"base\" }",
        "{ model = \"merged\", origin = \"other\" }",
    );
    let texts = [
        "FAILED  scores[digits]",
        "clip_vision.onnx",
        "exported from another checkpoint",
        "`vision_model.embeddings.class_embedding`",
    ];
    let outcome = fails(&lab, &["--stage", "scores"], &texts);
    is_kept(&lab, &outcome, &["--stage", "scores"]);
}

#[test]
fn an_origin_with_another_weight_than_the_graph_is_refused() {
    let lab = Lab::small();
    // The exporter gave this weight another name, so only its values tell that the graph was made from another checkpoint: with the base
    // too, it would run with its own weight.
    change(&lab.path("data/base.safetensors"), |tensors| {
        let tensor = tensors.get_mut(TENSOR).unwrap();
        tensor.data[..2].copy_from_slice(&half::f16::from_f32(0.75).to_le_bytes());
    });
    let texts =
        ["FAILED  base_scores[digits]", "clip_vision.onnx", TENSOR, "has other values than the origin's"];
    fails(&lab, &["--stage", "base_scores"], &texts);
}

#[test]
fn a_checkpoint_of_another_architecture_is_refused() {
    let lab = Lab::small();
    let tensors =
        (0..6).map(|layer| (format!("blocks.{layer}.weight"), single(&[8, 8], &[layer as f32; 64])));
    write_stored(&lab.path("data/base.safetensors"), &tensors.collect());
    let texts =
        ["FAILED  base_scores[digits]", "clip_vision.onnx", "no tensor of the origin was found in the graph"];
    fails(&lab, &["--stage", "base_scores"], &texts);
}

#[test]
fn a_model_that_lacks_a_tensor_of_the_graph_is_refused_with_its_name() {
    let lab = Lab::small();
    change(&lab.path("data/ft_digits.safetensors"), |tensors| {
        tensors.remove(TENSOR).unwrap();
    });
    lab.edit("pipeline.toml", "model = \"merged\"", "model = \"tuned\"");
    fails(&lab, &["--stage", "scores"], &["FAILED  scores[digits]", TENSOR]);
}

#[test]
fn files_that_are_not_what_they_should_be_are_named() {
    let rubbish: [(&str, &str); 5] = [
        ("clip_vision.onnx", "base_scores[digits]"),
        ("digits-images.idx.gz", "base_scores[digits]"),
        ("digits-labels.idx.gz", "base_scores[digits]"),
        ("head_digits.safetensors", "base_scores[digits]"),
        ("preprocessor_config.json", "base_scores[digits]"),
    ];
    let lab = Lab::small();
    for (file, unit) in rubbish {
        let path = lab.path("data").join(file);
        let good = fs_err::read(&path).unwrap();
        for bad in [b"rubbish".as_slice(), &good[..good.len() / 2], b""] {
            fs_err::write(&path, bad).unwrap();
            let outcome = lab.try_run("pipeline.toml", &["--stage", "base_scores"]);
            assert!(outcome.code == 1 || outcome.code == 2, "{file}: {outcome}");
            outcome.tells(&[unit, file]);
        }
        fs_err::write(&path, good).unwrap();
    }
    lab.run(&["--stage", "base_scores"]);
}

#[test]
fn images_and_labels_of_different_numbers_are_refused() {
    let lab = Lab::small();
    lab.edit("pipeline.toml", "labels = \"data/digits-labels.idx.gz\"", "labels = \"data/few-labels.idx\"");
    // idx of bytes, one dimension, three labels.
    fs_err::write(lab.path("data/few-labels.idx"), [0, 0, 8, 1, 0, 0, 0, 3, 1, 2, 3]).unwrap();
    let outcome = lab.try_run("pipeline.toml", &["--stage", "base_scores"]);
    assert!(outcome.code == 1 || outcome.code == 2, "{outcome}");
    outcome.tells(&["600", "3", "labels"]);
}

#[test]
fn an_unknown_key_is_shown_with_its_place_and_a_suggestion() {
    let lab = Lab::small();
    lab.edit("pipeline.toml", "scale = \"${scale}\"", "scal = \"${scale}\"");
    let text = fs_err::read_to_string(lab.path("pipeline.toml")).unwrap();
    let line = text.lines().position(|line| line.starts_with("scal =")).unwrap() + 1;
    refused(&lab, &[], &["unknown-key", "scal", "scale", &format!("pipeline.toml:{line}:1"), "did you mean"]);
}

#[test]
fn a_cycle_names_its_stages() {
    let lab = Lab::small();
    lab.edit(
        "pipeline.toml",
        "from = { base = \"base\", tuned = \"tuned\" }",
        "from = { base = \"merged\", tuned = \"tuned\" }",
    );
    refused(&lab, &[], &["cycle", "deltas", "packed", "merged"]);
}

#[test]
fn all_missing_files_are_named_before_anything_runs() {
    let lab = Lab::small();
    for file in ["ft_digits.safetensors", "head_negative.safetensors", "digits-images.idx.gz"] {
        fs_err::remove_file(lab.path("data").join(file)).unwrap();
    }
    refused(
        &lab,
        &[],
        &[
            "missing-file",
            "ft_digits.safetensors",
            "head_negative.safetensors",
            "digits-images.idx.gz",
            "pipeline.toml:",
        ],
    );
    let check = lab.call(["check", "pipeline.toml"]);
    assert_eq!(check.code, 2, "{check}");
    check.tells(&["ft_digits.safetensors", "head_negative.safetensors", "digits-images.idx.gz"]);
}

#[test]
fn only_the_files_that_a_run_needs_have_to_be_there() {
    let lab = Lab::small();
    fs_err::remove_file(lab.path("data/head_digits.safetensors")).unwrap();
    lab.run(&["--stage", "merged"]);
}

#[test]
fn mistakes_on_the_command_line_are_user_errors() {
    let lab = Lab::small();
    refused(&lab, &["--stage", "merge"], &["unknown stage `merge`", "merged"]);
    refused(&lab, &["--force", "pack"], &["unknown stage `pack`"]);
    refused(&lab, &["--set", "bit=3"], &["bit", "bits"]);
    refused(&lab, &["--set", "bits=12"], &["bits", "12"]);
    refused(&lab, &["--jobs", "0"], &["--jobs"]);
    refused(&lab, &["--threads", "0"], &["--threads"]);
    refused(&lab, &["--no-such-option"], &["--no-such-option"]);
    let missing = lab.call(["run", "no-such-pipeline.toml"]);
    assert_eq!(missing.code, 2, "{missing}");
    missing.tells(&["no-such-pipeline.toml"]);
    let unknown = lab.call(["rum"]);
    assert_eq!(unknown.code, 2, "{unknown}");
    unknown.tells(&["run"]);
    for command in ["show", "why"] {
        let outcome = lab.call([command, "pipeline.toml", "scoers"]);
        assert_eq!(outcome.code, 2, "{outcome}");
        outcome.tells(&["unknown stage `scoers`", "scores"]);
    }
}

#[test]
fn without_keep_going_the_rest_is_skipped() {
    let lab = Lab::small();
    put_nan(&lab, "digits");
    let run = fails(&lab, &[], &["FAILED  packed[digits]"]).run();
    assert_eq!(run.with("failed").into_iter().collect::<Vec<_>>(), ["packed[digits]"]);
    assert_eq!(run.units["merged"].status, "skipped");
    assert_eq!(run.units["scores[digits]"].status, "skipped");
}

#[test]
fn keep_going_goes_on_with_independent_stages_and_skips_dependents() {
    let lab = Lab::small();
    put_nan(&lab, "digits");
    let outcome = fails(&lab, &["--keep-going"], &["FAILED  packed[digits]"]);
    let run = outcome.run();
    assert_eq!(run.with("failed").into_iter().collect::<Vec<_>>(), ["packed[digits]"]);
    assert_eq!(
        run.with("skipped").into_iter().collect::<Vec<_>>(),
        ["merged", "scores[digits]", "scores[negative]"]
    );
    assert_eq!(run.ran().len(), 8);
    assert!(run.units["packed[digits]"].reason.contains(TENSOR), "{:?}", run.units["packed[digits]"]);
    // The scores that there are come out.
    assert_eq!(run.correct().len(), 2);
    is_kept(&lab, &outcome, &["--keep-going"]);
    // With the cause gone, only what it stopped runs.
    crate::util::copy(
        &crate::util::quickstart().join("ft_digits.safetensors"),
        &lab.path("data/ft_digits.safetensors"),
    );
    let mended = lab.run(&[]);
    assert!(
        mended.units["base_scores[digits]"].status == "cached"
            && mended.units["packed[negative]"].status == "cached"
    );
}

#[test]
fn a_file_that_changes_while_it_is_read_fails_the_stage() {
    // Two units read the same file under one digest; if it changes in between, the second must not use the new bytes under the old key.
    let lab = Lab::small();
    let base = read_stored(&lab.path("data/base.safetensors"));
    write_stored(&lab.path("data/copy.safetensors"), &base);
    lab.edit("pipeline.toml", "data/base.safetensors", "data/copy.safetensors");
    let mut child = lab
        .command(["run", "pipeline.toml", "--set", "bits=2,3,4,5,6,7,8", "--set", "limit=600"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut stderr = String::new();
    while !stderr.contains("ran     base_scores[digits]") {
        assert!(std::io::BufRead::read_line(&mut lines, &mut stderr).unwrap() > 0, "{stderr}");
    }
    change(&lab.path("data/copy.safetensors"), |tensors| {
        tensors.get_mut(TENSOR).unwrap().data[0] ^= 1;
    });
    std::io::Read::read_to_string(&mut lines, &mut stderr).unwrap();
    let code = child.wait().unwrap().code();
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("FAILED") && stderr.contains("copy.safetensors"), "{stderr}");
}
