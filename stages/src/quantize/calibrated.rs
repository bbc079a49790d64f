//! Tensors coded by what their layers see: values that are rounded with calibration, and errors that count.

use super::choose::Chosen;
use super::rounding::{Curvature, Rounding, round};
use crate::calibrate::{Calibration, layer_error};
use merganser_tensors::stream::BLOCK_ELEMENTS;
use merganser_tensors::{Result, Scratch};

/// How a stage rounds, and what it knows of layers.
#[derive(Default)]
pub(super) struct Rounder {
    pub(super) calibration: Option<Calibration>,
    pub(super) rounding: Rounding,
    /// Added to the diagonal of second moments, as a share of its mean.
    pub(super) damping: f64,
}

impl Rounder {
    /// The values that are coded in place of a tensor's own: every one of them is one that the codes stand for. Nothing where the nearest
    /// ones are taken: that is what coding does by itself.
    pub(super) fn rounded(&self, name: &str, chosen: &Chosen<'_>) -> Result<Option<Vec<f32>>> {
        let (Some(calibration), true) = (&self.calibration, self.rounding != Rounding::Nearest) else {
            return Ok(None);
        };
        let (form, tables) = (&chosen.form, &chosen.tables);
        let layers = calibration.layers(name, form.n)?;
        if layers.is_empty() {
            return Ok(None);
        }
        let mut values = chosen.whole()?;
        for (part, moments) in layers {
            let Some(curvature) = Curvature::new(moments.view(), self.damping) else { continue };
            let mut weights = part.weights(&values);
            let nearest = |output: usize, input: usize, value: f64| {
                let mut value = [value as f32];
                form.round(part.element(output, input), &mut value, tables);
                f64::from(value[0])
            };
            round(self.rounding, &mut weights, &curvature, &nearest);
            for ((output, input), value) in weights.indexed_iter() {
                values[part.element(output, input)] = *value as f32;
            }
        }
        Ok(Some(values))
    }

    /// The squared error of a tensor that is coded like this, relative: of the model's output where sensitivities were measured, of the layer's
    /// output where its inputs are known, else of the tensor.
    pub(super) fn error(&self, name: &str, chosen: &Chosen<'_>) -> Result<f64> {
        let values = chosen.whole()?;
        let mut decoded = self.rounded(name, chosen)?.unwrap_or_else(|| values.clone());
        for (index, block) in decoded.chunks_mut(BLOCK_ELEMENTS).enumerate() {
            chosen.form.round(index * BLOCK_ELEMENTS, block, &chosen.tables);
        }
        let layers = match &self.calibration {
            Some(calibration) => calibration.layers(name, values.len())?,
            None => Vec::new(),
        };
        let (mut error, mut size) = (0.0, 0.0);
        for (part, moments) in &layers {
            let weights = part.weights(&values);
            error += layer_error((part.weights(&decoded) - &weights).view(), moments.view());
            size += layer_error(weights.view(), moments.view());
        }
        if let Some(calibration) =
            self.calibration.as_ref().filter(|calibration| calibration.measures_sensitivity())
        {
            // A tensor that the output was not seen to depend on has no sensitivity.
            return Ok(error * calibration.sensitivity(name).unwrap_or(0.0));
        }
        if layers.is_empty() {
            for (value, decoded) in values.iter().zip(&decoded) {
                error += (f64::from(*value) - f64::from(*decoded)).powi(2);
                size += f64::from(*value).powi(2);
            }
        }
        Ok(if size > 0.0 { error / size } else { 0.0 })
    }
}

impl Chosen<'_> {
    /// All values.
    fn whole(&self) -> Result<Vec<f32>> {
        self.values.with(0..self.form.n, &mut Scratch::default(), <[f32]>::to_vec)
    }
}
