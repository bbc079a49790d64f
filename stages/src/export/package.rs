//! `package`: codes as they are stored, with what is needed to read them, in one safetensors file.
//!
//! Nothing is decoded or quantized on the way: `load` of the file gives the same values to the bit. docs/export.md is its specification.

use super::{Format, included, only_model, write_included};
use crate::filter::NameFilter;
use crate::job::ProgressUnit;
use crate::kind::{Connection, Content, MethodDoc, SourceSet, Stage, Unit};
use crate::params::{FilePath, OutputPath, Params, Problem, one_map, parse, to_value};
use crate::{Draft, Job, StageError, checkpoint};
use merganser_cache::Value;
use merganser_tensors::formats::package::{self, Description};
use merganser_tensors::manifest::{FileKind, FileRef, PackedTensor, TensorEntry};
use merganser_tensors::writer::{Block, OutputTensor, Payload, WriteOptions, Written, write_tensors};
use merganser_tensors::{DType, Encoding, Manifest, Scratch, TensorSource};
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

pub(super) struct Package;

/// The file of a package: what a folder is searched for.
const FILE: &str = "model.safetensors";

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct PackageParams {
    /// The folder to write to; a collection gets a folder per member inside it (default: only the cache). Existing files of the same names
    /// are replaced.
    #[serde(default, skip_serializing)]
    to: Option<OutputPath>,
    /// Files to put beside the package, such as `config.json`.
    #[serde(default)]
    include: Vec<FilePath>,
}

impl Format for Package {
    fn document(&self) -> MethodDoc {
        MethodDoc {
            id: "package",
            summary: "packed tensors as they are, in one file that `load` reads in place",
            formula: "codes, scales and zero points as stored; tensors that are not packed as they are",
            source: "docs/export.md",
            schema: NameFilter::document(schema_for!(PackageParams)),
        }
    }

    fn parse(&self, mut params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        match (NameFilter::take(&mut params), parse::<PackageParams>(&params)) {
            (Ok(filter), Ok(params)) => Ok(Box::new(PackageStage { params, filter })),
            (filter, parsed) => Err(filter.err().into_iter().chain(parsed.err()).flatten().collect()),
        }
    }
}

struct PackageStage {
    params: PackageParams,
    filter: NameFilter,
}

impl Stage for PackageStage {
    fn version(&self) -> u32 {
        2
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        only_model(inputs, "package")?;
        let model = inputs.iter().find(|input| input.port == "model");
        Ok(model.map_or(Content::Checkpoint, |model| model.content))
    }

    fn parameters(&self, _: &Unit) -> Result<Value, StageError> {
        Ok(one_map([Value::map([("format", "package")]), to_value(&self.params)?, to_value(&self.filter)?]))
    }

    fn sources(&self, _: &Unit) -> Result<Vec<SourceSet>, StageError> {
        Ok(included(&self.params.include)?.into_iter().collect())
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        let input = job.input("model")?;
        let content = job.files.manifest(&input.artifact)?.content();
        let source = job.tensors(input)?;
        let kept: Vec<usize> = (0..source.tensors().len())
            .filter(|&tensor| self.filter.admits(&source.tensors()[tensor].name))
            .collect();
        if kept.is_empty() {
            return Err(StageError::input("no tensor is admitted by `only` and `skip`"));
        }
        if kept.iter().all(|&tensor| source.encoding(tensor).is_none()) {
            job.warn("no tensor is packed: the package is a plain safetensors file");
        }
        let packed = kept.iter().filter_map(|&tensor| {
            let info = &source.tensors()[tensor];
            Some((info.name.as_str(), info.shape.as_slice(), source.encoding(tensor)?))
        });
        let description = Description::new(content, packed).to_json();
        let mut writer = job.staging.writer(FILE)?;
        let written = write(job, &mut writer, &*source, &kept, &description)?;
        let mut blobs = vec![writer.finish()?];
        let file = FileRef { digest: blobs[0].digest, size: blobs[0].size, kind: FileKind::Blob };
        let tensors = kept.iter().zip(&written.tensors).map(|(&tensor, written)| {
            let encoding = source.encoding(tensor).cloned().unwrap_or(Encoding::Plain);
            let packed = PackedTensor { encoding, offset: written.offset, length: written.length };
            (TensorEntry::view(source.tensors()[tensor].clone()), packed)
        });
        // What later stages read is the file: the artifact describes it as `load` would.
        let manifest = Manifest::packed(content, file, tensors.collect())?;
        write_included(job, &mut blobs)?;
        let manifest = checkpoint::manifest_text(&manifest);
        Ok(Draft { manifest, blobs, operands: Vec::new(), sources: Vec::new() })
    }

    fn destination(&self) -> Option<&FilePath> {
        self.params.to.as_ref().map(|to| &to.0)
    }
}

/// Writes the tensors `kept`, which are sorted by name, packed ones as lists of bytes.
fn write(
    job: &Job<'_>,
    out: &mut (impl std::io::Write + Send),
    source: &dyn TensorSource,
    kept: &[usize],
    description: &str,
) -> Result<Written, StageError> {
    let outputs = kept.iter().map(|&tensor| {
        let info = &source.tensors()[tensor];
        let (shape, payload) = match source.encoding(tensor) {
            Some(encoding) => {
                let length = encoding.stored_len(info.dtype, info.n_elements());
                (vec![length as usize], Payload::Bytes(DType::U8))
            }
            // As it is, but a NaN is refused here rather than where the file is read.
            None if matches!(info.dtype, DType::F32 | DType::F16 | DType::BF16) => {
                (info.shape.clone(), Payload::Values(info.dtype))
            }
            None => (info.shape.clone(), Payload::Bytes(info.dtype)),
        };
        OutputTensor { name: info.name.clone(), shape, payload }
    });
    let outputs: Vec<OutputTensor> = outputs.collect();
    let total: u64 = outputs.iter().map(checkpoint::output_bytes).sum();
    let done = AtomicU64::new(0);
    let progress = |bytes: u64| {
        let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        job.progress(done.min(total), total, ProgressUnit::Bytes);
    };
    let options = WriteOptions {
        progress: &progress,
        cancelled: &|| (job.cancelled)(),
        metadata: Some((package::KEY, description)),
        tensor_digests: false,
        ..WriteOptions::default()
    };
    let fill = |output: usize, range: Range<usize>, block: Block<'_>, scratch: &mut Scratch| {
        let tensor = kept[output];
        match block {
            Block::Values(values) => source.read_f32(tensor, range, values, scratch),
            Block::Bytes(bytes) if source.encoding(tensor).is_some() => {
                source.read_encoded(tensor, range.start as u64..range.end as u64, bytes)
            }
            Block::Bytes(bytes) => checkpoint::copy_elements(source, tensor, range, bytes, scratch),
        }
    };
    Ok(write_tensors(out, &outputs, fill, &options)?)
}
