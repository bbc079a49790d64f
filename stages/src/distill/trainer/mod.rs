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
use merganser_onnx::train::{Accumulator, Tensors, TrainError};
use merganser_onnx::{How, Input, Outputs, Session, Slot, Source, Weights, WeightsError};
use ndarray::{ArrayD, ArrayView, ArrayViewD, CowArray, IxDyn};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

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
        let largest = if self.params.clip > 0.0 { self.params.clip as f32 } else { f32::INFINITY };
        let (loss, norm) = if samples.len() <= at_once {
            // The optimizer reads gradients where the graph has put them.
            self.compute(&Batch { step, part: 0, samples }, |position, gradients| {
                position.optimizer.step(&mut position.values, gradients, rate, largest)
            })?
        } else {
            let mut sums = Accumulator::default();
            let mut loss = 0.0;
            for (part, samples) in samples.chunks(at_once).enumerate() {
                let weight = samples.len() as f32;
                let add = |_: &mut Position, gradients: &[(&str, &[f32])]| {
                    sums.add(gradients.iter().copied(), weight)
                };
                let (own, ()) = self.compute(&Batch { step, part, samples }, add)?;
                loss += f64::from(own) * f64::from(weight);
            }
            let mean = sums.take().map_err(|error| failure(step, &error))?;
            let mean: Vec<(&str, &[f32])> = mean.iter().map(|(n, g)| (n.as_str(), g.as_slice())).collect();
            let Position { optimizer, values, .. } = &mut self.position;
            let norm = optimizer.step(values, &mean, rate, largest);
            ((loss / samples.len() as f64) as f32, norm.map_err(|error| failure(step, &error))?)
        };
        self.objective.constrain(&mut self.position.values);
        self.position.note(loss, rate, norm, samples.len());
        let figures: Figures = [Some(("loss", f64::from(loss))), self.objective.figure()];
        self.job.steps(step + 1, self.total, figures);
        Ok(())
    }

    /// The loss of a batch, and what `take` makes of its gradients, by the names of trained values.
    fn compute<T>(
        &mut self,
        batch: &Batch<'_>,
        take: impl FnOnce(&mut Position, &[(&str, &[f32])]) -> Result<T, TrainError>,
    ) -> Result<(f32, T), StageError> {
        let Self { job, objective, engines, position, .. } = self;
        let n = batch.samples.len();
        let Engine { graph, session } = match engines.entry(n) {
            Entry::Occupied(engine) => engine.into_mut(),
            Entry::Vacant(place) => {
                let graph = objective.differentiate(n)?;
                let session = job.services.gradient_session(
                    graph.prepared(),
                    objective.model(),
                    job.threads,
                    job.notify,
                )?;
                place.insert(Engine { graph, session })
            }
        };
        let fed = objective.feed(batch)?;
        let current = Current { model: objective.model(), trained: &position.values };
        let outputs = run(graph, session, &fed, &current)?;
        let mut outputs: Floats<'_> = outputs.floats()?.into_iter().collect();
        let loss = outputs.remove(graph.loss()).and_then(|loss| loss.first().copied());
        let loss = loss.ok_or_else(|| StageError::Internal("the graph gave no loss".to_owned()))?;
        if !loss.is_finite() {
            return Err(StageError::input_help(
                format!("the loss of step {} is {loss}", batch.step + 1),
                "lower `learning_rate`, or raise `warm_up`",
            ));
        }
        let gradients = gradients(graph, &outputs, &current)?;
        let slices: Vec<(&str, &[f32])> =
            gradients.iter().map(|(name, values)| (&**name, &**values)).collect();
        if slices.is_empty() {
            return Err(failure(batch.step, &TrainError::NoGradients));
        }
        let taken = take(position, &slices).map_err(|error| failure(batch.step, &error))?;
        drop(gradients);
        for output in graph.gradients().iter().filter_map(|gradient| gradient.output.as_deref()) {
            outputs.remove(output);
        }
        let others = outputs.into_iter().map(|(name, array)| (name.to_owned(), array.into_owned())).collect();
        objective.seen(batch, &others)?;
        Ok((loss, taken))
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

/// Float outputs of a run, by name, where they lie.
type Floats<'o> = BTreeMap<&'o str, CowArray<'o, f32, IxDyn>>;

/// Feeds what a batch feeds and the trained values, and runs the graph.
fn run<'s>(
    graph: &Differentiated,
    session: &'s mut Session,
    fed: &Values,
    current: &Current<'_>,
) -> Result<Outputs<'s>, StageError> {
    let weights = graph.trained_weights().iter().map(|slot| Ok((slot, current.slot(slot)?)));
    let weights = weights.collect::<Result<Vec<_>, StageError>>()?;
    let mut inputs: Vec<(&str, Input<'_>)> =
        fed.iter().map(|(name, array)| (name.as_str(), Input::from(array.view()))).collect();
    for (slot, values) in &weights {
        inputs.push((&slot.name, Input::from(view(&slot.name, &slot.shape, values)?)));
    }
    // Inputs that an objective added, whether the loss depends on them or not.
    for port in graph.prepared().inputs() {
        let Some(values) = current.trained.get(&port.name) else { continue };
        if let Some(gradient) = graph.gradients().iter().find(|gradient| gradient.variable == port.name)
            && !weights.iter().any(|(slot, _)| slot.name == port.name)
        {
            inputs.push((&port.name, Input::from(view(&port.name, &gradient.shape, values)?)));
        }
    }
    Ok(session.outputs(&inputs)?)
}

/// A gradient by a trained value of that name.
type NamedGradient<'o> = (Cow<'o, str>, Cow<'o, [f32]>);

/// The gradients by trained values, sorted by name: where the run has put them, unless several constants of the graph are made of a value or
/// it is turned in one.
fn gradients<'o>(
    graph: &'o Differentiated,
    outputs: &'o Floats<'_>,
    current: &Current<'_>,
) -> Result<Vec<NamedGradient<'o>>, StageError> {
    let slots = graph.trained_weights();
    let uses = |tensor: &str| slots.iter().filter(|slot| slot.source.tensors().contains(&tensor)).count();
    let mut found = Vec::new();
    let mut summed = TensorGradients::default();
    for gradient in graph.gradients() {
        let Some(output) = &gradient.output else { continue };
        let missing = || StageError::Internal(format!("the graph did not give `{output}`"));
        let values = outputs.get(output.as_str()).and_then(|array| array.as_slice()).ok_or_else(missing)?;
        match slots.iter().find(|slot| slot.name == gradient.variable) {
            None => found.push((Cow::Borrowed(gradient.variable.as_str()), Cow::Borrowed(values))),
            Some(slot) => match as_it_is(slot) {
                Some(tensor) if uses(tensor) == 1 => {
                    found.push((Cow::Borrowed(tensor), Cow::Borrowed(values)));
                }
                _ => summed.add(slot, values, current)?,
            },
        }
    }
    found.extend(summed.tensors.into_iter().map(|(name, values)| (Cow::Owned(name), Cow::Owned(values))));
    // A constant that is made of several tensors has gradients for all of them.
    found.retain(|(name, _)| current.trained.contains_key(&**name));
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// The tensor that a constant of the graph is, value by value.
fn as_it_is(slot: &Slot) -> Option<&str> {
    match &slot.source {
        Source::Tensor { name, how: How::SameBytes | How::Reshaped } => Some(name),
        _ => None,
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
        match as_it_is(slot).and_then(|tensor| self.trained.get(tensor)) {
            Some(values) => Ok(Cow::Borrowed(values)),
            None => Ok(Cow::Owned(slot.values(self)?)),
        }
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
