//! How `from`, `--stage` and commands name a stage, an instance of it, or a member of its collection:
//! `packed`, `packed[bits=3]`, `deltas[digits]`, `packed[bits=3,task=digits]`.

use super::text::{loose_value, split_list, trimmed};
use merganser_stages::params::NodeValue;

/// A reference taken apart.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct StageReference {
    pub(super) stage: String,
    pub(super) picks: Vec<Pick>,
}

/// One entry in brackets.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Pick {
    /// `bits=3` or `task=digits`.
    Named { name: String, value: NodeValue, text: String },
    /// `digits`
    Member(String),
}

impl StageReference {
    /// Takes a reference apart, or says what is wrong with its form.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let Some(open) = text.find('[') else {
            return Ok(Self { stage: text.to_owned(), picks: Vec::new() });
        };
        if !text.ends_with(']') {
            return Err(format!("`{text}` does not end with `]`"));
        }
        let mut picks = Vec::new();
        for range in split_list(text, open + 1..text.len() - 1) {
            let entry = &text[range.clone()];
            if entry.is_empty() {
                return Err(format!("an entry in the brackets of `{text}` is empty"));
            }
            picks.push(match entry.find('=').filter(|_| !entry.starts_with(['"', '\''])) {
                None => Pick::Member(as_name(&loose_value(entry), entry)),
                Some(equals) => {
                    let name = entry[..equals].trim().to_owned();
                    let value = &entry[trimmed(entry, equals + 1..entry.len())];
                    let value = loose_value(value);
                    Pick::Named { name, text: as_name(&value, entry[equals + 1..].trim()), value }
                }
            });
        }
        Ok(Self { stage: text[..open].trim().to_owned(), picks })
    }
}

/// Members are named by strings; `2` in a list of members is the member `2`.
fn as_name(value: &NodeValue, written: &str) -> String {
    match value {
        NodeValue::String(text) => text.clone(),
        _ => written.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_references_apart() {
        let parsed = StageReference::parse(" packed[bits=3, \"a b\"] ").unwrap();
        assert_eq!(parsed.stage, "packed");
        let bits = Pick::Named { name: "bits".into(), value: NodeValue::Integer(3), text: "3".into() };
        assert_eq!(parsed.picks, [bits, Pick::Member("a b".into())]);
        assert_eq!(
            StageReference::parse("base").unwrap(),
            StageReference { stage: "base".into(), picks: vec![] }
        );
        let nested = StageReference::parse("m[tasks=[\"a\",\"b\"],x=\"p,q\"]").unwrap();
        assert_eq!(nested.picks.len(), 2);
    }

    #[test]
    fn refuses_broken_brackets() {
        for text in ["packed[bits=3", "packed[]", "packed[bits=3,]", "packed[bits=3]x"] {
            assert!(StageReference::parse(text).is_err(), "{text}");
        }
    }
}
