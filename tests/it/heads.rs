//! Heads: in every form that the field stores them in, made of class names, and those that do not fit.

use crate::tensors::{Stored, read_stored, single, write_stored};
use crate::util::{Lab, Outcome, Run};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/data").join(name)
}

fn fixture(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("onnx/tests/fixtures").join(name).display().to_string()
}

/// Logits [images, classes] of an evaluation.
fn logits(lab: &Lab, unit: &str) -> (Vec<usize>, Vec<f32>) {
    let files = lab.json(&["export", "pipeline.toml", unit, "out", "--overwrite"]);
    let stored = read_stored(&lab.path(files[0].as_str().unwrap())).remove("logits").unwrap();
    let values = stored.data.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]));
    (stored.shape, values.collect())
}

/// Scores the base on digits with a head.
fn with_head(lab: &Lab, head: &Path, more: &str) -> Outcome {
    lab.write(
        "pipeline.toml",
        &format!(
            "[stage.base]\nkind = \"load\"\npath = \"data/base.safetensors\"\n\
             [stage.scores]\nkind = \"evaluate\"\nfrom = {{ model = \"base\", origin = \"base\" }}\ngraph = \"data/clip_vision.onnx\"\n\
             [stage.scores.dataset.digits]\nformat = \"idx\"\nimages = \"data/digits-images.idx.gz\"\nlabels = \"data/digits-labels.idx.gz\"\n\
             limit = 40\nhead = \"{}\"\n{more}",
            head.display()
        ),
    );
    lab.try_run("pipeline.toml", &[])
}

#[test]
fn a_head_gives_the_same_logits_in_every_form() {
    let lab = Lab::small();
    let head = |path: &Path, more: &str| {
        let outcome = with_head(&lab, path, more);
        assert_eq!(outcome.code, 0, "{outcome}");
        logits(&lab, "scores[digits]").1
    };
    let plain = lab.path("data/head_digits.safetensors");
    let expected = head(&plain, "");
    assert_eq!(head(&data("heads/module.pt"), ""), expected, "a pickled module");
    assert_eq!(head(&data("heads/state_dict.pt"), ""), expected);

    let stored = read_stored(&plain);
    let renamed = |weight: &str, bias: &str| {
        let tensors = BTreeMap::from([
            (weight.to_owned(), stored["weight"].clone()),
            (bias.to_owned(), stored["bias"].clone()),
            // Whatever else a checkpoint holds is left alone.
            ("vit.encoder.weight".to_owned(), single(&[2, 2], &[1.0, 2.0, 3.0, f32::NAN])),
        ]);
        let path = lab.path("renamed.safetensors");
        write_stored(&path, &tensors);
        path
    };
    // Classifiers of transformers and timm follow no normalization, unless one is asked for.
    for (weight, bias) in [("classifier.weight", "classifier.bias"), ("head.weight", "head.bias")] {
        let path = renamed(weight, bias);
        assert_eq!(head(&path, "normalize = true\n"), expected);
        assert_eq!(head(&path, ""), head(&plain, "normalize = false\n"));
    }
    // A bare matrix is a head without bias.
    let weight = BTreeMap::from([("weight".to_owned(), stored["weight"].clone())]);
    write_stored(&lab.path("weight.safetensors"), &weight);
    assert_eq!(head(&data("heads/tensor.pt"), ""), head(&lab.path("weight.safetensors"), ""));
}

#[test]
fn a_head_in_another_order_than_the_labels_is_pointed_out() {
    let lab = Lab::small();
    let head = read_stored(&lab.path("data/head_digits.safetensors"));
    let reversed = |stored: &Stored| {
        let rows = stored.data.chunks_exact(stored.data.len() / 10).rev();
        Stored { data: rows.flatten().copied().collect(), ..stored.clone() }
    };
    let reversed = head.iter().map(|(name, stored)| (name.clone(), reversed(stored))).collect();
    write_stored(&lab.path("reversed.safetensors"), &reversed);
    lab.edit("pipeline.toml", "[stage.base_scores]", "[stage.tuned_scores]");
    lab.edit("pipeline.toml", "model = \"base\"", "model = \"tuned\"");
    let right = lab.try_run("pipeline.toml", &["--stage", "tuned_scores"]);
    assert_eq!(right.code, 0, "{right}");
    assert!(!right.stderr.contains("different orders"), "{right}");
    lab.edit("pipeline.toml", "data/head_digits.safetensors", "reversed.safetensors");
    let wrong = lab.try_run("pipeline.toml", &["--stage", "tuned_scores"]);
    assert_eq!(wrong.code, 0, "{wrong}");
    wrong.tells(&[
        "warning",
        "`digits`: head and labels seem to have their classes in different orders",
        "classes renamed",
    ]);
}

#[test]
fn heads_that_do_not_fit_are_refused_with_both_sides() {
    let lab = Lab::small();
    let write = |tensors: &[(&str, Stored)]| {
        let tensors = tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
        write_stored(&lab.path("odd.safetensors"), &tensors);
        lab.path("odd.safetensors")
    };
    let zeros = |shape: &[usize]| single(shape, &vec![0.5; shape.iter().product()]);
    let fails = |path: &Path, more: &str, texts: &[&str]| {
        let outcome = with_head(&lab, path, more);
        assert_eq!(outcome.code, 1, "{outcome}");
        outcome.tells(texts);
    };
    let wide = write(&[("weight", zeros(&[10, 48]))]);
    fails(&wide, "", &["odd.safetensors", "expects embeddings of 48 values, the graph gives 64"]);
    let few = write(&[("weight", zeros(&[7, 64]))]);
    fails(&few, "", &["dataset `digits`", "has label", "but the head has 7 classes"]);
    let named = "classes = [\"a\", \"b\", \"c\", \"d\", \"e\", \"f\", \"g\", \"h\", \"i\", \"j\"]\n";
    let many = write(&[("weight", zeros(&[11, 64]))]);
    fails(
        &many,
        named,
        &["dataset `digits` has 10 classes, head", "has 11", "same classes in the same order"],
    );
    let crooked = write(&[("weight", zeros(&[10, 64])), ("bias", zeros(&[9]))]);
    fails(&crooked, "", &["tensor `bias`", "[9]", "expected [10]"]);
    let nameless = write(&[("matrix", zeros(&[10, 64])), ("other", zeros(&[10, 64]))]);
    fails(&nameless, "", &["has no tensor `weight`", "help: a head is"]);
    // Two classifiers answer for two tokens, and this graph gives one vector.
    let pair = [("head.weight", zeros(&[10, 64])), ("head_dist.weight", zeros(&[10, 64]))];
    fails(&write(&pair), "", &["has shape [40, 64]", "expected [images, 2, features]"]);
}

/// Scores the fixture's models on random images with heads made of class names.
fn zero_shot(lab: &Lab, text: &str, dataset: &str) -> Outcome {
    for file in ["vocab.json", "merges.txt", "images.idx.gz", "labels.idx.gz"] {
        crate::util::copy(&data("zero_shot").join(file), &lab.path(file));
    }
    let mut pipeline = String::new();
    for (model, file) in [("base", "base"), ("other", "perturbed")] {
        pipeline += &format!(
            "[stage.{model}]\nkind = \"load\"\npath = \"{}\"\n\
             [stage.{model}_scores]\nkind = \"evaluate\"\nfrom = {{ model = \"{model}\", origin = \"base\" }}\n\
             graph = {{ vision = \"{}\", text = \"{}\" }}\ntext = {text}\npreprocess = \"${{pixels}}\"\ndataset = {{ shapes = \"${{shapes}}\" }}\n",
            fixture(&format!("clip_hf/{file}.safetensors")),
            fixture("clip_hf/vision.ts17.onnx"),
            fixture("clip_hf/text.ts17.onnx")
        );
    }
    pipeline += &format!(
        "[vars.pixels]\nimage_processor_type = \"CLIPImageProcessor\"\ndo_resize = false\ndo_center_crop = false\nimage_mean = [0.5, 0.5, 0.5]\nimage_std = [0.5, 0.5, 0.5]\n\
         [vars.shapes]\nformat = \"idx\"\nimages = \"images.idx.gz\"\nlabels = \"labels.idx.gz\"\n{dataset}"
    );
    lab.write("pipeline.toml", &pipeline);
    lab.try_run("pipeline.toml", &[])
}

const TOKENIZER: &str = "{ tokenizer = \"vocab.json\" }";

fn golden() -> Value {
    serde_json::from_slice(&fs_err::read(data("zero_shot/golden.json")).unwrap()).unwrap()
}

#[test]
fn heads_of_class_names_give_the_logits_of_pytorch() {
    let lab = Lab::empty();
    let golden = golden();
    let dataset = format!("classes = {}\ntemplates = {}\n", golden["classes"], golden["templates"]);
    let outcome = zero_shot(&lab, TOKENIZER, &dataset);
    assert_eq!(outcome.code, 0, "{outcome}");
    outcome.tells(&["5 of 20 texts are longer than the text tower takes: cut"]);
    let compare = |unit: &str, weights: &str| {
        let (shape, actual) = logits(&lab, unit);
        assert_eq!(shape, [20, 5]);
        let rows = golden["logits"][weights].as_array().unwrap().iter();
        let expected: Vec<f64> =
            rows.flat_map(|row| row.as_array().unwrap()).map(|value| value.as_f64().unwrap()).collect();
        let largest = expected.iter().fold(0f64, |largest, value| largest.max(value.abs()));
        for (actual, expected) in actual.iter().zip(&expected) {
            let off = (f64::from(*actual) - expected).abs() / largest;
            assert!(off < 1e-5, "{unit}: {actual} and {expected}");
        }
    };
    compare("base_scores[shapes]", "base");
    compare("other_scores[shapes]", "perturbed");

    // Heads have keys of their own: with other images only the images are inferred, and with the origin's text tower both share one.
    let heads = |lab: &Lab| {
        let listed = lab.json(&["cache", "ls"]);
        let rows = listed.as_array().unwrap().iter();
        rows.filter(|row| row["kind"] == "zero-shot head").count()
    };
    assert_eq!(heads(&lab), 2);
    let fewer = zero_shot(&lab, TOKENIZER, &(dataset.clone() + "limit = 7\n"));
    assert_eq!((fewer.code, heads(&lab)), (0, 2), "{fewer}");
    assert!(!fewer.stderr.contains("longer than"), "{fewer}");
    let shared = zero_shot(&lab, "{ tokenizer = \"vocab.json\", weights = \"origin\" }", &dataset);
    assert_eq!((shared.code, heads(&lab)), (0, 2), "{shared}");
    assert_ne!(logits(&lab, "other_scores[shapes]").1, logits(&lab, "base_scores[shapes]").1);

    // A given factor replaces that of the checkpoint; answers stay.
    let before = logits(&lab, "base_scores[shapes]").1;
    let scaled =
        zero_shot(&lab, "{ tokenizer = \"vocab.json\", weights = \"origin\", scale = 100 }", &dataset);
    assert_eq!(scaled.code, 0, "{scaled}");
    let factor = 100.0 / 2.598_896_5f32.exp();
    for (scaled, plain) in logits(&lab, "base_scores[shapes]").1.iter().zip(&before) {
        assert!((scaled - plain * factor).abs() < 1e-3, "{scaled} {plain}");
    }
}

#[test]
fn an_export_in_half_precision_takes_the_weights_of_a_single_precision_model() {
    let lab = Lab::empty();
    let golden = golden();
    let dataset = format!("classes = {}\ntemplates = {}\n", golden["classes"], golden["templates"]);
    let outcome = zero_shot(&lab, TOKENIZER, &dataset);
    assert_eq!(outcome.code, 0, "{outcome}");
    let half = data("half/vision.onnx").display().to_string();
    lab.edit("pipeline.toml", &fixture("clip_hf/vision.ts17.onnx"), &half);
    let outcome = lab.try_run("pipeline.toml", &[]);
    assert_eq!(outcome.code, 0, "{outcome}");
    for (unit, weights) in [("base_scores[shapes]", "base"), ("other_scores[shapes]", "perturbed")] {
        let (_, actual) = logits(&lab, unit);
        let rows = golden["logits"][weights].as_array().unwrap().iter();
        let expected: Vec<f64> =
            rows.flat_map(|row| row.as_array().unwrap()).map(|value| value.as_f64().unwrap()).collect();
        let largest = expected.iter().fold(0f64, |largest, value| largest.max(value.abs()));
        let off = actual.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs() / largest);
        let off = off.fold(0f64, f64::max);
        // Eleven bits of every weight and of every value on the way; the other weights are off by a third and more.
        assert!(off < 2e-2, "{unit}: {off}");
        assert!(off > 1e-7, "{unit} was not computed in half precision");
    }
}

#[test]
fn a_head_of_class_names_says_what_it_lacks() {
    let lab = Lab::empty();
    let says = |text: &str, dataset: &str, code: i32, texts: &[&str]| {
        let outcome = zero_shot(&lab, text, dataset);
        assert_eq!(outcome.code, code, "{outcome}");
        outcome.tells(texts);
    };
    let (classes, templates) =
        ("classes = [\"cat\", \"bird\", \"seal\", \"otter\", \"fox\"]\n", "templates = [\"a {}\"]\n");
    let both = format!("{classes}{templates}");
    says(TOKENIZER, templates, 1, &["dataset `shapes` has no class names", "`classes = [\"…\"]`"]);
    says(TOKENIZER, &format!("{classes}templates = [\"a cat\"]\n"), 1, &["template `a cat` has no `{}`"]);
    says(TOKENIZER, &format!("{classes}templates = []\n"), 1, &["dataset `shapes` has no templates"]);
    says("{}", &both, 2, &["there is neither `tokenizer.json` nor", "help: say how texts become tokens"]);
    says("{ tokenizer = \"images.idx.gz\" }", &both, 1, &["`", "images.idx.gz` is not a tokenizer"]);
    says(TOKENIZER, &format!("{both}head = \"images.idx.gz\"\n"), 2, &["both a `head` and `templates`"]);
    says("{ tokenizer = \"vocab.json\", scale = -1 }", &both, 2, &["`text.scale` must be a positive number"]);
    let few = "classes = [\"cat\", \"bird\"]\ntemplates = [\"a {}\"]\n";
    says(TOKENIZER, few, 1, &["label", "2 classes"]);
    // A task of the literature brings class names and prompts.
    says(
        TOKENIZER,
        "task = \"mnst\"\n",
        2,
        &["there is no task `mnst` of the literature", "help: did you mean `mnist`?"],
    );
    let foreign = format!("{classes}task = \"mnist\"\n");
    says(TOKENIZER, &foreign, 1, &["dataset `shapes`: task `mnist` has 10 classes, the dataset 5"]);
    let mnist = zero_shot(&lab, TOKENIZER, "task = \"mnist\"\n");
    assert_eq!(mnist.code, 0, "{mnist}");
    assert_eq!(logits(&lab, "base_scores[shapes]").0, [20, 10]);
    // The text export is missing.
    let outcome = zero_shot(&lab, TOKENIZER, &both);
    assert_eq!(outcome.code, 0, "{outcome}");
    let text = fixture("clip_hf/text.ts17.onnx");
    lab.edit("pipeline.toml", &format!(", text = \"{text}\""), "");
    let outcome = lab.try_run("pipeline.toml", &[]);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&[
        "dataset `shapes`: to make a head of `templates`, the text",
        "graph = { vision = \"…\", text = \"…\" }",
    ]);
}

#[test]
fn graphs_that_are_no_classifier_say_so() {
    let lab = Lab::small();
    let evaluate = |graph: &str, more: &str| -> Outcome {
        with_head(&lab, &lab.path("data/head_digits.safetensors"), "");
        lab.edit("pipeline.toml", "graph = \"data/clip_vision.onnx\"", &format!("graph = {graph}\n{more}"));
        lab.try_run("pipeline.toml", &[])
    };
    let outcome = evaluate("{ vision = \"data/clip_vision.onnx\", decoder = \"d.onnx\" }", "");
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&["this has `vision`, `decoder`"]);
    // Two inputs: the whole of CLIP.
    let whole = fixture("clip_hf/model.dyn18.onnx");
    let outcome = evaluate(&format!("\"{whole}\""), "preprocess = \"data/preprocessor_config.json\"\n");
    assert_eq!(outcome.code, 1, "{outcome}");
    lab.edit(
        "pipeline.toml",
        "path = \"data/base.safetensors\"",
        &format!("path = \"{}\"", fixture("clip_hf/base.safetensors")),
    );
    let outcome = lab.try_run("pipeline.toml", &[]);
    assert_eq!(outcome.code, 1, "{outcome}");
    outcome.tells(&[
        "has 3 inputs: `input_ids`, `pixel_values`, `attention_mask`",
        "say which one with `input =",
    ]);
}

#[test]
fn a_run_record_still_lists_every_score() {
    let lab = Lab::small();
    let outcome = with_head(&lab, &lab.path("data/head_digits.safetensors"), "");
    let run = Run::of(&outcome.json());
    assert_eq!(run.scores.len(), 2, "accuracy and top5");
}
