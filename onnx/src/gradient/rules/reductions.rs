//! Sums, means and the like over axes.

use super::super::backward::{Backward, Unsupported, axis_index};
use super::super::tape::{Value, reduced};
use super::Rules;

pub(super) static RULES: Rules = &[
    ("GlobalAveragePool", global_average_pool),
    ("ReduceL2", reduce_l2),
    ("ReduceMax", reduce_max),
    ("ReduceMean", reduce_mean),
    ("ReduceSum", reduce_sum),
];

/// Returns the axes that are reduced: an attribute up to opset 17 (for `ReduceSum`: 12), an input after.
fn axes(b: &Backward<'_>, rank: usize) -> Result<Vec<usize>, Unsupported> {
    let given = match b.ints("axes") {
        Some(axes) => Some(axes.to_vec()),
        None => b.constant(1)?,
    };
    match given {
        Some(axes) if !axes.is_empty() => axes.into_iter().map(|a| axis_index(a, rank)).collect(),
        _ if b.int("noop_with_empty_axes", 0) != 0 => Ok(Vec::new()),
        _ => Ok((0..rank).collect()),
    }
}

/// Gives a result back the axes that it lost.
fn with_axes(b: &mut Backward<'_>, v: &Value, x: &Value, axes: &[usize]) -> Value {
    b.tape.reshape(v, &reduced(&x.shape, axes, true))
}

fn reduce_sum(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, x) = (b.gradient()?, b.input(0)?);
    let axes = axes(b, x.rank())?;
    let g = with_axes(b, &g, &x, &axes);
    let gradient = b.tape.expand(&g, &x.shape);
    b.give(0, &gradient)
}

fn mean_over(b: &mut Backward<'_>, axes: &[usize]) -> Result<(), Unsupported> {
    let (g, x) = (b.gradient()?, b.input(0)?);
    let n: usize = axes.iter().map(|&a| x.shape[a]).product();
    let g = b.tape.scale(&g, 1.0 / n as f32);
    let g = with_axes(b, &g, &x, axes);
    let gradient = b.tape.expand(&g, &x.shape);
    b.give(0, &gradient)
}

fn reduce_mean(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let axes = axes(b, b.input(0)?.rank())?;
    mean_over(b, &axes)
}

fn global_average_pool(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let axes: Vec<usize> = (2..b.input(0)?.rank()).collect();
    mean_over(b, &axes)
}

/// g·x/y, and 0 where the norm is 0, as in PyTorch.
fn reduce_l2(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, x, y) = (b.gradient()?, b.input(0)?, b.output(0)?);
    let axes = axes(b, x.rank())?;
    let zero = b.tape.scalar(0.0);
    let quotient = b.tape.div(&g, &y);
    let positive = b.tape.binary("Greater", &y, &zero);
    let safe = b.tape.select(&positive, &quotient, &zero);
    let safe = with_axes(b, &safe, &x, &axes);
    let gradient = b.tape.mul(&x, &safe);
    b.give(0, &gradient)
}

/// g at the maximum, in equal parts where there are several, as PyTorch's `amax`.
fn reduce_max(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, x, y) = (b.gradient()?, b.input(0)?, b.output(0)?);
    let axes = axes(b, x.rank())?;
    let (g, y) = (with_axes(b, &g, &x, &axes), with_axes(b, &y, &x, &axes));
    let (zero, one) = (b.tape.scalar(0.0), b.tape.scalar(1.0));
    let is_max = b.tape.binary("Equal", &x, &y);
    let marks = b.tape.select(&is_max, &one, &zero);
    let n = b.tape.reduce_sum(&marks, &axes, true);
    let part = b.tape.div(&g, &n);
    let gradient = b.tape.mul(&marks, &part);
    b.give(0, &gradient)
}
