//! The values of one tensor, looked at as often as it takes: kept in memory where they are few, read again where they are many.

use merganser_tensors::source::check_finite;
use merganser_tensors::stream::{BLOCK_ELEMENTS, over_blocks};
use merganser_tensors::{Result, Scratch, TensorSource};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Tensors of more elements are read again for every look: memory must not follow the size of tensors.
pub(super) const KEPT_ELEMENTS: usize = 8 << 20;

/// Memory of tensors that are done with, for those that come: what the system hands out anew has to be cleared first.
#[derive(Default)]
pub(super) struct Memory {
    values: Mutex<Vec<Vec<f32>>>,
    scratch: Mutex<Vec<Scratch>>,
}

fn pop<T: Default>(idle: &Mutex<Vec<T>>) -> T {
    // The lock is never held while working.
    idle.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
}

fn push<T>(idle: &Mutex<Vec<T>>, memory: T) {
    idle.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
}

impl Memory {
    /// At least `n` numbers, of any value.
    fn values(&self, n: usize) -> Vec<f32> {
        let mut idle = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fits) = idle.iter().position(|values| values.len() >= n) {
            return idle.swap_remove(fits);
        }
        // What is too small now makes room, so that not more is held than ever was in use.
        idle.pop();
        drop(idle);
        vec![0.0; n]
    }
}

/// A tensor whose values are finite.
pub(super) struct Values<'a> {
    source: &'a dyn TensorSource,
    tensor: usize,
    /// All values, and whatever lies behind them.
    kept: Option<Vec<f32>>,
}

impl<'a> Values<'a> {
    /// Reads all values, keeping up to `kept` of them; `look` sees every block, and what it makes of them comes back in order. NaN and
    /// infinity are errors.
    pub(super) fn read<T: Send>(
        source: &'a dyn TensorSource,
        tensor: usize,
        kept: usize,
        memory: &Memory,
        look: impl Fn(Range<usize>, &[f32]) -> T + Sync,
    ) -> Result<(Self, Vec<T>)> {
        let info = &source.tensors()[tensor];
        let n = info.n_elements();
        if n > kept {
            let values = Self { source, tensor, kept: None };
            let looks = values.blocks(|range, values| {
                check_finite(&info.name, range.start, values)?;
                Ok(look(range, values))
            })?;
            return Ok((values, looks));
        }
        let mut kept = memory.values(n);
        let looks: Vec<Result<T>> = kept[..n]
            .par_chunks_mut(BLOCK_ELEMENTS)
            .enumerate()
            .map(|(index, block)| {
                let start = index * BLOCK_ELEMENTS;
                let range = start..start + block.len();
                let mut scratch = pop(&memory.scratch);
                let read = source.read_f32(tensor, range.clone(), block, &mut scratch);
                push(&memory.scratch, scratch);
                read?;
                check_finite(&info.name, start, block)?;
                Ok(look(range, block))
            })
            .collect();
        let looks = looks.into_iter().collect::<Result<_>>()?;
        Ok((Self { source, tensor, kept: Some(kept) }, looks))
    }

    /// Leaves the memory to tensors that come.
    pub(super) fn give_back(self, memory: &Memory) {
        if let Some(kept) = self.kept {
            push(&memory.values, kept);
        }
    }

    /// Looks at every block once more; results come in order.
    pub(super) fn blocks<T: Send>(
        &self,
        look: impl Fn(Range<usize>, &[f32]) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let n = self.source.tensors()[self.tensor].n_elements();
        if let Some(kept) = &self.kept {
            let blocks = kept[..n].par_chunks(BLOCK_ELEMENTS).enumerate();
            let looks: Vec<Result<T>> = blocks
                .map(|(index, block)| {
                    let start = index * BLOCK_ELEMENTS;
                    look(start..start + block.len(), block)
                })
                .collect();
            return looks.into_iter().collect();
        }
        let looks = over_blocks(&[n], |_, range, scratch, values: &mut Vec<f32>| {
            values.resize(range.len(), 0.0);
            self.source.read_f32(self.tensor, range.clone(), values, scratch)?;
            look(range, values)
        })?;
        Ok(looks.into_iter().flatten().collect())
    }

    /// Hands some values to `work`.
    pub(super) fn with<T>(
        &self,
        range: Range<usize>,
        scratch: &mut Scratch,
        work: impl FnOnce(&[f32]) -> T,
    ) -> Result<T> {
        if let Some(kept) = &self.kept {
            return Ok(work(&kept[range]));
        }
        let mut values = scratch.take(range.len());
        let read = self.source.read_f32(self.tensor, range, &mut values, scratch);
        let result = read.map(|()| work(&values));
        scratch.give_back(values);
        result
    }
}
