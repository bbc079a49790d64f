//! PNG and JPEG files to 8-bit grey or RGB, as Pillow's `Image.open(path).convert("RGB")` sees them.
//!
//! - Alpha is dropped, not blended; palettes are looked up; 1, 2 and 4-bit grey is scaled to 0..255.
//! - 16-bit RGB and grey-with-alpha keep the high byte. 16-bit grey saturates at 255: that is what Pillow does
//!   (mode `I;16`), and what a model evaluated in Python therefore sees.
//! - Grey stays one channel here; replication to RGB happens after the resize, with equal results.
//! - Orientation tags and colour profiles are not applied, as in Pillow.
//! - PNG is exact. JPEG is not: decoders round their transforms and interpolate colour differently (against
//!   libjpeg-turbo at most 1 level apart in grey, up to 4 with subsampled colour, in our trials).

use std::path::Path;

use image::{DynamicImage, ImageReader};

use super::error::DatasetError;
use super::image_type::Image;

/// Decodes a PNG or JPEG file, recognized by its content.
pub fn decode_image_file(path: &Path) -> Result<Image, DatasetError> {
    let read_error = |source| DatasetError::Read { path: path.to_owned(), source };
    // `image` limits what a decoder may allocate (512 MiB), whatever a file's header claims.
    let reader = ImageReader::new(std::io::BufReader::new(fs_err::File::open(path)?));
    let decoded = reader
        .with_guessed_format()
        .map_err(read_error)?
        .decode()
        .map_err(|source| DatasetError::Decode { path: path.to_owned(), source })?;
    Ok(to_grey_or_rgb(decoded))
}

/// Decodes a PNG or JPEG file that is part of another; `name` says of which.
pub(super) fn decode_image_bytes(bytes: &[u8], name: &str) -> Result<Image, DatasetError> {
    let broken = |source| DatasetError::DecodePart { name: name.to_owned(), source };
    let reader = ImageReader::new(std::io::Cursor::new(bytes)).with_guessed_format();
    let decoded = reader.map_err(|error| broken(error.into()))?.decode().map_err(broken)?;
    Ok(to_grey_or_rgb(decoded))
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
        // Neither PNG nor JPEG decodes to floats.
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
            let image = decode_image_file(&path).unwrap();
            let rgb: Vec<u8> = match image.channels() {
                1 => image.pixels().iter().flat_map(|&value| [value; 3]).collect(),
                _ => image.pixels().to_vec(),
            };
            assert_eq!(rgb, from_hex(&case["rgb"]), "{name}");
        }
    }

    #[test]
    fn errors_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broken.png");
        fs_err::write(&path, b"\x89PNG\r\n\x1a\nnot really").unwrap();
        let message = decode_image_file(&path).unwrap_err().to_string();
        assert!(message.starts_with("cannot decode `") && message.contains("broken.png"), "{message}");
        let missing = decode_image_file(&folder.path().join("missing.png")).unwrap_err().to_string();
        assert!(missing.contains("missing.png"), "{missing}");
    }
}
