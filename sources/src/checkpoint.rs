//! Which files an address means: the file, what belongs to it, or what stands for a checkpoint in a folder.
//!
//! The rules are those by which folders on this machine are read, so that a checkpoint means the same wherever it lies.

use crate::address::{beside, is_plain_path, name_of};
use crate::error::{Error, Result};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// What the configuration of an adapter is called.
const ADAPTER_CONFIG: &str = "adapter_config.json";

/// The weights of an adapter, in the order of preference.
const ADAPTER_WEIGHTS: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];

/// What stands for a checkpoint in a folder, in the order of preference.
const CHECKPOINTS: [&str; 6] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
];

/// An index is text that names tensors; more than this is something else.
const MAX_INDEX_BYTES: u64 = 256 << 20;

/// Files by `/`-separated names below some place.
pub(crate) trait Tree {
    /// How a file is called in messages.
    fn address(&self, name: &str) -> String;

    /// Gets a file; `None` if there is no such file.
    fn file(&mut self, name: &str) -> Result<Option<PathBuf>>;

    /// Whether a file is among those that are known to be meant.
    fn is_pinned(&self, name: &str) -> bool;

    /// Whether what is here and unpinned may be taken for what is meant.
    fn may_guess(&self) -> bool;
}

/// What a name can stand for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    File,
    Folder,
    /// A file if there is one, a folder otherwise.
    Either,
}

/// Gets what `name` means with all that belongs to it; returns where it lies: a file, or the folder of an adapter.
pub(crate) fn select(tree: &mut dyn Tree, name: &str, shape: Shape) -> Result<Option<PathBuf>> {
    if shape != Shape::Folder
        && let Some(path) = tree.file(name)?
    {
        companions(tree, name, &path)?;
        return Ok(Some(path));
    }
    match shape {
        Shape::File => Ok(None),
        Shape::Folder | Shape::Either => folder(tree, name.trim_end_matches('/')),
    }
}

fn folder(tree: &mut dyn Tree, folder: &str) -> Result<Option<PathBuf>> {
    let inside = |name: &str| if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") };
    let is_pinned =
        CHECKPOINTS.iter().chain(&ADAPTER_WEIGHTS).any(|candidate| tree.is_pinned(&inside(candidate)));
    if !is_pinned && !tree.may_guess() {
        return Err(Error::NotCached { address: tree.address(folder), offline: false });
    }
    // Pinned once, the choice stands: another file that has come to lie beside it changes nothing.
    let mut is_unknown = false;
    let mut look = |tree: &mut dyn Tree, name: &str| {
        if is_pinned && !tree.is_pinned(name) {
            return Ok(None);
        }
        match tree.file(name) {
            Err(Error::NotCached { .. }) if !is_pinned => {
                is_unknown = true;
                Ok(None)
            }
            other => other,
        }
    };
    if let Some(config) = look(tree, &inside(ADAPTER_CONFIG))? {
        for weights in ADAPTER_WEIGHTS {
            if look(tree, &inside(weights))?.is_some() {
                return Ok(config.parent().map(Into::into));
            }
        }
    }
    for candidate in CHECKPOINTS {
        let name = inside(candidate);
        if let Some(path) = look(tree, &name)? {
            companions(tree, &name, &path)?;
            return Ok(Some(path));
        }
    }
    if is_unknown {
        return Err(Error::NotCached { address: tree.address(folder), offline: true });
    }
    Ok(None)
}

/// Gets what belongs to a file.
fn companions(tree: &mut dyn Tree, name: &str, path: &std::path::Path) -> Result<()> {
    if name.to_ascii_lowercase().ends_with(".index.json") {
        let refused =
            |missing: &str| Error::Incomplete { address: tree.address(name), missing: missing.to_owned() };
        if fs_err::metadata(path)?.len() > MAX_INDEX_BYTES {
            return Err(refused("more files than an index can list"));
        }
        // Anything else than an index is for its reader to judge.
        let Ok(index) = serde_json::from_slice::<Index>(&fs_err::read(path)?) else { return Ok(()) };
        let shards: BTreeSet<String> = index.weight_map.into_values().collect();
        if let Some(bad) = shards.iter().find(|shard| !is_plain_path(shard)) {
            return Err(refused(bad));
        }
        for shard in shards {
            let shard = beside(name, &shard);
            if tree.file(&shard)?.is_none() {
                return Err(Error::Incomplete { address: tree.address(name), missing: tree.address(&shard) });
            }
        }
    } else if ADAPTER_WEIGHTS.contains(&name_of(name)) {
        let config = beside(name, ADAPTER_CONFIG);
        if tree.file(&config)?.is_none() {
            return Err(Error::Incomplete { address: tree.address(name), missing: tree.address(&config) });
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// A folder on this machine, with a memory of what was asked for.
    struct Folder<'a> {
        root: &'a Path,
        pinned: Vec<&'a str>,
        asked: Vec<String>,
        is_local: bool,
    }

    impl Tree for Folder<'_> {
        fn address(&self, name: &str) -> String {
            format!("x://{name}")
        }

        fn file(&mut self, name: &str) -> Result<Option<PathBuf>> {
            self.asked.push(name.to_owned());
            Ok(Some(self.root.join(name)).filter(|path| path.is_file()))
        }

        fn is_pinned(&self, name: &str) -> bool {
            self.pinned.contains(&name)
        }

        fn may_guess(&self) -> bool {
            !self.is_local
        }
    }

    fn lay(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = folder.path().join(name);
            fs_err::create_dir_all(path.parent().unwrap()).unwrap();
            fs_err::write(path, content).unwrap();
        }
        folder
    }

    fn choose(
        files: &[(&str, &str)],
        name: &str,
        pinned: &[&'static str],
    ) -> Result<(Option<String>, Vec<String>)> {
        let folder = lay(files);
        let mut tree =
            Folder { root: folder.path(), pinned: pinned.to_vec(), asked: Vec::new(), is_local: false };
        let path = select(&mut tree, name, Shape::Either)?;
        let relative =
            path.map(|path| path.strip_prefix(folder.path()).unwrap().to_str().unwrap().to_owned());
        Ok((relative, tree.asked))
    }

    const INDEX: &str = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;

    #[test]
    fn a_folder_stands_for_its_preferred_checkpoint() {
        let both = [("sub/model.safetensors", ""), ("sub/pytorch_model.bin", "")];
        assert_eq!(choose(&both, "sub", &[]).unwrap().0.as_deref(), Some("sub/model.safetensors"));
        assert_eq!(choose(&both, "sub/", &[]).unwrap().0.as_deref(), Some("sub/model.safetensors"));
        assert_eq!(
            choose(&both, "sub", &["sub/pytorch_model.bin"]).unwrap().0.as_deref(),
            Some("sub/pytorch_model.bin"),
            "what was chosen once stays chosen"
        );
        assert_eq!(choose(&[("weights.pt", "")], "", &[]).unwrap().0, None);
    }

    #[test]
    fn shards_come_with_their_index() {
        let files = [
            ("model.safetensors.index.json", INDEX),
            ("model-1.safetensors", ""),
            ("model-2.safetensors", ""),
        ];
        let (path, asked) = choose(&files, "model.safetensors.index.json", &[]).unwrap();
        assert_eq!(path.as_deref(), Some("model.safetensors.index.json"));
        assert_eq!(asked, ["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"]);
        let error = choose(&files[..2], "", &[]).unwrap_err().to_string();
        assert_eq!(
            error,
            "`x://model.safetensors.index.json` refers to `x://model-2.safetensors`, which is not there"
        );
    }

    #[test]
    fn an_index_cannot_point_out_of_its_folder() {
        for shard in ["../secret", "/etc/passwd", "a/../../b", ""] {
            let index = format!(r#"{{"weight_map": {{"a": "{shard}"}}}}"#);
            let error = choose(&[("x.index.json", &index)], "x.index.json", &[]).unwrap_err();
            assert!(matches!(error, Error::Incomplete { .. }), "{shard}: {error}");
        }
    }

    #[test]
    fn an_adapter_is_its_folder() {
        let files = [
            ("lora/adapter_config.json", "{}"),
            ("lora/adapter_model.bin", ""),
            ("lora/model.safetensors", ""),
        ];
        assert_eq!(choose(&files, "lora", &[]).unwrap().0.as_deref(), Some("lora"));
        let (path, asked) = choose(&files, "lora/adapter_model.bin", &[]).unwrap();
        assert_eq!(path.as_deref(), Some("lora/adapter_model.bin"));
        assert!(asked.contains(&"lora/adapter_config.json".to_owned()));
    }

    #[test]
    fn nothing_is_guessed_from_what_happens_to_be_here() {
        let folder = lay(&[("pytorch_model.bin", "")]);
        let mut tree = Folder { root: folder.path(), pinned: Vec::new(), asked: Vec::new(), is_local: true };
        let error = select(&mut tree, "", Shape::Folder).unwrap_err();
        assert!(matches!(error, Error::NotCached { .. }), "{error}");
        tree.pinned = vec!["pytorch_model.bin"];
        assert_eq!(
            select(&mut tree, "", Shape::Folder).unwrap(),
            Some(folder.path().join("pytorch_model.bin"))
        );
    }
}
