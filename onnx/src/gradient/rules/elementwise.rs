//! Ops that work element by element; sums over broadcast axes are `Backward::give`'s.

use std::f32::consts::PI;

use super::super::backward::{Backward, Unsupported};
use super::super::tape::{STRAIGHT_THROUGH, Value};
use super::Rules;

pub(super) static RULES: Rules = &[
    ("Abs", abs),
    ("Add", add),
    ("Cast", cast),
    ("Ceil", constant),
    ("Clip", clip),
    ("Cos", cos),
    ("Div", div),
    ("Erf", erf),
    ("Exp", exp),
    ("Floor", constant),
    ("Gelu", gelu),
    ("Identity", identity),
    ("Log", log),
    ("Mul", mul),
    ("Neg", neg),
    ("Pow", pow),
    ("Reciprocal", reciprocal),
    ("Relu", relu),
    ("Round", constant),
    ("Sigmoid", sigmoid),
    ("Sign", constant),
    ("Sin", sin),
    ("Sqrt", sqrt),
    (STRAIGHT_THROUGH, identity),
    ("Sub", sub),
    ("Sum", sum),
    ("Tanh", tanh),
    ("Where", select),
];

pub(super) static OWN_RULES: Rules = &[("Gelu", gelu), ("QuickGelu", quick_gelu)];

/// The derivative is zero wherever there is one.
#[expect(clippy::unnecessary_wraps, reason = "the signature of a rule")]
fn constant(_: &mut Backward<'_>) -> Result<(), Unsupported> {
    Ok(())
}

fn identity(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let g = b.gradient()?;
    b.give(0, &g)
}

/// Only `f32` values have gradients, so this is a cast between equal types.
fn cast(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    identity(b)
}

fn add(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let g = b.gradient()?;
    b.give(0, &g)?;
    b.give(1, &g)
}

fn sum(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let g = b.gradient()?;
    (0..b.n_inputs()).try_for_each(|i| b.give(i, &g))
}

fn sub(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let g = b.gradient()?;
    b.give(0, &g)?;
    if b.needs(1) {
        let negative = b.tape.unary("Neg", &g);
        b.give(1, &negative)?;
    }
    Ok(())
}

fn mul(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, factors) = (b.gradient()?, [b.input(0)?, b.input(1)?]);
    for i in [0, 1] {
        if b.needs(i) {
            let product = b.tape.mul(&g, &factors[1 - i]);
            b.give(i, &product)?;
        }
    }
    Ok(())
}

/// d(a/b) = g/b for a, −g·y/b for b.
fn div(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, divisor) = (b.gradient()?, b.input(1)?);
    let quotient = b.tape.div(&g, &divisor);
    b.give(0, &quotient)?;
    if b.needs(1) {
        let y = b.output(0)?;
        let product = b.tape.mul(&quotient, &y);
        let negative = b.tape.unary("Neg", &product);
        b.give(1, &negative)?;
    }
    Ok(())
}

fn neg(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let g = b.gradient()?;
    let negative = b.tape.unary("Neg", &g);
    b.give(0, &negative)
}

/// Gives g·d, where d is the derivative, as `derivative` computes it from x and y.
fn chain(
    b: &mut Backward<'_>,
    derivative: impl FnOnce(&mut Backward<'_>, &Value, &Value) -> Value,
) -> Result<(), Unsupported> {
    let (g, x, y) = (b.gradient()?, b.input(0)?, b.output(0)?);
    let d = derivative(b, &x, &y);
    let product = b.tape.mul(&g, &d);
    b.give(0, &product)
}

fn exp(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    chain(b, |_, _, y| y.clone())
}

fn log(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, x) = (b.gradient()?, b.input(0)?);
    let quotient = b.tape.div(&g, &x);
    b.give(0, &quotient)
}

/// g / 2y
fn sqrt(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, y) = (b.gradient()?, b.output(0)?);
    let half = b.tape.scale(&g, 0.5);
    let quotient = b.tape.div(&half, &y);
    b.give(0, &quotient)
}

/// −g·y²
fn reciprocal(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    chain(b, |b, _, y| {
        let square = b.tape.mul(y, y);
        b.tape.unary("Neg", &square)
    })
}

/// g·2/√π·exp(−x²)
fn erf(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    chain(b, |b, x, _| {
        let square = b.tape.mul(x, x);
        let negative = b.tape.unary("Neg", &square);
        let bell = b.tape.unary("Exp", &negative);
        b.tape.scale(&bell, 2.0 / PI.sqrt())
    })
}

/// g·(Φ(x) + x·φ(x)) with the normal distribution Φ and its density φ. The approximation by tanh has no rule.
fn gelu(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    if b.text("approximate", "none") != "none" {
        return Err("only the exact form has a rule".to_owned());
    }
    let (g, x) = (b.gradient()?, b.input(0)?);
    let gradient = b.tape.emit_own("GeluGrad", &[&g, &x], vec![], x.shape.clone());
    b.give(0, &gradient)
}

/// g·s·(1 + αx·(1 − s)) with s = σ(αx).
fn quick_gelu(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, x, attributes) = (b.gradient()?, b.input(0)?, b.attributes());
    let gradient = b.tape.emit_own("QuickGeluGrad", &[&g, &x], attributes, x.shape.clone());
    b.give(0, &gradient)
}

/// g·y·(1 − y)
fn sigmoid(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    chain(b, |b, _, y| {
        let one = b.tape.scalar(1.0);
        let rest = b.tape.sub(&one, y);
        b.tape.mul(y, &rest)
    })
}

/// g·(1 − y²)
fn tanh(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    chain(b, |b, _, y| {
        let square = b.tape.mul(y, y);
        let one = b.tape.scalar(1.0);
        b.tape.sub(&one, &square)
    })
}

fn sin(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    chain(b, |b, x, _| b.tape.unary("Cos", x))
}

fn cos(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    chain(b, |b, x, _| {
        let sin = b.tape.unary("Sin", x);
        b.tape.unary("Neg", &sin)
    })
}

fn abs(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    chain(b, |b, x, _| b.tape.unary("Sign", x))
}

/// g where y > 0; 0 at 0, as in PyTorch.
fn relu(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, y) = (b.gradient()?, b.output(0)?);
    let zero = b.tape.scalar(0.0);
    let positive = b.tape.binary("Greater", &y, &zero);
    let masked = b.tape.select(&positive, &g, &zero);
    b.give(0, &masked)
}

/// g where min ≤ x ≤ max, bounds included, as in PyTorch.
fn clip(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (mut g, x) = (b.gradient()?, b.input(0)?);
    for (i, comparison) in [(1, "GreaterOrEqual"), (2, "LessOrEqual")] {
        if b.needs(i) {
            return Err("the bounds of `Clip` have no rule".to_owned());
        }
        if b.has_input(i) {
            let (bound, zero) = (b.input(i)?, b.tape.scalar(0.0));
            let inside = b.tape.binary(comparison, &x, &bound);
            g = b.tape.select(&inside, &g, &zero);
        }
    }
    b.give(0, &g)
}

/// g·p·x^(p−1)
fn pow(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    if b.needs(1) {
        return Err("the exponent of `Pow` has no rule".to_owned());
    }
    let (g, x, exponent) = (b.gradient()?, b.input(0)?, b.input(1)?);
    // The exponent may be an integer.
    let power = b.tape.emit(
        "Cast",
        &[&exponent],
        vec![super::super::tape::int_attribute("to", 1)],
        exponent.shape.clone(),
    );
    let one = b.tape.scalar(1.0);
    let less = b.tape.sub(&power, &one);
    let lowered = b.tape.binary("Pow", &x, &less);
    let slope = b.tape.mul(&lowered, &power);
    let product = b.tape.mul(&g, &slope);
    b.give(0, &product)
}

fn select(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, condition) = (b.gradient()?, b.input(0)?);
    let zero = b.tape.scalar(0.0);
    if b.needs(1) {
        let chosen = b.tape.select(&condition, &g, &zero);
        b.give(1, &chosen)?;
    }
    if b.needs(2) {
        let other = b.tape.select(&condition, &zero, &g);
        b.give(2, &other)?;
    }
    Ok(())
}
