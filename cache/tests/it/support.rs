//! A store in a temporary folder, with a clock that tests move and events that they read.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use merganser_cache::{Artifact, Blob, CacheEvent, Options, Preimage, Store, Value};

pub(crate) struct Fixture {
    pub(crate) folder: Folder,
    pub(crate) events: Arc<Mutex<Vec<CacheEvent>>>,
    /// How far the store's clock is ahead of the real one; negative when it is behind.
    pub(crate) seconds_ahead: Arc<AtomicI64>,
}

/// Where a fixture keeps its files; its own folder is removed with it.
pub(crate) enum Folder {
    Own(tempfile::TempDir),
    Other(PathBuf),
}

impl Folder {
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Own(folder) => folder.path(),
            Self::Other(path) => path,
        }
    }
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Self::with(Folder::Own(tempfile::tempdir().unwrap()))
    }

    /// A second process on the folder of another fixture.
    pub(crate) fn in_folder(path: &Path) -> Self {
        Self::with(Folder::Other(path.to_owned()))
    }

    fn with(folder: Folder) -> Self {
        // Far enough ahead that files made by a test are not racy unless the test wants them to be.
        Self { folder, events: Arc::default(), seconds_ahead: Arc::new(AtomicI64::new(60)) }
    }

    /// Opens the store as a new process would: nothing is remembered but what is on disk.
    pub(crate) fn open(&self) -> Store {
        let sink = Arc::clone(&self.events);
        let seconds_ahead = Arc::clone(&self.seconds_ahead);
        let options = Options {
            clock: Arc::new(move || {
                let hour = Duration::from_hours(1);
                let ahead = 3600 + seconds_ahead.load(Ordering::Relaxed);
                SystemTime::now() - hour + Duration::from_secs(ahead.unsigned_abs())
            }),
            host: "host".into(),
            tool_version: "1.2.3".into(),
            on_event: Arc::new(move |event| sink.lock().unwrap().push(event)),
        };
        Store::open(&self.root(), options).unwrap()
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    /// Writes a user file.
    pub(crate) fn source(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        fs_err::write(&path, content).unwrap();
        path
    }

    /// The events since the last call.
    pub(crate) fn take_events(&self) -> Vec<CacheEvent> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    /// The paths that were quarantined since the last call; fails on any other event.
    pub(crate) fn take_quarantined(&self) -> Vec<PathBuf> {
        let quarantined = |event| match event {
            CacheEvent::Quarantined { path, moved_to, .. } => {
                assert!(moved_to.expect("it can be moved").exists());
                path
            }
            other => panic!("unexpected event {other:?}"),
        };
        self.take_events().into_iter().map(quarantined).collect()
    }

    pub(crate) fn object(&self, digest: &blake3::Hash) -> PathBuf {
        let hex = digest.to_hex();
        self.root().join("objects-v1").join(&hex[..2]).join(&hex[2..])
    }

    pub(crate) fn record(&self, preimage: &Preimage) -> PathBuf {
        let hex = preimage.key().to_string();
        self.root().join("keys-v1").join(&hex[..2]).join(format!("{}.json", &hex[2..]))
    }
}

pub(crate) fn preimage(operation: &str, input: &str) -> Preimage {
    Preimage { operation: Value::from(operation), inputs: Value::from(input) }
}

pub(crate) fn put_blob(store: &Store, name: &str, content: &[u8]) -> Blob {
    let mut writer = store.staging().unwrap().writer(name).unwrap();
    writer.write_all(content).unwrap();
    writer.finish().unwrap()
}

pub(crate) fn artifact_of(manifest: &str, blobs: Vec<Blob>) -> Artifact {
    Artifact { manifest: manifest.into(), blobs, operands: Vec::new(), sources: Vec::new() }
}

/// Publishes an artifact of one blob and returns it with its digest.
pub(crate) fn publish_blob(store: &Store, preimage: &Preimage, content: &[u8]) -> (Artifact, blake3::Hash) {
    let artifact = artifact_of("one blob", vec![put_blob(store, "data", content)]);
    let published = store.publish(preimage, &artifact, Duration::from_millis(1500)).unwrap();
    (artifact, published.artifact)
}

/// Changes one byte of a file, keeping its mode and its modification time.
pub(crate) fn flip_byte(path: &Path, idx: usize) {
    let mut bytes = fs_err::read(path).unwrap();
    bytes[idx] ^= 1;
    overwrite(path, &bytes);
}

/// Replaces the content of a file, keeping its mode and its modification time.
pub(crate) fn overwrite(path: &Path, bytes: &[u8]) {
    let metadata = fs_err::metadata(path).unwrap();
    let mut writable = metadata.permissions();
    #[expect(clippy::permissions_set_readonly_false, reason = "the file is removed with the test's folder")]
    writable.set_readonly(false);
    fs_err::set_permissions(path, writable).unwrap();
    fs_err::write(path, bytes).unwrap();
    fs_err::set_permissions(path, metadata.permissions()).unwrap();
    set_mtime(path, metadata.modified().unwrap());
}

pub(crate) fn set_mtime(path: &Path, time: SystemTime) {
    fs_err::File::open(path).unwrap().set_modified(time).unwrap();
}
