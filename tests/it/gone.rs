//! Files that are gone: what was stored of them is enough, and what is not is said.

use crate::util::{Lab, Run};
use std::collections::BTreeMap;

/// The quickstart's experts on two tasks, as stored directions and coefficients.
const STORED: &str = r#"
[vars]
tasks = ["digits", "negative"]
scale = 1.2
low = "keep"
bits = 4
store = "basis"

[stage.base]
kind = "load"
path = "data/base.safetensors"

[stage.tuned]
kind = "load"
each = { task = "${tasks}" }
path = "data/ft_${task}.safetensors"

[stage.deltas]
kind = "diff"
from = { base = "base", tuned = "tuned" }

[stage.basis]
kind = "svd"
from = { deltas = "deltas" }
energy = 0.6
store = "${store}"

[stage.coefficients]
kind = "compress"
from = { deltas = "deltas", basis = "basis" }

[stage.packed]
kind = "quantize"
from = "coefficients"
bits = "${bits}"
residual_stages = 2

[stage.merged]
kind = "merge"
from = { base = "base", vectors = "packed" }
method = "svd-hybrid"
scale = "${scale}"
low = "${low}"

[stage.experts]
kind = "merge"
from = { base = "base", vectors = "packed" }
method = "svd-hybrid"
output = "per-task"
low = "${low}"
"#;

fn lab() -> Lab {
    let lab = Lab::small();
    lab.write("pipeline.toml", STORED);
    lab
}

fn remove_experts(lab: &Lab) {
    for task in ["digits", "negative"] {
        fs_err::remove_file(lab.path(format!("data/ft_{task}.safetensors"))).unwrap();
    }
}

/// The artifacts of the models.
fn models(run: &Run) -> BTreeMap<String, String> {
    let artifacts = run.artifacts().into_iter().filter(|(unit, _)| unit.starts_with(['m', 'e']));
    artifacts.map(|(unit, artifact)| (unit.to_owned(), artifact.to_owned())).collect()
}

#[test]
fn models_are_rebuilt_bit_by_bit_without_the_fine_tuned_checkpoints() {
    let edits: [&[&str]; 3] = [&["--set", "scale=0.7"], &["--set", "low=drop"], &["--set", "bits=3"]];
    let whole = lab();
    let expected: Vec<_> = edits.map(|edit| models(&whole.run(edit))).into();
    let lab = lab();
    lab.run(&[]);
    remove_experts(&lab);
    // What is there already needs nobody.
    let again = lab.try_run("pipeline.toml", &[]);
    again.run().ran_exactly(&[]);
    again.tells(&["`", "data/ft_digits.safetensors` is gone"]);
    for (edit, expected) in edits.iter().zip(&expected) {
        let plan = Run::of(&lab.json(&[&["plan", "pipeline.toml"], *edit].concat()));
        assert!(plan.with("cached").contains("tuned[digits]"), "{:?}", plan.units);
        let run = lab.run(edit);
        assert!(run.ran().contains("merged") && !run.ran().contains("basis"), "{:?}", run.units);
        assert_eq!(models(&run), *expected, "{edit:?}");
    }
    assert!(lab.ok(["check", "pipeline.toml"]).stdout.contains("no mistakes"));
}

#[test]
fn a_stage_that_has_to_read_a_file_that_is_gone_says_which() {
    let lab = lab();
    lab.run(&["--set", "store=factors"]);
    remove_experts(&lab);
    let outcome = lab.try_run("pipeline.toml", &["--set", "store=factors", "--set", "scale=0.7"]);
    assert_eq!(outcome.code, 1, "{outcome}");
    let files = ["data/ft_digits.safetensors`, ", "data/ft_negative.safetensors` are gone"];
    outcome.tells(&[files[0], files[1], "this stage has to read them", "put them back"]);
    let run = outcome.run();
    assert_eq!(run.units["merged"].status, "failed");
    assert_eq!(run.units["tuned[digits]"].status, "cached");
}

#[test]
fn a_file_that_came_back_with_other_content_counts_as_what_it_is() {
    let lab = lab();
    let first = lab.run(&[]);
    remove_experts(&lab);
    for task in ["digits", "negative"] {
        let other = lab.path("data/ft_parity.safetensors");
        crate::util::copy(&other, &lab.path(format!("data/ft_{task}.safetensors")));
    }
    let second = lab.run(&[]);
    assert!(second.ran().contains("tuned[digits]") && second.ran().contains("merged"));
    assert_ne!(models(&first), models(&second));
}
