//! Checkpoints in memory, fixtures, and one ONNX Runtime for all tests.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use merganser_onnx::proto::{
    DataType, Dimension, DimensionValue, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use merganser_onnx::provision::{self, Environment};
use merganser_onnx::{
    Binding, Graph, Input, Optimization, Prepared, Runtime, SessionOptions, Weights, WeightsError,
};
use ndarray::{ArrayD, IxDyn};
use prost::Message;
use safetensors::{Dtype, SafeTensors};

/// A checkpoint that tests can change.
#[derive(Clone, Default)]
pub(crate) struct Checkpoint(pub(crate) BTreeMap<String, (Vec<usize>, Vec<f32>)>);

impl Checkpoint {
    pub(crate) fn read(path: &Path) -> Self {
        let bytes = fs_err::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let floats = tensors.tensors().into_iter().filter_map(|(name, view)| {
            let values = match view.dtype() {
                Dtype::F32 => view.data().as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect(),
                Dtype::F16 => view
                    .data()
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .map(|c| half::f16::from_le_bytes(*c).to_f32())
                    .collect(),
                Dtype::BF16 => view
                    .data()
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .map(|c| half::bf16::from_le_bytes(*c).to_f32())
                    .collect(),
                _ => return None,
            };
            Some((name, (view.shape().to_vec(), values)))
        });
        Self(floats.collect())
    }

    pub(crate) fn with(mut self, name: &str, shape: &[usize], values: Vec<f32>) -> Self {
        self.0.insert(name.to_owned(), (shape.to_vec(), values));
        self
    }

    /// Adds a little to the first value of a tensor.
    pub(crate) fn nudge(mut self, name: &str) -> Self {
        self.0.get_mut(name).unwrap().1[0] += 0.25;
        self
    }
}

impl Weights for Checkpoint {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).map(|(shape, _)| shape.clone())
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        self.0
            .get(name)
            .map(|(_, values)| values.clone())
            .ok_or_else(|| WeightsError { tensor: name.to_owned(), source: "no such tensor".into() })
    }
}

/// Inputs and expected outputs as PyTorch computed them.
pub(crate) struct Io {
    floats: Vec<(String, ArrayD<f32>)>,
    integers: Vec<(String, ArrayD<i64>)>,
}

impl Io {
    pub(crate) fn read(path: &Path) -> Self {
        let bytes = fs_err::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let (mut floats, mut integers) = (Vec::new(), Vec::new());
        for (name, view) in tensors.tensors() {
            let shape = IxDyn(view.shape());
            match view.dtype() {
                Dtype::F32 => {
                    let values =
                        view.data().as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
                    floats.push((name, ArrayD::from_shape_vec(shape, values).unwrap()));
                }
                Dtype::I64 => {
                    let values =
                        view.data().as_chunks::<8>().0.iter().map(|c| i64::from_le_bytes(*c)).collect();
                    integers.push((name, ArrayD::from_shape_vec(shape, values).unwrap()));
                }
                other => panic!("{name} has type {other:?}"),
            }
        }
        Self { floats, integers }
    }

    /// Returns the inputs of a graph; the file may hold more than one graph needs.
    pub(crate) fn inputs(&self, names: &[String]) -> Vec<(&str, Input<'_>)> {
        let wanted = |name: &str| names.iter().any(|n| n == name);
        let floats = self.floats.iter().filter_map(|(name, array)| {
            let name = name.strip_prefix("input.").filter(|n| wanted(n))?;
            Some((name, Input::from(array.view())))
        });
        let integers = self.integers.iter().filter_map(|(name, array)| {
            let name = name.strip_prefix("input.").filter(|n| wanted(n))?;
            Some((name, Input::from(array.view())))
        });
        floats.chain(integers).collect()
    }

    pub(crate) fn expected(&self, weights: &str, output: &str) -> &ArrayD<f32> {
        let name = format!("{weights}.{output}");
        &self.floats.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("no {name}")).1
    }
}

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join("fixtures")
}

/// One `<graph>.<exporter>.onnx` of a folder of fixtures.
pub(crate) struct Fixture {
    pub(crate) folder: PathBuf,
    pub(crate) graph: String,
    pub(crate) exporter: String,
}

impl Fixture {
    pub(crate) fn new(folder: &str, graph: &str, exporter: &str) -> Self {
        Self { folder: fixtures().join(folder), graph: graph.to_owned(), exporter: exporter.to_owned() }
    }

    pub(crate) fn onnx(&self) -> PathBuf {
        self.folder.join(format!("{}.{}.onnx", self.graph, self.exporter))
    }

    pub(crate) fn load(&self) -> Graph {
        Graph::load(&self.onnx()).unwrap()
    }

    pub(crate) fn base(&self) -> Checkpoint {
        Checkpoint::read(&self.folder.join("base.safetensors"))
    }

    pub(crate) fn perturbed(&self) -> Checkpoint {
        Checkpoint::read(&self.folder.join("perturbed.safetensors"))
    }

    pub(crate) fn io(&self) -> Io {
        Io::read(&self.folder.join(format!("{}.io.safetensors", self.graph)))
    }

    pub(crate) fn truth(&self) -> serde_json::Value {
        let path = self.folder.join(format!("{}.{}.binding.json", self.graph, self.exporter));
        serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap()
    }

    /// Runs a model in the graph and returns the largest error of any output, relative to its largest value.
    pub(crate) fn error(&self, model: &Checkpoint, weights: &str, optimization: Optimization) -> f32 {
        let (graph, base, io) = (self.load(), self.base(), self.io());
        let binding = Binding::find(&graph, &base).unwrap();
        assert_eq!(binding.check(model, &base).unwrap(), [], "{}", self.onnx().display());
        let prepared = Prepared::new(&graph, &binding).unwrap();
        let options = SessionOptions { optimization, ..SessionOptions::default() };
        let mut session = runtime().session(&prepared, model, options).unwrap();
        let names: Vec<String> = session.input_names().map(str::to_owned).collect();
        let outputs = session.run(&io.inputs(&names)).unwrap();
        assert!(!outputs.is_empty());
        outputs
            .iter()
            .map(|(name, actual)| relative_error(actual, io.expected(weights, name)))
            .fold(0.0, f32::max)
    }
}

pub(crate) fn relative_error(actual: &ArrayD<f32>, expected: &ArrayD<f32>) -> f32 {
    assert_eq!(actual.shape(), expected.shape());
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let error = actual.iter().zip(expected).map(|(a, b)| (a - b).abs());
    // A NaN must not pass as a small error.
    error.fold(0.0f32, |m, e| if e.is_nan() { f32::INFINITY } else { m.max(e) }) / largest
}

/// Returns ONNX Runtime as a user would get it: found on this machine, or installed into the user's cache folder.
pub(crate) fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let located = provision::resolve(&user_environment()).unwrap_or_else(|e| panic!("{e}"));
        Runtime::load(&located.path).unwrap()
    })
}

pub(crate) fn user_environment() -> Environment<'static> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME")
        .or_else(|| Some(set("HOME")?.join(".cache")))
        .unwrap_or_else(std::env::temp_dir);
    Environment {
        ort_dylib_path: set("ORT_DYLIB_PATH"),
        python: vec!["python3".into(), "python".into()],
        library_dirs: provision::default_library_dirs(),
        cache_dir: cache.join("merganser"),
        offline: false,
        on_event: &|_| {},
    }
}

/// Returns the folder of test data that does not belong to the repository, or says that `test` is skipped: past the test
/// harness, which hides what passing tests print, and in one piece, so that the lines can be counted.
pub(crate) fn test_data(test: &str) -> Option<PathBuf> {
    let folder =
        std::env::var_os("MERGANSER_TEST_DATA").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    if folder.is_none() {
        let line = format!("skipped: {test} (MERGANSER_TEST_DATA is not set)\n");
        std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).unwrap();
    }
    folder
}

pub(crate) fn node(op: &str, name: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: Some(op.to_owned()),
        name: Some(name.to_owned()),
        input: inputs.iter().map(|&i| i.to_owned()).collect(),
        output: vec![output.to_owned()],
        ..NodeProto::default()
    }
}

pub(crate) fn tensor(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
    TensorProto {
        name: Some(name.to_owned()),
        dims: dims.to_vec(),
        data_type: Some(DataType::Float as i32),
        float_data: values.to_vec(),
        ..TensorProto::default()
    }
}

pub(crate) fn value(name: &str, element: DataType, dims: &[i64]) -> ValueInfoProto {
    let dimension = |d: &i64| Dimension { value: Some(DimensionValue::DimValue(*d)), denotation: None };
    let shape = TensorShapeProto { dim: dims.iter().map(dimension).collect() };
    let tensor = type_proto::Tensor { elem_type: Some(element as i32), shape: Some(shape) };
    let r#type = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), denotation: None };
    ValueInfoProto { name: Some(name.to_owned()), r#type: Some(r#type), ..ValueInfoProto::default() }
}

/// Writes a graph and reads it again.
pub(crate) fn graph_file(
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
    inputs: Vec<ValueInfoProto>,
    outputs: Vec<ValueInfoProto>,
) -> Graph {
    let model = ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
        graph: Some(GraphProto {
            name: Some("test".to_owned()),
            node: nodes,
            initializer: initializers,
            input: inputs,
            output: outputs,
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("test.onnx");
    fs_err::write(&path, model.encode_to_vec()).unwrap();
    Graph::load(&path).unwrap()
}
