//! A pipeline that holds together: what its parts are and how to find them.

use super::reference::{Pick, StageReference};
use super::source::Files;
use super::sweep::find_value;
use super::text::write_loose;
use indexmap::IndexMap;
use merganser_stages::params::{NodeValue, Problem, Span, did_you_mean};
use merganser_stages::{Content, Stage, StageKind, Unit};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

/// A pipeline file, resolved: every stage instance with its inputs and units, valid by construction.
pub struct Pipeline {
    /// `[pipeline] name`, or the file's name without its extension.
    pub name: String,
    pub description: Option<String>,
    /// Absolute.
    pub path: PathBuf,
    /// The texts that spans point into.
    pub files: Files,
    /// Every instance after those that it takes from; in the order of the file where that leaves a choice.
    pub instances: Vec<Instance>,
    pub warnings: Vec<Problem>,
    /// Addresses of what is not on this machine, with what to say about it.
    pub missing: BTreeMap<String, String>,
}

/// A stage under one combination of the swept variables that it depends on.
pub struct Instance {
    /// `packed[bits=3]`, or the stage's name if it depends on no swept variable.
    pub label: String,
    /// The stage's name.
    pub stage: String,
    pub kind: &'static dyn StageKind,
    /// The swept variables that it depends on, in the order of the axes.
    pub vars: IndexMap<String, serde_json::Value>,
    /// One, or one per member of `each`.
    pub bodies: Vec<Arc<dyn Stage>>,
    /// Per body, the addresses of files that it reads.
    pub addresses: Vec<BTreeSet<String>>,
    pub content: Content,
    /// The names of the members in order; `None` for a single artifact.
    pub members: Option<Vec<String>>,
    /// One per artifact, in the order of `members`, each after the parts that it takes.
    pub units: Vec<PlannedUnit>,
    /// The stages that it takes from, without repetitions.
    pub inputs: Vec<Edge>,
    /// Where `kind` is written.
    pub kind_span: Span,
    /// What its members are called: the name that `each` bound, here or further up (`task`).
    pub member_label: Option<String>,
    pub(super) choices: Vec<(String, NodeValue)>,
}

/// What a name on the command line means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// At least one, in topological order.
    pub instances: Vec<usize>,
    /// The member of their collections that is meant; `None` means them whole.
    pub member: Option<String>,
}

/// A connected port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Edge {
    pub port: String,
    /// Index of the instance that it takes from.
    pub from: usize,
    /// The member that `from` names or `each` narrows to; `None` where the output is taken as it is.
    pub member: Option<String>,
}

/// A part of an instance that has a key and an artifact of its own.
#[derive(Clone, Debug)]
pub struct PlannedUnit {
    /// Names it within the instance's collection.
    pub member: Option<String>,
    /// Index of the body that computes it.
    pub body: usize,
    /// As the body gave it: what [`Stage::parameters`] and [`Stage::sources`] are asked about.
    pub unit: Unit,
    pub takes: Vec<ResolvedTake>,
}

/// What a unit consumes of one port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedTake {
    pub port: String,
    /// Index of the instance that it takes from; its own, for a part of it.
    pub from: usize,
    /// One member of that instance's collection; `None` takes all that it produces.
    pub member: Option<String>,
    /// Indices of the units of that instance that are taken, in order.
    pub units: Vec<usize>,
}

impl Pipeline {
    /// Finds what a name means, down to a member: `packed`, `packed[bits=3]`, `tuned[digits]`, `packed[bits=3,digits]`.
    pub fn select(&self, name: &str) -> Result<Selection, Problem> {
        if let Some(index) = self.instances.iter().position(|instance| instance.label == name) {
            return Ok(Selection { instances: vec![index], member: None });
        }
        let reference =
            StageReference::parse(name).map_err(|reason| Problem::new("bad-stage-name", reason))?;
        let of_stage: Vec<usize> = (0..self.instances.len())
            .filter(|&index| self.instances[index].stage == reference.stage)
            .collect();
        if of_stage.is_empty() {
            let mut stages: Vec<&str> =
                self.instances.iter().map(|instance| instance.stage.as_str()).collect();
            stages.dedup();
            let mut problem = Problem::new("unknown-stage", format!("unknown stage `{}`", reference.stage));
            problem.help = did_you_mean(&reference.stage, stages);
            return Err(problem);
        }
        let is_meant = |&index: &usize| reference.picks.iter().all(|pick| self.instances[index].agrees(pick));
        let instances: Vec<usize> = of_stage.iter().copied().filter(is_meant).collect();
        if instances.is_empty() {
            let known: Vec<String> = of_stage.iter().map(|&index| self.instances[index].describe()).collect();
            let problem = Problem::new("unknown-instance", format!("there is no `{name}`"));
            return Err(problem.help(format!("there is {}", known.join(", "))));
        }
        let is_member = |pick: &Pick| match pick {
            Pick::Named { name, text, .. } => {
                let is_axis = self.instances[instances[0]].choices.iter().any(|(axis, _)| axis == name);
                (!is_axis).then(|| text.clone())
            }
            Pick::Member(member) => Some(member.clone()),
        };
        let member = reference.picks.iter().find_map(is_member);
        Ok(Selection { instances, member })
    }
}

impl Instance {
    /// Names one of its artifacts: `tuned[digits]`, `packed[bits=3,digits]`; without a member, the instance itself.
    pub fn artifact_label(&self, member: Option<&str>) -> String {
        let Some(member) = member else { return self.label.clone() };
        let member = write_loose(&NodeValue::String(member.to_owned()));
        match self.label.strip_suffix(']') {
            Some(open) => format!("{open},{member}]"),
            None => format!("{}[{member}]", self.label),
        }
    }
}

impl Instance {
    fn agrees(&self, pick: &Pick) -> bool {
        let has_member =
            |member: &String| self.members.as_ref().is_some_and(|members| members.contains(member));
        match pick {
            Pick::Member(member) => has_member(member),
            Pick::Named { name, value, text } => match self.choices.iter().find(|(axis, _)| axis == name) {
                Some((_, chosen)) => find_value(std::slice::from_ref(chosen), value).is_some(),
                None => self.member_label.as_ref() == Some(name) && has_member(text),
            },
        }
    }

    fn describe(&self) -> String {
        match &self.members {
            None => format!("`{}`", self.label),
            Some(members) => format!("`{}` with members {}", self.label, members.join(", ")),
        }
    }
}

impl std::fmt::Debug for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Instance")
            .field("label", &self.label)
            .field("kind", &self.kind.id())
            .field("members", &self.members)
            .field("inputs", &self.inputs)
            .finish_non_exhaustive()
    }
}
