//! Calibration on the suite: rounding that looks at activations, and widths that look at sensitivities, by paired tests over images.
//!
//! Calibrated on images of the training splits, scored on those of the test splits.

use crate::suite::json;
use crate::util::{Lab, Run, test_data};
use safetensors::SafeTensors;
use std::fmt::Write;
use std::path::Path;

/// Linear and patch-embedding weights; biases, norms, tokens and positions stay as they are.
const WEIGHTS_ONLY: &str = "rules = [{ match = \"*norm*\", keep = true }, { match = \"*.bias\", keep = true }, { match = \"*token*\", keep = true }, \
     { match = \"*pos*_embed*\", keep = true }, { match = \"*class_embedding\", keep = true }]";

/// Tasks whose training images are there.
const TASKS: [&str; 3] = ["mnist", "fashion", "cifar10"];

/// The datasets of `tasks` as a table of vars: the images to calibrate on, or those to score.
fn datasets(data: &Path, name: &str, tasks: &[&str], calibration: bool, heads: bool) -> String {
    let images = data.join("suite/data").display().to_string();
    let classes = json(&data.join("suite/data/classes.json"))["fashion"].to_string();
    let mut text = String::new();
    for task in tasks {
        writeln!(text, "[vars.{name}.{task}]").unwrap();
        text += &match (*task, calibration) {
            ("mnist", _) => {
                let part = if calibration { "train" } else { "t10k" };
                format!(
                    "format = \"idx\"\nimages = \"{images}/mnist/{part}-images-idx3-ubyte.gz\"\nlabels = \"{images}/mnist/{part}-labels-idx1-ubyte.gz\"\n"
                )
            }
            ("cifar10", true) => {
                format!("format = \"cifar\"\npath = \"{images}/cifar10/data_batch_1.bin\"\n")
            }
            ("cifar10", false) => {
                format!("format = \"cifar\"\npath = \"{images}/cifar10\"\nsplit = \"test\"\n")
            }
            _ => {
                let split = if calibration { "train" } else { "test" };
                format!(
                    "format = \"folder\"\npath = \"{images}/fashion\"\nsplit = \"{split}\"\nclasses = {classes}\n"
                )
            }
        };
        if calibration {
            text += "limit = 256\n";
        }
        if heads {
            let head = data.join("suite/clip").join(format!("head_{task}.safetensors"));
            writeln!(text, "head = \"{}\"", head.display()).unwrap();
        }
    }
    text
}

/// A model (or one per task), calibrated, quantized by `quantize` and scored, as vars say.
fn calibrated(data: &Path, clip: bool, vars: &str, sensitivity_images: usize, quantize: &str) -> String {
    let suite = data.join("suite").display().to_string();
    let tasks: &[&str] = if clip { &TASKS } else { &["fashion"] };
    let mut text = format!("[vars]\ntasks = {tasks:?}\n{vars}");
    text += &datasets(data, "seen", tasks, true, clip);
    text += &datasets(data, "scored", tasks, false, clip);
    text += &if clip {
        format!(
            "[stage.base]\nkind = \"load\"\npath = \"{suite}/clip/base\"\n\
             [stage.model]\nkind = \"load\"\neach = {{ task = \"${{tasks}}\" }}\npath = \"{suite}/clip/ft_${{task}}.safetensors\"\n"
        )
    } else {
        format!(
            "[stage.base]\nkind = \"load\"\npath = \"{suite}/deit/model.safetensors\"\n\
             [stage.model]\nkind = \"load\"\npath = \"{suite}/deit/model.safetensors\"\n"
        )
    };
    let graph = if clip { "clip_base" } else { "deit" };
    let run = format!(
        "graph = \"{suite}/onnx/{graph}.onnx\"\npreprocess = \"{suite}/clip/base/preprocessor_config.json\"\n"
    );
    write!(
        text,
        "[stage.activations]\nkind = \"calibrate\"\nfrom = {{ model = \"model\", origin = \"base\" }}\n{run}dataset = \"${{seen}}\"\nsensitivity_images = {sensitivity_images}\n\
         [stage.plain]\nkind = \"evaluate\"\nfrom = {{ model = \"model\", origin = \"base\" }}\n{run}dataset = \"${{scored}}\"\n\
         [stage.packed]\nkind = \"quantize\"\nfrom = {{ tensors = \"model\", statistics = \"activations\" }}\nscheme = \"symmetric\"\n{WEIGHTS_ONLY}\n{quantize}\
         [stage.scores]\nkind = \"evaluate\"\nfrom = {{ model = \"packed\", origin = \"base\" }}\n{run}dataset = \"${{scored}}\"\n"
    )
    .unwrap();
    text
}

/// Whether each image was answered correctly, over all tasks.
pub(crate) fn answers(lab: &Lab, run: &Run, tasks: &[&str], unit: impl Fn(&str) -> String) -> Vec<bool> {
    let mut answers = Vec::new();
    for task in tasks {
        let unit = unit(task);
        let artifacts = run.artifacts();
        let artifact = artifacts.get(unit.as_str()).unwrap_or_else(|| panic!("no `{unit}` in {artifacts:?}"));
        let artifact = json(&lab.object(artifact));
        let blob = artifact["blobs"][0]["digest"].as_str().unwrap();
        let bytes = fs_err::read(lab.object(blob)).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let (logits, labels) = (tensors.tensor("logits").unwrap(), tensors.tensor("labels").unwrap());
        let classes = logits.shape()[1];
        let logits: Vec<f32> = logits.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let labels = labels.data().as_chunks().0.iter().map(|b| u32::from_le_bytes(*b) as usize);
        answers.extend(
            logits
                .chunks_exact(classes)
                .zip(labels)
                .map(|(row, label)| (0..classes).all(|other| other == label || row[other] < row[label])),
        );
    }
    answers
}

/// Answers of two models to the same images.
#[derive(Debug)]
pub(crate) struct Paired {
    pub correct: (usize, usize),
    /// Images that only the first, or only the second, answers correctly.
    pub only: (usize, usize),
    /// Exact McNemar test, two-sided: how likely a split as uneven as this is if both are equally good.
    pub p: f64,
}

pub(crate) fn paired(what: &str, first: &[bool], second: &[bool]) -> Paired {
    assert_eq!(first.len(), second.len());
    let count = |a: bool, b: bool| first.iter().zip(second).filter(|pair| pair == &(&a, &b)).count();
    let only = (count(true, false), count(false, true));
    let (n, fewer) = (only.0 + only.1, only.0.min(only.1));
    // Σ_{k ≤ fewer} C(n, k)/2ⁿ, in logarithms.
    let mut log_choose = -(n as f64) * 2f64.ln();
    let mut tail = 0.0;
    for k in 0..=fewer {
        tail += log_choose.exp();
        log_choose += ((n - k) as f64).ln() - ((k + 1) as f64).ln();
    }
    let correct = |answers: &[bool]| answers.iter().filter(|correct| **correct).count();
    let correct = (correct(first), correct(second));
    let found = Paired { correct, only, p: (2.0 * tail).min(1.0) };
    println!("{what}: {correct:?} of {} correct, {only:?} alone, p = {:.2e}", first.len(), found.p);
    found
}

#[test]
fn the_paired_test_is_exact() {
    let answers = |pattern: &str| pattern.chars().map(|c| c == '1').collect::<Vec<_>>();
    let found = paired("made up", &answers("1111111100"), &answers("0000000110"));
    // Seven to one of eight: 2·(1 + 8)/256.
    assert_eq!((found.only, found.correct), ((7, 1), (8, 2)));
    assert!((found.p - 18.0 / 256.0).abs() < 1e-12);
    assert_eq!(paired("equal", &answers("101"), &answers("101")).p, 1.0);
}

/// Adds a stage to the quickstart; the mistake must be found before anything runs.
#[track_caller]
fn refused(stage: &str, texts: &[&str]) {
    let lab = Lab::small();
    lab.append(
        "pipeline.toml",
        &format!("\n[stage.added]\nkind = \"quantize\"\nfrom = \"base\"\nscheme = \"symmetric\"\n{stage}\n"),
    );
    let outcome = lab.try_run("pipeline.toml", &[]);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(texts);
}

#[test]
fn mistakes_are_found_before_anything_runs() {
    refused(
        "bits = 3\nrounding = \"gptq\"",
        &["needs statistics of activations on port `statistics`", "kind `calibrate` makes them"],
    );
    refused("bits = \"auto\"", &["`bits = \"auto\"` needs a `budget`", "bits_per_weight = 3.0"]);
    refused("bits = 3\nbudget = { bytes = 9 }", &["`budget` is for widths that are chosen"]);
    refused(
        "bits = \"auto\"\nbudget = { bits_per_weight = -1 }",
        &["`budget.bits_per_weight` must be a positive number, got -1"],
    );
    refused(
        "bits = \"auto\"\nbudget = { bytes = 9 }\nwidths = [1, 2]",
        &["`widths` must be some of 2 to 8 or 16, got [1, 2]"],
    );
    refused("bits = 3\ndamping = 0.1", &["`damping` is for roundings with statistics"]);
    refused("bits = \"best\"", &["an integer from 0 to 255 or `auto`"]);
}

#[test]
fn a_budget_that_no_widths_keep_says_what_is_possible() {
    let lab = Lab::small();
    lab.append(
        "pipeline.toml",
        "\n[stage.added]\nkind = \"quantize\"\nfrom = \"base\"\nscheme = \"symmetric\"\nbits = \"auto\"\nbudget = { bits_per_weight = 1.5 }\n",
    );
    let outcome = lab.try_run("pipeline.toml", &["--stage", "added"]);
    assert_eq!(outcome.code, 1, "{outcome}");
    outcome.tells(&[
        "no choice of widths keeps the budget of 1.5 bits per weight; the least possible is 2.0",
        "`widths` says which are tried",
    ]);
}

/// Bytes of codes and scales, and the root mean square of the relative errors of all tensors.
fn spent(lab: &Lab, unit: &str, set: &[&str]) -> (u64, f64) {
    let shown = lab.json(&[&["show", "pipeline.toml", unit], set].concat());
    let quantization = &shown[0]["output"]["quantization"];
    let tensors = quantization["tensors"].as_array().unwrap();
    let squares = tensors.iter().map(|tensor| tensor["l2_relative"].as_f64().unwrap().powi(2));
    let bytes = quantization["total"]["stored_bytes"].as_u64().unwrap();
    (bytes, (squares.sum::<f64>() / tensors.len() as f64).sqrt())
}

#[test]
fn budgets_of_bytes_and_of_errors_are_kept_and_used_up() {
    let lab = Lab::small();
    lab.edit("pipeline.toml", "limit = 40\n", "limit = 40\nbytes = 200000\nerror = 0.1\n");
    for (name, budget) in [("sized", "bytes = \"${bytes}\""), ("exact", "relative_error = \"${error}\"")] {
        lab.append(
            "pipeline.toml",
            &format!(
                "\n[stage.{name}]\nkind = \"quantize\"\nfrom = \"base\"\nscheme = \"symmetric\"\nbits = \"auto\"\nbudget = {{ {budget} }}\n"
            ),
        );
    }
    let run = |stage: &str, set: &[&str]| {
        lab.run(&[&["--stage", stage], set].concat());
        spent(&lab, stage, set)
    };
    // One bit more for the largest tensor takes 4608 bytes.
    let sized = ["150000", "200000", "250000"].map(|bytes| {
        let (spent, error) = run("sized", &["--set", &format!("bytes={bytes}")]);
        let budget: u64 = bytes.parse().unwrap();
        assert!(spent <= budget && spent + 4608 > budget, "{spent} bytes for a budget of {budget}");
        error
    });
    assert!(sized.is_sorted_by(|a, b| a > b), "{sized:?}");
    let exact = [0.05, 0.1, 0.2].map(|error| {
        let (spent, found) = run("exact", &["--set", &format!("error={error}")]);
        assert!(found <= error, "an error of {found} for a budget of {error}");
        // As few bytes as possible: with as many, no other widths have a smaller error.
        let (same, least) = run("sized", &["--set", &format!("bytes={spent}")]);
        assert!(
            same <= spent && least <= found * (1.0 + 1e-12),
            "{least} would do with {spent} bytes, not {found}"
        );
        assert!(least > 0.95 * found, "{least} is much less than {found} with {spent} bytes");
        spent
    });
    assert!(exact.is_sorted_by(|a, b| a > b), "{exact:?}");
}

#[test]
fn calibrated_rounding_beats_plain_rounding_at_three_bits() {
    let Some(data) = test_data("calibrated_rounding_beats_plain_rounding_at_three_bits") else { return };
    for clip in [false, true] {
        let lab = Lab::empty();
        let text =
            calibrated(&data, clip, "rounding = \"nearest\"\n", 0, "bits = 3\nrounding = \"${rounding}\"\n");
        lab.write("pipeline.toml", &text);
        let run = lab.run(&["--set", "rounding=nearest,gptq,descent"]);
        let (model, tasks): (_, &[&str]) = if clip { ("CLIP", &TASKS) } else { ("DeiT", &["fashion"]) };
        let plain = answers(&lab, &run, tasks, |task| format!("plain[{task}]"));
        let of =
            |rounding: &str| answers(&lab, &run, tasks, |task| format!("scores[rounding={rounding},{task}]"));
        let nearest = of("nearest");
        paired(&format!("{model}: f32, int3 nearest"), &plain, &nearest);
        if !clip {
            let published = &json(&data.join("suite/results.json"))["deit"];
            println!("published: {published}");
        }
        for rounding in ["gptq", "descent"] {
            let found = paired(&format!("{model}: int3 {rounding}, int3 nearest"), &of(rounding), &nearest);
            assert!(found.only.0 > found.only.1 && found.p < 0.001, "{found:?}");
        }
    }
}

/// Bytes of codes and scales of all tensors whose widths are chosen.
fn packed_bytes(lab: &Lab, run: &Run, unit: &str) -> u64 {
    let artifact = json(&lab.object(run.artifacts()[unit]));
    artifact["blobs"][0]["size"].as_u64().unwrap()
}

#[test]
fn chosen_widths_beat_uniform_ones_at_equal_bytes() {
    let Some(data) = test_data("chosen_widths_beat_uniform_ones_at_equal_bytes") else { return };
    let lab = Lab::empty();
    let vars = "rounding = \"nearest\"\naverage = 3.0\nwidth = 3\n";
    let write = |file: &str, quantize: &str| {
        lab.write(
            file,
            &calibrated(&data, false, vars, 64, &format!("rounding = \"${{rounding}}\"\n{quantize}\n")),
        );
    };
    write("uniform.toml", "bits = \"${width}\"");
    write("chosen.toml", "bits = \"auto\"\nbudget = { bits_per_weight = \"${average}\" }");
    let blind = calibrated(
        &data,
        false,
        vars,
        64,
        "bits = \"auto\"\nbudget = { bits_per_weight = \"${average}\" }\n",
    );
    lab.write("blind.toml", &blind.replace(", statistics = \"activations\" }", " }"));
    let uniform = lab.run_file("uniform.toml", &["--set", "rounding=nearest,gptq", "--set", "width=2,3"]);
    let chosen = lab.run_file("chosen.toml", &["--set", "rounding=nearest,gptq", "--set", "average=2.5,3.0"]);
    let blind = lab.run_file("blind.toml", &["--set", "average=2.5,3.0"]);
    let of =
        |run: &Run, vars: &str| answers(&lab, run, &["fashion"], |task| format!("scores[{vars},{task}]"));
    for rounding in ["nearest", "gptq"] {
        let three = of(&uniform, &format!("rounding={rounding},width=3"));
        for average in ["2.5", "3.0"] {
            let vars = format!("rounding={rounding},average={average}");
            let found = paired(
                &format!("DeiT {rounding}: chosen widths {average}, uniform 3"),
                &of(&chosen, &vars),
                &three,
            );
            let (ours, theirs) = (
                packed_bytes(&lab, &chosen, &format!("packed[{vars}]")),
                packed_bytes(&lab, &uniform, &format!("packed[rounding={rounding},width=3]")),
            );
            println!("{ours} bytes, {theirs} bytes");
            assert!(ours <= theirs, "{ours} bytes against {theirs}");
            if (rounding, average) == ("nearest", "3.0") {
                assert!(found.only.0 > found.only.1 && found.p < 0.01, "{found:?}");
            }
        }
    }
    let three = of(&uniform, "rounding=nearest,width=3");
    for average in ["2.5", "3.0"] {
        paired(
            &format!("DeiT without calibration: chosen widths {average}, uniform 3"),
            &of(&blind, &format!("average={average}")),
            &three,
        );
    }
}
