//! ONNX Runtime sessions.
//!
//! A model's tensors enter through `AddExternalInitializers`, one call per tensor, and through nothing else:
//! `AddInitializer` is applied after graph optimization and silently computes with the old weights.
//!
//! The library is loaded once per process and never unloaded. It logs nothing (errors come back as values) and
//! sends nothing. Every session has its own threads, which sleep when there is no work.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};
use ndarray::{ArrayD, ArrayViewD, CowArray, IxDyn};
use ort::environment::Environment;
use ort::logging::LogLevel;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{Session as OrtSession, SessionInputValue, SessionOutputs};
use ort::value::{DynValue, Tensor, TensorElementType, TensorRef, ValueType};
use prost::Message;

use crate::kernels;
use crate::prepared::{Prepared, Slot};
use crate::proto::{DataType, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, value_info};
use crate::provider::Provider;
use crate::tensor::{FloatType, Weights, WeightsError};

/// The loaded library.
#[derive(Clone, Debug)]
pub struct Runtime {
    environment: Environment,
}

/// A graph with a model's weights in it, ready to run.
#[derive(Debug)]
pub struct Session {
    inner: OrtSession,
    graph: String,
    inputs: Vec<Expected>,
}

/// Names and values, which lie where ONNX Runtime has put them.
pub type Floats<'o> = Vec<(&'o str, CowArray<'o, f32, IxDyn>)>;

/// What a run has given, where ONNX Runtime has put it.
#[derive(Debug)]
pub struct Outputs<'s> {
    values: SessionOutputs<'s>,
    graph: &'s str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// threads that work on one run, at least 1; default 1
    pub intra_threads: usize,
    /// default `All`
    pub optimization: Optimization,
    /// default `Cpu`
    pub provider: Provider,
    /// which of several devices of the provider; default the first
    pub device: Option<u16>,
}

/// How much ONNX Runtime may rewrite the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Optimization {
    None,
    Basic,
    #[default]
    All,
}

/// Values for one input. They are converted to what the graph wants where that loses no meaning: `f32` to half
/// or double precision, `i64` to `i32` or `f32`.
#[derive(Clone, Debug)]
pub enum Input<'a> {
    F32(ArrayViewD<'a, f32>),
    I64(ArrayViewD<'a, i64>),
}

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("ONNX Runtime cannot be loaded from `{path}`: {reason}")]
    Load { path: PathBuf, reason: String },
    #[error(
        "ONNX Runtime is already loaded from `{loaded}`; a process can load only one, not also `{requested}`"
    )]
    AlreadyLoaded { loaded: PathBuf, requested: PathBuf },
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error("ONNX Runtime cannot use tensor `{tensor}` in `{graph}`: {reason}")]
    Tensor { graph: String, tensor: String, reason: String },
    #[error("ONNX Runtime refuses `{graph}`: {reason}")]
    Session { graph: String, reason: String },
    #[error("`{graph}` has no input `{input}`; its inputs are {expected}")]
    UnknownInput { graph: String, input: String, expected: String },
    #[error("`{graph}` needs input `{input}`")]
    MissingInput { graph: String, input: String },
    #[error("input `{input}` of `{graph}` is {expected}, got {actual}")]
    InputType { graph: String, input: String, expected: String, actual: String },
    #[error("the installed ONNX Runtime cannot use the execution provider `{provider}`: {reason}")]
    Provider { provider: Provider, reason: String },
    #[error("running `{graph}` failed: {reason}")]
    Run { graph: String, reason: String },
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { intra_threads: 1, optimization: Optimization::All, provider: Provider::Cpu, device: None }
    }
}

impl Runtime {
    /// Loads the library, or returns the one that this process has loaded from the same file.
    pub fn load(library: &Path) -> Result<Self, RuntimeError> {
        static LOADED: Mutex<Option<(PathBuf, Environment)>> = Mutex::new(None);
        let load_error = |reason: String| RuntimeError::Load { path: library.to_owned(), reason };
        let path = fs_err::canonicalize(library).map_err(|e| load_error(e.to_string()))?;
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((loaded, environment)) = &*loaded {
            if *loaded != path {
                return Err(RuntimeError::AlreadyLoaded { loaded: loaded.clone(), requested: path });
            }
            return Ok(Self { environment: environment.clone() });
        }
        let builder = ort::init_from(&path).map_err(|e| load_error(e.to_string()))?;
        let environment = builder
            .with_name("merganser")
            .with_telemetry(false)
            .with_logger(Arc::new(|_, _, _, _, _| {}))
            .build()
            .map_err(|e| load_error(e.to_string()))?;
        environment.set_log_level(LogLevel::Error);
        let runtime = Self { environment };
        runtime.register_operators().map_err(load_error)?;
        *loaded = Some((path, runtime.environment.clone()));
        Ok(runtime)
    }

    /// Makes the domain of our ops known to the library.
    ///
    /// The first session with a new domain enters it into a list of the process, and two sessions that are the first at once both try, which is an
    /// error. So the first is this one, of a graph that does nothing, while nobody else has the library yet.
    fn register_operators(&self) -> Result<(), String> {
        let port = |name: &str| value_info(name, DataType::Float, &[1]);
        let node = NodeProto {
            op_type: Some("Identity".to_owned()),
            input: vec!["x".to_owned()],
            output: vec!["y".to_owned()],
            ..NodeProto::default()
        };
        let graph = GraphProto {
            name: Some("nothing".to_owned()),
            node: vec![node],
            input: vec![port("x")],
            output: vec![port("y")],
            ..GraphProto::default()
        };
        let opset = OperatorSetIdProto { domain: None, version: Some(17) };
        let model = ModelProto {
            ir_version: Some(8),
            opset_import: vec![opset],
            graph: Some(graph),
            ..ModelProto::default()
        };
        let mut builder = self.builder(SessionOptions::default())?;
        builder.commit_from_memory(&model.encode_to_vec()).map(drop).map_err(|error| error.to_string())
    }

    /// Returns what the library says about its build.
    pub fn build_info(&self) -> &'static str {
        ort::info()
    }

    /// Builds a session of a graph with the tensors of `model`, which [`Binding::check`](crate::Binding::check)
    /// must have accepted.
    pub fn session(
        &self,
        prepared: &Prepared,
        model: &dyn Weights,
        options: SessionOptions,
    ) -> Result<Session, RuntimeError> {
        let name = prepared.name().to_owned();
        let refused = |reason: String| RuntimeError::Session { graph: name.clone(), reason };
        let mut builder = on_provider(self.builder(options).map_err(refused)?, options)?;
        if prepared.is_gradient() {
            // A plan of all memory is made from a first run, whose memory is kept beside what is planned: nearly twice as much.
            builder = builder.with_memory_pattern(false).map_err(|e| refused(e.to_string()))?;
        }
        for (slot, values) in prepared.slots().iter().zip(prepared.values(model)?) {
            let tensor_error = |reason: String| RuntimeError::Tensor {
                graph: name.clone(),
                tensor: slot.name.clone(),
                reason,
            };
            let value = slot_value(slot, values).map_err(|e| tensor_error(e.to_string()))?;
            builder = builder
                .with_external_initializer(&slot.name, value)
                .map_err(|e| tensor_error(e.to_string()))?;
        }
        let session = builder.commit_from_memory(prepared.bytes()).map_err(|e| refused(e.to_string()))?;
        Ok(Session::new(session, name))
    }

    /// Builds a session of a graph as it is, with its own weights. `data` holds the data files that it refers to, by their names; no
    /// other file is opened. `name` is for messages.
    pub fn open(
        &self,
        name: &str,
        model: &[u8],
        data: &[(String, Arc<[u8]>)],
        options: SessionOptions,
    ) -> Result<Session, RuntimeError> {
        let refused = |reason: String| RuntimeError::Session { graph: name.to_owned(), reason };
        // ONNX Runtime turns int8 weights between floats into a product that rounds the other side to int8 as well, unless it is told that
        // products are in single precision. What runs is what the file says.
        let mut builder = on_provider(self.builder(options).map_err(refused)?, options)?
            .with_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
            .map_err(|e| refused(e.to_string()))?;
        for (file, bytes) in data {
            builder = builder
                .with_external_initializer_file_in_memory(file, Arc::clone(bytes))
                .map_err(|e| refused(e.to_string()))?;
        }
        let session = builder.commit_from_memory(model).map_err(|e| refused(e.to_string()))?;
        Ok(Session::new(session, name.to_owned()))
    }

    pub(crate) fn builder(&self, options: SessionOptions) -> Result<SessionBuilder, String> {
        let level = match options.optimization {
            Optimization::None => GraphOptimizationLevel::Disable,
            Optimization::Basic => GraphOptimizationLevel::Level1,
            Optimization::All => GraphOptimizationLevel::All,
        };
        #[expect(clippy::result_large_err, reason = "the error type is the library's")]
        let configure = |builder: SessionBuilder| -> Result<SessionBuilder, ort::Error<SessionBuilder>> {
            builder
                .with_optimization_level(level)?
                .with_intra_threads(options.intra_threads.max(1))?
                .with_inter_threads(1)?
                .with_parallel_execution(false)?
                // Spinning threads are faster only on an idle machine, and here stages run side by side.
                .with_intra_op_spinning(false)?
                .with_inter_op_spinning(false)?
                .with_deterministic_compute(true)?
                .with_log_level(LogLevel::Error)
        };
        let operators = kernels::domain(options.intra_threads.max(1)).map_err(|e| e.to_string())?;
        let builder = OrtSession::builder(&self.environment).map_err(|e| e.to_string())?;
        let builder = configure(builder).map_err(|e| e.to_string())?;
        builder.with_operators(operators).map_err(|e| e.to_string())
    }
}

/// Adds the execution provider that was asked for.
fn on_provider(builder: SessionBuilder, options: SessionOptions) -> Result<SessionBuilder, RuntimeError> {
    let providers = options.provider.dispatch(options.device);
    if providers.is_empty() {
        return Ok(builder);
    }
    builder
        .with_execution_providers(providers)
        .map_err(|error| RuntimeError::Provider { provider: options.provider, reason: error.to_string() })
}

impl Session {
    fn new(inner: OrtSession, graph: String) -> Self {
        let inputs = inner.inputs().iter().map(|i| Expected::new(i.name(), i.dtype())).collect();
        Self { inner, graph, inputs }
    }

    pub fn input_names(&self) -> impl Iterator<Item = &str> {
        self.inputs.iter().map(|i| i.name.as_str())
    }

    pub fn output_names(&self) -> impl Iterator<Item = &str> {
        self.inner.outputs().iter().map(ort::value::Outlet::name)
    }

    /// Returns how many items an input takes at once, if its first dimension is fixed.
    pub fn fixed_batch(&self, input: &str) -> Option<usize> {
        let expected = self.inputs.iter().find(|i| i.name == input)?;
        usize::try_from(*expected.dimensions.first()?).ok()
    }

    /// Runs the graph; every input must be given. Returns all float outputs, in the graph's order.
    ///
    /// Takes `&mut self` because the `ort` crate does; several sessions run in parallel, one does not.
    pub fn run(&mut self, inputs: &[(&str, Input<'_>)]) -> Result<Vec<(String, ArrayD<f32>)>, RuntimeError> {
        let outputs = self.outputs(inputs)?;
        let floats = outputs.floats()?.into_iter();
        Ok(floats.map(|(name, array)| (name.to_owned(), array.into_owned())).collect())
    }

    /// Runs the graph like [`run`](Self::run), and keeps the outputs where they lie. The inputs are free again.
    pub fn outputs(&mut self, inputs: &[(&str, Input<'_>)]) -> Result<Outputs<'_>, RuntimeError> {
        let converted =
            inputs.iter().map(|(name, input)| self.convert(name, input)).collect::<Result<Vec<_>, _>>()?;
        if let Some(missing) = self.inputs.iter().find(|e| inputs.iter().all(|(name, _)| *name != e.name)) {
            return Err(RuntimeError::MissingInput {
                graph: self.graph.clone(),
                input: missing.name.clone(),
            });
        }
        let graph = &self.graph;
        let run_error = |e: ort::Error| RuntimeError::Run { graph: graph.clone(), reason: e.to_string() };
        let values = inputs
            .iter()
            .zip(&converted)
            .map(|((name, _), value)| Ok((Cow::Borrowed(*name), value.as_input()?)))
            .collect::<Result<Vec<_>, ort::Error>>()
            .map_err(run_error)?;
        let values = self.inner.run(values).map_err(run_error)?;
        Ok(Outputs { values, graph })
    }

    fn convert<'a>(&self, name: &str, input: &'a Input<'_>) -> Result<Converted<'a>, RuntimeError> {
        let Some(expected) = self.inputs.iter().find(|e| e.name == name) else {
            let expected = self.inputs.iter().map(|e| format!("`{}`", e.name)).collect::<Vec<_>>().join(", ");
            return Err(RuntimeError::UnknownInput {
                graph: self.graph.clone(),
                input: name.to_owned(),
                expected,
            });
        };
        let wrong = || RuntimeError::InputType {
            graph: self.graph.clone(),
            input: name.to_owned(),
            expected: expected.to_string(),
            actual: describe(input),
        };
        let shape = match input {
            Input::F32(view) => view.shape(),
            Input::I64(view) => view.shape(),
        };
        if !expected.accepts(shape) {
            return Err(wrong());
        }
        let narrow = |v: i64| i32::try_from(v).map_err(|_| wrong());
        Ok(match (input, expected.element) {
            (Input::F32(view), Some(TensorElementType::Float32)) => Converted::F32(view.as_standard_layout()),
            (Input::F32(view), Some(TensorElementType::Float16)) => Converted::F16(view.mapv(f16::from_f32)),
            (Input::F32(view), Some(TensorElementType::Bfloat16)) => {
                Converted::Bf16(view.mapv(bf16::from_f32))
            }
            (Input::F32(view), Some(TensorElementType::Float64)) => Converted::F64(view.mapv(f64::from)),
            (Input::I64(view), Some(TensorElementType::Int64)) => Converted::I64(view.as_standard_layout()),
            (Input::I64(view), Some(TensorElementType::Float32)) => {
                Converted::F32(CowArray::from(view.mapv(|v| v as f32)))
            }
            (Input::I64(view), Some(TensorElementType::Int32)) => {
                let values = view.iter().map(|&v| narrow(v)).collect::<Result<Vec<_>, _>>()?;
                Converted::I32(ArrayD::from_shape_vec(IxDyn(shape), values).expect("one value per element"))
            }
            _ => return Err(wrong()),
        })
    }
}

impl Outputs<'_> {
    /// Returns all float outputs, in the graph's order, without copying those that are `f32`.
    pub fn floats(&self) -> Result<Floats<'_>, RuntimeError> {
        let run_error =
            |e: ort::Error| RuntimeError::Run { graph: self.graph.to_owned(), reason: e.to_string() };
        let mut floats = Vec::new();
        for name in self.values.keys() {
            if let Some(array) = float_array(&self.values[name]).map_err(run_error)? {
                floats.push((name, array));
            }
        }
        Ok(floats)
    }
}

impl<'a> From<ArrayViewD<'a, f32>> for Input<'a> {
    fn from(view: ArrayViewD<'a, f32>) -> Self {
        Self::F32(view)
    }
}

impl<'a> From<ArrayViewD<'a, i64>> for Input<'a> {
    fn from(view: ArrayViewD<'a, i64>) -> Self {
        Self::I64(view)
    }
}

/// Type and shape that the graph declares for an input.
#[derive(Debug)]
struct Expected {
    name: String,
    element: Option<TensorElementType>,
    /// -1 where the dimension is free
    dimensions: Vec<i64>,
}

impl Expected {
    fn new(name: &str, value_type: &ValueType) -> Self {
        let (element, dimensions) = match value_type {
            ValueType::Tensor { ty, shape, .. } => (Some(*ty), shape.iter().copied().collect()),
            _ => (None, Vec::new()),
        };
        Self { name: name.to_owned(), element, dimensions }
    }

    fn accepts(&self, shape: &[usize]) -> bool {
        self.dimensions.len() == shape.len()
            && self.dimensions.iter().zip(shape).all(|(&d, &n)| d < 0 || d == n as i64)
    }
}

impl std::fmt::Display for Expected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.element {
            Some(element) => write!(f, "{element} {:?} (-1: any size)", self.dimensions),
            None => f.write_str("not a tensor"),
        }
    }
}

enum Converted<'a> {
    F32(CowArray<'a, f32, IxDyn>),
    F16(ArrayD<f16>),
    Bf16(ArrayD<bf16>),
    F64(ArrayD<f64>),
    I64(CowArray<'a, i64, IxDyn>),
    I32(ArrayD<i32>),
}

impl Converted<'_> {
    fn as_input(&self) -> ort::Result<SessionInputValue<'_>> {
        Ok(match self {
            Self::F32(array) => TensorRef::from_array_view(array)?.into(),
            Self::F16(array) => TensorRef::from_array_view(array)?.into(),
            Self::Bf16(array) => TensorRef::from_array_view(array)?.into(),
            Self::F64(array) => TensorRef::from_array_view(array)?.into(),
            Self::I64(array) => TensorRef::from_array_view(array)?.into(),
            Self::I32(array) => TensorRef::from_array_view(array)?.into(),
        })
    }
}

fn slot_value(slot: &Slot, values: Vec<f32>) -> ort::Result<DynValue> {
    let shape: Vec<i64> = slot.shape.iter().map(|&d| d as i64).collect();
    Ok(match slot.element {
        FloatType::F32 => Tensor::from_array((shape, values))?.into_dyn(),
        FloatType::F64 => {
            Tensor::from_array((shape, values.into_iter().map(f64::from).collect::<Vec<_>>()))?.into_dyn()
        }
        FloatType::F16 => {
            Tensor::from_array((shape, values.into_iter().map(f16::from_f32).collect::<Vec<_>>()))?.into_dyn()
        }
        FloatType::Bf16 => {
            Tensor::from_array((shape, values.into_iter().map(bf16::from_f32).collect::<Vec<_>>()))?
                .into_dyn()
        }
    })
}

/// Returns an output as `f32`; nothing for outputs that are not floats.
fn float_array(value: &DynValue) -> ort::Result<Option<CowArray<'_, f32, IxDyn>>> {
    let ValueType::Tensor { ty, .. } = value.dtype() else { return Ok(None) };
    Ok(Some(match ty {
        TensorElementType::Float32 => value.try_extract_array::<f32>()?.into(),
        TensorElementType::Float16 => value.try_extract_array::<f16>()?.mapv(f16::to_f32).into(),
        TensorElementType::Bfloat16 => value.try_extract_array::<bf16>()?.mapv(bf16::to_f32).into(),
        TensorElementType::Float64 => value.try_extract_array::<f64>()?.mapv(|v| v as f32).into(),
        _ => return Ok(None),
    }))
}

fn describe(input: &Input) -> String {
    match input {
        Input::F32(view) => format!("f32 {:?}", view.shape()),
        Input::I64(view) => format!("i64 {:?}", view.shape()),
    }
}
