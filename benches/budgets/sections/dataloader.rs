//! Evaluation of a folder of images, whole process, against the loop that people write in Python.

use super::Section;
use super::evaluation::library;
use crate::report::{Budget, budget, figure, interleaved};
use crate::tool::{Lab, find_program, output, seconds};
use crate::{Bench, Result};
use std::path::Path;
use std::process::Command;

pub const SECTION: Section = Section {
    name: "dataloader",
    title: "evaluation against Python: PIL, DataLoader with workers, onnxruntime",
    run,
};

const LIMIT: f64 = 1.2;
const BATCH_SIZE: &str = "64";
/// Each of the quickstart's 600 rotated images, enlarged, this many times.
const COPIES: &str = "10";
const SIZE: &str = "160";

const MISSING: &str = "set MERGANSER_PEER_PYTHON to a Python with torch, onnxruntime, pillow and safetensors";

fn run(bench: &Bench) -> Result<()> {
    let Some(python) = find_program("MERGANSER_PEER_PYTHON", "python3").filter(|python| has_packages(python))
    else {
        figure("not measured", MISSING);
        return Ok(());
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let quickstart = root.join("pipelines/quickstart");
    let script = root.join("benches/peers/evaluate.py");
    let lab = Lab::new(bench.root(), "dataloader")?;
    let images = lab.path("images");
    let peer = |arguments: &[&Path]| {
        let mut command = Command::new(&python);
        command.arg(&script).args(arguments);
        command
    };
    let rotated = quickstart.join("data/rotated");
    seconds(peer(&["prepare".as_ref(), &rotated, &images]).args([SIZE, COPIES]))?;
    let folder = quickstart.display();
    let pipeline = lab.write(
        "pipeline.toml",
        &format!(
            "[stage.base]\nkind = \"load\"\npath = '{folder}/base.safetensors'\n\n\
             [stage.scores]\nkind = \"evaluate\"\nfrom = {{ model = \"base\", origin = \"base\" }}\n\
             graph = '{folder}/clip_vision.onnx'\nbatch_size = {BATCH_SIZE}\n\n[stage.scores.dataset.rotated]\nformat = \"folder\"\n\
             path = '{}'\nhead = '{folder}/head_rotated.safetensors'\n",
            images.display()
        ),
    )?;
    let library = library()?;
    let (graph, config) = (quickstart.join("clip_vision.onnx"), quickstart.join("preprocessor_config.json"));
    let head = quickstart.join("head_rotated.safetensors");
    let (mut our_correct, mut their_correct, mut n_images) = (0, 0, 0);
    let [ours, theirs] = interleaved(
        bench.runs,
        [
            &mut || {
                // Nothing is cached: every image is hashed, decoded and inferred.
                lab.clear_cache()?;
                let started = std::time::Instant::now();
                let mut command = lab.run(&pipeline, &["--json"]);
                let record: serde_json::Value =
                    serde_json::from_str(&output(command.env("ORT_DYLIB_PATH", &library))?)?;
                let taken = started.elapsed().as_secs_f64();
                let accuracy = &record["scores"][0];
                our_correct = accuracy["correct"].as_u64().ok_or("`run --json` lists no correct answers")?;
                Ok(taken)
            },
            &mut || {
                let said =
                    output(peer(&["score".as_ref(), &graph, &config, &head, &images]).arg(BATCH_SIZE))?;
                let said: serde_json::Value = serde_json::from_str(&said)?;
                their_correct = said["correct"].as_u64().ok_or("the peer tells no correct answers")?;
                n_images = said["images"].as_u64().ok_or("the peer tells no number of images")?;
                said["seconds"].as_f64().ok_or_else(|| "the peer tells no seconds".into())
            },
        ],
    )?;
    let rate = |seconds: f64| format!("{:.0} images/s", n_images as f64 / seconds);
    figure(
        &format!("whole process, {n_images} PNG files of {SIZE} x {SIZE}, hashing included"),
        rate(ours.value),
    );
    figure("    spread", ours.seconds());
    figure("Python, without its start and imports", rate(theirs.value));
    figure("    spread", theirs.seconds());
    figure("correct answers, ours and theirs", format!("{our_correct} and {their_correct}"));
    budget("    times as fast", theirs.value / ours.value, " ×", Budget::AtLeast(LIMIT));
    Ok(())
}

fn has_packages(python: &Path) -> bool {
    let imports = "import torch, onnxruntime, PIL, safetensors";
    Command::new(python).args(["-c", imports]).output().is_ok_and(|output| output.status.success())
}
