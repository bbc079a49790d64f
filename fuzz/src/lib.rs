//! What the fuzz targets do with their bytes, shared by cargo-fuzz and by the mutation loop.
//!
//! A target reads the bytes as one format. What is accepted must keep its promises: tensors are described validly, lie inside
//! the file, and can be read. Anything else is a crash.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use merganser_tensors::formats::{FilePart, Note, Selection, TensorRegion};
use merganser_tensors::formats::{masks, npy, pytorch, safetensors, sharded};
use merganser_tensors::manifest::{Content, FileRef};
use merganser_tensors::{Manifest, ReadAt, Resolver, Scratch, open};

/// A parser of foreign bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Bare pickles and PyTorch files before 1.6.
    Pickle,
    /// PyTorch archives; the directory of zip files.
    Torch,
    /// Headers of safetensors files.
    Safetensors,
    /// `.npy` and `.npz`, and files of masks.
    Numpy,
    /// Indexes of shards.
    Index,
}

impl Target {
    pub const ALL: [Self; 5] = [Self::Pickle, Self::Torch, Self::Safetensors, Self::Numpy, Self::Index];

    pub fn name(self) -> &'static str {
        match self {
            Self::Pickle => "pickle",
            Self::Torch => "torch",
            Self::Safetensors => "safetensors",
            Self::Numpy => "numpy",
            Self::Index => "index",
        }
    }

    /// Whether a committed file is a seed of this target.
    pub fn takes(self, file_name: &str, start: &[u8]) -> bool {
        let zip = start.starts_with(b"PK");
        let extension = file_name.rsplit('.').next().unwrap_or_default();
        match self {
            Self::Pickle => matches!(extension, "pt" | "pkl") && !zip,
            Self::Torch => extension == "pt" && zip,
            Self::Safetensors => extension == "safetensors",
            Self::Numpy => matches!(extension, "npy" | "npz"),
            Self::Index => extension == "json",
        }
    }

    /// Reads `bytes` as this target's format; panics when a promise is broken.
    pub fn run(self, bytes: &[u8]) {
        let file = bytes.to_vec();
        let everything = Selection::default();
        match self {
            Self::Pickle | Self::Torch => {
                check(&file, pytorch::describe(&file, &everything));
                let _ = masks::read_from(&file);
                let nested = Selection { key: Some("model.a".to_owned()), strip_prefix: None };
                let _ = pytorch::describe(&file, &nested);
            }
            Self::Numpy => {
                check(&file, npy::describe(&file, &everything));
                let _ = masks::read_from(&file);
            }
            Self::Safetensors => {
                if let Ok(header) = safetensors::read_header(&file).expect("memory can be read") {
                    check(&file, Ok((header.tensors, Vec::new())));
                }
            }
            Self::Index => {
                let _ = sharded::parse_index(bytes);
            }
        }
    }
}

/// What is accepted can be described by a manifest and read.
fn check(file: &Vec<u8>, described: merganser_tensors::Result<(Vec<TensorRegion>, Vec<Note>)>) {
    let Ok((tensors, notes)) = described else { return };
    for note in &notes {
        assert!(!note.to_string().is_empty());
    }
    let part = FilePart { path: "memory".into(), size: file.len() as u64, tensors, notes };
    let digest = blake3::Hash::from_bytes([7; 32]);
    let manifest = Manifest::of_checkpoint(Content::Checkpoint, &[part], &[digest], |_| true);
    let manifest = manifest.expect("what a format describes is valid");
    let source = open(&manifest, &Memory(Arc::new(file.clone()))).expect("the file has the described size");
    let mut scratch = Scratch::new();
    for (tensor, info) in source.tensors().iter().enumerate().take(8) {
        let size = info.size_bytes();
        let mut out = vec![0; size.min(1 << 12) as usize];
        let length = out.len() as u64;
        source.read_bytes(tensor, 0..length, &mut out, &mut scratch).expect("tensors lie inside the file");
        source.read_bytes(tensor, size - length..size, &mut out, &mut scratch).expect("to their ends");
    }
}

struct Memory(Arc<Vec<u8>>);

impl Resolver for Memory {
    fn file(&self, _: &FileRef) -> merganser_tensors::Result<Arc<dyn ReadAt>> {
        Ok(self.0.clone())
    }

    fn manifest(&self, _: &blake3::Hash) -> merganser_tensors::Result<Manifest> {
        Err(io::Error::from(io::ErrorKind::NotFound).into())
    }
}

/// Seeds by target: the committed files and a few that are written here.
pub fn seeds() -> io::Result<BTreeMap<&'static str, Vec<Vec<u8>>>> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tensors/tests/data/torch");
    let mut files = Vec::new();
    for folder in [folder.clone(), folder.join("refused"), folder.join("sharded")] {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_file() {
                files.push((
                    path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                    std::fs::read(&path)?,
                ));
            }
        }
    }
    files.sort();
    Ok(Target::ALL
        .into_iter()
        .map(|target| {
            let mine = files.iter().filter(|(name, bytes)| target.takes(name, bytes));
            (target.name(), mine.map(|(_, bytes)| bytes.clone()).collect())
        })
        .collect())
}
