//! Correct answers on the quickstart against those of PyTorch.

use crate::util::{Lab, Run, quickstart};
use serde_json::Value;
use std::fmt::Write;

const TASKS: [&str; 4] = ["digits", "rotated", "negative", "parity"];

/// Fails unless the correct answers are within one image, or 0.2 %, of what is expected.
#[track_caller]
pub(crate) fn assert_correct(what: &str, actual: u64, expected: u64, n: u64) {
    let allowed = (0.002 * n as f64).max(1.0);
    let off = actual.abs_diff(expected) as f64;
    assert!(off <= allowed, "{what}: {actual} of {n} correct, expected {expected} ± {allowed}");
}

/// Compares a stage's answers with a row of the reference; returns the number of exact and of all comparisons.
#[track_caller]
fn compare(run: &Run, stage: &str, vars: &str, reference: &Value, row: &str) -> (usize, usize) {
    let correct = run.correct();
    let mut exact = 0;
    for task in TASKS {
        let (actual, n) = correct[&(stage.to_owned(), vars.to_owned(), task.to_owned())];
        assert_eq!(n, 600);
        let expected = reference[row][task].as_u64().unwrap();
        assert_correct(&format!("{row} {task}"), actual, expected, n);
        exact += usize::from(actual == expected);
    }
    (exact, TASKS.len())
}

/// The quickstart in full, with what `stages` adds and without its sweep and last two stages.
fn pipeline(stages: &str) -> String {
    let folder = quickstart().display().to_string();
    let mut text = format!("[vars]\ntasks = {TASKS:?}\nbits = 4\nscale = 0.3\n");
    for task in TASKS {
        let files = if task == "rotated" {
            format!("format = \"folder\"\npath = \"{folder}/data/rotated\"\n")
        } else {
            format!(
                "format = \"idx\"\nimages = \"{folder}/data/{task}-images.idx.gz\"\nlabels = \"{folder}/data/{task}-labels.idx.gz\"\n"
            )
        };
        write!(text, "[vars.datasets.{task}]\n{files}head = \"{folder}/head_{task}.safetensors\"\n").unwrap();
    }
    write!(
        text,
        "[stage.base]\nkind = \"load\"\npath = \"{folder}/base.safetensors\"\n\
         [stage.tuned]\nkind = \"load\"\neach = {{ task = \"${{tasks}}\" }}\npath = \"{folder}/ft_${{task}}.safetensors\"\n\
         [stage.deltas]\nkind = \"diff\"\nfrom = {{ base = \"base\", tuned = \"tuned\" }}\n{stages}"
    )
    .unwrap();
    text
}

fn evaluate(name: &str, model: &str) -> String {
    let graph = quickstart().join("clip_vision.onnx");
    format!(
        "[stage.{name}]\nkind = \"evaluate\"\nfrom = {{ model = \"{model}\", origin = \"base\" }}\ngraph = \"{}\"\ndataset = \"${{datasets}}\"\n",
        graph.display()
    )
}

fn reference() -> Value {
    serde_json::from_slice(&fs_err::read(quickstart().join("reference.json")).unwrap()).unwrap()
}

#[test]
fn base_experts_average_and_task_arithmetic_match() {
    let lab = Lab::empty();
    let stages = "[stage.added]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"deltas\" }\nmethod = \"task-arithmetic\"\nscale = \"${scale}\"\n\
                  [stage.averaged]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"deltas\" }\nmethod = \"average\"\n"
        .to_owned()
        + &evaluate("base_scores", "base")
        + &evaluate("tuned_scores", "tuned")
        + &evaluate("added_scores", "added")
        + &evaluate("averaged_scores", "averaged");
    lab.write("pipeline.toml", &pipeline(&stages));
    let run = lab.run(&["--set", "scale=0.2,0.25,0.3,0.4"]);
    let reference = reference();
    let mut counts = vec![
        compare(&run, "base_scores", "", &reference, "base"),
        compare(&run, "tuned_scores", "", &reference, "finetuned"),
        compare(&run, "averaged_scores", "", &reference, "task_arithmetic_0.25"),
    ];
    for scale in ["0.2", "0.25", "0.3", "0.4"] {
        counts.push(compare(
            &run,
            "added_scores",
            &format!("scale={scale}"),
            &reference,
            &format!("task_arithmetic_{scale}"),
        ));
    }
    println!(
        "{} of {} counts exactly as PyTorch's",
        counts.iter().map(|c| c.0).sum::<usize>(),
        counts.iter().map(|c| c.1).sum::<usize>()
    );
}

#[test]
fn quantized_task_vectors_and_quantized_checkpoints_match() {
    let lab = Lab::empty();
    let stages = "[stage.packed]\nkind = \"quantize\"\nfrom = \"deltas\"\nbits = \"${bits}\"\n\
                  [stage.merged]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"packed\" }\nmethod = \"task-arithmetic\"\nscale = 0.3\n\
                  [stage.experts]\nkind = \"merge\"\neach = { task = \"${tasks}\" }\nfrom = { base = \"base\", vectors = \"packed[${task}]\" }\nmethod = \"task-arithmetic\"\nscale = 1.0\n\
                  [stage.checkpoints]\nkind = \"quantize\"\nfrom = \"tuned\"\nbits = \"${bits}\"\n"
        .to_owned()
        + &evaluate("merged_scores", "merged")
        + &evaluate("expert_scores", "experts")
        + &evaluate("checkpoint_scores", "checkpoints");
    lab.write("pipeline.toml", &pipeline(&stages));
    let run = lab.run(&["--set", "bits=8,4,3,2"]);
    let reference = reference();
    let mut counts = Vec::new();
    for bits in [8, 4, 3, 2] {
        let vars = format!("bits={bits}");
        counts.push(compare(
            &run,
            "merged_scores",
            &vars,
            &reference,
            &format!("task_arithmetic_0.3_tvq{bits}"),
        ));
        counts.push(compare(&run, "expert_scores", &vars, &reference, &format!("finetuned_tvq{bits}")));
        counts.push(compare(&run, "checkpoint_scores", &vars, &reference, &format!("finetuned_fq{bits}")));
    }
    println!(
        "{} of {} counts exactly as PyTorch's",
        counts.iter().map(|c| c.0).sum::<usize>(),
        counts.iter().map(|c| c.1).sum::<usize>()
    );
}

#[test]
fn an_expert_on_every_task_is_a_cross_evaluation() {
    let lab = Lab::empty();
    let stages = evaluate("crossed", "tuned") + "cross = true\n" + &evaluate("own", "tuned");
    lab.write("pipeline.toml", &pipeline(&stages));
    let run = lab.run(&["--set", "tasks=[\"digits\",\"parity\"]"]);
    let crossed: Vec<&str> =
        run.units.keys().map(String::as_str).filter(|unit| unit.starts_with("crossed")).collect();
    assert_eq!(crossed.len(), 8, "{crossed:?}");
    let find = |stage: &str, member: &str, task: &str| {
        let score = run.scores.iter().find(|s| {
            s["stage"] == stage && s["member"] == member && s["task"] == task && s["metric"] == "accuracy"
        });
        score.unwrap()["value"].clone()
    };
    for task in ["digits", "parity"] {
        assert_eq!(find("crossed", task, task), find("own", task, task));
    }
    assert!(
        find("crossed", "digits", "parity").as_f64().unwrap()
            < find("crossed", "parity", "parity").as_f64().unwrap()
    );
}

#[test]
fn accuracy_is_also_given_in_units_of_a_baseline() {
    let lab = Lab::small();
    lab.edit(
        "pipeline.toml",
        "{ model = \"merged\", origin = \"base\" }",
        "{ model = \"merged\", origin = \"base\", baseline = \"tuned\" }",
    );
    lab.append(
        "pipeline.toml",
        "\n[stage.own]\nkind = \"evaluate\"\nfrom = { model = \"tuned\", origin = \"base\", baseline = \"tuned\" }\n\
         graph = \"data/clip_vision.onnx\"\ndataset = \"${datasets}\"\n",
    );
    let run = lab.run(&["--set", "limit=100"]);
    let value = |stage: &str, task: &str, metric: &str| {
        let is_meant =
            |score: &&Value| score["stage"] == stage && score["task"] == task && score["metric"] == metric;
        run.scores.iter().find(is_meant).unwrap()["value"].as_f64().unwrap()
    };
    for task in ["digits", "negative"] {
        assert_eq!(value("own", task, "normalized_accuracy"), 1.0);
        let expected = value("scores", task, "accuracy") / value("own", task, "accuracy");
        assert!((value("scores", task, "normalized_accuracy") - expected).abs() < 1e-12);
    }
    // Another baseline is another result.
    lab.edit(
        "pipeline.toml",
        "baseline = \"tuned\" }\ngraph = \"data/clip_vision.onnx\"\ndataset = \"${datasets}\"\n\n[vars",
        "baseline = \"base\" }\ngraph = \"data/clip_vision.onnx\"\ndataset = \"${datasets}\"\n\n[vars",
    );
    lab.run(&["--set", "limit=100"]).ran_exactly(&["scores[digits]", "scores[negative]"]);
}
