//! Bringing blobs out of the store.
//!
//! The default is a copy-on-write clone where the file system can make one, a copy elsewhere: the user may do with
//! the file what they like. A hard link costs nothing but shares its bytes with the store, so whoever makes it
//! writable and edits it damages the store (which notices and recomputes); it is made only when asked for.

use std::io;
use std::path::Path;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::layout::with_parent;
use crate::objects::BlobFile;
use crate::store::Store;

/// What the caller allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportMode {
    /// A file of the user's own: clone, else copy.
    Own,
    /// A read-only file that may share its bytes with the store: clone, else hard link, else copy.
    Shared,
}

/// How a blob was exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exported {
    /// A copy-on-write clone.
    Reflink,
    /// A second name for the store's own, read-only file.
    HardLink,
    /// A full copy.
    Copy,
}

impl Store {
    /// Writes a verified blob to `dest`, replacing a file there in one step, and returns how.
    pub fn export_blob(
        &self,
        digest: &blake3::Hash,
        size: u64,
        dest: &Path,
        mode: ExportMode,
    ) -> Result<Exported> {
        let blob = self.open_blob(digest, size)?;
        let folder = dest.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut how = Exported::Copy;
        // Beside the destination, so that it appears complete or not at all.
        let staged = with_parent(dest, || {
            tempfile::Builder::new().prefix(".export-").make_in(folder, |path| {
                how = place(&blob, path, mode)?;
                Ok(())
            })
        });
        let staged = staged?.into_temp_path();
        let staged_path = staged.to_path_buf();
        staged.persist(dest).map_err(|error| Error::at(dest)(error.error))?;
        // Renaming one hard link onto another of the same file does nothing and leaves both.
        let _ = std::fs::remove_file(staged_path);
        Ok(how)
    }
}

/// Makes `path`, which must not exist, from the blob.
fn place(blob: &BlobFile, path: &Path, mode: ExportMode) -> io::Result<Exported> {
    if mode == ExportMode::Shared && !can_clone(blob, path)? && std::fs::hard_link(&blob.path, path).is_ok() {
        return Ok(Exported::HardLink);
    }
    let mut file = fs_err::OpenOptions::new().write(true).create_new(true).open(path)?;
    let made = if reflink_copy::reflink_file(&blob.file, file.file()).is_ok() {
        Ok(Exported::Reflink)
    } else {
        // Opened anew: the position of an open file is shared.
        fs_err::File::open(&blob.path)
            .and_then(|mut source| io::copy(source.file_mut(), file.file_mut()))
            .map_err(|error| {
                io::Error::new(error.kind(), format!("cannot write `{}`: {error}", path.display()))
            })
            .map(|_| Exported::Copy)
    };
    if made.is_err() {
        let _ = std::fs::remove_file(path);
    }
    made
}

/// Tries a clone at `path` and removes it again.
fn can_clone(blob: &BlobFile, path: &Path) -> io::Result<bool> {
    let file = fs_err::OpenOptions::new().write(true).create_new(true).open(path)?;
    let cloned = reflink_copy::reflink_file(&blob.file, file.file()).is_ok();
    fs_err::remove_file(path)?;
    Ok(cloned)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::store::tests::{TestStore, files_below};

    #[test]
    fn exported_files_belong_to_the_user() {
        let test = TestStore::new();
        let mut writer = test.store.staging().unwrap().writer("b").unwrap();
        writer.write_all(b"content").unwrap();
        let blob = writer.finish().unwrap();
        let dest = test.folder.path().join("out/model.bin");
        let how = test.store.export_blob(&blob.digest, blob.size, &dest, ExportMode::Own).unwrap();
        assert!(matches!(how, Exported::Reflink | Exported::Copy));
        assert!(!fs_err::metadata(&dest).unwrap().permissions().readonly());
        fs_err::write(&dest, "edited").unwrap();
        // Again, over the edited file; the store is unharmed.
        test.store.export_blob(&blob.digest, blob.size, &dest, ExportMode::Own).unwrap();
        assert_eq!(fs_err::read(&dest).unwrap(), b"content");
        assert_eq!(files_below(dest.parent().unwrap()), [dest]);
    }

    fn is_export(path: &Path) -> bool {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".export-"))
    }

    #[test]
    fn hard_links_only_when_asked_for() {
        let test = TestStore::new();
        let blob = test.store.staging().unwrap().writer("b").unwrap().finish().unwrap();
        let dest = test.folder.path().join("shared");
        for _ in 0..2 {
            let how = test.store.export_blob(&blob.digest, blob.size, &dest, ExportMode::Shared).unwrap();
            assert!(matches!(how, Exported::Reflink | Exported::HardLink));
            assert_eq!(fs_err::metadata(&dest).unwrap().permissions().readonly(), how == Exported::HardLink);
            assert_eq!(files_below(test.folder.path()).iter().filter(|path| is_export(path)).count(), 0);
        }
    }

    #[test]
    fn destination_survives_a_missing_blob() {
        let test = TestStore::new();
        let dest = test.folder.path().join("kept");
        fs_err::write(&dest, "kept").unwrap();
        let missing = test.store.export_blob(&blake3::hash(b"nothing"), 7, &dest, ExportMode::Own);
        assert!(matches!(missing, Err(Error::Missing { .. })));
        assert_eq!(fs_err::read(&dest).unwrap(), b"kept");
    }
}
