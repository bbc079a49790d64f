//! Typed values that stage keys are computed from.
//!
//! # Canonical encoding
//!
//! One tag byte, then the payload; every length and count is a `u64`, little-endian. Each value delimits itself, so
//! no two different values, and no two different sequences of values, share an encoding.
//!
//! | tag | value | payload |
//! |---|---|---|
//! | 0 | null | nothing |
//! | 1 | boolean | one byte, 0 or 1 |
//! | 2 | integer | `i64`, little-endian |
//! | 3 | float | the bits of the `f64`, little-endian; every NaN is `0x7ff8000000000000`; -0.0 and 0.0 differ |
//! | 4 | text | length, UTF-8 bytes |
//! | 5 | bytes | length, bytes |
//! | 6 | digest | 32 bytes |
//! | 7 | list | count, items in order |
//! | 8 | map | count, then per entry in byte order of the keys: key length, key, value |
//!
//! -0.0 stays apart from 0.0 because multiplying by it gives other bits: a spurious miss is cheaper than a wrong hit.
//! Equality of [`Value`] is equality of encodings, so a NaN equals itself.
//!
//! # JSON
//!
//! Records keep preimages as JSON that people read: null, booleans, numbers (floats always with a point or an
//! exponent), strings, arrays and objects are themselves; the rest is an object with one reserved key:
//! `{"$digest": "hex"}`, `{"$bytes": "hex"}`, `{"$float": "nan" | "inf" | "-inf"}`. A map key that itself begins with
//! `$` gets a second one. Values nest at most as deep as the JSON reader follows (127 levels).

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::hex;

/// A typed value; see the module documentation for its encoding and its JSON form.
#[derive(Debug, Clone)]
pub enum Value {
    /// Absent.
    Null,
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A floating-point number, compared by bits.
    Float(f64),
    /// UTF-8 text.
    Text(String),
    /// Opaque bytes.
    Bytes(Vec<u8>),
    /// A content digest.
    Digest(blake3::Hash),
    /// Values in an order that matters.
    List(Vec<Value>),
    /// Named values; the order in which they were inserted does not matter.
    Map(BTreeMap<String, Value>),
}

impl Value {
    /// Builds a map from names and values; of two values with one name the later wins.
    pub fn map<K: Into<String>, V: Into<Value>>(entries: impl IntoIterator<Item = (K, V)>) -> Self {
        Self::Map(entries.into_iter().map(|(key, value)| (key.into(), value.into())).collect())
    }

    /// Builds a list.
    pub fn list<V: Into<Value>>(items: impl IntoIterator<Item = V>) -> Self {
        Self::List(items.into_iter().map(Into::into).collect())
    }

    /// Appends the canonical encoding to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Null => out.push(0),
            Self::Bool(value) => out.extend([1, u8::from(*value)]),
            Self::Int(value) => {
                out.push(2);
                out.extend(value.to_le_bytes());
            }
            Self::Float(value) => {
                out.push(3);
                out.extend(canonical_bits(*value).to_le_bytes());
            }
            Self::Text(text) => {
                out.push(4);
                encode_bytes(text.as_bytes(), out);
            }
            Self::Bytes(bytes) => {
                out.push(5);
                encode_bytes(bytes, out);
            }
            Self::Digest(digest) => {
                out.push(6);
                out.extend(digest.as_bytes());
            }
            Self::List(items) => {
                out.push(7);
                encode_count(items.len(), out);
                for item in items {
                    item.encode(out);
                }
            }
            Self::Map(entries) => {
                out.push(8);
                encode_count(entries.len(), out);
                for (key, value) in entries {
                    encode_bytes(key.as_bytes(), out);
                    value.encode(out);
                }
            }
        }
    }
}

impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Null, Self::Null) => true,
            (Self::Bool(a), Self::Bool(b)) => a == b,
            (Self::Int(a), Self::Int(b)) => a == b,
            (Self::Float(a), Self::Float(b)) => canonical_bits(*a) == canonical_bits(*b),
            (Self::Text(a), Self::Text(b)) => a == b,
            (Self::Bytes(a), Self::Bytes(b)) => a == b,
            (Self::Digest(a), Self::Digest(b)) => a == b,
            (Self::List(a), Self::List(b)) => a == b,
            (Self::Map(a), Self::Map(b)) => a == b,
            _ => false,
        }
    }
}

impl Eq for Value {}

/// Shows the value as its compact JSON, without the `$` wrappers around digests and bytes.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digest(digest) => write!(f, "{digest}"),
            Self::Bytes(bytes) => f.write_str(&hex::encode(bytes)),
            Self::Float(value) if !value.is_finite() => f.write_str(non_finite_name(*value)),
            other => f.write_str(&serde_json::to_string(other).map_err(|_| fmt::Error)?),
        }
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::Int(value.into())
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl From<blake3::Hash> for Value {
    fn from(value: blake3::Hash) -> Self {
        Self::Digest(value)
    }
}

impl From<Vec<Value>> for Value {
    fn from(value: Vec<Value>) -> Self {
        Self::List(value)
    }
}

impl From<BTreeMap<String, Value>> for Value {
    fn from(value: BTreeMap<String, Value>) -> Self {
        Self::Map(value)
    }
}

impl<T: Into<Value>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Int(value) => serializer.serialize_i64(*value),
            Self::Float(value) if value.is_finite() => serializer.serialize_f64(*value),
            Self::Float(value) => tagged(serializer, FLOAT, non_finite_name(*value)),
            Self::Text(text) => serializer.serialize_str(text),
            Self::Bytes(bytes) => tagged(serializer, BYTES, &hex::encode(bytes)),
            Self::Digest(digest) => tagged(serializer, DIGEST, digest.to_hex().as_str()),
            Self::List(items) => serializer.collect_seq(items),
            Self::Map(entries) => {
                let mut map = serializer.serialize_map(Some(entries.len()))?;
                for (key, value) in entries {
                    if key.starts_with('$') {
                        map.serialize_entry(&format!("${key}"), value)?;
                    } else {
                        map.serialize_entry(key, value)?;
                    }
                }
                map.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

const FLOAT: &str = "$float";
const BYTES: &str = "$bytes";
const DIGEST: &str = "$digest";

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value of a stage key's preimage")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Int(value))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Value, E> {
        let value = i64::try_from(value);
        value.map(Value::Int).map_err(|_| E::custom("an integer does not fit 64 bits with a sign"))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = BTreeMap::new();
        while let Some(key) = entries.next_key::<String>()? {
            let key = match key.strip_prefix('$') {
                None => key,
                Some(escaped) if escaped.starts_with('$') => escaped.to_owned(),
                Some(_) if map.is_empty() => {
                    let value = parse_tagged(&key, &entries.next_value::<String>()?);
                    if entries.next_key::<String>()?.is_some() {
                        return Err(A::Error::custom(format!("`{key}` must stand alone")));
                    }
                    return value.map_err(A::Error::custom);
                }
                Some(_) => return Err(A::Error::custom(format!("`{key}` must stand alone"))),
            };
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("`{key}` appears twice")));
            }
            map.insert(key, entries.next_value()?);
        }
        Ok(Value::Map(map))
    }
}

fn tagged<S: Serializer>(serializer: S, tag: &str, text: &str) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(1))?;
    map.serialize_entry(tag, text)?;
    map.end()
}

fn parse_tagged(tag: &str, text: &str) -> Result<Value, String> {
    match (tag, text) {
        (DIGEST, _) => hex::parse_digest(text).map(Value::Digest),
        (BYTES, _) => hex::decode(text).map(Value::Bytes).ok_or_else(|| format!("not hexadecimal: `{text}`")),
        (FLOAT, "nan") => Ok(Value::Float(f64::NAN)),
        (FLOAT, "inf") => Ok(Value::Float(f64::INFINITY)),
        (FLOAT, "-inf") => Ok(Value::Float(f64::NEG_INFINITY)),
        _ => Err(format!("unknown value `{tag}`: `{text}`")),
    }
}

fn non_finite_name(value: f64) -> &'static str {
    if value.is_nan() {
        "nan"
    } else if value > 0.0 {
        "inf"
    } else {
        "-inf"
    }
}

fn canonical_bits(value: f64) -> u64 {
    if value.is_nan() { 0x7ff8_0000_0000_0000 } else { value.to_bits() }
}

fn encode_count(count: usize, out: &mut Vec<u8>) {
    out.extend((count as u64).to_le_bytes());
}

fn encode_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    encode_count(bytes.len(), out);
    out.extend(bytes);
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any value, up to four levels deep.
    pub(crate) fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::Bool),
            any::<i64>().prop_map(Value::Int),
            any::<u64>().prop_map(|bits| Value::Float(f64::from_bits(bits))),
            prop_oneof![Just(-0.0), Just(0.0), Just(1.0), Just(1e300), Just(f64::NAN), Just(f64::INFINITY)]
                .prop_map(Value::Float),
            ".{0,8}".prop_map(Value::Text),
            prop::collection::vec(any::<u8>(), 0..8).prop_map(Value::Bytes),
            any::<[u8; 32]>().prop_map(|bytes| Value::Digest(bytes.into())),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::List),
                prop::collection::btree_map(
                    prop_oneof!["[$a-z]{0,3}", Just("$digest".to_owned()), Just("$float".to_owned())],
                    inner,
                    0..6
                )
                .prop_map(Value::Map),
            ]
        })
    }

    /// A reader of the canonical encoding: since it recovers every value, no two values share an encoding.
    fn decode(bytes: &mut &[u8]) -> Value {
        fn take<'a>(bytes: &mut &'a [u8], n_bytes: usize) -> &'a [u8] {
            let (head, tail) = bytes.split_at(n_bytes);
            *bytes = tail;
            head
        }
        fn number(bytes: &mut &[u8]) -> u64 {
            u64::from_le_bytes(take(bytes, 8).try_into().expect("took eight bytes"))
        }
        fn string(bytes: &mut &[u8]) -> Vec<u8> {
            let n_bytes = number(bytes) as usize;
            take(bytes, n_bytes).to_vec()
        }
        fn text(bytes: &mut &[u8]) -> String {
            String::from_utf8(string(bytes)).expect("encoded from a string")
        }
        match take(bytes, 1)[0] {
            0 => Value::Null,
            1 => Value::Bool(take(bytes, 1)[0] == 1),
            2 => Value::Int(number(bytes) as i64),
            3 => Value::Float(f64::from_bits(number(bytes))),
            4 => Value::Text(text(bytes)),
            5 => Value::Bytes(string(bytes)),
            6 => Value::Digest(blake3::Hash::from_slice(take(bytes, 32)).expect("took 32 bytes")),
            7 => Value::List((0..number(bytes)).map(|_| decode(bytes)).collect()),
            8 => Value::Map((0..number(bytes)).map(|_| (text(bytes), decode(bytes))).collect()),
            tag => panic!("unknown tag {tag}"),
        }
    }

    proptest! {
        #[test]
        fn json_round_trips_exactly(value in any_value()) {
            let json = serde_json::to_string(&value).unwrap();
            let back: Value = serde_json::from_str(&json).unwrap();
            prop_assert_eq!(&back, &value, "{}", json);
            prop_assert_eq!(serde_json::to_string(&back).unwrap(), json);
        }

        #[test]
        fn encoding_can_be_read_back(value in any_value()) {
            let mut encoding = Vec::new();
            value.encode(&mut encoding);
            let mut rest = encoding.as_slice();
            prop_assert_eq!(decode(&mut rest), value);
            prop_assert!(rest.is_empty());
        }
    }

    #[test]
    fn json_reads_well() {
        let value = Value::map([
            ("bits", Value::Int(4)),
            ("scale", Value::Float(1.0)),
            ("tiny", Value::Float(1e-12)),
            ("base", Value::Digest(blake3::hash(b""))),
            ("raw", Value::Bytes(vec![1, 255])),
            ("limit", Value::Float(f64::NEG_INFINITY)),
            ("$odd", Value::List(vec![Value::Null, Value::Bool(true)])),
        ]);
        assert_eq!(
            serde_json::to_string(&value).unwrap(),
            r#"{"$$odd":[null,true],"base":{"$digest":"af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"},"bits":4,"limit":{"$float":"-inf"},"raw":{"$bytes":"01ff"},"scale":1.0,"tiny":1e-12}"#
        );
    }

    #[test]
    fn rejects_malformed_json() {
        for json in [
            r#"{"$digest":"00"}"#,
            r#"{"$what":"00"}"#,
            r#"{"$float":"1.0"}"#,
            r#"{"$bytes":"0"}"#,
            r#"{"$bytes":"00","a":1}"#,
            r#"{"a":1,"$bytes":"00"}"#,
            r#"{"a":1,"a":2}"#,
            "18446744073709551615",
        ] {
            assert!(serde_json::from_str::<Value>(json).is_err(), "{json}");
        }
    }
}
