//! Task arithmetic against mergekit: from checkpoints to a merged checkpoint, with nothing cached.

use super::Section;
use crate::inputs::{Encoders, N_TASKS};
use crate::report::{Budget, budget, figure, interleaved};
use crate::tool::{Lab, find_program, seconds};
use crate::{Bench, Result};
use std::process::Command;

pub const SECTION: Section = Section { name: "mergekit", title: "task arithmetic against mergekit", run };

const LIMIT: f64 = 8.0;
const VARIABLE: &str = "MERGANSER_PEER_MERGEKIT";
const PROGRAM: &str = "mergekit-pytorch";

fn run(bench: &Bench) -> Result<()> {
    let Some(mergekit) = find_program(VARIABLE, PROGRAM) else {
        figure(
            "not measured",
            format!(
                "`{PROGRAM}` is not there; `pip install mergekit` into an environment of its own and set {VARIABLE} to its {PROGRAM}"
            ),
        );
        return Ok(());
    };
    let encoders = bench.encoders()?;
    let lab = Lab::new(bench.root(), "mergekit")?;
    let further = "[stage.merged]\nkind = \"merge\"\nmethod = \"task-arithmetic\"\nscale = 0.3\n\
                   from = { base = \"base\", vectors = \"deltas\" }\n";
    let pipeline = lab.write("pipeline.toml", &encoders.pipeline(further))?;
    let config = lab.write("mergekit.yaml", &config(&encoders))?;
    let target = lab.path("merged");
    let [ours, theirs] = interleaved(
        bench.runs.min(3),
        [
            &mut || {
                lab.clear_cache()?;
                lab.seconds(&pipeline, &[])
            },
            &mut || {
                if target.exists() {
                    fs_err::remove_dir_all(&target)?;
                }
                seconds(Command::new(&mergekit).arg(&config).arg(&target).arg("--safe-serialization"))
            },
        ],
    )?;
    figure("task arithmetic, 8 encoders, hashing of inputs included", ours.seconds());
    figure("    mergekit", theirs.seconds());
    budget("    times as fast", theirs.value / ours.value, " ×", Budget::AtLeast(LIMIT));
    Ok(())
}

fn config(encoders: &Encoders) -> String {
    let folder = encoders.folder.display();
    let mut text = "models:\n".to_owned();
    for task in 0..N_TASKS {
        text += &format!("  - model: {folder}/task{task}.safetensors\n    parameters:\n      weight: 0.3\n");
    }
    text + &format!("merge_method: task_arithmetic\nbase_model: {folder}/base.safetensors\ndtype: float32\n")
}
