//! Where things lie in the store, and the few file operations that depend on it.
//!
//! Folders are made when the first file goes into them, so opening a store costs one `stat`.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::key::{FamilyKey, StageKey};

/// Names of the buckets; the crate documentation shows the tree.
pub(crate) const OBJECTS: &str = "objects-v1";
pub(crate) const KEYS: &str = "keys-v1";
pub(crate) const FAMILIES: &str = "families-v1";
pub(crate) const STAGING: &str = "staging-v1";
pub(crate) const LOCKS: &str = "locks-v1";
pub(crate) const QUARANTINE: &str = "quarantine-v1";
pub(crate) const STATS: &str = "stat-v1";

/// Maps identities to paths below one root.
#[derive(Debug)]
pub(crate) struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Makes the root folder, if need be, with its `CACHEDIR.TAG`.
    pub(crate) fn create(root: &Path) -> Result<Self> {
        let tag = root.join("CACHEDIR.TAG");
        if !tag.exists() {
            fs_err::create_dir_all(root).map_err(Error::at(root))?;
            fs_err::write(&tag, CACHEDIR_TAG).map_err(Error::at(&tag))?;
        }
        // Absolute, so that a later change of the working directory does not move the store.
        let root = fs_err::canonicalize(root).map_err(Error::at(root))?;
        Ok(Self { root })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn bucket(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(crate) fn object(&self, digest: &blake3::Hash) -> PathBuf {
        self.sharded(OBJECTS, digest, "")
    }

    pub(crate) fn record(&self, key: &StageKey) -> PathBuf {
        self.sharded(KEYS, key.as_hash(), RECORD_EXTENSION)
    }

    pub(crate) fn family(&self, family: &FamilyKey) -> PathBuf {
        self.sharded(FAMILIES, family.as_hash(), "")
    }

    pub(crate) fn key_lock(&self, key: &StageKey) -> PathBuf {
        self.root.join(LOCKS).join(format!("{key}.lock"))
    }

    /// One of 256 locks for changing records: far fewer files than keys, and hardly ever contended.
    pub(crate) fn records_lock(&self, key: &StageKey) -> PathBuf {
        self.root.join(LOCKS).join(format!("{}.records", &key.as_hash().to_hex()[..2]))
    }

    pub(crate) fn stats_lock(&self) -> PathBuf {
        self.root.join(LOCKS).join("stat.lock")
    }

    /// One file per host: device numbers of network file systems differ between hosts, and hosts that share a
    /// store would keep overwriting each other's entries.
    pub(crate) fn stats(&self, host: &str) -> PathBuf {
        self.root.join(STATS).join(&blake3::hash(host.as_bytes()).to_hex()[..16])
    }

    fn sharded(&self, bucket: &str, digest: &blake3::Hash, extension: &str) -> PathBuf {
        let hex = digest.to_hex();
        let capacity = self.root.as_os_str().len() + bucket.len() + hex.len() + extension.len() + 3;
        let mut path = PathBuf::with_capacity(capacity);
        path.push(&self.root);
        path.push(bucket);
        path.push(&hex[..2]);
        path.push(&hex[2..]);
        path.as_mut_os_string().push(extension);
        path
    }
}

/// What follows the digest in the name of a record.
pub(crate) const RECORD_EXTENSION: &str = ".json";

const CACHEDIR_TAG: &str = "Signature: 8a477f597d28d172789f06886806bc55\n\
    # This folder holds results that merganser can compute again.\n\
    # For information about cache directory tags see https://bford.info/cachedir/\n";

/// Renames, making the folder of the target first if it does not exist yet.
pub(crate) fn rename_into(from: &Path, to: &Path) -> Result<()> {
    with_parent(to, || fs_err::rename(from, to))
}

/// Runs `make`, and once more after making the parent folder of `path` if that was missing.
pub(crate) fn with_parent<T>(path: &Path, mut make: impl FnMut() -> io::Result<T>) -> Result<T> {
    match make() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                fs_err::create_dir_all(parent).map_err(Error::at(parent))?;
            }
            make().map_err(Error::at(path))
        }
        other => other.map_err(Error::at(path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Preimage, Value};

    #[test]
    fn paths_are_sharded_by_the_first_byte() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::create(&folder.path().join("a/b")).unwrap();
        let root = layout.root().to_owned();
        assert!(root.ends_with("a/b") && root.join("CACHEDIR.TAG").is_file());
        let digest = blake3::hash(b"");
        let hex = digest.to_hex();
        assert_eq!(layout.object(&digest), root.join("objects-v1").join(&hex[..2]).join(&hex[2..]));
        let key = Preimage { operation: Value::Null, inputs: Value::Null }.key();
        let name = format!("{}.json", &key.to_string()[2..]);
        assert_eq!(layout.record(&key), root.join("keys-v1").join(&key.to_string()[..2]).join(name));
    }

    #[test]
    fn renaming_makes_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("from");
        fs_err::write(&from, "x").unwrap();
        rename_into(&from, &folder.path().join("d/e/to")).unwrap();
        assert_eq!(fs_err::read_to_string(folder.path().join("d/e/to")).unwrap(), "x");
        let missing = rename_into(&from, &folder.path().join("d/other"));
        assert!(matches!(missing, Err(Error::Io(_))));
    }
}
