//! Images of a dataset that are decoded and resized once, whatever number of models look at them.
//!
//! What is kept are the bytes before rescaling (a quarter of the floats, which a table makes from them as fast as a copy would be), as long as there is
//! room; what does not fit is prepared again. Nothing depends on whether an image was kept.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use ndarray::Array4;
use rayon::prelude::*;

use super::super::dataset::Dataset;
use super::error::PreprocessError;
use super::pipeline::Preprocessor;
use super::planes::Planes;

/// Memory for pixels that are kept, which datasets share; counted in bytes.
#[derive(Clone, Debug)]
pub struct Room(Arc<AtomicUsize>);

impl Room {
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(bytes)))
    }

    /// Takes memory if there is as much.
    fn take(&self, bytes: usize) -> bool {
        let less = |room: usize| room.checked_sub(bytes);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A dataset with its preprocessing. Can be shared between threads and models.
pub struct PreparedImages {
    images: Box<dyn Dataset>,
    preprocessor: Preprocessor,
    kept: Vec<OnceLock<Planes>>,
    room: Room,
}

impl PreparedImages {
    /// Keeps pixels as long as there is `room`.
    pub fn new(images: Box<dyn Dataset>, preprocessor: Preprocessor, room: Room) -> Self {
        let kept = (0..images.len()).map(|_| OnceLock::new()).collect();
        Self { images, preprocessor, kept, room }
    }

    pub fn dataset(&self) -> &dyn Dataset {
        &*self.images
    }

    pub fn preprocessor(&self) -> &Preprocessor {
        &self.preprocessor
    }

    /// Returns the model's inputs for images `range`, `[image][channel][row][column]`, in the memory of an earlier batch
    /// (`array.into_raw_vec_and_offset().0`).
    ///
    /// Works in parallel on the current rayon pool; of several faulty images the first is reported.
    pub fn batch(&self, range: Range<usize>, buffer: Vec<f32>) -> Result<Array4<f32>, PreprocessError> {
        let len = self.images.len();
        if range.start > range.end || range.end > len {
            return Err(PreprocessError::Range { start: range.start, end: range.end, len });
        }
        self.fill(range.len(), |position| range.start + position, buffer)
    }

    /// Returns the model's inputs for any images, in the order given; otherwise as [`batch`](Self::batch).
    pub fn gather(&self, images: &[usize], buffer: Vec<f32>) -> Result<Array4<f32>, PreprocessError> {
        let len = self.images.len();
        if let Some(&outside) = images.iter().find(|&&image| image >= len) {
            return Err(PreprocessError::Range { start: outside, end: outside + 1, len });
        }
        self.fill(images.len(), |position| images[position], buffer)
    }

    fn fill(
        &self,
        n: usize,
        image: impl Fn(usize) -> usize + Sync,
        buffer: Vec<f32>,
    ) -> Result<Array4<f32>, PreprocessError> {
        let shape = match self.preprocessor.fixed_shape() {
            Some(shape) => shape,
            None if n == 0 => (3, 0, 0),
            None => self.with(image(0), |planes, describe| self.preprocessor.shape(planes, describe))?,
        };
        let per_image = shape.0 * shape.1 * shape.2;
        let mut values = buffer;
        values.resize(n * per_image, 0.0);
        let outputs = values.par_chunks_mut(per_image.max(1)).zip(0..n);
        let filled = outputs.map(|(output, position)| {
            self.with(image(position), |planes, describe| {
                self.preprocessor.write(planes, shape, describe, output)
            })
        });
        if let Some(failure) = filled.find_first(Result::is_err) {
            failure?;
        }
        let shape = (n, shape.0, shape.1, shape.2);
        Ok(Array4::from_shape_vec(shape, values).expect("the buffer was sized by the shape"))
    }

    /// Looks at the pixels of an image, kept or prepared anew.
    fn with<T>(
        &self,
        index: usize,
        look: impl FnOnce(&Planes, &dyn Fn() -> String) -> Result<T, PreprocessError>,
    ) -> Result<T, PreprocessError> {
        let describe = || self.images.describe(index);
        let slot = &self.kept[index];
        if let Some(planes) = slot.get() {
            return look(planes, &describe);
        }
        let planes = self.preprocessor.resized(&self.images.image(index)?, &describe)?;
        let result = look(&planes, &describe)?;
        let bytes = planes.data.len();
        // Another thread may have been faster.
        if self.room.take(bytes) && slot.set(planes).is_err() {
            self.room.give_back(bytes);
        }
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::test_support::pattern_image;
    use super::super::config::Preprocess;
    use super::*;
    use crate::images::dataset::{DatasetError, DecodeError, Image};

    /// Patterns of several sizes, one of which may be broken; counts what is decoded.
    struct Counted {
        labels: [u32; 12],
        broken: Option<usize>,
        decoded: Arc<AtomicUsize>,
    }

    impl Dataset for Counted {
        fn labels(&self) -> &[u32] {
            &self.labels
        }

        fn image(&self, index: usize) -> Result<Image, DatasetError> {
            self.decoded.fetch_add(1, Ordering::Relaxed);
            if self.broken == Some(index) {
                return Err(DatasetError::Decode {
                    name: self.describe(index),
                    source: DecodeError::Unknown,
                });
            }
            Ok(pattern_image(5 + index % 7, 9 + index % 3, if index.is_multiple_of(2) { 3 } else { 1 }))
        }

        fn classes(&self) -> Option<&[String]> {
            None
        }

        fn describe(&self, index: usize) -> String {
            format!("pattern {index}")
        }
    }

    fn counted(broken: Option<usize>) -> (Counted, Arc<AtomicUsize>) {
        let decoded = Arc::new(AtomicUsize::new(0));
        (Counted { labels: [0; 12], broken, decoded: decoded.clone() }, decoded)
    }

    fn prepared(images: Counted, config: Preprocess, room: usize) -> PreparedImages {
        PreparedImages::new(Box::new(images), Preprocessor::new(config).unwrap(), Room::new(room))
    }

    #[test]
    fn batches_equal_those_of_the_preprocessor_whether_kept_or_not() {
        let expected = Preprocessor::new(Preprocess::clip(8)).unwrap().batch(&counted(None).0, 2..9).unwrap();
        // A pattern of 8x8 pixels takes 64 bytes in grey, 192 in colour.
        for (room, decoded_in_all) in [(0, 21), (200, 19), (1 << 20, 7)] {
            let (images, decoded) = counted(None);
            let prepared = prepared(images, Preprocess::clip(8), room);
            for _ in 0..3 {
                assert_eq!(prepared.batch(2..9, vec![7.0; 5]).unwrap(), expected);
            }
            let decoded = decoded.load(Ordering::Relaxed);
            // Which images find room depends on the threads.
            assert!(
                decoded <= decoded_in_all && (room == 200 || decoded == decoded_in_all),
                "{room}: {decoded}"
            );
        }
    }

    #[test]
    fn any_images_in_any_order_are_those_of_the_batches() {
        let prepared = prepared(counted(None).0, Preprocess::clip(8), 0);
        let images = [7, 0, 7, 11];
        let gathered = prepared.gather(&images, vec![1.0; 3]).unwrap();
        for (position, &image) in images.iter().enumerate() {
            let alone = prepared.batch(image..image + 1, Vec::new()).unwrap();
            assert_eq!(
                gathered.index_axis(ndarray::Axis(0), position),
                alone.index_axis(ndarray::Axis(0), 0)
            );
        }
        assert_eq!(prepared.gather(&[], Vec::new()).unwrap().shape(), [0, 3, 8, 8]);
        assert!(prepared.gather(&[0, 12], Vec::new()).is_err());
    }

    #[test]
    fn faults_are_those_of_the_first_image() {
        let all = prepared(counted(Some(4)).0, Preprocess::clip(8), 1 << 20);
        assert_eq!(all.batch(0..12, Vec::new()).unwrap_err().to_string(), "cannot decode pattern 4");
        assert_eq!(all.batch(5..12, Vec::new()).unwrap().shape(), [7, 3, 8, 8]);
        assert_eq!(all.batch(3..3, Vec::new()).unwrap().shape(), [0, 3, 8, 8]);
        assert!(all.batch(3..13, Vec::new()).is_err());
        let uncropped = Preprocess { crop: None, ..Preprocess::clip(8) };
        let ragged =
            prepared(counted(None).0, uncropped, 0).batch(0..12, Vec::new()).unwrap_err().to_string();
        assert!(ragged.contains("others in the batch"), "{ragged}");
    }
}
