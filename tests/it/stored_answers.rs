//! Answers of models that are stored with few bits, and of merges that need more than a stage, as published for the suite's six tasks.

use crate::accuracy::assert_correct;
use crate::suite::{compare, evaluate, json, pipeline};
use crate::util::{Lab, test_data};
use std::fmt::Write;

/// What the authors of TVQ leave as it is: normalizations, embeddings and biases.
const RULE_A: &str = "rules = [{ match = '*layer_norm*', keep = true }, { match = '*layrnorm*', keep = true }, \
                      { match = '*layernorm*', keep = true }, { match = '*embedding*', keep = true }, { match = '*bias*', keep = true }]\n";

/// Stages that end with a model, under the row that gives its answers.
struct Row {
    golden: String,
    model: String,
    /// Whether there is a row per task, and a model for each.
    by_task: bool,
}

fn merge(name: &str, vectors: &str, parameters: &str) -> String {
    format!("[stage.{name}]\nkind = \"merge\"\nfrom = {{ base = \"base\", {vectors} }}\n{parameters}\n")
}

fn quantize(name: &str, from: &str, parameters: &str) -> String {
    format!("[stage.{name}]\nkind = \"quantize\"\nfrom = \"{from}\"\n{parameters}\n{RULE_A}")
}

const ADDED: &str = "method = 'task-arithmetic'\nscale = 0.3";

/// Each expert by itself, from its stored task vector.
fn singles(name: &str, vectors: &str) -> String {
    merge(
        name,
        &format!("vectors = \"{vectors}[${{task}}]\""),
        "each = { task = \"${tasks}\" }\nmethod = 'task-arithmetic'\nscale = 1.0",
    )
}

fn rows() -> (String, Vec<Row>) {
    let mut stages = merge("averaged", "vectors = \"deltas\"", "method = 'average'");
    let mut rows = Vec::new();
    let mut row = |golden: &str, model: &str, by_task: bool| {
        rows.push(Row { golden: golden.to_owned(), model: model.to_owned(), by_task });
    };
    for (golden, scheme) in [
        ("fp4", "scheme = 'fp4'"),
        ("fp4_nested", "scheme = 'fp4'\ndouble_quantization = true"),
        ("nf4", "scheme = 'nf4'"),
        ("nf4_nested", "scheme = 'nf4'\ndouble_quantization = true"),
        ("int8", "scheme = 'int8-block'\ngranularity = { group = 64 }"),
    ] {
        stages += &quantize(golden, "averaged", scheme);
        row(&format!("bnb/weight_average_{golden}"), golden, false);
    }
    for bits in [8, 4, 3, 2] {
        stages += &quantize(&format!("tvq{bits}"), "deltas", &format!("bits = {bits}"));
        stages += &merge(&format!("tvq{bits}_added"), &format!("vectors = \"tvq{bits}\""), ADDED);
        stages += &singles(&format!("tvq{bits}_single"), &format!("tvq{bits}"));
        row(&format!("tvq/ta0.3_int{bits}_ruleA"), &format!("tvq{bits}_added"), false);
        row(&format!("tvq/single_int{bits}_ruleA"), &format!("tvq{bits}_single"), true);
    }
    for bits in [8, 4] {
        stages += &quantize(&format!("fq{bits}"), "tuned", &format!("bits = {bits}"));
        write!(
            stages,
            "[stage.fq{bits}_deltas]\nkind = \"diff\"\nfrom = {{ base = \"base\", tuned = \"fq{bits}\" }}\n"
        )
        .unwrap();
        stages += &merge(&format!("fq{bits}_added"), &format!("vectors = \"fq{bits}_deltas\""), ADDED);
        row(&format!("tvq/fq_ta0.3_int{bits}_ruleA"), &format!("fq{bits}_added"), false);
    }
    for (golden, error_correction) in [("ec", true), ("noec", false)] {
        let parameters =
            format!("scheme = 'rtvq'\nbase_bits = 3\nbits = 2\nerror_correction = {error_correction}");
        stages += &quantize(golden, "deltas", &parameters);
        stages += &merge(&format!("{golden}_added"), &format!("vectors = \"{golden}\""), ADDED);
        stages += &singles(&format!("{golden}_single"), golden);
        row(&format!("tvq/rtvq_b3o2_{golden}_ta0.3"), &format!("{golden}_added"), false);
        row(&format!("tvq/rtvq_b3o2_{golden}_single"), &format!("{golden}_single"), true);
    }
    stages += "[stage.masks]\nkind = \"mask\"\nfrom = { deltas = \"deltas\", base = \"base\" }\nmethod = \"tall\"\nlambda = 0.4\n";
    let both = "vectors = \"deltas\", masks = \"masks\"";
    stages += &merge("consensus", both, "method = 'consensus'\nk = 2\nscale = 1.0");
    row("tall_masks/consensus_ta_k2_alpha1.0", "consensus", false);
    // One expert, scaled down with depth, is asked what all of them know.
    stages +=
        &merge("scaled", "vectors = \"deltas[mnist]\"", "method = 'lines'\non = 'single-task'\nbeta = 0.6");
    row("lines/single_mnist_c0.4", "scaled", false);
    // The authors of ACTMat trim and elect in the weights of layers and positions, and average all else.
    let trimmed =
        "['*proj.weight', '*projection.weight', '*fc1.weight', '*fc2.weight', '*position_embedding.weight']";
    stages += &merge(
        "elected",
        "vectors = \"deltas\"",
        &format!("method = 'ties'\nscope = 'tensor'\ndensity = 0.2\nonly = {trimmed}"),
    );
    write!(
        stages,
        "[stage.elected_and_averaged]\nkind = \"merge\"\nfrom = {{ base = \"elected\", vectors = \"deltas\" }}\nmethod = 'average'\nskip = {trimmed}\n"
    )
    .unwrap();
    row("actmat/ties", "elected_and_averaged", false);
    (stages, rows)
}

#[test]
fn stored_models_answer_as_published() {
    let Some(data) = test_data("stored_models_answer_as_published") else { return };
    let lab = Lab::empty();
    let (mut stages, rows) = rows();
    for Row { model, .. } in &rows {
        stages += &evaluate(&data, &format!("{model}_scores"), model);
    }
    lab.write("pipeline.toml", &pipeline(&data, &stages));
    let run = lab.run(&[]);
    let goldens = json(&data.join("goldens/public/accuracy.json"))["results"].clone();
    for Row { golden, model, by_task } in &rows {
        compare(&run, &format!("{model}_scores"), "", |task| {
            let row = if *by_task { format!("{golden}/{task}") } else { golden.clone() };
            goldens[row][task].clone()
        });
    }
}

/// SLERP goes from one model to one other, so it is published for two tasks.
#[test]
fn models_between_two_experts_answer_as_published() {
    let Some(data) = test_data("models_between_two_experts_answer_as_published") else { return };
    let lab = Lab::empty();
    let clip = data.join("suite/clip").display().to_string();
    let mut stages = format!(
        "[stage.pair]\nkind = \"load\"\neach = {{ task = [\"mnist\", \"fashion\"] }}\npath = \"{clip}/ft_${{task}}.safetensors\"\n\
         [stage.pair_deltas]\nkind = \"diff\"\nfrom = {{ base = \"base\", tuned = \"pair\" }}\n"
    );
    let places = [("slerp3", "0.3"), ("slerp5", "0.5")];
    for (name, t) in places {
        stages += &merge(name, "vectors = \"pair_deltas\"", &format!("method = 'slerp'\nt = {t}"));
        stages += &evaluate(&data, &format!("{name}_scores"), name);
    }
    lab.write("pipeline.toml", &pipeline(&data, &stages));
    let correct = lab.run(&[]).correct();
    let goldens = json(&data.join("goldens/public/accuracy.json"))["results"].clone();
    for (name, t) in places {
        for task in ["mnist", "fashion"] {
            let (actual, n) = correct[&(format!("{name}_scores"), String::new(), task.to_owned())];
            let published = &goldens[format!("mergekit/slerp_t{t}")][task];
            assert_eq!(published["n"], n);
            assert_correct(&format!("{name} {task}"), actual, published["correct"].as_u64().unwrap(), n);
        }
    }
}
