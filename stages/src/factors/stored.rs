//! Directions that are stored: computing their entries from the task vectors, and adding them up.

use super::{Factors, MaskIndex, Region};
use merganser_tensors::{Result, Scratch, TensorSource};
use std::ops::Range;
use std::sync::Arc;

/// Rows that are computed, or read, at once.
const ROWS: usize = 8192;

/// The directions of one region of one parameter as columns, computed from the task vectors.
pub(crate) struct Columns<'a> {
    pub sources: &'a [Arc<dyn TensorSource>],
    /// Position of the parameter in each of them.
    pub tensors: &'a [usize],
    pub masks: Option<(&'a dyn TensorSource, usize)>,
    pub index: &'a MaskIndex,
    pub region: Region,
    pub factors: &'a Factors,
}

impl Columns<'_> {
    /// Writes elements `range` of the D × (R + 1) matrix, row-major.
    pub(crate) fn read(&self, range: Range<usize>, out: &mut [f32], scratch: &mut Scratch) -> Result<()> {
        let width = self.factors.sigma.len();
        let (first, last) = (range.start / width, range.end.div_ceil(width));
        let mut rows = Vec::new();
        for start in (first..last).step_by(ROWS) {
            let entries = start..last.min(start + ROWS);
            rows.resize(entries.len() * width, 0.0);
            self.rows(&entries, &mut rows, scratch)?;
            let low = (entries.start * width).max(range.start);
            let high = (entries.end * width).min(range.end);
            out[low - range.start..high - range.start]
                .copy_from_slice(&rows[low - entries.start * width..high - entries.start * width]);
        }
        Ok(())
    }

    /// Whole rows.
    fn rows(&self, entries: &Range<usize>, out: &mut [f32], scratch: &mut Scratch) -> Result<()> {
        let (elements, skip) = self.index.elements_of(self.region, entries);
        let mut kept = Vec::new();
        if let Some((masks, tensor)) = self.masks {
            let mut mask = vec![0.0; elements.len()];
            masks.read_f32(tensor, elements.clone(), &mut mask, scratch)?;
            let signal = self.region == Region::Signal;
            let inside = mask.iter().enumerate().filter(|(_, kept)| (**kept != 0.0) == signal);
            kept = inside.map(|(place, _)| place).skip(skip).take(entries.len()).collect();
        }
        let mut vectors = vec![0f32; self.sources.len() * entries.len()];
        let mut values = vec![0f32; if self.masks.is_some() { elements.len() } else { 0 }];
        let places = self.sources.iter().zip(self.tensors);
        for ((source, tensor), vector) in places.zip(vectors.chunks_exact_mut(entries.len().max(1))) {
            if self.masks.is_some() {
                source.read_f32(*tensor, elements.clone(), &mut values, scratch)?;
                vector.iter_mut().zip(&kept).for_each(|(x, place)| *x = values[*place]);
            } else {
                source.read_f32(*tensor, elements.clone(), vector, scratch)?;
            }
        }
        let scale = self.factors.storage_scale();
        let weights: Vec<f32> = self.factors.directions.iter().map(|w| (w * scale) as f32).collect();
        combine(&weights, &vectors, self.sources.len(), out);
        Ok(())
    }
}

/// Rows that are combined at once: what the compiler keeps in registers.
const LANES: usize = 16;

/// `out[row, i] = Σ_t weights[i, t] · vectors[t, row]` in f32, in the order of the tasks: all directions of a row while its entries are
/// at hand. What the sum loses to cancellation is of the order of the round-off of the task vectors, which are f32 themselves.
fn combine(weights: &[f32], vectors: &[f32], n_tasks: usize, out: &mut [f32]) {
    let (width, n_rows) = (weights.len() / n_tasks, vectors.len() / n_tasks);
    for first in (0..n_rows).step_by(LANES) {
        let n_lanes = LANES.min(n_rows - first);
        for (index, weights) in weights.chunks_exact(n_tasks).enumerate() {
            let mut sums = [0f32; LANES];
            for (weight, vector) in weights.iter().zip(vectors.chunks_exact(n_rows)) {
                let vector = &vector[first..first + n_lanes];
                // A length that is known makes vector instructions; the arithmetic is the same.
                if let Ok(vector) = <&[f32; LANES]>::try_from(vector) {
                    sums.iter_mut().zip(vector).for_each(|(sum, x)| *sum += weight * x);
                } else {
                    sums.iter_mut().zip(vector).for_each(|(sum, x)| *sum += weight * x);
                }
            }
            let rows = out[first * width..].chunks_exact_mut(width);
            rows.zip(&sums[..n_lanes]).for_each(|(row, sum)| row[index] = *sum);
        }
    }
}

/// A sum of stored directions, Σ_r factor_r · column_r.
pub(crate) struct Combination<'a> {
    pub basis: &'a dyn TensorSource,
    /// Position of the D × (R + 1) matrix.
    pub tensor: usize,
    /// One per column, the storage scale taken out.
    pub factors: &'a [f32],
}

impl Combination<'_> {
    /// Hands the sum for some entries to `work`, part by part, with the position of its first.
    pub(crate) fn entries(
        &self,
        entries: Range<usize>,
        scratch: &mut Scratch,
        work: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let width = self.factors.len();
        let (mut rows, mut sums) = (Vec::new(), Vec::new());
        for start in entries.clone().step_by(ROWS) {
            let part = start..entries.end.min(start + ROWS);
            rows.resize(part.len() * width, 0.0);
            self.basis.read_f32(self.tensor, part.start * width..part.end * width, &mut rows, scratch)?;
            sums.clear();
            sums.extend(rows.chunks_exact(width).map(|row| {
                row.iter().zip(self.factors).fold(0.0f32, |sum, (value, factor)| sum + value * factor)
            }));
            work(start, &sums);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn combinations_are_the_sums_of_the_definition(
            (n_tasks, width, n_rows) in (1usize..6, 1usize..8, 0usize..70),
            numbers in prop::collection::vec(-2f32..2.0, 500),
        ) {
            let (weights, vectors) = (&numbers[..width * n_tasks], &numbers[40..40 + n_tasks * n_rows]);
            let mut out = vec![f32::NAN; n_rows * width];
            combine(weights, vectors, n_tasks, &mut out);
            for (row, found) in out.chunks_exact(width).enumerate() {
                for (index, found) in found.iter().enumerate() {
                    let term = |t: usize| {
                        f64::from(weights[index * n_tasks + t]) * f64::from(vectors[t * n_rows + row])
                    };
                    let exact: f64 = (0..n_tasks).map(term).sum();
                    prop_assert!((f64::from(*found) - exact).abs() < 1e-5);
                }
            }
        }
    }
}
