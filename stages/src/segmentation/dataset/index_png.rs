//! PNG files whose pixels say which object they belong to.
//!
//! Grey or palette, of 1 to 16 bits; of a palette the index counts, not the colour. 0 is the background.

use super::super::SegmentationError;
use super::super::mask::Mask;
use super::super::rle::Rle;
use png::{BitDepth, ColorType, Decoder, Transformations};
use std::collections::BTreeSet;
use std::io::BufReader;
use std::path::Path;

/// Which object every pixel belongs to.
#[derive(Debug)]
pub(super) struct Indices {
    height: usize,
    width: usize,
    /// `[row][column]`
    values: Vec<u16>,
    /// Whether the values are indices into a palette.
    pub(super) is_palette: bool,
}

impl Indices {
    /// Reads the file of an image of `height`×`width` pixels.
    pub(super) fn read(path: &Path, height: usize, width: usize) -> Result<Self, SegmentationError> {
        let broken = |source| SegmentationError::Png { path: path.to_owned(), source };
        let mut decoder = Decoder::new(BufReader::new(fs_err::File::open(path)?));
        decoder.set_transformations(Transformations::IDENTITY);
        let mut reader = decoder.read_info().map_err(broken)?;
        let info = reader.info();
        let (found, expected) = ((info.height as usize, info.width as usize), (height, width));
        if found != expected {
            return Err(SegmentationError::Size { path: path.to_owned(), expected, found });
        }
        let is_palette = match info.color_type {
            ColorType::Indexed => true,
            ColorType::Grayscale => false,
            other => {
                let reason =
                    format!("its pixels are {other:?}, expected grey values or indices of a palette");
                return Err(SegmentationError::Annotation { path: path.to_owned(), reason });
            }
        };
        let depth = info.bit_depth;
        // The size is the image's, which was decoded before: no longer a mere claim.
        let mut bytes = vec![0; reader.output_buffer_size().unwrap_or(0)];
        let frame = reader.next_frame(&mut bytes).map_err(broken)?;
        let mut values = Vec::with_capacity(height * width);
        for row in bytes.chunks_exact(frame.line_size.max(1)).take(height) {
            values.extend((0..width).map(|column| value(row, column, depth)));
        }
        if values.len() != height * width {
            let reason = format!("it has {} pixels, expected {}", values.len(), height * width);
            return Err(SegmentationError::Annotation { path: path.to_owned(), reason });
        }
        Ok(Self { height, width, values, is_palette })
    }

    /// Returns the values that occur, 0 aside, in ascending order.
    pub(super) fn objects(&self) -> BTreeSet<u16> {
        self.values.iter().copied().filter(|&value| value != 0).collect()
    }

    /// Returns the pixels of which `belongs` is true.
    pub(super) fn mask(&self, belongs: impl Fn(u16) -> bool) -> Rle {
        let pixels = self.values.iter().map(|&value| belongs(value)).collect();
        Rle::of(&Mask::new(self.height, self.width, pixels))
    }
}

/// A packed row's value; the leftmost pixel is in the highest bits.
fn value(row: &[u8], column: usize, depth: BitDepth) -> u16 {
    let packed = |bits: usize| {
        let at = column * bits;
        u16::from(row[at / 8] >> (8 - bits - at % 8)) & ((1 << bits) - 1)
    };
    match depth {
        BitDepth::One => packed(1),
        BitDepth::Two => packed(2),
        BitDepth::Four => packed(4),
        BitDepth::Eight => u16::from(row[column]),
        BitDepth::Sixteen => u16::from_be_bytes([row[2 * column], row[2 * column + 1]]),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::images::test_support::from_hex;

    #[test]
    fn values_are_those_of_pillow() {
        let golden: Value = serde_json::from_str(include_str!("../testdata/pngs.json")).unwrap();
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() >= 7);
        let folder = tempfile::tempdir().unwrap();
        for case in cases {
            let path = folder.path().join("mask.png");
            fs_err::write(&path, from_hex(&case["png"])).unwrap();
            let expected: Vec<Vec<u16>> = serde_json::from_value(case["values"].clone()).unwrap();
            let indices = Indices::read(&path, expected.len(), expected[0].len()).unwrap();
            assert_eq!(indices.values, expected.concat(), "{}", case["kind"]);
            assert_eq!(indices.is_palette, case["palette"].as_bool().unwrap());
        }
    }

    #[test]
    fn other_sizes_and_colours_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mask.png");
        let write = |colour: ColorType, pixel: usize| {
            let mut encoder = png::Encoder::new(std::fs::File::create(&path).unwrap(), 3, 2);
            encoder.set_color(colour);
            encoder.write_header().unwrap().write_image_data(&vec![7; 6 * pixel]).unwrap();
        };
        write(ColorType::Rgb, 3);
        let error = Indices::read(&path, 2, 3).unwrap_err().to_string();
        assert!(
            error.ends_with("its pixels are Rgb, expected grey values or indices of a palette"),
            "{error}"
        );
        write(ColorType::Grayscale, 1);
        let error = Indices::read(&path, 3, 2).unwrap_err().to_string();
        assert!(error.ends_with("mask.png` is 3x2 pixels, its image 2x3"), "{error}");
        assert_eq!(Indices::read(&path, 2, 3).unwrap().objects(), BTreeSet::from([7]));
    }

    proptest! {
        #[test]
        fn damaged_files_are_errors(at in 0_usize..200, byte: u8, length in 0_usize..200) {
            let golden: Value = serde_json::from_str(include_str!("../testdata/pngs.json")).unwrap();
            let mut bytes = from_hex(&golden["cases"][3]["png"]);
            if let Some(own) = bytes.get_mut(at) {
                *own = byte;
            }
            bytes.truncate(length.max(8));
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("mask.png");
            fs_err::write(&path, bytes).unwrap();
            // Neither a panic nor an endless allocation; what can still be read is of the image's size.
            if let Ok(indices) = Indices::read(&path, 5, 11) {
                prop_assert_eq!(indices.values.len(), 55);
            }
        }
    }
}
