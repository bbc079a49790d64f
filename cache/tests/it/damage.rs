//! Damaged stores: every kind of damage is noticed, moved away, reported, and repaired by running again.

use merganser_cache::{Error, Miss, Part};

use crate::support::{Fixture, flip_byte, overwrite, preimage, publish_blob};

#[test]
fn flipped_byte_in_a_blob_is_found_on_read() {
    let fixture = Fixture::new();
    let preimage = preimage("merge", "a");
    let content = vec![5_u8; 3 << 20];
    let (artifact, digest) = publish_blob(&fixture.open(), &preimage, &content);
    let blob = &artifact.blobs[0];
    let path = fixture.object(&blob.digest);
    flip_byte(&path, 2 << 20);

    let store = fixture.open();
    // A lookup reads no blobs, so it is still a hit; using it is what must fail.
    assert!(store.lookup(&preimage.key()).is_ok());
    let damages = store.verify_artifact(&digest).unwrap_err();
    let part = Part::Blob { name: "data".into(), digest: blob.digest };
    assert_eq!((damages.len(), damages[0].artifact, &damages[0].part), (1, digest, &part));
    assert_eq!(fixture.take_quarantined(), std::slice::from_ref(&path));
    assert!(!path.exists());
    assert!(matches!(store.lookup(&preimage.key()), Err(Miss::Incomplete(_))));
    assert!(matches!(store.open_blob(&blob.digest, blob.size), Err(Error::Missing { .. })));

    publish_blob(&store, &preimage, &content);
    store.verify_artifact(&digest).unwrap();
    assert_eq!(fs_err::read(&path).unwrap(), content);
}

#[test]
fn open_blob_reports_the_flipped_byte_itself() {
    let fixture = Fixture::new();
    let (artifact, _) = publish_blob(&fixture.open(), &preimage("merge", "a"), b"content");
    let blob = &artifact.blobs[0];
    flip_byte(&fixture.object(&blob.digest), 0);
    let error = fixture.open().open_blob(&blob.digest, blob.size).unwrap_err();
    assert!(matches!(error, Error::Corrupt { digest, .. } if digest == blob.digest), "{error}");
    assert_eq!(fixture.take_quarantined().len(), 1);
}

#[test]
fn damage_after_the_first_use_is_found_too() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let (artifact, digest) = publish_blob(&store, &preimage("merge", "a"), b"content");
    store.verify_artifact(&digest).unwrap();
    // Longer than a tick of the file system's clock, so that the change time tells.
    std::thread::sleep(std::time::Duration::from_millis(20));
    flip_byte(&fixture.object(&artifact.blobs[0].digest), 0);
    assert!(store.verify_artifact(&digest).is_err());
}

#[test]
fn truncated_or_grown_blob_is_a_miss() {
    let fixture = Fixture::new();
    let preimage = preimage("merge", "a");
    for bad in [&b""[..], b"conten", b"content and more"] {
        let (artifact, _) = publish_blob(&fixture.open(), &preimage, b"content");
        let path = fixture.object(&artifact.blobs[0].digest);
        overwrite(&path, bad);
        assert!(matches!(fixture.open().lookup(&preimage.key()), Err(Miss::Incomplete(_))));
        assert_eq!(fixture.take_quarantined(), [path]);
    }
}

#[test]
fn writer_replaces_an_object_of_the_wrong_size() {
    let fixture = Fixture::new();
    let preimage = preimage("merge", "a");
    let (artifact, _) = publish_blob(&fixture.open(), &preimage, b"content");
    let path = fixture.object(&artifact.blobs[0].digest);
    overwrite(&path, b"");
    publish_blob(&fixture.open(), &preimage, b"content");
    assert_eq!(fixture.take_quarantined(), [path]);
    assert!(fixture.open().lookup(&preimage.key()).is_ok());
}

#[test]
fn damaged_description_is_a_miss() {
    let fixture = Fixture::new();
    let preimage = preimage("merge", "a");
    for damage in [|path: &_| overwrite(path, b""), |path: &_| flip_byte(path, 20)] {
        let (_, digest) = publish_blob(&fixture.open(), &preimage, b"content");
        let path = fixture.object(&digest);
        damage(&path);
        let store = fixture.open();
        assert!(matches!(store.lookup(&preimage.key()), Err(Miss::Incomplete(_))));
        assert_eq!(fixture.take_quarantined(), std::slice::from_ref(&path));
        let damages = store.verify_artifact(&digest).unwrap_err();
        assert_eq!(damages[0].part, Part::Description);
    }
    // A publisher that finds a damaged description replaces it.
    let (_, digest) = publish_blob(&fixture.open(), &preimage, b"content");
    flip_byte(&fixture.object(&digest), 20);
    publish_blob(&fixture.open(), &preimage, b"content");
    assert_eq!(fixture.take_quarantined().len(), 1);
    assert!(fixture.open().lookup(&preimage.key()).is_ok());
}

#[test]
fn record_cut_anywhere_is_a_miss() {
    let fixture = Fixture::new();
    let preimage = preimage("merge", "a");
    publish_blob(&fixture.open(), &preimage, b"content");
    let path = fixture.record(&preimage);
    let whole = fs_err::read(&path).unwrap();
    for n_bytes in (0..whole.len()).step_by(7).chain([whole.len() - 1]) {
        fs_err::write(&path, &whole[..n_bytes]).unwrap();
        let miss = fixture.open().lookup(&preimage.key()).unwrap_err();
        assert!(matches!(miss, Miss::Unreadable { .. }), "{n_bytes} bytes: {miss:?}");
        assert_eq!(fixture.take_quarantined(), std::slice::from_ref(&path));
        assert_eq!(fixture.open().lookup(&preimage.key()).unwrap_err(), Miss::Unknown);
    }
}

#[test]
fn record_of_another_key_is_a_miss() {
    let fixture = Fixture::new();
    let (one, two) = (preimage("merge", "a"), preimage("merge", "b"));
    publish_blob(&fixture.open(), &one, b"content");
    publish_blob(&fixture.open(), &two, b"other");
    fs_err::copy(fixture.record(&one), fixture.record(&two)).unwrap();
    assert!(matches!(fixture.open().lookup(&two.key()), Err(Miss::Unreadable { .. })));
    assert_eq!(fixture.take_quarantined(), [fixture.record(&two)]);
}

#[test]
fn folders_in_place_of_files_do_not_break_anything() {
    let fixture = Fixture::new();
    let preimage = preimage("merge", "a");
    let (artifact, _) = publish_blob(&fixture.open(), &preimage, b"content");
    let blob = fixture.object(&artifact.blobs[0].digest);
    for path in [blob, fixture.record(&preimage)] {
        fs_err::remove_file(&path).unwrap();
        fs_err::create_dir(&path).unwrap();
        assert!(fixture.open().lookup(&preimage.key()).is_err());
        if path.exists() {
            fs_err::remove_dir(&path).unwrap();
        }
        publish_blob(&fixture.open(), &preimage, b"content");
        assert!(fixture.open().lookup(&preimage.key()).is_ok());
    }
}
