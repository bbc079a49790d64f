//! What TALL masks compare, block by block, and the models that they make.

use super::inputs::{MaskInputs, find};
use merganser_tensors::source::{read_computed_bytes, read_finite_f32};
use merganser_tensors::{Result, Scratch, TensorInfo, TensorSource};
use std::ops::Range;
use std::sync::Arc;

/// The base, the task vectors, and what they are merged to.
#[derive(Clone)]
pub(super) struct Localizer {
    base: Arc<dyn TensorSource>,
    vectors: Vec<Arc<dyn TensorSource>>,
    /// θ_mt, if it was made elsewhere; else it is θ₀ + scale·Σ τ.
    merged: Option<Arc<dyn TensorSource>>,
    scale: f32,
}

/// A block of everything that is compared.
struct Blocks {
    base: Vec<f32>,
    /// τ_mt.
    vector: Vec<f32>,
    /// τ_t of the tasks that were asked for.
    deltas: Vec<Vec<f32>>,
}

impl Localizer {
    pub(super) fn new(inputs: &MaskInputs<'_>, base: &Arc<dyn TensorSource>, scale: f32) -> Self {
        Self {
            base: Arc::clone(base),
            vectors: inputs.vectors.iter().map(|vector| Arc::clone(&vector.tensors)).collect(),
            merged: inputs.merged.clone(),
            scale,
        }
    }

    /// Adds a vote to each entry that the mask of a task has; `lambdas` are those of the tasks `asked`.
    pub(super) fn vote(
        &self,
        name: &str,
        range: &Range<usize>,
        asked: &[usize],
        lambdas: &[f32],
        votes: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let blocks = self.read(name, range, asked, scratch)?;
        for (delta, lambda) in blocks.deltas.iter().zip(lambdas) {
            compare(&blocks.base, &blocks.vector, delta, *lambda, votes);
        }
        blocks.give_back(scratch);
        Ok(())
    }

    /// Reads each task vector once, in the order of the collection.
    fn read(&self, name: &str, range: &Range<usize>, asked: &[usize], scratch: &mut Scratch) -> Result<Blocks> {
        let n = range.len();
        let mut blocks =
            Blocks { base: scratch.take(n), vector: scratch.take(n), deltas: Vec::with_capacity(asked.len()) };
        let read = |source: &dyn TensorSource, out: &mut [f32], scratch: &mut Scratch| {
            read_finite_f32(source, find(source, name)?, range.clone(), out, scratch)
        };
        read(&*self.base, &mut blocks.base, scratch)?;
        blocks.vector.fill(0.0);
        for (task, vector) in self.vectors.iter().enumerate() {
            let is_asked = asked.contains(&task);
            if self.merged.is_some() && !is_asked {
                continue;
            }
            let mut delta = scratch.take(n);
            read(&**vector, &mut delta, scratch)?;
            blocks.vector.iter_mut().zip(&delta).for_each(|(sum, x)| *sum += x);
            if is_asked {
                blocks.deltas.push(delta);
            } else {
                scratch.give_back(delta);
            }
        }
        match &self.merged {
            Some(merged) => {
                read(&**merged, &mut blocks.vector, scratch)?;
                blocks.vector.iter_mut().zip(&blocks.base).for_each(|(x, base)| *x -= base);
            }
            None => merganser_tensors::kernels::linear::scale(&mut blocks.vector, self.scale),
        }
        Ok(blocks)
    }
}

impl Blocks {
    fn give_back(self, scratch: &mut Scratch) {
        for buffer in [self.base, self.vector].into_iter().chain(self.deltas) {
            scratch.give_back(buffer);
        }
    }
}

/// `|θ₀ − θ_t| > λ·|θ_mt − θ_t|`, in `f32`, in the order of operations of the authors' code.
fn compare(base: &[f32], vector: &[f32], delta: &[f32], lambda: f32, votes: &mut [f32]) {
    for (((vote, base), vector), delta) in votes.iter_mut().zip(base).zip(vector).zip(delta) {
        let (tuned, merged) = (base + delta, base + vector);
        *vote += f32::from(u8::from((base - tuned).abs() > (merged - tuned).abs() * lambda));
    }
}

/// θ₀ + mask_t ⊙ τ_mt, computed where it is read: what a task's λ is judged by.
pub(super) struct LocalizedModel {
    pub localizer: Localizer,
    /// The tensors that are masked, sorted; all others are the base's.
    pub masked: Arc<Vec<String>>,
    pub task: usize,
    pub lambda: f32,
}

impl TensorSource for LocalizedModel {
    fn tensors(&self) -> &[TensorInfo] {
        self.localizer.base.tensors()
    }

    fn read_f32(&self, tensor: usize, range: Range<usize>, out: &mut [f32], scratch: &mut Scratch) -> Result<()> {
        let base = &self.localizer.base;
        let name = &base.tensors()[tensor].name;
        if self.masked.binary_search(name).is_err() {
            return base.read_f32(tensor, range, out, scratch);
        }
        let blocks = self.localizer.read(name, &range, &[self.task], scratch)?;
        out.fill(0.0);
        compare(&blocks.base, &blocks.vector, &blocks.deltas[0], self.lambda, out);
        for ((mask, vector), base) in out.iter_mut().zip(&blocks.vector).zip(&blocks.base) {
            *mask = base + *mask * vector;
        }
        blocks.give_back(scratch);
        Ok(())
    }

    fn read_bytes(
        &self,
        tensor: usize,
        range: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let base = &self.localizer.base;
        match self.masked.binary_search(&base.tensors()[tensor].name) {
            Ok(_) => read_computed_bytes(self, tensor, range, out, scratch),
            Err(_) => base.read_bytes(tensor, range, out, scratch),
        }
    }

    fn stored_bytes(&self) -> u64 {
        0
    }

    fn check_unchanged(&self) -> Result<()> {
        self.localizer.vectors.iter().try_for_each(|vector| vector.check_unchanged())
    }
}
