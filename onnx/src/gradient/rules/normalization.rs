//! Softmax and layer normalization.

use super::super::backward::{Backward, Unsupported, axis_index};
use super::super::tape::reduced;
use super::Rules;

pub(super) static RULES: Rules =
    &[("LayerNormalization", layer_normalization), ("LogSoftmax", log_softmax), ("Softmax", softmax)];

/// y·(g − Σ g·y)
fn softmax(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, y) = (b.gradient()?, b.output(0)?);
    let axis = axis_index(b.int("axis", -1), y.rank())?;
    if axis + 1 == y.rank() {
        let gradient = b.tape.emit_own("SoftmaxGrad", &[&g, &y], vec![], y.shape.clone());
        return b.give(0, &gradient);
    }
    let product = b.tape.mul(&g, &y);
    let sum = b.tape.reduce_sum(&product, &[axis], true);
    let difference = b.tape.sub(&g, &sum);
    let gradient = b.tape.mul(&y, &difference);
    b.give(0, &gradient)
}

/// g − exp(y)·Σ g
fn log_softmax(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, y) = (b.gradient()?, b.output(0)?);
    let axis = axis_index(b.int("axis", -1), y.rank())?;
    let sum = b.tape.reduce_sum(&g, &[axis], true);
    let softmax = b.tape.unary("Exp", &y);
    let product = b.tape.mul(&softmax, &sum);
    let gradient = b.tape.sub(&g, &product);
    b.give(0, &gradient)
}

/// With x̂ = (x − mean)/std and h = g·scale: (h − mean(h) − x̂·mean(h·x̂)) / std for x, Σ g·x̂ for the scale, Σ g for the
/// bias. Mean and 1/std come from the optional outputs of the op.
fn layer_normalization(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, x, scale) = (b.gradient()?, b.input(0)?, b.input(1)?);
    let first = axis_index(b.int("axis", -1), x.rank())?;
    let axes: Vec<usize> = (first..x.rank()).collect();
    if !b.needs(0) && !b.needs(1) {
        return b.give(2, &g);
    }
    let mean = b.extra_output(1, reduced(&x.shape, &axes, true));
    let inverse = b.extra_output(2, reduced(&x.shape, &axes, true));
    if b.needs(0) && scale.shape == x.shape[first..] {
        let of = [true, b.needs(1), b.needs(2)];
        let shapes = [&x.shape, &scale.shape, &scale.shape].map(Clone::clone);
        let gradients =
            b.tape.emit_own_several("LayerNormalizationGrad", &[&g, &x, &scale, &mean, &inverse], shapes, of);
        for (i, gradient) in gradients.iter().enumerate() {
            b.give(i, gradient)?;
        }
        return Ok(());
    }
    b.give(2, &g)?;
    let centered = b.tape.sub(&x, &mean);
    let normalized = b.tape.mul(&centered, &inverse);
    let weighted = b.tape.mul(&g, &normalized);
    b.give(1, &weighted)?;
    if b.needs(0) {
        let h = b.tape.mul(&g, &scale);
        let mean_h = b.tape.reduce_mean(&h, &axes, true);
        let along = b.tape.mul(&weighted, &scale);
        let mean_along = b.tape.reduce_mean(&along, &axes, true);
        let parallel = b.tape.mul(&normalized, &mean_along);
        let shift = b.tape.add(&parallel, &mean_h);
        let difference = b.tape.sub(&h, &shift);
        let gradient = b.tape.mul(&difference, &inverse);
        b.give(0, &gradient)?;
    }
    Ok(())
}
