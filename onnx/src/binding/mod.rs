//! Which checkpoint tensor every float constant of a graph comes from.
//!
//! Exporters rename, transpose, reshape, merge, slice and concatenate weights, so names alone do not tell. The
//! *origin* is the checkpoint that the graph was exported from: its tensors are found in the graph by content.
//! A [`Binding`] records the result for any number of other checkpoints with the same tensor names.
//!
//! INVARIANT: a binding never guesses silently. What could not be traced is listed, and
//! [`Binding::check`] refuses a model in which a tensor that may be inside it differs from the origin.

mod check;
mod computed;
mod constants;
mod digests;
mod names;
mod resolve;
mod rows;
mod search;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use self::check::Refusal;
use crate::error::GraphError;
use crate::graph::{Graph, Place};
use crate::tensor::{FloatType, Weights};

/// How the tensors of one graph come from the tensors of one checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Binding {
    /// [`Graph::digest`] of the graph that this binding belongs to
    pub graph_digest: blake3::Hash,
    /// in the order of the graph file; an `Identity` that was split follows its initializer
    pub tensors: Vec<BoundTensor>,
    /// every other float constant, and why it may stay as it is (or not)
    pub constants: Vec<Constant>,
    /// checkpoint tensors found nowhere in the graph, sorted
    pub unused: Vec<String>,
    /// shapes of all checkpoint tensors that `tensors` or `constants` refer to, as in the origin
    pub origin_shapes: BTreeMap<String, Vec<usize>>,
}

/// A constant of the graph that is replaced by a model's values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BoundTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub element: FloatType,
    pub place: Place,
    pub source: Source,
    /// Other checkpoint tensors that equal the source in the origin and may have been merged into this constant:
    /// they have to be equal in every model.
    pub merged: Vec<String>,
}

/// What a constant is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    Tensor {
        name: String,
        how: How,
    },
    /// Slices and concatenations along the first axis: runs of rows, one after the other.
    Rows {
        runs: Vec<RowRun>,
        transposed: bool,
    },
}

/// How a constant differs from the checkpoint tensor that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    SameBytes,
    /// same bytes in another shape
    Reshaped,
    /// a matrix stored the other way round
    Transposed,
    /// the exponential of a scalar (`logit_scale`)
    Exp,
}

/// Consecutive rows of a checkpoint tensor seen as a matrix of the constant's row length.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowRun {
    pub tensor: String,
    pub first_row: usize,
    pub n_rows: usize,
}

/// A float constant that stays as it is in the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Constant {
    pub name: String,
    pub shape: Vec<usize>,
    pub kind: ConstantKind,
    /// Checkpoint tensors that it was, or may have been, computed from. They must not differ from the origin.
    pub sources: Vec<String>,
}

/// What a constant that is not bound was recognized as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConstantKind {
    /// at most four values (a scale, an epsilon, the factors of a `Resize`)
    Small,
    /// 0 above or below the diagonal, a large negative number elsewhere
    CausalMask,
    /// a linear function of the position along one axis
    CoordinateGrid,
    /// one value everywhere
    Uniform,
    /// computed from checkpoint tensors that were recognized
    Computed,
    /// of unknown origin: any checkpoint tensor in `sources` may be inside
    Unexplained,
    /// quantized or sparse weights, which cannot be compared
    Opaque,
    /// has the name of a checkpoint tensor, but other values
    Different,
}

impl Binding {
    /// Finds the tensors of `origin`, the checkpoint that the graph was exported from, in the graph.
    pub fn find(graph: &Graph, origin: &dyn Weights) -> Result<Self, GraphError> {
        search::find(graph, origin)
    }

    /// Returns the share of the graph's float values (scalars and masks aside) that a model replaces.
    pub fn coverage(&self) -> f64 {
        let count = |shape: &[usize]| shape.iter().product::<usize>() as f64;
        let bound: f64 =
            self.tensors.iter().filter(|t| t.place != Place::Identity).map(|t| count(&t.shape)).sum();
        let open: f64 = self.constants.iter().filter(|c| c.is_open()).map(|c| count(&c.shape)).sum();
        if bound + open == 0.0 { 0.0 } else { bound / (bound + open) }
    }

    /// Returns the checkpoint tensors that the graph depends on and that cannot be injected: a model must have
    /// them as the origin has them. Sorted.
    pub fn fixed_tensors(&self) -> Vec<&str> {
        let mut fixed: Vec<&str> =
            self.constants.iter().flat_map(|c| c.sources.iter().map(String::as_str)).collect();
        fixed.sort_unstable();
        fixed.dedup();
        fixed
    }
}

impl Constant {
    /// Returns whether the values may come from a checkpoint.
    pub fn is_open(&self) -> bool {
        use ConstantKind::{Computed, Different, Opaque, Unexplained};
        matches!(self.kind, Computed | Different | Opaque | Unexplained)
    }
}

impl Source {
    /// Returns the checkpoint tensors that the values are taken from, without duplicates.
    pub fn tensors(&self) -> Vec<&str> {
        match self {
            Self::Tensor { name, .. } => vec![name],
            Self::Rows { runs, .. } => {
                let mut names: Vec<&str> = runs.iter().map(|r| r.tensor.as_str()).collect();
                names.sort_unstable();
                names.dedup();
                names
            }
        }
    }
}

impl std::fmt::Display for How {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::SameBytes => "same bytes",
            Self::Reshaped => "same bytes, reshaped",
            Self::Transposed => "transposed",
            Self::Exp => "exp",
        })
    }
}
