//! Task arithmetic against mergekit: from checkpoints to a merged checkpoint, with nothing cached.

use super::Section;
use crate::inputs::{Encoders, N_TASKS};
use crate::report::{Budget, budget, figure, interleaved};
use crate::tool::{Lab, find_program, seconds};
use crate::{Bench, Result};
use std::path::PathBuf;
use std::process::Command;

pub const SECTION: Section = Section { name: "mergekit", title: "task arithmetic against mergekit", run };

const LIMIT: f64 = 8.0;

/// What to do when mergekit is not found.
pub(super) const MISSING: &str = "`mergekit-pytorch` is not there; `pip install mergekit` into an environment of its own and set MERGANSER_PEER_MERGEKIT to its mergekit-pytorch";

/// Its program that merges bare checkpoints.
pub(super) fn mergekit() -> Option<PathBuf> {
    find_program("MERGANSER_PEER_MERGEKIT", "mergekit-pytorch")
}

fn run(bench: &Bench) -> Result<()> {
    let Some(mergekit) = mergekit() else {
        figure("not measured", MISSING);
        return Ok(());
    };
    let encoders = bench.encoders()?;
    let lab = Lab::new(bench.root(), "mergekit")?;
    let further = "[stage.merged]\nkind = \"merge\"\nmethod = \"task-arithmetic\"\nscale = 0.3\n\
                   from = { base = \"base\", vectors = \"deltas\" }\n";
    let pipeline = lab.write("pipeline.toml", &encoders.pipeline(further))?;
    let config = lab.write("mergekit.yaml", &config(&encoders, "task_arithmetic", "      weight: 0.3\n"))?;
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

/// A merge of all encoders; `parameters` are those of each.
pub(super) fn config(encoders: &Encoders, method: &str, parameters: &str) -> String {
    let folder = encoders.folder.display();
    let mut text = "models:\n".to_owned();
    for task in 0..N_TASKS {
        text += &format!("  - model: {folder}/task{task}.safetensors\n    parameters:\n{parameters}");
    }
    text + &format!("merge_method: {method}\nbase_model: {folder}/base.safetensors\ndtype: float32\n")
}
