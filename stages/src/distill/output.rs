//! Trained models as artifacts.

use super::trainer::Training;
use crate::{Draft, Job, StageError, checkpoint};
use merganser_onnx::train::Tensors;
use merganser_tensors::writer::{Block, OutputTensor, Payload};
use merganser_tensors::{DType, TensorSource, manifest};
use std::ops::Range;

/// Stores a model with trained tensors in place of its own, all others as they are, and what training has to tell.
pub(super) fn store(
    job: &Job<'_>,
    model: &dyn TensorSource,
    trained: &Tensors,
    record: &Training,
) -> Result<Draft, StageError> {
    let outputs: Vec<OutputTensor> = model
        .tensors()
        .iter()
        .map(|info| {
            let payload = match info.dtype {
                _ if trained.contains_key(&info.name) => Payload::Values(DType::F32),
                DType::F32 | DType::F16 | DType::BF16 => Payload::Values(info.dtype),
                other => Payload::Bytes(other),
            };
            OutputTensor { name: info.name.clone(), shape: info.shape.clone(), payload }
        })
        .collect();
    let fill = |tensor: usize, range: Range<usize>, block: Block<'_>, scratch: &mut _| match block {
        Block::Values(values) => match trained.get(&outputs[tensor].name) {
            Some(own) => {
                values.copy_from_slice(&own[range]);
                Ok(())
            }
            None => model.read_f32(tensor, range, values, scratch),
        },
        Block::Bytes(bytes) => checkpoint::copy_elements(model, tensor, range, bytes, scratch),
    };
    let draft = checkpoint::store(job, manifest::Content::Checkpoint, &outputs, fill, None)?;
    let record = record.write(job.staging)?;
    Ok(Draft { blobs: draft.blobs.into_iter().chain([record]).collect(), ..draft })
}
