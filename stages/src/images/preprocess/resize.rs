//! `PIL.Image.resize` on bytes, restricted to a window of the result.
//!
//! Two passes, rounded to bytes in between; a pass whose axis keeps its size is left out, so resizing to the
//! same size returns the input. The horizontal pass goes first unless the height loses more than twice as
//! many pixels as the width: the order shows in the last bits, and this is the rule of Pillow 13 (older
//! versions go horizontal first unless an image is 100 times as tall as wide). Each output pixel depends
//! only on its own taps, so computing a window (what a centre crop keeps) gives the same bytes as cropping
//! the whole result.
//!
//! INVARIANT: bit-exact with Pillow 13 for 8-bit images of 1 and 3 channels and all six filters.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::super::dataset::Image;
use super::config::Size;
use super::planes::Planes;
use super::taps::{Filter, Taps};

/// Resizes images with one filter and remembers coefficients.
#[derive(Debug)]
pub(super) struct Resizer {
    filter: Filter,
    taps: Mutex<HashMap<TapsKey, Arc<Taps>>>,
}

type TapsKey = (usize, usize, usize, usize);

/// Datasets of many image sizes would otherwise collect tables without end.
const MAX_CACHED_TAPS: usize = 256;

impl Resizer {
    pub(super) fn new(filter: Filter) -> Self {
        Self { filter, taps: Mutex::default() }
    }

    /// Returns rows `rows` and columns `columns` of `image` resized to `target`.
    pub(super) fn resize(
        &self,
        image: &Image,
        target: Size,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> Planes {
        let vertical =
            (target.height != image.height()).then(|| self.taps(image.height(), target.height, &rows));
        let horizontal =
            (target.width != image.width()).then(|| self.taps(image.width(), target.width, &columns));
        let source_rows = vertical.as_ref().map_or((rows.start, rows.end), |taps| taps.source_range());
        let source_columns =
            horizontal.as_ref().map_or((columns.start, columns.end), |taps| taps.source_range());
        let (first_row, first_column) = (source_rows.0, source_columns.0);
        let source = Planes::from_image(image, source_rows, source_columns);
        match (horizontal, vertical) {
            (None, None) => source,
            (None, Some(vertical)) => source.resampled_rows(&vertical, first_row),
            (Some(horizontal), None) => {
                source.transposed().resampled_rows(&horizontal, first_column).transposed()
            }
            (Some(horizontal), Some(vertical)) if vertical_first(image, target) => source
                .resampled_rows(&vertical, first_row)
                .transposed()
                .resampled_rows(&horizontal, first_column)
                .transposed(),
            (Some(horizontal), Some(vertical)) => source
                .transposed()
                .resampled_rows(&horizontal, first_column)
                .transposed()
                .resampled_rows(&vertical, first_row),
        }
    }

    fn taps(&self, source: usize, target: usize, window: &Range<usize>) -> Arc<Taps> {
        let key = (source, target, window.start, window.end);
        // A poisoned map is still a map of correct tables.
        let lock = || self.taps.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(taps) = lock().get(&key) {
            return Arc::clone(taps);
        }
        let taps = Arc::new(Taps::new(self.filter, source, target, window.start, window.end));
        let mut cached = lock();
        if cached.len() >= MAX_CACHED_TAPS {
            cached.clear();
        }
        cached.insert(key, Arc::clone(&taps));
        taps
    }
}

fn vertical_first(image: &Image, target: Size) -> bool {
    let lost = |from: usize, to: usize| from as i64 - to as i64;
    let (rows, columns) = (lost(image.height(), target.height), lost(image.width(), target.width));
    rows > 0 && rows > 2 * columns
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::super::super::test_support::{from_hex, pattern_image};
    use super::*;

    fn resize(image: &Image, filter: Filter, height: usize, width: usize) -> Image {
        Resizer::new(filter).resize(image, Size { height, width }, 0..height, 0..width).to_image()
    }

    #[test]
    fn equals_pillow_bit_by_bit() {
        let golden: Value = serde_json::from_str(include_str!("testdata/resize.json")).unwrap();
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() > 100);
        for case in cases {
            let number = |name: &str| case[name].as_u64().unwrap() as usize;
            let image = pattern_image(number("in_h"), number("in_w"), number("channels"));
            let filter = Filter::from_number(case["resample"].as_u64().unwrap()).unwrap();
            let resized = resize(&image, filter, number("out_h"), number("out_w"));
            if case["pixels"].is_string() {
                assert_eq!(resized.pixels(), from_hex(&case["pixels"]), "{case}");
            }
            let mut crc = flate2::Crc::new();
            crc.update(resized.pixels());
            assert_eq!(u64::from(crc.sum()), case["crc32"].as_u64().unwrap(), "{case}");
        }
    }

    #[test]
    fn the_same_size_returns_the_input() {
        for filter in Filter::ALL {
            let image = pattern_image(9, 13, 3);
            assert_eq!(resize(&image, filter, 9, 13), image);
        }
    }

    /// One pass over one channel, written from the formula: dot products along each line.
    fn naive_pass(lines: &[Vec<u8>], taps: &Taps) -> Vec<Vec<u8>> {
        let value = |line: &[u8], output: usize| match taps {
            Taps::Pick(picks) => picks[output].map_or(0, |index| line[index]),
            Taps::Sum { outputs, weights } => {
                let output = outputs[output];
                let sum: i64 = (0..output.count)
                    .map(|tap| {
                        i64::from(line[output.first + tap]) * i64::from(weights[output.weights_at + tap])
                    })
                    .sum();
                ((sum + (1 << 21)).div_euclid(1 << 22)).clamp(0, 255) as u8
            }
        };
        lines.iter().map(|line| (0..taps.len()).map(|output| value(line, output)).collect()).collect()
    }

    fn flip(lines: &[Vec<u8>]) -> Vec<Vec<u8>> {
        (0..lines[0].len()).map(|column| lines.iter().map(|line| line[column]).collect()).collect()
    }

    fn naive(image: &Image, filter: Filter, height: usize, width: usize) -> Vec<u8> {
        let channels: Vec<_> = (0..image.channels())
            .map(|channel| {
                let mut lines: Vec<Vec<u8>> = image
                    .pixels()
                    .chunks_exact(image.width() * image.channels())
                    .map(|line| line.iter().skip(channel).step_by(image.channels()).copied().collect())
                    .collect();
                let (rows, columns) =
                    (image.height() as f64 - height as f64, image.width() as f64 - width as f64);
                let vertical_first = rows > 0.0 && rows > columns * 2.0;
                for axis in
                    if vertical_first { ["vertical", "horizontal"] } else { ["horizontal", "vertical"] }
                {
                    if axis == "horizontal" && width != image.width() {
                        lines = naive_pass(&lines, &Taps::new(filter, image.width(), width, 0, width));
                    }
                    if axis == "vertical" && height != image.height() {
                        let taps = Taps::new(filter, image.height(), height, 0, height);
                        lines = flip(&naive_pass(&flip(&lines), &taps));
                    }
                }
                lines
            })
            .collect();
        let mut pixels = Vec::new();
        for y in 0..height {
            for x in 0..width {
                pixels.extend(channels.iter().map(|channel| channel[y][x]));
            }
        }
        pixels
    }

    proptest! {
        #[test]
        fn equals_the_naive_reference_and_windows_equal_crops(
            in_h in 1_usize..40, in_w in 1_usize..40, out_h in 1_usize..40, out_w in 1_usize..40,
            rgb in any::<bool>(), number in 0_u64..6, cut in 0_usize..1000,
        ) {
            let image = pattern_image(in_h, in_w, if rgb { 3 } else { 1 });
            let filter = Filter::from_number(number).unwrap();
            let whole = resize(&image, filter, out_h, out_w);
            prop_assert_eq!(whole.pixels(), naive(&image, filter, out_h, out_w));
            let (top, left) = (cut % out_h, (cut / 7) % out_w);
            let target = Size { height: out_h, width: out_w };
            let window = Resizer::new(filter).resize(&image, target, top..out_h, left..out_w);
            let cropped = Planes::from_image(&whole, (top, out_h), (left, out_w));
            prop_assert_eq!(window, cropped);
        }
    }

    #[test]
    fn the_table_cache_stays_bounded() {
        let resizer = Resizer::new(Filter::Bicubic);
        let image = pattern_image(4, 4, 1);
        for side in 5..400 {
            resizer.resize(&image, Size::square(side), 0..1, 0..1);
        }
        assert!(resizer.taps.lock().unwrap().len() <= MAX_CACHED_TAPS);
    }
}
