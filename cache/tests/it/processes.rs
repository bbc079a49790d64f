//! Several processes on one store, some of them killed.
//!
//! The other processes are this test program itself, told by a variable to play a part in `child`.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use merganser_cache::{CacheEvent, Error, Waiting};

use crate::support::{Fixture, preimage, publish_blob};

const PART: &str = "MERGANSER_CACHE_TEST_PART";
const ROOT: &str = "MERGANSER_CACHE_TEST_ROOT";

/// Starts a process that plays `part` on the fixture's store and waits until it says that it is ready.
fn start(fixture: &Fixture, part: &str) -> (Child, BufReader<ChildStdout>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "processes::child", "--nocapture"])
        .env(PART, part)
        .env(ROOT, fixture.folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("ready") {
        line.clear();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "the process ended early");
    }
    (child, output)
}

/// Plays the other process; does nothing when run as a test of its own.
#[test]
fn child() {
    let (Some(part), Some(root)) = (std::env::var_os(PART), std::env::var_os(ROOT)) else { return };
    let fixture = Fixture::in_folder(root.as_ref());
    let store = fixture.open();
    let ready = || {
        let mut out = std::io::stdout().lock();
        out.write_all(b"ready\n").unwrap();
        out.flush().unwrap();
    };
    match part.to_str() {
        Some("write and hang") => {
            let mut writer = store.staging().unwrap().writer("b").unwrap();
            writer.write_all(&vec![1; 3 << 20]).unwrap();
            ready();
            std::thread::sleep(Duration::from_mins(1));
        }
        Some("lock and hang") => {
            let _lock = store.lock_key(&preimage("merge", "a").key(), &mut |_| {}, &|| false).unwrap();
            ready();
            std::thread::sleep(Duration::from_mins(1));
        }
        Some("publish") => {
            ready();
            for idx in 0..50 {
                publish_blob(&store, &preimage("merge", "a"), b"same");
                publish_blob(&store, &preimage("merge", "b"), &[idx, 0]);
            }
        }
        other => panic!("unknown part {other:?}"),
    }
}

#[test]
fn staging_of_a_killed_writer_is_removed() {
    let fixture = Fixture::new();
    let (mut child, _output) = start(&fixture, "write and hang");
    let staging = fixture.root().join("staging-v1");
    let count = || fs_err::read_dir(&staging).unwrap().count();
    assert_eq!(count(), 2);
    fixture.open().remove_leftovers().unwrap();
    assert_eq!(count(), 2, "the writer is alive");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(count(), 2, "nobody could clean up");
    publish_blob(&fixture.open(), &preimage("merge", "a"), b"x");
    assert_eq!(fixture.take_events(), [CacheEvent::LeftoversRemoved { n_folders: 1 }]);
    assert_eq!(count(), 0);
}

#[test]
fn lock_of_a_killed_holder_is_free() {
    let fixture = Fixture::new();
    let (mut child, _output) = start(&fixture, "lock and hang");
    let store = fixture.open();
    let key = preimage("merge", "a").key();
    let mut waits: Vec<Waiting> = Vec::new();
    let n_asked = AtomicUsize::new(0);
    let give_up = || n_asked.fetch_add(1, Ordering::Relaxed) == 3;
    let error = store.lock_key(&key, &mut |waiting| waits.push(waiting), &give_up).unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }));
    assert_eq!(waits.len(), 1);
    assert_eq!(waits[0].holder, Some(format!("process {} on host", child.id())));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!store.lock_key(&key, &mut |_| panic!("nobody holds it"), &|| false).unwrap().waited());
}

#[test]
fn processes_publish_the_same_keys() {
    let fixture = Fixture::new();
    let mut children: Vec<_> = (0..3).map(|_| start(&fixture, "publish")).collect();
    let store = fixture.open();
    for _ in 0..20 {
        if let Ok(hit) = store.lookup(&preimage("merge", "a").key()) {
            store.verify_artifact(&hit.artifact_digest).unwrap();
        }
    }
    for (child, output) in &mut children {
        std::io::copy(output, &mut std::io::sink()).unwrap();
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(store.record(&preimage("merge", "a").key()).unwrap().outputs.len(), 1);
    assert_eq!(store.record(&preimage("merge", "b").key()).unwrap().outputs.len(), 50);
    assert_eq!(fixture.take_events(), []);
}

#[test]
fn one_thread_at_a_time_computes_a_key() {
    let fixture = Fixture::new();
    let preimage = preimage("merge", "a");
    let n_computed = AtomicUsize::new(0);
    let n_waited = AtomicUsize::new(0);
    let busy = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let store = fixture.open();
                let lock = store.lock_key(&preimage.key(), &mut |_| {}, &|| false).unwrap();
                n_waited.fetch_add(usize::from(lock.waited()), Ordering::SeqCst);
                assert!(!busy.swap(true, Ordering::SeqCst));
                if store.lookup(&preimage.key()).is_err() {
                    n_computed.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(30));
                    publish_blob(&store, &preimage, b"x");
                }
                busy.store(false, Ordering::SeqCst);
            });
        }
    });
    assert_eq!((n_computed.into_inner(), n_waited.into_inner()), (1, 3));
}
