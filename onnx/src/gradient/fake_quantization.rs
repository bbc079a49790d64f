//! Fake quantization: values rounded to what a few bits can hold, in floats, so that a model learns to live with it.
//!
//! Rounding has no useful derivative, so gradients go straight through it ([`Tape::straight_through`]). How many levels there are is a
//! value of the graph, usually an input: a session serves every width.

use super::tape::{Tape, Value, reduced};

/// What a step may not fall below, so that nothing is divided by zero.
const SMALLEST_STEP: f32 = f32::from_bits(1);

/// Rounds a weight as `quantize` with scheme `symmetric` does, bit by bit: per channel of `axis`, Δ = max|w| / levels (1 where the channel
/// is all zeros), and round(w/Δ)·Δ, ties to even. The gradient of the result is the gradient of the weight.
///
/// `levels`: 2^(b−1) − 1 for b bits, as many numbers as there are channels. As the largest magnitude decides the step, nothing is cut off,
/// so no gradient is either. CDPQ's authors detach the weight, and with it every gradient of it; they write of straight-through gradients,
/// and those are what this gives.
///
/// # Panics
///
/// If there is no such axis, or `levels` has another number of values than it.
pub fn symmetric(tape: &mut Tape, weight: &Value, axis: usize, levels: &Value) -> Value {
    let levels = per_channel(tape, weight, axis, levels);
    let magnitude = tape.unary("Abs", weight);
    let others: Vec<usize> = (0..weight.rank()).filter(|&a| a != axis).collect();
    let largest = tape.largest(&magnitude, &others);
    let quotient = tape.div(&largest, &levels);
    let smallest = tape.scalar(SMALLEST_STEP);
    let step = tape.binary("Max", &quotient, &smallest);
    let (zero, one) = (tape.scalar(0.0), tape.scalar(1.0));
    let nothing = tape.binary("Equal", &largest, &zero);
    let step = tape.select(&nothing, &one, &step);
    let scaled = tape.div(weight, &step);
    let whole = tape.unary("Round", &scaled);
    let rounded = tape.mul(&whole, &step);
    tape.straight_through(weight, &rounded)
}

/// Rounds values by a step that is learned (LSQ; Esser et al. 2020, eq. 1 to 3): round(clip(x/s, lowest, highest))·s. The gradient of x
/// passes where x/s lies within the bounds; that of s is round(x/s) − x/s there, and the bound elsewhere.
///
/// `step`, `lowest` and `highest` are broadcast over x. The gradient of s comes out as it is; LSQ divides it by √(values per step · highest)
/// ([`gradient_scale`]).
pub fn learned(tape: &mut Tape, x: &Value, step: &Value, lowest: &Value, highest: &Value) -> Value {
    let scaled = tape.div(x, step);
    let below = tape.binary("Less", &scaled, lowest);
    let above = tape.binary("Greater", &scaled, highest);
    let clipped = tape.select(&below, lowest, &scaled);
    let clipped = tape.select(&above, highest, &clipped);
    let whole = tape.unary("Round", &clipped);
    let whole = tape.straight_through(&clipped, &whole);
    tape.mul(&whole, step)
}

/// What LSQ multiplies the gradient of a step with (§2.2): 1/√(n·highest), for n values that share the step.
pub fn gradient_scale(n: usize, highest: f32) -> f32 {
    (1.0 / (n as f64 * f64::from(highest)).sqrt()) as f32
}

/// What LSQ begins with (§2.1): 2·mean|x|/√highest.
pub fn first_step(mean_magnitude: f32, highest: f32) -> f32 {
    2.0 * mean_magnitude / highest.sqrt()
}

/// Gives a vector the shape that is broadcast along an axis.
fn per_channel(tape: &mut Tape, x: &Value, axis: usize, values: &Value) -> Value {
    assert_eq!(values.n_elements(), x.shape[axis], "one number per channel");
    let others: Vec<usize> = (0..x.rank()).filter(|&a| a != axis).collect();
    tape.reshape(values, &reduced(&x.shape, &others, true))
}
