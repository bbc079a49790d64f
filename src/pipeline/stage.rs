//! One stage's table, read once per combination of the swept variables that it uses itself: substituted, split into `each`
//! members, its kind found, its inputs named, its parameters parsed.
//!
//! Nothing here looks at other stages, so a stage's own mistakes are reported whatever is wrong elsewhere.

use super::document::StageTable;
use super::problems::Problems;
use super::reference::StageReference;
use super::sweep::Assignment;
use super::text::is_name;
use super::vars::{Budget, Environment, Scope, Substitution, Variables};
use merganser_stages::params::{
    Entry, Node, NodeValue, Params, ParseContext, Problem, Span, Table, closest, did_you_mean,
};
use merganser_stages::{Port, Ports, Stage, StageKind};
use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

/// A stage under one assignment of the axes that its table uses.
pub(super) struct Variant {
    pub(super) assignment: Assignment,
    pub(super) kind: Option<&'static dyn StageKind>,
    pub(super) kind_span: Span,
    /// Where problems with the inputs as a whole point to: `from`, or the kind if there is none.
    pub(super) from_span: Span,
    pub(super) each_name: Option<String>,
    /// One, or one per member of `each`.
    pub(super) bodies: Vec<Body>,
}

/// A stage's table with everything substituted.
pub(super) struct Body {
    /// The member of `each` that it is for.
    pub(super) member: Option<String>,
    pub(super) wires: Vec<Wire>,
    /// The parsed parameters, unless there were mistakes in them.
    pub(super) stage: Option<Arc<dyn Stage>>,
    /// The addresses of files that it reads.
    pub(super) addresses: BTreeSet<String>,
    /// Whether an input is missing or was mistaken; it has been reported.
    pub(super) is_miswired: bool,
}

/// One connected port.
#[derive(Clone)]
pub(super) struct Wire {
    pub(super) port: String,
    /// `None` if the kind is unknown, so that only the stage can be checked.
    pub(super) accepts: Option<&'static Port>,
    pub(super) reference: StageReference,
    pub(super) span: Span,
}

/// A member of `each`.
struct Member {
    name: String,
    /// What the bound name stands for: the name, or the integer that it was written as.
    value: NodeValue,
}

/// A stage's table without `kind` and `each`, and with values in place of references.
struct Substituted {
    table: Table,
    /// The keys that are left out because a reference in them is broken.
    broken: Vec<String>,
}

impl Substituted {
    fn lacks(&self, key: &str) -> bool {
        self.broken.iter().any(|broken| broken == key)
    }
}

/// What reading a stage needs beside its table.
pub(super) struct StageReader<'a> {
    pub(super) kinds: &'a [&'static dyn StageKind],
    pub(super) variables: &'a Variables,
    pub(super) context: &'a ParseContext,
    pub(super) budget: &'a mut Budget,
    pub(super) problems: &'a mut Problems,
}

/// Returns the name that the table's `each` binds, however broken the rest is.
pub(super) fn bound_name(table: &Table) -> Option<&str> {
    let each = table.get("each")?.node.as_table()?;
    each.keys().next().map(String::as_str)
}

impl StageReader<'_> {
    /// Reads the table under one assignment.
    pub(super) fn read(
        &mut self,
        stage: &StageTable,
        assignment: &Assignment,
        environment: &Environment,
    ) -> Variant {
        let (kind, kind_span) = self.kind(stage, environment);
        let from_span = stage.table.get("from").map_or(kind_span, |entry| entry.node.span);
        let each_name = bound_name(&stage.table).map(str::to_owned);
        let members: Vec<Option<Member>> = match stage.table.get("each") {
            None => vec![None],
            // Without its members the rest of the table can still be looked at, once.
            Some(each) => self
                .members(&each.node, environment)
                .map_or_else(|| vec![None], |members| members.into_iter().map(Some).collect()),
        };
        let mut bodies = Vec::new();
        for member in members {
            let is_each_broken = stage.table.contains_key("each") && member.is_none();
            let bound = each_name.as_deref().map(|name| (name, member.as_ref().map(|member| &member.value)));
            let substituted = self.substitute(&stage.table, environment, bound);
            let (wires, is_wired) = if substituted.lacks("from") {
                (Vec::new(), false)
            } else {
                self.wires(stage, kind, kind_span, substituted.table.get("from"))
            };
            let parsed = kind.and_then(|kind| self.parse(kind, kind_span, substituted));
            let member = member.map(|member| member.name);
            let addresses = self.context.take_addresses();
            let is_miswired = !is_wired || is_each_broken;
            bodies.push(Body { member, wires, stage: parsed, addresses, is_miswired });
        }
        Variant { assignment: assignment.clone(), kind, kind_span, from_span, each_name, bodies }
    }

    fn kind(
        &mut self,
        stage: &StageTable,
        environment: &Environment,
    ) -> (Option<&'static dyn StageKind>, Span) {
        let ids = || self.kinds.iter().map(|kind| kind.id());
        let Some(entry) = stage.table.get("kind") else {
            let known: Vec<String> = ids().map(|id| format!("`{id}`")).collect();
            let message = format!("stage `{}` has no `kind`", stage.name);
            let help = format!("the kinds are {}", known.join(", "));
            self.problems.error(Problem::new("missing-key", message).at(stage.name_span).help(help));
            return (None, stage.name_span);
        };
        let span = entry.node.span;
        let scope = Scope { variables: self.variables, environment, bound: None };
        let mut substitution = Substitution::new(scope, self.budget, self.problems);
        let node = substitution.node(&entry.node);
        if substitution.is_broken {
            return (None, span);
        }
        let Some(id) = node.as_str() else {
            let message = format!("`kind` must be a string, got {}", node.type_name());
            self.problems.error(Problem::new("wrong-type", message).at(span));
            return (None, span);
        };
        let kind = self.kinds.iter().copied().find(|kind| kind.id() == id);
        if kind.is_none() {
            let mut problem = Problem::new("unknown-kind", format!("unknown kind `{id}`")).at(span);
            problem.help = did_you_mean(id, self.kinds.iter().map(|kind| kind.id()));
            self.problems.error(problem);
        }
        (kind, span)
    }

    /// Reads `each = { name = [...] }`: the name that it binds and the members with the values that it is bound to.
    fn members(&mut self, each: &Node, environment: &Environment) -> Option<Vec<Member>> {
        let mut fail = |problem: Problem| {
            self.problems.error(problem.help("write `each = { task = [\"a\", \"b\"] }`"));
            None
        };
        let Some(table) = each.as_table() else {
            let message = format!("`each` must be a table, got {}", each.type_name());
            return fail(Problem::new("bad-each", message).at(each.span));
        };
        let mut entries = table.iter();
        let (Some((name, entry)), None) = (entries.next(), entries.next()) else {
            return fail(
                Problem::new("bad-each", format!("`each` must bind one name, got {}", table.len()))
                    .at(each.span),
            );
        };
        if !is_name(name) {
            return fail(
                Problem::new("bad-name", format!("`{name}` cannot be the name of a variable"))
                    .at(entry.key_span),
            );
        }
        if self.variables.definition(name).is_some() {
            let message = format!("`each` binds `{name}`, which is a variable already");
            let problem = Problem::new("shadowed-variable", message).at(entry.key_span);
            self.problems.error(problem.help("give one of them another name"));
            return None;
        }
        let scope = Scope { variables: self.variables, environment, bound: None };
        let mut substitution = Substitution::new(scope, self.budget, self.problems);
        let node = substitution.node(&entry.node);
        if substitution.is_broken {
            return None;
        }
        let type_name = node.type_name();
        let span = node.span;
        let NodeValue::Array(items) = node.value else {
            let message = format!("`each` needs an array of names, got {type_name}");
            self.problems.error(Problem::new("bad-each", message).at(span));
            return None;
        };
        if items.is_empty() {
            self.problems.error(Problem::new("bad-each", "`each` has no members").at(span));
            return None;
        }
        let mut members: Vec<Member> = Vec::new();
        let mut seen = HashSet::new();
        let mut is_sound = true;
        for item in items {
            let name = match &item.value {
                NodeValue::String(text) if !text.is_empty() => text.clone(),
                NodeValue::Integer(value) => value.to_string(),
                NodeValue::String(_) => String::new(),
                _ => {
                    let message = format!("a member's name must be a string, got {}", item.type_name());
                    self.problems.error(Problem::new("bad-each", message).at(item.span));
                    is_sound = false;
                    continue;
                }
            };
            if name.is_empty() || name.chars().any(char::is_control) {
                self.problems
                    .error(Problem::new("bad-each", "a member's name must be readable text").at(item.span));
                is_sound = false;
            } else if !seen.insert(name.clone()) {
                self.problems.error(
                    Problem::new("bad-each", format!("member `{name}` is listed twice")).at(item.span),
                );
                is_sound = false;
            }
            members.push(Member { name, value: item.value });
        }
        is_sound.then_some(members)
    }

    fn substitute(
        &mut self,
        table: &Table,
        environment: &Environment,
        bound: Option<(&str, Option<&NodeValue>)>,
    ) -> Substituted {
        let scope = Scope { variables: self.variables, environment, bound };
        let mut substituted = Substituted { table: Table::with_capacity(table.len()), broken: Vec::new() };
        for (key, entry) in table.iter().filter(|(key, _)| !matches!(key.as_str(), "kind" | "each")) {
            let mut substitution = Substitution::new(scope, self.budget, self.problems);
            let node = substitution.node(&entry.node);
            if substitution.is_broken {
                substituted.broken.push(key.clone());
            } else {
                substituted.table.insert(key.clone(), Entry { key_span: entry.key_span, node });
            }
        }
        substituted
    }

    fn parse(
        &mut self,
        kind: &'static dyn StageKind,
        kind_span: Span,
        substituted: Substituted,
    ) -> Option<Arc<dyn Stage>> {
        let Substituted { mut table, broken } = substituted;
        table.shift_remove("from");
        match kind.parse(Params { span: kind_span, table, context: self.context }) {
            Ok(stage) => broken.is_empty().then(|| Arc::from(stage)),
            Err(problems) => {
                // A key that could not be substituted is not missing.
                let is_consequence = |problem: &Problem| {
                    problem.code == "missing-key"
                        && broken.iter().any(|key| problem.message.contains(&format!("`{key}`")))
                };
                for problem in problems.into_iter().filter(|problem| !is_consequence(problem)) {
                    let span = problem.span.unwrap_or(kind_span);
                    self.problems.error(problem.at(span));
                }
                None
            }
        }
    }

    /// Reads `from`. Returns the wires that could be read, and whether they are all that the kind needs.
    fn wires(
        &mut self,
        stage: &StageTable,
        kind: Option<&'static dyn StageKind>,
        kind_span: Span,
        from: Option<&Entry>,
    ) -> (Vec<Wire>, bool) {
        let ports = kind.map(StageKind::ports);
        let mut wires = Vec::new();
        let mut is_sound = true;
        let has_no_ports = ports.as_ref().is_some_and(|ports| ports.named.is_empty() && ports.open.is_none());
        if let (true, Some(kind), Some(from)) = (has_no_ports, kind, from) {
            let message = format!("`{}` takes no inputs", kind.id());
            self.problems.error(Problem::new("no-ports", message).at(from.key_span));
            return (wires, false);
        }
        match from.map(|from| (&from.node, &from.node.value)) {
            None => {}
            Some((node, NodeValue::String(text))) => {
                let port = ports.as_ref().map(sole_port);
                if let (Some(None), Some(ports), Some(kind)) = (&port, &ports, kind) {
                    let message = format!("`{}` has several ports, `from` must say which", kind.id());
                    self.problems
                        .error(Problem::new("ambiguous-from", message).at(node.span).help(example(ports)));
                    return (wires, false);
                }
                let accepts = port.flatten();
                let port = accepts.map_or("", |port| port.name);
                is_sound &= self.wire(stage, port, accepts, text, node.span, &mut wires);
            }
            Some((_, NodeValue::Table(table))) => {
                for (name, entry) in table {
                    let accepts = ports.as_ref().and_then(|ports| ports.find(name));
                    if let (None, Some(ports), Some(kind)) = (accepts, &ports, kind) {
                        let message = format!("`{}` has no port `{name}`", kind.id());
                        let mut problem = Problem::new("unknown-port", message).at(entry.key_span);
                        problem.help = did_you_mean(name, ports.named.iter().map(|port| port.name));
                        self.problems.error(problem);
                        is_sound = false;
                        continue;
                    }
                    let Some(text) = entry.node.as_str() else {
                        let message =
                            format!("port `{name}` must name a stage, got {}", entry.node.type_name());
                        self.problems.error(Problem::new("wrong-type", message).at(entry.node.span));
                        is_sound = false;
                        // Mentioned all the same: it is not missing.
                        continue;
                    };
                    is_sound &= self.wire(stage, name, accepts, text, entry.node.span, &mut wires);
                }
            }
            Some((node, _)) => {
                let message =
                    format!("`from` must name a stage or map ports to stages, got {}", node.type_name());
                let mut problem = Problem::new("wrong-type", message).at(node.span);
                problem.help = ports.as_ref().map(example);
                self.problems.error(problem);
                return (wires, false);
            }
        }
        if let Some(ports) = &ports {
            let names = || ports.named.iter().map(|port| port.name);
            let mentioned: Vec<&str> = match from.map(|from| &from.node.value) {
                // A port that was meant but misspelt has been reported already.
                Some(NodeValue::Table(table)) => table
                    .keys()
                    .filter_map(|key| names().find(|name| name == key).or_else(|| closest(key, names())))
                    .collect(),
                Some(NodeValue::String(_)) => sole_port(ports).map(|port| port.name).into_iter().collect(),
                _ => Vec::new(),
            };
            let mut missing =
                ports.named.iter().filter(|port| port.required && !mentioned.contains(&port.name)).peekable();
            if missing.peek().is_some() {
                let names: Vec<String> = missing.map(|port| format!("`{}`", port.name)).collect();
                let plural = if names.len() == 1 { "port" } else { "ports" };
                let message =
                    format!("stage `{}` needs something on {plural} {}", stage.name, names.join(", "));
                let span = from.map_or(kind_span, |from| from.node.span);
                self.problems.error(Problem::new("missing-port", message).at(span).help(example(ports)));
                is_sound = false;
            }
        }
        (wires, is_sound)
    }

    fn wire(
        &mut self,
        stage: &StageTable,
        port: &str,
        accepts: Option<&'static Port>,
        text: &str,
        span: Span,
        wires: &mut Vec<Wire>,
    ) -> bool {
        let reference = match StageReference::parse(text) {
            Ok(reference) => reference,
            Err(reason) => {
                let help = "write `stage`, `stage[bits=3]` or `stage[member]`";
                self.problems.error(Problem::new("bad-stage-name", reason).at(span).help(help));
                return false;
            }
        };
        if reference.stage == stage.name {
            let message = format!("stage `{}` takes its own output", stage.name);
            self.problems.error(Problem::new("self-reference", message).at(span));
            return false;
        }
        wires.push(Wire { port: port.to_owned(), accepts, reference, span });
        true
    }
}

/// The port that `from = "stage"` connects to.
fn sole_port(ports: &Ports) -> Option<&'static Port> {
    ports.sole().or(match (ports.named, ports.open) {
        ([only], None) => Some(only),
        _ => None,
    })
}

fn example(ports: &Ports) -> String {
    if let Some(port) = sole_port(ports) {
        return format!("write `from = \"STAGE\"` for `{}`", port.name);
    }
    let required: Vec<&str> = ports.named.iter().filter(|port| port.required).map(|port| port.name).collect();
    let names =
        if required.is_empty() { ports.named.iter().map(|port| port.name).collect() } else { required };
    let names = if names.is_empty() { vec!["NAME"] } else { names };
    let entries: Vec<String> = names.iter().map(|name| format!("{name} = \"STAGE\"")).collect();
    format!("write `from = {{ {} }}`", entries.join(", "))
}
