//! What the tests of this module share.

use std::path::PathBuf;

use serde_json::Value;

use super::dataset::Image;

/// Returns the folder of test data that does not belong to the repository, or says that `test` is skipped: past the test
/// harness, which hides what passing tests print, and in one piece, so that the lines can be counted.
pub(crate) fn test_data(test: &str) -> Option<PathBuf> {
    let folder =
        std::env::var_os("MERGANSER_TEST_DATA").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    if folder.is_none() {
        let line = format!("skipped: {test} (MERGANSER_TEST_DATA is not set)\n");
        std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).unwrap();
    }
    folder
}

/// Decodes a JSON string of hexadecimal digits.
pub(crate) fn from_hex(value: &Value) -> Vec<u8> {
    let text = value.as_str().unwrap();
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// Returns pixel `(y, x, channel)` of the pattern that the golden scripts use.
pub(crate) fn pattern_pixel(y: usize, x: usize, channel: usize) -> u8 {
    let mut value = (y as u32).wrapping_mul(2_654_435_761)
        ^ (x as u32).wrapping_mul(2_246_822_519)
        ^ (channel as u32 + 1).wrapping_mul(3_266_489_917);
    value ^= value >> 15;
    value = value.wrapping_mul(2_246_822_519);
    value ^= value >> 13;
    // Half noise, half smooth ramp, with saturated patches: overshoot at edges must clip.
    if (y / 3 + x / 5).is_multiple_of(4) {
        if value & 1 == 0 { 0 } else { 255 }
    } else {
        (((value & 0x7f) as usize + y * 5 + x * 3 + channel * 40) & 0xff) as u8
    }
}

/// Returns the golden scripts' pattern as an image.
pub(crate) fn pattern_image(height: usize, width: usize, channels: usize) -> Image {
    let pixels = (0..height)
        .flat_map(|y| (0..width).flat_map(move |x| (0..channels).map(move |c| pattern_pixel(y, x, c))));
    Image::new(height, width, channels, pixels.collect())
}
