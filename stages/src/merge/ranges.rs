//! Checks of numbers that every method makes alike: what is wrong, where, and what was expected.

use crate::params::{Params, Problem};

/// Collects what is wrong with a method's numbers.
pub(super) struct Ranges<'a> {
    params: &'a Params<'a>,
    problems: Vec<Problem>,
}

impl<'a> Ranges<'a> {
    pub(super) fn of(params: &'a Params<'a>) -> Self {
        Self { params, problems: Vec::new() }
    }

    /// A share: above 0 and at most 1.
    pub(super) fn share(self, key: &str, value: f64) -> Self {
        self.number(key, value, value > 0.0 && value <= 1.0, "above 0 and at most 1")
    }

    /// A factor: any number that f32 holds.
    pub(super) fn factor(self, key: &str, value: f64) -> Self {
        self.number(key, value, (value as f32).is_finite(), "a finite number")
    }

    pub(super) fn number(mut self, key: &str, value: f64, is_valid: bool, expected: &str) -> Self {
        if !is_valid || !value.is_finite() {
            let span = self.params.table.get(key).map_or(self.params.span, |entry| entry.node.span);
            let message = format!("`{key}` must be {expected}, got {value}");
            self.problems.push(Problem::new("bad-value", message).at(span));
        }
        self
    }

    pub(super) fn finish(self) -> Result<(), Vec<Problem>> {
        if self.problems.is_empty() { Ok(()) } else { Err(self.problems) }
    }
}
