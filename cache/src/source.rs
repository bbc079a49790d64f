//! The user's own files: their digests, and opening them again by content.
//!
//! A source is never copied into the store by this module; it stays where the user keeps it and is identified by
//! content. The store remembers where contents were last seen (see `stat_cache`) and checks, whenever it matters,
//! that the file is still in the state in which its digest was taken.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard};

use crate::artifact::Source;
use crate::error::{Error, Result};
use crate::event::CacheEvent;
use crate::hash::hash_file;
use crate::lock::exclusively;
use crate::stat::{FileStat, unix_nanoseconds};
use crate::stat_cache::{self, Entry, StatCache};
use crate::store::{Inner, Store, lock};

/// Content of a user file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileDigest {
    /// BLAKE3 of the bytes.
    pub digest: blake3::Hash,
    /// Length in bytes.
    pub size: u64,
}

/// An open user file whose content is known.
#[derive(Debug)]
pub struct SourceFile {
    /// Where it lies: absolute, without symbolic links.
    pub path: PathBuf,
    /// The open file.
    pub file: File,
    stat: FileStat,
}

impl SourceFile {
    /// Fails if the file is not in the state in which its digest was taken; call it before and after a pass.
    pub fn check_unchanged(&self) -> Result<()> {
        let now = FileStat::of_file(&self.file).map_err(Error::at(&self.path))?;
        if now == self.stat {
            return Ok(());
        }
        Err(Error::SourceChanged { path: self.path.clone(), what: self.stat.differences(&now) })
    }
}

impl Store {
    /// Returns the digest of a user file, hashing it only if its stat does not vouch for the digest known.
    ///
    /// `progress` is told the bytes of each step, from several threads; it is not called for a known file. A file
    /// that changes while it is hashed is an error.
    pub fn digest_file(&self, path: &Path, progress: &(dyn Fn(u64) + Sync)) -> Result<FileDigest> {
        self.inner.digest_file(path, progress).map(|(_, entry)| entry.file_digest())
    }

    /// Returns what a user file held when it was last hashed or recognized, whatever is at the path now.
    ///
    /// For files that are gone: what was made from them may still be in the store, under keys that name this content.
    pub fn last_digest(&self, path: &Path) -> Option<FileDigest> {
        let path = std::path::absolute(path).ok()?;
        self.inner.stats().last(&path).map(|entry| entry.file_digest())
    }

    /// Returns where a content was seen, if there is nothing at any of these places any more.
    ///
    /// Of a file that was changed, not removed, this is empty: whoever named it can read it again.
    pub fn gone(&self, digest: &blake3::Hash) -> Vec<PathBuf> {
        let mut paths = self.inner.stats().known_paths(digest);
        paths.dedup();
        if paths.iter().any(|path| path.exists()) { Vec::new() } else { paths }
    }

    /// Opens a user file by content.
    ///
    /// Looks where the content was seen before; a file that was touched or rewritten there is hashed again.
    pub fn open_source(&self, digest: &blake3::Hash, size: u64) -> Result<SourceFile> {
        let source = Source { digest: *digest, size };
        let mut tried = self.inner.stats().known_paths(digest);
        // Those that look right first, so that no stale candidate is hashed without need.
        let likely = self.inner.stats().candidates(&source);
        tried.sort_by_key(|path| !likely.iter().any(|(likely_path, _)| likely_path == path));
        for path in &tried {
            let Ok((path, entry)) = self.inner.digest_file(path, &|_| {}) else { continue };
            if entry.file_digest() != (FileDigest { digest: *digest, size }) {
                continue;
            }
            let file = fs_err::File::open(&path).map_err(Error::at(&path))?.into_file();
            let source = SourceFile { path, file, stat: entry.stat };
            source.check_unchanged()?;
            return Ok(source);
        }
        Err(Error::SourceGone { digest: *digest, size, tried })
    }

    /// Writes newly learned digests of user files, for the next run. Dropping the store does it too, silently.
    pub fn flush(&self) -> Result<()> {
        self.inner.save_stats()
    }
}

impl Entry {
    fn file_digest(&self) -> FileDigest {
        FileDigest { digest: self.digest, size: self.stat.size }
    }
}

/// Unsaved digests of this many bytes are written at once: a killed run should not have to hash them again.
const SAVE_AFTER_BYTES: u64 = 64 << 20;

impl Inner {
    /// Returns true if some known file still has the content, as far as its stat can tell.
    pub(crate) fn source_resolvable(&self, source: &Source) -> bool {
        let candidates = self.stats().candidates(source);
        candidates.iter().any(|(path, stat)| FileStat::of_path(path).is_ok_and(|now| now == *stat))
    }

    pub(crate) fn save_stats(&self) -> Result<()> {
        let Some(cache) = self.stats.get() else { return Ok(()) };
        let entries = lock(cache).take_unsaved();
        if entries.is_empty() {
            return Ok(());
        }
        let path = self.layout.stats(&self.host);
        let saved = exclusively(&self.layout.stats_lock(), || stat_cache::append(&path, &entries));
        if saved.is_err() {
            lock(cache).keep_unsaved(entries);
        }
        saved
    }

    fn digest_file(&self, path: &Path, progress: &(dyn Fn(u64) + Sync)) -> Result<(PathBuf, Entry)> {
        // Links are not resolved: every state of the file behind the name has its own device, inode and times, and resolving
        // costs a system call per folder and file.
        let path = std::path::absolute(path).map_err(Error::at(path))?;
        if let Some(entry) = self.known_digest(&path)? {
            return Ok((path, entry));
        }
        let _guard = self.hashing.enter(&path);
        if let Some(entry) = self.known_digest(&path)? {
            return Ok((path, entry));
        }
        let hashed_at_ns = unix_nanoseconds((self.clock)());
        let file = fs_err::File::open(&path).map_err(Error::at(&path))?.into_file();
        let stat = FileStat::of_file(&file).map_err(Error::at(&path))?;
        let changed = |what: String| Error::SourceChanged { path: path.clone(), what };
        let digest = hash_file(&file, stat.size, progress).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => changed("it became shorter".to_owned()),
            kind => Error::Io(io::Error::new(kind, format!("cannot read `{}`: {source}", path.display()))),
        })?;
        // The name may lead to another file by now, so it is asked again rather than the open file.
        let after = FileStat::of_path(&path).map_err(Error::at(&path))?;
        if after != stat {
            return Err(changed(stat.differences(&after)));
        }
        let entry = Entry { stat, digest, hashed_at_ns };
        self.stats().insert(path.clone(), entry);
        let hashed_bytes = self.unsaved_bytes.fetch_add(stat.size, Ordering::Relaxed) + stat.size;
        if hashed_bytes >= SAVE_AFTER_BYTES {
            self.unsaved_bytes.store(0, Ordering::Relaxed);
            if let Err(error) = self.save_stats() {
                let path = self.layout.stats(&self.host);
                (self.on_event)(CacheEvent::StatCacheNotSaved { path, reason: error.to_string() });
            }
        }
        Ok((path, entry))
    }

    fn known_digest(&self, path: &Path) -> Result<Option<Entry>> {
        let metadata = fs_err::metadata(path).map_err(Error::at(path))?;
        if !metadata.is_file() {
            let reason = if metadata.is_dir() { "it is a folder" } else { "it is not a regular file" };
            return Err(Error::NotAFile { path: path.to_owned(), reason });
        }
        let stat = FileStat::of(&metadata);
        let digest = self.stats().trusted(path, &stat);
        Ok(digest.map(|digest| Entry { stat, digest, hashed_at_ns: i64::MAX }))
    }

    /// Locks the stat cache, reading it first if nobody has.
    fn stats(&self) -> MutexGuard<'_, StatCache> {
        let mut event = None;
        let cache = self.stats.get_or_init(|| {
            let path = self.layout.stats(&self.host);
            Mutex::new(match StatCache::load(&path) {
                Ok((cache, false)) => cache,
                Ok((cache, true)) => {
                    event = Some(CacheEvent::StatCacheDamaged { path, n_kept: cache.len() });
                    cache
                }
                Err(error) => {
                    event = Some(CacheEvent::Unreadable { path, reason: error.to_string() });
                    StatCache::default()
                }
            })
        });
        if let Some(event) = event {
            (self.on_event)(event);
        }
        lock(cache)
    }
}
