//! Old key against new, field by field, in words.

use merganser_cache::{Change, Value};

/// One line about all changes, the most telling first.
pub fn summary(changes: &[Change]) -> String {
    let mut parts: Vec<(u8, String)> =
        changes.iter().map(|change| (rank(&change.path), describe(change))).collect();
    parts.sort();
    parts.dedup();
    match parts.len() {
        0 => "nothing in its key changed".to_owned(),
        1..=3 => parts.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join("; "),
        n => {
            let shown: Vec<String> = parts.into_iter().take(3).map(|(_, text)| text).collect();
            format!("{}; and {} more", shown.join("; "), n - 3)
        }
    }
}

/// Says what a change is about: `bits 4 → 3`, `file path changed`, `input vectors changed`.
pub fn describe(change: &Change) -> String {
    let path = change.path.as_str();
    if let Some(parameter) = path.strip_prefix("operation.parameters.") {
        return format!("{parameter} {} → {}", shown(change.old.as_ref()), shown(change.new.as_ref()));
    }
    if let Some(file) = path.strip_prefix("operation.files.") {
        let parameter = file.split('[').next().unwrap_or(file);
        return format!("contents of `{parameter}` changed");
    }
    if let Some(input) = path.strip_prefix("inputs.") {
        let port = input.split(['[', '.']).next().unwrap_or(input);
        return format!("input `{port}` changed");
    }
    let field = path.strip_prefix("operation.").unwrap_or(path);
    format!("{field} {} → {}", shown(change.old.as_ref()), shown(change.new.as_ref()))
}

fn rank(path: &str) -> u8 {
    ["operation.parameters", "operation.files", "operation", "inputs"]
        .iter()
        .position(|prefix| path.starts_with(prefix))
        .map_or(u8::MAX, |position| position as u8)
}

/// A value as the user would write it; digests are shortened.
pub fn shown(value: Option<&Value>) -> String {
    match value {
        None => "(none)".to_owned(),
        Some(Value::Null) => "(default)".to_owned(),
        Some(Value::Bool(value)) => value.to_string(),
        Some(Value::Int(value)) => value.to_string(),
        Some(Value::Float(value)) => value.to_string(),
        Some(Value::Text(value)) => value.clone(),
        Some(Value::Bytes(bytes)) => format!("{} bytes", bytes.len()),
        Some(Value::Digest(digest)) => digest.to_hex()[..12].to_owned(),
        Some(Value::List(items)) => {
            format!("[{}]", items.iter().map(|item| shown(Some(item))).collect::<Vec<_>>().join(", "))
        }
        Some(Value::Map(entries)) => {
            let fields: Vec<String> =
                entries.iter().map(|(key, value)| format!("{key} = {}", shown(Some(value)))).collect();
            format!("{{{}}}", fields.join(", "))
        }
    }
}
