//! Scores after they were computed: metrics from kept logits, comparisons, goals, baselines, and evaluations that were cut short.

use crate::tensors::read_stored;
use crate::util::{Lab, Outcome, Run};
use serde_json::Value;
use std::io::Write;

/// [`Lab::small`] with the experts as baseline.
fn with_baseline() -> Lab {
    let lab = Lab::small();
    lab.edit(
        "pipeline.toml",
        "from = { model = \"merged\", origin = \"base\" }",
        "from = { model = \"merged\", origin = \"base\", baseline = \"tuned\" }",
    );
    lab
}

/// Labels and logits of an evaluation.
fn kept(lab: &Lab, unit: &str) -> (Vec<usize>, Vec<Vec<f64>>) {
    let files = lab.json(&["export", "pipeline.toml", unit, "out", "--overwrite"]);
    let stored = read_stored(&lab.path(files[0].as_str().unwrap()));
    let words =
        |name: &str| stored[name].data.chunks_exact(4).map(|c| [c[0], c[1], c[2], c[3]]).collect::<Vec<_>>();
    let labels = words("labels").into_iter().map(|word| u32::from_le_bytes(word) as usize).collect();
    let logits: Vec<f64> =
        words("logits").into_iter().map(|word| f64::from(f32::from_le_bytes(word))).collect();
    let n_classes = stored["logits"].shape[1];
    (labels, logits.chunks(n_classes).map(<[f64]>::to_vec).collect())
}

fn predicted(logits: &[f64]) -> usize {
    (0..logits.len()).fold(0, |best, class| if logits[class] > logits[best] { class } else { best })
}

#[test]
fn metrics_come_from_kept_logits_without_inference() {
    let lab = Lab::small();
    lab.run(&["--set", "limit=200"]);
    let shown = lab.json(&["show", "pipeline.toml", "scores[digits]", "--set", "limit=200"]);
    let output = &shown[0]["output"];
    let (labels, logits) = {
        let files = lab.json(&["export", "pipeline.toml", "scores[digits]", "out", "--set", "limit=200"]);
        assert!(files[0].as_str().unwrap().ends_with("logits.safetensors"));
        lab.edit("pipeline.toml", "limit = 40", "limit = 200");
        kept(&lab, "scores[digits]")
    };
    let answers: Vec<usize> = logits.iter().map(|row| predicted(row)).collect();
    let n = labels.len() as f64;
    let mut recalls = Vec::new();
    let mut f1 = Vec::new();
    for class in 0..10 {
        let images = labels.iter().filter(|label| **label == class).count() as f64;
        let said = answers.iter().filter(|answer| **answer == class).count() as f64;
        let hits = labels.iter().zip(&answers).filter(|(l, a)| **l == class && **a == class).count() as f64;
        assert_eq!(output["analysis"]["classes"][class]["correct"], hits as u64);
        assert_eq!(output["analysis"]["classes"][class]["images"], images as u64);
        recalls.push(hits / images);
        f1.push(2.0 * hits / (images + said));
    }
    let nll: f64 = logits
        .iter()
        .zip(&labels)
        .map(|(row, label)| row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[*label])
        .sum();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let hits = labels.iter().zip(&answers).filter(|(l, a)| l == a).count() as f64;
    for (metric, expected) in
        [("macro_recall", mean(&recalls)), ("macro_f1", mean(&f1)), ("nll", nll / n), ("accuracy", hits / n)]
    {
        let found = output["analysis"]["metrics"].as_array().unwrap();
        let found = found.iter().find(|row| row["metric"] == metric).unwrap();
        let value = found["value"].as_f64().unwrap();
        assert!((value - expected).abs() < 1e-9, "{metric}: {value} and {expected}");
        let [low, high] = [0, 1].map(|end| found["interval"][end].as_f64().unwrap());
        assert!(low < value && value < high, "{metric}: {low} {value} {high}");
    }
    let text = lab.ok(["show", "pipeline.toml", "scores[digits]"]).stdout;
    for word in ["macro_f1", "ece", "nll", "recall", "precision"] {
        assert!(text.contains(word), "{text}");
    }
    assert_eq!(lab.ok(["show", "pipeline.toml", "scores[digits]", "--threads", "1"]).stdout, text);
}

#[test]
fn models_are_compared_image_by_image() {
    let lab = Lab::small();
    lab.run(&[]);
    let shown = lab.json(&["show", "pipeline.toml", "scores", "--against", "base_scores"]);
    for (nth, task) in ["digits", "negative"].into_iter().enumerate() {
        let found = &shown[nth]["output"]["comparisons"][0];
        assert_eq!(found["against"], format!("base_scores[{task}]"));
        let correct = |unit: &str| {
            let (labels, logits) = kept(&lab, unit);
            let hits = labels.iter().zip(&logits).map(|(label, row)| predicted(row) == *label);
            hits.collect::<Vec<bool>>()
        };
        let (ours, theirs) = (correct(&format!("scores[{task}]")), correct(&format!("base_scores[{task}]")));
        let only = |a: &[bool], b: &[bool]| a.iter().zip(b).filter(|(a, b)| **a && !**b).count();
        assert_eq!(found["only_first"], only(&ours, &theirs));
        assert_eq!(found["only_second"], only(&theirs, &ours));
        assert!(found["p_value"].as_f64().unwrap() <= 1.0);
    }
    let text = lab.ok(["show", "pipeline.toml", "scores[digits]", "--against", "base_scores"]).stdout;
    assert!(text.contains("against base_scores[digits]: ") && text.contains("McNemar p = "), "{text}");
    let none = lab.call(["show", "pipeline.toml", "scores", "--against", "merged"]);
    assert_eq!(none.code, 2, "{none}");
    none.tells(&["`merged` has no scores to compare with"]);
}

#[test]
fn a_baseline_is_scored_once_and_adding_one_infers_nothing() {
    let lab = Lab::small();
    lab.run(&[]);
    let before = lab.json(&["cache", "ls"]).as_array().unwrap().len();
    lab.append(
        "pipeline.toml",
        "\n[stage.tuned_scores]\nkind = \"evaluate\"\nfrom = { model = \"tuned\", origin = \"base\" }\ngraph = \"data/clip_vision.onnx\"\ndataset = \"${datasets}\"\n",
    );
    lab.run(&["--stage", "tuned_scores"]);
    lab.edit(
        "pipeline.toml",
        "from = { model = \"merged\", origin = \"base\" }",
        "from = { model = \"merged\", origin = \"base\", baseline = \"tuned\" }",
    );
    let run = lab.run(&[]);
    run.ran_exactly(&["scores[digits]", "scores[negative]"]);
    let rows = lab.json(&["cache", "ls"]);
    let rows = rows.as_array().unwrap();
    // Two experts' scores, and two that only name what was there: no logits were computed for them.
    assert_eq!(rows.len(), before + 4);
    let share = |unit: &str, metric: &str| {
        let score = run.scores.iter().find(|score| {
            score["metric"] == metric
                && format!("{}[{}]", score["stage"].as_str().unwrap(), score["task"].as_str().unwrap())
                    == unit
        });
        score.unwrap()["value"].as_f64().unwrap()
    };
    for task in ["digits", "negative"] {
        let normalized = share(&format!("scores[{task}]"), "accuracy")
            / share(&format!("tuned_scores[{task}]"), "accuracy");
        assert!((share(&format!("scores[{task}]"), "normalized_accuracy") - normalized).abs() < 1e-12);
    }
    // The other way round: the baseline's own scores are there already.
    let lab = with_baseline();
    lab.run(&["--stage", "scores"]);
    lab.append(
        "pipeline.toml",
        "\n[stage.tuned_scores]\nkind = \"evaluate\"\nfrom = { model = \"tuned\", origin = \"base\" }\ngraph = \"data/clip_vision.onnx\"\ndataset = \"${datasets}\"\n",
    );
    lab.run(&["--stage", "tuned_scores"]).ran_exactly(&[]);
    let shown = lab.json(&["show", "pipeline.toml", "scores[digits]"]);
    assert_eq!(shown[0]["output"]["comparisons"][0]["against"], "baseline");
}

#[test]
fn a_missed_goal_has_its_own_exit_code_and_spoils_nothing() {
    let lab = with_baseline();
    let goal = |text: &str| {
        let old = fs_err::read_to_string(lab.path("pipeline.toml")).unwrap();
        let kept: Vec<&str> = old.lines().filter(|line| !line.starts_with("goal.")).collect();
        let new =
            kept.join("\n").replace("baseline = \"tuned\" }", &format!("baseline = \"tuned\" }}\n{text}"));
        lab.write("pipeline.toml", &new);
        lab.try_run("pipeline.toml", &[])
    };
    let met = goal("goal.accuracy = { min = 2 }");
    assert_eq!(met.code, 0, "{met}");
    let missed = goal("goal.accuracy = { min = 99.9, max_drop = 0 }");
    assert_eq!(missed.code, 3, "{missed}");
    missed.tells(&["goal missed: `scores[", "`min` needs 99.90 %", "points"]);
    // A changed goal runs nothing, and a second run says the same.
    missed.run().ran_exactly(&[]);
    let again = lab.try_run("pipeline.toml", &[]);
    assert_eq!((again.code, again.json()["goals"].clone()), (3, missed.json()["goals"].clone()), "{again}");
    let first = &again.json()["goals"][0];
    assert_eq!((&first["stage"], &first["metric"]), (&Value::from("scores"), &Value::from("accuracy")));
    assert!(first["missed_by"].as_f64().unwrap() > 0.0);
    for (text, says) in [
        ("goal.accuracy = { min = 0.9 }", "is a percentage, got 0.9"),
        ("goal.f1 = { min = 90 }", "`goal` knows no metric `f1`"),
        ("goal.accuracy = {}", "needs `min` or `max_drop`"),
    ] {
        let outcome: Outcome = goal(text);
        assert_eq!(outcome.code, 2, "{outcome}");
        outcome.tells(&[says]);
    }
    lab.edit("pipeline.toml", ", baseline = \"tuned\"", "");
    lab.edit("pipeline.toml", "goal.accuracy = {}", "goal.accuracy = { max_drop = 1 }");
    let outcome = lab.try_run("pipeline.toml", &[]);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&["compares with port `baseline`, which is not"]);
}

/// Writes `n` grey images of 8 × 8 pixels and labels as idx files.
fn many_images(lab: &Lab, n: u32) {
    let mut images = fs_err::File::create(lab.path("images.idx")).unwrap();
    images
        .write_all(&[[0, 0, 8, 3], n.to_be_bytes(), 8u32.to_be_bytes(), 8u32.to_be_bytes()].concat())
        .unwrap();
    let pixels: Vec<u8> = (0..n * 64).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    images.write_all(&pixels).unwrap();
    let labels: Vec<u8> = (0..n).map(|i| (i % 10) as u8).collect();
    fs_err::write(lab.path("labels.idx"), [&[0, 0, 8, 1][..], &n.to_be_bytes(), &labels].concat()).unwrap();
}

/// A lab whose evaluation of 2500 images was killed as soon as a part of its logits was kept.
fn killed() -> Lab {
    let lab = Lab::small();
    many_images(&lab, 2500);
    lab.write("pipeline.toml", NOISE);
    lab.run_and_kill("scores", 1);
    lab
}

const NOISE: &str = "[stage.base]\nkind = \"load\"\npath = \"data/base.safetensors\"\n\
    [stage.scores]\nkind = \"evaluate\"\nfrom = { model = \"base\", origin = \"base\" }\ngraph = \"data/clip_vision.onnx\"\n\
    [stage.scores.dataset.noise]\nformat = \"idx\"\nimages = \"images.idx\"\nlabels = \"labels.idx\"\nhead = \"data/head_digits.safetensors\"\n";

#[test]
fn a_killed_evaluation_goes_on_and_ends_with_the_same_bytes() {
    let lab = killed();
    let rest = lab.try_run("pipeline.toml", &[]);
    assert_eq!(rest.code, 0, "{rest}");
    rest.tells(&["`noise`: going on after"]);

    let other = Lab::small();
    many_images(&other, 2500);
    other.write("pipeline.toml", NOISE);
    assert_eq!(other.run(&[]).artifacts(), rest.run().artifacts());
    // With a size that a probe may choose, the key and the bytes are those of 64.
    lab.edit("pipeline.toml", "graph =", "batch_size = \"auto\"\ngraph =");
    lab.run(&[]).ran_exactly(&[]);

    // Who wants everything computed again does not get what was kept.
    let lab = killed();
    let forced = lab.try_run("pipeline.toml", &["--force", "scores"]);
    assert_eq!(forced.code, 0, "{forced}");
    assert!(!forced.stderr.contains("going on after"), "{forced}");
    assert_eq!(forced.run().artifacts(), rest.run().artifacts());
}

#[test]
fn a_graph_with_a_fixed_batch_scores_every_image() {
    let lab = Lab::small();
    let expected = lab.run(&["--stage", "base_scores"]);
    // The dimension `batch` (field 2 of a dimension) becomes the number 16 (field 1), in as many bytes.
    let graph = fs_err::read(lab.path("data/clip_vision.onnx")).unwrap();
    let (free, fixed) = (b"\x12\x05batch", b"\x08\x90\x80\x80\x80\x80\x00");
    let mut patched = Vec::with_capacity(graph.len());
    let mut rest = graph.as_slice();
    while let Some(position) = rest.windows(free.len()).position(|window| window == free) {
        patched.extend_from_slice(&rest[..position]);
        patched.extend_from_slice(fixed);
        rest = &rest[position + free.len()..];
    }
    patched.extend_from_slice(rest);
    assert_ne!(graph, patched);
    fs_err::write(lab.path("data/clip_vision.onnx"), patched).unwrap();
    let refused = lab.try_run("pipeline.toml", &["--stage", "base_scores"]);
    assert_eq!(refused.code, 1, "{refused}");
    refused.tells(&["takes 16 images at once, not 64", "set `batch_size = 16`"]);
    // 40 images: the third batch is half full.
    lab.edit("pipeline.toml", "graph =", "batch_size = 16\ngraph =");
    let scored = lab.run(&["--stage", "base_scores"]);
    let correct = |run: &Run| run.scores.iter().map(|row| row["correct"].clone()).collect::<Vec<_>>();
    assert_eq!(correct(&scored), correct(&expected));
}

#[test]
fn a_dataset_without_images_is_refused() {
    let lab = Lab::small();
    many_images(&lab, 0);
    lab.write("pipeline.toml", NOISE);
    let outcome = lab.try_run("pipeline.toml", &[]);
    assert_eq!(outcome.code, 1, "{outcome}");
    outcome.tells(&["scores[noise]: `", "images.idx` holds no images"]);
    // A list with a header and nothing else.
    lab.write("list.csv", "path,label\n");
    let list = "format = \"list\"\npath = \"list.csv\"\n";
    lab.edit("pipeline.toml", "format = \"idx\"\nimages = \"images.idx\"\nlabels = \"labels.idx\"\n", list);
    let outcome = lab.try_run("pipeline.toml", &[]);
    assert!(outcome.code != 0, "{outcome}");
    outcome.tells(&["stage `scores[noise]`", "list.csv", "holds no"]);
}

#[test]
fn execution_providers_are_named_by_the_site_and_never_replaced() {
    let lab = Lab::small();
    let site = |text: &str| {
        lab.write("site.toml", text);
        lab.call(["run", "pipeline.toml", "--site", "site.toml", "--stage", "base_scores"])
    };
    let bad = site("[onnxruntime]\nprovider = \"gpu\"\n");
    assert_eq!(bad.code, 2, "{bad}");
    bad.tells(&[
        "site.toml",
        "unknown execution provider `gpu`; there are cpu, cuda, tensorrt, coreml, openvino",
    ]);
    let unknown = site("[onnxruntime]\nprovidr = \"cpu\"\n");
    assert_eq!(unknown.code, 2, "{unknown}");
    unknown.tells(&["unknown field `providr`"]);
    let missing = lab.call(["run", "pipeline.toml", "--site", "none.toml"]);
    assert_eq!(missing.code, 2, "{missing}");
    // The installed library is for the processor: an accelerator that it lacks is an error, and no scores come of it.
    let coreml = site("[onnxruntime]\nprovider = \"coreml\"\n");
    assert_eq!(coreml.code, 1, "{coreml}");
    coreml.tells(&["cannot use the execution provider `coreml`"]);
    let plain = site("[onnxruntime]\nprovider = \"cpu\"\n");
    assert_eq!(plain.code, 0, "{plain}");
    // The user's own settings count where the site says nothing.
    fs_err::create_dir_all(lab.root().join(".config/merganser")).unwrap();
    fs_err::write(
        lab.root().join(".config/merganser/config.toml"),
        "[onnxruntime]\nprovider = \"openvino\"\n",
    )
    .unwrap();
    lab.write(
        "pipeline2.toml",
        &fs_err::read_to_string(lab.path("pipeline.toml")).unwrap().replace("limit = 40", "limit = 41"),
    );
    let user = lab.call(["run", "pipeline2.toml", "--stage", "base_scores"]);
    assert_eq!(user.code, 1, "{user}");
    user.tells(&["cannot use the execution provider `openvino`"]);
    let cpu = lab.call(["run", "pipeline2.toml", "--stage", "base_scores", "--site", "site.toml"]);
    assert_eq!(cpu.code, 0, "{cpu}");
}

/// Directions that are views are the task vectors: the same must be kept whether these are also read to measure errors or not.
#[test]
fn a_model_of_views_takes_the_bytes_of_what_it_views() {
    let lab = Lab::small();
    let mut stages = "[stage.basis]\nkind = \"svd\"\nfrom = { deltas = \"deltas\" }\n\
        [stage.coefficients]\nkind = \"compress\"\nfrom = { deltas = \"deltas\", basis = \"basis\" }\n"
        .to_owned();
    for (name, more) in [("plain", ""), ("measured", ", deltas = \"deltas\"")] {
        stages += &format!(
            "[stage.{name}]\nkind = \"merge\"\nfrom = {{ base = \"base\", vectors = \"coefficients\"{more} }}\nmethod = \"svd-hybrid\"\n\
             [stage.{name}_scores]\nkind = \"evaluate\"\nfrom = {{ model = \"{name}\", origin = \"base\" }}\ngraph = \"data/clip_vision.onnx\"\n\
             dataset = \"${{datasets}}\"\n"
        );
    }
    lab.append("pipeline.toml", &stages);
    let table = lab.ok(["run", "pipeline.toml"]).stdout;
    let sizes = |model: &str| -> Vec<String> {
        let row = table.lines().find(|line| line.starts_with(&format!("{model} "))).unwrap();
        row.split_whitespace().rev().take(3).map(str::to_owned).collect()
    };
    assert_eq!(sizes("measured"), sizes("plain"), "{table}");
    // Two experts in half precision, and a little more.
    let ratio: f64 = sizes("plain")[0].trim_end_matches('×').parse().unwrap();
    assert!((1.5..2.0).contains(&ratio), "{table}");
}

#[test]
fn a_row_that_lacks_a_task_has_no_mean() {
    let lab = Lab::small();
    lab.append(
        "pipeline.toml",
        "[stage.tuned_scores]\nkind = \"evaluate\"\nfrom = { model = \"tuned\", origin = \"base\" }\ngraph = \"data/clip_vision.onnx\"\n\
         dataset = \"${datasets}\"\n",
    );
    let expert = lab.path("data/ft_negative.safetensors");
    let bytes = fs_err::read(&expert).unwrap();
    fs_err::write(&expert, &bytes[..bytes.len() / 2]).unwrap();
    let outcome = lab.call(["run", "pipeline.toml", "--keep-going"]);
    assert_eq!(outcome.code, 1, "{outcome}");
    let cells = |model: &str| {
        let row = outcome.stdout.lines().find(|line| line.split_whitespace().next() == Some(model));
        row.unwrap_or_else(|| panic!("no row `{model}`\n{outcome}")).split_whitespace().count()
    };
    // Name, two tasks, their mean, bytes with their unit, ratio; of the other the name and the task that it was asked.
    assert_eq!((cells("base"), cells("tuned")), (7, 2), "{outcome}");
}
