//! From stages to instances: who takes from whom, which combinations of swept values exist, what is connected to what.
//!
//! Instances come from a natural join. A stage exists once per combination of the swept variables that its own table uses, joined
//! with the instances it takes from: those with the same values belong together. A stage thereby depends on exactly the axes that
//! it uses or inherits, and what no axis touches exists once. A pin (`packed[bits=3]`) filters the instances that are
//! joined and takes their axis out, so the axis is not inherited.
//!
//! INVARIANT: two instances of one stage disagree on the value of some axis, so no two are the same. (It holds for the
//! combinations of a stage's own axes, and joining, filtering and taking out a pinned axis keep it.)
//!
//! A stage whose own reading or upstream failed stays in as an instance without an outcome: its consumers are still wired and their own
//! mistakes reported, but nothing is said about what follows from the first mistake.

use super::order::{ReadStage, Unreadable, order};
use super::plan::{Edge, Instance, PlannedUnit, ResolvedTake};
use super::plug::{Outcome, Plugged, plug, with_article};
use super::problems::Problems;
use super::reference::{Pick, StageReference};
use super::stage::{Body, Variant, Wire};
use super::sweep::{Assignment, Axis, MAX_INSTANCES, find_value, label, to_vars, too_many};
use merganser_stages::params::Problem;
use merganser_stages::{Connection, Content, Ports, StageKind, Take, Unit};
use std::collections::HashMap;
use std::sync::Arc;

/// Resolves all stages. Returns nothing when there were problems.
pub(super) fn resolve(
    stages: &[ReadStage<'_>],
    axes: &[Axis],
    unreadable: &Unreadable,
    problems: &mut Problems,
) -> Option<Vec<Instance>> {
    let index: HashMap<&str, usize> =
        stages.iter().enumerate().map(|(index, stage)| (stage.table.name.as_str(), index)).collect();
    let order = order(stages, &index, unreadable, problems);
    let mut resolver = Resolver {
        stages,
        axes,
        unreadable,
        index: &index,
        component: &order.component,
        problems,
        drafts: Vec::new(),
        of_stage: vec![Vec::new(); stages.len()],
        is_uncertain: stages.iter().map(|stage| stage.is_incomplete).collect(),
    };
    for stage in order.stages {
        resolver.stage(stage)?;
    }
    if resolver.problems.has_errors() {
        return None;
    }
    resolver.finish()
}

/// An instance whose connections are being worked out.
struct Draft {
    stage: usize,
    variant: usize,
    assignment: Assignment,
    /// Per body and wire, the instance at its other end, unless that has been found wrong.
    targets: Vec<Vec<Option<usize>>>,
    outcome: Option<Outcome>,
}

struct Resolver<'a> {
    stages: &'a [ReadStage<'a>],
    axes: &'a [Axis],
    unreadable: &'a Unreadable,
    index: &'a HashMap<&'a str, usize>,
    component: &'a [Option<usize>],
    problems: &'a mut Problems,
    drafts: Vec<Draft>,
    /// Per stage, its drafts.
    of_stage: Vec<Vec<usize>>,
    /// Per stage, whether its instances are not all there.
    is_uncertain: Vec<bool>,
}

impl<'a> Resolver<'a> {
    /// Makes the instances of a stage. Returns nothing when there are too many to go on.
    fn stage(&mut self, stage: usize) -> Option<()> {
        let mut drafts: Vec<Draft> = Vec::new();
        let read = &self.stages[stage];
        for (variant_idx, variant) in read.variants.iter().enumerate() {
            let mut references: Vec<&StageReference> = Vec::new();
            let mut rows: Vec<(Assignment, Vec<Option<usize>>)> =
                vec![(variant.assignment.clone(), Vec::new())];
            for wire in variant.bodies.iter().flat_map(|body| &body.wires) {
                if references.contains(&&wire.reference) {
                    continue;
                }
                let candidates = self.candidates(stage, wire);
                self.is_uncertain[stage] |= candidates.is_none();
                references.push(&wire.reference);
                rows = match candidates {
                    None => rows
                        .into_iter()
                        .map(|(assignment, targets)| (assignment, with(targets, None)))
                        .collect(),
                    Some(candidates) => rows
                        .iter()
                        .flat_map(|(assignment, targets)| {
                            candidates.iter().filter_map(|(theirs, target)| {
                                Some((assignment.join(theirs)?, with(targets.clone(), Some(*target))))
                            })
                        })
                        .collect(),
                };
                if self.drafts.len() + drafts.len() + rows.len() > MAX_INSTANCES {
                    self.problems.error(too_many(self.axes));
                    return None;
                }
            }
            for (assignment, row) in rows {
                let target_of = |wire: &Wire| {
                    references.iter().position(|known| **known == wire.reference).and_then(|index| row[index])
                };
                let targets =
                    variant.bodies.iter().map(|body| body.wires.iter().map(target_of).collect()).collect();
                drafts.push(Draft { stage, variant: variant_idx, assignment, targets, outcome: None });
            }
        }
        drafts.sort_by(|left, right| left.assignment.cmp(&right.assignment));
        for mut draft in drafts {
            draft.outcome = self.outcome(&draft);
            self.of_stage[stage].push(self.drafts.len());
            self.drafts.push(draft);
        }
        Some(())
    }

    /// Returns the instances that a wire may come from, with the axes that are inherited from each.
    fn candidates(&mut self, consumer: usize, wire: &Wire) -> Option<Vec<(Assignment, usize)>> {
        let &producer = self.index.get(wire.reference.stage.as_str())?;
        if self.component[producer].is_some() && self.component[producer] == self.component[consumer] {
            return None;
        }
        let mut candidates: Vec<(Assignment, usize)> = self.of_stage[producer]
            .iter()
            .map(|&draft| (self.drafts[draft].assignment.clone(), draft))
            .collect();
        if candidates.is_empty() {
            return None;
        }
        for pick in &wire.reference.picks {
            let Pick::Named { name, value, text } = pick else { continue };
            if self.unreadable.axes.contains(name) {
                return None;
            }
            let Some(axis) = self.axes.iter().position(|axis| axis.name == *name) else { continue };
            let depends = candidates.iter().any(|(assignment, _)| assignment.get(axis).is_some());
            let wanted = find_value(&self.axes[axis].values, value);
            candidates.retain(|(assignment, _)| wanted.is_some() && assignment.get(axis) == wanted);
            if candidates.is_empty() {
                if !self.is_uncertain[producer] {
                    let stage = &wire.reference.stage;
                    let message = if depends {
                        format!("`{stage}` has no instance with `{name}={text}`")
                    } else {
                        format!("`{stage}` does not depend on `{name}`")
                    };
                    let help = format!("there is {}", self.labels(producer));
                    self.problems.error(Problem::new("unknown-instance", message).at(wire.span).help(help));
                }
                return None;
            }
            for (assignment, _) in &mut candidates {
                *assignment = assignment.clone().with(axis, None);
            }
        }
        Some(candidates)
    }

    fn labels(&self, stage: usize) -> String {
        const SHOWN: usize = 12;
        let drafts = &self.of_stage[stage];
        let mut labels: Vec<String> =
            drafts.iter().take(SHOWN).map(|&draft| format!("`{}`", self.label(draft))).collect();
        if drafts.len() > SHOWN {
            labels.push(format!("{} more", drafts.len() - SHOWN));
        }
        labels.join(", ")
    }

    fn label(&self, draft: usize) -> String {
        let draft = &self.drafts[draft];
        label(&self.stages[draft.stage].table.name, draft.assignment.values(self.axes))
    }

    /// Works out what an instance produces, or returns nothing if that cannot be known.
    fn outcome(&mut self, draft: &Draft) -> Option<Outcome> {
        let stages = self.stages;
        let variant: &'a Variant = &stages[draft.stage].variants[draft.variant];
        let ports = variant.kind.map(StageKind::ports);
        let mut outcome: Option<Outcome> = None;
        let mut is_sound = true;
        for (body_idx, body) in variant.bodies.iter().enumerate() {
            let plugged = self.plug(draft, variant, body, &draft.targets[body_idx]);
            let (Some(mut plugged), Some(ports)) = (plugged, &ports) else {
                is_sound = false;
                continue;
            };
            // Kinds see their inputs in the order of their ports, however `from` orders them.
            plugged.sort_by_key(|plugged| {
                ports.named.iter().position(|port| port.name == plugged.connection.port).unwrap_or(usize::MAX)
            });
            let Some((content, units)) = self.ask(variant, body, ports, &plugged) else {
                is_sound = false;
                continue;
            };
            let edges = plugged.iter().map(|plugged| Edge {
                port: plugged.connection.port.clone(),
                from: plugged.from,
                member: plugged.member.clone(),
            });
            let outcome = outcome.get_or_insert_with(|| Outcome {
                content,
                members: None,
                member_label: None,
                units: Vec::new(),
                inputs: Vec::new(),
            });
            for edge in edges {
                if !outcome.inputs.contains(&edge) {
                    outcome.inputs.push(edge);
                }
            }
            if outcome.content != content {
                let member = body.member.as_deref().unwrap_or_default();
                let (theirs, given) = (with_article(outcome.content), with_article(content));
                let message = format!("member `{member}` gives {given}, the first member gives {theirs}");
                self.problems.error(Problem::new("bad-each", message).at(variant.from_span));
                is_sound = false;
            }
            for unit in units {
                match self.planned(body, body_idx, unit, &plugged, &outcome.units) {
                    Ok(unit) => outcome.units.push(unit),
                    Err(message) => {
                        self.problems.error(Problem::new("broken-kind", message).at(variant.kind_span));
                        is_sound = false;
                    }
                }
            }
        }
        let mut outcome = outcome.filter(|_| is_sound)?;
        let members: Vec<Option<String>> =
            outcome.results().map(|unit| outcome.units[unit].member.clone()).collect();
        if !matches!(&members[..], [None]) {
            outcome.members = Some(members.into_iter().map(Option::unwrap_or_default).collect());
        }
        outcome.member_label = variant.each_name.clone().or_else(|| self.inherited_label(&outcome));
        Some(outcome)
    }

    /// A collection whose members are those of an input calls them what the input does.
    fn inherited_label(&self, outcome: &Outcome) -> Option<String> {
        outcome.members.as_ref()?;
        let producers = outcome.inputs.iter().filter_map(|edge| self.drafts[edge.from].outcome.as_ref());
        producers
            .filter(|producer| producer.members == outcome.members)
            .find_map(|producer| producer.member_label.clone())
    }

    /// Checks what is at the other end of every wire of a body.
    fn plug(
        &mut self,
        draft: &Draft,
        variant: &Variant,
        body: &Body,
        targets: &[Option<usize>],
    ) -> Option<Vec<Plugged>> {
        let consumer = self.stages[draft.stage].table;
        let mut plugged = Vec::with_capacity(body.wires.len());
        for (wire, target) in body.wires.iter().zip(targets) {
            let Some((from, outcome)) =
                target.and_then(|from| Some((from, self.drafts[from].outcome.as_ref()?)))
            else {
                continue;
            };
            match plug(consumer, variant, body, wire, self.axes, from, outcome) {
                Ok(fits) => plugged.push(fits),
                Err(problem) => self.problems.error(problem.at(wire.span)),
            }
        }
        (plugged.len() == body.wires.len() && !body.is_miswired).then_some(plugged)
    }

    /// Asks the stage what it produces from these inputs, and in which units.
    fn ask(
        &mut self,
        variant: &Variant,
        body: &Body,
        ports: &Ports,
        plugged: &[Plugged],
    ) -> Option<(Content, Vec<Unit>)> {
        let stage = body.stage.as_ref()?;
        let connections: Vec<Connection> = plugged.iter().map(|plugged| plugged.connection.clone()).collect();
        let answer =
            stage.output(&connections).and_then(|content| Ok((content, stage.units(&connections, ports)?)));
        match answer {
            Ok((_, units)) if body.member.is_some() && units.len() != 1 => {
                let message = "`each` needs a stage that produces one artifact per member";
                let produced: Vec<&str> = units.iter().filter_map(|unit| unit.member.as_deref()).collect();
                let mut problem = Problem::new("each-units", message).at(variant.from_span);
                problem.help =
                    Some(format!("each member would produce {}: {}", units.len(), produced.join(", ")));
                self.problems.error(problem);
                None
            }
            Ok(answer) => Some(answer),
            Err(problem) => {
                let span = problem.span.unwrap_or(variant.from_span);
                self.problems.error(problem.at(span));
                None
            }
        }
    }

    /// Ties what a unit takes to the instances at the other ends, or to parts among the units before it.
    fn planned(
        &self,
        body: &Body,
        body_idx: usize,
        unit: Unit,
        plugged: &[Plugged],
        before: &[PlannedUnit],
    ) -> Result<PlannedUnit, String> {
        let resolve = |take: &Take| {
            let is_part =
                |unit: &PlannedUnit| unit.body == body_idx && unit.unit.part == Some(take.port.as_str());
            if let Some(part) = before.iter().position(is_part) {
                // The instance that is being put together comes next.
                let from = self.drafts.len();
                return Ok(ResolvedTake { port: take.port.clone(), from, member: None, units: vec![part] });
            }
            let plugged = plugged
                .iter()
                .find(|plugged| plugged.connection.port == take.port)
                .ok_or_else(|| format!("a unit takes from port `{}`, which is not connected", take.port))?;
            let member = plugged.member.clone().or_else(|| take.member.clone());
            let producer = self.drafts[plugged.from]
                .outcome
                .as_ref()
                .expect("only instances with an outcome are plugged in");
            let units: Vec<usize> = match &member {
                None => producer.results().collect(),
                Some(name) => {
                    let is_named = |unit: &PlannedUnit| unit.member.as_ref() == Some(name);
                    let index = producer.units.iter().position(is_named);
                    vec![index.ok_or_else(|| {
                        format!("a unit takes member `{name}` of port `{}`, which has none", take.port)
                    })?]
                }
            };
            Ok(ResolvedTake { port: take.port.clone(), from: plugged.from, member, units })
        };
        let takes = unit.takes.iter().map(resolve).collect::<Result<Vec<_>, String>>()?;
        let member = body.member.clone().or_else(|| unit.member.clone());
        Ok(PlannedUnit { member, body: body_idx, unit, takes })
    }

    fn finish(self) -> Option<Vec<Instance>> {
        let mut instances = Vec::with_capacity(self.drafts.len());
        for draft in self.drafts {
            let stage = &self.stages[draft.stage];
            let variant = &stage.variants[draft.variant];
            let values = || draft.assignment.values(self.axes);
            let bodies =
                variant.bodies.iter().map(|body| body.stage.clone()).collect::<Option<Vec<Arc<_>>>>();
            let (Some(kind), Some(outcome), Some(bodies)) = (variant.kind, draft.outcome, bodies) else {
                let message = format!("stage `{}` could not be resolved", stage.table.name);
                self.problems.error(Problem::new("broken-kind", message).at(variant.kind_span));
                return None;
            };
            instances.push(Instance {
                label: label(&stage.table.name, values()),
                stage: stage.table.name.clone(),
                kind,
                vars: to_vars(values()),
                bodies,
                addresses: variant.bodies.iter().map(|body| body.addresses.clone()).collect(),
                content: outcome.content,
                members: outcome.members,
                units: outcome.units,
                inputs: outcome.inputs,
                kind_span: variant.kind_span,
                choices: values().map(|(name, value)| (name.to_owned(), value.clone())).collect(),
                member_label: outcome.member_label,
            });
        }
        Some(instances)
    }
}

fn with(mut targets: Vec<Option<usize>>, target: Option<usize>) -> Vec<Option<usize>> {
    targets.push(target);
    targets
}
