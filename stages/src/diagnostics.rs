//! How well factors stand for the task vectors that they were made from: kept beside an artifact as `diagnostics.json`.

use crate::StageError;
use merganser_cache::{Blob, Staging};
use serde::{Deserialize, Serialize};
use std::io::Write;

/// The name of the blob.
pub const DIAGNOSTICS: &str = "diagnostics.json";

/// Everything that is known about the errors of an artifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Diagnostics {
    pub totals: Totals,
    pub parameters: Vec<ParameterDiagnostics>,
    /// How many coefficients have a magnitude in each power of ten.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub histogram: Vec<HistogramBin>,
    /// Weight of each task in the merge, in the order of the tasks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<TaskWeight>,
}

/// Over all parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Totals {
    pub n_elements: u64,
    /// Bytes of coefficients and stored directions; of views, those of the task vectors too.
    pub stored_bytes: u64,
    /// Bytes of the task vectors in f32.
    pub plain_bytes: u64,
    pub tasks: Vec<TaskDiagnostics>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merged: Option<MergedDiagnostics>,
}

/// One parameter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParameterDiagnostics {
    pub name: String,
    pub n_elements: u64,
    pub regions: Vec<RegionDiagnostics>,
    pub stored_bytes: u64,
    pub plain_bytes: u64,
    pub tasks: Vec<TaskDiagnostics>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merged: Option<MergedDiagnostics>,
}

/// One region of a parameter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionDiagnostics {
    pub region: String,
    pub n_entries: u64,
    /// High-energy directions, k.
    pub rank: usize,
    pub n_directions: usize,
    /// Σ_{i ≤ k} σ_i² / Σ σ_i².
    pub energy_retained: f64,
}

/// How far a task's reconstruction is from its task vector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskDiagnostics {
    pub task: String,
    /// ‖τ̂ − τ‖₂.
    pub absolute: f64,
    /// ‖τ̂ − τ‖₂ / ‖τ‖₂; 0 where both are zero.
    pub relative: f64,
    /// ‖τ‖₂.
    pub norm: f64,
    /// Largest |τ̂ − τ|; only where the task vectors were read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// Mean of |τ̂ − τ|; only where the task vectors were read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_absolute: Option<f64>,
}

/// How far the merged difference δ is from simpler merges.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergedDiagnostics {
    /// ‖δ‖₂.
    pub norm: f64,
    /// ‖δ − a‖₂ with a = (1/T) Σ τ_t.
    pub from_average: f64,
    /// ‖a‖₂.
    pub average_norm: f64,
    /// ‖δ − b‖₂ with b = 0.3 Σ τ_t.
    pub from_task_arithmetic: f64,
    /// ‖b‖₂.
    pub task_arithmetic_norm: f64,
}

/// Coefficients whose magnitude is in \[10^e, 10^(e+1)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HistogramBin {
    pub exponent: i32,
    pub high: u64,
    pub low: u64,
}

/// How much a task counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskWeight {
    pub task: String,
    pub weight: f64,
}

impl TaskDiagnostics {
    pub(crate) fn of_norms(task: &str, absolute: f64, norm: f64) -> Self {
        // of nothing, any error is all there is
        let relative =
            if absolute == 0.0 { 0.0 } else { absolute / if norm > 0.0 { norm } else { absolute } };
        Self { task: task.to_owned(), absolute, relative, norm, max: None, mean_absolute: None }
    }
}

impl MergedDiagnostics {
    /// Of independent parts, from the squares of all five lengths.
    pub(crate) fn of_squares(squares: [f64; 5]) -> Self {
        let [norm, from_average, average_norm, from_task_arithmetic, task_arithmetic_norm] =
            squares.map(|square| square.max(0.0).sqrt());
        Self { norm, from_average, average_norm, from_task_arithmetic, task_arithmetic_norm }
    }

    pub(crate) fn squares(&self) -> [f64; 5] {
        let Self { norm, from_average, average_norm, from_task_arithmetic, task_arithmetic_norm } = *self;
        [norm, from_average, average_norm, from_task_arithmetic, task_arithmetic_norm]
            .map(|length| length * length)
    }
}

impl Diagnostics {
    /// Adds up what is known about parameters.
    pub(crate) fn of(parameters: Vec<ParameterDiagnostics>) -> Self {
        let sum = |of: fn(&ParameterDiagnostics) -> u64| parameters.iter().map(of).sum();
        let mut tasks: Vec<TaskDiagnostics> = Vec::new();
        let first = parameters.first().map(|parameter| parameter.tasks.as_slice()).unwrap_or_default();
        for (index, task) in first.iter().enumerate() {
            let all =
                || parameters.iter().filter_map(|parameter| Some((parameter, parameter.tasks.get(index)?)));
            let length =
                |of: fn(&TaskDiagnostics) -> f64| all().map(|(_, task)| of(task).powi(2)).sum::<f64>().sqrt();
            let mut total =
                TaskDiagnostics::of_norms(&task.task, length(|task| task.absolute), length(|task| task.norm));
            if task.max.is_some() {
                let n: u64 = all().map(|(parameter, _)| parameter.n_elements).sum();
                let mean = |(parameter, task): (&ParameterDiagnostics, &TaskDiagnostics)| {
                    task.mean_absolute.unwrap_or(0.0) * parameter.n_elements as f64
                };
                total.max = Some(all().filter_map(|(_, task)| task.max).fold(0.0, f64::max));
                total.mean_absolute = Some(all().map(mean).sum::<f64>() / n.max(1) as f64);
            }
            tasks.push(total);
        }
        let merged: Vec<MergedDiagnostics> =
            parameters.iter().filter_map(|parameter| parameter.merged).collect();
        let mut squares = [0.0; 5];
        for part in &merged {
            squares.iter_mut().zip(part.squares()).for_each(|(sum, square)| *sum += square);
        }
        let totals = Totals {
            n_elements: sum(|parameter| parameter.n_elements),
            stored_bytes: sum(|parameter| parameter.stored_bytes),
            plain_bytes: sum(|parameter| parameter.plain_bytes),
            tasks,
            merged: (!merged.is_empty()).then(|| MergedDiagnostics::of_squares(squares)),
        };
        Self { totals, parameters, histogram: Vec::new(), weights: Vec::new() }
    }

    /// Of several parts of one result; `None` of none.
    pub(crate) fn joined(parts: Vec<Self>) -> Option<Self> {
        let mut parts = parts.into_iter();
        let mut all = parts.next()?;
        for part in parts {
            all.parameters.extend(part.parameters);
            for bin in part.histogram {
                match all.histogram.iter_mut().find(|known| known.exponent == bin.exponent) {
                    Some(known) => (known.high, known.low) = (known.high + bin.high, known.low + bin.low),
                    None => all.histogram.push(bin),
                }
            }
        }
        all.parameters.sort_by(|left, right| left.name.cmp(&right.name));
        all.histogram.sort_by_key(|bin| bin.exponent);
        let (histogram, weights) = (all.histogram, all.weights);
        Some(Self { histogram, weights, ..Self::of(all.parameters) })
    }

    /// Reads the blob.
    pub fn from_json(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }
}

/// Writes the blob.
pub(crate) fn write(staging: &Staging, diagnostics: &Diagnostics) -> Result<Blob, StageError> {
    let mut writer = staging.writer(DIAGNOSTICS)?;
    let json = serde_json::to_vec(diagnostics).map_err(|error| StageError::Internal(error.to_string()))?;
    writer.write_all(&json)?;
    Ok(writer.finish()?)
}
