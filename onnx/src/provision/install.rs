//! Installing the pinned wheel, once, for its library.
//!
//! pip installs into a staging folder; the library and its licence move to
//! `<cache>/runtime/onnxruntime-<version>` with one rename, under a file lock. Wheels are made per Python version
//! although the library in them is the same, so if pip finds none for its own Python, it is asked for others.

use std::path::{Path, PathBuf};

use fs_err as fs;

use super::find::{newest_library, python_command};
use super::{Environment, Event, FoundBy, Located, PINNED_VERSION, ProvisionError};

/// Where an installation goes: a wheel's layout, so that the manual step of the error messages puts it there too.
pub(super) fn target(runtime_dir: &Path) -> PathBuf {
    runtime_dir.join(format!("onnxruntime-{PINNED_VERSION}"))
}

/// Returns the library of an earlier installation.
pub(super) fn installed(runtime_dir: &Path) -> Option<PathBuf> {
    newest_library(&target(runtime_dir).join("onnxruntime").join("capi"))
}

pub(super) fn install(environment: &Environment) -> Result<Located, ProvisionError> {
    let located = |path: PathBuf| Located { path, version: PINNED_VERSION, found_by: FoundBy::Installation };
    if environment.offline {
        return Err(ProvisionError::Offline { cache_dir: environment.cache_dir.clone() });
    }
    let runtime_dir = environment.runtime_dir();
    fs::create_dir_all(&runtime_dir)?;
    let _lock = lock(environment, &runtime_dir)?;
    // Another process may have finished while this one waited.
    if let Some(path) = installed(&runtime_dir) {
        return Ok(located(path));
    }
    let target = target(&runtime_dir);
    (environment.on_event)(&Event::Installing { version: PINNED_VERSION, target: target.clone() });
    let staging = Staging::new(&runtime_dir)?;
    pip(environment, &staging.wheel())?;
    keep_library(environment, &staging)?;
    if target.exists() {
        // Left over without a library in it, else it would have been found above.
        fs::remove_dir_all(&target)?;
    }
    fs::rename(staging.kept(), &target)?;
    let path = installed(&runtime_dir).ok_or_else(|| no_library(environment, &target))?;
    (environment.on_event)(&Event::Installed { path: path.clone(), version: PINNED_VERSION });
    Ok(located(path))
}

/// Holds the lock until dropped. The file stays: removing it would let two processes lock two files.
fn lock(environment: &Environment, runtime_dir: &Path) -> Result<fs::File, ProvisionError> {
    let path = runtime_dir.join("install.lock");
    let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path)?;
    match file.file().try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            (environment.on_event)(&Event::Waiting { lock: path });
            file.file().lock()?;
        }
        Err(std::fs::TryLockError::Error(e)) => return Err(e.into()),
    }
    Ok(file)
}

fn pip(environment: &Environment, target: &Path) -> Result<(), ProvisionError> {
    const OTHER_PYTHONS: [&str; 4] = ["3.13", "3.12", "3.11", "3.14"];
    let requirement = format!("onnxruntime=={PINNED_VERSION}");
    let mut last_output = None;
    for python in &environment.python {
        for other in std::iter::once(None).chain(OTHER_PYTHONS.map(Some)) {
            let mut command = python_command(environment, python);
            // A user's pip settings may forbid what `--target` does harmlessly.
            command.env("PIP_USER", "0").env("PIP_REQUIRE_VIRTUALENV", "0");
            command
                .args(["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-compile"])
                .args(["--no-deps", "--only-binary=:all:", "--upgrade", "--target"])
                .arg(target);
            if let Some(other) = other {
                command.args(["--implementation", "cp", "--python-version", other]);
                command.args(platforms().iter().flat_map(|p| ["--platform", p]));
            }
            let Ok(output) = command.arg(&requirement).output() else { break };
            if output.status.success() {
                return Ok(());
            }
            let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            if text.contains("No module named pip") {
                break;
            }
            // Another wheel helps only if there is none for this Python; other failures would repeat.
            let no_wheel =
                text.contains("No matching distribution") || text.contains("not a supported wheel");
            last_output = Some(text);
            if !no_wheel {
                break;
            }
        }
    }
    let cache_dir = environment.cache_dir.clone();
    Err(match last_output {
        Some(text) => {
            ProvisionError::PipFailed { version: PINNED_VERSION, output: last_lines(&text), cache_dir }
        }
        None => ProvisionError::NoPip {
            tried: environment
                .python
                .iter()
                .map(|p| format!("`{}`", p.display()))
                .collect::<Vec<_>>()
                .join(", "),
            cache_dir,
        },
    })
}

/// Moves the library and the licence texts out of the wheel; the rest (Python code, a second copy of the engine) goes.
fn keep_library(environment: &Environment, staging: &Staging) -> Result<(), ProvisionError> {
    let package = staging.wheel().join("onnxruntime");
    let library = newest_library(&package.join("capi")).ok_or_else(|| no_library(environment, &package))?;
    let kept = staging.kept().join("onnxruntime");
    fs::create_dir_all(kept.join("capi"))?;
    let name = library.file_name().expect("a found file has a name");
    fs::rename(&library, kept.join("capi").join(name))?;
    for text in ["LICENSE", "ThirdPartyNotices.txt"] {
        if package.join(text).is_file() {
            fs::rename(package.join(text), kept.join(text))?;
        }
    }
    Ok(())
}

/// A folder that disappears with its contents.
struct Staging(PathBuf);

impl Staging {
    fn new(runtime_dir: &Path) -> Result<Self, ProvisionError> {
        // The lock is held: what lies here was left by a process that was killed.
        let path = runtime_dir.join("staging");
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    fn wheel(&self) -> PathBuf {
        self.0.join("wheel")
    }

    fn kept(&self) -> PathBuf {
        self.0.join("kept")
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // A failure leaves the folder to the next installation, which removes it.
        fs::remove_dir_all(&self.0).ok();
    }
}

fn platforms() -> &'static [&'static str] {
    if cfg!(all(target_os = "macos", target_arch = "aarch64")) {
        &["macosx_14_0_arm64", "macosx_13_0_arm64", "macosx_13_0_universal2"]
    } else if cfg!(target_os = "macos") {
        &["macosx_14_0_x86_64", "macosx_13_0_x86_64", "macosx_13_0_universal2"]
    } else if cfg!(target_arch = "aarch64") {
        &["manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64"]
    } else if cfg!(windows) {
        &["win_amd64"]
    } else {
        &["manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64"]
    }
}

fn last_lines(text: &str) -> String {
    const MOST: usize = 8;
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(MOST)..].iter().map(|l| format!("  {l}")).collect::<Vec<_>>().join("\n")
}

fn no_library(environment: &Environment, folder: &Path) -> ProvisionError {
    ProvisionError::NoLibrary {
        version: PINNED_VERSION,
        folder: folder.to_owned(),
        cache_dir: environment.cache_dir.clone(),
    }
}
