//! Publishing, looking up, listing.

use std::sync::Barrier;
use std::time::{Duration, SystemTime};

use merganser_cache::{Artifact, Blob, CacheEvent, Error, Miss, Source, StageKey};

use crate::support::{Fixture, artifact_of, preimage, publish_blob, put_blob, set_mtime};

#[test]
fn published_artifact_is_found_again() {
    let fixture = Fixture::new();
    let preimage = preimage("merge", "a");
    let store = fixture.open();
    assert_eq!(store.lookup(&preimage.key()).unwrap_err(), Miss::Unknown);
    assert!(!store.family_seen(&preimage.family()));
    let (artifact, digest) = publish_blob(&store, &preimage, b"content");
    for store in [store, fixture.open()] {
        let hit = store.lookup(&preimage.key()).unwrap();
        assert_eq!((hit.artifact_digest, &*hit.artifact), (digest, &artifact));
        assert_eq!(hit.record.preimage, preimage);
        let output = hit.output();
        assert_eq!((output.seconds, &*output.host, &*output.tool_version), (1.5, "host", "1.2.3"));
        let blob = store.open_blob(&artifact.blobs[0].digest, 7).unwrap();
        assert_eq!(fs_err::read(blob.path).unwrap(), b"content");
        store.verify_artifact(&digest).unwrap();
    }
    assert_eq!(fixture.take_events(), []);
}

#[test]
fn family_is_seen_on_other_inputs() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let (old, new) = (preimage("merge", "old"), preimage("merge", "new"));
    publish_blob(&store, &old, b"x");
    assert!(store.family_seen(&new.family()));
    assert_eq!(store.family_newest(&new.family()), Some(old.key()));
    assert!(!store.family_seen(&preimage("mask", "old").family()));
    assert_eq!(store.record(&old.key()).unwrap().preimage, old);
}

#[test]
fn equal_content_is_stored_once() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let one = publish_blob(&store, &preimage("merge", "a"), b"same");
    let two = publish_blob(&store, &preimage("merge", "b"), b"same");
    assert_eq!(one, two);
    // The blob and the description.
    assert_eq!(store.disk_usage().unwrap().objects.n_files, 2);
}

#[test]
fn incomplete_artifacts_are_refused() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let absent = Blob { name: "data".into(), digest: blake3::hash(b"absent"), size: 6 };
    let publish = |artifact: &Artifact| store.publish(&preimage("m", ""), artifact, Duration::ZERO);
    let error = publish(&artifact_of("", vec![absent])).unwrap_err();
    assert!(matches!(error, Error::Incomplete { .. }) && error.to_string().contains("`data`"), "{error}");
    let twice = put_blob(&store, "twice", b"x");
    assert!(publish(&artifact_of("", vec![twice.clone(), twice])).is_err());
    let mut view = artifact_of("view", Vec::new());
    view.operands.push(blake3::hash(b"absent"));
    assert!(publish(&view).is_err());
    assert_eq!(store.lookup(&preimage("m", "").key()).unwrap_err(), Miss::Unknown);
}

#[test]
fn distinct_outputs_of_one_key_are_kept_and_reported() {
    let fixture = Fixture::new();
    let preimage = preimage("merge", "a");
    let store = fixture.open();
    let (_, first) = publish_blob(&store, &preimage, b"first");
    let (_, again) = publish_blob(&store, &preimage, b"first");
    assert_eq!(first, again);
    assert_eq!(fixture.take_events(), []);
    let (_, second) = publish_blob(&store, &preimage, b"second");
    let outputs = vec![second, first];
    let event = CacheEvent::NonDeterministic { key: preimage.key(), outputs: outputs.clone() };
    assert_eq!(fixture.take_events(), [event]);
    let hit = fixture.open().lookup(&preimage.key()).unwrap();
    assert_eq!(hit.artifact_digest, second);
    assert_eq!(hit.record.outputs.iter().map(|output| output.artifact).collect::<Vec<_>>(), outputs);
    // The one that came first comes again: it is the newest now, and still the same two.
    publish_blob(&store, &preimage, b"first");
    assert_eq!(store.record(&preimage.key()).unwrap().outputs.len(), 2);
    assert_eq!(store.lookup(&preimage.key()).unwrap().artifact_digest, first);
}

#[test]
fn older_output_serves_when_the_newest_is_gone() {
    let fixture = Fixture::new();
    let preimage = preimage("merge", "a");
    let store = fixture.open();
    let (_, first) = publish_blob(&store, &preimage, b"first");
    let (newest, _) = publish_blob(&store, &preimage, b"second");
    fs_err::remove_file(fixture.object(&newest.blobs[0].digest)).unwrap();
    let hit = fixture.open().lookup(&preimage.key()).unwrap();
    assert_eq!((hit.artifact_digest, hit.output_idx), (first, 1));
}

#[test]
fn concurrent_publishers_of_one_key_lose_nothing() {
    let fixture = Fixture::new();
    let preimage = preimage("merge", "a");
    let n_threads = 8;
    let barrier = Barrier::new(n_threads);
    std::thread::scope(|scope| {
        for idx in 0..n_threads {
            let (fixture, preimage, barrier) = (&fixture, &preimage, &barrier);
            scope.spawn(move || {
                let store = fixture.open();
                barrier.wait();
                for _ in 0..5 {
                    // Half of the threads agree; the others each have an output of their own.
                    publish_blob(&store, preimage, format!("{}", idx.max(n_threads / 2)).as_bytes());
                    store.lookup(&preimage.key()).unwrap();
                }
            });
        }
    });
    let outputs = fixture.open().record(&preimage.key()).unwrap().outputs;
    assert_eq!(outputs.len(), n_threads / 2);
    let leftovers = fs_err::read_dir(fixture.root().join("staging-v1")).unwrap().count();
    assert_eq!(leftovers, 0);
}

#[test]
fn views_are_complete_only_with_their_operands() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let (base, base_digest) = publish_blob(&store, &preimage("load", "base"), b"base");
    let (_, tuned_digest) = publish_blob(&store, &preimage("load", "tuned"), b"tuned");
    let mut delta = artifact_of("difference", Vec::new());
    delta.operands = vec![base_digest, tuned_digest];
    let delta_digest = store.publish(&preimage("diff", ""), &delta, Duration::ZERO).unwrap().artifact;
    let mut scaled = artifact_of("scaled", Vec::new());
    scaled.operands = vec![delta_digest, delta_digest];
    store.publish(&preimage("combine", ""), &scaled, Duration::ZERO).unwrap();
    let key = preimage("combine", "").key();
    assert!(fixture.open().lookup(&key).is_ok());

    fs_err::remove_file(fixture.object(&base.blobs[0].digest)).unwrap();
    match fixture.open().lookup(&key).unwrap_err() {
        Miss::Incomplete(damage) => assert_eq!(damage.artifact, base_digest),
        other => panic!("expected a missing blob, got {other:?}"),
    }
    let damages = fixture.open().verify_artifact(&delta_digest).unwrap_err();
    assert_eq!(damages.len(), 1);
    assert!(damages[0].to_string().contains("blob `data`"), "{}", damages[0]);
}

#[test]
fn listing_tells_sizes_and_use() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let (artifact, _) = publish_blob(&store, &preimage("a", ""), &[7; 1000]);
    publish_blob(&store, &preimage("b", ""), &[7; 1000]);
    let listed = store.list().unwrap();
    let keys: Vec<StageKey> = listed.iter().map(|entry| entry.key).collect();
    let mut expected = vec![preimage("a", "").key(), preimage("b", "").key()];
    expected.sort();
    assert_eq!(keys, expected);
    let description_bytes = artifact.to_bytes().len() as u64;
    assert!(listed.iter().all(|entry| entry.complete && entry.size_bytes == 1000 + description_bytes));
    assert!(listed.iter().all(|entry| entry.record.outputs[0].seconds == 1.5));
    let usage = store.disk_usage().unwrap();
    assert_eq!((usage.objects.size_bytes, usage.objects.n_files), (1000 + description_bytes, 2));
    assert_eq!(usage.records.n_files, 4);
    assert_eq!(usage.quarantine.n_files, 0);
    assert!(usage.total_bytes() > usage.objects.size_bytes);
    assert_eq!(fixture.open().list().unwrap(), listed);
}

#[test]
fn looking_up_marks_a_record_as_used_once_an_hour() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let preimage = preimage("a", "");
    publish_blob(&store, &preimage, b"x");
    let record = fixture.record(&preimage);
    let now = SystemTime::now();
    for (age, is_marked) in [(Duration::from_mins(1), false), (Duration::from_hours(2), true)] {
        set_mtime(&record, now - age);
        store.lookup(&preimage.key()).unwrap();
        let used = fs_err::metadata(&record).unwrap().modified().unwrap();
        assert_eq!(used > now - age, is_marked, "{age:?}");
    }
}

#[test]
fn artifacts_with_sources_need_not_have_them_to_be_published() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let mut view = artifact_of("region of a file", Vec::new());
    view.sources.push(Source { digest: blake3::hash(b"elsewhere"), size: 9 });
    let digest = store.store_artifact(&view).unwrap();
    assert_eq!(*store.load_artifact(&digest).unwrap(), view);
    assert!(store.verify_artifact(&digest).is_err());
}
