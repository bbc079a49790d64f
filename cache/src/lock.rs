//! Locks between processes (and threads): files locked through the operating system.
//!
//! A lock dies with its process, so nothing is ever left locked. Two kinds of lock file:
//! - [`LockFile`] is removed by its holder on release. Whoever acquires it checks that the name still leads to the
//!   file that was locked, and starts over otherwise. INVARIANT: only the holder removes it.
//! - [`exclusively`] runs a few file operations under a lock file that stays.

use std::fs::{File, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::key::StageKey;
use crate::layout::with_parent;
use crate::stat::FileStat;
use crate::store::Store;

/// Exclusive right to compute the output of one key; given back on drop.
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub struct KeyLock {
    _file: LockFile,
    waited: bool,
}

impl KeyLock {
    /// Returns true if someone else held the lock first: look the key up again before computing it.
    pub fn waited(&self) -> bool {
        self.waited
    }
}

/// Who is being waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// The lock file.
    pub path: PathBuf,
    /// The holder as it introduced itself: process number and host.
    pub holder: Option<String>,
}

impl Store {
    /// Waits until this caller is the only one, in any process, to compute `key`.
    ///
    /// `on_wait` hears whom we wait for, once, and again when the holder changes. `cancelled` is asked at least ten
    /// times a second while waiting; the wait ends with [`Error::Cancelled`] when it returns true.
    pub fn lock_key(
        &self,
        key: &StageKey,
        on_wait: &mut dyn FnMut(Waiting),
        cancelled: &dyn Fn() -> bool,
    ) -> Result<KeyLock> {
        let path = self.inner.layout.key_lock(key);
        let mut pause = Duration::from_millis(2);
        let mut reported: Option<Option<String>> = None;
        loop {
            if let Some(mut file) = LockFile::try_acquire(&path)? {
                file.introduce(&format!("process {} on {}", std::process::id(), self.inner.host));
                return Ok(KeyLock { _file: file, waited: reported.is_some() });
            }
            if cancelled() {
                return Err(Error::Cancelled { path });
            }
            let holder = read_holder(&path);
            if reported.as_ref() != Some(&holder) {
                on_wait(Waiting { path: path.clone(), holder: holder.clone() });
                reported = Some(holder);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }
}

/// A locked file that disappears when released.
#[derive(Debug)]
pub(crate) struct LockFile {
    file: File,
    path: PathBuf,
}

impl LockFile {
    /// Locks `path`, making it if need be; `None` when someone else holds it.
    pub(crate) fn try_acquire(path: &Path) -> Result<Option<Self>> {
        loop {
            let file = open(path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(source)) => {
                    return Err(Error::Lock { path: path.to_owned(), source });
                }
            }
            // The previous holder may have removed the file between our opening and our locking it.
            let locked = FileStat::of_file(&file).map_err(Error::at(path))?;
            match std::fs::metadata(path) {
                Ok(named) if FileStat::of(&named).is_same_file(&locked) => {
                    return Ok(Some(Self { file, path: path.to_owned() }));
                }
                _ => {}
            }
        }
    }

    /// Writes who holds the lock, for those who wait. Best effort: it is only ever shown.
    fn introduce(&mut self, holder: &str) {
        let _ = self.file.set_len(0).and_then(|()| self.file.rewind());
        let _ = self.file.write_all(holder.as_bytes());
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // Removed while still locked: see the module documentation.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Runs `action` while holding the lock on `path`; for a handful of file operations, not for work.
pub(crate) fn exclusively<T>(path: &Path, action: impl FnOnce() -> Result<T>) -> Result<T> {
    let file = open(path)?;
    file.lock().map_err(|source| Error::Lock { path: path.to_owned(), source })?;
    action()
}

fn open(path: &Path) -> Result<File> {
    with_parent(path, || {
        fs_err::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
    })
    .map(fs_err::File::into_file)
}

fn read_holder(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(256).read_to_string(&mut text).ok()?;
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn second_acquisition_fails_until_release() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("locks/x.lock");
        let lock = LockFile::try_acquire(&path).unwrap().expect("nobody holds it");
        assert!(LockFile::try_acquire(&path).unwrap().is_none());
        drop(lock);
        assert!(!path.exists());
        assert!(LockFile::try_acquire(&path).unwrap().is_some());
    }

    /// The file is removed on each release, so every round exercises the check for a vanished name.
    #[test]
    fn at_most_one_thread_holds_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.lock");
        let holders = AtomicUsize::new(0);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut rounds = 0;
                    while rounds < 50 {
                        if let Some(_lock) = LockFile::try_acquire(&path).unwrap() {
                            assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                            std::thread::yield_now();
                            holders.fetch_sub(1, Ordering::SeqCst);
                            total.fetch_add(1, Ordering::SeqCst);
                            rounds += 1;
                        }
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 200);
    }
}
