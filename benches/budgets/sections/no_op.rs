//! Runs that have nothing to do: 100 stages over small files, 9 stages over all encoders.

use super::Section;
use crate::inputs::Encoders;
use crate::report::{Budget, Median, budget, figure, interleaved};
use crate::tool::{Lab, seconds, tool};
use crate::{Bench, Result};
use std::process::Command;

pub const SECTION: Section = Section { name: "no-op", title: "a run that has nothing to do", run };

/// A no-op run is short, so it is repeated more often.
const REPETITIONS: usize = 5;

const LIMIT_MILLISECONDS: f64 = 20.0;

fn run(bench: &Bench) -> Result<()> {
    let stages = one_hundred_stages(&bench.tiny_encoders()?);
    measure(bench, "no-op run of 100 stages", &stages)?;
    let encoders = bench.encoders()?;
    let what = format!("no-op run of 9 stages, {:.1} GB of inputs", encoders.total_bytes() as f64 / 1e9);
    measure(bench, &what, &nine_stages(&encoders))
}

fn measure(bench: &Bench, what: &str, pipeline: &str) -> Result<()> {
    let lab = Lab::new(bench.root(), "no-op")?;
    let pipeline = lab.write("pipeline.toml", pipeline)?;
    // A file just written is hashed twice: its times cannot vouch for it yet.
    lab.seconds(&pipeline, &[])?;
    lab.seconds(&pipeline, &[])?;
    let [no_op, version] = interleaved(
        bench.runs * REPETITIONS,
        [&mut || lab.seconds(&pipeline, &[]), &mut || seconds(Command::new(tool()).arg("--version"))],
    )?;
    show(what, &no_op, &version);
    Ok(())
}

fn show(what: &str, no_op: &Median, version: &Median) {
    budget(what, no_op.value * 1e3, " ms", Budget::AtMost(LIMIT_MILLISECONDS));
    figure("    spread", no_op.milliseconds());
    figure("    of which starting a process (`--version`)", version.milliseconds());
}

/// Base, 33 fine-tuned models under names of their own, their differences, and each difference in few bits.
fn one_hundred_stages(encoders: &Encoders) -> String {
    let folder = encoders.folder.display();
    let mut text = format!(
        "[pipeline]\nname = \"hundred\"\n\n[stage.base]\nkind = \"load\"\npath = '{folder}/base.safetensors'\n"
    );
    for i in 0..33 {
        let (task, bits) = (i % crate::inputs::N_TASKS, 2 + i / crate::inputs::N_TASKS);
        text += &format!(
            "\n[stage.tuned{i}]\nkind = \"load\"\npath = '{folder}/task{task}.safetensors'\n\n\
             [stage.delta{i}]\nkind = \"diff\"\nfrom = {{ base = \"base\", tuned = \"tuned{i}\" }}\n\n\
             [stage.packed{i}]\nkind = \"quantize\"\nfrom = \"delta{i}\"\nbits = {bits}\n"
        );
    }
    text
}

/// Load (2), diff, and six stages that consume it.
fn nine_stages(encoders: &Encoders) -> String {
    let mut further = String::new();
    for bits in [2, 4] {
        further += &format!(
            "[stage.packed{bits}]\nkind = \"quantize\"\nfrom = \"deltas\"\nbits = {bits}\n\n\
             [stage.merged{bits}]\nkind = \"merge\"\nmethod = \"task-arithmetic\"\nscale = 0.3\n\
             from = {{ base = \"base\", vectors = \"packed{bits}\" }}\n\n"
        );
    }
    further += "[stage.merged]\nkind = \"merge\"\nmethod = \"task-arithmetic\"\nscale = 0.3\n\
                from = { base = \"base\", vectors = \"deltas\" }\n\n\
                [stage.averaged]\nkind = \"merge\"\nmethod = \"average\"\nfrom = { base = \"base\", vectors = \"deltas\" }\n";
    encoders.pipeline(&further)
}
