//! Gradients of a loss on the logits of images by the tensors of a model: what Fisher information and the tuning of merge coefficients ask for.
//!
//! Weights are fed at every run, so a model that changes from run to run needs one session. Gradients of the graph's constants are added up to
//! those of the checkpoint's tensors.
//!
//! A session has one thread: ONNX Runtime cuts the products of single rows by the number of threads, and their last bits with them. Who has several
//! graphs runs them side by side.

use crate::evaluate::Evaluation;
use crate::images::head::Head;
use crate::{Job, StageError, checkpoint};
use merganser_onnx::gradient::{
    Differentiated, Forward, GradientError, Tape, TensorGradients, Value, losses,
};
use merganser_onnx::{Input, Session, Weights};
use ndarray::{Array2, Array4, ArrayD, ArrayViewD, CowArray, Ix2, IxDyn};
use std::collections::BTreeMap;

/// A loss on the logits of a fixed number of images.
pub(crate) struct LossGraph {
    session: Session,
    graph: Differentiated,
    images: String,
    logits: String,
    n_logits: usize,
}

/// What a run gives beside gradients.
pub(crate) struct Found {
    pub loss: f32,
    /// [images, classes]
    pub logits: Array2<f32>,
}

/// Values of constants by their names in the graph: what is fed beside images. Graphs that were made from one share them.
pub(crate) type Fed = BTreeMap<String, ArrayD<f32>>;

impl LossGraph {
    /// The loss that `make` computes from the logits of `n_images` images, and its gradients by the tensors that `wanted` admits. All other
    /// tensors, and a head of class names, are those of `model`.
    pub(crate) fn new(
        job: &Job<'_>,
        evaluation: &Evaluation<'_>,
        model: &checkpoint::Weights,
        n_images: usize,
        wanted: &dyn Fn(&str) -> bool,
        make: impl FnOnce(&mut Forward, &Value) -> Result<Value, GradientError>,
    ) -> Result<Self, StageError> {
        let (bound, images) = evaluation.graph()?;
        let heads = evaluation.heads(Some(model))?;
        let shape = evaluation.images(&vec![0; n_images], Vec::new())?.shape().to_vec();
        let runtime = job.services.runtime(job.notify)?;
        let scratch = job.staging.path()?;
        let mut forward = Forward::new(&runtime, bound.prepared(), &[(images, &shape)], &[], scratch)?;
        let logits = logits(&mut forward, evaluation.output()?, &heads, n_images)?;
        let n_logits = logits.shape[1];
        let loss = make(&mut forward, &logits)?;
        let variables: Vec<String> = forward
            .weights()
            .iter()
            .filter(|slot| slot.source.tensors().into_iter().any(wanted))
            .map(|slot| slot.name.clone())
            .collect();
        let variables: Vec<&str> = variables.iter().map(String::as_str).collect();
        let graph = forward.differentiate(&loss, &variables, &[&logits])?;
        let session = job.services.gradient_session(graph.prepared(), model, 1, job.notify)?;
        // The outputs are the loss, what was asked for beside it, and the gradients.
        let logits = graph.prepared().outputs().get(1).map(|port| port.name.clone()).unwrap_or_default();
        Ok(Self { session, graph, images: images.to_owned(), logits, n_logits })
    }

    /// The number of logits per image.
    pub(crate) fn n_logits(&self) -> usize {
        self.n_logits
    }

    /// Adds what this graph is fed of a model, as far as it is not there.
    pub(crate) fn feed(&self, fed: &mut Fed, model: &dyn Weights) -> Result<(), StageError> {
        for slot in self.graph.trained_weights() {
            if !fed.contains_key(&slot.name) {
                let values = ArrayD::from_shape_vec(IxDyn(&slot.shape), slot.values(model)?)
                    .map_err(|error| StageError::Internal(error.to_string()))?;
                fed.insert(slot.name.clone(), values);
            }
        }
        Ok(())
    }

    /// Runs the graph on images and what `make` has added as inputs; adds the gradients to `sums`. `model` is what `fed` was made of.
    pub(crate) fn run(
        &mut self,
        images: &Array4<f32>,
        added: &[(&str, ArrayViewD<'_, f32>)],
        fed: &Fed,
        model: &dyn Weights,
        sums: &mut TensorGradients,
    ) -> Result<Found, StageError> {
        let mut inputs = vec![(self.images.as_str(), Input::F32(images.view().into_dyn()))];
        inputs.extend(added.iter().map(|(name, values)| (*name, Input::F32(values.view()))));
        for slot in self.graph.trained_weights() {
            let values = fed.get(&slot.name);
            let values =
                values.ok_or_else(|| StageError::Internal(format!("`{}` was not fed", slot.name)))?;
            inputs.push((slot.name.as_str(), Input::F32(values.view())));
        }
        let outputs = self.session.outputs(&inputs)?;
        let outputs: BTreeMap<&str, CowArray<'_, f32, IxDyn>> = outputs.floats()?.into_iter().collect();
        let output = |name: &str| {
            outputs.get(name).ok_or_else(|| StageError::Internal(format!("the graph did not give `{name}`")))
        };
        for gradient in self.graph.gradients() {
            let Some(name) = &gradient.output else { continue };
            let slots = self.graph.trained_weights();
            let slot = slots.iter().find(|slot| slot.name == gradient.variable);
            let slot =
                slot.ok_or_else(|| StageError::Internal(format!("no weight `{}`", gradient.variable)))?;
            let values = output(name)?.as_standard_layout();
            sums.add(slot, values.as_slice().expect("standard layout is contiguous"), model)?;
        }
        let loss = output(self.graph.loss())?.first().copied().unwrap_or(f32::NAN);
        let logits = output(&self.logits)?.to_owned().into_dimensionality::<Ix2>();
        Ok(Found { loss, logits: logits.map_err(|error| StageError::Internal(error.to_string()))? })
    }
}

/// Adds gradients to the sums of others.
pub(crate) fn add(sums: &mut TensorGradients, gradients: TensorGradients) {
    for (name, gradient) in gradients.tensors {
        match sums.tensors.get_mut(&name) {
            Some(sum) => sum.iter_mut().zip(&gradient).for_each(|(sum, own)| *sum += own),
            None => drop(sums.tensors.insert(name, gradient)),
        }
    }
}

/// The logits of `n` images, as a value of the graph.
pub(crate) fn logits(
    forward: &mut Forward,
    output: &str,
    heads: &[Head],
    n: usize,
) -> Result<Value, StageError> {
    let output = forward.value(output)?;
    let wrong = |expected: &str| {
        let Value { name, shape } = &output;
        StageError::input(format!("output `{name}` of the graph has shape {shape:?}, expected {expected}"))
    };
    let tape = forward.tape();
    let linear = |tape: &mut Tape, features: &Value, head: &Head| -> Result<Value, GradientError> {
        losses::linear_head(tape, features, head.weight(), &head.bias(), head.normalizes())
    };
    match heads {
        [] if output.rank() == 2 && output.shape[0] == n => Ok(output),
        [] => Err(wrong("[images, classes]")),
        [head] if output.shape == [n, head.features()] => Ok(linear(tape, &output, head)?),
        [head] => Err(wrong(&format!("[{n}, {}], as the head needs", head.features()))),
        // A distilled model answers twice, from its class token and its distillation token; the mean counts.
        [class, distillation, ..] => {
            let features = class.features();
            if output.shape != [n, 2, features] {
                return Err(wrong(&format!(
                    "[{n}, 2, {features}]: `head` has a classifier for either token"
                )));
            }
            let mut of = |token: usize, head: &Head| {
                let one = tape.slice(&output, &[1], &[token], &[token + 1]);
                let one = tape.reshape(&one, &[n, features]);
                linear(tape, &one, head)
            };
            let (class, distillation) = (of(0, class)?, of(1, distillation)?);
            let sum = tape.add(&class, &distillation);
            Ok(tape.scale(&sum, 0.5))
        }
    }
}
