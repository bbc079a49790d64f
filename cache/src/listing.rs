//! What is in the store, for `cache ls` and for deciding what to delete.
//!
//! Listing reads every record and description; it verifies no blobs. What cannot be read is left out, quarantined
//! and reported as by a lookup.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::key::StageKey;
use crate::layout::{self, RECORD_EXTENSION};
use crate::record::Record;
use crate::store::Store;

/// One key of the store.
#[derive(Debug, Clone, PartialEq)]
pub struct Listed {
    /// The key.
    pub key: StageKey,
    /// Its record: preimage, outputs, timings.
    pub record: Record,
    /// Bytes of the descriptions and blobs of all its outputs that are in the store, operands not counted; other
    /// keys may share them.
    pub size_bytes: u64,
    /// True if [`Store::lookup`] would answer with a hit.
    pub complete: bool,
    /// When it was last looked up or published, to the hour.
    pub last_used: SystemTime,
}

/// Files and bytes of each bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct DiskUsage {
    /// Blobs and descriptions of artifacts.
    pub objects: BucketUsage,
    /// Records and the family index.
    pub records: BucketUsage,
    /// Files being written, and leftovers.
    pub staging: BucketUsage,
    /// Damaged files.
    pub quarantine: BucketUsage,
    /// Locks and digests of user files.
    pub other: BucketUsage,
}

/// Files and bytes of one bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct BucketUsage {
    /// How many files.
    pub n_files: u64,
    /// Their lengths, added up.
    pub size_bytes: u64,
}

impl DiskUsage {
    /// Returns the bytes of all buckets.
    pub fn total_bytes(&self) -> u64 {
        let Self { objects, records, staging, quarantine, other } = self;
        [objects, records, staging, quarantine, other].iter().map(|usage| usage.size_bytes).sum()
    }
}

impl Store {
    /// Lists every key, sorted by key.
    pub fn list(&self) -> Result<Vec<Listed>> {
        let mut listed = Vec::new();
        for (path, metadata) in files_below(&self.inner.layout.bucket(layout::KEYS))? {
            let Some(key) = key_of_record(&path) else { continue };
            // Read before the record is, because reading marks it as used.
            let last_used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            let Ok(record) = self.inner.read_record(&key) else { continue };
            let complete = record.outputs.iter().any(|output| self.inner.complete(&output.artifact).is_ok());
            let size_bytes = self.stored_bytes(&record);
            listed.push(Listed { key, record, size_bytes, complete, last_used });
        }
        listed.sort_by_key(|entry| entry.key);
        Ok(listed)
    }

    /// Adds up the files of each bucket.
    pub fn disk_usage(&self) -> Result<DiskUsage> {
        let sum = |buckets: &[&str]| -> Result<BucketUsage> {
            let mut usage = BucketUsage::default();
            for bucket in buckets {
                for (_, metadata) in files_below(&self.inner.layout.bucket(bucket))? {
                    usage.n_files += 1;
                    usage.size_bytes += metadata.len();
                }
            }
            Ok(usage)
        };
        Ok(DiskUsage {
            objects: sum(&[layout::OBJECTS])?,
            records: sum(&[layout::KEYS, layout::FAMILIES])?,
            staging: sum(&[layout::STAGING])?,
            quarantine: sum(&[layout::QUARANTINE])?,
            other: sum(&[layout::LOCKS, layout::STATS])?,
        })
    }

    fn stored_bytes(&self, record: &Record) -> u64 {
        let mut digests = HashSet::new();
        for output in &record.outputs {
            digests.insert(output.artifact);
            if let Ok(artifact) = self.inner.load_artifact(&output.artifact) {
                digests.extend(artifact.blobs.iter().map(|blob| blob.digest));
            }
        }
        let size = |digest| std::fs::metadata(self.inner.layout.object(digest)).map_or(0, |file| file.len());
        digests.iter().map(size).sum()
    }
}

/// Puts the two parts of a sharded name together again.
fn key_of_record(path: &Path) -> Option<StageKey> {
    let rest = path.file_name()?.to_str()?.strip_suffix(RECORD_EXTENSION)?;
    let shard = path.parent()?.file_name()?.to_str()?;
    format!("{shard}{rest}").parse().ok()
}

/// Returns the files below a folder; what disappears meanwhile, or never existed, is not there.
fn files_below(folder: &Path) -> Result<Vec<(PathBuf, std::fs::Metadata)>> {
    fn there<T>(result: io::Result<T>, path: &Path) -> Result<Option<T>> {
        match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some).map_err(Error::at(path)),
        }
    }
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Some(entries) = there(fs_err::read_dir(&folder), &folder)? else { continue };
        for entry in entries {
            let Some(entry) = there(entry, &folder)? else { continue };
            let path = entry.path();
            let Some(metadata) = there(fs_err::symlink_metadata(&path), &path)? else { continue };
            if metadata.is_dir() {
                folders.push(path);
            } else {
                files.push((path, metadata));
            }
        }
    }
    Ok(files)
}
