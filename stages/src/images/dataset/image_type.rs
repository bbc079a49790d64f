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
}
