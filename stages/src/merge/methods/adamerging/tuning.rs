//! Tuning coefficients: steps of Adam on the entropy of what the merged model answers to images of all tasks.
//!
//! A step merges with the coefficients as they are, runs a batch of every task through the merged model and its own head, and adds up the
//! gradients G of the mean entropies by the model's tensors. By the chain rule dH/dλ_t is ⟨G, τ_t⟩, over the tensors that share λ_t. So the
//! graph knows nothing of task vectors, which may be packed, and memory does not grow with their number.
//!
//! As in the authors' code, what is used is the coefficient clamped to 0 to 1; outside, it has no gradient. A task's images come in a new order
//! in every epoch, a function of seed, task and epoch.
//!
//! What has been found out is kept every [`STEPS_KEPT`] steps as a part of the artifact: a killed run goes on there, to the same bytes.

use super::vectors::Vectors;
use crate::evaluate::Evaluation;
use crate::gradients::{self, Fed, LossGraph};
use crate::merge::inputs::{MergeInputs, Operand};
use crate::replaced::Replaced;
use crate::{Draft, Job, Notice, StageError, checkpoint};
use blake3::Hash;
use merganser_cache::{self as cache, Preimage, Staging};
use merganser_onnx::gradient::{Forward, TensorGradients, Value, losses};
use merganser_onnx::train::{AdamW, Algorithm, Optimizer, State as Moments, Tensors};
use merganser_tensors::kernels::random::Stream;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::sync::Arc;

/// Steps after which the state is kept.
const STEPS_KEPT: u32 = 50;

/// The blob of a kept state.
const STATE: &str = "state.json";

/// The name under which the optimizer knows the coefficients.
const COEFFICIENTS: &str = "coefficients";

/// What is asked for.
pub(super) struct Settings {
    pub steps: u32,
    pub batch_size: usize,
    pub learning_rate: f32,
    pub initial: f32,
    pub seed: u64,
    /// Whether every tensor has coefficients of its own.
    pub by_tensor: bool,
}

/// How far it has come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    /// Coefficients before they are clamped, group after group, in each the tasks in their order.
    raw: Vec<f32>,
    moments: Moments,
    /// By step, the mean entropy of every task's batch.
    pub entropies: Vec<Vec<f32>>,
}

/// A task's images, and the graph of the entropy of its batches.
struct Task<'t> {
    name: &'t str,
    evaluation: Evaluation<'t>,
    batch: usize,
    graph: LossGraph,
}

/// Everything that does not change from step to step.
pub(super) struct Tuning<'a, 'o> {
    pub inputs: &'o MergeInputs<'a>,
    pub operands: &'o [&'o Operand<'a>],
    pub vectors: &'o Vectors,
    pub settings: Settings,
}

impl Task<'_> {
    /// The mean entropy of a batch, and its gradients.
    fn run(
        &mut self,
        step: u32,
        seed: u64,
        fed: &Fed,
        merged: &checkpoint::Weights,
    ) -> Result<(f32, TensorGradients), StageError> {
        let order = batch(self.name, self.evaluation.n_images(), self.batch, seed, step);
        let images = self.evaluation.images(&order, Vec::new())?;
        let mut gradients = TensorGradients::default();
        let found = self.graph.run(&images, &[], fed, merged, &mut gradients)?;
        if !found.loss.is_finite() {
            return Err(StageError::input(format!(
                "step {step}: the entropy of what the merged model answers to images of `{}` is {}",
                self.name, found.loss
            )));
        }
        Ok((found.loss, gradients))
    }
}

impl State {
    fn new(n_groups: usize, n_tasks: usize, initial: f32) -> Self {
        Self { raw: vec![initial; n_groups * n_tasks], moments: Moments::default(), entropies: Vec::new() }
    }

    /// The coefficients of a group of tensors, one per task.
    pub(super) fn coefficients(&self, group: usize, n_tasks: usize) -> Vec<f32> {
        self.raw[group * n_tasks..(group + 1) * n_tasks].iter().map(|raw| raw.clamp(0.0, 1.0)).collect()
    }

    fn step(&mut self, gradient: &[f32], learning_rate: f32) -> Result<(), StageError> {
        let adam = Algorithm::AdamW(AdamW { weight_decay: 0.0, ..AdamW::default() });
        let mut optimizer = Optimizer::resume(adam, std::mem::take(&mut self.moments));
        let mut values = Tensors::from([(COEFFICIENTS.to_owned(), std::mem::take(&mut self.raw))]);
        optimizer
            .step(&mut values, &[(COEFFICIENTS, gradient)], learning_rate, f32::INFINITY)
            .map_err(|error| StageError::input(error.to_string()))?;
        self.raw = values.remove(COEFFICIENTS).unwrap_or_default();
        self.moments = optimizer.state().clone();
        Ok(())
    }
}

impl Tuning<'_, '_> {
    fn n_tasks(&self) -> usize {
        self.inputs.vectors.len()
    }

    /// The group whose coefficients an operand has.
    fn group(&self, position: usize) -> usize {
        if self.settings.by_tensor { position } else { 0 }
    }

    /// Tunes to the end. `evaluations` are those of the tasks, in the order of their vectors.
    pub(super) fn run(&self, evaluations: Vec<(&str, Evaluation<'_>)>) -> Result<State, StageError> {
        let job = self.inputs.job;
        let n_groups = if self.settings.by_tensor { self.operands.len() } else { 1 };
        let start = || (0, State::new(n_groups, self.n_tasks(), self.settings.initial));
        let (mut done, mut state) = self.newest()?.unwrap_or_else(start);
        // Graphs are made if there is something left to do.
        let mut waiting = evaluations;
        let mut tasks: Vec<Task<'_>> = Vec::new();
        while done < self.settings.steps {
            let end = (done + STEPS_KEPT).min(self.settings.steps);
            let artifact = job.part(&preimage_of(job.preimage, end), |staging| {
                if !waiting.is_empty() {
                    tasks = self.tasks(std::mem::take(&mut waiting))?;
                }
                let mut next = state.clone();
                for step in done..end {
                    self.step(step, &mut next, &mut tasks)?;
                }
                keep(&next, staging)
            })?;
            state = read(job, &artifact)?;
            done = end;
        }
        Ok(state)
    }

    /// The newest state that an earlier process has kept, and after how many steps.
    fn newest(&self) -> Result<Option<(u32, State)>, StageError> {
        let job = self.inputs.job;
        let total = self.settings.steps;
        for kept in (1..=total.div_ceil(STEPS_KEPT)).rev() {
            let done = (kept * STEPS_KEPT).min(total);
            if let Some(artifact) = job.stored(&preimage_of(job.preimage, done)) {
                (job.notify)(Notice::Info(format!("going on after step {done} of {total}")));
                return Ok(Some((done, read(job, &artifact)?)));
            }
        }
        Ok(None)
    }

    fn tasks<'t>(&self, evaluations: Vec<(&'t str, Evaluation<'t>)>) -> Result<Vec<Task<'t>>, StageError> {
        let base = checkpoint::Weights::new(Arc::clone(&self.inputs.base));
        let is_merged = |name: &str| self.operands.iter().any(|operand| operand.name() == name);
        let one = |(name, evaluation): (&'t str, Evaluation<'t>)| {
            let batch = self.settings.batch_size.min(evaluation.n_images());
            let entropy = |forward: &mut Forward, logits: &Value| losses::entropy(forward.tape(), logits);
            let graph = LossGraph::new(self.inputs.job, &evaluation, &base, batch, &is_merged, entropy)?;
            Ok(Task { name, evaluation, batch, graph })
        };
        evaluations.into_iter().map(one).collect()
    }

    fn step(&self, step: u32, state: &mut State, tasks: &mut [Task<'_>]) -> Result<(), StageError> {
        let job = self.inputs.job;
        if (job.cancelled)() {
            return Err(StageError::Cancelled);
        }
        let n_tasks = self.n_tasks();
        let used: Vec<Vec<f32>> = (0..self.operands.len())
            .map(|position| state.coefficients(self.group(position), n_tasks))
            .collect();
        let used: Vec<&[f32]> = used.iter().map(Vec::as_slice).collect();
        let merged = Replaced::new(&self.inputs.base, self.vectors.merged(self.operands, &used)?);
        let merged = checkpoint::Weights::new(Arc::new(merged));
        let mut fed = Fed::new();
        tasks.iter().try_for_each(|task| task.graph.feed(&mut fed, &merged))?;
        let mut sums = TensorGradients::default();
        let mut entropies = Vec::with_capacity(n_tasks);
        // Tasks side by side, as many as there are threads; their gradients are added up in their order.
        for wave in tasks.chunks_mut(job.threads.max(1)) {
            let run = |task: &mut Task<'_>| task.run(step, self.settings.seed, &fed, &merged);
            let found: Vec<_> = wave.par_iter_mut().map(run).collect();
            for own in found {
                let (entropy, own) = own?;
                entropies.push(entropy);
                gradients::add(&mut sums, own);
            }
        }
        let products = self.vectors.products(self.operands, &sums.tensors)?;
        let mut gradient = vec![0.0f64; state.raw.len()];
        for (position, products) in products.iter().enumerate() {
            let first = self.group(position) * n_tasks;
            gradient[first..first + n_tasks].iter_mut().zip(products).for_each(|(sum, own)| *sum += own);
        }
        let gradient: Vec<f32> = gradient
            .iter()
            .zip(&state.raw)
            .map(|(gradient, raw)| if (0.0..=1.0).contains(raw) { *gradient as f32 } else { 0.0 })
            .collect();
        state.step(&gradient, self.settings.learning_rate)?;
        let total: f32 = entropies.iter().sum();
        job.steps(
            u64::from(step) + 1,
            self.settings.steps.into(),
            [Some(("entropy", f64::from(total) / n_tasks as f64)), None],
        );
        state.entropies.push(entropies);
        Ok(())
    }
}

/// The images of a task's batch at a step: whole batches of every epoch's order, what is left over waits for the next epoch.
fn batch(task: &str, n_images: usize, size: usize, seed: u64, step: u32) -> Vec<usize> {
    let per_epoch = n_images / size;
    let (epoch, place) = (step as usize / per_epoch, step as usize % per_epoch);
    let mut words = vec![0u32; 2 * n_images];
    Stream::new(seed, &["adamerging", task, &epoch.to_string()]).fill(0, &mut words);
    let mut order: Vec<usize> = (0..n_images).collect();
    order.sort_by_key(|&image| (words[2 * image], words[2 * image + 1], image));
    order[place * size..(place + 1) * size].to_vec()
}

/// What the state after so many steps is a function of.
fn preimage_of(preimage: &Preimage, steps: u32) -> Preimage {
    let part = cache::Value::map([("part", format!("coefficients after {steps} steps").as_str())]);
    Preimage {
        operation: cache::Value::List(vec![preimage.operation.clone(), part]),
        inputs: preimage.inputs.clone(),
    }
}

fn keep(state: &State, staging: &Staging) -> Result<Draft, StageError> {
    let mut writer = staging.writer(STATE)?;
    writer.write_all(&serde_json::to_vec(state).map_err(|error| StageError::Internal(error.to_string()))?)?;
    let manifest = serde_json::json!({ "content": "coefficients of a merge" }).to_string();
    Ok(Draft { manifest, blobs: vec![writer.finish()?], operands: Vec::new(), sources: Vec::new() })
}

fn read(job: &Job<'_>, artifact: &Hash) -> Result<State, StageError> {
    let json = job.files.optional_blob(artifact, STATE)?.unwrap_or_default();
    serde_json::from_slice(&json).map_err(|error| StageError::Internal(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_has_whole_batches_in_another_order() {
        let epoch = |epoch: u32| -> Vec<usize> {
            (0..3).flat_map(|place| batch("digits", 14, 4, 7, 3 * epoch + place)).collect()
        };
        for number in 0..20 {
            let mut seen = epoch(number);
            assert_eq!(seen.len(), 12);
            assert_ne!(seen, epoch(number + 1));
            seen.sort_unstable();
            seen.dedup();
            assert_eq!((seen.len(), seen.iter().all(|image| *image < 14)), (12, true));
        }
        assert_eq!(batch("digits", 14, 4, 7, 5), batch("digits", 14, 4, 7, 5));
        assert_ne!(batch("digits", 14, 4, 7, 5), batch("parity", 14, 4, 7, 5));
        assert_ne!(batch("digits", 14, 4, 7, 5), batch("digits", 14, 4, 8, 5));
        assert_eq!(batch("digits", 1, 1, 0, 9), [0]);
    }

    #[test]
    fn coefficients_are_used_within_their_limits() {
        let mut state = State::new(2, 3, 0.3);
        state.raw[4] = -0.2;
        state.raw[5] = 1.25;
        assert_eq!(state.coefficients(0, 3), [0.3; 3]);
        assert_eq!(state.coefficients(1, 3), [0.3, 0.0, 1.0]);
    }

    #[test]
    fn a_first_step_of_adam_has_the_length_of_the_rate() {
        let mut state = State::new(1, 2, 0.3);
        state.step(&[2.0, -1e-3], 1e-3).unwrap();
        let expected = [0.3 - 1e-3, 0.3 + 1e-3];
        assert!(state.raw.iter().zip(expected).all(|(raw, expected)| (raw - expected).abs() < 1e-7));
    }

    #[test]
    fn a_state_is_kept_to_the_bit() {
        let mut state = State::new(3, 2, 0.3);
        for step in 0..7u32 {
            let gradient: Vec<f32> = (0..6).map(|i| ((i * 31 + step * 17) as f32).sin() * 1e-3).collect();
            state.step(&gradient, 1e-3).unwrap();
            state.entropies.push(vec![1.0 / (step as f32 + 3.0), 0.1]);
        }
        let json = serde_json::to_vec(&state).unwrap();
        assert_eq!(serde_json::from_slice::<State>(&json).unwrap(), state);
    }
}
