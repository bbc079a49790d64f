//! Two checkpoints of the same model under different names.

use std::collections::{BTreeMap, BTreeSet};

use super::error::listed;
use super::mapping::{Mapping, Target, map};
use super::{Identified, KeymapError, identify};
use crate::dtype::TensorInfo;
use crate::manifest::{Content, Manifest, TensorEntry};
use crate::views::Part;

/// How the names of one checkpoint become those of another.
#[derive(Clone, Debug, PartialEq)]
pub struct Reconciled {
    pub mapping: Mapping,
    /// What was found, for the log: "it has the names of `open-clip`, the base those of `transformers-clip`: mapped 78 tensors".
    pub notice: String,
}

/// Finds out how the tensors of `other` get the names that `base` has. `None` when there is nothing to do: the names agree already, or are
/// of different models or none that is known (which the caller finds out by comparing names).
///
/// Refused when the names fit several models, or when a tensor of the base would need parts that `other` lacks.
pub fn reconcile(base: &Manifest, other: &Manifest) -> Result<Option<Reconciled>, KeymapError> {
    let base_infos = infos(base);
    let other_infos = infos(other);
    let (base_names, other_names) = (floats(&base_infos), floats(&other_infos));
    // Names that mostly agree are not of different libraries, whatever else they may fit.
    let common = base_names.intersection(&other_names).count();
    if common * 2 >= base_names.len().min(other_names.len()) {
        return Ok(None);
    }
    let (base_family, other_family) = (identify(&base_infos)?, identify(&other_infos)?);
    let found = match (base_family, other_family) {
        (Some(to), Some(from)) => by_family(&other_infos, other.content(), &from, &to, &base_names)?,
        _ => by_prefix(&base_names, &other_infos),
    };
    Ok(found.map(|mut found| {
        reshape(&mut found.mapping, &base_infos);
        found
    }))
}

fn infos(manifest: &Manifest) -> Vec<TensorInfo> {
    manifest.tensors().iter().map(TensorEntry::info).collect()
}

fn floats(infos: &[TensorInfo]) -> BTreeSet<&str> {
    infos.iter().filter(|info| info.dtype.is_float()).map(|info| info.name.as_str()).collect()
}

fn by_family(
    tensors: &[TensorInfo],
    content: Content,
    from: &Identified,
    to: &Identified,
    base_names: &BTreeSet<&str>,
) -> Result<Option<Reconciled>, KeymapError> {
    let same = from.family.id == to.family.id && from.placement == to.placement;
    if same || from.family.model != to.family.model {
        return Ok(None);
    }
    let target = Target { family: to.family, placement: to.placement.clone(), like: Some(base_names) };
    let mapping = map(tensors, content, from, &target)?;
    let left_out: Vec<&str> = mapping.unmapped.iter().map(String::as_str).collect();
    let tail = if left_out.is_empty() { String::new() } else { format!(", left out {}", listed(left_out)) };
    let notice = format!(
        "it has the names of {}, the base those of {}: mapped {} tensors{tail}",
        from.describe(),
        to.describe(),
        mapping.tensors.len()
    );
    Ok(Some(Reconciled { mapping, notice }))
}

/// Names that agree but for something before all of them, on one side or the other.
fn by_prefix(base_names: &BTreeSet<&str>, tensors: &[TensorInfo]) -> Option<Reconciled> {
    let other_names = floats(tensors);
    let (mapping, notice) = if let Some(prefix) = common_prefix(base_names, &other_names) {
        let strip = |name: &str| name.strip_prefix(&prefix).map(str::to_owned);
        (renamed(tensors, strip), format!("its names begin with `{prefix}`, which those of the base lack"))
    } else {
        let prefix = common_prefix(&other_names, base_names)?;
        let add = |name: &str| Some(format!("{prefix}{name}"));
        (renamed(tensors, add), format!("its names lack `{prefix}`, with which those of the base begin"))
    };
    Some(Reconciled { mapping, notice })
}

/// Returns the only prefix with which every name of `short` is in `long`.
fn common_prefix(short: &BTreeSet<&str>, long: &BTreeSet<&str>) -> Option<String> {
    let first = short.first()?;
    let candidates =
        long.iter().filter_map(|name| name.strip_suffix(first)).filter(|prefix| prefix.ends_with('.'));
    let mut fitting = candidates
        .filter(|prefix| short.iter().all(|name| long.contains(format!("{prefix}{name}").as_str())));
    let found = fitting.next()?;
    fitting.next().is_none().then(|| found.to_owned())
}

fn renamed(tensors: &[TensorInfo], name: impl Fn(&str) -> Option<String>) -> Mapping {
    let mut mapped = BTreeMap::new();
    let mut unmapped = Vec::new();
    for info in tensors {
        match name(&info.name) {
            Some(name) => {
                let part = Part::Whole { tensor: info.name.clone() };
                mapped.insert(name.clone(), (TensorInfo { name, ..info.clone() }, vec![part]));
            }
            None => unmapped.push(info.name.clone()),
        }
    }
    unmapped.sort();
    Mapping { tensors: mapped.into_values().collect(), unmapped, ignored: Vec::new() }
}

/// Gives tensors the base's shape where the two differ in axes of length 1 only.
fn reshape(mapping: &mut Mapping, base: &[TensorInfo]) {
    let shapes: BTreeMap<&str, &Vec<usize>> =
        base.iter().map(|info| (info.name.as_str(), &info.shape)).collect();
    let squeezed = |shape: &[usize]| shape.iter().copied().filter(|extent| *extent != 1).collect::<Vec<_>>();
    for (info, _) in &mut mapping.tensors {
        if let Some(&shape) = shapes.get(info.name.as_str())
            && squeezed(shape) == squeezed(&info.shape)
        {
            info.shape.clone_from(shape);
        }
    }
}
