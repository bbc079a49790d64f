//! What calibration found: the artifact, and how other stages read it.
//!
//! The artifact's tensors are second moments `H = Σ x·xᵀ / images` of layer inputs x in f32, one matrix for every distinct input; beside
//! them, [`STATISTICS`] says which tensors of the checkpoint are multiplied with which input, the extremes of activations, and how
//! sensitive the output is to each tensor.

use super::fisher::FisherLabels;
use crate::{Job, JobInput, StageError};
use merganser_algebra::product;
use merganser_cache::{Blob, Staging};
use merganser_onnx::Side;
use merganser_tensors::source::read_finite_f32;
use merganser_tensors::{Scratch, TensorSource};
use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

/// The name of the blob.
pub const STATISTICS: &str = "statistics.json";

/// Everything but the second moments.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statistics {
    /// Images that the activations come from.
    pub images: u64,
    /// The inputs of layers, in the order of the moments.
    pub inputs: Vec<InputStatistics>,
    /// Tensors that are multiplied with an activation, by name.
    pub layers: BTreeMap<String, Vec<LayerPart>>,
    /// Extremes of the inputs and outputs of layers, by their name in the graph.
    pub ranges: BTreeMap<String, ValueRange>,
    /// By tensor: the squared change of the logits, relative to their variance over the images, per unit of `tr(ΔW·H·ΔWᵀ)`, where it was
    /// measured.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sensitivity: BTreeMap<String, f64>,
    /// How the diagonals of the Fisher information were measured, if they were: tensors of the artifact under `fisher.` and the name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fisher: Option<FisherInformation>,
}

/// How the Fisher information was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FisherInformation {
    pub images: u64,
    pub labels: FisherLabels,
}

/// What layers multiply.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputStatistics {
    /// Its name in the graph.
    pub value: String,
    /// Its second moments, a tensor of the artifact.
    pub moments: String,
    /// Values of a vector.
    pub width: usize,
    /// Vectors seen.
    pub vectors: u64,
}

/// Rows of a tensor that one layer computes with, the tensor seen as a row-major matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerPart {
    pub first_row: usize,
    pub n_rows: usize,
    pub columns: usize,
    /// The side that is summed over.
    pub inputs: Summed,
    /// Position in [`Statistics::inputs`].
    pub input: usize,
}

/// A side of a matrix, as it is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Summed {
    Columns,
    Rows,
}

/// Extremes of an activation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValueRange {
    pub min: f32,
    pub max: f32,
}

impl Statistics {
    /// Reads the blob; `None` if it is not one.
    pub fn from_json(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }

    pub(crate) fn write(&self, staging: &Staging) -> Result<Blob, StageError> {
        let mut writer = staging.writer(STATISTICS)?;
        let json = serde_json::to_vec(self).expect("names and finite numbers can be written");
        writer.write_all(&json)?;
        Ok(writer.finish()?)
    }
}

impl From<Side> for Summed {
    fn from(side: Side) -> Self {
        match side {
            Side::Columns => Self::Columns,
            Side::Rows => Self::Rows,
        }
    }
}

impl LayerPart {
    pub(crate) fn n_inputs(&self) -> usize {
        match self.inputs {
            Summed::Columns => self.columns,
            Summed::Rows => self.n_rows,
        }
    }

    pub(crate) fn n_outputs(&self) -> usize {
        match self.inputs {
            Summed::Columns => self.n_rows,
            Summed::Rows => self.columns,
        }
    }

    /// Where in the tensor the weight of an output and an input lies.
    pub(crate) fn element(&self, output: usize, input: usize) -> usize {
        match self.inputs {
            Summed::Columns => (self.first_row + output) * self.columns + input,
            Summed::Rows => (self.first_row + input) * self.columns + output,
        }
    }

    /// The weights, outputs × inputs.
    pub(crate) fn weights(&self, tensor: &[f32]) -> Array2<f64> {
        Array2::from_shape_fn((self.n_outputs(), self.n_inputs()), |(output, input)| {
            f64::from(tensor[self.element(output, input)])
        })
    }

    /// Whether another part is of the same weights.
    pub(crate) fn is_same_place(&self, other: &Self) -> bool {
        (self.first_row, self.n_rows, self.columns, self.inputs)
            == (other.first_row, other.n_rows, other.columns, other.inputs)
    }

    /// Whether all its weights lie within a tensor of `n` elements.
    fn fits(&self, n: usize) -> bool {
        let end = self.first_row.checked_add(self.n_rows).and_then(|rows| rows.checked_mul(self.columns));
        end.is_some_and(|end| end <= n)
    }
}

/// `tr(Δ·H·Δᵀ)`.
#[expect(clippy::needless_pass_by_value, reason = "views are references themselves")]
pub(crate) fn layer_error(delta: ArrayView2<'_, f64>, moments: ArrayView2<'_, f64>) -> f64 {
    let through = product(delta, moments);
    delta.iter().zip(&through).map(|(a, b)| a * b).sum()
}

/// Statistics of one calibration or of several, which count by their images.
pub(crate) struct Calibration {
    runs: Vec<(Statistics, Arc<dyn TensorSource>)>,
}

impl Calibration {
    /// Opens the artifacts on a port; nothing if it is left open.
    pub(crate) fn open(job: &Job<'_>, inputs: &[&JobInput]) -> Result<Option<Self>, StageError> {
        let runs = inputs.iter().map(|input| {
            let json = job.files.optional_blob(&input.artifact, STATISTICS)?;
            let damaged = || StageError::Internal("statistics do not describe themselves".to_owned());
            let statistics = json.and_then(|json| Statistics::from_json(&json)).ok_or_else(damaged)?;
            let moments = job.tensors(input)?;
            let has_moments = |input: &InputStatistics| {
                let tensor = moments.index_of(&input.moments);
                tensor.is_some_and(|tensor| moments.tensors()[tensor].shape == [input.width, input.width])
            };
            let is_known = |part: &LayerPart| {
                statistics.inputs.get(part.input).is_some_and(|input| input.width == part.n_inputs())
            };
            let is_whole = statistics.images > 0
                && statistics.inputs.iter().all(has_moments)
                && statistics.layers.values().flatten().all(is_known);
            if is_whole { Ok((statistics, moments)) } else { Err(damaged()) }
        });
        let runs = runs.collect::<Result<Vec<_>, _>>()?;
        Ok((!runs.is_empty()).then_some(Self { runs }))
    }

    /// The layers that compute with a tensor of `n` elements, each with the second moments of its input per image. Empty if none does, or
    /// if the calibrations do not agree about them.
    pub(crate) fn layers(
        &self,
        tensor: &str,
        n: usize,
    ) -> merganser_tensors::Result<Vec<(LayerPart, Array2<f64>)>> {
        let images: u64 = self.runs.iter().map(|(statistics, _)| statistics.images).sum();
        let mut found: Vec<(LayerPart, Array2<f64>)> = Vec::new();
        for (statistics, moments) in &self.runs {
            let weight = statistics.images as f64 / images as f64;
            for part in statistics.layers.get(tensor).into_iter().flatten() {
                if !part.fits(n) {
                    return Ok(Vec::new());
                }
                let mut matrix = read_square(&**moments, &statistics.inputs[part.input])?;
                matrix *= weight;
                // A tensor may be used at several places; their errors add up.
                match found.iter_mut().find(|(known, _)| known.is_same_place(part)) {
                    Some((_, sum)) => *sum += &matrix,
                    None => found.push((*part, matrix)),
                }
            }
        }
        let overlap = |a: &LayerPart, b: &LayerPart| {
            a.first_row < b.first_row + b.n_rows && b.first_row < a.first_row + a.n_rows
        };
        let agree = found.iter().enumerate().all(|(index, (part, _))| {
            found[..index].iter().all(|(other, _)| part.columns == other.columns && !overlap(part, other))
        });
        Ok(if agree { found } else { Vec::new() })
    }

    /// The change of the output per unit of a layer's error, if every calibration has measured it.
    pub(crate) fn sensitivity(&self, tensor: &str) -> Option<f64> {
        let images: u64 = self.runs.iter().map(|(statistics, _)| statistics.images).sum();
        let parts = self.runs.iter().map(|(statistics, _)| {
            let measured = statistics.sensitivity.get(tensor)?;
            Some(measured * statistics.images as f64 / images as f64)
        });
        parts.sum()
    }

    /// Whether every calibration has measured how sensitive the output is.
    pub(crate) fn measures_sensitivity(&self) -> bool {
        self.runs.iter().all(|(statistics, _)| !statistics.sensitivity.is_empty())
    }

    /// Whether the Fisher information was measured.
    pub(crate) fn has_fisher(&self) -> bool {
        self.runs.iter().all(|(statistics, _)| statistics.fisher.is_some())
    }

    /// The diagonal of the Fisher information of a tensor of `n` elements, where it lies, of a single calibration; nothing if the answers do not
    /// depend on the tensor.
    pub(crate) fn fisher(&self, tensor: &str, n: usize) -> Option<(&dyn TensorSource, usize)> {
        let [(_, tensors)] = self.runs.as_slice() else { return None };
        let index = tensors.index_of(&fisher_name(tensor))?;
        (tensors.tensors()[index].n_elements() == n).then_some((&**tensors, index))
    }

    /// What values of the graph lie between, over all calibrations.
    pub(crate) fn ranges(&self) -> BTreeMap<&str, ValueRange> {
        let mut ranges: BTreeMap<&str, ValueRange> = BTreeMap::new();
        for (name, own) in self.runs.iter().flat_map(|(statistics, _)| &statistics.ranges) {
            let range = ranges.entry(name).or_insert(*own);
            *range = ValueRange { min: range.min.min(own.min), max: range.max.max(own.max) };
        }
        ranges
    }

    /// Whether any calibration knows a tensor.
    pub(crate) fn knows(&self, tensor: &str) -> bool {
        self.runs.iter().any(|(statistics, _)| statistics.layers.contains_key(tensor))
    }
}

/// What the artifact calls the diagonal of a tensor's Fisher information.
pub(super) fn fisher_name(tensor: &str) -> String {
    format!("fisher.{tensor}")
}

fn read_square(source: &dyn TensorSource, input: &InputStatistics) -> merganser_tensors::Result<Array2<f64>> {
    let tensor = source.index_of(&input.moments).expect("checked when it was opened");
    let mut values = vec![0.0; input.width * input.width];
    read_finite_f32(source, tensor, 0..values.len(), &mut values, &mut Scratch::default())?;
    let at = |(row, column): (usize, usize)| f64::from(values[row * input.width + column]);
    Ok(Array2::from_shape_fn((input.width, input.width), at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn weights_are_gathered_from_either_side() {
        let tensor: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let part = LayerPart { first_row: 1, n_rows: 2, columns: 3, inputs: Summed::Columns, input: 0 };
        assert_eq!(part.weights(&tensor), array![[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]);
        let part = LayerPart { inputs: Summed::Rows, ..part };
        assert_eq!(part.weights(&tensor), array![[3.0, 6.0], [4.0, 7.0], [5.0, 8.0]]);
        assert!(part.fits(9) && !part.fits(8));
        assert!(!LayerPart { first_row: usize::MAX, ..part }.fits(9));
    }

    #[test]
    fn the_error_of_a_layer_is_that_of_its_outputs() {
        let inputs: Array2<f64> = array![[1.0, -2.0], [0.5, 3.0], [2.0, 2.0]];
        let delta: Array2<f64> = array![[0.1, 0.2], [-0.3, 0.05], [0.0, 1.0]];
        let outputs = inputs.dot(&delta.t());
        let direct: f64 = outputs.iter().map(|y| y * y).sum();
        let error = layer_error(delta.view(), inputs.t().dot(&inputs).view());
        assert!((error - direct).abs() < 1e-12);
    }
}
