//! Scores a classifier: logits of one model on one dataset, and what they are measured by.

use super::inference::Evaluation;
use super::params::EvaluateParams;
use super::scores::{Baseline, ScoreRow, Scores};
use crate::images::metrics::order::Exchanged;
use crate::images::metrics::{self, order};
use crate::{Draft, Job, JobInput, StageError, checkpoint};
use blake3::Hash;
use merganser_cache::{Preimage, Staging, Value};
use std::cell::OnceCell;
use std::collections::BTreeMap;

/// Scores the model on dataset `task`, and compares it with the baseline if there is one.
pub(super) fn run(job: &Job<'_>, params: &EvaluateParams, task: &str) -> Result<Draft, StageError> {
    let scoring = Scoring { job, params, task, evaluation: OnceCell::new() };
    let model = job.input("model")?;
    match job.optional("baseline") {
        None => scoring.score(model, job.preimage, job.staging),
        Some(baseline) => scoring.compare(model, baseline),
    }
}

struct Scoring<'a> {
    job: &'a Job<'a>,
    params: &'a EvaluateParams,
    task: &'a str,
    /// Prepared when the first model has to be run.
    evaluation: OnceCell<Evaluation<'a>>,
}

impl<'a> Scoring<'a> {
    /// One checkpoint by itself.
    fn score(&self, model: &JobInput, preimage: &Preimage, staging: &Staging) -> Result<Draft, StageError> {
        let evaluation = self.evaluation()?;
        let logits = evaluation.logits(model, preimage)?;
        let labels = evaluation.dataset().labels();
        let counts = metrics::score(&logits, labels, self.task, 0)?;
        let accuracy = ScoreRow::share(self.task, "accuracy", counts.top1, counts.images);
        let top5 = ScoreRow::share(self.task, "top5", counts.top5, counts.images);
        let classes = evaluation.dataset().classes().unwrap_or_default().to_vec();
        if let Some(exchanged) = order::exchanged(&metrics::predictions(&logits, 0)?, labels) {
            self.warn_of_order(&exchanged, &classes, accuracy.value);
        }
        let mut scores = Scores::new(vec![accuracy, top5], classes);
        scores.images = Some(evaluation.record().clone());
        let blob = checkpoint::write_logits(staging, &logits, labels)?;
        Ok(Draft { manifest: scores.to_json(), blobs: vec![blob], operands: Vec::new(), sources: Vec::new() })
    }

    /// Tells that labels and answers are probably not about the same order of classes.
    fn warn_of_order(&self, found: &Exchanged, classes: &[String], accuracy: f64) {
        let name = |class: u32| classes.get(class as usize).cloned().unwrap_or_else(|| class.to_string());
        self.job.warn(format!(
            "`{}`: head and labels seem to have their classes in different orders: {} of {} images of class `{}` are answered with `{}`; with {} \
             classes renamed the accuracy would be {:.1} %, not {:.1} %",
            self.task,
            found.times,
            found.images,
            name(found.label),
            name(found.answer),
            found.classes,
            100.0 * found.accuracy,
            accuracy,
        ));
    }

    /// A model and the baseline, each with a key of its own: the one that an evaluation without baseline has. So a baseline is scored once
    /// for all models of all pipelines, and connecting one to a model that was scored before infers nothing.
    fn compare(&self, model: &JobInput, baseline: &JobInput) -> Result<Draft, StageError> {
        let (own, own_artifact) = self.kept(model)?;
        let (theirs, their_artifact) = self.kept(baseline)?;
        let mut scores = Scores::new(own.rows, own.classes);
        scores.images = own.images;
        let find = |rows: &[ScoreRow]| rows.iter().find(|row| row.metric == "accuracy").cloned();
        if let (Some(accuracy), Some(baseline)) = (find(&scores.rows), find(&theirs.rows)) {
            match accuracy.normalized(baseline.value) {
                Some(row) => scores.rows.push(row),
                None => self.job.warn(format!(
                    "the baseline has no correct answer on `{}`: there is nothing to normalize by",
                    self.task
                )),
            }
        }
        scores.baseline = Some(Baseline { artifact: their_artifact, rows: theirs.rows });
        let blobs = self.job.files.blobs(&own_artifact)?;
        let sources = Vec::new();
        Ok(Draft { manifest: scores.to_json(), blobs, operands: vec![their_artifact], sources })
    }

    /// The scores of a checkpoint, found or computed, and kept.
    fn kept(&self, model: &JobInput) -> Result<(Scores, Hash), StageError> {
        let mut inputs = BTreeMap::from([("model".to_owned(), Value::Digest(model.artifact))]);
        if let Some(origin) = self.job.optional("origin") {
            inputs.insert("origin".to_owned(), Value::Digest(origin.artifact));
        }
        let operation = self.job.preimage.operation.clone();
        let preimage = Preimage { operation, inputs: Value::Map(inputs) };
        let artifact = self.job.part(&preimage, |staging| self.score(model, &preimage, staging))?;
        let scores = Scores::from_json(&self.job.files.description(&artifact)?);
        Ok((scores.ok_or_else(|| StageError::Internal("scores cannot be read".to_owned()))?, artifact))
    }

    fn evaluation(&self) -> Result<&Evaluation<'a>, StageError> {
        if self.evaluation.get().is_none() {
            let prepared = Evaluation::prepare(self.job, self.params, self.task)?;
            let _ = self.evaluation.set(prepared);
        }
        self.evaluation.get().ok_or_else(|| StageError::Internal("nothing was prepared".to_owned()))
    }
}
