//! Tensors that lie in files: as they are, arranged otherwise, or as codes.

use std::ops::Range;
use std::sync::Arc;

use blake3::Hash;

use super::{PackedCodes, TensorSource, check_bounds, check_byte_range, check_range, read_computed_bytes};
use crate::DType;
use crate::arrangement::Arrangement;
use crate::dtype::TensorInfo;
use crate::encoding::{Encoding, Form, Tables};
use crate::error::{Error, Result};
use crate::kernels::convert;
use crate::manifest::{FileRef, Manifest, ManifestProblem, TensorEntry};
use crate::read_at::{ReadAt, read_exact};
use crate::scratch::{Leaf, Raw, Scratch};

/// Tensors that lie in files.
pub(super) struct StoredSource {
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
pub(super) struct Place<'a> {
    pub file: &'a FileRef,
    pub opened: &'a Arc<dyn ReadAt>,
    pub offset: u64,
    pub length: u64,
    pub encoding: Encoding,
    pub arrangement: Option<Arrangement>,
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
    pub(super) fn new<'a>(
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

fn not_float(info: &TensorInfo) -> Error {
    Error::NotFloat { tensor: info.name.clone(), dtype: info.dtype }
}
