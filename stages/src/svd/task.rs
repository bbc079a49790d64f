//! Task mode: per parameter, the singular value decomposition of the matrix whose columns are the task vectors.
//!
//! One streaming pass over all task vectors gives their inner products, from which everything else follows; the directions
//! themselves stay a view (`store = "factors"`) unless they are asked for (`store = "basis"`): then they are computed in a second
//! pass and stored, rounded, and whatever uses the basis uses what is stored.

use super::backend::{Backend, failed};
use super::decompose::{RankRule, factors};
use super::{Decomposition, Mode};
use crate::factors::{Columns, Factors, MASKS, MaskIndex, Region, TASK};
use crate::filter::NameFilter;
use crate::gram::{ParameterGram, Place, TaskVectors};
use crate::kind::{Connection, Take, Unit};
use crate::params::{Params, Problem, parse, to_value};
use crate::{Content, Draft, Job, StageError, checkpoint, diff};
use merganser_cache::Value;
use merganser_tensors::kernels::reduce::{MinMax, chunk_min_max};
use merganser_tensors::manifest::{self, Link};
use merganser_tensors::stream::over_blocks;
use merganser_tensors::writer::{Block, OutputTensor, Payload};
use merganser_tensors::{Bits, DType, Encoding, TensorInfo};
use rayon::prelude::*;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

pub(super) struct TaskMode;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TaskParams {
    /// The share of the energy Σσ² that the high-energy directions keep, 0 to 1: k is the smallest rank that reaches it.
    #[serde(default = "usual_energy")]
    energy: f64,
    /// The largest k, at least 1.
    #[serde(default = "usual_max_rank")]
    max_rank: usize,
    /// Whether the mean of the task vectors is taken out first, and kept apart.
    #[serde(default = "yes")]
    center: bool,
    /// Whether the entries that the mask does not keep have a basis of their own; otherwise they contribute nothing.
    #[serde(default)]
    include_noise: bool,
    /// Regions of a masked parameter with fewer entries contribute nothing.
    #[serde(default = "usual_min_mask_size")]
    min_mask_size: usize,
    /// `factors`: small matrices only, the directions are computed from the task vectors when they are used; `basis`: the directions
    /// too, so that models can be rebuilt without the task vectors.
    #[serde(default)]
    store: Store,
    /// How a stored basis is rounded: `fp16` or `fp32`.
    #[serde(default)]
    precision: Precision,
    /// Bits per entry of a stored basis, 1 to 8, instead of `precision`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    basis_bits: Option<u8>,
    /// Who computes eigenvectors: `faer`, or `lapack` in builds that have it.
    #[serde(default)]
    backend: Backend,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Store {
    #[default]
    Factors,
    Basis,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Precision {
    #[default]
    Fp16,
    Fp32,
}

fn usual_energy() -> f64 {
    0.95
}

fn usual_max_rank() -> usize {
    64
}

fn yes() -> bool {
    true
}

fn usual_min_mask_size() -> usize {
    10
}

impl Mode for TaskMode {
    fn id(&self) -> &'static str {
        "task"
    }

    fn summary(&self) -> &'static str {
        "per parameter, the directions that all task vectors together span"
    }

    fn formula(&self) -> &'static str {
        "M = [τ_1 − μ … τ_T − μ] = UΣVᵀ, from MᵀM = VΣ²Vᵀ; k = min{k : Σ_{i≤k} σ_i² ≥ energy · Σ σ_i²}; U = MVΣ⁻¹, a direction with σ = 0 is 0; in each column of V the entry of largest magnitude is positive"
    }

    fn source(&self) -> &'static str {
        "SVD-Hybrid, mgradyn/SVD-Quantization-Task-Merging, src/svd_hybrid/basis.py"
    }

    fn schema(&self) -> Schema {
        schema_for!(TaskParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Decomposition>, Vec<Problem>> {
        let parsed: TaskParams = parse(params)?;
        let at = |key: &str| params.table.get(key).map_or(params.span, |entry| entry.node.span);
        let mut problems = Vec::new();
        let mut refuse = |key: &str, message: String| {
            problems.push(Problem::new("bad-value", message).at(at(key)));
        };
        if !(0.0..=1.0).contains(&parsed.energy) {
            refuse("energy", format!("`energy` must be between 0 and 1, got {}", parsed.energy));
        }
        if parsed.max_rank == 0 {
            refuse("max_rank", "`max_rank` must be at least 1, got 0".to_owned());
        }
        if let Some(bits) = parsed.basis_bits {
            if !(1..=8).contains(&bits) {
                refuse("basis_bits", format!("`basis_bits` must be 1 to 8, got {bits}"));
            }
            if parsed.store == Store::Factors {
                refuse("basis_bits", "`basis_bits` needs `store = \"basis\"`".to_owned());
            }
        }
        if let Err(problem) = parsed.backend.check() {
            problems.push(problem.at(at("backend")));
        }
        if problems.is_empty() { Ok(Box::new(parsed)) } else { Err(problems) }
    }
}

/// A parameter and what was found out about it.
struct Parameter {
    info: TensorInfo,
    place: Place,
    gram: ParameterGram,
    /// Signal and noise; `None` where the region contributes nothing.
    factors: [Option<Factors>; 2],
}

/// What an output tensor holds.
enum Output {
    /// A small matrix of f64.
    Numbers(Vec<f64>),
    /// The directions of a parameter's region.
    Basis(usize, Region),
}

impl Decomposition for TaskParams {
    fn version(&self) -> u32 {
        2
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        if inputs.iter().any(|input| input.port == "masks" && input.members.is_some()) {
            let message = "port `masks` takes one mask for all tasks, not one per task";
            return Err(Problem::new("wrong-type", message)
                .help("`combine` of the mask stage makes one of them, such as `combine = \"union\"`"));
        }
        Ok(Content::Basis)
    }

    fn units(&self, inputs: &[Connection]) -> Result<Vec<Unit>, Problem> {
        let take = |input: &Connection| Take { port: input.port.clone(), member: None };
        Ok(vec![Unit { member: None, part: None, takes: inputs.iter().map(take).collect() }])
    }

    fn parameters(&self) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn run(&self, job: &Job<'_>, filter: &NameFilter) -> Result<Draft, StageError> {
        let vectors = open(job)?;
        let n_tasks = vectors.sources.len();
        let (infos, places) = places(&vectors, filter)?;
        let grams = vectors.grams(&places)?;
        let found: Result<Vec<Parameter>, StageError> = infos
            .into_iter()
            .zip(places)
            .zip(grams)
            .collect::<Vec<_>>()
            .into_par_iter()
            .map(|((info, place), gram)| {
                let factors = [
                    self.factors(&info, place.mask.is_some(), &gram.signal, gram.n_signal, n_tasks)?,
                    if self.include_noise && place.mask.is_some() {
                        self.factors(&info, true, &gram.noise, gram.n_noise, n_tasks)?
                    } else {
                        None
                    },
                ];
                Ok(Parameter { info, place, gram, factors })
            })
            .collect();
        self.store(job, &vectors, &found?)
    }
}

impl TaskParams {
    fn factors(
        &self,
        info: &TensorInfo,
        is_masked: bool,
        gram: &[f64],
        n_entries: usize,
        n_tasks: usize,
    ) -> Result<Option<Factors>, StageError> {
        if n_entries == 0 || (is_masked && n_entries < self.min_mask_size) {
            return Ok(None);
        }
        let rule = RankRule { energy: self.energy, max_rank: self.max_rank };
        let found = factors(gram, n_tasks, n_entries, self.center, rule, self.backend.algebra());
        found.map(Some).map_err(|error| failed(&format!("parameter `{}`", info.name), &error))
    }

    /// Writes the artifact.
    fn store(
        &self,
        job: &Job<'_>,
        vectors: &TaskVectors,
        parameters: &[Parameter],
    ) -> Result<Draft, StageError> {
        let n_tasks = vectors.sources.len();
        let mut outputs = Vec::new();
        let mut contents = Vec::new();
        for (index, parameter) in parameters.iter().enumerate() {
            let name = &parameter.info.name;
            let grams = [&parameter.gram.signal, &parameter.gram.noise];
            for ((region, factors), gram) in Region::ALL.into_iter().zip(&parameter.factors).zip(grams) {
                if region == Region::Noise && parameter.place.mask.is_none() {
                    continue;
                }
                let mut numbers = |part: &str, shape: Vec<usize>, values: Vec<f64>| {
                    let payload = Payload::Bytes(DType::F64);
                    outputs.push(OutputTensor { name: region.tensor(name, part), shape, payload });
                    contents.push(Output::Numbers(values));
                };
                numbers("gram", vec![n_tasks, n_tasks], gram.clone());
                let Some(factors) = factors else { continue };
                let width = factors.sigma.len();
                numbers("sigma", vec![width], factors.sigma.clone());
                numbers("directions", vec![width, n_tasks], factors.directions.clone());
                numbers("rank", vec![2], vec![factors.rank as f64, factors.n_entries as f64]);
                if self.store == Store::Basis {
                    let payload = Payload::Values(if self.precision == Precision::Fp32 {
                        DType::F32
                    } else {
                        DType::F16
                    });
                    let shape = vec![factors.n_entries, width];
                    outputs.push(OutputTensor { name: region.tensor(name, "basis"), shape, payload });
                    contents.push(Output::Basis(index, region));
                }
            }
        }
        let masks = vectors.masks.as_deref();
        let indices = match masks.filter(|_| self.store == Store::Basis) {
            Some(masks) => {
                let masked: Vec<_> = parameters
                    .iter()
                    .map(|parameter| (parameter.place.mask, parameter.place.n_elements))
                    .collect();
                MaskIndex::of(masks, &masked)?
            }
            None => parameters.iter().map(|parameter| MaskIndex::full(parameter.place.n_elements)).collect(),
        };
        let columns = |index: usize, region: Region| {
            let parameter = &parameters[index];
            Columns {
                sources: &vectors.sources,
                tensors: &parameter.place.vectors,
                masks: masks.zip(parameter.place.mask),
                index: &indices[index],
                region,
                factors: parameter.factors[region as usize]
                    .as_ref()
                    .expect("only regions with factors are stored"),
            }
        };
        if let Some(bits) = self.basis_bits {
            pack(bits, &mut outputs, &contents, &columns)?;
        }
        let draft = checkpoint::store(
            job,
            manifest::Content::Basis,
            &outputs,
            |output, range, block, scratch| match (&contents[output], block) {
                (Output::Numbers(values), Block::Bytes(bytes)) => {
                    bytes.copy_from_slice(bytemuck::cast_slice(&values[range]));
                    Ok(())
                }
                (Output::Basis(index, region), Block::Values(values)) => {
                    columns(*index, *region).read(range, values, scratch)
                }
                _ => unreachable!("small matrices are bytes, directions are values"),
            },
            None,
        )?;
        let infos = parameters.iter().map(|parameter| parameter.info.clone()).collect();
        checkpoint::about(draft, self.links(job), infos)
    }

    /// Whether the artifact can be used without the task vectors shows in these.
    fn links(&self, job: &Job<'_>) -> Vec<Link> {
        let provenance = self.store == Store::Basis;
        let task = |input: &crate::JobInput| Link {
            role: TASK.to_owned(),
            member: input.member.clone().unwrap_or_default(),
            artifact: input.artifact,
            provenance,
        };
        let masks = |input: &crate::JobInput| Link {
            role: MASKS.to_owned(),
            member: String::new(),
            artifact: input.artifact,
            provenance: false,
        };
        job.inputs_on("deltas").map(task).chain(job.inputs_on("masks").map(masks)).collect()
    }
}

/// Chooses the scales of packed directions.
fn pack<'a>(
    bits: u8,
    outputs: &mut [OutputTensor],
    contents: &[Output],
    columns: &(impl Fn(usize, Region) -> Columns<'a> + Sync),
) -> Result<(), StageError> {
    let bits = Bits::new(bits).map_err(|error| StageError::Internal(error.to_string()))?;
    let stored: Vec<usize> =
        (0..contents.len()).filter(|output| matches!(contents[*output], Output::Basis(..))).collect();
    let sizes: Vec<usize> = stored.iter().map(|output| outputs[*output].shape.iter().product()).collect();
    let ranges = over_blocks(&sizes, |tensor, range, scratch, values: &mut Vec<f32>| {
        let Output::Basis(index, region) = &contents[stored[tensor]] else { return Ok(MinMax::EMPTY) };
        values.resize(range.len(), 0.0);
        columns(*index, *region).read(range, values, scratch)?;
        Ok(chunk_min_max(values))
    })?;
    for (output, blocks) in stored.into_iter().zip(ranges) {
        let range = blocks.into_iter().fold(MinMax::EMPTY, MinMax::merge);
        let encoding = Encoding::affine(bits, range);
        let refused =
            |problem| merganser_tensors::Error::Quantize { tensor: outputs[output].name.clone(), problem };
        outputs[output].payload = Payload::Codes(encoding.map_err(refused)?);
    }
    Ok(())
}

fn open(job: &Job<'_>) -> Result<TaskVectors, StageError> {
    let mut vectors = TaskVectors { names: Vec::new(), sources: Vec::new(), masks: None };
    for input in job.inputs_on("deltas") {
        vectors.names.push(input.member.clone().unwrap_or_default());
        vectors.sources.push(job.tensors(input)?);
    }
    vectors.masks = job.optional("masks").map(|input| job.tensors(input)).transpose()?;
    Ok(vectors)
}

/// The parameters that the filter admits and where they lie; all task vectors must have the same.
fn places(vectors: &TaskVectors, filter: &NameFilter) -> Result<(Vec<TensorInfo>, Vec<Place>), StageError> {
    let (Some(first), Some(first_name)) = (vectors.sources.first(), vectors.names.first()) else {
        return Err(StageError::input("there is no task vector to decompose"));
    };
    for (source, name) in vectors.sources.iter().zip(&vectors.names) {
        for (one, one_name, other, other_name) in
            [(first, first_name, source, name), (source, name, first, first_name)]
        {
            let names = one.tensors().iter().map(|info| info.name.as_str());
            let lacking: Vec<&str> = names.filter(|name| other.index_of(name).is_none()).collect();
            if !lacking.is_empty() {
                let lacking = diff::listed(&lacking);
                return Err(StageError::input(format!(
                    "task vector `{other_name}` lacks {lacking}, which task vector `{one_name}` has"
                )));
            }
        }
    }
    let mut infos = Vec::new();
    let mut places = Vec::new();
    for info in first.tensors().iter().filter(|info| info.dtype.is_float() && filter.admits(&info.name)) {
        let mut positions = Vec::with_capacity(vectors.sources.len());
        for (source, name) in vectors.sources.iter().zip(&vectors.names) {
            let position = source
                .index_of(&info.name)
                .ok_or_else(|| StageError::Internal(format!("tensor `{}` was there before", info.name)))?;
            let shape = &source.tensors()[position].shape;
            if *shape != info.shape {
                return Err(StageError::input(format!(
                    "tensor `{}` has shape {shape:?} in task vector `{name}` and {:?} in task vector `{first_name}`",
                    info.name, info.shape
                )));
            }
            positions.push(position);
        }
        let mask = vectors.masks.as_ref().and_then(|masks| masks.index_of(&info.name));
        if let (Some(masks), Some(mask)) = (&vectors.masks, mask) {
            let shape = &masks.tensors()[mask].shape;
            if *shape != info.shape {
                return Err(StageError::input(format!(
                    "tensor `{}` has shape {shape:?} in the mask and {:?} in the task vectors",
                    info.name, info.shape
                )));
            }
        }
        places.push(Place { vectors: positions, mask, n_elements: info.n_elements() });
        infos.push(TensorInfo { dtype: DType::F32, ..info.clone() });
    }
    if infos.is_empty() {
        return Err(StageError::input("no tensor is admitted by `only` and `skip`"));
    }
    Ok((infos, places))
}
