//! How much of a model masks keep, and how much of it they share.

use crate::merge::layers::layer_of;
use merganser_tensors::stream::{blocks, map_blocks};
use merganser_tensors::{Error, Result, Scratch, TensorSource};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a mask keeps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Coverage {
    /// Entries in all.
    pub entries: u64,
    /// Entries that the mask has.
    pub kept: u64,
    /// `kept / entries`; 0 of nothing.
    pub share: f64,
    /// Of the entries that this mask has: how many it alone has, how many one other mask has too, and so on. One number per mask; empty for
    /// a mask by itself.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub agreement: Vec<u64>,
    /// By layer, in order; what belongs to no layer (embeddings, final norms, heads) first.
    pub layers: Vec<CoverageRow>,
    /// By tensor.
    pub tensors: Vec<CoverageRow>,
}

/// A part of a mask.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CoverageRow {
    /// A tensor's name, `layer 3`, or `outside layers`.
    pub name: String,
    pub entries: u64,
    pub kept: u64,
    pub share: f64,
}

/// Counts the entries of masks that belong together, in one pass over all of them.
pub fn coverage(masks: &[Arc<dyn TensorSource>]) -> Result<Vec<Coverage>> {
    let same = masks.windows(2).all(|pair| pair[0].tensors() == pair[1].tensors());
    let Some(first) = masks.first().filter(|_| masks.len() > 1 && same) else {
        return masks.iter().map(|mask| alone(&**mask)).collect();
    };
    let counted: Vec<Result<Vec<Vec<u64>>>> =
        (0..first.tensors().len()).into_par_iter().map(|tensor| agreement(masks, tensor)).collect();
    let mut per_mask = vec![(Vec::new(), vec![0u64; masks.len()]); masks.len()];
    for tensor in counted {
        for ((kept, total), counts) in per_mask.iter_mut().zip(tensor?) {
            kept.push(counts.iter().sum());
            total.iter_mut().zip(counts).for_each(|(total, count)| *total += count);
        }
    }
    let summaries = per_mask.into_iter().zip(masks);
    Ok(summaries.map(|((kept, agreement), mask)| summary(&**mask, &kept, agreement)).collect())
}

fn alone(mask: &dyn TensorSource) -> Result<Coverage> {
    let kept: Result<Vec<u64>> = (0..mask.tensors().len())
        .map(|tensor| {
            let counts =
                map_blocks(mask, tensor, |_, values| Ok(values.iter().filter(|value| **value != 0.0).count()))?;
            Ok(counts.into_iter().sum::<usize>() as u64)
        })
        .collect();
    Ok(summary(mask, &kept?, Vec::new()))
}

/// Of one tensor: for each mask, how many of its entries 1, 2, … masks have.
fn agreement(masks: &[Arc<dyn TensorSource>], tensor: usize) -> Result<Vec<Vec<u64>>> {
    let n_masks = masks.len();
    let n = masks[0].tensors()[tensor].n_elements();
    let ranges: Vec<_> = blocks(n).collect();
    let counted: Vec<Result<Vec<Vec<u64>>>> = ranges
        .into_par_iter()
        .map(|range| {
            let mut scratch = Scratch::new();
            let mut values = vec![vec![0.0; range.len()]; n_masks];
            let mut votes = vec![0.0f32; range.len()];
            for (mask, values) in masks.iter().zip(&mut values) {
                mask.read_f32(tensor, range.clone(), values, &mut scratch)?;
                votes.iter_mut().zip(&*values).for_each(|(vote, value)| *vote += value);
            }
            let mut counts = vec![vec![0u64; n_masks]; n_masks];
            for (counts, values) in counts.iter_mut().zip(&values) {
                for (_, vote) in values.iter().zip(&votes).filter(|(value, _)| **value != 0.0) {
                    let others = counts.get_mut(*vote as usize - 1);
                    *others.ok_or_else(|| Error::Io(std::io::Error::other("a mask holds more than 0 and 1")))? += 1;
                }
            }
            Ok(counts)
        })
        .collect();
    let mut total = vec![vec![0; n_masks]; n_masks];
    for counts in counted {
        for (total, counts) in total.iter_mut().zip(counts?) {
            total.iter_mut().zip(counts).for_each(|(total, count)| *total += count);
        }
    }
    Ok(total)
}

fn summary(mask: &dyn TensorSource, kept: &[u64], agreement: Vec<u64>) -> Coverage {
    let row = |name: String, entries: u64, kept: u64| CoverageRow {
        name,
        entries,
        kept,
        share: if entries == 0 { 0.0 } else { kept as f64 / entries as f64 },
    };
    let sizes: Vec<u64> = mask.tensors().iter().map(|info| info.n_elements() as u64).collect();
    let mut by_layer: BTreeMap<Option<usize>, (u64, u64)> = BTreeMap::new();
    for ((info, entries), kept) in mask.tensors().iter().zip(&sizes).zip(kept) {
        let layer = by_layer.entry(layer_of(&info.name)).or_default();
        layer.0 += entries;
        layer.1 += kept;
    }
    let layers = by_layer.into_iter().map(|(layer, (entries, kept))| {
        row(layer.map_or_else(|| "outside layers".to_owned(), |layer| format!("layer {layer}")), entries, kept)
    });
    let tensors = mask.tensors().iter().zip(&sizes).zip(kept);
    let total = row(String::new(), sizes.iter().sum(), kept.iter().sum());
    Coverage {
        entries: total.entries,
        kept: total.kept,
        share: total.share,
        agreement,
        layers: layers.collect(),
        tensors: tensors.map(|((info, entries), kept)| row(info.name.clone(), *entries, *kept)).collect(),
    }
}
