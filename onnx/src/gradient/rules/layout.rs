//! Ops that move or repeat values without changing them.

use super::super::backward::{Backward, Unsupported, axis_index};
use super::Rules;

pub(super) static RULES: Rules = &[
    ("Expand", expand),
    ("Flatten", reshape),
    ("Reshape", reshape),
    ("Squeeze", reshape),
    ("Tile", tile),
    ("Transpose", transpose),
    ("Unsqueeze", reshape),
];

fn reshape(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, x) = (b.gradient()?, b.input(0)?);
    let gradient = b.tape.reshape(&g, &x.shape);
    b.give(0, &gradient)
}

/// The sum over repeated axes is what `give` does.
fn expand(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let g = b.gradient()?;
    b.give(0, &g)
}

fn transpose(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let g = b.gradient()?;
    let order: Vec<usize> = match b.ints("perm") {
        Some(order) => order.iter().map(|&o| axis_index(o, g.rank())).collect::<Result<_, _>>()?,
        None => (0..g.rank()).rev().collect(),
    };
    let mut back = vec![0; order.len()];
    for (i, o) in order.into_iter().enumerate() {
        back[o] = i;
    }
    let gradient = b.tape.transpose(&g, &back);
    b.give(0, &gradient)
}

/// Sums over the repetitions, which are axes of their own in another shape.
fn tile(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, x) = (b.gradient()?, b.input(0)?);
    // Not from the input `repeats`, which need not be a constant.
    let split: Vec<usize> = g.shape.iter().zip(&x.shape).flat_map(|(&n, &d)| [n / d.max(1), d]).collect();
    let repetitions: Vec<usize> = (0..x.rank()).map(|axis| 2 * axis).collect();
    let apart = b.tape.reshape(&g, &split);
    let gradient = b.tape.reduce_sum(&apart, &repetitions, false);
    b.give(0, &gradient)
}
