//! Sums of tensors of other sources, each with its coefficient: what a task vector, or a merge by arithmetic, is until it is read.

use std::ops::Range;
use std::sync::Arc;

use crate::dtype::TensorInfo;
use crate::error::Result;
use crate::kernels::linear;
use crate::scratch::Scratch;
use crate::source::{TensorSource, check_range, read_computed_bytes};

/// Tensors that are sums over those of other sources.
pub(crate) struct LinearSource {
    pub infos: Vec<TensorInfo>,
    /// At least one.
    pub operands: Vec<Operand>,
}

pub(crate) struct Operand {
    pub coefficient: f32,
    pub source: Arc<dyn TensorSource>,
    /// For each of our tensors, its position in `source`; of the first operand, all are there.
    pub tensors: Vec<Option<usize>>,
}

impl TensorSource for LinearSource {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn read_f32(
        &self,
        tensor: usize,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        check_range(&self.infos[tensor], &range, out.len())?;
        sum(&self.operands, tensor, &range, out, scratch)
    }

    fn add_scaled(
        &self,
        tensor: usize,
        range: Range<usize>,
        coefficient: f32,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        check_range(&self.infos[tensor], &range, out.len())?;
        let mut values = scratch.take(out.len());
        let last = self.operands.last().and_then(|last| Some((last, last.tensors[tensor]?)));
        let result = match (self.operands.as_slice(), last) {
            // The last operand is added on the way to `out`: one pass over memory less, which a difference feels.
            ([first @ .., _], Some((last, position))) if !first.is_empty() => {
                sum(first, tensor, &range, &mut values, scratch).and_then(|()| {
                    last.source.with_f32(position, range, scratch, &mut |x| {
                        linear::add_scaled_sum(out, coefficient, &values, last.coefficient, x);
                    })
                })
            }
            (operands, _) => sum(operands, tensor, &range, &mut values, scratch)
                .map(|()| linear::add_scaled(out, coefficient, &values)),
        };
        scratch.give_back(values);
        result
    }

    fn read_bytes(
        &self,
        tensor: usize,
        range: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        read_computed_bytes(self, tensor, range, out, scratch)
    }

    fn stored_bytes(&self) -> u64 {
        0
    }

    fn check_unchanged(&self) -> Result<()> {
        self.operands.iter().try_for_each(|operand| operand.source.check_unchanged())
    }
}

/// The sum of at least one operand, in their order.
fn sum(
    operands: &[Operand],
    tensor: usize,
    range: &Range<usize>,
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    let mut operands = operands.iter();
    if let Some((first, position)) = operands.next().and_then(|first| Some((first, first.tensors[tensor]?))) {
        first.source.read_f32(position, range.clone(), out, scratch)?;
        linear::scale(out, first.coefficient);
    }
    for operand in operands {
        let (Some(position), coefficient) = (operand.tensors[tensor], operand.coefficient) else { continue };
        operand.source.add_scaled(position, range.clone(), coefficient, out, scratch)?;
    }
    Ok(())
}
