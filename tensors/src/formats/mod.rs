//! Checkpoint formats: what a path holds, without reading any tensor.
//!
//! A format is one file here and one line in [`FORMATS`]. Nothing is executed, nothing outside the named files is
//! read, and no memory is allocated because a header says so: only what the file itself backs.
//! Adding a format: implement [`Format`] in its own file, list it in [`FORMATS`], give it a property test on damaged input.

pub mod masks;
pub mod npy;
pub mod package;
pub mod pickle;
pub mod pytorch;
pub mod safetensors;
pub mod sharded;
pub mod zip;

mod names;
mod window;

use std::io::Read;
use std::path::{Path, PathBuf};

use blake3::Hash;

use crate::DType;
use crate::arrangement::Arrangement;
use crate::dtype::TensorInfo;
use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::manifest::Content;

pub use names::{Note, Selection};

/// All formats, in the order in which they are asked.
pub static FORMATS: &[&dyn Format] =
    &[&sharded::Sharded, &safetensors::SafeTensors, &npy::Numpy, &pytorch::PyTorch];

/// A way in which checkpoints are stored.
pub trait Format: Sync {
    /// What users call it.
    fn name(&self) -> &'static str;

    /// Whether `path`, whose first bytes are `start`, should be read as this format.
    fn recognizes(&self, path: &Path, start: &[u8]) -> bool;

    /// Returns every file that the checkpoint consists of, `path` first.
    fn files(&self, path: &Path) -> Result<Vec<PathBuf>>;

    /// Returns the tensors of every file that holds some, in a fixed order of files. A prefix that the selection gives
    /// is not yet removed.
    fn describe(&self, path: &Path, selection: &Selection) -> Result<Vec<FilePart>>;

    /// Returns what the tensors mean, where the file says so.
    fn content(&self, _path: &Path) -> Result<Option<Content>> {
        Ok(None)
    }
}

/// One file of a checkpoint, and the tensors in it.
#[derive(Clone, Debug, PartialEq)]
pub struct FilePart {
    pub path: PathBuf,
    pub size: u64,
    /// Sorted by name.
    pub tensors: Vec<TensorRegion>,
    /// What was done to find them, for the reader of the log.
    pub notes: Vec<Note>,
    /// Of the shared base of a package, the digest that the package asks for: its values are added to those of the part before it.
    pub base: Option<Hash>,
}

/// Where a tensor lies in its file: `length` bytes from `offset` bytes after the file's beginning.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorRegion {
    pub info: TensorInfo,
    pub offset: u64,
    pub length: u64,
    /// How the elements lie in these bytes when they are not row-major and little-endian.
    pub arrangement: Option<Arrangement>,
    /// How the bytes stand for the elements when they are packed codes.
    pub encoding: Option<Encoding>,
    /// What the file calls it, when that is not its name.
    pub stored_name: Option<String>,
}

impl TensorRegion {
    /// A tensor of little-endian elements in row-major order, under the name that the file gives it.
    pub fn plain(info: TensorInfo, offset: u64, length: u64) -> Self {
        Self { info, offset, length, arrangement: None, encoding: None, stored_name: None }
    }
}

/// Returns every file that the checkpoint at `path` consists of: a file, an index and its shards, or what a Hugging Face
/// folder holds. Reads at most the index, or the header of a package.
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let (format, path) = detect(path)?;
    format.files(&path)
}

/// Returns what the format of the checkpoint at `path` is called.
pub fn name(path: &Path) -> Result<&'static str> {
    let (format, _) = detect(path)?;
    Ok(format.name())
}

/// Returns the tensors of the checkpoint at `path`, by file. Reads headers only and checks all of them.
pub fn describe(path: &Path) -> Result<Vec<FilePart>> {
    describe_selected(path, &Selection::default())
}

/// Returns what the checkpoint at `path` says its tensors mean; only packages say so.
pub fn content(path: &Path) -> Result<Option<Content>> {
    let (format, path) = detect(path)?;
    format.content(&path)
}

/// [`describe`] for a part of the file, or with other names: see [`Selection`].
pub fn describe_selected(path: &Path, selection: &Selection) -> Result<Vec<FilePart>> {
    let (format, path) = detect(path)?;
    let mut parts = format.describe(&path, selection)?;
    if let Some(prefix) = &selection.strip_prefix {
        names::strip_given(&mut parts, prefix).map_err(|problem| Error::format(path, problem))?;
    }
    Ok(parts)
}

/// What is wrong with a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatProblem {
    #[error("the format is not known{hint}; known formats: {}", format_names())]
    UnknownFormat { hint: &'static str },
    #[error("the folder holds none of {}", folder_files())]
    EmptyFolder,
    #[error("this format has no entries to choose from, so `key` cannot be `{0}`")]
    NoKeys(String),
    #[error("no tensor has a name that begins with `{0}`")]
    NoSuchPrefix(String),
    #[error("it holds no masks: expected a dictionary from task to packed bits")]
    NotMasks,
    #[error(transparent)]
    Zip(#[from] zip::ZipProblem),
    #[error(transparent)]
    Pickle(#[from] pickle::PickleProblem),
    #[error(transparent)]
    PyTorch(#[from] pytorch::TorchProblem),
    #[error(transparent)]
    Numpy(#[from] npy::NpyProblem),
    #[error("the file is truncated: its header describes {expected} bytes, it has {actual}")]
    Truncated { expected: u64, actual: u64 },
    #[error("the file has {actual} bytes, too few for a header")]
    NoHeader { actual: u64 },
    #[error("the header claims {claimed} bytes, more than the file has: {file_size}{hint}")]
    HeaderLargerThanFile { claimed: u64, file_size: u64, hint: &'static str },
    #[error("the header claims {claimed} bytes, the limit is {limit}")]
    HeaderTooLarge { claimed: u64, limit: u64 },
    #[error("the header is not valid: {0}")]
    Header(String),
    #[error("tensor `{0}` is listed twice")]
    DuplicateTensor(String),
    #[error("tensor `{tensor}` has unsupported dtype `{dtype}`; supported: {}", dtype_names())]
    UnknownDType { tensor: String, dtype: String },
    #[error("tensor `{tensor}` has a shape whose size overflows: {shape:?}")]
    ShapeOverflow { tensor: String, shape: Vec<usize> },
    #[error("tensor `{tensor}` of dtype {dtype} and shape {shape:?} needs {expected} bytes, its offsets {start} to {end} hold {}", end.saturating_sub(*start))]
    WrongLength { tensor: String, dtype: DType, shape: Vec<usize>, expected: u64, start: u64, end: u64 },
    #[error(
        "tensor `{tensor}` overlaps tensor `{other}`: it starts at {start}, the other ends at {other_end}"
    )]
    Overlap { tensor: String, other: String, start: u64, other_end: u64 },
    #[error(
        "there is a gap before tensor `{tensor}`: it starts at {start}, the data before it ends at {previous_end}"
    )]
    Gap { tensor: String, start: u64, previous_end: u64 },
    #[error("the file has {surplus} bytes after its last tensor: expected {expected} bytes, it has {actual}", surplus = actual - expected)]
    TrailingBytes { expected: u64, actual: u64 },
    #[error(transparent)]
    Package(#[from] package::PackageProblem),
    #[error("the index is not valid: {0}")]
    Index(String),
    #[error("the index names `{}` as a shard, which is an index itself", .0.display())]
    NestedIndex(PathBuf),
    #[error("the index names shard `{0}`, which is not a file beside it")]
    ShardOutside(String),
    #[error("shard `{}` is missing ({tensors} tensors, such as `{example}`)", path.display())]
    MissingShard { path: PathBuf, tensors: usize, example: String },
    #[error("tensor `{tensor}` is not in shard `{shard}`, where the index lists it")]
    NotInShard { tensor: String, shard: String },
    #[error("tensor `{tensor}` is in shard `{actual}`, the index lists it in `{listed}`")]
    WrongShard { tensor: String, listed: String, actual: String },
    #[error("tensor `{tensor}` is in two shards: `{first}` and `{second}`")]
    InTwoShards { tensor: String, first: String, second: String },
}

/// What stands for a checkpoint in a folder, in the order in which Hugging Face's own loader prefers it.
const FOLDER_FILES: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];

fn detect(path: &Path) -> Result<(&'static dyn Format, PathBuf)> {
    let path = if fs_err::metadata(path)?.is_dir() {
        let candidates = FOLDER_FILES.iter().map(|name| path.join(name));
        candidates
            .into_iter()
            .find(|candidate| candidate.is_file())
            .ok_or_else(|| Error::format(path, FormatProblem::EmptyFolder))?
    } else {
        path.to_owned()
    };
    let mut start = Vec::with_capacity(64);
    fs_err::File::open(&path)?.take(64).read_to_end(&mut start)?;
    let format = FORMATS.iter().find(|format| format.recognizes(&path, &start));
    format.map(|format| (*format, path.clone())).ok_or_else(|| {
        let hint = match &start[..] {
            [] => " (it is empty)",
            [0x1f, 0x8b, ..] => " (it is compressed by gzip; decompress it first)",
            _ if [&b"sys_info\0"[..], b"storages\0", b"tensors\0", b"pickle\0"]
                .iter()
                .any(|member| start.starts_with(member)) =>
            {
                " (it looks like a tar file of PyTorch 0.1; save it again with a later version)"
            }
            _ => lfs_hint(&start),
        };
        Error::format(path, FormatProblem::UnknownFormat { hint })
    })
}

/// A common accident: a repository cloned without its large files.
fn lfs_hint(start: &[u8]) -> &'static str {
    if start.starts_with(b"version https://git-lfs") || start.starts_with(b"version ") {
        " (it is a Git LFS pointer; fetch the file itself with `git lfs pull`)"
    } else {
        ""
    }
}

fn format_names() -> String {
    FORMATS.iter().map(|format| format.name()).collect::<Vec<_>>().join(", ")
}

fn folder_files() -> String {
    FOLDER_FILES.map(|name| format!("`{name}`")).join(", ")
}

fn dtype_names() -> String {
    DType::ALL.map(DType::name).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_known_formats_and_guesses_the_actual_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.pt");
        fs_err::write(&path, b"sys_info\0\0").unwrap();
        let message = describe(&path).unwrap_err().to_string();
        assert!(message.contains("looks like a tar file of PyTorch 0.1"), "{message}");
        assert!(message.contains("safetensors"), "{message}");
        assert!(message.contains("PyTorch (.pt"), "{message}");
    }

    #[test]
    fn recognizes_a_git_lfs_pointer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        fs_err::write(&path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n").unwrap();
        let message = describe(&path).unwrap_err().to_string();
        assert!(message.contains("git lfs pull"), "{message}");
    }

    #[test]
    fn an_empty_folder_and_a_missing_path_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let message = files(folder.path()).unwrap_err().to_string();
        assert!(message.contains("none of `model.safetensors`, `model.safetensors.index.json`"), "{message}");
        let message = files(&folder.path().join("absent")).unwrap_err().to_string();
        assert!(message.contains("absent"), "{message}");
    }
}
