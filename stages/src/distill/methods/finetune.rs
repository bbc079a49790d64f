//! `finetune`: all weights, or those that are chosen, on labels and on what a teacher says.
//!
//! With a teacher the loss is that of Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, arXiv:1503.02531, §2: the
//! divergence of the two models' softened probabilities, times T² so that its gradients keep their size, beside the cross-entropy.

use crate::distill::classifier::{Classifier, rows};
use crate::distill::method::{Distill, Method, Need, Setup};
use crate::distill::output;
use crate::distill::trainer::{self, Batch, Current, Objective, Trained, Training, Validation, Values};
use crate::params::{Params, Problem, parse, to_value};
use crate::seen::Seen;
use crate::{Draft, StageError, checkpoint};
use merganser_cache::Value;
use merganser_onnx::Weights;
use merganser_onnx::gradient::{Differentiated, losses};
use merganser_onnx::train::Tensors;
use merganser_tensors::TensorInfo;
use ndarray::Array2;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

pub(in crate::distill) struct FineTune;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct FineTuneParams {
    /// How much of a label's probability is spread over all classes.
    #[serde(default)]
    label_smoothing: f64,
    /// With a teacher: the share of the loss that is the divergence from its logits; the rest is the labels'.
    #[serde(default = "usual_teacher_weight")]
    teacher_weight: f64,
    /// With a teacher: T, what both models' logits are divided by.
    #[serde(default = "usual_temperature")]
    temperature: f64,
}

fn usual_teacher_weight() -> f64 {
    0.5
}

fn usual_temperature() -> f64 {
    2.0
}

impl Method for FineTune {
    fn id(&self) -> &'static str {
        "finetune"
    }

    fn summary(&self) -> &'static str {
        "trains all weights, or those that `only` and `skip` admit, on labels, and on a teacher's logits if there is one"
    }

    fn formula(&self) -> &'static str {
        "L = (1 − w)·CE(softmax z, y) + w·T²·KL(softmax(z_teacher / T) ‖ softmax(z / T)); w = 0 without a teacher"
    }

    fn source(&self) -> &'static str {
        "Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531, §2"
    }

    fn schema(&self) -> Schema {
        schema_for!(FineTuneParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Distill>, Vec<Problem>> {
        let span_of = |key: &str| params.table.get(key).map_or(params.span, |entry| entry.node.span);
        let parsed: FineTuneParams = parse(params)?;
        let mut problems = Vec::new();
        for (key, share) in
            [("label_smoothing", parsed.label_smoothing), ("teacher_weight", parsed.teacher_weight)]
        {
            if !(0.0..=1.0).contains(&share) {
                let message = format!("`{key}` must be from 0 to 1, got {share}");
                problems.push(Problem::new("bad-value", message).at(span_of(key)));
            }
        }
        if !(parsed.temperature as f32 > 0.0 && (parsed.temperature as f32).is_finite()) {
            let message = format!("`temperature` must be above zero, got {}", parsed.temperature);
            problems.push(Problem::new("bad-value", message).at(span_of("temperature")));
        }
        if problems.is_empty() { Ok(Box::new(parsed)) } else { Err(problems) }
    }
}

impl Distill for FineTuneParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn teacher(&self) -> Need {
        Need::Optional
    }

    fn seen(&self, setup: &Setup<'_>) -> Seen {
        let selects = setup.validating.is_some() && setup.training.selects();
        let taught_only = self.teacher_weight >= 1.0 && setup.job.optional("teacher").is_some();
        // A teacher can be all that is learned from; validation asks for labels still.
        setup.seen(!taught_only || selects, selects)
    }

    fn run(&self, setup: &Setup<'_>) -> Result<Draft, StageError> {
        let job = setup.job;
        let model = checkpoint::Weights::new(Arc::clone(&setup.model));
        let classifier = Classifier::new(setup, &model)?;
        let admits = |name: &str| setup.filter.admits(name);
        let values = classifier.tensors(&model, admits)?;
        if values.is_empty() {
            return Err(StageError::input_help(
                "no tensor that the graph computes with is to be trained",
                "`only` and `skip` match whole tensor names: `*.attn.*`, not `attn`",
            ));
        }
        classifier.check(&model, &values)?;
        let teacher = match job.optional("teacher") {
            Some(teacher) => {
                let teacher = checkpoint::Weights::new(setup.evaluation.model(teacher)?);
                Some(classifier.logits_of(&teacher)?)
            }
            None => None,
        };
        let slots = classifier.slots(admits)?.into_iter().map(|slot| slot.name).collect();
        let mut objective =
            Labels { params: self, classifier: &classifier, model: &model, slots, teacher, classes: 0 };
        let n_samples = classifier.n_samples();
        let Trained { values, record } =
            trainer::train(job, job.preimage, setup.training, n_samples, values, &mut objective)?;
        let trained_values: usize = values.values().map(Vec::len).sum();
        let all: usize = setup.model.tensors().iter().map(TensorInfo::n_elements).sum();
        let record = Training {
            images: n_samples as u64,
            validation_images: classifier.n_validation() as u64,
            trained_values: trained_values as u64,
            frozen_values: (all - trained_values) as u64,
            ..record
        };
        output::store(job, &*setup.model, &values, &record)
    }
}

/// Labels, and what a teacher says.
struct Labels<'a> {
    params: &'a FineTuneParams,
    classifier: &'a Classifier<'a>,
    model: &'a checkpoint::Weights,
    /// Weights of the graph that are trained.
    slots: Vec<String>,
    /// Logits of all samples.
    teacher: Option<Array2<f32>>,
    classes: usize,
}

/// What the graph is given beside images.
const TARGETS: &str = "merganser.targets";
const TEACHER: &str = "merganser.teacher";

impl Objective for Labels<'_> {
    fn differentiate(&mut self, n: usize) -> Result<Differentiated, StageError> {
        let (mut forward, logits) = self.classifier.forward(n, &[])?;
        self.classes = logits.shape[1];
        let share = if self.teacher.is_some() { self.params.teacher_weight as f32 } else { 0.0 };
        let mut parts = Vec::new();
        if share < 1.0 {
            let targets = forward.add_input(TARGETS, &logits.shape)?;
            parts.push((1.0 - share, losses::cross_entropy(forward.tape(), &logits, &targets)?));
        }
        if share > 0.0 {
            let teacher = forward.add_input(TEACHER, &logits.shape)?;
            let temperature = self.params.temperature as f32;
            let divergence = losses::logits_divergence(forward.tape(), &logits, &teacher, temperature)?;
            parts.push((share, divergence));
        }
        let loss = losses::weighted_sum(forward.tape(), &parts);
        let slots: Vec<&str> = self.slots.iter().map(String::as_str).collect();
        Ok(forward.differentiate(&loss, &slots, &[])?)
    }

    fn model(&self) -> &dyn Weights {
        self.model
    }

    fn feed(&mut self, batch: &Batch<'_>) -> Result<Values, StageError> {
        let mut fed = Values::from([self.classifier.feed(batch.samples)?]);
        let share = if self.teacher.is_some() { self.params.teacher_weight as f32 } else { 0.0 };
        if share < 1.0 {
            let smoothing = self.params.label_smoothing as f32;
            let targets = self.classifier.targets(batch.samples, self.classes, smoothing);
            fed.insert(TARGETS.to_owned(), targets);
        }
        if let Some(teacher) = self.teacher.as_ref().filter(|_| share > 0.0) {
            fed.insert(TEACHER.to_owned(), rows(teacher, batch.samples));
        }
        Ok(fed)
    }

    fn validate(&mut self, trained: &Tensors) -> Result<Option<Validation>, StageError> {
        self.classifier.validate(&Current { model: self.model, trained })
    }
}
