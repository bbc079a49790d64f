//! The pipeline flattened into units of work: what has a key and an artifact of its own.

use super::events::UnitName;
use crate::pipeline::{Instance, Pipeline, Selection};
use merganser_stages::{Stage, Unit};
use std::collections::BTreeSet;

/// Index of a unit in [`Units`]; topological: a unit's inputs have smaller indices.
pub type UnitId = usize;

/// One unit and where its inputs come from.
pub struct UnitEntry {
    pub instance: usize,
    pub body: usize,
    pub unit: Unit,
    pub member: Option<String>,
    pub name: UnitName,
    pub inputs: Vec<UnitInput>,
}

/// One input artifact: a port, the member it is labelled with, and the unit that makes it.
pub struct UnitInput {
    pub port: String,
    /// The member's name if the port holds a whole collection: it then enters the key.
    pub member: Option<String>,
    /// Whether the port holds a whole collection (of which this is one member).
    pub whole: bool,
    pub from: UnitId,
}

impl UnitEntry {
    /// Whether it only serves other units of its stage.
    pub fn is_part(&self) -> bool {
        self.unit.part.is_some()
    }
}

/// All units of a pipeline in topological order.
pub struct Units<'p> {
    pub pipeline: &'p Pipeline,
    pub entries: Vec<UnitEntry>,
    /// Per instance, the ids of its units.
    pub of_instance: Vec<Vec<UnitId>>,
}

impl<'p> Units<'p> {
    /// Flattens the pipeline.
    pub fn new(pipeline: &'p Pipeline) -> Self {
        let mut units = Self { pipeline, entries: Vec::new(), of_instance: Vec::new() };
        for (instance_id, instance) in pipeline.instances.iter().enumerate() {
            units.of_instance.push(Vec::new());
            for planned in &instance.units {
                let takes = planned.takes.iter();
                let inputs = takes.flat_map(|take| units.resolve(instance_id, take)).collect();
                let label = instance.artifact_label(planned.member.as_deref());
                let name = match planned.unit.part {
                    Some(part) => format!("{label} ({part})"),
                    None => label,
                };
                let id = units.entries.len();
                units.of_instance[instance_id].push(id);
                units.entries.push(UnitEntry {
                    instance: instance_id,
                    body: planned.body,
                    unit: planned.unit.clone(),
                    member: planned.member.clone(),
                    name: UnitName(name),
                    inputs,
                });
            }
        }
        units
    }

    fn resolve(&self, instance: usize, take: &crate::pipeline::ResolvedTake) -> Vec<UnitInput> {
        let upstream = &self.pipeline.instances[take.from];
        let is_part = take.from == instance;
        let whole = take.member.is_none() && upstream.members.is_some() && !is_part;
        let ids = take.units.iter().map(|&unit| self.of_instance[take.from][unit]);
        ids.map(|id| UnitInput {
            port: take.port.clone(),
            member: self.entries[id].member.clone(),
            whole,
            from: id,
        })
        .collect()
    }

    pub fn instance(&self, id: UnitId) -> &Instance {
        &self.pipeline.instances[self.entries[id].instance]
    }

    pub fn stage(&self, id: UnitId) -> &dyn Stage {
        self.instance(id).bodies[self.entries[id].body].as_ref()
    }

    /// What a unit reads and is not on this machine, in words.
    pub fn missing(&self, id: UnitId) -> Option<&str> {
        self.addresses(id).iter().find_map(|address| self.pipeline.missing.get(address)).map(String::as_str)
    }

    /// The addresses of what a unit reads.
    pub fn addresses(&self, id: UnitId) -> &BTreeSet<String> {
        &self.instance(id).addresses[self.entries[id].body]
    }

    /// Marks the units that a name on the command line means.
    pub fn selected(&self, selections: &[Selection]) -> Vec<bool> {
        let is_meant = |entry: &UnitEntry| {
            let mut matching =
                selections.iter().filter(|selection| selection.instances.contains(&entry.instance));
            matching.any(|selection| selection.member.is_none() || selection.member == entry.member)
        };
        self.entries.iter().map(is_meant).collect()
    }

    /// Marks the selected units and everything they need.
    pub fn needed_for(&self, selections: &[Selection]) -> Vec<bool> {
        let mut needed = self.selected(selections);
        for id in (0..self.entries.len()).rev() {
            if needed[id] {
                for input in &self.entries[id].inputs {
                    needed[input.from] = true;
                }
            }
        }
        needed
    }
}
