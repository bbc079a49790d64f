//! The driver of element-wise methods: one streaming pass over the base and all task vectors.

use super::MergeInputs;
use crate::{Draft, StageError, checkpoint};
use merganser_tensors::kernels::linear;
use merganser_tensors::manifest::Content;
use merganser_tensors::writer::{Block, OutputTensor, Payload};
use merganser_tensors::{DType, TensorSource};

/// What happens to the sum of the task vectors before it is added to the base.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rescale {
    Multiply(f32),
    /// Not the same as multiplying by the reciprocal, which is rounded itself.
    Divide(f32),
}

/// θ = θ₀ + scale · Σ_t coefficient_t · τ_t.
///
/// All in f32: the sum over the tasks first, in the order of the collection, then the scale, then the base, as the authors of task
/// arithmetic do. A NaN or infinity in any input reaches the result and is refused there, by name.
pub(super) fn linear(
    inputs: &MergeInputs<'_>,
    coefficients: &[f32],
    rescale: Rescale,
) -> Result<Draft, StageError> {
    let base = &*inputs.base;
    // Where each tensor of the base is found in each task vector; nothing where the result is the base's own.
    let plan: Vec<Vec<usize>> = base
        .tensors()
        .iter()
        .map(|info| {
            if !info.dtype.is_float() || !inputs.filter.admits(&info.name) {
                return Vec::new();
            }
            inputs.vectors.iter().filter_map(|(_, vector)| vector.index_of(&info.name)).collect()
        })
        .collect();
    let outputs: Vec<OutputTensor> = base
        .tensors()
        .iter()
        .map(|info| OutputTensor {
            name: info.name.clone(),
            shape: info.shape.clone(),
            payload: if info.dtype.is_float() {
                Payload::Values(DType::F32)
            } else {
                Payload::Bytes(info.dtype)
            },
        })
        .collect();
    let draft = checkpoint::store(
        inputs.job,
        Content::Checkpoint,
        &outputs,
        |tensor, range, block, scratch| match block {
            Block::Bytes(out) => checkpoint::copy_elements(base, tensor, range, out, scratch),
            Block::Values(out) if plan[tensor].is_empty() => base.read_f32(tensor, range, out, scratch),
            Block::Values(out) => {
                out.fill(0.0);
                for ((position, coefficient), (_, vector)) in
                    plan[tensor].iter().zip(coefficients).zip(&inputs.vectors)
                {
                    vector.add_scaled(*position, range.clone(), *coefficient, out, scratch)?;
                }
                match rescale {
                    Rescale::Multiply(factor) => linear::scale(out, factor),
                    Rescale::Divide(divisor) => out.iter_mut().for_each(|value| *value /= divisor),
                }
                base.add_scaled(tensor, range, 1.0, out, scratch)
            }
        },
        None,
    );
    draft.map_err(|error| name_the_culprit(inputs, error))
}

/// A value that is not finite was found in the result: says which input it came from.
fn name_the_culprit(inputs: &MergeInputs<'_>, error: StageError) -> StageError {
    let StageError::Tensors(merganser_tensors::Error::NotFinite { tensor, element, .. }) = &error else {
        return error;
    };
    let value = |source: &dyn TensorSource| {
        let mut value = [0.0f32];
        let position = source.index_of(tensor)?;
        let mut scratch = merganser_tensors::Scratch::default();
        source.read_f32(position, *element..*element + 1, &mut value, &mut scratch).ok()?;
        (!value[0].is_finite()).then_some(value[0])
    };
    if let Some(found) = value(&*inputs.base) {
        return StageError::input(format!(
            "tensor `{tensor}` of the base is not finite: element {element} is {found}"
        ));
    }
    for (task, vector) in &inputs.vectors {
        if let Some(found) = value(&**vector) {
            return StageError::input(format!(
                "tensor `{tensor}` of task vector `{task}` is not finite: element {element} is {found}"
            ));
        }
    }
    StageError::input(format!("tensor `{tensor}` of the result overflows f32 at element {element}"))
}
