//! Parameters that are numbers within limits: refused where they are written.

use serde::{Deserialize, Deserializer, de::Error};

/// A number that f32 can hold.
pub(super) fn finite<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    limited(deserializer, "a finite number", |value| (value as f32).is_finite())
}

/// A number above 0 that f32 can hold.
pub(super) fn positive<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    limited(deserializer, "a number above 0", |value| value > 0.0 && (value as f32).is_finite())
}

/// Above 0 and at most 1.
pub(super) fn share<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    limited(deserializer, "above 0 and at most 1", |value| value > 0.0 && value <= 1.0)
}

/// At least 0 and below 1.
pub(super) fn below_one<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    limited(deserializer, "at least 0 and below 1", |value| (0.0..1.0).contains(&value))
}

/// At least 0 and below 1, or not given.
pub(super) fn optional_below_one<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<f64>, D::Error> {
    below_one(deserializer).map(Some)
}

/// Above 0 and at most 1, or not given.
pub(super) fn optional_share<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    share(deserializer).map(Some)
}

/// Above 0, or not given.
pub(super) fn optional_positive<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    positive(deserializer).map(Some)
}

fn limited<'de, D: Deserializer<'de>>(
    deserializer: D,
    expected: &str,
    allowed: impl Fn(f64) -> bool,
) -> Result<f64, D::Error> {
    let value = f64::deserialize(deserializer)?;
    if allowed(value) {
        Ok(value)
    } else {
        Err(D::Error::custom(format!("expected {expected}, got {value}")))
    }
}
