//! What runs again after an edit, and what does not.

use crate::util::{Lab, PARITY, Run, SMALL_UNITS, quickstart};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, SystemTime};

#[test]
fn a_second_run_executes_nothing() {
    let lab = Lab::small();
    let first = lab.run(&[]);
    first.ran_exactly(&SMALL_UNITS);
    let second = lab.run(&[]);
    second.ran_exactly(&[]);
    assert_eq!(second.artifacts(), first.artifacts());
    assert_eq!(second.scores, first.scores);
}

#[test]
fn the_quickstart_at_other_bits_runs_exactly_quantize_merge_and_evaluate() {
    let lab = Lab::empty();
    let file = quickstart().with_extension("toml").display().to_string();
    let first = lab.run_file(&file, &[]);
    assert_eq!(first.ran().len(), first.units.len());
    let second = lab.run_file(&file, &[]);
    second.ran_exactly(&[]);

    let args = [file.as_str(), "--set", "bits=3"];
    let planned = Run::of(&lab.json(&[["plan"].as_slice(), &args].concat()));
    let run = lab.run_file(&file, &args[1..]);
    let tasks = ["digits", "rotated", "negative", "parity"];
    let mut expected = vec!["merged[bits=3]".to_owned()];
    expected.extend(
        tasks.iter().flat_map(|task| [format!("packed[bits=3,{task}]"), format!("scores[bits=3,{task}]")]),
    );
    run.ran_exactly(&expected.iter().map(String::as_str).collect::<Vec<_>>());
    let foreseen: BTreeSet<&str> = planned.with("run").union(&planned.with("maybe")).copied().collect();
    assert_eq!(foreseen, run.ran());
    assert_eq!(planned.with("run").iter().filter(|unit| unit.starts_with("packed")).count(), 4);
}

#[test]
fn changed_bits_run_exactly_quantize_merge_and_evaluate() {
    let lab = Lab::small();
    lab.run(&[]);
    let changed = lab.run(&["--set", "bits=3"]);
    changed.ran_exactly(&[
        "packed[digits]",
        "packed[negative]",
        "merged",
        "scores[digits]",
        "scores[negative]",
    ]);
    assert_eq!(changed.units["packed[digits]"].reason, "bits 4 → 3");
    lab.run(&[]).ran_exactly(&[]);
}

#[test]
fn swapping_the_values_of_two_parameters_is_a_miss() {
    let lab = Lab::small();
    lab.edit(
        "pipeline.toml",
        "bits = \"${bits}\"",
        "bits = \"${bits}\"\nrules = [{ match = \"*fc1*\", bits = 5 }, { match = \"*fc2*\", bits = 6 }]",
    );
    lab.edit(
        "pipeline.toml",
        "scale = \"${scale}\"",
        "scale = 0.25\nweights = { digits = 0.5, negative = 0.75 }",
    );
    let first = lab.run(&[]);
    lab.edit("pipeline.toml", "bits = 5", "bits = 0");
    lab.edit("pipeline.toml", "bits = 6", "bits = 5");
    lab.edit("pipeline.toml", "bits = 0", "bits = 6");
    let downstream = ["merged", "scores[digits]", "scores[negative]"];
    let rules = lab.run(&[]);
    rules.ran_exactly(&[["packed[digits]", "packed[negative]"].as_slice(), &downstream].concat());
    assert_ne!(rules.units["packed[digits]"].artifact, first.units["packed[digits]"].artifact);

    lab.edit("pipeline.toml", "digits = 0.5, negative = 0.75", "digits = 0.75, negative = 0.5");
    let weights = lab.run(&[]);
    weights.ran_exactly(&downstream);
    assert_ne!(weights.units["merged"].artifact, rules.units["merged"].artifact);

    lab.edit("pipeline.toml", "digits = 0.75", "digits = 0.25");
    lab.edit("pipeline.toml", "scale = 0.25", "scale = 0.75");
    let scale = lab.run(&[]);
    scale.ran_exactly(&downstream);
    assert_ne!(scale.units["merged"].artifact, weights.units["merged"].artifact);
}

#[test]
fn swapping_two_inputs_is_a_miss() {
    let lab = Lab::small();
    lab.edit("pipeline.toml", "scale = \"${scale}\"", "weights = { digits = 0.5, negative = 0.25 }");
    let first = lab.run(&[]);
    // What was the difference of `negative` is now that of `digits`, and the other way round.
    let (digits, negative) =
        (lab.path("data/ft_digits.safetensors"), lab.path("data/ft_negative.safetensors"));
    fs_err::rename(&digits, lab.path("data/third")).unwrap();
    fs_err::rename(&negative, &digits).unwrap();
    fs_err::rename(lab.path("data/third"), &negative).unwrap();
    let swapped = lab.run(&[]);
    // The differences themselves are known; whose they are in the merge is not.
    swapped.ran_exactly(&["merged", "scores[digits]", "scores[negative]"]);
    assert_eq!(swapped.units["deltas[digits]"].artifact, first.units["deltas[negative]"].artifact);
}

/// Gives a file another time of last change.
fn touch(path: &Path, seconds_ago: u64) {
    let file = fs_err::OpenOptions::new().write(true).open(path).unwrap();
    file.file().set_modified(SystemTime::now() - Duration::from_secs(seconds_ago)).unwrap();
}

fn flip_last_byte(path: &Path) {
    let mut bytes = fs_err::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs_err::write(path, bytes).unwrap();
}

#[test]
fn touching_an_input_without_changing_it_is_a_hit() {
    let lab = Lab::small();
    lab.run(&[]);
    for file in [
        "base.safetensors",
        "ft_digits.safetensors",
        "clip_vision.onnx",
        "digits-images.idx.gz",
        "head_digits.safetensors",
    ] {
        touch(&lab.path("data").join(file), 1000);
    }
    lab.run(&[]).ran_exactly(&[]);
}

#[test]
fn one_changed_byte_of_an_input_runs_exactly_what_depends_on_it() {
    let lab = Lab::small();
    lab.run(&[]);
    let merged = ["merged", "scores[digits]", "scores[negative]"];
    // The last bit of a checkpoint's last value.
    flip_last_byte(&lab.path("data/ft_digits.safetensors"));
    let run = lab.run(&[]);
    assert!(
        run.ran().contains("tuned[digits]")
            && run.ran().contains("deltas[digits]")
            && run.ran().contains("packed[digits]")
    );
    let others = [
        "base",
        "base_scores[digits]",
        "base_scores[negative]",
        "tuned[negative]",
        "deltas[negative]",
        "packed[negative]",
    ];
    assert!(others.iter().all(|unit| run.units[*unit].status == "cached"), "{:?}", run.units);
    // If the value survives quantization as it was, nothing below runs; if not, all of it.
    assert!(run.ran().len() == 3 || merged.iter().all(|unit| run.ran().contains(unit)));

    flip_last_byte(&lab.path("data/head_negative.safetensors"));
    lab.run(&[]).ran_exactly(&["base_scores[negative]", "scores[negative]"]);

    // A space at the end of the preprocessor's JSON changes no pixel, but that is not known before it has been read.
    lab.append("data/preprocessor_config.json", " ");
    lab.run(&[]).ran_exactly(&[
        "base_scores[digits]",
        "base_scores[negative]",
        "scores[digits]",
        "scores[negative]",
    ]);

    let graph = lab.path("data/clip_vision.onnx");
    rename_producer(&graph);
    lab.run(&[]).ran_exactly(&[
        "base_scores[digits]",
        "base_scores[negative]",
        "scores[digits]",
        "scores[negative]",
    ]);
}

/// Changes one byte of a graph that no number depends on.
pub(crate) fn rename_producer(graph: &Path) {
    let mut bytes = fs_err::read(graph).unwrap();
    let at = bytes.windows(7).position(|window| window == b"pytorch").unwrap();
    bytes[at] = b'P';
    fs_err::write(graph, bytes).unwrap();
}

#[test]
fn an_upstream_stage_that_gives_the_same_again_stops_there() {
    let lab = Lab::small();
    let first = lab.run(&[]);
    let forced = lab.run(&["--force", "packed"]);
    forced.ran_exactly(&["packed[digits]", "packed[negative]"]);
    assert_eq!(forced.artifacts(), first.artifacts());

    lab.edit(
        "pipeline.toml",
        "bits = \"${bits}\"",
        "bits = \"${bits}\"\nrules = [{ match = \"no.such.tensor\", bits = 2 }]",
    );
    let ruled = lab.run(&[]);
    ruled.ran_exactly(&["packed[digits]", "packed[negative]"]);
    assert_eq!(ruled.artifacts(), first.artifacts());

    // The same values in another file: the view describes other bytes, so its digest differs, but the codes are the same.
    crate::tensors::change(&lab.path("data/ft_digits.safetensors"), |tensors| {
        let extra = crate::tensors::single(&[1], &[0.0]);
        assert!(tensors.insert("aaa.not_in_the_base".to_owned(), extra).is_none());
    });
    lab.run(&[]).ran_exactly(&["tuned[digits]", "deltas[digits]", "packed[digits]"]);
}

#[test]
fn a_pipeline_that_was_moved_or_renamed_stays_cached() {
    let mut lab = Lab::small();
    let first = lab.run(&[]);
    lab.move_home("elsewhere");
    let moved = lab.run(&[]);
    moved.ran_exactly(&[]);
    assert_eq!(moved.artifacts(), first.artifacts());
    fs_err::rename(lab.path("pipeline.toml"), lab.path("renamed.toml")).unwrap();
    fs_err::rename(lab.path("data"), lab.path("files")).unwrap();
    lab.edit("renamed.toml", "\"data/", "\"files/");
    lab.run_file("renamed.toml", &[]).ran_exactly(&[]);
    // And what reads the views still finds their bytes.
    let changed = lab.run_file("renamed.toml", &["--set", "bits=3"]);
    changed.ran_exactly(&[
        "packed[digits]",
        "packed[negative]",
        "merged",
        "scores[digits]",
        "scores[negative]",
    ]);
}

#[test]
fn another_copy_of_the_same_files_is_cached_too() {
    let lab = Lab::small();
    lab.run(&[]);
    let mut other = Lab::small();
    other.cache.clone_from(&lab.cache);
    other.run(&[]).ran_exactly(&[]);
}

#[test]
fn a_renamed_stage_keeps_its_cache() {
    let lab = Lab::small();
    let first = lab.run(&[]);
    lab.edit("pipeline.toml", "packed", "codes");
    lab.edit("pipeline.toml", "[stage.scores]", "[stage.final]");
    let renamed = lab.run(&[]);
    renamed.ran_exactly(&[]);
    assert_eq!(renamed.units["codes[digits]"].artifact, first.units["packed[digits]"].artifact);
    assert_eq!(renamed.units["final[digits]"].artifact, first.units["scores[digits]"].artifact);
}

#[test]
fn a_further_task_computes_only_itself_the_merge_and_its_scores() {
    let lab = Lab::small();
    lab.run(&[]);
    lab.edit("pipeline.toml", "[\"digits\", \"negative\"]", "[\"digits\", \"negative\", \"parity\"]");
    lab.append("pipeline.toml", PARITY);
    lab.run(&[]).ran_exactly(&[
        "tuned[parity]",
        "deltas[parity]",
        "packed[parity]",
        "base_scores[parity]",
        "merged",
        "scores[digits]",
        "scores[negative]",
        "scores[parity]",
    ]);
}

#[test]
fn a_sweep_runs_shared_stages_once_and_names_its_instances() {
    let lab = Lab::small();
    lab.append("pipeline.toml", "\n[sweep]\nbits = [3, 4]\nscale = [0.2, 0.3]\n");
    let run = lab.run(&[]);
    let count = |stage: &str| run.units.keys().filter(|unit| unit.split('[').next() == Some(stage)).count();
    let counts = ["base", "tuned", "deltas", "packed", "merged", "base_scores", "scores"].map(count);
    assert_eq!(counts, [1, 2, 2, 4, 4, 2, 8]);
    assert!(run.units.contains_key("scores[bits=3,scale=0.2,digits]"), "{:?}", run.units.keys());

    lab.run(&["--set", "bits=3,4"]).ran_exactly(&[]);
    let one = lab.run(&["--stage", "packed[bits=3]"]);
    let expected = [
        "base",
        "deltas[digits]",
        "deltas[negative]",
        "packed[bits=3,digits]",
        "packed[bits=3,negative]",
        "tuned[digits]",
        "tuned[negative]",
    ];
    assert_eq!(one.units.keys().map(String::as_str).collect::<Vec<_>>(), expected);
    lab.run(&["--force", "packed[bits=3]"])
        .ran_exactly(&["packed[bits=3,digits]", "packed[bits=3,negative]"]);

    lab.run(&["--force", "packed[bits=3,digits]"]).ran_exactly(&["packed[bits=3,digits]"]);
    let member = lab.run(&["--stage", "packed[bits=4,negative]"]);
    assert_eq!(
        member.units.keys().collect::<Vec<_>>(),
        ["base", "deltas[negative]", "packed[bits=4,negative]", "tuned[negative]"]
    );

    let shown = lab.json(&["show", "pipeline.toml", "packed[bits=3]"]);
    let units: Vec<&str> =
        shown.as_array().unwrap().iter().map(|unit| unit["unit"].as_str().unwrap()).collect();
    assert_eq!(units, ["packed[bits=3,digits]", "packed[bits=3,negative]"]);
    let told = lab.ok(["why", "pipeline.toml", "packed[bits=3,digits]"]);
    assert!(
        told.stdout.contains("packed[bits=3,digits]: cached") && !told.stdout.contains("negative"),
        "{told}"
    );
    lab.ok(["export", "pipeline.toml", "merged[bits=3,scale=0.2]", "out"]);
    assert!(lab.path("out/merged-bits=3-scale=0.2.safetensors").is_file());

    // An axis of one value more runs only what has it.
    lab.run(&["--set", "bits=3,4,5", "--set", "scale=0.2"]).ran_exactly(&[
        "packed[bits=5,digits]",
        "packed[bits=5,negative]",
        "merged[bits=5,scale=0.2]",
        "scores[bits=5,scale=0.2,digits]",
        "scores[bits=5,scale=0.2,negative]",
    ]);
}

#[test]
fn stages_with_the_same_key_are_computed_once() {
    let lab = Lab::small();
    let text = "\n[stage.again]\nkind = \"quantize\"\nfrom = \"deltas\"\nbits = \"${bits}\"\n";
    lab.append("pipeline.toml", text);
    let run = lab.run(&["--jobs", "2"]);
    assert_eq!(run.units["again[digits]"].artifact, run.units["packed[digits]"].artifact);
    let statuses = |task: &str| {
        [&run.units[&format!("again[{task}]")].status, &run.units[&format!("packed[{task}]")].status]
    };
    for task in ["digits", "negative"] {
        let mut statuses = statuses(task);
        statuses.sort();
        assert_eq!(statuses, ["cached", "ran"], "{task}");
    }
}

#[test]
fn threads_jobs_and_the_working_folder_do_not_enter_a_key() {
    let lab = Lab::small();
    lab.run(&["--threads", "1"]);
    lab.run(&["--threads", "2", "--jobs", "3"]).ran_exactly(&[]);
    let file = lab.path("pipeline.toml");
    let mut command = lab.command([std::ffi::OsStr::new("run"), file.as_os_str(), "--json".as_ref()]);
    let outcome = crate::util::Outcome::of(command.current_dir(lab.root()));
    assert_eq!(outcome.code, 0, "{outcome}");
    outcome.run().ran_exactly(&[]);
}

#[test]
fn a_new_label_order_of_a_dataset_is_a_miss() {
    let lab = Lab::small();
    lab.run(&[]);
    let names: BTreeMap<&str, &str> = BTreeMap::from([("images", "data/digits-images.idx.gz")]);
    lab.edit("pipeline.toml", names["images"], "data/negative-images.idx.gz");
    lab.run(&[]).ran_exactly(&["base_scores[digits]", "scores[digits]"]);
}
