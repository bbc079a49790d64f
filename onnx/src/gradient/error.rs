//! What can go wrong when a graph is differentiated.

use crate::error::GraphError;
use crate::runtime::RuntimeError;

/// A graph that cannot be differentiated, or a question about it that has no answer.
#[derive(Debug, thiserror::Error)]
pub enum GradientError {
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("`{graph}` uses opset {actual}; gradients need {lowest} to {highest}")]
    Opset { graph: String, actual: i64, lowest: i64, highest: i64 },
    #[error("`{graph}` has no float input or weight `{variable}`")]
    UnknownVariable { graph: String, variable: String },
    #[error("`{graph}` has no float value `{value}` of known shape")]
    UnknownValue { graph: String, value: String },
    #[error("`{graph}` already has a value `{value}`")]
    ValueTaken { graph: String, value: String },
    #[error("{kind} `{tensor}` of `{graph}` has type {actual}; gradients are computed in f32 only")]
    ElementType { graph: String, kind: &'static str, tensor: String, actual: String },
    #[error("input `{input}` of `{graph}` is {expected}, so its shape cannot be {actual:?}")]
    InputShape { graph: String, input: String, expected: String, actual: Vec<usize> },
    #[error("input `{input}` of `{graph}` has free dimensions, and no shape is given for it")]
    FreeInput { graph: String, input: String },
    #[error(
        "weight `{weight}` of `{graph}` is more than the right factor of matrix products: node `{node}` ({op}) uses it too"
    )]
    NotAProduct { graph: String, weight: String, node: String, op: String },
    #[error("the loss has shape {actual:?}; it must be one number")]
    LossShape { actual: Vec<usize> },
    /// No rule, or none for this use of the op. `freeze`: the tensors whose gradients pass through the node.
    #[error(
        "no gradient passes through node `{node}` ({op}) of `{graph}`: {reason}; to go on, freeze {}",
        list(freeze)
    )]
    NoRule { graph: String, node: String, op: String, reason: String, freeze: Vec<String> },
    #[error("values of shapes {left:?} and {right:?} cannot be compared by {loss}")]
    LossOperands { loss: &'static str, left: Vec<usize>, right: Vec<usize> },
}

fn list(names: &[String]) -> String {
    const MOST: usize = 20;
    let mut text = names.iter().take(MOST).map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    if names.len() > MOST {
        text.push_str(&format!(" and {} more", names.len() - MOST));
    }
    text
}
