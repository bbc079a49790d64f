//! Scores: the artifact of an evaluation. Its manifest holds the numbers, its blob the logits they came from.

use blake3::Hash;
use serde::{Deserialize, Serialize};

/// The manifest of a scores artifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scores {
    content: Tag,
    pub rows: Vec<ScoreRow>,
    /// Class names in label order, where they are known: label i is `classes[i]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
    /// Which images were scored; earlier versions did not say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<Images>,
    /// What port `baseline` scored on the same images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Baseline>,
}

/// The scores that others are measured by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Baseline {
    /// Their artifact, which keeps its own logits.
    #[serde(with = "merganser_tensors::manifest::hex")]
    pub artifact: Hash,
    pub rows: Vec<ScoreRow>,
}

/// Which images were scored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Images {
    /// Digest of format, split, limit or subset, number of classes, and of the files in their order with their labels. The same for the same
    /// images, wherever they lie.
    #[serde(with = "merganser_tensors::manifest::hex")]
    pub manifest: Hash,
    /// Images that were scored.
    pub n: u64,
    /// Images that cannot be decoded and were left out.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skipped: u64,
    /// Of the scored ones, those that are training images too, where these are named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_training: Option<u64>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Tells scores from other manifests.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Tag {
    Scores,
}

/// One number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreRow {
    /// The dataset's name.
    pub task: String,
    /// `accuracy` (top-1), `top5`; of masks `point_miou`, `point_j`, `point_f`, `point_j_and_f` and the same of boxes; or `normalized_accuracy`: accuracy divided by the baseline's.
    pub metric: String,
    /// A share between 0 and 1; a normalized accuracy may exceed 1.
    pub value: f64,
    /// Images scored; of masks how many, or how many objects.
    pub n: u64,
    /// Images counted as correct, where the metric counts images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correct: Option<u64>,
    /// 95 % Wilson score interval, bootstrap interval over images or videos for masks; of a normalized accuracy, that of the accuracy divided by the baseline's, which counts as exact.
    pub low: f64,
    pub high: f64,
}

impl Scores {
    pub fn new(rows: Vec<ScoreRow>, classes: Vec<String>) -> Self {
        Self { content: Tag::Scores, rows, classes, images: None, baseline: None }
    }

    /// Canonical JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("names and finite numbers can be written")
    }

    /// Reads a manifest; `None` if it is not one of scores.
    pub fn from_json(manifest: &str) -> Option<Self> {
        serde_json::from_str(manifest).ok()
    }
}

impl ScoreRow {
    /// A share of correct answers with its interval. An empty dataset scores 0 with the interval 0 to 1.
    pub fn share(task: &str, metric: &str, correct: u64, n: u64) -> Self {
        let (low, high) = wilson(correct, n);
        let value = if n == 0 { 0.0 } else { correct as f64 / n as f64 };
        Self { task: task.to_owned(), metric: metric.to_owned(), value, n, correct: Some(correct), low, high }
    }

    /// A mean of `n` numbers with its interval.
    pub fn mean(task: &str, metric: String, value: f64, n: u64, (low, high): (f64, f64)) -> Self {
        Self { task: task.to_owned(), metric, value, n, correct: None, low, high }
    }

    /// This share in units of the baseline's; `None` if that is 0.
    pub fn normalized(&self, baseline: f64) -> Option<Self> {
        let divided = Self {
            metric: format!("normalized_{}", self.metric),
            value: self.value / baseline,
            low: self.low / baseline,
            high: self.high / baseline,
            correct: None,
            ..self.clone()
        };
        (baseline > 0.0).then_some(divided)
    }
}

/// The 95 % Wilson score interval of `correct` successes in `n` trials: unlike p ± 1.96·σ it stays within 0 and 1 and is honest for shares
/// near either end (E. B. Wilson, JASA 22, 1927).
fn wilson(correct: u64, n: u64) -> (f64, f64) {
    const Z: f64 = 1.959_963_984_540_054;
    if n == 0 {
        return (0.0, 1.0);
    }
    let (n, p) = (n as f64, correct as f64 / n as f64);
    let z2 = Z * Z / n;
    let center = (p + z2 / 2.0) / (1.0 + z2);
    let half = Z / (1.0 + z2) * (p * (1.0 - p) / n + z2 / (4.0 * n)).sqrt();
    ((center - half).max(0.0), (center + half).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_agrees_with_published_values() {
        // Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
        for (correct, n, low, high) in [
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ] {
            let row = ScoreRow::share("t", "accuracy", correct, n);
            assert!((row.low - low).abs() < 5e-5 && (row.high - high).abs() < 5e-5, "{row:?}");
        }
        assert_eq!(wilson(0, 0), (0.0, 1.0));
        assert!(wilson(5, 5).1 <= 1.0);
    }

    #[test]
    fn a_baseline_without_a_correct_answer_normalizes_nothing() {
        let row = ScoreRow::share("t", "accuracy", 45, 100);
        let normalized = row.normalized(0.9).unwrap();
        assert_eq!(
            (normalized.metric.as_str(), normalized.value, normalized.correct),
            ("normalized_accuracy", 0.5, None)
        );
        assert_eq!(row.normalized(0.0), None);
    }

    #[test]
    fn other_manifests_are_not_scores() {
        let mut scores = Scores::new(vec![ScoreRow::share("digits", "accuracy", 1, 2)], vec!["0".to_owned()]);
        scores.images =
            Some(Images { manifest: blake3::hash(b"digits"), n: 2, skipped: 1, in_training: Some(0) });
        assert_eq!(Scores::from_json(&scores.to_json()), Some(scores));
        assert_eq!(Scores::from_json(r#"{"content":"checkpoint","rows":[]}"#), None);
    }
}
