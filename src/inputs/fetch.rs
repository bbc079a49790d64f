//! Getting what a run needs, and keeping the lock file true.
//!
//! Every file is hashed and compared with the lock file before anything runs. A file that is not what it was is downloaded once more,
//! since it may have been damaged here; if it is then still different, the place it comes from has changed it, and only the user can
//! say what that means.

use super::lock_file::LockedFile;
use super::{Inputs, Known, LockFile, LockUse};
use merganser_cache::Store;
use merganser_sources::{Error, Located, Pins, Reach, RemoteFile};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Why remote inputs cannot be used. Nothing has run.
#[derive(Debug, thiserror::Error)]
pub enum Drift {
    /// All that could not be had, where the user may have made mistakes.
    #[error("{}", list(.0))]
    Unavailable(Vec<Error>),
    #[error("`--frozen` and these inputs are not in `{lock}`: {}", names(addresses))]
    Unpinned { lock: String, addresses: Vec<String> },
    #[error("`{address}` is not what it was: BLAKE3 {actual}, `{lock}` has {locked}")]
    Changed { address: String, lock: String, actual: String, locked: String },
    #[error(transparent)]
    Store(#[from] merganser_cache::Error),
}

impl Drift {
    /// What to do about it, if we know.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Unavailable(errors) => match &errors[..] {
                [only] => only.help(),
                // Each has its own, in the list.
                _ => None,
            },
            Self::Unpinned { .. } => {
                Some("run once without `--frozen`, which writes them into the lock file".to_owned())
            }
            Self::Changed { .. } => Some("`--update-lock` accepts what is there now".to_owned()),
            Self::Store(_) => None,
        }
    }
}

fn list(errors: &[Error]) -> String {
    if let [only] = errors {
        return only.to_string();
    }
    let text = |error: &Error| match error.help() {
        Some(help) => format!("\n  {error}\n    help: {help}"),
        None => format!("\n  {error}"),
    };
    let lines: Vec<String> = errors.iter().map(text).collect();
    format!("{} inputs could not be had:{}", errors.len(), lines.concat())
}

fn names(addresses: &[String]) -> String {
    let quoted: Vec<String> = addresses.iter().map(|address| format!("`{address}`")).collect();
    quoted.join(", ")
}

/// Told a path, bytes hashed and bytes to hash.
pub type Hashing<'a> = &'a (dyn Fn(&Path, u64, u64) + Sync);

impl Inputs {
    /// Gets those of the addresses that are missing. Afterwards the pipeline can be read again.
    pub fn fetch(&self, addresses: &BTreeSet<String>) -> Result<(), Drift> {
        let missing: Vec<&String> = addresses
            .iter()
            .filter(|address| matches!(self.known().get(*address), Some(Known::Missing)))
            .collect();
        if self.lock_use == LockUse::Frozen {
            self.refuse_unpinned(&missing)?;
        }
        let mut pins = self.pins();
        let mut errors = Vec::new();
        for address in missing {
            match self.sources.get(address, &pins, Reach::Network) {
                Ok(located) => {
                    // All inputs from one branch are of one commit.
                    pins.revisions
                        .extend(located.revision.iter().map(|it| (it.asked.clone(), it.commit.clone())));
                    self.known().insert(address.clone(), Known::Here(located));
                }
                Err(error) if error.is_users() => errors.push(error),
                Err(error) => {
                    errors.push(error);
                    break;
                }
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(Drift::Unavailable(errors)) }
    }

    /// What the lock file does not know is not even asked for.
    fn refuse_unpinned(&self, missing: &[&String]) -> Result<(), Drift> {
        let unpinned =
            missing.iter().filter(|address| self.lock.size_of(&self.sources.canonical(address)).is_none());
        let addresses: Vec<String> = unpinned.map(|address| (*address).clone()).collect();
        if addresses.is_empty() { Ok(()) } else { Err(self.unpinned(addresses)) }
    }

    fn unpinned(&self, addresses: Vec<String>) -> Drift {
        Drift::Unpinned { lock: self.lock_path.display().to_string(), addresses }
    }

    /// Compares every file of the addresses with the lock file; returns the lock file as it should be. With `is_all` the addresses are
    /// all of the pipeline, and what else the lock file has is left out.
    pub fn verify(
        &self,
        addresses: &BTreeSet<String>,
        is_all: bool,
        store: &Store,
        hashing: Hashing<'_>,
    ) -> Result<LockFile, Drift> {
        let mut lock = self.lock.clone();
        let located = self.here(addresses);
        let files: BTreeMap<&RemoteFile, &Located> = located
            .iter()
            .flat_map(|located| located.files.iter().map(move |file| (file, located)))
            .collect();
        let mut unpinned = Vec::new();
        for file in files.keys() {
            let locked = self.lock.files.get(&file.address).filter(|_| self.lock_use != LockUse::Update);
            let mut found = digest(store, &file.path, hashing)?;
            if let Some(locked) = locked.filter(|locked| **locked != found) {
                found = self.again(file, addresses, store, hashing)?;
                if found != *locked {
                    return Err(Drift::Changed {
                        address: file.address.clone(),
                        lock: self.lock_path.display().to_string(),
                        actual: found.blake3.to_hex().to_string(),
                        locked: locked.blake3.to_hex().to_string(),
                    });
                }
            }
            if locked.is_none() {
                unpinned.push(file.address.clone());
            }
            lock.files.insert(file.address.clone(), found);
        }
        let revisions: Vec<_> = located.iter().filter_map(|located| located.revision.as_ref()).collect();
        for revision in &revisions {
            if self.lock.revisions.get(&revision.asked) != Some(&revision.commit) {
                unpinned.push(revision.asked.clone());
            }
            lock.revisions.insert(revision.asked.clone(), revision.commit.clone());
        }
        if self.lock_use == LockUse::Frozen && !unpinned.is_empty() {
            return Err(self.unpinned(unpinned));
        }
        if is_all {
            let used = revisions.iter().map(|revision| revision.asked.clone()).collect();
            lock.retain(&used, &files.keys().map(|file| file.address.clone()).collect());
        }
        Ok(lock)
    }

    /// Downloads a file again that is not what it should be. Offline what is here is all there is.
    fn again(
        &self,
        file: &RemoteFile,
        addresses: &BTreeSet<String>,
        store: &Store,
        hashing: Hashing<'_>,
    ) -> Result<LockedFile, Drift> {
        let owner = addresses.iter().find(|address| {
            matches!(self.known().get(*address), Some(Known::Here(located)) if located.files.contains(file))
        });
        let Some(owner) = owner else { return digest(store, &file.path, hashing) };
        if self.sources.is_offline(owner) {
            return digest(store, &file.path, hashing);
        }
        let unavailable = |error| Drift::Unavailable(vec![error]);
        self.sources.discard(file).map_err(unavailable)?;
        let pins = Pins { revisions: self.lock.revisions.clone(), ..self.pins() };
        let located = self.sources.get(owner, &pins, Reach::Network).map_err(unavailable)?;
        self.known().insert(owner.clone(), Known::Here(located));
        digest(store, &file.path, hashing)
    }

    /// Writes the lock file if it would say something new; returns whether it was.
    pub fn save(&self, lock: &LockFile) -> std::io::Result<bool> {
        if self.lock_use == LockUse::Frozen || *lock == self.lock {
            return Ok(false);
        }
        lock.write(&self.lock_path).map(|()| true)
    }

    /// Whether there is something to keep a lock file for.
    pub fn keep_lock(&self) -> bool {
        self.are_remote() || self.lock_use == LockUse::Update || self.lock != LockFile::default()
    }

    pub fn lock_path(&self) -> &Path {
        &self.lock_path
    }
}

fn digest(store: &Store, path: &Path, hashing: Hashing<'_>) -> Result<LockedFile, Drift> {
    let total = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let digest = store.digest_file(path, &|done| hashing(path, done, total))?;
    Ok(LockedFile { blake3: digest.digest, size: digest.size })
}
