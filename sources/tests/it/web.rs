//! `https://`, over the unencrypted form that is allowed on this machine.

use crate::lab::Lab;
use crate::server::{Answer, Server, bytes, content, sha256};
use merganser_sources::{Error, Reach};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// A content and its entity tag.
type State = Arc<Mutex<(Vec<u8>, &'static str)>>;

/// A server with one file, whose content and entity tag can be changed.
fn server_with(body: Vec<u8>) -> (Server, State) {
    let state = Arc::new(Mutex::new((body, "\"one\"")));
    let known = Arc::clone(&state);
    let server = Server::start(move |request| {
        let (body, etag) = known.lock().unwrap().clone();
        if request.path.starts_with("/files/model.safetensors") {
            content(request, &body, etag)
        } else {
            Answer::status(404)
        }
    });
    (server, state)
}

#[test]
fn a_file_is_kept_and_not_downloaded_again() {
    let body = bytes(5000, 1);
    let (server, state) = server_with(body.clone());
    let mut lab = Lab::new();
    let address = server.url("/files/model.safetensors");
    let located = lab.get(&address).unwrap();
    assert_eq!(fs_err::read(&located.path).unwrap(), body);
    assert_eq!((located.revision.clone(), located.files.len()), (None, 1));

    assert_eq!(lab.read(&address), body);
    assert_eq!((server.count("GET"), server.count("HEAD")), (1, 1), "unpinned, the version is asked for");
    *state.lock().unwrap() = (bytes(6000, 2), "\"two\"");
    assert_eq!(lab.read(&address), bytes(6000, 2));

    lab.pin(&located);
    server.forget();
    assert_eq!(lab.read(&address), bytes(6000, 2));
    assert_eq!(lab.sources().get(&address, &lab.pins, Reach::Local).unwrap().path, located.path);
    assert_eq!(server.asked().len(), 0);
    lab.offline = true;
    assert_eq!(lab.read(&address), bytes(6000, 2));
    assert!(matches!(lab.fails(&server.url("/files/other")), Error::NotCached { offline: true, .. }));
}

#[test]
fn a_broken_download_goes_on_if_it_is_still_the_same_file() {
    let body = bytes(900_000, 3);
    let (server, _) = server_with(body.clone());
    let lab = Lab::new();
    server.cut_next(400_000);
    assert_eq!(lab.read(&server.url("/files/model.safetensors")), body);
    let asked = server.asked();
    assert_eq!(
        (asked[1].header("range"), asked[1].header("if-range")),
        (Some("bytes=400000-"), Some("\"one\""))
    );
}

#[test]
fn a_file_that_changed_meanwhile_is_read_from_the_start() {
    let (old, new) = (bytes(900_000, 4), bytes(800_000, 5));
    let changed = AtomicUsize::new(0);
    let (before, after) = (old.clone(), new.clone());
    let server = Server::start(move |request| match changed.fetch_add(1, Ordering::Relaxed) {
        0 => Answer { cut: Some(500_000), ..content(request, &before, "\"one\"") },
        _ => content(request, &after, "\"two\""),
    });
    let lab = Lab::new();
    assert_eq!(lab.read(&server.url("/x.bin")), new);
    assert_eq!(server.asked()[1].header("if-range"), Some("\"one\""));
}

#[test]
fn an_interrupted_process_leaves_something_to_go_on_from() {
    let body = bytes(4 << 20, 6);
    let (server, state) = server_with(body.clone());
    let lab = Lab::new();
    let address = server.url("/files/model.safetensors");
    lab.stop_after.store(2, Ordering::Relaxed);
    assert!(matches!(lab.fails(&address), Error::Cancelled));
    lab.cancelled.store(false, Ordering::Relaxed);
    server.forget();
    assert_eq!(lab.read(&address), body);
    assert!(server.asked()[0].header("range").is_some());

    // And not when it is another file by now.
    *state.lock().unwrap() = (bytes(4 << 20, 7), "\"two\"");
    lab.stop_after.store(2, Ordering::Relaxed);
    assert!(matches!(lab.fails(&address), Error::Cancelled));
    lab.cancelled.store(false, Ordering::Relaxed);
    *state.lock().unwrap() = (bytes(4 << 20, 8), "\"three\"");
    assert_eq!(lab.read(&address), bytes(4 << 20, 8));
}

#[test]
fn a_server_without_ranges_or_tags_is_read_from_the_start_a_few_times() {
    let body = bytes(500_000, 9);
    let n_cut = Arc::new(AtomicUsize::new(2));
    let (left, whole) = (Arc::clone(&n_cut), body.clone());
    let server = Server::start(move |_| {
        let is_cut =
            left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
        Answer { cut: is_cut.then_some(300_000), ..Answer::ok(whole.clone()) }
    });
    let lab = Lab::new();
    assert_eq!(lab.read(&server.url("/x.bin")), body);
    assert!(server.asked().iter().all(|request| request.header("range").is_none()));
    n_cut.store(1000, Ordering::Relaxed);
    let error = lab.fails(&server.url("/y.bin"));
    assert!(matches!(error, Error::Interrupted { .. }), "always broken at the same place: {error}");
}

#[test]
fn a_digest_in_the_address_is_verified() {
    let body = bytes(5000, 10);
    let (server, _) = server_with(body.clone());
    let lab = Lab::new();
    let address = server.url("/files/model.safetensors");
    let wrong = format!("{address}#sha256={}", sha256(b"something else"));
    assert!(matches!(lab.fails(&wrong), Error::WrongDigest { algorithm: "SHA-256", .. }));
    assert!(lab.files("downloads").iter().all(|name| name.contains(".lock")), "{:?}", lab.files("downloads"));
    assert_eq!(lab.read(&format!("{address}#sha256={}", sha256(&body))), body);
}

#[test]
fn shards_come_with_their_index_and_queries_are_kept_apart() {
    let index = br#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
    let server = Server::start(move |request| match request.path.as_str() {
        "/m/model.safetensors.index.json" => content(request, index, "\"i\""),
        "/m/one.safetensors" => content(request, b"one", "\"1\""),
        "/m/two.safetensors" => content(request, b"two", "\"2\""),
        "/m/x?v=1" => content(request, b"first", "\"1\""),
        "/m/x?v=2" => content(request, b"second", "\"2\""),
        _ => Answer::status(404),
    });
    let lab = Lab::new();
    for address in ["/m/model.safetensors.index.json", "/m/"] {
        let located = lab.get(&server.url(address)).unwrap();
        assert_eq!(located.files.len(), 3, "{address}");
        assert_eq!(fs_err::read(located.path.with_file_name("two.safetensors")).unwrap(), b"two");
    }
    assert_eq!(lab.read(&server.url("/m/x?v=1")), b"first");
    assert_eq!(lab.read(&server.url("/m/x?v=2")), b"second");
    assert_eq!(lab.read(&server.url("/m/x?v=1")), b"first");
}

#[test]
fn refusals_name_the_address() {
    let server = Server::start(|request| match request.path.as_str() {
        "/private" => Answer::status(403),
        "/gone" => Answer::status(410),
        "/teapot" => Answer::status(418),
        _ => Answer::status(404),
    });
    let lab = Lab::new();
    for (path, expected) in [
        ("/private", "access refused by"),
        ("/gone", "there is no such file: `gone`"),
        ("/missing", "there is no such file: `missing`"),
        ("/teapot", "answered with status 418"),
    ] {
        let error = lab.fails(&server.url(path)).to_string();
        assert!(error.contains(expected) && error.contains(&server.url(path)), "{path}: {error}");
    }
    assert!(lab.files("downloads").iter().all(|name| name.contains(".lock")));
}

#[test]
fn schemes_that_are_not_known_are_named_with_those_that_are() {
    let error = Lab::new().fails("ftp://host/x").to_string();
    assert_eq!(
        error,
        "`ftp://host/x` is no address: `ftp` is not among `hf`, `https`, `http`, `s3`, `s3a`, `gs`, `az`, `abfs`, `abfss`"
    );
}
