//! Matrix mode: each task vector's matrices in low rank, τ ≈ U_k Σ_k V_kᵀ.
//!
//! The result is task vectors like any others: the products are computed where they are read. What is not a matrix, and matrices that
//! would not become smaller, are kept as they are.

use super::backend::{Backend, failed};
use super::{Decomposition, Mode};
use crate::diagnostics::{self, Diagnostics, ParameterDiagnostics, RegionDiagnostics, TaskDiagnostics};
use crate::factors::NO_ENERGY;
use crate::filter::NameFilter;
use crate::kind::{Connection, Take, Unit};
use crate::params::{Params, Problem, parse, to_value};
use crate::{Content, Draft, Job, StageError, checkpoint};
use merganser_algebra::{RandomizedOptions, Svd, randomized_svd, thin_svd, truncated_svd};
use merganser_cache::Value;
use merganser_tensors::manifest;
use merganser_tensors::source::read_finite_f32;
use merganser_tensors::views::LowRankTensor;
use merganser_tensors::writer::{Block, OutputTensor, Payload};
use merganser_tensors::{DType, Manifest, Scratch, TensorInfo, TensorSource};
use ndarray::ArrayView2;
use rayon::prelude::*;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

pub(super) struct MatrixMode;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct MatrixParams {
    /// `exact`: all triplets, then the largest; `truncated`: only the largest, from the smaller Gram matrix; `randomized`: approximately,
    /// from random projections.
    #[serde(default)]
    algorithm: Algorithm,
    /// The share of the energy Σσ² that is kept, 0 to 1.
    #[serde(default = "usual_energy")]
    energy: f64,
    /// The largest rank that is kept, at least 1.
    #[serde(default = "usual_max_rank")]
    max_rank: usize,
    /// Randomized: further columns of the projection.
    #[serde(default = "usual_oversampling")]
    oversampling: usize,
    /// Randomized: how often the matrix is applied again; more for singular values that decay slowly.
    #[serde(default = "usual_power_iterations")]
    power_iterations: usize,
    /// Randomized: where the random numbers start.
    #[serde(default = "usual_seed")]
    seed: u64,
    /// Who computes: `faer`, or `lapack` in builds that have it.
    #[serde(default)]
    backend: Backend,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Algorithm {
    Exact,
    #[default]
    Truncated,
    Randomized,
}

fn usual_energy() -> f64 {
    0.95
}

fn usual_max_rank() -> usize {
    64
}

fn usual_oversampling() -> usize {
    10
}

fn usual_power_iterations() -> usize {
    2
}

fn usual_seed() -> u64 {
    42
}

impl Mode for MatrixMode {
    fn id(&self) -> &'static str {
        "matrix"
    }

    fn summary(&self) -> &'static str {
        "each matrix of each task vector in low rank"
    }

    fn formula(&self) -> &'static str {
        "τ ≈ U_k Σ_k V_kᵀ, k = min{k : Σ_{i≤k} σ_i² ≥ energy · ‖τ‖²} ≤ max_rank; randomized: Q = orth((ττᵀ)^q τΩ), then the decomposition of Qᵀτ"
    }

    fn source(&self) -> &'static str {
        "Eckart and Young 1936; randomized: Halko, Martinsson and Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1"
    }

    fn schema(&self) -> Schema {
        schema_for!(MatrixParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Decomposition>, Vec<Problem>> {
        let parsed: MatrixParams = parse(params)?;
        let at = |key: &str| params.table.get(key).map_or(params.span, |entry| entry.node.span);
        let mut problems = Vec::new();
        if !(0.0..=1.0).contains(&parsed.energy) {
            let message = format!("`energy` must be between 0 and 1, got {}", parsed.energy);
            problems.push(Problem::new("bad-value", message).at(at("energy")));
        }
        if parsed.max_rank == 0 {
            problems
                .push(Problem::new("bad-value", "`max_rank` must be at least 1, got 0").at(at("max_rank")));
        }
        if let Err(problem) = parsed.backend.check() {
            problems.push(problem.at(at("backend")));
        }
        if problems.is_empty() { Ok(Box::new(parsed)) } else { Err(problems) }
    }
}

/// A tensor of the result.
struct LowRank {
    info: TensorInfo,
    position: usize,
    /// U·diag(σ) and Vᵀ, row-major; `None` if the tensor is kept as it is.
    factors: Option<(Vec<f32>, Vec<f32>)>,
    rank: usize,
    diagnostics: Option<ParameterDiagnostics>,
}

/// What a stored tensor holds.
enum Output {
    Values(Vec<f32>),
    /// A tensor of the task vector, by position.
    Kept(usize),
}

/// The name of the 1 × 1 matrix that turns a kept tensor into a product.
const ONE: &str = ":one";

impl Decomposition for MatrixParams {
    fn version(&self) -> u32 {
        1
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        if inputs.iter().any(|input| input.port == "masks") {
            let message = "mode `matrix` does not read port `masks`";
            return Err(Problem::new("unknown-port", message).help("remove `masks` from `from`"));
        }
        Ok(Content::TaskVectors)
    }

    fn units(&self, inputs: &[Connection]) -> Result<Vec<Unit>, Problem> {
        let Some(input) = inputs.iter().find(|input| input.port == "deltas") else { return Ok(Vec::new()) };
        let unit = |member: Option<&String>| Unit {
            member: member.cloned(),
            part: None,
            takes: vec![Take { port: input.port.clone(), member: member.cloned() }],
        };
        Ok(match &input.members {
            Some(members) => members.iter().map(|member| unit(Some(member))).collect(),
            None => vec![unit(None)],
        })
    }

    fn parameters(&self) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn run(&self, job: &Job<'_>, filter: &NameFilter) -> Result<Draft, StageError> {
        let source = job.tensors(job.input("deltas")?)?;
        let admitted: Vec<usize> = (0..source.tensors().len())
            .filter(|index| {
                let info = &source.tensors()[*index];
                info.dtype.is_float() && filter.admits(&info.name)
            })
            .collect();
        if admitted.is_empty() {
            return Err(StageError::input("no tensor is admitted by `only` and `skip`"));
        }
        let task = job.unit.member.clone().unwrap_or_default();
        let found: Result<Vec<LowRank>, StageError> = admitted
            .into_par_iter()
            .with_max_len(1)
            .map(|index| self.tensor(job, &*source, index, &task))
            .collect();
        store(job, &*source, found?)
    }
}

impl MatrixParams {
    fn tensor(
        &self,
        job: &Job<'_>,
        source: &dyn TensorSource,
        position: usize,
        task: &str,
    ) -> Result<LowRank, StageError> {
        if (job.cancelled)() {
            return Err(StageError::Cancelled);
        }
        let info = TensorInfo { dtype: DType::F32, ..source.tensors()[position].clone() };
        let kept = |info| LowRank { info, position, factors: None, rank: 0, diagnostics: None };
        let &[rows, columns] = info.shape.as_slice() else { return Ok(kept(info)) };
        if rows == 0 || columns == 0 {
            return Ok(kept(info));
        }
        let mut values = vec![0.0f32; rows * columns];
        read_finite_f32(source, position, 0..values.len(), &mut values, &mut Scratch::new())?;
        let matrix = ArrayView2::from_shape((rows, columns), &values)
            .map_err(|error| StageError::Internal(error.to_string()))?;
        let squared = merganser_algebra::frobenius_squared(matrix);
        let svd = self.decompose(&info.name, &matrix)?;
        let kept_energy = |rank: usize| svd.values.iter().take(rank).map(|value| value * value).sum::<f64>();
        let enough = |rank: &usize| squared < NO_ENERGY || kept_energy(*rank) >= self.energy * squared;
        let most = svd.values.len().min(self.max_rank);
        let rank = (1..=most).find(enough).unwrap_or(most);
        if rank * (rows + columns) >= rows * columns {
            return Ok(kept(info));
        }
        let svd = svd.truncated(rank);
        let left: Vec<f32> = (&svd.u * &svd.values).iter().map(|value| *value as f32).collect();
        let right: Vec<f32> = svd.v.t().iter().map(|value| *value as f32).collect();
        let residual = (squared - kept_energy_of(&svd)).max(0.0).sqrt();
        let norm = squared.sqrt();
        let stored_bytes = 4 * (left.len() + right.len()) as u64;
        let diagnostics = ParameterDiagnostics {
            name: info.name.clone(),
            n_elements: values.len() as u64,
            regions: vec![RegionDiagnostics {
                region: "matrix".to_owned(),
                n_entries: values.len() as u64,
                rank,
                n_directions: rows.min(columns),
                energy_retained: if squared < NO_ENERGY { 1.0 } else { kept_energy_of(&svd) / squared },
            }],
            stored_bytes,
            plain_bytes: 4 * values.len() as u64,
            tasks: vec![TaskDiagnostics::of_norms(task, residual, norm)],
            merged: None,
        };
        Ok(LowRank { info, position, factors: Some((left, right)), rank, diagnostics: Some(diagnostics) })
    }

    fn decompose(&self, name: &str, matrix: &ArrayView2<'_, f32>) -> Result<Svd, StageError> {
        let matrix = matrix.view();
        let backend = self.backend.algebra();
        let found = match self.algorithm {
            Algorithm::Exact => thin_svd(matrix, backend),
            Algorithm::Truncated => truncated_svd(matrix, self.max_rank, backend),
            Algorithm::Randomized => {
                // every tensor has random numbers of its own
                let of_name = blake3::hash(name.as_bytes());
                let own = of_name.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
                let options = RandomizedOptions {
                    rank: self.max_rank,
                    oversampling: self.oversampling,
                    power_iterations: self.power_iterations,
                    seed: self.seed ^ own,
                };
                randomized_svd(matrix, options, backend).map(|found| found.svd)
            }
        };
        found.map_err(|error| failed(&format!("tensor `{name}`"), &error))
    }
}

fn kept_energy_of(svd: &Svd) -> f64 {
    svd.values.iter().map(|value| value * value).sum()
}

/// Stores the factors, and describes the task vectors as their products.
fn store(job: &Job<'_>, source: &dyn TensorSource, tensors: Vec<LowRank>) -> Result<Draft, StageError> {
    let mut outputs = Vec::new();
    let mut contents = Vec::new();
    let mut products = Vec::new();
    let mut diagnostics = Vec::new();
    let mut output = |name: String, shape: Vec<usize>, content: Output| {
        outputs.push(OutputTensor { name, shape, payload: Payload::Values(DType::F32) });
        contents.push(content);
    };
    output(ONE.to_owned(), vec![1, 1], Output::Values(vec![1.0]));
    for LowRank { info, position, factors, rank, diagnostics: own } in tensors {
        let names = if let Some((left, right)) = factors {
            let (rows, columns) = (info.shape[0], info.shape[1]);
            let names = [format!("{}:us", info.name), format!("{}:vt", info.name)];
            output(names[0].clone(), vec![rows, rank], Output::Values(left));
            output(names[1].clone(), vec![rank, columns], Output::Values(right));
            names
        } else {
            output(info.name.clone(), vec![info.n_elements(), 1], Output::Kept(position));
            [info.name.clone(), ONE.to_owned()]
        };
        let [left, right] = names;
        products.push((info, LowRankTensor { left, right, scale: 1.0, transposed: false }));
        diagnostics.extend(own);
    }
    let draft = checkpoint::store(
        job,
        manifest::Content::TaskVectors,
        &outputs,
        |output, range, block, scratch| match (&contents[output], block) {
            (Output::Values(values), Block::Values(out)) => {
                out.copy_from_slice(&values[range]);
                Ok(())
            }
            (Output::Kept(position), Block::Values(out)) => source.read_f32(*position, range, out, scratch),
            (_, Block::Bytes(_)) => unreachable!("only values were announced"),
        },
        None,
    )?;
    let stored = Manifest::from_json(draft.manifest.as_bytes())?;
    let view = Manifest::low_rank(manifest::Content::TaskVectors, stored.view_digest(), products)?;
    let mut draft = Draft { manifest: checkpoint::manifest_text(&view.with_views(vec![stored])?), ..draft };
    draft.blobs.push(diagnostics::write(job.staging, &Diagnostics::of(diagnostics))?);
    Ok(draft)
}
