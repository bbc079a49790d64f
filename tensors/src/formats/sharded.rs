//! Sharded checkpoints: an index (`model.safetensors.index.json`, `pytorch_model.bin.index.json`) that says which file
//! holds which tensor. A shard is of any other format that has no shards; its names are those of the index.
//!
//! Shards are files beside the index; an index cannot point anywhere else. The index and the shards must agree on
//! every listed tensor. A tensor that a shard holds and the index does not list belongs to the checkpoint, as it does
//! for the loaders that these files were written for.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::error::{Error, Result};
use crate::formats::safetensors::MAX_HEADER_BYTES;
use crate::formats::{FilePart, Format, FormatProblem, Selection, detect};

/// The format's entry in the registry.
pub struct Sharded;

impl Format for Sharded {
    fn name(&self) -> &'static str {
        "sharded (.index.json)"
    }

    fn recognizes(&self, path: &Path, _start: &[u8]) -> bool {
        let name = path.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase());
        name.is_some_and(|name| name.ends_with(".index.json"))
    }

    fn files(&self, path: &Path) -> Result<Vec<PathBuf>> {
        let index = read_index(path)?;
        let mut files = vec![path.to_owned()];
        files.extend(shard_paths(path, &index)?.into_iter().map(|(_, path)| path));
        Ok(files)
    }

    fn describe(&self, path: &Path, selection: &Selection) -> Result<Vec<FilePart>> {
        if let Some(key) = &selection.key {
            return Err(Error::format(path, FormatProblem::NoKeys(key.clone())));
        }
        // a prefix is a matter of the whole checkpoint, not of a shard
        let as_stored = Selection { key: None, strip_prefix: Some(String::new()) };
        let index = read_index(path)?;
        let mut parts = Vec::new();
        for (_, shard) in shard_paths(path, &index)? {
            let (format, shard) = detect(&shard)?;
            if format.name() == self.name() {
                return Err(Error::format(path, FormatProblem::NestedIndex(shard)));
            }
            parts.extend(format.describe(&shard, &as_stored)?);
        }
        check_agreement(&index, &parts).map_err(|problem| Error::format(path, problem))?;
        Ok(parts)
    }
}

/// The part of an index that matters: tensor name to file name.
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn read_index(path: &Path) -> Result<Index> {
    let size = fs_err::metadata(path)?.len();
    if size > MAX_HEADER_BYTES {
        let problem = FormatProblem::HeaderTooLarge { claimed: size, limit: MAX_HEADER_BYTES };
        return Err(Error::format(path, problem));
    }
    let weight_map = parse_index(&fs_err::read(path)?).map_err(|problem| Error::format(path, problem))?;
    Ok(Index { weight_map })
}

/// Returns which file holds which tensor.
pub fn parse_index(json: &[u8]) -> Result<BTreeMap<String, String>, FormatProblem> {
    let index: Index =
        serde_json::from_slice(json).map_err(|problem| FormatProblem::Index(problem.to_string()))?;
    Ok(index.weight_map)
}

/// Returns the shards in order of name, each with its path, after checking that they are files beside the index.
fn shard_paths<'a>(index_path: &Path, index: &'a Index) -> Result<Vec<(&'a str, PathBuf)>> {
    let folder = index_path.parent().unwrap_or(Path::new(""));
    let names: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
    let mut shards = Vec::with_capacity(names.len());
    for name in names {
        let mut components = Path::new(name).components();
        let stays_inside = components.all(|component| matches!(component, Component::Normal(_)));
        if name.is_empty() || !stays_inside {
            return Err(Error::format(index_path, FormatProblem::ShardOutside(name.to_owned())));
        }
        let path = folder.join(name);
        if !path.is_file() {
            let mut inside =
                index.weight_map.iter().filter(|(_, shard)| *shard == name).map(|(tensor, _)| tensor);
            let example = inside.next().cloned().unwrap_or_default();
            let problem = FormatProblem::MissingShard { path, tensors: 1 + inside.count(), example };
            return Err(Error::format(index_path, problem));
        }
        shards.push((name, path));
    }
    Ok(shards)
}

fn check_agreement(index: &Index, parts: &[FilePart]) -> Result<(), FormatProblem> {
    let file_name = |part: &FilePart| {
        part.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    };
    let mut found: HashMap<&str, &FilePart> = HashMap::new();
    for part in parts {
        for tensor in &part.tensors {
            if let Some(first) = found.insert(&tensor.info.name, part) {
                let tensor = tensor.info.name.clone();
                let (first, second) = (file_name(first), file_name(part));
                return Err(FormatProblem::InTwoShards { tensor, first, second });
            }
        }
    }
    for (tensor, listed) in &index.weight_map {
        match found.get(tensor.as_str()) {
            Some(part) if part.path.ends_with(listed) => {}
            Some(part) => {
                let (tensor, listed, actual) = (tensor.clone(), listed.clone(), file_name(part));
                return Err(FormatProblem::WrongShard { tensor, listed, actual });
            }
            None => {
                return Err(FormatProblem::NotInShard { tensor: tensor.clone(), shard: listed.clone() });
            }
        }
    }
    Ok(())
}

impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = Index;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with a `weight_map`")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
                let mut weight_map = None;
                while let Some(key) = map.next_key::<String>()? {
                    if key != "weight_map" {
                        map.next_value::<IgnoredAny>()?;
                    } else if weight_map.replace(map.next_value::<WeightMap>()?.0).is_some() {
                        return Err(A::Error::custom("`weight_map` is given twice"));
                    }
                }
                let weight_map = weight_map.ok_or_else(|| A::Error::missing_field("weight_map"))?;
                Ok(Index { weight_map })
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

/// A map in which no name may appear twice.
struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;

        impl<'de> Visitor<'de> for Names {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensor names and file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut names = BTreeMap::new();
                while let Some(tensor) = map.next_key::<String>()? {
                    let shard = map
                        .next_value::<String>()
                        .map_err(|problem| A::Error::custom(format!("tensor `{tensor}`: {problem}")))?;
                    if names.contains_key(&tensor) {
                        return Err(A::Error::custom(format!("tensor `{tensor}` is listed twice")));
                    }
                    names.insert(tensor, shard);
                }
                Ok(WeightMap(names))
            }
        }

        deserializer.deserialize_map(Names)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::formats;

    /// A folder with an index and two shards: `a` and `b` in the first, `c` in the second.
    fn folder(weight_map: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let shard = |names: &[&str]| {
            let data = [1u8; 4];
            let views = names.iter().map(|name| {
                (*name, safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![4], &data).unwrap())
            });
            safetensors::serialize(views, None).unwrap()
        };
        fs_err::write(folder.path().join("one.safetensors"), shard(&["a", "b"])).unwrap();
        fs_err::write(folder.path().join("two.safetensors"), shard(&["c"])).unwrap();
        let index = format!(r#"{{"metadata":{{"total_size":12}},"weight_map":{weight_map}}}"#);
        fs_err::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        folder
    }

    const GOOD: &str = r#"{"a":"one.safetensors","b":"one.safetensors","c":"two.safetensors"}"#;

    #[track_caller]
    fn check_refused(weight_map: &str, expected: &str) {
        let folder = folder(weight_map);
        let message = formats::describe(folder.path()).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
        assert!(message.contains("model.safetensors.index.json"), "{message}");
    }

    #[test]
    fn reads_index_and_shards_from_a_folder_or_by_name() {
        let folder = folder(GOOD);
        let index = folder.path().join("model.safetensors.index.json");
        let files = formats::files(folder.path()).unwrap();
        let expected = ["model.safetensors.index.json", "one.safetensors", "two.safetensors"];
        assert_eq!(files, expected.map(|name| folder.path().join(name)));
        let parts = formats::describe(&index).unwrap();
        assert_eq!(parts, formats::describe(folder.path()).unwrap());
        let names: Vec<_> = parts.iter().flat_map(|p| &p.tensors).map(|t| t.info.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c"]);
    }

    #[test]
    fn a_single_file_is_preferred_over_an_index_beside_it() {
        let folder = folder(GOOD);
        fs_err::copy(folder.path().join("two.safetensors"), folder.path().join("model.safetensors")).unwrap();
        assert_eq!(formats::files(folder.path()).unwrap(), [folder.path().join("model.safetensors")]);
    }

    #[test]
    fn refuses_shards_outside_the_folder() {
        for shard in ["../one.safetensors", "/etc/passwd", "x/../../one.safetensors", ""] {
            let expected = format!("the index names shard `{shard}`, which is not a file beside it");
            check_refused(&format!(r#"{{"a":"{shard}"}}"#), &expected);
        }
    }

    #[test]
    fn names_missing_shards_and_misplaced_tensors() {
        check_refused(r#"{"a":"three.safetensors","b":"three.safetensors"}"#, "(2 tensors, such as `a`)");
        check_refused(
            r#"{"a":"one.safetensors","zz":"two.safetensors"}"#,
            "tensor `zz` is not in shard `two.safetensors`, where the index lists it",
        );
        check_refused(
            r#"{"a":"one.safetensors","b":"two.safetensors"}"#,
            "tensor `b` is in shard `one.safetensors`, the index lists it in `two.safetensors`",
        );
        check_refused(r#"{"a":"one.safetensors","a":"two.safetensors"}"#, "tensor `a` is listed twice");
        check_refused(r#"{"a":3}"#, "tensor `a`: invalid type");
    }

    #[test]
    fn refuses_a_tensor_in_two_shards() {
        let folder = folder(GOOD);
        fs_err::copy(folder.path().join("one.safetensors"), folder.path().join("two.safetensors")).unwrap();
        let message = formats::describe(folder.path()).unwrap_err().to_string();
        assert!(
            message.contains("tensor `a` is in two shards: `one.safetensors` and `two.safetensors`"),
            "{message}"
        );
    }

    proptest! {
        #[test]
        fn damaged_indexes_never_panic(position in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut json = format!(r#"{{"weight_map":{GOOD}}}"#).into_bytes();
            let position = position.index(json.len());
            json[position] = byte;
            let _ = serde_json::from_slice::<Index>(&json);
        }
    }
}
