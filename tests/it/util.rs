//! A place to run the tool in, and what it answered.
//!
//! Every test has its own folder with its own copy of the data it may change, its own cache, and an environment with nothing of the user's
//! in it. Only ONNX Runtime is shared: found or installed once, where a user's first run would put it.

use merganser_onnx::provision::{self, Environment};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tempfile::TempDir;

/// The quickstart with two tasks and few images: enough for everything that is not about accuracy.
pub(crate) const SMALL: &str = r#"
[pipeline]
name = "small"

[vars]
tasks = ["digits", "negative"]
bits = 4
scale = 0.3
limit = 40

[stage.base]
kind = "load"
path = "data/base.safetensors"

[stage.tuned]
kind = "load"
each = { task = "${tasks}" }
path = "data/ft_${task}.safetensors"

[stage.deltas]
kind = "diff"
from = { base = "base", tuned = "tuned" }

[stage.packed]
kind = "quantize"
from = "deltas"
bits = "${bits}"

[stage.merged]
kind = "merge"
from = { base = "base", vectors = "packed" }
method = "task-arithmetic"
scale = "${scale}"

[stage.base_scores]
kind = "evaluate"
from = { model = "base", origin = "base" }
graph = "data/clip_vision.onnx"
dataset = "${datasets}"

[stage.scores]
kind = "evaluate"
from = { model = "merged", origin = "base" }
graph = "data/clip_vision.onnx"
dataset = "${datasets}"

[vars.datasets.digits]
format = "idx"
images = "data/digits-images.idx.gz"
labels = "data/digits-labels.idx.gz"
head = "data/head_digits.safetensors"
limit = "${limit}"

[vars.datasets.negative]
format = "idx"
images = "data/negative-images.idx.gz"
labels = "data/negative-labels.idx.gz"
head = "data/head_negative.safetensors"
limit = "${limit}"
"#;

/// A further dataset for [`SMALL`].
pub(crate) const PARITY: &str = r#"
[vars.datasets.parity]
format = "idx"
images = "data/parity-images.idx.gz"
labels = "data/parity-labels.idx.gz"
head = "data/head_parity.safetensors"
limit = "${limit}"
"#;

/// The units of [`SMALL`].
pub(crate) const SMALL_UNITS: [&str; 12] = [
    "base",
    "base_scores[digits]",
    "base_scores[negative]",
    "deltas[digits]",
    "deltas[negative]",
    "merged",
    "packed[digits]",
    "packed[negative]",
    "scores[digits]",
    "scores[negative]",
    "tuned[digits]",
    "tuned[negative]",
];

/// A folder, a cache and a clean environment.
pub(crate) struct Lab {
    folder: TempDir,
    /// Where the tool is started; `pipeline.toml` and `data` lie here.
    home: PathBuf,
    pub cache: PathBuf,
}

impl Lab {
    /// An empty folder.
    pub(crate) fn empty() -> Self {
        let folder = tempfile::Builder::new().prefix("merganser-test-").tempdir().unwrap();
        let home = folder.path().join("work");
        fs_err::create_dir(&home).unwrap();
        let cache = folder.path().join("cache");
        Self { folder, home, cache }
    }

    /// A copy of the quickstart's models and idx data under `data`, and [`SMALL`] as `pipeline.toml`.
    pub(crate) fn small() -> Self {
        let lab = Self::empty();
        let data = lab.path("data");
        fs_err::create_dir(&data).unwrap();
        for folder in [quickstart(), quickstart().join("data")] {
            for entry in fs_err::read_dir(folder).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_file() {
                    copy(&entry.path(), &data.join(entry.file_name()));
                }
            }
        }
        lab.write("pipeline.toml", SMALL);
        lab
    }

    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.home.join(name)
    }

    /// The folder that holds everything of this lab.
    pub(crate) fn root(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs_err::write(self.path(name), text).unwrap();
    }

    pub(crate) fn append(&self, name: &str, text: &str) {
        let old = fs_err::read_to_string(self.path(name)).unwrap();
        self.write(name, &(old + text));
    }

    /// Replaces a text that occurs in a file.
    #[track_caller]
    pub(crate) fn edit(&self, name: &str, from: &str, to: &str) {
        let old = fs_err::read_to_string(self.path(name)).unwrap();
        assert!(old.contains(from), "`{name}` does not contain `{from}`");
        self.write(name, &old.replace(from, to));
    }

    /// Moves the folder in which the tool is started, with all in it.
    pub(crate) fn move_home(&mut self, name: &str) {
        let target = self.root().join(name);
        fs_err::rename(&self.home, &target).unwrap();
        self.home = target;
    }

    /// The tool, ready to be started.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_merganser"));
        command
            .args(args)
            .current_dir(&self.home)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.root())
            .env("TMPDIR", self.root())
            .env("ORT_DYLIB_PATH", runtime())
            .env("MERGANSER_CACHE", &self.cache)
            .env("MERGANSER_OFFLINE", "true")
            .stdin(Stdio::null());
        command
    }

    /// Runs the tool to its end.
    pub(crate) fn call<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Outcome {
        Outcome::of(&mut self.command(args))
    }

    /// Runs the tool; it must succeed.
    #[track_caller]
    pub(crate) fn ok<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Outcome {
        let outcome = self.call(args);
        assert_eq!(outcome.code, 0, "{outcome}");
        outcome
    }

    /// Runs the tool with `--json`; it must succeed.
    #[track_caller]
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        self.ok(args.iter().copied().chain(["--json"])).json()
    }

    /// `run pipeline.toml --json` with further arguments; it must succeed.
    #[track_caller]
    pub(crate) fn run(&self, args: &[&str]) -> Run {
        self.run_file("pipeline.toml", args)
    }

    #[track_caller]
    pub(crate) fn run_file(&self, file: &str, args: &[&str]) -> Run {
        let outcome = self.try_run(file, args);
        assert_eq!(outcome.code, 0, "{outcome}");
        Run::of(&outcome.json())
    }

    /// `run --json`, whatever comes of it.
    pub(crate) fn try_run(&self, file: &str, args: &[&str]) -> Outcome {
        self.call(["run", file, "--json"].iter().chain(args))
    }

    /// Starts `run pipeline.toml` and kills it as soon as `stage` has kept so many parts of its work.
    #[track_caller]
    pub(crate) fn run_and_kill(&self, stage: &str, parts: usize) {
        let child =
            self.command(["run", "pipeline.toml"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut child = child.unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let start = format!("start   {stage}");
        assert!(lines.any(|line| line.unwrap().starts_with(&start)), "`{stage}` did not start");
        let kept = || self.cached_files("keys-v1").len();
        let wanted = kept() + parts;
        while kept() < wanted && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        assert!(child.wait().unwrap().code().is_none(), "`{stage}` ended before it could be killed");
        assert!(kept() >= wanted, "nothing was kept");
    }

    /// Every file in the cache below a bucket.
    pub(crate) fn cached_files(&self, bucket: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut open = vec![self.cache.join(bucket)];
        while let Some(folder) = open.pop() {
            let Ok(entries) = fs_err::read_dir(&folder) else { continue };
            for entry in entries.map(Result::unwrap) {
                if entry.file_type().unwrap().is_dir() {
                    open.push(entry.path());
                } else {
                    found.push(entry.path());
                }
            }
        }
        found.sort();
        found
    }

    /// The file of an object of the cache.
    pub(crate) fn object(&self, digest: &str) -> PathBuf {
        self.cache.join("objects-v1").join(&digest[..2]).join(&digest[2..])
    }

    /// Fails unless every object is what its name says.
    #[track_caller]
    pub(crate) fn check_objects(&self) {
        for path in self.cached_files("objects-v1") {
            let folder = path.parent().unwrap().file_name().unwrap().to_str().unwrap();
            let name = format!("{folder}{}", path.file_name().unwrap().to_str().unwrap());
            let actual = blake3::hash(&fs_err::read(&path).unwrap()).to_hex();
            assert_eq!(*name, *actual, "the content of an object is not what its name says");
        }
    }
}

/// What a process answered.
pub(crate) struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    pub(crate) fn of(command: &mut Command) -> Self {
        Self::from(command.output().unwrap())
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}\n{self}"))
    }

    /// Fails unless standard error contains each of the texts.
    #[track_caller]
    pub(crate) fn tells(&self, texts: &[&str]) {
        for text in texts {
            assert!(self.stderr.contains(text), "nothing about `{text}`\n{self}");
        }
    }

    /// The units of `run --json`, whatever the exit code.
    #[track_caller]
    pub(crate) fn run(&self) -> Run {
        Run::of(&self.json())
    }
}

impl From<std::process::Output> for Outcome {
    fn from(output: std::process::Output) -> Self {
        Self {
            // A process that a signal ended has no code.
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exit code {}\n--- stdout\n{}\n--- stderr\n{}", self.code, self.stdout, self.stderr)
    }
}

/// One unit of `run --json` or `plan --json`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Unit {
    pub status: String,
    pub key: Option<String>,
    pub artifact: Option<String>,
    pub reason: String,
}

/// The answer of `run --json` or `plan --json`.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub units: BTreeMap<String, Unit>,
    pub scores: Vec<Value>,
}

impl Run {
    #[track_caller]
    pub(crate) fn of(json: &Value) -> Self {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let units = json["stages"].as_array().unwrap().iter().map(|stage| {
            let unit = Unit {
                status: text(&stage["status"]).unwrap(),
                key: text(&stage["key"]),
                artifact: text(&stage["artifact"]),
                reason: text(&stage["reason"]).unwrap(),
            };
            (text(&stage["unit"]).unwrap(), unit)
        });
        let scores = json["scores"].as_array().cloned().unwrap_or_default();
        Self { units: units.collect(), scores }
    }

    /// The units with a status.
    pub(crate) fn with(&self, status: &str) -> BTreeSet<&str> {
        self.units.iter().filter(|(_, unit)| unit.status == status).map(|(name, _)| name.as_str()).collect()
    }

    /// The units that were executed.
    pub(crate) fn ran(&self) -> BTreeSet<&str> {
        self.with("ran")
    }

    /// Fails unless exactly these units were executed and all others cached.
    #[track_caller]
    pub(crate) fn ran_exactly(&self, expected: &[&str]) {
        assert_eq!(self.ran(), expected.iter().copied().collect::<BTreeSet<_>>());
        assert_eq!(self.ran().len() + self.with("cached").len(), self.units.len(), "{:?}", self.units);
    }

    /// Digests of all artifacts by unit.
    pub(crate) fn artifacts(&self) -> BTreeMap<&str, &str> {
        self.units.iter().map(|(name, unit)| (name.as_str(), unit.artifact.as_deref().unwrap())).collect()
    }

    /// Correct answers by (stage, vars, task): `("scores", "bits=3", "digits")`; of a var-less stage the middle is empty.
    pub(crate) fn correct(&self) -> BTreeMap<(String, String, String), (u64, u64)> {
        let accuracy = self.scores.iter().filter(|score| score["metric"] == "accuracy");
        let rows = accuracy.map(|score| {
            let vars = score["vars"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(name, value)| format!("{name}={value}"));
            let key = (
                score["stage"].as_str().unwrap().to_owned(),
                vars.collect::<Vec<_>>().join(","),
                score["task"].as_str().unwrap().to_owned(),
            );
            let n = score["n"].as_u64().unwrap();
            let correct = score["value"].as_f64().unwrap() * n as f64;
            (key, (correct.round() as u64, n))
        });
        rows.collect()
    }
}

/// The quickstart's folder in the repository.
pub(crate) fn quickstart() -> PathBuf {
    pipelines().join("quickstart")
}

fn pipelines() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines")
}

/// The text of a pipeline that is shipped.
pub(crate) fn shipped(name: &str) -> String {
    fs_err::read_to_string(pipelines().join(name)).unwrap()
}

/// Copies a file; the copy can be written.
pub(crate) fn copy(from: &Path, to: &Path) {
    fs_err::write(to, fs_err::read(from).unwrap()).unwrap();
}

/// ONNX Runtime as a user would get it: what the machine has, else one installation in the user's cache folder, made once under a file lock.
pub(crate) fn runtime() -> &'static Path {
    static RUNTIME: OnceLock<PathBuf> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let caches = set("XDG_CACHE_HOME")
            .or_else(|| Some(set("HOME")?.join(".cache")))
            .unwrap_or_else(std::env::temp_dir);
        let environment = Environment {
            ort_dylib_path: set("ORT_DYLIB_PATH"),
            python: vec!["python3".into(), "python".into()],
            library_dirs: provision::default_library_dirs(),
            cache_dir: caches.join("merganser"),
            offline: false,
            on_event: &|_| {},
        };
        provision::resolve(&environment).unwrap_or_else(|error| panic!("{error}")).path
    })
}

/// The folder of test data, or a line on standard error that says that the test is skipped.
pub(crate) fn test_data(test: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("MERGANSER_TEST_DATA").filter(|value| !value.is_empty()).map(PathBuf::from);
    if folder.is_none() {
        skipped(test, "MERGANSER_TEST_DATA is not set");
    }
    folder
}

/// Whether tests that take minutes are wanted; if not, a line says that this one is left out.
pub(crate) fn slow(test: &str) -> bool {
    let wanted = std::env::var_os("MERGANSER_SLOW_TESTS").is_some_and(|value| !value.is_empty());
    if !wanted {
        let line = format!("left out: {test} (MERGANSER_SLOW_TESTS is not set)\n");
        std::io::stderr().write_all(line.as_bytes()).unwrap();
    }
    wanted
}

/// Says that a test could not do its work here. Written past the test harness, which hides what passing tests print.
pub(crate) fn skipped(test: &str, reason: &str) {
    static SKIPPED: AtomicUsize = AtomicUsize::new(0);
    let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    let line = format!("skipped: {test} ({reason}) [{count} skipped so far]\n");
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}
