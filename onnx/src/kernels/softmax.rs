//! What a softmax over the last axis does to a gradient.

use super::math::{self, LANES};
use super::{Inputs, Op, PART, boxed, each, expect};
use crate::simd::{Loop, vectorized};

/// From g and y: y·(g − Σ g·y), with the sum over the last axis.
pub(super) static GRAD: Op = Op {
    name: "SoftmaxGrad",
    inputs: 2,
    optional_inputs: 0,
    outputs: 1,
    kernel: |_, _| {
        boxed(|context| {
            let inputs = Inputs::new(context)?;
            let ((shape, g), (_, y)) = (inputs.get(0)?, inputs.get(1)?);
            expect(g.len() == y.len(), "the gradient has another shape than the softmax")?;
            let n = shape.last().map_or(1, |&n| n as usize);
            let Some(mut output) = context.output(0, shape.clone())? else { return Ok(()) };
            let (_, d) = output.try_extract_tensor_mut::<f32>()?;
            if d.is_empty() {
                return Ok(());
            }
            let part = n * (PART / n).max(1);
            let parts = d.chunks_mut(part).zip(g.chunks(part).zip(y.chunks(part)));
            each(context, parts.collect(), |(d, (g, y))| vectorized(SoftmaxGrad { g, y, d, n }))
        })
    },
};

/// Whole rows of `n` values.
struct SoftmaxGrad<'a> {
    g: &'a [f32],
    y: &'a [f32],
    d: &'a mut [f32],
    n: usize,
}

impl Loop for SoftmaxGrad<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let rows = self.g.chunks_exact(self.n).zip(self.y.chunks_exact(self.n));
        for ((g, y), d) in rows.zip(self.d.chunks_exact_mut(self.n)) {
            let sum = dot(g, y);
            for ((&g, &y), d) in g.iter().zip(y).zip(d) {
                *d = y * (g - sum);
            }
        }
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0_f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] = a[i].mul_add(b[i], sums[i]);
        }
    }
    let mut sum = math::sum_lanes(sums);
    for (a, b) in a_rest.iter().zip(b_rest) {
        sum = a.mul_add(*b, sum);
    }
    sum
}
