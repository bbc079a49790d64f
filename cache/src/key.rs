//! Keys: what a stage's output is a function of, hashed.
//!
//! A [`Preimage`] has two halves. `operation` says what is computed (kind, version, parameters), `inputs` says from
//! what (content digests). [`StageKey`] covers both; [`FamilyKey`] covers the operation alone and answers "has this
//! ever run, on whatever inputs". Each is BLAKE3 in `derive_key` mode with its own context, over the canonical
//! encoding of [`Value`], which delimits itself: the halves cannot flow into each other.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Value;
use crate::hex;

/// Everything that a stage's output bytes are a function of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preimage {
    /// What is computed: kind, version, parameters with defaults filled in.
    pub operation: Value,
    /// What it is computed from: content digests, by port.
    pub inputs: Value,
}

impl Preimage {
    /// Returns the key that the output is stored under.
    pub fn key(&self) -> StageKey {
        let mut encoding = Vec::with_capacity(1024);
        self.operation.encode(&mut encoding);
        self.inputs.encode(&mut encoding);
        StageKey(blake3::derive_key(STAGE_KEY_CONTEXT, &encoding).into())
    }

    /// Returns the key shared by all runs of the same operation, whatever its inputs.
    pub fn family(&self) -> FamilyKey {
        let mut encoding = Vec::with_capacity(1024);
        self.operation.encode(&mut encoding);
        FamilyKey(blake3::derive_key(FAMILY_KEY_CONTEXT, &encoding).into())
    }
}

/// Key of one operation on one set of inputs.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct StageKey(blake3::Hash);

/// Key of one operation on any inputs.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FamilyKey(blake3::Hash);

/// One difference between two preimages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Where: `operation.params.bits`, `inputs.models[2]`; unusual names are quoted.
    pub path: String,
    /// The old value; `None` when the field is new.
    pub old: Option<Value>,
    /// The new value; `None` when the field is gone.
    pub new: Option<Value>,
}

/// Shows `path: old -> new`, the words `absent` standing in for a missing side.
impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |value: &Option<Value>| value.as_ref().map_or("absent".to_owned(), Value::to_string);
        write!(f, "{}: {} -> {}", self.path, show(&self.old), show(&self.new))
    }
}

/// Compares two preimages field by field; operation first, maps by name, lists by position.
pub fn diff(old: &Preimage, new: &Preimage) -> Vec<Change> {
    let mut changes = Vec::new();
    diff_values("operation", Some(&old.operation), Some(&new.operation), &mut changes);
    diff_values("inputs", Some(&old.inputs), Some(&new.inputs), &mut changes);
    changes
}

/// INVARIANT: these strings never change; a new meaning of keys is a new version at their end.
const STAGE_KEY_CONTEXT: &str = "merganser 2026-08 stage key v1";
const FAMILY_KEY_CONTEXT: &str = "merganser 2026-08 operation family key v1";

fn diff_values(path: &str, old: Option<&Value>, new: Option<&Value>, changes: &mut Vec<Change>) {
    match (old, new) {
        (Some(old), Some(new)) if old == new => {}
        (Some(Value::Map(old)), Some(Value::Map(new))) => {
            let added = new.keys().filter(|name| !old.contains_key(*name));
            let mut names: Vec<&String> = old.keys().chain(added).collect();
            names.sort();
            for name in names {
                diff_values(&field_path(path, name), old.get(name), new.get(name), changes);
            }
        }
        (Some(Value::List(old)), Some(Value::List(new))) => {
            for idx in 0..old.len().max(new.len()) {
                diff_values(&format!("{path}[{idx}]"), old.get(idx), new.get(idx), changes);
            }
        }
        (old, new) => {
            changes.push(Change { path: path.to_owned(), old: old.cloned(), new: new.cloned() });
        }
    }
}

fn field_path(path: &str, name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !name.is_empty() && name.chars().all(plain) {
        format!("{path}.{name}")
    } else {
        format!("{path}.{name:?}")
    }
}

macro_rules! digest_newtype {
    ($name:ident) => {
        impl $name {
            /// Returns the digest.
            pub fn as_hash(&self) -> &blake3::Hash {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.0.to_hex().as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0.to_hex().as_str())
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                hex::parse_digest(text).map(Self)
            }
        }

        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl Ord for $name {
            fn cmp(&self, other: &Self) -> Ordering {
                self.0.as_bytes().cmp(other.0.as_bytes())
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                hex::hex_digest::serialize(&self.0, serializer)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                hex::hex_digest::deserialize(deserializer).map(Self)
            }
        }
    };
}

digest_newtype!(StageKey);
digest_newtype!(FamilyKey);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::value::tests::any_value;

    fn key_of(operation: impl Into<Value>) -> StageKey {
        Preimage { operation: operation.into(), inputs: Value::Null }.key()
    }

    #[test]
    fn text_does_not_flow_between_neighbours() {
        assert_ne!(key_of(Value::list(["ab", "c"])), key_of(Value::list(["a", "bc"])));
        assert_ne!(key_of(Value::map([("ab", "c")])), key_of(Value::map([("a", "bc")])));
        assert_ne!(key_of(Value::list(["a", ""])), key_of(Value::list(["", "a"])));
    }

    #[test]
    fn operation_does_not_flow_into_inputs() {
        let one = Preimage { operation: Value::list(["a", "b"]), inputs: Value::list(["c"]) };
        let two = Preimage { operation: Value::list(["a"]), inputs: Value::list(["b", "c"]) };
        assert_ne!(one.key(), two.key());
        let swapped = Preimage { operation: one.inputs.clone(), inputs: one.operation.clone() };
        assert_ne!(one.key(), swapped.key());
    }

    #[test]
    fn swapped_parameter_values_differ() {
        let one = key_of(Value::map([("bits", Value::Int(4)), ("group", Value::Int(8))]));
        let two = key_of(Value::map([("bits", Value::Int(8)), ("group", Value::Int(4))]));
        assert_ne!(one, two);
    }

    #[test]
    fn insertion_order_of_maps_does_not_matter() {
        let one = key_of(Value::map([("a", 1_i64), ("b", 2)]));
        let two = key_of(Value::map([("b", 2_i64), ("a", 1)]));
        assert_eq!(one, two);
    }

    #[test]
    fn alike_looking_values_of_different_types_differ() {
        let values = [
            Value::Int(1),
            Value::Float(1.0),
            Value::Text("1".into()),
            Value::Bool(true),
            Value::Null,
            Value::Int(0),
            Value::Float(0.0),
            Value::Float(-0.0),
            Value::Float(f64::NAN),
            Value::Bool(false),
            Value::Text(String::new()),
            Value::Bytes(Vec::new()),
            Value::Bytes(b"1".to_vec()),
            Value::List(Vec::new()),
            Value::List(vec![Value::Null]),
            Value::Map(std::collections::BTreeMap::new()),
            Value::Digest(blake3::hash(b"")),
            Value::Bytes(blake3::hash(b"").as_bytes().to_vec()),
            Value::Text(blake3::hash(b"").to_string()),
        ];
        for (idx, one) in values.iter().enumerate() {
            for two in &values[idx + 1..] {
                assert_ne!(key_of(one.clone()), key_of(two.clone()), "{one:?} {two:?}");
                assert_ne!(one, two);
            }
        }
        let other_nan = f64::from_bits(0xfff8_0000_0000_0001);
        assert_eq!(key_of(f64::NAN), key_of(other_nan));
    }

    #[test]
    fn missing_parameter_differs_from_null() {
        let absent = Value::map([("a", Value::Int(1))]);
        let null = Value::map([("a", Value::Int(1)), ("b", Value::Null)]);
        assert_ne!(key_of(absent), key_of(null));
    }

    #[test]
    fn family_ignores_inputs_and_has_its_own_domain() {
        let one = Preimage { operation: Value::from("merge"), inputs: Value::from("a") };
        let two = Preimage { operation: Value::from("merge"), inputs: Value::from("b") };
        assert_ne!(one.key(), two.key());
        assert_eq!(one.family(), two.family());
        assert_ne!(one.family().as_hash(), one.key().as_hash());
    }

    /// A failure here means that every cache in the world is a miss: is that intended? The digests were computed
    /// by a separate encoder in Python, written from the table in `value`, with the `blake3` package 1.0.
    #[test]
    fn digests_are_pinned() {
        let preimage = Preimage {
            operation: Value::map([
                ("kind", Value::from("quantize")),
                ("version", Value::Int(1)),
                ("bits", Value::Int(4)),
                ("scale", Value::Float(0.5)),
                ("signed", Value::Bool(false)),
                ("seed", Value::Null),
            ]),
            inputs: Value::list([blake3::hash(b"model")]),
        };
        assert_eq!(
            preimage.key().to_string(),
            "33488c6ed0714d015cf8f9d08eb1128e99f910d978726d8b15319a482a293f01"
        );
        assert_eq!(
            preimage.family().to_string(),
            "ae32899448e091c9d01fa820b68fad88bd902b1e9a3c6ef6f772f1d40c0ef7f3"
        );
    }

    #[test]
    fn keys_round_trip_as_text_and_json() {
        let key = key_of("x");
        assert_eq!(key.to_string().parse(), Ok(key));
        assert_eq!(serde_json::from_str::<StageKey>(&serde_json::to_string(&key).unwrap()).unwrap(), key);
        assert!("xyz".parse::<StageKey>().is_err());
    }

    #[test]
    fn diff_names_each_changed_field() {
        let old = Preimage {
            operation: Value::map([
                ("bits", Value::Int(4)),
                ("gone", Value::Bool(true)),
                ("rules", Value::map([("a.weight", 8_i64)])),
                ("same", Value::Float(f64::NAN)),
            ]),
            inputs: Value::map([("models", Value::list(["a", "b"]))]),
        };
        let new = Preimage {
            operation: Value::map([
                ("bits", Value::Float(4.0)),
                ("rules", Value::map([("a.weight", 2_i64)])),
                ("same", Value::Float(f64::NAN)),
            ]),
            inputs: Value::map([("models", Value::list(["a", "c", "d"]))]),
        };
        let lines: Vec<String> = diff(&old, &new).iter().map(Change::to_string).collect();
        assert_eq!(
            lines,
            [
                "operation.bits: 4 -> 4.0",
                "operation.gone: true -> absent",
                "operation.rules.\"a.weight\": 8 -> 2",
                "inputs.models[1]: \"b\" -> \"c\"",
                "inputs.models[2]: absent -> \"d\"",
            ]
        );
    }

    proptest! {
        #[test]
        fn diff_is_empty_exactly_when_keys_agree(
            operation in any_value(), old in any_value(), new in any_value(),
        ) {
            let old = Preimage { operation: operation.clone(), inputs: old };
            let new = Preimage { operation, inputs: new };
            prop_assert_eq!(diff(&old, &new).is_empty(), old.key() == new.key());
            prop_assert!(diff(&old, &old).is_empty());
        }

        #[test]
        fn preimages_survive_json(operation in any_value(), inputs in any_value()) {
            let preimage = Preimage { operation, inputs };
            let back: Preimage = serde_json::from_str(&serde_json::to_string(&preimage).unwrap()).unwrap();
            prop_assert_eq!(back.key(), preimage.key());
        }
    }
}
