//! Collects mistakes while a pipeline is read, so that all of them are reported in one go.
//!
//! One mistake is reported once: a sweep reads a stage's table many times, and a value that could not be lowered is never
//! what the user meant, so whatever is found wrong with its stand-in is dropped.

use merganser_stages::params::{Problem, Span};
use std::collections::HashSet;

/// Errors and warnings found so far.
#[derive(Debug, Default)]
pub(super) struct Problems {
    errors: Vec<Problem>,
    warnings: Vec<Problem>,
    poisoned: HashSet<Span>,
}

impl Problems {
    pub(super) fn error(&mut self, problem: Problem) {
        if problem.span.is_none_or(|span| !self.poisoned.contains(&span)) {
            self.errors.push(problem);
        }
    }

    /// Reports a value that stands for nothing the user wrote; later problems at its place are consequences.
    pub(super) fn poison(&mut self, problem: Problem) {
        self.poisoned.extend(problem.span);
        self.errors.push(problem);
    }

    pub(super) fn warning(&mut self, problem: Problem) {
        self.warnings.push(problem);
    }

    pub(super) fn has_errors(&self) -> bool {
        !self.errors.is_empty()
    }

    pub(super) fn into_errors(self) -> Vec<Problem> {
        ordered(self.errors)
    }

    pub(super) fn into_warnings(self) -> Vec<Problem> {
        ordered(self.warnings)
    }
}

/// Orders by file and position and drops repetitions.
fn ordered(mut problems: Vec<Problem>) -> Vec<Problem> {
    let mut seen = HashSet::new();
    problems.retain(|problem| seen.insert((problem.code, problem.span, problem.message.clone())));
    problems.sort_by_key(|problem| problem.span);
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: u32, message: &str) -> Problem {
        Problem::new("wrong-type", message).at(Span { file: 0, start, end: start + 1 })
    }

    #[test]
    fn orders_by_position_and_drops_repetitions() {
        let mut problems = Problems::default();
        for problem in [at(9, "b"), at(3, "a"), at(9, "b"), Problem::new("no-stages", "c")] {
            problems.error(problem);
        }
        let messages: Vec<_> = problems.into_errors().into_iter().map(|problem| problem.message).collect();
        assert_eq!(messages, ["c", "a", "b"]);
    }

    #[test]
    fn drops_the_consequences_of_a_value_that_stands_for_nothing() {
        let mut problems = Problems::default();
        problems.poison(at(3, "not a number"));
        problems.error(at(3, "expected a boolean"));
        assert_eq!(problems.into_errors().len(), 1);
    }
}
