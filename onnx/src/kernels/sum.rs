//! Sums over all axes but the last: gradients of biases.

use super::{Inputs, Op, PART, boxed, each};
use crate::simd::{Loop, vectorized};

/// The sum of all rows, where a row is what lies along the last axis.
pub(super) static COLUMNS: Op = Op {
    name: "ColumnSum",
    inputs: 1,
    optional_inputs: 0,
    outputs: 1,
    kernel: |_, _| {
        boxed(|context| {
            let inputs = Inputs::new(context)?;
            let (shape, x) = inputs.get(0)?;
            let n = shape.last().map_or(1, |&n| n as usize);
            let Some(mut output) = context.output(0, [n])? else { return Ok(()) };
            let (_, output) = output.try_extract_tensor_mut::<f32>()?;
            if n == 0 {
                return Ok(());
            }
            let part = n * (PART / n).max(1);
            let mut sums = vec![0.0; x.len().div_ceil(part) * n];
            let parts = x.chunks(part).zip(sums.chunks_mut(n)).collect();
            each(context, parts, |(rows, sums)| vectorized(Rows { rows, sums }))?;
            add_up(sums.chunks(n), output);
            Ok(())
        })
    },
};

struct Rows<'a> {
    rows: &'a [f32],
    sums: &'a mut [f32],
}

impl Loop for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        // Four rows at a time: the sums are read and written once for them.
        let n = self.sums.len();
        let mut rows = self.rows.chunks_exact(4 * n);
        for four in &mut rows {
            let (first, second) = four.split_at(2 * n);
            let ((a, b), (c, d)) = (first.split_at(n), second.split_at(n));
            for (sum, ((a, b), (c, d))) in self.sums.iter_mut().zip(a.iter().zip(b).zip(c.iter().zip(d))) {
                *sum += (a + b) + (c + d);
            }
        }
        for row in rows.remainder().chunks_exact(n) {
            self.sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
    }
}

/// Adds up what parts have summed, in their order.
pub(super) fn add_up<'a>(parts: impl Iterator<Item = &'a [f32]>, output: &mut [f32]) {
    output.fill(0.0);
    for part in parts {
        output.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
    }
}
