//! `post`: what happens to the merged matrices after any method that makes one checkpoint.
//!
//! `post = "svc"`, or a table with its parameters: `post = { method = "svc", floor = 1.0 }`.

use super::inputs::Operand;
use super::method::Rule;
use super::methods::svc::Correction;
use crate::StageError;
use crate::params::{Entry, Node, NodeValue, Params, Problem, Table, did_you_mean, parse, to_value};
use merganser_cache::{Blob, Staging, Value};
use merganser_tensors::{Result, Scratch};
use schemars::{Schema, schema_for};
use std::collections::BTreeMap;
use std::ops::Range;

const POST: &str = "post";

/// The steps that there are.
const STEPS: [&str; 1] = ["svc"];

/// What is done after the method, if anything.
#[derive(Debug, Default)]
pub(super) struct Post(Option<Correction>);

impl Post {
    /// Takes `post` out of a stage's table.
    pub(super) fn take(params: &mut Params<'_>) -> std::result::Result<Self, Vec<Problem>> {
        let mut taken = params.split_off(&[POST]);
        let Some(Entry { node, .. }) = taken.table.shift_remove(POST) else { return Ok(Self(None)) };
        let Node { span, value } = node;
        let (name, name_span, table) = match value {
            NodeValue::String(name) => (name, span, Table::new()),
            NodeValue::Table(mut table) => match table.shift_remove("method") {
                Some(Entry { node: Node { span, value: NodeValue::String(name) }, .. }) => {
                    (name, span, table)
                }
                Some(entry) => {
                    let message = "`method` must be a string";
                    return Err(vec![Problem::new("wrong-type", message).at(entry.node.span)]);
                }
                None => {
                    let message = "`post` lacks its `method`";
                    return Err(vec![Problem::new("missing-key", message).at(span)]);
                }
            },
            _ => {
                let message = "`post` must be the name of a step or a table with its `method`";
                return Err(vec![Problem::new("wrong-type", message).at(span)]);
            }
        };
        if !STEPS.contains(&name.as_str()) {
            let problem = Problem::new("unknown-method", format!("unknown step `{name}` in `post`"));
            return Err(vec![Problem {
                help: did_you_mean(&name, STEPS.into_iter()),
                ..problem.at(name_span)
            }]);
        }
        let own = Params { span, table, context: params.context };
        Ok(Self(Some(parse::<Correction>(&own)?)))
    }

    pub(super) fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// What enters the key; an empty map if there is no step.
    pub(super) fn parameters(&self) -> std::result::Result<Value, StageError> {
        let mut map = BTreeMap::new();
        if let Some(correction) = &self.0 {
            let step = Value::map([
                ("method", Value::Text(STEPS[0].to_owned())),
                ("parameters", to_value(correction)?),
            ]);
            map.insert(POST.to_owned(), step);
        }
        Ok(Value::Map(map))
    }

    /// The rule with the step after it.
    pub(super) fn after<'a>(&'a self, rule: Box<dyn Rule + 'a>) -> Box<dyn Rule + 'a> {
        match &self.0 {
            None => rule,
            Some(correction) => Box::new(Corrected { rule, correction }),
        }
    }

    /// Adds `post` to the documentation of a method's own parameters.
    pub(super) fn document(mut schema: Schema) -> Schema {
        let parameters = schema_for!(Correction);
        let mut properties = parameters.get("properties").cloned().unwrap_or_default();
        properties["method"] = serde_json::json!({ "enum": STEPS });
        if let Some(own) = schema
            .ensure_object()
            .entry("properties")
            .or_insert_with(|| serde_json::json!({}))
            .as_object_mut()
        {
            own.insert(
                POST.to_owned(),
                serde_json::json!({
                    "anyOf": [
                        { "enum": STEPS },
                        { "type": "object", "required": ["method"], "properties": properties }
                    ],
                    "description": "What is done with the merged matrices afterwards: `\"svc\"`, or `{ method = \"svc\", floor = 1.0 }` \
                        with parameters of the method `svc`; not of methods that make a model per task (default: nothing)."
                }),
            );
        }
        schema
    }
}

/// A rule whose matrices are corrected.
struct Corrected<'a> {
    rule: Box<dyn Rule + 'a>,
    correction: &'a Correction,
}

impl Rule for Corrected<'_> {
    fn adds_to_base(&self) -> bool {
        self.rule.adds_to_base()
    }

    fn needs_whole(&self, operand: &Operand<'_>) -> bool {
        self.correction.treats(operand) || self.rule.needs_whole(operand)
    }

    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.rule.block(operand, range, out, scratch)
    }

    fn blobs(&self, staging: &Staging) -> std::result::Result<Vec<Blob>, StageError> {
        self.rule.blobs(staging)
    }

    fn tensor(&self, operand: &Operand<'_>, out: &mut [f32]) -> std::result::Result<(), StageError> {
        self.rule.tensor(operand, out)?;
        if !self.correction.treats(operand) {
            return Ok(());
        }
        if self.rule.adds_to_base() {
            return self.correction.correct(operand, out);
        }
        let mut base = vec![0.0; out.len()];
        operand.read_base(0..out.len(), &mut base, &mut Scratch::new())?;
        out.iter_mut().zip(&base).for_each(|(out, base)| *out -= base);
        self.correction.correct(operand, out)?;
        out.iter_mut().zip(&base).for_each(|(out, base)| *out += base);
        Ok(())
    }
}
