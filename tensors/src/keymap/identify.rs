//! Telling from names which family a checkpoint's tensors belong to.
//!
//! Every name is held against the tables of all families, with anything before it (`module.`, `model.`) or with a family's
//! root missing. The reading that explains most tensors wins, if names that only its family has are among them and if it
//! explains at least half of the float tensors. It must also explain every telling name of every other reading: a file with two models in
//! it, or names that fit two towers equally, are ambiguous and refused.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::KeymapError;
use super::family::{FAMILIES, Family};
use super::pattern::Pattern;
use crate::dtype::TensorInfo;

/// What the names of a checkpoint say about it.
#[derive(Clone)]
pub struct Identified {
    pub family: &'static Family,
    /// How its names differ from those of the family's table.
    pub placement: Placement,
    /// Float tensors whose names are the family's, and float tensors in all.
    pub n_matched: usize,
    pub n_floats: usize,
}

/// How names of a checkpoint differ from those of the family's table: `stripped` comes before, `root` is missing.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Placement {
    /// Empty, or ends in a dot.
    pub stripped: String,
    /// Empty, or one of the family's roots, which ends in a dot.
    pub root: String,
}

impl Placement {
    /// The name in the family's table.
    pub(super) fn canonical(&self, name: &str) -> Option<String> {
        name.strip_prefix(&self.stripped).map(|rest| format!("{}{rest}", self.root))
    }

    /// The name in the checkpoint.
    pub(super) fn place(&self, canonical: &str) -> Option<String> {
        canonical.strip_prefix(&self.root).map(|rest| format!("{}{rest}", self.stripped))
    }
}

impl Identified {
    /// "`open-clip`", "`open-clip` under `model.`".
    pub fn describe(&self) -> String {
        describe(self.family, &self.placement)
    }
}

/// Returns the family of a checkpoint's names; `None` when they fit none.
pub fn identify(tensors: &[TensorInfo]) -> Result<Option<Identified>, KeymapError> {
    let names: Vec<&str> =
        tensors.iter().filter(|tensor| tensor.dtype.is_float()).map(|tensor| tensor.name.as_str()).collect();
    let readings = readings(&names);
    // The first of equals is kept: families come in the order of the registry.
    let mut best: Option<(&(usize, Placement), &Reading<'_>)> = None;
    for (place, reading) in readings.iter().filter(|(_, reading)| !reading.telling.is_empty()) {
        let rank = |(place, reading): (&(usize, Placement), &Reading<'_>)| {
            let placement = &place.1;
            // What leaves least of the names unexplained, before and within.
            (
                reading.matched.len(),
                placement.root.is_empty(),
                !is_detour(place),
                Reverse(placement.stripped.len()),
            )
        };
        if best.is_none_or(|best| rank((place, reading)) > rank(best)) {
            best = Some((place, reading));
        }
    }
    let Some((place, reading)) = best.filter(|(_, reading)| reading.matched.len() * 2 >= names.len()) else {
        return Ok(None);
    };
    let rivals: Vec<&(usize, Placement)> = readings
        .iter()
        .filter(|(other, rival)| *other != place && rivals(place, reading, other, rival))
        .map(|(other, _)| other)
        .collect();
    if !rivals.is_empty() {
        let all = std::iter::once(&place).chain(&rivals);
        let readings: Vec<String> =
            all.take(3).map(|(family, placement)| describe(&FAMILIES[*family], placement)).collect();
        return Err(KeymapError::Ambiguous { readings: readings.join(", ") });
    }
    Ok(Some(Identified {
        family: &FAMILIES[place.0],
        placement: place.1.clone(),
        n_matched: reading.matched.len(),
        n_floats: names.len(),
    }))
}

/// One way to read the names: positions in the list.
#[derive(Default)]
struct Reading<'a> {
    matched: BTreeSet<&'a str>,
    telling: BTreeSet<&'a str>,
}

/// Whether a second reading makes the best one doubtful.
fn rivals(
    place: &(usize, Placement),
    best: &Reading<'_>,
    other: &(usize, Placement),
    rival: &Reading<'_>,
) -> bool {
    if rival.telling.iter().any(|name| !best.matched.contains(name)) {
        return true;
    }
    // As good a reading as the same family, in another place: the bare tower could be either. Families that
    // call everything alike are told apart by their order.
    let as_good = rival.matched.len() == best.matched.len() && is_detour(other) == is_detour(place);
    !rival.telling.is_empty() && as_good && place.0 == other.0
}

/// Whether a reading strips one of the family's own roots: `visual.` could be a wrapper around a text tower, but is not when it can be
/// what it says.
fn is_detour((family, placement): &(usize, Placement)) -> bool {
    FAMILIES[*family].roots.iter().any(|root| placement.stripped.ends_with(root))
}

fn readings<'a>(names: &[&'a str]) -> BTreeMap<(usize, Placement), Reading<'a>> {
    let mut readings: BTreeMap<(usize, Placement), Reading<'a>> = BTreeMap::new();
    // There are hundreds of patterns and there may be many thousands of names: only those are compared that end alike.
    let mut by_end: HashMap<[&str; 2], Vec<&'a str>> = HashMap::new();
    for &name in names {
        let (before, last) = name.rsplit_once('.').unwrap_or(("", name));
        let second = before.rsplit('.').next().unwrap_or_default();
        by_end.entry([second, last]).or_default().push(name);
    }
    for (index, family) in FAMILIES.iter().enumerate() {
        let mut look_for = |pattern: &Pattern, telling: bool, root: &str| {
            let ends = pattern.ends();
            let alike = ends.iter().flatten().filter_map(|end| by_end.get(end)).flatten();
            // a pattern of one segment fits whatever comes before it
            let any = names.iter().filter(|_| ends.is_none());
            for &name in alike.chain(any) {
                let Some((before, _)) = pattern.match_end(name) else { continue };
                if !root.is_empty() && before.ends_with(root) {
                    // The same as not dropping the root.
                    continue;
                }
                let placement = Placement { stripped: before.to_owned(), root: root.to_owned() };
                let reading = readings.entry((index, placement)).or_default();
                reading.matched.insert(name);
                if telling {
                    reading.telling.insert(name);
                }
            }
        };
        for stored in &family.tensors {
            look_for(&stored.name, stored.telling, "");
            for root in family.roots {
                // What lies beside the root is not there when the root is dropped.
                if let Some(bare) = stored.name.without_root(root) {
                    look_for(&bare, stored.telling, root);
                }
            }
        }
    }
    readings
}

fn describe(family: &Family, placement: &Placement) -> String {
    match (placement.stripped.as_str(), placement.root.as_str()) {
        ("", "") => format!("`{}`", family.id),
        ("", root) => format!("`{}` without `{root}`", family.id),
        (stripped, "") => format!("`{}` under `{stripped}`", family.id),
        (stripped, root) => format!("`{}` under `{stripped}` without `{root}`", family.id),
    }
}
