//! Starting the tool and its peers as whole processes, and watching what they take.

use crate::Result;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How often memory is looked at.
const SAMPLE_EVERY: Duration = Duration::from_millis(2);

/// The tool that is measured: the one built with this program, unless `MERGANSER_BENCH_TOOL` names another, such as an older one.
pub fn tool() -> PathBuf {
    let set = std::env::var_os("MERGANSER_BENCH_TOOL").filter(|path| !path.is_empty());
    set.unwrap_or_else(|| env!("CARGO_BIN_EXE_merganser").into()).into()
}

/// A pipeline file and a cache of its own.
pub struct Lab {
    folder: PathBuf,
    pub cache: PathBuf,
}

/// What a process took.
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    pub seconds: f64,
    /// Highest RssAnon + RssShmem seen.
    pub private_bytes: u64,
}

impl Lab {
    /// An empty cache in a new folder below `root`.
    pub fn new(root: &Path, name: &str) -> Result<Self> {
        let folder = root.join(name);
        if folder.exists() {
            fs_err::remove_dir_all(&folder)?;
        }
        fs_err::create_dir_all(&folder)?;
        Ok(Self { cache: folder.join("cache"), folder })
    }

    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        fs_err::write(&path, text)?;
        Ok(path)
    }

    /// Where a peer may write.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub fn clear_cache(&self) -> Result<()> {
        if self.cache.exists() {
            fs_err::remove_dir_all(&self.cache)?;
        }
        Ok(())
    }

    /// Puts a copy of the cache aside.
    pub fn save_cache(&self) -> Result<()> {
        succeed(Command::new("cp").arg("-a").arg(&self.cache).arg(self.folder.join("saved")))
    }

    /// Goes back to the cache that was saved.
    pub fn restore_cache(&self) -> Result<()> {
        self.clear_cache()?;
        succeed(Command::new("cp").arg("-a").arg(self.folder.join("saved")).arg(&self.cache))
    }

    /// `merganser run`, with nothing of the user's environment that could change what is measured.
    pub fn run(&self, pipeline: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(tool());
        command.arg("run").arg(pipeline).arg("--cache").arg(&self.cache).args(arguments);
        command.env_remove("MERGANSER_THREADS").env("NO_COLOR", "1");
        command
    }

    pub fn seconds(&self, pipeline: &Path, arguments: &[&str]) -> Result<f64> {
        seconds(&mut self.run(pipeline, arguments))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs_err::remove_dir_all(&self.folder);
    }
}

/// Runs a command to its end and returns how long it took; a failure is an error that holds what it said.
pub fn seconds(command: &mut Command) -> Result<f64> {
    let started = Instant::now();
    succeed(command)?;
    Ok(started.elapsed().as_secs_f64())
}

/// Runs a command and returns its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout)?);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last: Vec<&str> = said.lines().rev().take(8).collect();
    let last: Vec<&str> = last.into_iter().rev().collect();
    Err(format!("{command:?} ended with {}: {}", output.status, last.join("\n")).into())
}

pub fn succeed(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Runs a command and watches its private memory. Short peaks between two looks are missed.
pub fn watched(command: &mut Command) -> Result<Spent> {
    let started = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let status_file = PathBuf::from(format!("/proc/{}/status", child.id()));
    let mut private_bytes = 0;
    loop {
        if let Some(status) = child.try_wait()? {
            let seconds = started.elapsed().as_secs_f64();
            return if status.success() {
                Ok(Spent { seconds, private_bytes })
            } else {
                Err(format!("{command:?} ended with {status}").into())
            };
        }
        private_bytes = private_bytes.max(private_memory(&status_file));
        std::thread::sleep(SAMPLE_EVERY);
    }
}

/// RssAnon + RssShmem, or 0 once the process has ended.
fn private_memory(status_file: &Path) -> u64 {
    let status = std::fs::read_to_string(status_file).unwrap_or_default();
    let kilobytes = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse().ok()
    };
    (kilobytes("RssAnon").unwrap_or(0) + kilobytes("RssShmem").unwrap_or(0)) * 1024
}

/// Finds a program, by the path in an environment variable or by name.
pub fn find_program(variable: &str, name: &str) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(variable).filter(|path| !path.is_empty()) {
        return Some(path.into());
    }
    let paths = std::env::var_os("PATH")?;
    std::env::split_paths(&paths).map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// `cat FILES > /dev/null`.
pub fn cat<S: AsRef<OsStr>>(files: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "exec cat \"$@\" > /dev/null", "cat"]).args(files);
    command
}
