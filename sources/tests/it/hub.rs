//! `hf://`: the protocol, the cache, and everything that can go wrong between the two.

use crate::lab::Lab;
use crate::server::{Answer, Hub, Repo, Server, bytes, git_id, sha256};
use merganser_sources::{Error, Event, Reach};
use std::sync::atomic::Ordering;
use std::time::Duration;

const WEIGHTS: &str = "hf://org/clip/model.safetensors";

fn hub_with(content: &[u8]) -> Hub {
    Hub::start(&[("org/clip", Repo::of(&[("model.safetensors", content), ("config.json", b"{}")]))])
}

#[test]
fn a_file_lies_in_the_cache_as_other_tools_lay_it() {
    let weights = bytes(300_000, 1);
    let hub = hub_with(&weights);
    let lab = Lab::of(&hub);
    assert_eq!(lab.read(WEIGHTS), weights);
    assert_eq!(lab.read("hf://org/clip/config.json"), b"{}");
    let commit = hub.edit("org/clip", |repo| repo.branches["main"].clone());
    let (large, small) = (sha256(&weights), git_id(b"{}"));
    assert_eq!(
        lab.files("hub"),
        [
            format!(".locks/models--org--clip/{small}.lock"),
            format!(".locks/models--org--clip/{large}.lock"),
            format!("models--org--clip/blobs/{small}"),
            format!("models--org--clip/blobs/{large}"),
            "models--org--clip/refs/main".to_owned(),
            format!("models--org--clip/snapshots/{commit}/config.json"),
            format!("models--org--clip/snapshots/{commit}/model.safetensors"),
        ]
    );
    let reference = fs_err::read_to_string(lab.path("hub/models--org--clip/refs/main")).unwrap();
    assert_eq!(reference, commit, "no line break, as others write it");
    #[cfg(unix)]
    {
        let link = lab.path(&format!("hub/models--org--clip/snapshots/{commit}/model.safetensors"));
        let target = fs_err::read_link(link).unwrap();
        assert_eq!(target.to_str().unwrap(), format!("../../blobs/{large}"));
    }
}

#[test]
fn what_another_tool_has_downloaded_is_not_downloaded_again() {
    let weights = bytes(5000, 2);
    let hub = hub_with(&weights);
    let lab = Lab::of(&hub);
    let blob = lab.path(&format!("hub/models--org--clip/blobs/{}", sha256(&weights)));
    fs_err::create_dir_all(blob.parent().unwrap()).unwrap();
    fs_err::write(&blob, &weights).unwrap();
    assert_eq!(lab.read(WEIGHTS), weights);
    assert_eq!(hub.storage.asked().len(), 0);
}

#[test]
fn the_token_goes_to_the_hub_and_nowhere_else() {
    let weights = bytes(5000, 3);
    let hub = hub_with(&weights);
    hub.edit("org/clip", |repo| repo.token = Some("hf_secret".to_owned()));
    let lab = Lab { token: Some("hf_secret".to_owned()), ..Lab::of(&hub) };
    assert_eq!(lab.read(WEIGHTS), weights);
    assert!(
        hub.hub.asked().iter().all(|request| request.header("authorization") == Some("Bearer hf_secret"))
    );
    assert!(!hub.storage.asked().is_empty());
    assert!(hub.storage.asked().iter().all(|request| request.header("authorization").is_none()));
}

#[test]
fn a_broken_download_goes_on_where_it_broke_off() {
    let weights = bytes(900_000, 4);
    let hub = hub_with(&weights);
    let lab = Lab::of(&hub);
    hub.storage.cut_next(300_000);
    hub.storage.cut_next(250_000);
    assert_eq!(lab.read(WEIGHTS), weights);
    let ranges: Vec<_> =
        hub.storage.asked().iter().map(|request| request.header("range").map(str::to_owned)).collect();
    assert_eq!(ranges, [None, Some("bytes=300000-".to_owned()), Some("bytes=550000-".to_owned())]);
    assert_eq!(lab.retries(), 2);
}

#[test]
fn a_later_process_goes_on_with_what_an_earlier_one_received() {
    let weights = bytes(4 << 20, 5);
    let hub = hub_with(&weights);
    let lab = Lab::of(&hub);
    lab.stop_after.store(2, Ordering::Relaxed);
    assert!(matches!(lab.fails(WEIGHTS), Error::Cancelled));
    let partial = lab.path(&format!("hub/models--org--clip/blobs/{}.incomplete", sha256(&weights)));
    let received = fs_err::metadata(&partial).unwrap().len();
    assert!((1..weights.len() as u64).contains(&received), "{received}");
    lab.cancelled.store(false, Ordering::Relaxed);
    hub.storage.forget();
    assert_eq!(lab.read(WEIGHTS), weights);
    let asked = hub.storage.asked();
    assert_eq!(asked[0].header("range").unwrap(), format!("bytes={received}-"));
    assert!(!partial.exists());
}

#[test]
fn a_line_that_brings_nothing_is_given_up() {
    let weights = bytes(5000, 6);
    let hub = hub_with(&weights);
    let lab = Lab::of(&hub);
    for _ in 0..20 {
        hub.storage.cut_next(0);
    }
    let error = lab.fails(WEIGHTS);
    assert!(matches!(error, Error::Interrupted { attempts: 4, done: 0, .. }), "{error}");
    assert!(error.help().unwrap().contains("goes on from there"));
}

#[test]
fn a_wrong_digest_is_refused_and_nothing_of_it_stays() {
    let weights = bytes(5000, 7);
    let other = bytes(5000, 8);
    let hub = hub_with(&weights);
    let lab = Lab::of(&hub);
    hub.storage.next(Answer::ok(other.clone()));
    let error = lab.fails(WEIGHTS);
    assert_eq!(
        error.to_string(),
        format!(
            "`{WEIGHTS}`: the content is not what the server announced: SHA-256 is {}, expected {}",
            sha256(&other),
            sha256(&weights)
        )
    );
    assert!(!lab.files("hub").iter().any(|name| name.contains("blobs/") || name.contains("snapshots/")));
    assert_eq!(lab.read(WEIGHTS), weights, "and the next attempt is a new one");
}

#[test]
fn a_small_file_is_verified_by_its_id() {
    let hub = hub_with(b"");
    let lab = Lab::of(&hub);
    let id = git_id(b"{}");
    let commit = hub.edit("org/clip", |repo| repo.branches["main"].clone());
    hub.hub.next(
        Answer::ok("")
            .with("X-Repo-Commit", commit)
            .with("ETag", format!("\"{id}\""))
            .with("Content-Length", 2),
    );
    hub.hub.next(Answer::ok("[]"));
    let error = lab.fails("hf://org/clip/config.json");
    assert!(matches!(&error, Error::WrongDigest { expected, .. } if *expected == id), "{error}");
}

#[test]
fn a_damaged_leftover_costs_time_and_nothing_else() {
    let weights = bytes(5000, 9);
    let hub = hub_with(&weights);
    let lab = Lab::of(&hub);
    let partial = lab.path(&format!("hub/models--org--clip/blobs/{}.incomplete", sha256(&weights)));
    fs_err::create_dir_all(partial.parent().unwrap()).unwrap();
    for leftover in [bytes(2000, 10), bytes(5000, 10), bytes(9000, 10)] {
        fs_err::write(&partial, leftover).unwrap();
        assert_eq!(lab.read(WEIGHTS), weights);
        fs_err::remove_dir_all(lab.path("hub")).unwrap();
        fs_err::create_dir_all(partial.parent().unwrap()).unwrap();
    }
}

#[test]
fn a_wrong_size_is_refused() {
    let weights = bytes(5000, 11);
    let hub = hub_with(&weights);
    let lab = Lab::of(&hub);
    hub.storage.next(Answer::ok(&weights[..4000]));
    let error = lab.fails(WEIGHTS);
    assert!(matches!(error, Error::WrongSize { expected: 5000, actual: 4000, .. }), "{error}");
}

#[test]
fn a_server_that_ignores_ranges_is_read_from_the_start() {
    let weights = bytes(600_000, 12);
    let hub = hub_with(&weights);
    let lab = Lab::of(&hub);
    hub.storage.next(Answer { cut: Some(100_000), ..Answer::ok(weights.clone()) });
    hub.storage.next(Answer::ok(weights.clone()));
    assert_eq!(lab.read(WEIGHTS), weights);
    assert_eq!(hub.storage.asked()[1].header("range"), Some("bytes=100000-"));
}

#[test]
fn a_busy_hub_is_asked_again_when_it_says() {
    let weights = bytes(5000, 13);
    let hub = hub_with(&weights);
    let lab = Lab::of(&hub);
    hub.hub.next(Answer::status(429).with("Retry-After", 7));
    hub.hub.next(Answer::status(503));
    hub.storage.next(Answer::status(500));
    assert_eq!(lab.read(WEIGHTS), weights);
    assert_eq!(*lab.waits.lock().unwrap(), [7, 2, 1].map(Duration::from_secs));
}

#[test]
fn patience_ends() {
    let hub = hub_with(b"x");
    let lab = Lab::of(&hub);
    for _ in 0..4 {
        hub.hub.next(Answer::status(429));
    }
    let error = lab.fails(WEIGHTS);
    assert!(matches!(error, Error::RateLimited { attempts: 4, .. }), "{error}");
    for _ in 0..4 {
        hub.hub.next(Answer::status(502));
    }
    assert!(matches!(lab.fails(WEIGHTS), Error::Status { status: 502, .. }));
    // Nobody listens there.
    let lab = Lab::new();
    let error = lab.fails(WEIGHTS);
    assert!(matches!(error, Error::Connection { attempts: 3, .. }), "{error}");
    assert!(error.to_string().contains("127.0.0.1:1/org/clip/resolve/main/model.safetensors"), "{error}");
}

#[test]
fn refusals_say_what_to_do() {
    let weights = bytes(5000, 14);
    let hub = hub_with(&weights);
    let mut lab = Lab::of(&hub);
    let page = format!("{}/org/clip", hub.endpoint());

    hub.edit("org/clip", |repo| repo.token = Some("right".to_owned()));
    let error = lab.fails(WEIGHTS);
    assert!(error.to_string().starts_with(&format!("`{WEIGHTS}`: access refused by")), "{error}");
    assert!(error.to_string().ends_with("(status 401)"), "{error}");
    let help = error.help().unwrap();
    assert!(help.contains("HF_TOKEN") && help.contains(&page), "{help}");

    lab.token = Some("wrong".to_owned());
    assert!(lab.fails(WEIGHTS).help().unwrap().contains("the token has no access"));

    hub.edit("org/clip", |repo| repo.gated = true);
    let help = lab.fails(WEIGHTS).help().unwrap();
    assert!(help.contains(&format!("accept it at `{page}`")), "{help}");
    hub.edit("org/clip", |repo| (repo.gated, repo.token) = (false, None));

    let error = lab.fails("hf://org/clip@v9/model.safetensors");
    assert!(error.to_string().contains("there is no such revision: `v9`"), "{error}");
    let error = lab.fails("hf://org/clip/modle.safetensors");
    assert!(error.to_string().contains("there is no such file: `modle.safetensors`"), "{error}");
    assert!(error.help().unwrap().contains("spelling"));
    let error = lab.fails("hf://org/nothing/x");
    assert!(matches!(error, Error::Refused { status: 401, .. }), "as the hub answers: {error}");
}

#[test]
fn redirects_within_the_hub_are_followed_and_loops_are_not() {
    let weights = bytes(5000, 15);
    let hub = hub_with(&weights);
    let lab = Lab { token: Some("secret".to_owned()), ..Lab::of(&hub) };
    // The repository has been renamed.
    assert_eq!(lab.read("hf://old/clip/model.safetensors"), weights);

    let circle = Server::start(|request| Answer::status(302).with("Location", &request.path));
    let lab = Lab { endpoint: circle.url(""), ..Lab::new() };
    let error = lab.fails(WEIGHTS);
    assert!(matches!(error, Error::TooManyRedirects { limit: 10, .. }), "{error}");
    assert_eq!(circle.asked().len(), 11);

    let strange = Server::start(|_| Answer::status(302).with("Location", "file:///etc/passwd"));
    let lab = Lab { endpoint: strange.url(""), ..Lab::new() };
    assert!(matches!(lab.fails(WEIGHTS), Error::BadRedirect { .. }));
}

#[test]
fn a_server_that_is_no_hub_is_recognized() {
    let server = Server::start(|_| Answer::ok("hello").with("ETag", "\"x\""));
    let lab = Lab { endpoint: server.url(""), ..Lab::new() };
    let error = lab.fails(WEIGHTS);
    assert!(error.to_string().contains("it names no commit"), "{error}");
    for etag in ["\"../../x\"", "\"\"", "\"a/b\"", "\".hidden\""] {
        let server =
            Server::start(move |_| Answer::ok("x").with("X-Repo-Commit", "a".repeat(40)).with("ETag", etag));
        let lab = Lab { endpoint: server.url(""), ..Lab::new() };
        assert!(matches!(lab.fails(WEIGHTS), Error::Protocol { .. }), "{etag}");
    }
    for commit in ["..", "main", "ABCDEF"] {
        let server =
            Server::start(move |_| Answer::ok("x").with("X-Repo-Commit", commit).with("ETag", "\"x\""));
        let lab = Lab { endpoint: server.url(""), ..Lab::new() };
        assert!(matches!(lab.fails(WEIGHTS), Error::Protocol { .. }), "{commit}");
    }
}

#[test]
fn a_pinned_revision_stays_when_main_moves() {
    let (old, new) = (bytes(5000, 16), bytes(5000, 17));
    let hub = hub_with(&old);
    let mut lab = Lab::of(&hub);
    let located = lab.get(WEIGHTS).unwrap();
    let first = hub.edit("org/clip", |repo| repo.branches["main"].clone());
    let revision = located.revision.clone().unwrap();
    assert_eq!((revision.asked.as_str(), revision.commit.as_str()), ("hf://org/clip", first.as_str()));
    assert_eq!(located.files[0].address, WEIGHTS);

    let second = hub.edit("org/clip", |repo| repo.push("main", &[("model.safetensors", &new)]));
    assert_eq!(lab.read(WEIGHTS), new, "nothing is pinned yet");
    lab.pin(&located);
    hub.forget();
    assert_eq!(lab.read(WEIGHTS), old);
    assert_eq!(hub.n_asked(), 0, "nobody is asked about what is here and pinned");
    assert_eq!(lab.read(&format!("hf://org/clip@{second}/model.safetensors")), new);
    assert_eq!(hub.n_asked(), 0);

    // Even on another machine the pinned commit is what is downloaded.
    let other = Lab { pins: lab.pins.clone(), ..Lab::of(&hub) };
    assert_eq!(other.read(WEIGHTS), old);
    assert!(hub.hub.asked().iter().all(|request| request.path.contains(&first)));
}

#[test]
fn branches_with_slashes_are_one_revision() {
    let weights = bytes(5000, 18);
    let hub = hub_with(&weights);
    hub.edit("org/clip", |repo| repo.push("refs/pr/3", &[("model.safetensors", &weights)]));
    let lab = Lab::of(&hub);
    let located = lab.get("hf://org/clip@refs%2Fpr%2F3/model.safetensors").unwrap();
    assert_eq!(located.revision.unwrap().asked, "hf://org/clip@refs%2Fpr%2F3");
    assert!(lab.path("hub/models--org--clip/refs/refs/pr/3").is_file());
}

#[test]
fn offline_only_what_is_here_is_used() {
    let weights = bytes(5000, 19);
    let hub = hub_with(&weights);
    let mut lab = Lab::of(&hub);
    lab.read(WEIGHTS);
    hub.forget();
    lab.offline = true;
    assert_eq!(lab.read(WEIGHTS), weights);
    assert_eq!(lab.get("hf://org/clip").unwrap().path.file_name().unwrap(), "model.safetensors");
    let error = lab.fails("hf://org/clip/config.json");
    assert_eq!(error.to_string(), "`hf://org/clip/config.json` is not downloaded yet");
    assert!(error.help().unwrap().contains("HF_HUB_OFFLINE"));
    assert!(matches!(lab.fails("hf://org/other"), Error::NotCached { .. }));
    assert_eq!(hub.n_asked(), 0);
}

#[test]
fn without_the_network_only_what_is_pinned_is_known() {
    let weights = bytes(5000, 20);
    let hub = hub_with(&weights);
    let mut lab = Lab::of(&hub);
    let located = lab.get("hf://org/clip").unwrap();
    hub.forget();
    let local = |lab: &Lab, address: &str| lab.sources().get(address, &lab.pins, Reach::Local);
    for address in ["hf://org/clip", WEIGHTS] {
        assert!(matches!(local(&lab, address), Err(Error::NotCached { offline: false, .. })), "{address}");
    }
    lab.pin(&located);
    assert_eq!(local(&lab, "hf://org/clip").unwrap(), located);
    // Another tool's download of the same commit does not change what the address means.
    let folder = located.path.parent().unwrap().to_owned();
    fs_err::write(folder.join("adapter_config.json"), "{}").unwrap();
    fs_err::write(folder.join("adapter_model.safetensors"), "").unwrap();
    assert_eq!(local(&lab, "hf://org/clip").unwrap(), located);
    assert_eq!(hub.n_asked(), 0);
}

#[test]
fn a_repository_stands_for_its_checkpoint() {
    let (one, two) = (bytes(2000, 21), bytes(3000, 22));
    let index = br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    let sharded = Repo::of(&[
        ("model.safetensors.index.json", index),
        ("model-1.safetensors", &one),
        ("model-2.safetensors", &two),
    ]);
    let adapter = Repo::of(&[
        ("adapter_config.json", b"{}"),
        ("adapter_model.safetensors", &one),
        ("model.safetensors", &two),
    ]);
    let torch = Repo::of(&[("sub/pytorch_model.bin", &two), ("README.md", b"#")]);
    let hub = Hub::start(&[("org/sharded", sharded), ("org/lora", adapter), ("org/torch", torch)]);
    let lab = Lab::of(&hub);

    let located = lab.get("hf://org/sharded").unwrap();
    assert_eq!(located.path.file_name().unwrap(), "model.safetensors.index.json");
    let names: Vec<_> = located.files.iter().map(|file| file.address.as_str()).collect();
    assert_eq!(
        names,
        [
            "hf://org/sharded/model-1.safetensors",
            "hf://org/sharded/model-2.safetensors",
            "hf://org/sharded/model.safetensors.index.json"
        ]
    );
    assert_eq!(fs_err::read(located.path.with_file_name("model-2.safetensors")).unwrap(), two);

    let located = lab.get("hf://org/lora").unwrap();
    assert!(located.path.is_dir() && located.path.join("adapter_model.safetensors").is_file());
    assert_eq!(located.files.len(), 2);

    for address in ["hf://org/torch/sub", "hf://org/torch/sub/"] {
        assert_eq!(lab.read(address), two);
    }
    let error = lab.fails("hf://org/torch");
    assert!(error.to_string().contains("there is no such checkpoint"), "{error}");
}

#[test]
fn two_at_once_download_one_file_once() {
    let weights = bytes(3 << 20, 23);
    let hub = hub_with(&weights);
    let lab = Lab::of(&hub);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4).map(|_| scope.spawn(|| lab.read(WEIGHTS))).collect();
        for worker in workers {
            assert_eq!(worker.join().unwrap(), weights);
        }
    });
    assert_eq!(hub.storage.asked().len(), 1);
    let events = lab.events.lock().unwrap();
    assert_eq!(events.iter().filter(|event| matches!(event, Event::Finished { .. })).count(), 1);
}

#[test]
fn a_file_that_was_discarded_is_downloaded_again() {
    let weights = bytes(5000, 24);
    let hub = hub_with(&weights);
    let lab = Lab::of(&hub);
    let located = lab.get(WEIGHTS).unwrap();
    lab.sources().discard(&located.files[0]).unwrap();
    assert!(!lab.files("hub").iter().any(|name| name.contains("blobs/")));
    hub.forget();
    assert_eq!(lab.read(WEIGHTS), weights);
    assert_eq!(hub.storage.asked().len(), 1);
}
