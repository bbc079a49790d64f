//! A graph file in memory: its inputs and outputs, and every float constant that may be a weight.
//!
//! Constants are collected from initializers, `Constant` nodes, nested graphs (branches of an `If`) and
//! function bodies. How often a weight is really used is counted past nodes that only reshape constants,
//! because that is what tells a weight that an exporter shared between two places from one it did not.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use fs_err as fs;
use prost::Message;
use prost::bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::GraphError;
use crate::external;
use crate::proto::type_proto::Value;
use crate::proto::{
    DataType, DimensionValue, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto,
};
use crate::tensor::{FloatType, TensorData, float_tensor};

/// A graph with all its tensor data in memory.
#[derive(Debug)]
pub struct Graph {
    path: PathBuf,
    files: Vec<PathBuf>,
    digest: blake3::Hash,
    model: ModelProto,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    float_tensors: Vec<GraphTensor>,
    opaque: Vec<(String, Vec<i64>)>,
    identities: Vec<Identity>,
    uses: HashMap<String, Uses>,
}

/// An input or output of a graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub name: String,
    /// `None` for sequences and other things that are not tensors
    pub element: Option<DataType>,
    /// `None` where the file does not say
    pub dimensions: Option<Vec<Dimension>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dimension {
    Fixed(usize),
    /// a free dimension, with its name if it has one
    Free(Option<String>),
}

/// Where a constant lies in the file, which decides how it can be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    Initializer,
    /// a `Constant` node of the main graph
    Constant,
    /// an initializer or `Constant` node of a nested graph
    Nested,
    /// a `Constant` node in the body of a function, or one of several of the same name in nested graphs: nothing to
    /// inject a value by
    Function,
    /// the output of an `Identity` node by which an exporter shares one initializer between equal tensors
    Identity,
}

/// A float constant of a graph.
#[derive(Clone, Debug)]
pub struct GraphTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub element: FloatType,
    pub place: Place,
    data: TensorData,
}

/// An `Identity` node whose input is an initializer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub initializer: String,
    pub output: String,
}

#[derive(Clone, Debug, Default)]
struct Uses {
    count: usize,
    /// names of the nodes that consume the tensor, directly or through nodes on constants
    nodes: Vec<String>,
}

impl Graph {
    /// Reads a graph and the data files that it refers to.
    pub fn load(path: &Path) -> Result<Self, GraphError> {
        let bytes = Bytes::from(fs::read(path)?);
        Self::from_bytes(path, bytes).map_err(|source| match source {
            GraphError::Io(_) | GraphError::NotOnnx { .. } => source,
            source => GraphError::InFile { path: path.to_owned(), source: Box::new(source) },
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the files that the graph consists of: itself, then its data files.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Returns the digest of the file; with data files, of all digests and the locations they are known by.
    pub fn digest(&self) -> blake3::Hash {
        self.digest
    }

    pub fn model(&self) -> &ModelProto {
        &self.model
    }

    /// Returns what a caller has to provide: the graph's inputs that are not initializers.
    pub fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    /// Returns all float constants that are not empty, in file order.
    pub fn float_tensors(&self) -> &[GraphTensor] {
        &self.float_tensors
    }

    /// Returns names and dimensions of constants that may be weights in a form that cannot be compared: of eight
    /// bits or less (quantized after export, more than four values), or sparse.
    pub fn opaque_tensors(&self) -> &[(String, Vec<i64>)] {
        &self.opaque
    }

    pub fn identities(&self) -> &[Identity] {
        &self.identities
    }

    /// Returns at how many places a constant enters the computation. Nodes on constants alone are looked through.
    pub fn use_count(&self, tensor: &str) -> usize {
        self.uses.get(tensor).map_or(0, |u| u.count)
    }

    /// Returns the names of the nodes that consume a constant.
    pub fn consumer_names(&self, tensor: &str) -> &[String] {
        self.uses.get(tensor).map_or(&[], |u| &u.nodes)
    }

    fn from_bytes(path: &Path, bytes: Bytes) -> Result<Self, GraphError> {
        let not_onnx =
            |reason: &str| GraphError::NotOnnx { path: path.to_owned(), reason: reason.to_owned() };
        let file_digest = blake3::hash(&bytes);
        let mut model = ModelProto::decode(bytes).map_err(|e| not_onnx(&e.to_string()))?;
        if model.graph.as_ref().is_none_or(|g| g.node.is_empty() && g.output.is_empty()) {
            return Err(not_onnx("it holds no graph"));
        }
        let external = external::inline(&mut model, path)?;
        let mut files = vec![path.to_owned()];
        files.extend(external.values().map(|(path, _)| path.clone()));
        let digest =
            combined_digest(file_digest, external.iter().map(|(location, (_, data))| (location, data)));
        let graph = model.graph.as_ref().expect("checked above");
        let mut collected = Collected::default();
        collected.graph(graph, Place::Initializer)?;
        for function in &model.functions {
            collected.nodes(&function.node, Place::Function)?;
        }
        collected.pin_ambiguous_names(graph);
        let initializers: HashSet<&str> =
            graph.initializer.iter().filter_map(|t| t.name.as_deref()).collect();
        let inputs = graph.input.iter().filter(|i| !initializers.contains(name(i))).map(port).collect();
        let outputs = graph.output.iter().map(port).collect();
        let identities = graph
            .node
            .iter()
            .filter(|n| n.op_type() == "Identity" && n.domain().is_empty() && n.output.len() == 1)
            .filter(|n| n.input.len() == 1 && initializers.contains(n.input[0].as_str()))
            .map(|n| Identity { initializer: n.input[0].clone(), output: n.output[0].clone() })
            .collect();
        let uses = uses(graph, &initializers);
        Ok(Self {
            path: path.to_owned(),
            files,
            digest,
            inputs,
            outputs,
            float_tensors: collected.floats,
            opaque: collected.opaque,
            identities,
            uses,
            model,
        })
    }
}

impl GraphTensor {
    /// Returns the values as `f32`, in row-major order.
    pub fn values(&self) -> std::borrow::Cow<'_, [f32]> {
        self.data.values(self.element)
    }

    pub fn n_values(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Uses {
    /// Bounded, because the number of paths through a graph can be exponential in its size.
    fn add(&mut self, other: &Self) {
        const MOST_NAMES: usize = 16;
        self.count = self.count.saturating_add(other.count);
        let room = MOST_NAMES.saturating_sub(self.nodes.len());
        self.nodes.extend(other.nodes.iter().take(room).cloned());
    }
}

#[derive(Default)]
struct Collected {
    floats: Vec<GraphTensor>,
    opaque: Vec<(String, Vec<i64>)>,
}

impl Collected {
    fn graph(&mut self, graph: &GraphProto, place: Place) -> Result<(), GraphError> {
        for tensor in &graph.initializer {
            self.tensor(tensor.name(), tensor, place)?;
        }
        for sparse in &graph.sparse_initializer {
            if let Some(values) = &sparse.values {
                self.opaque.push((values.name().to_owned(), sparse.dims.clone()));
            }
        }
        self.nodes(&graph.node, if place == Place::Initializer { Place::Constant } else { place })
    }

    fn nodes(&mut self, nodes: &[NodeProto], place: Place) -> Result<(), GraphError> {
        for node in nodes {
            let is_constant = node.op_type() == "Constant" && node.domain().is_empty();
            for attribute in &node.attribute {
                if let (true, Some(output)) = (is_constant, node.output.first()) {
                    if let Some(tensor) = &attribute.t {
                        self.tensor(output, tensor, place)?;
                    }
                    if !attribute.floats.is_empty() {
                        self.floats.push(GraphTensor {
                            name: output.clone(),
                            shape: vec![attribute.floats.len()],
                            element: FloatType::F32,
                            place,
                            data: TensorData::F32(attribute.floats.clone()),
                        });
                    }
                }
                let nested = if place == Place::Function { Place::Function } else { Place::Nested };
                for graph in attribute.g.iter().chain(&attribute.graphs) {
                    self.graph(graph, nested)?;
                }
            }
        }
        Ok(())
    }

    /// A nested constant can become an initializer of the main graph only if its name is used once in the file.
    fn pin_ambiguous_names(&mut self, graph: &GraphProto) {
        let mut defined: HashMap<&str, usize> = HashMap::new();
        count_definitions(graph, &mut defined);
        for tensor in self.floats.iter_mut().filter(|t| t.place == Place::Nested) {
            if defined.get(tensor.name.as_str()) != Some(&1) {
                tensor.place = Place::Function;
            }
        }
    }

    fn tensor(&mut self, name: &str, tensor: &TensorProto, place: Place) -> Result<(), GraphError> {
        if let Some((shape, element, data)) = float_tensor(name, tensor)? {
            if !shape.contains(&0) {
                self.floats.push(GraphTensor { name: name.to_owned(), shape, element, place, data });
            }
        } else if is_quantized(tensor) {
            self.opaque.push((name.to_owned(), tensor.dims.clone()));
        }
        Ok(())
    }
}

fn count_definitions<'a>(graph: &'a GraphProto, defined: &mut HashMap<&'a str, usize>) {
    let outputs = graph.node.iter().flat_map(|n| n.output.iter().map(String::as_str));
    let names =
        graph.initializer.iter().map(TensorProto::name).chain(graph.input.iter().map(name)).chain(outputs);
    for name in names {
        *defined.entry(name).or_default() += 1;
    }
    for nested in graph.node.iter().flat_map(|n| &n.attribute).flat_map(|a| a.g.iter().chain(&a.graphs)) {
        count_definitions(nested, defined);
    }
}

fn is_quantized(tensor: &TensorProto) -> bool {
    let small_type = matches!(
        tensor.data_type.and_then(|t| DataType::try_from(t).ok()),
        Some(
            DataType::Uint8
                | DataType::Int8
                | DataType::Float8E4M3FN
                | DataType::Float8E4M3FNUZ
                | DataType::Float8E5M2
                | DataType::Float8E5M2FNUZ
                | DataType::Uint4
                | DataType::Int4
                | DataType::Float4E2M1
                | DataType::Uint2
                | DataType::Int2
                | DataType::Float6E2M3
                | DataType::Float6E3M2
        )
    );
    small_type && tensor.dims.iter().fold(1i64, |n, &d| n.saturating_mul(d)) > 4
}

fn name(value: &ValueInfoProto) -> &str {
    value.name.as_deref().unwrap_or_default()
}

fn port(value: &ValueInfoProto) -> Port {
    let tensor = match value.r#type.as_ref().and_then(|t| t.value.as_ref()) {
        Some(Value::TensorType(tensor)) => Some(tensor),
        _ => None,
    };
    let dimension = |d: &crate::proto::Dimension| match &d.value {
        Some(DimensionValue::DimValue(n)) if *n >= 0 => Dimension::Fixed(*n as usize),
        Some(DimensionValue::DimParam(name)) if !name.is_empty() => Dimension::Free(Some(name.clone())),
        _ => Dimension::Free(None),
    };
    Port {
        name: name(value).to_owned(),
        element: tensor.and_then(|t| t.elem_type).and_then(|t| DataType::try_from(t).ok()),
        dimensions: tensor.and_then(|t| t.shape.as_ref()).map(|s| s.dim.iter().map(dimension).collect()),
    }
}

fn combined_digest<'a>(
    file: blake3::Hash,
    external: impl ExactSizeIterator<Item = (&'a String, &'a Bytes)>,
) -> blake3::Hash {
    if external.len() == 0 {
        return file;
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(file.as_bytes());
    for (location, data) in external {
        hasher.update(&(location.len() as u64).to_le_bytes());
        hasher.update(location.as_bytes());
        hasher.update(blake3::hash(data).as_bytes());
    }
    hasher.finalize()
}

/// Counts the uses of every value that is constant. Nodes come in topological order, as ONNX demands; in a file
/// that breaks this the counts are merely too low or too high, and ONNX Runtime refuses the file anyway.
fn uses(graph: &GraphProto, initializers: &HashSet<&str>) -> HashMap<String, Uses> {
    let mut constant: HashSet<&str> = initializers.clone();
    let mut on_constants = vec![false; graph.node.len()];
    for (node, flag) in graph.node.iter().zip(&mut on_constants) {
        let nested = node.attribute.iter().any(|a| a.g.is_some() || !a.graphs.is_empty());
        let inputs_constant = node.input.iter().all(|i| i.is_empty() || constant.contains(i.as_str()));
        *flag = !nested && inputs_constant && !node.op_type().starts_with("Random");
        if *flag {
            constant.extend(node.output.iter().map(String::as_str));
        }
    }
    let mut uses: HashMap<String, Uses> = HashMap::new();
    for output in &graph.output {
        uses.entry(name(output).to_owned()).or_default().count += 1;
    }
    for (node, on_constants) in graph.node.iter().zip(on_constants).rev() {
        let through = if on_constants {
            let mut through = Uses { count: 0, nodes: vec![node.name().to_owned()] };
            for output in &node.output {
                if let Some(u) = uses.get(output) {
                    through.add(u);
                }
            }
            through
        } else {
            Uses { count: 1, nodes: vec![node.name().to_owned()] }
        };
        let mut names: Vec<&str> = node.input.iter().map(String::as_str).filter(|i| !i.is_empty()).collect();
        let n_direct = names.len();
        for nested in node.attribute.iter().flat_map(|a| a.g.iter().chain(&a.graphs)) {
            nested_inputs(nested, &mut names);
        }
        names[n_direct..].sort_unstable();
        for input in names {
            if constant.contains(input) {
                uses.entry(input.to_owned()).or_default().add(&through);
            }
        }
    }
    uses
}

fn nested_inputs<'a>(graph: &'a GraphProto, names: &mut Vec<&'a str>) {
    names.extend(graph.output.iter().map(name));
    for node in &graph.node {
        names.extend(node.input.iter().map(String::as_str));
        for nested in node.attribute.iter().flat_map(|a| a.g.iter().chain(&a.graphs)) {
            nested_inputs(nested, names);
        }
    }
}
