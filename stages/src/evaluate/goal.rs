//! Goals: what scores have to reach. A run whose scores do not says so and ends with an exit code of its own.
//!
//! INVARIANT: goals enter no key. They are looked at when scores are reported, so a missed goal neither fails a stage nor keeps its scores
//! out of the cache, and a changed goal runs nothing again.

use super::scores::{ScoreRow, Scores};
use crate::params::{Problem, Span};
use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Goals by metric.
pub type Goals = IndexMap<String, Goal>;

/// What one metric has to reach, in percent and in points of percent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Goal {
    /// The least value, in percent.
    #[serde(default)]
    pub min: Option<f64>,
    /// How many points of percent it may be below the baseline.
    #[serde(default)]
    pub max_drop: Option<f64>,
}

/// A goal that was not met.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Missed {
    pub task: String,
    pub metric: String,
    /// `min` or `max_drop`.
    pub goal: String,
    /// In percent.
    pub value: f64,
    /// The least value that meets it, in percent.
    pub needed: f64,
    /// Points of percent between the two.
    pub missed_by: f64,
}

/// What a decimal number such as 0.5 cannot say exactly in binary must not decide.
const ROUNDING: f64 = 1e-9;

impl Goal {
    /// Mistakes that types do not catch.
    pub(super) fn problems(goals: &Goals, metrics: &[&str], span: Span) -> Option<Problem> {
        let problem = |message: String| Some(Problem::new("bad-value", message).at(span));
        for (metric, goal) in goals {
            if !metrics.contains(&metric.as_str()) {
                let mut unknown =
                    Problem::new("unknown-key", format!("`goal` knows no metric `{metric}`")).at(span);
                unknown.help = Some(format!("goals can be set for {}", metrics.join(", ")));
                return Some(unknown);
            }
            if goal.min.is_none() && goal.max_drop.is_none() {
                return problem(format!("`goal.{metric}` needs `min` or `max_drop`"));
            }
            if goal.min.is_some_and(|min| !(0.0..=100.0).contains(&min)) {
                return problem(format!(
                    "`goal.{metric}.min` is a percentage, from 0 to 100, got {}",
                    goal.min.unwrap_or_default()
                ));
            }
            if let Some(min) = goal.min.filter(|min| *min > 0.0 && *min <= 1.0) {
                return Some(
                    Problem::new("bad-value", format!("`goal.{metric}.min` is a percentage, got {min}"))
                        .at(span)
                        .help(format!("for {} % write {}", min * 100.0, min * 100.0)),
                );
            }
            if goal.max_drop.is_some_and(|drop| !(0.0..=100.0).contains(&drop)) {
                return problem(format!(
                    "`goal.{metric}.max_drop` is in points of percent, from 0 to 100, got {}",
                    goal.max_drop.unwrap_or_default()
                ));
            }
        }
        None
    }

    /// What compares with a baseline when there is none.
    pub(super) fn without_baseline(goals: &Goals) -> Option<Problem> {
        let (metric, _) = goals.iter().find(|(_, goal)| goal.max_drop.is_some())?;
        let message =
            format!("`goal.{metric}.max_drop` compares with port `baseline`, which is not connected");
        Some(Problem::new("missing-input", message))
    }
}

/// The goals that these scores do not meet.
pub fn missed(goals: &Goals, scores: &Scores) -> Vec<Missed> {
    let mut found = Vec::new();
    for (metric, goal) in goals {
        for row in scores.rows.iter().filter(|row| row.metric == *metric) {
            let value = row.value * 100.0;
            let floor = goal.max_drop.and_then(|drop| Some(baseline_of(scores, row)? * 100.0 - drop));
            for (goal, needed) in [("min", goal.min), ("max_drop", floor)] {
                let Some(needed) = needed.filter(|needed| value < needed - ROUNDING) else { continue };
                found.push(Missed {
                    task: row.task.clone(),
                    metric: metric.clone(),
                    goal: goal.to_owned(),
                    value,
                    needed,
                    missed_by: needed - value,
                });
            }
        }
    }
    found
}

fn baseline_of(scores: &Scores, row: &ScoreRow) -> Option<f64> {
    let rows = &scores.baseline.as_ref()?.rows;
    let same = rows.iter().find(|other| other.task == row.task && other.metric == row.metric)?;
    Some(same.value)
}

impl std::fmt::Display for Missed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { task, metric, goal, value, needed, missed_by } = self;
        write!(
            f,
            "{metric} on `{task}` is {value:.2} %, `{goal}` needs {needed:.2} %: missed by {missed_by:.2} points"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::scores::Baseline;
    use super::*;

    fn goals(min: Option<f64>, max_drop: Option<f64>) -> Goals {
        IndexMap::from([("accuracy".to_owned(), Goal { min, max_drop })])
    }

    fn scores(correct: u64, baseline: u64) -> Scores {
        let row = |correct| ScoreRow::share("digits", "accuracy", correct, 1000);
        let mut scores = Scores::new(vec![row(correct)], Vec::new());
        let artifact = blake3::hash(b"baseline");
        scores.baseline = Some(Baseline { artifact, rows: vec![row(baseline)] });
        scores
    }

    #[test]
    fn a_goal_is_met_at_its_limit_and_missed_below_it() {
        assert_eq!(missed(&goals(Some(85.0), None), &scores(850, 900)), []);
        let found = missed(&goals(Some(85.0), None), &scores(849, 900));
        assert_eq!(
            found[0].to_string(),
            "accuracy on `digits` is 84.90 %, `min` needs 85.00 %: missed by 0.10 points"
        );
        // 90.7 − 0.7 is no sum of binary fractions.
        assert_eq!(missed(&goals(None, Some(0.7)), &scores(900, 907)), []);
        let found = missed(&goals(Some(10.0), Some(0.5)), &scores(894, 900));
        assert_eq!((found.len(), found[0].goal.as_str()), (1, "max_drop"));
        assert!((found[0].missed_by - 0.1).abs() < 1e-9);
        assert_eq!(missed(&goals(Some(99.0), Some(0.0)), &scores(800, 900)).len(), 2);
    }

    #[test]
    fn mistakes_are_found_before_anything_runs() {
        let span = Span { file: 0, start: 0, end: 0 };
        let says =
            |goals: &Goals| Goal::problems(goals, &["accuracy", "top5"], span).map(|problem| problem.message);
        assert_eq!(says(&goals(Some(85.0), Some(0.5))), None);
        assert_eq!(says(&goals(Some(0.85), None)).unwrap(), "`goal.accuracy.min` is a percentage, got 0.85");
        assert!(says(&goals(Some(850.0), None)).unwrap().contains("from 0 to 100"));
        assert!(says(&goals(None, Some(f64::NAN))).unwrap().contains("from 0 to 100"));
        assert!(Goal::without_baseline(&goals(None, Some(1.0))).unwrap().message.contains("not connected"));
        assert_eq!(Goal::without_baseline(&goals(Some(50.0), None)), None);
        assert!(says(&goals(None, None)).unwrap().contains("`min` or `max_drop`"));
        let unknown = IndexMap::from([("acuracy".to_owned(), Goal { min: Some(50.0), max_drop: None })]);
        assert!(says(&unknown).unwrap().contains("no metric `acuracy`"));
    }
}
