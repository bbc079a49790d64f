//! What a layer normalization does to a gradient.

use super::math::{self, LANES};
use super::sum::add_up;
use super::{Inputs, Op, PART, boxed, each, expect};
use crate::simd::{Loop, vectorized};

/// From g, x, scale, mean and 1/std: the gradients of x, scale and bias, of which the last two need not be asked for.
///
/// With x̂ = (x − mean)/std and h = g·scale: (h − mean(h) − x̂·mean(h·x̂))/std, Σ g·x̂, Σ g.
pub(super) static GRAD: Op = Op {
    name: "LayerNormalizationGrad",
    inputs: 5,
    optional_inputs: 0,
    outputs: 3,
    kernel: |_, _| {
        boxed(|context| {
            let inputs = Inputs::new(context)?;
            let ((_, g), (shape, x), (scale_shape, scale)) = (inputs.get(0)?, inputs.get(1)?, inputs.get(2)?);
            let ((_, mean), (_, inverse)) = (inputs.get(3)?, inputs.get(4)?);
            let n = scale.len();
            expect(n > 0 && g.len() == x.len(), "the gradient has another shape than what is normalized")?;
            expect(
                mean.len() * n == x.len() && inverse.len() == mean.len(),
                "there is not one mean and one deviation per row",
            )?;
            let Some(mut output) = context.output(0, shape.clone())? else { return Ok(()) };
            let (_, d) = output.try_extract_tensor_mut::<f32>()?;
            let mut of_scale = context.output(1, scale_shape.clone())?;
            let mut of_bias = context.output(2, scale_shape.clone())?;
            let rows = (PART / n).max(1);
            let n_parts = mean.len().div_ceil(rows);
            // Sums for scale and bias, one of each per part.
            let mut sums = vec![0.0; n_parts * 2 * n];
            let parts = d.chunks_mut(rows * n).zip(sums.chunks_mut(2 * n)).enumerate();
            each(context, parts.collect(), |(i, (d, sums))| {
                let (from, rows) = (i * rows, d.len() / n);
                let range = from * n..(from + rows) * n;
                let (of_scale, of_bias) = sums.split_at_mut(n);
                vectorized(Rows {
                    g: &g[range.clone()],
                    x: &x[range],
                    scale,
                    mean: &mean[from..from + rows],
                    inverse: &inverse[from..from + rows],
                    d,
                    of_scale,
                    of_bias,
                });
            })?;
            if let Some(output) = &mut of_scale {
                add_up(sums.chunks(2 * n).map(|part| &part[..n]), output.try_extract_tensor_mut()?.1);
            }
            if let Some(output) = &mut of_bias {
                add_up(sums.chunks(2 * n).map(|part| &part[n..]), output.try_extract_tensor_mut()?.1);
            }
            Ok(())
        })
    },
};

struct Rows<'a> {
    g: &'a [f32],
    x: &'a [f32],
    scale: &'a [f32],
    mean: &'a [f32],
    inverse: &'a [f32],
    d: &'a mut [f32],
    of_scale: &'a mut [f32],
    of_bias: &'a mut [f32],
}

impl Loop for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let n = self.scale.len();
        let rows = self.g.chunks_exact(n).zip(self.x.chunks_exact(n)).zip(self.d.chunks_exact_mut(n));
        for (((g, x), d), (&mean, &inverse)) in rows.zip(self.mean.iter().zip(self.inverse)) {
            let [sum, along] = sums(g, x, self.scale, mean, inverse, self.of_scale, self.of_bias);
            let (mean_h, mean_along) = (sum / n as f32, along / n as f32);
            for (((&g, &x), &scale), d) in g.iter().zip(x).zip(self.scale).zip(d) {
                let normalized = (x - mean) * inverse;
                *d = (-normalized).mul_add(mean_along, g.mul_add(scale, -mean_h)) * inverse;
            }
        }
    }
}

/// Returns Σ h and Σ h·x̂ of a row, and adds the row to the sums for scale and bias.
#[inline(always)]
fn sums(
    g: &[f32],
    x: &[f32],
    scale: &[f32],
    mean: f32,
    inverse: f32,
    of_scale: &mut [f32],
    of_bias: &mut [f32],
) -> [f32; 2] {
    let ((g, g_rest), (x, x_rest)) = (g.as_chunks::<LANES>(), x.as_chunks::<LANES>());
    let (scale, scale_rest) = scale.as_chunks::<LANES>();
    let (of_scale, of_scale_rest) = of_scale.as_chunks_mut::<LANES>();
    let (of_bias, of_bias_rest) = of_bias.as_chunks_mut::<LANES>();
    let mut lanes = [[0.0_f32; LANES]; 2];
    for ((g, x), (scale, (of_scale, of_bias))) in
        g.iter().zip(x).zip(scale.iter().zip(of_scale.iter_mut().zip(of_bias)))
    {
        for i in 0..LANES {
            let normalized = (x[i] - mean) * inverse;
            let h = g[i] * scale[i];
            lanes[0][i] += h;
            lanes[1][i] = h.mul_add(normalized, lanes[1][i]);
            of_scale[i] = g[i].mul_add(normalized, of_scale[i]);
            of_bias[i] += g[i];
        }
    }
    let mut sums = lanes.map(math::sum_lanes);
    for ((&g, &x), (&scale, (of_scale, of_bias))) in
        g_rest.iter().zip(x_rest).zip(scale_rest.iter().zip(of_scale_rest.iter_mut().zip(of_bias_rest)))
    {
        let normalized = (x - mean) * inverse;
        let h = g * scale;
        sums[0] += h;
        sums[1] = h.mul_add(normalized, sums[1]);
        *of_scale = g.mul_add(normalized, *of_scale);
        *of_bias += g;
    }
    sums
}
