//! What masks are made from: the task vectors and, per tensor, where it is found in each of them and in the base.

use crate::filter::NameFilter;
use crate::{Job, StageError, diff};
use merganser_tensors::source::read_finite_f32;
use merganser_tensors::{Error, Result, Scratch, TensorInfo, TensorSource};
use std::ops::Range;
use std::sync::Arc;

/// A member of a port, opened.
pub(super) struct Member {
    /// The task's name; empty where the port holds a single artifact.
    pub name: String,
    pub tensors: Arc<dyn TensorSource>,
}

/// The inputs of a unit. All task vectors have the same tensors, and so has the base.
pub(super) struct MaskInputs<'a> {
    pub job: &'a Job<'a>,
    /// Task vectors in the order of the collection; at least one.
    pub vectors: Vec<Member>,
    /// Positions of the tasks whose masks are asked for.
    pub asked: Vec<usize>,
    pub base: Option<Arc<dyn TensorSource>>,
    /// A merged checkpoint, where a method compares with one that was made elsewhere.
    pub merged: Option<Arc<dyn TensorSource>>,
    /// Masks that are given.
    pub masks: Vec<Member>,
    /// What is masked: the tensors of the task vectors that the filter admits, sorted by name.
    pub tensors: Vec<TensorInfo>,
}

impl<'a> MaskInputs<'a> {
    /// Opens the inputs of a job and checks that they fit together.
    pub(super) fn open(job: &'a Job<'a>, filter: &NameFilter) -> std::result::Result<Self, StageError> {
        let members = |port: &str| {
            job.inputs_on(port)
                .map(|input| {
                    let name = input.member.clone().unwrap_or_default();
                    Ok(Member { name, tensors: job.tensors(input)? })
                })
                .collect::<std::result::Result<Vec<_>, StageError>>()
        };
        let single = |port: &str| job.optional(port).map(|input| job.tensors(input)).transpose();
        let vectors = members("deltas")?;
        let Some(first) = vectors.first() else {
            return Err(StageError::input("there is no task vector to mask"));
        };
        let tensors: Vec<TensorInfo> =
            first.tensors.tensors().iter().filter(|info| filter.admits(&info.name)).cloned().collect();
        if tensors.is_empty() {
            return Err(StageError::input_help(
                "no tensor of the task vectors is admitted by `only` and `skip`",
                "globs match whole tensor names: `*.attn.*`, not `attn`",
            ));
        }
        let asked = match &job.unit.member {
            Some(task) => vectors.iter().position(|vector| vector.name == *task).into_iter().collect(),
            None => (0..vectors.len()).collect(),
        };
        let (base, merged, masks) = (single("base")?, single("merged")?, members("masks")?);
        let inputs = Self { job, vectors, asked, base, merged, masks, tensors };
        inputs.check()?;
        Ok(inputs)
    }

    /// The name of a task whose mask is asked for.
    pub(super) fn task(&self, position: usize) -> &str {
        &self.vectors[position].name
    }

    /// Elements `range` of a task vector, finite. `tensor` is a position in [`Self::tensors`].
    pub(super) fn read(
        &self,
        task: usize,
        tensor: usize,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let source = &*self.vectors[task].tensors;
        read_finite_f32(source, find(source, &self.tensors[tensor].name)?, range, out, scratch)
    }

    /// Says which input a value that is not finite came from.
    pub(super) fn name_the_culprit(&self, error: StageError) -> StageError {
        let StageError::Tensors(Error::NotFinite { tensor, element, .. }) = &error else { return error };
        let sources = self.vectors.iter().map(|vector| (format!("task vector `{}`", vector.name), &vector.tensors));
        let base = self.base.iter().map(|base| ("the base".to_owned(), base));
        let merged = self.merged.iter().map(|merged| ("the merged checkpoint".to_owned(), merged));
        for (what, source) in sources.chain(base).chain(merged) {
            let Some(position) = source.index_of(tensor) else { continue };
            let mut value = [0.0f32];
            let read =
                source.read_f32(position, *element..*element + 1, &mut value, &mut Scratch::new());
            if read.is_ok() && !value[0].is_finite() {
                return StageError::input(format!(
                    "tensor `{tensor}` of {what} is not finite: element {element} is {}",
                    value[0]
                ));
            }
        }
        StageError::input(format!("the sum of the task vectors overflows f32 in tensor `{tensor}` at element {element}"))
    }

    fn check(&self) -> std::result::Result<(), StageError> {
        let first = &self.vectors[0];
        let others = self.vectors[1..].iter().map(|vector| (format!("task vector `{}`", vector.name), &vector.tensors, true));
        let base = self.base.iter().map(|base| ("the base".to_owned(), base, false));
        let merged = self.merged.iter().map(|merged| ("the merged checkpoint".to_owned(), merged, false));
        for (what, source, exactly) in others.chain(base).chain(merged) {
            for info in &self.tensors {
                let Some(position) = source.index_of(&info.name) else {
                    let names: Vec<&str> = self.tensors.iter().map(|info| info.name.as_str()).collect();
                    let lacking: Vec<&str> =
                        names.into_iter().filter(|name| source.index_of(name).is_none()).collect();
                    return Err(StageError::input(format!(
                        "{what} lacks {}, which task vector `{}` has",
                        diff::listed(&lacking),
                        first.name
                    )));
                };
                same_shape(info, &source.tensors()[position], &what)?;
            }
            let extra: Vec<&str> = source
                .tensors()
                .iter()
                .map(|info| info.name.as_str())
                .filter(|name| exactly && first.tensors.index_of(name).is_none())
                .collect();
            if !extra.is_empty() {
                return Err(StageError::input(format!(
                    "task vector `{}` lacks {}, which {what} has",
                    first.name,
                    diff::listed(&extra)
                )));
            }
        }
        for mask in &self.masks {
            for info in &self.tensors {
                if let Some(position) = mask.tensors.index_of(&info.name) {
                    same_shape(info, &mask.tensors.tensors()[position], &format!("mask `{}`", mask.name))?;
                }
            }
        }
        Ok(())
    }
}

/// Position of a tensor that was found to be there when the inputs were opened.
pub(super) fn find(source: &dyn TensorSource, name: &str) -> Result<usize> {
    source.index_of(name).ok_or_else(|| Error::Io(std::io::Error::other(format!("tensor `{name}` is gone"))))
}

fn same_shape(expected: &TensorInfo, actual: &TensorInfo, what: &str) -> std::result::Result<(), StageError> {
    if actual.shape == expected.shape {
        return Ok(());
    }
    Err(StageError::input(format!(
        "tensor `{}` has shape {:?} in the task vectors and {:?} in {what}",
        expected.name, expected.shape, actual.shape
    )))
}
