//! `package`: codes as they are stored, with what is needed to read them, in one safetensors file.
//!
//! Nothing is decoded or quantized on the way: `load` of the file gives the same values to the bit. docs/export.md is its specification.
//! What the members of a collection share (scheme `rtvq`) is a file of its own, the same for all of them.

use super::{Format, included, only_model, write_included};
use crate::filter::NameFilter;
use crate::job::ProgressUnit;
use crate::kind::{Connection, Content, MethodDoc, SourceSet, Stage, Unit};
use crate::params::{FilePath, OutputPath, Params, Problem, one_map, parse, to_value};
use crate::{Draft, Job, StageError, checkpoint};
use blake3::Hash;
use merganser_cache::{Blob, Value};
use merganser_tensors::formats::package::{self, Base, Description};
use merganser_tensors::manifest::{FileKind, FileRef, Layout, PackedTensor, TensorEntry};
use merganser_tensors::writer::{Block, OutputTensor, Payload, WriteOptions, Written, write_tensors};
use merganser_tensors::{DType, Encoding, Manifest, Scratch, TensorSource};
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(super) struct Package;

/// The file of a package: what a folder is searched for.
const FILE: &str = "model.safetensors";

/// How the name of a file begins that the packages of several members share; the first digits of its digest follow.
const SHARED: &str = "base-";
const DIGITS: usize = 12;

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
        3 // a shared base is a file of its own; before, its sums with offsets were written as floats
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
        if self.kept(&*source).is_empty() {
            return Err(StageError::input("no tensor is admitted by `only` and `skip`"));
        }
        let (mut blobs, manifest) = match split(job, &input.artifact)? {
            Some((own, base)) if !self.kept(&*base).is_empty() => {
                let (mut blob, base) = self.write(job, content, &*base, None)?;
                let short: String = blob.digest.to_hex().chars().take(DIGITS).collect();
                blob.name = format!("{SHARED}{short}.safetensors");
                let named = Base { file: blob.name.clone(), size: blob.size, digest: blob.digest };
                let (file, own) = self.write(job, content, &*own, Some(named))?;
                (vec![file, blob], Manifest::on_base(own, base)?)
            }
            _ => {
                if self.kept(&*source).iter().all(|&tensor| source.encoding(tensor).is_none()) {
                    job.warn("no tensor is packed: the package is a plain safetensors file");
                }
                let (file, manifest) = self.write(job, content, &*source, None)?;
                (vec![file], manifest)
            }
        };
        write_included(job, &mut blobs)?;
        let manifest = checkpoint::manifest_text(&manifest);
        Ok(Draft { manifest, blobs, operands: Vec::new(), sources: Vec::new() })
    }

    fn destination(&self) -> Option<&FilePath> {
        self.params.to.as_ref().map(|to| &to.0)
    }

    fn is_shared_file(&self, name: &str) -> bool {
        // Not just any name that begins so: a file of the user's, from `include`, can.
        let digits = name.strip_prefix(SHARED).and_then(|rest| rest.strip_suffix(".safetensors"));
        digits.is_some_and(|digits| {
            digits.len() == DIGITS && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
        })
    }
}

impl PackageStage {
    fn kept(&self, source: &dyn TensorSource) -> Vec<usize> {
        let tensors = source.tensors();
        (0..tensors.len()).filter(|&tensor| self.filter.admits(&tensors[tensor].name)).collect()
    }

    /// Writes one file; the manifest describes it as `load` would, which is what later stages read.
    fn write(
        &self,
        job: &Job<'_>,
        content: merganser_tensors::manifest::Content,
        source: &dyn TensorSource,
        base: Option<Base>,
    ) -> Result<(Blob, Manifest), StageError> {
        let kept = self.kept(source);
        let packed = kept.iter().filter_map(|&tensor| {
            let info = &source.tensors()[tensor];
            Some((info.name.as_str(), info.shape.as_slice(), source.encoding(tensor)?))
        });
        let mut description = Description::new(content, packed);
        if let Some(base) = base {
            description = description.with_base(base);
        }
        let mut writer = job.staging.writer(FILE)?;
        let written = write(job, &mut writer, source, &kept, &description.to_json())?;
        let blob = writer.finish()?;
        let file = FileRef { digest: blob.digest, size: blob.size, kind: FileKind::Blob };
        let tensors = kept.iter().zip(&written.tensors).map(|(&tensor, written)| {
            let encoding = source.encoding(tensor).cloned().unwrap_or(Encoding::Plain);
            let packed = PackedTensor { encoding, offset: written.offset, length: written.length };
            (TensorEntry::view(source.tensors()[tensor].clone()), packed)
        });
        Ok((blob, Manifest::packed(content, file, tensors.collect())?))
    }
}

/// Codes, and the codes that they are offsets from.
type Split = (Arc<dyn TensorSource>, Arc<dyn TensorSource>);

/// Takes the sum of packed tensors and a shared base apart, as scheme `rtvq` of `quantize` stores it; nothing if the artifact is no such sum.
fn split(job: &Job<'_>, artifact: &Hash) -> Result<Option<Split>, StageError> {
    let manifest = job.files.manifest(artifact)?;
    let Layout::Linear { terms } = manifest.layout() else { return Ok(None) };
    let [own, base] = terms.as_slice() else { return Ok(None) };
    if own.coefficient != 1.0 || base.coefficient != 1.0 || !base.partial {
        return Ok(None);
    }
    let described = |artifact: Hash| manifest.views().iter().find(|view| view.view_digest() == artifact);
    let Some(own) = described(own.artifact) else { return Ok(None) };
    let base = match described(base.artifact) {
        Some(view) => view.clone(),
        None => job.files.manifest(&base.artifact)?,
    };
    let same = own
        .tensors()
        .iter()
        .map(|tensor| &tensor.name)
        .eq(manifest.tensors().iter().map(|tensor| &tensor.name));
    let stored = |manifest: &Manifest| matches!(manifest.layout(), Layout::Packed { .. });
    if !same || !stored(own) || !stored(&base) {
        return Ok(None);
    }
    Ok(Some((merganser_tensors::open(own, &job.files)?, merganser_tensors::open(&base, &job.files)?)))
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
