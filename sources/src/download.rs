//! One file over an unreliable line: received into a partial file, gone on from where it broke off, verified, and only then a file.
//!
//! A partial file is gone on from when that is safe: its content is verified in the end ([`Check`]), or the server can be told which
//! version it belongs to (a strong validator, kept beside it). Otherwise it starts over. An attempt counts as failed when it brought
//! nothing new, so a line that breaks every gigabyte is slow and not an error.

use crate::error::{Error, Result};
use crate::settings::{Event, Settings};
use ring::digest;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Bytes received at once.
const BLOCK: usize = 256 << 10;

/// Progress is told once per so many bytes.
const TOLD_EVERY: u64 = 1 << 20;

/// What the content must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Check {
    Nothing,
    /// The digest in hexadecimal.
    Sha256(String),
    /// What Git calls a blob of this content and size.
    Git {
        id: String,
        size: u64,
    },
}

/// What is to be received, and where.
pub(crate) struct Transfer<'a> {
    pub(crate) address: &'a str,
    /// Where it grows. Whoever calls holds a lock on it.
    pub(crate) partial: &'a Path,
    /// Where the validator of the partial file is kept, if one is needed to go on.
    pub(crate) validator: Option<PathBuf>,
    /// The size, if it is known beforehand.
    pub(crate) size: Option<u64>,
    pub(crate) check: Check,
}

/// Where to go on from.
pub(crate) struct Resume {
    pub(crate) offset: u64,
    /// The version that the bytes before belong to.
    pub(crate) validator: Option<String>,
}

/// An answer that can be read.
pub(crate) struct Opened {
    /// Where in the file it begins: what was asked for, or 0.
    pub(crate) offset: u64,
    /// The size of the whole file.
    pub(crate) total: Option<u64>,
    /// Names this version of the content exactly.
    pub(crate) validator: Option<String>,
    pub(crate) body: Box<dyn Read>,
}

impl Transfer<'_> {
    /// Receives the file whole; returns its size. The partial file is then complete and verified; it stays after an interruption and is
    /// removed when it is wrong.
    pub(crate) fn run(
        &self,
        settings: &Settings,
        open: &mut dyn FnMut(&Resume) -> Result<Opened>,
    ) -> Result<u64> {
        if let Some(folder) = self.partial.parent() {
            fs_err::create_dir_all(folder)?;
        }
        let has_leftover = fs_err::metadata(self.partial).is_ok_and(|metadata| metadata.len() > 0);
        let result = self.receive(settings, open);
        if result.is_err() && fs_err::metadata(self.partial).is_ok_and(|metadata| metadata.len() == 0) {
            self.remove()?;
        }
        let is_wrong = |error: &Error| matches!(error, Error::WrongDigest { .. } | Error::WrongSize { .. });
        match result {
            Err(error) if is_wrong(&error) => {
                self.remove()?;
                // Perhaps only what an earlier process left behind was wrong.
                if !has_leftover {
                    return Err(error);
                }
                self.receive(settings, open).inspect_err(|error| {
                    if is_wrong(error) {
                        // The error that is reported is the one that matters.
                        let _ = self.remove();
                    }
                })
            }
            other => other,
        }
    }

    /// Removes the partial file and what is known about it.
    pub(crate) fn remove(&self) -> Result<()> {
        for path in [Some(self.partial), self.validator.as_deref()].into_iter().flatten() {
            match fs_err::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        Ok(())
    }

    fn receive(&self, settings: &Settings, open: &mut dyn FnMut(&Resume) -> Result<Opened>) -> Result<u64> {
        let mut received = Received::open(self)?;
        let mut total = self.size;
        let address = || self.address.to_owned();
        (settings.on_event)(Event::Started { address: address(), done: received.size, total });
        let (mut n_failed, mut most) = (0, received.size);
        while total != Some(received.size) {
            let offset = received.size;
            let opened = open(&Resume { offset, validator: received.validator.clone() })?;
            if opened.offset != offset {
                received.start_over(self)?;
            }
            if let (Some(expected), Some(actual)) = (self.size, opened.total)
                && expected != actual
            {
                return Err(Error::WrongSize { address: address(), expected, actual });
            }
            total = opened.total.or(self.size);
            received.belongs_to(opened.validator, self)?;
            let reason = match received.append(opened.body, total, self, settings)? {
                None if total.is_none_or(|total| total == received.size) => {
                    total = Some(received.size);
                    continue;
                }
                None => "the connection was closed early".to_owned(),
                Some(error) => error.to_string(),
            };
            n_failed = if received.size > most { 1 } else { n_failed + 1 };
            most = most.max(received.size);
            let Some(wait) = settings.patience.wait(n_failed, None) else {
                let (done, attempts) = (received.size, n_failed);
                return Err(Error::Interrupted { address: address(), done, attempts, reason });
            };
            (settings.on_event)(Event::Retrying { address: address(), reason, wait });
            (settings.wait)(wait);
            if (settings.cancelled)() {
                return Err(Error::Cancelled);
            }
            if !received.can_go_on(self) {
                received.start_over(self)?;
            }
        }
        received.verify(self)?;
        Ok(received.size)
    }
}

/// What has been received.
struct Received {
    file: fs_err::File,
    size: u64,
    hash: Option<digest::Context>,
    validator: Option<String>,
}

impl Received {
    /// Opens the partial file, with what an earlier attempt left in it if that is of use.
    fn open(transfer: &Transfer<'_>) -> Result<Self> {
        let file = fs_err::OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(transfer.partial)?;
        let validator = transfer.validator.as_deref().and_then(|path| fs_err::read_to_string(path).ok());
        let size = file.metadata()?.len();
        let mut received = Self { file, size, hash: transfer.check.hash(), validator };
        if !received.can_go_on(transfer) || transfer.size.is_some_and(|expected| size > expected) {
            received.start_over(transfer)?;
            return Ok(received);
        }
        if let Some(hash) = &mut received.hash {
            let mut block = vec![0; BLOCK];
            loop {
                match received.file.read(&mut block)? {
                    0 => break,
                    n_read => hash.update(&block[..n_read]),
                }
            }
        }
        received.file.seek(SeekFrom::Start(size))?;
        Ok(received)
    }

    fn can_go_on(&self, transfer: &Transfer<'_>) -> bool {
        self.validator.is_some() || transfer.validator.is_none()
    }

    fn start_over(&mut self, transfer: &Transfer<'_>) -> Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.size = 0;
        self.hash = transfer.check.hash();
        self.validator = None;
        Ok(())
    }

    /// Remembers which version the bytes are of, also for a later process.
    fn belongs_to(&mut self, validator: Option<String>, transfer: &Transfer<'_>) -> Result<()> {
        let Some(path) = &transfer.validator else { return Ok(()) };
        if self.validator != validator {
            match &validator {
                Some(validator) => fs_err::write(path, validator)?,
                None => {
                    // Bytes without a version are never gone on from, so an old version beside them must go.
                    let _ = fs_err::remove_file(path);
                }
            }
            self.validator = validator;
        }
        Ok(())
    }

    /// Reads to the end, or to an error of the line, which is returned as a value. Errors of the disk are errors.
    fn append(
        &mut self,
        mut body: Box<dyn Read>,
        total: Option<u64>,
        transfer: &Transfer<'_>,
        settings: &Settings,
    ) -> Result<Option<std::io::Error>> {
        let mut block = vec![0; BLOCK];
        let mut told = self.size;
        loop {
            if (settings.cancelled)() {
                return Err(Error::Cancelled);
            }
            let n_read = match body.read(&mut block) {
                Ok(0) => break,
                Ok(n_read) => n_read,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Ok(Some(error)),
            };
            self.file.write_all(&block[..n_read])?;
            if let Some(hash) = &mut self.hash {
                hash.update(&block[..n_read]);
            }
            self.size += n_read as u64;
            if let Some(expected) = total.filter(|total| self.size > *total) {
                let (address, actual) = (transfer.address.to_owned(), self.size);
                return Err(Error::WrongSize { address, expected, actual });
            }
            if self.size - told >= TOLD_EVERY {
                told = self.size;
                let address = transfer.address.to_owned();
                (settings.on_event)(Event::Progress { address, done: self.size, total });
            }
        }
        Ok(None)
    }

    fn verify(&mut self, transfer: &Transfer<'_>) -> Result<()> {
        self.file.sync_all()?;
        let Some(hash) = self.hash.take() else { return Ok(()) };
        let actual = hex(hash.finish().as_ref());
        let (algorithm, expected) = match &transfer.check {
            Check::Nothing => return Ok(()),
            Check::Sha256(expected) => ("SHA-256", expected),
            Check::Git { id, .. } => ("Git's blob id", id),
        };
        if *expected == actual {
            return Ok(());
        }
        let (address, expected) = (transfer.address.to_owned(), expected.clone());
        Err(Error::WrongDigest { address, algorithm, expected, actual })
    }
}

impl Check {
    /// A hash that has seen nothing of the content yet.
    fn hash(&self) -> Option<digest::Context> {
        match self {
            Self::Nothing => None,
            Self::Sha256(_) => Some(digest::Context::new(&digest::SHA256)),
            Self::Git { size, .. } => {
                let mut hash = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
                hash.update(format!("blob {size}\0").as_bytes());
                Some(hash)
            }
        }
    }
}

/// Puts a complete partial file in its place.
pub(crate) fn keep(partial: &Path, place: &Path) -> Result<()> {
    if let Some(folder) = place.parent() {
        fs_err::create_dir_all(folder)?;
    }
    fs_err::rename(partial, place)?;
    // So that the name survives a power failure too; not every file system can do this for folders.
    if let Some(Ok(folder)) = place.parent().map(File::open) {
        let _ = folder.sync_all();
    }
    Ok(())
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.map(|digit| char::from_digit(u32::from(digit), 16).expect("four bits are a digit")).collect()
}

/// Reads `bytes 100-199/200`: where the part begins, and the size of the whole if it is told.
pub(crate) fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes")?.trim_start().split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let (start, end): (u64, u64) = (start.trim().parse().ok()?, end.trim().parse().ok()?);
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    (start <= end && total.is_none_or(|total| end < total)).then_some((start, total))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_ranges_and_refuses_impossible_ones() {
        assert_eq!(content_range("bytes 100-199/200"), Some((100, Some(200))));
        assert_eq!(content_range("bytes 0-0/*"), Some((0, None)));
        for text in ["", "bytes", "bytes */200", "bytes 5-4/9", "bytes 0-9/9", "items 0-1/2", "bytes -1-2/3"]
        {
            assert_eq!(content_range(text), None, "{text}");
        }
    }

    #[test]
    fn ids_are_those_of_git() {
        // `printf 'hello\n' | git hash-object --stdin`
        let mut hash = Check::Git { id: String::new(), size: 6 }.hash().unwrap();
        hash.update(b"hello\n");
        assert_eq!(hex(hash.finish().as_ref()), "ce013625030ba8dba906f756967f9e9ca394464a");
    }

    proptest! {
        #[test]
        fn any_range_is_read_or_refused(text in "\\PC{0,40}") {
            let _ = content_range(&text);
        }
    }
}
