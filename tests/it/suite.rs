//! Larger models on real data sets, against the published numbers and the tensors of the original implementations.
//!
//! The data is in the folder that `MERGANSER_TEST_DATA` names; without it these tests say that they were skipped.

use crate::accuracy::assert_correct;
use crate::tensors::{self, assert_close};
use crate::util::{Lab, Run, shipped, test_data};
use merganser_tensors::Bits;
use merganser_tensors::kernels::pack::unpack;
use serde_json::Value;
use std::fmt::Write;
use std::path::Path;

/// The tasks, in the order of the published tables.
pub(crate) const TASKS: [&str; 6] = ["mnist", "fashion", "notmnist", "cifar10", "gtsrb", "pneumonia"];

pub(crate) fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap()
}

/// Base, experts, task vectors and datasets of all six tasks, and what `stages` adds.
pub(crate) fn pipeline(data: &Path, stages: &str) -> String {
    let clip = data.join("suite/clip").display().to_string();
    let images = data.join("suite/data").display().to_string();
    let classes = json(&data.join("suite/data/classes.json"))["fashion"].to_string();
    let mut text = format!("[vars]\nbits = 4\ntasks = {TASKS:?}\n");
    for task in TASKS {
        let files = match task {
            "mnist" => format!(
                "format = \"idx\"\nimages = \"{images}/mnist/t10k-images-idx3-ubyte.gz\"\nlabels = \"{images}/mnist/t10k-labels-idx1-ubyte.gz\"\n"
            ),
            "notmnist" => format!(
                "format = \"idx\"\nimages = \"{images}/notmnist/t10k-images-idx3-ubyte\"\nlabels = \"{images}/notmnist/t10k-labels-idx1-ubyte\"\n"
            ),
            "cifar10" => format!("format = \"cifar\"\npath = \"{images}/cifar10\"\nsplit = \"test\"\n"),
            "gtsrb" => format!("format = \"parquet\"\npath = \"{images}/gtsrb\"\nsplit = \"test\"\n"),
            "pneumonia" => {
                format!(
                    "format = \"npz\"\npath = \"{images}/pneumonia/pneumoniamnist.npz\"\nsplit = \"test\"\n"
                )
            }
            _ => format!(
                "format = \"folder\"\npath = \"{images}/fashion\"\nsplit = \"test\"\nclasses = {classes}\n"
            ),
        };
        write!(text, "[vars.datasets.{task}]\n{files}head = \"{clip}/head_{task}.safetensors\"\n").unwrap();
    }
    write!(
        text,
        "[stage.base]\nkind = \"load\"\npath = \"{clip}/base\"\n\
         [stage.tuned]\nkind = \"load\"\neach = {{ task = \"${{tasks}}\" }}\npath = \"{clip}/ft_${{task}}.safetensors\"\n\
         [stage.deltas]\nkind = \"diff\"\nfrom = {{ base = \"base\", tuned = \"tuned\" }}\n{stages}"
    )
    .unwrap();
    text
}

pub(crate) fn evaluate(data: &Path, name: &str, model: &str) -> String {
    let suite = data.join("suite").display().to_string();
    format!(
        "[stage.{name}]\nkind = \"evaluate\"\nfrom = {{ model = \"{model}\", origin = \"base\" }}\ngraph = \"{suite}/onnx/clip_base.onnx\"\n\
         preprocess = \"{suite}/clip/base/preprocessor_config.json\"\ndataset = \"${{datasets}}\"\n"
    )
}

/// The stages of a shipped pipeline from a comment on, on the suite's graph.
pub(crate) fn shipped_stages(data: &Path, name: &str, from: &str) -> String {
    let text = shipped(name);
    let stages = &text[text.find(from).expect("the part that matters")..];
    let graph = "graph = \"quickstart/clip_vision.onnx\"";
    assert!(stages.contains(graph));
    let suite = data.join("suite").display().to_string();
    let own = format!(
        "graph = \"{suite}/onnx/clip_base.onnx\"\npreprocess = \"{suite}/clip/base/preprocessor_config.json\""
    );
    stages.replace(graph, &own)
}

/// Compares a stage's answers; `expected` gives what is published for a task.
#[track_caller]
pub(crate) fn compare(run: &Run, stage: &str, vars: &str, expected: impl Fn(&str) -> Value) {
    let correct = run.correct();
    let mut differences = Vec::new();
    for task in TASKS {
        let (actual, n) = correct[&(stage.to_owned(), vars.to_owned(), task.to_owned())];
        let published = expected(task);
        assert_eq!(published["n"], n, "{stage} {vars} {task}");
        let published = published["correct"].as_u64().unwrap();
        assert_correct(&format!("{stage} {vars} {task}"), actual, published, n);
        differences.push(actual as i64 - published as i64);
    }
    println!("{stage} {vars}: {differences:?}");
}

#[test]
fn merged_models_score_as_published() {
    let Some(data) = test_data("merged_models_score_as_published") else { return };
    let lab = Lab::empty();
    let stages = "[stage.averaged]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"deltas\" }\nmethod = \"average\"\n\
                  [stage.added]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"deltas\" }\nmethod = \"task-arithmetic\"\nscale = 0.3\n\
                  [stage.packed]\nkind = \"quantize\"\nfrom = \"deltas\"\nbits = \"${bits}\"\n\
                  [stage.merged]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"packed\" }\nmethod = \"task-arithmetic\"\nscale = 0.3\n\
                  [stage.selected]\nkind = \"quantize\"\nfrom = \"deltas\"\nbits = \"${bits}\"\nselect = \"tvq\"\n\
                  [stage.merged_b]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"selected\" }\nmethod = \"task-arithmetic\"\nscale = 0.3\n"
        .to_owned()
        + &evaluate(&data, "base_scores", "base")
        + &evaluate(&data, "averaged_scores", "averaged")
        + &evaluate(&data, "added_scores", "added")
        + &evaluate(&data, "merged_scores", "merged")
        + &evaluate(&data, "merged_b_scores", "merged_b");
    lab.write("pipeline.toml", &pipeline(&data, &stages));
    let run = lab.run(&["--set", "bits=8,4,3,2"]);
    let results = json(&data.join("suite/results.json"));
    let goldens = json(&data.join("goldens/public/accuracy.json"));
    let six = &results["merge_public6"];
    compare(&run, "base_scores", "", |task| results["base"][task].clone());
    compare(&run, "averaged_scores", "", |task| six["weight_average"][task].clone());
    compare(&run, "added_scores", "", |task| six["task_arithmetic"]["0.3"][task].clone());
    for bits in [8, 4, 3, 2] {
        let vars = format!("bits={bits}");
        compare(&run, "merged_scores", &vars, |task| {
            six["tvq_task_arithmetic"][format!("int{bits}")]["0.3"][task].clone()
        });
        compare(&run, "merged_b_scores", &vars, |task| {
            goldens["results"][format!("tvq/ta0.3_int{bits}_ruleB")][task].clone()
        });
    }
}

#[test]
fn single_experts_score_as_published() {
    let Some(data) = test_data("single_experts_score_as_published") else { return };
    let lab = Lab::empty();
    let clip = data.join("suite/clip").display().to_string();
    let stages = format!(
        "[stage.experts]\nkind = \"load\"\neach = {{ task = \"${{tasks}}\" }}\npath = \"{clip}/ft_${{task}}.safetensors\"\n\
         [stage.checkpoints]\nkind = \"quantize\"\nfrom = \"experts\"\nbits = \"${{bits}}\"\n\
         [stage.packed]\nkind = \"quantize\"\nfrom = \"deltas\"\nbits = \"${{bits}}\"\n\
         [stage.rebuilt]\nkind = \"merge\"\neach = {{ task = \"${{tasks}}\" }}\nfrom = {{ base = \"base\", vectors = \"packed[${{task}}]\" }}\nmethod = \"task-arithmetic\"\nscale = 1\n"
    ) + &evaluate(&data, "expert_scores", "experts")
        + &evaluate(&data, "checkpoint_scores", "checkpoints")
        + &evaluate(&data, "rebuilt_scores", "rebuilt");
    lab.write("pipeline.toml", &pipeline(&data, &stages));
    let run = lab.run(&["--set", "bits=8,4,3,2"]);
    let results = json(&data.join("suite/results.json"));
    compare(&run, "expert_scores", "", |task| results["finetuned"][task].clone());
    for bits in [8, 4, 3, 2] {
        let (vars, name) = (format!("bits={bits}"), format!("int{bits}"));
        compare(&run, "checkpoint_scores", &vars, |task| results["single_task_fq"][task][&name].clone());
        compare(&run, "rebuilt_scores", &vars, |task| results["single_task_tvq"][task][&name].clone());
    }
}

#[test]
fn merged_tensors_equal_those_of_the_original_code() {
    let Some(data) = test_data("merged_tensors_equal_those_of_the_original_code") else { return };
    let lab = Lab::empty();
    let stages = "[stage.averaged]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"deltas\" }\nmethod = \"average\"\n\
                  [stage.added]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"deltas\" }\nmethod = \"task-arithmetic\"\nscale = \"${scale}\"\n";
    let text = pipeline(&data, stages).replace("bits = 4\n", "bits = 4\nscale = 0.3\n");
    lab.write("pipeline.toml", &text);
    let sweep = ["--set", "scale=0.1,0.2,0.3"];
    lab.run(&sweep);
    let mut configs = vec![("averaged".to_owned(), "averaged".to_owned(), "weight_average".to_owned())];
    for scale in ["0.1", "0.2", "0.3"] {
        configs.push((
            format!("added[scale={scale}]"),
            format!("added-scale={scale}"),
            format!("task_arithmetic_{scale}"),
        ));
    }
    for (unit, file, golden) in configs {
        lab.ok(["export", "pipeline.toml", &unit, "out"].iter().chain(&sweep));
        let actual = tensors::read(&lab.path(format!("out/{file}.safetensors")));
        assert_eq!(actual.len(), 104);
        let expected = tensors::read(&data.join(format!("goldens/public/basic/{golden}.safetensors")));
        assert!(!expected.is_empty());
        for (name, (_, values)) in &expected {
            // Some are stored in part: `name[0:16]` is the first 16 rows.
            let whole = name.split('[').next().unwrap();
            assert_close(&format!("{golden} {name}"), &actual[whole].1[..values.len()], values);
        }
    }
}

#[test]
fn exported_codes_scales_and_zero_points_equal_those_of_the_original_code() {
    let Some(data) = test_data("exported_codes_scales_and_zero_points_equal_those_of_the_original_code")
    else {
        return;
    };
    let lab = Lab::empty();
    lab.write(
        "pipeline.toml",
        &pipeline(&data, "[stage.packed]\nkind = \"quantize\"\nfrom = \"deltas\"\nbits = \"${bits}\"\n"),
    );
    let goldens = tensors::read_stored(&data.join("goldens/public/tvq/tensors.safetensors"));
    let sweep = ["--set", "bits=8,4,3,2"];
    lab.run(&sweep);
    lab.ok(["export", "pipeline.toml", "packed", "out"].iter().chain(&sweep));
    let mut compared = 0;
    for (name, golden) in goldens.iter().filter(|(name, _)| name.ends_with("|codes")) {
        let parts: Vec<&str> = name.split('|').collect();
        let [scheme, task, tensor, _] = parts[..] else { continue };
        let Some(bits) = scheme.strip_prefix("tvq").and_then(|bits| bits.parse::<u8>().ok()) else {
            continue;
        };
        let file = format!("out/packed-bits={bits}-{task}");
        let bytes = fs_err::read(lab.path(format!("{file}.safetensors"))).unwrap();
        let manifest = json(&lab.path(format!("{file}.manifest.json")));
        let index =
            manifest["tensors"].as_array().unwrap().iter().position(|entry| entry["name"] == tensor).unwrap();
        let stored = &manifest["layout"]["packed"]["tensors"][index];
        let affine = &stored["encoding"]["affine"];
        let expected = tensors::read_stored(&data.join("goldens/public/tvq/tensors.safetensors"));
        let scale_zp = &expected[&format!("{scheme}|{task}|{tensor}|scale_zp")].data;
        let float = |value: &Value| value.as_f64().unwrap() as f32;
        let actual = [float(&affine["scale"][0]), float(&affine["zero_point"][0])];
        assert_eq!(actual.map(f32::to_le_bytes).concat(), *scale_zp, "{name}");

        let (offset, length) =
            (stored["offset"].as_u64().unwrap() as usize, stored["length"].as_u64().unwrap() as usize);
        let mut codes = vec![0; golden.data.len()];
        unpack(&bytes[offset..offset + length], Bits::new(bits).unwrap(), &mut codes);
        assert_eq!(length, (golden.data.len() * usize::from(bits)).div_ceil(8), "{name} is not packed");
        assert!(codes == golden.data, "{name}: the codes differ");
        compared += 1;
    }
    assert!(compared >= 8, "only {compared} tensors were compared");
}

#[test]
fn the_selection_of_the_tvq_authors_is_theirs() {
    let Some(data) = test_data("the_selection_of_the_tvq_authors_is_theirs") else { return };
    let lab = Lab::empty();
    lab.write(
        "pipeline.toml",
        &pipeline(
            &data,
            "[stage.packed]\nkind = \"quantize\"\nfrom = \"deltas\"\nbits = 4\nselect = \"tvq\"\n",
        ),
    );
    lab.run(&[]);
    let rules = json(&data.join("goldens/public/tvq/meta.json"))["rules"].as_object().unwrap().clone();
    assert_eq!(rules.len(), 104);
    let shown = lab.json(&["show", "pipeline.toml", "packed[mnist]"]);
    let shown = shown[0]["output"]["tensors"].as_array().unwrap();
    assert_eq!(shown.len(), 104);
    for tensor in shown {
        let name = tensor["name"].as_str().unwrap();
        let bits = if rules[name]["B"].as_bool().unwrap() { 4 } else { 32 };
        assert_eq!(tensor["bits"], bits, "{name}");
    }
}

#[test]
fn half_precision_and_sharded_checkpoints_load_and_score() {
    let Some(data) = test_data("half_precision_and_sharded_checkpoints_load_and_score") else { return };
    let lab = Lab::empty();
    let clip = data.join("suite/clip").display().to_string();
    let stages = format!(
        "[stage.half]\nkind = \"load\"\npath = \"{clip}/base_bf16.safetensors\"\n\
         [stage.sharded]\nkind = \"load\"\npath = \"{clip}/base_sharded\"\n\
         [stage.index]\nkind = \"load\"\npath = \"{clip}/base_sharded/model.safetensors.index.json\"\n"
    ) + &evaluate(&data, "base_scores", "base")
        + &evaluate(&data, "half_scores", "half")
        + &evaluate(&data, "sharded_scores", "sharded")
        // The graph's origin may be sharded too.
        + &evaluate(&data, "index_scores", "index").replace("origin = \"base\"", "origin = \"sharded\"");
    lab.write("pipeline.toml", &pipeline(&data, &stages));
    let run = lab.run(&[]);
    let base = json(&data.join("suite/results.json"))["base"].clone();
    for stage in ["base_scores", "sharded_scores", "index_scores"] {
        compare(&run, stage, "", |task| base[task].clone());
    }
    let correct = run.correct();
    for task in TASKS {
        let of = |stage: &str| correct[&(stage.to_owned(), String::new(), task.to_owned())].0;
        assert_eq!(of("sharded_scores"), of("base_scores"));
        assert_eq!(of("index_scores"), of("base_scores"));
        // bf16 keeps 8 bits of each weight: other weights, nearly the same answers.
        assert!(
            of("half_scores").abs_diff(of("base_scores")) <= 30,
            "{task}: {} and {}",
            of("half_scores"),
            of("base_scores")
        );
    }
}

/// The weights of every linear layer and of the patch embedding, rounded to `bits` per output channel as the suite's script does: s =
/// max|w| / (2^(b−1) − 1), w' = s · round(w/s).
fn rounded(tensors: &mut std::collections::BTreeMap<String, tensors::Stored>, bits: u32) {
    let most = ((1u32 << (bits - 1)) - 1) as f32;
    let weights = tensors.iter_mut().filter(|(name, tensor)| {
        name.ends_with(".weight") && (tensor.shape.len() == 2 || tensor.shape.len() == 4)
    });
    for (_, tensor) in weights {
        let row = tensor.shape[1..].iter().product::<usize>() * 4;
        for channel in tensor.data.chunks_exact_mut(row) {
            let values: Vec<f32> =
                channel.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
            let scale = values.iter().fold(0f32, |largest, value| largest.max(value.abs())) / most;
            for (bytes, value) in channel.chunks_exact_mut(4).zip(values) {
                let code = (value / scale).round_ties_even().clamp(-most, most);
                bytes.copy_from_slice(&(code * scale).to_le_bytes());
            }
        }
    }
}

#[test]
fn a_distilled_deit_scores_as_published_at_every_width() {
    let Some(data) = test_data("a_distilled_deit_scores_as_published_at_every_width") else { return };
    let lab = Lab::empty();
    let suite = data.join("suite");
    let classes = json(&suite.join("data/classes.json"))["fashion"].to_string();
    let mut text = format!(
        "[vars]\nbits = 8\n[stage.deit]\nkind = \"load\"\npath = \"{0}/deit\"\n\
         [stage.rounded]\nkind = \"load\"\npath = \"int${{bits}}.safetensors\"\n\
         [vars.datasets.fashion]\nformat = \"folder\"\npath = \"{0}/data/fashion\"\nsplit = \"test\"\nclasses = {classes}\n",
        suite.display()
    );
    for (name, model) in [("scores", "deit"), ("rounded_scores", "rounded")] {
        text += &format!(
            "[stage.{name}]\nkind = \"evaluate\"\nfrom = {{ model = \"{model}\", origin = \"deit\" }}\ngraph = \"{0}/onnx/deit.onnx\"\n\
             preprocess = \"{0}/clip/base/preprocessor_config.json\"\ndataset = \"${{datasets}}\"\n",
            suite.display()
        );
    }
    lab.write("pipeline.toml", &text);
    for bits in [8, 4, 3] {
        let mut stored = tensors::read_stored(&suite.join("deit/model.safetensors"));
        rounded(&mut stored, bits);
        tensors::write_stored(&lab.path(format!("int{bits}.safetensors")), &stored);
    }
    let correct = lab.run(&["--set", "bits=8,4,3"]).correct();
    let results = json(&suite.join("results.json"))["deit"]["results"].clone();
    for (stage, vars, row) in [
        ("scores", "", "fp32"),
        ("rounded_scores", "bits=8", "int8"),
        ("rounded_scores", "bits=4", "int4"),
        ("rounded_scores", "bits=3", "int3"),
    ] {
        let (actual, n) = correct[&(stage.to_owned(), vars.to_owned(), "fashion".to_owned())];
        let published = results[row]["correct"].as_u64().unwrap();
        assert_eq!(results[row]["n"], n);
        assert_correct(&format!("deit {row}"), actual, published, n);
        println!("deit {row}: {}", actual as i64 - published as i64);
    }
}
