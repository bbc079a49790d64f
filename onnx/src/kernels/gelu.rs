//! GELU, exact and by a sigmoid, and what they do to a gradient.

use std::f32::consts::{FRAC_1_SQRT_2, PI, SQRT_2};

use super::math;
use super::{Op, boxed, elementwise};
use crate::simd::{Loop, vectorized};

/// y = x·Φ(x), with the normal distribution Φ.
pub(super) static GELU: Op = Op {
    name: "Gelu",
    inputs: 1,
    optional_inputs: 0,
    outputs: 1,
    kernel: |_, _| boxed(|context| elementwise(context, |[x], y| vectorized(Gelu { x, y }))),
};

/// From g and x: g·(Φ(x) + x·φ(x)), with the normal density φ.
pub(super) static GELU_GRAD: Op = Op {
    name: "GeluGrad",
    inputs: 2,
    optional_inputs: 0,
    outputs: 1,
    kernel: |_, _| boxed(|context| elementwise(context, |[g, x], d| vectorized(GeluGrad { g, x, d }))),
};

/// y = x·σ(αx), with the logistic function σ.
pub(super) static QUICK_GELU: Op = Op {
    name: "QuickGelu",
    inputs: 1,
    optional_inputs: 0,
    outputs: 1,
    kernel: |attributes, _| {
        let alpha = attributes.get("alpha").unwrap_or(1.0);
        boxed(move |context| elementwise(context, |[x], y| vectorized(QuickGelu { x, y, alpha })))
    },
};

/// From g and x: g·s·(1 + αx·(1 − s)), where s = σ(αx).
pub(super) static QUICK_GELU_GRAD: Op = Op {
    name: "QuickGeluGrad",
    inputs: 2,
    optional_inputs: 0,
    outputs: 1,
    kernel: |attributes, _| {
        let alpha = attributes.get("alpha").unwrap_or(1.0);
        boxed(move |context| elementwise(context, |[g, x], d| vectorized(QuickGeluGrad { g, x, d, alpha })))
    },
};

struct Gelu<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
}

struct GeluGrad<'a> {
    g: &'a [f32],
    x: &'a [f32],
    d: &'a mut [f32],
}

struct QuickGelu<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
    alpha: f32,
}

struct QuickGeluGrad<'a> {
    g: &'a [f32],
    x: &'a [f32],
    d: &'a mut [f32],
    alpha: f32,
}

impl Loop for Gelu<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (&x, y) in self.x.iter().zip(self.y) {
            *y = x * distribution(x);
        }
    }
}

impl Loop for GeluGrad<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let factor = 1.0 / (SQRT_2 * PI.sqrt());
        for ((&g, &x), d) in self.g.iter().zip(self.x).zip(self.d) {
            let density = math::exp(-0.5 * x * x) * factor;
            *d = g * x.mul_add(density, distribution(x));
        }
    }
}

impl Loop for QuickGelu<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (&x, y) in self.x.iter().zip(self.y) {
            *y = x * logistic(self.alpha * x);
        }
    }
}

impl Loop for QuickGeluGrad<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for ((&g, &x), d) in self.g.iter().zip(self.x).zip(self.d) {
            let s = logistic(self.alpha * x);
            *d = g * s * (self.alpha * x).mul_add(1.0 - s, 1.0);
        }
    }
}

/// The normal distribution.
#[inline(always)]
fn distribution(x: f32) -> f32 {
    0.5 + 0.5 * math::erf(x * FRAC_1_SQRT_2)
}

#[inline(always)]
fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + math::exp(-x))
}
