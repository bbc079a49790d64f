//! Finding equal content: digests of every tensor of the origin and of the graph.
//!
//! A digest covers the widened values and not the shape, so one look-up finds a tensor in any shape. A matrix
//! that is not found is looked up once more transposed. Each tensor of the checkpoint is read and hashed once,
//! each constant of the graph at most twice: the work is linear in the bytes of both.

use std::collections::{BTreeSet, HashMap};

use rayon::prelude::*;

use crate::graph::{Graph, GraphTensor};
use crate::tensor::{FloatType, Weights, WeightsError, digest, transpose};

/// A float tensor of the checkpoint that the graph was exported from.
pub(super) struct OriginTensor {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    /// the value if there is only one
    pub(super) scalar: Option<f32>,
    /// all values are equal
    pub(super) uniform: bool,
    /// per rounding of the graph's element types
    digests: Vec<(FloatType, blake3::Hash)>,
}

pub(super) struct Origin {
    /// sorted by name
    pub(super) tensors: Vec<OriginTensor>,
    by_digest: HashMap<(FloatType, blake3::Hash), Vec<usize>>,
}

/// Checkpoint tensors with the content of one constant.
pub(super) struct ContentMatch {
    pub(super) digest: blake3::Hash,
    pub(super) rounding: FloatType,
    pub(super) transposed: bool,
}

impl Origin {
    pub(super) fn read(graph: &Graph, weights: &dyn Weights) -> Result<Self, WeightsError> {
        let roundings: BTreeSet<FloatType> =
            graph.float_tensors().iter().map(|t| rounding(t.element)).collect();
        let mut names = weights.names();
        names.sort_unstable();
        names.dedup();
        let tensors = names
            .into_par_iter()
            .map(|name| OriginTensor::read(name, weights, &roundings))
            .collect::<Result<Vec<_>, _>>()?;
        let mut by_digest: HashMap<_, Vec<usize>> = HashMap::new();
        for (idx, tensor) in tensors.iter().enumerate().filter(|(_, t)| t.scalar.is_none()) {
            for &key in &tensor.digests {
                by_digest.entry(key).or_default().push(idx);
            }
        }
        Ok(Self { tensors, by_digest })
    }

    pub(super) fn candidates(&self, found: &ContentMatch) -> &[usize] {
        self.by_digest.get(&(found.rounding, found.digest)).map_or(&[], Vec::as_slice)
    }

    pub(super) fn index(&self, name: &str) -> Option<usize> {
        self.tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok()
    }

    /// Returns whether two tensors hold the same values once rounded to a graph's element type.
    pub(super) fn equal(&self, a: usize, b: usize, element: FloatType) -> bool {
        let digest = |idx: usize| self.tensors[idx].digests.iter().find(|(r, _)| *r == rounding(element));
        digest(a).is_some() && digest(a) == digest(b)
    }

    /// Looks a constant up by content, as it is and transposed. Single values are too common to tell anything.
    pub(super) fn look_up(&self, tensor: &GraphTensor) -> Option<ContentMatch> {
        if tensor.n_values() < 2 {
            return None;
        }
        let rounding = rounding(tensor.element);
        let values = tensor.values();
        let found = |digest, transposed| {
            let found = ContentMatch { digest, rounding, transposed };
            (!self.candidates(&found).is_empty()).then_some(found)
        };
        found(digest(&values), false).or_else(|| match tensor.shape[..] {
            [rows, columns] if rows > 1 && columns > 1 => {
                found(digest(&transpose(&values, rows, columns)), true)
            }
            _ => None,
        })
    }
}

impl OriginTensor {
    fn read(
        name: String,
        weights: &dyn Weights,
        roundings: &BTreeSet<FloatType>,
    ) -> Result<Self, WeightsError> {
        let missing = |reason: String| WeightsError { tensor: name.clone(), source: reason.into() };
        let shape =
            weights.shape(&name).ok_or_else(|| missing("it is listed but has no shape".to_owned()))?;
        let values = weights.values(&name)?;
        let n_expected: usize = shape.iter().product();
        if values.len() != n_expected {
            return Err(missing(format!("shape {shape:?} needs {n_expected} values, got {}", values.len())));
        }
        let digests = roundings
            .iter()
            .map(|&rounding| match rounding {
                FloatType::F16 | FloatType::Bf16 => {
                    let mut rounded = values.clone();
                    rounding.round(&mut rounded);
                    (rounding, digest(&rounded))
                }
                FloatType::F32 | FloatType::F64 => (rounding, digest(&values)),
            })
            .collect();
        let scalar = if let [value] = values[..] { Some(value) } else { None };
        let uniform = is_uniform(&values);
        Ok(Self { name, shape, scalar, uniform, digests })
    }
}

/// Returns whether all values have the same bits; true for none and one.
pub(super) fn is_uniform(values: &[f32]) -> bool {
    values.first().is_none_or(|first| values.iter().all(|v| v.to_bits() == first.to_bits()))
}

/// Returns the type to which the origin is rounded for a comparison: `f64` constants are compared as `f32`.
pub(super) fn rounding(element: FloatType) -> FloatType {
    if element == FloatType::F64 { FloatType::F32 } else { element }
}
