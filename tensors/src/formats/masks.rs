//! Files of masks: a dictionary from task to bits, eight in a byte, the first bit in the most significant place.
//!
//! This is what `numpy.packbits` makes of the masks of the TALL-masks code, saved by `numpy.save` or by `torch.save`. The bits of a
//! task are those of all its parameters one after the other, in the order of their sorted names; the last byte is padded with zeros.
//! Unlike checkpoints, these files are read whole: they have a bit per parameter.

use std::collections::BTreeMap;
use std::path::Path;

use crate::DType;
use crate::error::Result;
use crate::formats::FormatProblem;
use crate::formats::npy;
use crate::formats::pytorch::{Container, MaskEntry, Payload, TensorProblem, TorchProblem, mask_entries};
use crate::formats::window::{Failure, Window};
use crate::read_at::{FileReader, ReadAt};

/// Returns the packed bits of every task.
pub fn read(path: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    read_from(&FileReader::open(path)?)
}

/// [`read`] from an open file.
pub fn read_from(file: &dyn ReadAt) -> Result<BTreeMap<String, Vec<u8>>> {
    masks(Window::whole(file)).map_err(|failure| failure.of_file(file))
}

fn masks(window: Window<'_>) -> Result<BTreeMap<String, Vec<u8>>, Failure> {
    let mut start = [0; 6];
    if window.length >= 6 {
        window.read(&mut start, 0)?;
    }
    let container = if start == npy::MAGIC {
        npy::open_objects(window)?.ok_or(FormatProblem::NotMasks)?
    } else {
        Container::open(window)?
    };
    let mut masks = BTreeMap::new();
    let mut total = 0u64;
    for (task, entry) in mask_entries(&container)? {
        let bytes = packed_bytes(&container, &task, entry)?;
        // the same bytes may be listed under any number of names
        total += bytes.len() as u64;
        if total > window.length {
            return Err(TorchProblem::TooLarge.into());
        }
        if masks.insert(task.clone(), bytes).is_some() {
            return Err(FormatProblem::DuplicateTensor(task).into());
        }
    }
    Ok(masks)
}

fn packed_bytes(container: &Container<'_>, task: &str, entry: MaskEntry<'_>) -> Result<Vec<u8>, Failure> {
    let fail = |problem| Failure::from(TorchProblem::Tensor { tensor: task.to_owned(), problem });
    let (dtype, shape, bytes) = match entry {
        MaskEntry::Array(array) => {
            let bytes = match array.payload {
                Payload::Bytes(bytes) => bytes.bytes()?,
                Payload::Escaped => return Err(fail(TensorProblem::TextPayload)),
                Payload::Latin1(text) => {
                    let text = String::from_utf8(text.bytes()?);
                    let text = text.map_err(|_| fail(TensorProblem::Invalid("its text is not UTF-8")))?;
                    let bytes: Option<Vec<u8>> = text.chars().map(|c| u8::try_from(c).ok()).collect();
                    bytes.ok_or_else(|| fail(TensorProblem::Invalid("its text is not made of bytes")))?
                }
            };
            (array.dtype, array.shape, bytes)
        }
        MaskEntry::Tensor(tensor) => {
            if tensor.arrangement.is_some() {
                return Err(fail(TensorProblem::Layout("packed bits are not contiguous".to_owned())));
            }
            let bytes = Window { file: container.graph.file(), start: tensor.offset, length: tensor.length };
            (tensor.info.dtype, tensor.info.shape, bytes.bytes()?)
        }
    };
    if dtype != DType::U8 {
        return Err(fail(TensorProblem::DType(dtype.name().to_owned())));
    }
    match &shape[..] {
        [length] if *length == bytes.len() => Ok(bytes),
        _ => Err(fail(TensorProblem::Layout(format!(
            "shape {shape:?} for {} bytes of packed bits",
            bytes.len()
        )))),
    }
}
