//! JPEG as libjpeg-turbo decodes it, bit by bit: what Pillow, and so the reference of every evaluation, sees.
//!
//! Decoders may differ in how they round the inverse transform, interpolate subsampled colour and convert it, and so they do, by a few levels.
//! This one does what libjpeg-turbo does by default (and Pillow leaves it at that): the "islow" integer transform, triangle ("fancy")
//! upsampling, 16-bit fixed-point colour. Formulas: ITU-T T.81 (entropy coding, progression); Loeffler, Ligtenberg and Moschytz, ICASSP 1989
//! (transform); the libjpeg documentation (upsampling, colour).
//!
//! - `header`: markers, tables, the frame; `huffman`: codes and the bits that they are read from;
//! - `scan`: coefficients of sequential and progressive scans; `idct`, `upsample`, `color`: from there to pixels.
//!
//! Baseline, extended sequential and progressive, Huffman-coded, 8 bits, of 1, 3 or 4 components. What Pillow does with four is done too (inverted
//! CMYK, as Adobe writes it, to RGB). Arithmetic coding, lossless and 12-bit files are refused by name. Damage is an error, where libjpeg would
//! warn and fill in grey: a score over guessed pixels would look like any other.
//!
//! INVARIANT: memory is bounded by the length of the file (a block of 64 coefficients takes at least a bit), whatever its header claims.

mod color;
mod header;
mod huffman;
mod idct;
mod scan;
mod upsample;

#[cfg(test)]
mod tests;

use super::dataset::Image;
use header::{Marker, Parser};
use scan::Planes;

/// Why a file cannot be decoded.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum JpegError {
    #[error("it does not begin as a JPEG file does")]
    NotJpeg,
    #[error("it is truncated")]
    Truncated,
    #[error("it is damaged: {0}")]
    Corrupt(&'static str),
    #[error("{0} is not supported")]
    Unsupported(String),
    #[error("{width}x{height} pixels cannot be in {bytes} bytes")]
    Claim { width: usize, height: usize, bytes: usize },
    #[error("it has {width}x{height} pixels, the most is {most}")]
    TooLarge { width: usize, height: usize, most: usize },
}

/// The most pixels of an image.
const MAX_PIXELS: usize = 1 << 26;

/// The most scans of a progressive file. Each costs a walk over all blocks; encoders write about ten.
const MAX_SCANS: usize = 256;

/// Tells whether bytes begin as a JPEG file does.
pub fn is_jpeg(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xFF, 0xD8, 0xFF])
}

/// Decodes a JPEG file to grey or RGB. Orientation tags and colour profiles are not applied.
pub fn decode(bytes: &[u8]) -> Result<Image, JpegError> {
    let mut parser = Parser::new(bytes)?;
    let mut planes: Option<Planes> = None;
    let mut scans = 0;
    loop {
        match parser.next_marker()? {
            Marker::Frame(frame) if planes.is_none() => planes = Some(Planes::new(frame, bytes.len())?),
            Marker::Frame(_) => return Err(JpegError::Corrupt("it has two frames")),
            Marker::Scan(scan) => {
                let planes = planes.as_mut().ok_or(JpegError::Corrupt("a scan comes before the frame"))?;
                scans += 1;
                if scans > MAX_SCANS {
                    return Err(JpegError::Corrupt("it has more scans than any encoder writes"));
                }
                let end = planes.read_scan(&scan, &parser.tables, parser.rest())?;
                parser.skip(end);
            }
            Marker::End => break,
            // As in Pillow, also where only the end marker is missing.
            Marker::OutOfBytes => return Err(JpegError::Truncated),
        }
    }
    let planes = planes.ok_or(JpegError::Corrupt("it holds no image"))?;
    Ok(color::to_image(&planes.finish()?, parser.color_hints()))
}

/// Reads the orientation of an Exif tag, 1 to 8; 1 where there is none.
pub fn orientation(bytes: &[u8]) -> u8 {
    header::orientation(bytes).unwrap_or(1)
}
