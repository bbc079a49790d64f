//! A decoded image: 8 bits per channel, grey or RGB, rows top to bottom, channels interleaved.

/// A decoded image of one (grey) or three (RGB) 8-bit channels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    height: usize,
    width: usize,
    channels: usize,
    /// `height * width * channels` bytes, `[row][column][channel]`.
    pixels: Vec<u8>,
}

impl Image {
    /// Builds an image from interleaved pixels.
    ///
    /// # Panics
    /// If a dimension is zero, `channels` is neither 1 nor 3, or the number of bytes does not fit: callers
    /// hand over bytes they have already checked.
    pub fn new(height: usize, width: usize, channels: usize, pixels: Vec<u8>) -> Self {
        assert!(channels == 1 || channels == 3, "an image has 1 or 3 channels, got {channels}");
        assert!(height > 0 && width > 0, "an image has at least one pixel, got {height}x{width}");
        assert_eq!(pixels.len(), height * width * channels, "bytes of a {height}x{width}x{channels} image");
        Self { height, width, channels, pixels }
    }

    pub fn height(&self) -> usize {
        self.height
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// Returns 1 (grey) or 3 (RGB).
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Returns the bytes, `[row][column][channel]`.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Turns and mirrors the image as an Exif orientation (1 to 8) says that it is to be seen; other numbers mean 1.
    #[must_use]
    pub fn oriented(self, orientation: u8) -> Self {
        let (height, width, channels) = (self.height, self.width, self.channels);
        // Where pixel (y, x) of the result comes from; from 5 on rows and columns are swapped.
        let source = |y: usize, x: usize| match orientation {
            2 => (y, width - 1 - x),
            3 => (height - 1 - y, width - 1 - x),
            4 => (height - 1 - y, x),
            5 => (x, y),
            6 => (height - 1 - x, y),
            7 => (height - 1 - x, width - 1 - y),
            _ => (x, width - 1 - y),
        };
        let (new_height, new_width) = match orientation {
            2..=4 => (height, width),
            5..=8 => (width, height),
            _ => return self,
        };
        let mut pixels = Vec::with_capacity(self.pixels.len());
        for (y, x) in (0..new_height).flat_map(|y| (0..new_width).map(move |x| (y, x))) {
            let (from_y, from_x) = source(y, x);
            pixels.extend_from_slice(&self.pixels[(from_y * width + from_x) * channels..][..channels]);
        }
        Self::new(new_height, new_width, channels, pixels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orientations_are_those_of_exif() {
        // What `PIL.ImageOps.exif_transpose` makes of the rows 1 2 3 / 4 5 6.
        let image = Image::new(2, 3, 1, vec![1, 2, 3, 4, 5, 6]);
        let expected: [(u8, [u8; 6]); 8] = [
            (1, [1, 2, 3, 4, 5, 6]),
            (2, [3, 2, 1, 6, 5, 4]),
            (3, [6, 5, 4, 3, 2, 1]),
            (4, [4, 5, 6, 1, 2, 3]),
            (5, [1, 4, 2, 5, 3, 6]),
            (6, [4, 1, 5, 2, 6, 3]),
            (7, [6, 3, 5, 2, 4, 1]),
            (8, [3, 6, 2, 5, 1, 4]),
        ];
        for (orientation, pixels) in expected {
            let turned = image.clone().oriented(orientation);
            assert_eq!(turned.pixels(), pixels, "{orientation}");
            assert_eq!(turned.height(), if orientation < 5 { 2 } else { 3 });
        }
        assert_eq!(image.clone().oriented(0), image);
    }
}
