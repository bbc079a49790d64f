//! λ of TALL masks: one number, one per task, or the best of a list on validation data.

use crate::params::{Problem, did_you_mean};
use indexmap::IndexMap;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// `lambda = 0.4`, `lambda = { mnist = 0.3, fashion = 0.5 }` or `lambda = "search"`.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Lambda {
    One(f64),
    PerTask(IndexMap<String, f64>),
    Search,
}

impl Default for Lambda {
    fn default() -> Self {
        Self::One(0.4)
    }
}

impl Lambda {
    /// The λ of a task; a table of one entry is about the only task.
    pub(super) fn of(&self, task: &str) -> Option<f64> {
        match self {
            Self::One(lambda) => Some(*lambda),
            Self::PerTask(table) if table.len() == 1 && task.is_empty() => table.values().next().copied(),
            Self::PerTask(table) => table.get(task).copied(),
            Self::Search => None,
        }
    }

    /// Mistakes in the numbers.
    pub(super) fn problem(&self) -> Option<Problem> {
        match self {
            Self::One(lambda) => refusal("lambda", *lambda),
            Self::PerTask(table) => table.iter().find_map(|(task, lambda)| refusal(&format!("lambda.{task}"), *lambda)),
            Self::Search => None,
        }
    }

    /// A table must name exactly the tasks.
    pub(super) fn check(&self, tasks: Option<&[String]>) -> Result<(), Problem> {
        let Self::PerTask(table) = self else { return Ok(()) };
        let Some(tasks) = tasks else {
            if table.len() == 1 {
                return Ok(());
            }
            let message = format!("`lambda` names {} tasks, and there is one task vector", table.len());
            return Err(Problem::new("unknown-member", message).help("write one number: `lambda = 0.4`"));
        };
        if let Some(name) = table.keys().find(|name| !tasks.contains(name)) {
            let help = did_you_mean(name, tasks.iter().map(String::as_str));
            let message = format!("`lambda` names `{name}`, which is no task");
            return Err(Problem { help, ..Problem::new("unknown-member", message) });
        }
        match tasks.iter().find(|task| !table.contains_key(*task)) {
            Some(task) => {
                Err(Problem::new("unknown-member", format!("`lambda` does not say what task `{task}` takes")))
            }
            None => Ok(()),
        }
    }
}

/// What is wrong with a λ, if anything.
pub(super) fn refusal(key: &str, lambda: f64) -> Option<Problem> {
    let is_usable = lambda >= 0.0 && (lambda as f32).is_finite();
    (!is_usable).then(|| {
        Problem::new("bad-value", format!("`{key}` must be a finite number, 0 or more, got {lambda}"))
    })
}

impl<'de> Deserialize<'de> for Lambda {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(LambdaVisitor)
    }
}

struct LambdaVisitor;

impl<'de> Visitor<'de> for LambdaVisitor {
    type Value = Lambda;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, a table of numbers by task, or `search`")
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Lambda, E> {
        Ok(Lambda::One(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Lambda, E> {
        Ok(Lambda::One(value as f64))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Lambda, E> {
        if text == "search" { Ok(Lambda::Search) } else { Err(E::unknown_variant(text, &["search"])) }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Lambda, A::Error> {
        let mut table = IndexMap::new();
        while let Some((task, lambda)) = access.next_entry()? {
            table.insert(task, lambda);
        }
        Ok(Lambda::PerTask(table))
    }
}

impl Serialize for Lambda {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::One(lambda) => serializer.serialize_f64(*lambda),
            Self::PerTask(table) => table.serialize(serializer),
            Self::Search => serializer.serialize_str("search"),
        }
    }
}

impl JsonSchema for Lambda {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "lambda".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                { "type": "number", "minimum": 0 },
                { "type": "object", "additionalProperties": { "type": "number", "minimum": 0 } },
                { "enum": ["search"] }
            ]
        })
    }
}
