//! What a model's logits say beyond counts: precision, recall and F1 (macro averages), calibration, likelihood.
//!
//! - Macro averages are plain means over the classes that occur among labels or answers (as scikit-learn's
//!   `average="macro"`); a class that was never answered has precision 0, one that never occurs has recall 0.
//! - ECE is the expected calibration error of Guo et al. (ICML 2017, arXiv:1706.04599, eq. 3): fifteen bins of equal
//!   width over the probability of the answer, `(b/15, (b+1)/15]`; Σ nᵦ/n · |accuracyᵦ − mean probabilityᵦ|.
//! - NLL is the mean of −ln softmax(logits) at the label, in nats.
//!
//! Probabilities and sums are in f64, over images in order.

use super::resample::{interval, replicates};
use super::{MetricsError, check_label, check_numbers, rank};
use ndarray::{ArrayRef1, ArrayRef2};
use serde::Serialize;

/// Bins of the calibration error.
pub const BINS: usize = 15;

/// The number of [`METRICS`].
const N_METRICS: usize = METRICS.len();

/// A number that sums a model's answers up.
pub struct Metric {
    /// What it is called in results.
    pub id: &'static str,
    /// Whether it is a share, which people read in percent.
    pub is_share: bool,
    value: fn(&Tally) -> f64,
}

/// All metrics, in the order in which they are shown.
pub const METRICS: [Metric; 7] = [
    Metric { id: "accuracy", is_share: true, value: |tally| tally.share(|image| image.correct) },
    Metric { id: "top5", is_share: true, value: |tally| tally.share(|image| image.top5) },
    Metric { id: "macro_precision", is_share: true, value: |tally| tally.macro_mean(ClassTally::precision) },
    Metric { id: "macro_recall", is_share: true, value: |tally| tally.macro_mean(ClassTally::recall) },
    Metric { id: "macro_f1", is_share: true, value: |tally| tally.macro_mean(ClassTally::f1) },
    Metric { id: "ece", is_share: true, value: Tally::calibration_error },
    Metric { id: "nll", is_share: false, value: |tally| tally.loss / tally.images as f64 },
];

/// A metric's value with its 95 % bootstrap interval.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    pub metric: &'static str,
    pub value: f64,
    /// `None` where a resampled value is not a number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<(f64, f64)>,
}

/// One class's share of the answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ClassTally {
    /// Images of the class.
    pub images: u64,
    /// Images that the model says are of it.
    pub answers: u64,
    /// Images of it that the model says are.
    pub correct: u64,
}

/// One image's answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer {
    pub label: u32,
    /// The class with the largest logit.
    pub predicted: u32,
    /// Whether the label is among the five largest logits.
    pub top5: bool,
    /// softmax(logits) at the predicted class
    pub confidence: f64,
    /// −ln softmax(logits) at the label
    pub loss: f64,
}

/// What a set of answers adds up to.
#[derive(Clone, Debug)]
struct Tally {
    images: u64,
    counts: Counted,
    classes: Vec<ClassTally>,
    bins: [Bin; BINS],
    loss: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    correct: u64,
    top5: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bin {
    images: u64,
    correct: u64,
    confidence: f64,
}

/// Reads the answers out of logits `[image, class]`.
pub fn answers(logits: &ArrayRef2<f32>, labels: &[u32], dataset: &str) -> Result<Vec<Answer>, MetricsError> {
    let (rows, classes) = logits.dim();
    if rows != labels.len() {
        return Err(MetricsError::RowCount { logits: rows, labels: labels.len() });
    }
    if classes == 0 {
        return Err(MetricsError::NoClasses);
    }
    let each = logits.rows().into_iter().zip(labels).enumerate();
    each.map(|(index, (logits, &label))| {
        check_label(label, classes, dataset, index)?;
        check_numbers(&logits, index)?;
        Ok(answer(&logits, label))
    })
    .collect()
}

fn answer(logits: &ArrayRef1<f32>, label: u32) -> Answer {
    let mut predicted = 0;
    for (class, &logit) in logits.iter().enumerate() {
        if logit > logits[predicted] {
            predicted = class;
        }
    }
    let largest = f64::from(logits[predicted]);
    // Of infinite logits each takes an equal part.
    let above = |logit: f32| if f64::from(logit) == largest { 0.0 } else { f64::from(logit) - largest };
    let sum: f64 = logits.iter().map(|&logit| above(logit).exp()).sum();
    Answer {
        label,
        predicted: predicted as u32,
        top5: rank(logits, label as usize) < 5,
        confidence: 1.0 / sum,
        loss: sum.ln() - above(logits[label as usize]),
    }
}

/// All metrics of a model's answers, with intervals from resampled images. Empty without images.
pub fn estimate(answers: &[Answer], classes: usize) -> Vec<Estimate> {
    if answers.is_empty() {
        return Vec::new();
    }
    let whole = Tally::of(answers.iter(), classes).values();
    let drawn = replicates(answers.len(), |drawn| {
        Tally::of(drawn.iter().map(|&index| &answers[index as usize]), classes).values()
    });
    METRICS
        .iter()
        .enumerate()
        .map(|(nth, metric)| Estimate {
            metric: metric.id,
            value: whole[nth],
            interval: interval(drawn.iter().map(|values| values[nth])),
        })
        .collect()
}

/// Counts per class, in class order.
pub fn per_class(answers: &[Answer], classes: usize) -> Vec<ClassTally> {
    Tally::of(answers.iter(), classes).classes
}

impl ClassTally {
    /// The share of its images that were found; also the class's accuracy. 0 without images.
    pub fn recall(&self) -> f64 {
        ratio(self.correct, self.images)
    }

    /// The share of the answers that are right; 0 without answers.
    pub fn precision(&self) -> f64 {
        ratio(self.correct, self.answers)
    }

    /// The harmonic mean of precision and recall.
    pub fn f1(&self) -> f64 {
        ratio(2 * self.correct, self.images + self.answers)
    }
}

impl Answer {
    pub fn is_correct(&self) -> bool {
        self.label == self.predicted
    }
}

impl Tally {
    fn of<'a>(answers: impl Iterator<Item = &'a Answer>, classes: usize) -> Self {
        let mut tally = Self {
            images: 0,
            counts: Counted::default(),
            classes: vec![ClassTally::default(); classes],
            bins: [Bin::default(); BINS],
            loss: 0.0,
        };
        for answer in answers {
            let correct = u64::from(answer.is_correct());
            tally.images += 1;
            tally.counts.correct += correct;
            tally.counts.top5 += u64::from(answer.top5);
            tally.classes[answer.label as usize].images += 1;
            tally.classes[answer.predicted as usize].answers += 1;
            tally.classes[answer.label as usize].correct += correct;
            let bin = &mut tally.bins[bin_of(answer.confidence)];
            bin.images += 1;
            bin.correct += correct;
            bin.confidence += answer.confidence;
            tally.loss += answer.loss;
        }
        tally
    }

    fn values(&self) -> [f64; N_METRICS] {
        METRICS.map(|metric| (metric.value)(self))
    }

    fn share(&self, count: fn(&Counted) -> u64) -> f64 {
        ratio(count(&self.counts), self.images)
    }

    fn macro_mean(&self, value: fn(&ClassTally) -> f64) -> f64 {
        let occurring = self.classes.iter().filter(|class| class.images + class.answers > 0);
        let (n, sum) = occurring.fold((0u64, 0.0), |(n, sum), class| (n + 1, sum + value(class)));
        sum / n as f64
    }

    fn calibration_error(&self) -> f64 {
        let off = self.bins.iter().map(|bin| (bin.correct as f64 - bin.confidence).abs());
        off.sum::<f64>() / self.images as f64
    }
}

/// The bin whose interval, open below and closed above, holds a probability.
fn bin_of(confidence: f64) -> usize {
    let position = (confidence * BINS as f64).ceil() as usize;
    position.clamp(1, BINS) - 1
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, array};

    fn value(estimates: &[Estimate], metric: &str) -> f64 {
        estimates.iter().find(|estimate| estimate.metric == metric).unwrap().value
    }

    /// scikit-learn 1.x's example of `precision_recall_fscore_support`, worked out by hand: labels 0 1 2 0 1 2, answers 0 2 1 0 0 1.
    #[test]
    fn macro_averages_are_those_of_scikit_learn() {
        let logit = |class: usize| -> [f32; 3] { std::array::from_fn(|i| f32::from(u8::from(i == class))) };
        let rows: Vec<f32> = [0, 2, 1, 0, 0, 1].into_iter().flat_map(logit).collect();
        let logits = Array2::from_shape_vec((6, 3), rows).unwrap();
        let answers = answers(&logits, &[0, 1, 2, 0, 1, 2], "d").unwrap();
        let found = estimate(&answers, 3);
        assert!((value(&found, "macro_precision") - 2.0 / 9.0).abs() < 1e-12);
        assert!((value(&found, "macro_recall") - 1.0 / 3.0).abs() < 1e-12);
        assert!((value(&found, "macro_f1") - 4.0 / 15.0).abs() < 1e-12);
        assert_eq!(value(&found, "accuracy"), 1.0 / 3.0);
        let classes = per_class(&answers, 3);
        assert_eq!(classes[0], ClassTally { images: 2, answers: 3, correct: 2 });
        assert_eq!((classes[0].recall(), classes[1].recall()), (1.0, 0.0));
    }

    #[test]
    fn a_class_that_occurs_nowhere_does_not_count() {
        let logits = array![[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]];
        let found = estimate(&answers(&logits, &[0, 1, 1], "d").unwrap(), 4);
        // class 0: precision 1/2, recall 1; class 1: precision 1, recall 1/2; 2 and 3 do not occur
        assert_eq!(value(&found, "macro_precision"), 0.75);
        assert_eq!(value(&found, "macro_recall"), 0.75);
    }

    #[test]
    fn likelihood_and_calibration_are_the_formulas() {
        let logits = Array2::from_shape_fn((90, 7), |(i, c)| ((i * 13 + c * 29) as f32 * 0.37).sin() * 3.0);
        let labels: Vec<u32> = (0..90).map(|i| i * 5 % 7).collect();
        let found = estimate(&answers(&logits, &labels, "d").unwrap(), 7);
        let (mut nll, mut bins) = (0.0, vec![(0.0, 0.0); BINS]);
        for (row, &label) in logits.rows().into_iter().zip(&labels) {
            let exp: Vec<f64> = row.iter().map(|&x| f64::from(x).exp()).collect();
            let total: f64 = exp.iter().sum();
            let best = (0..7).max_by(|&a, &b| exp[a].total_cmp(&exp[b])).unwrap();
            nll -= (exp[label as usize] / total).ln();
            let p = exp[best] / total;
            // The bins by their definition, not by rounding.
            let bin = (0..BINS).find(|&b| p <= (b + 1) as f64 / BINS as f64).unwrap();
            bins[bin].0 += p;
            bins[bin].1 += f64::from(u8::from(best == label as usize));
        }
        let ece: f64 = bins.iter().map(|(p, hits): &(f64, f64)| (hits - p).abs() / 90.0).sum();
        assert!((value(&found, "nll") - nll / 90.0).abs() < 1e-12);
        assert!((value(&found, "ece") - ece).abs() < 1e-12);
        for estimate in found {
            let (low, high) = estimate.interval.unwrap();
            assert!(low <= high && low.is_finite(), "{estimate:?}");
        }
    }

    #[test]
    fn certainty_and_doubt_lie_in_the_outermost_bins() {
        assert_eq!((bin_of(1.0), bin_of(0.0), bin_of(1.0 / 15.0), bin_of(0.0667)), (14, 0, 0, 1));
        let sure = answers(&array![[100.0, 0.0], [f32::INFINITY, 0.0]], &[0, 0], "d").unwrap();
        assert_eq!(value(&estimate(&sure, 2), "ece"), 0.0);
        assert_eq!(value(&estimate(&sure, 2), "nll"), 0.0);
        let wrong = answers(&array![[f32::INFINITY, 0.0]], &[1], "d").unwrap();
        assert_eq!(value(&estimate(&wrong, 2), "nll"), f64::INFINITY);
        let torn = answers(&array![[f32::INFINITY, f32::INFINITY]], &[1], "d").unwrap();
        assert_eq!(torn[0].confidence, 0.5);
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        assert_eq!(estimate(&[], 3), []);
        assert!(answers(&array![[f32::NAN, 0.0]], &[0], "d").is_err());
        assert!(answers(&array![[0.0, 0.0]], &[2], "d").is_err());
        assert!(answers(&array![[0.0, 0.0]], &[], "d").is_err());
        assert!(answers(&Array2::<f32>::zeros((1, 0)), &[0], "d").is_err());
    }
}
