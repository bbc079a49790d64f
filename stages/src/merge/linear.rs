//! The rule of methods that only weigh and add up: one streaming pass, nothing to look at beforehand.

use super::inputs::{MergeInputs, Operand};
use super::method::Rule;
use crate::StageError;
use merganser_tensors::Scratch;
use merganser_tensors::kernels::linear;
use merganser_tensors::source::check_finite;
use std::ops::Range;

/// What happens to the sum of the task vectors before it is added to the base.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rescale {
    Multiply(f32),
    /// Not the same as multiplying by the reciprocal, which is rounded itself.
    Divide(f32),
}

/// Δ = scale · Σ_t coefficient_t · (mask_t ⊙ τ_t), where there are masks.
///
/// All in f32: the sum over the tasks first, in the order of the collection, then the scale, then the base, as the authors of task
/// arithmetic do.
pub(super) struct Linear {
    pub coefficients: Vec<f32>,
    pub rescale: Rescale,
    /// The mask of each task, as a position on port `masks`; empty without.
    pub masks: Vec<usize>,
}

impl Linear {
    pub(super) fn new(inputs: &MergeInputs<'_>, weights: &[f64], rescale: Rescale) -> Result<Self, StageError> {
        let masks = if inputs.masks.is_empty() {
            Vec::new()
        } else {
            (0..weights.len()).map(|task| inputs.mask_of(task)).collect::<Result<_, _>>()?
        };
        Ok(Self { coefficients: weights.iter().map(|weight| *weight as f32).collect(), rescale, masks })
    }

    fn add_masked(
        &self,
        operand: &Operand<'_>,
        task: usize,
        range: &Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        let (mut values, mut mask) = (scratch.take(range.len()), scratch.take(range.len()));
        operand.read(task, range.clone(), &mut values, scratch)?;
        // A masked NaN would not show in the sum.
        check_finite(operand.name(), range.start, &values)?;
        operand.read_mask(self.masks[task], range.clone(), &mut mask, scratch)?;
        values.iter_mut().zip(&mask).for_each(|(value, mask)| *value *= mask);
        linear::add_scaled(out, self.coefficients[task], &values);
        scratch.give_back(values);
        scratch.give_back(mask);
        Ok(())
    }
}

impl Rule for Linear {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        out.fill(0.0);
        for (task, coefficient) in self.coefficients.iter().enumerate() {
            if !self.masks.is_empty() {
                self.add_masked(operand, task, &range, out, scratch)?;
                continue;
            }
            operand.add_scaled(task, range.clone(), *coefficient, out, scratch)?;
        }
        match self.rescale {
            Rescale::Multiply(factor) => linear::scale(out, factor),
            Rescale::Divide(divisor) => out.iter_mut().for_each(|value| *value /= divisor),
        }
        Ok(())
    }
}
