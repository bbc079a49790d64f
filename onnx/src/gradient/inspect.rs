//! What only ONNX Runtime can tell about a graph: its simplified form, and types and shapes of all values.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use fs_err as fs;
use ort::session::{RunOptions, Session, SessionInputValue};
use ort::value::{DynValue, Tensor, TensorElementType, ValueType};
use prost::Message;
use prost::bytes::Bytes;

use crate::proto::{DataType, ModelProto, NodeProto, ValueInfoProto};
use crate::runtime::{Optimization, Runtime, SessionOptions};

/// Types and shapes of the values of a graph with fixed shapes.
#[derive(Debug, Default)]
pub(super) struct Values {
    pub(super) elements: HashMap<String, DataType>,
    pub(super) shapes: HashMap<String, Vec<usize>>,
}

/// Returns the model as ONNX Runtime's basic optimizations leave it: standard ops only, constants folded.
///
/// The file that this goes through is made in `scratch` and removed again.
pub(super) fn simplify(runtime: &Runtime, model: &ModelProto, scratch: &Path) -> Result<ModelProto, String> {
    let folder = tempfile::Builder::new().prefix("graph").tempdir_in(scratch).map_err(|e| e.to_string())?;
    let path = folder.path().join("simplified.onnx");
    let options = SessionOptions { optimization: Optimization::Basic, ..SessionOptions::default() };
    let builder = runtime.builder(options)?;
    let mut builder = builder.with_optimized_model_path(&path).map_err(|e| e.to_string())?;
    builder.commit_from_memory(&model.encode_to_vec()).map_err(|e| e.to_string())?;
    let bytes = fs::read(&path).map_err(|e| e.to_string())?;
    ModelProto::decode(Bytes::from(bytes)).map_err(|e| e.to_string())
}

/// Finds the types of all values, and the shapes of all but the inputs: those that ONNX Runtime infers, and the others by running the graph once on
/// zeros.
///
/// `inputs`: names, types and shapes.
pub(super) fn values(
    runtime: &Runtime,
    model: &ModelProto,
    inputs: &[(String, DataType, Vec<usize>)],
) -> Result<Values, String> {
    let names: Vec<String> = model
        .graph
        .iter()
        .flat_map(|g| &g.node)
        .flat_map(|n| &n.output)
        .filter(|o| !o.is_empty())
        .cloned()
        .collect();
    let mut values = inferred(runtime, model, &names)?;
    let names: Vec<String> = names.into_iter().filter(|name| !values.shapes.contains_key(name)).collect();
    if names.is_empty() {
        return Ok(values);
    }
    let mut asking = model.clone();
    let graph = asking.graph.get_or_insert_default();
    graph.output.clear();
    for (i, name) in names.iter().enumerate() {
        let output = shape_output(i);
        graph.output.push(ValueInfoProto { name: Some(output.clone()), ..ValueInfoProto::default() });
        graph.node.push(NodeProto {
            op_type: Some("Shape".to_owned()),
            input: vec![name.clone()],
            output: vec![output],
            ..NodeProto::default()
        });
    }
    let mut session = plain_session(runtime, &asking)?;
    let feeds = inputs
        .iter()
        .map(|(name, element, shape)| {
            Ok((Cow::Borrowed(name.as_str()), zeros(name, *element, shape)?.into()))
        })
        .collect::<Result<Vec<(Cow<'_, str>, SessionInputValue<'_>)>, String>>()?;
    let options = RunOptions::new().map_err(|e| e.to_string())?;
    let outputs = session.run_with_options(feeds, &options).map_err(|e| e.to_string())?;
    for (i, name) in names.into_iter().enumerate() {
        let Some(value) = outputs.get(shape_output(i)) else { continue };
        let (_, dims) = value.try_extract_tensor::<i64>().map_err(|e| e.to_string())?;
        values.shapes.insert(name, dims.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect());
    }
    Ok(values)
}

fn shape_output(i: usize) -> String {
    format!("merganser.shape.{i}")
}

/// Lets ONNX Runtime infer types and shapes of all values: as outputs of a session that is never run.
fn inferred(runtime: &Runtime, model: &ModelProto, names: &[String]) -> Result<Values, String> {
    let mut asking = model.clone();
    let graph = asking.graph.get_or_insert_default();
    graph.output =
        names.iter().map(|n| ValueInfoProto { name: Some(n.clone()), ..ValueInfoProto::default() }).collect();
    let session = plain_session(runtime, &asking)?;
    let mut values = Values::default();
    for output in session.outputs() {
        let ValueType::Tensor { ty, shape, .. } = output.dtype() else { continue };
        if let Some(element) = data_type(*ty) {
            values.elements.insert(output.name().to_owned(), element);
        }
        let shape: Option<Vec<usize>> = shape.iter().map(|&d| usize::try_from(d).ok()).collect();
        // A value whose shape is not known at all looks like a scalar.
        if let Some(shape) = shape.filter(|shape| !shape.is_empty()) {
            values.shapes.insert(output.name().to_owned(), shape);
        }
    }
    Ok(values)
}

fn plain_session(runtime: &Runtime, model: &ModelProto) -> Result<Session, String> {
    let options = SessionOptions { optimization: Optimization::None, ..SessionOptions::default() };
    let mut builder = runtime.builder(options)?;
    builder.commit_from_memory(&model.encode_to_vec()).map_err(|e| e.to_string())
}

fn data_type(element: TensorElementType) -> Option<DataType> {
    Some(match element {
        TensorElementType::Float32 => DataType::Float,
        TensorElementType::Float64 => DataType::Double,
        TensorElementType::Float16 => DataType::Float16,
        TensorElementType::Bfloat16 => DataType::Bfloat16,
        TensorElementType::Int64 => DataType::Int64,
        TensorElementType::Int32 => DataType::Int32,
        TensorElementType::Bool => DataType::Bool,
        _ => return None,
    })
}

fn zeros(name: &str, element: DataType, shape: &[usize]) -> Result<DynValue, String> {
    let n = shape.iter().product();
    let dims: Vec<i64> = shape.iter().map(|&d| d as i64).collect();
    let value = match element {
        DataType::Float => Tensor::from_array((dims, vec![0f32; n])).map(Tensor::into_dyn),
        DataType::Double => Tensor::from_array((dims, vec![0f64; n])).map(Tensor::into_dyn),
        DataType::Int64 => Tensor::from_array((dims, vec![0i64; n])).map(Tensor::into_dyn),
        DataType::Int32 => Tensor::from_array((dims, vec![0i32; n])).map(Tensor::into_dyn),
        DataType::Bool => Tensor::from_array((dims, vec![false; n])).map(Tensor::into_dyn),
        other => return Err(format!("input `{name}` has type {other:?}, which is not supported here")),
    };
    value.map_err(|e| e.to_string())
}
