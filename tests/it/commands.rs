//! The commands beside `run`, and what every command keeps to.

use crate::util::{Lab, Outcome, Run, SMALL_UNITS};
use serde_json::Value;
use std::collections::BTreeSet;
use std::process::Stdio;

/// The names of an object's fields.
fn fields(value: &Value) -> BTreeSet<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// Fails unless an object has these fields and, at most, further ones.
#[track_caller]
fn has(value: &Value, expected: &[&str]) {
    let actual = fields(value);
    let missing: Vec<&&str> = expected.iter().filter(|name| !actual.contains(*name)).collect();
    assert!(missing.is_empty(), "{missing:?} are missing in {actual:?}");
}

#[test]
fn run_json_has_the_documented_fields() {
    let lab = Lab::small();
    let json = lab.json(&["run", "pipeline.toml", "--set", "bits=3,4"]);
    has(&json, &["run", "pipeline", "stages", "scores"]);
    assert_eq!(json["pipeline"], "small");
    let stages = json["stages"].as_array().unwrap();
    for stage in stages {
        has(stage, &["stage", "kind", "status", "key", "artifact", "seconds", "reason"]);
        assert_eq!(stage["key"].as_str().unwrap().len(), 64);
        assert_eq!(stage["artifact"].as_str().unwrap().len(), 64);
        assert!(stage["seconds"].is_number());
        let swept = ["packed", "merged", "scores"].contains(&stage["stage"].as_str().unwrap());
        assert_eq!(stage.get("vars").is_some(), swept, "{stage}");
        let single = ["base", "merged"].contains(&stage["stage"].as_str().unwrap());
        assert_eq!(stage.get("member").is_some(), !single, "{stage}");
    }
    let packed = stages.iter().find(|stage| stage["unit"] == "packed[bits=3,negative]").unwrap();
    assert_eq!(
        (&packed["stage"], &packed["kind"], &packed["member"]),
        (&"packed".into(), &"quantize".into(), &"negative".into())
    );
    assert_eq!(packed["vars"], serde_json::json!({ "bits": 3 }));

    let scores = json["scores"].as_array().unwrap();
    assert_eq!(
        scores.len(),
        2 * (2 + 2 * 2),
        "accuracy and top5 of the base and of two merged models on two tasks"
    );
    for score in scores {
        has(score, &["stage", "model", "task", "metric", "value", "n", "low", "high"]);
        let [value, low, high] = ["value", "low", "high"].map(|name| score[name].as_f64().unwrap());
        assert!(0.0 <= low && low <= value && value <= high && high <= 1.0, "{score}");
        assert_eq!(score["n"], 40);
        let model = if score["stage"] == "base_scores" { "base" } else { "merged" };
        assert_eq!(score["model"], model);
        assert_eq!(score.get("vars").is_some(), model == "merged");
    }
}

#[test]
fn plan_json_has_the_documented_fields() {
    let lab = Lab::small();
    lab.run(&[]);
    let json = lab.json(&["plan", "pipeline.toml", "--set", "bits=3"]);
    has(&json, &["pipeline", "stages"]);
    for stage in json["stages"].as_array().unwrap() {
        has(stage, &["stage", "kind", "status", "key", "artifact", "reason"]);
        assert!(stage.get("seconds").is_none());
        let status = stage["status"].as_str().unwrap();
        assert_eq!(stage["artifact"].is_string(), status == "cached", "{stage}");
        assert_eq!(stage["key"].is_string(), status != "maybe", "{stage}");
    }
    let statuses: BTreeSet<&str> =
        json["stages"].as_array().unwrap().iter().map(|stage| stage["status"].as_str().unwrap()).collect();
    assert_eq!(statuses, BTreeSet::from(["cached", "run", "maybe"]));
}

#[test]
fn members_of_scores_are_told() {
    let lab = Lab::small();
    lab.edit("pipeline.toml", "model = \"merged\"", "model = \"tuned\"");
    let json = lab.json(&["run", "pipeline.toml", "--stage", "scores"]);
    for score in json["scores"].as_array().unwrap() {
        assert_eq!(score["member"], score["task"]);
        assert_eq!(score["model"], "tuned");
    }
}

#[test]
fn check_says_that_all_is_well_or_everything_that_is_not() {
    let lab = Lab::small();
    let good = lab.ok(["check", "pipeline.toml"]);
    assert!(good.stdout.contains("no mistakes") && good.stderr.is_empty(), "{good}");
    assert_eq!(lab.json(&["check", "pipeline.toml"]), serde_json::json!({ "problems": [], "warnings": [] }));
    assert!(!lab.cache.exists(), "`check` needs no cache");

    lab.edit("pipeline.toml", "scale = \"${scale}\"", "scael = \"${scale}\"");
    lab.edit("pipeline.toml", "from = \"deltas\"", "from = \"detlas\"");
    lab.append("pipeline.toml", "\n[stage.odd]\nkind = \"marge\"\n\n[stage.other]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"packed\" }\nmethod = \"task-arithmetik\"\n");
    lab.edit(
        "pipeline.toml",
        "{ model = \"base\", origin = \"base\" }",
        "{ model = \"deltas\", origin = \"base\" }",
    );
    lab.edit("pipeline.toml", "bits = \"${bits}\"", "bits = \"four\"");
    let bad = lab.call(["check", "pipeline.toml"]);
    assert_eq!(bad.code, 2, "{bad}");
    assert_eq!(bad.stdout, "");
    bad.tells(&[
        "scael",
        "`scale`",
        "detlas",
        "`deltas`",
        "task-arithmetik",
        "`task-arithmetic`",
        "marge",
        "`merge`",
        "\"four\"",
        "takes a checkpoint",
    ]);
    let json = lab.call(["check", "pipeline.toml", "--json"]);
    assert_eq!(json.code, 2, "{json}");
    let json = json.json();
    let problems = json["problems"].as_array().unwrap();
    assert_eq!(problems.len(), 6, "{problems:?}");
    for problem in problems {
        has(problem, &["code", "message", "file", "line", "column"]);
    }
    let codes: BTreeSet<&str> = problems.iter().map(|problem| problem["code"].as_str().unwrap()).collect();
    for code in
        ["unknown-key", "unknown-stage", "unknown-method", "unknown-kind", "wrong-type", "wrong-content"]
    {
        assert!(codes.contains(code), "{codes:?}");
    }
}

#[test]
fn show_describes_every_kind_of_output() {
    let lab = Lab::small();
    lab.append("pipeline.toml", "\n[stage.files]\nkind = \"export\"\nfrom = \"merged\"\nto = \"out\"\n");
    let nothing = lab.json(&["show", "pipeline.toml", "merged"]);
    assert_eq!(nothing[0]["output"], Value::Null);
    lab.run(&[]);
    let show = |unit: &str| {
        let text = lab.ok(["show", "pipeline.toml", unit]);
        let json = lab.json(&["show", "pipeline.toml", unit]);
        (text.stdout, json)
    };
    let tensor = "vision_model.encoder.layers.0.mlp.fc1.weight";
    let row = |json: &Value| {
        json[0]["output"]["tensors"]
            .as_array()
            .unwrap()
            .iter()
            .find(|row| row["name"] == tensor)
            .unwrap()
            .clone()
    };

    let (text, json) = show("base");
    assert!(text.contains(tensor) && text.contains("[384, 96]") && text.contains("72 tensors"), "{text}");
    assert_eq!(
        (&json[0]["content"], &json[0]["output"]["layout"]),
        (&"checkpoint".into(), &"view of files".into())
    );
    assert_eq!(json[0]["output"]["stored_bytes"], 0);
    assert_eq!(row(&json)["bits"], 16);

    let (_, json) = show("deltas[digits]");
    assert_eq!(json.as_array().unwrap().len(), 1);
    assert_eq!(json[0]["content"], "task vectors");
    assert_eq!(row(&json)["dtype"], "F32");

    let (text, json) = show("packed");
    assert_eq!(json.as_array().unwrap().len(), 2);
    assert_eq!(json[0]["output"]["layout"], "packed");
    assert_eq!((&row(&json)["bits"], &row(&json)["bytes"]), (&4.into(), &(384 * 96 / 2).into()));
    assert_eq!(json[0]["output"]["f32_bytes"], 4 * 474_048);
    assert!(text.contains("in single precision"), "{text}");

    let (_, json) = show("merged");
    assert_eq!(json[0]["output"]["layout"], "stored");
    assert_eq!(row(&json)["bits"], 32);

    let (text, json) = show("scores");
    assert_eq!(json[0]["content"], "scores");
    assert_eq!(json[0]["output"]["scores"]["rows"][0]["metric"], "accuracy");
    assert!(text.contains("accuracy") && text.contains("95 % interval"), "{text}");

    let (text, json) = show("files");
    assert_eq!(json[0]["output"]["files"][0]["name"], "model.safetensors");
    assert!(text.contains("model.safetensors"), "{text}");
}

#[test]
fn export_brings_out_packed_tensors_and_scores() {
    let lab = Lab::small();
    let early = lab.call(["export", "pipeline.toml", "packed", "out"]);
    assert_eq!(early.code, 2, "{early}");
    early.tells(&["not in the cache", "run"]);
    assert!(!lab.path("out").exists());
    lab.run(&[]);
    let outcome = lab.ok(["export", "pipeline.toml", "packed", "out"]);
    for file in ["packed-digits.safetensors", "packed-digits.manifest.json", "packed-negative.safetensors"] {
        assert!(lab.path("out").join(file).is_file() && outcome.stdout.contains(file), "{outcome}");
    }
    // The user's own file: it can be changed without harm to the cache.
    let file = lab.path("out/packed-digits.safetensors");
    fs_err::OpenOptions::new().append(true).open(&file).unwrap();
    fs_err::write(&file, "mine").unwrap();
    lab.run(&["--set", "scale=0.1"]);
    lab.check_objects();

    let again = lab.call(["export", "pipeline.toml", "packed[digits]", "out"]);
    assert_eq!(again.code, 2, "{again}");
    again.tells(&["already there", "--overwrite"]);
    assert_eq!(fs_err::read_to_string(&file).unwrap(), "mine");
    lab.ok(["export", "pipeline.toml", "packed[digits]", "out", "--overwrite"]);
    assert_eq!(crate::tensors::read_stored(&file).len(), 72);

    let files = lab.json(&["export", "pipeline.toml", "scores[digits]", "scores"]);
    let logits = files[0].as_str().unwrap();
    let logits = crate::tensors::read_stored(&lab.path(logits));
    assert_eq!((&logits["logits"].shape, &logits["labels"].shape), (&vec![40, 10], &vec![40]));
}

#[test]
fn graph_draws_all_stages_and_edges() {
    let lab = Lab::small();
    let stages = ["base", "tuned", "deltas", "packed", "merged", "base_scores", "scores"];
    let draw = |format: &str| lab.ok(["graph", "pipeline.toml", "--format", format]).stdout;

    let mermaid = draw("mermaid");
    assert!(mermaid.starts_with("flowchart LR\n"), "{mermaid}");
    assert_eq!(mermaid.matches("-->").count(), 8, "{mermaid}");
    assert!(stages.iter().all(|stage| mermaid.contains(&format!("[\"{stage}<br/>"))), "{mermaid}");

    let dot = draw("dot");
    assert!(dot.starts_with("digraph") && dot.trim_end().ends_with('}'), "{dot}");
    assert_eq!(dot.matches(" -> ").count(), 8, "{dot}");
    assert_eq!(dot.matches('{').count(), dot.matches('}').count());
    assert_eq!(dot.matches('"').count() % 2, 0);
    assert!(stages.iter().all(|stage| dot.contains(&format!("label=\"{stage}\\n"))), "{dot}");

    let svg = draw("svg");
    assert!(is_well_formed(&svg), "{svg}");
    assert!(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\""), "{svg}");
    assert_eq!((svg.matches("<rect").count(), svg.matches("marker-end").count()), (7, 8), "{svg}");

    let json = lab.json(&["graph", "pipeline.toml"]);
    assert_eq!((json["stages"].as_array().unwrap().len(), json["edges"].as_array().unwrap().len()), (7, 8));
    assert!(!lab.cache.exists(), "`graph` needs no cache");
}

/// Whether every tag of an XML text is closed in its order.
fn is_well_formed(text: &str) -> bool {
    let mut open: Vec<&str> = Vec::new();
    for piece in text.split('<').skip(1) {
        let Some(end) = piece.find('>') else { return false };
        let tag = &piece[..end];
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap_or_default();
        if tag.starts_with('/') {
            if open.pop() != Some(name) {
                return false;
            }
        } else if !tag.ends_with('/') {
            open.push(name);
        }
    }
    open.is_empty()
}

#[test]
fn stages_json_describes_kinds_and_methods() {
    let lab = Lab::empty();
    let kinds = ["load", "diff", "combine", "quantize", "mask", "merge", "evaluate", "export"];
    for kind in kinds {
        let json = lab.json(&["stages", kind]);
        let methods = json["methods"].as_array().unwrap();
        assert!(!methods.is_empty());
        for method in methods {
            has(method, &["id", "summary", "params", "formula", "source"]);
            assert!(
                ["id", "summary", "formula", "source"]
                    .iter()
                    .all(|name| !method[*name].as_str().unwrap().is_empty()),
                "{method}"
            );
            for param in method["params"].as_array().unwrap() {
                has(param, &["name", "type", "default", "doc"]);
                assert!(!param["doc"].as_str().unwrap().is_empty(), "{kind}: {param}");
            }
        }
    }
    let ids = |kind: &str| -> Vec<String> {
        let json = lab.json(&["stages", kind]);
        json["methods"]
            .as_array()
            .unwrap()
            .iter()
            .map(|method| method["id"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(ids("quantize"), ["asymmetric", "absmax", "symmetric", "int8-block", "nf4", "fp4", "rtvq"]);
    assert_eq!(ids("merge")[..2], ["average", "task-arithmetic"]);
    assert_eq!(ids("mask"), ["tall", "consensus", "magnitude", "random", "file"]);
    let scale = lab.json(&["stages", "merge", "task-arithmetic"]);
    let params = scale["methods"][0]["params"].as_array().unwrap();
    let scale = params.iter().find(|param| param["name"] == "scale").unwrap();
    assert_eq!((&scale["type"], &scale["default"]), (&"number".into(), &0.3.into()));

    let all = lab.json(&["stages"]);
    assert!(all["methods"].is_array(), "`stages --json` is an object with `methods`, with or without a kind");
    let table = lab.ok(["stages"]).stdout;
    assert!(kinds.iter().all(|kind| table.contains(kind)), "{table}");
    let unknown = lab.call(["stages", "marge"]);
    assert_eq!(unknown.code, 2, "{unknown}");
    unknown.tells(&["marge", "merge"]);
}

#[test]
fn cache_ls_lists_every_output() {
    let lab = Lab::small();
    assert_eq!(lab.json(&["cache", "ls"]), serde_json::json!([]));
    let run = lab.run(&[]);
    let rows = lab.json(&["cache", "ls"]);
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), SMALL_UNITS.len());
    let listed: BTreeSet<&str> = rows.iter().map(|row| row["outputs"][0].as_str().unwrap()).collect();
    assert_eq!(listed, run.artifacts().into_values().collect());
    assert!(rows.iter().all(|row| row["complete"] == true));
    let text = lab.ok(["cache", "ls"]).stdout;
    assert!(text.contains("quantize") && text.contains("12 outputs"), "{text}");
}

#[test]
fn why_compares_the_old_key_with_the_new() {
    let lab = Lab::small();
    let never = lab.ok(["why", "pipeline.toml", "base"]).stdout;
    assert!(never.contains("has not run in this pipeline before"), "{never}");
    lab.run(&[]);
    let told = lab.ok(["why", "pipeline.toml", "packed", "--set", "bits=3"]).stdout;
    assert!(told.contains("bits 4 → 3") && told.contains("packed[digits]: would run"), "{told}");
    let unchanged = lab.ok(["why", "pipeline.toml", "merged"]).stdout;
    assert!(unchanged.contains("merged: cached") && unchanged.contains("unchanged"), "{unchanged}");
    let json = lab.json(&["why", "pipeline.toml", "packed[digits]", "--set", "bits=3"]);
    let change = &json[0]["changes"][0];
    assert_eq!((&change["old"], &change["new"]), (&"4".into(), &"3".into()));
    // Also after the change has run.
    lab.run(&["--set", "bits=3"]);
    let after = lab.ok(["why", "pipeline.toml", "packed[digits]", "--set", "bits=3"]).stdout;
    assert!(after.contains("bits 4 → 3"), "{after}");
    // A changed file and a changed input are told apart.
    let head = lab.path("data/head_digits.safetensors");
    crate::tensors::change(&head, |tensors| tensors.get_mut("bias").unwrap().data[0] ^= 1);
    let file = lab.ok(["why", "pipeline.toml", "scores[digits]", "--set", "bits=3"]).stdout;
    assert!(file.contains("contents of `head` changed"), "{file}");
    let head_plan = Run::of(&lab.json(&["plan", "pipeline.toml", "--set", "bits=3"]));
    assert_eq!(head_plan.units["scores[digits]"].reason, "contents of `head` changed");
}

#[test]
fn results_go_to_standard_output_and_everything_else_to_standard_error() {
    let lab = Lab::small();
    let first = lab.ok(["run", "pipeline.toml"]);
    assert!(
        first.stdout.contains("base") && first.stdout.contains("merged") && first.stdout.contains("accuracy"),
        "{first}"
    );
    assert!(
        !first.stdout.contains("start ")
            && first.stderr.contains("ran     merged")
            && first.stderr.contains("12 ran"),
        "{first}"
    );
    let json = lab.ok(["run", "pipeline.toml", "--json"]);
    json.json();
    assert!(json.stderr.contains("12 cached"), "{json}");
    for args in [
        ["plan", "pipeline.toml"].as_slice(),
        &["show", "pipeline.toml", "merged"],
        &["graph", "pipeline.toml"],
        &["stages"],
        &["cache", "ls"],
    ] {
        let outcome = lab.ok(args);
        assert!(!outcome.stdout.is_empty() && outcome.stderr.is_empty(), "{outcome}");
    }
}

#[test]
fn without_a_terminal_nothing_is_coloured() {
    let lab = Lab::small();
    lab.write("bad.toml", "[stage.a]\nkind = \"lod\"\n");
    for no_color in [None, Some("1")] {
        for args in [
            ["run", "pipeline.toml"].as_slice(),
            &["plan", "pipeline.toml"],
            &["show", "pipeline.toml", "scores"],
            &["check", "bad.toml"],
            &["run"],
            &["--help"],
        ] {
            let mut command = lab.command(args);
            if let Some(value) = no_color {
                command.env("NO_COLOR", value);
            }
            let outcome = Outcome::of(&mut command);
            assert!(!outcome.stdout.contains('\x1b') && !outcome.stderr.contains('\x1b'), "{outcome}");
            assert!(!outcome.stderr.contains('\r'), "{outcome}");
        }
    }
}

#[test]
fn the_cache_is_where_the_user_wants_it() {
    let lab = Lab::small();
    lab.run(&["--stage", "base"]);
    assert!(lab.cache.join("CACHEDIR.TAG").is_file());
    let other = lab.root().join("other");
    lab.run(&["--stage", "base", "--cache", other.to_str().unwrap()]).ran_exactly(&["base"]);
    assert!(other.join("objects-v1").is_dir(), "`--cache` goes before MERGANSER_CACHE");
    // Relative to the working folder, not to the pipeline.
    lab.run(&["--stage", "base", "--cache", "here"]).ran_exactly(&["base"]);
    assert!(lab.path("here/objects-v1").is_dir());
    // Without either, the user's cache folder.
    let mut command = lab.command(["run", "pipeline.toml", "--stage", "base", "--json"]);
    let outcome =
        Outcome::of(command.env_remove("MERGANSER_CACHE").env("XDG_CACHE_HOME", lab.root().join("xdg")));
    assert_eq!(outcome.code, 0, "{outcome}");
    assert!(lab.root().join("xdg/merganser/objects-v1").is_dir());
    let mut command = lab.command(["run", "pipeline.toml", "--stage", "base", "--json"]);
    let outcome = Outcome::of(command.env_remove("MERGANSER_CACHE"));
    assert_eq!(outcome.code, 0, "{outcome}");
    assert!(lab.root().join(".cache/merganser/objects-v1").is_dir());
}

#[test]
fn a_reader_that_goes_away_is_no_crash() {
    let lab = Lab::small();
    lab.run(&[]);
    for args in [
        ["run", "pipeline.toml", "--json"].as_slice(),
        &["show", "pipeline.toml", "base", "--json"],
        &["plan", "pipeline.toml"],
        &["graph", "pipeline.toml"],
    ] {
        let mut child = lab.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Nobody ever reads, as with `| head -0`.
        drop(child.stdout.take());
        let outcome = Outcome::from(child.wait_with_output().unwrap());
        assert_eq!(outcome.code, 0, "{args:?}: {outcome}");
        assert!(!outcome.stderr.contains("panicked"), "{args:?}: {outcome}");
    }
}

#[test]
fn a_listener_to_progress_that_goes_away_does_not_stop_a_run() {
    let lab = Lab::small();
    let mut child = lab
        .command(["run", "pipeline.toml", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stderr.take());
    let outcome = Outcome::from(child.wait_with_output().unwrap());
    assert_eq!(outcome.code, 0, "{outcome}");
    outcome.run().ran_exactly(&SMALL_UNITS);
}

#[test]
fn results_that_cannot_be_written_are_an_error() {
    let Ok(full) = fs_err::OpenOptions::new().write(true).open("/dev/full") else {
        return crate::util::skipped("results_that_cannot_be_written_are_an_error", "there is no /dev/full");
    };
    let lab = Lab::small();
    let outcome = Outcome::of(lab.command(["run", "pipeline.toml", "--json"]).stdout(full.into_file()));
    assert_eq!(outcome.code, 1, "{outcome}");
    outcome.tells(&["12 ran", "could not be written to standard output", "No space left on device"]);
}

#[test]
fn a_run_tells_what_to_try_next() {
    let lab = Lab::small();
    let outcome = lab.ok(["run", "pipeline.toml", "--set", "bits=2,4"]);
    let last = outcome.stdout.lines().last().unwrap();
    assert!(last.starts_with("next: ") && last.contains("--set bits=3"), "{outcome}");
    assert!(outcome.stdout.contains("bytes") && outcome.stdout.contains("ratio"), "{outcome}");
}

#[test]
fn help_documents_the_exit_codes() {
    let help = Lab::empty().ok(["--help"]).stdout;
    for line in ["a stage failed", "interrupted", "130", "could not be repaired"] {
        assert!(help.contains(line), "{help}");
    }
}
