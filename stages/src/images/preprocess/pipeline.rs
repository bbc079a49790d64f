//! Applying a [`Preprocess`] to images and batches.
//!
//! The steps are those of transformers' PIL/NumPy image processors, in their order and precision:
//!
//! ```text
//! RGB -> resize (bytes) -> centre crop (bytes, black padding; see `CropRounding`)
//!     -> f32(f64(byte) * rescale) -> (value - f32(mean)) / f32(std), in f32
//! ```
//!
//! A byte has 256 values, so the float steps are a table per channel: exact and as fast as a copy. Grey images
//! are resized as one channel and replicated afterwards, which gives the same bytes. Exactness: bit-exact
//! with transformers for what Pillow decodes alike. (Transformers' torchvision processors resize with another
//! implementation, whose bytes differ by one here and there.)

use std::ops::Range;

use ndarray::{Array3, Array4};
use rayon::prelude::*;

use super::super::dataset::{Dataset, Image};
use super::config::{CropRounding, Normalize, Preprocess, Size};
use super::error::PreprocessError;
use super::planes::Planes;
use super::resize::Resizer;

/// Applies a [`Preprocess`]; holds its tables, and can be shared between threads.
#[derive(Debug)]
pub struct Preprocessor {
    config: Preprocess,
    resizer: Resizer,
    /// Byte to float: one table for all channels or one per channel.
    tables: Vec<[f32; 256]>,
}

/// The most pixels that an image may be resized to.
const MAX_PIXELS: usize = 1 << 26;

/// Float input of one image: channels, height, width.
pub(super) type Shape = (usize, usize, usize);

impl Preprocessor {
    /// Checks a configuration and computes its tables.
    pub fn new(config: Preprocess) -> Result<Self, PreprocessError> {
        check(&config)?;
        let tables = tables(&config);
        Ok(Self { resizer: Resizer::new(config.resample), config, tables })
    }

    pub fn config(&self) -> &Preprocess {
        &self.config
    }

    /// Returns the bytes before rescaling: in RGB if the configuration says so, resized and cropped.
    pub fn pixels(&self, image: &Image) -> Result<Image, PreprocessError> {
        let planes = self.resized(image, &this_image)?;
        let image = planes.to_image();
        if self.channels(&planes) == planes.channels {
            return Ok(image);
        }
        let rgb = image.pixels().iter().flat_map(|&grey| [grey; 3]).collect();
        Ok(Image::new(image.height(), image.width(), 3, rgb))
    }

    /// Returns the model's input for one image, `[channel][row][column]`.
    pub fn input(&self, image: &Image) -> Result<Array3<f32>, PreprocessError> {
        let planes = self.resized(image, &this_image)?;
        let shape = self.shape(&planes, &this_image)?;
        let mut values = vec![0.0; shape.0 * shape.1 * shape.2];
        self.write_floats(&planes, &mut values);
        Ok(Array3::from_shape_vec(shape, values).expect("the buffer was sized by the shape"))
    }

    /// Returns the model's inputs for images `range` of `dataset`, `[image][channel][row][column]`.
    ///
    /// Decodes and resizes in parallel on the current rayon pool; of several faulty images the first is
    /// reported.
    pub fn batch(&self, dataset: &dyn Dataset, range: Range<usize>) -> Result<Array4<f32>, PreprocessError> {
        self.batch_into(dataset, range, Vec::new())
    }

    /// As [`Preprocessor::batch`], in the memory of an earlier batch (`array.into_raw_vec_and_offset().0`).
    ///
    /// Fresh memory for a large batch costs several times as much as the preprocessing of small images.
    pub fn batch_into(
        &self,
        dataset: &dyn Dataset,
        range: Range<usize>,
        buffer: Vec<f32>,
    ) -> Result<Array4<f32>, PreprocessError> {
        if range.start > range.end || range.end > dataset.len() {
            return Err(PreprocessError::Range { start: range.start, end: range.end, len: dataset.len() });
        }
        let shape = match self.fixed_shape() {
            Some(shape) => shape,
            None if range.is_empty() => (3, 0, 0),
            None => {
                let describe = || dataset.describe(range.start);
                self.shape(&self.resized(&dataset.image(range.start)?, &describe)?, &describe)?
            }
        };
        let per_image = shape.0 * shape.1 * shape.2;
        let mut values = buffer;
        values.resize(range.len() * per_image, 0.0);
        let failure = values
            .par_chunks_mut(per_image.max(1))
            .zip(range.clone())
            .map(|(output, index)| self.fill(dataset, index, shape, output))
            .find_first(Result::is_err);
        if let Some(failure) = failure {
            failure?;
        }
        let shape = (range.len(), shape.0, shape.1, shape.2);
        Ok(Array4::from_shape_vec(shape, values).expect("the buffer was sized by the shape"))
    }

    fn fill(
        &self,
        dataset: &dyn Dataset,
        index: usize,
        expected: Shape,
        output: &mut [f32],
    ) -> Result<(), PreprocessError> {
        let describe = || dataset.describe(index);
        let planes = self.resized(&dataset.image(index)?, &describe)?;
        self.write(&planes, expected, &describe, output)
    }

    /// Writes the input for an image that was resized.
    pub(super) fn write(
        &self,
        planes: &Planes,
        expected: Shape,
        describe: &dyn Fn() -> String,
        output: &mut [f32],
    ) -> Result<(), PreprocessError> {
        let actual = self.shape(planes, describe)?;
        if actual != expected {
            let text = |shape: Shape| format!("{}x{}x{}", shape.0, shape.1, shape.2);
            return Err(PreprocessError::Ragged {
                image: describe(),
                expected: text(expected),
                actual: text(actual),
            });
        }
        self.write_floats(planes, output);
        Ok(())
    }

    /// Returns the shape of every input, if it does not depend on the image.
    pub(super) fn fixed_shape(&self) -> Option<Shape> {
        let size = self.config.output_size().filter(|_| self.config.convert_rgb)?;
        Some((3, size.height, size.width))
    }

    /// Resizes and crops, computing only what the crop keeps.
    pub(super) fn resized(
        &self,
        image: &Image,
        describe: &dyn Fn() -> String,
    ) -> Result<Planes, PreprocessError> {
        let source = Size { height: image.height(), width: image.width() };
        let target = self.config.resize.map_or(source, |resize| resize.target(source));
        let crop = self.config.crop.unwrap_or(target);
        let (rows, top) = window(target.height, crop.height, self.config.crop_rounding);
        let (columns, left) = window(target.width, crop.width, self.config.crop_rounding);
        if rows.len().saturating_mul(columns.len()) > MAX_PIXELS
            || target.height.max(target.width) > MAX_PIXELS
        {
            let Size { height, width } = target;
            return Err(PreprocessError::TooLarge { image: describe(), height, width, most: MAX_PIXELS });
        }
        let visible = self.resizer.resize(image, target, rows, columns);
        if (visible.height, visible.width) == (crop.height, crop.width) {
            return Ok(visible);
        }
        let mut data = vec![0; visible.channels * crop.height * crop.width];
        for (channel, plane) in data.chunks_exact_mut(crop.height * crop.width).enumerate() {
            let from = visible.data[channel * visible.height * visible.width..].chunks_exact(visible.width);
            let to = plane.chunks_exact_mut(crop.width).skip(top);
            for (to, from) in to.zip(from).take(visible.height) {
                to[left..left + visible.width].copy_from_slice(from);
            }
        }
        Ok(Planes { channels: visible.channels, height: crop.height, width: crop.width, data })
    }

    fn channels(&self, planes: &Planes) -> usize {
        if self.config.convert_rgb { 3 } else { planes.channels }
    }

    pub(super) fn shape(
        &self,
        planes: &Planes,
        describe: &dyn Fn() -> String,
    ) -> Result<Shape, PreprocessError> {
        let channels = self.channels(planes);
        for (field, values) in
            self.config.normalize.iter().flat_map(|n| [("image_mean", &n.mean), ("image_std", &n.std)])
        {
            if values.len() != 1 && values.len() != channels {
                let (image, expected) = (describe(), values.len());
                return Err(PreprocessError::Channels { image, field, expected, actual: channels });
            }
        }
        Ok((channels, planes.height, planes.width))
    }

    fn write_floats(&self, planes: &Planes, output: &mut [f32]) {
        let plane = planes.height * planes.width;
        for (channel, output) in output.chunks_exact_mut(plane).enumerate() {
            let source = channel % planes.channels; // grey is replicated
            let table = &self.tables[channel % self.tables.len()];
            for (value, &byte) in output.iter_mut().zip(&planes.data[source * plane..][..plane]) {
                *value = table[usize::from(byte)];
            }
        }
    }
}

/// Returns which of `length` positions a centre crop to `crop` keeps, and where in the result they go.
fn window(length: usize, crop: usize, rounding: CropRounding) -> (Range<usize>, usize) {
    if crop <= length {
        let left_over = length - crop;
        let start = match rounding {
            CropRounding::Down => left_over / 2,
            // Half of an odd number, to the even one.
            CropRounding::HalfEven => left_over / 2 + usize::from(left_over % 4 == 3),
        };
        (start..start + crop, 0)
    } else {
        let missing = crop - length;
        let top = match rounding {
            CropRounding::Down => missing.div_ceil(2),
            CropRounding::HalfEven => missing / 2,
        };
        (0..length, top)
    }
}

fn tables(config: &Preprocess) -> Vec<[f32; 256]> {
    let value = |byte: usize| match config.rescale {
        Some(factor) => (byte as f64 * factor) as f32,
        None => byte as f32,
    };
    let Some(Normalize { mean, std }) = &config.normalize else {
        return vec![std::array::from_fn(value)];
    };
    (0..mean.len().max(std.len()))
        .map(|channel| {
            let (mean, std) = (mean[channel % mean.len()] as f32, std[channel % std.len()] as f32);
            std::array::from_fn(|byte| (value(byte) - mean) / std)
        })
        .collect()
}

fn check(config: &Preprocess) -> Result<(), PreprocessError> {
    let wrong = |field, expected, found: String| Err(PreprocessError::Config { field, expected, found });
    let sizes =
        [("size", config.resize.map(|resize| resize.target(Size::square(1)))), ("crop_size", config.crop)];
    for (field, size) in sizes {
        if let Some(Size { height, width }) = size
            && (height == 0 || width == 0 || height.saturating_mul(width) > MAX_PIXELS)
        {
            return wrong(field, "at least 1x1 and at most 67108864 pixels", format!("{height}x{width}"));
        }
    }
    if let Some(factor) = config.rescale.filter(|factor| !factor.is_finite()) {
        return wrong("rescale_factor", "finite", factor.to_string());
    }
    let Some(Normalize { mean, std }) = &config.normalize else { return Ok(()) };
    for (field, values) in [("image_mean", mean), ("image_std", std)] {
        if !matches!(values.len(), 1 | 3) || values.iter().any(|value| !value.is_finite()) {
            return wrong(field, "1 or 3 finite numbers", format!("{values:?}"));
        }
    }
    if std.iter().any(|&value| value as f32 == 0.0) {
        return wrong("image_std", "different from zero", format!("{std:?}"));
    }
    Ok(())
}

fn this_image() -> String {
    "the image".to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::super::dataset::DatasetError;
    use super::super::super::test_support::pattern_image;
    use super::super::config::Resize;
    use super::*;

    /// Images of a pattern, of the given sizes.
    struct Patterns {
        sizes: Vec<(usize, usize, usize)>,
        labels: Vec<u32>,
    }

    impl Patterns {
        fn new(sizes: &[(usize, usize, usize)]) -> Self {
            Self { sizes: sizes.to_vec(), labels: vec![0; sizes.len()] }
        }
    }

    impl Dataset for Patterns {
        fn labels(&self) -> &[u32] {
            &self.labels
        }
        fn image(&self, index: usize) -> Result<Image, DatasetError> {
            let (height, width, channels) = self.sizes[index];
            if height == 0 {
                return Err(DatasetError::IndexOutOfRange { index, len: 0 });
            }
            Ok(pattern_image(height, width, channels))
        }
        fn classes(&self) -> Option<&[String]> {
            None
        }
        fn describe(&self, index: usize) -> String {
            format!("pattern {index}")
        }
    }

    fn crc32(bytes: &[u8]) -> u64 {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        u64::from(crc.sum())
    }

    #[test]
    fn equals_transformers_bit_by_bit() {
        let golden: Value = serde_json::from_str(include_str!("testdata/processed.json")).unwrap();
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() > 20);
        for case in cases {
            let number = |name: &str| case[name].as_u64().unwrap() as usize;
            let mut config = case["config"].clone();
            config["image_processor_type"] = "CLIPImageProcessor".into();
            let config = Preprocess::from_hf_value(&config, "golden").unwrap();
            let image = pattern_image(number("height"), number("width"), number("channels"));
            let input = Preprocessor::new(config).unwrap().input(&image).unwrap();
            let shape: Vec<usize> = serde_json::from_value(case["shape"].clone()).unwrap();
            assert_eq!(input.shape(), shape, "{case}");
            assert_eq!(f64::from(input[[0, 0, 0]]), case["first"].as_f64().unwrap(), "{case}");
            let bytes: Vec<u8> = input.iter().flat_map(|value| value.to_le_bytes()).collect();
            assert_eq!(crc32(&bytes), case["crc32"].as_u64().unwrap(), "{case}");
        }
    }

    #[test]
    fn batches_hold_the_single_inputs_whatever_the_thread_count() {
        let dataset = Patterns::new(&[(9, 7, 1), (30, 40, 3), (8, 8, 3), (50, 3, 1), (12, 12, 1)]);
        let preprocessor = Preprocessor::new(Preprocess::clip(10)).unwrap();
        let batch_on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| preprocessor.batch(&dataset, 1..5).unwrap())
        };
        let batch = batch_on(1);
        assert_eq!(batch.shape(), [4, 3, 10, 10]);
        for index in 0..4 {
            let single = preprocessor.input(&dataset.image(index + 1).unwrap()).unwrap();
            assert_eq!(batch.index_axis(ndarray::Axis(0), index), single);
        }
        assert_eq!(batch, batch_on(3));
        let reused = preprocessor.batch(&dataset, 0..3).unwrap().into_raw_vec_and_offset().0;
        assert_eq!(batch, preprocessor.batch_into(&dataset, 1..5, reused).unwrap());
        assert_eq!(preprocessor.batch(&dataset, 2..2).unwrap().shape(), [0, 3, 10, 10]);
    }

    #[test]
    fn pixels_are_the_bytes_behind_the_floats() {
        let preprocessor = Preprocessor::new(Preprocess { normalize: None, ..Preprocess::clip(6) }).unwrap();
        for channels in [1, 3] {
            let image = pattern_image(9, 14, channels);
            let pixels = preprocessor.pixels(&image).unwrap();
            assert_eq!((pixels.height(), pixels.width(), pixels.channels()), (6, 6, 3));
            let input = preprocessor.input(&image).unwrap();
            for ((y, x, c), byte) in ndarray::indices((6, 6, 3)).into_iter().zip(pixels.pixels()) {
                assert_eq!(input[[c, y, x]], (f64::from(*byte) * (1.0 / 255.0)) as f32);
            }
        }
    }

    #[test]
    fn without_conversion_channels_must_fit_the_normalization() {
        let config = Preprocess { convert_rgb: false, ..Preprocess::clip(4) };
        let dataset = Patterns::new(&[(4, 4, 3), (4, 4, 1)]);
        let message =
            Preprocessor::new(config.clone()).unwrap().batch(&dataset, 0..2).unwrap_err().to_string();
        assert_eq!(message, "pattern 1 has 1 channels, `image_mean` has 3 values");
        let one = Normalize { mean: vec![0.5], std: vec![0.25] };
        let preprocessor = Preprocessor::new(Preprocess { normalize: Some(one), ..config }).unwrap();
        assert_eq!(preprocessor.batch(&dataset, 1..2).unwrap().shape(), [1, 1, 4, 4]);
        assert_eq!(
            preprocessor.batch(&dataset, 0..2).unwrap_err().to_string(),
            "pattern 1 becomes 1x4x4 (channels x height x width), others in the batch 3x4x4; \
             set an exact size or a crop"
        );
    }

    #[test]
    fn reports_the_first_of_several_faulty_images() {
        let dataset = Patterns::new(&[(4, 4, 1), (4, 4, 1), (0, 0, 0), (4, 4, 1), (0, 0, 0)]);
        let preprocessor = Preprocessor::new(Preprocess::clip(4)).unwrap();
        for _ in 0..20 {
            let error = preprocessor.batch(&dataset, 0..5).unwrap_err();
            assert!(matches!(
                error,
                PreprocessError::Dataset(DatasetError::IndexOutOfRange { index: 2, .. })
            ));
        }
        assert_eq!(
            preprocessor.batch(&dataset, 3..6).unwrap_err().to_string(),
            "images 3..6 were asked for, the dataset holds 5"
        );
    }

    #[test]
    fn a_crop_bounds_the_work_and_absurd_sizes_are_refused() {
        let sliver = pattern_image(1, 40_000, 1);
        let preprocessor = Preprocessor::new(Preprocess::clip(224)).unwrap();
        assert_eq!(preprocessor.input(&sliver).unwrap().shape(), [3, 224, 224]);
        let uncropped = Preprocessor::new(Preprocess { crop: None, ..Preprocess::clip(224) }).unwrap();
        assert_eq!(
            uncropped.input(&sliver).unwrap_err().to_string(),
            "the image would be resized to 224x8960000 pixels; the most is 67108864 pixels"
        );
    }

    #[test]
    fn refuses_configurations_that_mean_nothing() {
        let clip = || Preprocess::clip(8);
        let normalize = |mean: &[f64], std: &[f64]| Preprocess {
            normalize: Some(Normalize { mean: mean.to_vec(), std: std.to_vec() }),
            ..clip()
        };
        let cases = [
            (
                Preprocess { crop: Some(Size { height: 0, width: 4 }), ..clip() },
                "`crop_size` must be at least",
            ),
            (Preprocess { resize: Some(Resize::ShortestEdge(0)), ..clip() }, "`size` must be at least"),
            (Preprocess { rescale: Some(f64::NAN), ..clip() }, "`rescale_factor` must be finite, found NaN"),
            (normalize(&[0.5; 2], &[1.0]), "`image_mean` must be 1 or 3 finite numbers"),
            (normalize(&[0.5; 3], &[1.0, 0.0, 1.0]), "`image_std` must be different from zero"),
        ];
        for (config, expected) in cases {
            let message = Preprocessor::new(config).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn windows_follow_the_centre_crop_of_transformers() {
        let down = |length, crop| window(length, crop, CropRounding::Down);
        assert_eq!(down(10, 4), (3..7, 0));
        assert_eq!(down(11, 4), (3..7, 0));
        assert_eq!(down(4, 4), (0..4, 0));
        assert_eq!(down(3, 8), (0..3, 3));
        assert_eq!(down(1, 2), (0..1, 1));
    }

    #[test]
    fn windows_follow_the_centre_crop_of_torchvision() {
        let even = |length, crop| window(length, crop, CropRounding::HalfEven);
        assert_eq!([4, 5, 6, 7, 8, 9, 11].map(|length| even(length, 4).0.start), [0, 0, 1, 2, 2, 2, 4]);
        assert_eq!(even(3, 8), (0..3, 2));
        assert_eq!(even(1, 2), (0..1, 0));
    }
}
