//! `distill`: a model trained on a dataset, by gradients that ONNX Runtime computes.
//!
//! A method is one file and one line in [`methods`]; [`method`] says what it is asked, [`trainer`] is the loop that all of them go through.
//! One unit of work per dataset (and member), as for evaluations: the result is a collection with a model per dataset.

mod classifier;
mod method;
mod methods;
mod output;
mod trainer;
mod training;

pub(crate) use methods::lora::{ADAPTER, CONFIG};
pub use methods::{
    Attempt, BitReductions, EpochWidths, FLOAT_STUDENT, LayerWidth, PROGRESS, QuantizedActivation, Reduction,
};
pub use trainer::{Epoch, GradientSummary, TRAINING, Training, Validation};

use crate::evaluate::{self, EvaluateParams, Evaluation};
use crate::filter::NameFilter;
use crate::images::dataset;
use crate::kind::{Arity, Connection, Content, MethodDoc, Port, Ports, SourceSet, Stage, StageKind, Unit};
use crate::params::{Params, Problem, did_you_mean, one_map, to_value};
use crate::{Draft, Job, Services, StageError};
use classifier::Validating;
use merganser_cache::Value;
use method::{Distill, Method, Need, Setup};
use methods::METHODS;
use training::{TrainingParams, evaluation_keys};

pub(crate) struct DistillKind;

const PORTS: &[Port] = &[
    Port {
        name: "model",
        doc: "what is trained, packed or not: one checkpoint on every dataset, or a collection, member t on dataset t",
        accepts: &[Content::Checkpoint],
        arity: Arity::PerMember,
        required: true,
    },
    Port {
        name: "origin",
        doc: "the checkpoint that the graph was exported from: tells which tensor is which initializer",
        accepts: &[Content::Checkpoint],
        arity: Arity::All,
        required: true,
    },
    Port {
        name: "teacher",
        doc: "whose answers the model learns, run through the same graph: one checkpoint, or a collection, member t for dataset t",
        accepts: &[Content::Checkpoint],
        arity: Arity::All,
        required: false,
    },
];

impl StageKind for DistillKind {
    fn id(&self) -> &'static str {
        "distill"
    }

    fn summary(&self) -> &'static str {
        "trains a model on a dataset, by gradients that ONNX Runtime computes"
    }

    fn ports(&self) -> Ports {
        Ports { named: PORTS, open: None }
    }

    fn method_key(&self) -> Option<&'static str> {
        Some("method")
    }

    fn methods(&self) -> Vec<MethodDoc> {
        let document = |method: &&dyn Method| MethodDoc {
            id: method.id(),
            summary: method.summary(),
            formula: method.formula(),
            source: method.source(),
            schema: NameFilter::document(EvaluateParams::document(
                TrainingParams::document(method.schema()),
                "",
            )),
        };
        METHODS.iter().map(document).collect()
    }

    fn parse(&self, mut params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        let mut problems = Vec::new();
        let method = params
            .choose("method", METHODS, <dyn Method>::id, None)
            .map_err(|problem| problems.push(problem))
            .ok();
        let span = params.span;
        let filter = NameFilter::take(&mut params).map_err(|found| problems.extend(found)).ok();
        let of_evaluation = params.split_off(&evaluation_keys());
        let evaluation = EvaluateParams::parse(&of_evaluation).map_err(|found| problems.extend(found)).ok();
        let training = TrainingParams::take(&mut params).map_err(|found| problems.extend(found)).ok();
        let distill = method.and_then(|method| {
            let found = method.parse(&params);
            found
                .map_err(|found| problems.extend(found.into_iter().map(|found| all_keys(method, found))))
                .ok()
        });
        let (Some(method), Some(filter), Some(evaluation), Some(training), Some(distill)) =
            (method, filter, evaluation, training, distill)
        else {
            return Err(problems);
        };
        let place = training.validation_place();
        let names_files = place
            .as_ref()
            .is_some_and(|place| place.path.is_some() || place.images.is_some() || place.labels.is_some());
        if names_files && evaluation.dataset.len() > 1 {
            let message = "`validation` names files, which are those of one dataset; here are several";
            problems.push(
                Problem::new("bad-value", message)
                    .at(span)
                    .help("a `split`, or `n` images set aside, is for all of them"),
            );
        }
        let validation = place.map(|place| evaluation.elsewhere(&place));
        problems.extend(validation.iter().flat_map(|validation| validation.mistakes(span)));
        if problems.is_empty() {
            Ok(Box::new(DistillStage { method, distill, filter, evaluation, training, validation }))
        } else {
            Err(problems)
        }
    }
}

/// Keys are parsed in parts: what an unknown one was meant to be may be in any of them.
fn all_keys(method: &dyn Method, problem: Problem) -> Problem {
    let Some(word) = problem.message.split('`').nth(1).filter(|_| problem.code == "unknown-key") else {
        return problem;
    };
    let schema = method.schema();
    let own = schema.get("properties").and_then(serde_json::Value::as_object);
    let own: Vec<&str> = own.into_iter().flatten().map(|(key, _)| key.as_str()).collect();
    let all = own.into_iter().chain(TrainingParams::KEYS.iter().copied()).chain(evaluation_keys());
    let help = did_you_mean(word, all.chain(["only", "skip"]).collect::<Vec<_>>());
    Problem { help, ..problem }
}

struct DistillStage {
    method: &'static dyn Method,
    distill: Box<dyn Distill>,
    filter: NameFilter,
    evaluation: EvaluateParams,
    training: TrainingParams,
    /// Datasets of images for validation, if these lie elsewhere.
    validation: Option<EvaluateParams>,
}

impl DistillStage {
    /// The dataset that a unit is about.
    fn task<'a>(&self, unit: &'a Unit) -> Result<&'a str, StageError> {
        let name = unit.member.as_deref().unwrap_or_default();
        if self.evaluation.dataset.contains_key(name) {
            Ok(name)
        } else {
            Err(StageError::Internal(format!("no dataset for `{name}`")))
        }
    }

    /// The images to train on, and those for validation.
    fn images<'a>(
        &'a self,
        job: &'a Job<'a>,
        task: &'a str,
        evaluation: &Evaluation<'_>,
    ) -> Result<(Vec<usize>, Option<Validating<'a>>), StageError> {
        let all = 0..evaluation.n_images();
        if let Some(validation) = &self.validation {
            let elsewhere = Evaluation::prepare(job, validation, task)?;
            let images = (0..elsewhere.n_images()).collect();
            return Ok((all.collect(), Some(Validating { elsewhere: Some(elsewhere), images })));
        }
        let Some(subset) = self.training.validation_split() else { return Ok((all.collect(), None)) };
        let images = dataset::choose(evaluation.labels(), subset);
        let training: Vec<usize> = all.filter(|image| images.binary_search(image).is_err()).collect();
        if training.is_empty() {
            return Err(StageError::input(format!(
                "dataset `{task}` has {} images: `validation` leaves none to train on",
                images.len()
            )));
        }
        Ok((training, Some(Validating { elsewhere: None, images })))
    }
}

impl Stage for DistillStage {
    fn version(&self) -> u32 {
        // 2: gradients by kernels and products of our own; 3: no scaling and unscaling of the gradients of a batch that is whole;
        // 4: images for validation from files of their own are those, and `seen.json`
        4
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        if inputs.iter().any(|input| input.port == "origin" && input.members.is_some()) {
            let message = "port `origin` takes one checkpoint, not a collection";
            return Err(Problem::new("wrong-type", message));
        }
        let has_teacher = inputs.iter().any(|input| input.port == "teacher");
        let id = self.method.id();
        match self.distill.teacher() {
            Need::No if has_teacher => {
                Err(Problem::new("unknown-port", format!("method `{id}` does not read port `teacher`"))
                    .help("remove `teacher` from `from`"))
            }
            Need::Required if !has_teacher => {
                Err(Problem::new("missing-port", format!("method `{id}` needs port `teacher`")))
            }
            _ => Ok(Content::Checkpoint),
        }
    }

    fn units(&self, inputs: &[Connection], _: &Ports) -> Result<Vec<Unit>, Problem> {
        evaluate::units_by_dataset(&self.evaluation, inputs, &["teacher"])
    }

    fn parameters(&self, unit: &Unit) -> Result<Value, StageError> {
        let Value::Map(mut evaluation) = self.evaluation.for_task(self.task(unit)?)? else {
            return Err(StageError::Internal("parameters are a map".to_owned()));
        };
        // Images at once of a validation: this kind's own `batch_size` is that of a step.
        evaluation.remove("batch_size");
        Ok(one_map([
            Value::map([("method", self.method.id())]),
            Value::map([("method_version", self.distill.version())]),
            self.distill.parameters()?,
            to_value(&self.training)?,
            to_value(&self.filter)?,
            Value::Map(evaluation),
        ]))
    }

    fn sources(&self, unit: &Unit) -> Result<Vec<SourceSet>, StageError> {
        let task = self.task(unit)?;
        let mut sources = self.evaluation.sources(task)?;
        if let Some(validation) = &self.validation {
            sources.push(validation.image_files("validation", task)?);
        }
        Ok(sources)
    }

    fn environment(&self, services: &Services) -> Result<Value, StageError> {
        evaluate::environment(services)
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        let task = self.task(&job.unit)?;
        let evaluation = Evaluation::prepare(job, &self.evaluation, task)?;
        let model = evaluation.model(job.input("model")?)?;
        let (images, validating) = self.images(job, task, &evaluation)?;
        let setup = Setup {
            job,
            task,
            training: &self.training,
            filter: &self.filter,
            evaluation,
            model,
            images,
            validating,
        };
        let draft = self.distill.run(&setup)?;
        let seen = self.distill.seen(&setup).write(job.staging)?;
        Ok(Draft { blobs: draft.blobs.into_iter().chain([seen]).collect(), ..draft })
    }
}

#[cfg(test)]
mod tests;
