//! What a method merges: the base, the task vectors, and per tensor where it is found in each of them.

use super::method::{Merge, Outcome};
use crate::filter::NameFilter;
use crate::{Content, Job, StageError, checkpoint, diff};
use merganser_tensors::source::check_finite;
use merganser_tensors::stream::blocks;
use merganser_tensors::{Result, Scratch, TensorInfo, TensorSource};
use std::ops::Range;
use std::sync::Arc;

/// A member of a port, opened.
pub(crate) struct Member {
    /// The task's name; empty where the port holds a single artifact.
    pub name: String,
    pub tensors: Arc<dyn TensorSource>,
}

/// The inputs of a merge.
pub(crate) struct MergeInputs<'a> {
    pub job: &'a Job<'a>,
    pub base: Arc<dyn TensorSource>,
    /// Task vectors in the order of the collection; at least one.
    pub vectors: Vec<Member>,
    /// Masks in the order of their collection; empty if the port is not connected.
    pub masks: Vec<Member>,
    /// A checkpoint that the task vectors were merged to elsewhere.
    pub merged: Option<Arc<dyn TensorSource>>,
    /// The task whose model is asked for, as a position in `vectors`; of methods that make one model per task.
    pub task: Option<usize>,
}

/// A tensor to merge.
#[derive(Clone)]
pub(crate) struct Operand<'a> {
    inputs: &'a MergeInputs<'a>,
    /// Position in the base.
    base: usize,
    /// Position in each task vector, in their order.
    vectors: Vec<usize>,
    /// Position in the list of all operands: where a rule keeps what it knows about this tensor.
    pub index: usize,
}

impl<'a> MergeInputs<'a> {
    /// Opens the inputs of a job and checks that they fit together.
    pub(super) fn open(job: &'a Job<'a>, merge: &dyn Merge) -> std::result::Result<Self, StageError> {
        let members = |port: &str| {
            job.inputs_on(port)
                .map(|input| {
                    Ok(Member {
                        name: input.member.clone().unwrap_or_default(),
                        tensors: job.tensors(input)?,
                    })
                })
                .collect::<std::result::Result<Vec<_>, StageError>>()
        };
        let base = job.tensors(job.input("base")?)?;
        let merged = job.optional("merged").map(|input| job.tensors(input)).transpose()?;
        let (vectors, masks) = (members("vectors")?, members("masks")?);
        let inputs = Self { job, base, vectors, masks, merged, task: None };
        inputs.check_masks_and_merged()?;
        if merge.vectors() == Content::TaskVectors {
            inputs.check_shapes()?;
        }
        let task = job.unit.member.as_ref().filter(|_| merge.outcome() == Outcome::PerTask);
        let find = |name: &String| {
            let found = inputs.vectors.iter().position(|vector| vector.name == *name);
            found.ok_or_else(|| StageError::Internal(format!("there is no task vector `{name}`")))
        };
        let task = match (task, merge.outcome()) {
            (Some(name), _) => Some(find(name)?),
            (None, Outcome::PerTask) => Some(0),
            (None, Outcome::One) => None,
        };
        Ok(Self { task, ..inputs })
    }

    /// The tensors that are merged: float tensors of the base that the task vectors have and `filter` admits, sorted by name. What is
    /// given instead of task vectors has other tensors; then these are all float tensors of the base.
    pub(super) fn operands(&'a self, filter: &NameFilter, vectors: Content) -> Vec<Operand<'a>> {
        let mut operands = Vec::new();
        for (base, info) in self.base.tensors().iter().enumerate() {
            if !info.dtype.is_float() || !filter.admits(&info.name) {
                continue;
            }
            let found: Vec<usize> =
                self.vectors.iter().filter_map(|vector| vector.tensors.index_of(&info.name)).collect();
            if vectors != Content::TaskVectors || found.len() == self.vectors.len() {
                operands.push(Operand { inputs: self, base, vectors: found, index: operands.len() });
            }
        }
        operands
    }

    /// Every task vector must fit the base, and all must have the same tensors: a tensor that one task lacks would silently count as zero.
    fn check_shapes(&self) -> std::result::Result<(), StageError> {
        let Some(Member { name: first_task, tensors: first }) = self.vectors.first() else {
            return Err(StageError::input("there is no task vector to merge"));
        };
        for Member { name: task, tensors: vector } in &self.vectors {
            for info in vector.tensors() {
                let Some(index) = self.base.index_of(&info.name) else {
                    return Err(StageError::input(format!(
                        "the base has no tensor `{}`, which task vector `{task}` has",
                        info.name
                    )));
                };
                let expected = &self.base.tensors()[index].shape;
                if *expected != info.shape {
                    return Err(StageError::input(format!(
                        "tensor `{}` has shape {:?} in task vector `{task}` and {expected:?} in the base",
                        info.name, info.shape
                    )));
                }
            }
            let lacking = |of: &dyn TensorSource, other: &dyn TensorSource| {
                let names = of.tensors().iter().map(|info| info.name.as_str());
                let names: Vec<&str> = names.filter(|name| other.index_of(name).is_none()).collect();
                (!names.is_empty()).then(|| diff::listed(&names))
            };
            if let Some(names) = lacking(&**first, &**vector) {
                return Err(StageError::input(format!(
                    "task vector `{task}` lacks {names}, which task vector `{first_task}` has"
                )));
            }
            if let Some(names) = lacking(&**vector, &**first) {
                return Err(StageError::input(format!(
                    "task vector `{first_task}` lacks {names}, which task vector `{task}` has"
                )));
            }
        }
        Ok(())
    }

    /// Masks may lack tensors, a merged checkpoint may not; what they have must fit the base.
    fn check_masks_and_merged(&self) -> std::result::Result<(), StageError> {
        let merged = self.merged.iter().map(|merged| ("the merged checkpoint".to_owned(), merged, true));
        let masks = self.masks.iter().map(|mask| (format!("mask `{}`", mask.name), &mask.tensors, false));
        for (what, source, is_whole) in merged.chain(masks) {
            for info in self.base.tensors().iter().filter(|info| info.dtype.is_float()) {
                let found = source.index_of(&info.name).map(|position| &source.tensors()[position]);
                match found {
                    Some(found) if found.shape != info.shape => {
                        return Err(StageError::input(format!(
                            "tensor `{}` has shape {:?} in {what} and {:?} in the base",
                            info.name, found.shape, info.shape
                        )));
                    }
                    None if is_whole => {
                        return Err(StageError::input(format!(
                            "{what} has no tensor `{}`, which the base has",
                            info.name
                        )));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// The mask of a task, as a position in `masks`: that of its name, or the only one.
    pub(crate) fn mask_of(&self, task: usize) -> std::result::Result<usize, StageError> {
        let name = &self.vectors[task].name;
        match self.masks.as_slice() {
            [_] => Ok(0),
            masks => {
                let found = masks.iter().position(|mask| mask.name == *name);
                found.ok_or_else(|| StageError::input(format!("port `masks` has no mask of task `{name}`")))
            }
        }
    }

    /// A value that is not finite was found in the result: says which input it came from.
    pub(super) fn name_the_culprit(&self, error: StageError) -> StageError {
        let StageError::Tensors(merganser_tensors::Error::NotFinite { tensor, element, .. }) = &error else {
            return error;
        };
        let value = |source: &dyn TensorSource| checkpoint::not_finite(source, tensor, *element);
        if let Some(found) = value(&*self.base) {
            return StageError::input(format!(
                "tensor `{tensor}` of the base is not finite: element {element} is {found}"
            ));
        }
        for Member { name: task, tensors } in &self.vectors {
            if let Some(found) = value(&**tensors) {
                return StageError::input(format!(
                    "tensor `{tensor}` of task vector `{task}` is not finite: element {element} is {found}"
                ));
            }
        }
        if let Some(found) = self.merged.as_ref().and_then(|merged| value(&**merged)) {
            return StageError::input(format!(
                "tensor `{tensor}` of the merged checkpoint is not finite: element {element} is {found}"
            ));
        }
        StageError::input(format!("tensor `{tensor}` of the result overflows f32 at element {element}"))
    }
}

impl<'a> Operand<'a> {
    pub(crate) fn inputs(&self) -> &'a MergeInputs<'a> {
        self.inputs
    }

    pub(crate) fn info(&self) -> &'a TensorInfo {
        &self.inputs.base.tensors()[self.base]
    }

    pub(crate) fn name(&self) -> &'a str {
        &self.info().name
    }

    pub(crate) fn shape(&self) -> &'a [usize] {
        &self.info().shape
    }

    pub(crate) fn n_elements(&self) -> usize {
        self.info().n_elements()
    }

    pub(crate) fn n_tasks(&self) -> usize {
        self.vectors.len()
    }

    /// Rows and columns, if it is a matrix with elements.
    pub(crate) fn as_matrix(&self) -> Option<(usize, usize)> {
        match *self.shape() {
            [rows, columns] if rows > 0 && columns > 0 => Some((rows, columns)),
            _ => None,
        }
    }

    /// Position in each task vector, in their order.
    pub(super) fn positions(&self) -> &[usize] {
        &self.vectors
    }

    /// Position in the base's list of tensors.
    pub(super) fn position(&self) -> usize {
        self.base
    }

    /// Elements `range` of the base.
    pub(crate) fn read_base(
        &self,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.inputs.base.read_f32(self.base, range, out, scratch)
    }

    /// `out += θ₀` for elements `range`.
    pub(crate) fn add_base(&self, range: Range<usize>, out: &mut [f32], scratch: &mut Scratch) -> Result<()> {
        self.inputs.base.add_scaled(self.base, range, 1.0, out, scratch)
    }

    /// Elements `range` of a task vector.
    pub(crate) fn read(
        &self,
        task: usize,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.inputs.vectors[task].tensors.read_f32(self.vectors[task], range, out, scratch)
    }

    /// `out += coefficient · τ` for elements `range` of a task vector.
    pub(crate) fn add_scaled(
        &self,
        task: usize,
        range: Range<usize>,
        coefficient: f32,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.inputs.vectors[task].tensors.add_scaled(self.vectors[task], range, coefficient, out, scratch)
    }

    /// Elements `range` of a mask, 0 or 1; one that lacks this tensor has all its entries.
    pub(crate) fn read_mask(
        &self,
        mask: usize,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let tensors = &self.inputs.masks[mask].tensors;
        if let Some(position) = tensors.index_of(self.name()) {
            return tensors.read_f32(position, range, out, scratch);
        }
        out.fill(1.0);
        Ok(())
    }

    /// Elements `range` of what the task vectors are merged to: θ_mt − θ₀ where port `merged` holds θ_mt, or else their sum, in the order of
    /// the collection.
    pub(crate) fn read_merged(
        &self,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let merged = self.inputs.merged.as_ref();
        if let Some((merged, position)) =
            merged.and_then(|merged| Some((merged, merged.index_of(self.name())?)))
        {
            merged.read_f32(position, range.clone(), out, scratch)?;
            return self.inputs.base.add_scaled(self.base, range, -1.0, out, scratch);
        }
        out.fill(0.0);
        (0..self.n_tasks()).try_for_each(|task| self.add_scaled(task, range.clone(), 1.0, out, scratch))
    }

    /// A whole task vector of this tensor, finite.
    pub(crate) fn whole(&self, task: usize, scratch: &mut Scratch) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.n_elements()];
        for range in blocks(values.len()) {
            let out = &mut values[range.clone()];
            self.read(task, range.clone(), out, scratch)?;
            check_finite(self.name(), range.start, out)?;
        }
        Ok(values)
    }
}
