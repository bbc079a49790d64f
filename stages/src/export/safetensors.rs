//! `safetensors`: single or sharded with an index, tensors as plain floats.

use super::{Format, included, only_model, write_included, write_whole};
use crate::filter::NameFilter;
use crate::kind::{Connection, Content, MethodDoc, SourceSet, Stage, Unit};
use crate::params::{FilePath, OutputPath, Params, Problem, one_map, parse, to_value};
use crate::{Draft, Job, StageError, checkpoint};
use merganser_cache::{Blob, Value};
use merganser_tensors::writer::{Block, OutputTensor, Payload, WriteOptions, write_tensors};
use merganser_tensors::{DType, TensorSource};
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

pub(super) struct SafeTensors;

/// How float tensors are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum StoredAs {
    /// Single precision.
    #[default]
    F32,
    /// Half precision; values that do not fit are refused.
    F16,
    /// bfloat16.
    Bf16,
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ExportParams {
    /// The folder to write to; a collection gets a folder per member inside it. Existing files of the same names are replaced.
    to: OutputPath,
    /// How float tensors are stored: `f32`, `f16` or `bf16`.
    #[serde(default)]
    dtype: StoredAs,
    /// Start a new file beyond this many bytes of tensors (default: a single file).
    #[serde(default)]
    max_shard_bytes: Option<u64>,
    /// Files to put beside the model, such as `config.json`.
    #[serde(default)]
    include: Vec<FilePath>,
}

impl Format for SafeTensors {
    fn document(&self) -> MethodDoc {
        MethodDoc {
            id: "safetensors",
            summary: "plain floats, single or sharded: what every other program reads",
            formula: "θ as stored floats, rounded to nearest even where narrowed; packed tensors are unpacked",
            source: "the safetensors format; Hugging Face's sharded index",
            schema: NameFilter::document(schema_for!(ExportParams)),
        }
    }

    fn parse(&self, mut params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        let filter = NameFilter::take(&mut params);
        match (filter, parse::<ExportParams>(&params)) {
            (Ok(_), Ok(parsed)) if parsed.max_shard_bytes == Some(0) => Err(vec![
                Problem::new("bad-value", "`max_shard_bytes` must be at least 1, got 0").at(params.span),
            ]),
            (Ok(filter), Ok(params)) => Ok(Box::new(ExportStage { params, filter })),
            (filter, parsed) => Err(filter.err().into_iter().chain(parsed.err()).flatten().collect()),
        }
    }
}

struct ExportStage {
    params: ExportParams,
    filter: NameFilter,
}

impl Stage for ExportStage {
    fn version(&self) -> u32 {
        1
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        only_model(inputs, "safetensors")?;
        Ok(Content::Files)
    }

    fn parameters(&self, _: &Unit) -> Result<Value, StageError> {
        Ok(one_map([
            Value::map([("format", "safetensors")]),
            to_value(&self.params)?,
            to_value(&self.filter)?,
        ]))
    }

    fn sources(&self, _: &Unit) -> Result<Vec<SourceSet>, StageError> {
        Ok(included(&self.params.include)?.into_iter().collect())
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        let source = job.tensors(job.input("model")?)?;
        let shards = self.shards(&*source);
        let total = shards.iter().flatten().map(|tensor| tensor.bytes).sum();
        let done = AtomicU64::new(0);
        let mut blobs = Vec::new();
        let mut weight_map = BTreeMap::new();
        for (index, shard) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => "model.safetensors".to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", index + 1),
            };
            weight_map.extend(shard.iter().map(|tensor| (tensor.output.name.clone(), name.clone())));
            blobs.push(write_shard(job, &*source, shard, &name, total, &done)?);
        }
        if shards.len() > 1 {
            let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
            blobs.push(write_whole(job, "model.safetensors.index.json", index.to_string().as_bytes())?);
        }
        write_included(job, &mut blobs)?;
        let files: Vec<&str> = blobs.iter().map(|blob| blob.name.as_str()).collect();
        let manifest = serde_json::json!({ "content": "files", "files": files }).to_string();
        Ok(Draft { manifest, blobs, operands: Vec::new(), sources: Vec::new() })
    }

    fn destination(&self) -> Option<&FilePath> {
        Some(&self.params.to.0)
    }
}

/// A tensor to write and where it comes from.
struct Exported {
    tensor: usize,
    output: OutputTensor,
    bytes: u64,
}

impl ExportStage {
    /// Cuts the tensors, in the order of their names, into files of at most `max_shard_bytes` (a larger tensor has a file to itself).
    fn shards(&self, source: &dyn TensorSource) -> Vec<Vec<Exported>> {
        let dtype = match self.params.dtype {
            StoredAs::F32 => DType::F32,
            StoredAs::F16 => DType::F16,
            StoredAs::Bf16 => DType::BF16,
        };
        let limit = self.params.max_shard_bytes.unwrap_or(u64::MAX);
        let mut shards: Vec<Vec<Exported>> = vec![Vec::new()];
        let mut filled = 0u64;
        for (tensor, info) in
            source.tensors().iter().enumerate().filter(|(_, info)| self.filter.admits(&info.name))
        {
            let (payload, stored) = if info.dtype.is_float() {
                (Payload::Values(dtype), dtype)
            } else {
                (Payload::Bytes(info.dtype), info.dtype)
            };
            let bytes = (info.n_elements() * stored.size_bytes()) as u64;
            if filled > 0 && filled.saturating_add(bytes) > limit {
                shards.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            let output = OutputTensor { name: info.name.clone(), shape: info.shape.clone(), payload };
            if let Some(shard) = shards.last_mut() {
                shard.push(Exported { tensor, output, bytes });
            }
        }
        shards
    }
}

fn write_shard(
    job: &Job<'_>,
    source: &dyn TensorSource,
    shard: &[Exported],
    name: &str,
    total: u64,
    done: &AtomicU64,
) -> Result<Blob, StageError> {
    let mut writer = job.staging.writer(name)?;
    let outputs: Vec<OutputTensor> = shard.iter().map(|tensor| tensor.output.clone()).collect();
    let progress = |bytes: u64| {
        let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        job.progress(done.min(total), total, crate::job::ProgressUnit::Bytes);
    };
    let cancelled = || (job.cancelled)();
    let options = WriteOptions {
        progress: &progress,
        cancelled: &cancelled,
        // transformers refuses a file without it.
        metadata: Some(("format", "pt")),
        tensor_digests: false,
        ..WriteOptions::default()
    };
    let fill = |output: usize, range: std::ops::Range<usize>, block: Block<'_>, scratch: &mut _| match block {
        Block::Values(values) => source.read_f32(shard[output].tensor, range, values, scratch),
        Block::Bytes(bytes) => checkpoint::copy_elements(source, shard[output].tensor, range, bytes, scratch),
    };
    write_tensors(&mut writer, &outputs, fill, &options)?;
    Ok(writer.finish()?)
}
