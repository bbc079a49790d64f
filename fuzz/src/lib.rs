//! What the fuzz targets do with their bytes, shared by cargo-fuzz and by the mutation loop.
//!
//! A target reads the bytes as one format. What is accepted must keep its promises: tensors are described validly, lie inside
//! the file, and can be read. Anything else is a crash.

use std::io;
use std::path::Path;
use std::sync::Arc;

use merganser_tensors::formats::{FilePart, Note, Selection, TensorRegion};
use merganser_tensors::formats::{masks, npy, pytorch, safetensors, sharded, zip};
use merganser_tensors::lora::Adapter;
use merganser_tensors::manifest::{Content, FileRef};
use merganser_tensors::{Manifest, ReadAt, Resolver, Scratch, TensorInfo, keymap, open};

mod seeds;

pub use seeds::seeds;

/// A parser of foreign bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Bare pickles and PyTorch files before 1.6.
    Pickle,
    /// PyTorch archives.
    Torch,
    /// The directory of zip files.
    Zip,
    /// Headers of safetensors files; telling a family from their names.
    Safetensors,
    /// `.npy` and `.npz`, and files of masks.
    Numpy,
    /// Indexes of shards.
    Index,
    /// Configurations of LoRA adapters and the names and shapes of their factors: a configuration, a zero byte, a safetensors file.
    Adapter,
    /// Descriptions of artifacts.
    Manifest,
}

impl Target {
    pub const ALL: [Self; 8] = [
        Self::Pickle,
        Self::Torch,
        Self::Zip,
        Self::Safetensors,
        Self::Numpy,
        Self::Index,
        Self::Adapter,
        Self::Manifest,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Pickle => "pickle",
            Self::Torch => "torch",
            Self::Zip => "zip",
            Self::Safetensors => "safetensors",
            Self::Numpy => "numpy",
            Self::Index => "index",
            Self::Adapter => "adapter",
            Self::Manifest => "manifest",
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
            Self::Zip => check_members(&file),
            Self::Numpy => {
                check(&file, npy::describe(&file, &everything));
                let _ = masks::read_from(&file);
            }
            Self::Safetensors => {
                if let Ok(header) = safetensors::read_header(&file).expect("memory can be read") {
                    let infos: Vec<TensorInfo> = header.tensors.iter().map(|t| t.info.clone()).collect();
                    check(&file, Ok((header.tensors, Vec::new())));
                    if let Ok(Some(family)) = keymap::identify(&infos) {
                        assert!(family.n_matched <= family.n_floats, "each name is explained once");
                    }
                }
            }
            Self::Index => {
                let _ = sharded::parse_index(bytes);
            }
            Self::Adapter => check_adapter(bytes),
            Self::Manifest => {
                if let Ok(manifest) = Manifest::from_json(bytes) {
                    let again =
                        Manifest::from_json(&manifest.to_json()).expect("what is written can be read");
                    assert!(again == manifest, "what is written says the same");
                    let _ = open(&manifest, &Memory(Arc::new(file)));
                }
            }
        }
    }
}

/// Members lie inside the archive and apart from each other.
fn check_members(file: &Vec<u8>) {
    let Ok(members) = zip::members(file) else { return };
    let mut regions: Vec<_> = members.into_values().filter(|region| !region.is_empty()).collect();
    regions.sort_by_key(|region| region.start);
    assert!(regions.windows(2).all(|pair| pair[0].end <= pair[1].start), "members are apart");
    assert!(regions.last().is_none_or(|region| region.end <= file.len() as u64), "members are inside");
}

/// Products that are accepted can be described and read.
fn check_adapter(bytes: &[u8]) {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let (config, weights) = (&bytes[..end], bytes[end..].get(1..).unwrap_or_default().to_vec());
    let Ok(header) = safetensors::read_header(&weights).expect("memory can be read") else { return };
    let size = weights.len() as u64;
    let part = FilePart { path: "memory".into(), size, tensors: header.tensors, notes: Vec::new(), base: None };
    let Ok(adapter) = Adapter::new(config, vec![part], Path::new("memory")) else { return };
    let Ok(manifest) = adapter.manifest(&[blake3::Hash::from_bytes([7; 32])], |_| true) else { return };
    read(&manifest, weights);
}

/// What is accepted can be described by a manifest and read.
fn check(file: &Vec<u8>, described: merganser_tensors::Result<(Vec<TensorRegion>, Vec<Note>)>) {
    let Ok((tensors, notes)) = described else { return };
    for note in &notes {
        assert!(!note.to_string().is_empty());
    }
    let part = FilePart { path: "memory".into(), size: file.len() as u64, tensors, notes, base: None };
    let digest = blake3::Hash::from_bytes([7; 32]);
    let manifest = Manifest::of_checkpoint(Content::Checkpoint, &[part], &[digest], |_| true);
    read(&manifest.expect("what a format describes is valid"), file.clone());
}

/// What is described can be read: the beginnings and ends of some tensors.
fn read(manifest: &Manifest, file: Vec<u8>) {
    let source = open(manifest, &Memory(Arc::new(file))).expect("the file has the described size");
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
