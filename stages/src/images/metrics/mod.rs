//! Scores from logits: top-1 and top-5 counts here, the rest in modules.
//!
//! - [`quality`]: precision, recall, F1, calibration, likelihood; per class; bootstrap intervals;
//! - [`paired`]: two models on the same images;
//! - [`order`]: a head whose classes are in another order than the labels'.
//!
//! Ties: of equal logits the lower class comes first. For top-1 that is `argmax` taking the first maximum, as
//! `torch.argmax` does; top-5 extends the same order. Counts are whole numbers, so they add up exactly
//! however a dataset is cut into batches.

pub mod order;
pub mod paired;
pub mod quality;
mod resample;

use std::ops::AddAssign;

use ndarray::{ArrayRef1, ArrayRef2};

/// How many images were classified correctly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub images: u64,
    /// Images whose label has the largest logit.
    pub top1: u64,
    /// Images whose label is among the `k` largest logits.
    pub top5: u64,
    /// 5, or the number of classes if there are fewer.
    pub k: usize,
}

/// Why logits cannot be scored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetricsError {
    #[error("the logits of image {index} are not numbers: class {class} has NaN")]
    NotANumber { index: usize, class: usize },
    #[error("{logits} rows of logits, {labels} labels")]
    RowCount { logits: usize, labels: usize },
    #[error("dataset `{dataset}`: image {index} has label {label}, but the head has {classes} classes")]
    LabelOutOfRange { dataset: String, index: usize, label: u32, classes: usize },
    #[error("dataset `{dataset}`: {first} images were scored in one, {second} in the other")]
    Unpaired { dataset: String, first: usize, second: usize },
    #[error("the logits have no classes")]
    NoClasses,
}

/// Scores logits `[image, class]` against labels.
///
/// `first_index` is the index of the first row in `dataset`, for messages.
pub fn score(
    logits: &ArrayRef2<f32>,
    labels: &[u32],
    dataset: &str,
    first_index: usize,
) -> Result<Counts, MetricsError> {
    let (rows, classes) = logits.dim();
    if rows != labels.len() {
        return Err(MetricsError::RowCount { logits: rows, labels: labels.len() });
    }
    if classes == 0 {
        return Err(MetricsError::NoClasses);
    }
    let k = classes.min(5);
    let mut counts = Counts { images: rows as u64, k, ..Counts::default() };
    for (row, (logits, &label)) in logits.rows().into_iter().zip(labels).enumerate() {
        check_label(label, classes, dataset, first_index + row)?;
        check_numbers(&logits, first_index + row)?;
        let rank = rank(&logits, label as usize);
        counts.top1 += u64::from(rank == 0);
        counts.top5 += u64::from(rank < k);
    }
    Ok(counts)
}

/// Returns the class with the largest logit of every image, the first one if several are equal.
pub fn predictions(logits: &ArrayRef2<f32>, first_index: usize) -> Result<Vec<u32>, MetricsError> {
    if logits.ncols() == 0 {
        return Err(MetricsError::NoClasses);
    }
    let rows = logits.rows().into_iter().enumerate();
    rows.map(|(row, logits)| {
        check_numbers(&logits, first_index + row)?;
        let mut best = 0;
        for (class, &logit) in logits.iter().enumerate() {
            if logit > logits[best] {
                best = class;
            }
        }
        Ok(best as u32)
    })
    .collect()
}

/// Checks before any image is decoded that every label has a class.
pub fn check_labels(dataset: &str, labels: &[u32], classes: usize) -> Result<(), MetricsError> {
    labels.iter().enumerate().try_for_each(|(index, &label)| check_label(label, classes, dataset, index))
}

impl Counts {
    /// Returns the share of correct answers in 0..=1, or `None` without images.
    pub fn top1_accuracy(&self) -> Option<f64> {
        (self.images > 0).then(|| self.top1 as f64 / self.images as f64)
    }

    /// Returns the share of images whose label is among the `k` largest logits, or `None` without images.
    pub fn top5_accuracy(&self) -> Option<f64> {
        (self.images > 0).then(|| self.top5 as f64 / self.images as f64)
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.images += other.images;
        self.top1 += other.top1;
        self.top5 += other.top5;
        self.k = self.k.max(other.k);
    }
}

/// Counts the classes that come before `label`.
fn rank(logits: &ArrayRef1<f32>, label: usize) -> usize {
    let own = logits[label];
    logits
        .iter()
        .enumerate()
        .filter(|&(class, &logit)| logit > own || (logit == own && class < label))
        .count()
}

fn check_numbers(logits: &ArrayRef1<f32>, index: usize) -> Result<(), MetricsError> {
    match logits.iter().position(|logit| logit.is_nan()) {
        Some(class) => Err(MetricsError::NotANumber { index, class }),
        None => Ok(()),
    }
}

fn check_label(label: u32, classes: usize, dataset: &str, index: usize) -> Result<(), MetricsError> {
    if (label as usize) < classes {
        return Ok(());
    }
    Err(MetricsError::LabelOutOfRange { dataset: dataset.to_owned(), index, label, classes })
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, array};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn counts_the_largest_and_the_five_largest() {
        let logits = array![
            [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
            [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
            [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
        ];
        let counts = score(&logits, &[0, 4, 5], "digits", 0).unwrap();
        assert_eq!(counts, Counts { images: 3, top1: 1, top5: 2, k: 5 });
        assert_eq!(counts.top1_accuracy(), Some(1.0 / 3.0));
        assert_eq!(Counts::default().top5_accuracy(), None);
    }

    #[test]
    fn of_equal_logits_the_first_class_wins() {
        let logits = array![[0.0, 1.0, 1.0], [f32::INFINITY, 0.0, f32::INFINITY], [-0.0, 0.0, -1.0]];
        assert_eq!(predictions(&logits, 0).unwrap(), [1, 0, 0]);
        assert_eq!(score(&logits, &[1, 0, 0], "d", 0).unwrap().top1, 3);
        assert_eq!(score(&logits, &[2, 2, 1], "d", 0).unwrap().top1, 0);
    }

    #[test]
    fn with_few_classes_everything_is_among_the_largest() {
        let counts = score(&array![[1.0, 2.0]], &[0], "d", 0).unwrap();
        assert_eq!((counts.k, counts.top1, counts.top5), (2, 0, 1));
    }

    #[test]
    fn errors_name_image_label_and_classes() {
        let logits = array![[0.0, 1.0], [f32::NAN, 0.0]];
        let message = |result: Result<Counts, MetricsError>| result.unwrap_err().to_string();
        assert_eq!(
            message(score(&logits, &[0, 1], "digits", 64)),
            "the logits of image 65 are not numbers: class 0 has NaN"
        );
        assert_eq!(
            message(score(&logits, &[2, 1], "digits", 64)),
            "dataset `digits`: image 64 has label 2, but the head has 2 classes"
        );
        assert_eq!(message(score(&logits, &[0], "digits", 0)), "2 rows of logits, 1 labels");
        assert_eq!(
            check_labels("digits", &[0, 9, 10], 10).unwrap_err().to_string(),
            "dataset `digits`: image 2 has label 10, but the head has 10 classes"
        );
        assert_eq!(predictions(&Array2::zeros((1, 0)), 0), Err(MetricsError::NoClasses));
    }

    proptest! {
        #[test]
        fn batches_add_up_and_top1_agrees_with_predictions(
            values in proptest::collection::vec(-3_i8..4, 7..70), cut in 0_usize..11,
        ) {
            let rows = values.len() / 7;
            let logits = Array2::from_shape_fn((rows, 7), |(row, class)| f32::from(values[row * 7 + class]));
            let labels: Vec<u32> = (0..rows as u32).map(|row| row % 7).collect();
            let whole = score(&logits, &labels, "d", 0).unwrap();
            let (top, bottom) = logits.view().split_at(ndarray::Axis(0), cut.min(rows));
            let mut parts = score(&top, &labels[..cut.min(rows)], "d", 0).unwrap();
            parts += score(&bottom, &labels[cut.min(rows)..], "d", cut).unwrap();
            prop_assert_eq!(whole, parts);
            let predicted = predictions(&logits, 0).unwrap();
            let agreeing = predicted.iter().zip(&labels).filter(|(a, b)| a == b).count();
            prop_assert_eq!(whole.top1, agreeing as u64);
        }
    }
}
