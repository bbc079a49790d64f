//! Typed parameters as the canonical value that enters a key.

use super::deserialize::{FILE_PATH, OUTPUT_PATH};
use merganser_cache::Value;
use serde::Serialize;
use serde::ser::{
    self, SerializeMap, SerializeSeq, SerializeStruct, SerializeStructVariant, SerializeTuple,
    SerializeTupleStruct, SerializeTupleVariant, Serializer,
};
use std::collections::BTreeMap;
use std::fmt::Display;

/// Turns parameters into a [`Value`]: structs and maps become maps, enums their names, paths nothing (their contents enter by digest).
///
/// A float parameter is a float whatever the user wrote, so `1` and `1.0` give one key.
pub fn to_value<T: Serialize + ?Sized>(parameters: &T) -> Result<Value, NotAKey> {
    parameters.serialize(ToValue)
}

/// Parameters that were parsed in parts, as one map: what the user wrote as one table is one table in the key too.
///
/// # Panics
/// If two parts have a key in common, or one is not a map: both are mistakes of a stage kind, not of a user.
pub fn one_map(parts: impl IntoIterator<Item = Value>) -> Value {
    let mut entries = BTreeMap::new();
    for part in parts {
        let Value::Map(fields) = part else { panic!("parameters are maps") };
        for (key, value) in fields {
            assert!(entries.insert(key, value).is_none(), "parameters have distinct names");
        }
    }
    Value::Map(entries)
}

/// A parameter of a type that a key cannot hold (such as a map with keys that are no strings).
#[derive(Debug, thiserror::Error)]
#[error("a parameter cannot be written into a key: {0}")]
pub struct NotAKey(String);

impl ser::Error for NotAKey {
    fn custom<T: Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

struct ToValue;

impl Serializer for ToValue {
    type Ok = Value;
    type Error = NotAKey;
    type SerializeSeq = List;
    type SerializeTuple = List;
    type SerializeTupleStruct = List;
    type SerializeTupleVariant = Variant<List>;
    type SerializeMap = Map;
    type SerializeStruct = Map;
    type SerializeStructVariant = Variant<Map>;

    fn serialize_bool(self, v: bool) -> Result<Value, NotAKey> {
        Ok(Value::Bool(v))
    }
    fn serialize_i8(self, v: i8) -> Result<Value, NotAKey> {
        Ok(Value::Int(v.into()))
    }
    fn serialize_i16(self, v: i16) -> Result<Value, NotAKey> {
        Ok(Value::Int(v.into()))
    }
    fn serialize_i32(self, v: i32) -> Result<Value, NotAKey> {
        Ok(Value::Int(v.into()))
    }
    fn serialize_i64(self, v: i64) -> Result<Value, NotAKey> {
        Ok(Value::Int(v))
    }
    fn serialize_u8(self, v: u8) -> Result<Value, NotAKey> {
        Ok(Value::Int(v.into()))
    }
    fn serialize_u16(self, v: u16) -> Result<Value, NotAKey> {
        Ok(Value::Int(v.into()))
    }
    fn serialize_u32(self, v: u32) -> Result<Value, NotAKey> {
        Ok(Value::Int(v.into()))
    }
    fn serialize_u64(self, v: u64) -> Result<Value, NotAKey> {
        i64::try_from(v).map(Value::Int).map_err(|_| NotAKey(format!("{v} is too large")))
    }
    fn serialize_f32(self, v: f32) -> Result<Value, NotAKey> {
        // By way of its shortest decimal form: the key then shows the 0.3 that the user wrote, not 0.30000001192092896.
        let shortest = v.to_string().parse().map_err(|_| NotAKey(format!("{v} is no number")))?;
        Ok(Value::Float(shortest))
    }
    fn serialize_f64(self, v: f64) -> Result<Value, NotAKey> {
        Ok(Value::Float(v))
    }
    fn serialize_char(self, v: char) -> Result<Value, NotAKey> {
        Ok(Value::Text(v.to_string()))
    }
    fn serialize_str(self, v: &str) -> Result<Value, NotAKey> {
        Ok(Value::Text(v.to_owned()))
    }
    fn serialize_bytes(self, v: &[u8]) -> Result<Value, NotAKey> {
        Ok(Value::Bytes(v.to_vec()))
    }
    fn serialize_none(self) -> Result<Value, NotAKey> {
        Ok(Value::Null)
    }
    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Value, NotAKey> {
        value.serialize(self)
    }
    fn serialize_unit(self) -> Result<Value, NotAKey> {
        Ok(Value::Null)
    }
    fn serialize_unit_struct(self, _: &'static str) -> Result<Value, NotAKey> {
        Ok(Value::Null)
    }
    fn serialize_unit_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
    ) -> Result<Value, NotAKey> {
        Ok(Value::Text(variant.to_owned()))
    }
    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        value: &T,
    ) -> Result<Value, NotAKey> {
        if name == FILE_PATH || name == OUTPUT_PATH { Ok(Value::Null) } else { value.serialize(self) }
    }
    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<Value, NotAKey> {
        Ok(tagged(variant, value.serialize(self)?))
    }
    fn serialize_seq(self, _: Option<usize>) -> Result<List, NotAKey> {
        Ok(List(Vec::new()))
    }
    fn serialize_tuple(self, _: usize) -> Result<List, NotAKey> {
        Ok(List(Vec::new()))
    }
    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<List, NotAKey> {
        Ok(List(Vec::new()))
    }
    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Variant<List>, NotAKey> {
        Ok(Variant { name: variant, inner: List(Vec::new()) })
    }
    fn serialize_map(self, _: Option<usize>) -> Result<Map, NotAKey> {
        Ok(Map::default())
    }
    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Map, NotAKey> {
        Ok(Map::default())
    }
    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Variant<Map>, NotAKey> {
        Ok(Variant { name: variant, inner: Map::default() })
    }
}

fn tagged(variant: &str, value: Value) -> Value {
    Value::Map(BTreeMap::from([(variant.to_owned(), value)]))
}

struct List(Vec<Value>);

impl List {
    fn push<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), NotAKey> {
        self.0.push(to_value(value)?);
        Ok(())
    }
}

#[derive(Default)]
struct Map {
    entries: BTreeMap<String, Value>,
    key: Option<String>,
}

impl Map {
    fn insert<T: Serialize + ?Sized>(&mut self, key: &str, value: &T) -> Result<(), NotAKey> {
        self.entries.insert(key.to_owned(), to_value(value)?);
        Ok(())
    }
}

struct Variant<T> {
    name: &'static str,
    inner: T,
}

impl SerializeSeq for List {
    type Ok = Value;
    type Error = NotAKey;
    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), NotAKey> {
        self.push(value)
    }
    fn end(self) -> Result<Value, NotAKey> {
        Ok(Value::List(self.0))
    }
}

impl SerializeTuple for List {
    type Ok = Value;
    type Error = NotAKey;
    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), NotAKey> {
        self.push(value)
    }
    fn end(self) -> Result<Value, NotAKey> {
        Ok(Value::List(self.0))
    }
}

impl SerializeTupleStruct for List {
    type Ok = Value;
    type Error = NotAKey;
    fn serialize_field<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), NotAKey> {
        self.push(value)
    }
    fn end(self) -> Result<Value, NotAKey> {
        Ok(Value::List(self.0))
    }
}

impl SerializeTupleVariant for Variant<List> {
    type Ok = Value;
    type Error = NotAKey;
    fn serialize_field<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), NotAKey> {
        self.inner.push(value)
    }
    fn end(self) -> Result<Value, NotAKey> {
        Ok(tagged(self.name, Value::List(self.inner.0)))
    }
}

impl SerializeMap for Map {
    type Ok = Value;
    type Error = NotAKey;
    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), NotAKey> {
        let Value::Text(text) = to_value(key)? else {
            return Err(NotAKey("a map's keys must be strings".to_owned()));
        };
        self.key = Some(text);
        Ok(())
    }
    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), NotAKey> {
        let key = self.key.take().ok_or_else(|| NotAKey("a map's value without its key".to_owned()))?;
        self.insert(&key, value)
    }
    fn end(self) -> Result<Value, NotAKey> {
        Ok(Value::Map(self.entries))
    }
}

impl SerializeStruct for Map {
    type Ok = Value;
    type Error = NotAKey;
    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        key: &'static str,
        value: &T,
    ) -> Result<(), NotAKey> {
        self.insert(key, value)
    }
    fn end(self) -> Result<Value, NotAKey> {
        Ok(Value::Map(self.entries))
    }
}

impl SerializeStructVariant for Variant<Map> {
    type Ok = Value;
    type Error = NotAKey;
    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        key: &'static str,
        value: &T,
    ) -> Result<(), NotAKey> {
        self.inner.insert(key, value)
    }
    fn end(self) -> Result<Value, NotAKey> {
        Ok(tagged(self.name, Value::Map(self.inner.entries)))
    }
}
