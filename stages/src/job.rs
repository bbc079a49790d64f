//! What a running unit is given: opened inputs and sources, a staging area, services, and someone to tell.
//!
//! INVARIANT: a job hands out tensors, never paths into the cache. User files are handed out by parameter, opened and pinned to the digest
//! that entered the key.

use crate::kind::Unit;
use crate::{Draft, Services, StageError};
use blake3::Hash;
use merganser_cache::{self as cache, Preimage, Source, Staging, Store};
use merganser_tensors::manifest::{FileKind, FileRef};
use merganser_tensors::{FileReader, Manifest, ReadAt, Resolver, TensorSource};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How far a unit has come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    pub done: u64,
    pub total: u64,
    pub unit: ProgressUnit,
    /// What else is worth seeing on the way, such as a loss.
    pub figures: Figures,
}

/// A few numbers with their names.
pub type Figures = [Option<(&'static str, f64)>; 2];

/// What is being counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgressUnit {
    Bytes,
    Images,
    Texts,
    /// Of training.
    Steps,
}

/// Something worth telling while a unit runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    Progress(Progress),
    /// Not an error, but the user should know.
    Warning(String),
    /// What is being done, such as installing ONNX Runtime.
    Info(String),
}

/// An input artifact of a unit.
#[derive(Clone, Debug)]
pub struct JobInput {
    pub port: String,
    /// The member's name when the port holds a collection or was narrowed to one of its members.
    pub member: Option<String>,
    pub artifact: Hash,
}

/// A source file with the digest that entered the key.
#[derive(Clone, Debug)]
pub struct JobSource {
    pub parameter: String,
    pub label: String,
    pub path: PathBuf,
    pub source: Source,
}

/// A unit that is being run.
pub struct Job<'a> {
    pub unit: Unit,
    pub inputs: Vec<JobInput>,
    pub sources: Vec<JobSource>,
    /// What its key is made of.
    pub preimage: &'a Preimage,
    pub services: &'a Services,
    /// CPU threads that this unit may use.
    pub threads: usize,
    pub staging: &'a Staging,
    pub notify: &'a (dyn Fn(Notice) + Sync),
    /// The time since some moment in the past.
    pub clock: &'a (dyn Fn() -> Duration + Sync),
    pub cancelled: &'a (dyn Fn() -> bool + Sync),
    pub files: OpenFiles<'a>,
    /// Whether the user wants everything computed again: parts that are in the store are not used.
    pub forced: bool,
}

impl Job<'_> {
    /// This job with the files of one of several datasets ([`SourceSet::scoped`](crate::SourceSet)) under the parameters that an evaluation
    /// knows them by.
    pub(crate) fn scoped(&self, scope: &str) -> Self {
        let sources = self.sources.iter().filter_map(|source| {
            let parameter = source.parameter.strip_prefix(scope)?.strip_prefix('/')?.to_owned();
            Some(JobSource { parameter, ..source.clone() })
        });
        Self {
            unit: self.unit.clone(),
            inputs: self.inputs.clone(),
            sources: sources.collect(),
            files: self.files.clone(),
            ..*self
        }
    }
}

impl Job<'_> {
    /// The single artifact on a port.
    pub fn input(&self, port: &str) -> Result<&JobInput, StageError> {
        self.optional(port).ok_or_else(|| StageError::Internal(format!("port `{port}` was not connected")))
    }

    /// The single artifact on a port that may be left open.
    pub fn optional(&self, port: &str) -> Option<&JobInput> {
        self.inputs_on(port).next()
    }

    /// All artifacts on a port, in order.
    pub fn inputs_on(&self, port: &str) -> impl Iterator<Item = &JobInput> {
        self.inputs.iter().filter(move |input| input.port == port)
    }

    /// Opens an input's tensors; views are read through, packed tensors are unpacked as they are read.
    pub fn tensors(&self, input: &JobInput) -> Result<Arc<dyn TensorSource>, StageError> {
        Ok(merganser_tensors::open(&self.files.manifest(&input.artifact)?, &self.files)?)
    }

    /// The files of a parameter.
    pub fn sources_of(&self, parameter: &str) -> impl Iterator<Item = &JobSource> {
        self.sources.iter().filter(move |source| source.parameter == parameter)
    }

    /// The only file of a parameter.
    pub fn source(&self, parameter: &str) -> Result<&JobSource, StageError> {
        self.sources_of(parameter)
            .next()
            .ok_or_else(|| StageError::Internal(format!("no file was resolved for `{parameter}`")))
    }

    /// Reads a small source file whole.
    pub fn read(&self, source: &JobSource) -> Result<Vec<u8>, StageError> {
        self.files.pin(&source.source)?;
        Ok(fs_err::read(&source.path)?)
    }

    /// An artifact that is worth keeping by itself, because other units need the same or because a killed run should not start over: found
    /// under its own key, or computed, alone among all processes, and published.
    ///
    /// Its bytes must be a function of `preimage`, as those of a unit are of its own. INVARIANT: no part waits for a unit or for a part that
    /// contains it, so waiting ends.
    pub(crate) fn part(
        &self,
        preimage: &Preimage,
        compute: impl FnOnce(&Staging) -> Result<Draft, StageError>,
    ) -> Result<Hash, StageError> {
        let key = preimage.key();
        if let Some(found) = self.stored(preimage) {
            return Ok(found);
        }
        let lock = self.files.store.lock_key(&key, &mut |_| (), self.cancelled)?;
        if lock.waited()
            && let Some(found) = self.stored(preimage)
        {
            return Ok(found);
        }
        let started = (self.clock)();
        let staging = self.files.store.staging()?;
        let draft = compute(&staging)?;
        self.files.check_unchanged()?;
        Ok(self.files.store.publish(preimage, &draft, (self.clock)().saturating_sub(started))?.artifact)
    }

    /// The artifact of a part that is in the store, whole; none for a forced unit.
    pub(crate) fn stored(&self, preimage: &Preimage) -> Option<Hash> {
        if self.forced {
            return None;
        }
        let hit = self.files.store.lookup(&preimage.key()).ok()?;
        self.files.store.verify_artifact(&hit.artifact_digest).ok()?;
        Some(hit.artifact_digest)
    }

    pub fn progress(&self, done: u64, total: u64, unit: ProgressUnit) {
        (self.notify)(Notice::Progress(Progress { done, total, unit, figures: [None; 2] }));
    }

    /// Steps of training, with what is worth seeing of them.
    pub(crate) fn steps(&self, done: u64, total: u64, figures: Figures) {
        (self.notify)(Notice::Progress(Progress { done, total, unit: ProgressUnit::Steps, figures }));
    }

    pub fn warn(&self, message: impl Into<String>) {
        (self.notify)(Notice::Warning(message.into()));
    }
}

/// The files that a unit reads, found by digest. User files are remembered so that [`check_unchanged`](Self::check_unchanged) can tell
/// whether one was changed while it was read; clones remember the same.
#[derive(Clone)]
pub struct OpenFiles<'a> {
    store: &'a Store,
    pinned: Arc<Mutex<Vec<cache::SourceFile>>>,
}

impl<'a> OpenFiles<'a> {
    pub fn new(store: &'a Store) -> Self {
        Self { store, pinned: Arc::default() }
    }

    /// Opens a user file and remembers it; fails when it is no longer what its digest says.
    pub fn pin(&self, source: &Source) -> Result<PathBuf, StageError> {
        let opened = self.store.open_source(&source.digest, source.size)?;
        let path = opened.path.clone();
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner).push(opened);
        Ok(path)
    }

    /// Reads an artifact's manifest of tensors.
    pub fn manifest(&self, artifact: &Hash) -> Result<Manifest, StageError> {
        Ok(Manifest::from_json(self.store.load_artifact(artifact)?.manifest.as_bytes())?)
    }

    /// The file of an artifact's blob; `None` if it has none of that name.
    pub(crate) fn find_blob(&self, artifact: &Hash, name: &str) -> Result<Option<PathBuf>, StageError> {
        let stored = self.store.load_artifact(artifact)?;
        let Some(blob) = stored.blobs.iter().find(|blob| blob.name == name) else { return Ok(None) };
        Ok(Some(self.store.open_blob(&blob.digest, blob.size)?.path))
    }

    /// The blobs of an artifact.
    pub(crate) fn blobs(&self, artifact: &Hash) -> Result<Vec<cache::Blob>, StageError> {
        Ok(self.store.load_artifact(artifact)?.blobs.clone())
    }

    /// Reads an artifact's manifest of something other than tensors.
    pub fn description(&self, artifact: &Hash) -> Result<String, StageError> {
        Ok(self.store.load_artifact(artifact)?.manifest.clone())
    }

    /// Reads a blob of an artifact that is not of tensors, such as an exported graph; nothing if it has none of that name.
    pub fn optional_blob(&self, artifact: &Hash, name: &str) -> Result<Option<Vec<u8>>, StageError> {
        let artifact = self.store.load_artifact(artifact)?;
        let Some(blob) = artifact.blobs.iter().find(|blob| blob.name == name) else { return Ok(None) };
        let opened = self.store.open_blob(&blob.digest, blob.size)?;
        Ok(Some(fs_err::read(&opened.path)?))
    }

    /// Fails if a user file that was read is not what it was.
    pub fn check_unchanged(&self) -> Result<(), StageError> {
        for file in self.pinned.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            file.check_unchanged()?;
        }
        Ok(())
    }
}

impl Resolver for OpenFiles<'_> {
    fn file(&self, file: &FileRef) -> merganser_tensors::Result<Arc<dyn ReadAt>> {
        let source = Source { digest: file.digest, size: file.size };
        Ok(match file.kind {
            FileKind::Source => {
                Arc::new(FileReader::open(&self.pin(&source).map_err(std::io::Error::other)?)?)
            }
            FileKind::Blob => {
                let blob = self.store.open_blob(&file.digest, file.size).map_err(std::io::Error::other)?;
                Arc::new(FileReader::open_immutable(&blob.path)?)
            }
        })
    }

    fn manifest(&self, artifact: &Hash) -> merganser_tensors::Result<Manifest> {
        let artifact = self.store.load_artifact(artifact).map_err(std::io::Error::other)?;
        Manifest::from_json(artifact.manifest.as_bytes())
    }
}
