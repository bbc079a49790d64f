//! What an artifact of tensors holds: its tensors, and where their values come from.
//!
//! The JSON is byte-stable: tensors are sorted by name, fields are in a fixed order, numbers are written in their shortest
//! exact form. It names files and other artifacts by digest only; paths live elsewhere. Artifacts that only one view is made of
//! (the factors of an adapter, a checkpoint under other names) can be described within it ([`Manifest::with_views`]). A [`Manifest`] is valid by
//! construction, also one that was read: names are unique and sorted, lengths follow from types and shapes, regions
//! lie inside their files, and scales are usable.

use std::collections::BTreeMap;

use blake3::Hash;
use serde::{Deserialize, Serialize};

use crate::arrangement::Arrangement;
use crate::dtype::{DType, TensorInfo};
use crate::encoding::Encoding;
use crate::error::Result;
use crate::formats::FilePart;
use crate::views::{LowRankTensor, Part};

mod check;
mod json;

pub use json::hex;
use json::{RawManifest, optional_hex};

/// Version of the JSON. Readers refuse others.
pub const MANIFEST_VERSION: u32 = 1;

/// An artifact of tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "RawManifest", try_from = "RawManifest")]
pub struct Manifest {
    content: Content,
    tensors: Vec<TensorEntry>,
    layout: Layout,
    views: Vec<Manifest>,
    links: Vec<Link>,
    parameters: Vec<TensorEntry>,
    figures: BTreeMap<String, f64>,
}

/// What the tensors mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    Checkpoint,
    TaskVectors,
    Masks,
    Basis,
    Coefficients,
    /// Second moments of activations.
    Statistics,
}

/// One tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    pub name: String,
    /// Type of the values that reading gives; of quantized tensors and of linear views, F32.
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// BLAKE3 of the stored bytes (elements or packed codes). Views leave it out.
    #[serde(default, with = "optional_hex", skip_serializing_if = "Option::is_none")]
    pub digest: Option<Hash>,
}

/// Where the values come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Layout {
    /// Each tensor is a region of a file; `regions` runs parallel to the tensors.
    Regions { files: Vec<FileRef>, regions: Vec<Region> },
    /// Each tensor is `Σ c_i·x_i` over the tensors of that name in other artifacts: in `f32`, in this order, the coefficient
    /// rounded to `f32`, product and sum rounded separately. `[+1 tuned, −1 base]` is exactly `f32(tuned) − f32(base)`.
    Linear { terms: Vec<Term> },
    /// Each tensor is a region of one file under its own encoding; `tensors` runs parallel to the manifest's tensors.
    Packed { file: FileRef, tensors: Vec<PackedTensor> },
    /// Each tensor is put together from pieces of another artifact's tensors; `tensors` runs parallel to the manifest's tensors.
    Mapped {
        #[serde(with = "hex")]
        artifact: Hash,
        tensors: Vec<Vec<Part>>,
    },
    /// Each tensor is a product of two thin matrices of another artifact; `tensors` runs parallel to the manifest's tensors.
    LowRank {
        #[serde(with = "hex")]
        artifact: Hash,
        tensors: Vec<LowRankTensor>,
    },
    /// Each tensor is `base + scale·(vector·mask)`, element by element over three other artifacts: in `f32`, each operation rounded, in
    /// this order. A tensor that `vector` lacks is the base's own; one that `mask` lacks has all its entries. `scales` runs parallel to
    /// the tensors.
    Masked {
        #[serde(with = "hex")]
        base: Hash,
        #[serde(with = "hex")]
        vector: Hash,
        #[serde(with = "hex")]
        mask: Hash,
        scales: Vec<f32>,
    },
}

/// A file by content.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRef {
    #[serde(with = "hex")]
    pub digest: Hash,
    pub size: u64,
    pub kind: FileKind,
}

/// Another artifact that these tensors are about, such as the basis of coefficients: not needed to read them, but to make use of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// What it is to them, such as `basis`.
    pub role: String,
    /// The task, where several artifacts have the same role.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub member: String,
    #[serde(with = "hex")]
    pub artifact: Hash,
    /// Whether it only says where the tensors came from: they can be used without it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub provenance: bool,
}

/// Whose file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileKind {
    /// A file of the user, read where it lies.
    Source,
    /// An object of the store.
    Blob,
}

/// `length` bytes from `offset` on in the file of that index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    pub file: usize,
    pub offset: u64,
    pub length: u64,
    /// How the elements lie in these bytes when they are not row-major and little-endian.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrangement: Option<Arrangement>,
}

/// One summand of a linear view.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Term {
    pub coefficient: f64,
    #[serde(with = "hex")]
    pub artifact: Hash,
    /// Whether tensors that the artifact lacks count as zero. Never of the first term.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub partial: bool,
}

impl Term {
    /// A summand that has every tensor.
    pub fn new(coefficient: f64, artifact: Hash) -> Self {
        Self { coefficient, artifact, partial: false }
    }
}

/// A stored tensor of a packed artifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedTensor {
    pub encoding: Encoding,
    pub offset: u64,
    pub length: u64,
}

/// Why a manifest is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestProblem {
    #[error("it is not valid JSON: {0}")]
    Json(String),
    #[error("it has version {0}, this program reads version {MANIFEST_VERSION}")]
    Version(u32),
    #[error("tensor `{0}` is listed twice")]
    DuplicateTensor(String),
    #[error("tensor `{tensor}` has a shape whose size overflows: {shape:?}")]
    ShapeOverflow { tensor: String, shape: Vec<usize> },
    #[error("it lists {tensors} tensors and {described} descriptions of where they lie")]
    CountMismatch { tensors: usize, described: usize },
    #[error("tensor `{tensor}` needs {expected} bytes, its region has {actual}")]
    WrongLength { tensor: String, expected: u64, actual: u64 },
    #[error("tensor `{tensor}` ends at byte {end} of a file of {size}")]
    OutsideFile { tensor: String, end: u64, size: u64 },
    #[error("tensor `{tensor}` lies in file {file}, there are {files}")]
    NoSuchFile { tensor: String, file: usize, files: usize },
    #[error("tensor `{tensor}` is encoded in a way that cannot be read: {reason}")]
    Encoding { tensor: String, reason: String },
    #[error("tensor `{tensor}` of a view does not fit what it is made of: {reason}")]
    View { tensor: String, reason: String },
    #[error("it has packed tensors and {0} files; a package is one file")]
    PackedShards(usize),
    #[error("figure `{0}` is not a finite number")]
    Figure(String),
    #[error("it describes view {0} twice")]
    DuplicateView(Hash),
    #[error("a linear view needs at least one term")]
    NoTerms,
    #[error("the first term of a linear view must have every tensor")]
    PartialFirst,
    #[error("a linear view has coefficient {0}, which is not a finite f32")]
    Coefficient(String),
    #[error("tensor `{tensor}` of a linear view has dtype {dtype}, it must be F32")]
    LinearDType { tensor: String, dtype: DType },
    #[error("tensor `{tensor}` is not in artifact {artifact}, which a linear view refers to")]
    MissingOperand { tensor: String, artifact: Hash },
    #[error(
        "tensor `{tensor}` has shape {actual:?} in artifact {artifact}, the linear view expects {expected:?}"
    )]
    OperandShape { tensor: String, artifact: Hash, expected: Vec<usize>, actual: Vec<usize> },
    #[error(
        "tensor `{tensor}` holds {dtype} values in artifact {artifact}, which cannot be combined linearly"
    )]
    OperandDType { tensor: String, artifact: Hash, dtype: DType },
    #[error(
        "it refers to itself through too many levels or terms of linear views, the limits are {max_depth} levels and {max_reads} reads"
    )]
    TooDeep { max_depth: usize, max_reads: u64 },
    #[error("file {digest} has {actual} bytes, expected {expected}")]
    FileSize { digest: Hash, expected: u64, actual: u64 },
}

impl Manifest {
    /// Describes tensors that are regions of files.
    pub fn regions(
        content: Content,
        files: Vec<FileRef>,
        tensors: Vec<(TensorEntry, Region)>,
    ) -> Result<Self> {
        let (tensors, regions) = sorted(tensors);
        Self::checked(content, tensors, Layout::Regions { files, regions })
    }

    /// Describes tensors that are sums over other artifacts. Each entry has dtype F32 and no digest.
    pub fn linear(content: Content, tensors: Vec<TensorInfo>, terms: Vec<Term>) -> Result<Self> {
        let tensors = tensors.into_iter().map(|info| (TensorEntry::view(info), ())).collect();
        let (tensors, _) = sorted::<()>(tensors);
        Self::checked(content, tensors, Layout::Linear { terms })
    }

    /// Describes tensors that are put together from those of another artifact. Types are those of the pieces, or F32 where
    /// the pieces are floats of several types.
    pub fn mapped(content: Content, artifact: Hash, tensors: Vec<(TensorInfo, Vec<Part>)>) -> Result<Self> {
        let tensors = tensors.into_iter().map(|(info, parts)| (TensorEntry::view(info), parts)).collect();
        let (entries, tensors) = sorted(tensors);
        Self::checked(content, entries, Layout::Mapped { artifact, tensors })
    }

    /// Describes tensors that are products of the matrices of another artifact. Each entry has dtype F32.
    pub fn low_rank(
        content: Content,
        artifact: Hash,
        tensors: Vec<(TensorInfo, LowRankTensor)>,
    ) -> Result<Self> {
        let tensors = tensors.into_iter().map(|(info, product)| (TensorEntry::view(info), product)).collect();
        let (entries, tensors) = sorted(tensors);
        Self::checked(content, entries, Layout::LowRank { artifact, tensors })
    }

    /// Describes tensors that add the masked entries of a vector to a base. Each entry has the base's dtype; of tensors that the vector
    /// has, F32.
    pub fn masked(
        content: Content,
        base: Hash,
        vector: Hash,
        mask: Hash,
        tensors: Vec<(TensorInfo, f32)>,
    ) -> Result<Self> {
        let tensors = tensors.into_iter().map(|(info, scale)| (TensorEntry::view(info), scale)).collect();
        let (entries, scales) = sorted(tensors);
        Self::checked(content, entries, Layout::Masked { base, vector, mask, scales })
    }

    /// Adds numbers that came up while it was made, such as a parameter that was searched for.
    pub fn with_figures(mut self, figures: BTreeMap<String, f64>) -> Result<Self> {
        self.figures = figures;
        self.check()?;
        Ok(self)
    }

    /// Describes, within this manifest, artifacts that it refers to by [`Self::view_digest`] and that nobody else stores.
    pub fn with_views(mut self, views: Vec<Self>) -> Result<Self> {
        self.views = views;
        self.check()?;
        Ok(self)
    }

    /// Names artifacts that the tensors are about, in an order that matters.
    #[must_use]
    pub fn with_links(mut self, links: Vec<Link>) -> Self {
        self.links = links;
        self
    }

    /// Says which parameters of a model the tensors are factors of; their names, types and shapes are those of the values that the
    /// factors stand for.
    pub fn with_parameters(mut self, parameters: Vec<TensorInfo>) -> Result<Self> {
        let entries = parameters.into_iter().map(|info| (TensorEntry::view(info), ())).collect();
        self.parameters = sorted::<()>(entries).0;
        self.check()?;
        Ok(self)
    }

    /// Describes tensors that lie in one file, each under its own encoding.
    pub fn packed(
        content: Content,
        file: FileRef,
        tensors: Vec<(TensorEntry, PackedTensor)>,
    ) -> Result<Self> {
        let (entries, tensors) = sorted(tensors);
        Self::checked(content, entries, Layout::Packed { file, tensors })
    }

    /// Describes those tensors of a checkpoint that `keep` selects, as regions of its own files, whose digests are given in the
    /// order of `parts`. Files of which nothing is kept are not mentioned. Packed tensors and others lie in one file; a shared base in another.
    pub fn of_checkpoint(
        content: Content,
        parts: &[FilePart],
        digests: &[Hash],
        keep: impl Fn(&TensorInfo) -> bool,
    ) -> Result<Self> {
        assert_eq!(parts.len(), digests.len(), "one digest per file");
        if let ([own, base], [own_digest, base_digest]) = (parts, digests)
            && base.base.is_some()
        {
            let own = Self::of_package(content, own, *own_digest, &keep)?;
            let base = Self::of_package(content, base, *base_digest, &keep)?;
            return Self::on_base(own, base);
        }
        let is_packed = |part: &FilePart| part.tensors.iter().any(|tensor| tensor.encoding.is_some());
        if let Some(packed) = parts.iter().position(is_packed) {
            if parts.len() > 1 {
                return Err(ManifestProblem::PackedShards(parts.len()).into());
            }
            return Self::of_package(content, &parts[packed], digests[packed], keep);
        }
        let mut files = Vec::new();
        let mut tensors = Vec::new();
        for (part, digest) in parts.iter().zip(digests) {
            let file = files.len();
            let kept = part.tensors.iter().filter(|tensor| keep(&tensor.info));
            tensors.extend(kept.map(|tensor| {
                let arrangement = tensor.arrangement.clone();
                let region = Region { file, offset: tensor.offset, length: tensor.length, arrangement };
                (TensorEntry::view(tensor.info.clone()), region)
            }));
            if tensors.last().is_some_and(|(_, region)| region.file == file) {
                files.push(FileRef { digest: *digest, size: part.size, kind: FileKind::Source });
            }
        }
        Self::regions(content, files, tensors)
    }

    /// Describes the sums of some tensors and those of a base, which may lack some; both are views of the result.
    pub fn on_base(own: Self, base: Self) -> Result<Self> {
        let infos = own.tensors.iter().map(TensorEntry::info).collect();
        let shared = Term { partial: true, ..Term::new(1.0, base.view_digest()) };
        let terms = vec![Term::new(1.0, own.view_digest()), shared];
        Self::linear(own.content, infos, terms)?.with_views(vec![own, base])
    }

    fn of_package(
        content: Content,
        part: &FilePart,
        digest: Hash,
        keep: impl Fn(&TensorInfo) -> bool,
    ) -> Result<Self> {
        let file = FileRef { digest, size: part.size, kind: FileKind::Source };
        let kept = part.tensors.iter().filter(|tensor| keep(&tensor.info));
        let tensors = kept.map(|tensor| {
            let encoding = tensor.encoding.clone().unwrap_or(Encoding::Plain);
            let packed = PackedTensor { encoding, offset: tensor.offset, length: tensor.length };
            (TensorEntry::view(tensor.info.clone()), packed)
        });
        Self::packed(content, file, tensors.collect())
    }

    pub fn content(&self) -> Content {
        self.content
    }

    /// Sorted by name.
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Artifacts that this manifest describes itself because nobody else stores them.
    pub fn views(&self) -> &[Self] {
        &self.views
    }

    /// Artifacts that the tensors are about.
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// The artifacts that have a role, in order.
    pub fn linked<'a>(&'a self, role: &'a str) -> impl Iterator<Item = &'a Link> {
        self.links.iter().filter(move |link| link.role == role)
    }

    /// The parameters that the tensors are factors of, sorted by name; empty where the tensors stand for themselves.
    pub fn parameters(&self) -> &[TensorEntry] {
        &self.parameters
    }

    /// Numbers that came up while it was made; all are finite.
    pub fn figures(&self) -> &BTreeMap<String, f64> {
        &self.figures
    }

    /// What a manifest that contains this one as a view calls it: the digest of its JSON.
    pub fn view_digest(&self) -> Hash {
        blake3::hash(&self.to_json())
    }

    /// Files that hold the values, those of its views included, each once.
    pub fn files(&self) -> Vec<FileRef> {
        let mut files = match &self.layout {
            Layout::Regions { files, .. } => files.clone(),
            Layout::Packed { file, .. } => vec![file.clone()],
            Layout::Linear { .. }
            | Layout::Mapped { .. }
            | Layout::LowRank { .. }
            | Layout::Masked { .. } => Vec::new(),
        };
        for file in self.views.iter().flat_map(Self::files) {
            if !files.contains(&file) {
                files.push(file);
            }
        }
        files
    }

    /// Other artifacts that this one and its views refer to, in order, possibly repeated.
    pub fn operands(&self) -> impl Iterator<Item = &Hash> {
        let mut found = Vec::new();
        self.collect_operands(&mut found);
        found.into_iter()
    }

    fn collect_operands<'a>(&'a self, found: &mut Vec<&'a Hash>) {
        let described: Vec<Hash> = self.views.iter().map(Self::view_digest).collect();
        let own: Vec<&Hash> = match &self.layout {
            Layout::Linear { terms } => terms.iter().map(|term| &term.artifact).collect(),
            Layout::Mapped { artifact, .. } | Layout::LowRank { artifact, .. } => vec![artifact],
            Layout::Masked { base, vector, mask, .. } => vec![base, vector, mask],
            Layout::Regions { .. } | Layout::Packed { .. } => Vec::new(),
        };
        let linked = self.links.iter().filter(|link| !link.provenance).map(|link| &link.artifact);
        found.extend(own.into_iter().chain(linked).filter(|artifact| !described.contains(artifact)));
        for view in &self.views {
            view.collect_operands(found);
        }
    }

    /// Bytes of the store's objects that this artifact itself needs, headers included; 0 for a view.
    pub fn stored_bytes(&self) -> u64 {
        let files = self.files();
        let blobs = files.iter().filter(|file| file.kind == FileKind::Blob);
        blobs.fold(0, |total, file| total.saturating_add(file.size))
    }

    /// Bytes that the float tensors, or the parameters that they are factors of, would take in `f32`: the denominator of compression
    /// ratios.
    pub fn f32_bytes(&self) -> u64 {
        let counted = if self.parameters.is_empty() { &self.tensors } else { &self.parameters };
        let floats = counted.iter().filter(|tensor| tensor.dtype.is_float());
        floats.fold(0, |total, tensor| {
            total.saturating_add(4u64.saturating_mul(tensor.info().n_elements() as u64))
        })
    }

    /// Canonical JSON.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings, whole numbers and finite floats can be written")
    }

    pub fn from_json(json: &[u8]) -> Result<Self> {
        serde_json::from_slice(json).map_err(|problem| ManifestProblem::Json(problem.to_string()).into())
    }

    fn checked(content: Content, tensors: Vec<TensorEntry>, layout: Layout) -> Result<Self> {
        let manifest = Self {
            content,
            tensors,
            layout,
            views: Vec::new(),
            links: Vec::new(),
            parameters: Vec::new(),
            figures: BTreeMap::new(),
        };
        manifest.check()?;
        Ok(manifest)
    }
}

impl TensorEntry {
    /// An entry without a digest.
    pub fn view(info: TensorInfo) -> Self {
        Self { name: info.name, dtype: info.dtype, shape: info.shape, digest: None }
    }

    pub fn info(&self) -> TensorInfo {
        TensorInfo { name: self.name.clone(), dtype: self.dtype, shape: self.shape.clone() }
    }
}

fn sorted<T>(mut tensors: Vec<(TensorEntry, T)>) -> (Vec<TensorEntry>, Vec<T>) {
    tensors.sort_by(|(left, _), (right, _)| left.name.cmp(&right.name));
    tensors.into_iter().unzip()
}

#[cfg(test)]
mod tests;
