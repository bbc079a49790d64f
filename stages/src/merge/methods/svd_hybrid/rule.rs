//! The merged difference block by block, from the task vectors or from stored directions.

use super::diagnose::diagnose;
use super::model::{Model, in_tasks};
use crate::diagnostics::Diagnostics;
use crate::factors::{BasisRegion, Combination, MaskIndex, Region};
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::method::Rule;
use crate::{Job, StageError};
use merganser_tensors::{Result, Scratch, TensorSource};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// A prepared merge.
pub(super) struct HybridRule<'a> {
    pub inputs: &'a MergeInputs<'a>,
    pub model: Model,
    pub reader: Reader,
    /// Of each task; they add up to 1.
    pub weights: Vec<f64>,
    /// By the operand's index.
    plans: HashMap<usize, Plan>,
    /// λ, of signal and noise.
    pub scales: [f64; 2],
}

/// How the values of one parameter are computed.
pub(super) enum Plan {
    /// Nothing contributes.
    Zero,
    /// Factors of the task vectors, of signal and noise.
    View { position: usize, factors: [Vec<f32>; 2] },
    /// Factors of stored directions, by region.
    Stored { position: usize, regions: Vec<(Region, usize, Vec<f32>)> },
}

/// What plans read.
pub(super) struct Reader {
    /// Task vectors that the basis was made from; empty if its directions are stored.
    tasks: Vec<Arc<dyn TensorSource>>,
    /// Per parameter of the basis, its position in each of them.
    tensors: Vec<Vec<usize>>,
    basis: Arc<dyn TensorSource>,
    masks: Option<Arc<dyn TensorSource>>,
    /// Per parameter of the basis, its position in the masks.
    mask_of: Vec<Option<usize>>,
    /// Per parameter of the basis; only if its directions are stored.
    indices: Vec<MaskIndex>,
}

impl<'a> HybridRule<'a> {
    pub(super) fn new(
        inputs: &'a MergeInputs<'a>,
        model: Model,
        operands: &[&Operand<'a>],
        weights: Vec<f64>,
        scale: f64,
        noise_shrink: f64,
    ) -> std::result::Result<Self, StageError> {
        let reader = Reader::open(inputs.job, &model)?;
        let scales = [scale, scale * noise_shrink];
        let mut plans = HashMap::new();
        for operand in operands {
            let plan = model.position(operand.name()).map_or(Plan::Zero, |position| {
                Plan::new(&model, position, &model.combined(position, &weights), scales)
            });
            plans.insert(operand.index, plan);
        }
        Ok(Self { inputs, model, reader, weights, plans, scales })
    }
}

impl Rule for HybridRule<'_> {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let plan = self.plans.get(&operand.index).unwrap_or(&Plan::Zero);
        self.reader.block(plan, range, out, scratch)
    }

    fn diagnostics(&self, operands: &[&Operand<'_>]) -> std::result::Result<Option<Diagnostics>, StageError> {
        diagnose(self, operands).map(Some)
    }
}

impl Plan {
    /// From factors of the directions, the mean first.
    pub(super) fn new(
        model: &Model,
        position: usize,
        regions: &[(&BasisRegion, Vec<f64>)],
        scales: [f64; 2],
    ) -> Self {
        if model.basis.is_stored {
            let stored = regions.iter().filter_map(|(region, values)| {
                let scale = scales[region.region as usize] / region.factors.as_ref()?.storage_scale();
                let factors = values.iter().map(|value| (value * scale) as f32).collect();
                Some((region.region, region.stored?, factors))
            });
            return Self::Stored { position, regions: stored.collect() };
        }
        let mut factors = [Vec::new(), Vec::new()];
        for (region, values) in regions {
            let scale = scales[region.region as usize];
            factors[region.region as usize] =
                in_tasks(region, values).into_iter().map(|factor| (factor * scale) as f32).collect();
        }
        for factors in &mut factors {
            factors.resize(model.basis.tasks.len(), 0.0);
        }
        Self::View { position, factors }
    }
}

impl Reader {
    fn open(job: &Job<'_>, model: &Model) -> std::result::Result<Self, StageError> {
        let basis = &model.basis;
        let tasks = basis.open_tasks(job)?;
        let masks = basis.open_masks(job)?;
        let mut tensors = Vec::with_capacity(basis.parameters.len());
        for parameter in &basis.parameters {
            let name = &parameter.info.name;
            let found: Option<Vec<usize>> = tasks.iter().map(|task| task.index_of(name)).collect();
            tensors.push(found.ok_or_else(|| {
                StageError::Internal(format!("a task vector of the basis lacks tensor `{name}`"))
            })?);
        }
        let mask = |name: &str| masks.as_ref()?.index_of(name);
        let mask_of: Vec<Option<usize>> =
            basis.parameters.iter().map(|parameter| mask(&parameter.info.name)).collect();
        let sizes = basis.parameters.iter().map(|parameter| parameter.info.n_elements());
        let indices = match &masks {
            Some(masks) if basis.is_stored => {
                MaskIndex::of(&**masks, &mask_of.iter().copied().zip(sizes).collect::<Vec<_>>())?
            }
            _ => sizes.map(MaskIndex::full).collect(),
        };
        Ok(Self { tasks, tensors, basis: Arc::clone(&basis.tensors), masks, mask_of, indices })
    }

    /// Writes elements `range` of a parameter.
    pub(super) fn block(
        &self,
        plan: &Plan,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        out.fill(0.0);
        match plan {
            Plan::Zero => Ok(()),
            Plan::View { position, factors } => self.view(*position, factors, &range, out, scratch),
            Plan::Stored { position, regions } => {
                let mask = self.mask(*position, &range, scratch)?;
                for (region, tensor, factors) in regions {
                    let index = &self.indices[*position];
                    let entries =
                        index.entries_before(*region, range.start)..index.entries_before(*region, range.end);
                    let first = entries.start;
                    let combination = Combination { basis: &*self.basis, tensor: *tensor, factors };
                    match &mask {
                        None => combination.entries(entries, scratch, &mut |start, values| {
                            out[start - first..][..values.len()].copy_from_slice(values);
                        })?,
                        Some(mask) => {
                            let signal = *region == Region::Signal;
                            let mut places = (0..out.len()).filter(|place| (mask[*place] != 0.0) == signal);
                            combination.entries(entries, scratch, &mut |_, values| {
                                for (value, place) in values.iter().zip(&mut places) {
                                    out[place] = *value;
                                }
                            })?;
                        }
                    }
                }
                Ok(())
            }
        }
    }

    fn view(
        &self,
        position: usize,
        factors: &[Vec<f32>; 2],
        range: &Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let [signal, noise] = factors;
        let mask = self.mask(position, range, scratch)?;
        for (index, (task, tensor)) in self.tasks.iter().zip(&self.tensors[position]).enumerate() {
            let (signal, noise) = (signal[index], noise[index]);
            match &mask {
                None => task.add_scaled(*tensor, range.clone(), signal, out, scratch)?,
                Some(mask) => task.with_f32(*tensor, range.clone(), scratch, &mut |values| {
                    for ((sum, x), kept) in out.iter_mut().zip(values).zip(mask) {
                        *sum += x * if *kept == 0.0 { noise } else { signal };
                    }
                })?,
            }
        }
        Ok(())
    }

    fn mask(&self, position: usize, range: &Range<usize>, scratch: &mut Scratch) -> Result<Option<Vec<f32>>> {
        let (Some(masks), Some(tensor)) = (&self.masks, self.mask_of[position]) else { return Ok(None) };
        let mut mask = vec![0.0; range.len()];
        masks.read_f32(tensor, range.clone(), &mut mask, scratch)?;
        Ok(Some(mask))
    }
}
