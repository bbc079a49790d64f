//! Markers, tables and the frame of a file.

use super::JpegError;
use super::huffman::Huffman;

/// Tables that scans refer to by number.
#[derive(Default)]
pub(super) struct Tables {
    /// Quantization steps, in the order of [`ZIGZAG`].
    pub quantization: [Option<[u16; 64]>; 4],
    pub dc: [Option<Huffman>; 4],
    pub ac: [Option<Huffman>; 4],
    /// MCUs between restart markers; 0 for none.
    pub restart_interval: usize,
}

pub(super) struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
    pub tables: Tables,
    jfif: bool,
    adobe: Option<u8>,
    ids: Vec<u8>,
}

/// What [`Parser::next_marker`] stops at.
pub(super) enum Marker {
    Frame(Frame),
    Scan(Scan),
    End,
    OutOfBytes,
}

pub(super) struct Frame {
    pub progressive: bool,
    pub height: usize,
    pub width: usize,
    pub components: Vec<FrameComponent>,
}

pub(super) struct FrameComponent {
    pub id: u8,
    /// Horizontal and vertical sampling factor, 1 to 4.
    pub h: usize,
    pub v: usize,
    /// Number of its quantization table.
    pub table: usize,
}

/// The header of a scan: components with their tables, and which bits of which coefficients it brings.
pub(super) struct Scan {
    /// (component's id, DC table, AC table)
    pub components: Vec<(u8, usize, usize)>,
    pub first: usize,
    pub last: usize,
    /// Bit position of the scan before; 0 for the first.
    pub high: u8,
    pub low: u8,
}

/// What says which colours the components are.
#[derive(Clone, Copy)]
pub(super) struct ColorHints<'a> {
    pub jfif: bool,
    /// The transform of an Adobe marker.
    pub adobe: Option<u8>,
    pub ids: &'a [u8],
}

/// The position of coefficient k of a scan in its block of 8 rows.
pub(super) const ZIGZAG: [u8; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7,
    14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39,
    46, 53, 60, 61, 54, 47, 55, 62, 63,
];

impl<'a> Parser<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Result<Self, JpegError> {
        if !bytes.starts_with(&[0xFF, 0xD8]) {
            return Err(JpegError::NotJpeg);
        }
        let tables = Tables::default();
        Ok(Self { bytes, at: 2, tables, jfif: false, adobe: None, ids: Vec::new() })
    }

    /// The bytes that are left.
    pub(super) fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    pub(super) fn skip(&mut self, n: usize) {
        self.at = (self.at + n).min(self.bytes.len());
    }

    pub(super) fn color_hints(&self) -> ColorHints<'_> {
        ColorHints { jfif: self.jfif, adobe: self.adobe, ids: &self.ids }
    }

    /// Reads tables up to the next frame, scan or end. Bytes between segments are passed over, as libjpeg does.
    pub(super) fn next_marker(&mut self) -> Result<Marker, JpegError> {
        loop {
            let Some(code) = self.marker_code() else { return Ok(Marker::OutOfBytes) };
            match code {
                0xD9 => return Ok(Marker::End),
                0x01 | 0xD0..=0xD8 => {}
                0xC0..=0xC2 => return self.frame(code == 0xC2).map(Marker::Frame),
                0xDA => return self.scan().map(Marker::Scan),
                0xC4 => self.huffman_tables()?,
                0xDB => self.quantization_tables()?,
                0xDD => {
                    let [high, low, ..] = *self.segment()? else {
                        return Err(JpegError::Corrupt("its restart interval is too short"));
                    };
                    self.tables.restart_interval = usize::from(u16::from_be_bytes([high, low]));
                }
                0xE0 => self.jfif |= self.segment()?.starts_with(b"JFIF\0"),
                0xEE => {
                    if let Some(adobe) = self.segment()?.strip_prefix(b"Adobe") {
                        self.adobe = adobe.get(6).copied().or(self.adobe);
                    }
                }
                0xC3 => return Err(JpegError::Unsupported("lossless JPEG".to_owned())),
                0xC9 | 0xCA => return Err(JpegError::Unsupported("arithmetic coding".to_owned())),
                0xC5..=0xC8 | 0xCB..=0xCF | 0xDC => {
                    return Err(JpegError::Unsupported(format!("marker {code:02X}")));
                }
                _ => {
                    self.segment()?;
                }
            }
        }
    }

    fn marker_code(&mut self) -> Option<u8> {
        loop {
            self.at += self.rest().iter().position(|&byte| byte == 0xFF)?;
            self.at += self.rest().iter().position(|&byte| byte != 0xFF)?;
            let code = self.bytes[self.at];
            self.at += 1;
            if code != 0 {
                return Some(code);
            }
        }
    }

    /// The contents of the segment that begins here.
    fn segment(&mut self) -> Result<&'a [u8], JpegError> {
        let truncated = JpegError::Truncated;
        let Some(&[high, low]) = self.rest().first_chunk() else { return Err(truncated) };
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length < 2 {
            return Err(JpegError::Corrupt("a segment has no length"));
        }
        let contents = self.rest().get(2..length).ok_or(truncated)?;
        self.at += length;
        Ok(contents)
    }

    fn frame(&mut self, progressive: bool) -> Result<Frame, JpegError> {
        let segment = self.segment()?;
        let short = JpegError::Corrupt("its frame header is too short");
        let Some((&[precision, h1, h0, w1, w0, n], components)) = segment.split_first_chunk() else {
            return Err(short);
        };
        if precision != 8 {
            return Err(JpegError::Unsupported(format!("a precision of {precision} bits")));
        }
        let (height, width) =
            (usize::from(u16::from_be_bytes([h1, h0])), usize::from(u16::from_be_bytes([w1, w0])));
        if height == 0 || width == 0 {
            return Err(JpegError::Corrupt("its frame has no height or no width"));
        }
        if !matches!(n, 1 | 3 | 4) {
            return Err(JpegError::Unsupported(format!("an image of {n} components")));
        }
        let components = components.get(..3 * usize::from(n)).ok_or(short)?;
        let component = |bytes: &[u8]| FrameComponent {
            id: bytes[0],
            h: usize::from(bytes[1] >> 4),
            v: usize::from(bytes[1] & 15),
            table: usize::from(bytes[2]),
        };
        let components: Vec<FrameComponent> = components.chunks_exact(3).map(component).collect();
        if components.iter().any(|c| !(1..=4).contains(&c.h) || !(1..=4).contains(&c.v) || c.table > 3) {
            return Err(JpegError::Corrupt("a component has no valid sampling factors or table"));
        }
        self.ids = components.iter().map(|component| component.id).collect();
        Ok(Frame { progressive, height, width, components })
    }

    fn scan(&mut self) -> Result<Scan, JpegError> {
        let segment = self.segment()?;
        let corrupt = || JpegError::Corrupt("a scan header is not valid");
        let (&n, rest) = segment.split_first().ok_or_else(corrupt)?;
        let (components, rest) = rest.split_at_checked(2 * usize::from(n)).ok_or_else(corrupt)?;
        let &[first, last, bits] = rest.first_chunk().ok_or_else(corrupt)?;
        let components: Vec<_> = components
            .chunks_exact(2)
            .map(|bytes| (bytes[0], usize::from(bytes[1] >> 4), usize::from(bytes[1] & 15)))
            .collect();
        if !(1..=4).contains(&n) || components.iter().any(|&(_, dc, ac)| dc > 3 || ac > 3) {
            return Err(corrupt());
        }
        let (first, last) = (usize::from(first), usize::from(last));
        Ok(Scan { components, first, last, high: bits >> 4, low: bits & 15 })
    }

    fn huffman_tables(&mut self) -> Result<(), JpegError> {
        let mut rest = self.segment()?;
        let corrupt = || JpegError::Corrupt("a Huffman table is not valid");
        while let Some((&class, tail)) = rest.split_first() {
            let (counts, tail) = tail.split_first_chunk::<16>().ok_or_else(corrupt)?;
            let n: usize = counts.iter().map(|&count| usize::from(count)).sum();
            let (symbols, tail) = tail.split_at_checked(n).ok_or_else(corrupt)?;
            let table = Huffman::new(counts, symbols).ok_or_else(corrupt)?;
            let (kind, number) = (class >> 4, usize::from(class & 15));
            let tables = match kind {
                // The symbol of a DC code is a number of bits.
                0 if symbols.iter().all(|&symbol| symbol <= 15) => &mut self.tables.dc,
                1 => &mut self.tables.ac,
                _ => return Err(corrupt()),
            };
            *tables.get_mut(number).ok_or_else(corrupt)? = Some(table);
            rest = tail;
        }
        Ok(())
    }

    fn quantization_tables(&mut self) -> Result<(), JpegError> {
        let mut rest = self.segment()?;
        let corrupt = || JpegError::Corrupt("a quantization table is not valid");
        while let Some((&kind, tail)) = rest.split_first() {
            let bytes_each = match kind >> 4 {
                0 => 1,
                1 => 2,
                _ => return Err(corrupt()),
            };
            let (values, tail) = tail.split_at_checked(64 * bytes_each).ok_or_else(corrupt)?;
            let mut table = [0; 64];
            for (step, bytes) in table.iter_mut().zip(values.chunks_exact(bytes_each)) {
                *step = bytes.iter().fold(0, |value, &byte| value << 8 | u16::from(byte));
            }
            *self.tables.quantization.get_mut(usize::from(kind & 15)).ok_or_else(corrupt)? = Some(table);
            rest = tail;
        }
        Ok(())
    }
}

/// The orientation in the first Exif segment: tag 0x0112 of its first directory (TIFF 6.0).
pub(super) fn orientation(bytes: &[u8]) -> Option<u8> {
    let mut parser = Parser::new(bytes).ok()?;
    loop {
        match parser.marker_code()? {
            0xE1 => {
                if let Some(tiff) = parser.segment().ok()?.strip_prefix(b"Exif\0\0") {
                    return tiff_orientation(tiff);
                }
            }
            0xD9 | 0xDA => return None,
            0x01 | 0xD0..=0xD8 => {}
            _ => {
                parser.segment().ok()?;
            }
        }
    }
}

fn tiff_orientation(tiff: &[u8]) -> Option<u8> {
    let little = match tiff.get(..2)? {
        b"II" => true,
        b"MM" => false,
        _ => return None,
    };
    let u16_at = |at: usize| {
        let bytes = *tiff.get(at..)?.first_chunk()?;
        Some(if little { u16::from_le_bytes(bytes) } else { u16::from_be_bytes(bytes) })
    };
    let u32_at = |at: usize| {
        let bytes = *tiff.get(at..)?.first_chunk()?;
        Some(if little { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) })
    };
    let directory = u32_at(4)? as usize;
    let entries = usize::from(u16_at(directory)?);
    let entry = |index: usize| directory.checked_add(2 + 12 * index);
    let found = (0..entries).map_while(entry).find(|&at| u16_at(at) == Some(0x0112))?;
    let value = u16_at(found.checked_add(8)?)?;
    u8::try_from(value).ok().filter(|value| (1..=8).contains(value))
}
