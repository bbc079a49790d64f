//! PyTorch files, and pickles of tensors, state dicts or whole modules.
//!
//! Three containers hold the same kind of pickle: a zip archive (`torch.save` since 1.6), a sequence of pickles followed by
//! storages (before), and a bare pickle (`pickle.dump`), whose tensors carry such a sequence inside themselves. Nothing is
//! executed ([`super::pickle`]), and no storage is read: tensors are regions of the file, with strides where they are views.
//!
//! * `container`: the three containers, and where in them a storage lies
//! * `tensor`: the records that mean a tensor
//! * `select`: which of them make up the checkpoint; walks modules like `state_dict()` does
//!
//! A whole module gives what its `state_dict()` would return as long as its class does not change that by hooks, which are code.
//! Refused by name: quantized, sparse, nested and conjugated tensors, compressed archives, TorchScript.

mod container;
mod select;
mod tensor;

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::formats::names::strip_wrappers;
use crate::formats::window::{Failure, Window};
use crate::formats::{FilePart, Format, FormatProblem, Note, Selection, TensorRegion, npy, zip};
use crate::read_at::{FileReader, ReadAt};

pub(super) use container::Container;
pub(super) use select::{MaskEntry, mask_entries};
pub(super) use tensor::{Payload, dtype_of_numpy};

/// The format's entry in the registry.
pub struct PyTorch;

impl Format for PyTorch {
    fn name(&self) -> &'static str {
        "PyTorch (.pt, .pth, .bin, .ckpt) and pickle"
    }

    fn recognizes(&self, path: &Path, start: &[u8]) -> bool {
        if start.starts_with(&zip::SIGNATURE) {
            return !npy::is_npz(path);
        }
        is_pickle(start)
    }

    fn files(&self, path: &Path) -> Result<Vec<PathBuf>> {
        Ok(vec![path.to_owned()])
    }

    fn describe(&self, path: &Path, selection: &Selection) -> Result<Vec<FilePart>> {
        let file = FileReader::open(path)?;
        let (tensors, notes) = describe(&file, selection)?;
        Ok(vec![FilePart { path: path.to_owned(), size: file.size(), tensors, notes, base: None }])
    }
}

/// Returns the tensors of a PyTorch file or pickle, sorted by name, and what is to be said about it. Reads no storage.
pub fn describe(file: &dyn ReadAt, selection: &Selection) -> Result<(Vec<TensorRegion>, Vec<Note>)> {
    let window = Window::whole(file);
    let found = Container::open(window).and_then(|container| describe_container(&container, selection));
    found.map_err(|failure| failure.of_file(file))
}

/// [`describe`] for the pickle in a NumPy file of objects.
pub(super) fn describe_objects(
    file: &dyn ReadAt,
    selection: &Selection,
) -> Result<(Vec<TensorRegion>, Vec<Note>)> {
    let describe = || {
        let container = npy::open_objects(Window::whole(file))?.ok_or(FormatProblem::NotMasks)?;
        describe_container(&container, selection)
    };
    describe().map_err(|failure: Failure| failure.of_file(file))
}

fn describe_container(
    container: &Container<'_>,
    selection: &Selection,
) -> Result<(Vec<TensorRegion>, Vec<Note>), Failure> {
    let found = select::tensors(container, selection.key.as_deref())?;
    let select::Found { mut tensors, mut notes, wrapped } = found;
    tensors.sort_by(|left, right| left.info.name.cmp(&right.info.name));
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].info.name == pair[1].info.name) {
        return Err(FormatProblem::DuplicateTensor(pair[0].info.name.clone()).into());
    }
    if selection.strip_prefix.is_none() {
        notes.extend(strip_wrappers(&mut tensors, wrapped));
    }
    Ok((tensors, notes))
}

/// What is wrong with a PyTorch file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TorchProblem {
    #[error("the archive holds no `data.pkl`, as `torch.save` writes it")]
    NoPickle,
    #[error("the archive holds several of `data.pkl`: `{0}` and `{1}`")]
    SeveralPickles(String, String),
    #[error("it is a TorchScript archive; save the model's `state_dict()` instead")]
    TorchScript,
    #[error("its byte order is `{0}`, expected `little` or `big`")]
    ByteOrder(String),
    #[error("the legacy PyTorch file is not valid: {0}")]
    Legacy(&'static str),
    #[error("pickles are nested more than {0} deep")]
    TooDeep(usize),
    #[error("its content is larger than any checkpoint, or refers to itself")]
    TooLarge,
    #[error("it holds no tensors: it is {content}; nothing of it was executed")]
    NoTensors { content: String },
    #[error("several entries hold tensors: {}; choose one with `key`", quoted(.0))]
    Ambiguous(Vec<String>),
    #[error("it has no entry `{key}`{}", available(.entries))]
    NoSuchKey { key: String, entries: Vec<String> },
    #[error("module `{module}` is {content}, whose parameters cannot be found")]
    OpaqueModule { module: String, content: String },
    #[error("tensor `{tensor}` {problem}")]
    Tensor { tensor: String, problem: TensorProblem },
}

/// Why a tensor cannot be read; follows its name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorProblem {
    #[error("is {0}, not a tensor")]
    NotATensor(String),
    #[error("is built by `{callable}`, which is not supported{}", why_unsupported(.callable))]
    Unsupported { callable: String },
    #[error("is lazily {0}; save it after `resolve_conj().resolve_neg()`")]
    Lazy(&'static str),
    #[error("is not valid: {0}")]
    Invalid(&'static str),
    #[error("has the negative size, stride or offset {0}")]
    Negative(i64),
    #[error("has unsupported element type `{0}`")]
    DType(String),
    #[error("has a layout that cannot be read: {0}")]
    Layout(String),
    #[error(
        "has shape {shape:?} and strides {strides:?} from element {offset} on, more than its storage holds: {available} bytes"
    )]
    OutsideStorage { shape: Vec<usize>, strides: Vec<usize>, offset: u64, available: u64 },
    #[error("has its values in storage `{0}`, which is not in the file")]
    NoStorage(String),
    #[error("has its values in storage `{storage}` of {actual} bytes, expected {expected}")]
    StorageLength { storage: String, expected: u64, actual: u64 },
    #[error("has its values stored as text (pickle protocol 2 or older); save it again with protocol 4")]
    TextPayload,
}

/// Bare pickles begin in few ways: with a protocol from 2 on, or with what protocols 0 and 1 write for a call, a container, or the
/// number with which old PyTorch files begin.
pub(super) fn is_pickle(start: &[u8]) -> bool {
    let names = |rest: &[u8]| {
        let line = rest.split(|byte| *byte == b'\n').next().unwrap_or_default();
        line.len() > 1
            && line.len() < rest.len()
            && line.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._".contains(byte))
    };
    match start {
        [0x80, protocol, ..] => (1..=5).contains(protocol),
        [b'c', rest @ ..] => names(rest),
        [b'(', b'd' | b'l' | b't' | b'i' | b'c', ..]
        | [b'}' | b']', b'q' | b'r' | b'(' | b'.' | b'p', ..] => true,
        _ => start.starts_with(b"L119547037146038801333356L"),
    }
}

fn quoted(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

fn available(entries: &[String]) -> String {
    if entries.is_empty() { String::new() } else { format!("; it has {}", quoted(entries)) }
}

fn why_unsupported(callable: &str) -> &'static str {
    if callable.ends_with("qtensor") {
        ": it is quantized, save it after `dequantize()`"
    } else if callable.contains("sparse") {
        ": it is sparse, save it after `to_dense()`"
    } else if callable.contains("nested") {
        ": it is nested, save its parts"
    } else if callable.contains("meta_tensor") {
        ": it is on the meta device and has no values"
    } else {
        ""
    }
}
