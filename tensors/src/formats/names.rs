//! Which tensors of a file are meant, what they are called, and what is said about it.
//!
//! PyTorch files are often a training script's dictionary around the model, or a wrapper object. Names are what other stages bind
//! to, so the wrapping is removed, by rules that depend on the file alone:
//!
//! * `module.` (`DataParallel`) and `_orig_mod.` (`torch.compile`) are removed when every tensor has them. They are never part of
//!   a model.
//! * `model.` is removed, once, when every tensor has it and the tensors were themselves wrapped: they lay under a key such as
//!   `state_dict`, or the file is a whole pickled module. In a plain state dict it is left, since there it may be the model's own.
//! * A prefix that the user gives replaces these rules; the empty one leaves all names as stored.
//!
//! Nothing of this is silent: every step is a [`Note`], and [`TensorRegion::stored_name`] keeps the name as stored.

use std::fmt;

use crate::formats::{FilePart, FormatProblem, TensorRegion};

/// Which part of a file is meant, and how its names become tensor names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Entry of the file's dictionary that holds the tensors. By default it is found when there is no doubt.
    pub key: Option<String>,
    /// Removed from the beginning of every name that has it. By default only what wrappers add is removed.
    pub strip_prefix: Option<String>,
}

/// Something about a file that its reader should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// The tensors are those of one entry of the file's dictionary.
    Key { key: String },
    /// The file holds a module rather than a state dict.
    Module { class: String },
    /// A prefix was removed from this many names.
    Stripped { prefix: String, tensors: usize },
    /// Entries that hold no tensor, or other tensors than those that were asked for.
    LeftOut { entries: usize, example: String, what: String },
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key { key } => write!(f, "read the tensors under `{key}`"),
            Self::Module { class } => write!(f, "read the pickled module `{class}` without executing it"),
            Self::Stripped { prefix, tensors } => write!(f, "stripped `{prefix}` from {tensors} names"),
            Self::LeftOut { entries: 1, example, what } => write!(f, "left out `{example}`: {what}"),
            Self::LeftOut { entries, example, what } => {
                write!(f, "left out {entries} entries such as `{example}`: {what}")
            }
        }
    }
}

/// Removes what wrappers add, when every tensor has it; `wrapped` says whether that may be `model.`.
pub(super) fn strip_wrappers(tensors: &mut [TensorRegion], wrapped: bool) -> Vec<Note> {
    let mut notes = Vec::new();
    let mut model_prefixes = usize::from(wrapped);
    while let Some(prefix) = ["module.", "_orig_mod.", "model."].into_iter().find(|prefix| {
        (*prefix != "model." || model_prefixes > 0)
            && !tensors.is_empty()
            && tensors.iter().all(|tensor| has_prefix(&tensor.info.name, prefix))
    }) {
        if prefix == "model." {
            model_prefixes -= 1;
        }
        for tensor in &mut *tensors {
            rename(tensor, prefix.len());
        }
        notes.push(Note::Stripped { prefix: prefix.to_owned(), tensors: tensors.len() });
    }
    notes
}

/// Removes `prefix` from every name that has it.
pub(super) fn strip_given(parts: &mut [FilePart], prefix: &str) -> Result<(), FormatProblem> {
    if prefix.is_empty() {
        return Ok(());
    }
    let mut found = false;
    for part in &mut *parts {
        let mut tensors = 0;
        for tensor in part.tensors.iter_mut().filter(|tensor| has_prefix(&tensor.info.name, prefix)) {
            rename(tensor, prefix.len());
            tensors += 1;
        }
        if tensors > 0 {
            found = true;
            part.notes.push(Note::Stripped { prefix: prefix.to_owned(), tensors });
            part.tensors.sort_by(|left, right| left.info.name.cmp(&right.info.name));
        }
    }
    if !found {
        return Err(FormatProblem::NoSuchPrefix(prefix.to_owned()));
    }
    let mut names: Vec<&str> =
        // A base has the names of what it is added to.
        parts.iter().filter(|part| part.base.is_none()).flat_map(|part| &part.tensors).map(|tensor| tensor.info.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(FormatProblem::DuplicateTensor(pair[0].to_owned())),
        None => Ok(()),
    }
}

/// A prefix is not a whole name.
fn has_prefix(name: &str, prefix: &str) -> bool {
    name.len() > prefix.len() && name.starts_with(prefix)
}

fn rename(tensor: &mut TensorRegion, prefix_length: usize) {
    let stripped = tensor.info.name[prefix_length..].to_owned();
    let stored = std::mem::replace(&mut tensor.info.name, stripped);
    tensor.stored_name.get_or_insert(stored);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::dtype::TensorInfo;

    fn tensors(names: &[&str]) -> Vec<TensorRegion> {
        let region = |name: &&str| {
            let info = TensorInfo { name: (*name).to_owned(), dtype: DType::U8, shape: vec![] };
            TensorRegion::plain(info, 0, 1)
        };
        names.iter().map(region).collect()
    }

    #[track_caller]
    fn check(names: &[&str], wrapped: bool, expected: &[&str]) {
        let mut tensors = tensors(names);
        strip_wrappers(&mut tensors, wrapped);
        assert_eq!(tensors.iter().map(|tensor| tensor.info.name.as_str()).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn only_what_all_names_have_is_stripped() {
        check(&["module.a", "module.b.c"], false, &["a", "b.c"]);
        check(&["module.a", "b"], true, &["module.a", "b"]);
        check(&["model.a", "model.b"], false, &["model.a", "model.b"]);
        check(&["model.a", "model.b"], true, &["a", "b"]);
        check(&["model.model.a"], true, &["model.a"]);
        check(&["_orig_mod.module.model.a"], true, &["a"]);
        check(&["module."], true, &["module."]);
        check(&[], true, &[]);
    }

    #[test]
    fn the_stored_name_is_the_first_one() {
        let mut tensors = tensors(&["module.model.a"]);
        let notes = strip_wrappers(&mut tensors, true);
        assert_eq!(tensors[0].stored_name.as_deref(), Some("module.model.a"));
        assert_eq!(notes[1].to_string(), "stripped `model.` from 1 names");
    }

    #[test]
    fn a_given_prefix_must_exist_and_must_not_make_names_equal() {
        let part = |names: &[&str]| FilePart {
            path: "x".into(),
            size: 9,
            tensors: tensors(names),
            notes: vec![],
            base: None,
        };
        let mut parts = [part(&["a.z", "b"])];
        strip_given(&mut parts, "a.").unwrap();
        assert_eq!(parts[0].tensors[1].info.name, "z");
        strip_given(&mut parts, "").unwrap();
        assert_eq!(strip_given(&mut parts, "q."), Err(FormatProblem::NoSuchPrefix("q.".into())));
        let mut parts = [part(&["a.b"]), part(&["b"])];
        assert_eq!(strip_given(&mut parts, "a."), Err(FormatProblem::DuplicateTensor("b".into())));
    }
}
