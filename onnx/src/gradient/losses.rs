//! Losses, as parts of a graph: each appends its nodes to a tape and returns one number.
//!
//! Batches are averaged over. What a teacher says, and targets, are values as others, usually inputs
//! ([`Forward::add_input`](super::Forward::add_input)); no gradient reaches them unless they are asked for.

use super::error::GradientError;
use super::tape::{Tape, Value};

/// Below this, a norm counts as this (PyTorch's `normalize`).
const SMALLEST_NORM: f32 = 1e-12;

/// Cross-entropy of `logits` [batch, classes] against probabilities `targets` of the same shape (for labels: one 1 per
/// row): mean over rows of −Σ t · log softmax(z).
pub fn cross_entropy(tape: &mut Tape, logits: &Value, targets: &Value) -> Result<Value, GradientError> {
    same("cross-entropy", logits, targets)?;
    let axis = last_axis("cross-entropy", logits)?;
    let log = tape.log_softmax(logits, axis);
    let product = tape.mul(targets, &log);
    Ok(mean_over_rows(tape, &product, -1.0))
}

/// Entropy of softmax(`logits`) [batch, classes], mean over rows (AdaMerging, eq. 5).
pub fn entropy(tape: &mut Tape, logits: &Value) -> Result<Value, GradientError> {
    let axis = last_axis("entropy", logits)?;
    let log = tape.log_softmax(logits, axis);
    let p = tape.softmax(logits, axis);
    let product = tape.mul(&p, &log);
    Ok(mean_over_rows(tape, &product, -1.0))
}

/// T² · KL(softmax(teacher / T) ‖ softmax(student / T)) of logits [batch, classes], mean over rows (Hinton et al. 2015).
pub fn logits_divergence(
    tape: &mut Tape,
    student: &Value,
    teacher: &Value,
    temperature: f32,
) -> Result<Value, GradientError> {
    same("the divergence of logits", student, teacher)?;
    let axis = last_axis("the divergence of logits", student)?;
    let (s, t) = (tape.scale(student, 1.0 / temperature), tape.scale(teacher, 1.0 / temperature));
    let (log_s, log_t) = (tape.log_softmax(&s, axis), tape.log_softmax(&t, axis));
    let p = tape.softmax(&t, axis);
    let difference = tape.sub(&log_t, &log_s);
    let product = tape.mul(&p, &difference);
    Ok(mean_over_rows(tape, &product, temperature * temperature))
}

/// Mean of (student − teacher)² over all values.
pub fn mean_squared_error(tape: &mut Tape, student: &Value, teacher: &Value) -> Result<Value, GradientError> {
    same("the squared error", student, teacher)?;
    let difference = tape.sub(student, teacher);
    let square = tape.mul(&difference, &difference);
    Ok(tape.mean(&square))
}

/// Layer statistics of CDPQ: squared errors of the means and of the unbiased variances over space, per channel.
///
/// Both are [batch, channels, height, width]. A student of another resolution is averaged to the teacher's first, as
/// PyTorch's `adaptive_avg_pool2d` does. Of maps of one pixel the variance is 0/0, and the loss NaN.
pub fn layer_statistics(tape: &mut Tape, student: &Value, teacher: &Value) -> Result<Value, GradientError> {
    let student = matched("layer statistics", tape, student, teacher)?;
    let (mean_s, variance_s) = statistics(tape, &student);
    let (mean_t, variance_t) = statistics(tape, teacher);
    let means = mean_squared_error(tape, &mean_s, &mean_t)?;
    let variances = mean_squared_error(tape, &variance_s, &variance_t)?;
    Ok(tape.add(&means, &variances))
}

/// Affinity of CDPQ: with channels normalized over space (rows of t̂ and ŝ), the squared error of t̂ ŝᵀ against t̂ t̂ᵀ.
///
/// Shapes and resolutions as in [`layer_statistics`].
pub fn affinity(tape: &mut Tape, student: &Value, teacher: &Value) -> Result<Value, GradientError> {
    let student = matched("affinity", tape, student, teacher)?;
    let s = normalized_channels(tape, &student);
    let t = normalized_channels(tape, teacher);
    let (s_transposed, t_transposed) = (tape.transpose_matrices(&s), tape.transpose_matrices(&t));
    let own = tape.matmul(&t, &t_transposed);
    let between = tape.matmul(&t, &s_transposed);
    mean_squared_error(tape, &between, &own)
}

/// Logits of a linear head: `x · Wᵀ + b` of `features` [batch, features], divided by their norms first if `normalize`.
///
/// `weight` is [classes, features] in row-major order, with as many classes as there are values in `bias`.
pub fn linear_head(
    tape: &mut Tape,
    features: &Value,
    weight: &[f32],
    bias: &[f32],
    normalize: bool,
) -> Result<Value, GradientError> {
    let &[_, width] = &features.shape[..] else { return Err(operands("a linear head", features, features)) };
    if weight.len() != bias.len() * width {
        let right = vec![bias.len(), weight.len() / bias.len().max(1)];
        return Err(GradientError::LossOperands {
            loss: "a linear head",
            left: features.shape.clone(),
            right,
        });
    }
    let features = if normalize { normalized(tape, features, 1) } else { features.clone() };
    let weight = tape.floats(&[bias.len(), width], weight);
    let product = tape.gemm((&features, false), (&weight, true), 1.0);
    let bias = tape.floats(&[bias.len()], bias);
    Ok(tape.add(&product, &bias))
}

/// Adds up losses with their weights.
pub fn weighted_sum(tape: &mut Tape, losses: &[(f32, Value)]) -> Value {
    let mut sum: Option<Value> = None;
    for (weight, loss) in losses {
        let loss = tape.scale(loss, *weight);
        sum = Some(match sum {
            Some(sum) => tape.add(&sum, &loss),
            None => loss,
        });
    }
    sum.unwrap_or_else(|| tape.scalar(0.0))
}

/// Makes [batch, channels, tokens, 1] of tokens [batch, tokens, channels], the form that statistics and affinity are
/// defined on.
pub fn tokens_as_map(tape: &mut Tape, tokens: &Value) -> Result<Value, GradientError> {
    let &[batch, n, channels] = &tokens.shape[..] else {
        return Err(operands("a map of tokens", tokens, tokens));
    };
    let moved = tape.transpose(tokens, &[0, 2, 1]);
    Ok(tape.reshape(&moved, &[batch, channels, n, 1]))
}

fn operands(loss: &'static str, left: &Value, right: &Value) -> GradientError {
    GradientError::LossOperands { loss, left: left.shape.clone(), right: right.shape.clone() }
}

fn same(loss: &'static str, left: &Value, right: &Value) -> Result<(), GradientError> {
    if left.shape == right.shape { Ok(()) } else { Err(operands(loss, left, right)) }
}

fn last_axis(loss: &'static str, logits: &Value) -> Result<usize, GradientError> {
    logits.rank().checked_sub(1).ok_or_else(|| operands(loss, logits, logits))
}

/// Sums over the last axis and averages over the others, times a factor.
fn mean_over_rows(tape: &mut Tape, x: &Value, factor: f32) -> Value {
    let rows: usize = x.shape[..x.rank() - 1].iter().product();
    let axes: Vec<usize> = (0..x.rank()).collect();
    let sum = tape.reduce_sum(x, &axes, false);
    tape.scale(&sum, factor / rows as f32)
}

/// Checks that both are maps of the same channels; averages the student's to the teacher's resolution.
fn matched(
    loss: &'static str,
    tape: &mut Tape,
    student: &Value,
    teacher: &Value,
) -> Result<Value, GradientError> {
    if student.rank() != 4 || teacher.rank() != 4 || student.shape[..2] != teacher.shape[..2] {
        return Err(operands(loss, student, teacher));
    }
    if student.n_elements() == 0 || teacher.n_elements() == 0 {
        return Err(operands(loss, student, teacher));
    }
    let mut pooled = student.clone();
    if pooled.shape[3] != teacher.shape[3] {
        let matrix = averages(tape, pooled.shape[3], teacher.shape[3]);
        let transposed = tape.transpose(&matrix, &[1, 0]);
        pooled = tape.matmul(&pooled, &transposed);
    }
    if pooled.shape[2] != teacher.shape[2] {
        let matrix = averages(tape, pooled.shape[2], teacher.shape[2]);
        pooled = tape.matmul(&matrix, &pooled);
    }
    Ok(pooled)
}

/// Returns the matrix [to, from] whose row i averages from ⌊i·from/to⌋ to ⌈(i+1)·from/to⌉.
fn averages(tape: &mut Tape, from: usize, to: usize) -> Value {
    let mut matrix = vec![0.0; to * from];
    for (i, row) in matrix.chunks_exact_mut(from).enumerate() {
        let (start, end) = (i * from / to, ((i + 1) * from).div_ceil(to));
        row[start..end].fill(1.0 / (end - start) as f32);
    }
    tape.floats(&[to, from], &matrix)
}

/// Returns mean and unbiased variance over the last two axes.
fn statistics(tape: &mut Tape, x: &Value) -> (Value, Value) {
    let mean = tape.reduce_mean(x, &[2, 3], true);
    let centered = tape.sub(x, &mean);
    let square = tape.mul(&centered, &centered);
    let sum = tape.reduce_sum(&square, &[2, 3], true);
    // In f32, so that one pixel gives 0 · ∞.
    let n = (x.shape[2] * x.shape[3]) as f32;
    let variance = tape.scale(&sum, 1.0 / (n - 1.0));
    (mean, variance)
}

/// Returns [batch, channels, pixels] with channels divided by their norm over pixels.
fn normalized_channels(tape: &mut Tape, x: &Value) -> Value {
    let flat = tape.reshape(x, &[x.shape[0], x.shape[1], x.shape[2] * x.shape[3]]);
    normalized(tape, &flat, 2)
}

/// Divides by the norms over an axis.
fn normalized(tape: &mut Tape, x: &Value, axis: usize) -> Value {
    let norm = tape.norm(x, &[axis]);
    let smallest = tape.scalar(SMALLEST_NORM);
    let norm = tape.emit("Clip", &[&norm, &smallest], vec![], norm.shape.clone());
    tape.div(x, &norm)
}
