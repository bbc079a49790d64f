//! From gradients of a graph's constants to gradients of a checkpoint's tensors.

use std::collections::BTreeMap;

use crate::binding::{How, Source};
use crate::prepared::Slot;
use crate::tensor::{Weights, WeightsError, transpose};

/// Gradients by names of checkpoint tensors.
///
/// A tensor may be in several constants of a graph (queries, keys and values cut out of one matrix, a matrix that an
/// exporter stored twice): its gradient is the sum, in the order in which constants are added.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorGradients {
    /// values in row-major order, as many as the tensor has
    pub tensors: BTreeMap<String, Vec<f32>>,
}

impl TensorGradients {
    /// Adds the gradient of one constant, in row-major order of the constant's shape; `model` is the checkpoint that
    /// the constant's values came from.
    ///
    /// # Errors
    ///
    /// If the model lacks a tensor, or has another number of values than the constant was made from.
    pub fn add(&mut self, slot: &Slot, gradient: &[f32], model: &dyn Weights) -> Result<(), WeightsError> {
        let wrong = |tensor: &str, reason: String| WeightsError {
            tensor: tensor.to_owned(),
            source: format!("the graph's `{}`: {reason}", slot.name).into(),
        };
        let first = slot.source.tensors().first().copied().unwrap_or_default().to_owned();
        let expected: usize = slot.shape.iter().product();
        if gradient.len() != expected {
            return Err(wrong(
                &first,
                format!("needs a gradient of {expected} values, got {}", gradient.len()),
            ));
        }
        match &slot.source {
            Source::Tensor { name, how } => {
                let own = match (how, &slot.shape[..]) {
                    (How::Transposed, &[rows, columns]) => transpose(gradient, rows, columns),
                    // d exp(x) = exp(x) dx
                    (How::Exp, _) => {
                        model.values(name)?.iter().zip(gradient).map(|(x, g)| g * x.exp()).collect()
                    }
                    _ => gradient.to_vec(),
                };
                let n = count(name, model)?;
                if n != own.len() {
                    return Err(wrong(name, format!("has {} values, the model's {n}", own.len())));
                }
                match self.tensors.get_mut(name) {
                    Some(sum) => sum.iter_mut().zip(&own).for_each(|(sum, g)| *sum += g),
                    None => drop(self.tensors.insert(name.clone(), own)),
                }
            }
            Source::Rows { runs, transposed } => {
                let (own, length) = match (transposed, &slot.shape[..]) {
                    (true, &[rows, columns]) => (transpose(gradient, rows, columns), rows),
                    (_, shape) => (gradient.to_vec(), shape.last().copied().unwrap_or(1)),
                };
                let mut rest = own.as_slice();
                for run in runs {
                    let n = run.n_rows * length;
                    let start = run.first_row * length;
                    let sum = self.tensor(&run.tensor, model)?;
                    let (Some(part), Some(target)) = (rest.get(..n), sum.get_mut(start..start + n)) else {
                        let end = run.first_row + run.n_rows;
                        return Err(wrong(
                            &run.tensor,
                            format!("there are no rows {} to {end}", run.first_row),
                        ));
                    };
                    target.iter_mut().zip(part).for_each(|(sum, g)| *sum += g);
                    rest = &rest[n..];
                }
            }
        }
        Ok(())
    }

    fn tensor(&mut self, name: &str, model: &dyn Weights) -> Result<&mut Vec<f32>, WeightsError> {
        if !self.tensors.contains_key(name) {
            self.tensors.insert(name.to_owned(), vec![0.0; count(name, model)?]);
        }
        Ok(self.tensors.get_mut(name).expect("it was inserted"))
    }
}

/// Returns how many values a tensor has.
fn count(name: &str, model: &dyn Weights) -> Result<usize, WeightsError> {
    let missing = || WeightsError { tensor: name.to_owned(), source: "no such tensor".into() };
    Ok(model.shape(name).ok_or_else(missing)?.iter().product())
}
