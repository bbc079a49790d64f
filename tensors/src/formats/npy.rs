//! NumPy files: one array (`.npy`), or an archive of arrays (`.npz`).
//!
//! Arrays of numbers are regions of the file, in C or Fortran order and either byte order. Arrays of objects are pickles: an
//! array that holds one dictionary of arrays, which is what `numpy.save` makes of a dictionary, is read like a PyTorch file
//! ([`super::pytorch`]). Members of compressed archives cannot be read in place and are refused.

use std::path::{Path, PathBuf};

use crate::arrangement::Arrangement;
use crate::dtype::{TensorInfo, byte_size};
use crate::error::Result;
use crate::formats::pytorch::{self, Container};
use crate::formats::window::{Failure, Window};
use crate::formats::zip::{self, Directory};
use crate::formats::{FilePart, Format, FormatProblem, Note, Selection, TensorRegion};
use crate::read_at::{FileReader, ReadAt};

/// How files begin.
pub(super) const MAGIC: &[u8] = b"\x93NUMPY";

/// Longest header that is read; NumPy's own limit is 10 000.
const MAX_HEADER_BYTES: u64 = 64 << 10;

/// How the members of an archive are called after the name of the array.
const SUFFIX: &str = ".npy";

/// What an array in a file of its own is called.
const SINGLE: &str = "tensor";

/// The formats' entry in the registry.
pub struct Numpy;

impl Format for Numpy {
    fn name(&self) -> &'static str {
        "NumPy (.npy, .npz)"
    }

    fn recognizes(&self, path: &Path, start: &[u8]) -> bool {
        start.starts_with(MAGIC) || (start.starts_with(&zip::SIGNATURE) && is_npz(path))
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

/// Returns the arrays of a NumPy file, sorted by name, and what is to be said about it.
pub fn describe(file: &dyn ReadAt, selection: &Selection) -> Result<(Vec<TensorRegion>, Vec<Note>)> {
    let window = Window::whole(file);
    let describe = || {
        let mut start = [0; 4];
        if window.length >= 4 {
            window.read(&mut start, 0)?;
        }
        if start == zip::SIGNATURE { archive(window) } else { Ok(array(SINGLE, window)?) }
    };
    match describe().map_err(|failure: Failure| failure.of_file(file))? {
        Some(_) if selection.key.is_some() => {
            let key = selection.key.clone().unwrap_or_default();
            Err(Failure::from(FormatProblem::NoKeys(key)).of_file(file))
        }
        Some(tensors) => Ok((tensors, Vec::new())),
        None => pytorch::describe_objects(file, selection),
    }
}

/// Whether an archive holds arrays rather than a PyTorch file. One that cannot be read is not.
pub(super) fn is_npz(path: &Path) -> bool {
    let Ok(file) = FileReader::open(path) else { return false };
    Directory::read(Window::whole(&file))
        .is_ok_and(|directory| directory.names().any(|name| name.strip_suffix(SUFFIX).is_some()))
}

/// What is wrong with a NumPy file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NpyProblem {
    #[error("the header of {0} is not valid: {1}")]
    Header(String, &'static str),
    #[error("the header of {0} has version {1}, the latest that is known is 3")]
    Version(String, u8),
    #[error("{0} has unsupported element type `{1}`")]
    DType(String, String),
    #[error("{0} holds Python objects; only a file of one such array can be read")]
    Objects(String),
    #[error("{array} of shape {shape:?} needs {expected} bytes, it has {actual}")]
    Length { array: String, shape: Vec<usize>, expected: u64, actual: u64 },
    #[error("{0} has a shape whose size overflows: {1:?}")]
    Overflow(String, Vec<usize>),
}

/// Where the values of an array begin and what they are.
struct Header {
    descr: String,
    column_major: bool,
    shape: Vec<usize>,
    data: u64,
}

/// Returns where the pickle of an array of objects begins, if the file is one.
pub(super) fn objects(window: Window<'_>) -> Result<Option<u64>, Failure> {
    let header = read_header("the array", window)?;
    Ok(header.descr.contains('O').then_some(header.data))
}

fn archive(window: Window<'_>) -> Result<Option<Vec<TensorRegion>>, Failure> {
    let directory = Directory::read(window)?;
    let mut names: Vec<&str> = directory.names().filter_map(|name| name.strip_suffix(SUFFIX)).collect();
    names.sort_unstable();
    let mut tensors = Vec::with_capacity(names.len());
    for name in names {
        let Some(bytes) = directory.member(window, &format!("{name}{SUFFIX}"))? else { continue };
        let arrays = array(name, bytes)?.ok_or_else(|| NpyProblem::Objects(format!("array `{name}`")))?;
        tensors.extend(arrays);
    }
    tensors.sort_by(|left, right| left.info.name.cmp(&right.info.name));
    match tensors.windows(2).find(|pair| pair[0].info.name == pair[1].info.name) {
        Some(pair) => Err(FormatProblem::DuplicateTensor(pair[0].info.name.clone()).into()),
        None => Ok(Some(tensors)),
    }
}

/// Describes one array, unless it holds objects.
fn array(name: &str, window: Window<'_>) -> Result<Option<Vec<TensorRegion>>, Failure> {
    let label = format!("array `{name}`");
    let Header { descr, column_major, shape, data } = read_header(&label, window)?;
    let (big_endian, code) = match descr.split_at_checked(1) {
        Some(("<" | "|" | "=", code)) => (false, code),
        Some((">", code)) => (true, code),
        _ => (false, descr.as_str()),
    };
    if code.starts_with('O') {
        return Ok(None);
    }
    let Some(dtype) = pytorch::dtype_of_numpy(code) else {
        return Err(NpyProblem::DType(label, descr).into());
    };
    let actual = window.length - data;
    let Some(expected) = byte_size(dtype, &shape) else {
        return Err(NpyProblem::Overflow(label, shape).into());
    };
    if actual != expected {
        return Err(NpyProblem::Length { array: label, shape, expected, actual }.into());
    }
    let strides = column_major.then(|| Arrangement::column_major(&shape));
    let arrangement = Arrangement::new(dtype, &shape, strides, big_endian);
    let info = TensorInfo { name: name.to_owned(), dtype, shape };
    let offset = window.start + data;
    Ok(Some(vec![TensorRegion {
        info,
        offset,
        length: expected,
        arrangement,
        encoding: None,
        stored_name: None,
    }]))
}

fn read_header(label: &str, window: Window<'_>) -> Result<Header, Failure> {
    let invalid = |what| Failure::from(NpyProblem::Header(label.to_owned(), what));
    let mut start = [0; 12];
    let available = window.length.min(12) as usize;
    window.read(&mut start[..available], 0)?;
    if available < 12 || !start.starts_with(MAGIC) {
        return Err(invalid("it is too short or does not begin as it should"));
    }
    let (offset, length) = match start[6] {
        1 => (10, u64::from(u16::from_le_bytes([start[8], start[9]]))),
        2 | 3 => (12, u64::from(u32::from_le_bytes([start[8], start[9], start[10], start[11]]))),
        version => return Err(NpyProblem::Version(label.to_owned(), version).into()),
    };
    let text = window.part(offset, length).filter(|text| text.length <= MAX_HEADER_BYTES);
    let text = text.ok_or_else(|| invalid("it is longer than the file or the limit"))?.bytes()?;
    let text = std::str::from_utf8(&text).map_err(|_| invalid("it is not text"))?;
    let (descr, column_major, shape) =
        parse(text).ok_or_else(|| invalid("it is not the expected dictionary"))?;
    Ok(Header { descr, column_major, shape, data: offset + length })
}

/// Parses `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`, in any order of the keys.
fn parse(text: &str) -> Option<(String, bool, Vec<usize>)> {
    let mut rest = text.trim().strip_prefix('{')?.trim_start();
    let (mut descr, mut column_major, mut shape) = (None, None, None);
    while !rest.starts_with('}') {
        let (key, after) = quoted(rest)?;
        rest = after.trim_start().strip_prefix(':')?.trim_start();
        match key {
            "descr" => {
                let (value, after) = quoted(rest)?;
                (descr, rest) = (Some(value.to_owned()), after);
            }
            "fortran_order" => {
                let (value, after) = match rest.strip_prefix("True") {
                    Some(after) => (true, after),
                    None => (false, rest.strip_prefix("False")?),
                };
                (column_major, rest) = (Some(value), after);
            }
            "shape" => {
                let (inside, after) = rest.strip_prefix('(')?.split_once(')')?;
                let extents = inside.split(',').map(str::trim).filter(|extent| !extent.is_empty());
                // Python 2 marked long integers
                let extents = extents.map(|extent| extent.trim_end_matches('L').parse().ok());
                (shape, rest) = (Some(extents.collect::<Option<Vec<usize>>>()?), after);
            }
            _ => return None,
        }
        rest = rest.trim_start();
        rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
    }
    (rest == "}").then_some((descr?, column_major?, shape?))
}

fn quoted(text: &str) -> Option<(&str, &str)> {
    let quote = text.chars().next().filter(|quote| matches!(quote, '\'' | '"'))?;
    text[1..].split_once(quote)
}

/// Opens the pickle of a file of objects.
pub(super) fn open_objects(window: Window<'_>) -> Result<Option<Container<'_>>, Failure> {
    let Some(start) = objects(window)? else { return Ok(None) };
    Container::open_pickle(window, start).map(Some)
}
