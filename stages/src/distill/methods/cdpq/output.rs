//! The student as an artifact: packed with the widths of its layers, so that what is kept is what was trained; its floats beside it.

use super::record::{BitReductions, FLOAT_STUDENT, LayerWidth};
use crate::distill::trainer::Training;
use crate::{Draft, Job, StageError, checkpoint, quantize};
use merganser_onnx::Weights as _;
use merganser_onnx::train::Tensors;
use merganser_tensors::manifest::Manifest;
use merganser_tensors::source::read_computed_bytes;
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
    let student = Student::new(model, values);
    let floats = student.store(job)?;
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
        let infos = student.tensors.clone();
        let packed = quantize::pack(job, &student.split(&parts)?, bits)?;
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

/// A model with trained values in place of its own.
struct Student {
    model: Arc<dyn TensorSource>,
    tensors: Vec<TensorInfo>,
    /// Positions in the model of those that are its own.
    own: HashMap<String, usize>,
    values: Tensors,
}

impl Student {
    fn new(model: &Arc<dyn TensorSource>, values: Tensors) -> Self {
        let info = |info: &TensorInfo| {
            let dtype = if values.contains_key(&info.name) { DType::F32 } else { info.dtype };
            TensorInfo { dtype, ..info.clone() }
        };
        let tensors: Vec<TensorInfo> = model.tensors().iter().map(info).collect();
        let own = tensors.iter().enumerate().map(|(index, info)| (info.name.clone(), index)).collect();
        Self { model: Arc::clone(model), tensors, own, values }
    }

    /// The same with rows of some tensors as tensors of their own.
    fn split(mut self, parts: &HashMap<&str, Vec<&LayerWidth>>) -> Result<Self, StageError> {
        let whole: Vec<TensorInfo> =
            self.tensors.extract_if(.., |info| parts.contains_key(info.name.as_str())).collect();
        for info in whole {
            let values = match self.values.remove(&info.name) {
                Some(values) => values,
                None => checkpoint::Weights::new(Arc::clone(&self.model)).values(&info.name)?,
            };
            let per_row = values.len() / info.shape[0].max(1);
            let mut rest = values.as_slice();
            for layer in &parts[info.name.as_str()] {
                let (rows, after) = rest.split_at(per_row * layer.rows as usize);
                let shape = [layer.rows as usize].into_iter().chain(info.shape[1..].iter().copied());
                self.tensors.push(TensorInfo {
                    name: layer.name.clone(),
                    dtype: DType::F32,
                    shape: shape.collect(),
                });
                self.values.insert(layer.name.clone(), rows.to_vec());
                rest = after;
            }
        }
        self.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(self)
    }

    /// Where the model has a tensor that is not trained.
    fn position(&self, tensor: usize) -> usize {
        self.own[&self.tensors[tensor].name]
    }

    /// Writes the floats as a file of their own.
    fn store(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        let output = |info: &TensorInfo| {
            let payload = match info.dtype {
                DType::F32 | DType::F16 | DType::BF16 => Payload::Values(info.dtype),
                other => Payload::Bytes(other),
            };
            OutputTensor { name: info.name.clone(), shape: info.shape.clone(), payload }
        };
        let outputs: Vec<OutputTensor> = self.tensors.iter().map(output).collect();
        let fill = |tensor: usize, range: Range<usize>, block: Block<'_>, scratch: &mut Scratch| match block {
            Block::Values(values) => self.read_f32(tensor, range, values, scratch),
            Block::Bytes(bytes) => checkpoint::copy_elements(self, tensor, range, bytes, scratch),
        };
        checkpoint::store_part(job, FLOAT_STUDENT, manifest::Content::Checkpoint, &outputs, fill)
    }
}

impl TensorSource for Student {
    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read_f32(
        &self,
        tensor: usize,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        match self.values.get(&self.tensors[tensor].name) {
            Some(values) => out.copy_from_slice(&values[range]),
            None => self.model.read_f32(self.position(tensor), range, out, scratch)?,
        }
        Ok(())
    }

    fn read_bytes(
        &self,
        tensor: usize,
        range: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        if self.values.contains_key(&self.tensors[tensor].name) {
            read_computed_bytes(self, tensor, range, out, scratch)
        } else {
            self.model.read_bytes(self.position(tensor), range, out, scratch)
        }
    }

    fn stored_bytes(&self) -> u64 {
        0
    }

    fn check_unchanged(&self) -> merganser_tensors::Result<()> {
        self.model.check_unchanged()
    }
}
