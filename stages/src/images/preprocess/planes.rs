//! Planar bytes and the two kernels that resizing is made of.
//!
//! The convolution works on whole rows (`output row = sum of weight * source row`), which vectorizes without
//! any shuffling; the other axis goes through the same kernel between two transpositions, which cost less than
//! dot products along a row. Portable and safe, and on x86-64 still somewhat faster than Pillow.

use super::super::dataset::Image;
use super::taps::{PRECISION_BITS, TapRange, Taps};

/// Bytes of one or more channels, `[channel][row][column]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Planes {
    pub(super) channels: usize,
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) data: Vec<u8>,
}

impl Planes {
    /// Copies a rectangle of an image.
    pub(super) fn from_image(image: &Image, rows: (usize, usize), columns: (usize, usize)) -> Self {
        let (channels, image_width) = (image.channels(), image.width());
        let (height, width) = (rows.1 - rows.0, columns.1 - columns.0);
        let mut data = vec![0; channels * height * width];
        let lines = image.pixels().chunks_exact(image_width * channels).skip(rows.0).take(height);
        let lines = lines.map(|line| &line[columns.0 * channels..columns.1 * channels]);
        if channels == 1 {
            for (line, row) in lines.zip(data.chunks_exact_mut(width)) {
                row.copy_from_slice(line);
            }
        } else {
            let (red, rest) = data.split_at_mut(height * width);
            let (green, blue) = rest.split_at_mut(height * width);
            let red_and_green = red.chunks_exact_mut(width).zip(green.chunks_exact_mut(width));
            let planes = red_and_green.zip(blue.chunks_exact_mut(width));
            for (line, ((red, green), blue)) in lines.zip(planes) {
                let (pixels, _) = line.as_chunks::<3>();
                let outputs = red.iter_mut().zip(green).zip(blue);
                for (&[r, g, b], ((red, green), blue)) in pixels.iter().zip(outputs) {
                    (*red, *green, *blue) = (r, g, b);
                }
            }
        }
        Self { channels, height, width, data }
    }

    /// Interleaves the channels.
    pub(super) fn to_image(&self) -> Image {
        let plane = self.height * self.width;
        let pixels = (0..plane).flat_map(|at| (0..self.channels).map(move |c| self.data[c * plane + at]));
        Image::new(self.height, self.width, self.channels, pixels.collect())
    }

    /// Swaps rows and columns.
    pub(super) fn transposed(&self) -> Self {
        let (height, width) = (self.height, self.width);
        let mut data = vec![0; self.data.len()];
        for (from, to) in self.data.chunks_exact(height * width).zip(data.chunks_exact_mut(height * width)) {
            transpose(from, height, width, to);
        }
        Self { channels: self.channels, height: width, width: height, data }
    }

    /// Resamples the rows of every plane; tap index `first_row` is row 0.
    pub(super) fn resampled_rows(&self, taps: &Taps, first_row: usize) -> Self {
        let (height, width) = (taps.len(), self.width);
        let mut data = vec![0; self.channels * height * width];
        let mut sums = vec![0_i32; width];
        for (from, to) in
            self.data.chunks_exact(self.height * width).zip(data.chunks_exact_mut(height * width))
        {
            let rows = to.chunks_exact_mut(width);
            match taps {
                Taps::Pick(picks) => {
                    for (&pick, row) in picks.iter().zip(rows) {
                        if let Some(source) = pick {
                            row.copy_from_slice(&from[(source - first_row) * width..][..width]);
                        }
                    }
                }
                Taps::Sum { outputs, weights } => {
                    for (&output, row) in outputs.iter().zip(rows) {
                        let TapRange { first, count, weights_at } = output;
                        let source = &from[(first - first_row) * width..][..count * width];
                        weighted_sum(source, &weights[weights_at..][..count], &mut sums, row);
                    }
                }
            }
        }
        Self { channels: self.channels, height, width, data }
    }
}

/// Sums rows of `source` with fixed-point weights, rounds and clips.
///
/// Four rows at a time halve the traffic on the sums. Plain loops over whole rows on purpose: tiles held in
/// registers are a third faster where the compiler vectorizes them, and several times slower where it does not.
fn weighted_sum(source: &[u8], weights: &[i32], sums: &mut [i32], output: &mut [u8]) {
    sums.fill(1 << (PRECISION_BITS - 1));
    let mut rows = source.chunks_exact(output.len());
    let (quads, rest) = weights.as_chunks::<4>();
    for &[k0, k1, k2, k3] in quads {
        let (Some(r0), Some(r1), Some(r2), Some(r3)) = (rows.next(), rows.next(), rows.next(), rows.next())
        else {
            break;
        };
        for ((((sum, &p0), &p1), &p2), &p3) in sums.iter_mut().zip(r0).zip(r1).zip(r2).zip(r3) {
            *sum += i32::from(p0) * k0 + i32::from(p1) * k1 + i32::from(p2) * k2 + i32::from(p3) * k3;
        }
    }
    for (&weight, row) in rest.iter().zip(rows) {
        for (sum, &pixel) in sums.iter_mut().zip(row) {
            *sum += i32::from(pixel) * weight;
        }
    }
    for (value, &sum) in output.iter_mut().zip(&*sums) {
        *value = (sum >> PRECISION_BITS).clamp(0, 255) as u8;
    }
}

/// Transposes in blocks of 8 by 8 bytes.
fn transpose(from: &[u8], height: usize, width: usize, to: &mut [u8]) {
    const BLOCK: usize = 8;
    let (whole_height, whole_width) = (height / BLOCK * BLOCK, width / BLOCK * BLOCK);
    for top in (0..whole_height).step_by(BLOCK) {
        for left in (0..whole_width).step_by(BLOCK) {
            let mut block: [u64; BLOCK] = std::array::from_fn(|row| {
                let bytes = &from[(top + row) * width + left..];
                u64::from_le_bytes(*bytes.first_chunk().expect("the block lies within the rows"))
            });
            transpose_block(&mut block);
            for (column, bytes) in block.iter().enumerate() {
                to[(left + column) * height + top..][..BLOCK].copy_from_slice(&bytes.to_le_bytes());
            }
        }
    }
    for row in 0..height {
        let done = if row < whole_height { whole_width } else { 0 };
        for column in done..width {
            to[column * height + row] = from[row * width + column];
        }
    }
}

/// Transposes 8 rows of 8 bytes: quadrants, then their quadrants, then single bytes change places.
fn transpose_block(rows: &mut [u64; 8]) {
    for (distance, mask) in
        [(4, 0x0000_0000_ffff_ffff), (2, 0x0000_ffff_0000_ffff), (1, 0x00ff_00ff_00ff_00ff_u64)]
    {
        let bits = 8 * distance;
        for upper in (0..8).filter(|row| row & distance == 0) {
            let lower = upper + distance;
            let changed = ((rows[upper] >> bits) ^ rows[lower]) & mask;
            rows[upper] ^= changed << bits;
            rows[lower] ^= changed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::test_support::{pattern_image, pattern_pixel};
    use super::*;

    #[test]
    fn planes_and_images_convert_back_and_forth() {
        for (height, width, channels) in
            [(1, 1, 1), (5, 3, 3), (7, 8, 1), (9, 8, 3), (17, 33, 3), (16, 15, 1)]
        {
            let image = pattern_image(height, width, channels);
            let planes = Planes::from_image(&image, (0, height), (0, width));
            assert_eq!(planes.to_image(), image);
            let transposed = planes.transposed();
            for (y, x, c) in [(0, 0, 0), (height - 1, width - 1, channels - 1), (height / 2, width - 1, 0)] {
                assert_eq!(transposed.data[(c * width + x) * height + y], pattern_pixel(y, x, c));
            }
            assert_eq!(transposed.transposed(), planes);
        }
    }

    #[test]
    fn transposition_equals_the_definition_at_every_block_boundary() {
        for (height, width) in [(1, 9), (7, 7), (8, 8), (9, 16), (15, 17), (24, 8)] {
            let from: Vec<u8> = (0..height * width).map(|at| (at * 7 + at / 256) as u8).collect();
            let mut to = vec![0; from.len()];
            transpose(&from, height, width, &mut to);
            for at in 0..from.len() {
                assert_eq!(to[at % width * height + at / width], from[at], "{height}x{width} at {at}");
            }
        }
    }

    #[test]
    fn a_rectangle_is_cut_out() {
        let planes = Planes::from_image(&pattern_image(6, 7, 3), (2, 5), (1, 7));
        assert_eq!((planes.height, planes.width), (3, 6));
        assert_eq!(planes.data[2 * 18 + 6 + 4], pattern_pixel(3, 5, 2));
    }
}
