//! Errors, damages and misses: three different things.
//!
//! An [`Error`] stops what the caller asked for. A [`Damage`] is a part of an artifact that cannot be used any more;
//! the remedy is to run the stage again. A [`Miss`] is the ordinary answer "not in the store", with the reason.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The result of operations that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation on the store failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused; the message names the path.
    #[error(transparent)]
    Io(io::Error),
    /// The file system, or the user's share of it, is full.
    #[error("no space left for `{}`: free some, or choose another cache folder", path.display())]
    DiskFull {
        /// The file being written.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// A lock file could not be locked, for a reason other than someone else holding it.
    #[error("cannot lock `{}`: does its file system support locks?", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The caller gave up waiting for a lock.
    #[error("gave up waiting for `{}`", path.display())]
    Cancelled {
        /// The lock file.
        path: PathBuf,
    },
    /// An object that was asked for is not in the store.
    #[error("not in the store: object {digest}")]
    Missing {
        /// The object's digest.
        digest: blake3::Hash,
    },
    /// An object does not hold the bytes that its name promises; it has been moved to quarantine.
    #[error("damaged in the store: object {digest}: {reason}")]
    Corrupt {
        /// The object's digest.
        digest: blake3::Hash,
        /// What is wrong with it.
        reason: String,
    },
    /// An artifact was handed over for publication without all that it needs.
    #[error("cannot publish artifact {artifact}: {reason}")]
    Incomplete {
        /// The artifact's digest.
        artifact: blake3::Hash,
        /// What is missing.
        reason: String,
    },
    /// A file to be digested or taken over is not a regular file in the expected place.
    #[error("not a usable file: `{}`: {reason}", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A user file changed while it was read.
    #[error("changed while it was in use: `{}`: {what}", path.display())]
    SourceChanged {
        /// The file.
        path: PathBuf,
        /// What changed.
        what: String,
    },
    /// No file with the content is known any more.
    #[error("no known file has the content {digest} ({size} bytes){}", tried_list(tried))]
    SourceGone {
        /// Digest of the content.
        digest: blake3::Hash,
        /// Its length in bytes.
        size: u64,
        /// Where files with the content used to lie.
        tried: Vec<PathBuf>,
    },
}

impl Error {
    /// Returns a function that turns an I/O error about `path` into an [`Error`]; a full disk becomes its own case.
    pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { path: path.to_owned(), source }
            }
            _ => Self::Io(source),
        }
    }
}

/// A part of an artifact that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The artifact that needs the part: the one asked for, or one of its operands.
    pub artifact: blake3::Hash,
    /// The part.
    pub part: Part,
    /// What is wrong with it.
    pub reason: String,
}

/// What a [`Damage`] is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// The artifact's own description.
    Description,
    /// One of its blobs.
    Blob {
        /// Name within the artifact.
        name: String,
        /// Digest of the bytes.
        digest: blake3::Hash,
    },
    /// A user file that it points into.
    Source {
        /// Digest of the file.
        digest: blake3::Hash,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.part {
            Part::Description => write!(f, "artifact {}: {}", self.artifact, self.reason),
            Part::Blob { name, .. } => {
                write!(f, "blob `{name}` of artifact {}: {}", self.artifact, self.reason)
            }
            Part::Source { digest } => {
                write!(f, "source {digest} of artifact {}: {}", self.artifact, self.reason)
            }
        }
    }
}

/// Why a lookup found nothing usable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Miss {
    /// The key has never been published here.
    Unknown,
    /// The record was damaged or could not be read.
    Unreadable {
        /// What is wrong with it.
        reason: String,
    },
    /// The record is there, but no output of it is complete; this is about the newest.
    Incomplete(Damage),
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("never ran with these inputs and parameters"),
            Self::Unreadable { reason } => write!(f, "its cache record cannot be read: {reason}"),
            Self::Incomplete(damage) => write!(f, "its cached output is incomplete: {damage}"),
        }
    }
}

fn tried_list(tried: &[PathBuf]) -> String {
    let mut text = String::new();
    for (idx, path) in tried.iter().enumerate() {
        text += if idx == 0 { "; it used to be in `" } else { ", `" };
        text += &path.display().to_string();
        text.push('`');
    }
    text
}
