//! Masks end to end: models of single tasks, what is stored for them, and what runs again when λ changes.

use crate::suite::{compare, evaluate, json, pipeline};
use crate::tensors::{Floats, combine, read, read_stored};
use crate::util::{Lab, test_data};
use serde_json::Value;

/// Masks, every merge that localizes, and their scores.
const STAGES: &str = r#"
[stage.masks]
kind = "mask"
from = { deltas = "deltas", base = "base" }
method = "tall"
lambda = "${lambda}"

[stage.localized]
kind = "merge"
from = { base = "base", vectors = "deltas", masks = "masks" }
method = "tall"

[stage.agreed]
kind = "merge"
from = { base = "base", vectors = "deltas", masks = "masks" }
method = "consensus"
k = 2
scale = 0.5

[stage.elected]
kind = "merge"
from = { base = "base", vectors = "deltas" }
method = "emr"

[stage.localized_scores]
kind = "evaluate"
from = { model = "localized", origin = "base" }
graph = "data/clip_vision.onnx"
dataset = "${datasets}"

[stage.agreed_scores]
kind = "evaluate"
from = { model = "agreed", origin = "base" }
graph = "data/clip_vision.onnx"
dataset = "${datasets}"

[stage.elected_scores]
kind = "evaluate"
from = { model = "elected", origin = "base" }
graph = "data/clip_vision.onnx"
dataset = "${datasets}"

[stage.tuned_scores]
kind = "evaluate"
from = { model = "tuned", origin = "base" }
graph = "data/clip_vision.onnx"
dataset = "${datasets}"
"#;

const TASKS: [&str; 2] = ["digits", "negative"];

fn lab() -> Lab {
    let lab = Lab::small();
    lab.edit("pipeline.toml", "bits = 4\n", "bits = 4\nlambda = 0.4\n");
    lab.append("pipeline.toml", STAGES);
    lab
}

fn exported(lab: &Lab, unit: &str) -> std::path::PathBuf {
    lab.ok(["export", "pipeline.toml", unit, "out", "--overwrite"]);
    lab.path(format!("out/{}.safetensors", unit.replace('[', "-").replace(']', "")))
}

fn differences(lab: &Lab) -> Vec<Floats> {
    let base = read(&lab.path("data/base.safetensors"));
    let tuned = TASKS.map(|task| read(&lab.path(format!("data/ft_{task}.safetensors"))));
    tuned.iter().map(|tuned| combine(&[tuned, &base], |v| v[0] - v[1])).collect()
}

#[test]
fn every_task_is_scored_on_its_own_model() {
    let lab = lab();
    let run = lab.run(&["--set", "limit=300"]);
    let correct = run.correct();
    let of = |stage: &str, task: &str| correct[&(stage.to_owned(), String::new(), task.to_owned())].0;
    for task in TASKS {
        // An elected model is nearly the expert; what a mask of the sum can do depends on how much the tasks contradict each other.
        assert!(of("elected_scores", task) + 15 >= of("tuned_scores", task), "{task}: {correct:?}");
        assert!(of("localized_scores", task) >= of("base_scores", task) + 15, "{task}: {correct:?}");
        assert!(of("agreed_scores", task) >= of("base_scores", task), "{task}: {correct:?}");
    }
    assert!(
        run.units.contains_key("localized[digits]") && run.units.contains_key("elected_scores[negative]"),
        "one unit per task"
    );
    assert!(run.units.contains_key("agreed"), "one unit for all tasks");
}

#[test]
fn another_lambda_runs_masks_merges_and_scores_again_and_nothing_else() {
    let lab = lab();
    lab.run(&[]);
    lab.run(&[]).ran_exactly(&[]);
    lab.run(&["--set", "lambda=0.5"]).ran_exactly(&[
        "agreed",
        "agreed_scores[digits]",
        "agreed_scores[negative]",
        "localized[digits]",
        "localized[negative]",
        "localized_scores[digits]",
        "localized_scores[negative]",
        "masks[digits]",
        "masks[negative]",
    ]);
    // λ of one task is about that task only.
    lab.edit("pipeline.toml", "lambda = \"${lambda}\"", "lambda = { digits = 0.5, negative = 0.25 }");
    lab.run(&[]).ran_exactly(&[
        "agreed",
        "agreed_scores[digits]",
        "agreed_scores[negative]",
        "localized[negative]",
        "localized_scores[negative]",
        "masks[negative]",
    ]);
}

#[test]
fn models_are_plain_arithmetic_on_vectors_and_masks() {
    let lab = lab();
    lab.run(&["--stage", "localized", "--stage", "agreed", "--stage", "elected"]);
    let base = read(&lab.path("data/base.safetensors"));
    let deltas = differences(&lab);
    let sum = combine(&[&deltas[0], &deltas[1]], |v| v[0] + v[1]);
    let masks = TASKS.map(|task| {
        let stored = read_stored(&exported(&lab, &format!("masks[{task}]")));
        assert!(stored.values().all(|tensor| tensor.dtype == safetensors::Dtype::BOOL));
        stored
    });
    let models = TASKS.map(|task| read(&exported(&lab, &format!("localized[{task}]"))));
    let elected = TASKS.map(|task| read(&exported(&lab, &format!("elected[{task}]"))));
    let agreed = read(&exported(&lab, "agreed"));
    let mut rescaler = [None; 2];
    for (name, (_, sum)) in &sum {
        let base = &base[name].1;
        for i in 0..sum.len() {
            let bits = [0, 1].map(|task| f32::from(masks[task][name].data[i]));
            let tuned = [0, 1].map(|task| base[i] + deltas[task][name].1[i]);
            for task in [0, 1] {
                let is_kept = (base[i] - tuned[task]).abs() > (base[i] + sum[i] - tuned[task]).abs() * 0.4;
                assert_eq!(bits[task], f32::from(u8::from(is_kept)), "{name}");
                assert_eq!(models[task][name].1[i], base[i] + sum[i] * bits[task], "{name}");
                // u has the sign of the sum, and the task takes what agrees with it.
                let own = deltas[task][name].1[i];
                let change = elected[task][name].1[i] - base[i];
                let agrees = if sum[i] > 0.0 { own > 0.0 } else { own < 0.0 };
                if !agrees {
                    assert_eq!(change, 0.0, "{name}");
                } else if change.abs() > 1e-2 {
                    let largest = [0, 1]
                        .map(|t| deltas[t][name].1[i] * sum[i].signum())
                        .into_iter()
                        .fold(0.0, f32::max);
                    let factor = change.abs() / largest;
                    let expected = *rescaler[task].get_or_insert(factor);
                    assert!((factor - expected).abs() < 1e-3, "{name}: {factor} and {expected}");
                }
            }
            assert_eq!(agreed[name].1[i], base[i] + sum[i] * (bits[0] * bits[1]) * 0.5, "{name}");
        }
    }
    assert!(
        rescaler.iter().all(|found| found.is_some_and(|factor| (0.5..1.1).contains(&factor))),
        "{rescaler:?}"
    );
}

#[test]
fn exported_masks_are_read_back_bit_by_bit() {
    let lab = lab();
    lab.append(
        "pipeline.toml",
        "[stage.again]\nkind = \"mask\"\nfrom = \"deltas\"\nmethod = \"file\"\npath = \"given\"\n",
    );
    let made = lab.run(&["--stage", "masks"]);
    fs_err::create_dir(lab.path("given")).unwrap();
    for (task, name) in [("digits", "digits_mask.safetensors"), ("negative", "negative.safetensors")] {
        fs_err::copy(exported(&lab, &format!("masks[{task}]")), lab.path("given").join(name)).unwrap();
    }
    let again = lab.run(&["--stage", "again"]);
    for task in TASKS {
        assert_eq!(
            made.artifacts()[format!("masks[{task}]").as_str()],
            again.artifacts()[format!("again[{task}]").as_str()]
        );
    }
}

#[test]
fn coverage_and_what_is_shared_is_shown() {
    let lab = lab();
    lab.run(&["--stage", "localized"]);
    let shown = lab.json(&["show", "pipeline.toml", "masks"]);
    let coverage: Vec<&Value> = (0..2).map(|unit| &shown[unit]["output"]["coverage"]).collect();
    let number = |value: &Value| value.as_u64().unwrap();
    for coverage in &coverage {
        let agreement = coverage["agreement"].as_array().unwrap();
        assert_eq!(number(&agreement[0]) + number(&agreement[1]), number(&coverage["kept"]));
        let layers = coverage["layers"].as_array().unwrap();
        assert_eq!(layers.iter().map(|layer| number(&layer["kept"])).sum::<u64>(), number(&coverage["kept"]));
        assert_eq!(
            (layers[0]["name"].as_str(), layers[1]["name"].as_str()),
            (Some("outside layers"), Some("layer 0"))
        );
    }
    assert_eq!(
        coverage[0]["agreement"][1], coverage[1]["agreement"][1],
        "what two masks share is the same for both"
    );
    let text = lab.ok(["show", "pipeline.toml", "masks[digits]"]).stdout;
    assert!(text.contains(" entries (") && text.contains("layer 0"), "{text}");
    assert!(!text.contains("no other mask"), "a mask by itself shares nothing\n{text}");
}

#[test]
fn models_that_share_a_vector_are_stored_as_one_vector_and_masks() {
    let lab = lab();
    let run = lab.run(&["--stage", "localized", "--stage", "elected"]);
    for stage in ["localized", "elected"] {
        let shown = lab.json(&["show", "pipeline.toml", stage]);
        let files: Vec<Vec<&Value>> =
            (0..2).map(|unit| shown[unit]["output"]["files"].as_array().unwrap().iter().collect()).collect();
        let digest = |unit: usize, file: usize| &files[unit][file]["digest"];
        assert_eq!(digest(0, 0), digest(1, 0), "the vector is the same file for every task of `{stage}`");
        assert_ne!(digest(0, 1), digest(1, 1), "the masks of `{stage}` differ");
        let (plain, vector, mask) = (
            shown[0]["output"]["f32_bytes"].as_u64().unwrap(),
            files[0][0]["bytes"].as_u64().unwrap(),
            files[0][1]["bytes"].as_u64().unwrap(),
        );
        assert!(vector < plain + 20_000 && mask < plain / 32 + 20_000, "{plain} {vector} {mask}");
    }
    // Nothing of the experts is needed any more: the models are there without them.
    assert_eq!(run.units["localized[digits]"].status, "ran");
    for task in TASKS {
        fs_err::remove_file(lab.path(format!("data/ft_{task}.safetensors"))).unwrap();
    }
    let stored = lab.cached_files("objects-v1").len();
    assert!(stored > 0);
}

#[test]
fn the_lambda_that_answers_best_is_found_for_every_task() {
    let lab = lab();
    lab.append(
        "pipeline.toml",
        r#"
[stage.searched]
kind = "mask"
from = { deltas = "deltas", base = "base", origin = "base" }
method = "tall"
lambda = "search"
candidates = [0.9, 0.2, 0.4]
graph = "data/clip_vision.onnx"
dataset = "${datasets}"
"#,
    );
    let set = ["--set", "limit=120", "--stage", "searched"];
    let run = lab.run(&set);
    assert!(run.ran().contains("searched[digits]"));
    let shown = lab.json(&["show", "pipeline.toml", "searched", "--set", "limit=120"]);
    // The same by hand: a pipeline per λ.
    let by_hand =
        lab.run(&["--set", "limit=120", "--set", "lambda=0.9,0.2,0.4", "--stage", "localized_scores"]);
    let correct = by_hand.correct();
    for (unit, task) in TASKS.iter().enumerate() {
        let figures = &shown[unit]["output"]["figures"];
        let mut best: Option<(f64, u64)> = None;
        for lambda in [0.9, 0.2, 0.4] {
            let (right, n) =
                correct[&("localized_scores".to_owned(), format!("lambda={lambda}"), (*task).to_owned())];
            assert_eq!(figures[format!("accuracy at {lambda}")], right as f64 / n as f64, "{task} {figures}");
            if best.is_none_or(|(_, most)| right > most) {
                best = Some((lambda, right));
            }
        }
        assert_eq!(figures["lambda"], best.unwrap().0, "{task} {figures}");
        let made = lab.json(&[
            "show",
            "pipeline.toml",
            "masks",
            "--set",
            "limit=120",
            "--set",
            &format!("lambda={}", best.unwrap().0),
        ]);
        assert_eq!(made[unit]["output"]["coverage"]["kept"], shown[unit]["output"]["coverage"]["kept"]);
    }
    // More images are another search; another λ of other stages is none.
    lab.run(&["--set", "lambda=0.7", "--set", "limit=120", "--stage", "searched"]).ran_exactly(&[]);
    assert_eq!(lab.run(&["--set", "limit=60", "--stage", "searched"]).ran().len(), 2);
}

#[test]
fn mistakes_are_reported_before_anything_runs() {
    let lab = lab();
    let check = |text: &str, expected: &[&str]| {
        lab.write("wrong.toml", &(crate::util::SMALL.to_owned() + text));
        let outcome = lab.call(["check", "wrong.toml"]);
        assert_eq!(outcome.code, 2, "{outcome}");
        outcome.tells(expected);
    };
    check(
        "[stage.m]\nkind = \"mask\"\nfrom = \"deltas\"\nmethod = \"tal\"\n",
        &["unknown method `tal`", "did you mean `tall`?"],
    );
    check(
        "[stage.m]\nkind = \"mask\"\nfrom = \"deltas\"\nmethod = \"magnitude\"\nkeep = 2\ncombine = \"unio\"\n",
        &["`keep` must be 0 to 1, got 2", "unio"],
    );
    check(
        "[stage.m]\nkind = \"mask\"\nfrom = \"deltas\"\nmethod = \"file\"\npath = \"absent\"\n",
        &["no such file or folder"],
    );
    check(
        "[stage.m]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"deltas\" }\nmethod = \"tall\"\n",
        &["method `tall` needs port `masks`"],
    );
    check(
        "[stage.m]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"deltas\", masks = \"deltas\" }\nmethod = \"tall\"\n",
        &["masks"],
    );
}

#[test]
fn localized_elected_and_agreed_models_score_as_published() {
    let Some(data) = test_data("localized_elected_and_agreed_models_score_as_published") else { return };
    let lab = Lab::empty();
    let mut stages = String::from(
        r#"
[stage.masks]
kind = "mask"
from = { deltas = "deltas", base = "base" }
method = "tall"
lambda = 0.4

[stage.localized]
kind = "merge"
from = { base = "base", vectors = "deltas", masks = "masks" }
method = "tall"

[stage.elected]
kind = "merge"
from = { base = "base", vectors = "deltas" }
method = "emr"

[stage.agreed]
kind = "merge"
from = { base = "base", vectors = "deltas", masks = "masks" }
method = "consensus"
k = 2
scale = 0.3
"#,
    );
    for stage in ["agreed", "localized", "elected"] {
        stages += &evaluate(&data, &format!("{stage}_scores"), stage);
    }
    lab.write("pipeline.toml", &pipeline(&data, &stages));
    let run = lab.run(&[]);
    let goldens = json(&data.join("goldens/public/accuracy.json"))["results"].clone();
    compare(&run, "agreed_scores", "", |task| goldens["tall_masks/consensus_ta_k2_alpha0.3"][task].clone());
    let own = [("localized", "tall_masks/localized"), ("elected", "emr/reconstructed")];
    for (stage, golden) in own {
        compare(&run, &format!("{stage}_scores"), "", |task| {
            goldens[format!("{golden}_{task}")][task].clone()
        });
    }
}
