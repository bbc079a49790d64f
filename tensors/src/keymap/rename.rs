//! Names that users map themselves, by rules with stars.

use std::collections::BTreeMap;

use super::KeymapError;
use super::error::listed;

/// Renames what matches `from` to `to`. Each `*` in `from` stands for any run of characters, dots included, as short as possible;
/// the stars of `to` stand for the same runs, in the same order. Without a star the rule is about one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenameRule {
    from: String,
    to: String,
}

impl RenameRule {
    pub fn new(from: impl Into<String>, to: impl Into<String>) -> Result<Self, KeymapError> {
        let (from, to) = (from.into(), to.into());
        let refused = |reason: &str| {
            let rule = format!("{from} = {to}");
            Err(KeymapError::Rule { rule, reason: reason.to_owned() })
        };
        if from.is_empty() || to.is_empty() {
            return refused("a name is empty");
        }
        if from.contains("**") {
            return refused("two stars in a row stand for the same as one");
        }
        if from.matches('*').count() != to.matches('*').count() {
            return refused("both sides need the same number of `*`");
        }
        Ok(Self { from, to })
    }

    /// Returns the new name of `name`, if the rule is about it.
    pub fn apply(&self, name: &str) -> Option<String> {
        let pieces: Vec<&str> = self.from.split('*').collect();
        let runs = match_stars(name, &pieces)?;
        let mut renamed = String::new();
        let mut runs = runs.into_iter();
        for (index, piece) in self.to.split('*').enumerate() {
            if index > 0 {
                renamed.push_str(runs.next().unwrap_or_default());
            }
            renamed.push_str(piece);
        }
        Some(renamed)
    }
}

/// Applies the first rule that matches to every name; returns the new names in the same order. A rule that is never
/// applied, and two tensors that get the same name, are refused.
pub fn rename(names: &[&str], rules: &[RenameRule]) -> Result<Vec<String>, KeymapError> {
    let mut used = vec![false; rules.len()];
    let renamed: Vec<String> = names
        .iter()
        .map(|name| {
            let found = rules.iter().enumerate().find_map(|(index, rule)| Some((index, rule.apply(name)?)));
            match found {
                Some((index, renamed)) => {
                    used[index] = true;
                    renamed
                }
                None => (*name).to_owned(),
            }
        })
        .collect();
    // A rule that an earlier one shadows is as unused as one that fits nothing.
    if let Some(unused) = used.iter().position(|used| !used) {
        let rule = format!("{} = {}", rules[unused].from, rules[unused].to);
        return Err(KeymapError::UnusedRule { rule, examples: listed(names.iter().copied()) });
    }
    let mut seen: BTreeMap<&str, &str> = BTreeMap::new();
    for (new, old) in renamed.iter().zip(names) {
        if let Some(first) = seen.insert(new, old) {
            let (name, first, second) = (new.clone(), first.to_owned(), (*old).to_owned());
            return Err(KeymapError::Collision { name, first, second });
        }
    }
    Ok(renamed)
}

/// What the gaps between `pieces` stand for, each as short as possible.
fn match_stars<'a>(name: &'a str, pieces: &[&str]) -> Option<Vec<&'a str>> {
    let (first, rest) = pieces.split_first()?;
    let mut left = name.strip_prefix(first)?;
    let Some((last, middle)) = rest.split_last() else { return left.is_empty().then(Vec::new) };
    let mut runs = Vec::new();
    for piece in middle {
        let at = left.find(piece)?;
        runs.push(&left[..at]);
        left = &left[at + piece.len()..];
    }
    runs.push(left.strip_suffix(last)?);
    Some(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(from: &str, to: &str, name: &str) -> Option<String> {
        RenameRule::new(from, to).unwrap().apply(name)
    }

    #[test]
    fn stars_stand_for_runs_in_order() {
        assert_eq!(apply("a.b", "c", "a.b").as_deref(), Some("c"));
        assert_eq!(apply("a.b", "c", "a.b.c"), None);
        assert_eq!(apply("backbone.*", "vit.*", "backbone.x.y").as_deref(), Some("vit.x.y"));
        assert_eq!(apply("*.gamma", "*.weight", "a.b.gamma").as_deref(), Some("a.b.weight"));
        assert_eq!(
            apply("layer*.fc.*", "block*.mlp.*", "layer3.fc.bias").as_deref(),
            Some("block3.mlp.bias")
        );
        assert_eq!(apply("*.a.*", "*.b.*", "x.a.y.a.z").as_deref(), Some("x.b.y.a.z"));
        assert_eq!(apply("a*a", "b*b", "a"), None);
        assert_eq!(apply("*", "model.*", "w").as_deref(), Some("model.w"));
    }

    #[test]
    fn rules_that_cannot_mean_anything_are_refused() {
        for (from, to) in [("", "a"), ("a", ""), ("a.*", "b"), ("a", "b.*"), ("**", "**")] {
            let message = RenameRule::new(from, to).unwrap_err().to_string();
            assert!(message.starts_with(&format!("rename rule `{from} = {to}` is not valid")), "{message}");
        }
    }

    #[test]
    fn mistakes_name_the_tensors() {
        let rule = |from, to| RenameRule::new(from, to).unwrap();
        let names = ["m.a", "m.b", "c"];
        assert_eq!(rename(&names, &[]).unwrap(), names);
        assert_eq!(rename(&names, &[rule("m.*", "*"), rule("c", "d")]).unwrap(), ["a", "b", "d"]);
        let message = rename(&names, &[rule("x", "y")]).unwrap_err().to_string();
        assert_eq!(
            message,
            "rename rule `x = y` matches no tensor name that an earlier one leaves (they are such as `m.a`, `m.b`, `c`)"
        );
        let message = rename(&names, &[rule("m.a", "c")]).unwrap_err().to_string();
        assert_eq!(message, "`m.a` and `c` would both be called `c`");
        let message = rename(&names, &[rule("*", "m.*"), rule("c", "d")]).unwrap_err().to_string();
        assert!(message.contains("`c = d` matches no"), "{message}");
    }
}
