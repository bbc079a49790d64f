//! `adamerging`: coefficients of the task vectors, tuned until the merged model is sure of what it answers to unlabelled images of all tasks.
//!
//! θ = θ₀ + Σ_t λ_t·τ_t with one λ per task, or per task and tensor, minimizes the entropy of the merged model's answers, summed over the tasks,
//! by Adam on small batches. Labels are not used, images are: whoever tunes on the images that are scored has used them, which the artifact
//! and the table of scores say. AdaMerging++ tunes what TIES leaves of the task vectors (trimmed, without entries that contradict the elected
//! sign).
//!
//! From the authors' code we differ in that a step takes one batch of a task (theirs takes two, though the paper says one), from whole
//! epochs.

mod record;
mod tuning;
mod vectors;

pub use record::{ADAPTATION, Adaptation, TunedTensor};

use crate::evaluate::{EvaluateParams, Evaluation};
use crate::kind::SourceSet;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::{Merge, Method, Need, Rule};
use crate::merge::numbers;
use crate::params::{Params, Problem, did_you_mean, one_map, parse, to_value};
use crate::seen::Seen;
use crate::{Job, StageError};
use merganser_cache::{Blob, Staging, Value};
use merganser_tensors::Scratch;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use tuning::{Settings, Tuning};
use vectors::Vectors;

pub(super) struct AdaMerging;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct AdaMergingParams {
    /// What has a coefficient: each `task`, or each tensor of each task (`layer`, as the authors call it).
    #[serde(default)]
    granularity: Granularity,
    /// AdaMerging++: the task vectors are those that TIES leaves, the largest entries that agree with the elected sign.
    #[serde(default)]
    plus: bool,
    /// Of `plus`, K: the share of each task vector's entries that survive the trim.
    #[serde(default = "usual_density", deserialize_with = "numbers::share")]
    density: f64,
    /// λ before the first step; from 0 to 1, where the coefficients stay.
    #[serde(default = "usual_initial")]
    initial: f64,
    /// Steps of Adam.
    #[serde(default = "usual_steps")]
    steps: u32,
    /// Images of each task per step.
    #[serde(default = "usual_batch_size")]
    batch_size: u32,
    /// The learning rate.
    #[serde(default = "usual_rate", deserialize_with = "numbers::positive")]
    learning_rate: f64,
    /// Decides the order of the images.
    #[serde(default)]
    seed: u64,
}

/// What shares a coefficient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Granularity {
    Task,
    #[default]
    Layer,
}

fn usual_density() -> f64 {
    0.2
}

fn usual_initial() -> f64 {
    0.3
}

fn usual_steps() -> u32 {
    500
}

fn usual_batch_size() -> u32 {
    16
}

fn usual_rate() -> f64 {
    1e-3
}

/// The keys that it has in common with evaluations: `batch_size` is that of the steps.
fn evaluation_keys() -> Vec<&'static str> {
    EvaluateParams::KEYS.iter().copied().filter(|key| *key != "batch_size").collect()
}

impl Method for AdaMerging {
    fn id(&self) -> &'static str {
        "adamerging"
    }

    fn summary(&self) -> &'static str {
        "coefficients that make the merged model sure of its answers to unlabelled images of all tasks"
    }

    fn formula(&self) -> &'static str {
        "θ = θ₀ + Σ_t λ_t τ_t per tensor, λ in [0, 1] by Adam on Σ_t H(softmax(f_t(x; θ))), x from the images of task t, f_t with the head of task t"
    }

    fn source(&self) -> &'static str {
        "Yang et al., AdaMerging: Adaptive Model Merging for Multi-Task Learning, arXiv:2310.02575, §3.2"
    }

    fn schema(&self) -> Schema {
        EvaluateParams::document(schema_for!(AdaMergingParams), "")
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        let mut params = params.clone();
        let mut problems = Vec::new();
        let of_evaluation = params.split_off(&evaluation_keys());
        let evaluation = EvaluateParams::parse(&of_evaluation).map_err(|found| problems.extend(found)).ok();
        let own = parse::<AdaMergingParams>(&params).map_err(|found| problems.extend(found)).ok();
        if let Some(own) = &own {
            let mut complain = |key: &str, message: String| {
                let span = params.table.get(key).map_or(params.span, |entry| entry.node.span);
                problems.push(Problem::new("bad-value", message).at(span));
            };
            if !(0.0..=1.0).contains(&own.initial) {
                complain("initial", format!("`initial` must be from 0 to 1, got {}", own.initial));
            }
            if own.batch_size == 0 {
                complain("batch_size", "`batch_size` must be at least 1, got 0".to_owned());
            }
        }
        match (own, evaluation) {
            (Some(own), Some(evaluation)) if problems.is_empty() => Ok(Box::new(Tuned { own, evaluation })),
            _ => Err(problems),
        }
    }
}

struct Tuned {
    own: AdaMergingParams,
    evaluation: EvaluateParams,
}

impl Merge for Tuned {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> Result<Value, StageError> {
        let tasks =
            self.evaluation.tasks().map(|task| Ok((task.to_owned(), self.evaluation.for_task(task)?)));
        let tasks = tasks.collect::<Result<BTreeMap<_, _>, StageError>>()?;
        let evaluation = Value::Map(BTreeMap::from([("evaluation".to_owned(), Value::Map(tasks))]));
        Ok(one_map([to_value(&self.own)?, evaluation]))
    }

    fn check(&self, members: &[String]) -> Result<(), Problem> {
        if let Some(member) = members.iter().find(|member| !self.evaluation.dataset.contains_key(*member)) {
            let help = did_you_mean(member, self.evaluation.tasks().collect::<Vec<_>>());
            let message = format!("there is no dataset for task `{member}`");
            return Err(Problem { help, ..Problem::new("missing-dataset", message) });
        }
        let is_merged = |task: &str| members.iter().any(|member| member == task);
        if let Some(task) = self.evaluation.tasks().find(|task| !is_merged(task)) {
            let message = format!("there is a dataset for `{task}`, which is no task that is merged");
            return Err(Problem::new("unknown-member", message));
        }
        Ok(())
    }

    fn origin(&self) -> Need {
        Need::Required
    }

    fn runs_graphs(&self) -> bool {
        true
    }

    fn is_joint(&self) -> bool {
        true
    }

    fn sources(&self) -> Result<Vec<SourceSet>, StageError> {
        let mut sets = Vec::new();
        for task in self.evaluation.tasks() {
            let own = self.evaluation.sources(task)?.into_iter();
            sets.extend(own.map(|set| set.scoped(task)));
        }
        Ok(sets)
    }

    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        operands: &[&Operand<'a>],
    ) -> Result<Box<dyn Rule + 'a>, StageError> {
        if let Some(vector) = inputs.vectors.iter().find(|v| !self.evaluation.dataset.contains_key(&v.name)) {
            return Err(StageError::input_help(
                format!("there is no dataset for task vector `{}`", vector.name),
                "`adamerging` takes a collection of task vectors, and a dataset for each",
            ));
        }
        let jobs: Vec<Job<'_>> =
            inputs.vectors.iter().map(|vector| inputs.job.scoped(&vector.name)).collect();
        let evaluations = inputs
            .vectors
            .iter()
            .zip(&jobs)
            .map(|(vector, job)| Ok((vector.name.as_str(), self.evaluation(job, &vector.name, operands)?)))
            .collect::<Result<Vec<_>, StageError>>()?;
        let images = evaluations.iter().map(|(task, own)| ((*task).to_owned(), own.record().clone()));
        let seen = Seen { labels: false, images: images.collect(), validation: BTreeMap::new() };
        let vectors = Vectors::new(inputs, operands, self.own.plus.then_some(self.own.density))?;
        let by_tensor = self.own.granularity == Granularity::Layer;
        let settings = Settings {
            steps: self.own.steps,
            batch_size: self.own.batch_size as usize,
            learning_rate: self.own.learning_rate as f32,
            initial: self.own.initial as f32,
            seed: self.own.seed,
            by_tensor,
        };
        let state = Tuning { inputs, operands, vectors: &vectors, settings }.run(evaluations)?;
        let tasks: Vec<String> = inputs.vectors.iter().map(|vector| vector.name.clone()).collect();
        let of_group = |group: usize| state.coefficients(group, tasks.len());
        let coefficients = operands
            .iter()
            .enumerate()
            .map(|(position, operand)| (operand.index, of_group(if by_tensor { position } else { 0 })));
        let coefficients = coefficients.collect();
        let listed = if by_tensor {
            let tensors = operands.iter().enumerate();
            tensors
                .map(|(position, operand)| TunedTensor {
                    tensor: Some(operand.name().to_owned()),
                    values: of_group(position),
                })
                .collect()
        } else {
            vec![TunedTensor { tensor: None, values: of_group(0) }]
        };
        let adaptation = Adaptation { tasks, coefficients: listed, entropies: state.entropies };
        Ok(Box::new(Weighted { vectors, coefficients, adaptation, seen }))
    }
}

impl Tuned {
    fn evaluation<'t>(
        &'t self,
        job: &'t Job<'t>,
        task: &'t str,
        operands: &[&Operand<'_>],
    ) -> Result<Evaluation<'t>, StageError> {
        let evaluation = Evaluation::prepare(job, &self.evaluation, task)?;
        let model = evaluation.model(job.input("base")?)?;
        if let Some(unknown) = operands.iter().find(|operand| model.index_of(operand.name()).is_none()) {
            return Err(StageError::input_help(
                format!(
                    "the base calls a tensor `{}`, the checkpoint on port `origin` does not",
                    unknown.name()
                ),
                "give tensors the same names in both: `family` of `load`",
            ));
        }
        Ok(evaluation)
    }
}

/// Sums with the coefficients of each tensor.
struct Weighted {
    vectors: Vectors,
    /// By the index of the operand.
    coefficients: HashMap<usize, Vec<f32>>,
    adaptation: Adaptation,
    seen: Seen,
}

impl Rule for Weighted {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        self.vectors.sum(operand, &self.coefficients[&operand.index], range, out, scratch)
    }

    fn blobs(&self, staging: &Staging) -> Result<Vec<Blob>, StageError> {
        Ok(vec![self.adaptation.write(staging)?, self.seen.write(staging)?])
    }
}
