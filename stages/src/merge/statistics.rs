//! What each task's model sees of its data, from port `statistics`.

use super::inputs::{MergeInputs, Operand};
use crate::calibrate::{Calibration, LayerPart};
use crate::{JobInput, StageError};
use merganser_tensors::TensorSource;
use ndarray::Array2;

/// The statistics of every task, in the order of the task vectors.
pub(super) struct TaskStatistics(Vec<Calibration>);

impl TaskStatistics {
    pub(super) fn open(inputs: &MergeInputs<'_>) -> Result<Self, StageError> {
        let listed: Vec<&JobInput> = inputs.job.inputs_on("statistics").collect();
        let of_task = |name: &str| -> Result<Calibration, StageError> {
            let own: Vec<&JobInput> = match listed.as_slice() {
                [only] if only.member.is_none() && inputs.vectors.len() == 1 => vec![*only],
                all => all.iter().copied().filter(|input| input.member.as_deref() == Some(name)).collect(),
            };
            Calibration::open(inputs.job, &own)?.ok_or_else(|| {
                StageError::input_help(
                    format!("port `statistics` has nothing about task `{name}`"),
                    "`calibrate` the fine-tuned models as a collection: member t on dataset t",
                )
            })
        };
        Ok(Self(inputs.vectors.iter().map(|vector| of_task(&vector.name)).collect::<Result<_, _>>()?))
    }

    /// Whether every task knows which activations a tensor is multiplied with.
    pub(super) fn know(&self, operand: &Operand<'_>) -> bool {
        self.0.iter().all(|task| task.knows(operand.name()))
    }

    /// Refuses statistics without Fisher information.
    pub(super) fn require_fisher(&self, inputs: &MergeInputs<'_>) -> Result<(), StageError> {
        match self.0.iter().position(|task| !task.has_fisher()) {
            None => Ok(()),
            Some(task) => Err(StageError::input_help(
                format!("the statistics of task `{}` have no Fisher information", inputs.vectors[task].name),
                "say with how many images `calibrate` measures it: `fisher_images = 256`",
            )),
        }
    }

    /// Where the diagonal of a tensor's Fisher information lies, by task; nothing of a task whose answers do not depend on the tensor.
    pub(super) fn fisher(&self, operand: &Operand<'_>) -> Vec<Option<(&dyn TensorSource, usize)>> {
        self.0.iter().map(|task| task.fisher(operand.name(), operand.n_elements())).collect()
    }

    /// The layers that compute with a tensor, each with the second moments of its input by task. Empty if the tasks' graphs do not agree about
    /// them.
    pub(super) fn layers(
        &self,
        operand: &Operand<'_>,
    ) -> merganser_tensors::Result<Vec<(LayerPart, Vec<Array2<f64>>)>> {
        let mut found: Vec<(LayerPart, Vec<Array2<f64>>)> = Vec::new();
        for (position, task) in self.0.iter().enumerate() {
            let own = task.layers(operand.name(), operand.n_elements())?;
            if position > 0 && own.len() != found.len() {
                return Ok(Vec::new());
            }
            for (part, moments) in own {
                if position == 0 {
                    found.push((part, vec![moments]));
                    continue;
                }
                match found.iter_mut().find(|(known, _)| known.is_same_place(&part)) {
                    Some((_, all)) => all.push(moments),
                    None => return Ok(Vec::new()),
                }
            }
        }
        Ok(found)
    }
}
