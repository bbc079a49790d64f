//! Inputs that lie elsewhere: found for the pipeline, pinned in its lock file, downloaded for a run.
//!
//! While a pipeline is read, an address stands for what the lock file says and what is on this machine: reading asks nobody
//! ([`Inputs`] as [`Remotes`]). What is not here is remembered as missing. `run` then gets what it needs ([`fetch`]) and reads the
//! pipeline again; other commands say what is missing.
//!
//! INVARIANT: what an address stands for depends on the lock file alone, never on what other tools happen to have downloaded. Offline
//! nothing can move, so there what is here counts.

mod fetch;
mod lock_file;
mod settings;

pub use fetch::{Drift, Hashing};
pub use lock_file::{LockFile, path_for};
pub use settings::Environment;

use merganser_sources::{Event, Located, Pins, Reach, Sources, is_address};
use merganser_stages::params::Remotes;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What to do about what the lock file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockUse {
    /// Follow it, and add what it lacks.
    Follow,
    /// Follow it, and refuse what it lacks.
    Frozen,
    /// Find everything anew.
    Update,
}

/// The remote inputs of one pipeline.
#[derive(Debug)]
pub struct Inputs {
    sources: Sources,
    /// As it was when the command began.
    lock: LockFile,
    lock_path: PathBuf,
    lock_use: LockUse,
    /// Below it there is nothing: where files are that are nowhere.
    nowhere: PathBuf,
    known: Mutex<BTreeMap<String, Known>>,
}

/// What is known about an address.
#[derive(Clone, Debug)]
enum Known {
    Here(Located),
    Missing,
}

impl Inputs {
    /// Reads the lock file of a pipeline. `cache_dir` is where downloads go that belong to no other cache.
    pub fn open(
        pipeline: &Path,
        lock_use: LockUse,
        environment: Environment,
        on_event: Arc<dyn Fn(Event) + Send + Sync>,
    ) -> Result<Self, lock_file::LockError> {
        let lock_path = path_for(pipeline);
        let lock = LockFile::read(&lock_path)?;
        let nowhere = environment.cache_dir.join("not-downloaded");
        let sources = Sources::new(environment.into_settings(on_event));
        Ok(Self { sources, lock, lock_path, lock_use, nowhere, known: Mutex::default() })
    }

    /// The addresses that stand for nothing on this machine yet, with what to say about each.
    pub fn missing(&self) -> BTreeMap<String, String> {
        let known = self.known();
        let missing = known.iter().filter(|(_, known)| matches!(known, Known::Missing));
        missing.map(|(address, _)| (address.clone(), self.describe(address))).collect()
    }

    fn describe(&self, address: &str) -> String {
        let size = self.lock.size_of(&self.sources.canonical(address));
        match size {
            Some(size) => format!("`{address}` is not downloaded yet ({})", crate::report::bytes(size)),
            None => format!("`{address}` is not downloaded yet"),
        }
    }

    /// Whether the pipeline has inputs from elsewhere.
    pub fn are_remote(&self) -> bool {
        !self.known().is_empty()
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pins(&self) -> Pins {
        match self.lock_use {
            LockUse::Follow | LockUse::Frozen => Pins {
                revisions: self.lock.revisions.clone(),
                files: self.lock.files.keys().cloned().collect(),
            },
            LockUse::Update => Pins::default(),
        }
    }

    fn here(&self, addresses: &BTreeSet<String>) -> Vec<Located> {
        let known = self.known();
        let here = addresses.iter().filter_map(|address| match known.get(address) {
            Some(Known::Here(located)) => Some(located.clone()),
            _ => None,
        });
        here.collect()
    }
}

impl Remotes for Inputs {
    fn locate(&self, written: &str) -> Option<Result<PathBuf, String>> {
        if !is_address(written) {
            return None;
        }
        if let Err(error) = self.sources.check(written) {
            return Some(Err(error.to_string()));
        }
        let mut known = self.known();
        let entry = known.entry(written.to_owned()).or_insert_with(|| {
            match self.sources.get(written, &self.pins(), Reach::Local) {
                Ok(located) => Known::Here(located),
                // Whatever is wrong with what is here, `run` will find out when it gets it, and say so.
                Err(_) => Known::Missing,
            }
        });
        Some(Ok(match entry {
            Known::Here(located) => located.path.clone(),
            Known::Missing => self.nowhere.join(written.replace("://", "/")),
        }))
    }
}
