//! Checkpoints read where they lie, outside of any store.
//!
//! Manifests name files by the digest of their content. To look into a file, its content need not be hashed: here a file's "digest" is that
//! of its path. It must never reach a store. Two sources may be read through one [`Scratch`](crate::Scratch), which tells regions apart by
//! these digests, so they are unique among all [`LocalFiles`] of a process.

use std::collections::HashMap;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use blake3::Hash;

use crate::error::Result;
use crate::formats::FilePart;
use crate::manifest::{FileRef, Manifest};
use crate::read_at::{FileReader, ReadAt};
use crate::source::Resolver;

/// Files under made-up digests.
#[derive(Debug, Default)]
pub struct LocalFiles {
    paths: HashMap<Hash, PathBuf>,
}

impl LocalFiles {
    /// Adds the files of a checkpoint, and returns what manifests are to call them, in the order of `parts`.
    pub fn add(&mut self, parts: &[FilePart]) -> Vec<Hash> {
        let digests = parts.iter().map(|part| {
            let digest = blake3::hash(part.path.as_os_str().as_bytes());
            self.paths.insert(digest, part.path.clone());
            digest
        });
        digests.collect()
    }
}

impl Resolver for LocalFiles {
    fn file(&self, file: &FileRef) -> Result<Arc<dyn ReadAt>> {
        let path = self.paths.get(&file.digest).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(Arc::new(FileReader::open(path)?))
    }

    /// There are no other artifacts: what a view is made of is described within it.
    fn manifest(&self, _: &Hash) -> Result<Manifest> {
        Err(io::Error::from(io::ErrorKind::NotFound).into())
    }
}
