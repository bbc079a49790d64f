//! Ops that cut tensors apart and put them together.

use super::super::backward::{Backward, Unsupported, axis_index};
use super::super::tape::Value;
use super::Rules;

pub(super) static RULES: Rules = &[("Concat", concat), ("Pad", pad), ("Slice", slice), ("Split", split)];

fn concat(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let g = b.gradient()?;
    let axis = axis_index(b.int("axis", 0), g.rank())?;
    let mut start = 0;
    for i in 0..b.n_inputs() {
        let end = start + b.input(i)?.shape[axis];
        if b.needs(i) {
            let piece = b.tape.slice(&g, &[axis], &[start], &[end]);
            b.give(i, &piece)?;
        }
        start = end;
    }
    Ok(())
}

fn split(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let x = b.input(0)?;
    let axis = axis_index(b.int("axis", 0), x.rank())?;
    let mut pieces = Vec::new();
    for i in 0..b.n_outputs() {
        let piece = if let Some(g) = b.gradient_of(i) {
            g
        } else {
            let shape = b.output(i)?.shape;
            b.tape.zeros(&shape)
        };
        pieces.push(piece);
    }
    let gradient = b.tape.concat(&pieces, axis);
    b.give(0, &gradient)
}

fn pad(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    if b.text("mode", "constant") != "constant" {
        return Err(format!("mode `{}` has no rule", b.text("mode", "constant")));
    }
    if b.needs(2) {
        return Err("the value of `Pad` has no rule".to_owned());
    }
    let (g, x) = (b.gradient()?, b.input(0)?);
    let pads = b.constant(1)?.unwrap_or_default();
    let axes: Vec<usize> = match b.constant(3)? {
        Some(axes) => axes.into_iter().map(|a| axis_index(a, x.rank())).collect::<Result<_, _>>()?,
        None => (0..x.rank()).collect(),
    };
    if pads.len() != 2 * axes.len() {
        return Err(format!("{} pads for {} axes", pads.len(), axes.len()));
    }
    let (mut before, mut after) = (vec![0; x.rank()], vec![0; x.rank()]);
    for (i, &axis) in axes.iter().enumerate() {
        before[axis] = -pads[i];
        after[axis] = -pads[i + axes.len()];
    }
    let gradient = b.tape.pad(&g, &before, &after);
    b.give(0, &gradient)
}

/// Where the values of one axis come from: `start`, `start + step`, … (`n` of them).
struct Range {
    start: i64,
    step: i64,
    n: i64,
}

impl Range {
    /// Reads start and end as ONNX defines them: negative numbers count from the end, too large ones are cut.
    fn new(length: usize, start: i64, end: i64, step: i64) -> Result<Self, Unsupported> {
        let length = length as i64;
        let absolute = |v: i64| if v < 0 { v.saturating_add(length) } else { v };
        let (start, end) = match step {
            0 => return Err("a step of 0".to_owned()),
            1.. => (absolute(start).clamp(0, length), absolute(end).clamp(0, length)),
            _ => (absolute(start).clamp(0, (length - 1).max(0)), absolute(end).clamp(-1, length - 1)),
        };
        let distance = if step > 0 { end - start } else { start - end }.max(0);
        let stride = step.saturating_abs();
        Ok(Self { start, step, n: distance / stride + i64::from(distance % stride != 0) })
    }
}

/// Zeros everywhere but at what was cut out.
fn slice(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, x) = (b.gradient()?, b.input(0)?);
    let starts = b.constant(1)?.unwrap_or_default();
    let ends = b.constant(2)?.unwrap_or_default();
    let axes: Vec<usize> = match b.constant(3)? {
        Some(axes) => axes.into_iter().map(|a| axis_index(a, x.rank())).collect::<Result<_, _>>()?,
        None => (0..starts.len().min(x.rank())).collect(),
    };
    let steps = b.constant(4)?.unwrap_or_else(|| vec![1; axes.len()]);
    if [starts.len(), ends.len(), steps.len()] != [axes.len(); 3] {
        return Err("its starts, ends, axes and steps differ in number".to_owned());
    }
    if g.n_elements() == 0 {
        let zeros = b.tape.zeros(&x.shape);
        return b.give(0, &zeros);
    }
    let (mut before, mut after) = (vec![0; x.rank()], vec![0; x.rank()]);
    let mut spread = g;
    for (i, &axis) in axes.iter().enumerate() {
        let mut range = Range::new(x.shape[axis], starts[i], ends[i], steps[i])?;
        if range.step < 0 {
            spread = b.tape.reverse(&spread, axis);
            range.start += (range.n - 1) * range.step;
            range.step = -range.step;
        }
        // A single value needs no gaps, and its step may be any number.
        if range.n > 1 && range.step > 1 {
            spread = with_gaps(b, &spread, axis, range.step as usize);
        }
        before[axis] = range.start;
        after[axis] = x.shape[axis] as i64 - range.start - spread.shape[axis] as i64;
    }
    let gradient = b.tape.pad(&spread, &before, &after);
    b.give(0, &gradient)
}

/// Puts `step − 1` zeros after every index of an axis.
fn with_gaps(b: &mut Backward<'_>, x: &Value, axis: usize, step: usize) -> Value {
    let mut apart = x.shape.clone();
    apart.insert(axis + 1, 1);
    let apart = b.tape.reshape(x, &apart);
    let mut after = vec![0; apart.rank()];
    after[axis + 1] = step as i64 - 1;
    let padded = b.tape.pad(&apart, &vec![0; apart.rank()], &after);
    let mut joined = x.shape.clone();
    joined[axis] *= step;
    b.tape.reshape(&padded, &joined)
}
