//! The parameter `bits`: a number, or `auto`.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// `bits = 4`, or `bits = "auto"`: chosen for every tensor within a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    Bits(u8),
    Auto,
}

impl Width {
    /// The number, if one is given.
    pub(super) fn bits(self) -> Option<u8> {
        match self {
            Self::Bits(bits) => Some(bits),
            Self::Auto => None,
        }
    }
}

impl<'de> Deserialize<'de> for Width {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WidthVisitor)
    }
}

struct WidthVisitor;

impl Visitor<'_> for WidthVisitor {
    type Value = Width;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an integer from 0 to 255 or `auto`")
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Width, E> {
        u8::try_from(value).map(Width::Bits).map_err(|_| E::invalid_value(Unexpected::Signed(value), &self))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Width, E> {
        u8::try_from(value).map(Width::Bits).map_err(|_| E::invalid_value(Unexpected::Unsigned(value), &self))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Width, E> {
        if text == "auto" { Ok(Width::Auto) } else { Err(E::invalid_type(Unexpected::Str(text), &self)) }
    }
}

impl Serialize for Width {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Bits(bits) => serializer.serialize_u8(*bits),
            Self::Auto => serializer.serialize_str("auto"),
        }
    }
}

impl JsonSchema for Width {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "width".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [{ "type": "integer", "minimum": 0, "maximum": 255 }, { "enum": ["auto"] }]
        })
    }
}
