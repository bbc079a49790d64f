//! `file`: masks that were made elsewhere.
//!
//! What a file holds is found by looking at it: a dictionary from task to packed bits (one file for all tasks, as the TALL-masks code writes
//! it), or tensors by name (the masks of one task). Bits lie over all tensors of the task vectors, those that `only` and `skip` leave out
//! included, one after the other in the order of their sorted names.

use super::inputs::MaskInputs;
use super::method::{Masking, Method, Prepared, Voting};
use crate::job::JobSource;
use crate::kind::{SourceFile, SourceSet};
use crate::params::{FilePath, Params, Problem, did_you_mean, one_map, parse, to_value};
use crate::{StageError, diff};
use merganser_cache::Value;
use merganser_tensors::formats::{self, masks};
use merganser_tensors::manifest::Content;
use merganser_tensors::{Error, Manifest, Scratch, TensorSource};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(super) struct File;

/// What a mask may be called in a folder, in the order in which it is looked for; `*` is the task.
const PATTERNS: [&str; 7] = [
    "*_mask.pt",
    "*.pt",
    "*/mask.pt",
    "*_mask.safetensors",
    "*.safetensors",
    "*/mask.safetensors",
    "*_mask.npy",
];

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct FileParams {
    /// A file of all tasks' packed bits (`TALL_mask_8task.npy` or `.pt`), a file of one mask (`.pt`, `.safetensors`: tensors of 0 and 1 by
    /// name), which is then every task's, or a folder with one per task: `TASK_mask.pt`, `TASK.pt`, `TASK/mask.pt`, or the same with `.safetensors`.
    path: FilePath,
}

impl Method for File {
    fn id(&self) -> &'static str {
        "file"
    }

    fn summary(&self) -> &'static str {
        "masks that were made elsewhere"
    }

    fn formula(&self) -> &'static str {
        "mask_t as stored; a tensor that a file of tensors lacks has all its entries"
    }

    fn source(&self) -> &'static str {
        "the files of nik-dim/tall_masks (numpy.packbits by task) and of mgradyn/SVD-Quantization-Task-Merging"
    }

    fn schema(&self) -> Schema {
        schema_for!(FileParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Masking>, Vec<Problem>> {
        Ok(Box::new(parse::<FileParams>(params)?))
    }
}

impl Masking for FileParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self, task: Option<&str>) -> Result<Value, StageError> {
        let task = Value::map([("task", task.unwrap_or_default())]);
        Ok(one_map([to_value(self)?, task]))
    }

    fn sources(&self, task: Option<&str>) -> Result<Vec<SourceSet>, StageError> {
        let path = &self.path.path;
        if !path.exists() {
            return Err(StageError::MissingFile { parameter: "path".to_owned(), path: path.clone() });
        }
        if path.is_file() {
            return Ok(vec![SourceSet::one("path", path)]);
        }
        let files: Vec<SourceFile> = match task {
            Some(task) => file_of(path, task).into_iter().collect(),
            None => all_files(path)?,
        };
        if files.is_empty() {
            let what = task.map_or_else(|| "no mask".to_owned(), |task| format!("no mask of task `{task}`"));
            let names = PATTERNS.map(|pattern| format!("`{}`", pattern.replace('*', task.unwrap_or("TASK"))));
            return Err(StageError::input_help(
                format!("`{}` holds {what}", self.path.written),
                format!("looked for {}", names.join(", ")),
            ));
        }
        Ok(vec![SourceSet { parameter: "path".to_owned(), files }])
    }

    fn prepare<'a>(&'a self, inputs: &'a MaskInputs<'a>) -> Result<Prepared<'a>, StageError> {
        let mut opened: BTreeMap<PathBuf, Opened> = BTreeMap::new();
        let mut found = Vec::with_capacity(inputs.asked.len());
        for &task in &inputs.asked {
            let name = inputs.task(task);
            let source = self.source_of(inputs, name)?;
            if !opened.contains_key(&source.path) {
                opened.insert(source.path.clone(), open(inputs, source)?);
            }
            let file = source.path.display().to_string();
            found.push(match &opened[&source.path] {
                Opened::Bits(by_task) => Stored::Bits(bits_of(inputs, by_task, name, &file)?),
                Opened::Tensors(tensors) => Stored::Tensors(by_position(inputs, tensors, name, &file)?),
            });
        }
        let mut offsets = BTreeMap::new();
        let mut offset = 0;
        for info in inputs.vectors[0].tensors.tensors() {
            offsets.insert(info.name.as_str(), offset);
            offset += info.n_elements();
        }
        let offsets = inputs.tensors.iter().map(|info| offsets[info.name.as_str()]).collect();
        Ok(Prepared::new(inputs, Box::new(FromFile { inputs, found, offsets })))
    }
}

impl FileParams {
    /// The file that holds the mask of a task.
    fn source_of<'a>(&self, inputs: &'a MaskInputs<'_>, task: &str) -> Result<&'a JobSource, StageError> {
        let files: Vec<&JobSource> = inputs.job.sources_of("path").collect();
        if let [only] = files.as_slice() {
            return Ok(only);
        }
        let labels = PATTERNS.map(|pattern| pattern.replace('*', task));
        let found = labels.iter().find_map(|label| files.iter().find(|file| file.label == *label));
        found.copied().ok_or_else(|| {
            StageError::input_help(
                format!("`{}` holds no mask of task `{task}`", self.path.written),
                format!("looked for {}", labels.map(|label| format!("`{label}`")).join(", ")),
            )
        })
    }
}

/// The file of a task in a folder. Its name decides nothing: whose mask it is says the task.
fn file_of(folder: &Path, task: &str) -> Option<SourceFile> {
    let candidates = PATTERNS.iter().map(|pattern| folder.join(pattern.replace('*', task)));
    let path = candidates.into_iter().find(|path| path.is_file())?;
    Some(SourceFile { label: String::new(), path })
}

/// Every file in a folder that may be some task's mask, under its name in the folder.
fn all_files(folder: &Path) -> Result<Vec<SourceFile>, StageError> {
    let mut files = Vec::new();
    for entry in fs_err::read_dir(folder)? {
        let path = entry?.path();
        let candidates = if path.is_dir() {
            ["mask.pt", "mask.safetensors"].map(|name| path.join(name)).to_vec()
        } else {
            vec![path]
        };
        for path in candidates.into_iter().filter(|path| path.is_file()) {
            let Some(label) = path.strip_prefix(folder).ok().and_then(Path::to_str) else { continue };
            let is_mask = PATTERNS.iter().any(|pattern| {
                pattern
                    .split_once('*')
                    .is_some_and(|(_, end)| label.ends_with(end) && label.len() > end.len())
            });
            if is_mask {
                files.push(SourceFile { label: label.replace('\\', "/"), path });
            }
        }
    }
    files.sort_by(|a, b| a.label.cmp(&b.label));
    Ok(files)
}

/// What a file holds.
enum Opened {
    /// Packed bits by task.
    Bits(BTreeMap<String, Arc<Vec<u8>>>),
    Tensors(Arc<dyn TensorSource>),
}

fn open(inputs: &MaskInputs<'_>, source: &JobSource) -> Result<Opened, StageError> {
    let job = inputs.job;
    let path = job.files.pin(&source.source)?;
    let described = formats::describe(&source.path);
    if let Ok(parts) = &described {
        let mut names = parts.iter().flat_map(|part| &part.tensors).map(|tensor| tensor.info.name.as_str());
        if names.any(|name| inputs.tensors.iter().any(|info| info.name == name)) {
            let digests = vec![source.source.digest; parts.len()];
            let manifest = Manifest::of_checkpoint(Content::Masks, parts, &digests, |_| true)?;
            return Ok(Opened::Tensors(merganser_tensors::open(&manifest, &job.files)?));
        }
    }
    match (masks::read(&path), described) {
        (Ok(by_task), _) => {
            Ok(Opened::Bits(by_task.into_iter().map(|(task, bits)| (task, Arc::new(bits))).collect()))
        }
        (Err(_), Ok(_)) => Err(StageError::input(format!(
            "`{}` has no tensor of the task vectors, and it is no dictionary of packed bits",
            source.path.display()
        ))),
        (Err(error), Err(_)) => Err(error.into()),
    }
}

/// The bits of a task, under its name or one that differs in case, `-` and `_` only.
fn bits_of(
    inputs: &MaskInputs<'_>,
    by_task: &BTreeMap<String, Arc<Vec<u8>>>,
    task: &str,
    file: &str,
) -> Result<Arc<Vec<u8>>, StageError> {
    let folded = |name: &str| name.to_lowercase().replace(['-', '_', ' '], "");
    let mut alike = by_task.iter().filter(|(name, _)| folded(name) == folded(task));
    let found = match (by_task.get(task), by_task.len(), alike.next(), alike.next()) {
        (Some(exact), ..) => Some(exact),
        (None, 1, ..) if task.is_empty() => by_task.values().next(),
        (None, _, Some((_, only)), None) => Some(only),
        _ => None,
    };
    let Some(bits) = found else {
        let message = format!("`{file}` holds no mask of task `{task}`");
        let help = did_you_mean(task, by_task.keys().map(String::as_str));
        return Err(StageError::Input { message, help });
    };
    let total: usize =
        inputs.vectors[0].tensors.tensors().iter().map(merganser_tensors::TensorInfo::n_elements).sum();
    if bits.len() != total.div_ceil(8) {
        return Err(StageError::input_help(
            format!(
                "the mask of task `{task}` in `{file}` has {} bytes; the {total} entries of the task vectors take {}",
                bits.len(),
                total.div_ceil(8)
            ),
            "the bits are those of all tensors in the order of their sorted names: load the checkpoints under the names that the mask was made for",
        ));
    }
    Ok(Arc::clone(bits))
}

/// A file of tensors, with the position of each of ours in it; one that it lacks has all its entries.
struct Named {
    tensors: Arc<dyn TensorSource>,
    positions: Vec<Option<usize>>,
    what: String,
}

fn by_position(
    inputs: &MaskInputs<'_>,
    tensors: &Arc<dyn TensorSource>,
    task: &str,
    file: &str,
) -> Result<Named, StageError> {
    let mut positions = Vec::with_capacity(inputs.tensors.len());
    for info in &inputs.tensors {
        let position = tensors.index_of(&info.name);
        if let Some(found) = position.map(|position| &tensors.tensors()[position]) {
            let is_flat = found.shape == [info.n_elements()];
            if found.shape != info.shape && !is_flat {
                return Err(StageError::input(format!(
                    "the mask of tensor `{}` in `{file}` has shape {:?}, expected {:?}",
                    info.name, found.shape, info.shape
                )));
            }
        }
        positions.push(position);
    }
    let lacking: Vec<&str> = inputs
        .tensors
        .iter()
        .zip(&positions)
        .filter(|(_, position)| position.is_none())
        .map(|(info, _)| info.name.as_str())
        .collect();
    if !lacking.is_empty() {
        let of = if task.is_empty() { String::new() } else { format!(" of task `{task}`") };
        inputs
            .job
            .warn(format!("the mask{of} has none of {}: all their entries are kept", diff::listed(&lacking)));
    }
    Ok(Named { tensors: Arc::clone(tensors), positions, what: file.to_owned() })
}

/// Where the mask of a task is.
enum Stored {
    Bits(Arc<Vec<u8>>),
    Tensors(Named),
}

struct FromFile<'a> {
    inputs: &'a MaskInputs<'a>,
    found: Vec<Stored>,
    /// The first bit of each tensor.
    offsets: Vec<usize>,
}

impl Voting for FromFile<'_> {
    fn vote(
        &self,
        tensor: usize,
        range: Range<usize>,
        votes: &mut [f32],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        for stored in &self.found {
            match stored {
                Stored::Bits(bits) => {
                    let first = self.offsets[tensor] + range.start;
                    for (bit, vote) in (first..).zip(votes.iter_mut()) {
                        *vote += f32::from(bits[bit / 8] >> (7 - bit % 8) & 1);
                    }
                }
                Stored::Tensors(named) => {
                    named.vote(tensor, &self.inputs.tensors[tensor].name, &range, votes, scratch)?;
                }
            }
        }
        Ok(())
    }
}

impl Named {
    fn vote(
        &self,
        tensor: usize,
        name: &str,
        range: &Range<usize>,
        votes: &mut [f32],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        let Some(position) = self.positions[tensor] else {
            for vote in votes {
                *vote += 1.0;
            }
            return Ok(());
        };
        let refused = |element: usize, value: String| {
            let what = &self.what;
            Error::Io(std::io::Error::other(format!(
                "the mask of tensor `{name}` in `{what}` must hold 0 and 1: element {element} is {value}"
            )))
        };
        let dtype = self.tensors.tensors()[position].dtype;
        if dtype.is_float() {
            let mut values = scratch.take(range.len());
            self.tensors.read_f32(position, range.clone(), &mut values, scratch)?;
            for ((element, value), vote) in range.clone().zip(&values).zip(votes.iter_mut()) {
                if *value != 0.0 && *value != 1.0 {
                    return Err(refused(element, value.to_string()));
                }
                *vote += value;
            }
            scratch.give_back(values);
            return Ok(());
        }
        let size = dtype.size_bytes();
        let mut bytes = vec![0; range.len() * size];
        let wanted = (range.start * size) as u64..(range.end * size) as u64;
        self.tensors.read_bytes(position, wanted, &mut bytes, scratch)?;
        for ((element, value), vote) in range.clone().zip(bytes.chunks_exact(size)).zip(votes.iter_mut()) {
            // little-endian: one is a one and nothing else
            if value[0] > 1 || value[1..].iter().any(|byte| *byte != 0) {
                return Err(refused(element, format!("{dtype} {value:?}")));
            }
            *vote += f32::from(value[0]);
        }
        Ok(())
    }
}
