//! Training against PyTorch: forward, backward and AdamW of all weights of a ViT-B/32 and of a DeiT, a batch of 8 images.
//!
//! Both sides start from the same weights and see the same batch, so that their losses have to agree. Each runs as a process of its own; ours is
//! this program again.

use super::Section;
use super::evaluation::{Checkpoint, library};
use crate::report::{Budget, Median, budget, cpu_seconds_so_far, figure};
use crate::tool::{find_program, output, succeed, watched};
use crate::{Bench, Result};
use merganser_onnx::gradient::Forward;
use merganser_onnx::train::{AdamW, Algorithm, Optimizer, Tensors};
use merganser_onnx::{Binding, Graph, Input, Prepared, Runtime, SessionOptions};
use ndarray::{ArrayView, IxDyn};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

pub const SECTION: Section =
    Section { name: "training", title: "training steps against PyTorch: ViT-B/32 and DeiT-tiny", run };

const TIME_LIMIT: f64 = 1.1;
const MEMORY_LIMIT: f64 = 1.2;
const MODELS: [&str; 2] = ["clip_vit_b32", "deit_tiny"];
/// Of each process; the first two are not counted.
const STEPS: usize = 8;
const WARM_UP: usize = 2;
const RATE: f32 = 1e-5;
/// The argument that makes this program train; after it: a folder, threads, steps.
pub const CHILD: &str = "--train";

const MISSING: &str =
    "set MERGANSER_PEER_PYTHON to a Python with torch, timm, transformers, onnx and safetensors";

/// What training took, step by step.
#[derive(Serialize, Deserialize)]
struct Taken {
    losses: Vec<f64>,
    seconds: Vec<f64>,
    cpu_seconds: Vec<f64>,
}

fn run(bench: &Bench) -> Result<()> {
    let Some(python) = find_program("MERGANSER_PEER_PYTHON", "python3").filter(|python| has_packages(python))
    else {
        figure("not measured", MISSING);
        return Ok(());
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut threads = vec![1, cores];
    threads.dedup();
    for model in MODELS {
        let folder = bench.root().join("training").join(model);
        let peer = |command: &str, numbers: &[usize]| {
            let mut process = Command::new(&python);
            process.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/training.py"));
            process.arg(command).arg(model).arg(&folder).args(numbers.iter().map(usize::to_string));
            process
        };
        if !folder.join("model.onnx").exists() {
            succeed(&mut peer("prepare", &[]))?;
        }
        for &threads in &threads {
            compare(bench, model, threads, &folder, &peer)?;
        }
    }
    Ok(())
}

fn compare(
    bench: &Bench,
    model: &str,
    threads: usize,
    folder: &Path,
    peer: &dyn Fn(&str, &[usize]) -> Command,
) -> Result<()> {
    let ours = || -> Result<Command> {
        let mut process = Command::new(std::env::current_exe()?);
        process.arg(CHILD).arg(folder).args([threads.to_string(), STEPS.to_string()]);
        process.env("RAYON_NUM_THREADS", threads.to_string());
        Ok(process)
    };
    let mut sides = [Side::default(), Side::default()];
    for _ in 0..bench.runs {
        sides[0].add(&output(&mut ours()?)?)?;
        sides[1].add(&output(&mut peer("train", &[threads, STEPS]))?)?;
    }
    let [ours_taken, theirs_taken] = sides;
    let worst = ours_taken
        .losses
        .iter()
        .zip(&theirs_taken.losses)
        .map(|(a, b)| (a / b - 1.0).abs())
        .fold(0.0, f64::max);
    let memory = [watched(&mut ours()?)?, watched(&mut peer("train", &[threads, STEPS]))?];
    let megabytes = memory.map(|spent| spent.private_bytes as f64 / 1e6);
    let [(our_time, our_cpu), (their_time, their_cpu)] = [ours_taken, theirs_taken].map(Side::medians);
    figure(&format!("{model}, batch 8, threads: {threads}; a step"), our_time.milliseconds());
    figure("    processor time", our_cpu.milliseconds());
    figure("    PyTorch", their_time.milliseconds());
    figure("    PyTorch, processor time", their_cpu.milliseconds());
    figure("    largest relative difference of losses", format!("{worst:.1e}"));
    figure(
        "    highest private memory, ours and PyTorch's",
        format!("{:.0} MB and {:.0} MB", megabytes[0], megabytes[1]),
    );
    budget("    of PyTorch's time", our_time.value / their_time.value, " ×", Budget::AtMost(TIME_LIMIT));
    budget(
        "    of PyTorch's processor time",
        our_cpu.value / their_cpu.value,
        " ×",
        Budget::AtMost(TIME_LIMIT),
    );
    budget("    of PyTorch's memory", megabytes[0] / megabytes[1], " ×", Budget::AtMost(MEMORY_LIMIT));
    Ok(())
}

/// All runs of one side.
#[derive(Default)]
struct Side {
    losses: Vec<f64>,
    seconds: Vec<f64>,
    cpu_seconds: Vec<f64>,
}

impl Side {
    fn add(&mut self, said: &str) -> Result<()> {
        let taken: Taken = serde_json::from_str(said)?;
        self.losses = taken.losses;
        self.seconds.extend(&taken.seconds[WARM_UP..]);
        // Processor time is counted in steps of 10 ms: one figure for all steps.
        let counted = &taken.cpu_seconds[WARM_UP..];
        self.cpu_seconds.push(counted.iter().sum::<f64>() / counted.len() as f64);
        Ok(())
    }

    fn medians(self) -> (Median, Median) {
        (Median::of(self.seconds), Median::of(self.cpu_seconds))
    }
}

fn has_packages(python: &Path) -> bool {
    let imports = "import torch, timm, transformers, onnx, safetensors";
    Command::new(python).args(["-c", imports]).output().is_ok_and(|output| output.status.success())
}

/// Trains in this process and prints what it took. Arguments: folder, threads, steps.
pub fn child(arguments: &[String]) -> Result<()> {
    let [folder, threads, steps] = arguments else {
        return Err("it needs a folder, threads and steps".into());
    };
    let taken = train(&PathBuf::from(folder), threads.parse()?, steps.parse()?)?;
    println!("{}", serde_json::to_string(&taken)?);
    Ok(())
}

fn train(folder: &Path, threads: usize, steps: usize) -> Result<Taken> {
    let batch = Checkpoint::read(&folder.join("batch.safetensors"))?;
    let (shape, pixels) = batch.get("pixels").ok_or("the batch has no pixels")?;
    let model = Checkpoint::read(&folder.join("model.safetensors"))?;
    let prepared = {
        let graph = Graph::load(&folder.join("model.onnx"))?;
        Prepared::new(&graph, &Binding::find(&graph, &model)?)?
    };
    let runtime = Runtime::load(&library()?)?;
    let mut forward = Forward::new(&runtime, &prepared, &[("pixels", shape)], &[], &std::env::temp_dir())?;
    drop(prepared);
    let y = forward.value(&forward.outputs()[0].clone())?;
    let tape = forward.tape();
    let square = tape.mul(&y, &y);
    let loss = tape.mean(&square);
    let weights: Vec<String> = forward.weights().iter().map(|slot| slot.name.clone()).collect();
    let weights: Vec<&str> = weights.iter().map(String::as_str).collect();
    let step = forward.differentiate(&loss, &weights, &[])?;
    let options = SessionOptions { intra_threads: threads, ..SessionOptions::default() };
    let mut session = runtime.session(step.prepared(), &model, options)?;
    let mut tensors = Tensors::new();
    for slot in step.trained_weights() {
        tensors.insert(slot.name.clone(), slot.values(&model)?);
    }
    drop(model);
    let mut optimizer = Optimizer::new(Algorithm::AdamW(AdamW::default()));
    let pixels = ArrayView::from_shape(IxDyn(shape), pixels)?;
    let mut taken = Taken { losses: Vec::new(), seconds: Vec::new(), cpu_seconds: Vec::new() };
    for _ in 0..steps {
        let (started, cpu_started) = (Instant::now(), cpu_seconds_so_far());
        let mut inputs = vec![("pixels", Input::F32(pixels.clone()))];
        for slot in step.trained_weights() {
            let values = ArrayView::from_shape(IxDyn(&slot.shape), &tensors[&slot.name])?;
            inputs.push((&slot.name, Input::F32(values)));
        }
        let outputs = session.outputs(&inputs)?;
        drop(inputs);
        let outputs: HashMap<_, _> = outputs.floats()?.into_iter().collect();
        let loss = outputs[step.loss()].iter().next().copied().unwrap_or(f32::NAN);
        let gradients: Vec<(&str, &[f32])> = step
            .gradients()
            .iter()
            .filter_map(|g| Some((g.variable.as_str(), outputs.get(g.output.as_deref()?)?.as_slice()?)))
            .collect();
        optimizer.step(&mut tensors, &gradients, RATE, f32::INFINITY)?;
        taken.seconds.push(started.elapsed().as_secs_f64());
        taken.cpu_seconds.push(cpu_seconds_so_far() - cpu_started);
        taken.losses.push(f64::from(loss));
    }
    Ok(taken)
}
