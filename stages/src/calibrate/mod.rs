//! `calibrate`: what the layers of a model see of a dataset, and how its answers depend on its weights.
//!
//! Quantization that looks at activations needs the second moments of every layer's inputs, extremes of activations, and how much each
//! tensor matters to the output. All of it is found in one pass over a dataset (and one evaluation per tensor for the last), and kept, so
//! that schemes, widths and budgets can be tried on it. One unit of work per dataset (and member), as for evaluations.

mod capture;
mod fisher;
mod sensitivity;
mod statistics;

pub use fisher::FisherLabels;
pub(crate) use statistics::{Calibration, layer_error};
pub use statistics::{
    FisherInformation, InputStatistics, LayerPart, STATISTICS, Statistics, Summed, ValueRange,
};

use crate::evaluate::{self, EvaluateParams, Evaluation};
use crate::kind::{Arity, Connection, Content, MethodDoc, Port, Ports, SourceSet, Stage, StageKind, Unit};
use crate::params::{Params, Problem, one_map, parse, to_value};
use crate::seen::Seen;
use crate::{Draft, Job, Services, StageError, checkpoint};
use capture::Moments;
use merganser_cache::Value;
use merganser_tensors::TensorSource;
use merganser_tensors::writer::{Block, OutputTensor, Payload};
use merganser_tensors::{DType, manifest};
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

pub(crate) struct Calibrate;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct CalibrateParams {
    /// Images that the sensitivity of the output to every tensor is measured with, spread over the dataset: as many evaluations as there
    /// are tensors. 0 measures none.
    #[serde(default = "default_sensitivity_images")]
    sensitivity_images: usize,
    /// Images that the diagonal of the Fisher information is measured with, for the merge method `fisher`, spread over the dataset. 0 measures
    /// none.
    #[serde(default)]
    fisher_images: usize,
    /// How the labels of the Fisher information come from the model's own distribution: `expected` over all classes, as many passes per image
    /// as there are classes, or `sampled` once per image.
    #[serde(default)]
    fisher_labels: FisherLabels,
}

fn default_sensitivity_images() -> usize {
    64
}

const PORTS: &[Port] = &[
    Port {
        name: "model",
        doc: "what is run: one checkpoint on every dataset, or a collection, member t on dataset t",
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
];

impl StageKind for Calibrate {
    fn id(&self) -> &'static str {
        "calibrate"
    }

    fn summary(&self) -> &'static str {
        "what the layers of a model see of a dataset: second moments, extremes, sensitivities"
    }

    fn ports(&self) -> Ports {
        Ports { named: PORTS, open: None }
    }

    fn methods(&self) -> Vec<MethodDoc> {
        vec![MethodDoc {
            id: "calibrate",
            summary: self.summary(),
            formula: "H = Σ x·xᵀ / images over the inputs x of a layer; sensitivity = Σ‖Δlogits‖² / Σ‖logits − their mean‖² / tr(ΔW·H·ΔWᵀ), with W rounded to 3 bits per output; F = E_x E_y[(∂ log p(y|x) / ∂θ)²], y from the model's own distribution",
            source: "H: Frantar et al., GPTQ, arXiv:2210.17323, §3; F: Matena and Raffel, arXiv:2111.09832, §3; sensitivity: ours",
            schema: EvaluateParams::document(schema_for!(CalibrateParams), ""),
        }]
    }

    fn parse(&self, mut params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        let mut problems = Vec::new();
        let of_evaluation = params.split_off(EvaluateParams::KEYS);
        let evaluation = EvaluateParams::parse(&of_evaluation).map_err(|found| problems.extend(found)).ok();
        let own = parse::<CalibrateParams>(&params).map_err(|found| problems.extend(found)).ok();
        match (evaluation, own) {
            (Some(evaluation), Some(own)) => Ok(Box::new(CalibrateStage { evaluation, own })),
            _ => Err(problems),
        }
    }
}

struct CalibrateStage {
    evaluation: EvaluateParams,
    own: CalibrateParams,
}

impl CalibrateStage {
    /// The dataset that a unit is about.
    fn task<'a>(&self, unit: &'a Unit) -> Result<&'a str, StageError> {
        let name = unit.member.as_deref().unwrap_or_default();
        if self.evaluation.dataset.contains_key(name) {
            Ok(name)
        } else {
            Err(StageError::Internal(format!("no dataset for `{name}`")))
        }
    }
}

impl Stage for CalibrateStage {
    fn version(&self) -> u32 {
        2
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        if inputs.iter().any(|input| input.port == "origin" && input.members.is_some()) {
            let message = "port `origin` takes one checkpoint, not a collection";
            return Err(Problem::new("wrong-type", message));
        }
        Ok(Content::Statistics)
    }

    fn units(&self, inputs: &[Connection], _: &Ports) -> Result<Vec<Unit>, Problem> {
        evaluate::units_by_dataset(&self.evaluation, inputs, &[])
    }

    fn parameters(&self, unit: &Unit) -> Result<Value, StageError> {
        Ok(one_map([to_value(&self.own)?, self.evaluation.for_task(self.task(unit)?)?]))
    }

    fn sources(&self, unit: &Unit) -> Result<Vec<SourceSet>, StageError> {
        self.evaluation.sources(self.task(unit)?)
    }

    fn environment(&self, services: &Services) -> Result<Value, StageError> {
        evaluate::environment(services)
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        let task = self.task(&job.unit)?;
        let evaluation = Evaluation::prepare(job, &self.evaluation, task)?;
        let model = evaluation.model(job.input("model")?)?;
        let (mut statistics, moments) = capture::capture(job, &evaluation, &model)?;
        if statistics.layers.is_empty() {
            return Err(StageError::input(
                "no tensor of the model is multiplied with an activation in the graph",
            ));
        }
        if self.own.sensitivity_images > 0 {
            let n = self.own.sensitivity_images;
            sensitivity::measure(job, &evaluation, &model, n, &mut statistics, &moments)?;
        }
        let images = statistics.images as f64;
        let mut tensors: Vec<Computed> =
            moments.into_iter().map(|moments| Computed::moments(moments, images)).collect();
        if self.own.fisher_images > 0 {
            let (how, diagonals) =
                fisher::measure(job, &evaluation, &model, self.own.fisher_images, self.own.fisher_labels)?;
            statistics.fisher = Some(how);
            tensors.extend(diagonals.into_iter().map(|(name, values)| Computed {
                shape: shape_of(&*model, &name),
                name: statistics::fisher_name(&name),
                values,
            }));
        }
        let outputs: Vec<OutputTensor> = tensors
            .iter()
            .map(|tensor| OutputTensor {
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
                payload: Payload::Values(DType::F32),
            })
            .collect();
        let fill = |output: usize, range: std::ops::Range<usize>, block: Block<'_>, _: &mut _| {
            let Block::Values(values) = block else { unreachable!("only values were announced") };
            let computed = &tensors[output].values[range];
            values.iter_mut().zip(computed).for_each(|(value, computed)| *value = *computed as f32);
            Ok(())
        };
        let draft = checkpoint::store(job, manifest::Content::Statistics, &outputs, fill, None)?;
        let images = BTreeMap::from([(task.to_owned(), evaluation.record().clone())]);
        let seen = Seen { labels: false, images, validation: BTreeMap::new() };
        let further = [statistics.write(job.staging)?, seen.write(job.staging)?];
        Ok(Draft { blobs: draft.blobs.into_iter().chain(further).collect(), ..draft })
    }
}

/// A tensor of the artifact.
struct Computed {
    name: String,
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Computed {
    fn moments(moments: Moments, images: f64) -> Self {
        let shape = moments.sum.shape().to_vec();
        let values = moments.sum.iter().map(|sum| sum / images).collect();
        Self { name: moments.name, shape, values }
    }
}

fn shape_of(model: &dyn TensorSource, name: &str) -> Vec<usize> {
    model.index_of(name).map(|tensor| model.tensors()[tensor].shape.clone()).unwrap_or_default()
}
