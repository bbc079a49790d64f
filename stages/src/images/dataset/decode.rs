//! Image files to 8-bit grey or RGB, as Pillow's `Image.open(path).convert("RGB")` sees them.
//!
//! - JPEG: [`crate::images::jpeg`], bit-exact. PNG, WebP, BMP and the PNM family: the crate `image`.
//! - Alpha is dropped, not blended; palettes are looked up; 1, 2 and 4-bit grey is scaled to 0..255.
//! - 16-bit RGB and grey-with-alpha keep the high byte. 16-bit grey saturates at 255: that is what Pillow does
//!   (mode `I;16`), and what a model evaluated in Python therefore sees.
//! - Grey stays one channel here; replication to RGB happens after the resize, with equal results.
//! - Colour profiles are not applied, and orientation tags only on demand: neither does Pillow, nor the image processors of transformers and
//!   torchvision.
//! - The first frame of an animation counts.

use std::io::{BufReader, Cursor};
use std::path::Path;

use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader};

use super::error::DatasetError;
use super::image_type::Image;
use crate::images::jpeg::{self, JpegError};

/// Extensions of the files that can be decoded, in lower case.
pub(super) const READABLE: &[&str] = &["png", "jpg", "jpeg", "webp", "bmp", "ppm", "pgm", "pbm", "pnm"];

/// The most pixels of an image.
const MAX_PIXELS: u64 = 1 << 26;

/// DEFLATE emits at most 258 bytes for every two bits, and a byte of a PNG file is eight pixels at most.
const MAX_PIXELS_PER_PNG_BYTE: u64 = 8 * 1032;

/// Why bytes cannot be decoded.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error(transparent)]
    Jpeg(#[from] JpegError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("it is no image of a known format (JPEG, PNG, WebP, BMP, PNM)")]
    Unknown,
    #[error("{width}x{height} pixels cannot be in {bytes} bytes")]
    Claim { width: u32, height: u32, bytes: usize },
    #[error("it has {width}x{height} pixels, the most is {MAX_PIXELS}")]
    TooLarge { width: u32, height: u32 },
    #[error("it has {0} colours, which Pillow scales in its own way")]
    Scaled(&'static str),
}

/// How files become images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Decoding {
    /// Whether images are turned as their Exif orientation says (Pillow's `ImageOps.exif_transpose`).
    pub exif_orientation: bool,
}

impl Decoding {
    /// Decodes an image file, recognized by its content.
    pub fn file(self, path: &Path) -> Result<Image, DatasetError> {
        let bytes = fs_err::read(path)?;
        self.bytes(&bytes)
            .map_err(|source| DatasetError::Decode { name: format!("`{}`", path.display()), source })
    }

    /// Decodes an image file that is part of another; `name` says of which.
    pub(super) fn part(self, bytes: &[u8], name: impl FnOnce() -> String) -> Result<Image, DatasetError> {
        self.bytes(bytes).map_err(|source| DatasetError::Decode { name: name(), source })
    }

    /// Decodes the contents of an image file.
    pub fn bytes(self, bytes: &[u8]) -> Result<Image, DecodeError> {
        let (image, orientation) = if jpeg::is_jpeg(bytes) {
            (jpeg::decode(bytes)?, if self.exif_orientation { jpeg::orientation(bytes) } else { 1 })
        } else {
            decode_other(bytes)?
        };
        Ok(if self.exif_orientation { image.oriented(orientation) } else { image })
    }
}

/// Decodes what is not JPEG; with the orientation that the file says.
fn decode_other(bytes: &[u8]) -> Result<(Image, u8), DecodeError> {
    let reader = ImageReader::new(BufReader::new(Cursor::new(bytes)));
    let reader = reader.with_guessed_format().map_err(ImageError::IoError)?;
    let format = reader.format().ok_or(DecodeError::Unknown)?;
    let mut decoder = reader.into_decoder()?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels > MAX_PIXELS {
        return Err(DecodeError::TooLarge { width, height });
    }
    if format == ImageFormat::Png && pixels > (bytes.len() as u64).saturating_mul(MAX_PIXELS_PER_PNG_BYTE) {
        return Err(DecodeError::Claim { width, height, bytes: bytes.len() });
    }
    let orientation = decoder.orientation().map_or(1, image::metadata::Orientation::to_exif);
    let decoded = DynamicImage::from_decoder(decoder)?;
    if format == ImageFormat::Pnm && decoded.color().bytes_per_pixel() > decoded.color().channel_count() {
        return Err(DecodeError::Scaled("more than 256 shades of its"));
    }
    Ok((to_grey_or_rgb(decoded), orientation))
}

fn to_grey_or_rgb(decoded: DynamicImage) -> Image {
    let (height, width) = (decoded.height() as usize, decoded.width() as usize);
    let grey = |pixels| Image::new(height, width, 1, pixels);
    let rgb = |pixels| Image::new(height, width, 3, pixels);
    match decoded {
        DynamicImage::ImageLuma8(image) => grey(image.into_raw()),
        DynamicImage::ImageLumaA8(image) => grey(image.pixels().map(|pixel| pixel.0[0]).collect()),
        DynamicImage::ImageRgb8(image) => rgb(image.into_raw()),
        DynamicImage::ImageRgba8(image) => {
            rgb(image.pixels().flat_map(|pixel| [pixel.0[0], pixel.0[1], pixel.0[2]]).collect())
        }
        DynamicImage::ImageLuma16(image) => {
            grey(image.pixels().map(|pixel| pixel.0[0].min(255) as u8).collect())
        }
        DynamicImage::ImageLumaA16(image) => {
            grey(image.pixels().map(|pixel| high_byte(pixel.0[0])).collect())
        }
        DynamicImage::ImageRgb16(image) => rgb(image.into_raw().into_iter().map(high_byte).collect()),
        DynamicImage::ImageRgba16(image) => rgb(image
            .pixels()
            .flat_map(|pixel| [pixel.0[0], pixel.0[1], pixel.0[2]].map(high_byte))
            .collect()),
        // None of the formats decodes to floats.
        other => rgb(other.into_rgb8().into_raw()),
    }
}

fn high_byte(value: u16) -> u8 {
    (value >> 8) as u8
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::super::test_support::from_hex;
    use super::*;

    #[test]
    fn png_modes_convert_as_in_pillow() {
        let golden: Value = serde_json::from_str(include_str!("testdata/png_modes.json")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() >= 10);
        for case in cases {
            let name = case["name"].as_str().unwrap();
            let path = folder.path().join(name);
            fs_err::write(&path, from_hex(&case["png"])).unwrap();
            let image = Decoding::default().file(&path).unwrap();
            let rgb: Vec<u8> = match image.channels() {
                1 => image.pixels().iter().flat_map(|&value| [value; 3]).collect(),
                _ => image.pixels().to_vec(),
            };
            assert_eq!(rgb, from_hex(&case["rgb"]), "{name}");
        }
    }

    #[test]
    fn other_formats_decode_as_in_pillow() {
        let golden: Value = serde_json::from_str(include_str!("testdata/other_formats.json")).unwrap();
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() >= 15);
        let mut wrong = Vec::new();
        for case in cases {
            let name = case["name"].as_str().unwrap();
            let bytes = from_hex(&case["file"]);
            let image = Decoding::default().bytes(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
            let size = (image.height() as u64, image.width() as u64);
            assert_eq!(size, (case["height"].as_u64().unwrap(), case["width"].as_u64().unwrap()), "{name}");
            let rgb = image.pixels().iter().flat_map(|&v| std::iter::repeat_n(v, 3 / image.channels()));
            let mut crc = flate2::Crc::new();
            crc.update(&rgb.collect::<Vec<u8>>());
            if u64::from(crc.sum()) != case["crc32"].as_u64().unwrap() {
                wrong.push(name);
            }
            let turned = Decoding { exif_orientation: true }.bytes(&bytes).unwrap();
            assert_eq!(turned.height() != image.height(), name.starts_with("turned"), "{name}");
        }
        assert_eq!(wrong, [""; 0]);
    }

    #[test]
    fn claims_beyond_the_file_are_refused() {
        let golden: Value = serde_json::from_str(include_str!("testdata/png_modes.json")).unwrap();
        let mut bytes = from_hex(&golden["cases"][0]["png"]);
        bytes[16..24].copy_from_slice(&[0, 0, 0x20, 0, 0, 0, 0x20, 0]);
        let mut crc = flate2::Crc::new();
        crc.update(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.sum().to_be_bytes());
        let said = Decoding::default().bytes(&bytes).unwrap_err().to_string();
        assert_eq!(said, format!("8192x8192 pixels cannot be in {} bytes", bytes.len()));
        assert!(Decoding::default().bytes(b"").is_err());
    }

    #[test]
    fn errors_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broken.png");
        fs_err::write(&path, b"\x89PNG\r\n\x1a\nnot really").unwrap();
        let message = Decoding::default().file(&path).unwrap_err().to_string();
        assert!(message.starts_with("cannot decode `") && message.contains("broken.png"), "{message}");
        let missing = Decoding::default().file(&folder.path().join("missing.png")).unwrap_err().to_string();
        assert!(missing.contains("missing.png"), "{missing}");
    }
}
