//! The diagonal Fisher information of a model: how much its answers depend on every single weight.
//!
//! F = (1/n) Σ_x E_y [(∂ log p(y|x) / ∂θ)²], with y from the model's own distribution p(·|x) and not from labels (Matena and Raffel,
//! arXiv:2111.09832, §3). The expectation over y is taken exactly, class by class, as their code does: with as many backward passes per image as
//! there are classes it needs no random numbers, and the classes that a sure model would hardly ever draw have the largest gradients. Where there
//! are too many classes, y is drawn once per image, which is unbiased too.
//!
//! Squares do not add up over a batch: images are run one by one. Sums are in f64.

use super::statistics::FisherInformation;
use crate::evaluate::Evaluation;
use crate::gradients::{Fed, LossGraph};
use crate::job::ProgressUnit;
use crate::{Job, StageError, checkpoint};
use merganser_onnx::gradient::{TensorGradients, losses};
use merganser_tensors::TensorSource;
use merganser_tensors::kernels::random::Stream;
use ndarray::ArrayD;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// How labels are taken from the model's distribution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FisherLabels {
    /// The expectation over all classes.
    #[default]
    Expected,
    /// One draw per image.
    Sampled,
}

/// Elements that one thread works on at a time.
const CHUNK: usize = 1 << 16;

/// The input that says how much every class counts.
const TARGETS: &str = "merganser/targets";

/// Diagonals by tensor, means over the images.
pub(super) type Diagonals = BTreeMap<String, Vec<f64>>;

/// Measures at most `n` images, spread evenly over the dataset.
pub(super) fn measure(
    job: &Job<'_>,
    evaluation: &Evaluation<'_>,
    model: &Arc<dyn TensorSource>,
    n: usize,
    labels: FisherLabels,
) -> Result<(FisherInformation, Diagonals), StageError> {
    let weights = checkpoint::Weights::new(Arc::clone(model));
    let mut graph = LossGraph::new(job, evaluation, &weights, 1, &|_| true, |forward, logits| {
        let targets = forward.add_input(TARGETS, &logits.shape)?;
        losses::cross_entropy(forward.tape(), logits, &targets)
    })?;
    let mut fed = Fed::new();
    graph.feed(&mut fed, &weights)?;
    let (all, n) = (evaluation.n_images(), n.min(evaluation.n_images()));
    let n_classes = graph.n_logits();
    let mut sums = Diagonals::new();
    for position in 0..n {
        let images = evaluation.images(&[position * all / n], Vec::new())?;
        let mut probabilities: Option<Vec<f64>> = None;
        let mut class = 0;
        while class < n_classes {
            if (job.cancelled)() {
                return Err(StageError::Cancelled);
            }
            let mut targets = ArrayD::zeros(vec![1, n_classes]);
            targets[[0, class]] = 1.0;
            let mut gradients = TensorGradients::default();
            let found = graph.run(&images, &[(TARGETS, targets.view())], &fed, &weights, &mut gradients)?;
            let probabilities = probabilities.get_or_insert_with(|| softmax(found.logits.row(0).iter()));
            match labels {
                FisherLabels::Expected => {
                    add_squares(&mut sums, &gradients, probabilities[class])?;
                    class += 1;
                }
                FisherLabels::Sampled => {
                    // The first pass tells the probabilities; unless its class is drawn, a second one is needed.
                    let drawn = draw(probabilities, position);
                    if drawn == class {
                        add_squares(&mut sums, &gradients, 1.0)?;
                        break;
                    }
                    class = drawn;
                }
            }
        }
        job.progress(position as u64 + 1, n as u64, ProgressUnit::Images);
    }
    sums.values_mut().flatten().for_each(|sum| *sum /= n as f64);
    Ok((FisherInformation { images: n as u64, labels }, sums))
}

/// p of a row of logits, in f64.
fn softmax<'a>(logits: impl Iterator<Item = &'a f32> + Clone) -> Vec<f64> {
    let largest = logits.clone().fold(f64::NEG_INFINITY, |most, logit| most.max(f64::from(*logit)));
    let powers: Vec<f64> = logits.map(|logit| (f64::from(*logit) - largest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|power| power / sum).collect()
}

/// A class by its probability, the same for the same image.
fn draw(probabilities: &[f64], image: usize) -> usize {
    let mut words = [0u32; 2];
    Stream::new(0, &["fisher"]).fill(2 * image, &mut words);
    let place = (f64::from(words[0]) * 4_294_967_296.0 + f64::from(words[1])) / 18_446_744_073_709_551_616.0;
    let mut sum = 0.0;
    for (class, probability) in probabilities.iter().enumerate() {
        sum += probability;
        if place < sum {
            return class;
        }
    }
    // Rounding: the last class that can be.
    probabilities.iter().rposition(|probability| *probability > 0.0).unwrap_or(0)
}

fn add_squares(sums: &mut Diagonals, gradients: &TensorGradients, weight: f64) -> Result<(), StageError> {
    for (name, gradient) in &gradients.tensors {
        if let Some(element) = gradient.iter().position(|value| !value.is_finite()) {
            return Err(StageError::input(format!(
                "the gradient of tensor `{name}` is not finite: element {element} is {}",
                gradient[element]
            )));
        }
        let sum = sums.entry(name.clone()).or_insert_with(|| vec![0.0; gradient.len()]);
        sum.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK)).for_each(|(sum, gradient)| {
            sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += weight * f64::from(*g) * f64::from(*g));
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_drawn_as_often_as_they_are_likely() {
        let probabilities = [0.5, 0.0, 0.2, 0.3];
        let mut counts = [0i32; 4];
        (0..10_000).for_each(|image| counts[draw(&probabilities, image)] += 1);
        for (count, probability) in counts.iter().zip(probabilities) {
            // five standard deviations
            assert!((f64::from(*count) - 10_000.0 * probability).abs() <= 250.0, "{counts:?}");
        }
        assert_eq!(counts[1], 0);
        assert_eq!(draw(&[0.0, 0.0], 3), 0);
        assert_eq!(draw(&probabilities, 17), draw(&probabilities, 17));
    }

    #[test]
    fn probabilities_add_up_to_one_however_large_the_logits() {
        let found = softmax([1000.0f32, 999.0, -1000.0].iter());
        let expected = [1.0 / (1.0 + (-1.0f64).exp()), 1.0 / (1.0 + 1f64.exp()), 0.0];
        assert!(found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-12));
    }
}
