//! Reading a window forwards through a small buffer, skipping what is only to be remembered.

use crate::formats::pickle::PickleProblem;
use crate::formats::window::{Failure, Window};

const BUFFER_BYTES: u64 = 32 << 10;

/// `length` bytes from `offset` on, in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::formats) struct Span {
    pub(in crate::formats) offset: u64,
    pub(in crate::formats) length: u64,
}

pub(super) struct Cursor<'a> {
    window: Window<'a>,
    position: u64,
    buffer: Vec<u8>,
    buffer_start: u64,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(window: Window<'a>, position: u64) -> Self {
        Self { window, position, buffer: Vec::new(), buffer_start: 0 }
    }

    /// Offset of the next byte.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    pub(super) fn byte(&mut self) -> Result<u8, Failure> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Failure> {
        let bytes = self.ahead(N)?.first_chunk::<N>().copied().ok_or_else(|| self.truncated())?;
        self.position += N as u64;
        Ok(bytes)
    }

    /// Steps over `length` bytes.
    pub(super) fn skip(&mut self, length: u64) -> Result<Span, Failure> {
        let span = Span { offset: self.position, length };
        match self.position.checked_add(length) {
            Some(end) if end <= self.window.length => self.position = end,
            _ => return Err(self.truncated().into()),
        }
        Ok(span)
    }

    /// Steps over a line and its end; returns where it is, without the end.
    pub(super) fn line(&mut self) -> Result<Span, Failure> {
        let offset = self.position;
        loop {
            let ahead = self.ahead(1)?;
            if ahead.is_empty() {
                return Err(self.truncated().into());
            }
            let newline = ahead.iter().position(|byte| *byte == b'\n');
            let length = ahead.len();
            match newline {
                Some(newline) => {
                    self.position += newline as u64 + 1;
                    return Ok(Span { offset, length: self.position - 1 - offset });
                }
                None => self.position += length as u64,
            }
        }
    }

    pub(super) fn truncated(&self) -> PickleProblem {
        PickleProblem::Truncated(self.window.length)
    }

    /// At least the next `n` bytes, or as many as there are.
    fn ahead(&mut self, n: usize) -> Result<&[u8], Failure> {
        let end = self.buffer_start + self.buffer.len() as u64;
        if self.position < self.buffer_start || self.position + n as u64 > end {
            let length = BUFFER_BYTES.min(self.window.length.saturating_sub(self.position));
            self.buffer.resize(length as usize, 0);
            self.buffer_start = self.position;
            if length > 0 {
                self.window.read(&mut self.buffer, self.position)?;
            }
        }
        Ok(&self.buffer[(self.position - self.buffer_start) as usize..])
    }
}
