//! The values of one tensor, looked at as often as it takes: kept in memory where they are few, read again where they are many.

use merganser_tensors::source::check_finite;
use merganser_tensors::stream::{BLOCK_ELEMENTS, over_blocks};
use merganser_tensors::{Result, Scratch, TensorSource};
use rayon::prelude::*;
use std::ops::Range;

/// Tensors of more elements are read again for every look: memory must not follow the size of tensors.
pub(super) const KEPT_ELEMENTS: usize = 8 << 20;

/// A tensor whose values are finite.
pub(super) struct Values<'a> {
    source: &'a dyn TensorSource,
    tensor: usize,
    kept: Option<Vec<f32>>,
}

impl<'a> Values<'a> {
    /// Reads all values, keeping up to `kept` of them; `look` sees every block, and what it makes of them comes back in order. NaN and
    /// infinity are errors.
    pub(super) fn read<T: Send>(
        source: &'a dyn TensorSource,
        tensor: usize,
        kept: usize,
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
        let mut kept = vec![0f32; n];
        let looks: Vec<Result<T>> = kept
            .par_chunks_mut(BLOCK_ELEMENTS)
            .enumerate()
            .map_init(Scratch::new, |scratch, (index, block)| {
                let start = index * BLOCK_ELEMENTS;
                let range = start..start + block.len();
                source.read_f32(tensor, range.clone(), block, scratch)?;
                check_finite(&info.name, start, block)?;
                Ok(look(range, block))
            })
            .collect();
        let looks = looks.into_iter().collect::<Result<_>>()?;
        Ok((Self { source, tensor, kept: Some(kept) }, looks))
    }

    /// Looks at every block once more; results come in order.
    pub(super) fn blocks<T: Send>(
        &self,
        look: impl Fn(Range<usize>, &[f32]) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        if let Some(kept) = &self.kept {
            let blocks = kept.par_chunks(BLOCK_ELEMENTS).enumerate();
            let looks: Vec<Result<T>> = blocks
                .map(|(index, block)| {
                    let start = index * BLOCK_ELEMENTS;
                    look(start..start + block.len(), block)
                })
                .collect();
            return looks.into_iter().collect();
        }
        let n = self.source.tensors()[self.tensor].n_elements();
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
