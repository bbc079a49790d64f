//! Graphs of a few nodes, made for a test.

use std::collections::HashMap;

use merganser_onnx::gradient::{Differentiated, Forward, Value};
use merganser_onnx::proto::{
    AttributeProto, AttributeType, DataType, Dimension, DimensionValue, GraphProto, ModelProto, NodeProto,
    OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use merganser_onnx::{Binding, Graph, Input, Prepared, Session, SessionOptions};
use ndarray::{ArrayD, IxDyn};
use prost::Message;

use crate::support::{Checkpoint, runtime};

/// A graph to be written: inputs with shapes, constants, nodes; the output is `y`.
#[derive(Clone, Default)]
pub(super) struct Small {
    pub(super) opset: i64,
    pub(super) inputs: Vec<(String, Vec<usize>)>,
    pub(super) constants: Vec<TensorProto>,
    pub(super) nodes: Vec<NodeProto>,
}

impl Small {
    pub(super) fn new(opset: i64) -> Self {
        Self { opset, ..Self::default() }
    }

    pub(super) fn input(mut self, name: &str, shape: &[usize]) -> Self {
        self.inputs.push((name.to_owned(), shape.to_vec()));
        self
    }

    pub(super) fn ints(self, name: &str, values: &[i64]) -> Self {
        self.ints_of(name, &[values.len()], values)
    }

    pub(super) fn ints_of(mut self, name: &str, shape: &[usize], values: &[i64]) -> Self {
        self.constants.push(TensorProto {
            name: Some(name.to_owned()),
            dims: shape.iter().map(|&d| d as i64).collect(),
            data_type: Some(DataType::Int64 as i32),
            int64_data: values.to_vec(),
            ..TensorProto::default()
        });
        self
    }

    pub(super) fn floats(mut self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        self.constants.push(TensorProto {
            name: Some(name.to_owned()),
            dims: shape.iter().map(|&d| d as i64).collect(),
            data_type: Some(DataType::Float as i32),
            float_data: values.to_vec(),
            ..TensorProto::default()
        });
        self
    }

    pub(super) fn node(self, op: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> Self {
        self.node_to(op, inputs, &["y"], attributes)
    }

    pub(super) fn node_to(
        mut self,
        op: &str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: Vec<AttributeProto>,
    ) -> Self {
        let n_before = self.nodes.iter().filter(|n| n.op_type() == op).count();
        self.nodes.push(NodeProto {
            op_type: Some(op.to_owned()),
            name: Some(format!("{op} {n_before}")),
            input: inputs.iter().map(|&i| i.to_owned()).collect(),
            output: outputs.iter().map(|&o| o.to_owned()).collect(),
            attribute: attributes,
            ..NodeProto::default()
        });
        self
    }

    pub(super) fn prepared(&self) -> Prepared {
        let model = ModelProto {
            ir_version: Some(8),
            opset_import: vec![OperatorSetIdProto { domain: None, version: Some(self.opset) }],
            graph: Some(GraphProto {
                name: Some("test".to_owned()),
                node: self.nodes.clone(),
                initializer: self.constants.clone(),
                input: self.inputs.iter().map(|(name, shape)| value(name, shape)).collect(),
                output: vec![output()],
                ..GraphProto::default()
            }),
            ..ModelProto::default()
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("test.onnx");
        fs_err::write(&path, model.encode_to_vec()).unwrap();
        let graph = Graph::load(&path).unwrap();
        let binding = Binding::find(&graph, &Checkpoint::default()).unwrap();
        Prepared::new(&graph, &binding).unwrap()
    }

    pub(super) fn forward(&self) -> Forward {
        let scratch = tempfile::tempdir().unwrap();
        Forward::new(runtime(), &self.prepared(), &[], &[], scratch.path())
            .unwrap_or_else(|e| panic!("{:?}: {e}", self.nodes))
    }
}

/// The output: a float tensor of whatever shape.
fn output() -> ValueInfoProto {
    let tensor = type_proto::Tensor { elem_type: Some(DataType::Float as i32), shape: None };
    let r#type = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), denotation: None };
    ValueInfoProto { name: Some("y".to_owned()), r#type: Some(r#type), ..ValueInfoProto::default() }
}

fn value(name: &str, shape: &[usize]) -> ValueInfoProto {
    let dimension =
        |&d: &usize| Dimension { value: Some(DimensionValue::DimValue(d as i64)), denotation: None };
    let shape = TensorShapeProto { dim: shape.iter().map(dimension).collect() };
    let tensor = type_proto::Tensor { elem_type: Some(DataType::Float as i32), shape: Some(shape) };
    let r#type = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), denotation: None };
    ValueInfoProto { name: Some(name.to_owned()), r#type: Some(r#type), ..ValueInfoProto::default() }
}

pub(super) fn int(name: &str, value: i64) -> AttributeProto {
    attribute(name, AttributeType::Int, |a| a.i = Some(value))
}

pub(super) fn ints(name: &str, values: &[i64]) -> AttributeProto {
    attribute(name, AttributeType::Ints, |a| a.ints = values.to_vec())
}

pub(super) fn float(name: &str, value: f32) -> AttributeProto {
    attribute(name, AttributeType::Float, |a| a.f = Some(value))
}

pub(super) fn text(name: &str, value: &str) -> AttributeProto {
    attribute(name, AttributeType::String, |a| a.s = Some(value.as_bytes().to_vec().into()))
}

fn attribute(name: &str, kind: AttributeType, set: impl FnOnce(&mut AttributeProto)) -> AttributeProto {
    let mut attribute = AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(kind as i32),
        ..AttributeProto::default()
    };
    set(&mut attribute);
    attribute
}

/// Numbers that look random and are the same everywhere, between −1 and 1.
pub(super) struct Numbers(pub(super) u64);

impl Numbers {
    pub(super) fn next(&mut self) -> f32 {
        (splitmix64(&mut self.0) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(super) fn array(&mut self, shape: &[usize]) -> ArrayD<f32> {
        ArrayD::from_shape_simple_fn(IxDyn(shape), || self.next())
    }
}

/// Steele, Lea and Flood 2014.
pub(super) fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A differentiated graph with its session.
pub(super) struct Running {
    pub(super) graph: Differentiated,
    session: Session,
}

pub(super) type Feeds = Vec<(String, ArrayD<f32>)>;

impl Running {
    pub(super) fn new(graph: Differentiated) -> Self {
        let session = runtime()
            .session(graph.prepared(), &Checkpoint::default(), SessionOptions::default())
            .unwrap_or_else(|e| panic!("{e}"));
        Self { graph, session }
    }

    pub(super) fn run(&mut self, feeds: &Feeds) -> HashMap<String, ArrayD<f32>> {
        let inputs: Vec<(&str, Input<'_>)> =
            feeds.iter().map(|(name, array)| (name.as_str(), Input::from(array.view()))).collect();
        self.session.run(&inputs).unwrap_or_else(|e| panic!("{e}")).into_iter().collect()
    }

    /// Returns the gradient with respect to a variable out of the outputs of a run.
    pub(super) fn gradient(&self, outputs: &HashMap<String, ArrayD<f32>>, variable: &str) -> ArrayD<f32> {
        let gradient = self.graph.gradients().iter().find(|g| g.variable == variable).unwrap();
        match &gradient.output {
            Some(output) => outputs[output].clone(),
            None => ArrayD::zeros(IxDyn(&gradient.shape)),
        }
    }
}

/// Appends the loss Σ r·y for a fixed r.
pub(super) fn weighted(forward: &mut Forward, weights: &ArrayD<f32>) -> Value {
    let y = forward.value("y").unwrap();
    assert_eq!(y.shape, weights.shape());
    let tape = forward.tape();
    let r = tape.floats(&y.shape, weights.as_slice().unwrap());
    let product = tape.mul(&r, &y);
    let axes: Vec<usize> = (0..product.rank()).collect();
    tape.reduce_sum(&product, &axes, false)
}
