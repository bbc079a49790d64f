//! Why names cannot be mapped, and what to write instead.

/// Lists long enough to recognize what is meant, short enough to read.
const SHOWN: usize = 4;

/// A refusal. Every message names tensors and what the user can do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeymapError {
    #[error("`{family}` is not a family of names; known families: {known}")]
    UnknownFamily { family: String, known: String },
    #[error("its tensor names (such as {examples}) fit no known family; `rename` rules can map them")]
    Unidentified { examples: String },
    #[error(
        "its tensor names fit more than one model: {readings}; `strip_prefix`, `only` or `skip` can choose one of them"
    )]
    Ambiguous { readings: String },
    #[error("names of family `{from}` cannot be mapped to `{to}`; possible: {possible}")]
    OtherModel { from: String, to: String, possible: String },
    #[error("tensor `{tensor}` is put together from {needed}, but {missing} not there")]
    Incomplete { tensor: String, needed: String, missing: String },
    #[error("tensor `{tensor}` of shape {shape:?} is not {expected}")]
    Shape { tensor: String, shape: Vec<usize>, expected: String },
    #[error("tensor `{tensor}` cannot be put together from parts that do not fit each other: {parts}")]
    PartsDiffer { tensor: String, parts: String },
    #[error("`{first}` and `{second}` would both be called `{name}`")]
    Collision { name: String, first: String, second: String },
    #[error("rename rule `{rule}` is not valid: {reason}")]
    Rule { rule: String, reason: String },
    #[error(
        "rename rule `{rule}` matches no tensor name that an earlier one leaves (they are such as {examples})"
    )]
    UnusedRule { rule: String, examples: String },
}

/// "`a`, `b` and 3 more".
pub(crate) fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.into_iter().collect();
    let mut text = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}
