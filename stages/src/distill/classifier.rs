//! A classifier as training sees it: its graph with heads, ready for losses, and images with their labels.

use super::method::Setup;
use super::trainer::{Current, Validation};
use crate::evaluate::Evaluation;
use crate::images::head::Head;
use crate::images::metrics;
use crate::{Job, StageError, checkpoint, gradients};
use merganser_onnx::gradient::{Forward, Value};
use merganser_onnx::train::Tensors;
use merganser_onnx::{Slot, Weights};
use ndarray::{Array2, ArrayD, IxDyn};
use std::borrow::Cow;
use std::collections::BTreeSet;

/// Images for validation.
pub(super) struct Validating<'a> {
    /// The dataset they are in, if it is not the one that is trained on.
    pub elsewhere: Option<Evaluation<'a>>,
    /// Their positions there.
    pub images: Vec<usize>,
}

pub(crate) struct Classifier<'a> {
    job: &'a Job<'a>,
    task: &'a str,
    evaluation: &'a Evaluation<'a>,
    /// Fixed: what is trained is in the graph.
    heads: Cow<'a, [Head]>,
    /// Of one image.
    shape: Vec<usize>,
    /// Images that are trained on.
    images: &'a [usize],
    validation: Option<(&'a Evaluation<'a>, &'a [usize])>,
}

impl<'a> Classifier<'a> {
    /// `model`: whose text tower makes a head of class names, where that is asked for.
    pub(super) fn new(setup: &'a Setup<'_>, model: &checkpoint::Weights) -> Result<Self, StageError> {
        let Setup { job, task, evaluation, images, .. } = setup;
        let one = evaluation.images(&images[..1], Vec::new())?;
        Ok(Self {
            job,
            task,
            evaluation,
            heads: evaluation.heads(Some(model))?,
            shape: one.shape()[1..].to_vec(),
            images,
            validation: setup.validation(),
        })
    }

    /// The weights of the graph whose values come from a tensor that `wanted` admits.
    pub(crate) fn slots(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<Slot>, StageError> {
        let slots = self.evaluation.graph()?.0.prepared().slots().iter();
        Ok(slots.filter(|slot| slot.source.tensors().into_iter().any(&wanted)).cloned().collect())
    }

    /// The tensors of the model that `wanted` admits and the graph computes with, with their values.
    pub(crate) fn tensors(
        &self,
        model: &dyn Weights,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Tensors, StageError> {
        let slots = self.slots(&wanted)?;
        let names: BTreeSet<&str> =
            slots.iter().flat_map(|slot| slot.source.tensors()).filter(|name| wanted(name)).collect();
        names.into_iter().map(|name| Ok((name.to_owned(), model.values(name)?))).collect()
    }

    /// Refuses tensors to train whose changes would not reach the graph, by name.
    pub(crate) fn check(&self, model: &dyn Weights, trained: &Tensors) -> Result<(), StageError> {
        let moved = |(name, values): (&String, &Vec<f32>)| {
            (name.clone(), values.iter().map(|value| value + 1.0).collect())
        };
        let trained: Tensors = trained.iter().map(moved).collect();
        self.evaluation
            .check(&Current { model, trained: &trained })
            .map_err(|error| StageError::input_help(error.to_string(), "leave such tensors out with `skip`"))
    }

    /// The graph for `n` images, and their logits in it.
    pub(crate) fn forward(&self, n: usize, keep: &[&str]) -> Result<(Forward, Value), StageError> {
        let (graph, input) = self.evaluation.graph()?;
        let shape: Vec<usize> = std::iter::once(n).chain(self.shape.iter().copied()).collect();
        let runtime = self.job.services.runtime(self.job.notify)?;
        let scratch = self.job.staging.path()?;
        let mut forward = Forward::new(&runtime, graph.prepared(), &[(input, &shape)], keep, scratch)?;
        let logits = gradients::logits(&mut forward, self.evaluation.output()?, &self.heads, n)?;
        metrics::check_labels(self.task, self.evaluation.labels(), logits.shape[1])?;
        Ok((forward, logits))
    }

    /// The name of the graph's input for images, and the images of samples.
    pub(crate) fn feed(&self, samples: &[usize]) -> Result<(String, ArrayD<f32>), StageError> {
        let images: Vec<usize> = samples.iter().map(|&sample| self.images[sample]).collect();
        let batch = self.evaluation.images(&images, Vec::new())?;
        Ok((self.evaluation.graph()?.1.to_owned(), batch.into_dyn()))
    }

    /// Probabilities that the labels of samples stand for: `smoothing` of it is spread over all classes.
    pub(crate) fn targets(&self, samples: &[usize], classes: usize, smoothing: f32) -> ArrayD<f32> {
        let mut targets = Array2::from_elem((samples.len(), classes), smoothing / classes as f32);
        for (row, &sample) in samples.iter().enumerate() {
            targets[[row, self.evaluation.labels()[self.images[sample]] as usize]] += 1.0 - smoothing;
        }
        targets.into_dyn()
    }

    /// The logits of another model for all samples, [samples, classes].
    pub(crate) fn logits_of(&self, teacher: &checkpoint::Weights) -> Result<Array2<f32>, StageError> {
        let heads = self.evaluation.heads(Some(teacher))?;
        self.evaluation.logits_of(teacher, &heads, self.images)
    }

    pub(crate) fn n_samples(&self) -> usize {
        self.images.len()
    }

    pub(crate) fn n_validation(&self) -> usize {
        self.validation.map_or(0, |(_, images)| images.len())
    }

    /// Cross-entropy and accuracy of a model on the images for validation.
    pub(crate) fn validate(&self, model: &dyn Weights) -> Result<Option<Validation>, StageError> {
        let Some((evaluation, images)) = self.validation else { return Ok(None) };
        let logits = evaluation.logits_of(model, &self.heads, images)?;
        let labels: Vec<u32> = images.iter().map(|&image| evaluation.labels()[image]).collect();
        let counts = metrics::score(&logits, &labels, self.task, 0)?;
        Ok(Some(Validation {
            loss: cross_entropy(&logits, &labels),
            accuracy: counts.top1 as f64 / labels.len().max(1) as f64,
        }))
    }
}

/// Mean of −log softmax(z)_label, in f64.
fn cross_entropy(logits: &Array2<f32>, labels: &[u32]) -> f64 {
    let rows = logits.outer_iter().zip(labels).map(|(row, &label)| {
        let largest = row.iter().fold(f64::NEG_INFINITY, |most, &z| most.max(z.into()));
        let sum: f64 = row.iter().map(|&z| (f64::from(z) - largest).exp()).sum();
        sum.ln() + largest - f64::from(row[label as usize])
    });
    rows.sum::<f64>() / labels.len().max(1) as f64
}

/// Some rows of a matrix.
pub(super) fn rows(matrix: &Array2<f32>, chosen: &[usize]) -> ArrayD<f32> {
    let values = chosen.iter().flat_map(|&row| matrix.row(row).to_vec()).collect();
    ArrayD::from_shape_vec(IxDyn(&[chosen.len(), matrix.ncols()]), values).expect("whole rows were taken")
}
