//! A part of a file: a member of an archive, or the whole.
//!
//! Formats nest (a pickle in a zip in a pickle), and what is found inside must be said in terms of the file itself. A window reads
//! relative to its beginning and turns places back into offsets of the file.

use crate::error::Error;
use crate::formats::FormatProblem;
use crate::read_at::{ReadAt, read_exact};

/// Why a file cannot be described: it cannot be read, or not be used.
#[derive(Debug)]
pub(super) enum Failure {
    Read(Error),
    Problem(FormatProblem),
}

impl Failure {
    /// The error, with the name of the file.
    pub(super) fn of_file(self, file: &dyn ReadAt) -> Error {
        match self {
            Self::Read(error) => error,
            Self::Problem(problem) => Error::format(file.name(), problem),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Read(error)
    }
}

impl<T: Into<FormatProblem>> From<T> for Failure {
    fn from(problem: T) -> Self {
        Self::Problem(problem.into())
    }
}

/// `length` bytes of `file` from `start` on; lies inside the file.
#[derive(Clone, Copy)]
pub(super) struct Window<'a> {
    pub(super) file: &'a dyn ReadAt,
    pub(super) start: u64,
    pub(super) length: u64,
}

impl<'a> Window<'a> {
    pub(super) fn whole(file: &'a dyn ReadAt) -> Self {
        Self { file, start: 0, length: file.size() }
    }

    /// `length` bytes from `offset` on, if they are inside.
    pub(super) fn part(self, offset: u64, length: u64) -> Option<Self> {
        (offset.checked_add(length)? <= self.length).then_some(Self {
            start: self.start + offset,
            length,
            ..self
        })
    }

    /// Fills `buffer`; what lies outside is an error of reading.
    pub(super) fn read(self, buffer: &mut [u8], offset: u64) -> Result<(), Error> {
        read_exact(self.file, buffer, self.start.saturating_add(offset))
    }

    /// Returns all bytes. For windows whose length the caller has bounded.
    pub(super) fn bytes(self) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; self.length as usize];
        self.read(&mut bytes, 0)?;
        Ok(bytes)
    }
}
