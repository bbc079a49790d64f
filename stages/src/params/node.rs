//! A value of the pipeline file and where it was written.

use indexmap::IndexMap;

/// A byte range in one of the pipeline's files (`include` may bring in several).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Span {
    /// Index into the application's list of files; command-line overrides count as a file.
    pub file: u32,
    pub start: u32,
    pub end: u32,
}

/// A value with its position.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub span: Span,
    pub value: NodeValue,
}

/// What TOML can say, less dates (no parameter is one).
#[derive(Clone, Debug, PartialEq)]
pub enum NodeValue {
    Bool(bool),
    Integer(i64),
    Float(f64),
    String(String),
    Array(Vec<Node>),
    Table(Table),
}

/// A table in the order of the file.
pub type Table = IndexMap<String, Entry>;

/// A key's position and its value.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub key_span: Span,
    pub node: Node,
}

impl Node {
    /// Returns the string, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        match &self.value {
            NodeValue::String(text) => Some(text),
            _ => None,
        }
    }

    /// Returns the table, if it is one.
    pub fn as_table(&self) -> Option<&Table> {
        match &self.value {
            NodeValue::Table(table) => Some(table),
            _ => None,
        }
    }

    /// Names the type as a message would: "a string", "an array".
    pub fn type_name(&self) -> &'static str {
        match &self.value {
            NodeValue::Bool(_) => "a boolean",
            NodeValue::Integer(_) => "an integer",
            NodeValue::Float(_) => "a float",
            NodeValue::String(_) => "a string",
            NodeValue::Array(_) => "an array",
            NodeValue::Table(_) => "a table",
        }
    }
}
