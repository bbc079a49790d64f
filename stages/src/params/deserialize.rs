//! serde over spanned nodes: an error knows the value or the key that it is about.

use super::{Entry, Node, NodeValue, Problem, Span, Table, did_you_mean};
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess,
    SeqAccess, Unexpected, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use std::collections::BTreeSet;
use std::fmt::{self, Display};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

pub(super) const FILE_PATH: &str = "$merganser::FilePath";
pub(super) const OUTPUT_PATH: &str = "$merganser::OutputPath";
pub(super) const PATH_OR: &str = "$merganser::PathOr";

/// What parsing needs to know beside the nodes.
#[derive(Clone, Debug, Default)]
pub struct ParseContext {
    /// Per file of the pipeline, the folder that relative paths start from.
    pub folders: Vec<PathBuf>,
    /// Where files with addresses lie; without it every path is one of this machine.
    pub remotes: Option<Arc<dyn Remotes>>,
    /// The addresses that parsing came across; clones share them.
    pub addresses: Arc<Mutex<BTreeSet<String>>>,
}

impl ParseContext {
    /// The addresses that parsing came across since this was last called.
    pub fn take_addresses(&self) -> BTreeSet<String> {
        std::mem::take(&mut self.addresses.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Knows where files with addresses such as `hf://org/repo/file` lie on this machine.
pub trait Remotes: fmt::Debug + Send + Sync {
    /// The path of what an address means; `None` for what is no address, an error for a mistake in one. What is not on this machine has
    /// a path too, at which there is nothing.
    fn locate(&self, written: &str) -> Option<Result<PathBuf, String>>;
}

/// A stage's own table (without the keys that the application handles), ready to be parsed by its kind.
#[derive(Clone, Debug)]
pub struct Params<'a> {
    /// Where problems about the table as a whole point to: its `kind`.
    pub span: Span,
    pub table: Table,
    pub context: &'a ParseContext,
}

impl Params<'_> {
    /// Takes a string out of the table, such as the `method` that decides how the rest is read.
    fn take_string(&mut self, key: &str) -> Option<Result<(String, Span), Problem>> {
        let Entry { node, .. } = self.table.shift_remove(key)?;
        Some(match node.as_str() {
            Some(text) => Ok((text.to_owned(), node.span)),
            None => {
                Err(Problem::new("wrong-type", format!("`{key}` must be a string, got {}", node.type_name()))
                    .at(node.span))
            }
        })
    }

    /// Takes the key that chooses how the rest is read (`method`, `scheme`), and returns what it names among `choices`; the default if there is
    /// one and the key is not there.
    pub fn choose<'c, T: ?Sized>(
        &mut self,
        key: &'static str,
        choices: &'c [&'c T],
        id: impl Fn(&T) -> &'static str,
        default: Option<&'c T>,
    ) -> Result<&'c T, Problem> {
        let known = choices.iter().map(|choice| id(choice));
        match self.take_string(key).transpose()? {
            None => default.ok_or_else(|| Problem {
                help: did_you_mean("", known),
                ..Problem::new("missing-key", format!("missing key `{key}`")).at(self.span)
            }),
            Some((word, span)) => {
                let found = choices.iter().copied().find(|choice| id(choice) == word);
                found.ok_or_else(|| Problem {
                    help: did_you_mean(&word, known),
                    ..Problem::new("unknown-method", format!("unknown {key} `{word}`")).at(span)
                })
            }
        }
    }

    /// Splits off the keys that `T` knows; the rest stays.
    #[must_use]
    pub fn split_off(&mut self, keys: &[&str]) -> Self {
        let (taken, left) =
            std::mem::take(&mut self.table).into_iter().partition(|(key, _)| keys.contains(&key.as_str()));
        self.table = left;
        Self { span: self.span, table: taken, context: self.context }
    }
}

/// Parses a table into `T`, reporting every mistake in it.
///
/// serde stops at its first error, so the entry that an error is about is set aside and parsing starts again; a required key that was
/// set aside is not reported as missing too.
pub fn parse<T: DeserializeOwned>(params: &Params<'_>) -> Result<T, Vec<Problem>> {
    let mut table = params.table.clone();
    let mut problems = Vec::new();
    let mut set_aside: Vec<String> = Vec::new();
    loop {
        let result =
            T::deserialize(TableDeserializer { table: &table, span: params.span, context: params.context });
        match result {
            Ok(parsed) if problems.is_empty() => return Ok(parsed),
            Ok(_) => return Err(problems),
            Err(error) => {
                if let Some(missing) = &error.missing {
                    if !set_aside.contains(missing) {
                        problems.push(error.into_problem(params.span));
                    }
                    return Err(problems);
                }
                let entry = error.entry.clone();
                problems.push(error.into_problem(params.span));
                match entry.filter(|key| table.shift_remove(key).is_some()) {
                    Some(key) => set_aside.push(key),
                    None => return Err(problems),
                }
            }
        }
    }
}

/// An error of one value; becomes a [`Problem`].
#[derive(Debug)]
struct ParamError {
    code: &'static str,
    message: String,
    help: Option<String>,
    span: Option<Span>,
    /// The top-level key that it is inside of.
    entry: Option<String>,
    missing: Option<String>,
}

impl ParamError {
    fn new(code: &'static str, message: String) -> Self {
        Self { code, message, help: None, span: None, entry: None, missing: None }
    }

    fn at(mut self, span: Span) -> Self {
        self.span.get_or_insert(span);
        self
    }

    fn into_problem(self, fallback: Span) -> Problem {
        Problem {
            code: self.code,
            message: self.message,
            span: Some(self.span.unwrap_or(fallback)),
            help: self.help,
        }
    }
}

impl Display for ParamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ParamError {}

impl de::Error for ParamError {
    fn custom<T: Display>(message: T) -> Self {
        Self::new("bad-value", message.to_string())
    }

    fn invalid_type(unexpected: Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::new("wrong-type", format!("expected {}, got {unexpected}", in_words(expected)))
    }

    fn invalid_value(unexpected: Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::new("bad-value", format!("expected {}, got {unexpected}", in_words(expected)))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let mut error = Self::new("unknown-key", format!("unknown key `{field}`"));
        error.help = did_you_mean(field, expected.iter().copied());
        error
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        let mut error = Self::new("bad-value", format!("unknown value `{variant}`"));
        error.help = did_you_mean(variant, expected.iter().copied());
        error
    }

    fn missing_field(field: &'static str) -> Self {
        let mut error = Self::new("missing-key", format!("missing key `{field}`"));
        error.missing = Some(field.to_owned());
        error
    }
}

/// What serde expects, without the names of Rust's types.
fn in_words(expected: &dyn de::Expected) -> String {
    match expected.to_string().as_str() {
        "u8" => "an integer from 0 to 255".to_owned(),
        "u16" | "u32" | "u64" | "usize" => "an integer that is not negative".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "an integer".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "a table".to_owned(),
        other => match other.strip_prefix("struct ") {
            Some(_) => "a table".to_owned(),
            None => other.to_owned(),
        },
    }
}

#[derive(Clone, Copy)]
struct NodeDeserializer<'a> {
    node: &'a Node,
    context: &'a ParseContext,
}

impl<'a> NodeDeserializer<'a> {
    fn path(self, is_output: bool) -> Result<String, ParamError> {
        let Some(written) = self.node.as_str() else {
            return Err(ParamError::new(
                "wrong-type",
                format!("expected a path, got {}", self.node.type_name()),
            )
            .at(self.node.span));
        };
        if written.is_empty() || written.contains('\0') {
            return Err(ParamError::new("bad-value", "expected a path, got an empty string".to_owned())
                .at(self.node.span));
        }
        if let Some(located) = self.context.remotes.as_ref().and_then(|remotes| remotes.locate(written)) {
            let bad = |message| ParamError::new("bad-address", message).at(self.node.span);
            if is_output {
                return Err(bad(format!("`{written}` is an address, and only folders can be written to")));
            }
            let path = located.map_err(bad)?;
            self.context.addresses.lock().unwrap_or_else(PoisonError::into_inner).insert(written.to_owned());
            return Ok(format!("{written}\0{}", path.display()));
        }
        let folder = self.context.folders.get(self.node.span.file as usize).cloned().unwrap_or_default();
        Ok(format!("{written}\0{}", folder.join(written).display()))
    }

    fn visit<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, ParamError> {
        match &self.node.value {
            NodeValue::Bool(value) => visitor.visit_bool(*value),
            NodeValue::Integer(value) => visitor.visit_i64(*value),
            NodeValue::Float(value) => visitor.visit_f64(*value),
            NodeValue::String(value) => visitor.visit_str(value),
            NodeValue::Array(items) => {
                visitor.visit_seq(Items { items: items.iter(), context: self.context })
            }
            NodeValue::Table(table) => {
                visitor.visit_map(Entries { rest: table.iter(), current: None, context: self.context })
            }
        }
    }
}

impl<'de> Deserializer<'de> for NodeDeserializer<'de> {
    type Error = ParamError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamError> {
        self.visit(visitor).map_err(|error| error.at(self.node.span))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, ParamError> {
        if name == FILE_PATH || name == OUTPUT_PATH {
            return visitor.visit_newtype_struct(self.path(name == OUTPUT_PATH)?.into_deserializer());
        }
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ParamError> {
        let result = match &self.node.value {
            value if name == PATH_OR => {
                let variant = if matches!(value, NodeValue::String(_)) { "path" } else { "value" };
                visitor.visit_enum(TableVariant {
                    name: variant,
                    key_span: self.node.span,
                    node: self.node,
                    context: self.context,
                })
            }
            NodeValue::String(variant) => visitor
                .visit_enum(<&str as IntoDeserializer<'_, ParamError>>::into_deserializer(variant.as_str())),
            NodeValue::Table(table) if table.len() == 1 => {
                let (variant, entry) = table.first().expect("the table has one entry");
                visitor.visit_enum(TableVariant {
                    name: variant,
                    key_span: entry.key_span,
                    node: &entry.node,
                    context: self.context,
                })
            }
            _ => {
                Err(ParamError::new("wrong-type", format!("expected a name, got {}", self.node.type_name())))
            }
        };
        result.map_err(|error| error.at(self.node.span))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

struct Items<'a> {
    items: std::slice::Iter<'a, Node>,
    context: &'a ParseContext,
}

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = ParamError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, ParamError> {
        let context = self.context;
        self.items.next().map(|node| seed.deserialize(NodeDeserializer { node, context })).transpose()
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len())
    }
}

struct Entries<'a> {
    rest: indexmap::map::Iter<'a, String, Entry>,
    current: Option<(&'a str, &'a Entry)>,
    context: &'a ParseContext,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = ParamError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, ParamError> {
        self.current = self.rest.next().map(|(key, entry)| (key.as_str(), entry));
        let Some((key, entry)) = self.current else { return Ok(None) };
        match seed.deserialize(<&str as IntoDeserializer<'_, ParamError>>::into_deserializer(key)) {
            Ok(parsed) => Ok(Some(parsed)),
            Err(error) => Err(in_entry(error.at(entry.key_span), key)),
        }
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, ParamError> {
        let (key, entry) = self.current.take().expect("serde asks for a key before its value");
        seed.deserialize(NodeDeserializer { node: &entry.node, context: self.context })
            .map_err(|error| in_entry(error.at(entry.node.span), key))
    }
}

/// Marks an error with the key it came from; on the way out of nested tables the outermost key wins.
fn in_entry(mut error: ParamError, key: &str) -> ParamError {
    // A key that is missing inside a nested table is an error of that table's entry.
    if let Some(missing) = error.missing.take() {
        error.message = format!("missing key `{missing}` in `{key}`");
    }
    error.entry = Some(key.to_owned());
    error
}

/// The whole table: unlike a nested node it has no value of its own to point to.
struct TableDeserializer<'a> {
    table: &'a Table,
    span: Span,
    context: &'a ParseContext,
}

impl<'de> Deserializer<'de> for TableDeserializer<'de> {
    type Error = ParamError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamError> {
        visitor
            .visit_map(Entries { rest: self.table.iter(), current: None, context: self.context })
            .map_err(|error| error.at(self.span))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

/// `{ variant = value }`: an enum variant that carries something.
struct TableVariant<'a> {
    name: &'a str,
    key_span: Span,
    node: &'a Node,
    context: &'a ParseContext,
}

impl<'de> EnumAccess<'de> for TableVariant<'de> {
    type Error = ParamError;
    type Variant = NodeDeserializer<'de>;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self::Variant), ParamError> {
        let variant = seed
            .deserialize(<&str as IntoDeserializer<'_, ParamError>>::into_deserializer(self.name))
            .map_err(|error| error.at(self.key_span))?;
        Ok((variant, NodeDeserializer { node: self.node, context: self.context }))
    }
}

impl<'de> EnumAccess<'de> for NodeDeserializer<'de> {
    type Error = ParamError;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), ParamError> {
        Ok((seed.deserialize(self)?, self))
    }
}

impl<'de> VariantAccess<'de> for NodeDeserializer<'de> {
    type Error = ParamError;

    fn unit_variant(self) -> Result<(), ParamError> {
        Err(ParamError::new("wrong-type", "expected a name alone".to_owned()).at(self.node.span))
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, ParamError> {
        seed.deserialize(self)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, ParamError> {
        self.deserialize_any(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ParamError> {
        self.deserialize_any(visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{FilePath, to_value};
    use merganser_cache::Value;
    use serde::{Deserialize, Serialize};

    #[derive(Debug, Deserialize, Serialize, PartialEq)]
    #[serde(rename_all = "kebab-case")]
    enum Mode {
        Fast,
        Scaled(f32),
    }

    fn eight() -> u8 {
        8
    }

    #[derive(Debug, Deserialize, Serialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        path: FilePath,
        #[serde(default = "eight")]
        bits: u8,
        scale: Option<f32>,
        mode: Mode,
        #[serde(default)]
        rules: Vec<Rule>,
    }

    #[derive(Debug, Deserialize, Serialize)]
    #[serde(deny_unknown_fields)]
    struct Rule {
        bits: u8,
    }

    fn span(start: u32) -> Span {
        Span { file: 0, start, end: start + 1 }
    }

    fn table(entries: Vec<(&str, NodeValue)>) -> Table {
        entries
            .into_iter()
            .zip((10..).step_by(10))
            .map(|((key, value), at)| {
                (key.to_owned(), Entry { key_span: span(at), node: Node { span: span(at + 5), value } })
            })
            .collect()
    }

    fn text(value: &str) -> NodeValue {
        NodeValue::String(value.to_owned())
    }

    fn parse_sample(entries: Vec<(&str, NodeValue)>) -> Result<Sample, Vec<Problem>> {
        let context = ParseContext { folders: vec!["/pipelines".into()], ..ParseContext::default() };
        parse(&Params { span: span(0), table: table(entries), context: &context })
    }

    #[test]
    fn fills_in_defaults_and_resolves_paths() {
        let sample = parse_sample(vec![
            ("path", text("data/a.safetensors")),
            ("mode", text("fast")),
            ("scale", NodeValue::Integer(1)),
        ])
        .unwrap();
        assert_eq!(sample.path.path, PathBuf::from("/pipelines/data/a.safetensors"));
        let Value::Map(key) = to_value(&sample).unwrap() else { panic!("a struct is a map") };
        assert_eq!(key["bits"], Value::Int(8));
        assert_eq!(key["scale"], Value::Float(1.0), "an integer for a float is the float");
        assert_eq!(key["mode"], Value::Text("fast".into()));
        assert_eq!(key["path"], Value::Null, "a path never enters a key");
    }

    #[test]
    fn reads_variants_that_carry_a_value() {
        let scaled = table(vec![("scaled", NodeValue::Float(0.5))]);
        let sample = parse_sample(vec![("path", text("a")), ("mode", NodeValue::Table(scaled))]).unwrap();
        assert_eq!(sample.mode, Mode::Scaled(0.5));
    }

    #[test]
    fn reports_every_mistake_at_its_place() {
        let rule = NodeValue::Table(table(vec![("bitz", NodeValue::Integer(2))]));
        let problems = parse_sample(vec![
            ("path", NodeValue::Integer(3)),
            ("bitts", NodeValue::Integer(4)),
            ("bits", NodeValue::Integer(400)),
            ("mode", text("fsat")),
            ("rules", NodeValue::Array(vec![Node { span: span(99), value: rule }])),
        ])
        .unwrap_err();
        let seen: Vec<_> =
            problems.iter().map(|p| (p.code, p.span.unwrap().start, p.help.as_deref())).collect();
        assert_eq!(
            seen,
            [
                ("wrong-type", 15, None),
                ("unknown-key", 20, Some("did you mean `bits`?")),
                ("bad-value", 35, None),
                ("bad-value", 45, Some("did you mean `fast`?")),
                ("unknown-key", 10, Some("did you mean `bits`?")),
            ],
            "{problems:#?}"
        );
    }

    #[test]
    fn reports_a_missing_key_at_the_kind() {
        let problems = parse_sample(vec![("mode", text("fast"))]).unwrap_err();
        assert_eq!(problems.len(), 1);
        assert_eq!((problems[0].message.as_str(), problems[0].span), ("missing key `path`", Some(span(0))));
    }
}
