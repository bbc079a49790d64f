//! Writing: files come into being in a staging folder and enter the store by `rename`.
//!
//! A store that writes has one *session*: `staging-v1/<session>/`, and beside it `<session>.lock`, locked as long as
//! the process lives. A session whose lock nobody holds belongs to a process that was killed; starting a session
//! removes such leftovers. INVARIANT: the lock file exists, locked, before the folder does, and outlives it; so a
//! folder without a lock file is a leftover too.
//!
//! Objects of a megabyte and more are synced to disk before they are renamed. Smaller ones are not: losing one in a
//! power failure is a miss, and reading verifies digests. A large object is sent to the disk while it is still being written,
//! so that little is left to wait for at its end.

use std::io::{self, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use crate::artifact::Blob;
use crate::error::{Error, Result};
use crate::event::CacheEvent;
use crate::hash::{hash_file, on_hash_pool};
use crate::layout::{STAGING, rename_into, with_parent};
use crate::lock::LockFile;
use crate::stat::{FileStat, unix_nanoseconds};
use crate::store::{Inner, Store, lock};

/// A private place on the store's file system; what is still in it when it is dropped is removed.
///
/// Stages write blobs through [`Staging::writer`]; an external program is given the folder [`Staging::path`] to write into,
/// and its files are taken over with [`Staging::adopt`].
#[derive(Debug, Clone)]
pub struct Staging {
    store: Store,
    folder: Arc<StagingFolder>,
}

/// Writes one blob, hashing as it goes; a writer dropped before [`BlobWriter::finish`] leaves nothing behind.
///
/// Each megabyte is hashed by all cores while it is written. Do not hold a lock that rayon tasks take, while writing
/// from inside a rayon task.
#[derive(Debug)]
pub struct BlobWriter {
    store: Store,
    name: String,
    /// Removed on drop unless it has been renamed.
    path: PathBuf,
    file: fs_err::File,
    hasher: blake3::Hasher,
    /// Bytes not yet hashed and written; always fewer than [`BUFFER_BYTES`].
    buffer: Vec<u8>,
    /// Bytes hashed and written.
    n_written: u64,
    /// Why a write failed: kept because `io::Write` callers often lose it. A failed writer never finishes.
    failed: Option<io::ErrorKind>,
    /// Bytes written since the last sync began.
    n_unsynced: u64,
    /// A sync that is under way, or has ended and was not looked at.
    syncing: Option<JoinHandle<io::Result<()>>>,
    _session: Arc<Session>,
}

impl Store {
    /// Makes a place to write to. Costs nothing until something is written.
    pub fn staging(&self) -> Result<Staging> {
        let session = self.inner.session()?;
        let folder = StagingFolder { path: OnceLock::new(), session };
        Ok(Staging { store: self.clone(), folder: Arc::new(folder) })
    }

    /// Removes staging folders of processes that were killed; starting to write does the same.
    pub fn remove_leftovers(&self) -> Result<()> {
        self.inner.remove_leftovers()
    }
}

impl Staging {
    /// Returns the folder, which the first call makes.
    pub fn path(&self) -> Result<&Path> {
        if let Some(path) = self.folder.path.get() {
            return Ok(path);
        }
        let path = self.folder.session.next_path();
        fs_err::create_dir(&path).map_err(Error::at(&path))?;
        // Of two threads that come here at once one loses, and leaves an empty folder to the end of the session.
        Ok(self.folder.path.get_or_init(|| path))
    }

    /// Begins a blob that will be known as `name` within its artifact.
    pub fn writer(&self, name: &str) -> Result<BlobWriter> {
        let path = self.folder.session.next_path();
        let file = fs_err::OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        Ok(BlobWriter {
            store: self.store.clone(),
            name: name.to_owned(),
            file: file.map_err(Error::at(&path))?,
            path,
            hasher: blake3::Hasher::new(),
            buffer: Vec::new(),
            n_written: 0,
            failed: None,
            n_unsynced: 0,
            syncing: None,
            _session: Arc::clone(&self.folder.session),
        })
    }

    /// Takes over a finished file that lies in this folder.
    ///
    /// The file must be a regular one; one with a second name is copied, because whoever knows that name could still
    /// change it.
    pub fn adopt(&self, name: &str, path: &Path) -> Result<Blob> {
        let not_usable = |reason| Error::NotAFile { path: path.to_owned(), reason };
        let metadata = fs_err::symlink_metadata(path).map_err(Error::at(path))?;
        if !metadata.is_file() {
            return Err(not_usable("it is not a regular file"));
        }
        let real = fs_err::canonicalize(path).map_err(Error::at(path))?;
        if !self.folder.path.get().is_some_and(|folder| real.starts_with(folder)) {
            return Err(not_usable("it lies outside the staging folder"));
        }
        let mut file = fs_err::File::open(&real).map_err(Error::at(&real))?;
        if metadata.nlink() > 1 {
            let mut writer = self.writer(name)?;
            io::copy(&mut file, &mut writer).map_err(Error::at(&real))?;
            return writer.finish();
        }
        let before = FileStat::of(&metadata);
        let digest = hash_file(file.file(), before.size, &|_| {}).map_err(|source| {
            Error::Io(io::Error::new(source.kind(), format!("cannot read `{}`: {source}", real.display())))
        })?;
        let after = FileStat::of_path(&real).map_err(Error::at(&real))?;
        if after != before {
            return Err(Error::SourceChanged { path: real, what: before.differences(&after) });
        }
        self.store.inner.install(&real, &file, &digest, before.size)?;
        Ok(Blob { name: name.to_owned(), digest, size: before.size })
    }
}

impl BlobWriter {
    /// Returns the number of bytes written so far.
    pub fn bytes_written(&self) -> u64 {
        self.n_written + self.buffer.len() as u64
    }

    /// Puts the blob into the store; from here on it is read-only and named by its digest.
    pub fn finish(mut self) -> Result<Blob> {
        self.flush().and_then(|()| self.end_sync()).map_err(Error::at(&self.path))?;
        let digest = self.hasher.finalize();
        self.store.inner.install(&self.path, &self.file, &digest, self.n_written)?;
        Ok(Blob { name: std::mem::take(&mut self.name), digest, size: self.n_written })
    }

    fn write_through(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Some(kind) = self.failed {
            return Err(io::Error::new(
                kind,
                format!("an earlier write to `{}` failed", self.path.display()),
            ));
        }
        let result = if bytes.len() < PARALLEL_BYTES {
            self.hasher.update(bytes);
            self.file.write_all(bytes)
        } else {
            let (hasher, file) = (&mut self.hasher, &mut self.file);
            on_hash_pool(|| rayon::join(|| hasher.update_rayon(bytes), || file.write_all(bytes)).1)
        };
        let result = result.and_then(|()| {
            self.n_written += bytes.len() as u64;
            self.n_unsynced += bytes.len() as u64;
            if self.n_unsynced < SYNC_EVERY || self.syncing.as_ref().is_some_and(|sync| !sync.is_finished()) {
                return Ok(());
            }
            self.end_sync()?;
            self.begin_sync()
        });
        if let Err(error) = &result {
            self.failed = Some(error.kind());
        }
        result
    }

    /// Sends to the disk what has been written, without waiting for it.
    fn begin_sync(&mut self) -> io::Result<()> {
        let file = self.file.file().try_clone()?;
        self.n_unsynced = 0;
        // Without a thread, all is synced at the end.
        self.syncing =
            std::thread::Builder::new().name("sync".to_owned()).spawn(move || file.sync_data()).ok();
        Ok(())
    }

    /// Waits for the sync under way. A disk tells an error once: it must not be lost here.
    fn end_sync(&mut self) -> io::Result<()> {
        match self.syncing.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("syncing panicked")),
        }
    }

    fn write_buffer(&mut self) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = self.write_through(&buffer);
        buffer.clear();
        self.buffer = buffer;
        result
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() + bytes.len() < BUFFER_BYTES {
            self.buffer.extend_from_slice(bytes);
            return Ok(bytes.len());
        }
        if !self.buffer.is_empty() {
            self.write_buffer()?;
        }
        self.write_through(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write_buffer()
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Small writes are gathered up to this many bytes.
const BUFFER_BYTES: usize = 1 << 20;
/// A file that grows is sent to the disk each time it has grown by this many bytes.
const SYNC_EVERY: u64 = 32 << 20;
/// From this many bytes on, hashing with several threads pays.
const PARALLEL_BYTES: usize = 256 << 10;

/// The staging area of one [`Store`].
#[derive(Debug)]
pub(crate) struct Session {
    folder: PathBuf,
    n_paths: AtomicU64,
    /// Dropped, and thereby removed, after the folder.
    _lock: LockFile,
}

#[derive(Debug)]
struct StagingFolder {
    /// Most stages never need a folder, and making one costs more than all else that a view does.
    path: OnceLock<PathBuf>,
    /// Keeps the session's folder and lock for as long as there is something in it.
    session: Arc<Session>,
}

impl Session {
    fn next_path(&self) -> PathBuf {
        self.folder.join(self.n_paths.fetch_add(1, Ordering::Relaxed).to_string())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Drop for StagingFolder {
    fn drop(&mut self) {
        if let Some(path) = self.path.get() {
            let _ = std::fs::remove_dir_all(path);
        }
    }
}

impl Inner {
    /// Writes a small file next to where it belongs and renames it into place.
    pub(crate) fn write_atomically(&self, path: &Path, bytes: &[u8], read_only: bool) -> Result<()> {
        let staged = self.session()?.next_path();
        let written = fs_err::File::create_new(&staged).and_then(|mut file| {
            file.write_all(bytes)?;
            if read_only { make_read_only(&file) } else { Ok(()) }
        });
        let result = written.map_err(Error::at(&staged)).and_then(|()| rename_into(&staged, path));
        if result.is_err() {
            let _ = std::fs::remove_file(&staged);
        }
        result
    }

    fn session(&self) -> Result<Arc<Session>> {
        let mut slot = lock(&self.session);
        if let Some(session) = &*slot {
            return Ok(Arc::clone(session));
        }
        let session = Arc::new(self.start_session()?);
        *slot = Some(Arc::clone(&session));
        drop(slot);
        // Leftovers that resist are no reason to fail.
        let _ = self.remove_leftovers();
        Ok(session)
    }

    fn start_session(&self) -> Result<Session> {
        let staging = self.layout.bucket(STAGING);
        let host = &blake3::hash(self.host.as_bytes()).to_hex()[..8];
        let process = std::process::id();
        let mut moment = unix_nanoseconds((self.clock)());
        loop {
            let name = format!("{host}-{process}-{moment:x}");
            let path = staging.join(format!("{name}.lock"));
            let folder = staging.join(name);
            if let Some(lock) = LockFile::try_acquire(&path)? {
                match with_parent(&folder, || fs_err::create_dir(&folder)) {
                    Ok(()) => return Ok(Session { folder, n_paths: AtomicU64::new(0), _lock: lock }),
                    Err(Error::Io(error)) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(error) => return Err(error),
                }
            }
            // Another store of this process started within the same tick of the clock.
            moment = moment.wrapping_add(1);
        }
    }

    fn remove_leftovers(&self) -> Result<()> {
        let staging = self.layout.bucket(STAGING);
        let entries = match fs_err::read_dir(&staging) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(Error::at(&staging))?,
        };
        let mut n_folders = 0;
        for entry in entries {
            let path = entry.map_err(Error::at(&staging))?.path();
            let folder = path.with_extension("");
            let lock_file = path.with_extension("lock");
            if path == folder && lock_file.exists() {
                continue;
            }
            // For a folder without a lock file this makes one, which is removed again below.
            if let Some(_lock) = LockFile::try_acquire(&lock_file)?
                && folder.exists()
            {
                fs_err::remove_dir_all(&folder).map_err(Error::at(&folder))?;
                n_folders += 1;
            }
        }
        if n_folders > 0 {
            (self.on_event)(CacheEvent::LeftoversRemoved { n_folders });
        }
        Ok(())
    }
}

/// Takes all write permissions away, leaving to the user's umask who may read.
pub(crate) fn make_read_only(file: &fs_err::File) -> io::Result<()> {
    let mut permissions = file.metadata()?.permissions();
    permissions.set_readonly(true);
    file.set_permissions(permissions)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{TestStore, files_below};

    fn pattern(n_bytes: usize) -> Vec<u8> {
        (0..n_bytes).map(|idx| (idx % 251) as u8).collect()
    }

    #[test]
    fn pieces_of_any_size_give_the_digest_of_the_whole() {
        let test = TestStore::new();
        let staging = test.store.staging().unwrap();
        let bytes = pattern(3 * BUFFER_BYTES + 12_345);
        for piece in
            [1 << 13, PARALLEL_BYTES - 1, PARALLEL_BYTES, BUFFER_BYTES - 1, BUFFER_BYTES, bytes.len()]
        {
            let mut writer = staging.writer("b").unwrap();
            for piece in bytes.chunks(piece) {
                writer.write_all(piece).unwrap();
            }
            assert_eq!(writer.bytes_written(), bytes.len() as u64);
            let blob = writer.finish().unwrap();
            assert_eq!((blob.digest, blob.size), (blake3::hash(&bytes), bytes.len() as u64));
        }
        let object = test.store.inner.layout.object(&blake3::hash(&bytes));
        assert_eq!(fs_err::read(&object).unwrap(), bytes);
        assert!(fs_err::metadata(&object).unwrap().permissions().readonly());
    }

    #[test]
    fn empty_blob_is_a_blob() {
        let test = TestStore::new();
        let blob = test.store.staging().unwrap().writer("b").unwrap().finish().unwrap();
        assert_eq!((blob.digest, blob.size), (blake3::hash(b""), 0));
        test.store.open_blob(&blob.digest, 0).unwrap();
    }

    #[test]
    fn dropped_writers_and_folders_leave_nothing() {
        let test = TestStore::new();
        let staging = test.store.staging().unwrap();
        let mut writer = staging.writer("b").unwrap();
        writer.write_all(&pattern(2 * BUFFER_BYTES)).unwrap();
        let folder = staging.path().unwrap().to_owned();
        fs_err::write(folder.join("by a program"), "x").unwrap();
        assert_eq!(staging.path().unwrap(), folder);
        drop(staging);
        assert!(!folder.exists());
        let written = writer.path.clone();
        assert!(written.exists(), "a writer is still at work");
        drop(writer);
        assert!(!written.exists());
        let root = test.store.inner.layout.bucket(STAGING);
        drop(test.store);
        assert_eq!(files_below(&root), Vec::<PathBuf>::new());
    }

    #[test]
    fn full_disk_is_named_and_leaves_nothing() {
        let test = TestStore::new();
        let staging = test.store.staging().unwrap();
        for n_bytes in [10, 3 * BUFFER_BYTES] {
            let mut writer = staging.writer("b").unwrap();
            // The kernel's own full disk, in place of the staged file.
            writer.file = fs_err::OpenOptions::new().write(true).open("/dev/full").unwrap();
            let path = writer.path.clone();
            let early = writer.write_all(&pattern(n_bytes));
            assert_eq!(early.is_err(), n_bytes > BUFFER_BYTES);
            match writer.finish() {
                Err(Error::DiskFull { path: named, .. }) => assert_eq!(named, path),
                other => panic!("expected a full disk, got {other:?}"),
            }
            assert!(!path.exists());
        }
        assert_eq!(
            files_below(&test.store.inner.layout.bucket(crate::layout::OBJECTS)),
            Vec::<PathBuf>::new()
        );
    }

    #[test]
    fn adopts_files_of_other_programs() {
        let test = TestStore::new();
        let staging = test.store.staging().unwrap();
        let inside = staging.path().unwrap().join("out/result.bin");
        fs_err::create_dir(staging.path().unwrap().join("out")).unwrap();
        fs_err::write(&inside, "result").unwrap();
        let blob = staging.adopt("r", &inside).unwrap();
        assert_eq!(blob, Blob { name: "r".into(), digest: blake3::hash(b"result"), size: 6 });
        assert!(!inside.exists());

        let outside = test.folder.path().join("outside");
        fs_err::write(&outside, "outside").unwrap();
        assert!(matches!(staging.adopt("r", &outside), Err(Error::NotAFile { .. })));
        let link = staging.path().unwrap().join("link");
        std::os::unix::fs::symlink(&outside, &link).unwrap();
        assert!(matches!(staging.adopt("r", &link), Err(Error::NotAFile { .. })));

        let shared = staging.path().unwrap().join("shared");
        fs_err::hard_link(&outside, &shared).unwrap();
        let blob = staging.adopt("s", &shared).unwrap();
        fs_err::write(&outside, "changed").unwrap();
        let kept = test.store.open_blob(&blob.digest, blob.size).unwrap();
        assert_eq!(fs_err::read(kept.path).unwrap(), b"outside");
    }

    #[test]
    fn leftovers_go_and_live_sessions_stay() {
        let test = TestStore::new();
        let staging = test.store.inner.layout.bucket(STAGING);
        fs_err::create_dir_all(staging.join("dead/0")).unwrap();
        fs_err::write(staging.join("dead/0/.blob-0"), "half").unwrap();
        fs_err::write(staging.join("dead.lock"), "").unwrap();
        fs_err::create_dir_all(staging.join("orphan")).unwrap();
        let live = test.store.staging().unwrap();
        assert!(
            live.path().unwrap().exists()
                && !staging.join("dead").exists()
                && !staging.join("orphan").exists()
        );
        assert_eq!(test.events(), [CacheEvent::LeftoversRemoved { n_folders: 2 }]);
        let second = test.reopen().staging().unwrap();
        assert!(live.path().unwrap().exists() && second.path().unwrap().exists());
        assert_eq!(test.events(), []);
    }
}
