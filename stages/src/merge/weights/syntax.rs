//! How task weights are written in a pipeline, and how they enter a key.

use super::cluster::{Linkage, Share};
use super::{Accuracies, Clusters, Performance, TaskWeights};
use crate::params::PathOr;
use indexmap::IndexMap;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

const USUAL_TEMPERATURE: f64 = 1.0;
const USUAL_SEED: u64 = 42;

/// The word for the port `scores` where a file could stand.
const SCORES: &str = "scores";

impl<'de> Deserialize<'de> for TaskWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WeightsVisitor)
    }
}

struct WeightsVisitor;

impl<'de> Visitor<'de> for WeightsVisitor {
    type Value = TaskWeights;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`uniform`, a table of weights by task, or one with `performance` or `cluster`")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<TaskWeights, E> {
        if text == "uniform" { Ok(TaskWeights::Uniform) } else { Err(E::unknown_variant(text, &["uniform"])) }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<TaskWeights, A::Error> {
        let mut read = Read::default();
        while let Some(key) = access.next_key::<String>()? {
            match key.as_str() {
                "performance" => read.accuracies = Some(accuracies(access.next_value()?)),
                "linkage" => read.linkage = Some(access.next_value()?),
                "across" => read.across = Some(access.next_value()?),
                "within" => read.within = Some(access.next_value()?),
                _ => {
                    let weight = access.next_value()?;
                    read.numbers.insert(key, weight);
                }
            }
        }
        read.weights()
    }
}

/// What a table said.
#[derive(Default)]
struct Read {
    accuracies: Option<Accuracies>,
    linkage: Option<Linkage>,
    across: Option<Share>,
    within: Option<Share>,
    /// Weights by task, or `temperature`, `cluster`, `seed`.
    numbers: IndexMap<String, f64>,
}

impl Read {
    fn weights<E: Error>(mut self) -> Result<TaskWeights, E> {
        let is_cluster = self.numbers.contains_key("cluster");
        if !is_cluster && self.accuracies.is_none() {
            return match (self.linkage, self.across, self.within) {
                (None, None, None) => Ok(TaskWeights::Explicit(self.numbers)),
                _ => {
                    Err(E::custom("`linkage`, `across` and `within` need `cluster`, the number of clusters"))
                }
            };
        }
        let temperature = self.numbers.shift_remove("temperature");
        if temperature.is_some_and(|temperature| !(temperature > 0.0 && temperature.is_finite())) {
            return Err(E::custom("`temperature` must be a positive number"));
        }
        let temperature = temperature.unwrap_or(USUAL_TEMPERATURE);
        let performance = self.accuracies.take().map(|accuracies| Performance { accuracies, temperature });
        let cluster = self.whole::<E>("cluster")?;
        let seed = self.whole::<E>("seed")?;
        if let Some(key) = self.numbers.keys().next() {
            return Err(E::custom(format!("`{key}` has no meaning beside `performance` or `cluster`")));
        }
        let Some(cluster) = cluster else {
            return match (performance, self.linkage, self.across, self.within, seed) {
                (Some(performance), None, None, None, None) => Ok(TaskWeights::Performance(performance)),
                _ => Err(E::custom(
                    "`linkage`, `across`, `within` and `seed` need `cluster`, the number of clusters",
                )),
            };
        };
        if cluster == 0 {
            return Err(E::custom("`cluster` must be at least 1"));
        }
        let (across, within) = (self.across.unwrap_or_default(), self.within.unwrap_or_default());
        if (across, within) != (Share::Equal, Share::Equal) && performance.is_none() {
            return Err(E::custom("shares by performance need `performance`"));
        }
        Ok(TaskWeights::Cluster(Clusters {
            cluster: cluster as usize,
            linkage: self.linkage.unwrap_or_default(),
            seed: seed.unwrap_or(USUAL_SEED),
            across,
            within,
            performance,
        }))
    }

    fn whole<E: Error>(&mut self, key: &str) -> Result<Option<u64>, E> {
        let Some(value) = self.numbers.shift_remove(key) else { return Ok(None) };
        if value >= 0.0 && value.fract() == 0.0 && value <= 2f64.powi(53) {
            Ok(Some(value as u64))
        } else {
            Err(E::custom(format!("`{key}` must be a whole number, got {value}")))
        }
    }
}

fn accuracies(read: PathOr<IndexMap<String, f64>>) -> Accuracies {
    match read {
        PathOr::Path(file) if file.written == SCORES => Accuracies::Scores,
        PathOr::Path(file) => Accuracies::File(file),
        PathOr::Value(table) => Accuracies::Table(table),
    }
}

impl Serialize for TaskWeights {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Uniform => serializer.serialize_str("uniform"),
            Self::Explicit(weights) => weights.serialize(serializer),
            Self::Performance(performance) => {
                let mut map = serializer.serialize_map(None)?;
                performance.entries(&mut map)?;
                map.end()
            }
            Self::Cluster(clusters) => {
                let mut map = serializer.serialize_map(None)?;
                map.serialize_entry("cluster", &clusters.cluster)?;
                map.serialize_entry("linkage", &clusters.linkage)?;
                map.serialize_entry("seed", &clusters.seed)?;
                map.serialize_entry("across", &clusters.across)?;
                map.serialize_entry("within", &clusters.within)?;
                if let Some(performance) = &clusters.performance {
                    performance.entries(&mut map)?;
                }
                map.end()
            }
        }
    }
}

impl Performance {
    fn entries<M: SerializeMap>(&self, map: &mut M) -> Result<(), M::Error> {
        match &self.accuracies {
            Accuracies::Scores => map.serialize_entry("performance", SCORES)?,
            Accuracies::File(file) => map.serialize_entry("performance", file)?,
            Accuracies::Table(table) => map.serialize_entry("performance", table)?,
        }
        map.serialize_entry("temperature", &self.temperature)
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
        let performance = serde_json::json!({
            "anyOf": [
                { "type": "string", "description": "a JSON file of accuracies by task, or `scores`: the port" },
                { "type": "object", "additionalProperties": { "type": "number" } }
            ]
        });
        let share = serde_json::json!({ "enum": ["equal", "performance"] });
        json_schema!({
            "anyOf": [
                { "enum": ["uniform"] },
                { "type": "object", "additionalProperties": { "type": "number" } },
                {
                    "type": "object",
                    "required": ["performance"],
                    "additionalProperties": false,
                    "properties": { "performance": performance, "temperature": { "type": "number" } }
                },
                {
                    "type": "object",
                    "required": ["cluster"],
                    "additionalProperties": false,
                    "properties": {
                        "cluster": { "type": "integer", "minimum": 1 },
                        "linkage": { "enum": ["k-means", "ward"] },
                        "seed": { "type": "integer", "minimum": 0 },
                        "across": share,
                        "within": share,
                        "performance": performance,
                        "temperature": { "type": "number" }
                    }
                }
            ]
        })
    }
}
