//! The student as graphs: the loss between its features and the teacher's, with weights rounded to the widths of their layers.
//!
//! Widths and the teacher's values are inputs, so that a graph serves every width, and every teacher.

use super::activations::QuantizedActivation;
use super::layers::{Feature, Piece, QuantizedConstant};
use super::params::LossParams;
use crate::StageError;
use merganser_onnx::gradient::{
    Differentiated, Forward, GradientError, Tape, Value, fake_quantization, losses,
};
use merganser_onnx::{Layout, Prepared, Runtime};
use std::collections::BTreeSet;
use std::path::Path;

/// Everything that decides the graphs but the number of images.
pub(super) struct Blueprint<'a> {
    pub(super) runtime: &'a Runtime,
    pub(super) prepared: &'a Prepared,
    /// The input for images, and the shape of one.
    pub(super) input: &'a str,
    pub(super) image: &'a [usize],
    /// The output whose logits are compared, if they are.
    pub(super) output: &'a str,
    pub(super) features: &'a [Feature],
    pub(super) constants: &'a [QuantizedConstant],
    pub(super) activations: &'a [QuantizedActivation],
    pub(super) losses: &'a LossParams,
    /// The values of the graph that student and teacher are compared by.
    pub(super) compared: &'a [String],
    /// A folder for files that exist for a moment.
    pub(super) scratch: &'a Path,
}

/// A graph for some number of images.
pub(super) struct StudentGraph {
    pub(super) graph: Differentiated,
    /// Outputs with the losses of the features, in their order.
    pub(super) feature_losses: Vec<String>,
    /// The output with the divergence of logits, if it counts.
    pub(super) logits_loss: Option<String>,
}

/// The input that takes the highest codes of a constant's channels.
pub(super) fn levels_input(constant: &str) -> String {
    format!("levels of {constant}")
}

/// The input that takes the step of a value's codes; it is trained under this name.
pub(super) fn step_input(value: &str) -> String {
    format!("step of {value}")
}

/// The input that takes a teacher's value.
pub(super) fn teacher_input(value: &str) -> String {
    format!("teacher's {value}")
}

impl Blueprint<'_> {
    /// A graph of the loss and its gradients with respect to the weights that `trains` takes, which are named by their constants.
    pub(super) fn training(
        &self,
        n_images: usize,
        trains: impl Fn(&merganser_onnx::Slot) -> bool,
    ) -> Result<StudentGraph, StageError> {
        let (forward, parts) = self.forward(n_images)?;
        let mut variables = names(&forward, trains);
        variables.extend(self.activations.iter().map(|activation| step_input(&activation.value)));
        let variables: Vec<&str> = variables.iter().map(String::as_str).collect();
        let graph = forward.differentiate(&parts.total, &variables, &parts.outputs())?;
        Ok(parts.of(graph))
    }

    /// A graph of the loss alone, whose weights are fed like those of [`Self::training`].
    pub(super) fn evaluation(
        &self,
        n_images: usize,
        trains: impl Fn(&merganser_onnx::Slot) -> bool,
    ) -> Result<StudentGraph, StageError> {
        let (forward, parts) = self.forward(n_images)?;
        let weights = names(&forward, trains);
        let weights: Vec<&str> = weights.iter().map(String::as_str).collect();
        let graph = forward.evaluate(&parts.total, &weights, &parts.outputs())?;
        Ok(parts.of(graph))
    }

    fn forward(&self, n_images: usize) -> Result<(Forward, Parts), StageError> {
        let is_computed = |value: &&str| self.prepared.inputs().iter().all(|input| input.name != **value);
        let rounded = self.activations.iter().map(|activation| activation.value.as_str());
        let keep: BTreeSet<&str> = self.compared.iter().map(String::as_str).chain(rounded).collect();
        let keep: Vec<&str> = keep.into_iter().filter(is_computed).collect();
        let shape: Vec<usize> = [n_images].into_iter().chain(self.image.iter().copied()).collect();
        let mut forward =
            Forward::new(self.runtime, self.prepared, &[(self.input, &shape)], &keep, self.scratch)?;
        for constant in self.constants {
            let levels = forward.add_input(&levels_input(&constant.name), &[constant.n_channels()])?;
            forward.rewire(&constant.name, |tape, weight| {
                fake_quantization::symmetric(tape, weight, constant.axis, &levels)
            })?;
        }
        for activation in self.activations {
            let step = forward.add_input(&step_input(&activation.value), &[])?;
            let per_image = forward.value(&activation.value)?.n_elements() / n_images;
            forward.rewire(&activation.value, |tape, x| activation.round(tape, x, &step, per_image))?;
        }
        for value in self.compared {
            let shape = forward.value(value)?.shape;
            forward.add_input(&teacher_input(value), &shape)?;
        }
        let mut features = Vec::with_capacity(self.features.len());
        for feature in self.features {
            let student = maps(&mut forward, feature, n_images, str::to_owned)?;
            let teacher = maps(&mut forward, feature, n_images, teacher_input)?;
            features.push(self.compare(forward.tape(), &student, &teacher)?);
        }
        let weighted = self.features.iter().zip(&features);
        let mut terms: Vec<(f32, Value)> =
            weighted.map(|(feature, loss)| (self.losses.weight(&feature.name), loss.clone())).collect();
        let mut logits = None;
        if self.losses.logits > 0.0 {
            let (student, teacher) =
                (forward.value(self.output)?, forward.value(&teacher_input(self.output))?);
            let temperature = self.losses.temperature as f32;
            let divergence = losses::logits_divergence(forward.tape(), &student, &teacher, temperature)?;
            terms.push((self.losses.logits as f32, divergence.clone()));
            logits = Some(divergence);
        }
        let total = losses::weighted_sum(forward.tape(), &terms);
        // Under a name of its own, even if it is one of the losses.
        let total = forward.tape().unary("Identity", &total);
        Ok((forward, Parts { total, features, logits }))
    }

    /// The loss of one feature.
    fn compare(&self, tape: &mut Tape, student: &Value, teacher: &Value) -> Result<Value, GradientError> {
        let LossParams { statistics, affinity, features, .. } = self.losses;
        let mut terms = Vec::new();
        // The variance over a single place is not defined: what is left of statistics is the squared error.
        let is_point = teacher.shape[2] * teacher.shape[3] == 1;
        if *statistics > 0.0 {
            let loss = if is_point { losses::mean_squared_error } else { losses::layer_statistics };
            terms.push((*statistics as f32, loss(tape, student, teacher)?));
        }
        if *affinity > 0.0 {
            terms.push((*affinity as f32, losses::affinity(tape, student, teacher)?));
        }
        if *features > 0.0 {
            terms.push((*features as f32, losses::mean_squared_error(tape, student, teacher)?));
        }
        Ok(losses::weighted_sum(tape, &terms))
    }
}

/// The losses in a graph.
struct Parts {
    total: Value,
    features: Vec<Value>,
    logits: Option<Value>,
}

impl Parts {
    fn outputs(&self) -> Vec<&Value> {
        self.features.iter().chain(&self.logits).collect()
    }

    /// Tells where the losses come out of a finished graph, whose outputs are in the order of [`Self::outputs`] after the loss.
    fn of(&self, graph: Differentiated) -> StudentGraph {
        let feature_losses = self.features.iter().map(|value| value.name.clone()).collect();
        let logits_loss = self.logits.as_ref().map(|value| value.name.clone());
        StudentGraph { graph, feature_losses, logits_loss }
    }
}

fn names(forward: &Forward, trains: impl Fn(&merganser_onnx::Slot) -> bool) -> Vec<String> {
    forward.weights().iter().filter(|slot| trains(slot)).map(|slot| slot.name.clone()).collect()
}

/// A feature as [images, channels, height, width], of values whose names `of` gives.
fn maps(
    forward: &mut Forward,
    feature: &Feature,
    n_images: usize,
    of: impl Fn(&str) -> String,
) -> Result<Value, StageError> {
    let mut pieces = Vec::with_capacity(feature.pieces.len());
    for piece in &feature.pieces {
        let value = forward.value(&of(&piece.value))?;
        let map = map(forward.tape(), &value, piece, n_images).ok_or_else(|| {
            StageError::input_help(
                format!(
                    "feature `{}`: value `{}` has shape {:?}, which is no map or list of tokens of {n_images} images",
                    feature.name, piece.value, value.shape
                ),
                "choose others with `features`",
            )
        })?;
        pieces.push(map);
    }
    Ok(if let [one] = pieces.as_slice() { one.clone() } else { forward.tape().concat(&pieces, 1) })
}

/// Makes a map of a value that has images first; of tokens one that is as high as there are tokens and one wide.
fn map(tape: &mut Tape, value: &Value, piece: &Piece, n_images: usize) -> Option<Value> {
    let shape = &value.shape;
    let rank = shape.len();
    let guessed = if rank == 4 { Layout::Channels } else { Layout::Last };
    let map = match piece.layout.as_ref().unwrap_or(&guessed) {
        // Windows and tokens of one image lie next to each other.
        Layout::Last => {
            let channels = *shape.last()?;
            let tokens = value.n_elements().checked_div(n_images * channels).filter(|tokens| *tokens > 0)?;
            if rank < 2 || tokens * n_images * channels != value.n_elements() {
                return None;
            }
            let tokens = tape.reshape(value, &[n_images, tokens, channels]);
            losses::tokens_as_map(tape, &tokens).ok()?
        }
        Layout::LastButOne | Layout::Channels | Layout::Windows(_) => {
            let &[images, channels, ref places @ ..] = shape.as_slice() else { return None };
            let (height, width) = match places {
                [] => (1, 1),
                [length] => (*length, 1),
                [height, width] => (*height, *width),
                _ => return None,
            };
            if images != n_images {
                return None;
            }
            tape.reshape(value, &[images, channels, height, width])
        }
    };
    match &piece.channels {
        Some(channels) if channels.end > map.shape[1] => None,
        Some(channels) => Some(tape.slice(&map, &[1], &[channels.start], &[channels.end])),
        None => Some(map),
    }
}
