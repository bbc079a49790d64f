//! The user's files: digests by stat, and views that point into them.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use merganser_cache::{CacheEvent, Error, FileDigest, Miss, Part, Source, Store};

use crate::support::{Fixture, artifact_of, overwrite, preimage, set_mtime};

/// Digests a file and returns how many bytes were hashed for it.
fn hashed_bytes(store: &Store, path: &Path) -> (FileDigest, u64) {
    let seen = AtomicU64::new(0);
    let progress = |n_bytes| {
        seen.fetch_add(n_bytes, Ordering::Relaxed);
    };
    let digest = store.digest_file(path, &progress).unwrap();
    (digest, seen.into_inner())
}

#[test]
fn unchanged_file_is_hashed_once() {
    let fixture = Fixture::new();
    let path = fixture.source("model", b"weights");
    let expected = FileDigest { digest: blake3::hash(b"weights"), size: 7 };
    let store = fixture.open();
    assert_eq!(hashed_bytes(&store, &path), (expected, 7));
    assert_eq!(hashed_bytes(&store, &path), (expected, 0));
    drop(store);
    assert_eq!(hashed_bytes(&fixture.open(), &path), (expected, 0));
    let link = fixture.folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    // Another name is hashed once more: finding out that it leads to a known file would cost every run system calls.
    assert_eq!(hashed_bytes(&fixture.open(), &link), (expected, 7));
    assert_eq!(hashed_bytes(&fixture.open(), &link), (expected, 0));
}

#[test]
fn many_threads_hash_a_file_once() {
    let fixture = Fixture::new();
    let path = fixture.source("model", &vec![3; 4 << 20]);
    let store = fixture.open();
    let total = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| total.fetch_add(hashed_bytes(&store, &path).1, Ordering::Relaxed));
        }
    });
    assert_eq!(total.into_inner(), 4 << 20);
}

#[test]
fn changed_content_gives_another_digest() {
    let fixture = Fixture::new();
    let path = fixture.source("model", b"weights");
    let store = fixture.open();
    hashed_bytes(&store, &path);
    // Same size, same modification time: the change time tells.
    std::thread::sleep(Duration::from_millis(20));
    overwrite(&path, b"WEIGHTS");
    assert_eq!(hashed_bytes(&store, &path).0.digest, blake3::hash(b"WEIGHTS"));
}

#[test]
fn file_hashed_within_a_tick_of_its_change_is_hashed_again() {
    let fixture = Fixture::new();
    // By the store's clock the file is hashed no later than it was changed: a second change could leave its times.
    fixture.seconds_ahead.store(-1, Ordering::Relaxed);
    let path = fixture.source("model", b"weights");
    let store = fixture.open();
    assert_eq!(hashed_bytes(&store, &path).1, 7);
    drop(store);
    let store = fixture.open();
    fixture.seconds_ahead.store(60, Ordering::Relaxed);
    assert_eq!(hashed_bytes(&store, &path).1, 7, "the entry was racy");
    assert_eq!(hashed_bytes(&store, &path).1, 0, "and is not any more");
}

#[test]
fn touched_file_is_hashed_again_and_found_equal() {
    let fixture = Fixture::new();
    let path = fixture.source("model", b"weights");
    let store = fixture.open();
    let (before, _) = hashed_bytes(&store, &path);
    set_mtime(&path, SystemTime::now() - Duration::from_secs(1000));
    assert_eq!(hashed_bytes(&store, &path), (before, 7));
    assert_eq!(hashed_bytes(&store, &path), (before, 0));
}

#[test]
fn only_regular_files_have_digests() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let digest = |path: &Path| store.digest_file(path, &|_| {});
    assert!(matches!(digest(fixture.folder.path()), Err(Error::NotAFile { .. })));
    assert!(matches!(digest(Path::new("/dev/zero")), Err(Error::NotAFile { .. })));
    let error = digest(&fixture.folder.path().join("absent")).unwrap_err().to_string();
    assert!(error.contains("absent"), "{error}");
}

#[test]
fn file_that_changes_while_it_is_hashed_is_an_error() {
    let fixture = Fixture::new();
    let path = fixture.source("model", &vec![3; 1 << 20]);
    let store = fixture.open();
    let error = store.digest_file(&path, &|_| fs_err::write(&path, vec![4; 1 << 20]).unwrap()).unwrap_err();
    assert!(matches!(error, Error::SourceChanged { .. }), "{error}");
    let error = store.digest_file(&path, &|_| fs_err::write(&path, b"short").unwrap()).unwrap_err();
    assert!(matches!(error, Error::SourceChanged { .. }), "{error}");
}

#[test]
fn damaged_stat_file_costs_only_time() {
    let fixture = Fixture::new();
    let path = fixture.source("model", b"weights");
    hashed_bytes(&fixture.open(), &path);
    let stats = fs_err::read_dir(fixture.root().join("stat-v1")).unwrap().next().unwrap().unwrap().path();
    let whole = fs_err::read(&stats).unwrap();
    for bad in [&whole[..whole.len() - 1], &whole[..4], b"garbage, and more of it"] {
        fs_err::write(&stats, bad).unwrap();
        let store = fixture.open();
        assert_eq!(hashed_bytes(&store, &path).1, 7);
        assert!(matches!(fixture.take_events()[..], [CacheEvent::StatCacheDamaged { .. }]));
        drop(store);
        assert_eq!(hashed_bytes(&fixture.open(), &path).1, 0, "it was repaired");
        assert_eq!(fixture.take_events(), []);
    }
}

#[test]
fn stores_of_two_processes_add_up_their_digests() {
    let fixture = Fixture::new();
    let (one, two) = (fixture.source("one", b"1"), fixture.source("two", b"2"));
    let (store_one, store_two) = (fixture.open(), fixture.open());
    hashed_bytes(&store_one, &one);
    hashed_bytes(&store_two, &two);
    store_two.flush().unwrap();
    drop((store_one, store_two));
    let store = fixture.open();
    assert_eq!((hashed_bytes(&store, &one).1, hashed_bytes(&store, &two).1), (0, 0));
}

/// A published view into a user file, and the digests of both.
fn publish_view(fixture: &Fixture, content: &[u8]) -> (std::path::PathBuf, Source, blake3::Hash) {
    let path = fixture.source("model", content);
    let store = fixture.open();
    let FileDigest { digest, size } = store.digest_file(&path, &|_| {}).unwrap();
    let source = Source { digest, size };
    let mut view = artifact_of("region of a file", Vec::new());
    view.sources.push(source);
    let published = store.publish(&preimage("load", "model"), &view, Duration::ZERO).unwrap();
    (path, source, published.artifact)
}

#[test]
fn view_is_found_while_its_source_is_in_place() {
    let fixture = Fixture::new();
    let (path, source, artifact) = publish_view(&fixture, b"weights");
    let store = fixture.open();
    assert!(store.lookup(&preimage("load", "model").key()).is_ok());
    store.verify_artifact(&artifact).unwrap();
    let file = store.open_source(&source.digest, source.size).unwrap();
    assert_eq!(file.path, fs_err::canonicalize(&path).unwrap());
    file.check_unchanged().unwrap();
}

#[test]
fn view_whose_source_is_gone_is_a_miss() {
    let fixture = Fixture::new();
    let (path, source, artifact) = publish_view(&fixture, b"weights");
    let key = preimage("load", "model").key();
    let same_run = fixture.open();
    assert!(same_run.lookup(&key).is_ok());
    fs_err::remove_file(&path).unwrap();
    for store in [same_run, fixture.open()] {
        match store.lookup(&key).unwrap_err() {
            Miss::Incomplete(damage) => assert_eq!(damage.part, Part::Source { digest: source.digest }),
            other => panic!("expected a missing source, got {other:?}"),
        }
        assert_eq!(store.verify_artifact(&artifact).unwrap_err().len(), 1);
        assert_eq!(store.lookup_without_sources(&key).unwrap().artifact_digest, artifact);
        assert_eq!(store.last_digest(&path).map(|last| last.digest), Some(source.digest));
        assert_eq!(store.gone(&source.digest), std::slice::from_ref(&path));
        let error = store.open_source(&source.digest, source.size).unwrap_err();
        assert!(matches!(error, Error::SourceGone { .. }) && error.to_string().contains("model"), "{error}");
    }
    assert_eq!(fixture.take_events(), []);
}

#[test]
fn view_whose_source_changed_is_a_miss() {
    let fixture = Fixture::new();
    let (path, source, _) = publish_view(&fixture, b"weights");
    std::thread::sleep(Duration::from_millis(20));
    overwrite(&path, b"WEIGHTS");
    let store = fixture.open();
    assert!(store.lookup(&preimage("load", "model").key()).is_err());
    assert!(store.gone(&source.digest).is_empty(), "there is a file that can be read again");
    assert!(matches!(store.open_source(&source.digest, source.size), Err(Error::SourceGone { .. })));
}

#[test]
fn source_that_moved_is_found_once_it_was_digested_again() {
    let fixture = Fixture::new();
    let (path, source, _) = publish_view(&fixture, b"weights");
    let moved = fixture.folder.path().join("moved");
    fs_err::rename(&path, &moved).unwrap();
    let store = fixture.open();
    let key = preimage("load", "model").key();
    assert!(store.lookup(&key).is_err());
    store.digest_file(&moved, &|_| {}).unwrap();
    assert!(store.lookup(&key).is_ok());
    assert!(store.open_source(&source.digest, source.size).unwrap().path.ends_with("moved"));
}

#[test]
fn touched_source_is_hashed_again_when_opened() {
    let fixture = Fixture::new();
    let (path, source, _) = publish_view(&fixture, b"weights");
    set_mtime(&path, SystemTime::now() - Duration::from_secs(1000));
    let store = fixture.open();
    store.open_source(&source.digest, source.size).unwrap().check_unchanged().unwrap();
    assert!(store.lookup(&preimage("load", "model").key()).is_ok());
}

#[test]
fn source_that_changes_during_a_pass_is_noticed() {
    let fixture = Fixture::new();
    let (path, source, _) = publish_view(&fixture, b"weights");
    let file = fixture.open().open_source(&source.digest, source.size).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    overwrite(&path, b"WEIGHTS");
    let error = file.check_unchanged().unwrap_err();
    assert!(error.to_string().contains("model"), "{error}");
}
