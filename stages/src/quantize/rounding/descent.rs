//! Coordinate descent on the quadratic form: one weight at a time moves to the stored value where the error is least.
//!
//! With q the values of a row and g = (w − q)·H, the error as a function of q_i alone is a parabola of curvature H_ii with its lowest point
//! at `q_i + g_i/H_ii`: of all values that weight i can be stored as, the nearest to that point is best. A move is made only if it makes the
//! error smaller, `Δ = d²·H_ii − 2·d·g_i < 0` for a step d. So the error never grows, and the result is never worse than the start; as every
//! move makes it smaller and there are finitely many codes, it ends. AdaRound (Nagel et al., arXiv:2004.10568) minimizes the same
//! form over rounding up or down by gradient descent on a relaxation, which has neither property; steps of several codes are allowed here.

use super::Curvature;
use ndarray::ArrayView1;

/// Sweeps over a row; few rows need more than ten.
const MOST_SWEEPS: usize = 64;

/// A move must be worth this part of what it trades: below, it would be round-off.
const LEAST_GAIN: f64 = 1e-9;

/// Improves the values of one row.
pub(super) fn improve(
    weights: ArrayView1<'_, f64>,
    start: Vec<f64>,
    curvature: &Curvature,
    nearest: &dyn Fn(usize, f64) -> f64,
) -> Vec<f64> {
    let mut rounded = start;
    let h = &curvature.damped;
    let mut gradient = vec![0.0f64; weights.len()];
    for (input, (weight, value)) in weights.iter().zip(&rounded).enumerate() {
        subtract(&mut gradient, value - weight, h.row(input));
    }
    for _ in 0..MOST_SWEEPS {
        let mut moved = false;
        for &input in &curvature.order {
            let curvature = h[[input, input]];
            let wanted = rounded[input] + gradient[input] / curvature;
            let candidate = nearest(input, wanted);
            let step = candidate - rounded[input];
            let (cost, gain) = (step * step * curvature, 2.0 * step * gradient[input]);
            if gain - cost > LEAST_GAIN * gain {
                rounded[input] = candidate;
                subtract(&mut gradient, step, h.row(input));
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    rounded
}

/// g − step·(row of H); H is symmetric.
fn subtract(gradient: &mut [f64], step: f64, row: ArrayView1<'_, f64>) {
    if step != 0.0 {
        gradient.iter_mut().zip(row).for_each(|(g, h)| *g -= step * h);
    }
}
