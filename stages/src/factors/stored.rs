//! Directions that are stored: computing their entries from the task vectors, and adding them up.

use super::{Factors, MaskIndex, Region};
use merganser_tensors::kernels::linear::combine;
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
