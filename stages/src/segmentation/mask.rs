//! A binary mask, one byte per pixel: what is worked with. Stored masks are [`Rle`](super::rle::Rle).

/// Which pixels of an image belong to an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    height: usize,
    width: usize,
    /// `[row][column]`
    pixels: Vec<bool>,
}

/// Columns and rows of the outermost pixels, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub left: usize,
    pub top: usize,
    pub right: usize,
    pub bottom: usize,
}

impl Mask {
    /// # Panics
    /// If there is not one value per pixel.
    pub fn new(height: usize, width: usize, pixels: Vec<bool>) -> Self {
        assert_eq!(pixels.len(), height * width, "pixels of a {height}x{width} mask");
        Self { height, width, pixels }
    }

    pub fn from_fn(height: usize, width: usize, pixel: impl Fn(usize, usize) -> bool) -> Self {
        let pixels = (0..height * width).map(|at| pixel(at / width, at % width)).collect();
        Self { height, width, pixels }
    }

    pub fn height(&self) -> usize {
        self.height
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// Returns the pixels, `[row][column]`.
    pub fn pixels(&self) -> &[bool] {
        &self.pixels
    }

    pub fn get(&self, row: usize, column: usize) -> bool {
        self.pixels[row * self.width + column]
    }

    pub fn area(&self) -> u64 {
        self.pixels.iter().map(|&pixel| u64::from(pixel)).sum()
    }

    /// Takes the pixels of `other` out.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn remove(&mut self, other: &Self) {
        assert_eq!((self.height, self.width), (other.height, other.width), "masks of one image");
        for (pixel, &removed) in self.pixels.iter_mut().zip(&other.pixels) {
            *pixel &= !removed;
        }
    }

    /// Returns where the object lies; `None` if the mask is empty.
    pub fn bounds(&self) -> Option<Bounds> {
        let mut bounds: Option<Bounds> = None;
        for (row, pixels) in self.pixels.chunks_exact(self.width.max(1)).enumerate() {
            let Some(left) = pixels.iter().position(|&pixel| pixel) else { continue };
            let right = pixels.iter().rposition(|&pixel| pixel).unwrap_or(left);
            let before = bounds.unwrap_or(Bounds { left, top: row, right, bottom: row });
            bounds = Some(Bounds {
                left: before.left.min(left),
                top: before.top,
                right: before.right.max(right),
                bottom: row,
            });
        }
        bounds
    }
}

impl Bounds {
    /// The smallest rectangle around both.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self {
            left: self.left.min(other.left),
            top: self.top.min(other.top),
            right: self.right.max(other.right),
            bottom: self.bottom.max(other.bottom),
        }
    }

    pub fn height(self) -> usize {
        self.bottom - self.top + 1
    }

    pub fn width(self) -> usize {
        self.right - self.left + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_the_outermost_pixels() {
        let mask = Mask::from_fn(5, 7, |row, column| matches!((row, column), (1, 4) | (3, 2)));
        assert_eq!(mask.bounds(), Some(Bounds { left: 2, top: 1, right: 4, bottom: 3 }));
        assert_eq!(mask.area(), 2);
        assert_eq!(Mask::from_fn(3, 3, |_, _| false).bounds(), None);
        assert_eq!(Mask::from_fn(0, 0, |_, _| true).bounds(), None);
    }

    #[test]
    fn removed_pixels_are_gone() {
        let mut mask = Mask::from_fn(2, 2, |_, _| true);
        mask.remove(&Mask::from_fn(2, 2, |row, _| row == 0));
        assert_eq!(mask.pixels(), [false, false, true, true]);
    }
}
