//! A method's parameters, tensor by tensor: `rules` (first match wins) and gradients over depth.
//!
//! A rule repeats those parameters that are different for the tensors it matches. A list of numbers where a parameter is one number is a
//! gradient, as in mergekit: its values are spread evenly from the first layer to the last and interpolated between. Whatever looks at many
//! tensors at once (a global threshold) looks at those that share a rule and, under a gradient, a depth.

use super::layers;
use super::method::{Merge, Method};
use crate::StageError;
use crate::filter::NameGlob;
use crate::params::{Entry, Node, NodeValue, Params, ParseContext, Problem, Span, Table};
use merganser_cache::Value;
use schemars::Schema;
use std::collections::BTreeMap;

/// The key that holds the rules.
const RULES: &str = "rules";

/// A set of parameters, and the positions of the tensors that it is for.
pub(super) type Group = (Box<dyn Merge>, Vec<usize>);

pub(super) struct Variants {
    pub(super) method: &'static dyn Method,
    /// In the order of the file.
    rules: Vec<(NameGlob, Case)>,
    default: Case,
}

/// One set of parameters.
struct Case {
    span: Span,
    table: Table,
    context: ParseContext,
    /// Values of the parameters that change over depth.
    gradients: BTreeMap<String, Vec<f64>>,
    /// The parameters at depth 0.
    first: Box<dyn Merge>,
}

impl Variants {
    /// Parses the parameters, and those of each rule with the default's for what the rule leaves out; reports every mistake.
    pub(super) fn parse(method: &'static dyn Method, mut params: Params<'_>) -> Result<Self, Vec<Problem>> {
        let rules = params.split_off(&[RULES]).table.shift_remove(RULES);
        let mut problems = Vec::new();
        let mut parsed_rules = Vec::new();
        let nodes = rules.as_ref().map_or(Ok(&[][..]), rules_of).unwrap_or_else(|problem| {
            problems.push(problem);
            &[]
        });
        for node in nodes {
            match parse_rule(method, &params, node) {
                Ok(rule) => parsed_rules.push(rule),
                Err(found) => problems.extend(found),
            }
        }
        match Case::parse(method, &params) {
            Ok(default) if problems.is_empty() => Ok(Self { method, rules: parsed_rules, default }),
            Ok(_) => Err(problems),
            Err(mut found) => {
                // What is wrong with the default is wrong with every rule that keeps it: say it once.
                problems.retain(|problem| !found.contains(problem));
                found.extend(problems);
                Err(found)
            }
        }
    }

    /// The parameters of tensors that no rule matches.
    pub(super) fn default(&self) -> &dyn Merge {
        &*self.default.first
    }

    /// Whether some tensors have other parameters than others.
    pub(super) fn vary(&self) -> bool {
        !self.rules.is_empty() || !self.default.gradients.is_empty()
    }

    /// All parsed sets of parameters, the default's first.
    pub(super) fn all(&self) -> impl Iterator<Item = &dyn Merge> {
        std::iter::once(self.default()).chain(self.rules.iter().map(|(_, case)| &*case.first))
    }

    /// What enters the key.
    pub(super) fn parameters(&self) -> Result<Value, StageError> {
        let Value::Map(mut map) = self.default.parameters()? else {
            return Err(StageError::Internal("parameters are not a map".to_owned()));
        };
        if !self.rules.is_empty() {
            let rules = self.rules.iter().map(|(glob, case)| {
                let name = Value::Text(glob.pattern().to_owned());
                Ok(Value::Map(
                    [("match".to_owned(), name), ("parameters".to_owned(), case.parameters()?)].into(),
                ))
            });
            map.insert(RULES.to_owned(), Value::List(rules.collect::<Result<_, StageError>>()?));
        }
        Ok(Value::Map(map))
    }

    /// Groups tensors by their parameters: for each group, the parameters and the positions in `names`.
    pub(super) fn assign(&self, names: &[&str], n_layers: usize) -> Result<Vec<Group>, StageError> {
        let mut groups: BTreeMap<(usize, u64), Vec<usize>> = BTreeMap::new();
        for (index, name) in names.iter().enumerate() {
            let rule = self.rules.iter().position(|(glob, _)| glob.matches(name)).unwrap_or(self.rules.len());
            let depth =
                if self.case(rule).gradients.is_empty() { 0.0 } else { layers::depth(name, n_layers) };
            // not negative, so that the order of the bits is the order of the numbers
            groups.entry((rule, depth.to_bits())).or_default().push(index);
        }
        groups
            .into_iter()
            .map(|((rule, depth), members)| {
                Ok((self.case(rule).at(self.method, f64::from_bits(depth))?, members))
            })
            .collect()
    }

    fn case(&self, rule: usize) -> &Case {
        self.rules.get(rule).map_or(&self.default, |(_, case)| case)
    }

    /// Adds `rules` to the documentation of a method's own parameters, and says which of these may be gradients.
    pub(super) fn document(mut schema: Schema) -> Schema {
        if let Some(properties) = schema
            .ensure_object()
            .entry("properties")
            .or_insert_with(|| serde_json::json!({}))
            .as_object_mut()
        {
            properties.insert(
                RULES.to_owned(),
                serde_json::json!({
                    "type": "array",
                    "items": { "type": "object", "required": ["match"] },
                    "default": [],
                    "description": "Other parameters for some tensors, first match wins: `{ match = \"*.attn.*\", … }` with those that differ. \
                        Here and above, a list of numbers where one number is meant is a gradient over depth: `[0.2, 0.4]` goes from the first layer to the last."
                }),
            );
        }
        schema
    }
}

impl Case {
    fn parse(method: &'static dyn Method, params: &Params<'_>) -> Result<Self, Vec<Problem>> {
        let schema = method.schema();
        let mut gradients = BTreeMap::new();
        for (key, entry) in &params.table {
            if let (NodeValue::Array(items), Some(_)) = (&entry.node.value, number_type(&schema, key)) {
                let values: Option<Vec<f64>> = items.iter().map(number).collect();
                match values {
                    Some(values) if !values.is_empty() => drop(gradients.insert(key.clone(), values)),
                    _ => {
                        let message =
                            format!("a gradient of `{key}` must be a list of numbers, at least one");
                        return Err(vec![Problem::new("wrong-type", message).at(entry.node.span)]);
                    }
                }
            }
        }
        let case = |first| Self {
            span: params.span,
            table: params.table.clone(),
            context: params.context.clone(),
            gradients: gradients.clone(),
            first,
        };
        let longest = gradients.values().map(Vec::len).max().unwrap_or(1);
        let mut first = None;
        // Every value of a gradient must be one that the parameter may have.
        for step in 0..longest {
            let values = gradients.iter().map(|(key, values)| (key, values[step.min(values.len() - 1)]));
            let merge = method.parse(&Params {
                span: params.span,
                table: with_numbers(&params.table, values, &schema),
                context: params.context,
            })?;
            first.get_or_insert(merge);
        }
        Ok(case(first.ok_or_else(Vec::new)?))
    }

    /// The parameters at a depth.
    fn at(&self, method: &dyn Method, depth: f64) -> Result<Box<dyn Merge>, StageError> {
        let values = self.gradients.iter().map(|(key, points)| (key, layers::interpolate(points, depth)));
        let table = with_numbers(&self.table, values, &method.schema());
        method.parse(&Params { span: self.span, table, context: &self.context }).map_err(|problems| {
            let messages: Vec<String> = problems.into_iter().map(|problem| problem.message).collect();
            StageError::input(format!("at depth {depth}: {}", messages.join("; ")))
        })
    }

    fn parameters(&self) -> Result<Value, StageError> {
        let Value::Map(mut map) = self.first.parameters()? else {
            return Err(StageError::Internal("parameters are not a map".to_owned()));
        };
        for (key, values) in &self.gradients {
            map.insert(key.clone(), Value::List(values.iter().map(|value| Value::Float(*value)).collect()));
        }
        Ok(Value::Map(map))
    }
}

/// The tables of the list `rules`.
fn rules_of(entry: &Entry) -> Result<&[Node], Problem> {
    if let NodeValue::Array(items) = &entry.node.value {
        Ok(items)
    } else {
        let message = format!("`rules` must be a list of tables, got {}", entry.node.type_name());
        Err(Problem::new("wrong-type", message).at(entry.node.span))
    }
}

fn parse_rule(
    method: &'static dyn Method,
    default: &Params<'_>,
    node: &Node,
) -> Result<(NameGlob, Case), Vec<Problem>> {
    let wrong = |message: String| vec![Problem::new("wrong-type", message).at(node.span)];
    let Some(own) = node.as_table() else {
        return Err(wrong(format!("a rule must be a table, got {}", node.type_name())));
    };
    let Some(name) = own.get("match") else {
        return Err(vec![Problem::new("missing-key", "missing key `match`").at(node.span)]);
    };
    let Some(pattern) = name.node.as_str() else {
        return Err(wrong(format!("`match` must be a string, got {}", name.node.type_name())));
    };
    let glob = NameGlob::new(pattern).map_err(|error| {
        let message = format!("`{pattern}` is not a glob: {}", error.kind());
        vec![Problem::new("bad-value", message).at(name.node.span)]
    })?;
    let mut table = default.table.clone();
    table.extend(
        own.iter().filter(|(key, _)| *key != "match").map(|(key, entry)| (key.clone(), entry.clone())),
    );
    let case = Case::parse(method, &Params { span: node.span, table, context: default.context })?;
    if case.first.outcome() != method.parse(default).map_or(case.first.outcome(), |merge| merge.outcome()) {
        let message = "a rule cannot decide between one model and one model per task";
        return Err(vec![Problem::new("bad-value", message).at(node.span)]);
    }
    Ok((glob, case))
}

/// `number` or `integer`, if that is what a parameter is.
fn number_type<'a>(schema: &'a Schema, key: &str) -> Option<&'a str> {
    let kind = schema.get("properties")?.get(key)?.get("type")?;
    let kinds: Vec<&str> = match kind {
        serde_json::Value::Array(kinds) => kinds.iter().filter_map(serde_json::Value::as_str).collect(),
        kind => kind.as_str().into_iter().collect(),
    };
    kinds.into_iter().find(|kind| ["number", "integer"].contains(kind))
}

fn number(node: &Node) -> Option<f64> {
    match node.value {
        NodeValue::Integer(value) => Some(value as f64),
        NodeValue::Float(value) => Some(value),
        _ => None,
    }
}

/// The table with numbers in place of gradients.
fn with_numbers<'a>(
    table: &Table,
    values: impl Iterator<Item = (&'a String, f64)>,
    schema: &Schema,
) -> Table {
    let mut table = table.clone();
    for (key, value) in values {
        if let Some(entry) = table.get_mut(key) {
            entry.node.value = match number_type(schema, key) {
                Some("integer") => NodeValue::Integer(value.round() as i64),
                _ => NodeValue::Float(value),
            };
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::methods::task_arithmetic::TaskArithmetic;

    const SPAN: Span = Span { file: 0, start: 0, end: 0 };

    fn node(value: NodeValue) -> Node {
        Node { span: SPAN, value }
    }

    fn table(entries: Vec<(&str, NodeValue)>) -> Table {
        entries
            .into_iter()
            .map(|(key, value)| (key.to_owned(), Entry { key_span: SPAN, node: node(value) }))
            .collect()
    }

    fn numbers(values: &[f64]) -> NodeValue {
        NodeValue::Array(values.iter().map(|value| node(NodeValue::Float(*value))).collect())
    }

    fn parse(entries: Vec<(&str, NodeValue)>) -> Result<Variants, Vec<Problem>> {
        let context = ParseContext::default();
        Variants::parse(&TaskArithmetic, Params { span: SPAN, table: table(entries), context: &context })
    }

    fn rule(entries: Vec<(&str, NodeValue)>) -> NodeValue {
        NodeValue::Array(vec![node(NodeValue::Table(table(entries)))])
    }

    fn scale(merge: &dyn Merge) -> f64 {
        let Value::Map(map) = merge.parameters().unwrap() else { panic!("parameters are a map") };
        match map["scale"] {
            Value::Float(value) => value,
            _ => panic!("`scale` is a number"),
        }
    }

    #[test]
    fn a_rule_overrides_what_it_names_and_keeps_the_rest() {
        let rules =
            rule(vec![("match", NodeValue::String("*.attn.*".to_owned())), ("scale", NodeValue::Float(0.5))]);
        let variants = parse(vec![("scale", NodeValue::Float(0.3)), ("rules", rules)]).unwrap();
        let groups = variants.assign(&["blocks.0.attn.w", "blocks.0.mlp.w", "blocks.1.attn.w"], 2).unwrap();
        let found: Vec<(f64, Vec<usize>)> =
            groups.iter().map(|(merge, members)| (scale(&**merge), members.clone())).collect();
        assert_eq!(found, [(0.5, vec![0, 2]), (0.3, vec![1])]);
    }

    #[test]
    fn a_list_is_a_gradient_over_depth() {
        let variants = parse(vec![("scale", numbers(&[0.2, 0.4]))]).unwrap();
        let groups =
            variants.assign(&["embed.w", "blocks.0.w", "blocks.1.w", "blocks.2.w", "norm.w"], 3).unwrap();
        let found: Vec<(f64, Vec<usize>)> =
            groups.iter().map(|(merge, members)| (scale(&**merge), members.clone())).collect();
        assert_eq!(found.len(), 3);
        assert_eq!(found[0], (0.2, vec![0, 1]));
        assert!((found[1].0 - 0.3).abs() < 1e-12 && found[1].1 == [2]);
        assert_eq!(found[2], (0.4, vec![3, 4]));
    }

    #[test]
    fn parameters_without_rules_are_those_of_the_method() {
        let variants = parse(vec![("scale", NodeValue::Float(0.3))]).unwrap();
        assert_eq!(variants.parameters().unwrap(), variants.default().parameters().unwrap());
    }

    #[test]
    fn rules_and_gradients_enter_the_key() {
        let plain = parse(vec![("scale", NodeValue::Float(0.2))]).unwrap().parameters().unwrap();
        let gradient = parse(vec![("scale", numbers(&[0.2, 0.4]))]).unwrap().parameters().unwrap();
        let rules =
            rule(vec![("match", NodeValue::String("*.attn.*".to_owned())), ("scale", NodeValue::Float(0.5))]);
        let ruled =
            parse(vec![("scale", NodeValue::Float(0.2)), ("rules", rules)]).unwrap().parameters().unwrap();
        assert!(plain != gradient && plain != ruled && gradient != ruled);
    }

    #[test]
    fn mistakes_in_rules_are_reported_together() {
        let rules = NodeValue::Array(vec![
            node(NodeValue::Table(table(vec![("scale", NodeValue::Float(0.5))]))),
            node(NodeValue::Table(table(vec![
                ("match", NodeValue::String("*".to_owned())),
                ("scal", NodeValue::Float(0.5)),
            ]))),
            node(NodeValue::Integer(3)),
        ]);
        let problems = parse(vec![("rules", rules)]).err().unwrap();
        let codes: Vec<&str> = problems.iter().map(|problem| problem.code).collect();
        assert_eq!(codes, ["missing-key", "unknown-key", "wrong-type"]);
    }

    #[test]
    fn each_value_of_a_gradient_must_be_allowed() {
        let problems = parse(vec![("scale", numbers(&[0.2, f64::INFINITY]))]).err().unwrap();
        assert_eq!(problems[0].code, "bad-value");
        let mixed = NodeValue::Array(vec![node(NodeValue::Float(0.1)), node(NodeValue::Bool(true))]);
        assert_eq!(parse(vec![("scale", mixed)]).err().unwrap()[0].code, "wrong-type");
    }
}
