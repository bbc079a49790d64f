//! SAM 2 through its exports: answers of other implementations, published scores, and what is said about mistakes.
//!
//! The exports and the annotated images are in the folder that `MERGANSER_TEST_DATA` names; without it these tests say that they were skipped.

use crate::suite::json;
use crate::util::{Lab, Run, test_data};
use merganser_stages::segmentation::measure::jaccard;
use merganser_stages::segmentation::rle::Rle;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A model that is evaluated through both halves of an export; `dataset` is the data set's table.
fn pipeline(origin: &Path, model: &Path, [encoder, decoder]: [&Path; 2], dataset: &str) -> String {
    format!(
        "[stage.origin]\nkind = \"load\"\npath = \"{}\"\n[stage.model]\nkind = \"load\"\npath = \"{}\"\n\
         [stage.scores]\nkind = \"evaluate\"\nfrom = {{ model = \"model\", origin = \"origin\" }}\n\
         graph = {{ encoder = \"{}\", decoder = \"{}\" }}\nbatch_size = 8\n\
         [stage.scores.preprocess]\nsize = {{ height = 128, width = 128 }}\nresample = 2\nimage_mean = [0.485, 0.456, 0.406]\nimage_std = [0.229, 0.224, 0.225]\n\
         [stage.scores.dataset.objects]\n{dataset}\n",
        origin.display(),
        model.display(),
        encoder.display(),
        decoder.display()
    )
}

fn golden() -> Value {
    json(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/sam2.json"))
}

/// A lab with the golden image and its record in `images`.
fn lab(golden: &Value) -> Lab {
    let lab = Lab::empty();
    fs_err::create_dir(lab.path("images")).unwrap();
    let hex = golden["image"].as_str().unwrap();
    let bytes: Vec<u8> =
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
    fs_err::write(lab.path("images/sa_1.png"), bytes).unwrap();
    lab.write("images/sa_1.json", &golden["record"].to_string());
    lab
}

const IMAGES: &str = "format = \"sa1b\"\npath = \"images\"";

/// The masks that the only evaluation has stored, one a line.
fn stored_masks(lab: &Lab) -> Vec<Value> {
    let is_masks = |bytes: &Vec<u8>| bytes.starts_with(b"{\"image\":");
    let files = lab.cached_files("objects-v1").into_iter().map(|path| fs_err::read(path).unwrap());
    let found: Vec<Vec<u8>> = files.filter(is_masks).collect();
    assert_eq!(found.len(), 1);
    let text = String::from_utf8(found[0].clone()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn fixture(data: &Path, folder: &str, names: [&str; 2]) -> [PathBuf; 2] {
    names.map(|name| data.join("onnx-fixtures").join(folder).join(format!("{name}.onnx")))
}

const TRANSFORMERS: [&str; 2] = ["vision_encoder.ts17", "prompt_encoder_mask_decoder.ts17"];
const SAMEXPORTER: [&str; 2] = ["encoder.ts17", "decoder.ts17"];

#[test]
fn answers_are_those_of_pytorch_in_both_layouts() {
    let Some(data) = test_data("answers_are_those_of_pytorch_in_both_layouts") else { return };
    let golden = golden();
    for (folder, weights, graphs) in [
        ("sam2_hf", "base", TRANSFORMERS),
        ("sam2_hf", "perturbed", TRANSFORMERS),
        ("sam2_meta", "base", SAMEXPORTER),
    ] {
        let lab = lab(&golden);
        let weights_of =
            |name: &str| data.join("onnx-fixtures").join(folder).join(format!("{name}.safetensors"));
        let graphs = fixture(&data, folder, graphs);
        lab.write(
            "pipeline.toml",
            &pipeline(&weights_of("base"), &weights_of(weights), [&graphs[0], &graphs[1]], IMAGES),
        );
        let run = lab.run(&["--threads", "1"]);
        let answers = stored_masks(&lab);
        let expected = golden["answers"][format!("{folder} {weights}")].as_array().unwrap();
        assert_eq!(answers.len(), expected.len());
        for (answer, expected) in answers.iter().zip(expected) {
            let what = format!("{folder} {weights} {} {}", expected["object"], expected["prompt"]);
            assert_eq!(
                [&answer["object"], &answer["prompt"]],
                [&expected["object"], &expected["prompt"]],
                "{what}"
            );
            let [predicted, reference] =
                [answer, expected].map(|answer| answer["predicted_iou"].as_f64().unwrap());
            assert!((predicted - reference).abs() < 1e-4, "{what}: {predicted}, expected {reference}");
            let [mask, reference] = [answer, expected].map(|answer| {
                let rle: Rle = serde_json::from_value(answer["mask"].clone()).unwrap();
                rle.to_mask(96, 160).unwrap()
            });
            // Logits that are almost zero may have either sign.
            assert!(jaccard(&mask, &reference) > 0.999, "{what}: {}", jaccard(&mask, &reference));
        }
        // The bytes do not depend on the number of threads.
        fs_err::remove_dir_all(&lab.cache).unwrap();
        assert_eq!(lab.run(&["--threads", "3"]).artifacts(), run.artifacts());
    }
}

/// The value of a metric; the run has a single evaluation.
#[track_caller]
fn metric(run: &Run, name: &str) -> (f64, u64) {
    let row = run.scores.iter().find(|row| row["metric"] == name).unwrap();
    let [low, value, high] = ["low", "value", "high"].map(|field| row[field].as_f64().unwrap());
    assert!(0.0 <= low && low <= value && value <= high && high <= 1.0, "{row}");
    (value, row["n"].as_u64().unwrap())
}

/// Linear and convolutional weights in steps of each output channel, all else as it is.
const QUANTIZED: &str = "[vars]\nbits = 8\n[stage.packed]\nkind = \"quantize\"\nfrom = \"model\"\nscheme = \"symmetric\"\nbits = \"${bits}\"\nrules = [\n\
    { match = \"*.bias\", keep = true }, { match = \"*norm*\", keep = true }, { match = \"*_token*.weight\", keep = true },\n\
    { match = \"*_embed.weight\", keep = true }, { match = \"*pos_embed*\", keep = true }, { match = \"*positional_embedding\", keep = true },\n\
    { match = \"no_memory_embedding\", keep = true }, { match = \"*upscale_conv*\", keep = true },\n]\n";

#[test]
fn sam_2_scores_as_published() {
    let Some(data) = test_data("sam_2_scores_as_published") else { return };
    let lab = Lab::empty();
    let model = data.join("suite/sam2/model.safetensors");
    let [encoder, decoder] =
        ["encoder", "decoder"].map(|half| data.join(format!("suite/onnx/sam2_{half}.onnx")));
    let images = data.join("suite/data/sam2_composites");
    let dataset = format!("format = \"sa1b\"\npath = \"{}\"", images.display());
    lab.write("pipeline.toml", &pipeline(&model, &model, [&encoder, &decoder], &dataset));
    let run = lab.run(&[]);
    let published = &json(&data.join("suite/results.json"))["sam2"]["results"]["fp32"];
    for prompt in ["point", "box"] {
        let (miou, n) = metric(&run, &format!("{prompt}_miou"));
        let expected = published[prompt].as_f64().unwrap();
        println!("{prompt}: {miou:.5}, published {expected}");
        assert_eq!(n, 300);
        assert!((miou - expected).abs() < 0.002, "{prompt}: {miou}, published {expected}");
        // Every image has one object: J is the mean IoU.
        let (j, _) = metric(&run, &format!("{prompt}_j"));
        let (f, _) = metric(&run, &format!("{prompt}_f"));
        let (both, _) = metric(&run, &format!("{prompt}_j_and_f"));
        assert!((j - miou).abs() < 1e-12 && (both - f64::midpoint(j, f)).abs() < 1e-12);
    }
    assert_eq!(lab.run(&[]).ran().len(), 0);

    lab.edit("pipeline.toml", "model = \"model\"", "model = \"packed\"");
    lab.append("pipeline.toml", QUANTIZED);
    for bits in ["8", "4"] {
        let run = lab.run(&["--set", &format!("bits={bits}")]);
        let published = &json(&data.join("suite/results.json"))["sam2"]["results"][format!("int{bits}")];
        for prompt in ["point", "box"] {
            let (miou, _) = metric(&run, &format!("{prompt}_miou"));
            let expected = published[prompt].as_f64().unwrap();
            println!("{bits} bits, {prompt}: {miou:.5}, published {expected}");
            assert!((miou - expected).abs() < 0.002, "{bits} bits, {prompt}: {miou}, published {expected}");
        }
    }
}

#[test]
fn a_killed_evaluation_of_masks_goes_on_and_ends_with_the_same_bytes() {
    let test = "a_killed_evaluation_of_masks_goes_on_and_ends_with_the_same_bytes";
    let Some(data) = test_data(test) else { return };
    let model = data.join("suite/sam2/model.safetensors");
    let [encoder, decoder] =
        ["encoder", "decoder"].map(|half| data.join(format!("suite/onnx/sam2_{half}.onnx")));
    let images = data.join("suite/data/sam2_composites");
    let dataset = format!("format = \"sa1b\"\npath = \"{}\"", images.display());
    let text = pipeline(&model, &model, [&encoder, &decoder], &dataset);
    let lab = Lab::empty();
    lab.write("pipeline.toml", &text);
    lab.run_and_kill("scores", 3);
    let rest = lab.try_run("pipeline.toml", &[]);
    assert_eq!(rest.code, 0, "{rest}");
    rest.tells(&["`objects`: going on after", "of 300 images"]);

    let undisturbed = Lab::empty();
    undisturbed.write("pipeline.toml", &text);
    assert_eq!(undisturbed.run(&[]).artifacts(), rest.run().artifacts());
}

#[test]
fn mistakes_about_masks_are_named() {
    let Some(data) = test_data("mistakes_about_masks_are_named") else { return };
    let golden = golden();
    let lab = lab(&golden);
    let model = data.join("onnx-fixtures/sam2_hf/base.safetensors");
    let [encoder, decoder] = fixture(&data, "sam2_hf", TRANSFORMERS);
    let fails = |decoder: &Path, dataset: &str, code: i32, texts: &[&str]| {
        lab.write("pipeline.toml", &pipeline(&model, &model, [&encoder, decoder], dataset));
        let outcome = lab.try_run("pipeline.toml", &[]);
        assert_eq!(outcome.code, code, "{outcome}");
        outcome.tells(texts);
    };
    fails(&encoder, IMAGES, 1, &["is not a mask decoder of SAM 2: its inputs are `pixel_values`"]);
    fails(Path::new("absent.onnx"), IMAGES, 2, &["graph.decoder", "absent.onnx"]);
    let idx = "format = \"idx\"\nimages = \"images/sa_1.png\"\nlabels = \"images/sa_1.png\"";
    fails(
        &decoder,
        idx,
        2,
        &["unknown format `idx`", "of masks there are `sa1b`", "`images` goes with classifiers"],
    );
    fails(
        &decoder,
        &format!("{IMAGES}\nprompts = []"),
        2,
        &["`prompts` are `point`, `box`, or both, each once"],
    );
    fails(
        &decoder,
        &format!("{IMAGES}\nmultimask = false"),
        1,
        &["prompt_encoder_mask_decoder.ts17.onnx", "three masks", "`multimask = false`"],
    );

    let mut record = golden["record"].clone();
    record["annotations"][1]["point_coords"] = serde_json::json!([[161.0, 5.0]]);
    lab.write("images/sa_1.json", &record.to_string());
    fails(
        &decoder,
        IMAGES,
        1,
        &["sa_1.json`: the point of object `2` lies outside the image of 160x96 pixels: (161, 5)"],
    );
    // The masks can be asked for instead.
    lab.write(
        "pipeline.toml",
        &pipeline(&model, &model, [&encoder, &decoder], &format!("{IMAGES}\nderived_prompts = true")),
    );
    lab.run(&[]);
    record["annotations"][0]["segmentation"]["counts"] = serde_json::json!([96 * 160]);
    lab.write("images/sa_1.json", &record.to_string());
    let derived = format!("{IMAGES}\nderived_prompts = true");
    fails(&decoder, &derived, 1, &["sa_1.json`: the mask of object `1` is empty"]);
    record["annotations"][0]["segmentation"] = serde_json::json!({ "size": [2, 2], "counts": [4] });
    lab.write("images/sa_1.json", &record.to_string());
    fails(&decoder, IMAGES, 1, &["the mask of object `1`: it is 2x2 pixels, the image 160x96"]);
    record["annotations"] = serde_json::json!([]);
    lab.write("images/sa_1.json", &record.to_string());
    fails(&decoder, IMAGES, 1, &["dataset `objects` has no object in its 1 images"]);
}
