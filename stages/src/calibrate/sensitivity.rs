//! How much the output of a model changes when one tensor is changed a little.
//!
//! The error of a layer, `tr(ΔW·H·ΔWᵀ)`, says how far its own output is off, not what becomes of that: layers differ by factors of a
//! thousand. So each tensor is rounded to [`BITS`] bits per output, alone, and the model is run; the squared change of the logits
//! over the layer's error is the tensor's sensitivity, in units of the logits' own variance. To first order it is the same for any small
//! ΔW of that kind.

use super::capture::Moments;
use super::statistics::{LayerPart, Statistics, layer_error};
use crate::evaluate::Evaluation;
use crate::replaced::Replaced;
use crate::{Job, StageError};
use merganser_tensors::source::read_finite_f32;
use merganser_tensors::{Scratch, TensorSource};
use ndarray::{Array2, Axis};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Coarse enough to be seen in the logits, fine enough not to break the model.
const BITS: i32 = 3;

/// Measures every tensor that a layer computes with: one evaluation each, and one of the model as it is.
pub(super) fn measure(
    job: &Job<'_>,
    evaluation: &Evaluation<'_>,
    model: &Arc<dyn TensorSource>,
    n_images: usize,
    statistics: &mut Statistics,
    moments: &[Moments],
) -> Result<(), StageError> {
    let images = statistics.images as f64;
    let reference = evaluation.some_logits(Arc::clone(model), n_images)?;
    let variance = variance(&reference);
    for (name, parts) in &statistics.layers {
        if (job.cancelled)() {
            return Err(StageError::Cancelled);
        }
        let Some((values, deltas)) = perturbed(&**model, name, parts)? else { continue };
        let perturbed = Replaced::new(model, BTreeMap::from([(name.clone(), values)]));
        let mut error = 0.0;
        for (part, delta) in &deltas {
            error += layer_error(delta.view(), moments[part.input].sum.view()) / images;
        }
        let logits = evaluation.some_logits(Arc::new(perturbed), n_images)?;
        let change: f64 =
            logits.iter().zip(&reference).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
        let sensitivity = change / variance / error;
        if sensitivity.is_finite() {
            statistics.sensitivity.insert(name.clone(), sensitivity);
        }
    }
    Ok(())
}

/// Squared distances of all images' logits from their mean.
fn variance(logits: &Array2<f32>) -> f64 {
    let n = logits.len_of(Axis(0)).max(1) as f64;
    let columns = logits.columns().into_iter().map(|column| {
        let mean = column.iter().map(|value| f64::from(*value)).sum::<f64>() / n;
        column.iter().map(|value| (f64::from(*value) - mean).powi(2)).sum::<f64>()
    });
    columns.sum()
}

/// What rounding changed, part by part.
type Deltas = Vec<(LayerPart, Array2<f64>)>;

/// The values of a tensor whose parts are rounded; nothing if rounding changes nothing.
fn perturbed(
    model: &dyn TensorSource,
    name: &str,
    parts: &[LayerPart],
) -> Result<Option<(Vec<f32>, Deltas)>, StageError> {
    let tensor = model.index_of(name);
    let tensor = tensor.ok_or_else(|| StageError::Internal(format!("there is no tensor `{name}`")))?;
    let mut original = vec![0.0; model.tensors()[tensor].n_elements()];
    read_finite_f32(model, tensor, 0..original.len(), &mut original, &mut Scratch::default())?;
    let mut values = original.clone();
    let mut deltas = Vec::with_capacity(parts.len());
    for part in parts {
        let weights = part.weights(&original);
        let rounded = rounded(&weights);
        for ((output, input), value) in rounded.indexed_iter() {
            values[part.element(output, input)] = *value as f32;
        }
        deltas.push((*part, rounded - weights));
    }
    let changes = deltas.iter().any(|(_, delta)| delta.iter().any(|change| *change != 0.0));
    Ok(changes.then_some((values, deltas)))
}

/// Every output's weights, rounded to steps of its largest magnitude over 2^(b−1) − 1.
fn rounded(weights: &Array2<f64>) -> Array2<f64> {
    let mut rounded = weights.clone();
    for mut row in rounded.outer_iter_mut() {
        let step = row.iter().fold(0.0f64, |most, w| most.max(w.abs())) / f64::from((1 << (BITS - 1)) - 1);
        if step > 0.0 {
            row.mapv_inplace(|weight| (weight / step).round_ties_even() * step);
        }
    }
    rounded
}
