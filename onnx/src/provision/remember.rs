//! What was found last time, valid as long as the file is the same and the request too.
//!
//! `<cache>/runtime/resolved.json`. A record that cannot be read or does not fit is no record; one that cannot be
//! written costs a search next time, nothing else.

use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use fs_err as fs;
use serde::{Deserialize, Serialize};

use super::{Environment, FoundBy, Located, Version};

#[derive(Serialize, Deserialize)]
struct Record {
    path: PathBuf,
    version: Version,
    found_by: FoundBy,
    size_bytes: u64,
    modified_ns: u64,
    ort_dylib_path: Option<PathBuf>,
}

pub(super) fn recall(environment: &Environment) -> Option<Located> {
    let text = fs::read(file(environment)).ok()?;
    let record: Record = serde_json::from_slice(&text).ok()?;
    let same = record.ort_dylib_path == environment.ort_dylib_path
        && stat(&record.path) == Some((record.size_bytes, record.modified_ns));
    same.then_some(Located { path: record.path, version: record.version, found_by: record.found_by })
}

pub(super) fn store(environment: &Environment, located: &Located) {
    let Some((size_bytes, modified_ns)) = stat(&located.path) else { return };
    let record = Record {
        path: located.path.clone(),
        version: located.version,
        found_by: located.found_by,
        size_bytes,
        modified_ns,
        ort_dylib_path: environment.ort_dylib_path.clone(),
    };
    let Ok(text) = serde_json::to_vec_pretty(&record) else { return };
    let file = file(environment);
    // Written beside and renamed: a reader sees the old record or the new one.
    let staged = file.with_extension(format!("{}.tmp", std::process::id()));
    let written = fs::create_dir_all(environment.runtime_dir())
        .and_then(|()| fs::write(&staged, text))
        .and_then(|()| fs::rename(&staged, &file));
    if written.is_err() {
        // Nothing to tell: the next call searches again.
        fs::remove_file(&staged).ok();
    }
}

fn file(environment: &Environment) -> PathBuf {
    environment.runtime_dir().join("resolved.json")
}

fn stat(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some((metadata.len(), modified.as_nanos() as u64))
}
