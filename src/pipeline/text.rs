//! Small grammars that `--set` and stage references share: lists split at commas outside brackets and quotes, values that may be
//! bare words, and the same values written back.

use super::lower;
use super::problems::Problems;
use merganser_stages::params::{Entry, Node, NodeValue, Problem, Span};
use std::fmt::Write;
use std::ops::Range;

/// Splits at the commas that are in no brackets and no quotes; pieces are trimmed and may be empty.
pub(super) fn split_list(text: &str, range: Range<usize>) -> Vec<Range<usize>> {
    let mut pieces = Vec::new();
    let (mut start, mut depth) = (range.start, 0usize);
    let mut quote: Option<char> = None;
    let mut escaped = false;
    for (index, character) in
        text[range.clone()].char_indices().map(|(index, character)| (range.start + index, character))
    {
        if let Some(open) = quote {
            if escaped {
                escaped = false;
            } else if character == '\\' && open == '"' {
                escaped = true;
            } else if character == open {
                quote = None;
            }
            continue;
        }
        match character {
            // A quote inside a bare word (`it's`) opens nothing.
            '"' | '\''
                if depth > 0
                    || text[start..index].trim_end().ends_with('=')
                    || text[start..index].trim().is_empty() =>
            {
                quote = Some(character);
            }
            '[' | '{' => depth += 1,
            ']' | '}' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                pieces.push(trimmed(text, start..index));
                start = index + 1;
            }
            _ => {}
        }
    }
    pieces.push(trimmed(text, start..range.end));
    pieces
}

/// Shrinks a range to leave out white space at both ends.
pub(super) fn trimmed(text: &str, range: Range<usize>) -> Range<usize> {
    let piece = &text[range.clone()];
    let start = range.start + (piece.len() - piece.trim_start().len());
    start..start + piece.trim().len()
}

/// Reads a TOML value, or a bare word as a string.
pub(super) fn value_or_word(
    text: &str,
    range: Range<usize>,
    file: u32,
    problems: &mut Problems,
) -> Result<Node, Problem> {
    let piece = &text[range.clone()];
    let span = Span { file, start: range.start as u32, end: range.end as u32 };
    match lower::value(text, range, file, problems) {
        Ok(node) => Ok(node),
        Err(problem) if piece.starts_with(['"', '\'', '[', '{']) => Err(problem),
        Err(_) => Ok(Node { span, value: NodeValue::String(piece.to_owned()) }),
    }
}

/// Reads a value that has no place in a file, such as one in a stage name on the command line.
pub(super) fn loose_value(text: &str) -> NodeValue {
    value_or_word(text, 0..text.len(), 0, &mut Problems::default())
        .map_or_else(|_| NodeValue::String(text.to_owned()), |node| node.value)
}

/// Writes a value as TOML would, with strings bare where [`loose_value`] reads them back.
pub(super) fn write_loose(value: &NodeValue) -> String {
    match value {
        NodeValue::String(text) if is_bare(text) => text.clone(),
        _ => write_toml(value),
    }
}

fn is_bare(text: &str) -> bool {
    let is_plain = |character: char| character.is_ascii_alphanumeric() || "_-./+".contains(character);
    !text.is_empty()
        && text.chars().all(is_plain)
        && matches!(loose_value(text), NodeValue::String(read) if read == text)
}

fn write_toml(value: &NodeValue) -> String {
    match value {
        NodeValue::Bool(value) => value.to_string(),
        NodeValue::Integer(value) => value.to_string(),
        NodeValue::Float(value) => write_float(*value),
        NodeValue::String(text) => quoted(text),
        NodeValue::Array(items) => {
            let items: Vec<String> = items.iter().map(|item| write_toml(&item.value)).collect();
            format!("[{}]", items.join(","))
        }
        NodeValue::Table(table) => {
            let write_entry = |(key, entry): (&String, &Entry)| {
                let key = if is_name(key) { key.clone() } else { quoted(key) };
                format!("{key}={}", write_toml(&entry.node.value))
            };
            let entries: Vec<String> = table.iter().map(write_entry).collect();
            format!("{{{}}}", entries.join(","))
        }
    }
}

/// Writes a float so that it reads back as the same float, never as an integer.
pub(super) fn write_float(value: f64) -> String {
    format!("{value:?}")
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            _ if character.is_control() => {
                let _ = write!(out, "\\u{:04X}", character as u32);
            }
            _ => out.push(character),
        }
    }
    out.push('"');
    out
}

/// Whether a stage, a variable or an `each` name may be called this.
pub(super) fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|character| character.is_alphanumeric() || "_-".contains(character))
}

/// Whether two values are the same value, wherever they were written; `2` is `2.0`.
pub(super) fn same_value(left: &NodeValue, right: &NodeValue) -> bool {
    match (left, right) {
        (NodeValue::Integer(integer), NodeValue::Float(float))
        | (NodeValue::Float(float), NodeValue::Integer(integer)) => *integer as f64 == *float,
        (NodeValue::Array(left), NodeValue::Array(right)) => {
            left.len() == right.len()
                && left.iter().zip(right).all(|(left, right)| same_value(&left.value, &right.value))
        }
        (NodeValue::Table(left), NodeValue::Table(right)) => {
            let same = |(key, entry): (&String, &Entry)| {
                right.get(key).is_some_and(|other| same_value(&entry.node.value, &other.node.value))
            };
            left.len() == right.len() && left.iter().all(same)
        }
        (left, right) => left == right,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(text: &str) -> Vec<&str> {
        split_list(text, 0..text.len()).into_iter().map(|range| &text[range]).collect()
    }

    #[test]
    fn splits_at_commas_outside_brackets_and_quotes() {
        assert_eq!(split("2,3"), ["2", "3"]);
        assert_eq!(
            split(" 2 , [1,2] ,{a=1,b=2}, \"x,\\\"y\" , 'p,q'"),
            ["2", "[1,2]", "{a=1,b=2}", "\"x,\\\"y\"", "'p,q'"]
        );
        assert_eq!(split("it's,fine"), ["it's", "fine"]);
        assert_eq!(split("a=\"x,y\",b"), ["a=\"x,y\"", "b"]);
        assert_eq!(split(""), [""]);
        assert_eq!(split("2,"), ["2", ""]);
    }

    #[test]
    fn reads_bare_words_as_strings() {
        assert_eq!(loose_value("fast"), NodeValue::String("fast".into()));
        assert_eq!(loose_value("data/x.toml"), NodeValue::String("data/x.toml".into()));
        assert_eq!(loose_value("3"), NodeValue::Integer(3));
        assert_eq!(loose_value("\"3\""), NodeValue::String("3".into()));
        assert_eq!(loose_value("true"), NodeValue::Bool(true));
        assert_eq!(loose_value("0.5"), NodeValue::Float(0.5));
    }

    #[test]
    fn writes_strings_bare_only_where_they_stay_strings() {
        let text = |text: &str| write_loose(&NodeValue::String(text.into()));
        assert_eq!(text("fast"), "fast");
        assert_eq!(text("3"), "\"3\"");
        assert_eq!(text("true"), "\"true\"");
        assert_eq!(text("a b"), "\"a b\"");
        assert_eq!(text(""), "\"\"");
        assert_eq!(write_loose(&NodeValue::Float(1.0)), "1.0");
    }

    proptest! {
        #[test]
        fn reads_back_what_it_writes(text in "\\PC*", float in proptest::num::f64::NORMAL, integer: i64) {
            for value in [NodeValue::String(text), NodeValue::Float(float), NodeValue::Integer(integer)] {
                prop_assert_eq!(loose_value(&write_loose(&value)), value);
            }
        }

        #[test]
        fn splits_any_text(text in "\\PC*") {
            for range in split_list(&text, 0..text.len()) {
                let _ = value_or_word(&text, range, 0, &mut Problems::default());
            }
        }
    }
}
