//! What layers multiply, rounded in steps that are learned (LSQ; Esser et al. 2020).

use super::layers::QuantizedLayer;
use super::params::ActivationParams;
use super::student::step_input;
use crate::distill::method::Setup;
use crate::{StageError, checkpoint};
use merganser_onnx::gradient::{Tape, Value, fake_quantization};
use merganser_onnx::train::Tensors;
use merganser_onnx::{Input, Module};
use ndarray::{ArrayD, arr0};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A value of the graph that is rounded, with the step that was learned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizedActivation {
    /// Its name in the graph.
    pub value: String,
    /// The layers that multiply it.
    pub layers: Vec<String>,
    pub bits: u8,
    /// Whether there are codes below zero.
    pub signed: bool,
    pub step: f32,
}

/// Finds the activations of layers, and their first steps from a batch of images.
pub(super) fn find(
    params: &ActivationParams,
    setup: &Setup<'_>,
    model: &checkpoint::Weights,
    quantized: &[QuantizedLayer],
    modules: &[Module],
) -> Result<Vec<QuantizedActivation>, StageError> {
    let (job, evaluation) = (setup.job, &setup.evaluation);
    let mut layers: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for layer in quantized.iter().filter(|layer| params.admits(&layer.name)) {
        for module in modules.iter().filter(|module| module.weight.tensor == layer.tensor) {
            if module.owns_activation {
                layers.entry(&module.weight.activation).or_default().push(layer.name.clone());
            } else {
                job.warn(format!(
                    "what `{}` multiplies is used elsewhere, too, and stays as it is",
                    layer.name
                ));
            }
        }
    }
    if layers.is_empty() {
        return Err(StageError::input_help(
            "`activations`: no layer has activations of its own that could be rounded",
            "`only` and `skip` take globs over names of layers",
        ));
    }
    let values: Vec<&str> = layers.keys().copied().collect();
    let (graph, input) = evaluation.graph()?;
    let (graph, names) = graph.with_outputs(&values)?;
    let mut session = job.services.session(&graph, model, job.threads, job.notify)?;
    let n_images = setup.images.len().min(setup.training.batch_size as usize);
    let batch = evaluation.images(&setup.images[..n_images], Vec::new())?;
    let outputs = session.run(&[(input, Input::F32(batch.view().into_dyn()))])?;
    let found = layers.into_iter().zip(&names).map(|((value, layers), name)| {
        let array = outputs.iter().find(|(output, _)| output == name).map(|(_, array)| array);
        let array = array.ok_or_else(|| StageError::Internal(format!("the graph did not give `{value}`")))?;
        Ok(QuantizedActivation::begin(value, layers, params.bits, array))
    });
    found.collect()
}

impl QuantizedActivation {
    fn begin(value: &str, mut layers: Vec<String>, bits: u8, seen: &ArrayD<f32>) -> Self {
        layers.dedup();
        let signed = seen.iter().any(|x| *x < 0.0);
        let mean = seen.iter().map(|x| f64::from(x.abs())).sum::<f64>() / seen.len().max(1) as f64;
        let mut found = Self { value: value.to_owned(), layers, bits, signed, step: 1.0 };
        // Of nothing but zeros any step is right.
        if mean > 0.0 {
            found.step = fake_quantization::first_step(mean as f32, found.highest());
        }
        found
    }

    fn lowest(&self) -> f32 {
        if self.signed { -f32::from(1u16 << (self.bits - 1)) } else { 0.0 }
    }

    fn highest(&self) -> f32 {
        let codes = if self.signed { 1u16 << (self.bits - 1) } else { 1u16 << self.bits };
        f32::from(codes - 1)
    }

    /// Appends the rounded value to a graph; the gradient of `step` is scaled as LSQ does.
    pub(super) fn round(&self, tape: &mut Tape, x: &Value, step: &Value, per_image: usize) -> Value {
        let scale = fake_quantization::gradient_scale(per_image, self.highest());
        let scaled = tape.scale(step, scale);
        let step = tape.straight_through(&scaled, step);
        let (lowest, highest) = (tape.scalar(self.lowest()), tape.scalar(self.highest()));
        fake_quantization::learned(tape, x, &step, &lowest, &highest)
    }

    /// Its step, as a graph is fed with it.
    pub(super) fn fed(&self, trained: &Tensors) -> (String, ArrayD<f32>) {
        let name = step_input(&self.value);
        let step = trained.get(&name).and_then(|step| step.first().copied()).unwrap_or(self.step);
        (name, arr0(step).into_dyn())
    }
}
