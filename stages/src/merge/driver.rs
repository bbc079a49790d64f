//! Runs prepared rules over all tensors and stores the merged checkpoint.
//!
//! Blocks stream: what is held does not grow with the number of tasks or with the model. Tensors that a rule needs whole are computed ahead
//! of the writer, several at once, in the order in which they are written, and dropped as soon as they are; [`AHEAD_ELEMENTS`] bounds them.
//! Models of single tasks that share a vector are not written at all: see [`parts`].

use super::inputs::{MergeInputs, Operand};
use super::method::{Parts, Rule};
use super::parts;
use crate::{Draft, StageError, checkpoint};
use merganser_tensors::manifest::Content;
use merganser_tensors::writer::{Block, OutputTensor, Payload};
use merganser_tensors::{DType, Error, Result};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Elements of whole tensors that are computed before they are written; one tensor may be larger.
const AHEAD_ELEMENTS: usize = 32 << 20;

/// An operand and the rule that it is merged by, as a position in the list of rules.
pub(super) struct Assigned<'a> {
    pub operand: Operand<'a>,
    pub rule: usize,
}

/// Writes θ₀ + Δ for the assigned tensors and the base's own bytes or values for all others.
pub(super) fn run<'a>(
    inputs: &'a MergeInputs<'a>,
    assigned: &[Assigned<'a>],
    rules: &[Box<dyn Rule + 'a>],
) -> std::result::Result<Draft, StageError> {
    let parts: Vec<&dyn Parts> = rules.iter().filter_map(|rule| rule.parts()).collect();
    if parts.len() == rules.len() && !rules.is_empty() {
        return parts::store(inputs, assigned, &parts);
    }
    let base = &*inputs.base;
    let mut plan: Vec<Option<&Assigned<'a>>> = vec![None; base.tensors().len()];
    for entry in assigned {
        plan[entry.operand.position()] = Some(entry);
    }
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
    let ahead = Ahead::new(inputs, assigned, rules);
    let fill = |tensor: usize, range: std::ops::Range<usize>, block: Block<'_>, scratch: &mut _| {
        let out = match block {
            Block::Bytes(out) => return checkpoint::copy_elements(base, tensor, range, out, scratch),
            Block::Values(out) => out,
        };
        let Some(Assigned { operand, rule }) = plan[tensor] else {
            return base.read_f32(tensor, range, out, scratch);
        };
        let rule = &rules[*rule];
        match ahead.get(tensor) {
            Some(values) => out.copy_from_slice(&values[range.clone()]),
            None => rule.block(operand, range.clone(), out, scratch)?,
        }
        if rule.adds_to_base() { base.add_scaled(tensor, range, 1.0, out, scratch) } else { Ok(()) }
    };
    let prepare = |tensors: &[usize]| ahead.compute(tensors);
    let draft = checkpoint::store_ahead(inputs.job, Content::Checkpoint, &outputs, &prepare, fill, None);
    draft.map_err(|error| ahead.failure().unwrap_or_else(|| inputs.name_the_culprit(error)))
}

/// Whole tensors, computed before their blocks are asked for.
struct Ahead<'r, 'a> {
    inputs: &'r MergeInputs<'a>,
    rules: &'r [Box<dyn Rule + 'a>],
    /// Tensors that need it, by position in the base, which is the order of the file.
    whole: BTreeMap<usize, &'r Assigned<'a>>,
    computed: Mutex<BTreeMap<usize, Arc<Vec<f32>>>>,
    /// Why a tensor could not be computed; the writer only learns that it was cancelled.
    failed: Mutex<Option<StageError>>,
}

impl<'r, 'a> Ahead<'r, 'a> {
    fn new(
        inputs: &'r MergeInputs<'a>,
        assigned: &'r [Assigned<'a>],
        rules: &'r [Box<dyn Rule + 'a>],
    ) -> Self {
        let whole = assigned.iter().filter(|entry| rules[entry.rule].needs_whole(&entry.operand));
        let whole = whole.map(|entry| (entry.operand.position(), entry)).collect();
        Self { inputs, rules, whole, computed: Mutex::default(), failed: Mutex::default() }
    }

    /// Makes sure that `tensors`, the next ones to be written, are there; forgets those before them.
    fn compute(&self, tensors: &[usize]) -> Result<()> {
        let mut computed = self.computed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(first) = tensors.iter().copied().filter(|tensor| self.whole.contains_key(tensor)).min()
        else {
            return Ok(());
        };
        computed.retain(|tensor, _| *tensor >= first);
        if let Some(missing) =
            tensors.iter().find(|t| self.whole.contains_key(t) && !computed.contains_key(t))
        {
            let last = tensors.iter().copied().max().unwrap_or(*missing);
            let mut elements = 0;
            let mut batch: Vec<&Assigned<'a>> = Vec::new();
            for (position, entry) in self.whole.range(missing..) {
                elements += entry.operand.n_elements();
                if *position > last && elements > AHEAD_ELEMENTS {
                    break;
                }
                batch.push(entry);
            }
            // The largest first, so that no thread is left alone with one at the end.
            batch.sort_by_key(|entry| std::cmp::Reverse(entry.operand.n_elements()));
            let results: Vec<Result<(usize, Vec<f32>)>> =
                batch.into_par_iter().with_max_len(1).map(|entry| self.one(entry)).collect();
            for result in results {
                let (position, values) = result?;
                computed.insert(position, Arc::new(values));
            }
        }
        *self.computed.lock().unwrap_or_else(PoisonError::into_inner) = computed;
        Ok(())
    }

    fn one(&self, entry: &Assigned<'a>) -> Result<(usize, Vec<f32>)> {
        if (self.inputs.job.cancelled)() {
            return Err(Error::Cancelled);
        }
        let mut values = vec![0.0; entry.operand.n_elements()];
        match self.rules[entry.rule].tensor(&entry.operand, &mut values) {
            Ok(()) => Ok((entry.operand.position(), values)),
            Err(StageError::Tensors(error)) => Err(error),
            Err(error) => {
                self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                Err(Error::Cancelled)
            }
        }
    }

    fn get(&self, tensor: usize) -> Option<Arc<Vec<f32>>> {
        if !self.whole.contains_key(&tensor) {
            return None;
        }
        self.computed.lock().unwrap_or_else(PoisonError::into_inner).get(&tensor).cloned()
    }

    fn failure(&self) -> Option<StageError> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
