//! Which of several equal checkpoint tensors a constant holds.
//!
//! Equal tensors are common (zero biases, unit norms, tied weights), and exporters merge equal constants into
//! one. Names decide where they can: of the constant, of an `Identity` that an exporter left in place of a
//! merged tensor, of the modules that consume it. What stays open is recorded: the constant then stands for
//! all of its candidates, which have to be equal in every model.

use std::collections::BTreeSet;

use super::digests::Origin;
use super::names::{best_by_module, best_by_name};
use crate::graph::Graph;

/// Constants of one content, and the checkpoint tensors of that content.
pub(super) struct Class<'a> {
    /// indices of graph tensors, in file order
    pub(super) members: Vec<usize>,
    /// names of checkpoint tensors, sorted
    pub(super) candidates: Vec<&'a str>,
    pub(super) uniform: bool,
}

/// What was decided for one constant.
pub(super) struct Decision<'a> {
    pub(super) member: usize,
    pub(super) source: &'a str,
    /// candidates that this constant also stands for, because nothing tells them apart
    pub(super) merged: Vec<&'a str>,
    /// `Identity` nodes whose output is another candidate: output name and source
    pub(super) splits: Vec<(String, &'a str)>,
    /// the constant is used at several places, so that it may also stand for candidates found nowhere else
    pub(super) shared: bool,
}

impl<'a> Class<'a> {
    /// Decides for every member that holds a candidate; members left out are plain constants.
    pub(super) fn resolve(&self, graph: &Graph) -> Vec<Decision<'a>> {
        let name = |member: usize| graph.float_tensors()[member].name.as_str();
        let mut claimed: BTreeSet<&str> = BTreeSet::new();
        let mut sources: Vec<Option<&'a str>> = vec![None; self.members.len()];
        for (source, &member) in sources.iter_mut().zip(&self.members) {
            *source = best_by_name(name(member), self.candidates.iter().copied());
            claimed.extend(*source);
        }
        let splits: Vec<Vec<(String, &'a str)>> = self
            .members
            .iter()
            .zip(&sources)
            .map(|(&member, source)| self.splits(graph, name(member), *source))
            .collect();
        claimed.extend(splits.iter().flatten().map(|(_, source)| *source));
        for (source, &member) in sources.iter_mut().zip(&self.members).filter(|(s, _)| s.is_none()) {
            let nodes = graph.consumer_names(name(member));
            *source = best_by_module(nodes, &self.unclaimed(&claimed))
                .or_else(|| best_by_module(nodes, &self.candidates));
            claimed.extend(*source);
        }
        let open = self.unclaimed(&claimed);
        let pool = if open.is_empty() { &self.candidates } else { &open };
        self.members
            .iter()
            .zip(sources)
            .zip(splits)
            .filter_map(|((&member, source), splits)| {
                let uses_elsewhere: usize = splits.iter().map(|(output, _)| graph.use_count(output)).sum();
                let shared = graph.use_count(name(member)).saturating_sub(uses_elsewhere) > 1;
                let (source, merged) = match source {
                    Some(source) => (source, Vec::new()),
                    // A fill of ones or zeros that looks like tensors which all have a place of their own.
                    None if self.uniform && open.is_empty() && self.candidates.len() > 1 => return None,
                    None => (pool[0], pool[1..].to_vec()),
                };
                Some(Decision { member, source, merged, splits, shared })
            })
            .collect()
    }

    fn splits(&self, graph: &Graph, member: &str, source: Option<&str>) -> Vec<(String, &'a str)> {
        graph
            .identities()
            .iter()
            .filter(|i| i.initializer == member)
            .filter_map(|i| {
                Some((i.output.clone(), best_by_name(&i.output, self.candidates.iter().copied())?))
            })
            .filter(|(_, split)| Some(*split) != source)
            .collect()
    }

    fn unclaimed(&self, claimed: &BTreeSet<&str>) -> Vec<&'a str> {
        self.candidates.iter().copied().filter(|c| !claimed.contains(c)).collect()
    }
}

/// Decides for constants of a single value, which bind by name only.
pub(super) fn scalar_by_name<'a>(name: &str, value: f32, origin: &'a Origin) -> Option<&'a str> {
    let equal = origin.tensors.iter().filter(|t| t.scalar.is_some_and(|s| s.to_bits() == value.to_bits()));
    best_by_name(name, equal.map(|t| t.name.as_str()))
}
