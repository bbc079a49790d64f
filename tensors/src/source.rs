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
use crate::arrangement::Arrangement;
use crate::dtype::TensorInfo;
use crate::encoding::{Encoding, Form, Tables};
use crate::error::{Error, Result};
use crate::kernels::{convert, finite, linear};
use crate::manifest::{FileRef, Layout, Manifest, ManifestProblem, PackedTensor, Region, TensorEntry, Term};
use crate::read_at::{ReadAt, read_exact};
use crate::scratch::{Leaf, Raw, Scratch};
use crate::views::low_rank::LowRankSource;
use crate::views::mapped::MappedSource;
use crate::views::masked::MaskedSource;

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

    /// Hands the elements `range` of a tensor to `work`, as [`Self::read_f32`] would write them.
    fn with_f32(
        &self,
        tensor: usize,
        range: Range<usize>,
        scratch: &mut Scratch,
        work: &mut dyn FnMut(&[f32]),
    ) -> Result<()> {
        let mut values = scratch.take(range.len());
        let result = self.read_f32(tensor, range, &mut values, scratch);
        if result.is_ok() {
            work(&values);
        }
        scratch.give_back(values);
        result
    }

    /// `out[i] += coefficient·x[i]` for the elements `range` of a tensor.
    fn add_scaled(
        &self,
        tensor: usize,
        range: Range<usize>,
        coefficient: f32,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        assert_eq!(range.len(), out.len(), "the buffer holds exactly the range");
        self.with_f32(tensor, range, scratch, &mut |values| linear::add_scaled(out, coefficient, values))
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

    /// How a tensor is stored as codes; nothing if its elements are stored as they are, or computed.
    fn encoding(&self, _tensor: usize) -> Option<&Encoding> {
        None
    }

    /// Writes the stored bytes `range` of a tensor that has an [`Self::encoding`]: its codes, and the scales behind them.
    fn read_encoded(&self, tensor: usize, range: Range<u64>, out: &mut [u8]) -> Result<()> {
        check_bounds(&self.tensors()[tensor], "encoded bytes", range.start, range.end, 0, out.len() as u64)
    }

    /// The codes of a tensor and their scales, when it is stored as such; `None` for plain elements and for views.
    fn packed(&self, _tensor: usize) -> Result<Option<PackedCodes>> {
        Ok(None)
    }

    /// Bytes of the store's objects that this artifact itself needs; 0 for a view.
    fn stored_bytes(&self) -> u64;

    /// Fails when a file that this reads may have changed since it was opened.
    fn check_unchanged(&self) -> Result<()>;
}

/// A quantized tensor as it is stored, without being decoded: for what goes on working with codes.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedCodes {
    pub form: Form,
    /// All codes, packed; [`Form::unpack`] takes them apart.
    pub codes: Vec<u8>,
    /// The scales of all groups.
    pub tables: Tables,
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
    let mut opening =
        Opening { resolver, files: HashMap::new(), artifacts: HashMap::new(), views: HashMap::new() };
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
    /// Artifacts that manifests describe themselves, by the digest they are referred to by.
    views: HashMap<Hash, Manifest>,
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
        self.views.extend(manifest.views().iter().map(|view| (view.view_digest(), view.clone())));
        match manifest.layout() {
            Layout::Regions { files, regions } => {
                let opened = files.iter().map(|file| self.file(file)).collect::<Result<Vec<_>>>()?;
                let stored = regions.iter().map(|region| {
                    let Region { file, offset, length, arrangement } = region.clone();
                    Place {
                        file: &files[file],
                        opened: &opened[file],
                        offset,
                        length,
                        encoding: Encoding::Plain,
                        arrangement,
                    }
                });
                Ok(Opened { source: Arc::new(StoredSource::new(manifest, stored, opened.clone())), reads: 1 })
            }
            Layout::Packed { file, tensors } => {
                let opened = self.file(file)?;
                let stored = tensors.iter().map(|packed| {
                    let PackedTensor { encoding, offset, length } = packed.clone();
                    Place { file, opened: &opened, offset, length, encoding, arrangement: None }
                });
                let source = StoredSource::new(manifest, stored, vec![opened.clone()]);
                Ok(Opened { source: Arc::new(source), reads: 1 })
            }
            Layout::Linear { terms } => self.linear(manifest, terms, depth),
            Layout::Mapped { artifact, tensors } => {
                let pieces = tensors.iter().map(Vec::len).max().unwrap_or(0);
                self.view(manifest, artifact, depth, pieces, |infos, source| {
                    Ok(Arc::new(MappedSource::new(infos, tensors, source)?))
                })
            }
            Layout::LowRank { artifact, tensors } => {
                self.view(manifest, artifact, depth, 2, |infos, source| {
                    Ok(Arc::new(LowRankSource::new(infos, tensors, source)?))
                })
            }
            Layout::Masked { base, vector, mask, scales } => {
                let [base, vector, mask] =
                    [base, vector, mask].map(|artifact| self.artifact(artifact, depth + 1));
                let (base, vector, mask) = (base?, vector?, mask?);
                let reads = base.reads.saturating_add(vector.reads).saturating_add(mask.reads);
                if reads > MAX_READS {
                    return Err(too_deep());
                }
                let infos = manifest.tensors().iter().map(TensorEntry::info).collect();
                let source = MaskedSource::new(infos, scales, [base.source, vector.source, mask.source]);
                let source = source.map_err(|(index, reason)| {
                    let tensor = manifest.tensors()[index].name.clone();
                    Error::from(ManifestProblem::View { tensor, reason })
                })?;
                Ok(Opened { source: Arc::new(source), reads })
            }
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
            let tensors = infos.iter().map(|info| {
                if term.partial && opened.source.index_of(&info.name).is_none() {
                    return Ok(None);
                }
                find_operand(&*opened.source, info, term.artifact).map(Some)
            });
            operands.push(Operand {
                coefficient: term.coefficient as f32,
                tensors: tensors.collect::<Result<_, ManifestProblem>>()?,
                source: opened.source,
            });
        }
        Ok(Opened { source: Arc::new(LinearSource { infos, operands }), reads })
    }

    /// Opens a view over one artifact, of which each block reads up to `pieces` pieces.
    fn view(
        &mut self,
        manifest: &Manifest,
        artifact: &Hash,
        depth: usize,
        pieces: usize,
        make: impl FnOnce(
            Vec<TensorInfo>,
            Arc<dyn TensorSource>,
        ) -> Result<Arc<dyn TensorSource>, (usize, String)>,
    ) -> Result<Opened> {
        let opened = self.artifact(artifact, depth + 1)?;
        let reads = opened.reads.saturating_mul(pieces.max(1) as u64);
        if reads > MAX_READS {
            return Err(too_deep());
        }
        let infos: Vec<TensorInfo> = manifest.tensors().iter().map(TensorEntry::info).collect();
        let source = make(infos, opened.source).map_err(|(index, reason)| {
            let tensor = manifest.tensors()[index].name.clone();
            Error::from(ManifestProblem::View { tensor, reason })
        })?;
        Ok(Opened { source, reads })
    }

    fn artifact(&mut self, artifact: &Hash, depth: usize) -> Result<Opened> {
        if let Some(opened) = self.artifacts.get(artifact) {
            return Ok(opened.clone());
        }
        let manifest = match self.views.get(artifact) {
            Some(view) => view.clone(),
            None => self.resolver.manifest(artifact)?,
        };
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
    /// What decodes it, if it is encoded.
    form: Option<Form>,
    /// Scales that do not lie in the file.
    tables: Option<Tables>,
    arrangement: Option<Arrangement>,
    leaf: Leaf,
}

/// What a manifest says about a stored tensor.
struct Place<'a> {
    file: &'a FileRef,
    opened: &'a Arc<dyn ReadAt>,
    offset: u64,
    length: u64,
    encoding: Encoding,
    arrangement: Option<Arrangement>,
}

impl Stored {
    /// Reads elements `range` of a tensor that is not encoded, row-major and little-endian.
    fn read_elements(&self, info: &TensorInfo, range: &Range<usize>, out: &mut [u8]) -> Result<()> {
        match &self.arrangement {
            None => {
                read_exact(&*self.file, out, self.offset + (range.start * info.dtype.size_bytes()) as u64)
            }
            Some(arrangement) => arrangement.read(info.dtype, &info.shape, range, out, |buffer, offset| {
                read_exact(&*self.file, buffer, self.offset + offset)
            }),
        }
    }
}

impl Place<'_> {
    /// What blocks are read from, so that equal identities give equal values.
    fn identity(&self, info: &TensorInfo) -> Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.file.digest.as_bytes());
        hasher.update(&self.offset.to_le_bytes());
        hasher.update(&self.length.to_le_bytes());
        hasher.update(info.dtype.name().as_bytes());
        if self.encoding != Encoding::Plain {
            hasher.update(&serde_json::to_vec(&self.encoding).expect("finite numbers can be written"));
        }
        if let Some(arrangement) = &self.arrangement {
            // the shape decides which elements a range means
            let how = (arrangement, &info.shape);
            hasher.update(&serde_json::to_vec(&how).expect("whole numbers can be written"));
        }
        hasher.finalize()
    }
}

impl StoredSource {
    fn new<'a>(
        manifest: &Manifest,
        stored: impl Iterator<Item = Place<'a>>,
        files: Vec<Arc<dyn ReadAt>>,
    ) -> Self {
        let infos: Vec<TensorInfo> = manifest.tensors().iter().map(TensorEntry::info).collect();
        let stored = infos.iter().zip(stored).map(|(info, place)| {
            let leaf = Leaf { file: place.file.digest, identity: place.identity(info) };
            let Place { opened, offset, encoding, arrangement, .. } = place;
            let (form, tables) = (encoding.form(info.n_elements()), encoding.tables());
            Stored { file: opened.clone(), offset, encoding, form, tables, arrangement, leaf }
        });
        let stored = stored.collect();
        Self { infos, stored, files, stored_bytes: manifest.stored_bytes() }
    }

    /// Reads and converts elements `range` of a tensor.
    fn load(&self, tensor: usize, range: &Range<usize>, out: &mut [f32], raw: &mut Raw) -> Result<()> {
        let (info, stored) = (&self.infos[tensor], &self.stored[tensor]);
        if let Some(form) = &stored.form {
            return self.decode(form, tensor, range, out, raw);
        }
        let size = info.dtype.size_bytes();
        if info.dtype == DType::F32 {
            return stored.read_elements(info, range, bytemuck::cast_slice_mut(out));
        }
        let bytes = raw.bytes(range.len() * size);
        stored.read_elements(info, range, bytes)?;
        if convert::widen(info.dtype, bytes, out) { Ok(()) } else { Err(not_float(info)) }
    }

    /// Reads and decodes elements `range` of a tensor.
    fn decode(
        &self,
        form: &Form,
        tensor: usize,
        range: &Range<usize>,
        out: &mut [f32],
        raw: &mut Raw,
    ) -> Result<()> {
        let stored = &self.stored[tensor];
        let (elements, bytes) = stored.encoding.enclosing(range, form.n).expect("what has a form has codes");
        let packed = raw.bytes(bytes.len());
        read_exact(&*stored.file, packed, stored.offset + bytes.start as u64)?;
        let read;
        let tables = if let Some(tables) = &stored.tables {
            tables
        } else {
            read = self.read_tables(form, tensor, &elements)?;
            &read
        };
        if elements == *range {
            form.decode(elements.start, packed, tables, out);
        } else {
            // Ranges that do not begin on a packing group are rare; blocks do.
            let mut wider = vec![0.0; elements.len()];
            form.decode(elements.start, packed, tables, &mut wider);
            out.copy_from_slice(&wider[range.start - elements.start..][..range.len()]);
        }
        Ok(())
    }

    /// Reads the scales of some elements that lie behind their codes.
    fn read_tables(&self, form: &Form, tensor: usize, elements: &Range<usize>) -> Result<Tables> {
        let (info, stored) = (&self.infos[tensor], &self.stored[tensor]);
        let Encoding::Grouped(grouped) = &stored.encoding else { return Ok(Tables::default()) };
        let start = stored.offset + stored.encoding.codes_len(DType::F32, form.n);
        let tables = grouped.read_tables(form.n, form.groups(elements), |buffer, offset| {
            read_exact(&*stored.file, buffer, start + offset)
        })?;
        tables
            .check(form.code)
            .map_err(|reason| ManifestProblem::Encoding { tensor: info.name.clone(), reason })?;
        Ok(tables)
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

    fn with_f32(
        &self,
        tensor: usize,
        range: Range<usize>,
        scratch: &mut Scratch,
        work: &mut dyn FnMut(&[f32]),
    ) -> Result<()> {
        self.check_float(tensor)?;
        let length = range.len();
        check_range(&self.infos[tensor], &range, length)?;
        scratch.enter(&self.infos[tensor].name, &range);
        let leaf = &self.stored[tensor].leaf;
        scratch.with(leaf, length, |out, raw| self.load(tensor, &range, out, raw), work)
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
        if stored.arrangement.is_none() {
            return read_exact(&*stored.file, out, stored.offset + range.start);
        }
        let size = info.dtype.size_bytes();
        let (start, end) = (range.start as usize, range.end as usize);
        let elements = start / size..end.div_ceil(size);
        if elements.len() * size == out.len() {
            return stored.read_elements(info, &elements, out);
        }
        let mut wider = vec![0; elements.len() * size];
        stored.read_elements(info, &elements, &mut wider)?;
        out.copy_from_slice(&wider[start - elements.start * size..][..end - start]);
        Ok(())
    }

    fn encoding(&self, tensor: usize) -> Option<&Encoding> {
        Some(&self.stored[tensor].encoding).filter(|encoding| **encoding != Encoding::Plain)
    }

    fn read_encoded(&self, tensor: usize, range: Range<u64>, out: &mut [u8]) -> Result<()> {
        let (info, stored) = (&self.infos[tensor], &self.stored[tensor]);
        let available = stored.encoding.stored_len(info.dtype, info.n_elements());
        check_bounds(info, "encoded bytes", range.start, range.end, available, out.len() as u64)?;
        read_exact(&*stored.file, out, stored.offset + range.start)
    }

    fn packed(&self, tensor: usize) -> Result<Option<PackedCodes>> {
        let stored = &self.stored[tensor];
        let Some(form) = stored.form else { return Ok(None) };
        let mut codes = vec![0; form.codes_len(form.n)];
        read_exact(&*stored.file, &mut codes, stored.offset)?;
        let tables = match &stored.tables {
            Some(tables) => tables.clone(),
            None => self.read_tables(&form, tensor, &(0..form.n))?,
        };
        Ok(Some(PackedCodes { form, codes, tables }))
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
    /// For each of our tensors, its position in `source`; of the first operand, all are there.
    tensors: Vec<Option<usize>>,
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
        sum(&self.operands, tensor, &range, out, scratch)
    }

    fn add_scaled(
        &self,
        tensor: usize,
        range: Range<usize>,
        coefficient: f32,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        check_range(&self.infos[tensor], &range, out.len())?;
        let mut values = scratch.take(out.len());
        let last = self.operands.last().and_then(|last| Some((last, last.tensors[tensor]?)));
        let result = match (self.operands.as_slice(), last) {
            // The last operand is added on the way to `out`: one pass over memory less, which a difference feels.
            ([first @ .., _], Some((last, position))) if !first.is_empty() => {
                sum(first, tensor, &range, &mut values, scratch).and_then(|()| {
                    last.source.with_f32(position, range, scratch, &mut |x| {
                        linear::add_scaled_sum(out, coefficient, &values, last.coefficient, x);
                    })
                })
            }
            (operands, _) => sum(operands, tensor, &range, &mut values, scratch)
                .map(|()| linear::add_scaled(out, coefficient, &values)),
        };
        scratch.give_back(values);
        result
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

/// The sum of at least one operand, in their order.
fn sum(
    operands: &[Operand],
    tensor: usize,
    range: &Range<usize>,
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    let mut operands = operands.iter();
    if let Some((first, position)) = operands.next().and_then(|first| Some((first, first.tensors[tensor]?))) {
        first.source.read_f32(position, range.clone(), out, scratch)?;
        linear::scale(out, first.coefficient);
    }
    for operand in operands {
        let (Some(position), coefficient) = (operand.tensors[tensor], operand.coefficient) else { continue };
        operand.source.add_scaled(position, range.clone(), coefficient, out, scratch)?;
    }
    Ok(())
}

/// Bytes of the `f32` values of a tensor that is not stored as such.
pub fn read_computed_bytes(
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

fn not_float(info: &TensorInfo) -> Error {
    Error::NotFloat { tensor: info.name.clone(), dtype: info.dtype }
}

pub(crate) fn check_range(info: &TensorInfo, range: &Range<usize>, buffer: usize) -> Result<()> {
    let available = info.n_elements() as u64;
    check_bounds(info, "elements", range.start as u64, range.end as u64, available, buffer as u64)
}

pub(crate) fn check_byte_range(info: &TensorInfo, range: &Range<u64>, buffer: usize) -> Result<()> {
    check_bounds(info, "bytes", range.start, range.end, info.size_bytes(), buffer as u64)
}

pub(crate) fn check_bounds(
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
