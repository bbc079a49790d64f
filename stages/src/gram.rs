//! Inner products of task vectors, parameter by parameter, in one streaming pass over all of them at once.
//!
//! `G[s, t] = Σ_i τ_s[i]·τ_t[i]` in f64, with fixed chunks: the same bits for any number of threads and on any machine. With masks, the
//! entries that a mask keeps and the others are counted apart.

use crate::{StageError, checkpoint};
use merganser_tensors::kernels::gram::{GramScratch, add_chunk, mirror};
use merganser_tensors::source::check_finite;
use merganser_tensors::stream::over_blocks;
use merganser_tensors::{Error, Scratch, TensorSource};
use std::ops::Range;
use std::sync::Arc;

/// The inner products of one parameter's task vectors.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ParameterGram {
    /// Of the entries that the mask keeps; row-major, one row per task.
    pub signal: Vec<f64>,
    /// Of the others; zero without a mask.
    pub noise: Vec<f64>,
    pub n_signal: usize,
    pub n_noise: usize,
}

/// A parameter: where it lies in each task vector, and in the masks if these have it.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub vectors: Vec<usize>,
    pub mask: Option<usize>,
    pub n_elements: usize,
}

/// Task vectors, with their names for messages.
pub(crate) struct TaskVectors {
    pub names: Vec<String>,
    pub sources: Vec<Arc<dyn TensorSource>>,
    pub masks: Option<Arc<dyn TensorSource>>,
}

#[derive(Default)]
struct Memory {
    rows: Vec<Vec<f32>>,
    mask: Vec<f32>,
    masked: Vec<Vec<f32>>,
    gram: GramScratch,
}

impl TaskVectors {
    /// The inner products of every parameter; values that are not finite are refused, by task, tensor and element.
    pub(crate) fn grams(&self, places: &[Place]) -> Result<Vec<ParameterGram>, StageError> {
        let n = self.sources.len();
        let sizes: Vec<usize> = places.iter().map(|place| place.n_elements).collect();
        let blocks = over_blocks(&sizes, |index, range, scratch, memory: &mut Memory| {
            self.block(&places[index], range, scratch, memory)
        });
        let blocks = blocks.map_err(|error| self.name_the_culprit(error))?;
        Ok(blocks
            .into_iter()
            .map(|blocks| {
                let mut total = ParameterGram::empty(n);
                for block in blocks {
                    total.add(&block);
                }
                mirror(&mut total.signal, n);
                mirror(&mut total.noise, n);
                total
            })
            .collect())
    }

    /// Lower triangles of one block.
    fn block(
        &self,
        place: &Place,
        range: Range<usize>,
        scratch: &mut Scratch,
        memory: &mut Memory,
    ) -> merganser_tensors::Result<ParameterGram> {
        let n = self.sources.len();
        let Memory { rows, mask, masked, gram } = memory;
        rows.resize_with(n, Vec::new);
        for ((row, source), &tensor) in rows.iter_mut().zip(&self.sources).zip(&place.vectors) {
            row.resize(range.len(), 0.0);
            source.read_f32(tensor, range.clone(), row, scratch)?;
        }
        let mut found = ParameterGram::empty(n);
        if let (Some(masks), Some(tensor)) = (&self.masks, place.mask) {
            mask.resize(range.len(), 0.0);
            masks.read_f32(tensor, range.clone(), mask, scratch)?;
            found.n_signal = mask.iter().filter(|kept| **kept != 0.0).count();
            found.n_noise = range.len() - found.n_signal;
            masked.resize_with(n, Vec::new);
            for (signal, total) in [(true, &mut found.signal), (false, &mut found.noise)] {
                for (masked, row) in masked.iter_mut().zip(&*rows) {
                    masked.clear();
                    masked.extend(
                        row.iter()
                            .zip(&*mask)
                            .map(|(x, kept)| if (*kept != 0.0) == signal { *x } else { 0.0 }),
                    );
                }
                add_chunk(&slices(masked), total, gram);
            }
        } else {
            found.n_signal = range.len();
            add_chunk(&slices(rows), &mut found.signal, gram);
        }
        // A value that is not finite makes a square on the diagonal that is not: only then is it searched for.
        for (task, row) in rows.iter().enumerate() {
            let squares = [found.signal[task * n + task], found.noise[task * n + task]];
            if squares.iter().any(|square| !square.is_finite()) {
                check_finite(&self.sources[task].tensors()[place.vectors[task]].name, range.start, row)?;
            }
        }
        Ok(found)
    }

    /// Says which task vector holds the value that is not finite.
    fn name_the_culprit(&self, error: Error) -> StageError {
        let Error::NotFinite { tensor, element, .. } = &error else { return error.into() };
        for (name, source) in self.names.iter().zip(&self.sources) {
            if let Some(value) = checkpoint::not_finite(&**source, tensor, *element) {
                return StageError::input(format!(
                    "tensor `{tensor}` of task vector `{name}` is not finite: element {element} is {value}"
                ));
            }
        }
        error.into()
    }
}

impl ParameterGram {
    fn empty(n: usize) -> Self {
        Self { signal: vec![0.0; n * n], noise: vec![0.0; n * n], n_signal: 0, n_noise: 0 }
    }

    fn add(&mut self, other: &Self) {
        let add = |sum: &mut [f64], more: &[f64]| sum.iter_mut().zip(more).for_each(|(sum, x)| *sum += x);
        add(&mut self.signal, &other.signal);
        add(&mut self.noise, &other.noise);
        self.n_signal += other.n_signal;
        self.n_noise += other.n_noise;
    }
}

/// `aᵀ·G·b`.
pub(crate) fn form(gram: &[f64], a: &[f64], b: &[f64]) -> f64 {
    let n = a.len();
    (0..n).map(|s| a[s] * (0..n).map(|t| gram[s * n + t] * b[t]).sum::<f64>()).sum()
}

fn slices(rows: &[Vec<f32>]) -> Vec<&[f32]> {
    rows.iter().map(Vec::as_slice).collect()
}
