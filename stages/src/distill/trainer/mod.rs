//! The loop that every method of training goes through.
//!
//! A method is an [`Objective`]: a loss with its gradients for any number of samples, what a batch feeds, and what it thinks of the result
//! now and then. The loop does the rest: the order of samples (a function of seed and epoch), micro-batches, clipping, learning rates, the
//! optimizer, early stopping, the record, progress, and checkpoints.
//!
//! A run is a function of its parameters to the bit: nothing depends on threads, on the clock, or on where a killed run was taken up again.
//! Values are known by name: those of a checkpoint's tensors where a graph's weights are trained, and inputs that the objective added.

mod kept;
mod order;
mod record;

pub use record::{Epoch, GradientSummary, TRAINING, Training, Validation};

#[cfg(test)]
pub(super) use order::shuffled;

use super::training::{Keep, Monitor, TrainingParams};
use crate::job::Figures;
use crate::{Job, StageError};
use kept::Position;
use merganser_cache::Preimage;
use merganser_onnx::gradient::{Differentiated, TensorGradients};
use merganser_onnx::train::{Accumulator, Tensors, TrainError, clip_norm};
use merganser_onnx::{How, Input, Session, Slot, Source, Weights, WeightsError};
use ndarray::{ArrayD, ArrayView, ArrayViewD, IxDyn};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Values that a graph is fed or returns, by name.
pub(crate) type Values = BTreeMap<String, ArrayD<f32>>;

/// What is trained for.
pub(crate) trait Objective {
    /// The loss of `n` samples, as a mean over them, and its gradients. Asked for once per number of samples.
    ///
    /// Variables are weights of the graph, or inputs under the names of trained values.
    fn differentiate(&mut self, n: usize) -> Result<Differentiated, StageError>;

    /// The model as it is before the first step: what is not trained is taken from it.
    fn model(&self) -> &dyn Weights;

    /// What is fed beside the trained values: images, targets, what a teacher says.
    fn feed(&mut self, batch: &Batch<'_>) -> Result<Values, StageError>;

    /// Looks at what a batch returned beside the loss and the gradients.
    fn seen(&mut self, _batch: &Batch<'_>, _outputs: &Values) -> Result<(), StageError> {
        Ok(())
    }

    /// Brings values back where they have to be, after every step.
    fn constrain(&self, _trained: &mut Tensors) {}

    /// How good the model is on images for validation; nothing if there are none.
    fn validate(&mut self, _trained: &Tensors) -> Result<Option<Validation>, StageError> {
        Ok(None)
    }

    /// Told at the end of every epoch, after validation. It may change values; `false` ends training.
    fn epoch_ended(&mut self, _epoch: &Epoch, _trained: &mut Tensors) -> Result<bool, StageError> {
        Ok(true)
    }

    /// Whatever it remembers between steps: a checkpoint keeps it.
    fn state(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Goes on from a state.
    fn restore(&mut self, _state: serde_json::Value) -> Result<(), StageError> {
        Ok(())
    }

    /// A number to show while it runs, beside the loss.
    fn figure(&self) -> Option<(&'static str, f64)> {
        None
    }
}

/// Samples that are computed with at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch<'a> {
    /// From 0.
    pub step: u64,
    /// Which part of the step it is.
    pub part: usize,
    /// Positions among the samples.
    pub samples: &'a [usize],
}

/// What training came to.
pub(crate) struct Trained {
    pub values: Tensors,
    /// Counts of images and values are the caller's to fill in.
    pub record: Training,
}

/// Trains `values` on `n_samples`. Checkpoints are kept under `preimage`, which must cover everything that the run depends on.
pub(crate) fn train(
    job: &Job<'_>,
    preimage: &Preimage,
    params: &TrainingParams,
    n_samples: usize,
    values: Tensors,
    objective: &mut dyn Objective,
) -> Result<Trained, StageError> {
    if n_samples == 0 {
        return Err(StageError::input("there are no images to train on"));
    }
    let per_epoch = n_samples.div_ceil(params.batch_size as usize) as u64;
    let all = per_epoch * u64::from(params.epochs);
    let total = params.max_steps.map_or(all, |most| most.min(all));
    let mut run = Run {
        job,
        preimage,
        params,
        n_samples,
        per_epoch,
        total,
        objective,
        engines: BTreeMap::new(),
        position: Position::new(values, params.algorithm()),
    };
    run.resume()?;
    run.go()
}

struct Run<'a> {
    job: &'a Job<'a>,
    preimage: &'a Preimage,
    params: &'a TrainingParams,
    n_samples: usize,
    per_epoch: u64,
    total: u64,
    objective: &'a mut dyn Objective,
    /// By number of samples.
    engines: BTreeMap<usize, Engine>,
    position: Position,
}

/// A loss and its gradients, ready to run.
struct Engine {
    graph: Differentiated,
    session: Session,
}

impl Run<'_> {
    fn go(mut self) -> Result<Trained, StageError> {
        if self.position.step == 0 {
            self.position.record.initial = self.objective.validate(&self.position.values)?;
        }
        let rates = self.params.rates(self.total);
        let mut order = Vec::new();
        while self.position.step < self.total && !self.position.ended {
            if (self.job.cancelled)() {
                return Err(StageError::Cancelled);
            }
            let step = self.position.step;
            let within = (step % self.per_epoch) as usize;
            if order.is_empty() || within == 0 {
                order = order::shuffled(self.n_samples, self.params.seed, step / self.per_epoch);
            }
            let size = self.params.batch_size as usize;
            let samples = &order[within * size..self.n_samples.min((within + 1) * size)];
            self.step(step, samples, rates.rate(step))?;
            self.position.step = step + 1;
            if self.position.step.is_multiple_of(self.per_epoch) || self.position.step == self.total {
                self.end_epoch()?;
            }
            if self.position.step.is_multiple_of(self.interval()) && self.position.step < self.total {
                self.position.objective = self.objective.state();
                self.position.keep(self.job, self.preimage)?;
            }
        }
        Ok(self.position.finish(self.params.keep))
    }

    /// Steps between checkpoints. A function of the parameters alone, as is what a checkpoint holds.
    fn interval(&self) -> u64 {
        /// More would fill the store, fewer would lose much.
        const CHECKPOINTS: u64 = 10;
        const LEAST: u64 = 20;
        self.total.div_ceil(CHECKPOINTS).max(LEAST)
    }

    /// Takes up the newest checkpoint of an earlier process.
    fn resume(&mut self) -> Result<(), StageError> {
        let interval = self.interval();
        let newest = (1..=(self.total.saturating_sub(1)) / interval).rev().map(|i| i * interval);
        for step in newest {
            if let Some(found) = self.position.stored(self.job, self.preimage, step)? {
                let (total, message) = (self.total, "going on after step");
                (self.job.notify)(crate::Notice::Info(format!("{message} {step} of {total}")));
                self.position = found;
                let state = std::mem::take(&mut self.position.objective);
                return self.objective.restore(state);
            }
        }
        Ok(())
    }

    /// One step of the optimizer.
    fn step(&mut self, step: u64, samples: &[usize], rate: f32) -> Result<(), StageError> {
        let at_once = self.params.micro_batch.map_or(samples.len(), |size| size as usize);
        let mut sums = Accumulator::default();
        let mut loss = 0.0;
        for (part, samples) in samples.chunks(at_once).enumerate() {
            let batch = Batch { step, part, samples };
            let weight = samples.len() as f32;
            loss += f64::from(self.compute(&batch, weight, &mut sums)?) * f64::from(weight);
        }
        let loss = (loss / samples.len() as f64) as f32;
        let failed = |error: TrainError| failure(step, &error);
        let mut gradients = sums.take().map_err(failed)?;
        let largest = if self.params.clip > 0.0 { self.params.clip as f32 } else { f32::INFINITY };
        let norm = clip_norm(&mut gradients, largest).map_err(failed)?;
        self.position.optimizer.step(&mut self.position.values, &gradients, rate).map_err(failed)?;
        self.objective.constrain(&mut self.position.values);
        self.position.note(loss, rate, norm, samples.len());
        let figures: Figures = [Some(("loss", f64::from(loss))), self.objective.figure()];
        self.job.steps(step + 1, self.total, figures);
        Ok(())
    }

    /// Adds the gradients of a batch; returns its loss.
    fn compute(&mut self, batch: &Batch<'_>, weight: f32, sums: &mut Accumulator) -> Result<f32, StageError> {
        let n = batch.samples.len();
        if !self.engines.contains_key(&n) {
            let graph = self.objective.differentiate(n)?;
            let job = self.job;
            let session =
                job.services.session_of(graph.prepared(), self.objective.model(), job.threads, job.notify)?;
            self.engines.insert(n, Engine { graph, session });
        }
        let fed = self.objective.feed(batch)?;
        let engine = self.engines.get_mut(&n).expect("it was inserted");
        let model = self.objective.model();
        let computed = engine.run(&fed, &self.position.values, model)?;
        if !computed.loss.is_finite() {
            return Err(StageError::input_help(
                format!("the loss of step {} is {}", batch.step + 1, computed.loss),
                "lower `learning_rate`, or raise `warm_up`",
            ));
        }
        let gradients = computed.gradients.iter();
        let gradients = gradients.map(|(name, gradient)| (name.as_str(), gradient.as_slice()));
        sums.add(gradients, weight).map_err(|error| failure(batch.step, &error))?;
        self.objective.seen(batch, &computed.others)?;
        Ok(computed.loss)
    }

    fn end_epoch(&mut self) -> Result<(), StageError> {
        let validation = self.objective.validate(&self.position.values)?;
        if let Some(found) = validation.filter(|found| !found.loss.is_finite()) {
            let step = self.position.step;
            return Err(StageError::input(format!(
                "the validation loss after step {step} is {}",
                found.loss
            )));
        }
        let epoch = self.position.end_epoch(validation);
        let is_better = |best: &Validation, now: &Validation| match self.params.monitor {
            Monitor::Loss => now.loss < best.loss,
            Monitor::Accuracy => {
                now.accuracy > best.accuracy || now.accuracy == best.accuracy && now.loss < best.loss
            }
        };
        self.position.compare(&epoch, is_better, self.params.keep == Keep::Best);
        let goes_on = self.objective.epoch_ended(&epoch, &mut self.position.values)?;
        let waited = epoch.epoch - self.position.best.map_or(epoch.epoch, |(epoch, _)| epoch);
        if self.params.patience.is_some_and(|patience| waited >= u64::from(patience)) {
            self.position.ended = true;
            self.position.record.stopped_early = self.position.step < self.total;
        }
        self.position.ended |= !goes_on;
        Ok(())
    }
}

fn failure(step: u64, error: &TrainError) -> StageError {
    let message = format!("step {}: {error}", step + 1);
    match error {
        TrainError::NotFinite { .. } => StageError::input_help(message, "lower `learning_rate`"),
        TrainError::NoGradients => {
            StageError::input_help(message, "the loss depends on nothing that is trained")
        }
        _ => StageError::Internal(message),
    }
}

/// What a run of a graph gave.
struct Computed {
    loss: f32,
    gradients: Tensors,
    others: Values,
}

impl Engine {
    fn run(&mut self, fed: &Values, trained: &Tensors, model: &dyn Weights) -> Result<Computed, StageError> {
        let Self { graph, session } = self;
        let current = Current { model, trained };
        let weights = graph.trained_weights().iter().map(|slot| Ok((slot, current.slot(slot)?)));
        let weights = weights.collect::<Result<Vec<_>, StageError>>()?;
        let mut inputs: Vec<(&str, Input<'_>)> =
            fed.iter().map(|(name, array)| (name.as_str(), Input::from(array.view()))).collect();
        for (slot, values) in &weights {
            inputs.push((&slot.name, Input::from(view(&slot.name, &slot.shape, values)?)));
        }
        // Inputs that an objective added, whether the loss depends on them or not.
        for port in graph.prepared().inputs() {
            let Some(values) = trained.get(&port.name) else { continue };
            if let Some(gradient) = graph.gradients().iter().find(|gradient| gradient.variable == port.name)
                && !weights.iter().any(|(slot, _)| slot.name == port.name)
            {
                inputs.push((&port.name, Input::from(view(&port.name, &gradient.shape, values)?)));
            }
        }
        let mut outputs: Values = session.run(&inputs)?.into_iter().collect();
        let mut of_tensors = TensorGradients::default();
        let mut gradients = Tensors::new();
        for gradient in graph.gradients() {
            let Some(output) = &gradient.output else { continue };
            let missing = || StageError::Internal(format!("the graph did not give `{output}`"));
            let values = outputs.get(output).and_then(|array| array.as_slice()).ok_or_else(missing)?;
            match weights.iter().find(|(slot, _)| slot.name == gradient.variable) {
                Some((slot, _)) => of_tensors.add(slot, values, &current)?,
                None => drop(gradients.insert(gradient.variable.clone(), values.to_vec())),
            }
        }
        // A constant that is made of several tensors has gradients for all of them.
        gradients.extend(of_tensors.tensors.into_iter().filter(|(name, _)| trained.contains_key(name)));
        let loss = outputs.remove(graph.loss()).and_then(|loss| loss.first().copied());
        let loss = loss.ok_or_else(|| StageError::Internal("the graph gave no loss".to_owned()))?;
        for output in graph.gradients().iter().filter_map(|gradient| gradient.output.as_ref()) {
            outputs.remove(output);
        }
        Ok(Computed { loss, gradients, others: outputs })
    }
}

fn view<'a>(name: &str, shape: &[usize], values: &'a [f32]) -> Result<ArrayViewD<'a, f32>, StageError> {
    ArrayView::from_shape(IxDyn(shape), values).map_err(|_| {
        StageError::Internal(format!("`{name}` has shape {shape:?} and {} values", values.len()))
    })
}

/// A model with trained values in place of its own.
pub(crate) struct Current<'a> {
    pub model: &'a dyn Weights,
    pub trained: &'a Tensors,
}

impl<'a> Current<'a> {
    /// The values of a slot, without a copy where it is a trained tensor as it is.
    fn slot(&self, slot: &Slot) -> Result<Cow<'a, [f32]>, StageError> {
        if let Source::Tensor { name, how: How::SameBytes | How::Reshaped } = &slot.source
            && let Some(values) = self.trained.get(name)
        {
            return Ok(Cow::Borrowed(values));
        }
        Ok(Cow::Owned(slot.values(self)?))
    }
}

impl Weights for Current<'_> {
    fn names(&self) -> Vec<String> {
        self.model.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.model.shape(name)
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        match self.trained.get(name) {
            Some(values) => Ok(values.clone()),
            None => self.model.values(name),
        }
    }
}
