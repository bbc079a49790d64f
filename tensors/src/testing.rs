//! An artifact store in memory, for the tests of this crate.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use blake3::Hash;

use crate::DType;
use crate::dtype::TensorInfo;
use crate::error::Result;
use crate::manifest::{Content, FileKind, FileRef, Manifest, Region, TensorEntry, Term};
use crate::read_at::ReadAt;
use crate::source::{Resolver, TensorSource, open};

/// Bytes that remember what was read of them.
pub(crate) struct Counting {
    bytes: Vec<u8>,
    pub(crate) reads: Mutex<Vec<(u64, usize)>>,
}

impl ReadAt for Counting {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.reads.lock().unwrap().push((offset, buffer.len()));
        self.bytes.read_exact_at(buffer, offset)
    }

    fn name(&self) -> String {
        "memory".to_owned()
    }
}

#[derive(Default)]
pub(crate) struct Store {
    pub(crate) files: HashMap<Hash, Arc<Counting>>,
    manifests: HashMap<Hash, Manifest>,
}

impl Resolver for Store {
    fn file(&self, file: &FileRef) -> Result<Arc<dyn ReadAt>> {
        Ok(self.files[&file.digest].clone())
    }

    fn manifest(&self, artifact: &Hash) -> Result<Manifest> {
        Ok(self.manifests[artifact].clone())
    }
}

impl Store {
    pub(crate) fn add_file(&mut self, bytes: Vec<u8>) -> FileRef {
        let digest = blake3::hash(&bytes);
        let size = bytes.len() as u64;
        self.files.insert(digest, Arc::new(Counting { bytes, reads: Mutex::default() }));
        FileRef { digest, size, kind: FileKind::Blob }
    }

    pub(crate) fn add(&mut self, manifest: Manifest) -> Hash {
        let digest = blake3::hash(&manifest.to_json());
        self.manifests.insert(digest, manifest);
        digest
    }

    /// Stores tensors one after the other in a file of their own.
    pub(crate) fn checkpoint(&mut self, tensors: &[(&str, DType, &[usize], &[u8])]) -> Manifest {
        let bytes: Vec<u8> = tensors.iter().flat_map(|(_, _, _, bytes)| bytes.iter().copied()).collect();
        let file = self.add_file(bytes);
        let mut offset = 0;
        let regions = tensors.iter().map(|(name, dtype, shape, bytes)| {
            let entry =
                TensorEntry { name: (*name).to_owned(), dtype: *dtype, shape: shape.to_vec(), digest: None };
            let length = bytes.len() as u64;
            offset += length;
            (entry, Region { file: 0, offset: offset - length, length, arrangement: None })
        });
        Manifest::regions(Content::Checkpoint, vec![file], regions.collect()).unwrap()
    }

    /// Stores one F32 tensor called `name`.
    pub(crate) fn one(&mut self, name: &str, values: &[f32]) -> Hash {
        let manifest = self.checkpoint(&[(name, DType::F32, &[values.len()], bytemuck::cast_slice(values))]);
        self.add(manifest)
    }

    pub(crate) fn linear(tensors: &[(&str, &[usize])], terms: &[(f64, Hash)]) -> Result<Manifest> {
        let infos = tensors.iter().map(|(name, shape)| TensorInfo {
            name: (*name).to_owned(),
            dtype: DType::F32,
            shape: shape.to_vec(),
        });
        let terms = terms.iter().map(|&(coefficient, artifact)| Term::new(coefficient, artifact));
        Manifest::linear(Content::TaskVectors, infos.collect(), terms.collect())
    }

    pub(crate) fn open(&self, manifest: &Manifest) -> Result<Arc<dyn TensorSource>> {
        open(manifest, self)
    }

    /// Number of reads of all files since the last call.
    pub(crate) fn take_reads(&self) -> usize {
        self.files.values().map(|file| std::mem::take(&mut *file.reads.lock().unwrap()).len()).sum()
    }
}

/// Some values that differ everywhere.
pub(crate) fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + seed) * 7919 % 10_007) as f32 - 5000.0) * 1.3e-3).collect()
}
