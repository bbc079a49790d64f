//! Progressive bit reduction: the same student whatever the threads and interruptions, and students against the same models that were only
//! rounded, at the same bytes.

use crate::calibration::{answers, paired};
use crate::suite::json;
use crate::util::{Lab, Run, quickstart, slow, test_data};
use std::path::Path;

/// The quickstart's DeiT, with further keys of `cdpq`, on images that it was not tested on.
fn pipeline(keys: &str) -> String {
    let data = quickstart().display().to_string();
    format!(
        "[stage.base]\nkind = \"load\"\npath = \"{data}/deit/model.safetensors\"\n\
         [stage.student]\nkind = \"distill\"\nmethod = \"cdpq\"\nfrom = {{ model = \"base\", origin = \"base\" }}\n{keys}\n\
         graph = \"{data}/deit/deit.onnx\"\n\
         [stage.student.dataset.digits]\nformat = \"idx\"\nimages = \"{data}/data/calib/digits-images.idx.gz\"\nlabels = \"{data}/data/calib/digits-labels.idx.gz\"\n"
    )
}

/// Candidates everywhere, and reductions between checkpoints.
const KEYS: &str = "start_bits = 5\nmin_bits = 3\nfeatures = 6\nlayer_threshold = 10\nconfidence = \"variance\"\nvariance_threshold = 10\n\
    learning_rate = 0.001\nbatch_size = 16\nactivations = { bits = 8 }\nvalidation = { n = 40 }\n";

#[test]
fn students_do_not_depend_on_threads() {
    let lab = Lab::empty();
    lab.write("pipeline.toml", &pipeline(&format!("{KEYS}epochs = 2\nmax_steps = 12\nmicro_batch = 10")));
    let students = ["1", "2", "3"].map(|threads| {
        let run = lab.run(&["--threads", threads, "--force", "student"]);
        run.artifacts()["student[digits]"].to_owned()
    });
    assert!(students.iter().all(|student| *student == students[0]), "{students:?}");
}

#[test]
fn a_killed_reduction_goes_on_and_ends_with_the_same_bytes() {
    let keys = format!("{KEYS}epochs = 6");
    let lab = Lab::empty();
    lab.write("pipeline.toml", &pipeline(&keys));
    lab.run_and_kill("student", 2);
    let rest = lab.try_run("pipeline.toml", &[]);
    assert_eq!(rest.code, 0, "{rest}");
    rest.tells(&["going on after step"]);

    let undisturbed = Lab::empty();
    undisturbed.write("pipeline.toml", &pipeline(&keys));
    assert_eq!(undisturbed.run(&[]).artifacts(), rest.run().artifacts());
}

#[test]
fn every_decision_is_shown() {
    let lab = Lab::empty();
    lab.write("pipeline.toml", &pipeline(&format!("{KEYS}epochs = 1")));
    lab.run(&[]);
    let shown = lab.ok(["show", "pipeline.toml", "student"]).stdout;
    for text in
        ["packed", "candidates", "5 to 4", "patch_embed.proj", "of the loss", "bits per weight", "activation"]
    {
        assert!(shown.contains(text), "nothing about `{text}` in\n{shown}");
    }
    let json = lab.json(&["show", "pipeline.toml", "student"]);
    let reductions = &json[0]["output"]["reductions"];
    assert_eq!(reductions["layers"].as_array().unwrap().len(), 18);
    let attempts = reductions["epochs"][0]["reduction"]["attempts"].as_array().unwrap();
    assert!(!attempts.is_empty());
}

/// A stage with further keys that scores a model of the suite.
fn scores(stage: &str, model: &str, run: &str, dataset: &str) -> String {
    format!(
        "[stage.{stage}]\nkind = \"evaluate\"\nfrom = {{ model = \"{model}\", origin = \"base\" }}\n{run}{dataset}"
    )
}

/// What the student is made from, what it is compared with, and how both are scored.
fn against_rounding(data: &Path) -> String {
    let suite = data.join("suite").display().to_string();
    let run = format!(
        "graph = \"{suite}/onnx/deit.onnx\"\npreprocess = \"{suite}/clip/base/preprocessor_config.json\"\n"
    );
    let classes = "classes = [\"T-shirt_top\", \"Trouser\", \"Pullover\", \"Dress\", \"Coat\", \"Sandal\", \"Shirt\", \"Sneaker\", \"Bag\", \"Ankle_boot\"]\n";
    let images = |part: &str| {
        format!(
            "dataset.fashion.format = \"folder\"\ndataset.fashion.path = \"{suite}/data/fashion/{part}\"\ndataset.fashion.{classes}"
        )
    };
    let mut text = format!(
        "[vars]\nseed = 1\n[stage.base]\nkind = \"load\"\npath = \"{suite}/deit/model.safetensors\"\n\
         [stage.rounded]\nkind = \"quantize\"\nfrom = \"base\"\nscheme = \"symmetric\"\nbits = 3\n\
         rules = [{{ match = \"*norm*\", keep = true }}, {{ match = \"*.bias\", keep = true }}, {{ match = \"*token*\", keep = true }}, {{ match = \"*pos_embed\", keep = true }}]\n\
         [stage.student]\nkind = \"distill\"\nmethod = \"cdpq\"\nfrom = {{ model = \"base\", origin = \"base\" }}\n\
         start_bits = 4\nmin_bits = 2\ntarget_bits = 3.0\nfeatures = \"all\"\nlosses = {{ statistics = 1.0, features = 1.0, logits = 1.0 }}\n\
         layer_threshold = 10.0\nimpact_threshold = 0.3\nepochs = 14\nbatch_size = 16\nlearning_rate = 5e-4\nweight_decay = 1e-6\n\
         validation = {{ n = 100 }}\nseed = \"${{seed}}\"\n{run}{}",
        images("train")
    );
    for (stage, model) in [("plain", "base"), ("rounded_scores", "rounded"), ("student_scores", "student")] {
        text += &scores(stage, model, &run, &images("test"));
    }
    text
}

/// A file of a unit's artifact: its digest and its size.
fn file(lab: &Lab, run: &Run, unit: &str, name: &str) -> (String, u64) {
    let artifact = json(&lab.object(run.artifacts()[unit]));
    let blobs = artifact["blobs"].as_array().unwrap();
    let blob = blobs.iter().find(|blob| blob["name"] == name).unwrap();
    (blob["digest"].as_str().unwrap().to_owned(), blob["size"].as_u64().unwrap())
}

/// The average width of the quantized weights of a student.
fn bits(lab: &Lab, run: &Run, unit: &str) -> f64 {
    let (digest, _) = file(lab, run, unit, "cdpq.json");
    json(&lab.object(&digest))["bits_per_weight"].as_f64().unwrap()
}

/// The suite's DeiT, trained on clothes: at three bits per weight on average, chosen and learned by what its layers give out on the 600 images
/// that it is not tested on.
#[test]
fn a_deit_of_three_bits_beats_the_one_that_was_only_rounded() {
    let test = "a_deit_of_three_bits_beats_the_one_that_was_only_rounded";
    let Some(data) = test_data(test) else { return };
    if !slow(test) {
        return;
    }
    let lab = Lab::empty();
    lab.write("pipeline.toml", &against_rounding(&data));
    let run: Run = lab.run(&["--set", "seed=1,2,3"]);
    let of = |unit: &str| answers(&lab, &run, &["fashion"], |task| format!("{unit}[{task}]"));
    let size = |unit: &str| file(&lab, &run, unit, "tensors.safetensors").1;
    let (plain, rounded) = (of("plain"), of("rounded_scores"));
    for seed in ["1", "2", "3"] {
        let unit = format!("student[seed={seed},fashion]");
        let student = answers(&lab, &run, &["fashion"], |task| format!("student_scores[seed={seed},{task}]"));
        let average = bits(&lab, &run, &unit);
        let (ours, theirs) = (size(&unit), size("rounded"));
        println!("seed {seed}: {average:.3} bits per weight, {ours} bytes, rounded {theirs} bytes");
        assert!(average <= 3.0 && ours <= theirs, "{average} bits, {ours} and {theirs} bytes");
        paired(&format!("seed {seed}: student, single precision"), &student, &plain);
        let found = paired(&format!("seed {seed}: student, rounded"), &student, &rounded);
        assert!(found.only.0 > found.only.1 && found.p < 0.01, "{found:?}");
    }
}
