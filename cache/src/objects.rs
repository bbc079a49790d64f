//! Objects: putting them in, reading them back verified, and moving damaged ones out of the way.
//!
//! An object is never changed in place. It enters by `rename`, and leaves by `rename` into quarantine when its bytes
//! are not what its name says. Its size is checked on every access; its digest on the first per [`Store`], and again
//! whenever its stat has changed since. What this store wrote itself was hashed on the way in and counts as verified.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::artifact::{Artifact, Source};
use crate::error::{Damage, Error, Part, Result};
use crate::event::CacheEvent;
use crate::hash::hash_file;
use crate::layout::{QUARANTINE, rename_into};
use crate::staging::make_read_only;
use crate::stat::{FileStat, unix_nanoseconds};
use crate::store::{Inner, Store, lock};

/// A verified blob. Its bytes stay what they are for as long as it is open; it may be memory-mapped.
#[derive(Debug)]
pub struct BlobFile {
    /// Where it lies in the store; read-only.
    pub path: PathBuf,
    /// The open file.
    pub file: std::fs::File,
}

impl Store {
    /// Opens a blob whose bytes have been verified.
    ///
    /// A damaged one is moved to quarantine and reported; the caller gets [`Error::Corrupt`] and computes it again.
    pub fn open_blob(&self, digest: &blake3::Hash, size: u64) -> Result<BlobFile> {
        self.inner.open_blob(digest, size)
    }

    /// Reads an artifact's description.
    pub fn load_artifact(&self, digest: &blake3::Hash) -> Result<Arc<Artifact>> {
        self.inner.load_artifact(digest)
    }

    /// Stores an artifact's description and returns its digest; everything that it needs must be there already.
    pub fn store_artifact(&self, artifact: &Artifact) -> Result<blake3::Hash> {
        self.inner.store_artifact(artifact)
    }

    /// Verifies all that reading an artifact takes: descriptions, blobs, operands, and that its sources are in place.
    ///
    /// Meant to be called before a stage consumes the artifact, so that damage is found while it can be repaired.
    pub fn verify_artifact(&self, digest: &blake3::Hash) -> Result<(), Vec<Damage>> {
        let mut damages = Vec::new();
        let mut seen = HashSet::new();
        let mut todo = vec![*digest];
        while let Some(digest) = todo.pop() {
            if seen.insert(digest) {
                match self.inner.load_artifact(&digest) {
                    Ok(artifact) => {
                        self.inner.verify_parts(digest, &artifact, &mut damages);
                        todo.extend(&artifact.operands);
                    }
                    Err(error) => damages.push(Damage {
                        artifact: digest,
                        part: Part::Description,
                        reason: error.to_string(),
                    }),
                }
            }
        }
        if damages.is_empty() {
            return Ok(());
        }
        self.inner.forget_complete();
        Err(damages)
    }
}

/// What one artifact needs besides its own description, all of which was found once.
#[derive(Debug)]
pub(crate) struct Complete {
    pub(crate) artifact: Arc<Artifact>,
    /// Sources of the artifact and of its operands, each with the artifact that points into it.
    sources: Vec<(blake3::Hash, Source)>,
}

/// Objects and records that were last used longer ago than this are marked as used; more often would cost writes.
const TOUCH_AFTER: Duration = Duration::from_hours(1);
/// From this size on an object is worth a sync.
const SYNC_BYTES: u64 = 1 << 20;
/// Descriptions are read whole into memory; a larger file is not one of ours.
const MAX_DESCRIPTION_BYTES: u64 = 256 << 20;
/// Views of views nest as deep as a pipeline is long; a deeper chain was made to exhaust the stack.
const MAX_OPERAND_DEPTH: usize = 512;

impl Inner {
    /// Moves a staged file into the store, unless the object is there already.
    pub(crate) fn install(
        &self,
        staged: &Path,
        file: &fs_err::File,
        digest: &blake3::Hash,
        size: u64,
    ) -> Result<()> {
        let path = self.layout.object(digest);
        if let Ok(metadata) = std::fs::metadata(&path) {
            if metadata.len() == size && !lock(&self.known_bad).contains(digest) {
                // Whoever collects garbage by age must see that the object is wanted again.
                self.touch(&path, &metadata);
                return std::fs::remove_file(staged).map_err(Error::at(staged));
            }
            let reason = if metadata.len() == size {
                "it could not be read".to_owned()
            } else {
                format!("it has {} bytes instead of {size}", metadata.len())
            };
            self.quarantine(&path, Some(&FileStat::of(&metadata)), &reason);
        }
        if size >= SYNC_BYTES {
            file.sync_data().map_err(Error::at(staged))?;
        }
        make_read_only(file).map_err(Error::at(staged))?;
        rename_into(staged, &path)?;
        lock(&self.known_bad).remove(digest);
        // After the rename, which changes the change time.
        if let Ok(stat) = FileStat::of_file(file.file()) {
            lock(&self.verified).insert(*digest, stat);
        }
        Ok(())
    }

    pub(crate) fn load_artifact(&self, digest: &blake3::Hash) -> Result<Arc<Artifact>> {
        if let Some(artifact) = lock(&self.artifacts).get(digest) {
            return Ok(Arc::clone(artifact));
        }
        let path = self.layout.object(digest);
        let file = open_object(&path, digest)?;
        let stat = FileStat::of_file(file.file()).map_err(Error::at(&path))?;
        let corrupt = |reason: String| {
            self.quarantine(&path, Some(&stat), &reason);
            Error::Corrupt { digest: *digest, reason }
        };
        if stat.size > MAX_DESCRIPTION_BYTES {
            return Err(corrupt(format!(
                "{} bytes are too many for the description of an artifact",
                stat.size
            )));
        }
        let bytes = read_all(file, stat.size).map_err(Error::at(&path))?;
        if blake3::hash(&bytes) != *digest {
            return Err(corrupt("its bytes have another digest".to_owned()));
        }
        // The bytes are what the name says, so the object stays; it just is no artifact.
        let artifact = Artifact::from_bytes(&bytes).map_err(|error| Error::Corrupt {
            digest: *digest,
            reason: format!("it is not the description of an artifact: {error}"),
        })?;
        let artifact = Arc::new(artifact);
        lock(&self.artifacts).insert(*digest, Arc::clone(&artifact));
        Ok(artifact)
    }

    /// Returns the artifact if everything that it needs is there: sizes only, nothing large is read.
    pub(crate) fn complete(&self, digest: &blake3::Hash) -> Result<Arc<Complete>, Damage> {
        let complete = self.complete_except_sources(digest, 0)?;
        for (artifact, source) in &complete.sources {
            if !self.source_resolvable(source) {
                return Err(source_damage(*artifact, source));
            }
        }
        Ok(complete)
    }

    pub(crate) fn store_artifact(&self, artifact: &Artifact) -> Result<blake3::Hash> {
        let bytes = artifact.to_bytes();
        let digest = blake3::hash(&bytes);
        let incomplete = |reason| Error::Incomplete { artifact: digest, reason };
        artifact.check().map_err(incomplete)?;
        self.find_parts(digest, artifact, 0).map_err(|damage| incomplete(damage.to_string()))?;
        let path = self.layout.object(&digest);
        match fs_err::read(&path) {
            Ok(existing) if existing == bytes => {
                if let Ok(metadata) = std::fs::metadata(&path) {
                    self.touch(&path, &metadata);
                }
            }
            existing => {
                if existing.is_ok() {
                    self.quarantine(&path, None, "its bytes have another digest");
                }
                self.write_atomically(&path, &bytes, true)?;
            }
        }
        Ok(digest)
    }

    /// Moves a damaged file out of the way and tells so, unless it has been replaced since it was `seen`.
    pub(crate) fn quarantine(&self, path: &Path, seen: Option<&FileStat>, reason: &str) {
        self.forget_complete();
        lock(&self.artifacts).clear();
        match (FileStat::of_path(path), seen) {
            (Ok(now), Some(seen)) if !now.is_same_file(seen) => return,
            (Err(error), _) if error.kind() == io::ErrorKind::NotFound => return,
            _ => {}
        }
        let below_root = path.strip_prefix(self.layout.root()).unwrap_or(path);
        let flat: Vec<_> = below_root.iter().map(|part| part.to_string_lossy()).collect();
        let moment = unix_nanoseconds((self.clock)());
        let count = self.n_quarantined.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}.{moment:x}-{}-{count}", flat.join("-"), std::process::id());
        let target = self.layout.bucket(QUARANTINE).join(name);
        let moved_to = match rename_into(path, &target) {
            Ok(()) => Some(target),
            Err(Error::Io(error)) if error.kind() == io::ErrorKind::NotFound => return,
            Err(_) => None,
        };
        (self.on_event)(CacheEvent::Quarantined {
            path: path.to_owned(),
            moved_to,
            reason: reason.to_owned(),
        });
    }

    /// Marks a file as used now, if that was last done long ago. Best effort: it only serves garbage collection.
    pub(crate) fn touch(&self, path: &Path, metadata: &std::fs::Metadata) {
        let now = (self.clock)();
        let age = metadata.modified().ok().and_then(|modified| now.duration_since(modified).ok());
        if age.is_some_and(|age| age > TOUCH_AFTER) {
            let _ = std::fs::File::open(path).and_then(|file| file.set_modified(now));
        }
    }

    fn open_blob(&self, digest: &blake3::Hash, size: u64) -> Result<BlobFile> {
        let path = self.layout.object(digest);
        let file = open_object(&path, digest)?;
        let stat = FileStat::of_file(file.file()).map_err(Error::at(&path))?;
        if stat.size != size {
            return Err(self.corrupt(digest, &stat, format!("it has {} bytes instead of {size}", stat.size)));
        }
        if !self.is_verified(digest, &stat) {
            let _guard = self.verifying.enter(digest);
            if !self.is_verified(digest, &stat) {
                let found = hash_file(file.file(), size, &|_| {}).map_err(|source| {
                    // A bad sector, say: the next writer of this object must not trust it.
                    lock(&self.known_bad).insert(*digest);
                    let message = format!("cannot read `{}`: {source}", path.display());
                    Error::Io(io::Error::new(source.kind(), message))
                })?;
                if found != *digest {
                    return Err(self.corrupt(digest, &stat, "its bytes have another digest".to_owned()));
                }
                lock(&self.verified).insert(*digest, stat);
            }
        }
        Ok(BlobFile { path, file: file.into_file() })
    }

    fn corrupt(&self, digest: &blake3::Hash, stat: &FileStat, reason: String) -> Error {
        lock(&self.known_bad).insert(*digest);
        self.quarantine(&self.layout.object(digest), Some(stat), &reason);
        Error::Corrupt { digest: *digest, reason }
    }

    fn is_verified(&self, digest: &blake3::Hash, stat: &FileStat) -> bool {
        lock(&self.verified).get(digest) == Some(stat)
    }

    fn verify_parts(&self, digest: blake3::Hash, artifact: &Artifact, damages: &mut Vec<Damage>) {
        for blob in &artifact.blobs {
            if let Err(error) = self.open_blob(&blob.digest, blob.size) {
                let part = Part::Blob { name: blob.name.clone(), digest: blob.digest };
                damages.push(Damage { artifact: digest, part, reason: error.to_string() });
            }
        }
        let gone = artifact.sources.iter().filter(|source| !self.source_resolvable(source));
        damages.extend(gone.map(|source| source_damage(digest, source)));
    }

    pub(crate) fn complete_except_sources(
        &self,
        digest: &blake3::Hash,
        depth: usize,
    ) -> Result<Arc<Complete>, Damage> {
        if let Some(complete) = lock(&self.complete).get(digest) {
            return Ok(Arc::clone(complete));
        }
        let damage = |reason| Damage { artifact: *digest, part: Part::Description, reason };
        if depth > MAX_OPERAND_DEPTH {
            return Err(damage(format!("its operands nest deeper than {MAX_OPERAND_DEPTH}")));
        }
        let artifact = self.load_artifact(digest).map_err(|error| damage(error.to_string()))?;
        let sources = self.find_parts(*digest, &artifact, depth)?;
        let complete = Arc::new(Complete { artifact, sources });
        lock(&self.complete).insert(*digest, Arc::clone(&complete));
        Ok(complete)
    }

    /// Finds the blobs and operands of an artifact and returns the sources that it needs in all.
    fn find_parts(
        &self,
        digest: blake3::Hash,
        artifact: &Artifact,
        depth: usize,
    ) -> Result<Vec<(blake3::Hash, Source)>, Damage> {
        for blob in &artifact.blobs {
            self.find_blob(&blob.digest, blob.size).map_err(|reason| Damage {
                artifact: digest,
                part: Part::Blob { name: blob.name.clone(), digest: blob.digest },
                reason,
            })?;
        }
        let mut seen = HashSet::new();
        let mut sources = Vec::new();
        for source in &artifact.sources {
            if seen.insert(*source) {
                sources.push((digest, *source));
            }
        }
        for operand in &artifact.operands {
            let operand = self.complete_except_sources(operand, depth + 1)?;
            sources.extend(operand.sources.iter().filter(|(_, source)| seen.insert(*source)));
        }
        Ok(sources)
    }

    fn find_blob(&self, digest: &blake3::Hash, size: u64) -> Result<(), String> {
        let path = self.layout.object(digest);
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.len() == size && metadata.is_file() => Ok(()),
            Ok(metadata) => {
                let reason = format!("it has {} bytes instead of {size}", metadata.len());
                Err(self.corrupt(digest, &FileStat::of(&metadata), reason).to_string())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Error::Missing { digest: *digest }.to_string())
            }
            Err(error) => Err(format!("cannot read `{}`: {error}", path.display())),
        }
    }

    fn forget_complete(&self) {
        lock(&self.complete).clear();
    }
}

fn open_object(path: &Path, digest: &blake3::Hash) -> Result<fs_err::File> {
    fs_err::File::open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::Missing { digest: *digest },
        _ => Error::at(path)(error),
    })
}

fn source_damage(artifact: blake3::Hash, source: &Source) -> Damage {
    let reason = "no known file has that content any more".to_owned();
    Damage { artifact, part: Part::Source { digest: source.digest }, reason }
}

/// Reads a file of known size in one allocation.
pub(crate) fn read_all(mut file: fs_err::File, size: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(size as usize);
    io::Read::read_to_end(&mut file, &mut bytes)?;
    Ok(bytes)
}
