//! Reading the tensors of an artifact, whatever its layout.
//!
//! [`open`] turns a [`Manifest`] into a [`TensorSource`]. Nothing is read until a block is asked for, and only into the caller's
//! buffers and [`Scratch`]. Views over views are followed recursively; artifacts and files that several of them refer to are opened
//! once, and within a block each region is read once (see [`Scratch`]).

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use blake3::Hash;

use crate::DType;
use crate::dtype::TensorInfo;
use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::kernels::{convert, finite, linear};
use crate::manifest::{FileRef, Layout, Manifest, ManifestProblem, TensorEntry, Term};
use crate::read_at::{ReadAt, read_exact};
use crate::scratch::{Leaf, Raw, Scratch};

/// Levels of views over views.
const MAX_DEPTH: usize = 32;

/// Regions that one block may need, all views expanded. Guards against a small manifest that means an endless computation.
const MAX_READS: u64 = 1 << 16;

/// Tensors that can be read in blocks, from several threads at once.
pub trait TensorSource: Send + Sync {
    /// Sorted by name. `read_…` take positions in this list.
    fn tensors(&self) -> &[TensorInfo];

    fn index_of(&self, name: &str) -> Option<usize> {
        self.tensors().binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()
    }

    /// Writes the elements `range` of a tensor as `f32`. Halves and 8-bit floats are widened exactly, `f64` is rounded to nearest;
    /// other types are refused. Values may be NaN or infinite: see [`read_finite_f32`].
    fn read_f32(
        &self,
        tensor: usize,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()>;

    /// `out[i] += coefficient·x[i]` for the elements `range` of a tensor.
    fn add_scaled(
        &self,
        tensor: usize,
        range: Range<usize>,
        coefficient: f32,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let mut values = scratch.take(out.len());
        let result = self.read_f32(tensor, range, &mut values, scratch);
        if result.is_ok() {
            linear::add_scaled(out, coefficient, &values);
        }
        scratch.give_back(values);
        result
    }

    /// Writes the bytes `range` of a tensor in its own type, little-endian. Stored elements come out verbatim; of a tensor that
    /// is computed or decoded, these are the bytes of its `f32` values.
    fn read_bytes(
        &self,
        tensor: usize,
        range: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()>;

    /// Bytes of the store's objects that this artifact itself needs; 0 for a view.
    fn stored_bytes(&self) -> u64;

    /// Fails when a file that this reads may have changed since it was opened.
    fn check_unchanged(&self) -> Result<()>;
}

/// Finds what manifests refer to.
pub trait Resolver {
    /// Opens a file by its digest.
    fn file(&self, file: &FileRef) -> Result<Arc<dyn ReadAt>>;

    /// Loads the manifest of another artifact.
    fn manifest(&self, artifact: &Hash) -> Result<Manifest>;
}

/// Opens an artifact. Checks that everything it refers to is there and fits; reads no tensor.
pub fn open(manifest: &Manifest, resolver: &dyn Resolver) -> Result<Arc<dyn TensorSource>> {
    let mut opening = Opening { resolver, files: HashMap::new(), artifacts: HashMap::new() };
    Ok(opening.open(manifest, 0)?.source)
}

/// [`TensorSource::read_f32`], failing with the tensor's name and the element when a value is NaN or infinite.
pub fn read_finite_f32(
    source: &dyn TensorSource,
    tensor: usize,
    range: Range<usize>,
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    let start = range.start;
    source.read_f32(tensor, range, out, scratch)?;
    check_finite(&source.tensors()[tensor].name, start, out)
}

/// Fails with the tensor's name and the element when a value is NaN or infinite; `values` begin at element `start`.
pub fn check_finite(tensor: &str, start: usize, values: &[f32]) -> Result<()> {
    match finite::first_non_finite(values) {
        None => Ok(()),
        Some(i) => Err(Error::NotFinite { tensor: tensor.to_owned(), element: start + i, value: values[i] }),
    }
}

/// One call of [`open`].
struct Opening<'a> {
    resolver: &'a dyn Resolver,
    files: HashMap<Hash, Arc<dyn ReadAt>>,
    artifacts: HashMap<Hash, Opened>,
}

#[derive(Clone)]
struct Opened {
    source: Arc<dyn TensorSource>,
    /// Regions read per block.
    reads: u64,
}

impl Opening<'_> {
    fn open(&mut self, manifest: &Manifest, depth: usize) -> Result<Opened> {
        if depth > MAX_DEPTH {
            return Err(too_deep());
        }
        match manifest.layout() {
            Layout::Regions { files, regions } => {
                let opened = files.iter().map(|file| self.file(file)).collect::<Result<Vec<_>>>()?;
                let stored = regions.iter().map(|region| {
                    (&files[region.file], &opened[region.file], region.offset, region.length, Encoding::Plain)
                });
                Ok(Opened { source: Arc::new(StoredSource::new(manifest, stored, opened.clone())), reads: 1 })
            }
            Layout::Packed { file, tensors } => {
                let opened = self.file(file)?;
                let stored = tensors
                    .iter()
                    .map(|packed| (file, &opened, packed.offset, packed.length, packed.encoding.clone()));
                let source = StoredSource::new(manifest, stored, vec![opened.clone()]);
                Ok(Opened { source: Arc::new(source), reads: 1 })
            }
            Layout::Linear { terms } => self.linear(manifest, terms, depth),
        }
    }

    fn linear(&mut self, manifest: &Manifest, terms: &[Term], depth: usize) -> Result<Opened> {
        let infos: Vec<TensorInfo> = manifest.tensors().iter().map(TensorEntry::info).collect();
        let mut operands = Vec::with_capacity(terms.len());
        let mut reads = 0u64;
        for term in terms {
            let opened = self.artifact(&term.artifact, depth + 1)?;
            reads = reads.saturating_add(opened.reads);
            if reads > MAX_READS {
                return Err(too_deep());
            }
            let tensors = infos.iter().map(|info| find_operand(&*opened.source, info, term.artifact));
            operands.push(Operand {
                coefficient: term.coefficient as f32,
                tensors: tensors.collect::<Result<_, ManifestProblem>>()?,
                source: opened.source,
            });
        }
        Ok(Opened { source: Arc::new(LinearSource { infos, operands }), reads })
    }

    fn artifact(&mut self, artifact: &Hash, depth: usize) -> Result<Opened> {
        if let Some(opened) = self.artifacts.get(artifact) {
            return Ok(opened.clone());
        }
        let manifest = self.resolver.manifest(artifact)?;
        let opened = self.open(&manifest, depth)?;
        self.artifacts.insert(*artifact, opened.clone());
        Ok(opened)
    }

    fn file(&mut self, file: &FileRef) -> Result<Arc<dyn ReadAt>> {
        if let Some(opened) = self.files.get(&file.digest) {
            return Ok(opened.clone());
        }
        let opened = self.resolver.file(file)?;
        if opened.size() != file.size {
            let problem =
                ManifestProblem::FileSize { digest: file.digest, expected: file.size, actual: opened.size() };
            return Err(problem.into());
        }
        self.files.insert(file.digest, opened.clone());
        Ok(opened)
    }
}

fn too_deep() -> Error {
    ManifestProblem::TooDeep { max_depth: MAX_DEPTH, max_reads: MAX_READS }.into()
}

fn find_operand(
    source: &dyn TensorSource,
    info: &TensorInfo,
    artifact: Hash,
) -> Result<usize, ManifestProblem> {
    let tensor = info.name.clone();
    let Some(index) = source.index_of(&info.name) else {
        return Err(ManifestProblem::MissingOperand { tensor, artifact });
    };
    let found = &source.tensors()[index];
    if found.shape != info.shape {
        let (expected, actual) = (info.shape.clone(), found.shape.clone());
        return Err(ManifestProblem::OperandShape { tensor, artifact, expected, actual });
    }
    if !found.dtype.is_float() {
        return Err(ManifestProblem::OperandDType { tensor, artifact, dtype: found.dtype });
    }
    Ok(index)
}

/// Tensors that lie in files.
struct StoredSource {
    infos: Vec<TensorInfo>,
    stored: Vec<Stored>,
    files: Vec<Arc<dyn ReadAt>>,
    stored_bytes: u64,
}

struct Stored {
    file: Arc<dyn ReadAt>,
    offset: u64,
    encoding: Encoding,
    leaf: Leaf,
}

impl StoredSource {
    fn new<'a>(
        manifest: &Manifest,
        stored: impl Iterator<Item = (&'a FileRef, &'a Arc<dyn ReadAt>, u64, u64, Encoding)>,
        files: Vec<Arc<dyn ReadAt>>,
    ) -> Self {
        let infos: Vec<TensorInfo> = manifest.tensors().iter().map(TensorEntry::info).collect();
        let stored = infos.iter().zip(stored).map(|(info, (file, opened, offset, length, encoding))| {
            let identity = identity(file, offset, length, info.dtype, &encoding);
            Stored { file: opened.clone(), offset, encoding, leaf: Leaf { file: file.digest, identity } }
        });
        let stored = stored.collect();
        Self { infos, stored, files, stored_bytes: manifest.stored_bytes() }
    }

    /// Reads and converts elements `range` of a tensor.
    fn load(&self, tensor: usize, range: &Range<usize>, out: &mut [f32], raw: &mut Raw) -> Result<()> {
        let (info, stored) = (&self.infos[tensor], &self.stored[tensor]);
        if let Some((elements, bytes)) = stored.encoding.enclosing(range, info.n_elements()) {
            let packed = raw.bytes(bytes.len());
            read_exact(&*stored.file, packed, stored.offset + bytes.start as u64)?;
            if elements == *range {
                stored.encoding.decode(elements.start, packed, out);
            } else {
                // Ranges that do not begin on a packing group are rare; blocks do.
                let mut wider = vec![0.0; elements.len()];
                stored.encoding.decode(elements.start, packed, &mut wider);
                out.copy_from_slice(&wider[range.start - elements.start..][..range.len()]);
            }
            return Ok(());
        }
        let size = info.dtype.size_bytes();
        let offset = stored.offset + (range.start * size) as u64;
        if info.dtype == DType::F32 {
            return read_exact(&*stored.file, bytemuck::cast_slice_mut(out), offset);
        }
        let bytes = raw.bytes(range.len() * size);
        read_exact(&*stored.file, bytes, offset)?;
        if convert::widen(info.dtype, bytes, out) { Ok(()) } else { Err(not_float(info)) }
    }

    fn check_float(&self, tensor: usize) -> Result<()> {
        let info = &self.infos[tensor];
        if info.dtype.is_float() { Ok(()) } else { Err(not_float(info)) }
    }
}

impl TensorSource for StoredSource {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn read_f32(
        &self,
        tensor: usize,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.check_float(tensor)?;
        check_range(&self.infos[tensor], &range, out.len())?;
        scratch.enter(&self.infos[tensor].name, &range);
        scratch.read(&self.stored[tensor].leaf, out, |out, raw| self.load(tensor, &range, out, raw))
    }

    fn add_scaled(
        &self,
        tensor: usize,
        range: Range<usize>,
        coefficient: f32,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.check_float(tensor)?;
        check_range(&self.infos[tensor], &range, out.len())?;
        scratch.enter(&self.infos[tensor].name, &range);
        let leaf = &self.stored[tensor].leaf;
        scratch.add_scaled(leaf, coefficient, out, |out, raw| self.load(tensor, &range, out, raw))
    }

    fn read_bytes(
        &self,
        tensor: usize,
        range: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (info, stored) = (&self.infos[tensor], &self.stored[tensor]);
        if stored.encoding != Encoding::Plain {
            return read_computed_bytes(self, tensor, range, out, scratch);
        }
        check_byte_range(info, &range, out.len())?;
        read_exact(&*stored.file, out, stored.offset + range.start)
    }

    fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    fn check_unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(|file| file.check_unchanged())
    }
}

/// Tensors that are sums over those of other sources.
struct LinearSource {
    infos: Vec<TensorInfo>,
    /// At least one.
    operands: Vec<Operand>,
}

struct Operand {
    coefficient: f32,
    source: Arc<dyn TensorSource>,
    /// For each of our tensors, its position in `source`.
    tensors: Vec<usize>,
}

impl TensorSource for LinearSource {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn read_f32(
        &self,
        tensor: usize,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        check_range(&self.infos[tensor], &range, out.len())?;
        let mut operands = self.operands.iter();
        if let Some(first) = operands.next() {
            first.source.read_f32(first.tensors[tensor], range.clone(), out, scratch)?;
            linear::scale(out, first.coefficient);
        }
        for operand in operands {
            let (position, coefficient) = (operand.tensors[tensor], operand.coefficient);
            operand.source.add_scaled(position, range.clone(), coefficient, out, scratch)?;
        }
        Ok(())
    }

    fn read_bytes(
        &self,
        tensor: usize,
        range: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        read_computed_bytes(self, tensor, range, out, scratch)
    }

    fn stored_bytes(&self) -> u64 {
        0
    }

    fn check_unchanged(&self) -> Result<()> {
        self.operands.iter().try_for_each(|operand| operand.source.check_unchanged())
    }
}

/// Bytes of the `f32` values of a tensor that is not stored as such.
fn read_computed_bytes(
    source: &dyn TensorSource,
    tensor: usize,
    range: Range<u64>,
    out: &mut [u8],
    scratch: &mut Scratch,
) -> Result<()> {
    check_byte_range(&source.tensors()[tensor], &range, out.len())?;
    let (start, end) = (range.start as usize, range.end as usize);
    let elements = start / 4..end.div_ceil(4);
    let mut values = scratch.take(elements.len());
    let result = source.read_f32(tensor, elements.clone(), &mut values, scratch);
    let bytes: &[u8] = bytemuck::cast_slice(&values);
    out.copy_from_slice(&bytes[start - elements.start * 4..][..end - start]);
    scratch.give_back(values);
    result
}

/// What a block is read from, so that equal identities give equal values.
fn identity(file: &FileRef, offset: u64, length: u64, dtype: DType, encoding: &Encoding) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(file.digest.as_bytes());
    hasher.update(&offset.to_le_bytes());
    hasher.update(&length.to_le_bytes());
    hasher.update(dtype.name().as_bytes());
    if *encoding != Encoding::Plain {
        hasher.update(&serde_json::to_vec(encoding).expect("finite numbers can be written"));
    }
    hasher.finalize()
}

fn not_float(info: &TensorInfo) -> Error {
    Error::NotFloat { tensor: info.name.clone(), dtype: info.dtype }
}

fn check_range(info: &TensorInfo, range: &Range<usize>, buffer: usize) -> Result<()> {
    let available = info.n_elements() as u64;
    check_bounds(info, "elements", range.start as u64, range.end as u64, available, buffer as u64)
}

fn check_byte_range(info: &TensorInfo, range: &Range<u64>, buffer: usize) -> Result<()> {
    check_bounds(info, "bytes", range.start, range.end, info.size_bytes(), buffer as u64)
}

fn check_bounds(
    info: &TensorInfo,
    unit: &'static str,
    start: u64,
    end: u64,
    available: u64,
    buffer: u64,
) -> Result<()> {
    if start > end || end > available {
        return Err(Error::OutOfBounds { tensor: info.name.clone(), unit, start, end, available });
    }
    assert_eq!(end - start, buffer, "the buffer holds exactly the range");
    Ok(())
}

#[cfg(test)]
mod tests;
