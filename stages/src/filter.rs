//! Globs over tensor names: `only`, `skip`, and the `match` of rules.
//!
//! `*` matches any run of characters, dots and slashes included, because tensor names are not paths: `*.attn.*` finds
//! `blocks.0.attn.qkv.weight`. `?`, `[abc]` and `{a,b}` work as in a shell.

use crate::params::{Params, Problem, parse};
use globset::{Glob, GlobMatcher};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

/// A glob over tensor names.
#[derive(Clone, Debug)]
pub struct NameGlob(GlobMatcher);

impl NameGlob {
    /// Compiles a pattern.
    pub fn new(pattern: &str) -> Result<Self, globset::Error> {
        Glob::new(pattern).map(|glob| Self(glob.compile_matcher()))
    }

    pub fn matches(&self, name: &str) -> bool {
        self.0.is_match(name)
    }

    pub fn pattern(&self) -> &str {
        self.0.glob().glob()
    }
}

impl<'de> Deserialize<'de> for NameGlob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let pattern = String::deserialize(deserializer)?;
        Self::new(&pattern)
            .map_err(|error| D::Error::custom(format!("`{pattern}` is not a glob: {}", error.kind())))
    }
}

impl Serialize for NameGlob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.pattern())
    }
}

impl JsonSchema for NameGlob {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "glob".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "format": "glob", "description": "a glob over tensor names" })
    }
}

/// The tensors that a stage is about: every stage that handles tensors takes these two keys.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NameFilter {
    /// Only tensors whose name matches one of these globs (default: all).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub only: Vec<NameGlob>,
    /// Not the tensors whose name matches one of these globs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skip: Vec<NameGlob>,
}

impl NameFilter {
    /// Takes `only` and `skip` out of a stage's table.
    pub fn take(params: &mut Params<'_>) -> Result<Self, Vec<Problem>> {
        parse(&params.split_off(&["only", "skip"]))
    }

    /// Adds the two keys to the documentation of a kind's own parameters.
    pub fn document(mut parameters: Schema) -> Schema {
        let own = schema_for!(Self);
        let ours = own.get("properties").and_then(serde_json::Value::as_object).cloned().unwrap_or_default();
        if let Some(properties) = parameters
            .ensure_object()
            .entry("properties")
            .or_insert_with(|| serde_json::json!({}))
            .as_object_mut()
        {
            properties.extend(ours);
        }
        parameters
    }

    pub fn admits(&self, name: &str) -> bool {
        (self.only.is_empty() || self.only.iter().any(|glob| glob.matches(name)))
            && !self.skip.iter().any(|glob| glob.matches(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(only: &[&str], skip: &[&str]) -> NameFilter {
        let globs =
            |patterns: &[&str]| patterns.iter().map(|pattern| NameGlob::new(pattern).unwrap()).collect();
        NameFilter { only: globs(only), skip: globs(skip) }
    }

    #[test]
    fn admits_everything_by_default() {
        assert!(filter(&[], &[]).admits("a.b"));
    }

    #[test]
    fn stars_cross_dots_and_slashes() {
        let filter = filter(&["*.attn.*"], &[]);
        assert!(filter.admits("blocks.0.attn.qkv.weight"));
        assert!(filter.admits("a/b.attn.c/d"));
        assert!(!filter.admits("blocks.0.mlp.fc1.weight"));
    }

    #[test]
    fn skip_wins_over_only() {
        let filter = filter(&["*.{q,k}_proj.weight"], &["layers.0.*"]);
        assert!(filter.admits("layers.1.q_proj.weight"));
        assert!(!filter.admits("layers.0.q_proj.weight"));
        assert!(!filter.admits("layers.1.v_proj.weight"));
    }
}
