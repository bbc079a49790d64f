//! Prints what the store costs a run that has nothing to do, and how fast it hashes, writes and verifies.
//!
//! `cargo run --release -p merganser-cache --example no_op_run`. Timings are printed and never asserted: they are
//! the machine's business.
#![expect(clippy::print_stdout, reason = "this program's only purpose is to print")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use merganser_cache::{Artifact, FileDigest, Options, Preimage, Source, Store, Value};

const N_STAGES: usize = 100;
const N_TENSORS: usize = 200;
const LARGE_BYTES: usize = 512 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let root = folder.path().join("store");
    let sources: Vec<PathBuf> =
        (0..N_STAGES).map(|idx| folder.path().join(format!("source-{idx}"))).collect();
    for (idx, path) in sources.iter().enumerate() {
        fs_err::write(path, format!("source {idx}"))?;
    }
    let preimages: Vec<Preimage> = (0..N_STAGES).map(preimage).collect();

    let start = Instant::now();
    fill(&open(&root)?, &sources, &preimages)?;
    println!("first run, {N_STAGES} stages of 4 blobs:        {}", show(start.elapsed()));

    for _ in 0..5 {
        let start = Instant::now();
        let store = open(&root)?;
        for path in &sources {
            store.digest_file(path, &|_| {})?;
        }
        let digested = start.elapsed();
        for preimage in &preimages {
            store.lookup(&preimage.key()).map_err(|miss| miss.to_string())?;
        }
        let all = start.elapsed();
        println!(
            "no-op run, {N_STAGES} digest_file + {N_STAGES} lookups: {} = {} + {}",
            show(all),
            show(digested),
            show(all.saturating_sub(digested))
        );
    }

    let many: Vec<PathBuf> = (0..1000).map(|idx| folder.path().join(format!("many-{idx}"))).collect();
    let store = open(&root)?;
    for path in &many {
        fs_err::write(path, "x")?;
        store.digest_file(path, &|_| {})?;
    }
    store.flush()?;
    let start = Instant::now();
    open(&root)?.digest_file(&many[0], &|_| {})?;
    println!("loading 1100 known digests:               {}", show(start.elapsed()));

    let bytes: Vec<u8> = (0..LARGE_BYTES).map(|idx| (idx % 251) as u8).collect();
    let store = open(&root)?;
    let start = Instant::now();
    let mut writer = store.staging()?.writer("large")?;
    for block in bytes.chunks(4 << 20) {
        writer.write_all(block)?;
    }
    let written = start.elapsed();
    let blob = writer.finish()?;
    let finished = start.elapsed();
    println!("write and hash {} MiB: {}; with sync: {}", LARGE_BYTES >> 20, rate(written), rate(finished));
    let start = Instant::now();
    open(&root)?.open_blob(&blob.digest, blob.size)?;
    println!("verify {} MiB (page cache):  {}", LARGE_BYTES >> 20, rate(start.elapsed()));
    let start = Instant::now();
    let digest = blake3::hash(&bytes);
    println!("blake3 in memory, one thread: {}", rate(start.elapsed()));
    assert_eq!(digest, blob.digest);
    Ok(())
}

fn open(root: &Path) -> Result<Store, merganser_cache::Error> {
    let options = Options {
        // Ahead of the real clock, so that the files just written are not racy.
        clock: Arc::new(|| SystemTime::now() + Duration::from_mins(1)),
        host: "host".into(),
        tool_version: "0".into(),
        on_event: Arc::new(|event| println!("{event:?}")),
    };
    Store::open(root, options)
}

fn preimage(idx: usize) -> Preimage {
    let parameters = (0..20).map(|n| (format!("parameter-{n}"), Value::Float(n as f64 / 7.0)));
    Preimage {
        operation: Value::map([("kind", Value::from("quantize")), ("parameters", Value::map(parameters))]),
        inputs: Value::list([blake3::hash(&idx.to_le_bytes())]),
    }
}

fn fill(store: &Store, sources: &[PathBuf], preimages: &[Preimage]) -> Result<(), merganser_cache::Error> {
    for (idx, (path, preimage)) in sources.iter().zip(preimages).enumerate() {
        let FileDigest { digest, size } = store.digest_file(path, &|_| {})?;
        let staging = store.staging()?;
        let mut blobs = Vec::new();
        for n in 0..4 {
            let mut writer = staging.writer(&format!("blob-{n}"))?;
            // Writing into the buffer cannot fail; `finish` reports everything else.
            let _ = writer.write_all(format!("{idx} {n}").as_bytes());
            blobs.push(writer.finish()?);
        }
        // About as long as a manifest of so many tensors.
        let manifest = format!("{digest} name dtype shape digest ").repeat(N_TENSORS);
        let artifact =
            Artifact { manifest, blobs, operands: Vec::new(), sources: vec![Source { digest, size }] };
        store.publish(preimage, &artifact, Duration::from_secs(1))?;
    }
    Ok(())
}

fn show(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

fn rate(time: Duration) -> String {
    format!("{:.2} GB/s", LARGE_BYTES as f64 / time.as_secs_f64() / 1e9)
}
