//! `run --max N`: a few of a sweep's combinations at a time.

use super::setup;
use crate::engine::{Forecast, Workspace};
use crate::exit::Result;
use crate::pipeline::{Pipeline, Selection};
use std::collections::BTreeSet;

/// Of the combinations of swept vars, keeps those that are finished and at most `n` that are not; returns how many are left for later.
///
/// A combination is what its last stages depend on: those that no other stage of the targets takes from.
pub fn at_most(
    workspace: &Workspace,
    pipeline: &Pipeline,
    targets: Vec<Selection>,
    forced: &[Selection],
    n: usize,
) -> Result<(Vec<Selection>, usize)> {
    let resolver = setup::resolver(workspace, pipeline, &targets, forced, Box::new(|_, _, _| ()))?;
    let planned = setup::plan(&resolver)?;
    let entries = &resolver.units.entries;
    let (mut last, mut unfinished) = (BTreeSet::new(), BTreeSet::new());
    for unit in &planned {
        let instance = entries[unit.id].instance;
        last.insert(instance);
        if unit.forecast != Forecast::Cached {
            unfinished.insert(instance);
        }
    }
    for unit in &planned {
        let entry = &entries[unit.id];
        let others = entry.inputs.iter().map(|input| entries[input.from].instance);
        for taken in others.filter(|&taken| taken != entry.instance) {
            last.remove(&taken);
        }
    }
    let vars = |instance: usize| &pipeline.instances[instance].vars;
    let mut open = Vec::new();
    for &instance in last.intersection(&unfinished).filter(|&&instance| !vars(instance).is_empty()) {
        if !open.contains(&vars(instance)) {
            open.push(vars(instance));
        }
    }
    let left = open.split_off(n.min(open.len()));
    last.retain(|&instance| !left.contains(&vars(instance)));
    let chosen = targets.into_iter().filter_map(|target| {
        let instances = target.instances.into_iter().filter(|instance| last.contains(instance));
        let instances: Vec<usize> = instances.collect();
        (!instances.is_empty()).then_some(Selection { instances, member: target.member })
    });
    Ok((chosen.collect(), left.len()))
}
