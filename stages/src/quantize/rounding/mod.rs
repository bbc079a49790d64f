//! Rounding that looks at the inputs of a layer: of all codes near a weight, those that change the layer's output least.
//!
//! A layer computes y = W·x. With H = E[x·xᵀ] over calibration data, codes that decode to Q change its output by
//!
//! `E‖(W − Q)·x‖² = tr((W − Q)·H·(W − Q)ᵀ)`,
//!
//! one independent quadratic form per row of W. Rounding each weight to the nearest value ignores that errors of one row can cancel;
//! [`error_feedback`] (GPTQ) and [`descent`] do not. Scales and zero points are given and stay: what is stored is as small as before.
//!
//! H is damped, `H + damping·mean(diag H)·I`: calibration data is little, and inputs that it never excites would be free to go anywhere.
//! All that is promised here is about the damped form, which is computed in f64.

#![expect(clippy::needless_pass_by_value, reason = "views are references themselves")]

mod descent;
mod error_feedback;

use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, Axis};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Beyond, nothing of H would be left.
const MOST_DAMPING: f64 = 100.0;

/// How weights become codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Rounding {
    /// To the nearest value, ties to even codes.
    #[default]
    Nearest,
    /// One input after the other, each weight making up for the errors of those before it (GPTQ).
    Gptq,
    /// From the better of `nearest` and `gptq`, one code at a time to where the error is least, until none can be improved.
    Descent,
}

impl Rounding {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
    pub(super) fn is_nearest(&self) -> bool {
        *self == Self::Nearest
    }
}

/// The second moments of a layer's inputs, damped and factored.
pub(super) struct Curvature {
    /// Damped H, inputs in the order in which they are given.
    damped: Array2<f64>,
    /// The order in which error feedback takes the inputs: the loudest first.
    order: Vec<usize>,
    /// L of damped H = L·Lᵀ, rows and columns in the reverse of `order`.
    factor: Array2<f64>,
}

impl Curvature {
    /// Damps and factors the second moments of `n` inputs, n × n. Where so little damping does not make them positive definite, it is
    /// raised tenfold until it does. Nothing if there is nothing to go by: no input was ever other than zero.
    pub(super) fn new(moments: ArrayView2<'_, f64>, damping: f64) -> Option<Self> {
        let n = moments.nrows();
        let diagonal = moments.diag();
        let mean = diagonal.sum() / n.max(1) as f64;
        if n == 0 || !(mean.is_finite() && mean > 0.0) {
            return None;
        }
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]).then(a.cmp(&b)));
        let reversed: Vec<usize> = order.iter().rev().copied().collect();
        let dampings = std::iter::successors(Some(damping), |damping| Some(damping * 10.0));
        dampings.take_while(|damping| *damping <= MOST_DAMPING).find_map(|damping| {
            let mut damped = moments.to_owned();
            damped.diag_mut().mapv_inplace(|value| value + damping * mean);
            let permuted = damped.select(Axis(0), &reversed).select(Axis(1), &reversed);
            let factor = merganser_algebra::cholesky(permuted.view()).ok()?;
            Some(Self { damped, order: order.clone(), factor })
        })
    }

    pub(super) fn n_inputs(&self) -> usize {
        self.order.len()
    }

    /// e·H·eᵀ of the error of one row, damped.
    pub(super) fn error(&self, weights: ArrayView1<'_, f64>, rounded: ArrayView1<'_, f64>) -> f64 {
        let error = &weights - &rounded;
        error.iter().zip(self.damped.outer_iter()).map(|(e, row)| e * row.dot(&error)).sum()
    }
}

/// Rounds each row of `weights` (outputs × inputs) in place. `nearest(row, input, value)` is the value nearest to `value` that the
/// weight at this place can be stored as.
pub(super) fn round(
    rounding: Rounding,
    weights: &mut Array2<f64>,
    curvature: &Curvature,
    nearest: &(dyn Fn(usize, usize, f64) -> f64 + Sync),
) {
    let rows: Vec<(usize, ArrayViewMut1<'_, f64>)> = weights.outer_iter_mut().enumerate().collect();
    rows.into_par_iter().for_each(|(row, mut weights)| {
        let nearest = |input: usize, value: f64| nearest(row, input, value);
        let rounded = match rounding {
            Rounding::Nearest => to_nearest(weights.view(), &nearest),
            Rounding::Gptq => error_feedback::round(weights.view(), curvature, &nearest),
            Rounding::Descent => {
                let plain = to_nearest(weights.view(), &nearest);
                let fed_back = error_feedback::round(weights.view(), curvature, &nearest);
                let error = |rounded: &[f64]| curvature.error(weights.view(), ArrayView1::from(rounded));
                let start = if error(&fed_back) < error(&plain) { fed_back } else { plain };
                descent::improve(weights.view(), start, curvature, &nearest)
            }
        };
        weights.assign(&ArrayView1::from(&rounded));
    });
}

fn to_nearest(weights: ArrayView1<'_, f64>, nearest: &dyn Fn(usize, f64) -> f64) -> Vec<f64> {
    weights.iter().enumerate().map(|(input, weight)| nearest(input, *weight)).collect()
}

#[cfg(test)]
mod tests;
