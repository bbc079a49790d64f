//! The directory of a zip archive: which members it has and where their bytes lie.
//!
//! PyTorch and NumPy store members uncompressed, so that a member is a region of the file; nothing is ever extracted. Archives
//! that two readers could understand differently are refused: members that overlap, names that appear twice or that point out of
//! the archive, local headers that contradict the directory. Zip64 is understood. Checksums are not looked at:
//! files are identified by their digest.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use crate::error::Result as CrateResult;
use crate::formats::window::{Failure, Window};
use crate::read_at::ReadAt;

/// Signature with which archives begin.
pub(super) const SIGNATURE: [u8; 4] = *b"PK\x03\x04";

/// Largest directory that is read, and most members.
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;
const MAX_MEMBERS: usize = 1 << 17;

const END_LENGTH: usize = 22;
const END64_LENGTH: usize = 56;
const LOCATOR_LENGTH: usize = 20;
const CENTRAL_LENGTH: usize = 46;
const LOCAL_LENGTH: usize = 30;

/// What is wrong with an archive.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ZipProblem {
    #[error("the archive has no directory at its end: it is truncated or not a zip archive")]
    NoDirectory,
    #[error("its directory is damaged: {0}")]
    Damaged(&'static str),
    #[error("its directory has {bytes} bytes, the limit is {MAX_DIRECTORY_BYTES}")]
    DirectoryTooLarge { bytes: u64 },
    #[error("it has more than {MAX_MEMBERS} members")]
    TooManyMembers,
    #[error("member `{0}` has a name that points out of the archive")]
    Outside(String),
    #[error("member `{0}` is listed twice")]
    Duplicate(String),
    #[error("member `{0}` is encrypted")]
    Encrypted(String),
    #[error("member `{member}` is compressed (method {method}); only stored members can be read in place")]
    Compressed { member: String, method: u16 },
    #[error("member `{0}` does not begin where the directory says")]
    Contradiction(String),
    #[error("member `{member}` overlaps member `{other}`")]
    Overlap { member: String, other: String },
    #[error("member `{member}` ends at byte {end}, after the data of the archive, which ends at {limit}")]
    Beyond { member: String, end: u64, limit: u64 },
}

/// Returns where in the file the bytes of every member lie that is stored as it is, by name.
pub fn members(file: &dyn ReadAt) -> CrateResult<BTreeMap<String, Range<u64>>> {
    let archive = Window::whole(file);
    let directory = Directory::read(archive).map_err(|failure| failure.of_file(file))?;
    let stored = directory.names().filter_map(|name| {
        let window = directory.member(archive, name).ok()??;
        Some((name.to_owned(), window.start..window.start + window.length))
    });
    Ok(stored.collect())
}

/// Members by name.
#[derive(Debug)]
pub(super) struct Directory {
    members: HashMap<String, Member>,
}

/// Where a member lies in the archive's window.
#[derive(Clone, Copy, Debug)]
struct Member {
    data: u64,
    stored: u64,
    size: u64,
    method: u16,
    encrypted: bool,
}

impl Directory {
    /// Reads and checks the directory.
    pub(super) fn read(archive: Window<'_>) -> Result<Self, Failure> {
        let (offset, length, end) = find(archive)?;
        if length > MAX_DIRECTORY_BYTES {
            return Err(ZipProblem::DirectoryTooLarge { bytes: length }.into());
        }
        if offset.checked_add(length) != Some(end) {
            return Err(ZipProblem::Damaged("it is not where the end of the archive says").into());
        }
        let window = archive.part(offset, length).ok_or(ZipProblem::Damaged("it lies outside the file"))?;
        let listed = parse(&window.bytes()?)?;
        let mut members = HashMap::with_capacity(listed.len());
        let mut extents = Vec::with_capacity(listed.len());
        for (name, header, mut member) in listed {
            member.data = locate(archive, &name, header, &member)?;
            let end = member.data.saturating_add(member.stored);
            if end > offset {
                return Err(ZipProblem::Beyond { member: name, end, limit: offset }.into());
            }
            extents.push((header, end, name.clone()));
            if members.insert(name.clone(), member).is_some() {
                return Err(ZipProblem::Duplicate(name).into());
            }
        }
        extents.sort_unstable();
        if let Some(pair) = extents.windows(2).find(|pair| pair[1].0 < pair[0].1) {
            let (member, other) = (pair[1].2.clone(), pair[0].2.clone());
            return Err(ZipProblem::Overlap { member, other }.into());
        }
        Ok(Self { members })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }

    /// Returns the bytes of a member, unless it is compressed or encrypted.
    pub(super) fn member<'a>(
        &self,
        archive: Window<'a>,
        name: &str,
    ) -> Result<Option<Window<'a>>, ZipProblem> {
        let Some(member) = self.members.get(name) else { return Ok(None) };
        if member.encrypted {
            return Err(ZipProblem::Encrypted(name.to_owned()));
        }
        if member.method != 0 {
            return Err(ZipProblem::Compressed { member: name.to_owned(), method: member.method });
        }
        if member.size != member.stored {
            return Err(ZipProblem::Damaged("a stored member has two sizes"));
        }
        Ok(archive.part(member.data, member.size))
    }
}

/// Returns where the directory begins, its length, and where the record behind it begins.
fn find(archive: Window<'_>) -> Result<(u64, u64, u64), Failure> {
    // the record at the end may be followed by a comment of up to 65 535 bytes
    let tail_length = archive.length.min((END_LENGTH + usize::from(u16::MAX)) as u64);
    let tail_start = archive.length - tail_length;
    let tail = archive.part(tail_start, tail_length).ok_or(ZipProblem::NoDirectory)?.bytes()?;
    let record = (0..tail.len().saturating_sub(END_LENGTH - 1)).rev().find(|&start| {
        let record = &tail[start..];
        record.starts_with(b"PK\x05\x06") && usize::from(u16_at(record, 20)) == record.len() - END_LENGTH
    });
    let start = record.ok_or(ZipProblem::NoDirectory)?;
    let record = &tail[start..];
    let record_start = tail_start + start as u64;
    if u16_at(record, 4) != 0 && u16_at(record, 4) != u16::MAX {
        return Err(ZipProblem::Damaged("the archive has several parts").into());
    }
    let (length, offset) = (u32_at(record, 12), u32_at(record, 16));
    let locator_start = record_start.checked_sub(LOCATOR_LENGTH as u64);
    let Some(locator_start) = locator_start else { return Ok((offset.into(), length.into(), record_start)) };
    let mut locator = [0; LOCATOR_LENGTH];
    archive.read(&mut locator, locator_start)?;
    if !locator.starts_with(b"PK\x06\x07") {
        return Ok((offset.into(), length.into(), record_start));
    }
    let record_start = u64_at(&locator, 8);
    if record_start.checked_add(END64_LENGTH as u64).is_none_or(|end| end > locator_start) {
        return Err(ZipProblem::Damaged("the zip64 record lies outside the file").into());
    }
    let mut record = [0; END64_LENGTH];
    archive.read(&mut record, record_start)?;
    if !record.starts_with(b"PK\x06\x06") {
        return Err(ZipProblem::Damaged("the zip64 record is missing").into());
    }
    Ok((u64_at(&record, 48), u64_at(&record, 40), record_start))
}

/// Returns name, offset of the local header, and what is known of each member.
fn parse(mut rest: &[u8]) -> Result<Vec<(String, u64, Member)>, ZipProblem> {
    let mut members = Vec::new();
    while !rest.is_empty() {
        if rest.len() < CENTRAL_LENGTH || !rest.starts_with(b"PK\x01\x02") {
            return Err(ZipProblem::Damaged("an entry is missing"));
        }
        if members.len() == MAX_MEMBERS {
            return Err(ZipProblem::TooManyMembers);
        }
        let lengths = [28, 30, 32].map(|at| usize::from(u16_at(rest, at)));
        let [name_length, extra_length, comment_length] = lengths;
        let (entry, variable) = rest.split_at(CENTRAL_LENGTH);
        if variable.len() < name_length + extra_length + comment_length {
            return Err(ZipProblem::Damaged("an entry is cut off"));
        }
        let (name, variable) = variable.split_at(name_length);
        let (extra, variable) = variable.split_at(extra_length);
        rest = &variable[comment_length..];

        let name = std::str::from_utf8(name).map_err(|_| ZipProblem::Damaged("a name is not UTF-8"))?;
        let mut parts = name.split('/');
        if name.starts_with('/') || name.contains(['\\', '\0']) || parts.any(|part| part == "..") {
            return Err(ZipProblem::Outside(name.to_owned()));
        }
        let [mut stored, mut size, mut header] = [20, 24, 42].map(|at| u64::from(u32_at(entry, at)));
        widen(extra, [&mut size, &mut stored, &mut header])?;
        let encrypted = u16_at(entry, 8) & 1 != 0;
        let member = Member { data: 0, stored, size, method: u16_at(entry, 10), encrypted };
        members.push((name.to_owned(), header, member));
    }
    Ok(members)
}

/// Replaces fields that are too small for their value by those of the zip64 extra field, in its order.
fn widen(mut extra: &[u8], fields: [&mut u64; 3]) -> Result<(), ZipProblem> {
    const FULL: u64 = u32::MAX as u64;
    let mut zip64: &[u8] = &[];
    while extra.len() >= 4 {
        let length = usize::from(u16_at(extra, 2));
        let data = extra[4..].get(..length).ok_or(ZipProblem::Damaged("an extra field is cut off"))?;
        if u16_at(extra, 0) == 1 {
            zip64 = data;
        }
        extra = &extra[4 + length..];
    }
    for field in fields {
        if *field == FULL {
            let value = zip64.get(..8).ok_or(ZipProblem::Damaged("a zip64 size is missing"))?;
            *field = u64_at(value, 0);
            zip64 = &zip64[8..];
        }
    }
    Ok(())
}

/// Returns where a member's bytes begin, after comparing its local header with the directory.
fn locate(archive: Window<'_>, name: &str, header: u64, member: &Member) -> Result<u64, Failure> {
    let contradiction = || ZipProblem::Contradiction(name.to_owned());
    let length = LOCAL_LENGTH + name.len();
    let local = archive.part(header, length as u64).ok_or_else(contradiction)?.bytes()?;
    let agrees = local.starts_with(&SIGNATURE)
        && usize::from(u16_at(&local, 26)) == name.len()
        && &local[LOCAL_LENGTH..] == name.as_bytes()
        && u16_at(&local, 8) == member.method;
    if !agrees {
        return Err(contradiction().into());
    }
    // `part` has checked that these sums do not overflow
    Ok(header + length as u64 + u64::from(u16_at(&local, 28)))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
