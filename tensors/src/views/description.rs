//! How a manifest describes the tensors of a view.

use serde::{Deserialize, Serialize};

/// A piece of a mapped tensor. The pieces lie one after the other in row-major order; the tensor's shape is given apart, so a
/// reshape is a single [`Part::Whole`] under another shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Part {
    /// All elements of a tensor.
    Whole { tensor: String },
    /// Positions `start..end` of a tensor's first axis.
    Rows { tensor: String, start: usize, end: usize },
    /// Columns `start..end` of a matrix, each of them as a row: rows of its transpose.
    Columns { tensor: String, start: usize, end: usize },
    /// Zeros: what a task vector that leaves something out says about it.
    Zeros { elements: usize },
}

impl Part {
    /// The tensor that it is taken from.
    pub fn tensor(&self) -> Option<&str> {
        match self {
            Self::Whole { tensor } | Self::Rows { tensor, .. } | Self::Columns { tensor, .. } => Some(tensor),
            Self::Zeros { .. } => None,
        }
    }
}

/// A product `scale · left · right` of two matrices, read from the tensors of those names. Axes after the first are
/// flattened: `left` is `m × r`, `right` is `r × n`, the tensor has `m·n` elements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LowRankTensor {
    pub left: String,
    pub right: String,
    /// Finite.
    pub scale: f64,
    /// Whether the transpose of the product is meant (`n × m`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub transposed: bool,
}
