//! `cdpq`: confidence-driven progressive quantization. A student that computes with rounded weights learns to have its teacher's features, and
//! layers that do so well lose a bit, epoch after epoch.
//!
//! After jaein4722/sam2_adaptive_qat, `projects/layerwise_quantization` (weights rounded symmetrically per output channel; losses over the
//! features of some layers; candidates by the history of their losses; a bit less is kept if the student's loss allows it). Where we differ:
//! gradients of weights go straight through the rounding, as the authors' notes say and their code does not (it detaches weights, and so
//! trains biases and norms alone); tokens count as places and their features as channels, where the code takes the last two axes for space
//! whatever they are; of a feature without space, such as logits, statistics are the squared error.

mod activations;
mod confidence;
mod layers;
mod objective;
mod output;
mod params;
mod record;
mod student;
mod teacher;

pub use activations::QuantizedActivation;
pub use confidence::{Attempt, Reduction};
pub use record::{BitReductions, EpochWidths, FLOAT_STUDENT, LayerWidth, PROGRESS};

use crate::distill::method::{Distill, Method, Need, Setup};
use crate::distill::trainer::{self, Trained, Training};
use crate::distill::training::{Keep, TrainingParams};
use crate::params::{Params, Problem, parse, to_value};
use crate::seen::Seen;
use crate::{Draft, StageError, checkpoint};
use merganser_cache::Value;
use merganser_tensors::TensorInfo;
use objective::Progressive;
use params::CdpqParams;
use schemars::{Schema, schema_for};
use std::sync::Arc;

#[cfg(test)]
mod tests;

pub(in crate::distill) struct Cdpq;

impl Method for Cdpq {
    fn id(&self) -> &'static str {
        "cdpq"
    }

    fn summary(&self) -> &'static str {
        "trains a student with rounded weights on its teacher's features, and takes bits from layers that can do without"
    }

    fn formula(&self) -> &'static str {
        "L = Σ features MSE(mean_hw) + MSE(var_hw) [+ MSE(t̂ŝᵀ, t̂t̂ᵀ)]; candidates: mean loss ≤ layer_threshold; b − 1 stays if L ≤ L_now·(1 + impact_threshold)"
    }

    fn source(&self) -> &'static str {
        "jaein4722/sam2_adaptive_qat; straight-through gradients: Bengio et al., arXiv:1308.3432"
    }

    fn schema(&self) -> Schema {
        schema_for!(CdpqParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Distill>, Vec<Problem>> {
        let span_of = |key: &str| params.table.get(key).map_or(params.span, |entry| entry.node.span);
        let parsed: CdpqParams = parse(params)?;
        let problems: Vec<Problem> =
            parsed.problems().into_iter().map(|(key, problem)| problem.at(span_of(key))).collect();
        if problems.is_empty() { Ok(Box::new(parsed)) } else { Err(problems) }
    }
}

impl Distill for CdpqParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn teacher(&self) -> Need {
        Need::Optional
    }

    /// No labels; images for validation decide which bits stay off, whatever is kept of epochs.
    fn seen(&self, setup: &Setup<'_>) -> Seen {
        setup.seen(false, true)
    }

    fn run(&self, setup: &Setup<'_>) -> Result<Draft, StageError> {
        let job = setup.job;
        let model = checkpoint::Weights::new(Arc::clone(&setup.model));
        let teacher = match job.optional("teacher") {
            Some(teacher) => checkpoint::Weights::new(setup.evaluation.model(teacher)?),
            None => checkpoint::Weights::new(Arc::clone(&setup.model)),
        };
        let mut objective = Progressive::new(self, setup, &model, &teacher)?;
        let values = objective.values()?;
        let n_samples = setup.images.len();
        // The student is that of the last widths: an earlier one is another model.
        let training = TrainingParams { keep: Keep::Last, patience: None, ..setup.training.clone() };
        let Trained { values, record } =
            trainer::train(job, job.preimage, &training, n_samples, values, &mut objective)?;
        let trained_values: usize = values.values().map(Vec::len).sum();
        let all: usize = setup.model.tensors().iter().map(TensorInfo::n_elements).sum();
        let record = Training {
            images: n_samples as u64,
            validation_images: setup.validation().map_or(0, |(_, images)| images.len()) as u64,
            trained_values: trained_values as u64,
            frozen_values: (all - trained_values) as u64,
            ..record
        };
        let reductions = objective.finish(&values)?;
        output::store(job, &setup.model, values, &record, &reductions)
    }
}
