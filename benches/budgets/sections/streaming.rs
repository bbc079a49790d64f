//! Streaming passes over all encoders, with hashing and publishing, against `cat` of the same bytes to `/dev/null`.

use super::Section;
use crate::inputs::{Encoders, N_TASKS};
use crate::report::{Budget, Median, budget, figure, interleaved};
use crate::tool::{Lab, cat, seconds};
use crate::{Bench, Result};
use std::path::PathBuf;
use std::process::Command;

pub const SECTION: Section = Section { name: "streaming", title: "streaming passes against `cat`", run };

const LIMIT: f64 = 2.0;
const QUANTIZE_LIMIT: f64 = 2.5;

const MERGED: &str = "[stage.merged]\nkind = \"merge\"\nmethod = \"task-arithmetic\"\nscale = 0.3\n\
                      from = { base = \"base\", vectors = \"deltas\" }\n";
const PACKED: &str = "[stage.packed]\nkind = \"quantize\"\nfrom = \"deltas\"\nbits = 4\n";

fn run(bench: &Bench) -> Result<()> {
    let encoders = bench.encoders()?;
    hashing(bench, &encoders)?;
    let merge = Pass {
        what: "merge: task arithmetic over 8 task vectors",
        stage: MERGED,
        output_bytes: encoders.bytes_per_file,
        read: encoders.paths(),
        limit: LIMIT,
    };
    merge.measure(bench, &encoders)?;
    // Every task vector is a unit of its own, computed from its two files: the base is read eight times.
    let paths = encoders.paths();
    let pairs = paths[1..].iter().flat_map(|tuned| [paths[0].clone(), tuned.clone()]).collect();
    let quantize = Pass {
        what: "quantize: 8 task vectors to 4 bits, each from two files that are read once",
        stage: PACKED,
        output_bytes: encoders.bytes_per_file * N_TASKS as u64 / 8,
        read: pairs,
        limit: QUANTIZE_LIMIT,
    };
    quantize.measure(bench, &encoders)
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

/// A stage over all encoders, and `cat` of the files that one pass of it reads.
struct Pass {
    what: &'static str,
    stage: &'static str,
    output_bytes: u64,
    read: Vec<PathBuf>,
    limit: f64,
}

impl Pass {
    fn measure(&self, bench: &Bench, encoders: &Encoders) -> Result<()> {
        let lab = Lab::new(bench.root(), "streaming")?;
        let pipeline = lab.write("pipeline.toml", &encoders.pipeline(self.stage))?;
        lab.seconds(&pipeline, &["--stage", "deltas"])?;
        lab.seconds(&pipeline, &["--stage", "deltas"])?;
        lab.save_cache()?;
        let target = lab.path("copied");
        let [ours, theirs, stored] = interleaved(
            bench.runs,
            [
                &mut || {
                    lab.restore_cache()?;
                    lab.seconds(&pipeline, &[])
                },
                &mut || seconds(&mut cat(&self.read)),
                &mut || {
                    if target.exists() {
                        fs_err::remove_file(&target)?;
                    }
                    let mut copy = Command::new("sh");
                    copy.args(["-c", "head -c \"$1\" \"$2\" > \"$3\" && sync -d \"$3\"", "copy"]);
                    copy.arg(self.output_bytes.to_string()).arg(&self.read[0]).arg(&target);
                    seconds(&mut copy)
                },
            ],
        )?;
        figure(self.what, ours.seconds());
        compare(&ours, &theirs, Some(self.limit));
        figure("    copying and syncing as many bytes as are stored", stored.seconds());
        Ok(())
    }
}

fn compare(ours: &Median, theirs: &Median, limit: Option<f64>) {
    figure("    cat to /dev/null", theirs.seconds());
    let ratio = ours.value / theirs.value;
    match limit {
        Some(limit) => budget("    ratio", ratio, " ×", Budget::AtMost(limit)),
        None => figure("    ratio", format!("{ratio:.2} ×")),
    }
    figure(
        "    ratio of CPU time (on one core, or on a busy machine)",
        format!("{:.2} ×", ours.cpu / theirs.cpu),
    );
}
