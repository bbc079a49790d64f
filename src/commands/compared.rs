//! What `show` says about scores beyond the stored numbers: further metrics, classes, and other models on the same images.

use super::setup;
use crate::engine::Workspace;
use crate::exit::{Failure, Result};
use crate::pipeline::Pipeline;
use crate::report::{Align, Table};
use blake3::Hash;
use merganser_cache::Store;
use merganser_stages::images::metrics::paired::Paired;
use merganser_stages::images::metrics::quality::METRICS;
use merganser_stages::{Analysis, Answers, OpenFiles, Scores, StageError};
use serde::Serialize;

/// Classes beyond this many are a long list; `--json` has them all.
const SHOWN_CLASSES: usize = 50;

/// The evaluations that others are compared with.
#[derive(Default)]
pub(super) struct Against {
    answers: Vec<(String, Answers)>,
}

/// What the logits of an evaluation say.
#[derive(Default, Serialize)]
pub(super) struct Details {
    #[serde(skip_serializing_if = "Option::is_none")]
    analysis: Option<Analysis>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    comparisons: Vec<Comparison>,
}

/// Another model on the same images.
#[derive(Serialize)]
struct Comparison {
    task: String,
    against: String,
    #[serde(flatten)]
    paired: Paired,
}

impl Against {
    /// Reads the scores of a stage; those that are not in the cache are missing.
    pub(super) fn read(workspace: &Workspace, pipeline: &Pipeline, name: &str) -> Result<Self> {
        let selection = setup::select(pipeline, name)?;
        let resolver = setup::resolver(workspace, pipeline, &[selection], &[], Box::new(|_, _, _| ()))?;
        let mut answers = Vec::new();
        for unit in setup::plan(&resolver)?.iter().filter(|unit| resolver.selected[unit.id]) {
            let Some(artifact) = unit.artifact else {
                return Err(Failure::user_help(
                    format!("`{}` is not in the cache", unit.name),
                    Some("run it first"),
                ));
            };
            if let Some(found) = read(&workspace.store, &artifact)? {
                answers.push((unit.name.to_string(), found));
            }
        }
        if answers.is_empty() {
            return Err(Failure::user(format!("`{name}` has no scores to compare with")));
        }
        Ok(Self { answers })
    }
}

fn read(store: &Store, artifact: &Hash) -> Result<Option<Answers>> {
    Answers::read(&OpenFiles::new(store), artifact).map_err(|error| failed(&error))
}

fn failed(error: &StageError) -> Failure {
    Failure::failed(error.with_causes())
}

impl Details {
    pub(super) fn of(
        store: &Store,
        artifact: &Hash,
        scores: Option<&Scores>,
        against: &Against,
    ) -> Result<Self> {
        let Some(answers) = read(store, artifact)? else { return Ok(Self::default()) };
        let baseline = match scores.and_then(|scores| scores.baseline.as_ref()) {
            Some(baseline) => read(store, &baseline.artifact)?,
            None => None,
        };
        let others = baseline.iter().map(|answers| ("baseline", answers));
        let others = others.chain(against.answers.iter().map(|(name, answers)| (name.as_str(), answers)));
        let mut comparisons = Vec::new();
        for (name, other) in others.filter(|(_, other)| other.task() == answers.task()) {
            comparisons.push(Comparison {
                task: answers.task().to_owned(),
                against: name.to_owned(),
                paired: answers.compare(other).map_err(|error| failed(&error))?,
            });
        }
        Ok(Self { analysis: Some(answers.analyse()), comparisons })
    }

    /// Rows for the table of scores: the metrics that are not stored.
    pub(super) fn rows(&self, scores: &Scores) -> Vec<[String; 6]> {
        let Some(analysis) = &self.analysis else { return Vec::new() };
        let first = scores.rows.first();
        let (task, n) = first.map_or_else(Default::default, |row| (row.task.clone(), row.n.to_string()));
        let is_new = |metric: &str| scores.rows.iter().all(|row| row.metric != metric);
        let new = analysis.metrics.iter().filter(|estimate| is_new(estimate.metric));
        new.map(|estimate| {
            let is_share = METRICS.iter().any(|metric| metric.id == estimate.metric && metric.is_share);
            let number = |value: f64| {
                if is_share { format!("{:.2}", value * 100.0) } else { format!("{value:.4}") }
            };
            let interval = estimate
                .interval
                .map_or_else(String::new, |(low, high)| format!("{} – {}", number(low), number(high)));
            [
                format!("  {task}"),
                estimate.metric.to_owned(),
                number(estimate.value),
                String::new(),
                n.clone(),
                interval,
            ]
        })
        .collect()
    }

    /// Classes, and comparisons.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        if let Some(analysis) = self.analysis.as_ref().filter(|found| found.classes.len() <= SHOWN_CLASSES) {
            let right = Align::Right;
            let mut table = Table::new(&[
                ("  class", Align::Left),
                ("images", right),
                ("correct", right),
                ("recall", right),
                ("precision", right),
                ("F1", right),
            ]);
            let percent = |value: f64| format!("{:.2}", value * 100.0);
            for class in &analysis.classes {
                table.row([
                    format!("  {}", class.class),
                    class.tally.images.to_string(),
                    class.tally.correct.to_string(),
                    percent(class.recall),
                    percent(class.precision),
                    percent(class.f1),
                ]);
            }
            text += &table.to_string();
        }
        for Comparison { against, paired, .. } in &self.comparisons {
            let points = |value: f64| format!("{:+.2}", value * 100.0);
            text += &format!(
                "  against {against}: {} points (95 % interval {} to {}); {} images only here, {} only there; McNemar p = {}\n",
                points(paired.difference),
                points(paired.low),
                points(paired.high),
                paired.only_first,
                paired.only_second,
                probability(paired.p_value)
            );
        }
        text
    }
}

fn probability(p: f64) -> String {
    if p >= 0.001 { format!("{p:.3}") } else { format!("{p:.1e}") }
}
