//! What the teacher says: the values of its graph that the student is compared by.

use super::student::teacher_input;
use crate::distill::trainer::Values;
use crate::services::BoundGraph;
use crate::{Job, StageError, checkpoint};
use merganser_onnx::{Input, Session};
use ndarray::ArrayD;
use std::collections::HashMap;

/// Bytes of what was said that are kept, for images that are asked about again and again.
const ROOM: usize = 256 << 20;

/// A model, ready to run.
pub(super) struct Teacher {
    session: Session,
    /// The input for images.
    input: String,
    compared: Vec<String>,
    /// Under which names these leave the graph, in their order.
    outputs: Vec<String>,
    kept: HashMap<usize, Values>,
    kept_bytes: usize,
}

impl Teacher {
    /// `compared`: the values of the graph that are wanted.
    pub(super) fn new(
        job: &Job<'_>,
        graph: &BoundGraph,
        input: &str,
        model: &checkpoint::Weights,
        compared: Vec<&str>,
    ) -> Result<Self, StageError> {
        let (graph, outputs) = graph.with_outputs(&compared)?;
        let session = job.services.session(&graph, model, job.threads, job.notify)?;
        Ok(Self {
            session,
            input: input.to_owned(),
            compared: compared.into_iter().map(str::to_owned).collect(),
            outputs,
            kept: HashMap::new(),
            kept_bytes: 0,
        })
    }

    /// The values that are compared.
    pub(super) fn compared(&self) -> &[String] {
        &self.compared
    }

    /// What it says of images, as a student's graph is fed with it.
    pub(super) fn says(&mut self, images: &ArrayD<f32>) -> Result<Values, StageError> {
        let values = self.session.run(&[(self.input.as_str(), Input::F32(images.view()))])?;
        let mut values: HashMap<String, ArrayD<f32>> = values.into_iter().collect();
        let compared = self.compared.iter().zip(&self.outputs).map(|(value, output)| {
            let array = values.remove(output);
            let missing = || StageError::Internal(format!("the graph did not give `{value}`"));
            Ok((teacher_input(value), array.ok_or_else(missing)?))
        });
        compared.collect()
    }

    /// [`Self::says`] of a batch with that number, which is always of the same images: what was said before is said again, if there was room.
    pub(super) fn kept(&mut self, number: usize, images: &ArrayD<f32>) -> Result<Values, StageError> {
        if let Some(values) = self.kept.get(&number) {
            return Ok(values.clone());
        }
        let values = self.says(images)?;
        let bytes: usize = values.values().map(|array| array.len() * size_of::<f32>()).sum();
        if self.kept_bytes + bytes <= ROOM {
            self.kept_bytes += bytes;
            self.kept.insert(number, values.clone());
        }
        Ok(values)
    }
}
