//! Training: the same bytes whatever the threads and interruptions, sweeps a few at a time, and what factors beside quantized weights keep
//! of full fine-tuning.

use crate::suite::json;
use crate::util::{Lab, Run, quickstart, slow, test_data};
use std::fmt::Write;

/// The quickstart's DeiT, and `distill` with further keys on images that it was not tested on.
fn pipeline(keys: &str) -> String {
    let data = quickstart().display().to_string();
    format!(
        "[vars]\nmethod = \"finetune\"\n[stage.base]\nkind = \"load\"\npath = \"{data}/deit/model.safetensors\"\n\
         [stage.tuned]\nkind = \"distill\"\nfrom = {{ model = \"base\", origin = \"base\" }}\nmethod = \"${{method}}\"\n{keys}\n\
         graph = \"{data}/deit/deit.onnx\"\n\
         [stage.tuned.dataset.negative]\nformat = \"idx\"\nimages = \"{data}/data/calib/negative-images.idx.gz\"\nlabels = \"{data}/data/calib/negative-labels.idx.gz\"\n"
    )
}

fn artifact(run: &Run, unit: &str) -> String {
    run.artifacts()[unit].to_owned()
}

#[test]
fn training_does_not_depend_on_threads() {
    let lab = Lab::empty();
    lab.write(
        "pipeline.toml",
        &pipeline("epochs = 1\nbatch_size = 24\nmicro_batch = 16\nlearning_rate = 0.001"),
    );
    let mut expected = None;
    for threads in ["1", "2", "3"] {
        let run = lab.run(&["--threads", threads, "--set", "method=finetune,lora", "--force", "tuned"]);
        let found =
            ["finetune", "lora"].map(|method| artifact(&run, &format!("tuned[method={method},negative]")));
        assert_eq!(found, *expected.get_or_insert_with(|| found.clone()), "{threads} threads");
    }
}

#[test]
fn a_killed_training_goes_on_and_ends_with_the_same_bytes() {
    let lab = Lab::empty();
    let keys = "epochs = 10\nbatch_size = 16\nlearning_rate = 0.002\nvalidation = { n = 40 }\npatience = 6";
    lab.write("pipeline.toml", &pipeline(keys));
    lab.run_and_kill("tuned", 2);
    let rest = lab.try_run("pipeline.toml", &[]);
    assert_eq!(rest.code, 0, "{rest}");
    rest.tells(&["going on after step"]);

    let undisturbed = Lab::empty();
    undisturbed.write("pipeline.toml", &pipeline(keys));
    assert_eq!(undisturbed.run(&[]).artifacts(), rest.run().artifacts());
}

#[test]
fn a_sweep_is_run_a_few_combinations_at_a_time() {
    let lab = Lab::empty();
    let text = pipeline("max_steps = 1\nseed = \"${seed}\"").replace("[vars]\n", "[vars]\nseed = 0\n");
    lab.write("pipeline.toml", &text);
    let sweep = ["--set", "seed=1,2,3", "--set", "method=finetune,lora", "--max", "4"];
    let outcome = lab.try_run("pipeline.toml", &sweep);
    assert_eq!(outcome.code, 0, "{outcome}");
    outcome.tells(&["2 combinations are left: run the same command to go on"]);
    assert_eq!(outcome.run().ran().len(), 5, "the model and four of six: {outcome}");
    let rest = lab.try_run("pipeline.toml", &sweep);
    assert_eq!((rest.run().ran().len(), rest.run().with("cached").len()), (2, 5), "{rest}");
    assert!(!rest.stderr.contains("left"), "{rest}");
    lab.run(&sweep).ran_exactly(&[]);
}

#[test]
fn training_shows_its_curves() {
    let lab = Lab::empty();
    lab.write("pipeline.toml", &pipeline("epochs = 2\nvalidation = { n = 50 }"));
    lab.run(&[]);
    let shown = lab.ok(["show", "pipeline.toml", "tuned"]).stdout;
    for text in ["on 150 images, validated on 50", "validation accuracy", "before", "gradient norms: mean"] {
        assert!(shown.contains(text), "nothing about `{text}` in\n{shown}");
    }
    let json = lab.json(&["show", "pipeline.toml", "tuned"]);
    assert_eq!(json[0]["output"]["training"]["epochs"].as_array().unwrap().len(), 2);
}

/// Scores of a trained model, of what is made of it, and of the model before, on images that were trained on and on others.
#[test]
fn scores_tell_what_a_model_was_trained_and_selected_on() {
    let data = quickstart().display().to_string();
    let of = |folder: &str| {
        format!(
            "images = \"{data}/{folder}/negative-images.idx.gz\"\nlabels = \"{data}/{folder}/negative-labels.idx.gz\"\n"
        )
    };
    let elsewhere = format!("validation = {{ {} }}", of("data").trim_end().replace('\n', ", "));
    let mut stages = "[stage.packed]\nkind = \"quantize\"\nfrom = \"tuned\"\nbits = 8\n".to_owned();
    for (stage, model, folder) in [
        ("on_trained", "packed", "data/calib"),
        ("on_others", "packed", "data"),
        ("before", "base", "data/calib"),
    ] {
        write!(
            stages,
            "[stage.{stage}]\nkind = \"evaluate\"\nfrom = {{ model = \"{model}\", origin = \"base\" }}\ngraph = \"{data}/deit/deit.onnx\"\n\
             [stage.{stage}.dataset.negative]\nformat = \"idx\"\n{}",
            of(folder)
        )
        .unwrap();
    }
    // Whether images that validate decide what comes out: for `cdpq` they do whatever is kept, for the others if an epoch is chosen.
    for (method, validation, labels, decided) in [
        ("finetune", elsewhere.as_str(), true, true),
        ("finetune", &format!("{elsewhere}\nkeep = \"last\""), true, false),
        ("finetune", &format!("{elsewhere}\nkeep = \"last\"\npatience = 1"), true, true),
        ("finetune", "validation = { n = 40 }", true, false),
        ("finetune", "teacher_weight = 1", false, false),
        ("finetune", &format!("{elsewhere}\nteacher_weight = 1"), true, true),
        ("lora", &elsewhere, true, true),
        ("cdpq", &format!("{elsewhere}\nkeep = \"last\""), false, true),
        ("cdpq", "", false, false),
    ] {
        let lab = Lab::empty();
        let keys = format!("epochs = 1\nmax_steps = 1\n{validation}");
        let mut text = pipeline(&keys);
        if validation.contains("teacher_weight") {
            text = text.replace("origin = \"base\" }", "origin = \"base\", teacher = \"base\" }");
        }
        lab.write("pipeline.toml", &format!("{text}{stages}"));
        let run = lab.run(&["--set", &format!("method={method}")]);
        let case = format!("{method}, {validation}");
        assert_eq!(
            run.scores.iter().filter(|score| score["metric"] == "accuracy").count(),
            3,
            "{case}: {:?}",
            run.scores
        );
        for score in &run.scores {
            let scored = match score["stage"].as_str().unwrap() {
                "on_trained" => Some(true),
                "on_others" => Some(decided),
                _ => None,
            };
            let expected = scored.map(|scored| serde_json::json!({ "labels": labels, "scored": scored }));
            assert_eq!(score.get("seen"), expected.as_ref(), "{case}: {score}");
        }
        let with = if labels { "with" } else { "without" };
        let outcome = lab.ok(["run", "pipeline.toml", "--set", &format!("method={method}")]);
        let note = format!("the scored images of negative, {with} their labels");
        let told = outcome.stdout.lines().find(|line| line.starts_with("packed was made with "));
        assert!(told.is_some_and(|line| line.contains(&note)), "{case}: {}", outcome.stdout);
        assert!(!outcome.stdout.contains("base was made with"), "{case}: {}", outcome.stdout);
        let shown = lab.ok(["show", "pipeline.toml", "tuned", "--set", &format!("method={method}")]).stdout;
        let validated = if decided { ", `negative` (600 for validation)" } else { "" };
        let note = format!("made with images of `negative` (200){validated}, {with} their labels");
        assert!(shown.contains(&note), "{case}: no `{note}` in\n{shown}");
    }
}

#[test]
fn mistakes_are_told_before_anything_runs() {
    let refused = |keys: &str, text: &str| {
        let lab = Lab::empty();
        lab.write("pipeline.toml", &pipeline(keys));
        let outcome = lab.try_run("pipeline.toml", &[]);
        assert_eq!(outcome.code, 2, "{outcome}");
        outcome.tells(&[text]);
    };
    refused("learning_rate = -1", "`learning_rate` must be above zero, got -1");
    refused("epoch = 3", "did you mean `epochs`?");
    refused("batch_size = 0", "`batch_size` must be at least 1, got 0");
    refused("validation = { images = \"none.gz\", labels = \"none.gz\" }", "none.gz");
}

/// The suite's DeiT, trained on clothes, moved to digits: the whole model, and factors beside it in four bits.
///
/// Both have the same images, steps and batches, and a learning rate of their own, chosen on the validation images.
#[test]
fn factors_beside_four_bits_keep_what_full_training_gains() {
    let test = "factors_beside_four_bits_keep_what_full_training_gains";
    let Some(data) = test_data(test) else { return };
    if !slow(test) {
        return;
    }
    let suite = data.join("suite").display().to_string();
    let run = format!(
        "graph = \"{suite}/onnx/deit.onnx\"\npreprocess = \"{suite}/clip/base/preprocessor_config.json\"\n"
    );
    let images = |part: &str| {
        format!(
            "format = \"idx\"\nimages = \"{suite}/data/mnist/{part}-images-idx3-ubyte.gz\"\nlabels = \"{suite}/data/mnist/{part}-labels-idx1-ubyte.gz\"\n"
        )
    };
    let budget = "validation = { n = 100, balanced = true }\nepochs = 30\nbatch_size = 32\npatience = 8\nmonitor = \"accuracy\"\nseed = \"${seed}\"\n";
    let mut text = format!(
        "[vars]\nseed = 42\n[stage.base]\nkind = \"load\"\npath = \"{suite}/deit/model.safetensors\"\n\
         [stage.nf4]\nkind = \"quantize\"\nfrom = \"base\"\nscheme = \"nf4\"\ndouble_quantization = true\n\
         rules = [{{ match = \"*norm*\", keep = true }}, {{ match = \"*.bias\", keep = true }}, {{ match = \"*token*\", keep = true }}, {{ match = \"*pos_embed\", keep = true }}, {{ match = \"head*\", keep = true }}]\n"
    );
    for (stage, model, keys) in [
        ("full", "base", "method = \"finetune\"\nlearning_rate = 0.002\n"),
        (
            "qlora",
            "nf4",
            "method = \"lora\"\nrank = 16\ndropout = 0.1\ntargets = [\"*.attn.*.weight\", \"*.mlp.*.weight\"]\ntrain = [\"head*\"]\nlearning_rate = 0.006\n",
        ),
    ] {
        write!(
            text,
            "[stage.{stage}]\nkind = \"distill\"\nfrom = {{ model = \"{model}\", origin = \"base\" }}\n{keys}{budget}{run}[stage.{stage}.dataset.mnist]\n{}",
            images("train")
        )
        .unwrap();
    }
    for (stage, model) in [("before", "base"), ("full_scores", "full"), ("qlora_scores", "qlora")] {
        write!(
            text,
            "[stage.{stage}]\nkind = \"evaluate\"\nfrom = {{ model = \"{model}\", origin = \"base\" }}\n{run}[stage.{stage}.dataset.mnist]\n{}",
            images("t10k")
        )
        .unwrap();
    }
    let lab = Lab::empty();
    lab.write("pipeline.toml", &text);
    let run = lab.run(&["--set", "seed=42,123,456"]);
    let correct = run.correct();
    let of = |stage: &str, vars: &str| {
        let (correct, n) = correct[&(stage.to_owned(), vars.to_owned(), "mnist".to_owned())];
        100.0 * correct as f64 / n as f64
    };
    let before = of("before", "");
    let (mut full, mut factors) = (0.0, 0.0);
    for seed in ["42", "123", "456"] {
        let vars = format!("seed={seed}");
        let found = (of("full_scores", &vars), of("qlora_scores", &vars));
        println!(
            "seed {seed}: before {before:.2} %, full {:.2} %, NF4 with factors {:.2} %",
            found.0, found.1
        );
        full += (found.0 - before) / 3.0;
        factors += (found.1 - before) / 3.0;
        for stage in ["full", "qlora"] {
            let artifact = json(&lab.object(run.artifacts()[format!("{stage}[{vars},mnist]").as_str()]));
            let blobs = artifact["blobs"].as_array().unwrap();
            let blob = blobs.iter().find(|blob| blob["name"] == "training.json").unwrap();
            let training = json(&lab.object(blob["digest"].as_str().unwrap()));
            let epochs = training["epochs"].as_array().unwrap();
            println!(
                "  {stage}: {} values trained, {} epochs, kept {}, last {}",
                training["trained_values"],
                epochs.len(),
                training["kept"],
                epochs.last().unwrap()
            );
        }
    }
    println!(
        "mean gain: full {full:.2} points, NF4 with factors {factors:.2}: {:.1} %",
        100.0 * factors / full
    );
    assert!(factors >= 0.95 * full, "{factors:.2} of {full:.2} points");
}
