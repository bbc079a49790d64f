//! Convolutions, with and without overlap.
//!
//! Where windows do not overlap (patch embeddings, 1×1, upscaling by 2×2), a convolution is a matrix product of patches.
//! In general the gradient of the kernel is a convolution itself: of the input, with the gradient as kernel, batch and
//! channels exchanged, strides and dilations exchanged.

use super::super::backward::{Backward, Unsupported};
use super::super::tape::{Value, ints_attribute, signed};
use super::Rules;

pub(super) static RULES: Rules = &[("Conv", conv), ("ConvTranspose", conv_transpose)];

/// Windows of a convolution, per spatial axis.
struct Windows {
    kernel: Vec<usize>,
    strides: Vec<usize>,
    dilations: Vec<usize>,
    before: Vec<i64>,
    after: Vec<i64>,
}

impl Windows {
    fn new(b: &Backward<'_>, kernel: &[usize]) -> Result<Self, Unsupported> {
        if b.int("group", 1) != 1 {
            return Err("convolutions in groups have no rule".to_owned());
        }
        if !matches!(b.text("auto_pad", "NOTSET"), "NOTSET" | "VALID" | "") {
            return Err("padding that is not given in numbers has no rule".to_owned());
        }
        let n = kernel.len();
        let sizes = |name: &str| -> Result<Vec<usize>, Unsupported> {
            let Some(given) = b.ints(name) else { return Ok(vec![1; n]) };
            let sizes: Vec<usize> =
                given.iter().filter_map(|&v| usize::try_from(v).ok()).filter(|&v| v > 0).collect();
            if sizes.len() == n { Ok(sizes) } else { Err(format!("`{name}` is {given:?}")) }
        };
        let pads = b.ints("pads").map_or_else(|| vec![0; 2 * n], <[i64]>::to_vec);
        if pads.len() != 2 * n {
            return Err(format!("`pads` is {pads:?}"));
        }
        let (before, after) = (pads[..n].to_vec(), pads[n..].to_vec());
        Ok(Self {
            kernel: kernel.to_vec(),
            strides: sizes("strides")?,
            dilations: sizes("dilations")?,
            before,
            after,
        })
    }

    /// Returns whether windows lie side by side, from the first value on.
    fn are_patches(&self) -> bool {
        self.strides == self.kernel
            && self.dilations.iter().all(|&d| d == 1)
            && self.before.iter().chain(&self.after).all(|&p| p == 0)
    }

    /// Emits a convolution that moves as this one does (`exchanged`: strides as dilations).
    fn emit(&self, b: &mut Backward<'_>, x: &Value, kernel: &Value, exchanged: bool) -> Value {
        let (strides, dilations) =
            if exchanged { (&self.dilations, &self.strides) } else { (&self.strides, &self.dilations) };
        let mut shape = vec![x.shape[0], kernel.shape[0]];
        for i in 0..self.kernel.len() {
            let padded = x.shape[i + 2] as i64 + self.before[i] + self.after[i];
            let reach = (dilations[i] * (kernel.shape[i + 2] - 1) + 1) as i64;
            shape.push(((padded - reach) / strides[i] as i64 + 1).max(0) as usize);
        }
        let attributes = vec![
            ints_attribute("strides", &signed(strides)),
            ints_attribute("dilations", &signed(dilations)),
            ints_attribute("pads", &self.pads()),
        ];
        b.tape.emit("Conv", &[x, kernel], attributes, shape)
    }

    fn pads(&self) -> Vec<i64> {
        self.before.iter().chain(&self.after).copied().collect()
    }

    /// Returns the gradient of a kernel that was moved over `fine` to give `coarse`: [coarse channels, fine channels, …].
    fn kernel_gradient(&self, b: &mut Backward<'_>, fine: &Value, coarse: &Value) -> Value {
        let mut shape = vec![coarse.shape[1], fine.shape[1]];
        shape.extend(&self.kernel);
        if self.are_patches() {
            let rows = pixels(b, coarse);
            let patches = self.patches(b, fine, &coarse.shape[2..]);
            let product = b.tape.gemm((&rows, true), (&patches, false), 1.0);
            return b.tape.reshape(&product, &shape);
        }
        let (fine, coarse) = (exchange_batch(b, fine), exchange_batch(b, coarse));
        let all = self.emit(b, &fine, &coarse, true);
        // Values that no window reached make the result larger than the kernel.
        let axes: Vec<usize> = (2..all.rank()).collect();
        let cut = b.tape.slice(&all, &axes, &vec![0; self.kernel.len()], &self.kernel);
        exchange_batch(b, &cut)
    }

    /// Returns the patches of `x` [n, c, …] as rows of c · kernel values.
    fn patches(&self, b: &mut Backward<'_>, x: &Value, n_patches: &[usize]) -> Value {
        let rank = self.kernel.len();
        let axes: Vec<usize> = (2..2 + rank).collect();
        let ends: Vec<usize> = n_patches.iter().zip(&self.kernel).map(|(n, k)| n * k).collect();
        let covered = b.tape.slice(x, &axes, &vec![0; rank], &ends);
        let mut apart = vec![x.shape[0], x.shape[1]];
        apart.extend(n_patches.iter().zip(&self.kernel).flat_map(|(&n, &k)| [n, k]));
        let apart = b.tape.reshape(&covered, &apart);
        let order: Vec<usize> = [0]
            .into_iter()
            .chain((0..rank).map(|i| 2 + 2 * i))
            .chain([1])
            .chain((0..rank).map(|i| 3 + 2 * i))
            .collect();
        let apart = b.tape.transpose(&apart, &order);
        let rows = x.shape[0] * n_patches.iter().product::<usize>();
        let columns = x.shape[1] * self.kernel.iter().product::<usize>();
        b.tape.reshape(&apart, &[rows, columns])
    }
}

/// Returns [n, c, …] as one row of c values per place.
fn pixels(b: &mut Backward<'_>, x: &Value) -> Value {
    let order: Vec<usize> = [0].into_iter().chain(2..x.rank()).chain([1]).collect();
    let last = b.tape.transpose(x, &order);
    let channels = x.shape[1];
    let rows = x.shape[0] * x.shape[2..].iter().product::<usize>();
    b.tape.reshape(&last, &[rows, channels])
}

fn exchange_batch(b: &mut Backward<'_>, x: &Value) -> Value {
    let order: Vec<usize> = [1, 0].into_iter().chain(2..x.rank()).collect();
    b.tape.transpose(x, &order)
}

/// The bias is added at every place.
fn give_bias(b: &mut Backward<'_>, g: &Value) -> Result<(), Unsupported> {
    if !b.needs(2) {
        return Ok(());
    }
    let axes: Vec<usize> = (0..g.rank()).filter(|&axis| axis != 1).collect();
    let sum = b.tape.reduce_sum(g, &axes, false);
    b.give(2, &sum)
}

fn conv(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, x, w) = (b.gradient()?, b.input(0)?, b.input(1)?);
    let windows = Windows::new(b, w.shape.get(2..).unwrap_or_default())?;
    give_bias(b, &g)?;
    if b.needs(1) {
        let gradient = windows.kernel_gradient(b, &x, &g);
        b.give(1, &gradient)?;
    }
    if b.needs(0) {
        // What the windows do not reach at the end of the input has to be made up for.
        let missing = |i: usize| {
            let reached = (windows.strides[i] * (g.shape[i + 2] - 1)
                + windows.dilations[i] * (windows.kernel[i] - 1)
                + 1) as i64;
            x.shape[i + 2] as i64 + windows.before[i] + windows.after[i] - reached
        };
        let missing: Vec<i64> = (0..windows.kernel.len()).map(missing).collect();
        let attributes = vec![
            ints_attribute("strides", &signed(&windows.strides)),
            ints_attribute("dilations", &signed(&windows.dilations)),
            ints_attribute("pads", &windows.pads()),
            ints_attribute("output_padding", &missing),
        ];
        let gradient = b.tape.emit("ConvTranspose", &[&g, &w], attributes, x.shape.clone());
        b.give(0, &gradient)?;
    }
    Ok(())
}

/// The transpose of a convolution: its own gradient is that convolution.
fn conv_transpose(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, x, w) = (b.gradient()?, b.input(0)?, b.input(1)?);
    if b.has("output_shape") {
        return Err("a given output shape has no rule".to_owned());
    }
    let windows = Windows::new(b, w.shape.get(2..).unwrap_or_default())?;
    give_bias(b, &g)?;
    if b.needs(1) {
        let gradient = windows.kernel_gradient(b, &g, &x);
        b.give(1, &gradient)?;
    }
    if b.needs(0) {
        let gradient = windows.emit(b, &g, &w, false);
        let axes: Vec<usize> = (2..x.rank()).collect();
        let cut = b.tape.slice(&gradient, &axes, &vec![0; axes.len()], &x.shape[2..]);
        b.give(0, &cut)?;
    }
    Ok(())
}
