//! The store itself: opening it, what it is configured with, and looking keys up.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use crate::artifact::Artifact;
use crate::error::{Damage, Miss, Result};
use crate::event::CacheEvent;
use crate::in_flight::InFlight;
use crate::key::StageKey;
use crate::layout::Layout;
use crate::objects::Complete;
use crate::record::{Output, Record};
use crate::staging::Session;
use crate::stat::FileStat;
use crate::stat_cache::StatCache;

/// What the store takes from its surroundings instead of asking for it.
#[derive(Clone)]
pub struct Options {
    /// The time; used for records, for telling racy files, and for marking use.
    pub clock: Arc<dyn Fn() -> SystemTime + Send + Sync>,
    /// Name of this machine, for records and lock files, and to keep stats of different machines apart.
    pub host: String,
    /// Version of the tool, for records.
    pub tool_version: String,
    /// Hears about damage and repairs, on any thread; it must not call back into the store.
    pub on_event: Arc<dyn Fn(CacheEvent) + Send + Sync>,
}

/// A content-addressed store in one folder; cheap to clone, usable from any thread.
///
/// What has been verified once is not verified again through the same `Store` (or a clone of it).
#[derive(Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

/// A usable output of a key.
#[derive(Debug, Clone)]
pub struct Hit {
    /// The key.
    pub key: StageKey,
    /// Digest of the artifact.
    pub artifact_digest: blake3::Hash,
    /// The artifact.
    pub artifact: Arc<Artifact>,
    /// The record it was found in.
    pub record: Record,
    /// Which of the record's outputs it is: the first, unless newer ones are incomplete.
    pub output_idx: usize,
}

impl Hit {
    /// Returns when, where and in how many seconds the artifact was computed.
    pub fn output(&self) -> &Output {
        &self.record.outputs[self.output_idx]
    }
}

impl Store {
    /// Opens the store in `root`, making the folder if need be.
    pub fn open(root: &Path, options: Options) -> Result<Self> {
        let Options { clock, host, tool_version, on_event } = options;
        let inner = Inner {
            layout: Layout::create(root)?,
            clock,
            host,
            tool_version,
            on_event,
            session: Mutex::default(),
            artifacts: Mutex::default(),
            complete: Mutex::default(),
            verified: Mutex::default(),
            known_bad: Mutex::default(),
            verifying: InFlight::new(),
            n_quarantined: AtomicU64::new(0),
            stats: OnceLock::new(),
            hashing: InFlight::new(),
            unsaved_bytes: AtomicU64::new(0),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Returns the folder.
    pub fn root(&self) -> &Path {
        self.inner.layout.root()
    }

    /// Looks for a complete output of `key`.
    ///
    /// Complete means: the artifact's description is what its digest says, every blob is there with the right size,
    /// the same for all operands, and a file is known for every source. Blobs are not read: see
    /// [`Store::verify_artifact`]. Whatever is wrong is a miss.
    pub fn lookup(&self, key: &StageKey) -> Result<Hit, Miss> {
        self.lookup_by(key, |digest| self.inner.complete(digest))
    }

    /// [`Store::lookup`] where the user files that views point into may be gone.
    ///
    /// Who only passes the artifact on can do without them; who reads it finds out in [`Store::verify_artifact`].
    pub fn lookup_without_sources(&self, key: &StageKey) -> Result<Hit, Miss> {
        self.lookup_by(key, |digest| self.inner.complete_except_sources(digest, 0))
    }

    fn lookup_by(
        &self,
        key: &StageKey,
        complete: impl Fn(&blake3::Hash) -> Result<Arc<Complete>, Damage>,
    ) -> Result<Hit, Miss> {
        let record = self.inner.read_record(key)?;
        let mut newest_damage = None;
        for (output_idx, output) in record.outputs.iter().enumerate() {
            match complete(&output.artifact) {
                Ok(complete) => {
                    return Ok(Hit {
                        key: *key,
                        artifact_digest: output.artifact,
                        artifact: Arc::clone(&complete.artifact),
                        record,
                        output_idx,
                    });
                }
                Err(damage) => {
                    newest_damage.get_or_insert(damage);
                }
            }
        }
        Err(newest_damage.map_or(Miss::Unknown, Miss::Incomplete))
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.inner.layout.root()).finish()
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut options = f.debug_struct("Options");
        options.field("host", &self.host).field("tool_version", &self.tool_version).finish_non_exhaustive()
    }
}

/// The state shared by clones of a [`Store`].
///
/// No lock below is held while calling rayon or anything that takes another of them.
pub(crate) struct Inner {
    pub(crate) layout: Layout,
    pub(crate) clock: Arc<dyn Fn() -> SystemTime + Send + Sync>,
    pub(crate) host: String,
    pub(crate) tool_version: String,
    pub(crate) on_event: Arc<dyn Fn(CacheEvent) + Send + Sync>,
    /// Where this store writes; made by the first write.
    pub(crate) session: Mutex<Option<Arc<Session>>>,
    /// Descriptions read and verified.
    pub(crate) artifacts: Mutex<HashMap<blake3::Hash, Arc<Artifact>>>,
    /// Artifacts found complete; emptied whenever any damage comes to light.
    pub(crate) complete: Mutex<HashMap<blake3::Hash, Arc<Complete>>>,
    /// Objects whose digest was found right, in the state in which it was.
    pub(crate) verified: Mutex<HashMap<blake3::Hash, FileStat>>,
    /// Objects found wrong that may still lie in place; the next writer replaces them.
    pub(crate) known_bad: Mutex<HashSet<blake3::Hash>>,
    pub(crate) verifying: InFlight<blake3::Hash>,
    pub(crate) n_quarantined: AtomicU64,
    /// Digests of user files; read when first asked for.
    pub(crate) stats: OnceLock<Mutex<StatCache>>,
    pub(crate) hashing: InFlight<PathBuf>,
    pub(crate) unsaved_bytes: AtomicU64,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // What is lost here is only time: the files are hashed again.
        let _ = self.save_stats();
    }
}

/// Locks a mutex; after a panic elsewhere its content is still sound, since every change of it is one call.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A store in a temporary folder that records its events.
    pub(crate) struct TestStore {
        pub(crate) store: Store,
        pub(crate) folder: tempfile::TempDir,
        options: Options,
        events: Arc<Mutex<Vec<CacheEvent>>>,
    }

    impl TestStore {
        pub(crate) fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let events = Arc::new(Mutex::new(Vec::new()));
            let sink = Arc::clone(&events);
            let options = Options {
                clock: Arc::new(SystemTime::now),
                host: "host".into(),
                tool_version: "1.2.3".into(),
                on_event: Arc::new(move |event| lock(&sink).push(event)),
            };
            let store = Store::open(&folder.path().join("store"), options.clone()).unwrap();
            Self { store, folder, options, events }
        }

        /// Another store on the same folder, as a second process would have it.
        pub(crate) fn reopen(&self) -> Store {
            Store::open(self.store.root(), self.options.clone()).unwrap()
        }

        /// The events since the last call.
        pub(crate) fn events(&self) -> Vec<CacheEvent> {
            std::mem::take(&mut lock(&self.events))
        }
    }

    /// All files below a folder, in no particular order.
    pub(crate) fn files_below(folder: &Path) -> Vec<PathBuf> {
        let Ok(entries) = fs_err::read_dir(folder) else { return Vec::new() };
        entries
            .flat_map(|entry| {
                let path = entry.unwrap().path();
                if path.is_dir() { files_below(&path) } else { vec![path] }
            })
            .collect()
    }

    #[test]
    fn opening_makes_a_tagged_folder_once() {
        let test = TestStore::new();
        let tag = test.store.root().join("CACHEDIR.TAG");
        assert!(
            fs_err::read_to_string(&tag).unwrap().starts_with("Signature: 8a477f597d28d172789f06886806bc55")
        );
        fs_err::write(&tag, "mine").unwrap();
        test.reopen();
        assert_eq!(fs_err::read_to_string(&tag).unwrap(), "mine");
    }
}
