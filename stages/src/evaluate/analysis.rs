//! What kept logits say beyond the scores that were stored: further metrics, single classes, and two models on the same images.
//!
//! Computed when somebody looks, from the artifact alone: a new metric costs no inference and changes no key.

use crate::images::metrics::MetricsError;
use crate::images::metrics::paired::{self, Paired};
use crate::images::metrics::quality::{self, Answer, ClassTally, Estimate};
use crate::{OpenFiles, Scores, StageError, checkpoint};
use blake3::Hash;
use serde::Serialize;

/// What `show` tells about an evaluation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Analysis {
    /// With bootstrap intervals.
    pub metrics: Vec<Estimate>,
    pub classes: Vec<ClassRow>,
}

/// One class's answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassRow {
    /// Its name, where it is known, or its number.
    pub class: String,
    #[serde(flatten)]
    pub tally: ClassTally,
    /// Correct answers among its images: the accuracy on the class.
    pub recall: f64,
    /// Correct ones among the answers that name it.
    pub precision: f64,
    pub f1: f64,
}

/// A model's answers on one dataset.
pub struct Answers {
    task: String,
    images: Vec<Answer>,
    n_classes: usize,
    classes: Vec<String>,
}

impl Answers {
    /// Reads the answers of an evaluation; `None` if the artifact keeps no logits.
    pub fn read(files: &OpenFiles<'_>, artifact: &Hash) -> Result<Option<Self>, StageError> {
        let Some(scores) = Scores::from_json(&files.description(artifact)?) else { return Ok(None) };
        let Some(path) = files.find_blob(artifact, checkpoint::LOGITS)? else { return Ok(None) };
        let (logits, labels) = checkpoint::read_logits(&path)?;
        let task = scores.rows.first().map_or_else(String::new, |row| row.task.clone());
        let answers = quality::answers(&logits, &labels, &task)?;
        Ok(Some(Self { task, images: answers, n_classes: logits.ncols(), classes: scores.classes }))
    }

    /// The dataset that they are about.
    pub fn task(&self) -> &str {
        &self.task
    }

    pub fn analyse(&self) -> Analysis {
        let tallies = quality::per_class(&self.images, self.n_classes);
        let row = |(class, tally): (usize, ClassTally)| ClassRow {
            class: self.classes.get(class).cloned().unwrap_or_else(|| class.to_string()),
            tally,
            recall: tally.recall(),
            precision: tally.precision(),
            f1: tally.f1(),
        };
        Analysis {
            metrics: quality::estimate(&self.images, self.n_classes),
            classes: tallies.into_iter().enumerate().map(row).collect(),
        }
    }

    /// Compares with another model's answers on the same images.
    pub fn compare(&self, other: &Self) -> Result<Paired, StageError> {
        let labels = |answers: &[Answer]| answers.iter().map(|answer| answer.label).collect::<Vec<_>>();
        let correct = |answers: &[Answer]| answers.iter().map(Answer::is_correct).collect::<Vec<_>>();
        if self.images.len() == other.images.len() && labels(&self.images) != labels(&other.images) {
            return Err(StageError::input(format!(
                "`{}`: the two were not scored on the same images: their labels differ",
                self.task
            )));
        }
        paired::compare(&correct(&self.images), &correct(&other.images)).ok_or_else(|| {
            StageError::Metrics(MetricsError::Unpaired {
                dataset: self.task.clone(),
                first: self.images.len(),
                second: other.images.len(),
            })
        })
    }
}
