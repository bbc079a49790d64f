//! The cache folder of one repository, laid out as Hugging Face's own tools lay it out.

use super::address::HubAddress;
use super::is_commit;
use crate::error::Result;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Tells what this process writes beside its place apart.
static N_STAGED: AtomicU64 = AtomicU64::new(0);

/// Knows where things of a repository are.
pub(super) struct RepoCache {
    folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(super) fn new(cache_dir: &Path, address: &HubAddress) -> Self {
        let name = format!("{}--{}", address.kind.folder(), address.repo.replace('/', "--"));
        Self { folder: cache_dir.join(&name), locks: cache_dir.join(".locks").join(&name) }
    }

    /// A file of a commit, there or not.
    pub(super) fn file(&self, commit: &str, name: &str) -> PathBuf {
        name.split('/').fold(self.folder.join("snapshots").join(commit), |path, part| path.join(part))
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    pub(super) fn incomplete(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    pub(super) fn lock(&self, etag: &str) -> PathBuf {
        self.locks.join(format!("{etag}.lock"))
    }

    /// The commit that a branch stood for when somebody last asked.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        let text = fs_err::read_to_string(self.reference(revision)).ok()?;
        let commit = text.trim();
        is_commit(commit).then(|| commit.to_owned())
    }

    /// Remembers what a branch stands for.
    pub(super) fn remember(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) || self.commit_of(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.reference(revision);
        let folder = path.parent().unwrap_or(&self.folder);
        fs_err::create_dir_all(folder)?;
        // By rename: others read it while it is written, and other threads of this process write it, too.
        let count = N_STAGED.fetch_add(1, Ordering::Relaxed);
        let staged = folder.join(format!(".{}-{count}.tmp", std::process::id()));
        fs_err::write(&staged, commit)?;
        Ok(fs_err::rename(staged, path)?)
    }

    fn reference(&self, revision: &str) -> PathBuf {
        revision.split('/').fold(self.folder.join("refs"), |path, part| path.join(part))
    }

    /// Gives a blob its name in a commit.
    pub(super) fn link(&self, commit: &str, name: &str, etag: &str) -> Result<PathBuf> {
        let path = self.file(commit, name);
        if path.is_file() {
            return Ok(path);
        }
        let folder = path.parent().unwrap_or(&self.folder);
        fs_err::create_dir_all(folder)?;
        // From `snapshots/<commit>/a/b` up to the repository's folder, then down.
        let up = "../".repeat(2 + name.matches('/').count());
        match place_link(Path::new(&format!("{up}blobs/{etag}")), &self.blob(etag), &path) {
            // Another process was faster.
            Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_file() => Ok(path),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                // A link to a blob that is gone.
                fs_err::remove_file(&path)?;
                place_link(Path::new(&format!("{up}blobs/{etag}")), &self.blob(etag), &path)?;
                Ok(path)
            }
            other => other.map(|()| path).map_err(Into::into),
        }
    }
}

#[cfg(unix)]
fn place_link(target: &Path, _: &Path, path: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

/// Where links need rights that people do not have, the file itself takes the place, as with Hugging Face's tools.
#[cfg(not(unix))]
fn place_link(_: &Path, blob: &Path, path: &Path) -> std::io::Result<()> {
    fs_err::rename(blob, path)
}

/// Forgets a file and its content.
pub(crate) fn discard(path: &Path) -> Result<()> {
    let blob = fs_err::canonicalize(path).ok().filter(|blob| blob != path);
    for path in blob.iter().map(PathBuf::as_path).chain([path]) {
        match fs_err::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_branch_may_be_remembered_by_several_threads_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let address = HubAddress::parse("hf://org/clip/model.safetensors").unwrap();
        let cache = RepoCache::new(folder.path(), &address);
        let commits = ["a".repeat(40), "b".repeat(40)];
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (cache, commits) = (&cache, &commits);
                scope.spawn(move || {
                    for round in 0..200 {
                        cache.remember("main", &commits[(thread + round) % 2]).unwrap();
                        assert!(commits.contains(&cache.commit_of("main").unwrap()));
                    }
                });
            }
        });
        let left = fs_err::read_dir(cache.reference("main").parent().unwrap()).unwrap().count();
        assert_eq!(left, 1, "only the branch is there");
    }
}
