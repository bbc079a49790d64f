//! Reading at an offset, without a shared position and without mapping.
//!
//! `pread` into the caller's buffer rather than `mmap`: a file that shrinks is an error here, not a signal that kills the
//! process, and what is read is private memory that the caller has bounded. Unix only.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use fs_err::File;
use fs_err::os::unix::fs::FileExt;

use crate::error::{Error, Result};

/// Something with a size that can be read at any offset from several threads.
pub trait ReadAt: Send + Sync {
    /// Number of bytes.
    fn size(&self) -> u64;

    /// Fills `buffer` from `offset` on, or fails.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Fails when the content may have changed since this was opened.
    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }

    /// What to call it in messages.
    fn name(&self) -> String;
}

/// Reads and, on failure, says what was asked of which file.
pub(crate) fn read_exact(file: &dyn ReadAt, buffer: &mut [u8], offset: u64) -> Result<()> {
    file.read_exact_at(buffer, offset).map_err(|source| Error::Read {
        file: file.name(),
        offset,
        length: buffer.len() as u64,
        file_size: file.size(),
        source,
    })
}

/// A file on disk.
pub struct FileReader {
    file: File,
    opened: Stamp,
    watch: Watch,
}

/// What of a file's status must stay the same.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Watch {
    /// Size and both times.
    Everything,
    /// Size only: links to a stored object come and go, which changes its times.
    Size,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileReader {
    /// Opens a file that belongs to the user: any change of it is noticed by [`ReadAt::check_unchanged`].
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::open_watching(path, Watch::Everything)
    }

    /// Opens an immutable stored object: only its size is watched.
    pub fn open_immutable(path: &Path) -> io::Result<Self> {
        Self::open_watching(path, Watch::Size)
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }

    fn open_watching(path: &Path, watch: Watch) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            let message = format!("`{}` is not a regular file", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Ok(Self { file, opened: Stamp::of(&metadata), watch })
    }
}

impl ReadAt for FileReader {
    fn size(&self) -> u64 {
        self.opened.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn check_unchanged(&self) -> Result<()> {
        let now = Stamp::of(&self.file.metadata()?);
        let change = if now.size != self.opened.size {
            format!("it had {} bytes and now has {}", self.opened.size, now.size)
        } else if self.watch == Watch::Everything && now != self.opened {
            "it was written to or replaced".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::SourceChanged { file: self.name(), change })
    }

    fn name(&self) -> String {
        self.path().display().to_string()
    }
}

impl fmt::Debug for FileReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FileReader").field(&self.path()).finish()
    }
}

impl Stamp {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// Bytes in memory.
impl ReadAt for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(buffer.len());
        let bytes = self.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }

    fn name(&self) -> String {
        format!("{} bytes in memory", self.len())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn notices_a_file_that_changed_under_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs_err::write(&path, b"0123456789").unwrap();
        let reader = FileReader::open(&path).unwrap();
        let mut two = [0; 2];
        read_exact(&reader, &mut two, 8).unwrap();
        assert_eq!(&two, b"89");
        reader.check_unchanged().unwrap();

        fs_err::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"x").unwrap();
        let message = reader.check_unchanged().unwrap_err().to_string();
        assert!(message.ends_with("it had 10 bytes and now has 11"), "{message}");
    }

    #[test]
    fn a_file_that_shrank_is_an_error_with_both_sizes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs_err::write(&path, b"0123456789").unwrap();
        let reader = FileReader::open(&path).unwrap();
        let message = read_exact(&reader, &mut [0; 4], 8).unwrap_err().to_string();
        assert!(message.starts_with("cannot read 4 bytes at offset 8 of `"), "{message}");
        assert!(message.ends_with("which has only 10"), "{message}");
    }

    #[test]
    fn new_links_to_a_stored_object_are_not_a_change() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs_err::write(&path, b"0123456789").unwrap();
        let reader = FileReader::open_immutable(&path).unwrap();
        fs_err::hard_link(&path, folder.path().join("b")).unwrap();
        reader.check_unchanged().unwrap();
    }

    #[test]
    fn a_folder_is_not_a_file() {
        let folder = tempfile::tempdir().unwrap();
        assert!(FileReader::open(folder.path()).is_err());
    }
}
