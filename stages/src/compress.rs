//! `compress`: task vectors as coefficients of the directions of a basis.
//!
//! Of a task vector that the basis was made from, the coefficients follow from the factors, without reading it. Others, and all of
//! them where the stored directions are packed in few bits, are projected: the coefficients are then those of the smallest
//! error, (BᵀB)⁻¹Bᵀ(τ − μ), with the directions B as they are stored.

use crate::factors::{BASIS, Basis, BasisParameter, BasisRegion, Factors, MASKS, MaskIndex, Region};
use crate::kind::{Arity, Connection, Content, MethodDoc, Port, Ports, Stage, StageKind, Unit};
use crate::numerics::numerics_class;
use crate::params::{Params, Problem, parse, to_value};
use crate::{Draft, Job, Services, StageError, checkpoint};
use merganser_algebra::{Backend, symmetric_eigen};
use merganser_cache::Value;
use merganser_tensors::kernels::gram::{GramScratch, add_chunk, mirror};
use merganser_tensors::manifest::{self, Link};
use merganser_tensors::source::check_finite;
use merganser_tensors::stream::over_blocks;
use merganser_tensors::writer::{Block, OutputTensor, Payload};
use merganser_tensors::{DType, Scratch, TensorSource};
use ndarray::Array2;
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;

pub(crate) struct Compress;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct CompressParams {
    /// How the high-energy coefficients are stored: `fp16` or `fp32`. The low-energy ones are fp32, for `quantize`.
    #[serde(default)]
    high: Precision,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Precision {
    #[default]
    Fp16,
    Fp32,
}

const PORTS: &[Port] = &[
    Port {
        name: "deltas",
        doc: "task vectors; a collection is compressed member by member",
        accepts: &[Content::TaskVectors],
        arity: Arity::PerMember,
        required: true,
    },
    Port {
        name: "basis",
        doc: "the directions, of `svd` in task mode",
        accepts: &[Content::Basis],
        arity: Arity::All,
        required: true,
    },
];

impl StageKind for Compress {
    fn id(&self) -> &'static str {
        "compress"
    }

    fn summary(&self) -> &'static str {
        "task vectors as coefficients of a basis"
    }

    fn ports(&self) -> Ports {
        Ports { named: PORTS, open: None }
    }

    fn methods(&self) -> Vec<MethodDoc> {
        vec![MethodDoc {
            id: "compress",
            summary: self.summary(),
            formula: "c = Uᵀ(τ − μ); high part c_1 … c_k, low part c_{k+1} … c_R",
            source: "SVD-Hybrid, mgradyn/SVD-Quantization-Task-Merging, src/svd_hybrid/compress.py",
            schema: schema_for!(CompressParams),
        }]
    }

    fn parse(&self, params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        Ok(Box::new(CompressStage { params: parse(&params)? }))
    }
}

struct CompressStage {
    params: CompressParams,
}

impl Stage for CompressStage {
    fn version(&self) -> u32 {
        1
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        if inputs.iter().any(|input| input.port == "basis" && input.members.is_some()) {
            return Err(Problem::new("wrong-type", "port `basis` takes one basis, not a collection"));
        }
        Ok(Content::Coefficients)
    }

    fn parameters(&self, _: &Unit) -> Result<Value, StageError> {
        Ok(to_value(&self.params)?)
    }

    fn environment(&self, _: &Services) -> Result<Value, StageError> {
        let class = Value::Text(numerics_class().to_owned());
        Ok(Value::Map(BTreeMap::from([("numerics".to_owned(), class)])))
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        let (deltas, input) = (job.input("deltas")?, job.input("basis")?);
        let basis = Basis::open(job, &input.artifact)?;
        let known = basis.tasks.iter().position(|task| task.artifact == deltas.artifact);
        let mut regions: Vec<Compressed<'_>> = Vec::new();
        for parameter in &basis.parameters {
            for region in &parameter.regions {
                let Some(factors) = &region.factors else { continue };
                let coefficients = known.map(|task| factors.coefficients(task)).unwrap_or_default();
                regions.push(Compressed { parameter, region, factors, coefficients });
            }
        }
        if known.is_none() && !basis.is_stored {
            return Err(StageError::input_help(
                "the basis was not made from this task vector, and its directions are not stored",
                "`store = \"basis\"` of `svd` stores them; or make the basis from this task vector too",
            ));
        }
        if basis.is_stored && (known.is_none() || basis.is_packed) {
            let found = Projection::new(job, &basis, &*job.tensors(deltas)?, &regions)?.coefficients()?;
            regions.iter_mut().zip(found).for_each(|(region, found)| region.coefficients = found);
        }
        self.store(job, &basis, &regions)
    }
}

/// The coefficients of one region of one parameter.
struct Compressed<'a> {
    parameter: &'a BasisParameter,
    region: &'a BasisRegion,
    factors: &'a Factors,
    coefficients: Vec<f64>,
}

impl CompressStage {
    fn store(&self, job: &Job<'_>, basis: &Basis, regions: &[Compressed<'_>]) -> Result<Draft, StageError> {
        let high = match self.params.high {
            Precision::Fp16 => DType::F16,
            Precision::Fp32 => DType::F32,
        };
        let mut outputs = Vec::new();
        let mut contents: Vec<&[f64]> = Vec::new();
        for Compressed { parameter, region, factors, coefficients } in regions {
            let (first, rest) = coefficients.split_at(factors.rank);
            for (part, values, dtype) in [("high", first, high), ("low", rest, DType::F32)] {
                outputs.push(OutputTensor {
                    name: region.region.tensor(&parameter.info.name, part),
                    shape: vec![values.len()],
                    payload: Payload::Values(dtype),
                });
                contents.push(values);
            }
        }
        let draft = checkpoint::store(
            job,
            manifest::Content::Coefficients,
            &outputs,
            |output, range, block, _| {
                if let Block::Values(values) = block {
                    let wide = &contents[output][range];
                    values.iter_mut().zip(wide).for_each(|(value, wide)| *value = *wide as f32);
                }
                Ok(())
            },
            None,
        )?;
        let link = |role: &str, artifact| Link {
            role: role.to_owned(),
            member: String::new(),
            artifact,
            provenance: false,
        };
        let masks = basis.masks.map(|masks| link(MASKS, masks));
        checkpoint::about(draft, [link(BASIS, basis.digest)].into_iter().chain(masks).collect(), Vec::new())
    }
}

/// A task vector against stored directions.
struct Projection<'a> {
    basis: &'a Basis,
    regions: &'a [Compressed<'a>],
    deltas: &'a dyn TensorSource,
    /// Position of each region's parameter in `deltas`.
    tensors: Vec<usize>,
    masks: Option<std::sync::Arc<dyn TensorSource>>,
    mask_of: Vec<Option<usize>>,
    indices: Vec<MaskIndex>,
}

impl<'a> Projection<'a> {
    fn new(
        job: &Job<'_>,
        basis: &'a Basis,
        deltas: &'a dyn TensorSource,
        regions: &'a [Compressed<'a>],
    ) -> Result<Self, StageError> {
        let mut tensors = Vec::with_capacity(regions.len());
        for region in regions {
            let info = &region.parameter.info;
            let index =
                deltas.index_of(&info.name).filter(|index| deltas.tensors()[*index].shape == info.shape);
            tensors.push(index.ok_or_else(|| {
                StageError::input(format!(
                    "the task vector has no tensor `{}` of shape {:?}, which the basis has",
                    info.name, info.shape
                ))
            })?);
        }
        let masks = basis.open_masks(job)?;
        let mask = |region: &Compressed<'_>| masks.as_ref()?.index_of(&region.parameter.info.name);
        let mask_of: Vec<Option<usize>> = regions.iter().map(mask).collect();
        let sizes = regions.iter().map(|region| region.parameter.info.n_elements());
        let indices = match &masks {
            Some(masks) => MaskIndex::of(&**masks, &mask_of.iter().copied().zip(sizes).collect::<Vec<_>>())?,
            None => sizes.map(MaskIndex::full).collect(),
        };
        Ok(Self { basis, regions, deltas, tensors, masks, mask_of, indices })
    }

    fn coefficients(&self) -> Result<Vec<Vec<f64>>, StageError> {
        let sizes: Vec<usize> =
            self.regions.iter().map(|region| region.parameter.info.n_elements()).collect();
        let grams = over_blocks(&sizes, |index, range, scratch, memory: &mut Memory| {
            self.block(index, range, scratch, memory)
        })?;
        let solve = |(region, blocks): (&Compressed<'_>, Vec<Vec<f64>>)| {
            let width = region.factors.sigma.len();
            let mut gram = vec![0.0; width * width];
            for block in blocks {
                gram.iter_mut().zip(block).for_each(|(sum, x)| *sum += x);
            }
            mirror(&mut gram, width);
            solve(region, &gram)
        };
        self.regions.iter().zip(grams).map(solve).collect()
    }

    /// Inner products of the columns 1 … R with each other and, last, with τ − μ; of the entries in some elements.
    fn block(
        &self,
        index: usize,
        range: Range<usize>,
        scratch: &mut Scratch,
        memory: &mut Memory,
    ) -> merganser_tensors::Result<Vec<f64>> {
        let Compressed { parameter, region, factors, .. } = &self.regions[index];
        let width = factors.sigma.len();
        let Memory { values, mask, rows, columns, gram } = memory;
        values.resize(range.len(), 0.0);
        self.deltas.read_f32(self.tensors[index], range.clone(), values, scratch)?;
        check_finite(&parameter.info.name, range.start, values)?;
        if let (Some(masks), Some(tensor)) = (&self.masks, self.mask_of[index]) {
            mask.resize(range.len(), 0.0);
            masks.read_f32(tensor, range.clone(), mask, scratch)?;
            let mut kept = mask.iter().map(|kept| (*kept != 0.0) == (region.region == Region::Signal));
            values.retain(|_| kept.next().unwrap_or(false));
        }
        let places = &self.indices[index];
        let entries = places.entries_before(region.region, range.start)
            ..places.entries_before(region.region, range.end);
        let stored = region.stored.unwrap_or_default();
        rows.resize(entries.len() * width, 0.0);
        self.basis.tensors.read_f32(stored, entries.start * width..entries.end * width, rows, scratch)?;
        let mean = (factors.sigma[0] / factors.storage_scale()) as f32;
        columns.resize_with(width, Vec::new);
        for (position, column) in columns.iter_mut().enumerate() {
            column.clear();
            if position + 1 < width {
                column.extend(rows.chunks_exact(width).map(|row| row[position + 1]));
            } else {
                column.extend(rows.chunks_exact(width).zip(&*values).map(|(row, x)| x - mean * row[0]));
            }
        }
        let mut found = vec![0.0; width * width];
        add_chunk(&columns.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut found, gram);
        Ok(found)
    }
}

#[derive(Default)]
struct Memory {
    values: Vec<f32>,
    mask: Vec<f32>,
    rows: Vec<f32>,
    columns: Vec<Vec<f32>>,
    gram: GramScratch,
}

/// Solves (BᵀB)c = Bᵀx; directions that are all zeros get the coefficient 0.
fn solve(region: &Compressed<'_>, gram: &[f64]) -> Result<Vec<f64>, StageError> {
    let width = region.factors.sigma.len();
    let n = width - 1;
    let matrix = Array2::from_shape_fn((n, n), |(s, t)| gram[s * width + t]);
    let eigen = symmetric_eigen(matrix.view(), Backend::Faer).map_err(|error| {
        StageError::input(format!("the basis of parameter `{}`: {error}", region.parameter.info.name))
    })?;
    let largest = eigen.values.iter().fold(0.0f64, |largest, value| largest.max(*value));
    let mut coefficients = vec![0.0; n];
    for (value, vector) in eigen.values.iter().zip(eigen.vectors.columns()) {
        if *value <= 1e-10 * largest {
            continue;
        }
        let along: f64 = vector.iter().enumerate().map(|(r, v)| v * gram[n * width + r]).sum::<f64>() / value;
        coefficients.iter_mut().zip(vector).for_each(|(sum, v)| *sum += along * v);
    }
    let scale = region.factors.storage_scale();
    Ok(coefficients.into_iter().map(|c| c * scale).collect())
}
