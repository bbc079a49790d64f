//! Families of names: how one library calls the tensors of a model.
//!
//! The families of one model share *roles*: names for its tensors as the finest-grained of them stores them (queries, keys and values apart,
//! linear weights as `[out, in]`). A family is a table of its names and the roles that each of them holds. Any family maps to any other
//! of the same model through the roles, so adding one is one table and one line in [`FAMILIES`].

use std::sync::LazyLock;

use super::pattern::Pattern;
use super::{clip, sam2, vit};

/// How a library calls the tensors of a model.
pub struct Family {
    /// What users write.
    pub id: &'static str,
    /// The model whose tensors these are: families of one model map to each other.
    pub model: &'static str,
    pub summary: &'static str,
    /// Beginnings that saving a part of the model drops: `visual.` when a vision tower is saved alone.
    pub(super) roots: &'static [&'static str],
    pub(super) tensors: Vec<Stored>,
    /// Buffers that belong to the family and mean nothing elsewhere.
    pub(super) ignored: Vec<Pattern>,
}

/// One row of a family's table.
pub(super) struct Stored {
    pub(super) name: Pattern,
    /// What it holds: these roles, of equal size, one after the other along the first axis.
    pub(super) roles: Vec<Pattern>,
    pub(super) form: Form,
    /// Whether only this family has such a name, so that it is evidence.
    pub(super) telling: bool,
}

/// How a tensor holds its roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As they are.
    Plain,
    /// Its one role transposed.
    Transposed,
    /// Its one role, which another row holds too: read only where that other is missing, written always.
    Copy,
    /// Its one role under another name: read like any, written only where the other checkpoint has it.
    Alternative,
}

/// All families, those first that win when names fit two equally.
pub static FAMILIES: LazyLock<Vec<Family>> = LazyLock::new(|| {
    vec![
        clip::open_clip(),
        clip::transformers(),
        vit::timm(),
        vit::transformers_vit(),
        vit::transformers_deit(),
        vit::transformers5_vit(),
        vit::transformers5_deit(),
        sam2::meta(),
        sam2::transformers(),
    ]
});

impl Family {
    /// Finds a family by its id. Case does not matter.
    pub fn find(id: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| family.id.eq_ignore_ascii_case(id))
    }

    /// All ids, for messages.
    pub fn known() -> String {
        FAMILIES.iter().map(|family| family.id).collect::<Vec<_>>().join(", ")
    }
}

impl Stored {
    pub(super) fn plain(name: &str, role: &str) -> Self {
        Self::new(name, &[role], Form::Plain)
    }

    pub(super) fn fused(name: &str, roles: &[&str]) -> Self {
        Self::new(name, roles, Form::Plain)
    }

    pub(super) fn transposed(name: &str, role: &str) -> Self {
        Self::new(name, &[role], Form::Transposed)
    }

    pub(super) fn copy(name: &str, role: &str) -> Self {
        Self::new(name, &[role], Form::Copy)
    }

    pub(super) fn alternative(name: &str, role: &str) -> Self {
        Self::new(name, &[role], Form::Alternative)
    }

    /// Marks a name that only this family has.
    pub(super) fn telling(mut self) -> Self {
        self.telling = true;
        self
    }

    fn new(name: &str, roles: &[&str], form: Form) -> Self {
        let roles = roles.iter().map(|role| Pattern::new(role)).collect();
        Self { name: Pattern::new(name), roles, form, telling: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_consistent() {
        for family in FAMILIES.iter() {
            assert!(family.tensors.iter().any(|stored| stored.telling), "{}", family.id);
            for (i, stored) in family.tensors.iter().enumerate() {
                assert!(!stored.roles.is_empty());
                for role in &stored.roles {
                    assert_eq!(
                        role.placeholders(),
                        stored.name.placeholders(),
                        "{}: {:?}",
                        family.id,
                        stored.name
                    );
                }
                assert!(stored.form == Form::Plain || stored.roles.len() == 1);
                let twice = family.tensors[..i].iter().any(|other| other.name == stored.name);
                assert!(!twice, "{}: {:?} is listed twice", family.id, stored.name);
                for role in &stored.roles {
                    let holders = family.tensors.iter().filter(|other| {
                        other.roles.contains(role) && matches!(other.form, Form::Plain | Form::Transposed)
                    });
                    assert_eq!(holders.count(), 1, "{}: {role:?}", family.id);
                }
            }
        }
    }

    #[test]
    fn ids_are_unique_and_found() {
        for family in FAMILIES.iter() {
            assert_eq!(Family::find(&family.id.to_uppercase()).unwrap().id, family.id);
            assert_eq!(FAMILIES.iter().filter(|other| other.id == family.id).count(), 1);
        }
        assert!(Family::find("clip").is_none());
    }

    #[test]
    fn families_of_one_model_share_most_roles() {
        for family in FAMILIES.iter() {
            for other in FAMILIES.iter().filter(|other| other.model == family.model) {
                let has = |role: &Pattern| other.tensors.iter().any(|stored| stored.roles.contains(role));
                let roles: Vec<&Pattern> = family.tensors.iter().flat_map(|stored| &stored.roles).collect();
                let shared = roles.iter().filter(|role| has(role)).count();
                assert!(
                    shared * 10 >= roles.len() * 7,
                    "{} and {}: {shared} of {}",
                    family.id,
                    other.id,
                    roles.len()
                );
            }
        }
    }
}
