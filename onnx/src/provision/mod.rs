//! ONNX Runtime is found on the machine, or installed once into the cache folder.
//!
//! Looked for in this order: the path in `ORT_DYLIB_PATH`, an `onnxruntime` Python package, the system's library
//! folders, an earlier installation of ours; failing those, pip installs a pinned wheel (only for its library: no
//! Python runs later). What was found is remembered with the file's size and time, so that a plan costs one
//! `stat` and never loads the library.
//!
//! Everything comes in through [`Environment`]: this module reads no environment variable and prints nothing.

mod find;
mod install;
mod remember;
mod version;

use std::path::{Path, PathBuf};

pub use self::find::default_library_dirs;
pub use self::version::Version;

/// The version that is installed where none is found.
pub const PINNED_VERSION: Version = Version { major: 1, minor: 31, patch: 1 };

/// The oldest version that has every function this crate calls (ONNX Runtime's C API 22).
pub const OLDEST_VERSION: Version = Version { major: 1, minor: 22, patch: 0 };

/// Where to look, where to install, and whom to tell.
pub struct Environment<'a> {
    /// the value of `ORT_DYLIB_PATH`, if set
    pub ort_dylib_path: Option<PathBuf>,
    /// Python commands or paths, tried in order; usually `python3`, `python`
    pub python: Vec<PathBuf>,
    /// folders to search, such as those of `LD_LIBRARY_PATH` followed by [`default_library_dirs`]
    pub library_dirs: Vec<PathBuf>,
    /// the tool's cache folder; everything lives in its `runtime` folder
    pub cache_dir: PathBuf,
    /// never use the network
    pub offline: bool,
    pub on_event: &'a (dyn Fn(&Event) + Sync),
}

/// What a user should hear about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// a library was found but is too old
    Skipped {
        path: PathBuf,
        version: Version,
    },
    /// another process is installing
    Waiting {
        lock: PathBuf,
    },
    Installing {
        version: Version,
        target: PathBuf,
    },
    Installed {
        path: PathBuf,
        version: Version,
    },
}

/// A library that can be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    pub path: PathBuf,
    pub version: Version,
    pub found_by: FoundBy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FoundBy {
    OrtDylibPath,
    PythonPackage,
    System,
    /// installed by this module, now or earlier
    Installation,
}

/// The version that a run will use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedVersion {
    pub version: Version,
    /// false if it is still to be installed
    pub present: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    #[error("ORT_DYLIB_PATH is `{path}`, which is not an ONNX Runtime library: {reason}")]
    BadDylibPath { path: PathBuf, reason: String },
    #[error("ORT_DYLIB_PATH is `{path}`, version {version}; at least {OLDEST_VERSION} is needed")]
    TooOld { path: PathBuf, version: Version },
    #[error("ONNX Runtime was not found, and may not be installed offline; {}", manual_step(.cache_dir))]
    Offline { cache_dir: PathBuf },
    #[error("ONNX Runtime was not found, and no Python with pip is there to install it (tried {tried}); {}", manual_step(.cache_dir))]
    NoPip { tried: String, cache_dir: PathBuf },
    #[error("installing onnxruntime {version} failed; {}\npip said:\n{output}", manual_step(.cache_dir))]
    PipFailed { version: Version, output: String, cache_dir: PathBuf },
    #[error("the installed onnxruntime {version} holds no library in `{folder}`; {}", manual_step(.cache_dir))]
    NoLibrary { version: Version, folder: PathBuf, cache_dir: PathBuf },
    /// The message of `fs-err` names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Returns the library to load, installing it if there is none.
pub fn resolve(environment: &Environment) -> Result<Located, ProvisionError> {
    if let Some(located) = locate(environment)? {
        return Ok(located);
    }
    let located = install::install(environment)?;
    remember::store(environment, &located);
    Ok(located)
}

/// Returns the version that [`resolve`] will give. Loads and installs nothing; after the first time costs one `stat`.
pub fn resolve_version_without_loading(environment: &Environment) -> Result<PlannedVersion, ProvisionError> {
    Ok(match locate(environment)? {
        Some(located) => PlannedVersion { version: located.version, present: true },
        None => PlannedVersion { version: PINNED_VERSION, present: false },
    })
}

/// Returns what is there already, remembered or found, and remembers it.
fn locate(environment: &Environment) -> Result<Option<Located>, ProvisionError> {
    if let Some(located) = remember::recall(environment) {
        return Ok(Some(located));
    }
    let located = find::find(environment)?;
    if let Some(located) = &located {
        remember::store(environment, located);
    }
    Ok(located)
}

impl Environment<'_> {
    /// Absolute, because Python runs in this folder.
    fn runtime_dir(&self) -> PathBuf {
        let folder = self.cache_dir.join("runtime");
        std::path::absolute(&folder).unwrap_or(folder)
    }
}

fn manual_step(cache_dir: &Path) -> String {
    format!(
        "to do it by hand: `python3 -m pip install --no-deps --target {} onnxruntime=={PINNED_VERSION}`, \
         or set ORT_DYLIB_PATH to a libonnxruntime of version {OLDEST_VERSION} or later",
        install::target(&cache_dir.join("runtime")).display()
    )
}
