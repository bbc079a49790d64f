//! Task weights: how much each task vector counts.

use crate::params::{Problem, did_you_mean};
use indexmap::IndexMap;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// `weights = "uniform"`, or a number per task: `weights = { mnist = 1.0, fashion = 0.5 }`. Negative weights are allowed.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum TaskWeights {
    #[default]
    Uniform,
    Explicit(IndexMap<String, f64>),
}

impl TaskWeights {
    /// The weight of each member, 1 if uniform.
    pub(super) fn of(&self, members: impl Iterator<Item = String>) -> Vec<f64> {
        members
            .map(|member| match self {
                Self::Uniform => 1.0,
                Self::Explicit(weights) => weights.get(&member).copied().unwrap_or(0.0),
            })
            .collect()
    }

    /// Explicit weights must be finite and name exactly the members.
    pub(super) fn check(&self, members: &[String]) -> Result<(), Problem> {
        let Self::Explicit(weights) = self else { return Ok(()) };
        if let Some((name, weight)) = weights.iter().find(|(_, weight)| !weight.is_finite()) {
            return Err(Problem::new(
                "bad-value",
                format!("the weight of `{name}` must be finite, got {weight}"),
            ));
        }
        if let Some(name) = weights.keys().find(|name| !members.contains(name)) {
            let help = did_you_mean(name, members.iter().map(String::as_str));
            return Err(Problem {
                help,
                ..Problem::new("unknown-member", format!("`weights` names `{name}`, which is no task"))
            });
        }
        if let Some(member) = members.iter().find(|member| !weights.contains_key(*member)) {
            return Err(Problem::new(
                "unknown-member",
                format!("`weights` does not say how much task `{member}` counts"),
            )
            .help("give every task a weight; 0 leaves it out"));
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for TaskWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WeightsVisitor)
    }
}

struct WeightsVisitor;

impl<'de> Visitor<'de> for WeightsVisitor {
    type Value = TaskWeights;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`uniform` or a table of weights by task")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<TaskWeights, E> {
        if text == "uniform" { Ok(TaskWeights::Uniform) } else { Err(E::unknown_variant(text, &["uniform"])) }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<TaskWeights, A::Error> {
        let mut weights = IndexMap::new();
        while let Some((task, weight)) = access.next_entry()? {
            weights.insert(task, weight);
        }
        Ok(TaskWeights::Explicit(weights))
    }
}

impl Serialize for TaskWeights {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Uniform => serializer.serialize_str("uniform"),
            Self::Explicit(weights) => weights.serialize(serializer),
        }
    }
}

impl JsonSchema for TaskWeights {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "task-weights".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                { "enum": ["uniform"] },
                { "type": "object", "additionalProperties": { "type": "number" } }
            ]
        })
    }
}
