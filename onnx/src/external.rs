//! Tensor data that lies in files beside the graph (`model.onnx_data`).
//!
//! All of it is read into memory and put into the tensors, so that the rest of the crate sees one kind of
//! tensor and sessions need no file. A location is a claim by a stranger: it must resolve, symbolic links
//! included, to a file in the folder of the graph, or in the folder that the graph itself is linked from
//! (the Hugging Face cache links both from a folder of blobs).

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use fs_err as fs;
use prost::bytes::Bytes;

use crate::error::GraphError;
use crate::proto::{AttributeProto, DataLocation, DataType, GraphProto, ModelProto, NodeProto, TensorProto};
use crate::tensor::{element_count, shape_of};

/// Puts external data into the tensors that refer to it; returns the files read, by location.
pub(crate) fn inline(
    model: &mut ModelProto,
    graph_path: &Path,
) -> Result<BTreeMap<String, (PathBuf, Bytes)>, GraphError> {
    let mut files = Files { roots: roots(graph_path)?, read: BTreeMap::new() };
    if let Some(graph) = &mut model.graph {
        files.inline_graph(graph)?;
    }
    for function in &mut model.functions {
        files.inline_nodes(&mut function.node)?;
    }
    Ok(files.read)
}

struct Files {
    /// the folder of the graph as given, with links resolved, then the folder where the graph really lies
    roots: [PathBuf; 2],
    read: BTreeMap<String, (PathBuf, Bytes)>,
}

impl Files {
    fn inline_graph(&mut self, graph: &mut GraphProto) -> Result<(), GraphError> {
        for tensor in &mut graph.initializer {
            self.inline_tensor(tensor)?;
        }
        for sparse in &mut graph.sparse_initializer {
            for tensor in sparse.values.iter_mut().chain(sparse.indices.iter_mut()) {
                self.inline_tensor(tensor)?;
            }
        }
        self.inline_nodes(&mut graph.node)
    }

    fn inline_nodes(&mut self, nodes: &mut [NodeProto]) -> Result<(), GraphError> {
        for attribute in nodes.iter_mut().flat_map(|n| n.attribute.iter_mut()) {
            self.inline_attribute(attribute)?;
        }
        Ok(())
    }

    fn inline_attribute(&mut self, attribute: &mut AttributeProto) -> Result<(), GraphError> {
        for tensor in attribute.t.iter_mut().chain(attribute.tensors.iter_mut()) {
            self.inline_tensor(tensor)?;
        }
        for graph in attribute.g.iter_mut().chain(attribute.graphs.iter_mut()) {
            self.inline_graph(graph)?;
        }
        Ok(())
    }

    fn inline_tensor(&mut self, tensor: &mut TensorProto) -> Result<(), GraphError> {
        if tensor.data_location != Some(DataLocation::External as i32) {
            return Ok(());
        }
        let name = tensor.name.clone().unwrap_or_default();
        let reference =
            |reason: &str| GraphError::ExternalReference { tensor: name.clone(), reason: reason.to_owned() };
        let entry = |key: &str| {
            tensor
                .external_data
                .iter()
                .find(|e| e.key.as_deref() == Some(key))
                .and_then(|e| e.value.as_deref())
        };
        let number = |key: &str| match entry(key) {
            None => Ok(None),
            Some(text) => text.parse::<u64>().map(Some).map_err(|_| reference(&format!("{key} is `{text}`"))),
        };
        let location = entry("location").ok_or_else(|| reference("it names no file"))?.to_owned();
        let offset = number("offset")?.unwrap_or(0);
        let length = number("length")?;
        let (path, bytes) = self.file(&name, &location)?;
        let actual = bytes.len() as u64;
        let end = match length {
            Some(length) => {
                offset.checked_add(length).ok_or_else(|| reference("offset and length overflow"))?
            }
            None => actual.max(offset),
        };
        if end > actual {
            return Err(GraphError::ExternalTooShort { tensor: name, path: path.clone(), end, actual });
        }
        let mut range = offset as usize..end as usize;
        let expected = expected_bytes(&name, tensor)?;
        match (expected, length) {
            // Without a length the data goes to the end of the file, or as far as the shape needs.
            (Some(expected), None) if range.len() >= expected => range.end = range.start + expected,
            (Some(expected), _) if range.len() != expected => {
                return Err(GraphError::TensorSize {
                    tensor: name,
                    what: format!("{:?} needs {expected} bytes", tensor.dims),
                    actual: range.len(),
                });
            }
            _ => {}
        }
        tensor.raw_data = Some(bytes.slice(range));
        tensor.data_location = None;
        tensor.external_data.clear();
        Ok(())
    }

    fn file(&mut self, tensor: &str, location: &str) -> Result<(PathBuf, Bytes), GraphError> {
        if let Some(found) = self.read.get(location) {
            return Ok(found.clone());
        }
        let escape =
            || GraphError::ExternalEscape { tensor: tensor.to_owned(), location: location.to_owned() };
        let relative = Path::new(location);
        let plain = relative.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
        if location.is_empty() || !plain {
            return Err(escape());
        }
        let path = self.roots[0].join(relative);
        let real = fs::canonicalize(&path)?;
        if !self.roots.iter().any(|root| real.starts_with(root)) {
            return Err(escape());
        }
        // A fifo or device would block or never end.
        if !fs::metadata(&real)?.is_file() {
            return Err(GraphError::ExternalReference {
                tensor: tensor.to_owned(),
                reason: format!("`{location}` is not a file"),
            });
        }
        let found = (path, Bytes::from(fs::read(&real)?));
        self.read.insert(location.to_owned(), found.clone());
        Ok(found)
    }
}

fn roots(graph_path: &Path) -> Result<[PathBuf; 2], GraphError> {
    let folder = match graph_path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let given = fs::canonicalize(folder)?;
    let real = fs::canonicalize(graph_path)?;
    let linked = real.parent().map_or_else(|| given.clone(), Path::to_path_buf);
    Ok([given, linked])
}

/// Returns how many bytes a tensor's shape and element type need; nothing for types of unusual storage.
fn expected_bytes(name: &str, tensor: &TensorProto) -> Result<Option<usize>, GraphError> {
    let size = match tensor.data_type.and_then(|t| DataType::try_from(t).ok()) {
        Some(DataType::Uint8 | DataType::Int8 | DataType::Bool) => 1,
        Some(DataType::Float16 | DataType::Bfloat16 | DataType::Uint16 | DataType::Int16) => 2,
        Some(DataType::Float | DataType::Int32 | DataType::Uint32) => 4,
        Some(DataType::Double | DataType::Int64 | DataType::Uint64 | DataType::Complex64) => 8,
        Some(DataType::Complex128) => 16,
        _ => return Ok(None),
    };
    let n_values = element_count(name, &shape_of(name, &tensor.dims)?)?;
    n_values.checked_mul(size).map(Some).ok_or_else(|| GraphError::TooLarge { tensor: name.to_owned() })
}
