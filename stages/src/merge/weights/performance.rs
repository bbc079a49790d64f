//! Weights by performance: softmax(accuracy / temperature).

use crate::params::FilePath;
use crate::{Job, Scores, StageError};
use indexmap::IndexMap;

/// The parameter that the file of accuracies belongs to.
pub(super) const PARAMETER: &str = "weights.performance";

/// Accuracies, and how sharply they count.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Performance {
    pub accuracies: Accuracies,
    /// Positive; the larger, the closer to uniform.
    pub temperature: f64,
}

/// Where accuracies come from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Accuracies {
    /// The port `scores`.
    Scores,
    /// A JSON object of numbers by task.
    File(FilePath),
    Table(IndexMap<String, f64>),
}

impl Performance {
    /// Weights with the mean 1.
    pub(super) fn weights(&self, job: &Job<'_>, tasks: &[&str]) -> Result<Vec<f64>, StageError> {
        let shares = softmax(&self.of_tasks(job, tasks)?, self.temperature);
        Ok(shares.into_iter().map(|share| share * tasks.len() as f64).collect())
    }

    /// The accuracy of each task. Names match whatever their case, `_` and `-`; a task without an accuracy counts as 1.
    pub(super) fn of_tasks(&self, job: &Job<'_>, tasks: &[&str]) -> Result<Vec<f64>, StageError> {
        let known = self.accuracies.read(job)?;
        if let Some((task, accuracy)) = known.iter().find(|(_, accuracy)| !accuracy.is_finite()) {
            return Err(StageError::input(format!("the accuracy of `{task}` is {accuracy}")));
        }
        let find = |task: &&str| {
            let found = known.iter().find(|(name, _)| folded(name) == folded(task));
            if found.is_none() {
                job.warn(format!("there is no accuracy for task `{task}`: it counts as 1"));
            }
            found.map_or(1.0, |(_, accuracy)| *accuracy)
        };
        Ok(tasks.iter().map(find).collect())
    }
}

impl Accuracies {
    fn read(&self, job: &Job<'_>) -> Result<IndexMap<String, f64>, StageError> {
        match self {
            Self::Table(table) => Ok(table.clone()),
            Self::File(file) => {
                let json = job.read(job.source(PARAMETER)?)?;
                serde_json::from_slice(&json).map_err(|error| {
                    let message =
                        format!("`{}` is not a JSON object of numbers by task: {error}", file.written);
                    StageError::input(message)
                })
            }
            Self::Scores => {
                let mut found = IndexMap::new();
                for input in job.inputs_on("scores") {
                    let scores = Scores::from_json(&job.files.description(&input.artifact)?);
                    let scores =
                        scores.ok_or_else(|| StageError::input("port `scores` holds something else"))?;
                    for row in scores.rows.into_iter().filter(|row| row.metric == "accuracy") {
                        found.insert(row.task, row.value);
                    }
                }
                Ok(found)
            }
        }
    }
}

/// exp(x/t) / Σ exp(x/t).
pub(super) fn softmax(values: &[f64], temperature: f64) -> Vec<f64> {
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = values.iter().map(|value| ((value - largest) / temperature).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

fn folded(name: &str) -> String {
    name.chars().filter(|c| !['_', '-'].contains(c)).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn softmax_survives_small_temperatures() {
        let shares = softmax(&[0.9, 0.8, 0.1], 1e-4);
        assert!((shares[0] - 1.0).abs() < 1e-12 && shares.iter().all(|share| share.is_finite()));
        let shares = softmax(&[0.93, 0.8, 0.85, 0.52, 0.71, 0.83], 5.0);
        assert!((shares[0] - 0.171_913_251).abs() < 1e-7, "{shares:?}");
    }

    #[test]
    fn names_match_whatever_their_case_and_separators() {
        assert_eq!(folded("Not_MNIST"), folded("not-mnist"));
        assert_ne!(folded("mnist"), folded("notmnist"));
    }
}
