//! Storing the models of single tasks by their parts: a vector that all tasks share, a mask and a factor.
//!
//! The artifact of a task holds the vector (`f32`) and the task's mask (a bit per entry), and describes the model `θ₀ + scale·(vector ⊙ mask)`
//! as a view of them and of the base. The vector's file is the same for every task, so a store keeps it once: what has to be kept for T
//! models is one vector and T masks.

use super::driver::Assigned;
use super::inputs::MergeInputs;
use super::method::Parts;
use crate::mask::one_bit;
use crate::{Draft, StageError, checkpoint};
use merganser_tensors::manifest::{Content, FileKind};
use merganser_tensors::source::check_finite;
use merganser_tensors::stream::{BLOCK_ELEMENTS, blocks};
use merganser_tensors::writer::{Block, OutputTensor, Payload};
use merganser_tensors::{DType, Manifest, TensorInfo};
use std::collections::BTreeMap;
use std::sync::OnceLock;

/// The names of the files.
const VECTOR: &str = "vector.safetensors";
const MASK: &str = "mask.safetensors";

/// Writes vector and mask of the assigned tensors; all others are the base's own.
pub(super) fn store(
    inputs: &MergeInputs<'_>,
    assigned: &[Assigned<'_>],
    parts: &[&dyn Parts],
) -> Result<Draft, StageError> {
    let outputs = |payload: Payload| -> Vec<OutputTensor> {
        let tensors = assigned.iter().map(|entry| OutputTensor {
            name: entry.operand.name().to_owned(),
            shape: entry.operand.shape().to_vec(),
            payload: payload.clone(),
        });
        tensors.collect()
    };
    // Vector and mask come of the same pass over the task vectors; a bit per entry is little to remember until the second file is written.
    let bits: Vec<Vec<OnceLock<Vec<u8>>>> = assigned
        .iter()
        .map(|entry| blocks(entry.operand.n_elements()).map(|_| OnceLock::new()).collect())
        .collect();
    let vector = checkpoint::store_part(
        inputs.job,
        VECTOR,
        Content::TaskVectors,
        &outputs(Payload::Values(DType::F32)),
        |tensor, range, block, scratch| {
            let Block::Values(out) = block else { unreachable!("only values were announced") };
            let Assigned { operand, rule } = &assigned[tensor];
            let mut mask = scratch.take(range.len());
            // The model is a view: what the base holds would otherwise be looked at by nobody.
            operand.read_base(range.clone(), &mut mask, scratch)?;
            check_finite(operand.name(), range.start, &mask)?;
            parts[*rule].block(operand, range.clone(), out, &mut mask, scratch)?;
            // A block is written once; if it were not, it would be the same.
            let _ = bits[tensor][range.start / BLOCK_ELEMENTS].set(packed(&mask));
            scratch.give_back(mask);
            Ok(())
        },
    )
    .map_err(|error| inputs.name_the_culprit(error))?;
    let mask = checkpoint::store_part(
        inputs.job,
        MASK,
        Content::Masks,
        &outputs(Payload::Codes(one_bit())),
        |tensor, range, block, _| {
            let Block::Values(out) = block else { unreachable!("only codes were announced") };
            let bytes = bits[tensor][range.start / BLOCK_ELEMENTS].get().map_or(&[][..], Vec::as_slice);
            for (i, value) in out.iter_mut().enumerate() {
                *value = f32::from(bytes[i / 8] >> (i % 8) & 1);
            }
            Ok(())
        },
    )?;
    describe(inputs, assigned, parts, vector, mask)
}

/// The model as a view of its parts.
fn describe(
    inputs: &MergeInputs<'_>,
    assigned: &[Assigned<'_>],
    parts: &[&dyn Parts],
    vector: Draft,
    mask: Draft,
) -> Result<Draft, StageError> {
    let scales: BTreeMap<usize, f32> =
        assigned.iter().map(|entry| (entry.operand.position(), parts[entry.rule].scale())).collect();
    let tensors = inputs.base.tensors().iter().enumerate().map(|(position, info)| {
        match scales.get(&position) {
            Some(scale) => (TensorInfo { dtype: DType::F32, ..info.clone() }, *scale),
            None => (info.clone(), 1.0),
        }
    });
    let views = [&vector, &mask].map(|draft| Manifest::from_json(draft.manifest.as_bytes()));
    let [vector_view, mask_view] = views;
    let (vector_view, mask_view) = (vector_view?, mask_view?);
    let base = inputs.job.input("base")?.artifact;
    let model = Manifest::masked(
        Content::Checkpoint,
        base,
        vector_view.view_digest(),
        mask_view.view_digest(),
        tensors.collect(),
    )?
    .with_views(vec![vector_view, mask_view])?;
    debug_assert!(model.files().iter().all(|file| file.kind == FileKind::Blob), "parts are objects of the store");
    Ok(Draft {
        manifest: checkpoint::manifest_text(&model),
        blobs: vector.blobs.into_iter().chain(mask.blobs).collect(),
        operands: vec![base],
        sources: Vec::new(),
    })
}

fn packed(mask: &[f32]) -> Vec<u8> {
    let byte = |bits: &[f32]| bits.iter().enumerate().fold(0, |sum, (i, bit)| sum | u8::from(*bit != 0.0) << i);
    mask.chunks(8).map(byte).collect()
}

#[cfg(test)]
mod tests {
    use crate::testing::{Input, Workbench};
    use serde_json::{Value, json};

    #[test]
    fn a_model_is_a_view_of_a_vector_that_all_tasks_share_and_of_a_mask() {
        let bench = Workbench::new();
        let n = 70_001;
        let values = |seed: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * 7919 + seed * 131) % 1009) as f32 / 500.0 - 1.0).collect()
        };
        let base = bench.checkpoint("base", &[("left", &[2], &[1.0, 2.0]), ("w", &[n], &values(0))]);
        let deltas = [("a", 1), ("b", 2)].map(|(name, seed)| {
            let tuned = bench.checkpoint(name, &[("left", &[2], &[5.0, 6.0]), ("w", &[n], &values(seed))]);
            (name, bench.diff(base, tuned))
        });
        let inputs = [Input::One("base", base), Input::Members("vectors", &deltas)];
        let models = bench.run("merge", &json!({ "method": "emr", "only": ["w"] }), &inputs).unwrap();
        let described: Vec<Value> =
            models.iter().map(|(_, model)| serde_json::from_str(&bench.manifest(*model)).unwrap()).collect();
        let view = |model: usize, view: usize| &described[model]["views"][view];
        assert_eq!(view(0, 0), view(1, 0), "the vector");
        assert_ne!(view(0, 1), view(1, 1), "the masks");
        assert_eq!(view(0, 1)["layout"]["packed"]["tensors"][0]["length"], n.div_ceil(8));
        // What the filter leaves out is the base's own.
        assert_eq!(bench.values(models[0].1, "left"), [1.0, 2.0]);
        assert!(bench.values(models[0].1, "w") != bench.values(models[1].1, "w"));
    }

    #[test]
    fn a_base_that_is_not_finite_is_refused_though_it_is_not_copied() {
        let bench = Workbench::new();
        let sound = bench.checkpoint("sound", &[("w", &[2], &[1.0, 1.0])]);
        let base = bench.checkpoint("base", &[("w", &[2], &[1.0, f32::NAN])]);
        let delta = bench.diff(sound, sound);
        let inputs = [Input::One("base", base), Input::One("vectors", delta)];
        let refused = bench.run("merge", &json!({ "method": "emr" }), &inputs).unwrap_err();
        assert_eq!(refused.to_string(), "tensor `w` of the base is not finite: element 1 is NaN");
    }
}
