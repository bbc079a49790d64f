//! When a layer may lose a bit: CDPQ's decisions, on numbers alone.
//!
//! A layer whose distillation loss has been small enough is a candidate. Each candidate in turn loses one bit, the student is evaluated, and
//! the new width stays if the loss has not grown too much; otherwise the old one comes back. What is accepted is the measure for the next.
//!
//! `baseline` and `variance` are the authors' (mean and population variance over all records so far). Ours: `trend`, which also wants the
//! loss not to rise, over the records since the layer last lost a bit; penalties on width; and an average to stop at.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the losses of a layer make it a candidate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Confidence {
    /// Their mean is at most `layer_threshold`.
    #[default]
    Baseline,
    /// Besides, their variance is at most `variance_threshold`; from three records on.
    Variance,
    /// Since the layer last lost a bit: their mean is at most `layer_threshold`, and they do not rise by more than `slope_threshold` of that
    /// mean per record; from three records on.
    Trend,
}

/// What decides about candidates and attempts.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Policy {
    pub(super) confidence: Confidence,
    pub(super) layer_threshold: f64,
    pub(super) variance_threshold: f64,
    pub(super) slope_threshold: f64,
    /// By how much of itself the loss may grow.
    pub(super) impact_threshold: f64,
    pub(super) min_bits: u8,
    /// What names of candidates begin with; anything if empty.
    pub(super) target_roots: Vec<String>,
    /// Added to the loss per bit of the average over layers.
    pub(super) bit_penalty: f64,
    /// Added to the loss per bit of the average over weights, which is what bytes follow.
    pub(super) byte_penalty: f64,
    /// No attempts once the average over weights is this or less.
    pub(super) target_bits: Option<f64>,
}

/// A layer with its width and what its loss was, batch after batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Layer {
    pub(super) name: String,
    pub(super) bits: u8,
    pub(super) weights: u64,
    pub(super) history: Vec<f32>,
    /// Records that were there when the layer last lost a bit.
    pub(super) reduced_at: usize,
}

/// One bit less, tried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attempt {
    pub layer: String,
    pub from: u8,
    pub to: u8,
    /// The student's loss with the new width; nothing if it was not a number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// By how much of itself the loss, with penalties, has grown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub increase: Option<f64>,
    pub accepted: bool,
}

/// What became of the candidates of an epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reduction {
    pub candidates: Vec<String>,
    pub attempts: Vec<Attempt>,
    /// Attempts that were accepted, as a share of all; nothing without attempts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accept_rate: Option<f64>,
    /// Over those that were accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_increase: Option<f64>,
}

/// Losses below this count as this where they are divided by.
const SMALLEST_LOSS: f64 = 1e-8;

/// What variance and slope are told from.
const FEWEST_RECORDS: usize = 3;

impl Policy {
    /// The layers that may lose a bit, in their order.
    pub(super) fn candidates(&self, layers: &[Layer]) -> Vec<usize> {
        let is_candidate = |layer: &Layer| {
            layer.bits > self.min_bits
                && (self.target_roots.is_empty()
                    || self.target_roots.iter().any(|root| layer.name.starts_with(root)))
                && self.trusts(layer)
        };
        (0..layers.len()).filter(|&layer| is_candidate(&layers[layer])).collect()
    }

    fn trusts(&self, layer: &Layer) -> bool {
        let all = &layer.history;
        match self.confidence {
            Confidence::Baseline => !all.is_empty() && mean(all) <= self.layer_threshold,
            Confidence::Variance => {
                all.len() >= FEWEST_RECORDS
                    && mean(all) <= self.layer_threshold
                    && variance(all) <= self.variance_threshold
            }
            Confidence::Trend => {
                let recent = all.get(layer.reduced_at..).unwrap_or_default();
                recent.len() >= FEWEST_RECORDS
                    && mean(recent) <= self.layer_threshold
                    && slope(recent) <= self.slope_threshold * mean(recent)
            }
        }
    }

    /// The loss with what widths cost.
    fn objective(&self, loss: f64, layers: &[Layer]) -> f64 {
        loss + self.bit_penalty * average_bits(layers) + self.byte_penalty * bits_per_weight(layers)
    }

    /// Takes one bit from each candidate in turn, and keeps it taken where the loss allows. `evaluate` gives the loss of the student with
    /// these widths.
    pub(super) fn reduce<E>(
        &self,
        layers: &mut [Layer],
        mut evaluate: impl FnMut(&[Layer]) -> Result<f64, E>,
    ) -> Result<Reduction, E> {
        let is_there =
            |layers: &[Layer]| self.target_bits.is_some_and(|bits| bits_per_weight(layers) <= bits);
        let candidates = self.candidates(layers);
        let mut reduction = Reduction {
            candidates: candidates.iter().map(|&layer| layers[layer].name.clone()).collect(),
            ..Reduction::default()
        };
        if candidates.is_empty() || is_there(layers) {
            return Ok(reduction);
        }
        let mut current = self.objective(evaluate(layers)?, layers);
        for layer in candidates {
            if is_there(layers) {
                break;
            }
            let from = layers[layer].bits;
            layers[layer].bits = from - 1;
            let loss = evaluate(layers)?;
            let objective = self.objective(loss, layers);
            let accepted = objective <= current * (1.0 + self.impact_threshold);
            reduction.attempts.push(Attempt {
                layer: layers[layer].name.clone(),
                from,
                to: from - 1,
                loss: finite(loss),
                increase: finite((objective - current) / current.max(SMALLEST_LOSS)),
                accepted,
            });
            if accepted {
                current = objective;
                layers[layer].reduced_at = layers[layer].history.len();
            } else {
                layers[layer].bits = from;
            }
        }
        let accepted = reduction.attempts.iter().filter(|attempt| attempt.accepted);
        let increases: Vec<f64> = accepted.filter_map(|attempt| attempt.increase).collect();
        let n_attempts = reduction.attempts.len();
        reduction.accept_rate = (n_attempts > 0).then(|| increases.len() as f64 / n_attempts as f64);
        reduction.mean_increase =
            (!increases.is_empty()).then(|| increases.iter().sum::<f64>() / increases.len() as f64);
        Ok(reduction)
    }
}

fn finite(value: f64) -> Option<f64> {
    Some(value).filter(|value| value.is_finite())
}

/// The mean of the layers' widths, whatever their sizes.
pub(super) fn average_bits(layers: &[Layer]) -> f64 {
    layers.iter().map(|layer| f64::from(layer.bits)).sum::<f64>() / layers.len().max(1) as f64
}

/// The mean of the widths of all weights.
pub(super) fn bits_per_weight(layers: &[Layer]) -> f64 {
    let weights: u64 = layers.iter().map(|layer| layer.weights).sum();
    let bits: u64 = layers.iter().map(|layer| layer.weights * u64::from(layer.bits)).sum();
    bits as f64 / weights.max(1) as f64
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value)).sum::<f64>() / values.len() as f64
}

fn variance(values: &[f32]) -> f64 {
    let mean = mean(values);
    values.iter().map(|&value| (f64::from(value) - mean).powi(2)).sum::<f64>() / values.len() as f64
}

/// The slope of the line of least squares through (0, v₀), (1, v₁), …
fn slope(values: &[f32]) -> f64 {
    let middle = (values.len() as f64 - 1.0) / 2.0;
    let mean = mean(values);
    let (mut products, mut squares) = (0.0, 0.0);
    for (i, &value) in values.iter().enumerate() {
        let x = i as f64 - middle;
        products += x * (f64::from(value) - mean);
        squares += x * x;
    }
    products / squares
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn policy(confidence: Confidence) -> Policy {
        Policy {
            confidence,
            layer_threshold: 0.1,
            variance_threshold: 0.05,
            slope_threshold: 0.0,
            impact_threshold: 0.3,
            min_bits: 4,
            target_roots: Vec::new(),
            bit_penalty: 0.0,
            byte_penalty: 0.0,
            target_bits: None,
        }
    }

    fn layer(name: &str, bits: u8, history: &[f32]) -> Layer {
        Layer { name: name.to_owned(), bits, weights: 10, history: history.to_vec(), reduced_at: 0 }
    }

    fn candidates(policy: &Policy, layers: &[Layer]) -> Vec<String> {
        policy.candidates(layers).into_iter().map(|layer| layers[layer].name.clone()).collect()
    }

    /// Losses that a table gives for widths.
    fn reduce(policy: &Policy, layers: &mut [Layer], loss: impl Fn(&[u8]) -> f64) -> Reduction {
        let evaluate = |layers: &[Layer]| {
            let bits: Vec<u8> = layers.iter().map(|layer| layer.bits).collect();
            Ok::<_, Infallible>(loss(&bits))
        };
        policy.reduce(layers, evaluate).unwrap()
    }

    #[test]
    fn small_losses_make_candidates() {
        let layers = [
            layer("low", 8, &[0.09, 0.109]),
            layer("high", 8, &[0.2, 0.01]),
            layer("unknown", 8, &[]),
            layer("narrow", 4, &[0.0]),
        ];
        assert_eq!(candidates(&policy(Confidence::Baseline), &layers), ["low"]);
    }

    #[test]
    fn variance_wants_three_steady_records() {
        // Of mean 0.1 and variance 0.03, and of mean 0.1 and variance 0.09.
        let mut steady = vec![0.0f32; 3];
        steady.push(0.3999);
        let mut wild = vec![0.0f32; 9];
        wild.push(1.0);
        let layers = [layer("two", 8, &[0.05, 0.05]), layer("steady", 8, &steady), layer("wild", 8, &wild)];
        assert_eq!(candidates(&policy(Confidence::Variance), &layers), ["steady"]);
        assert_eq!(candidates(&policy(Confidence::Baseline), &layers), ["two", "steady", "wild"]);
    }

    #[test]
    fn trend_looks_at_what_came_after_the_last_reduction() {
        let falling = [0.09, 0.05, 0.04, 0.03];
        let rising = [0.03, 0.04, 0.05, 0.09];
        let mut recovered = layer("recovered", 6, &[5.0, 0.05, 0.04, 0.03]);
        recovered.reduced_at = 1;
        let mut fresh = layer("fresh", 6, &falling);
        fresh.reduced_at = 2;
        let layers = [layer("falling", 8, &falling), layer("rising", 8, &rising), recovered, fresh];
        assert_eq!(candidates(&policy(Confidence::Trend), &layers), ["falling", "recovered"]);
        let patient = Policy { slope_threshold: 0.5, ..policy(Confidence::Trend) };
        assert_eq!(candidates(&patient, &layers), ["falling", "rising", "recovered"]);
        assert_eq!(candidates(&policy(Confidence::Baseline), &layers), ["falling", "rising", "fresh"]);
    }

    #[test]
    fn slopes_are_those_of_least_squares() {
        assert!((slope(&[1.0, 3.0, 5.0]) - 2.0).abs() < 1e-12);
        assert!((slope(&[0.0, 0.0, 6.0]) - 3.0).abs() < 1e-12);
        assert!((slope(&[4.0, 1.0, 1.0, 0.0]) + 1.2).abs() < 1e-12);
    }

    #[test]
    fn roots_confine_candidates() {
        let layers = [layer("encoder.a", 8, &[0.0]), layer("decoder.a", 8, &[0.0]), layer("neck", 8, &[0.0])];
        let policy = Policy {
            target_roots: vec!["encoder".to_owned(), "neck".to_owned()],
            ..policy(Confidence::Baseline)
        };
        assert_eq!(candidates(&policy, &layers), ["encoder.a", "neck"]);
    }

    #[test]
    fn what_is_accepted_is_the_new_measure_and_what_is_not_is_rolled_back() {
        let mut layers = [layer("a", 8, &[0.0; 5]), layer("b", 8, &[0.0; 5]), layer("c", 8, &[0.0; 5])];
        let reduction = reduce(&policy(Confidence::Baseline), &mut layers, |bits| match bits {
            [8, 8, 8] => 1.0,
            [7, 8, 8] => 1.3,
            [7, 7, 8] => 1.7,
            // Within 30 % of what `a` left, not of what there was at first.
            [7, 8, 7] => 1.65,
            other => panic!("{other:?} is evaluated"),
        });
        let bits: Vec<u8> = layers.iter().map(|layer| layer.bits).collect();
        assert_eq!(bits, [7, 8, 7]);
        let told: Vec<(&str, u8, u8, Option<f64>, bool)> = reduction
            .attempts
            .iter()
            .map(|attempt| (attempt.layer.as_str(), attempt.from, attempt.to, attempt.loss, attempt.accepted))
            .collect();
        assert_eq!(
            told,
            [("a", 8, 7, Some(1.3), true), ("b", 8, 7, Some(1.7), false), ("c", 8, 7, Some(1.65), true)]
        );
        assert!((reduction.attempts[1].increase.unwrap() - 0.4 / 1.3).abs() < 1e-12);
        assert!((reduction.accept_rate.unwrap() - 2.0 / 3.0).abs() < 1e-12);
        assert!((reduction.mean_increase.unwrap() - f64::midpoint(0.3, 0.35 / 1.3)).abs() < 1e-12);
        assert_eq!(layers.map(|layer| layer.reduced_at), [5, 0, 5]);
    }

    #[test]
    fn nothing_is_evaluated_without_candidates() {
        let mut layers = [layer("a", 4, &[0.0])];
        let reduction = reduce(&policy(Confidence::Baseline), &mut layers, |_| panic!("it is evaluated"));
        assert_eq!(reduction, Reduction::default());
    }

    #[test]
    fn a_loss_that_is_not_a_number_is_rolled_back() {
        let mut layers = [layer("a", 8, &[0.0])];
        let loss = |bits: &[u8]| if bits == [8] { 1.0 } else { f64::NAN };
        let reduction = reduce(&policy(Confidence::Baseline), &mut layers, loss);
        let attempt = &reduction.attempts[0];
        assert_eq!((layers[0].bits, attempt.loss, attempt.accepted), (8, None, false));
    }

    /// A bit less pays for a loss that alone would be too much.
    #[test]
    fn penalties_pay_for_losses() {
        let accepted = |policy: Policy| {
            let mut layers = [layer("a", 8, &[0.0]), Layer { weights: 30, ..layer("b", 4, &[9.0]) }];
            reduce(&policy, &mut layers, |bits| if bits[0] == 8 { 1.0 } else { 1.4 });
            layers[0].bits == 7
        };
        let plain = policy(Confidence::Baseline);
        assert!(!accepted(plain.clone()));
        // The average of widths falls from 6 to 5.5, that of weights from 5 to 4.75.
        assert!(accepted(Policy { bit_penalty: 1.0, ..plain.clone() }));
        assert!(accepted(Policy { byte_penalty: 1.0, ..plain.clone() }));
        let strict = Policy { impact_threshold: 0.0, ..plain };
        assert!(accepted(Policy { bit_penalty: 0.81, ..strict.clone() }));
        assert!(!accepted(Policy { bit_penalty: 0.79, ..strict.clone() }));
        assert!(accepted(Policy { byte_penalty: 1.61, ..strict.clone() }));
        assert!(!accepted(Policy { byte_penalty: 1.59, ..strict }));
    }

    #[test]
    fn attempts_end_at_the_average_that_was_asked_for() {
        let policy = Policy { target_bits: Some(7.0), ..policy(Confidence::Baseline) };
        let mut layers = ["a", "b", "c"].map(|name| layer(name, 8, &[0.0]));
        layers[0].weights = 80;
        reduce(&policy, &mut layers, |_| 1.0);
        assert_eq!(layers.clone().map(|layer| layer.bits), [7, 7, 7]);
        let mut layers = layers.map(|layer| Layer { bits: 8, ..layer });
        layers[1].bits = 4;
        layers[2].bits = 4;
        reduce(&policy, &mut layers, |_| 1.0);
        assert_eq!(layers.clone().map(|layer| layer.bits), [7, 4, 4]);
        let reduction = reduce(&policy, &mut layers, |_| panic!("it is evaluated"));
        assert_eq!((reduction.candidates.len(), reduction.attempts.len()), (1, 0));
    }
}
