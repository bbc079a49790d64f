//! Adding constants and nodes to a graph, under names that are free.

use std::collections::HashSet;

use prost::bytes::Bytes;

use crate::proto::{
    AttributeProto, AttributeType, DataType, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    TensorProto,
};

/// The domain of ONNX Runtime's own operators.
pub(super) const MICROSOFT: &str = "com.microsoft";

/// What is added to a graph. Nodes on constants come before all others.
pub(super) struct Editor {
    names: HashSet<String>,
    /// constants that several tensors may refer to
    common: HashSet<String>,
    pub(super) constants: Vec<TensorProto>,
    pub(super) nodes: Vec<NodeProto>,
}

impl Editor {
    pub(super) fn new(graph: &GraphProto) -> Self {
        let mut names = HashSet::new();
        collect_names(graph, &mut names);
        Self { names, common: HashSet::new(), constants: Vec::new(), nodes: Vec::new() }
    }

    /// Returns a name that nothing in the graph has: `base.suffix`, with a number if that is taken.
    pub(super) fn fresh(&mut self, base: &str, suffix: &str) -> String {
        let wanted = format!("{base}.{suffix}");
        let numbered = (2..).map(|n| format!("{wanted}.{n}"));
        let free = std::iter::once(wanted.clone()).chain(numbered).find(|name| !self.names.contains(name));
        let free = free.expect("there are more numbers than names");
        self.names.insert(free.clone());
        free
    }

    /// Adds a constant under a fresh name, which is returned.
    pub(super) fn constant(
        &mut self,
        base: &str,
        suffix: &str,
        element: DataType,
        dims: &[usize],
        bytes: Vec<u8>,
    ) -> String {
        let name = self.fresh(base, suffix);
        self.constants.push(raw_tensor(&name, element, dims, bytes));
        name
    }

    /// Returns a constant that tensors have in common, such as the number of bits to shift by; added when it is first asked for.
    fn shared(&mut self, name: &str, element: DataType, dims: &[usize], bytes: Vec<u8>) -> String {
        let same = |tensor: &&TensorProto| {
            tensor.data_type == Some(element as i32)
                && tensor.raw_data.as_deref() == Some(bytes.as_slice())
                && tensor.dims.iter().map(|&dim| dim as usize).eq(dims.iter().copied())
        };
        let mut common = self.constants.iter().filter(|tensor| self.common.contains(tensor.name()));
        if let Some(tensor) = common.find(same) {
            return tensor.name().to_owned();
        }
        let name = self.constant("common", name, element, dims, bytes);
        self.common.insert(name.clone());
        name
    }

    pub(super) fn shared_bytes(&mut self, name: &str, dims: &[usize], bytes: Vec<u8>) -> String {
        self.shared(name, DataType::Uint8, dims, bytes)
    }

    pub(super) fn shared_number(&mut self, name: &str, value: f32) -> String {
        self.shared_floats(name, &[], &[value])
    }

    pub(super) fn shared_floats(&mut self, name: &str, dims: &[usize], values: &[f32]) -> String {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.shared(name, DataType::Float, dims, bytes)
    }

    pub(super) fn shared_integers(&mut self, name: &str, values: &[i64]) -> String {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.shared(name, DataType::Int64, &[values.len()], bytes)
    }

    pub(super) fn floats(&mut self, base: &str, suffix: &str, dims: &[usize], values: &[f32]) -> String {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(base, suffix, DataType::Float, dims, bytes)
    }

    /// Adds a node on constants under a fresh name; returns its output.
    pub(super) fn apply(
        &mut self,
        base: &str,
        suffix: &str,
        op: &str,
        inputs: &[&str],
        attributes: Vec<AttributeProto>,
    ) -> String {
        let output = self.fresh(base, suffix);
        self.nodes.push(NodeProto { name: None, ..node(op, "", inputs, &output, attributes) });
        output
    }

    /// Gives the last node's output another name, which must be free by now.
    pub(super) fn rename_last(&mut self, name: &str) {
        if let Some(output) = self.nodes.last_mut().and_then(|node| node.output.first_mut()) {
            name.clone_into(output);
        }
    }
}

pub(super) fn node(
    op: &str,
    domain: &str,
    inputs: &[&str],
    output: &str,
    attributes: Vec<AttributeProto>,
) -> NodeProto {
    NodeProto {
        name: Some(output.to_owned()),
        op_type: Some(op.to_owned()),
        domain: (!domain.is_empty()).then(|| domain.to_owned()),
        input: inputs.iter().map(|&input| input.to_owned()).collect(),
        output: vec![output.to_owned()],
        attribute: attributes,
        ..NodeProto::default()
    }
}

pub(super) fn integer(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        i: Some(value),
        r#type: Some(AttributeType::Int as i32),
        ..AttributeProto::default()
    }
}

pub(super) fn integer_list(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        ints: values.to_vec(),
        r#type: Some(AttributeType::Ints as i32),
        ..AttributeProto::default()
    }
}

pub(super) fn text(name: &str, value: &'static str) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        s: Some(Bytes::from_static(value.as_bytes())),
        r#type: Some(AttributeType::String as i32),
        ..AttributeProto::default()
    }
}

pub(super) fn raw_tensor(name: &str, element: DataType, dims: &[usize], bytes: Vec<u8>) -> TensorProto {
    TensorProto {
        name: Some(name.to_owned()),
        dims: dims.iter().map(|&dim| dim as i64).collect(),
        data_type: Some(element as i32),
        raw_data: Some(Bytes::from(bytes)),
        ..TensorProto::default()
    }
}

/// Says that the model uses operators of a domain, unless it does.
pub(super) fn import(model: &mut ModelProto, domain: &str, version: i64) {
    if model.opset_import.iter().all(|set| set.domain.as_deref().unwrap_or_default() != domain) {
        let domain = Some(domain.to_owned());
        model.opset_import.push(OperatorSetIdProto { domain, version: Some(version) });
    }
}

fn collect_names(graph: &GraphProto, names: &mut HashSet<String>) {
    let tensors = graph.initializer.iter().filter_map(|tensor| tensor.name.clone());
    let inputs = graph.input.iter().filter_map(|input| input.name.clone());
    let values = graph.node.iter().flat_map(|node| node.input.iter().chain(&node.output)).cloned();
    let nodes = graph.node.iter().filter_map(|node| node.name.clone());
    names.extend(tensors.chain(inputs).chain(values).chain(nodes));
    let attributes = graph.node.iter().flat_map(|node| &node.attribute);
    for nested in attributes.flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs)) {
        collect_names(nested, names);
    }
}
