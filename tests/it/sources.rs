//! Inputs that lie elsewhere, through the built tool: what is downloaded, what is pinned, what is refused.

use crate::util::{Lab, Outcome, Run, quickstart};
use server::{Answer, Hub, Repo, Server, content, sha256};
use std::collections::BTreeMap;
use std::path::Path;

#[path = "../../sources/tests/support/server.rs"]
mod server;

/// A base from the hub and a tuned model, and their difference.
const PIPELINE: &str = r#"
[stage.base]
kind = "load"
path = "hf://org/clip"

[stage.tuned]
kind = "load"
each = { task = ["digits", "negative"] }
path = "hf://org/clip-${task}/model.safetensors"

[stage.deltas]
kind = "diff"
from = { base = "base", tuned = "tuned" }
"#;

fn weights(name: &str) -> Vec<u8> {
    fs_err::read(quickstart().join(name)).unwrap()
}

/// The quickstart's models as repositories.
fn hub() -> Hub {
    let repo = |name: &str| Repo::of(&[("model.safetensors", &weights(name))]);
    Hub::start(&[
        ("org/clip", repo("base.safetensors")),
        ("org/clip-digits", repo("ft_digits.safetensors")),
        ("org/clip-negative", repo("ft_negative.safetensors")),
    ])
}

fn lab(pipeline: &str) -> Lab {
    let lab = Lab::empty();
    lab.write("pipeline.toml", pipeline);
    lab
}

/// Runs the tool with a network that consists of a hub.
fn call(lab: &Lab, hub: &str, args: &[&str]) -> Outcome {
    let mut command = lab.command(args);
    command.env_remove("MERGANSER_OFFLINE").env("HF_ENDPOINT", hub).env("HF_HOME", lab.root().join("hf"));
    Outcome::of(&mut command)
}

#[track_caller]
fn run(lab: &Lab, hub: &Hub, args: &[&str]) -> Run {
    let all: Vec<&str> = ["run", "pipeline.toml", "--json"].into_iter().chain(args.iter().copied()).collect();
    let outcome = call(lab, &hub.endpoint(), &all);
    assert_eq!(outcome.code, 0, "{outcome}");
    Run::of(&outcome.json())
}

fn lock(lab: &Lab) -> String {
    fs_err::read_to_string(lab.path("pipeline.lock")).unwrap()
}

fn artifacts(run: &Run) -> BTreeMap<String, String> {
    run.artifacts().into_iter().map(|(name, digest)| (name.to_owned(), digest.to_owned())).collect()
}

fn main_of(hub: &Hub, repo: &str) -> String {
    hub.edit(repo, |repo| repo.branches["main"].clone())
}

#[test]
fn a_run_downloads_once_and_writes_what_it_found_into_the_lock() {
    let (hub, lab) = (hub(), lab(PIPELINE));
    let first = run(&lab, &hub, &[]);
    assert_eq!(first.ran().len(), 5);
    let text = lock(&lab);
    let commit = main_of(&hub, "org/clip");
    let digest = blake3::hash(&weights("base.safetensors")).to_hex();
    let size = weights("base.safetensors").len();
    for line in [
        format!("\"hf://org/clip\" = \"{commit}\""),
        format!("\"hf://org/clip/model.safetensors\" = {{ blake3 = \"{digest}\", size = {size} }}"),
        format!("\"deltas[digits]\" = \"{}\"", first.artifacts()["deltas[digits]"]),
    ] {
        assert!(text.lines().any(|written| written == line), "no line `{line}` in\n{text}");
    }
    assert_eq!(text.lines().filter(|line| line.starts_with('"')).count(), 3 + 3 + 5, "{text}");
    assert_eq!(hub.storage.asked().len(), 3);

    // The same models from files give the same artifacts: where a file came from is no part of a key.
    let local = Lab::empty();
    for name in ["base", "ft_digits", "ft_negative"] {
        fs_err::write(local.path(name), weights(&format!("{name}.safetensors"))).unwrap();
    }
    local.write(
        "pipeline.toml",
        &PIPELINE
            .replace("hf://org/clip-${task}/model.safetensors", "ft_${task}")
            .replace("hf://org/clip", "base"),
    );
    assert_eq!(artifacts(&local.run(&[])), artifacts(&first));
    assert!(!local.path("pipeline.lock").exists(), "without remote inputs there is nothing to pin");

    hub.forget();
    let second = run(&lab, &hub, &[]);
    assert_eq!((second.ran().len(), hub.n_asked()), (0, 0));
    assert_eq!(lock(&lab), text);
}

#[test]
fn a_pipeline_keeps_its_revision_when_main_moves() {
    let (hub, lab) = (hub(), lab(PIPELINE));
    let first = run(&lab, &hub, &[]);
    let old = main_of(&hub, "org/clip");
    let new = hub.edit("org/clip", |repo| {
        repo.push("main", &[("model.safetensors", &weights("ft_parity.safetensors"))])
    });
    assert_eq!(artifacts(&run(&lab, &hub, &[])), artifacts(&first));
    // Another machine with the same lock file.
    let other = self::lab(PIPELINE);
    other.write("pipeline.lock", &lock(&lab));
    assert_eq!(artifacts(&run(&other, &hub, &["--frozen"])), artifacts(&first));
    assert!(lock(&other).contains(&old));

    let updated = run(&lab, &hub, &["--update-lock"]);
    assert_ne!(artifacts(&updated)["base"], artifacts(&first)["base"]);
    assert!(lock(&lab).contains(&new) && !lock(&lab).contains(&old));
    let outcome = call(&other, &hub.endpoint(), &["run", "pipeline.toml", "--frozen", "--update-lock"]);
    assert_eq!(outcome.code, 2, "{outcome}");
}

#[test]
fn frozen_refuses_what_the_lock_does_not_know() {
    let (hub, lab) = (hub(), lab(PIPELINE));
    let frozen = |lab: &Lab| call(lab, &hub.endpoint(), &["run", "pipeline.toml", "--frozen"]);
    let outcome = frozen(&lab);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&[
        "`hf://org/clip`",
        "`hf://org/clip-digits/model.safetensors`",
        "pipeline.lock",
        "without `--frozen`",
    ]);
    assert_eq!(hub.n_asked(), 0, "nobody is asked");
    assert!(!lab.path("pipeline.lock").exists());

    run(&lab, &hub, &[]);
    let outcome = frozen(&lab);
    assert_eq!(outcome.code, 0, "{outcome}");

    // An input more.
    lab.append("pipeline.toml", "\n[stage.more]\nkind = \"load\"\npath = \"hf://org/clip@v2\"\n");
    let outcome = frozen(&lab);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&["`hf://org/clip@v2`"]);
}

#[test]
fn a_digest_that_differs_from_the_locked_one_is_refused() {
    let (hub, lab) = (hub(), lab(PIPELINE));
    run(&lab, &hub, &[]);
    let right = blake3::hash(&weights("base.safetensors")).to_hex().to_string();
    let wrong = blake3::hash(b"something else").to_hex().to_string();
    lab.edit("pipeline.lock", &right, &wrong);
    for args in [&["run", "pipeline.toml"][..], &["run", "pipeline.toml", "--frozen"]] {
        let outcome = call(&lab, &hub.endpoint(), args);
        assert_eq!(outcome.code, 2, "{outcome}");
        outcome.tells(&[
            "`hf://org/clip/model.safetensors` is not what it was",
            &right,
            &wrong,
            "--update-lock",
        ]);
    }
    run(&lab, &hub, &["--update-lock"]);
    assert!(lock(&lab).contains(&right));
}

#[test]
fn a_download_that_was_damaged_later_is_replaced() {
    let (hub, lab) = (hub(), lab(PIPELINE));
    let first = run(&lab, &hub, &[]);
    let blob = lab.root().join("hf/hub/models--org--clip/blobs").join(sha256(&weights("base.safetensors")));
    let mut damaged = fs_err::read(&blob).unwrap();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    fs_err::write(&blob, damaged).unwrap();
    hub.forget();
    assert_eq!(artifacts(&run(&lab, &hub, &[])), artifacts(&first));
    assert_eq!(hub.storage.asked().len(), 1);
    assert_eq!(fs_err::read(&blob).unwrap(), weights("base.safetensors"));
}

#[test]
fn frozen_refuses_another_output() {
    let (hub, lab) = (hub(), lab(PIPELINE));
    let first = run(&lab, &hub, &[]);
    let output = artifacts(&first)["deltas[digits]"].clone();
    let other = blake3::hash(b"another").to_hex().to_string();
    lab.edit("pipeline.lock", &output, &other);
    let outcome = call(&lab, &hub.endpoint(), &["run", "pipeline.toml", "--frozen"]);
    assert_eq!(outcome.code, 4, "{outcome}");
    outcome.tells(&["the output of `deltas[digits]` is not what"]);
    assert!(lock(&lab).contains(&other), "nothing is written");
    run(&lab, &hub, &[]);
    assert!(lock(&lab).contains(&output));
}

#[test]
fn a_pipeline_of_files_can_pin_its_outputs() {
    let lab = Lab::small();
    lab.ok(["run", "pipeline.toml", "--stage", "deltas", "--update-lock"]);
    lab.ok(["run", "pipeline.toml", "--stage", "deltas", "--frozen"]);
    let tuned = lab.path("data/ft_digits.safetensors");
    fs_err::write(&tuned, weights("ft_parity.safetensors")).unwrap();
    let outcome = lab.call(["run", "pipeline.toml", "--stage", "deltas", "--frozen"]);
    assert_eq!(outcome.code, 4, "{outcome}");
    outcome.tells(&["`tuned[digits]`", "`deltas[digits]`"]);
    assert!(!outcome.stderr.contains("negative]` is not"), "{outcome}");
}

#[test]
fn planning_and_checking_ask_nobody_and_say_what_is_missing() {
    let (hub, lab) = (hub(), lab(PIPELINE));
    let tool = |args: &[&str]| call(&lab, &hub.endpoint(), args);
    let outcome = tool(&["check", "pipeline.toml"]);
    assert_eq!(outcome.code, 0, "{outcome}");
    assert!(outcome.stdout.contains("no mistakes\n`hf://org/clip` is not downloaded yet\n"), "{outcome}");
    assert_eq!(tool(&["check", "pipeline.toml", "--json"]).json()["missing"].as_array().unwrap().len(), 3);
    let outcome = tool(&["plan", "pipeline.toml"]);
    assert_eq!(outcome.code, 0, "{outcome}");
    assert!(outcome.stdout.contains("`hf://org/clip` is not downloaded yet"), "{outcome}");
    assert!(outcome.stdout.contains("5 to run, 0 maybe, 0 cached"), "{outcome}");
    assert_eq!(hub.n_asked(), 0);

    run(&lab, &hub, &[]);
    hub.forget();
    let planned = tool(&["plan", "pipeline.toml"]);
    assert!(planned.stdout.contains("0 to run, 0 maybe, 5 cached"), "{planned}");
    // Somebody cleans up: the lock still knows how much there is to get.
    fs_err::remove_dir_all(lab.root().join("hf")).unwrap();
    let planned = tool(&["plan", "pipeline.toml"]);
    assert!(planned.stdout.contains("`hf://org/clip` is not downloaded yet ("), "{planned}");
    assert!(planned.stdout.contains("0 to run, 5 maybe, 0 cached"), "{planned}");
    let outcome = tool(&["why", "pipeline.toml", "base"]);
    assert_eq!(outcome.code, 0, "{outcome}");
    assert_eq!(hub.n_asked(), 0);
    assert_eq!(
        run(&lab, &hub, &[]).ran().len(),
        0,
        "the same files come back, and nothing is computed again"
    );
    assert_eq!(hub.storage.asked().len(), 3);
}

#[test]
fn only_what_is_asked_for_is_downloaded() {
    let (hub, lab) = (hub(), lab(PIPELINE));
    run(&lab, &hub, &["--stage", "base"]);
    assert_eq!(hub.storage.asked().len(), 1);
    run(&lab, &hub, &["--stage", "tuned[digits]"]);
    assert_eq!(hub.storage.asked().len(), 2);
    let text = lock(&lab);
    assert!(text.contains("hf://org/clip/model") && text.contains("hf://org/clip-digits/model"), "{text}");
}

#[test]
fn mistakes_are_told_before_anything_is_downloaded() {
    let (hub, lab) = (hub(), lab(PIPELINE));
    lab.append("pipeline.toml", "\n[stage.bad]\nkind = \"load\"\npath = \"hf://org\"\nonly = 3\n");
    let outcome = call(&lab, &hub.endpoint(), &["run", "pipeline.toml"]);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&["bad-address", "`hf://org` is no address", "wrong-type"]);
    lab.write("pipeline.toml", "[stage.x]\nkind = \"load\"\npath = \"ftp://host/x\"\n");
    let outcome = call(&lab, &hub.endpoint(), &["check", "pipeline.toml"]);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&["`ftp` is not among"]);
    lab.write(
        "pipeline.toml",
        &format!("{PIPELINE}\n[stage.gone]\nkind = \"load\"\npath = \"gone.safetensors\"\n"),
    );
    let outcome = call(&lab, &hub.endpoint(), &["run", "pipeline.toml"]);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&["missing-file"]);
    assert_eq!(hub.n_asked(), 0);
}

#[test]
fn all_that_cannot_be_had_is_told_at_once() {
    let (hub, lab) = (hub(), lab(PIPELINE));
    hub.edit("org/clip", |repo| repo.gated = true);
    hub.edit("org/clip-digits", |repo| repo.token = Some("secret".to_owned()));
    lab.edit("pipeline.toml", "\"negative\"", "\"nothing\"");
    let outcome = call(&lab, &hub.endpoint(), &["run", "pipeline.toml"]);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&["3 inputs could not be had", "accept it at", "HF_TOKEN", "org/clip-nothing"]);

    hub.edit("org/clip", |repo| repo.gated = false);
    lab.edit("pipeline.toml", "\"nothing\"", "\"negative\"");
    let mut command = lab.command(["run", "pipeline.toml"]);
    command
        .env_remove("MERGANSER_OFFLINE")
        .env("HF_ENDPOINT", hub.endpoint())
        .env("HF_HOME", lab.root().join("hf"));
    // Where `hf auth login` puts it.
    fs_err::create_dir_all(lab.root().join("hf")).unwrap();
    fs_err::write(lab.root().join("hf/token"), "secret\n").unwrap();
    let outcome = Outcome::of(&mut command);
    assert_eq!(outcome.code, 0, "{outcome}");
    outcome.tells(&[
        "fetch   hf://org/clip/model.safetensors (",
        "fetched hf://org/clip/model.safetensors: ",
        "wrote   ",
    ]);
    assert!(hub.storage.asked().iter().all(|request| request.header("authorization").is_none()));
}

#[test]
fn offline_uses_what_is_here() {
    let (hub, lab) = (hub(), lab(PIPELINE));
    for variable in ["MERGANSER_OFFLINE", "HF_HUB_OFFLINE"] {
        let mut command = lab.command(["run", "pipeline.toml"]);
        command.env_remove("MERGANSER_OFFLINE").env(variable, "1").env("HF_ENDPOINT", hub.endpoint());
        let outcome = Outcome::of(&mut command);
        assert_eq!(outcome.code, 2, "{outcome}");
        outcome.tells(&["`hf://org/clip` is not downloaded yet"]);
        outcome.tells(&["offline"]);
    }
    assert_eq!(hub.n_asked(), 0);
    run(&lab, &hub, &[]);
    hub.forget();
    // Without the lock file, what `main` was when it was downloaded counts.
    fs_err::remove_file(lab.path("pipeline.lock")).unwrap();
    let outcome = call(&lab, &hub.endpoint(), &["run", "pipeline.toml", "--offline"]);
    assert_eq!(outcome.code, 0, "{outcome}");
    outcome.tells(&["5 cached"]);
    assert_eq!(hub.n_asked(), 0);
}

#[test]
fn two_runs_at_once_download_once() {
    let (hub, lab) = (hub(), lab(PIPELINE));
    let start = || {
        let mut command = lab.command(["run", "pipeline.toml"]);
        command
            .env_remove("MERGANSER_OFFLINE")
            .env("HF_ENDPOINT", hub.endpoint())
            .env("HF_HOME", lab.root().join("hf"));
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
    };
    let children = [start(), start(), start()];
    for child in children {
        let outcome = Outcome::from(child.wait_with_output().unwrap());
        assert_eq!(outcome.code, 0, "{outcome}");
    }
    assert_eq!(hub.storage.asked().len(), 3);
}

#[test]
fn an_interrupted_download_is_continued_by_the_next_run() {
    let (hub, lab) =
        (hub(), lab("[stage.base]\nkind = \"load\"\npath = \"hf://org/clip/model.safetensors\"\n"));
    let whole = weights("base.safetensors");
    let digest = sha256(&whole);
    let blobs = lab.root().join("hf/hub/models--org--clip/blobs");
    fs_err::create_dir_all(&blobs).unwrap();
    // What an interrupted run leaves behind, or another tool.
    fs_err::write(blobs.join(format!("{digest}.incomplete")), &whole[..100_000]).unwrap();
    run(&lab, &hub, &[]);
    assert_eq!(hub.storage.asked()[0].header("range"), Some("bytes=100000-"));
    assert!(blobs.join(&digest).is_file() && !blobs.join(format!("{digest}.incomplete")).exists());
}

#[test]
fn shards_and_adapters_of_the_hub_are_read_like_those_of_a_folder() {
    let base = weights("base.safetensors");
    let tensors = safetensors::SafeTensors::deserialize(&base).unwrap();
    let mut names = tensors.names();
    names.sort_unstable();
    let part = |is_first: bool| {
        let (one, two) = names.split_at(names.len() / 2);
        let chosen = if is_first { one } else { two };
        safetensors::serialize(chosen.iter().map(|name| (*name, tensors.tensor(name).unwrap())), None)
            .unwrap()
    };
    let map: BTreeMap<&str, &str> = names
        .iter()
        .enumerate()
        .map(|(idx, name)| (*name, if idx < names.len() / 2 { "a.safetensors" } else { "b.safetensors" }))
        .collect();
    let index = serde_json::json!({ "weight_map": map }).to_string();
    let sharded = Repo::of(&[
        ("model.safetensors.index.json", index.as_bytes()),
        ("a.safetensors", &part(true)),
        ("b.safetensors", &part(false)),
    ]);
    let config = br#"{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["x"]}"#;
    let factor = |rows: usize, columns: usize| {
        let bytes: Vec<u8> = std::iter::repeat_n(0.5_f32.to_le_bytes(), rows * columns).flatten().collect();
        (vec![rows, columns], bytes)
    };
    let ((a_shape, a), (b_shape, b)) = (factor(1, 4), factor(3, 1));
    let view = |shape: &[usize], bytes| {
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes).unwrap()
    };
    let factors = [
        ("base_model.model.x.lora_A.weight", view(&a_shape, &a)),
        ("base_model.model.x.lora_B.weight", view(&b_shape, &b)),
    ];
    let adapter = safetensors::serialize(factors, None).unwrap();
    let lora = Repo::of(&[("adapter_config.json", config), ("adapter_model.safetensors", &adapter)]);
    let hub = Hub::start(&[("org/sharded", sharded), ("org/lora", lora)]);
    let lab = lab(
        "[stage.base]\nkind = \"load\"\npath = \"hf://org/sharded\"\n\n[stage.lora]\nkind = \"load\"\npath = \"hf://org/lora\"\n\n\
         [stage.packed]\nkind = \"quantize\"\nfrom = \"lora\"\nbits = 8\n",
    );
    let result = run(&lab, &hub, &[]);
    assert_eq!(result.ran().len(), 3);
    let shown = call(&lab, &hub.endpoint(), &["show", "pipeline.toml", "lora"]);
    assert!(shown.stdout.contains("task vectors"), "{shown}");
    assert_eq!(lock(&lab).lines().filter(|line| line.contains("blake3 =")).count(), 5, "{}", lock(&lab));
}

#[test]
fn the_web_and_object_stores_are_inputs_too() {
    let whole = weights("base.safetensors");
    let server = Server::start(move |request| match request.path.as_str() {
        "/models/base.safetensors" | "/bucket/models/base.safetensors" => content(request, &whole, "\"one\""),
        _ => Answer::status(404),
    });
    let lab = lab(&format!(
        "[stage.web]\nkind = \"load\"\npath = \"{}\"\n\n[stage.store]\nkind = \"load\"\npath = \"s3://bucket/models/base.safetensors\"\n",
        server.url("/models/base.safetensors")
    ));
    let tool = |args: &[&str]| {
        let mut command = lab.command(args);
        command
            .env_remove("MERGANSER_OFFLINE")
            .env("AWS_ENDPOINT_URL", server.url(""))
            .env("AWS_ACCESS_KEY_ID", "key")
            .env("AWS_SECRET_ACCESS_KEY", "secret");
        Outcome::of(&mut command)
    };
    let outcome = tool(&["run", "pipeline.toml", "--json"]);
    assert_eq!(outcome.code, 0, "{outcome}");
    let run = outcome.run();
    assert_eq!(run.artifacts()["web"], run.artifacts()["store"]);
    let signed = server.asked().iter().filter(|request| request.header("authorization").is_some()).count();
    assert_eq!(signed, 1, "the store's request is signed, the other one is not");
    server.forget();
    let outcome = tool(&["run", "pipeline.toml", "--frozen"]);
    assert_eq!(outcome.code, 0, "{outcome}");
    assert_eq!(server.asked().len(), 0);
    assert!(
        lab.cached_files("downloads-v1").iter().any(|path| path.ends_with(Path::new("base.safetensors")))
    );
}

#[test]
fn a_web_page_that_changes_is_not_taken_silently() {
    let (old, new) = (weights("base.safetensors"), weights("ft_digits.safetensors"));
    let state = std::sync::Arc::new(std::sync::Mutex::new((old.clone(), "\"one\"")));
    let known = std::sync::Arc::clone(&state);
    let server = Server::start(move |request| {
        let (body, tag) = known.lock().unwrap().clone();
        content(request, &body, tag)
    });
    let lab = lab(&format!("[stage.web]\nkind = \"load\"\npath = \"{}\"\n", server.url("/base.safetensors")));
    let tool = |args: &[&str]| Outcome::of(lab.command(args).env_remove("MERGANSER_OFFLINE"));
    assert_eq!(tool(&["run", "pipeline.toml"]).code, 0);
    *state.lock().unwrap() = (new.clone(), "\"two\"");
    assert_eq!(tool(&["run", "pipeline.toml"]).code, 0, "what is here is what is locked");
    fs_err::remove_dir_all(lab.cache.join("downloads-v1")).unwrap();
    let outcome = tool(&["run", "pipeline.toml"]);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&["is not what it was", "`--update-lock` accepts"]);
    assert_eq!(tool(&["run", "pipeline.toml", "--update-lock"]).code, 0);
    assert!(lock(&lab).contains(&*blake3::hash(&new).to_hex()));
}

#[test]
fn a_lock_file_that_cannot_be_read_is_named() {
    let lab = lab("[stage.x]\nkind = \"load\"\npath = \"hf://org/clip\"\n");
    lab.write("pipeline.lock", "version = 7\n");
    for command in ["run", "plan", "check"] {
        let outcome = lab.call([command, "pipeline.toml"]);
        assert_eq!(outcome.code, 2, "{outcome}");
        outcome.tells(&["lock file `pipeline.lock`: it has version 7"]);
    }
}

#[test]
fn nothing_can_be_written_to_an_address() {
    let lab = Lab::small();
    lab.append(
        "pipeline.toml",
        "\n[stage.out]\nkind = \"export\"\nfrom = \"merged\"\nto = \"s3://bucket/x\"\n",
    );
    let outcome = lab.call(["check", "pipeline.toml"]);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&["bad-address", "only folders can be written to"]);
}
