//! Parameters of a stage: from a spanned tree to typed values, and from typed values to the key.
//!
//! The application lowers the pipeline file to [`Node`]s (values that remember where they were written, with `${}` already
//! substituted). A stage kind turns its table into a `#[derive(Deserialize)]` struct with [`parse`], which reports *all* mistakes
//! with their positions, and gives the struct back as a [`Value`](merganser_cache::Value) with [`to_value`] after defaults are filled in:
//! that value, and nothing the user typed, enters the key.
//!
//! This module reads no file. A path is resolved against the folder of the file it was written in, never opened.

mod deserialize;
mod file_path;
mod node;
mod problem;
mod to_value;

pub use deserialize::{Params, ParseContext, Remotes, parse};
pub use file_path::{FilePath, OutputPath, PathOr};
pub use node::{Entry, Node, NodeValue, Span, Table};
pub use problem::{Problem, closest, did_you_mean};
pub use to_value::{NotAKey, one_map, to_value};
