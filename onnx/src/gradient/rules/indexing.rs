//! Ops that read or write at indices.
//!
//! Sums over equal indices go through `ScatterElements`, which adds one value after the other: the order is fixed.

use super::super::backward::{Backward, Unsupported, axis_index};
use super::super::tape::{Value, int_attribute, string_attribute};
use super::Rules;

pub(super) static RULES: Rules = &[
    ("Gather", gather),
    ("GatherElements", gather_elements),
    ("GatherND", gather_nd),
    ("ScatterElements", scatter_elements),
    ("ScatterND", scatter_nd),
];

/// Adds row i of `updates` [n, columns] to row `indices[i]` of zeros [`rows`, columns].
fn scatter_rows(b: &mut Backward<'_>, rows: usize, indices: &Value, updates: &Value) -> Value {
    let (n, columns) = (updates.shape[0], updates.shape[1]);
    let indices = b.tape.reshape(indices, &[n, 1]);
    let indices = b.tape.expand(&indices, &[n, columns]);
    let zeros = b.tape.zeros(&[rows, columns]);
    add_at(b, &zeros, &indices, updates, 0)
}

pub(super) fn add_at(
    b: &mut Backward<'_>,
    data: &Value,
    indices: &Value,
    updates: &Value,
    axis: usize,
) -> Value {
    let attributes = vec![int_attribute("axis", axis as i64), string_attribute("reduction", "add")];
    b.tape.emit("ScatterElements", &[data, indices, updates], attributes, data.shape.clone())
}

/// A single constant index is a slice; other indices are scattered along the axis.
fn gather(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, x, indices) = (b.gradient()?, b.input(0)?, b.input(1)?);
    let axis = axis_index(b.int("axis", 0), x.rank())?;
    let length = x.shape[axis];
    if let Ok(Some(index)) = b.constant(1)
        && let [index] = index[..]
    {
        let mut single = x.shape.clone();
        single[axis] = 1;
        let piece = b.tape.reshape(&g, &single);
        let index = axis_index(index, length)?;
        let (mut before, mut after) = (vec![0; x.rank()], vec![0; x.rank()]);
        before[axis] = index as i64;
        after[axis] = (length - 1 - index) as i64;
        let gradient = b.tape.pad(&piece, &before, &after);
        return b.give(0, &gradient);
    }
    // The axes of the indices, which stand where the axis was, come first.
    let n = indices.rank();
    let order: Vec<usize> = (axis..axis + n).chain(0..axis).chain(axis + n..g.rank()).collect();
    let updates = b.tape.transpose(&g, &order);
    let rest: Vec<usize> = x.shape[..axis].iter().chain(&x.shape[axis + 1..]).copied().collect();
    let updates = b.tape.reshape(&updates, &[indices.n_elements(), rest.iter().product()]);
    let scattered = scatter_rows(b, length, &indices, &updates);
    let mut shape = vec![length];
    shape.extend(rest);
    let scattered = b.tape.reshape(&scattered, &shape);
    let back: Vec<usize> = (1..=axis).chain([0]).chain(axis + 1..x.rank()).collect();
    let gradient = b.tape.transpose(&scattered, &back);
    b.give(0, &gradient)
}

fn gather_elements(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, x, indices) = (b.gradient()?, b.input(0)?, b.input(1)?);
    let axis = axis_index(b.int("axis", 0), x.rank())?;
    let zeros = b.tape.zeros(&x.shape);
    let gradient = add_at(b, &zeros, &indices, &g, axis);
    b.give(0, &gradient)
}

/// Index tuples become row numbers of the data seen as a matrix.
fn gather_nd(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    if b.int("batch_dims", 0) != 0 {
        return Err("batch dimensions have no rule".to_owned());
    }
    let (g, x, indices) = (b.gradient()?, b.input(0)?, b.input(1)?);
    let width = indices.shape.last().copied().unwrap_or(0);
    if width == 0 || width > x.rank() {
        return Err(format!("tuples of {width} indices into {} axes", x.rank()));
    }
    let (indexed, rest) = x.shape.split_at(width);
    let strides: Vec<i64> = (0..width).map(|i| indexed[i + 1..].iter().product::<usize>() as i64).collect();
    let lengths: Vec<i64> = indexed.iter().map(|&d| d as i64).collect();
    let (zero, lengths, strides) = (b.tape.int(0), b.tape.ints(&lengths), b.tape.ints(&strides));
    let negative = b.tape.binary("Less", &indices, &zero);
    let wrapped = b.tape.add(&indices, &lengths);
    let indices = b.tape.select(&negative, &wrapped, &indices);
    let offsets = b.tape.mul(&indices, &strides);
    let rows = b.tape.reduce_sum(&offsets, &[offsets.rank() - 1], false);
    let columns: usize = rest.iter().product();
    let updates = b.tape.reshape(&g, &[rows.n_elements(), columns]);
    let scattered = scatter_rows(b, indexed.iter().product(), &rows, &updates);
    let gradient = b.tape.reshape(&scattered, &x.shape);
    b.give(0, &gradient)
}

/// The data's gradient is 0 where updates were written, the updates' gradient is what stands there.
fn scatter_nd(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    if b.text("reduction", "none") != "none" {
        return Err(format!("reduction `{}` has no rule", b.text("reduction", "none")));
    }
    let (g, indices, updates) = (b.gradient()?, b.input(1)?, b.input(2)?);
    if b.needs(0) {
        let zeros = b.tape.zeros(&updates.shape);
        let gradient = b.tape.emit("ScatterND", &[&g, &indices, &zeros], vec![], g.shape.clone());
        b.give(0, &gradient)?;
    }
    if b.needs(2) {
        let gradient = b.tape.emit("GatherND", &[&g, &indices], vec![], updates.shape.clone());
        b.give(2, &gradient)?;
    }
    Ok(())
}

fn scatter_elements(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, indices, updates) = (b.gradient()?, b.input(1)?, b.input(2)?);
    let attributes = vec![int_attribute("axis", b.int("axis", 0))];
    match b.text("reduction", "none") {
        "none" => {
            if b.needs(0) {
                let zeros = b.tape.zeros(&updates.shape);
                let inputs = [&g, &indices, &zeros];
                let gradient = b.tape.emit("ScatterElements", &inputs, attributes.clone(), g.shape.clone());
                b.give(0, &gradient)?;
            }
        }
        "add" => b.give(0, &g)?,
        other => return Err(format!("reduction `{other}` has no rule")),
    }
    if b.needs(2) {
        let gradient = b.tape.emit("GatherElements", &[&g, &indices], attributes, updates.shape.clone());
        b.give(2, &gradient)?;
    }
    Ok(())
}
