//! Where a run of training is: all that has to be kept to go on from there to the same end.

use super::Keep;
use super::record::{Epoch, GradientSummary, Training, Validation};
use crate::{Draft, Job, StageError, checkpoint};
use merganser_cache::{Preimage, Staging, Value};
use merganser_onnx::train::{Algorithm, Optimizer, State, Tensors};
use merganser_tensors::writer::{WriteOptions, write_f32_tensors};
use merganser_tensors::{DType, Scratch};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;

/// The blob of everything that is no tensor.
const STATE: &str = "state.json";

/// A run between two steps.
pub(super) struct Position {
    /// Steps taken.
    pub step: u64,
    pub values: Tensors,
    pub optimizer: Optimizer,
    algorithm: Algorithm,
    /// The epoch with the best validation, and that.
    pub best: Option<(u64, Validation)>,
    /// The values of then, if they are wanted.
    best_values: Option<Tensors>,
    pub ended: bool,
    pub record: Training,
    /// Σ loss · images, and images, of this epoch.
    epoch: (f64, u64),
    pub objective: serde_json::Value,
}

/// What of it is written as JSON.
#[derive(Serialize, Deserialize)]
struct Rest {
    step: u64,
    /// Of the optimizer, and how many moments each tensor has.
    optimizer_step: u64,
    moments: BTreeMap<String, usize>,
    best: Option<(u64, Validation)>,
    ended: bool,
    record: Training,
    epoch: (f64, u64),
    objective: serde_json::Value,
}

impl Position {
    pub(super) fn new(values: Tensors, algorithm: Algorithm) -> Self {
        Self {
            step: 0,
            values,
            optimizer: Optimizer::new(algorithm),
            algorithm,
            best: None,
            best_values: None,
            ended: false,
            record: Training::default(),
            epoch: (0.0, 0),
            objective: serde_json::Value::Null,
        }
    }

    /// Takes down a step.
    pub(super) fn note(&mut self, loss: f32, rate: f32, norm: f32, n_samples: usize) {
        self.record.losses.push(loss);
        self.record.rates.push(rate);
        self.record.gradient_norms.push(norm);
        self.epoch.0 += f64::from(loss) * n_samples as f64;
        self.epoch.1 += n_samples as u64;
    }

    pub(super) fn end_epoch(&mut self, validation: Option<Validation>) -> Epoch {
        let (sum, n) = std::mem::take(&mut self.epoch);
        let epoch = Epoch {
            epoch: self.record.epochs.len() as u64 + 1,
            steps: self.step,
            loss: sum / n.max(1) as f64,
            validation,
        };
        self.record.epochs.push(epoch);
        epoch
    }

    /// Remembers an epoch that is better than all before.
    pub(super) fn compare(
        &mut self,
        epoch: &Epoch,
        is_better: impl Fn(&Validation, &Validation) -> bool,
        keeps_values: bool,
    ) {
        let Some(now) = epoch.validation else { return };
        if self.best.is_none_or(|(_, best)| is_better(&best, &now)) {
            self.best = Some((epoch.epoch, now));
            self.best_values = keeps_values.then(|| self.values.clone());
        }
    }

    pub(super) fn finish(self, keep: Keep) -> super::Trained {
        let last = self.record.epochs.len() as u64;
        let (kept, values) = match (keep, self.best, self.best_values) {
            (Keep::Best, Some((epoch, _)), Some(values)) => (epoch, values),
            _ => (last, self.values),
        };
        let gradients = GradientSummary::of(&self.record.gradient_norms);
        super::Trained { values, record: Training { kept, gradients, ..self.record } }
    }

    /// Keeps it in the store, as a part of the unit.
    pub(super) fn keep(&self, job: &Job<'_>, preimage: &Preimage) -> Result<(), StageError> {
        job.part(&part(preimage, self.step), |staging| self.write(staging))?;
        Ok(())
    }

    fn write(&self, staging: &Staging) -> Result<Draft, StageError> {
        let state = self.optimizer.state();
        let mut tensors: Vec<(String, &[f32])> = Vec::new();
        tensors.extend(self.values.iter().map(|(name, values)| (format!("value.{name}"), values.as_slice())));
        for (name, moments) in &state.moments {
            let named = moments.iter().enumerate();
            tensors.extend(named.map(|(i, moment)| (format!("moment{i}.{name}"), moment.as_slice())));
        }
        if let Some(best) = &self.best_values {
            tensors.extend(best.iter().map(|(name, values)| (format!("best.{name}"), values.as_slice())));
        }
        let listed: Vec<(String, Vec<usize>)> =
            tensors.iter().map(|(name, values)| (name.clone(), vec![values.len()])).collect();
        let fill = |tensor: usize, range: Range<usize>, out: &mut [f32], _: &mut Scratch| {
            out.copy_from_slice(&tensors[tensor].1[range]);
            Ok(())
        };
        let mut writer = staging.writer(checkpoint::BLOB)?;
        write_f32_tensors(&mut writer, &listed, DType::F32, fill, &WriteOptions::default())?;
        let tensors = writer.finish()?;
        let rest = Rest {
            step: self.step,
            optimizer_step: state.step,
            moments: state.moments.iter().map(|(name, moments)| (name.clone(), moments.len())).collect(),
            best: self.best,
            ended: self.ended,
            record: self.record.clone(),
            epoch: self.epoch,
            objective: self.objective.clone(),
        };
        let mut writer = staging.writer(STATE)?;
        let json = serde_json::to_vec(&rest).map_err(|error| StageError::Internal(error.to_string()))?;
        writer.write_all(&json)?;
        let blobs = vec![tensors, writer.finish()?];
        let manifest = serde_json::json!({ "content": "training" }).to_string();
        Ok(Draft { manifest, blobs, operands: Vec::new(), sources: Vec::new() })
    }

    /// What an earlier process has left of a step, for the same values.
    pub(super) fn stored(
        &self,
        job: &Job<'_>,
        preimage: &Preimage,
        step: u64,
    ) -> Result<Option<Self>, StageError> {
        let Some(artifact) = job.stored(&part(preimage, step)) else { return Ok(None) };
        let Some(json) = job.files.optional_blob(&artifact, STATE)? else { return Ok(None) };
        let Some(path) = job.files.find_blob(&artifact, checkpoint::BLOB)? else { return Ok(None) };
        let rest: Rest = serde_json::from_slice(&json)
            .map_err(|error| StageError::Internal(format!("a checkpoint cannot be read: {error}")))?;
        let source = checkpoint::open_blob(&path)?;
        let mut scratch = Scratch::default();
        let mut read = |name: &str| -> Result<Vec<f32>, StageError> {
            let tensor = source.index_of(name);
            let tensor =
                tensor.ok_or_else(|| StageError::Internal(format!("a checkpoint has no tensor `{name}`")))?;
            let mut values = vec![0.0; source.tensors()[tensor].n_elements()];
            source.read_f32(tensor, 0..values.len(), &mut values, &mut scratch)?;
            Ok(values)
        };
        let mut values = Tensors::new();
        let mut best_values = Tensors::new();
        let has_best = source.tensors().iter().any(|tensor| tensor.name.starts_with("best."));
        for name in self.values.keys() {
            values.insert(name.clone(), read(&format!("value.{name}"))?);
            if has_best {
                best_values.insert(name.clone(), read(&format!("best.{name}"))?);
            }
        }
        let mut moments = BTreeMap::new();
        for (name, &n) in &rest.moments {
            let all = (0..n).map(|i| read(&format!("moment{i}.{name}"))).collect::<Result<Vec<_>, _>>()?;
            moments.insert(name.clone(), all);
        }
        let state = State { step: rest.optimizer_step, moments };
        Ok(Some(Self {
            step: rest.step,
            values,
            optimizer: Optimizer::resume(self.algorithm, state),
            algorithm: self.algorithm,
            best: rest.best,
            best_values: has_best.then_some(best_values),
            ended: rest.ended,
            record: rest.record,
            epoch: rest.epoch,
            objective: rest.objective,
        }))
    }
}

/// What the state after a step is a function of.
fn part(preimage: &Preimage, step: u64) -> Preimage {
    let name = Value::Text(format!("step {step}"));
    let operation = match &preimage.operation {
        Value::Map(fields) => {
            let mut fields = fields.clone();
            fields.insert("part".to_owned(), name);
            Value::Map(fields)
        }
        other => Value::List(vec![other.clone(), name]),
    };
    Preimage { operation, inputs: preimage.inputs.clone() }
}
