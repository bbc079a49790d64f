//! A graph without its weights: what every model's session starts from.
//!
//! The bound constants lose their values and are marked as external, because ONNX Runtime takes a caller's
//! tensor (`AddExternalInitializers`) only for such an initializer, and takes it *before* it optimizes the graph.
//! Constants elsewhere (`Constant` nodes, nested graphs, split `Identity` nodes) become initializers of the main graph.
//! The external file that the entries name does not exist and is never opened.

use std::collections::{HashMap, HashSet};

use prost::Message;
use prost::bytes::Bytes;
use rayon::prelude::*;

use crate::binding::{Binding, BoundTensor, How, Source};
use crate::error::GraphError;
use crate::graph::{Graph, Place, Port};
use crate::proto::{DataLocation, DataType, GraphProto, ModelProto, StringStringEntryProto, TensorProto};
use crate::tensor::{FloatType, Weights, WeightsError, transpose};

/// A graph whose bound constants wait for a model's values.
#[derive(Clone, Debug)]
pub struct Prepared {
    name: String,
    bytes: Vec<u8>,
    slots: Vec<Slot>,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    is_gradient: bool,
}

/// A constant to be filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Slot {
    pub name: String,
    pub shape: Vec<usize>,
    pub element: FloatType,
    pub source: Source,
}

impl Prepared {
    pub fn new(graph: &Graph, binding: &Binding) -> Result<Self, GraphError> {
        let (model, slots) = stripped(graph, binding)?;
        Ok(Self {
            name: graph.path().display().to_string(),
            bytes: model.encode_to_vec(),
            slots,
            inputs: graph.inputs().to_vec(),
            outputs: graph.outputs().to_vec(),
            is_gradient: false,
        })
    }

    /// The same graph, changed in what does not concern its slots and inputs.
    pub(crate) fn with_bytes(&self, bytes: Vec<u8>) -> Self {
        Self { bytes, ..self.clone() }
    }

    /// Puts together a graph that computes gradients of another; `slots` are the initializers without values in `bytes`.
    pub(crate) fn from_parts(
        name: String,
        bytes: Vec<u8>,
        slots: Vec<Slot>,
        inputs: Vec<Port>,
        outputs: Vec<Port>,
    ) -> Self {
        Self { name, bytes, slots, inputs, outputs, is_gradient: true }
    }

    /// Whether this is a graph of gradients.
    pub(crate) fn is_gradient(&self) -> bool {
        self.is_gradient
    }

    /// Returns the path of the graph, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the serialized graph without the bound values.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    pub fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    /// Returns the values for every slot, in order, taken from a model that [`Binding::check`] has accepted.
    pub fn values(&self, model: &dyn Weights) -> Result<Vec<Vec<f32>>, WeightsError> {
        self.slots.par_iter().map(|slot| slot.values(model)).collect()
    }
}

impl Slot {
    /// Returns the values for this slot in row-major order; as many as its shape says.
    pub fn values(&self, model: &dyn Weights) -> Result<Vec<f32>, WeightsError> {
        let values = match &self.source {
            Source::Tensor { name, how } => {
                let values = model.values(name)?;
                self.expect_count(name, values.len())?;
                match (how, &self.shape[..]) {
                    (How::Transposed, &[rows, columns]) => transpose(&values, columns, rows),
                    (How::Exp, _) => values.into_iter().map(f32::exp).collect(),
                    _ => values,
                }
            }
            Source::Rows { runs, transposed } => {
                let length = match (transposed, &self.shape[..]) {
                    (true, &[rows, _]) => rows,
                    (_, shape) => shape.last().copied().unwrap_or(1),
                };
                let mut values = Vec::with_capacity(self.shape.iter().product());
                let mut read: HashMap<&str, Vec<f32>> = HashMap::new();
                for run in runs {
                    if !read.contains_key(run.tensor.as_str()) {
                        read.insert(&run.tensor, model.values(&run.tensor)?);
                    }
                    let source = &read[run.tensor.as_str()];
                    let range = run.first_row * length..(run.first_row + run.n_rows) * length;
                    let rows = source.get(range).ok_or_else(|| WeightsError {
                        tensor: run.tensor.clone(),
                        source: format!("it has no rows {} to {}", run.first_row, run.first_row + run.n_rows)
                            .into(),
                    })?;
                    values.extend_from_slice(rows);
                }
                match (transposed, &self.shape[..]) {
                    (true, &[rows, columns]) => transpose(&values, columns, rows),
                    _ => values,
                }
            }
        };
        self.expect_count(self.source.tensors().first().copied().unwrap_or_default(), values.len())?;
        Ok(values)
    }

    fn expect_count(&self, tensor: &str, actual: usize) -> Result<(), WeightsError> {
        let expected: usize = self.shape.iter().product();
        if actual == expected {
            return Ok(());
        }
        let reason = format!("the graph's `{}` needs {expected} values, got {actual}", self.name);
        Err(WeightsError { tensor: tensor.to_owned(), source: reason.into() })
    }
}

/// Takes the bound constants out of a graph: in their places are external initializers without data, one per slot.
pub(crate) fn stripped(graph: &Graph, binding: &Binding) -> Result<(ModelProto, Vec<Slot>), GraphError> {
    if binding.graph_digest != graph.digest() {
        return Err(GraphError::OtherGraph {
            expected: binding.graph_digest.to_string(),
            actual: graph.digest().to_string(),
        });
    }
    let mut model = graph.model().clone();
    strip(&mut model, &binding.tensors)?;
    let slots = binding.tensors.iter().map(|t| Slot {
        name: t.name.clone(),
        shape: t.shape.clone(),
        element: t.element,
        source: t.source.clone(),
    });
    let slots = slots.collect();
    Ok((model, slots))
}

fn strip(model: &mut ModelProto, bound: &[BoundTensor]) -> Result<(), GraphError> {
    let keeps_inputs = model.ir_version.unwrap_or(0) < 4;
    let graph = model.graph.get_or_insert_default();
    let names: HashSet<&str> = bound.iter().map(|t| t.name.as_str()).collect();
    let mut offset = 0usize;
    let positions: HashMap<String, usize> =
        graph.initializer.iter().enumerate().map(|(i, t)| (t.name().to_owned(), i)).collect();
    let mut moved: HashSet<&str> = HashSet::new();
    for tensor in bound {
        let stripped = placeholder(&tensor.name, &tensor.shape, tensor.element, &mut offset);
        match tensor.place {
            Place::Initializer => {
                let position = positions.get(&tensor.name).ok_or_else(|| missing(tensor))?;
                graph.initializer[*position] = stripped;
            }
            Place::Constant | Place::Nested | Place::Identity => {
                moved.insert(&tensor.name);
                graph.initializer.push(stripped);
            }
            Place::Function => return Err(missing(tensor)),
        }
    }
    let mut removed = HashSet::new();
    remove(graph, &moved, &mut removed, false);
    if let Some(tensor) = bound.iter().find(|t| moved.contains(t.name.as_str()) && !removed.contains(&t.name))
    {
        return Err(missing(tensor));
    }
    if !keeps_inputs {
        // An initializer that is an input as well may be overridden, and is then not a constant to the optimizer.
        graph.input.retain(|i| !names.contains(i.name.as_deref().unwrap_or_default()));
    }
    Ok(())
}

/// Removes the nodes and nested initializers that define the named values.
fn remove(graph: &mut GraphProto, names: &HashSet<&str>, removed: &mut HashSet<String>, nested: bool) {
    if names.is_empty() {
        return;
    }
    graph.node.retain(|n| {
        let defines = matches!(n.op_type(), "Constant" | "Identity") && n.domain().is_empty();
        let gone = defines && matches!(&n.output[..], [output] if names.contains(output.as_str()));
        if gone {
            removed.insert(n.output[0].clone());
        }
        !gone
    });
    if nested {
        graph.initializer.retain(|t| {
            let gone = names.contains(t.name());
            if gone {
                removed.insert(t.name().to_owned());
            }
            !gone
        });
    }
    for attribute in graph.node.iter_mut().flat_map(|n| n.attribute.iter_mut()) {
        for inner in attribute.g.iter_mut().chain(attribute.graphs.iter_mut()) {
            remove(inner, names, removed, true);
        }
    }
}

/// Returns an initializer whose values ONNX Runtime has to be given; `offset` counts the bytes of those before.
pub(crate) fn placeholder(
    name: &str,
    shape: &[usize],
    element: FloatType,
    offset: &mut usize,
) -> TensorProto {
    let data_type = match element {
        FloatType::F16 => DataType::Float16,
        FloatType::Bf16 => DataType::Bfloat16,
        FloatType::F32 => DataType::Float,
        FloatType::F64 => DataType::Double,
    };
    let length = shape.iter().product::<usize>() * element.size_bytes();
    let entry =
        |key: &str, value: String| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value) };
    let external_data = vec![
        entry("location", "weights".to_owned()),
        entry("offset", offset.to_string()),
        entry("length", length.to_string()),
    ];
    *offset += length;
    TensorProto {
        name: Some(name.to_owned()),
        dims: shape.iter().map(|&d| d as i64).collect(),
        data_type: Some(data_type as i32),
        data_location: Some(DataLocation::External as i32),
        external_data,
        raw_data: None::<Bytes>,
        ..TensorProto::default()
    }
}

fn missing(tensor: &BoundTensor) -> GraphError {
    GraphError::NoSuchTensor { tensor: tensor.name.clone() }
}
