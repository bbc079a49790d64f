//! `${name}`: variables put into values, with their types kept.
//!
//! A string that is nothing but `${name}` becomes the variable's value, whatever its type, at the place of the reference. Anywhere
//! else the variable is spliced into the text, which only strings, numbers and booleans can be. `$${` stands for `${` itself.
//! Variables may use other variables. Keys are never substituted.
//!
//! What a few lines can expand to is bounded by a [`Budget`]: a file of a stranger must not exhaust memory.

use super::document::Definition;
use super::problems::Problems;
use super::sweep::{Assignment, Axis};
use super::text::write_float;
use indexmap::{IndexMap, IndexSet};
use merganser_stages::params::{Entry, Node, NodeValue, Problem, Span, Table, did_you_mean};
use petgraph::algo::{kosaraju_scc, toposort};
use petgraph::graph::{DiGraph, NodeIndex};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::rc::Rc;

/// A string taken apart.
#[derive(Debug, PartialEq)]
enum Piece<'a> {
    Text(&'a str),
    Reference(&'a str),
}

/// Takes a string apart, or says what is wrong with it.
fn pieces(text: &str) -> Result<Vec<Piece<'_>>, &'static str> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some(dollar) = rest.find("${") {
        if let Some(before) = rest[..dollar].strip_suffix('$') {
            pieces.push(Piece::Text(before));
            pieces.push(Piece::Text("${"));
            rest = &rest[dollar + 2..];
            continue;
        }
        if dollar > 0 {
            pieces.push(Piece::Text(&rest[..dollar]));
        }
        let inside = &rest[dollar + 2..];
        let Some(close) = inside.find('}') else { return Err("`${` is never closed") };
        let name = inside[..close].trim();
        if name.is_empty() {
            return Err("`${}` names no variable");
        }
        pieces.push(Piece::Reference(name));
        rest = &inside[close + 1..];
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(rest));
    }
    Ok(pieces)
}

/// Returns the names of the variables that a value refers to.
pub(super) fn mentions(node: &Node) -> Vec<String> {
    fn collect(node: &Node, names: &mut IndexSet<String>) {
        match &node.value {
            NodeValue::String(text) if text.contains("${") => {
                for piece in pieces(text).unwrap_or_default() {
                    if let Piece::Reference(name) = piece {
                        names.insert(name.to_owned());
                    }
                }
            }
            NodeValue::Array(items) => items.iter().for_each(|item| collect(item, names)),
            NodeValue::Table(table) => table.values().for_each(|entry| collect(&entry.node, names)),
            _ => {}
        }
    }
    let mut names = IndexSet::new();
    collect(node, &mut names);
    names.into_iter().collect()
}

/// How much more substitution may write, counted in values (32 bytes of text are one).
#[derive(Debug)]
pub(super) struct Budget(usize);

const MAX_VALUES: usize = 4 << 20;
/// Nesting that substitution may build; TOML itself stops at 80.
const MAX_DEPTH: usize = 160;

impl Default for Budget {
    fn default() -> Self {
        Self(MAX_VALUES)
    }
}

impl Budget {
    fn spend(&mut self, value: &NodeValue) -> bool {
        let cost = 1 + if let NodeValue::String(text) = value { text.len() / 32 } else { 0 };
        let is_left = self.0 >= cost;
        self.0 = self.0.saturating_sub(cost);
        is_left
    }
}

/// The variables of a pipeline: which are swept, which depend on which.
#[derive(Debug, Default)]
pub(super) struct Variables {
    definitions: IndexMap<String, Definition>,
    /// Which variables have the values of which axis.
    axis_of: HashMap<String, usize>,
    /// The axes that a variable's value depends on, by way of others too.
    axes: HashMap<String, BTreeSet<usize>>,
    /// Each variable after those that it uses; those in circles are left out.
    order: Vec<String>,
}

/// The values of the variables under one assignment.
#[derive(Debug, Default)]
pub(super) struct Environment {
    /// `None` for a variable whose own mistake has been reported.
    values: HashMap<String, Option<Rc<NodeValue>>>,
}

impl Variables {
    /// Orders the variables and reports those that use each other in a circle. Axes are given by name.
    pub(super) fn new(
        definitions: IndexMap<String, Definition>,
        axes: &[String],
        problems: &mut Problems,
    ) -> Self {
        let axis_of: HashMap<String, usize> = axes.iter().cloned().zip(0..).collect();
        let mut graph = DiGraph::<usize, ()>::new();
        let nodes: Vec<NodeIndex> = (0..definitions.len()).map(|index| graph.add_node(index)).collect();
        for (index, (name, definition)) in definitions.iter().enumerate() {
            if axis_of.contains_key(name) {
                continue;
            }
            for used in mentions(&definition.node) {
                if let Some(used) = definitions.get_index_of(&used) {
                    graph.update_edge(nodes[used], nodes[index], ());
                }
            }
        }
        let mut in_circles = HashSet::new();
        for component in kosaraju_scc(&graph) {
            let is_circle = component.len() > 1 || graph.find_edge(component[0], component[0]).is_some();
            if !is_circle {
                continue;
            }
            let mut members: Vec<usize> = component.iter().map(|&node| graph[node]).collect();
            members.sort_unstable();
            let names: Vec<String> = members
                .iter()
                .filter_map(|&index| definitions.get_index(index))
                .map(|(name, _)| format!("`{name}`"))
                .collect();
            let message = match &names[..] {
                [one] => format!("variable {one} uses itself"),
                _ => format!("variables use each other in a circle: {}", names.join(", ")),
            };
            problems.error(Problem::new("variable-cycle", message).at(definitions[members[0]].node.span));
            in_circles.extend(members);
        }
        graph.retain_nodes(|graph, node| !in_circles.contains(&graph[node]));
        let order: Vec<usize> =
            toposort(&graph, None).unwrap_or_default().into_iter().map(|node| graph[node]).collect();
        let mut axes: HashMap<String, BTreeSet<usize>> = HashMap::new();
        for (name, definition) in order.iter().filter_map(|&index| definitions.get_index(index)) {
            let depends_on = match axis_of.get(name) {
                Some(&axis) => BTreeSet::from([axis]),
                None => mentions(&definition.node)
                    .iter()
                    .filter_map(|used| axes.get(used))
                    .flatten()
                    .copied()
                    .collect(),
            };
            axes.insert(name.clone(), depends_on);
        }
        let order = order.iter().filter_map(|&index| Some(definitions.get_index(index)?.0.clone())).collect();
        Self { definitions, axis_of, axes, order }
    }

    pub(super) fn definition(&self, name: &str) -> Option<&Definition> {
        self.definitions.get(name)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> + Clone {
        self.definitions.keys().map(String::as_str)
    }

    /// Returns the axes that values using these variables depend on.
    pub(super) fn axes_of<'a>(&self, names: impl Iterator<Item = &'a String>) -> BTreeSet<usize> {
        names.filter_map(|name| self.axes.get(name)).flatten().copied().collect()
    }

    /// Computes the values under an assignment. Variables that depend on an axis without a value there are left out.
    pub(super) fn environment(
        &self,
        assignment: &Assignment,
        axes: &[Axis],
        budget: &mut Budget,
        problems: &mut Problems,
    ) -> Environment {
        let mut environment = Environment::default();
        for name in self.definitions.keys().filter(|name| !self.axes.contains_key(*name)) {
            environment.values.insert(name.clone(), None);
        }
        for name in &self.order {
            if self.axes[name].iter().any(|&axis| assignment.get(axis).is_none()) {
                continue;
            }
            let value = if let Some(&axis) = self.axis_of.get(name) {
                assignment.get(axis).map(|value| Rc::new(axes[axis].values[value].clone()))
            } else {
                let scope = Scope { variables: self, environment: &environment, bound: None };
                let mut substitution = Substitution::new(scope, budget, problems);
                let value = substitution.node(&self.definitions[name].node).value;
                (!substitution.is_broken).then(|| Rc::new(value))
            };
            environment.values.insert(name.clone(), value);
        }
        environment
    }

    /// Warns of variables that nothing uses, given those that stages and sweeps mention.
    pub(super) fn warn_of_unused(
        &self,
        mentioned: impl IntoIterator<Item = String>,
        problems: &mut Problems,
    ) {
        let mut used: HashSet<String> = HashSet::new();
        let mut open: Vec<String> = mentioned.into_iter().collect();
        while let Some(name) = open.pop() {
            let Some(definition) = self.definitions.get(&name) else { continue };
            if used.insert(name) {
                open.extend(definition.mentions.iter().cloned());
                open.extend(mentions(&definition.node));
            }
        }
        for (name, definition) in self.definitions.iter().filter(|(name, _)| !used.contains(*name)) {
            let message = if self.axis_of.contains_key(name) {
                format!("sweeping over `{name}` changes nothing: no stage uses it")
            } else {
                format!("variable `{name}` is never used")
            };
            problems.warning(Problem::new("unused-variable", message).at(definition.key_span));
        }
    }
}

/// Where names are looked up.
#[derive(Clone, Copy)]
pub(super) struct Scope<'a> {
    pub(super) variables: &'a Variables,
    pub(super) environment: &'a Environment,
    /// The name that `each` binds, with the member's value; no value if the members could not be read, which has been reported.
    pub(super) bound: Option<(&'a str, Option<&'a NodeValue>)>,
}

/// Puts values in place of references.
pub(super) struct Substitution<'a> {
    scope: Scope<'a>,
    budget: &'a mut Budget,
    problems: &'a mut Problems,
    depth: usize,
    /// Whether something could not be substituted; it has been reported, here or at the variable.
    pub(super) is_broken: bool,
}

impl<'a> Substitution<'a> {
    pub(super) fn new(scope: Scope<'a>, budget: &'a mut Budget, problems: &'a mut Problems) -> Self {
        Self { scope, budget, problems, depth: 0, is_broken: false }
    }

    pub(super) fn table(&mut self, table: &Table) -> Table {
        let entry = |(key, entry): (&String, &Entry)| {
            (key.clone(), Entry { key_span: entry.key_span, node: self.node(&entry.node) })
        };
        table.iter().map(entry).collect()
    }

    pub(super) fn node(&mut self, node: &Node) -> Node {
        if !self.admit(&node.value, node.span) {
            return Node { span: node.span, value: NodeValue::Bool(false) };
        }
        self.depth += 1;
        let value = match &node.value {
            NodeValue::String(text) if text.contains("${") => self.text(text, node.span),
            NodeValue::Array(items) => NodeValue::Array(items.iter().map(|item| self.node(item)).collect()),
            NodeValue::Table(table) => NodeValue::Table(self.table(table)),
            other => other.clone(),
        };
        self.depth -= 1;
        Node { span: node.span, value }
    }

    fn admit(&mut self, value: &NodeValue, span: Span) -> bool {
        let is_admitted = self.depth < MAX_DEPTH && self.budget.spend(value);
        if !is_admitted && !self.is_broken {
            self.fail(Problem::new("too-large", "the variables expand to more than fits in memory").at(span));
        }
        is_admitted
    }

    fn fail(&mut self, problem: Problem) {
        self.is_broken = true;
        self.problems.error(problem);
    }

    fn text(&mut self, text: &str, span: Span) -> NodeValue {
        let pieces = match pieces(text) {
            Ok(pieces) => pieces,
            Err(reason) => {
                let help = "to write `${` itself, double the dollar: `$${`";
                self.fail(Problem::new("bad-reference", reason).at(span).help(help));
                return NodeValue::String(String::new());
            }
        };
        if let [Piece::Reference(name)] = pieces[..] {
            return match self.value(name, span) {
                Some(value) => self.copy(&value, span),
                None => NodeValue::Bool(false),
            };
        }
        let mut out = String::new();
        for piece in pieces {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Reference(name) => {
                    let Some(value) = self.value(name, span) else { continue };
                    match value.as_ref() {
                        NodeValue::String(text) => out.push_str(text),
                        NodeValue::Integer(value) => out.push_str(&value.to_string()),
                        NodeValue::Float(value) => out.push_str(&write_float(*value)),
                        NodeValue::Bool(value) => out.push_str(&value.to_string()),
                        NodeValue::Array(_) | NodeValue::Table(_) => {
                            let what =
                                if matches!(*value, NodeValue::Array(_)) { "an array" } else { "a table" };
                            let message = format!("`{name}` is {what} and cannot be part of a text");
                            let help = format!("`\"${{{name}}}\"` alone becomes the whole value");
                            self.fail(Problem::new("not-text", message).at(span).help(help));
                        }
                    }
                }
            }
        }
        let value = NodeValue::String(out);
        if self.admit(&value, span) { value } else { NodeValue::Bool(false) }
    }

    fn value(&mut self, name: &str, span: Span) -> Option<Rc<NodeValue>> {
        if let Some((_, value)) = self.scope.bound.filter(|(bound, _)| *bound == name) {
            self.is_broken |= value.is_none();
            return value.cloned().map(Rc::new);
        }
        match self.scope.environment.values.get(name) {
            Some(Some(value)) => Some(Rc::clone(value)),
            Some(None) => {
                self.is_broken = true;
                None
            }
            None if self.scope.variables.definitions.contains_key(name) => {
                let message =
                    format!("`{name}` is swept or depends on what is swept, so it has no value here");
                self.fail(Problem::new("bad-sweep", message).at(span));
                None
            }
            None => {
                let names = self.scope.variables.names().chain(self.scope.bound.map(|(bound, _)| bound));
                let mut problem =
                    Problem::new("unknown-variable", format!("unknown variable `{name}`")).at(span);
                problem.help = did_you_mean(name, names);
                self.fail(problem);
                None
            }
        }
    }

    /// Copies a variable's value, as if all of it had been written at the reference.
    fn copy(&mut self, value: &NodeValue, span: Span) -> NodeValue {
        if !self.admit(value, span) {
            return NodeValue::Bool(false);
        }
        self.depth += 1;
        let copied = match value {
            NodeValue::Array(items) => NodeValue::Array(
                items.iter().map(|item| Node { span, value: self.copy(&item.value, span) }).collect(),
            ),
            NodeValue::Table(table) => NodeValue::Table(
                table
                    .iter()
                    .map(|(key, entry)| {
                        let node = Node { span, value: self.copy(&entry.node.value, span) };
                        (key.clone(), Entry { key_span: span, node })
                    })
                    .collect(),
            ),
            other => other.clone(),
        };
        self.depth -= 1;
        copied
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn takes_strings_apart() {
        use Piece::{Reference, Text};
        assert_eq!(pieces("a").unwrap(), [Text("a")]);
        assert_eq!(pieces("${x}").unwrap(), [Reference("x")]);
        assert_eq!(pieces("a${ x }b$c").unwrap(), [Text("a"), Reference("x"), Text("b$c")]);
        assert_eq!(pieces("$${x}").unwrap(), [Text(""), Text("${"), Text("x}")]);
        assert_eq!(pieces("$$").unwrap(), [Text("$$")]);
        assert!(pieces("a${x").is_err());
        assert!(pieces("${ }").is_err());
    }

    fn node(value: NodeValue) -> Node {
        Node { span: Span { file: 0, start: 0, end: 1 }, value }
    }

    fn string(text: &str) -> Node {
        node(NodeValue::String(text.to_owned()))
    }

    fn substitute(vars: &[(&str, Node)], target: &Node) -> Result<NodeValue, Vec<Problem>> {
        let definitions = vars
            .iter()
            .map(|(name, node)| {
                let definition =
                    Definition { key_span: node.span, node: node.clone(), mentions: mentions(node) };
                ((*name).to_owned(), definition)
            })
            .collect();
        let (mut problems, mut budget) = (Problems::default(), Budget::default());
        let variables = Variables::new(definitions, &[], &mut problems);
        let environment = variables.environment(&Assignment::none(0), &[], &mut budget, &mut problems);
        let scope = Scope { variables: &variables, environment: &environment, bound: None };
        let mut substitution = Substitution::new(scope, &mut budget, &mut problems);
        let value = substitution.node(target).value;
        if problems.has_errors() { Err(problems.into_errors()) } else { Ok(value) }
    }

    #[test]
    fn keeps_types_of_whole_references_and_splices_the_rest() {
        let list = node(NodeValue::Array(vec![node(NodeValue::Integer(1)), string("${n}")]));
        let vars = [
            ("n", node(NodeValue::Integer(4))),
            ("f", node(NodeValue::Float(0.5))),
            ("list", list),
            ("alias", string("${list}")),
        ];
        assert_eq!(substitute(&vars, &string("${n}")).unwrap(), NodeValue::Integer(4));
        assert_eq!(substitute(&vars, &string("n${n}-${f}")).unwrap(), NodeValue::String("n4-0.5".into()));
        assert_eq!(substitute(&vars, &string("$${n}")).unwrap(), NodeValue::String("${n}".into()));
        let NodeValue::Array(items) = substitute(&vars, &string("${alias}")).unwrap() else {
            panic!("an array stays one")
        };
        assert_eq!(items[1].value, NodeValue::Integer(4));
    }

    #[test]
    fn bounds_what_a_few_lines_expand_to() {
        let double = |name: &str| {
            node(NodeValue::Array(vec![string(&format!("${{{name}}}")), string(&format!("${{{name}}}"))]))
        };
        let names: Vec<String> = (0..40).map(|index| format!("v{index}")).collect();
        let mut vars = vec![(names[0].as_str(), string("x"))];
        vars.extend((1..40).map(|index| (names[index].as_str(), double(&names[index - 1]))));
        let problems = substitute(&vars, &string("${v39}")).unwrap_err();
        assert_eq!(problems[0].code, "too-large");
    }

    proptest! {
        #[test]
        fn leaves_text_without_references_alone(text in "[^$]*") {
            prop_assert_eq!(substitute(&[], &string(&text)).unwrap(), NodeValue::String(text));
        }

        #[test]
        fn substitutes_any_text(text in "[$\\{\\}a ]*") {
            let _ = substitute(&[("a", string("b"))], &string(&text));
        }
    }
}
