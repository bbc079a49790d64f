//! What `plan` foresees is what `run` does: it is the same code, and this holds it to that over many edits.

use crate::cache::rename_producer;
use crate::util::{Lab, PARITY, Run};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use std::io::{Read, Write};
use std::path::Path;

/// Plans, runs, and compares. Returns what was executed.
#[track_caller]
fn plan_and_run(lab: &Lab, what: &str, args: &[&str]) -> Run {
    let planned = Run::of(&lab.json(&[["plan", "pipeline.toml"].as_slice(), args].concat()));
    let run = lab.run(args);
    assert!(planned.units.keys().eq(run.units.keys()), "{what}: other units");
    for (unit, forecast) in &planned.units {
        let status = run.units[unit].status.as_str();
        let agrees = match forecast.status.as_str() {
            "cached" => status == "cached",
            // A unit with the same key as another of this run is computed once.
            "run" => {
                status == "ran" || run.ran().iter().any(|twin| run.units[*twin].key == run.units[unit].key)
            }
            "maybe" => status == "cached" || status == "ran",
            other => panic!("{what}: `{other}` is no forecast"),
        };
        assert!(
            agrees,
            "{what}: {unit} was planned `{}` ({}) and {status}",
            forecast.status, forecast.reason
        );
        if forecast.status != "cached" {
            assert!(!forecast.reason.is_empty(), "{what}: no reason is given for {unit}");
        }
    }
    run
}

#[test]
fn what_is_planned_cached_is_never_executed() {
    let lab = Lab::small();
    let edit = |from: &str, to: &str| lab.edit("pipeline.toml", from, to);
    let go = |what: &str, args: &[&str]| plan_and_run(&lab, what, args);

    assert_eq!(go("nothing cached", &[]).with("cached").len(), 0);
    go("nothing changed", &[]).ran_exactly(&[]);
    go("bits on the command line", &["--set", "bits=3"]);
    edit("bits = 4", "bits = 2");
    go("bits", &[]);
    edit("scale = 0.3", "scale = 0.4");
    go("scale", &[]);
    go("scale and bits at once", &["--set", "scale=0.1", "--set", "bits=5"]);
    go("a sweep", &["--set", "bits=2,3,6", "--set", "scale=0.4,0.1"]);
    edit("path = \"data/ft_${task}.safetensors\"", "path = \"data/ft_parity.safetensors\"");
    go("another checkpoint", &[]);
    edit("path = \"data/ft_parity.safetensors\"", "path = \"data/ft_${task}.safetensors\"");
    go("the old checkpoint again", &[]).ran_exactly(&[]);
    edit("[\"digits\", \"negative\"]", "[\"negative\", \"digits\"]");
    go("the order of the tasks", &[]);
    edit("[\"negative\", \"digits\"]", "[\"negative\", \"parity\", \"digits\"]");
    lab.append("pipeline.toml", PARITY);
    go("a further task", &[]);
    go("one task less", &["--set", "tasks=[\"digits\",\"parity\"]"]);
    edit("limit = 40", "limit = 30");
    go("a limit", &[]);
    edit("data/head_parity.safetensors", "data/head_other.safetensors");
    let head = fs_err::read(lab.path("data/head_parity.safetensors")).unwrap();
    fs_err::write(lab.path("data/head_other.safetensors"), &head).unwrap();
    go("a head of another name", &[]).ran_exactly(&[]);
    let mut changed = head;
    *changed.last_mut().unwrap() ^= 1;
    fs_err::write(lab.path("data/head_other.safetensors"), changed).unwrap();
    go("a head of other content", &[]).ran_exactly(&["base_scores[parity]", "scores[parity]"]);
    rename_producer(&lab.path("data/clip_vision.onnx"));
    go("a byte of the graph", &[]);
    change_a_pixel(&lab.path("data/digits-images.idx.gz"));
    go("a pixel", &[]).ran_exactly(&["base_scores[digits]", "scores[digits]"]);
    lab.append("data/preprocessor_config.json", "\n");
    go("a byte of the preprocessor", &[]);
    edit("graph = \"data/clip_vision.onnx\"", "graph = \"data/clip_vision.onnx\"\nbatch_size = 7");
    go("the batch size", &[]);
    edit("from = \"deltas\"", "from = \"deltas\"\nrules = [{ match = \"nothing\", bits = 8 }]");
    go("a rule that matches nothing", &[]);
    edit("match = \"nothing\"", "match = \"*fc1*\"");
    go("a rule that matches", &[]);
    edit("from = \"deltas\"", "from = \"deltas\"\nskip = [\"*.bias\"]");
    go("tensors left out", &[]);
    edit("method = \"task-arithmetic\"\nscale = \"${scale}\"", "method = \"average\"");
    go("another method", &[]);
    edit("packed", "codes");
    go("a renamed stage", &[]).ran_exactly(&[]);
    go("a forced stage", &["--force", "codes"]);
    go("a forced root", &["--force", "base", "--force", "tuned"]);
    go("one stage", &["--stage", "codes"]).ran_exactly(&[]);
    fs_err::remove_dir_all(lab.cache.join("keys-v1")).unwrap();
    go("all keys lost", &[]);
    fs_err::remove_dir_all(lab.cache.join("objects-v1")).unwrap();
    go("all objects lost", &[]);
}

/// Changes the first pixel of a gzipped idx file of images.
fn change_a_pixel(path: &Path) {
    let mut bytes = Vec::new();
    GzDecoder::new(fs_err::File::open(path).unwrap()).read_to_end(&mut bytes).unwrap();
    bytes[16] ^= 1;
    let mut encoder = GzEncoder::new(fs_err::File::create(path).unwrap(), Compression::fast());
    encoder.write_all(&bytes).unwrap();
    encoder.finish().unwrap();
}

#[test]
fn planning_changes_nothing() {
    let lab = Lab::small();
    let first = Run::of(&lab.json(&["plan", "pipeline.toml"]));
    assert_eq!(first.with("cached").len(), 0);
    assert_eq!(lab.cached_files("objects-v1"), Vec::<std::path::PathBuf>::new());
    let dry = lab.ok(["run", "pipeline.toml", "--dry-run", "--json"]);
    assert_eq!(dry.run().units, first.units);
    assert_eq!(lab.cached_files("objects-v1"), Vec::<std::path::PathBuf>::new());
}

#[test]
fn the_plan_gives_the_root_cause_of_each_miss() {
    let lab = Lab::small();
    lab.run(&[]);
    let planned = Run::of(&lab.json(&["plan", "pipeline.toml", "--set", "bits=3"]));
    assert_eq!(planned.units["packed[digits]"].reason, "bits 4 → 3");
    for unit in ["merged", "scores[negative]"] {
        assert_eq!(planned.units[unit].status, "maybe");
        assert_eq!(planned.units[unit].reason, "`packed[digits]` runs: bits 4 → 3");
    }
    let text = lab.ok(["plan", "pipeline.toml", "--set", "bits=3"]).stdout;
    assert!(text.contains("2 to run, 3 maybe, 7 cached"), "{text}");
}
