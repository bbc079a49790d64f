//! Whether a wire fits: what a port takes against what a stage gives, and which member of a collection is meant.

use super::document::StageTable;
use super::plan::{Edge, PlannedUnit};
use super::reference::Pick;
use super::stage::{Body, Variant, Wire};
use super::sweep::Axis;
use merganser_stages::params::{Problem, did_you_mean};
use merganser_stages::{Arity, Connection, Content};

/// What an instance produces.
pub(super) struct Outcome {
    pub(super) content: Content,
    pub(super) members: Option<Vec<String>>,
    pub(super) member_label: Option<String>,
    pub(super) units: Vec<PlannedUnit>,
    pub(super) inputs: Vec<Edge>,
}

impl Outcome {
    /// The units whose artifacts others see: all but those that only serve other units of the stage.
    pub(super) fn results(&self) -> impl Iterator<Item = usize> {
        (0..self.units.len()).filter(|unit| self.units[*unit].unit.part.is_none())
    }
}

/// A wire whose other end is known to fit.
pub(super) struct Plugged {
    pub(super) connection: Connection,
    pub(super) from: usize,
    /// Set when one member is taken.
    pub(super) member: Option<String>,
}

/// Checks that a wire fits what is at its other end, and finds the member that it takes of a collection.
pub(super) fn plug(
    consumer: &StageTable,
    variant: &Variant,
    body: &Body,
    wire: &Wire,
    axes: &[Axis],
    from: usize,
    outcome: &Outcome,
) -> Result<Plugged, Problem> {
    if let Some(port) = wire.accepts.filter(|port| !port.accepts.contains(&outcome.content)) {
        let taken: Vec<String> = port.accepts.iter().map(|&content| with_article(content)).collect();
        let (taken, given) = (taken.join(" or "), with_article(outcome.content));
        let (consumer, producer) = (&consumer.name, &wire.reference.stage);
        let message =
            format!("port `{}` of `{consumer}` takes {taken}, `{producer}` gives {given}", wire.port);
        return Err(Problem::new("wrong-content", message));
    }
    let member = match picked_member(wire, axes, outcome)? {
        Some(picked) => Some(picked),
        None => narrowed_member(variant, body, wire, outcome)?,
    };
    let members = if member.is_some() { None } else { outcome.members.clone() };
    let connection = Connection { port: wire.port.clone(), content: outcome.content, members };
    Ok(Plugged { connection, from, member })
}

/// Names a content as a sentence does.
pub(super) fn with_article(content: Content) -> String {
    match content {
        Content::Checkpoint => format!("a {}", content.label()),
        _ => content.label().to_owned(),
    }
}

/// Returns the member that the brackets of a reference name.
fn picked_member(wire: &Wire, axes: &[Axis], outcome: &Outcome) -> Result<Option<String>, Problem> {
    let producer = &wire.reference.stage;
    let mut picked: Option<String> = None;
    for pick in &wire.reference.picks {
        let member = match pick {
            Pick::Named { name, .. } if axes.iter().any(|axis| axis.name == *name) => continue,
            Pick::Named { name, text, .. } if outcome.member_label.as_ref() == Some(name) => text,
            Pick::Named { name, text, .. } => {
                let known = axes.iter().map(|axis| axis.name.as_str()).chain(outcome.member_label.as_deref());
                let mut problem = Problem::new(
                    "unknown-member",
                    format!("`{producer}` has nothing called `{name}` to choose by"),
                );
                problem.help = match &outcome.members {
                    Some(members) if members.contains(text) => {
                        Some(format!("for the member, write `{producer}[{text}]`"))
                    }
                    _ => did_you_mean(name, known),
                };
                return Err(problem);
            }
            Pick::Member(member) => member,
        };
        let Some(members) = &outcome.members else {
            let message = format!("`{producer}` is no collection and has no member `{member}`");
            return Err(Problem::new("unknown-member", message));
        };
        if !members.contains(member) {
            let mut problem =
                Problem::new("unknown-member", format!("`{producer}` has no member `{member}`"));
            problem.help = did_you_mean(member, members.iter().map(String::as_str));
            return Err(problem);
        }
        if picked.replace(member.clone()).is_some_and(|earlier| earlier != *member) {
            return Err(Problem::new(
                "bad-stage-name",
                format!("`{producer}` is asked for two members at once"),
            ));
        }
    }
    Ok(picked)
}

/// Returns the member of a connected collection that belongs to a member of `each`: the one of the same name.
///
/// A port that takes collections whole keeps one that has no member in common with `each`: its members are of another sort.
fn narrowed_member(
    variant: &Variant,
    body: &Body,
    wire: &Wire,
    outcome: &Outcome,
) -> Result<Option<String>, Problem> {
    let (Some(name), Some(members)) = (&body.member, &outcome.members) else { return Ok(None) };
    if members.contains(name) {
        return Ok(Some(name.clone()));
    }
    let shares_one =
        variant.bodies.iter().filter_map(|body| body.member.as_ref()).any(|other| members.contains(other));
    if wire.accepts.is_some_and(|port| port.arity == Arity::All) && !shares_one {
        return Ok(None);
    }
    let known: Vec<String> = members.iter().map(|member| format!("`{member}`")).collect();
    let problem = Problem::new(
        "unknown-member",
        format!("`{}` has no member `{name}` for that member of `each`", wire.reference.stage),
    );
    Err(problem.help(format!("it has {}", known.join(", "))))
}
