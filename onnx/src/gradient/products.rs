//! Products of a weight with activations, and what may be added to them: the branch of an adapter.

use super::error::GradientError;
use super::forward::Forward;
use super::tape::Value;
use crate::proto::NodeProto;

/// A place where a weight is multiplied with an activation: `output = input · W`, the weight taken as it is or transposed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Product {
    /// vectors lie along the last axis
    pub input: Value,
    pub output: Value,
    /// whether the rows of the weight are summed over, or its columns
    pub sums_rows: bool,
}

impl Forward {
    /// Finds all products of a weight.
    ///
    /// # Errors
    ///
    /// If the weight is used in another way too: then what is added to its products is not a change of the weight.
    pub fn products(&self, weight: &str) -> Result<Vec<Product>, GradientError> {
        let mut found = Vec::new();
        // Names under which the weight is known, and whether it is transposed there.
        let mut open = vec![(weight.to_owned(), false)];
        while let Some((name, turned)) = open.pop() {
            for node in self.tape.nodes.iter().filter(|node| node.input.contains(&name)) {
                let other = || GradientError::NotAProduct {
                    graph: self.graph.clone(),
                    weight: weight.to_owned(),
                    node: Some(node.name()).filter(|n| !n.is_empty()).unwrap_or(&node.output[0]).to_owned(),
                    op: node.op_type().to_owned(),
                };
                let is_right =
                    |node: &NodeProto| node.input.len() > 1 && node.input[1] == name && node.input[0] != name;
                let sums_rows = match node.op_type() {
                    "Identity" => {
                        open.push((node.output[0].clone(), turned));
                        continue;
                    }
                    "Transpose" if swaps(node) => {
                        open.push((node.output[0].clone(), !turned));
                        continue;
                    }
                    "MatMul" if is_right(node) => !turned,
                    "Gemm" if is_right(node) && is_plain(node) => (integer(node, "transB") == 0) != turned,
                    _ => return Err(other()),
                };
                let (input, output) = (self.value(&node.input[0])?, self.value(&node.output[0])?);
                found.push(Product { input, output, sums_rows });
            }
        }
        Ok(found)
    }

    /// Adds a value to the result of a product, for everything that uses it.
    ///
    /// # Panics
    ///
    /// If it has another shape.
    pub fn add_to(&mut self, product: &Product, addend: &Value) {
        let Product { output, .. } = product;
        assert_eq!(output.shape, addend.shape, "what is added to `{}`", output.name);
        let before = self.tape.fresh("Product");
        for node in &mut self.tape.nodes {
            node.output.iter_mut().filter(|o| **o == output.name).for_each(|o| o.clone_from(&before));
        }
        self.tape.shapes.insert(before.clone(), output.shape.clone());
        let inputs = vec![before, addend.name.clone()];
        self.tape.nodes.push(super::tape::node("Add", inputs, vec![output.name.clone()], vec![]));
    }
}

/// Whether a `Transpose` swaps the axes of a matrix.
fn swaps(node: &NodeProto) -> bool {
    node.attribute.iter().find(|a| a.name.as_deref() == Some("perm")).is_none_or(|a| a.ints == [1, 0])
}

/// Whether a `Gemm` computes `x · W`, and no multiple or transpose of it.
fn is_plain(node: &NodeProto) -> bool {
    let alpha = node.attribute.iter().find(|a| a.name.as_deref() == Some("alpha")).and_then(|a| a.f);
    #[expect(clippy::float_cmp, reason = "a factor of exactly one is the default")]
    let is_one = alpha.unwrap_or(1.0) == 1.0;
    is_one && integer(node, "transA") == 0
}

fn integer(node: &NodeProto, name: &str) -> i64 {
    node.attribute.iter().find(|a| a.name.as_deref() == Some(name)).and_then(|a| a.i).unwrap_or(0)
}
