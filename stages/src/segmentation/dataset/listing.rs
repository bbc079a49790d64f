//! What formats share about folders: listings in an order that does not depend on the file system.

use super::super::SegmentationError;
use std::path::{Path, PathBuf};

/// Extensions of images that can be decoded.
const IMAGES: &[&str] = &["jpg", "jpeg", "png"];

/// A file or folder by its name without the extension.
pub(super) struct Entry {
    pub(super) stem: String,
    /// In lower case; empty if there is none.
    pub(super) extension: String,
    pub(super) path: PathBuf,
}

impl Entry {
    pub(super) fn is_image(&self) -> bool {
        IMAGES.contains(&self.extension.as_str())
    }
}

/// Lists a folder by name (bytes). Names that start with a dot, or are not Unicode, are left out.
pub(super) fn entries(folder: &Path) -> Result<Vec<Entry>, SegmentationError> {
    let mut entries = Vec::new();
    for entry in fs_err::read_dir(folder)? {
        let path = entry?.path();
        let text = |part: Option<&std::ffi::OsStr>| part.and_then(|part| part.to_str()).map(str::to_owned);
        let Some(stem) = text(path.file_stem()).filter(|stem| !stem.starts_with('.')) else { continue };
        let extension = text(path.extension()).unwrap_or_default().to_ascii_lowercase();
        entries.push(Entry { stem, extension, path });
    }
    entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(entries)
}

/// Lists the names of the folders in a folder.
pub(super) fn folders(folder: &Path) -> Result<Vec<String>, SegmentationError> {
    let names = entries(folder)?.into_iter().filter(|entry| entry.path.is_dir());
    Ok(names.filter_map(|entry| entry.path.file_name()?.to_str().map(str::to_owned)).collect())
}

/// Reads a list of names, one a line; refuses what would lead out of the folder.
pub(super) fn names(list: &Path) -> Result<Vec<String>, SegmentationError> {
    let text = fs_err::read_to_string(list)?;
    let names = text.lines().map(str::trim).filter(|line| !line.is_empty());
    names
        .map(|name| {
            let plain = Path::new(name).components().count() == 1
                && !name.contains(['/', '\\', ':'])
                && name != ".."
                && name != ".";
            plain.then(|| name.to_owned()).ok_or_else(|| SegmentationError::Annotation {
                path: list.to_owned(),
                reason: format!("`{name}` is not the name of a sequence"),
            })
        })
        .collect()
}
