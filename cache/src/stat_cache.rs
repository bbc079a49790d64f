//! Digests of user files, remembered by path and stat, so that a run that changes nothing reads nothing.
//!
//! # When an entry is trusted
//!
//! Device, inode, size, modification time and change time must all be what they were when the file was hashed. That
//! is not enough: a file modified twice within one tick of the file system's clock, and hashed in between, has the
//! old digest and the new times. So, as in git's index, an entry is *racy*, and not trusted, unless both times lie
//! safely before the moment at which hashing began; a racy file is simply hashed again. "Safely" is the tick: file
//! systems with nanosecond times are stamped from a kernel clock that advances at least every 10 ms; one whose
//! change times are whole seconds may tick every 2 s (FAT). A clock that was set back makes entries racy, not wrong.
//!
//! # File
//!
//! `MGSTAT1\n`, then frames, each written by one process in one append:
//! length of the body (`u32`), the first 16 bytes of the body's BLAKE3, the body. A body is a sequence of entries:
//! length of the path (`u32`), path, device, inode, size, mtime, ctime, time of hashing (64 bits each), digest
//! (32 bytes); all little-endian. Later entries for a path replace earlier ones. Reading stops at the first damaged
//! frame. Writers hold a lock; they append, or rewrite and rename when the file is damaged or mostly superseded.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use crate::artifact::Source;
use crate::error::{Error, Result};
use crate::layout::with_parent;
use crate::stat::FileStat;

/// What is known about one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) stat: FileStat,
    pub(crate) digest: blake3::Hash,
    /// When hashing began, in nanoseconds since 1970.
    pub(crate) hashed_at_ns: i64,
}

impl Entry {
    /// Returns true unless the file could have changed after it was hashed without its times showing it.
    pub(crate) fn is_racy(&self) -> bool {
        let coarse = self.stat.ctime_ns % 1_000_000_000 == 0;
        let tick_ns = if coarse { 2_000_000_000 } else { 20_000_000 };
        let newest = self.stat.mtime_ns.max(self.stat.ctime_ns);
        newest.saturating_add(tick_ns) >= self.hashed_at_ns
    }
}

/// The entries in memory, by path and by content.
#[derive(Debug, Default)]
pub(crate) struct StatCache {
    entries: HashMap<PathBuf, Entry>,
    /// Paths that have, or had, a content; checked against `entries` when used.
    by_digest: HashMap<blake3::Hash, Vec<PathBuf>>,
    /// Paths seen by this instance: their stat was compared, or their content hashed, in this run.
    this_run: HashSet<PathBuf>,
    unsaved: HashSet<PathBuf>,
}

impl StatCache {
    /// Reads a file of entries; the flag says whether some of it was damaged. A missing file is an empty cache.
    pub(crate) fn load(path: &Path) -> io::Result<(Self, bool)> {
        let bytes = read_or_empty(path)?;
        let parsed = parse(&bytes);
        let mut cache = Self::default();
        cache.entries.reserve(parsed.entries.len());
        cache.by_digest.reserve(parsed.entries.len());
        for (path, entry) in parsed.entries {
            cache.put(path, entry);
        }
        Ok((cache, parsed.damaged))
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns the digest of a file in the given state, if it is known beyond doubt.
    pub(crate) fn trusted(&mut self, path: &Path, stat: &FileStat) -> Option<blake3::Hash> {
        let entry = self.entries.get(path)?;
        if entry.stat != *stat || entry.is_racy() {
            return None;
        }
        if !self.this_run.contains(path) {
            self.this_run.insert(path.to_owned());
        }
        Some(entry.digest)
    }

    /// Returns what is remembered of a path, whether or not it still holds.
    pub(crate) fn last(&self, path: &Path) -> Option<Entry> {
        self.entries.get(path).copied()
    }

    /// Remembers a file that has just been hashed.
    pub(crate) fn insert(&mut self, path: PathBuf, entry: Entry) {
        self.this_run.insert(path.clone());
        self.unsaved.insert(path.clone());
        self.put(path, entry);
    }

    /// Returns the files that had the content when last seen, with the state they had then.
    ///
    /// Racy entries count only if they were made in this run.
    pub(crate) fn candidates(&self, source: &Source) -> Vec<(PathBuf, FileStat)> {
        let paths = self.by_digest.get(&source.digest).map_or(&[][..], Vec::as_slice);
        paths
            .iter()
            .filter_map(|path| {
                let entry = self.entries.get(path)?;
                let same = entry.digest == source.digest && entry.stat.size == source.size;
                let sure = self.this_run.contains(path) || !entry.is_racy();
                (same && sure).then(|| (path.clone(), entry.stat))
            })
            .collect()
    }

    /// Returns every path that was ever seen with the content, whatever is there now.
    pub(crate) fn known_paths(&self, digest: &blake3::Hash) -> Vec<PathBuf> {
        self.by_digest.get(digest).cloned().unwrap_or_default()
    }

    /// Hands out what has not been written yet, and forgets that it has not.
    pub(crate) fn take_unsaved(&mut self) -> Vec<(PathBuf, Entry)> {
        let paths = std::mem::take(&mut self.unsaved);
        let mut entries: Vec<_> = paths
            .into_iter()
            .filter_map(|path| self.entries.get(&path).map(|entry| (path, *entry)))
            .collect();
        entries.sort_by(|(a, _), (b, _)| a.cmp(b));
        entries
    }

    /// Takes back entries whose writing failed.
    pub(crate) fn keep_unsaved(&mut self, entries: Vec<(PathBuf, Entry)>) {
        self.unsaved.extend(entries.into_iter().map(|(path, _)| path));
    }

    fn put(&mut self, path: PathBuf, entry: Entry) {
        if self.entries.get(&path).is_none_or(|old| old.digest != entry.digest) {
            self.by_digest.entry(entry.digest).or_default().push(path.clone());
        }
        self.entries.insert(path, entry);
    }
}

/// Adds entries to a file of entries. The caller holds the lock.
pub(crate) fn append(path: &Path, entries: &[(PathBuf, Entry)]) -> Result<()> {
    let existing = read_or_empty(path).map_err(Error::at(path))?;
    let parsed = parse(&existing);
    let n_written = parsed.entries.len();
    let mut live: HashMap<&Path, &Entry> =
        parsed.entries.iter().map(|(path, entry)| (&**path, entry)).collect();
    if !existing.is_empty()
        && !parsed.damaged
        && n_written <= 2 * live.len() + 256
        && n_written <= MAX_ENTRIES
    {
        let mut file = fs_err::OpenOptions::new().append(true).open(path).map_err(Error::at(path))?;
        return file
            .write_all(&frame(entries.iter().map(|(path, entry)| (&**path, entry))))
            .map_err(Error::at(path));
    }
    live.extend(entries.iter().map(|(path, entry)| (&**path, entry)));
    let mut live: Vec<(&Path, &Entry)> = live.into_iter().collect();
    live.sort_by_key(|(path, entry)| (std::cmp::Reverse(entry.hashed_at_ns), *path));
    live.truncate(MAX_ENTRIES / 2);
    let mut bytes = MAGIC.to_vec();
    bytes.extend(frame(live.into_iter()));
    let new = path.with_extension("new");
    with_parent(&new, || fs_err::write(&new, &bytes))?;
    fs_err::rename(&new, path).map_err(Error::at(path))
}

const MAGIC: &[u8; 8] = b"MGSTAT1\n";
/// Length of a frame's header and of an entry without its path.
const FRAME_HEADER: usize = 4 + 16;
const ENTRY_FIXED: usize = 6 * 8 + 32;
/// A file with more entries than this is cut to the newest half of it.
const MAX_ENTRIES: usize = 200_000;

struct Parsed {
    entries: Vec<(PathBuf, Entry)>,
    damaged: bool,
}

fn read_or_empty(path: &Path) -> io::Result<Vec<u8>> {
    match fs_err::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other,
    }
}

fn parse(bytes: &[u8]) -> Parsed {
    let mut parsed = Parsed { entries: Vec::new(), damaged: false };
    let Some(mut rest) = bytes.strip_prefix(MAGIC) else {
        parsed.damaged = !bytes.is_empty();
        return parsed;
    };
    while !rest.is_empty() {
        let Some(entries) = parse_frame(&mut rest) else {
            parsed.damaged = true;
            break;
        };
        parsed.entries.extend(entries);
    }
    parsed
}

fn parse_frame(rest: &mut &[u8]) -> Option<Vec<(PathBuf, Entry)>> {
    let n_bytes = u32::from_le_bytes(take(rest)?) as usize;
    let checksum: [u8; 16] = take(rest)?;
    let mut body = rest.split_off(..n_bytes)?;
    if blake3::hash(body).as_bytes()[..16] != checksum {
        return None;
    }
    let mut entries = Vec::with_capacity(body.len() / (ENTRY_FIXED + 40));
    while !body.is_empty() {
        let n_path = u32::from_le_bytes(take(&mut body)?) as usize;
        let path = PathBuf::from(OsStr::from_bytes(body.split_off(..n_path)?));
        let stat = FileStat {
            device: u64::from_le_bytes(take(&mut body)?),
            inode: u64::from_le_bytes(take(&mut body)?),
            size: u64::from_le_bytes(take(&mut body)?),
            mtime_ns: i64::from_le_bytes(take(&mut body)?),
            ctime_ns: i64::from_le_bytes(take(&mut body)?),
        };
        let hashed_at_ns = i64::from_le_bytes(take(&mut body)?);
        let digest = take::<32>(&mut body)?.into();
        entries.push((path, Entry { stat, digest, hashed_at_ns }));
    }
    Some(entries)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

fn frame<'a>(entries: impl Iterator<Item = (&'a Path, &'a Entry)>) -> Vec<u8> {
    let mut bytes = vec![0; FRAME_HEADER];
    for (path, entry) in entries {
        let path = path.as_os_str().as_bytes();
        let n_path = u32::try_from(path.len()).expect("paths are shorter than 4 GiB");
        bytes.extend(n_path.to_le_bytes());
        bytes.extend(path);
        bytes.extend(entry.stat.device.to_le_bytes());
        bytes.extend(entry.stat.inode.to_le_bytes());
        bytes.extend(entry.stat.size.to_le_bytes());
        bytes.extend(entry.stat.mtime_ns.to_le_bytes());
        bytes.extend(entry.stat.ctime_ns.to_le_bytes());
        bytes.extend(entry.hashed_at_ns.to_le_bytes());
        bytes.extend(entry.digest.as_bytes());
    }
    let n_body = u32::try_from(bytes.len() - FRAME_HEADER).expect("MAX_ENTRIES entries are less than 4 GiB");
    let checksum = blake3::hash(&bytes[FRAME_HEADER..]);
    bytes[..4].copy_from_slice(&n_body.to_le_bytes());
    bytes[4..FRAME_HEADER].copy_from_slice(&checksum.as_bytes()[..16]);
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(seed: i64) -> Entry {
        let stat = FileStat {
            device: 1,
            inode: seed as u64,
            size: 3,
            mtime_ns: seed * 7 + 1,
            ctime_ns: seed * 7 + 2,
        };
        Entry { stat, digest: blake3::hash(&seed.to_le_bytes()), hashed_at_ns: i64::MAX }
    }

    fn named(range: std::ops::Range<i64>) -> Vec<(PathBuf, Entry)> {
        range.map(|seed| (PathBuf::from(format!("/data/{seed}")), entry(seed))).collect()
    }

    fn entries_of(path: &Path) -> Vec<(PathBuf, Entry)> {
        let (cache, _) = StatCache::load(path).unwrap();
        let mut entries: Vec<_> = cache.entries.into_iter().collect();
        entries.sort_by_key(|(_, entry)| entry.stat.inode);
        entries
    }

    #[test]
    fn entries_survive_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stat-v1/host");
        assert_eq!(entries_of(&path), []);
        append(&path, &named(0..3)).unwrap();
        append(&path, &named(3..5)).unwrap();
        assert_eq!(entries_of(&path), named(0..5));
        let (_, damaged) = StatCache::load(&path).unwrap();
        assert!(!damaged);
    }

    #[test]
    fn damaged_tail_loses_only_itself_and_is_repaired() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("host");
        append(&path, &named(0..3)).unwrap();
        let n_good = fs_err::metadata(&path).unwrap().len();
        append(&path, &named(3..5)).unwrap();
        let whole = fs_err::read(&path).unwrap();
        for n_kept in [n_good + 1, n_good + 10, whole.len() as u64 - 1] {
            fs_err::write(&path, &whole[..n_kept as usize]).unwrap();
            assert!(StatCache::load(&path).unwrap().1, "cut to {n_kept} bytes");
            assert_eq!(entries_of(&path), named(0..3));
            append(&path, &named(5..6)).unwrap();
            let mut expected = named(0..3);
            expected.extend(named(5..6));
            assert_eq!(entries_of(&path), expected);
            assert!(!StatCache::load(&path).unwrap().1);
        }
    }

    #[test]
    fn superseded_entries_are_dropped_in_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("host");
        for _ in 0..600 {
            append(&path, &named(7..8)).unwrap();
        }
        assert_eq!(entries_of(&path), named(7..8));
        assert!(parse(&fs_err::read(&path).unwrap()).entries.len() < 300);
    }

    #[test]
    fn entry_hashed_within_the_tick_of_a_change_is_racy() {
        let stat = |mtime_ns, ctime_ns| FileStat { device: 1, inode: 1, size: 1, mtime_ns, ctime_ns };
        let racy = |stat, hashed_at_ns| Entry { stat, digest: blake3::hash(b""), hashed_at_ns }.is_racy();
        let second = 1_000_000_000;
        let fine = stat(5 * second + 1, 5 * second + 1);
        assert!(racy(fine, 5 * second), "hashed before the change");
        assert!(racy(fine, 5 * second + 1), "hashed in the same nanosecond");
        assert!(racy(fine, 5 * second + 19_000_000), "hashed within a tick of the kernel's clock");
        assert!(!racy(fine, 5 * second + 30_000_000));
        let coarse = stat(5 * second, 5 * second);
        assert!(racy(coarse, 6 * second + 900_000_000), "a change time of whole seconds");
        assert!(!racy(coarse, 8 * second));
        assert!(racy(stat(i64::MAX, 1), 8 * second), "a modification time in the future");
    }

    #[test]
    fn racy_entry_is_not_trusted() {
        let mut cache = StatCache::default();
        let mut entry = entry(1);
        let path = Path::new("/data/1");
        cache.insert(path.to_owned(), entry);
        assert_eq!(cache.trusted(path, &entry.stat), Some(entry.digest));
        entry.hashed_at_ns = entry.stat.ctime_ns;
        cache.insert(path.to_owned(), entry);
        assert_eq!(cache.trusted(path, &entry.stat), None);
        let source = Source { digest: entry.digest, size: 3 };
        assert_eq!(cache.candidates(&source).len(), 1, "hashed in this run");
        cache.this_run.clear();
        assert!(cache.candidates(&source).is_empty());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            parse(&bytes);
            let mut with_magic = MAGIC.to_vec();
            with_magic.extend(&bytes);
            parse(&with_magic);
            // A frame whose checksum is right but whose body is anything.
            let mut framed = MAGIC.to_vec();
            framed.extend((bytes.len() as u32).to_le_bytes());
            framed.extend(&blake3::hash(&bytes).as_bytes()[..16]);
            framed.extend(&bytes);
            parse(&framed);
        }

        #[test]
        fn any_flipped_bit_is_noticed(bit in 0_usize..8 * 300) {
            let mut bytes = MAGIC.to_vec();
            let entries = named(0..3);
            bytes.extend(frame(entries.iter().map(|(path, entry)| (&**path, entry))));
            let bit = bit % (8 * bytes.len());
            bytes[bit / 8] ^= 1 << (bit % 8);
            let parsed = parse(&bytes);
            prop_assert!(parsed.damaged);
            prop_assert!(parsed.entries.is_empty());
        }
    }
}
