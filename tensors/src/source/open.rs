//! Opening what a manifest describes, and all that it refers to, each once.

use std::collections::HashMap;
use std::sync::Arc;

use blake3::Hash;

use super::stored::{Place, StoredSource};
use super::{Resolver, TensorSource};
use crate::dtype::TensorInfo;
use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::manifest::{FileRef, Layout, Manifest, ManifestProblem, PackedTensor, Region, TensorEntry, Term};
use crate::read_at::ReadAt;
use crate::views::linear::{LinearSource, Operand};
use crate::views::low_rank::LowRankSource;
use crate::views::mapped::MappedSource;
use crate::views::masked::MaskedSource;

/// Levels of views over views.
const MAX_DEPTH: usize = 32;

/// Regions that one block may need, all views expanded. Guards against a small manifest that means an endless computation.
const MAX_READS: u64 = 1 << 16;

/// Opens an artifact. Checks that everything it refers to is there and fits; reads no tensor.
pub fn open(manifest: &Manifest, resolver: &dyn Resolver) -> Result<Arc<dyn TensorSource>> {
    let mut opening =
        Opening { resolver, files: HashMap::new(), artifacts: HashMap::new(), views: HashMap::new() };
    Ok(opening.open(manifest, 0)?.source)
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
