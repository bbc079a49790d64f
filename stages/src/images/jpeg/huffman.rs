//! Huffman codes, and the bits that they are read from.

use super::JpegError;

/// Codes of up to this many bits are looked up at once.
const LOOKUP_BITS: u32 = 9;

/// A table of codes of 1 to 16 bits (T.81, annex C).
pub(super) struct Huffman {
    /// By the next bits: length and symbol of the code that they begin with; length 0 if it is longer.
    lookup: Vec<(u8, u8)>,
    /// By length: one more than the largest code of it, shifted to 16 bits.
    ends: [u32; 17],
    /// By length: the position of its first symbol, less its first code.
    offsets: [i32; 17],
    symbols: Vec<u8>,
}

impl Huffman {
    /// Builds a table from the number of codes of each length and the symbols in the order of their codes.
    pub(super) fn new(counts: &[u8; 16], symbols: &[u8]) -> Option<Self> {
        let mut lookup = vec![(0, 0); 1 << LOOKUP_BITS];
        let (mut ends, mut offsets) = ([0; 17], [0; 17]);
        let (mut code, mut position) = (0_u32, 0_usize);
        for (length, &count) in (1_u32..).zip(counts) {
            offsets[length as usize] = position as i32 - code as i32;
            for _ in 0..count {
                let symbol = *symbols.get(position)?;
                if code >= 1 << length {
                    return None;
                }
                if length <= LOOKUP_BITS {
                    let first = (code << (LOOKUP_BITS - length)) as usize;
                    lookup[first..first + (1 << (LOOKUP_BITS - length))].fill((length as u8, symbol));
                }
                code += 1;
                position += 1;
            }
            ends[length as usize] = code << (16 - length);
            code <<= 1;
        }
        (position <= 256).then(|| Self { lookup, ends, offsets, symbols: symbols.to_vec() })
    }
}

/// Bits of entropy-coded data, most significant first. Ends at the first marker; what is read after it are zeros, which [`Bits::check`] reports.
pub(super) struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The next bits, from the top.
    buffer: u64,
    available: u32,
    /// How many of the available bits are not there.
    padding: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, buffer: 0, available: 0, padding: 0 }
    }

    fn refill(&mut self) {
        while self.available <= 56 {
            let byte = match self.bytes.get(self.at) {
                Some(0xFF) if self.bytes.get(self.at + 1) == Some(&0) => {
                    self.at += 2;
                    0xFF
                }
                Some(&byte) if byte != 0xFF => {
                    self.at += 1;
                    byte
                }
                _ => {
                    self.padding += 8;
                    0
                }
            };
            self.buffer |= u64::from(byte) << (56 - self.available);
            self.available += 8;
        }
    }

    fn consume(&mut self, n: u32) {
        self.buffer <<= n;
        self.available -= n;
    }

    /// Returns the next `n` bits, at most 16.
    pub(super) fn take(&mut self, n: u32) -> i32 {
        if n == 0 {
            return 0;
        }
        if self.available < n {
            self.refill();
        }
        let value = (self.buffer >> (64 - n)) as i32;
        self.consume(n);
        value
    }

    /// Returns a number of `n` bits, of which a leading 0 stands for negative ones (T.81, F.2.2.1).
    pub(super) fn signed(&mut self, n: u32) -> i32 {
        if n == 0 {
            return 0;
        }
        let value = self.take(n);
        if value < 1 << (n - 1) { value - (1 << n) + 1 } else { value }
    }

    /// Returns the next symbol.
    pub(super) fn symbol(&mut self, table: &Huffman) -> Result<u8, JpegError> {
        if self.available < 16 {
            self.refill();
        }
        let (length, symbol) = table.lookup[(self.buffer >> (64 - LOOKUP_BITS)) as usize];
        if length > 0 {
            self.consume(u32::from(length));
            return Ok(symbol);
        }
        let next = (self.buffer >> 48) as u32;
        let length = (LOOKUP_BITS + 1..=16).find(|&length| next < table.ends[length as usize]);
        let length = length.ok_or(JpegError::Corrupt("a code is in no Huffman table"))?;
        self.consume(length);
        let position = (next >> (16 - length)) as i32 + table.offsets[length as usize];
        let symbol = usize::try_from(position).ok().and_then(|position| table.symbols.get(position));
        symbol.copied().ok_or(JpegError::Corrupt("a code is in no Huffman table"))
    }

    /// Fails if more was read than there is.
    pub(super) fn check(&self) -> Result<(), JpegError> {
        if self.available >= self.padding {
            return Ok(());
        }
        Err(if self.at >= self.bytes.len() {
            JpegError::Truncated
        } else {
            JpegError::Corrupt("its data ends early")
        })
    }

    /// Goes on after the restart marker with the number `expected` modulo 8.
    pub(super) fn restart(&mut self, expected: usize) -> Result<(), JpegError> {
        self.check()?;
        let rest = &self.bytes[self.at..];
        // Bytes before the marker are passed over, as libjpeg does.
        let marker = rest.windows(2).position(|pair| pair[0] == 0xFF && !matches!(pair[1], 0 | 0xFF));
        let marker = marker.ok_or(JpegError::Truncated)?;
        if rest[marker + 1] != 0xD0 + (expected % 8) as u8 {
            return Err(JpegError::Corrupt("a restart marker is missing"));
        }
        *self = Self { at: self.at + marker + 2, ..Self::new(self.bytes) };
        Ok(())
    }

    /// Where the data ends: bytes that were read ahead are not past it.
    pub(super) fn position(&self) -> usize {
        self.at
    }
}
