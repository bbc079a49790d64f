//! Ops that change the resolution of images.

use super::super::backward::{Backward, Unsupported};
use super::super::tape::Value;
use super::Rules;
use super::indexing::add_at;

pub(super) static RULES: Rules = &[("MaxPool", max_pool), ("Resize", resize)];

/// g goes to the place of each maximum, which the op tells in its optional output: the first of several, as in PyTorch.
fn max_pool(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    if b.int("storage_order", 0) != 0 {
        return Err("column-major indices have no rule".to_owned());
    }
    let (g, x) = (b.gradient()?, b.input(0)?);
    let places = b.extra_output(1, g.shape.clone());
    let places = b.tape.reshape(&places, &[g.n_elements()]);
    let flat = b.tape.reshape(&g, &[g.n_elements()]);
    let zeros = b.tape.zeros(&[x.n_elements()]);
    let sums = add_at(b, &zeros, &places, &flat, 0);
    let gradient = b.tape.reshape(&sums, &x.shape);
    b.give(0, &gradient)
}

/// Resizing is linear, one axis after the other, so its gradient is a product with the transpose of a matrix per axis:
/// the op itself, applied to unit vectors, says which. Whole repetitions of pixels are sums.
fn resize(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, x) = (b.gradient()?, b.input(0)?);
    if b.has("axes") || b.text("keep_aspect_ratio_policy", "stretch") != "stretch" {
        return Err("sizes of some axes only have no rule".to_owned());
    }
    if b.text("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize" {
        return Err("cropping has no rule".to_owned());
    }
    let by_scales = b.has_input(2);
    if let Some(factors) = repetitions(b, &x, &g) {
        let split: Vec<usize> = x.shape.iter().zip(&factors).flat_map(|(&d, &f)| [d, f]).collect();
        let apart = b.tape.reshape(&g, &split);
        let repeated: Vec<usize> = (0..x.rank()).filter(|&i| factors[i] != 1).map(|i| 2 * i + 1).collect();
        let gradient = b.tape.reduce_sum(&apart, &repeated, false);
        let gradient = b.tape.reshape(&gradient, &x.shape);
        return b.give(0, &gradient);
    }
    if x.rank() < 3 || x.shape[..2] != g.shape[..2] {
        return Err("only axes after the second have a rule".to_owned());
    }
    let mut gradient = g;
    for axis in 2..x.rank() {
        if gradient.shape[axis] == x.shape[axis] && !by_scales {
            continue;
        }
        let matrix = matrix(b, &x, axis, gradient.shape[axis])?;
        let mut order: Vec<usize> = (0..x.rank()).collect();
        order.swap(axis, x.rank() - 1);
        let last = b.tape.transpose(&gradient, &order);
        let transposed = b.tape.transpose(&matrix, &[1, 0]);
        let product = b.tape.matmul(&last, &transposed);
        gradient = b.tape.transpose(&product, &order);
    }
    b.give(0, &gradient)
}

/// Returns how often every value is repeated per axis, if that is all that the op does.
fn repetitions(b: &Backward<'_>, x: &Value, y: &Value) -> Option<Vec<usize>> {
    let plain = b.text("mode", "nearest") == "nearest"
        && b.text("coordinate_transformation_mode", "half_pixel") == "asymmetric"
        && b.text("nearest_mode", "round_prefer_floor") == "floor";
    let whole = x.shape.iter().zip(&y.shape).all(|(&d, &n)| d > 0 && n % d == 0);
    let factors: Vec<usize> = x.shape.iter().zip(&y.shape).map(|(&d, &n)| n / d.max(1)).collect();
    // A scale of 2.2 may give twice the length as well.
    let exact = !b.has_input(2)
        || b.floats(2).is_some_and(|scales| {
            scales.len() == factors.len() && scales.iter().zip(&factors).all(|(&s, &f)| s == f as f32)
        });
    (plain && whole && exact).then_some(factors)
}

/// Returns the matrix [length of the axis, new length] whose rows are resized unit vectors.
fn matrix(b: &mut Backward<'_>, x: &Value, axis: usize, new: usize) -> Result<Value, Unsupported> {
    let length = x.shape[axis];
    let mut units = vec![0.0; length * length];
    units.iter_mut().step_by(length + 1).for_each(|v| *v = 1.0);
    let mut shape = vec![1; x.rank()];
    (shape[0], shape[axis]) = (length, length);
    let units = b.tape.floats(&shape, &units);
    let none = Value { name: String::new(), shape: vec![] };
    let mut resized = shape.clone();
    resized[axis] = new;
    let attributes = b.attributes();
    let result = if b.has_input(2) {
        // Coordinates are computed from the scale that is given, not from the lengths.
        let scales = b.input(2)?;
        let own = b.tape.slice(&scales, &[0], &[axis], &[axis + 1]);
        let ones = |b: &mut Backward<'_>, n: usize| b.tape.floats(&[n], &vec![1.0; n]);
        let mut parts = vec![ones(b, axis), own];
        if axis + 1 < x.rank() {
            parts.push(ones(b, x.rank() - axis - 1));
        }
        let scales = b.tape.concat(&parts, 0);
        b.tape.emit("Resize", &[&units, &none, &scales], attributes, resized)
    } else {
        let sizes: Vec<i64> = resized.iter().map(|&d| d as i64).collect();
        let sizes = b.tape.ints(&sizes);
        b.tape.emit("Resize", &[&units, &none, &none, &sizes], attributes, resized)
    };
    Ok(b.tape.reshape(&result, &[length, new]))
}
