//! A linear classification head on embeddings: `logits = x / max(|x|, 1e-12) · Wᵀ + b`.
//!
//! The normalization is that of `torch.nn.functional.normalize`; it can be switched off. The norm is
//! accumulated in f64 and rounded once. Dot products are f32 in sixteen interleaved partial sums that are
//! added as a tree: the order depends on the length alone, so logits are the same on every machine and
//! for every thread and batch count. Against f64 they differ by about `1e-6` of the sum of magnitudes.
//!
//! Matrix libraries are avoided on purpose: they choose fused multiply-add by processor.

use ndarray::{Array1, Array2, ArrayRef1, ArrayRef2};
use rayon::prelude::*;

/// A linear classification head.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    /// `[classes, features]`, in row-major order.
    weight: Array2<f32>,
    /// `[classes]`
    bias: Array1<f32>,
    normalize: bool,
}

/// Why a head does not fit together, or does not fit the embeddings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    #[error("head: `bias` must have one value for each of the {classes} rows of `weight`, found {actual}")]
    Bias { classes: usize, actual: usize },
    #[error("head: `weight` must have at least one class and one feature, found [{classes}, {features}]")]
    Empty { classes: usize, features: usize },
    #[error("head: `{tensor}` holds a value that is not finite")]
    NotFinite { tensor: &'static str },
    #[error("the head expects embeddings of {expected} values, the graph gives {actual}")]
    Features { expected: usize, actual: usize },
}

impl Head {
    /// Builds a head from `weight` `[classes, features]` and `bias` `[classes]`.
    pub fn new(weight: Array2<f32>, bias: Array1<f32>, normalize: bool) -> Result<Self, HeadError> {
        let (classes, features) = weight.dim();
        if classes == 0 || features == 0 {
            return Err(HeadError::Empty { classes, features });
        }
        if bias.len() != classes {
            return Err(HeadError::Bias { classes, actual: bias.len() });
        }
        for (tensor, finite) in [
            ("weight", weight.iter().all(|value| value.is_finite())),
            ("bias", bias.iter().all(|value| value.is_finite())),
        ] {
            if !finite {
                return Err(HeadError::NotFinite { tensor });
            }
        }
        let weight =
            if weight.is_standard_layout() { weight } else { weight.as_standard_layout().into_owned() };
        Ok(Self { weight, bias, normalize })
    }

    pub fn classes(&self) -> usize {
        self.weight.nrows()
    }

    pub fn features(&self) -> usize {
        self.weight.ncols()
    }

    /// Returns `[classes, features]` in row-major order.
    pub fn weight(&self) -> &[f32] {
        self.weight.as_slice().expect("`new` made it contiguous")
    }

    /// Returns one value per class.
    pub fn bias(&self) -> Vec<f32> {
        self.bias.to_vec()
    }

    /// Tells whether features are divided by their norms first.
    pub fn normalizes(&self) -> bool {
        self.normalize
    }

    /// Returns the logits `[image, class]` of embeddings `[image, feature]`.
    pub fn logits(&self, embeddings: &ArrayRef2<f32>) -> Result<Array2<f32>, HeadError> {
        let (images, features) = embeddings.dim();
        if features != self.features() {
            return Err(HeadError::Features { expected: self.features(), actual: features });
        }
        let mut logits = Array2::zeros((images, self.classes()));
        let outputs = logits.as_slice_mut().expect("a new array is contiguous");
        outputs
            .par_chunks_mut(self.classes())
            .enumerate()
            .for_each(|(image, output)| self.write_logits(&embeddings.row(image), output));
        Ok(logits)
    }

    fn write_logits(&self, embedding: &ArrayRef1<f32>, output: &mut [f32]) {
        let mut features = embedding.to_vec();
        if self.normalize {
            normalize_l2(&mut features);
        }
        let weight = self.weight();
        for ((logit, row), bias) in output.iter_mut().zip(weight.chunks_exact(features.len())).zip(&self.bias)
        {
            *logit = dot(&features, row) + bias;
        }
    }
}

fn normalize_l2(values: &mut [f32]) {
    let squares: f64 = values.iter().fold(0.0, |sum, &value| sum + f64::from(value) * f64::from(value));
    let norm = (squares.sqrt() as f32).max(1e-12);
    for value in values {
        *value /= norm;
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0.0_f32; LANES];
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum += a * b;
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use ndarray::{Array, array, s};

    use super::*;

    fn wave(rows: usize, columns: usize, phase: f64) -> Array2<f32> {
        Array::from_shape_fn((rows, columns), |(row, column)| {
            ((row as f64 * 1.7 + column as f64 * 0.9 + phase).sin() * 2.0) as f32
        })
    }

    fn naive(head: &Head, embeddings: &Array2<f32>) -> Array2<f64> {
        let (weight, embeddings) = (head.weight.mapv(f64::from), embeddings.mapv(f64::from));
        Array::from_shape_fn((embeddings.nrows(), head.classes()), |(image, class)| {
            let x = embeddings.row(image);
            let norm = if head.normalize { x.dot(&x).sqrt().max(1e-12) } else { 1.0 };
            x.dot(&weight.row(class)) / norm + f64::from(head.bias[class])
        })
    }

    #[test]
    fn equals_the_formula_at_every_block_boundary() {
        for features in [1, 2, 15, 16, 17, 31, 32, 33, 512] {
            for normalize in [true, false] {
                let head =
                    Head::new(wave(7, features, 0.3), wave(1, 7, 2.0).row(0).to_owned(), normalize).unwrap();
                let embeddings = wave(5, features, 1.1);
                let logits = head.logits(&embeddings).unwrap();
                // f32 sums of at most 512 terms of magnitude 4.
                for (logit, expected) in logits.iter().zip(&naive(&head, &embeddings)) {
                    assert!((f64::from(*logit) - expected).abs() < 2e-4, "{logit} {expected}");
                }
            }
        }
    }

    #[test]
    fn logits_do_not_depend_on_batches_threads_or_layout() {
        let head = Head::new(wave(11, 50, 0.0), Array1::zeros(11), true).unwrap();
        let embeddings = wave(23, 50, 0.5);
        let whole = head.logits(&embeddings).unwrap();
        let part = head.logits(&embeddings.slice(s![5..9, ..])).unwrap();
        assert_eq!(whole.slice(s![5..9, ..]), part);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert_eq!(pool.install(|| head.logits(&embeddings).unwrap()), whole);
        let columns_first = embeddings.t().as_standard_layout().into_owned();
        assert_eq!(head.logits(&columns_first.t()).unwrap(), whole);
        let weight_columns_first = head.weight.t().as_standard_layout().into_owned().reversed_axes();
        let same = Head::new(weight_columns_first, Array1::zeros(11), true).unwrap();
        assert_eq!(same.logits(&embeddings).unwrap(), whole);
    }

    #[test]
    fn zero_embeddings_give_the_bias_and_nan_stays_nan() {
        let head = Head::new(array![[1.0, 2.0]], array![0.5], true).unwrap();
        assert_eq!(head.logits(&array![[0.0, 0.0]]).unwrap(), array![[0.5]]);
        assert!(head.logits(&array![[f32::NAN, 1.0]]).unwrap()[[0, 0]].is_nan());
        assert_eq!(head.logits(&Array2::zeros((0, 2))).unwrap().dim(), (0, 1));
    }

    #[test]
    fn shape_errors_name_both_sizes() {
        let message = |result: Result<Head, HeadError>| result.unwrap_err().to_string();
        assert_eq!(
            message(Head::new(Array2::zeros((10, 4)), Array1::zeros(9), true)),
            "head: `bias` must have one value for each of the 10 rows of `weight`, found 9"
        );
        assert_eq!(
            message(Head::new(Array2::zeros((0, 4)), Array1::zeros(0), true)),
            "head: `weight` must have at least one class and one feature, found [0, 4]"
        );
        assert_eq!(
            message(Head::new(array![[f32::NAN]], array![0.0], true)),
            "head: `weight` holds a value that is not finite"
        );
        let head = Head::new(Array2::zeros((10, 64)), Array1::zeros(10), true).unwrap();
        assert_eq!(
            head.logits(&Array2::zeros((2, 96))).unwrap_err().to_string(),
            "the head expects embeddings of 64 values, the graph gives 96"
        );
    }
}
