//! What stages share about tensors: storing computed ones as an artifact, reading small files, and showing a checkpoint to the ONNX side.

use crate::job::{JobSource, ProgressUnit};
use crate::{Draft, Job, StageError};
use blake3::Hash;
use merganser_cache::{Blob, Source, Staging};
use merganser_onnx::WeightsError;
use merganser_onnx::quantized::{Codes, Grid, PackedWeights};
use merganser_tensors::encoding::{self as tensors, Code, Table};
use merganser_tensors::kernels::codebook::{FP4, NF4, dynamic};
use merganser_tensors::kernels::pack::packed_len;
use merganser_tensors::kernels::quantize::signed_offset;
use merganser_tensors::manifest::{Content, FileKind, FileRef, Link};
use merganser_tensors::source::{PackedCodes, read_finite_f32};
use merganser_tensors::writer::{
    Block, OutputTensor, Payload, WriteOptions, Written, write_f32_tensors, write_tensors,
};
use merganser_tensors::{DType, Encoding, LocalFiles, Manifest, Scratch, TensorInfo, TensorSource, formats};
use ndarray::Array2;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The name of the one blob of stored tensors.
pub(crate) const BLOB: &str = "tensors.safetensors";

/// Writes `tensors` as one canonical safetensors blob and describes them; `fill` provides each block. Progress counts the bytes of
/// `work_bytes` in proportion to what has been written.
pub(crate) fn store(
    job: &Job<'_>,
    content: Content,
    tensors: &[OutputTensor],
    fill: impl Fn(usize, Range<usize>, Block<'_>, &mut Scratch) -> merganser_tensors::Result<()> + Sync,
    metadata: Option<(&str, &str)>,
) -> Result<Draft, StageError> {
    store_ahead(job, content, tensors, &|_| Ok(()), fill, metadata)
}

/// [`store`], with a call before the blocks of some tensors are filled: for what can only be computed a whole tensor at a time.
pub(crate) fn store_ahead(
    job: &Job<'_>,
    content: Content,
    tensors: &[OutputTensor],
    prepare: &(dyn Fn(&[usize]) -> merganser_tensors::Result<()> + Sync),
    fill: impl Fn(usize, Range<usize>, Block<'_>, &mut Scratch) -> merganser_tensors::Result<()> + Sync,
    metadata: Option<(&str, &str)>,
) -> Result<Draft, StageError> {
    write(job, BLOB, content, tensors, prepare, fill, metadata)
}

/// The value of an element, if it is not finite: for finding out which input has spoilt a result.
pub(crate) fn not_finite(source: &dyn TensorSource, tensor: &str, element: usize) -> Option<f32> {
    let mut value = [0.0f32];
    let position = source.index_of(tensor)?;
    source.read_f32(position, element..element + 1, &mut value, &mut Scratch::new()).ok()?;
    (!value[0].is_finite()).then_some(value[0])
}

/// [`store`] under another name: a part of an artifact that has several.
pub(crate) fn store_part(
    job: &Job<'_>,
    name: &str,
    content: Content,
    tensors: &[OutputTensor],
    fill: impl Fn(usize, Range<usize>, Block<'_>, &mut Scratch) -> merganser_tensors::Result<()> + Sync,
) -> Result<Draft, StageError> {
    write(job, name, content, tensors, &|_| Ok(()), fill, None)
}

/// [`store_ahead`] with tensors that the caller packs; `encoding` knows how, once they are written.
pub(crate) fn store_packed(
    job: &Job<'_>,
    content: Content,
    tensors: &[OutputTensor],
    prepare: &(dyn Fn(&[usize]) -> merganser_tensors::Result<()> + Sync),
    fill: impl Fn(usize, Range<usize>, Block<'_>, &mut Scratch) -> merganser_tensors::Result<()> + Sync,
    encoding: &dyn Fn(&str) -> Option<Encoding>,
) -> Result<Draft, StageError> {
    let (written, blob) = write_blob(job, BLOB, tensors, prepare, fill, None)?;
    draft(content, written.encode(encoding), blob)
}

fn write(
    job: &Job<'_>,
    name: &str,
    content: Content,
    tensors: &[OutputTensor],
    prepare: &(dyn Fn(&[usize]) -> merganser_tensors::Result<()> + Sync),
    fill: impl Fn(usize, Range<usize>, Block<'_>, &mut Scratch) -> merganser_tensors::Result<()> + Sync,
    metadata: Option<(&str, &str)>,
) -> Result<Draft, StageError> {
    let (written, blob) = write_blob(job, name, tensors, prepare, fill, metadata)?;
    draft(content, written, blob)
}

fn write_blob(
    job: &Job<'_>,
    name: &str,
    tensors: &[OutputTensor],
    prepare: &(dyn Fn(&[usize]) -> merganser_tensors::Result<()> + Sync),
    fill: impl Fn(usize, Range<usize>, Block<'_>, &mut Scratch) -> merganser_tensors::Result<()> + Sync,
    metadata: Option<(&str, &str)>,
) -> Result<(Written, Blob), StageError> {
    let mut writer = job.staging.writer(name)?;
    let total: u64 = tensors.iter().map(output_bytes).sum();
    let done = AtomicU64::new(0);
    let progress = |bytes: u64| {
        let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        job.progress(done.min(total), total, ProgressUnit::Bytes);
    };
    let cancelled = || (job.cancelled)();
    let options = WriteOptions {
        progress: &progress,
        cancelled: &cancelled,
        metadata,
        prepare,
        ..WriteOptions::default()
    };
    let written = write_tensors(&mut writer, tensors, fill, &options)?;
    Ok((written, writer.finish()?))
}

fn draft(content: Content, written: Written, blob: Blob) -> Result<Draft, StageError> {
    let file = FileRef { digest: blob.digest, size: blob.size, kind: FileKind::Blob };
    let manifest = written.into_manifest(content, file)?;
    Ok(Draft {
        manifest: manifest_text(&manifest),
        blobs: vec![blob],
        operands: Vec::new(),
        sources: Vec::new(),
    })
}

/// Makes the artifact of factors out of that of plain tensors: says what they are about and which parameters they stand for.
pub(crate) fn about(
    draft: Draft,
    links: Vec<Link>,
    parameters: Vec<TensorInfo>,
) -> Result<Draft, StageError> {
    let manifest = Manifest::from_json(draft.manifest.as_bytes())?;
    let manifest = manifest.with_links(links).with_parameters(parameters)?;
    let mut operands: Vec<Hash> = Vec::new();
    for operand in manifest.operands() {
        if !operands.contains(operand) {
            operands.push(*operand);
        }
    }
    Ok(Draft { manifest: manifest_text(&manifest), operands, ..draft })
}

/// A manifest as an artifact keeps it.
pub(crate) fn manifest_text(manifest: &Manifest) -> String {
    String::from_utf8(manifest.to_json()).expect("JSON is UTF-8")
}

pub(crate) fn output_bytes(tensor: &OutputTensor) -> u64 {
    let n: usize = tensor.shape.iter().product();
    match &tensor.payload {
        Payload::Values(dtype) | Payload::Bytes(dtype) => (n * dtype.size_bytes()) as u64,
        Payload::Codes(encoding) => encoding.stored_len(DType::F32, n),
        Payload::Packed { bits, n_codes, tables_len } => (packed_len(n, *bits) * n_codes) as u64 + tables_len,
    }
}

/// The artifact of a view: nothing is stored, what it is computed from is named.
pub(crate) fn view(manifest: &Manifest) -> Draft {
    let mut operands: Vec<Hash> = Vec::new();
    for operand in manifest.operands() {
        if !operands.contains(operand) {
            operands.push(*operand);
        }
    }
    // Blobs are in the store; what is looked after here are the user's files.
    let files = manifest.files();
    let sources = files
        .iter()
        .filter(|file| file.kind == FileKind::Source)
        .map(|file| Source { digest: file.digest, size: file.size })
        .collect();
    Draft { manifest: manifest_text(manifest), blobs: Vec::new(), operands, sources }
}

/// Copies the elements `range` of a tensor as they are stored.
pub(crate) fn copy_elements(
    source: &dyn TensorSource,
    tensor: usize,
    range: Range<usize>,
    out: &mut [u8],
    scratch: &mut Scratch,
) -> merganser_tensors::Result<()> {
    let size = source.tensors()[tensor].dtype.size_bytes() as u64;
    source.read_bytes(tensor, range.start as u64 * size..range.end as u64 * size, out, scratch)
}

/// A whole tensor, widened to f32.
pub(crate) struct SmallTensor {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// Reads the float tensors that `keep` admits of a checkpoint in one file, such as a classification head; they fit in memory.
pub(crate) fn read_small(
    job: &Job<'_>,
    source: &JobSource,
    keep: &dyn Fn(&TensorInfo) -> bool,
) -> Result<HashMap<String, SmallTensor>, StageError> {
    let parts = formats::describe(&source.path)?;
    let digests = vec![source.source.digest; parts.len()];
    let keep = |tensor: &TensorInfo| tensor.dtype.is_float() && keep(tensor);
    let manifest = Manifest::of_checkpoint(Content::Checkpoint, &parts, &digests, keep)?;
    let opened = merganser_tensors::open(&manifest, &job.files)?;
    let read = |(index, info): (usize, &TensorInfo)| {
        let mut values = vec![0.0; info.n_elements()];
        read_finite_f32(&*opened, index, 0..values.len(), &mut values, &mut Scratch::default())?;
        Ok((info.name.clone(), SmallTensor { shape: info.shape.clone(), values }))
    };
    opened.tensors().iter().enumerate().map(read).collect()
}

/// The tensor of a checkpoint that has no other.
pub(crate) fn sole_tensor(path: &Path) -> Result<Option<TensorInfo>, StageError> {
    let parts = formats::describe(path)?;
    let mut tensors = parts.iter().flat_map(|part| &part.tensors);
    let first = tensors.next().map(|tensor| tensor.info.clone());
    Ok(first.filter(|_| tensors.next().is_none()))
}

/// The blob of an evaluation's logits.
pub(crate) const LOGITS: &str = "logits.safetensors";

/// Stores the logits of an evaluation with their labels, so that further metrics cost no inference.
pub(crate) fn write_logits(
    staging: &Staging,
    logits: &Array2<f32>,
    labels: &[u32],
) -> Result<Blob, StageError> {
    let mut writer = staging.writer(LOGITS)?;
    let tensors = [
        OutputTensor {
            name: "labels".to_owned(),
            shape: vec![labels.len()],
            payload: Payload::Bytes(DType::U32),
        },
        OutputTensor {
            name: "logits".to_owned(),
            shape: logits.shape().to_vec(),
            payload: Payload::Values(DType::F32),
        },
    ];
    let logits = logits.as_standard_layout();
    let values = logits.as_slice().expect("standard layout is contiguous");
    let fill = |_: usize, range: Range<usize>, block: Block<'_>, _: &mut Scratch| {
        match block {
            Block::Values(out) => out.copy_from_slice(&values[range]),
            Block::Bytes(out) => out.copy_from_slice(bytemuck::cast_slice(&labels[range])),
        }
        Ok(())
    };
    write_tensors(&mut writer, &tensors, fill, &WriteOptions::default())?;
    Ok(writer.finish()?)
}

/// Reads what [`write_logits`] wrote: logits [images, classes], and labels.
pub(crate) fn read_logits(path: &Path) -> Result<(Array2<f32>, Vec<u32>), StageError> {
    let opened = open_blob(path)?;
    let labels = find(&*opened, "labels")?;
    let mut numbers = vec![0u32; opened.tensors()[labels].n_elements()];
    let bytes = bytemuck::cast_slice_mut(&mut numbers);
    opened.read_bytes(labels, 0..bytes.len() as u64, bytes, &mut Scratch::default())?;
    Ok((matrix(&*opened, "logits")?, numbers))
}

/// Stores one matrix as a blob.
pub(crate) fn write_matrix(
    staging: &Staging,
    blob: &str,
    name: &str,
    matrix: &Array2<f32>,
) -> Result<Blob, StageError> {
    let mut writer = staging.writer(blob)?;
    let matrix = matrix.as_standard_layout();
    let values = matrix.as_slice().expect("standard layout is contiguous");
    let fill = |_: usize, range: Range<usize>, out: &mut [f32], _: &mut Scratch| {
        out.copy_from_slice(&values[range]);
        Ok(())
    };
    let tensors = [(name.to_owned(), matrix.shape().to_vec())];
    write_f32_tensors(&mut writer, &tensors, DType::F32, fill, &WriteOptions::default())?;
    Ok(writer.finish()?)
}

/// Reads what [`write_matrix`] wrote.
pub(crate) fn read_matrix(path: &Path, name: &str) -> Result<Array2<f32>, StageError> {
    matrix(&*open_blob(path)?, name)
}

/// Opens a blob of ours.
pub(crate) fn open_blob(path: &Path) -> Result<Arc<dyn TensorSource>, StageError> {
    let parts = formats::describe(path)?;
    let mut files = LocalFiles::default();
    let digests = files.add(&parts);
    let manifest = Manifest::of_checkpoint(Content::Checkpoint, &parts, &digests, |_| true)?;
    Ok(merganser_tensors::open(&manifest, &files)?)
}

fn find(opened: &dyn TensorSource, name: &str) -> Result<usize, StageError> {
    opened.index_of(name).ok_or_else(|| StageError::Internal(format!("a blob of ours has no `{name}`")))
}

fn matrix(opened: &dyn TensorSource, name: &str) -> Result<Array2<f32>, StageError> {
    let tensor = find(opened, name)?;
    let mut values = vec![0.0; opened.tensors()[tensor].n_elements()];
    opened.read_f32(tensor, 0..values.len(), &mut values, &mut Scratch::default())?;
    let &[rows, columns] = opened.tensors()[tensor].shape.as_slice() else {
        return Err(StageError::Internal(format!("`{name}` is no matrix")));
    };
    Array2::from_shape_vec((rows, columns), values).map_err(|error| StageError::Internal(error.to_string()))
}

/// A checkpoint as the ONNX side wants it: whole float tensors by name.
pub struct Weights(Arc<dyn TensorSource>);

impl Weights {
    pub fn new(source: Arc<dyn TensorSource>) -> Self {
        Self(source)
    }
}

impl merganser_onnx::Weights for Weights {
    fn names(&self) -> Vec<String> {
        self.0
            .tensors()
            .iter()
            .filter(|tensor| tensor.dtype.is_float())
            .map(|tensor| tensor.name.clone())
            .collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let tensor = &self.0.tensors()[self.0.index_of(name)?];
        tensor.dtype.is_float().then(|| tensor.shape.clone())
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| WeightsError {
            tensor: name.to_owned(),
            source,
        };
        let tensor = self.0.index_of(name).ok_or_else(|| failed("there is no such tensor".into()))?;
        let n = self.0.tensors()[tensor].n_elements();
        let mut values = vec![0.0; n];
        read_finite_f32(&*self.0, tensor, 0..n, &mut values, &mut Scratch::default())
            .map_err(|error| failed(error.into()))?;
        Ok(values)
    }
}

impl PackedWeights for Weights {
    fn is_packed(&self, name: &str) -> bool {
        self.0.index_of(name).is_some_and(|tensor| self.0.encoding(tensor).is_some())
    }

    fn codes(&self, name: &str) -> Result<Vec<Codes>, WeightsError> {
        let Some(tensor) = self.0.index_of(name) else { return Ok(Vec::new()) };
        let packed = self
            .0
            .packed(tensor)
            .map_err(|error| WeightsError { tensor: name.to_owned(), source: error.into() })?;
        let Some(PackedCodes { form, codes, tables }) = packed else { return Ok(Vec::new()) };
        let stages = tables.0.into_iter().enumerate();
        Ok(stages.map(|(stage, table)| stage_codes(&form, stage, &codes, table)).collect())
    }
}

/// The codes of one stage as the ONNX side takes them.
fn stage_codes(form: &tensors::Form, stage: usize, packed: &[u8], table: Table) -> Codes {
    let mut values = vec![0u16; form.n];
    if form.bits.get() == 16 {
        form.unpack(stage, packed, &mut values);
    } else {
        let mut narrow = vec![0u8; form.n];
        form.unpack(stage, packed, &mut narrow);
        values.iter_mut().zip(narrow).for_each(|(wide, code)| *wide = code.into());
    }
    let Table { scale, zero_point, .. } = table;
    let offsets = vec![signed_offset(form.bits); scale.len()];
    let grid = match form.code {
        Code::Affine => Grid::Inverse { scale, zero_point },
        Code::Absmax => Grid::Inverse { scale, zero_point: offsets },
        Code::Symmetric => Grid::Step { step: scale, zero_point: offsets },
        Code::Nf4 => Grid::Table { table: NF4.to_vec(), scale },
        Code::Fp4 => Grid::Table { table: FP4.to_vec(), scale },
        Code::Dynamic => Grid::Table { table: dynamic().to_vec(), scale },
    };
    Codes { bits: form.bits.get(), values, group: form.elements, grid }
}
