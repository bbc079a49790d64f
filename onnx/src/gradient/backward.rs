//! What a rule is given: one node, the gradients of its outputs, and where to put the gradients of its inputs.

use std::collections::{HashMap, HashSet};

use super::tape::{Tape, Value};
use crate::proto::{AttributeProto, NodeProto};

/// Why a rule does not cover a node.
pub(super) type Unsupported = String;

/// One node of the forward graph on the way back.
pub(super) struct Backward<'a> {
    pub(super) tape: &'a mut Tape,
    node: &'a NodeProto,
    shapes: &'a HashMap<String, Vec<usize>>,
    constants: &'a Constants,
    differentiable: &'a HashSet<String>,
    gradients: Vec<Option<Value>>,
    given: Vec<(String, Value)>,
    extra_outputs: Vec<(usize, String)>,
}

/// The small constants of a graph, by name.
#[derive(Debug, Default)]
pub(super) struct Constants {
    pub(super) integers: HashMap<String, Vec<i64>>,
    pub(super) floats: HashMap<String, Vec<f32>>,
}

/// What a rule leaves behind.
pub(super) struct Passed {
    /// names of inputs and their gradients
    pub(super) given: Vec<(String, Value)>,
    /// optional outputs that the node must have, by place
    pub(super) extra_outputs: Vec<(usize, String)>,
}

impl<'a> Backward<'a> {
    pub(super) fn new(
        tape: &'a mut Tape,
        node: &'a NodeProto,
        shapes: &'a HashMap<String, Vec<usize>>,
        constants: &'a Constants,
        differentiable: &'a HashSet<String>,
        gradients: Vec<Option<Value>>,
    ) -> Self {
        Self {
            tape,
            node,
            shapes,
            constants,
            differentiable,
            gradients,
            given: Vec::new(),
            extra_outputs: Vec::new(),
        }
    }

    pub(super) fn finish(self) -> Passed {
        Passed { given: self.given, extra_outputs: self.extra_outputs }
    }

    pub(super) fn n_inputs(&self) -> usize {
        self.node.input.len()
    }

    pub(super) fn n_outputs(&self) -> usize {
        self.node.output.len()
    }

    pub(super) fn has_input(&self, i: usize) -> bool {
        self.node.input.get(i).is_some_and(|name| !name.is_empty())
    }

    /// Returns an input of any type; its shape is known to ONNX Runtime, so it is known here.
    pub(super) fn input(&self, i: usize) -> Result<Value, Unsupported> {
        let name = self.node.input.get(i).filter(|n| !n.is_empty());
        self.known(name.ok_or_else(|| format!("input {i} is missing"))?)
    }

    pub(super) fn output(&self, i: usize) -> Result<Value, Unsupported> {
        self.known(self.node.output.get(i).ok_or_else(|| format!("output {i} is missing"))?)
    }

    fn known(&self, name: &str) -> Result<Value, Unsupported> {
        let shape = self.shapes.get(name).ok_or_else(|| format!("the shape of `{name}` is not known"))?;
        Ok(Value { name: name.to_owned(), shape: shape.clone() })
    }

    /// Returns whether a gradient is wanted for an input.
    pub(super) fn needs(&self, i: usize) -> bool {
        self.node.input.get(i).is_some_and(|name| self.differentiable.contains(name))
    }

    /// Returns the gradient of output 0. A rule for one output is called only where there is one.
    pub(super) fn gradient(&self) -> Result<Value, Unsupported> {
        self.gradient_of(0).ok_or_else(|| "it is used through an optional output".to_owned())
    }

    pub(super) fn gradient_of(&self, output: usize) -> Option<Value> {
        self.gradients.get(output).cloned().flatten()
    }

    /// Adds to the gradient of an input; summed over the axes along which the op has repeated the input.
    pub(super) fn give(&mut self, i: usize, gradient: &Value) -> Result<(), Unsupported> {
        if !self.needs(i) {
            return Ok(());
        }
        let input = self.input(i)?;
        let gradient = self.tape.sum_to(gradient, &input.shape);
        if gradient.shape != input.shape {
            return Err(format!(
                "its gradient would have shape {:?}, but input {i} has shape {:?}",
                gradient.shape, input.shape
            ));
        }
        self.given.push((input.name, gradient));
        Ok(())
    }

    /// Makes the node compute an optional output that nobody has asked for so far.
    pub(super) fn extra_output(&mut self, i: usize, shape: Vec<usize>) -> Value {
        if let Some(name) = self.node.output.get(i).filter(|n| !n.is_empty()) {
            return Value { name: name.clone(), shape };
        }
        let name = self.tape.fresh(self.node.op_type());
        self.extra_outputs.push((i, name.clone()));
        Value { name, shape }
    }

    fn attribute(&self, name: &str) -> Option<&'a AttributeProto> {
        self.node.attribute.iter().find(|a| a.name.as_deref() == Some(name))
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.attribute(name).is_some()
    }

    pub(super) fn int(&self, name: &str, default: i64) -> i64 {
        self.attribute(name).and_then(|a| a.i).unwrap_or(default)
    }

    pub(super) fn float(&self, name: &str, default: f32) -> f32 {
        self.attribute(name).and_then(|a| a.f).unwrap_or(default)
    }

    pub(super) fn ints(&self, name: &str) -> Option<&'a [i64]> {
        self.attribute(name).map(|a| a.ints.as_slice())
    }

    pub(super) fn text(&self, name: &str, default: &'a str) -> &'a str {
        let text = self.attribute(name).and_then(|a| a.s.as_deref());
        text.map_or(default, |s| std::str::from_utf8(s).unwrap_or_default())
    }

    pub(super) fn attributes(&self) -> Vec<AttributeProto> {
        self.node.attribute.clone()
    }

    /// Returns the constant integers of an input; nothing if it is absent.
    pub(super) fn constant(&self, i: usize) -> Result<Option<Vec<i64>>, Unsupported> {
        if !self.has_input(i) {
            return Ok(None);
        }
        let name = &self.node.input[i];
        self.constants
            .integers
            .get(name)
            .cloned()
            .map(Some)
            .ok_or_else(|| format!("input `{name}` is not a constant"))
    }

    /// Returns the floats of an input that is a small constant.
    pub(super) fn floats(&self, i: usize) -> Option<&'a [f32]> {
        self.node.input.get(i).and_then(|name| self.constants.floats.get(name)).map(Vec::as_slice)
    }
}

/// Returns an axis as an index; negative axes count from the last.
pub(super) fn axis_index(axis: i64, rank: usize) -> Result<usize, Unsupported> {
    let index = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(index)
        .ok()
        .filter(|&a| a < rank)
        .ok_or_else(|| format!("it has no axis {axis} among {rank}"))
}
