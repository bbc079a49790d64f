//! The rule of methods that only weigh and add up: one streaming pass, nothing to look at beforehand.

use super::inputs::Operand;
use super::method::Rule;
use merganser_tensors::kernels::linear;
use merganser_tensors::{Result, Scratch};
use std::ops::Range;

/// What happens to the sum of the task vectors before it is added to the base.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rescale {
    Multiply(f32),
    /// Not the same as multiplying by the reciprocal, which is rounded itself.
    Divide(f32),
}

/// Δ = scale · Σ_t coefficient_t · τ_t.
///
/// All in f32: the sum over the tasks first, in the order of the collection, then the scale, then the base, as the authors of task
/// arithmetic do.
pub(super) struct Linear {
    pub coefficients: Vec<f32>,
    pub rescale: Rescale,
}

impl Rule for Linear {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        out.fill(0.0);
        for (task, coefficient) in self.coefficients.iter().enumerate() {
            operand.add_scaled(task, range.clone(), *coefficient, out, scratch)?;
        }
        match self.rescale {
            Rescale::Multiply(factor) => linear::scale(out, factor),
            Rescale::Divide(divisor) => out.iter_mut().for_each(|value| *value /= divisor),
        }
        Ok(())
    }
}
