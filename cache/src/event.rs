//! Events: what the store did on its own account and a user would want to hear about.

use std::path::PathBuf;

use crate::key::StageKey;

/// Something worth reporting that is not an error of the operation under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheEvent {
    /// A damaged file was moved out of the way.
    Quarantined {
        /// Where it was.
        path: PathBuf,
        /// Where it is now; `None` when it could not be moved.
        moved_to: Option<PathBuf>,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of the store could not be read; it was left alone and counts as absent.
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        reason: String,
    },
    /// One key produced different outputs.
    NonDeterministic {
        /// The key.
        key: StageKey,
        /// All distinct artifacts seen for it, newest first.
        outputs: Vec<blake3::Hash>,
    },
    /// Staging folders of processes that ended without cleaning up were removed.
    LeftoversRemoved {
        /// How many.
        n_folders: usize,
    },
    /// The file of known digests was damaged; what could not be read will be hashed again.
    StatCacheDamaged {
        /// The file.
        path: PathBuf,
        /// How many entries could be read.
        n_kept: usize,
    },
    /// Known digests could not be written; the next run hashes those files again.
    StatCacheNotSaved {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        reason: String,
    },
}
