//! The student as an artifact: packed with the widths of its layers, so that what is kept is what was trained; its floats beside it.

use super::record::{BitReductions, FLOAT_STUDENT, LayerWidth};
use crate::distill::trainer::Training;
use crate::replaced::Replaced;
use crate::{Draft, Job, StageError, checkpoint, quantize};
use merganser_onnx::train::Tensors;
use merganser_tensors::manifest::Manifest;
use merganser_tensors::views::Part;
use merganser_tensors::writer::{Block, OutputTensor, Payload};
use merganser_tensors::{DType, Scratch, TensorInfo, TensorSource, manifest};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

pub(super) fn store(
    job: &Job<'_>,
    model: &Arc<dyn TensorSource>,
    values: Tensors,
    training: &Training,
    reductions: &BitReductions,
) -> Result<Draft, StageError> {
    let student = Replaced::new(model, values);
    let floats = store_floats(job, &student)?;
    let records = [training.write(job.staging)?, reductions.write(job.staging)?];
    let parts = parts(&reductions.layers);
    let mut widths: HashMap<&str, u8> = HashMap::new();
    for layer in &reductions.layers {
        let is_part = parts.contains_key(layer.tensor.as_str());
        widths.insert(if is_part { &layer.name } else { &layer.tensor }, layer.bits);
    }
    let bits = |tensor: &str| widths.get(tensor).copied();
    let packed = if parts.is_empty() {
        quantize::pack(job, &student, bits)?
    } else {
        // Parts are stored as tensors of their own, and the artifact puts them together when it is read.
        let infos = student.tensors().to_vec();
        let rows = parts.iter().map(|(tensor, layers)| {
            (*tensor, layers.iter().map(|layer| (layer.name.as_str(), layer.rows as usize)).collect())
        });
        let packed = quantize::pack(job, &student.split(&rows.collect())?, bits)?;
        let stored = Manifest::from_json(packed.manifest.as_bytes())?;
        let tensors = infos.into_iter().map(|info| {
            let taken = match parts.get(info.name.as_str()) {
                Some(layers) => layers.iter().map(|l| Part::Whole { tensor: l.name.clone() }).collect(),
                None => vec![Part::Whole { tensor: info.name.clone() }],
            };
            (info, taken)
        });
        let view = Manifest::mapped(manifest::Content::Checkpoint, stored.view_digest(), tensors.collect())?;
        Draft { manifest: checkpoint::manifest_text(&view.with_views(vec![stored])?), ..packed }
    };
    let blobs = packed.blobs.into_iter().chain(floats.blobs).chain(records).collect();
    Ok(Draft { blobs, ..packed })
}

/// The layers of tensors that are several.
fn parts(layers: &[LayerWidth]) -> HashMap<&str, Vec<&LayerWidth>> {
    let mut parts: HashMap<&str, Vec<&LayerWidth>> = HashMap::new();
    for layer in layers {
        parts.entry(&layer.tensor).or_default().push(layer);
    }
    parts.retain(|_, layers| layers.len() > 1);
    parts
}

/// Writes the floats of the student as a file of their own.
fn store_floats(job: &Job<'_>, student: &Replaced) -> Result<Draft, StageError> {
    let output = |info: &TensorInfo| {
        let payload = match info.dtype {
            DType::F32 | DType::F16 | DType::BF16 => Payload::Values(info.dtype),
            other => Payload::Bytes(other),
        };
        OutputTensor { name: info.name.clone(), shape: info.shape.clone(), payload }
    };
    let outputs: Vec<OutputTensor> = student.tensors().iter().map(output).collect();
    let fill = |tensor: usize, range: Range<usize>, block: Block<'_>, scratch: &mut Scratch| match block {
        Block::Values(values) => student.read_f32(tensor, range, values, scratch),
        Block::Bytes(bytes) => checkpoint::copy_elements(student, tensor, range, bytes, scratch),
    };
    checkpoint::store_part(job, FLOAT_STUDENT, manifest::Content::Checkpoint, &outputs, fill)
}
