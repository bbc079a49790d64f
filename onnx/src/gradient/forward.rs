//! A graph made ready to be differentiated: weights as inputs, fixed shapes, simplified, every shape known.
//!
//! Weights become inputs *before* ONNX Runtime simplifies the graph, or it would fold what depends on weights alone.

use std::collections::HashSet;
use std::path::Path;

use prost::Message;

use super::backward::Constants;
use super::error::GradientError;
use super::inspect::{self, Values};
use super::tape::{Tape, Value};
use crate::graph::{Dimension, Port};
use crate::prepared::{Prepared, Slot};
use crate::proto::{DataType, ModelProto, OperatorSetIdProto, TensorProto, ValueInfoProto, value_info};
use crate::runtime::{Runtime, RuntimeError};
use crate::tensor::{FloatType, float_tensor};

/// From 13 on, axes are inputs of `ReduceSum` and `Squeeze`, and `Softmax` works on one axis.
pub(super) const LOWEST_OPSET: i64 = 13;
/// Opset 21 is the last that rules were read against.
pub(super) const HIGHEST_OPSET: i64 = 21;
/// The lowest that gradients are written in: `ScatterElements` adds since 16, `LayerNormalization` exists since 17.
const WRITTEN_OPSET: i64 = 17;

/// A forward computation of fixed shapes, to which losses and other inputs can be added.
#[derive(Debug)]
pub struct Forward {
    pub(super) graph: String,
    pub(super) model: ModelProto,
    pub(super) tape: Tape,
    /// the graph's own inputs, then those added
    pub(super) inputs: Vec<Input>,
    pub(super) weights: Vec<Slot>,
    pub(super) outputs: Vec<String>,
    pub(super) values: Values,
}

/// An input that is fed at every run.
#[derive(Clone, Debug)]
pub(super) struct Input {
    pub(super) name: String,
    pub(super) element: DataType,
    pub(super) shape: Vec<usize>,
}

impl Forward {
    /// Prepares a graph for inputs of the given shapes (those whose shapes are fixed in the file need none).
    ///
    /// `keep`: inner values that must stay available, because a loss will use them; simplification may remove others.
    /// `scratch`: a folder for a file that exists for a moment.
    ///
    /// # Errors
    ///
    /// If a shape is missing or impossible, a weight is not `f32`, the opset is too old or too new, or ONNX Runtime
    /// refuses the graph.
    pub fn new(
        runtime: &Runtime,
        prepared: &Prepared,
        shapes: &[(&str, &[usize])],
        keep: &[&str],
        scratch: &Path,
    ) -> Result<Self, GradientError> {
        let graph = prepared.name().to_owned();
        let refused =
            |reason: String| GradientError::Runtime(RuntimeError::Session { graph: graph.clone(), reason });
        let mut model = ModelProto::decode(prepared.bytes()).map_err(|e| refused(e.to_string()))?;
        raise_opset(&graph, &mut model)?;
        for slot in prepared.slots() {
            if slot.element != FloatType::F32 {
                return Err(GradientError::ElementType {
                    graph,
                    kind: "weight",
                    tensor: slot.name.clone(),
                    actual: slot.element.to_string(),
                });
            }
        }
        let inputs = fix_inputs(&graph, prepared.inputs(), shapes)?;
        let outputs: Vec<String> = prepared.outputs().iter().map(|o| o.name.clone()).collect();
        let proto = model.graph.get_or_insert_default();
        let weights: HashSet<&str> = prepared.slots().iter().map(|s| s.name.as_str()).collect();
        proto.initializer.retain(|t| !weights.contains(t.name()));
        // An initializer that is an input as well would count as variable: what depends on it would not be folded.
        proto.input.clear();
        let all = inputs
            .iter()
            .map(|i| (i.name.clone(), i.element, i.shape.clone()))
            .chain(prepared.slots().iter().map(|s| (s.name.clone(), DataType::Float, s.shape.clone())))
            .collect::<Vec<_>>();
        proto.input.extend(all.iter().map(|(name, element, shape)| value_info(name, *element, shape)));
        for output in &mut proto.output {
            output.r#type = None;
        }
        let kept: Vec<&str> = keep.iter().copied().filter(|k| !outputs.iter().any(|o| o == k)).collect();
        let defined: HashSet<&str> =
            proto.node.iter().flat_map(|n| n.output.iter().map(String::as_str)).collect();
        if let Some(unknown) = kept.iter().find(|k| !defined.contains(*k)) {
            return Err(GradientError::UnknownValue { graph, value: (*unknown).to_owned() });
        }
        let named = |name: &&str| ValueInfoProto { name: Some((*name).to_owned()), ..Default::default() };
        proto.output.extend(kept.iter().map(named));
        let model = inspect::simplify(runtime, &model, scratch).map_err(refused)?;
        let mut values = inspect::values(runtime, &model, &all).map_err(refused)?;
        for (name, element, shape) in all {
            values.elements.insert(name.clone(), element);
            values.shapes.insert(name, shape);
        }
        Self::from_simplified(graph, model, inputs, prepared.slots().to_vec(), outputs, values)
    }

    fn from_simplified(
        graph: String,
        mut model: ModelProto,
        inputs: Vec<Input>,
        weights: Vec<Slot>,
        outputs: Vec<String>,
        mut values: Values,
    ) -> Result<Self, GradientError> {
        let proto = model.graph.get_or_insert_default();
        let nodes = std::mem::take(&mut proto.node);
        let initializers = std::mem::take(&mut proto.initializer);
        for tensor in &initializers {
            let shape = crate::tensor::shape_of(tensor.name(), &tensor.dims)?;
            values.shapes.insert(tensor.name().to_owned(), shape);
            if let Some(element) = tensor.data_type.and_then(|t| DataType::try_from(t).ok()) {
                values.elements.insert(tensor.name().to_owned(), element);
            }
        }
        let used: HashSet<&str> = nodes.iter().filter_map(|n| n.domain.as_deref()).collect();
        model.opset_import.retain(|o| {
            let domain = o.domain.as_deref().unwrap_or_default();
            domain.is_empty() || used.contains(domain)
        });
        let names = nodes.iter().flat_map(|n| n.output.iter().cloned());
        let names = names.chain(values.shapes.keys().cloned()).collect();
        let opset = model.opset_import.iter().find(|o| is_onnx(o)).and_then(|o| o.version).unwrap_or(1);
        let tape = Tape::new(opset, nodes, initializers, names);
        let mut forward = Self { graph, model, tape, inputs, weights, outputs, values };
        forward.fuse_activations();
        Ok(forward)
    }

    /// Returns the path of the graph, for messages.
    pub fn graph(&self) -> &str {
        &self.graph
    }

    /// Returns the names of the graph's own outputs.
    pub fn outputs(&self) -> &[String] {
        &self.outputs
    }

    /// Returns the weights, which are inputs unless they are frozen when the graph is differentiated.
    pub fn weights(&self) -> &[Slot] {
        &self.weights
    }

    /// Returns a float value of the graph: an input, a weight, an output, or a value that was kept.
    pub fn value(&self, name: &str) -> Result<Value, GradientError> {
        let known = self.values.shapes.get(name);
        match (known, self.values.elements.get(name)) {
            (Some(shape), Some(DataType::Float)) => Ok(Value { name: name.to_owned(), shape: shape.clone() }),
            _ => Err(GradientError::UnknownValue { graph: self.graph.clone(), value: name.to_owned() }),
        }
    }

    /// Adds a float input: targets, what a teacher says, the factors of an adapter.
    pub fn add_input(&mut self, name: &str, shape: &[usize]) -> Result<Value, GradientError> {
        if !self.tape.names.insert(name.to_owned()) {
            return Err(GradientError::ValueTaken { graph: self.graph.clone(), value: name.to_owned() });
        }
        self.inputs.push(Input { name: name.to_owned(), element: DataType::Float, shape: shape.to_vec() });
        self.values.shapes.insert(name.to_owned(), shape.to_vec());
        self.values.elements.insert(name.to_owned(), DataType::Float);
        Ok(Value { name: name.to_owned(), shape: shape.to_vec() })
    }

    /// Where losses are written to.
    pub fn tape(&mut self) -> &mut Tape {
        &mut self.tape
    }

    /// Lets every node that uses `weight` use what `make` computes from it instead, which must have its shape:
    /// `W + B·A`, `W + Σ λ τ`.
    pub fn rewire(
        &mut self,
        weight: &str,
        make: impl FnOnce(&mut Tape, &Value) -> Value,
    ) -> Result<Value, GradientError> {
        let value = self.value(weight)?;
        let n_nodes = self.tape.nodes.len();
        let made = make(&mut self.tape, &value);
        if made.shape != value.shape {
            return Err(GradientError::LossOperands {
                loss: "an adapter",
                left: value.shape,
                right: made.shape,
            });
        }
        for node in &mut self.tape.nodes[..n_nodes] {
            node.input.iter_mut().filter(|i| *i == weight).for_each(|i| i.clone_from(&made.name));
        }
        Ok(made)
    }

    /// Returns the values of initializers that rules may want to know.
    pub(super) fn constants(&self) -> Constants {
        const MOST_FLOATS: usize = 16;
        let mut constants = Constants::default();
        for tensor in &self.tape.initializers {
            if let Some(integers) = integers(tensor) {
                constants.integers.insert(tensor.name().to_owned(), integers);
            } else if tensor.dims.iter().product::<i64>() <= MOST_FLOATS as i64
                && let Ok(Some((_, element, data))) = float_tensor(tensor.name(), tensor)
            {
                constants.floats.insert(tensor.name().to_owned(), data.values(element).into_owned());
            }
        }
        constants
    }
}

fn integers(tensor: &TensorProto) -> Option<Vec<i64>> {
    let is = |data_type: DataType| tensor.data_type == Some(data_type as i32);
    match &tensor.raw_data {
        Some(raw) if is(DataType::Int64) => {
            Some(raw.as_chunks::<8>().0.iter().map(|c| i64::from_le_bytes(*c)).collect())
        }
        Some(raw) if is(DataType::Int32) => {
            Some(raw.as_chunks::<4>().0.iter().map(|c| i64::from(i32::from_le_bytes(*c))).collect())
        }
        None if is(DataType::Int64) => Some(tensor.int64_data.clone()),
        None if is(DataType::Int32) => Some(tensor.int32_data.iter().map(|&v| i64::from(v)).collect()),
        _ => None,
    }
}

/// Checks the opset and raises it to the one that gradients are written in.
///
/// Between 13 and 17 ops only gained types and attributes, except `RoiAlign`, whose default changed.
fn raise_opset(graph: &str, model: &mut ModelProto) -> Result<(), GradientError> {
    let changed = model.graph.iter().flat_map(|g| &g.node).any(|n| n.op_type() == "RoiAlign");
    let import = model.opset_import.iter_mut().find(|o| is_onnx(o));
    let opset = import.as_ref().and_then(|o| o.version).unwrap_or(1);
    let lowest = if changed { WRITTEN_OPSET } else { LOWEST_OPSET };
    if !(lowest..=HIGHEST_OPSET).contains(&opset) {
        let graph = graph.to_owned();
        return Err(GradientError::Opset { graph, actual: opset, lowest, highest: HIGHEST_OPSET });
    }
    if let Some(import) = import {
        import.version = Some(opset.max(WRITTEN_OPSET));
    }
    // Opset 17 came with version 8 of the format.
    model.ir_version = Some(model.ir_version.unwrap_or(0).max(8));
    Ok(())
}

fn is_onnx(import: &OperatorSetIdProto) -> bool {
    matches!(import.domain.as_deref(), None | Some("" | "ai.onnx"))
}

fn fix_inputs(graph: &str, ports: &[Port], shapes: &[(&str, &[usize])]) -> Result<Vec<Input>, GradientError> {
    if let Some((unknown, _)) = shapes.iter().find(|(name, _)| ports.iter().all(|p| p.name != *name)) {
        let expected = ports.iter().map(|p| format!("`{}`", p.name)).collect::<Vec<_>>().join(", ");
        return Err(RuntimeError::UnknownInput {
            graph: graph.to_owned(),
            input: (*unknown).to_owned(),
            expected,
        }
        .into());
    }
    let fix = |port: &Port| {
        let element = port.element.unwrap_or(DataType::Undefined);
        let declared = port.dimensions.as_deref();
        let given = shapes.iter().find(|(name, _)| *name == port.name).map(|(_, shape)| *shape);
        let Some(given) = given else {
            let fixed = declared.and_then(|dims| {
                let size = |d: &Dimension| match d {
                    Dimension::Fixed(n) => Some(*n),
                    Dimension::Free(_) => None,
                };
                dims.iter().map(size).collect::<Option<Vec<usize>>>()
            });
            let free = || GradientError::FreeInput { graph: graph.to_owned(), input: port.name.clone() };
            return Ok(Input { name: port.name.clone(), element, shape: fixed.ok_or_else(free)? });
        };
        let fits = declared.is_none_or(|dims| {
            let fits =
                |(d, n): (&Dimension, &usize)| *d == Dimension::Fixed(*n) || matches!(d, Dimension::Free(_));
            dims.len() == given.len() && dims.iter().zip(given).all(fits)
        });
        if !fits {
            return Err(GradientError::InputShape {
                graph: graph.to_owned(),
                input: port.name.clone(),
                expected: describe(declared.unwrap_or_default()),
                actual: given.to_vec(),
            });
        }
        Ok(Input { name: port.name.clone(), element, shape: given.to_vec() })
    };
    ports.iter().map(fix).collect()
}

fn describe(dimensions: &[Dimension]) -> String {
    let sizes: Vec<String> = dimensions
        .iter()
        .map(|d| match d {
            Dimension::Fixed(n) => n.to_string(),
            Dimension::Free(name) => name.clone().unwrap_or_else(|| "?".to_owned()),
        })
        .collect();
    format!("[{}]", sizes.join(", "))
}
