//! Constants put together from rows of checkpoint tensors: slices, and concatenations along the first axis.
//!
//! SAM 2's decoder is exported with its output tokens concatenated and with single rows of the point
//! embedding. A constant is bound when every row is found, and only if nothing about it is ambiguous.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use rayon::prelude::*;

use super::RowRun;
use super::digests::{Origin, rounding};
use crate::graph::GraphTensor;
use crate::tensor::{FloatType, Weights, WeightsError, transpose};

/// Row contents of the origin, for the row lengths that open constants have.
pub(super) struct RowIndex {
    rows: HashMap<(FloatType, blake3::Hash), Vec<(usize, usize)>>,
}

/// What the rows of a constant are.
pub(super) enum Found {
    /// the runs, and tensors equal to the only source
    Runs {
        runs: Vec<RowRun>,
        transposed: bool,
        merged: Vec<String>,
    },
    /// all rows are known, but not from which of several tensors
    Ambiguous {
        tensors: Vec<String>,
    },
    Nothing,
}

impl RowIndex {
    pub(super) fn build(
        open: &[&GraphTensor],
        origin: &Origin,
        weights: &dyn Weights,
    ) -> Result<Self, WeightsError> {
        let mut wanted: BTreeMap<usize, BTreeSet<FloatType>> = BTreeMap::new();
        for tensor in open {
            for length in row_lengths(tensor) {
                wanted.entry(length).or_default().insert(rounding(tensor.element));
            }
        }
        let found = origin
            .tensors
            .par_iter()
            .enumerate()
            .map(|(idx, tensor)| {
                let length = tensor.shape.last().copied().unwrap_or(1);
                let Some(roundings) =
                    wanted.get(&length).filter(|_| length > 1 && !tensor.shape.contains(&0))
                else {
                    return Ok(Vec::new());
                };
                let values = weights.values(&tensor.name)?;
                let mut found = Vec::new();
                for &rounding in roundings {
                    let mut rounded = values.clone();
                    rounding.round(&mut rounded);
                    for (row, values) in rounded.chunks_exact(length).enumerate() {
                        found.push(((rounding, crate::tensor::digest(values)), (idx, row)));
                    }
                }
                Ok(found)
            })
            .collect::<Result<Vec<_>, WeightsError>>()?;
        let mut rows: HashMap<_, Vec<_>> = HashMap::new();
        for (key, place) in found.into_iter().flatten() {
            rows.entry(key).or_default().push(place);
        }
        Ok(Self { rows })
    }

    pub(super) fn look_up(&self, tensor: &GraphTensor, origin: &Origin) -> Found {
        let values = tensor.values();
        let last = tensor.shape.last().copied().unwrap_or(1);
        match self.runs(&values, last, tensor.element, origin) {
            Found::Nothing => {}
            found => return found,
        }
        let [rows, columns] = tensor.shape[..] else { return Found::Nothing };
        match self.runs(&transpose(&values, rows, columns), rows, tensor.element, origin) {
            Found::Runs { runs, merged, .. } => Found::Runs { runs, transposed: true, merged },
            found => found,
        }
    }

    fn runs(&self, values: &[f32], length: usize, element: FloatType, origin: &Origin) -> Found {
        if length < 2 {
            return Found::Nothing;
        }
        let mut picked: Vec<(usize, usize)> = Vec::new();
        let mut all = Vec::new();
        for row in values.chunks_exact(length) {
            let Some(places) = self.rows.get(&(rounding(element), crate::tensor::digest(row))) else {
                return Found::Nothing;
            };
            let next = picked.last().map(|&(tensor, row)| (tensor, row + 1));
            picked.push(next.filter(|n| places.contains(n)).unwrap_or(places[0]));
            all.push(places);
        }
        let sources: BTreeSet<usize> = picked.iter().map(|&(tensor, _)| tensor).collect();
        let others: BTreeSet<usize> =
            all.iter().flat_map(|p| p.iter().map(|&(t, _)| t)).filter(|t| !sources.contains(t)).collect();
        let tied = |source: usize| others.iter().all(|&other| origin.equal(source, other, element));
        let repeated =
            all.iter().zip(&picked).any(|(places, p)| places.iter().any(|q| q.0 == p.0 && q.1 != p.1));
        let crossed = sources.len() > 1 && all.iter().any(|places| places.len() > 1);
        let first = *sources.first().expect("a constant has at least one row");
        if repeated || crossed || !tied(first) {
            let tensors = sources.union(&others).map(|&t| origin.tensors[t].name.clone()).collect();
            return Found::Ambiguous { tensors };
        }
        let mut runs: Vec<RowRun> = Vec::new();
        for (tensor, row) in picked {
            let name = &origin.tensors[tensor].name;
            match runs.last_mut() {
                Some(run) if run.tensor == *name && run.first_row + run.n_rows == row => run.n_rows += 1,
                _ => runs.push(RowRun { tensor: name.clone(), first_row: row, n_rows: 1 }),
            }
        }
        let merged = others.into_iter().map(|t| origin.tensors[t].name.clone()).collect();
        Found::Runs { runs, transposed: false, merged }
    }
}

fn row_lengths(tensor: &GraphTensor) -> Vec<usize> {
    match tensor.shape[..] {
        [rows, columns] => vec![rows, columns],
        _ => tensor.shape.last().copied().into_iter().collect(),
    }
}
