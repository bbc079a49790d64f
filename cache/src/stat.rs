//! What the file system says about a file, reduced to what tells one state of it from another.
//!
//! The only module that depends on Unix metadata.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Identity and times of a file; two equal ones mean "not changed", up to the rule in `stat_cache`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileStat {
    /// Number of the device that holds the file.
    pub device: u64,
    /// Number of the file on its device.
    pub inode: u64,
    /// Length in bytes.
    pub size: u64,
    /// Last change of the content, in nanoseconds since 1970; users can set it.
    pub mtime_ns: i64,
    /// Last change of content or metadata, in nanoseconds since 1970; users cannot set it.
    pub ctime_ns: i64,
}

impl FileStat {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        let nanoseconds =
            |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            mtime_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            ctime_ns: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    pub(crate) fn of_file(file: &File) -> io::Result<Self> {
        file.metadata().map(|metadata| Self::of(&metadata))
    }

    pub(crate) fn of_path(path: &Path) -> io::Result<Self> {
        fs_err::metadata(path).map(|metadata| Self::of(&metadata))
    }

    pub(crate) fn is_same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// Names the fields in which two states differ.
    pub(crate) fn differences(&self, other: &Self) -> String {
        let fields = [
            (self.device != other.device, "device"),
            (self.inode != other.inode, "inode"),
            (self.size != other.size, "size"),
            (self.mtime_ns != other.mtime_ns, "modification time"),
            (self.ctime_ns != other.ctime_ns, "change time"),
        ];
        let names: Vec<&str> = fields.iter().filter(|(differs, _)| *differs).map(|(_, name)| *name).collect();
        format!("{} differs", names.join(", "))
    }
}

/// Nanoseconds since 1970, negative before; saturates around the years 1677 and 2262.
pub(crate) fn unix_nanoseconds(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |ns| -ns),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_convert_on_both_sides_of_1970() {
        assert_eq!(unix_nanoseconds(UNIX_EPOCH), 0);
        assert_eq!(unix_nanoseconds(UNIX_EPOCH + Duration::from_millis(1500)), 1_500_000_000);
        assert_eq!(unix_nanoseconds(UNIX_EPOCH - Duration::from_nanos(3)), -3);
        assert_eq!(unix_nanoseconds(UNIX_EPOCH + Duration::from_secs(1 << 40)), i64::MAX);
    }

    #[test]
    fn differences_are_named() {
        let one = FileStat { device: 1, inode: 2, size: 3, mtime_ns: 4, ctime_ns: 5 };
        let two = FileStat { size: 4, ctime_ns: 6, ..one };
        assert_eq!(one.differences(&two), "size, change time differs");
    }
}
