//! Libraries that are on the machine already.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fs_err as fs;
use serde::Deserialize;

use super::{Environment, Event, FoundBy, Located, OLDEST_VERSION, ProvisionError, Version, install};

pub(super) fn find(environment: &Environment) -> Result<Option<Located>, ProvisionError> {
    if let Some(path) = environment.ort_dylib_path.as_deref().filter(|p| !p.as_os_str().is_empty()) {
        return by_path(path).map(Some);
    }
    let accept = |path: PathBuf, found_by: FoundBy| {
        let version = Version::of_library(&path).ok()??;
        if version < OLDEST_VERSION {
            (environment.on_event)(&Event::Skipped { path, version });
            return None;
        }
        Some(Located { path, version, found_by })
    };
    for folder in python_packages(environment) {
        if let Some(located) = newest_library(&folder).and_then(|p| accept(p, FoundBy::PythonPackage)) {
            return Ok(Some(located));
        }
    }
    for folder in &environment.library_dirs {
        if let Some(located) = newest_library(folder).and_then(|p| accept(p, FoundBy::System)) {
            return Ok(Some(located));
        }
    }
    Ok(install::installed(&environment.runtime_dir()).and_then(|p| accept(p, FoundBy::Installation)))
}

/// Returns the folders in which the dynamic loader of this platform looks without being told to.
pub fn default_library_dirs() -> Vec<PathBuf> {
    let multiarch = format!("{}-linux-gnu", std::env::consts::ARCH);
    let dirs: Vec<String> = if cfg!(target_os = "macos") {
        ["/opt/homebrew/lib", "/usr/local/lib", "/usr/lib"].map(str::to_owned).to_vec()
    } else {
        vec![
            "/usr/local/lib".to_owned(),
            "/usr/local/lib64".to_owned(),
            format!("/usr/local/lib/{multiarch}"),
            format!("/usr/lib/{multiarch}"),
            format!("/lib/{multiarch}"),
            "/usr/lib64".to_owned(),
            "/lib64".to_owned(),
            "/usr/lib".to_owned(),
            "/lib".to_owned(),
        ]
    };
    dirs.into_iter().map(PathBuf::from).collect()
}

/// Returns the newest ONNX Runtime library in a folder.
pub(super) fn newest_library(folder: &Path) -> Option<PathBuf> {
    let mut found: Vec<(Option<Version>, PathBuf)> = fs::read_dir(folder)
        .ok()?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.file_name().and_then(|n| n.to_str()).is_some_and(is_library_name))
        .filter(|path| path.is_file())
        .map(|path| (Version::of_library(&path).ok().flatten(), path))
        .collect();
    found.sort();
    found.pop().map(|(_, path)| path)
}

fn is_library_name(name: &str) -> bool {
    if cfg!(target_os = "macos") {
        name.strip_prefix("libonnxruntime.").is_some_and(|rest| rest.ends_with("dylib"))
    } else if cfg!(windows) {
        name == "onnxruntime.dll"
    } else {
        name == "libonnxruntime.so" || name.starts_with("libonnxruntime.so.")
    }
}

/// `ORT_DYLIB_PATH` is an order: what it names is used, or refused.
fn by_path(path: &Path) -> Result<Located, ProvisionError> {
    let bad = |reason: String| ProvisionError::BadDylibPath { path: path.to_owned(), reason };
    let metadata = fs::metadata(path).map_err(|e| bad(e.to_string()))?;
    let library = if metadata.is_dir() {
        newest_library(path).ok_or_else(|| bad("the folder holds no libonnxruntime".to_owned()))?
    } else {
        path.to_owned()
    };
    let version = Version::of_library(&library)?.ok_or_else(|| bad("it holds no version".to_owned()))?;
    if version < OLDEST_VERSION {
        return Err(ProvisionError::TooOld { path: library, version });
    }
    let path = fs::canonicalize(&library)?;
    Ok(Located { path, version, found_by: FoundBy::OrtDylibPath })
}

/// Asks each Python where its `onnxruntime` package lies, without importing that.
fn python_packages(environment: &Environment) -> Vec<PathBuf> {
    const SCRIPT: &str = "\
import importlib.util, json
spec = importlib.util.find_spec('onnxruntime')
print(json.dumps({'folders': list(spec.submodule_search_locations or []) if spec else []}))";
    #[derive(Deserialize)]
    struct Answer {
        folders: Vec<PathBuf>,
    }
    let mut folders = Vec::new();
    for python in &environment.python {
        let Ok(output) =
            python_command(environment, python).args(["-c", SCRIPT]).stderr(Stdio::null()).output()
        else {
            continue;
        };
        if let Ok(answer) = serde_json::from_slice::<Answer>(&output.stdout) {
            folders.extend(answer.folders.into_iter().map(|f| f.join("capi")));
        }
    }
    folders
}

/// A Python that takes no module from the folder that the user happens to be in.
pub(super) fn python_command(environment: &Environment, python: &Path) -> Command {
    // A path relative to the user's folder stays that; a bare name is looked up in PATH.
    let is_path = python.components().count() > 1;
    let python =
        if is_path { std::path::absolute(python).ok() } else { None }.unwrap_or_else(|| python.to_owned());
    let mut command = Command::new(python);
    command.stdin(Stdio::null());
    // `python -c` and `-m` put the working folder first in the search path for modules.
    let folder = environment.runtime_dir();
    if fs::create_dir_all(&folder).is_ok() {
        command.current_dir(folder);
    } else {
        command.current_dir("/");
    }
    command
}
