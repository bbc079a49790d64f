//! Runs that end early keep what they finished: Ctrl-C and a full disk.

use crate::util::{Lab, Outcome, skipped};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Enough work that a signal always comes in the middle.
const LONG: [&str; 4] = ["--set", "bits=2,3,4,5,6,7,8", "--set", "limit=600"];

/// Starts a long run and signals it when a line appears; the rest of its standard error is returned with its code.
fn interrupted(lab: &Lab, signal: &str, line: &str, further: &[&str]) -> Outcome {
    let args = ["run", "pipeline.toml", "--json"].iter().chain(&LONG).chain(further);
    let mut child = lab.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let mut stderr = String::new();
    loop {
        let start = stderr.len();
        assert!(lines.read_line(&mut stderr).unwrap() > 0, "no line `{line}` in\n{stderr}");
        if stderr[start..].starts_with(line) {
            break;
        }
    }
    let sent = Command::new("sh").args(["-c", &format!("kill -{signal} {}", child.id())]).status().unwrap();
    assert!(sent.success());
    lines.read_to_string(&mut stderr).unwrap();
    let output = child.wait_with_output().unwrap();
    Outcome {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr,
    }
}

#[test]
fn control_c_keeps_finished_work_and_says_how_to_go_on() {
    let lab = Lab::small();
    let outcome = interrupted(&lab, "INT", "ran     scores[bits=2,digits]", &[]);
    assert_eq!(outcome.code, 130, "{outcome}");
    outcome.tells(&["interrupted", "run the same command to go on"]);
    let run = outcome.run();
    assert_eq!(run.units["scores[bits=2,digits]"].status, "ran");
    assert!(!run.with("skipped").is_empty() && run.with("failed").is_empty(), "{outcome}");
    lab.check_objects();

    let rest = lab.run(&LONG);
    for unit in run.ran() {
        assert_eq!(rest.units[unit].status, "cached", "{unit} was finished");
    }
    for unit in run.with("skipped") {
        assert_eq!(rest.units[unit].status, "ran", "{unit} was not finished");
    }
    let undisturbed = Lab::small();
    assert_eq!(undisturbed.run(&LONG).artifacts(), rest.artifacts());
}

#[test]
fn control_c_stops_a_run_of_several_jobs() {
    let lab = Lab::small();
    let outcome = interrupted(&lab, "INT", "ran     scores[", &["--jobs", "3"]);
    assert_eq!(outcome.code, 130, "{outcome}");
    let run = outcome.run();
    assert!(!run.with("skipped").is_empty(), "{outcome}");
    assert_eq!(lab.cached_files("staging-v1"), Vec::<PathBuf>::new());
}

#[test]
fn a_request_to_terminate_is_an_interruption_too() {
    let lab = Lab::small();
    let outcome = interrupted(&lab, "TERM", "ran     scores[", &[]);
    assert_eq!(outcome.code, 130, "{outcome}");
    assert!(!outcome.run().with("ran").is_empty());
}

/// A small file system in memory, unmounted when dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    /// `None`, and a line that says so, where mounting is not allowed.
    fn mount(test: &str, path: &Path, size: &str) -> Option<Self> {
        fs_err::create_dir_all(path).unwrap();
        let options = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(path).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(path.to_owned()));
        }
        skipped(test, "a tmpfs cannot be mounted here");
        None
    }

    fn resize(&self, size: &str) {
        let options = format!("remount,size={size}");
        let status = Command::new("mount").args(["-o", &options]).arg(&self.0).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(&self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

#[test]
fn a_full_disk_is_a_clear_message_and_finished_work_is_kept() {
    let lab = Lab::small();
    let Some(disk) =
        Tmpfs::mount("a_full_disk_is_a_clear_message_and_finished_work_is_kept", &lab.cache, "600k")
    else {
        return;
    };
    let outcome = lab.try_run("pipeline.toml", &[]);
    assert_eq!(outcome.code, 1, "{outcome}");
    outcome.tells(&[
        "No space left on device",
        "FAILED",
        &lab.cache.display().to_string(),
        "help: free some space",
    ]);
    let run = outcome.run();
    assert_eq!(run.with("failed").len(), 1, "{outcome}");
    assert!(run.ran().len() >= 5, "{outcome}");
    lab.check_objects();
    assert_eq!(lab.cached_files("staging-v1"), Vec::<PathBuf>::new(), "partial output is left behind");

    disk.resize("40m");
    let rest = lab.run(&[]);
    for unit in run.ran() {
        assert_eq!(rest.units[unit].status, "cached", "{unit} was finished");
    }
    assert_eq!(Lab::small().run(&[]).artifacts(), rest.artifacts());
}

#[test]
fn a_disk_that_is_full_from_the_start_is_a_clear_message() {
    let lab = Lab::small();
    let Some(_disk) = Tmpfs::mount("a_disk_that_is_full_from_the_start_is_a_clear_message", &lab.cache, "4k")
    else {
        return;
    };
    fs_err::write(lab.cache.join("filler"), [0; 4096]).unwrap();
    let outcome = lab.try_run("pipeline.toml", &[]);
    assert_eq!(outcome.code, 1, "{outcome}");
    outcome.tells(&["no space left", "free some", &lab.cache.display().to_string()]);
}

#[test]
fn a_cache_that_cannot_be_written_is_a_clear_message() {
    let lab = Lab::small();
    // A file where the folder should be stops even root.
    fs_err::write(&lab.cache, "not a folder").unwrap();
    let outcome = lab.try_run("pipeline.toml", &[]);
    assert_eq!(outcome.code, 1, "{outcome}");
    outcome.tells(&[&lab.cache.display().to_string()]);
}
