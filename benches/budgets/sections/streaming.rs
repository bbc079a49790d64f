//! Streaming passes over all encoders, with hashing and publishing, against `cat` of the same bytes to `/dev/null`.

use super::Section;
use crate::inputs::{Encoders, N_TASKS};
use crate::report::{Budget, Median, budget, figure, interleaved};
use crate::tool::{Lab, cat, seconds};
use crate::{Bench, Result};

pub const SECTION: Section = Section { name: "streaming", title: "streaming passes against `cat`", run };

const LIMIT: f64 = 2.0;

const MERGED: &str = "[stage.merged]\nkind = \"merge\"\nmethod = \"task-arithmetic\"\nscale = 0.3\n\
                      from = { base = \"base\", vectors = \"deltas\" }\n";
const PACKED: &str = "[stage.packed]\nkind = \"quantize\"\nfrom = \"deltas\"\nbits = 4\n";

fn run(bench: &Bench) -> Result<()> {
    let encoders = bench.encoders()?;
    hashing(bench, &encoders)?;
    pass(bench, &encoders, "merge: task arithmetic over 8 task vectors", MERGED, true)?;
    pass(bench, &encoders, "quantize: 8 task vectors to 4 bits, two passes each", PACKED, false)
}

/// The first run over inputs that the store has never seen.
fn hashing(bench: &Bench, encoders: &Encoders) -> Result<()> {
    let lab = Lab::new(bench.root(), "hashing")?;
    let pipeline = lab.write("pipeline.toml", &encoders.pipeline(""))?;
    let [ours, theirs] = interleaved(
        bench.runs,
        [
            &mut || {
                lab.clear_cache()?;
                lab.seconds(&pipeline, &[])
            },
            &mut || seconds(&mut cat(encoders.paths())),
        ],
    )?;
    figure("hashing the inputs (first run only; load and diff)", ours.seconds());
    compare(&ours, &theirs, None);
    Ok(())
}

fn pass(bench: &Bench, encoders: &Encoders, what: &str, stage: &str, single: bool) -> Result<()> {
    let lab = Lab::new(bench.root(), "streaming")?;
    let pipeline = lab.write("pipeline.toml", &encoders.pipeline(stage))?;
    lab.seconds(&pipeline, &["--stage", "deltas"])?;
    lab.seconds(&pipeline, &["--stage", "deltas"])?;
    lab.save_cache()?;
    // What a plain copy of the output costs on this disk: written once and synced.
    let output_bytes =
        if single { encoders.bytes_per_file } else { encoders.bytes_per_file * N_TASKS as u64 / 8 };
    let target = lab.path("copied");
    let [ours, theirs, written] = interleaved(
        bench.runs,
        [
            &mut || {
                lab.restore_cache()?;
                lab.seconds(&pipeline, &[])
            },
            &mut || seconds(&mut cat(encoders.paths())),
            &mut || {
                if target.exists() {
                    fs_err::remove_file(&target)?;
                }
                let mut copy = std::process::Command::new("sh");
                copy.args([
                    "-c",
                    "head -c \"$1\" \"$2\" > \"$3\" && sync -d \"$3\"",
                    "copy",
                    &output_bytes.to_string(),
                ]);
                seconds(copy.arg(&encoders.paths()[0]).arg(&target))
            },
        ],
    )?;
    figure(what, ours.seconds());
    compare(&ours, &theirs, Some(LIMIT));
    figure("    of which storing takes at least (copy and sync the output)", written.seconds());
    Ok(())
}

fn compare(ours: &Median, theirs: &Median, limit: Option<f64>) {
    figure("    cat to /dev/null", theirs.seconds());
    let ratio = ours.value / theirs.value;
    match limit {
        Some(limit) => budget("    ratio", ratio, " ×", Budget::AtMost(limit)),
        None => figure("    ratio", format!("{ratio:.2} ×")),
    }
}
