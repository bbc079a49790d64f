//! Merge methods against the code that defines them, or against mergekit: from checkpoints to a merged checkpoint, with nothing cached.
//!
//! Peers are installed or checked out by whoever measures; a peer that is not there is said to be missing, and ours is measured alone.

use super::Section;
use super::mergekit::{self, mergekit};
use crate::inputs::{Encoders, N_TASKS};
use crate::report::{Budget, budget, figure, interleaved};
use crate::tool::{Lab, find_program, seconds, succeed, watched};
use crate::{Bench, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

pub const SECTION: Section =
    Section { name: "methods", title: "merge methods against their authors' code", run };

/// A Python with torch and safetensors.
const PYTHON: &str = "MERGANSER_PEER_PYTHON";

/// Peers take minutes: ours is repeated as often as theirs.
const RUNS: usize = 3;

fn run(bench: &Bench) -> Result<()> {
    let encoders = bench.encoders()?;
    ties(bench, &encoders)?;
    authors(bench, &encoders, "tsv-m", "MERGANSER_PEER_TSV")?;
    authors(bench, &encoders, "iso-c", "MERGANSER_PEER_ISO")?;
    svd_hybrid(bench, &encoders)
}

/// A merge as a pipeline of its own.
fn merge(encoders: &Encoders, method: &str, parameters: &str) -> String {
    encoders.pipeline(&format!(
        "[stage.merged]\nkind = \"merge\"\nmethod = \"{method}\"\n{parameters}from = {{ base = \"base\", vectors = \"deltas\" }}\n"
    ))
}

fn ties(bench: &Bench, encoders: &Encoders) -> Result<()> {
    const LIMIT: f64 = 50.0;
    let lab = Lab::new(bench.root(), "ties")?;
    // What mergekit does by default; a test over its golden values holds that these parameters mean the same.
    let parameters = "scope = \"tensor\"\ndensity = 0.2\nmean_by = \"weights\"\ntie = \"positive\"\n";
    let pipeline = lab.write("pipeline.toml", &merge(encoders, "ties", parameters))?;
    let parameters = "      weight: 0.3\n      density: 0.2\n";
    let config = lab.write("mergekit.yaml", &mergekit::config(encoders, "ties", parameters))?;
    let target = lab.path("merged");
    let peer = mergekit().map(|program| {
        move || {
            if target.exists() {
                fs_err::remove_dir_all(&target)?;
            }
            seconds(Command::new(&program).arg(&config).arg(&target).arg("--safe-serialization"))
        }
    });
    compare(bench, &lab, &pipeline, "ties", "mergekit", mergekit::MISSING, peer, LIMIT)
}

fn authors(bench: &Bench, encoders: &Encoders, method: &str, variable: &str) -> Result<()> {
    const LIMIT: f64 = 8.0;
    let lab = Lab::new(bench.root(), method)?;
    let pipeline = lab.write("pipeline.toml", &merge(encoders, method, "scale = 1.0\n"))?;
    let missing = format!(
        "set {PYTHON} to a Python with torch and safetensors, and {variable} to a checkout of the authors' repository"
    );
    let (script, target) = (script("authors.py"), lab.path("theirs.safetensors"));
    let paths = encoders.paths();
    let peer = python().zip(checkout(variable)).map(|(python, checkout)| {
        move || {
            let mut command = Command::new(&python);
            command.arg(&script).arg(method).arg(&checkout).arg(&paths[0]).arg(&target).args(&paths[1..]);
            seconds(&mut command)
        }
    });
    compare(bench, &lab, &pipeline, method, "the authors' torch code", &missing, peer, LIMIT)
}

fn svd_hybrid(bench: &Bench, encoders: &Encoders) -> Result<()> {
    const LIMIT: f64 = 50.0;
    const VARIABLE: &str = "MERGANSER_PEER_SVD_HYBRID";
    let lab = Lab::new(bench.root(), "svd-hybrid")?;
    let further = "[stage.basis]\nkind = \"svd\"\nfrom = { deltas = \"deltas\" }\nenergy = 0.95\nmax_rank = 64\n\
        [stage.coefficients]\nkind = \"compress\"\nfrom = { deltas = \"deltas\", basis = \"basis\" }\n\
        [stage.packed]\nkind = \"quantize\"\nfrom = \"coefficients\"\nbits = 4\nresidual_stages = 2\n\
        [stage.merged]\nkind = \"merge\"\nmethod = \"svd-hybrid\"\nfrom = { base = \"base\", vectors = \"packed\" }\n";
    // What the original stores: half-precision bases beside the coefficients.
    let stored = further.replace("max_rank = 64\n", "max_rank = 64\nstore = \"basis\"\n");
    let views = lab.write("views.toml", &encoders.pipeline(further))?;
    let pipeline = lab.write("pipeline.toml", &encoders.pipeline(&stored))?;
    let missing = format!(
        "set {PYTHON} to a Python with torch, torchvision, datasets, scikit-learn and open_clip_torch, and {VARIABLE} to a checkout of the original"
    );
    let folder = lab.path("original");
    fs_err::create_dir_all(&folder)?;
    let peer = python().zip(checkout(VARIABLE));
    if let Some((python, _)) = &peer {
        // The original reads torch files only; writing them is not part of its time.
        succeed(Command::new(python).arg(script("convert.py")).arg(&folder).args(encoders.paths()))?;
    }
    let peer = peer.map(|(python, checkout)| {
        let folder = folder.clone();
        move || {
            let out = folder.join("out");
            let mut command = Command::new(&python);
            command.current_dir(&checkout).env("PYTHONPATH", &checkout).arg("src/main.py");
            command.args(["--method", "svd_hybrid", "--device", "cpu", "--store-artifacts", "--tasks"]);
            command.args((0..N_TASKS).map(|task| format!("task{task}")));
            command.arg("--checkpoint-dir").arg(&folder).arg("--base-model-path").arg(folder.join("base.pt"));
            command.arg("--output-dir").arg(&out).arg("--artifact-dir").arg(out.join("artifacts"));
            seconds(&mut command)
        }
    });
    compare(bench, &lab, &pipeline, "svd-hybrid, bases stored", "the original", &missing, peer, LIMIT)?;
    lab.clear_cache()?;
    let spent = watched(&mut lab.run(&views, &[]))?;
    figure("svd-hybrid, bases as views", format!("{:.3} s", spent.seconds));
    figure("    highest private memory", format!("{} MB", spent.private_bytes / 1_000_000));
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "one comparison is described by all of these")]
fn compare(
    bench: &Bench,
    lab: &Lab,
    pipeline: &Path,
    what: &str,
    peer_name: &str,
    missing: &str,
    peer: Option<impl FnMut() -> Result<f64>>,
    limit: f64,
) -> Result<()> {
    let mut ours = || {
        lab.clear_cache()?;
        lab.seconds(pipeline, &[])
    };
    let runs = bench.runs.min(RUNS);
    let Some(mut peer) = peer else {
        let [ours] = interleaved(runs, [&mut ours])?;
        figure(&format!("{what}, 8 encoders, hashing of inputs included"), ours.seconds());
        figure(&format!("    {peer_name}"), format!("not measured: {missing}"));
        return Ok(());
    };
    let [ours, theirs] = interleaved(runs, [&mut ours, &mut peer])?;
    figure(&format!("{what}, 8 encoders, hashing of inputs included"), ours.seconds());
    figure(&format!("    {peer_name}"), theirs.seconds());
    budget("    times as fast", theirs.value / ours.value, " ×", Budget::AtLeast(limit));
    Ok(())
}

fn python() -> Option<PathBuf> {
    find_program(PYTHON, "merganser-peer-python")
}

/// The folder that a variable names.
fn checkout(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from)
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers").join(name)
}
