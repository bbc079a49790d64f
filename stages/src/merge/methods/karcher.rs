//! `karcher`: the mean of models on the sphere, tensor by tensor.
//!
//! The mean u of the directions minimises the sum of squared angles; it is found by steps along the mean of the tangents that lead to
//! them. It never leaves the span of the directions, so the iteration needs their inner products only. The result is u times the mean of
//! the lengths.

use crate::StageError;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::{Merge, Method, Rule};
use crate::merge::ranges::Ranges;
use crate::merge::span::{Between, Coefficients, Gram, Span, grams};
use crate::merge::weights::TaskWeights;
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

pub(super) struct Karcher;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct KarcherParams {
    /// The largest number of steps.
    #[serde(default = "usual_steps")]
    max_iter: u32,
    /// Steps shorter than this end the iteration; angles and lengths below it count as zero. Above 0.
    #[serde(default = "usual_tolerance")]
    tol: f64,
    /// `uniform`, or a weight per task, not negative; they are divided by their sum.
    #[serde(default)]
    weights: TaskWeights,
    /// What is averaged: the fine-tuned `models`, or their `task-vectors`.
    #[serde(default)]
    between: Between,
}

fn usual_steps() -> u32 {
    10
}

fn usual_tolerance() -> f64 {
    1e-5
}

impl Method for Karcher {
    fn id(&self) -> &'static str {
        "karcher"
    }

    fn summary(&self) -> &'static str {
        "the mean of the fine-tuned models on the sphere, tensor by tensor"
    }

    fn formula(&self) -> &'static str {
        "θ = (Σ_t w_t ‖θ_t‖) · argmin_{‖u‖=1} Σ_t w_t ∠(u, θ_t)²"
    }

    fn source(&self) -> &'static str {
        "Karcher, Riemannian center of mass and mollifier smoothing, 1977; per tensor as in mergekit"
    }

    fn schema(&self) -> Schema {
        schema_for!(KarcherParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        let parsed: KarcherParams = parse(params)?;
        Ranges::of(params).number("tol", parsed.tol, parsed.tol > 0.0, "above 0").finish()?;
        Ok(Box::new(parsed))
    }
}

impl Merge for KarcherParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn weights(&self) -> Option<&TaskWeights> {
        Some(&self.weights)
    }

    fn check(&self, _: &[String]) -> Result<(), Problem> {
        let is_negative = match &self.weights {
            TaskWeights::Explicit(weights) => weights.values().any(|weight| *weight < 0.0),
            _ => false,
        };
        if is_negative || self.weights.given_sum().is_some_and(|sum| sum <= 0.0) {
            let message = "the weights of a mean on the sphere must not be negative, and not all 0";
            return Err(Problem::new("bad-value", message));
        }
        Ok(())
    }

    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        operands: &[&Operand<'a>],
    ) -> Result<Box<dyn Rule + 'a>, StageError> {
        let weights = self.weights.of(inputs, operands)?;
        let sum: f64 = weights.iter().sum();
        let weights: Vec<f64> = weights.iter().map(|weight| weight / sum).collect();
        let coefficients = grams(operands, self.between)?
            .into_iter()
            .map(|gram| Coefficients::new(self.between, &mean(&gram, &weights, self.max_iter, self.tol)));
        Ok(Box::new(Span::new(operands, coefficients)))
    }
}

/// The coefficients of the mean of vectors; `weights` add up to 1.
fn mean(gram: &Gram, weights: &[f64], max_iter: u32, tol: f64) -> Vec<f64> {
    let n = gram.n();
    if n == 1 {
        return vec![1.0];
    }
    let norms: Vec<f64> = (0..n).map(|t| gram.norm(t)).collect();
    let used: Vec<usize> = (0..n).filter(|t| norms[*t] > tol && weights[*t] > 0.0).collect();
    let sum: f64 = used.iter().map(|t| weights[*t]).sum();
    let Some(first) = used.first() else { return vec![0.0; n] };
    let unit_dot = |a: usize, b: usize| gram.dot(a, b) / (norms[a] * norms[b]);
    let length_of = |c: &[f64]| {
        let terms = used.iter().flat_map(|a| used.iter().map(|b| c[*a] * c[*b] * unit_dot(*a, *b)));
        terms.sum::<f64>().max(0.0).sqrt()
    };
    // u = Σ_t direction[t] · θ_t/‖θ_t‖
    let mut direction = vec![0.0; n];
    for t in &used {
        direction[*t] = weights[*t] / sum;
    }
    let length = length_of(&direction);
    if length < tol {
        direction.fill(0.0);
        direction[*first] = 1.0;
    } else {
        scale(&mut direction, 1.0 / length);
    }
    for _ in 0..max_iter {
        let mut tangent = vec![0.0; n];
        for t in &used {
            let cosine: f64 = used.iter().map(|other| direction[*other] * unit_dot(*other, *t)).sum();
            let angle = cosine.clamp(-1.0, 1.0).acos();
            if angle < tol || angle.sin() == 0.0 {
                continue;
            }
            let pull = weights[*t] / sum * angle / angle.sin();
            tangent[*t] += pull;
            tangent.iter_mut().zip(&direction).for_each(|(own, c)| *own -= pull * cosine * c);
        }
        let step = length_of(&tangent);
        if step < tol {
            break;
        }
        for (c, tangent) in direction.iter_mut().zip(&tangent) {
            *c = step.cos() * *c + step.sin() * tangent / step;
        }
        let length = length_of(&direction);
        if length > tol {
            scale(&mut direction, 1.0 / length);
        }
    }
    let length: f64 = weights.iter().zip(&norms).map(|(weight, norm)| weight * norm).sum();
    let coefficient = |t: usize| if direction[t] == 0.0 { 0.0 } else { length * direction[t] / norms[t] };
    (0..n).map(coefficient).collect()
}

fn scale(coefficients: &mut [f64], factor: f64) {
    for coefficient in coefficients {
        *coefficient *= factor;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean_of(rows: &[&[f32]], weights: &[f64]) -> Vec<f64> {
        let coefficients = mean(&Gram::of_rows(rows), weights, 50, 1e-12);
        let n = rows[0].len();
        (0..n).map(|i| rows.iter().zip(&coefficients).map(|(row, c)| f64::from(row[i]) * c).sum()).collect()
    }

    #[track_caller]
    fn assert_close(actual: &[f64], expected: &[f64]) {
        assert!(actual.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-10), "{actual:?}");
    }

    #[test]
    fn the_mean_of_two_halves_the_angle_and_averages_the_lengths() {
        let half = 0.5f64.sqrt();
        assert_close(&mean_of(&[&[1.0, 0.0], &[0.0, 3.0]], &[0.5, 0.5]), &[2.0 * half, 2.0 * half]);
        // a quarter of the way
        let angle = std::f64::consts::FRAC_PI_8;
        assert_close(&mean_of(&[&[1.0, 0.0], &[0.0, 1.0]], &[0.75, 0.25]), &[angle.cos(), angle.sin()]);
    }

    #[test]
    fn the_mean_of_three_axes_is_their_diagonal() {
        let third = 1.0 / 3.0;
        let found = mean_of(&[&[1.0, 0.0, 0.0], &[0.0, 1.0, 0.0], &[0.0, 0.0, 1.0]], &[third; 3]);
        assert_close(&found, &[third.sqrt(); 3]);
    }

    #[test]
    fn one_vector_equal_vectors_and_zeros_are_their_own_mean() {
        assert_close(&mean_of(&[&[1.0, 2.0]], &[1.0]), &[1.0, 2.0]);
        assert_close(&mean_of(&[&[1.0, 2.0], &[1.0, 2.0]], &[0.5, 0.5]), &[1.0, 2.0]);
        assert_close(&mean_of(&[&[0.0, 0.0], &[0.0, 0.0]], &[0.5, 0.5]), &[0.0, 0.0]);
        // a vector without a direction shortens the mean, as in mergekit
        assert_close(&mean_of(&[&[0.0, 0.0], &[2.0, 0.0]], &[0.5, 0.5]), &[1.0, 0.0]);
    }
}
