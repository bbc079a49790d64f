//! `onnx`: a graph with the model's weights in it, packed ones as codes, as ONNX Runtime runs it.
//!
//! The weights that the file computes with are those of the model to the bit (`merganser_onnx::quantized` says in which forms). The binding
//! to the graph is that of evaluations. With statistics, layers with eight-bit weights read their inputs through bytes of fixed ranges, the
//! extremes that calibration has seen: then both sides of their products are integers.

use super::{ExportedForm, ExportedGraph, Format, included, write_included, write_whole};
use crate::calibrate::Calibration;
use crate::evaluate::graph_files;
use crate::kind::{
    Connection, Content, MethodDoc, Ports, SourceSet, Stage, Unit, narrow_to_members, per_member,
};
use crate::params::{FilePath, OutputPath, Params, Problem, one_map, parse, to_value};
use crate::{Draft, Job, JobInput, StageError, checkpoint, names, services};
use merganser_cache::Value;
use merganser_onnx::quantized::{Choices, DATA_FILE, Form, Range, Written, write_model};
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

pub(super) struct Onnx;

/// The file of a graph.
const FILE: &str = "model.onnx";

/// How packed weights are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Weights {
    /// Eight bits as `dequantize-linear`, four bits in blocks as `matmul-nbits`, all else `unpacked`.
    #[default]
    Auto,
    /// `DequantizeLinear` on int8: eight bits, one step per tensor or output channel.
    DequantizeLinear,
    /// `MatMulNBits` of ONNX Runtime: 2, 4 or 8 bits in blocks of 16 to 256 along the inputs of a layer.
    #[serde(rename = "matmul-nbits")]
    MatMulNBits,
    /// Unpacked by standard operators when the file is loaded: any width, as fast as in single precision.
    Unpacked,
    /// Single precision.
    Floats,
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct OnnxParams {
    /// The ONNX export that the weights are put into.
    graph: FilePath,
    /// The folder to write to; a collection gets a folder per member inside it (default: only the cache). Existing files of the same names
    /// are replaced.
    #[serde(default, skip_serializing)]
    to: Option<OutputPath>,
    /// How packed weights are stored where that is exact: `auto`, `dequantize-linear`, `matmul-nbits`, `unpacked` or `floats`.
    #[serde(default)]
    weights: Weights,
    /// Files to put beside the graph, such as `preprocessor_config.json`.
    #[serde(default)]
    include: Vec<FilePath>,
}

impl Format for Onnx {
    fn document(&self) -> MethodDoc {
        MethodDoc {
            id: "onnx",
            summary: "an ONNX graph with the model's weights in it, packed ones as codes",
            formula: "the graph's own, with ŵ = (q − z)·Δ for packed weights; with port `statistics` also x̂ = (clamp(round(x/Δ) + z, 0, 255) − z)·Δ, Δ = (max − min)/255, for the inputs of layers with eight-bit weights",
            source: "onnx.ai/onnx/operators: DequantizeLinear, QuantizeLinear; ONNX Runtime ContribOperators: com.microsoft.MatMulNBits; ranges: Jacob et al., arXiv:1712.05877, §2.1",
            schema: schema_for!(OnnxParams),
        }
    }

    fn parse(&self, params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        Ok(Box::new(OnnxStage { params: parse(&params)? }))
    }
}

struct OnnxStage {
    params: OnnxParams,
}

impl Stage for OnnxStage {
    fn version(&self) -> u32 {
        2
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        let connected = |port: &str| inputs.iter().find(|input| input.port == port);
        match connected("origin") {
            None => {
                let message =
                    "format `onnx` needs the checkpoint that the graph was exported from on port `origin`";
                return Err(Problem::new("missing-port", message));
            }
            Some(origin) if origin.members.is_some() => {
                return Err(Problem::new(
                    "wrong-type",
                    "port `origin` takes one checkpoint, not a collection",
                ));
            }
            Some(_) => {}
        }
        let takes_bytes = matches!(self.params.weights, Weights::Auto | Weights::DequantizeLinear);
        if connected("statistics").is_some() && !takes_bytes {
            let message = "with port `statistics`, `weights` must be `auto` or `dequantize-linear`: only these compute with integers";
            return Err(Problem::new("bad-value", message));
        }
        match connected("model").map(|model| model.content) {
            Some(Content::TaskVectors) => {
                Err(Problem::new("wrong-type", "format `onnx` takes a checkpoint, not task vectors")
                    .help("`merge` adds task vectors to their base"))
            }
            _ => Ok(Content::Graph),
        }
    }

    fn units(&self, inputs: &[Connection], ports: &Ports) -> Result<Vec<Unit>, Problem> {
        let mut units = per_member(inputs, ports)?;
        narrow_to_members(&mut units, inputs, "statistics");
        Ok(units)
    }

    fn parameters(&self, _: &Unit) -> Result<Value, StageError> {
        Ok(one_map([Value::map([("format", "onnx")]), to_value(&self.params)?]))
    }

    fn sources(&self, _: &Unit) -> Result<Vec<SourceSet>, StageError> {
        let graph = &self.params.graph;
        if !graph.path.is_file() {
            return Err(StageError::MissingFile { parameter: "graph".to_owned(), path: graph.path.clone() });
        }
        let graph = graph_files("graph", graph);
        Ok(std::iter::once(graph).chain(included(&self.params.include)?).collect())
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        let (model, origin) = (job.input("model")?, job.input("origin")?);
        for source in job.sources_of("graph") {
            job.files.pin(&source.source)?;
        }
        let files: Vec<_> = job.sources_of("graph").collect();
        let known = checkpoint::Weights::new(job.tensors(origin)?);
        // A model with another library's names is bound under those of the origin.
        let weights = checkpoint::Weights::new(names::open_like(job, origin, model)?);
        let statistics: Vec<&JobInput> = job.inputs_on("statistics").collect();
        let calibration = Calibration::open(job, &statistics)?;
        let activations = calibration.as_ref().map(ranges).unwrap_or_default();
        let choices = Choices { prefer: self.prefer(), activations, ..Choices::default() };
        let (graph, binding) = services::bind(&files, &known)?;
        if model.artifact != origin.artifact {
            services::refuse(&graph.path().display().to_string(), &binding.check(&weights, &known)?)?;
        }
        let written = write_model(&graph, &binding, &weights, &choices)?;
        if choices.prefer != Some(Form::Floats) {
            warn_of_floats(job, &written);
        }
        if calibration.is_some() && written.n_integer_layers == 0 {
            job.warn(
                "no layer computes with integers: that takes weights of eight bits with one step per tensor or output channel, \
                 and statistics of this graph",
            );
        }
        let mut blobs = vec![write_whole(job, FILE, &written.model)?];
        if let Some(data) = &written.data {
            blobs.push(write_whole(job, DATA_FILE, data)?);
        }
        write_included(job, &mut blobs)?;
        let manifest = describe(&written).to_json();
        Ok(Draft { manifest, blobs, operands: Vec::new(), sources: Vec::new() })
    }

    fn destination(&self) -> Option<&FilePath> {
        self.params.to.as_ref().map(|to| &to.0)
    }
}

impl OnnxStage {
    fn prefer(&self) -> Option<Form> {
        match self.params.weights {
            Weights::Auto => None,
            Weights::DequantizeLinear => Some(Form::DequantizeLinear),
            Weights::MatMulNBits => Some(Form::MatMulNBits),
            Weights::Unpacked => Some(Form::Unpacked),
            Weights::Floats => Some(Form::Floats),
        }
    }
}

fn ranges(calibration: &Calibration) -> BTreeMap<String, Range> {
    let ranges = calibration.ranges().into_iter();
    ranges.map(|(value, range)| (value.to_owned(), Range { min: range.min, max: range.max })).collect()
}

/// Says which packed tensors are larger in the file than in the store.
fn warn_of_floats(job: &Job<'_>, written: &Written) {
    let floats: Vec<&str> = written
        .tensors
        .iter()
        .filter(|tensor| tensor.was_packed && tensor.form == Form::Floats)
        .map(|tensor| tensor.name.as_str())
        .collect();
    if let [first, rest @ ..] = floats.as_slice() {
        let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
        job.warn(format!(
            "packed tensor `{first}`{more} cannot be stored as codes in this graph: written as floats"
        ));
    }
}

fn describe(written: &Written) -> ExportedGraph {
    let mut forms: BTreeMap<String, ExportedForm> = BTreeMap::new();
    for tensor in &written.tensors {
        let form = match tensor.form {
            Form::DequantizeLinear => "dequantize-linear",
            Form::MatMulNBits => "matmul-nbits",
            Form::Unpacked => "unpacked",
            Form::Floats => "floats",
        };
        let form = forms.entry(form.to_owned()).or_default();
        form.tensors += 1;
        form.bytes += tensor.bytes;
    }
    let f32_bytes = written.tensors.iter().map(|tensor| 4 * tensor.n_values as u64).sum();
    ExportedGraph::new(FILE, f32_bytes, forms, written.n_integer_layers)
}
