//! Paths as parameters: files that a stage reads, and places that it writes to.
//!
//! Only [`parse`](super::parse) deserializes them: it knows which folder a relative path starts from.

use super::deserialize::{FILE_PATH, OUTPUT_PATH, PATH_OR};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{EnumAccess, Error, VariantAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

/// A file or folder that a stage reads; relative paths are relative to the pipeline file. An address (`hf://org/repo/file`) is written in
/// the same place; its path is where the file lies on this machine, so that a stage need not know the difference.
///
/// INVARIANT: it never enters a key as a path. It serializes as a marker, and the stage lists it in
/// [`Stage::sources`](crate::Stage::sources), whose contents enter the key by digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilePath {
    /// As the user wrote it, for messages.
    pub written: String,
    /// Resolved against the folder of the file it was written in.
    pub path: PathBuf,
}

/// A place that a stage's output is copied to; it does not enter the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputPath(pub FilePath);

/// A parameter that is written in place or kept in a file of its own.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PathOr<T> {
    Path(FilePath),
    Value(T),
}

impl FilePath {
    /// Names a file beside this one.
    #[must_use]
    pub fn sibling(&self, name: &str) -> Self {
        let path = self.path.with_file_name(name);
        let written = Path::new(&self.written).with_file_name(name).display().to_string();
        Self { written, path }
    }

    /// Names a file inside this folder.
    #[must_use]
    pub fn inside(&self, name: &str) -> Self {
        let written = Path::new(&self.written).join(name).display().to_string();
        Self { written, path: self.path.join(name) }
    }
}

// The deserializer hands a path over as `written NUL resolved`: serde has no other channel for two strings in one newtype.
fn split(joined: &str) -> Option<FilePath> {
    let (written, path) = joined.split_once('\0')?;
    Some(FilePath { written: written.to_owned(), path: PathBuf::from(path) })
}

#[derive(Deserialize)]
#[serde(rename = "$merganser::FilePath")]
struct FileMarker(String);

#[derive(Deserialize)]
#[serde(rename = "$merganser::OutputPath")]
struct OutputMarker(String);

impl<'de> Deserialize<'de> for FilePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let FileMarker(joined) = FileMarker::deserialize(deserializer)?;
        split(&joined).ok_or_else(|| D::Error::custom("expected a path"))
    }
}

impl<'de> Deserialize<'de> for OutputPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let OutputMarker(joined) = OutputMarker::deserialize(deserializer)?;
        split(&joined).map(Self).ok_or_else(|| D::Error::custom("expected a path"))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for PathOr<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_enum(PATH_OR, &["path", "value"], PathOrVisitor(PhantomData))
    }
}

struct PathOrVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for PathOrVisitor<T> {
    type Value = PathOr<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path or a table")
    }

    fn visit_enum<A: EnumAccess<'de>>(self, access: A) -> Result<PathOr<T>, A::Error> {
        let (variant, content): (String, _) = access.variant()?;
        if variant == "path" {
            content.newtype_variant().map(PathOr::Path)
        } else {
            content.newtype_variant().map(PathOr::Value)
        }
    }
}

impl Serialize for FilePath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_newtype_struct(FILE_PATH, &())
    }
}

impl Serialize for OutputPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_newtype_struct(OUTPUT_PATH, &())
    }
}

fn path_schema(description: &str) -> Schema {
    json_schema!({ "type": "string", "format": "path", "description": description })
}

impl JsonSchema for FilePath {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "path".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        path_schema(
            "a path, relative to the file it is written in, or an address: `hf://org/repo/file`, `https://…`, `s3://…`",
        )
    }
}

impl<T: JsonSchema> JsonSchema for PathOr<T> {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        format!("path-or-{}", T::schema_name()).into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let path = generator.subschema_for::<FilePath>();
        let value = generator.subschema_for::<T>();
        json_schema!({ "anyOf": [path, value] })
    }
}

impl JsonSchema for OutputPath {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "output-path".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        path_schema("a path to write to, relative to the file it is written in")
    }
}
