//! `slerp`: spherical interpolation between two models, tensor by tensor.
//!
//! The two models are the base plus the first and plus the second task vector, in the order of the collection: t = 0 is the first, t = 1 the
//! second. mergekit, whose `base_model` is the model at t = 0, has no third checkpoint; here the base only says what the task vectors
//! are differences from.

use crate::StageError;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::{Merge, Method, Rule};
use crate::merge::ranges::Ranges;
use crate::merge::span::{Between, Coefficients, Gram, Span, grams};
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

/// Shorter vectors have no direction, as in mergekit.
const SMALLEST_NORM: f64 = 1e-8;

/// Vectors this close to parallel or opposite are interpolated linearly in any case.
const SMALLEST_SINE: f64 = 1e-7;

pub(super) struct Slerp;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SlerpParams {
    /// Where between the first model (0) and the second (1).
    #[serde(default = "half")]
    t: f64,
    /// Tensors whose |cosine| is above this are interpolated linearly; from 0, at most 1.
    #[serde(default = "usual_threshold")]
    lerp_threshold: f64,
    /// What is interpolated: the fine-tuned `models`, or their `task-vectors`.
    #[serde(default)]
    between: Between,
}

fn half() -> f64 {
    0.5
}

fn usual_threshold() -> f64 {
    0.9995
}

impl Method for Slerp {
    fn id(&self) -> &'static str {
        "slerp"
    }

    fn summary(&self) -> &'static str {
        "spherical interpolation between two models, tensor by tensor"
    }

    fn formula(&self) -> &'static str {
        "θ = (sin((1−t)φ) θ₁ + sin(tφ) θ₂) / sin φ, φ the angle between θ₁ and θ₂; linear where |cos φ| > lerp_threshold"
    }

    fn source(&self) -> &'static str {
        "Shoemake, Animating rotation with quaternion curves, 1985; per tensor as in mergekit"
    }

    fn schema(&self) -> Schema {
        schema_for!(SlerpParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        let parsed: SlerpParams = parse(params)?;
        let limit = parsed.lerp_threshold;
        Ranges::of(params)
            .number("t", parsed.t, (0.0..=1.0).contains(&parsed.t), "from 0 to 1")
            .number("lerp_threshold", limit, (0.0..=1.0).contains(&limit), "from 0 to 1")
            .finish()?;
        Ok(Box::new(parsed))
    }
}

impl Merge for SlerpParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn check(&self, members: &[String]) -> Result<(), Problem> {
        if members.len() == 2 {
            return Ok(());
        }
        let message = format!("`slerp` interpolates between 2 task vectors, got {}", members.len());
        Err(Problem::new("bad-value", message).help("`karcher` takes any number"))
    }

    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        operands: &[&Operand<'a>],
    ) -> Result<Box<dyn Rule + 'a>, StageError> {
        let n = inputs.vectors.len();
        if n != 2 {
            return Err(StageError::input(format!("`slerp` interpolates between 2 task vectors, got {n}")));
        }
        let coefficients = grams(operands, self.between)?.into_iter().map(|gram| {
            let [first, second] = interpolate(&gram, self.t, self.lerp_threshold);
            Coefficients::new(self.between, &[first, second])
        });
        Ok(Box::new(Span::new(operands, coefficients)))
    }
}

/// The coefficients of two vectors.
fn interpolate(gram: &Gram, t: f64, lerp_threshold: f64) -> [f64; 2] {
    let length = |a: usize| Some(gram.norm(a)).filter(|norm| *norm > SMALLEST_NORM).unwrap_or(1.0);
    let cosine = (gram.dot(0, 1) / (length(0) * length(1))).clamp(-1.0, 1.0);
    let angle = cosine.acos();
    // Whatever the threshold: the great circle through opposite vectors is not defined.
    if cosine.abs() > lerp_threshold || angle.sin() < SMALLEST_SINE {
        return [1.0 - t, t];
    }
    [((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gram(a: &[f32], b: &[f32]) -> Gram {
        Gram::of_rows(&[a, b])
    }

    #[test]
    fn the_ends_are_the_models_and_the_middle_lies_on_the_circle() {
        let right_angle = gram(&[1.0, 0.0], &[0.0, 1.0]);
        assert_eq!(interpolate(&right_angle, 0.0, 0.9995), [1.0, 0.0]);
        let [first, second] = interpolate(&right_angle, 1.0, 0.9995);
        assert!(first.abs() < 1e-15 && (second - 1.0).abs() < 1e-15);
        let [first, second] = interpolate(&right_angle, 0.5, 0.9995);
        assert!((first - 0.5f64.sqrt()).abs() < 1e-15 && (second - first).abs() < 1e-15);
    }

    #[test]
    fn parallel_opposite_and_empty_vectors_are_interpolated_without_dividing_by_zero() {
        for (a, b) in [([1.0, 1.0], [2.0, 2.0]), ([1.0, 1.0], [-1.0, -1.0])] {
            assert_eq!(interpolate(&gram(&a, &b), 0.25, 1.0), [0.75, 0.25]);
        }
        for (a, b) in [([0.0, 0.0], [0.0, 0.0]), ([0.0, 0.0], [1.0, 0.0])] {
            let found = interpolate(&gram(&a, &b), 0.25, 0.9995);
            assert!(found.iter().all(|coefficient| coefficient.is_finite()), "{found:?}");
        }
    }
}
