//! Models as files: ONNX graphs with packed weights, and packages, scored as the files that they are.

use crate::suite::{TASKS, json};
use crate::util::{Lab, Run, quickstart, test_data};
use merganser_onnx::proto::ModelProto;
use prost::Message;
use std::fmt::Write;
use std::path::Path;

/// The correct answers of an evaluation on one task, and how many images there were.
#[track_caller]
fn correct(run: &Run, stage: &str, task: &str) -> (u64, u64) {
    run.correct()[&(stage.to_owned(), String::new(), task.to_owned())]
}

/// Fails if a model answers more than `points` in a hundred worse than another.
#[track_caller]
fn assert_drop(run: &Run, model: &str, against: &str, task: &str, points: f64) {
    let ((actual, n), (expected, _)) = (correct(run, model, task), correct(run, against, task));
    let drop = 100.0 * (expected as f64 - actual as f64) / n as f64;
    println!("{model} {task}: {actual} of {n}, {against} {expected}: {drop:.2} points lost");
    assert!(drop <= points, "{model} on {task}: {actual} correct of {n}, {against} has {expected}");
}

/// Weights that are kept as they are, as a TOML value.
const KEPT: &str = "[{ match = \"*.bias\", keep = true }, { match = \"*norm*\", keep = true }, { match = \"*layrnorm*\", keep = true }, \
     { match = \"*pos_embed\", keep = true }, { match = \"*position_embedding*\", keep = true }, { match = \"*class_embedding\", keep = true }, \
     { match = \"*_token\", keep = true }]";

/// Stages that quantize `model`, write it into `graph` and score the file: `NAME`, `NAME_onnx` and `NAME_scores`.
fn compressed(
    name: &str,
    model: &str,
    origin: &str,
    graph: &Path,
    scheme: &str,
    export: &str,
    evaluate: &str,
) -> String {
    format!(
        "[stage.{name}]\nkind = \"quantize\"\nfrom = \"{model}\"\n{scheme}\nrules = {KEPT}\n\
         [stage.{name}_onnx]\nkind = \"export\"\nformat = \"onnx\"\nfrom = {{ model = \"{name}\", origin = \"{origin}\" }}\n\
         graph = \"{}\"\nto = \"{name}\"\n{export}\n\
         [stage.{name}_scores]\nkind = \"evaluate\"\nfrom = \"{name}_onnx\"\n{evaluate}\n",
        graph.display()
    )
}

const INT8: &str = "scheme = \"symmetric\"\nbits = 8";
const INT4: &str = "scheme = \"symmetric\"\nbits = 4\ngranularity = { group = 32 }";
const INT3: &str = "scheme = \"asymmetric\"\nbits = 3\ngranularity = \"channel\"";

#[test]
fn the_shipped_pipeline_scores_the_files() {
    let pipeline = quickstart().with_file_name("compress.toml");
    let lab = Lab::empty();
    let file = pipeline.to_str().unwrap();
    let run = lab.run_file(file, &[]);
    assert_eq!(correct(&run, "deit_scores", "digits"), (546, 600));
    for (model, against, points) in [
        ("deit_int8_scores", "deit_scores", 1.0),
        ("deit_integer_scores", "deit_scores", 1.0),
        ("deit_int4_scores", "deit_scores", 2.0),
        ("clip_int8_scores", "clip_scores", 1.0),
        ("clip_int4_scores", "clip_scores", 2.0),
    ] {
        assert_drop(&run, model, against, "digits", points);
    }
    // The package holds what the graph holds.
    let package = correct(&run, "deit_package_scores", "digits").0;
    assert!(package.abs_diff(correct(&run, "deit_int4_scores", "digits").0) <= 1);

    // The table says how large and how fast the files are; what was measured is remembered when nothing runs again.
    let table = lab.ok(["run", file]).stdout;
    println!("{table}");
    assert!(table.contains("images/s"), "{table}");
    let row = |model: &str| table.lines().find(|line| line.starts_with(&format!("{model} "))).unwrap();
    let pace: f64 = row("deit_int4_onnx").split_whitespace().last().unwrap().parse().unwrap();
    assert!(pace > 1.0, "{table}");
    let again = lab.run_file(file, &[]);
    assert_eq!(again.ran().len(), 0);
    let record = lab.json(&["run", file]);
    let stages = record["stages"].as_array().unwrap();
    let scored = stages.iter().find(|stage| stage["stage"] == "deit_int8_scores").unwrap();
    assert_eq!(scored["pace"]["images"], 600, "{scored}");

    let shown = lab.ok(["show", file, "deit_int4_onnx"]).stdout;
    assert!(shown.contains("matmul-nbits") && shown.contains("unpacked"), "{shown}");
    let shown = lab.ok(["show", file, "deit_integer_onnx"]).stdout;
    assert!(shown.contains("layers compute with integers"), "{shown}");
}

#[test]
fn a_package_on_another_machine_has_the_same_values() {
    let lab = Lab::small();
    for (scheme, name) in
        [(INT8, "int8"), (INT4, "int4"), (INT3, "int3"), ("bits = 5\nresidual_stages = 2", "residual")]
    {
        lab.write(
            "pipeline.toml",
            &format!(
                "[stage.base]\nkind = \"load\"\npath = \"data/base.safetensors\"\n\
                 [stage.tuned]\nkind = \"load\"\npath = \"data/ft_digits.safetensors\"\n\
                 [stage.deltas]\nkind = \"diff\"\nfrom = {{ base = \"base\", tuned = \"tuned\" }}\n\
                 [stage.packed]\nkind = \"quantize\"\nfrom = \"tuned\"\n{scheme}\nrules = {KEPT}\n\
                 [stage.packed_deltas]\nkind = \"quantize\"\nfrom = \"deltas\"\n{scheme}\nrules = {KEPT}\n\
                 [stage.package]\nkind = \"export\"\nformat = \"package\"\nfrom = \"packed\"\nto = \"out/model\"\n\
                 [stage.package_of_deltas]\nkind = \"export\"\nformat = \"package\"\nfrom = \"packed_deltas\"\nto = \"out/deltas\"\n\
                 [stage.scores]\nkind = \"evaluate\"\nfrom = {{ model = \"packed\", origin = \"base\" }}\n{EVALUATE}"
            ),
        );
        let here = lab.run(&[]);
        // Another machine: nothing but the folder that was written, and what everyone has.
        let other = Lab::small();
        fs_err::rename(lab.path("out"), other.path("out")).unwrap();
        other.write(
            "pipeline.toml",
            &format!(
                "[stage.base]\nkind = \"load\"\npath = \"data/base.safetensors\"\n\
                 [stage.model]\nkind = \"load\"\npath = \"out/model\"\n\
                 [stage.deltas]\nkind = \"load\"\npath = \"out/deltas\"\n\
                 [stage.merged]\nkind = \"merge\"\nfrom = {{ base = \"base\", vectors = \"deltas\" }}\nmethod = \"task-arithmetic\"\n\
                 [stage.scores]\nkind = \"evaluate\"\nfrom = {{ model = \"model\", origin = \"base\" }}\n{EVALUATE}"
            ),
        );
        let there = other.run(&[]);
        // Logits and all: the same artifact.
        assert_eq!(here.artifacts()["scores[digits]"], there.artifacts()["scores[digits]"], "{name}");
        let show = |lab: &Lab, stage: &str| {
            lab.json(&["show", "pipeline.toml", stage])[0]["output"]["tensors"].clone()
        };
        assert_eq!(show(&lab, "packed"), show(&other, "model"), "{name}: bits and bytes of every tensor");
        let size = fs_err::metadata(other.path("out/model/model.safetensors")).unwrap().len();
        println!("{name}: {size} bytes");
    }
}

/// What tasks share is written once, for all of them; what is read back, on another machine too, are the same values.
#[test]
fn a_shared_base_is_packaged_once() {
    const MERGED: &str = "[stage.merged]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"VECTORS\" }\nmethod = \"task-arithmetic\"\nscale = 0.4\n";
    let lab = Lab::small();
    lab.append(
        "pipeline.toml",
        &format!(
            "[stage.shared]\nkind = \"quantize\"\nfrom = \"deltas\"\nscheme = \"rtvq\"\nbits = 2\nrules = {KEPT}\n\
             [stage.package]\nkind = \"export\"\nformat = \"package\"\nfrom = \"shared\"\nto = \"out\"\n\
             include = [\"base-notes.safetensors\"]\n{}{}",
            MERGED.replace("stage.merged", "stage.merged_here").replace("VECTORS", "shared"),
            MERGED.replace("stage.merged", "stage.merged_files").replace("VECTORS", "package"),
        ),
    );
    // A file of the user's goes with each task, whatever its name.
    lab.write("base-notes.safetensors", "notes");
    let run = lab.run(&["--stage", "merged_here", "--stage", "merged_files"]);
    let tensors = |lab: &Lab, run: &Run, stage: &str| {
        json(&lab.object(run.artifacts()[stage]))["blobs"][0]["digest"].as_str().unwrap().to_owned()
    };
    let merged = tensors(&lab, &run, "merged_here");
    assert_eq!(
        merged,
        tensors(&lab, &run, "merged_files"),
        "what `export` leaves is read like what it was made of"
    );

    // One base for two tasks: 3 bits once and 2 bits each, and what is kept as it is.
    let files = |folder: &Path| -> Vec<String> {
        let entries = fs_err::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = entries.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    };
    let found = files(&lab.path("out"));
    assert!(
        found.len() == 3 && found[0].starts_with("base-") && found[1..] == ["digits", "negative"],
        "{found:?}"
    );
    let base = found[0].as_str();
    let mut written = fs_err::metadata(lab.path("out").join(base)).unwrap().len();
    for task in &found[1..] {
        assert_eq!(files(&lab.path("out").join(task)), ["base-notes.safetensors", "model.safetensors"]);
        written += fs_err::metadata(lab.path("out").join(task).join("model.safetensors")).unwrap().len();
    }
    let shown = lab.json(&["show", "pipeline.toml", "shared"]);
    let stored = |unit: usize| shown[unit]["output"]["stored_bytes"].as_u64().unwrap();
    let needed = stored(1) + stored(2) + stored(3);
    println!("{written} bytes written, {needed} stored");
    assert!(written < needed + needed / 10, "{written} bytes written, {needed} are stored");
    let single: u64 = shown[2]["output"]["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tensor| {
            tensor["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).product::<u64>() * 4
        })
        .sum();
    assert!(written * 4 < 2 * single, "{written} bytes written, {single} for each task in single precision");

    // Another machine has the folder; for one task, its file and the base.
    let other = Lab::small();
    let load = |path: &str| {
        format!(
            "[stage.base]\nkind = \"load\"\npath = \"data/base.safetensors\"\n\
         [stage.vectors]\nkind = \"load\"\n{path}\n{}",
            MERGED.replace("VECTORS", "vectors")
        )
    };
    for task in ["digits", "negative"] {
        fs_err::create_dir_all(other.path("out").join(task)).unwrap();
        fs_err::copy(
            lab.path("out").join(task).join("model.safetensors"),
            other.path("out").join(task).join("model.safetensors"),
        )
        .unwrap();
    }
    fs_err::copy(lab.path("out").join(base), other.path("out").join(base)).unwrap();
    let both = load("each = { task = [\"digits\", \"negative\"] }\npath = \"out/${task}\"");
    other.write("pipeline.toml", &both);
    assert_eq!(merged, tensors(&other, &other.run(&[]), "merged"));
    let inspected = other.ok(["inspect", "out/digits", "--json"]).json();
    let read: Vec<&str> =
        inspected["files"].as_array().unwrap().iter().map(|file| file["path"].as_str().unwrap()).collect();
    assert!(
        read.len() == 2 && read[0].ends_with("model.safetensors") && read[1].ends_with(base),
        "{read:?} for a package and its base"
    );
    other.write("pipeline.toml", &load("path = \"out/digits\""));
    let above = tensors(&other, &other.run(&[]), "merged");
    fs_err::rename(other.path("out").join(base), other.path("out/digits").join(base)).unwrap();
    assert_eq!(above, tensors(&other, &other.run(&[]), "merged"), "the base beside the file");

    // Damage: no base, another base of the same size.
    let path = other.path("out/digits").join(base);
    let mut bytes = fs_err::read(&path).unwrap();
    fs_err::remove_file(&path).unwrap();
    let refused = other.try_run("pipeline.toml", &[]);
    assert_ne!(refused.code, 0, "{refused}");
    refused.tells(&["model.safetensors", base, "neither"]);
    *bytes.last_mut().unwrap() ^= 1;
    fs_err::write(&path, &bytes).unwrap();
    let refused = other.try_run("pipeline.toml", &[]);
    assert_ne!(refused.code, 0, "{refused}");
    refused.tells(&[base, "BLAKE3", "asks"]);
}

const EVALUATE: &str = "graph = \"data/clip_vision.onnx\"\n[stage.scores.dataset.digits]\nformat = \"idx\"\n\
     images = \"data/digits-images.idx.gz\"\nlabels = \"data/digits-labels.idx.gz\"\nhead = \"data/head_digits.safetensors\"\nlimit = 100\n";

#[test]
fn what_cannot_be_exported_or_scored_says_so() {
    let lab = Lab::small();
    let base = "[stage.base]\nkind = \"load\"\npath = \"data/base.safetensors\"\n\
                [stage.tuned]\nkind = \"load\"\npath = \"data/ft_digits.safetensors\"\n\
                [stage.deltas]\nkind = \"diff\"\nfrom = { base = \"base\", tuned = \"tuned\" }\n";
    let data = EVALUATE.split_once('\n').unwrap().1;
    let graph = "graph = \"data/clip_vision.onnx\"";
    for (stages, message) in [
        (
            format!("[stage.files]\nkind = \"export\"\nformat = \"onnx\"\nfrom = \"base\"\n{graph}\n"),
            "needs the checkpoint that the graph was exported from on port `origin`",
        ),
        (
            format!(
                "[stage.files]\nkind = \"export\"\nformat = \"onnx\"\nfrom = {{ model = \"deltas\", origin = \"base\" }}\n{graph}\n"
            ),
            "takes a checkpoint, not task vectors",
        ),
        (
            "[stage.files]\nkind = \"export\"\nformat = \"onyx\"\nfrom = \"base\"\n".to_owned(),
            "unknown format `onyx`",
        ),
        (
            format!(
                "[stage.seen]\nkind = \"calibrate\"\nfrom = {{ model = \"tuned\", origin = \"base\" }}\n{graph}\n{}\
                 [stage.files]\nkind = \"export\"\nformat = \"onnx\"\nfrom = {{ model = \"tuned\", origin = \"base\", statistics = \"seen\" }}\n\
                 weights = \"unpacked\"\n{graph}\n",
                data.replace("stage.scores", "stage.seen")
            ),
            "with port `statistics`, `weights` must be `auto` or `dequantize-linear`",
        ),
        (
            format!(
                "[stage.scores]\nkind = \"evaluate\"\nfrom = {{ model = \"tuned\", origin = \"base\" }}\n{data}"
            ),
            "missing key `graph`",
        ),
        (
            format!("[stage.scores]\nkind = \"evaluate\"\nfrom = \"tuned\"\n{graph}\n{data}"),
            "needs something on port `origin`",
        ),
        (
            format!(
                "[stage.files]\nkind = \"export\"\nformat = \"onnx\"\nfrom = {{ model = \"tuned\", origin = \"base\" }}\n{graph}\n\
                 [stage.scores]\nkind = \"evaluate\"\nfrom = {{ model = \"files\", origin = \"base\" }}\n{graph}\n{data}"
            ),
            "has its own",
        ),
    ] {
        lab.write("pipeline.toml", &format!("{base}{stages}"));
        let outcome = lab.call(["check", "pipeline.toml"]);
        assert_eq!(outcome.code, 2, "{outcome}");
        // Long messages are broken into lines.
        let text =
            outcome.stderr.split_whitespace().filter(|word| *word != "|").collect::<Vec<_>>().join(" ");
        assert!(text.contains(message), "{message}\n{outcome}");
    }
    // A graph of another model.
    lab.write(
        "pipeline.toml",
        &format!("{base}[stage.files]\nkind = \"export\"\nformat = \"onnx\"\nfrom = {{ model = \"base\", origin = \"tuned\" }}\n{graph}\n"),
    );
    let outcome = lab.call(["run", "pipeline.toml"]);
    assert_eq!(outcome.code, 1, "{outcome}");
    outcome.tells(&["cannot be bound into", "clip_vision.onnx"]);
}

/// What a file should have: codes and scales of packed tensors, f32 of the others, and the graph without its weights.
fn theoretical(checkpoint: &Path, graph: &Path, bits: f64, scale_bytes: impl Fn(&[usize]) -> f64) -> f64 {
    let file = fs_err::read(checkpoint).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let weights: f64 = tensors
        .tensors()
        .iter()
        .map(|(name, view)| {
            let n = view.shape().iter().product::<usize>() as f64;
            let kept = name.rsplit('.').next() == Some("bias")
                || ["norm", "layrnorm", "pos_embed", "position_embedding", "class_embedding", "_token"]
                    .iter()
                    .any(|part| name.contains(part));
            if kept { 4.0 * n } else { n * bits / 8.0 + scale_bytes(view.shape()) }
        })
        .sum();
    let bytes = fs_err::read(graph).unwrap();
    let model = ModelProto::decode(bytes.as_slice()).unwrap();
    let constants = &model.graph.as_ref().unwrap().initializer;
    let large = constants.iter().filter_map(|tensor| tensor.raw_data.as_ref()).map(prost::bytes::Bytes::len);
    let skeleton = bytes.len() - large.filter(|length| *length > 64).sum::<usize>();
    weights + skeleton as f64
}

#[track_caller]
fn assert_size(path: &Path, expected: f64) {
    let actual = fs_err::metadata(path).unwrap().len() as f64;
    let off = 100.0 * (actual / expected - 1.0);
    println!("{}: {actual} bytes, {expected} in theory: {off:+.2} %", path.file_name().unwrap().display());
    assert!(off.abs() <= 3.0, "{} has {actual} bytes, {expected} in theory", path.display());
}

fn channels(shape: &[usize]) -> f64 {
    4.0 * shape[0] as f64
}

fn groups(shape: &[usize]) -> f64 {
    4.0 * (shape.iter().product::<usize>() / 32) as f64
}

#[test]
fn a_quantized_deit_runs_in_onnx_runtime() {
    let Some(data) = test_data("a_quantized_deit_runs_in_onnx_runtime") else { return };
    let suite = data.join("suite");
    let lab = Lab::empty();
    let (checkpoint, graph) = (suite.join("deit/model.safetensors"), suite.join("onnx/deit.onnx"));
    let classes = &json(&suite.join("data/classes.json"))["fashion"];
    let dataset = format!(
        "preprocess = \"{0}/clip/base/preprocessor_config.json\"\ndataset.fashion = {{ format = \"folder\", path = \"{0}/data/fashion\", split = \"test\", classes = {classes} }}",
        suite.display()
    );
    let evaluate = |name: &str, model: &str| {
        format!(
            "[stage.{name}]\nkind = \"evaluate\"\nfrom = {{ model = \"{model}\", origin = \"deit\" }}\ngraph = \"{}\"\n{dataset}\n",
            graph.display()
        )
    };
    let mut text = format!("[stage.deit]\nkind = \"load\"\npath = \"{}\"\n", checkpoint.display());
    for (name, scheme) in [("int8", INT8), ("int4", INT4), ("int3", INT3), ("nf4", "scheme = \"nf4\"")] {
        text += &compressed(name, "deit", "deit", &graph, scheme, "", &dataset);
        text += &evaluate(&format!("{name}_injected"), name);
    }
    text += &evaluate("fp32", "deit");
    // Weights and activations in eight bits, calibrated on images of the training split.
    let seen = dataset.replace("split = \"test\"", "split = \"train\", limit = 256");
    write!(
        text,
        "[stage.seen]\nkind = \"calibrate\"\nfrom = {{ model = \"deit\", origin = \"deit\" }}\ngraph = \"{}\"\n{seen}\nsensitivity_images = 0\n",
        graph.display()
    )
    .unwrap();
    text += &compressed("integer", "deit", "deit", &graph, INT8, "", &dataset)
        .replace("origin = \"deit\" }", "origin = \"deit\", statistics = \"seen\" }");
    lab.write("pipeline.toml", &text);
    let run = lab.run(&[]);
    assert_drop(&run, "int8_scores", "fp32", "fashion", 1.0);
    assert_drop(&run, "integer_scores", "fp32", "fashion", 1.0);
    let shown = lab.json(&["show", "pipeline.toml", "integer_onnx"]);
    let layers = &shown[0]["output"]["graph"]["integer_layers"];
    println!("{layers} layers compute with integers");
    assert!(layers.as_u64().unwrap() >= 24, "{layers}");
    assert_drop(&run, "int4_scores", "fp32", "fashion", 2.0);
    for name in ["int8", "int4", "int3", "nf4"] {
        // The same weights: answers differ by sums in another order at most.
        let (file, injected) = (
            correct(&run, &format!("{name}_scores"), "fashion").0,
            correct(&run, &format!("{name}_injected"), "fashion").0,
        );
        assert!(file.abs_diff(injected) <= 1, "{name}: {file} in the file, {injected} injected");
    }
    let size = |name: &str, bits: f64, scales: fn(&[usize]) -> f64| {
        assert_size(&lab.path(name).join("model.onnx"), theoretical(&checkpoint, &graph, bits, scales));
    };
    size("int8", 8.0, channels);
    size("int4", 4.0, groups);
    size("int3", 3.0, |shape| 2.0 * channels(shape));
    println!("{}", lab.ok(["run", "pipeline.toml"]).stdout);
}

#[test]
fn quantized_clip_experts_run_in_onnx_runtime() {
    let Some(data) = test_data("quantized_clip_experts_run_in_onnx_runtime") else { return };
    let suite = data.join("suite");
    let lab = Lab::empty();
    let graph = suite.join("onnx/clip_base.onnx");
    let evaluate = format!(
        "preprocess = \"{}/clip/base/preprocessor_config.json\"\ndataset = \"${{datasets}}\"",
        suite.display()
    );
    let mut stages = crate::suite::evaluate(&data, "fp32", "tuned");
    for (name, scheme) in [("int8", INT8), ("int4", INT4)] {
        write!(stages, "{}", compressed(name, "tuned", "base", &graph, scheme, "", &evaluate)).unwrap();
    }
    // Weights and activations in eight bits, each expert calibrated on images of its own task.
    write!(
        stages,
        "[stage.found]\nkind = \"calibrate\"\nfrom = {{ model = \"tuned\", origin = \"base\" }}\ngraph = \"{}\"\n{}\nsensitivity_images = 0\n",
        graph.display(),
        evaluate.replace("datasets", "seen")
    )
    .unwrap();
    stages += &compressed("integer", "tuned", "base", &graph, INT8, "", &evaluate)
        .replace("origin = \"base\" }", "origin = \"base\", statistics = \"found\" }");
    lab.write("pipeline.toml", &crate::tuned::with_calibration(&data, "", None, &stages));
    let run = lab.run(&[]);
    for task in TASKS {
        assert_drop(&run, "int8_scores", "fp32", task, 1.0);
        assert_drop(&run, "integer_scores", "fp32", task, 1.0);
        assert_drop(&run, "int4_scores", "fp32", task, 2.0);
        for (name, bits, scales) in [("int8", 8.0, channels as fn(&[usize]) -> f64), ("int4", 4.0, groups)] {
            let checkpoint = suite.join(format!("clip/ft_{task}.safetensors"));
            assert_size(
                &lab.path(name).join(task).join("model.onnx"),
                theoretical(&checkpoint, &graph, bits, scales),
            );
        }
    }
}
