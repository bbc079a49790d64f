//! A checkpoint or an adapter as it was found: what is said about it, and how to read it.

use super::Options;
use crate::exit::{Failure, Result};
use crate::report::bytes;
use merganser_tensors::formats::{self, FilePart, Selection};
use merganser_tensors::keymap;
use merganser_tensors::lora::{self, Adapter, AdapterFiles};
use merganser_tensors::manifest::{Content, TensorEntry};
use merganser_tensors::{LocalFiles, Manifest, TensorInfo, TensorSource};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

/// A file whose header was read.
pub(in crate::commands) struct Opened {
    pub(super) overview: Overview,
    /// What the file calls tensors, where that is not their name.
    pub(super) stored_names: BTreeMap<String, String>,
    /// Tensors that the filter admits.
    pub(super) manifest: Manifest,
    files: LocalFiles,
}

/// What is said before the tensors.
#[derive(Serialize)]
pub(super) struct Overview {
    pub(super) path: String,
    pub(super) format: String,
    /// Of all its files.
    bytes: u64,
    files: Vec<FileRow>,
    /// Elements of float tensors.
    parameters: u64,
    /// Tensors by element type.
    dtypes: BTreeMap<&'static str, usize>,
    family: Option<FamilyRow>,
    /// Why no family can be named although names fit some.
    #[serde(skip_serializing_if = "Option::is_none")]
    family_problem: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<AdapterRow>,
    /// What was done to find the tensors.
    notes: Vec<String>,
}

#[derive(Serialize)]
struct FileRow {
    path: String,
    bytes: u64,
    tensors: usize,
}

#[derive(Serialize)]
struct FamilyRow {
    id: &'static str,
    model: &'static str,
    /// What stands before the family's names, and what they lack.
    stripped: String,
    root: String,
    /// Float tensors with names of the family, and float tensors in all.
    matched: usize,
    floats: usize,
    #[serde(skip)]
    described: String,
}

#[derive(Serialize)]
struct AdapterRow {
    rank: u64,
    alpha: f64,
    rank_stabilized: bool,
    /// Whether some modules have a rank or an alpha of their own.
    patterns: bool,
    targets: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<String>,
    /// Tensors that it replaces as a whole.
    replaced: Vec<String>,
}

impl Opened {
    /// Reads headers only.
    pub(in crate::commands) fn open(path: &Path, options: &Options) -> Result<Self> {
        if !path.exists() {
            return Err(Failure::user(format!("`{}` does not exist", path.display())));
        }
        match lora::locate(path) {
            Some(files) => Self::adapter(path, &files, options),
            None => Self::checkpoint(path, options),
        }
        .map_err(Failure::user)
    }

    fn checkpoint(path: &Path, options: &Options) -> merganser_tensors::Result<Self> {
        let selection = Selection { key: options.key.clone(), strip_prefix: options.strip_prefix.clone() };
        let parts = formats::describe_selected(path, &selection)?;
        let mut files = LocalFiles::default();
        let digests = files.add(&parts);
        let keep = |info: &TensorInfo| options.filter.admits(&info.name);
        let manifest = Manifest::of_checkpoint(Content::Checkpoint, &parts, &digests, keep)?;
        let tensors = parts.iter().flat_map(|part| &part.tensors);
        let stored =
            tensors.filter_map(|tensor| Some((tensor.info.name.clone(), tensor.stored_name.clone()?)));
        let stored_names = stored.collect();
        // "PyTorch (.pt, …)": the extensions are for those who do not know what they have
        let format = formats::name(path)?.split(" (").next().unwrap_or_default().to_owned();
        let overview = Overview::new(path, format, &parts, &manifest);
        Ok(Self { overview, stored_names, manifest, files })
    }

    fn adapter(path: &Path, found: &AdapterFiles, options: &Options) -> merganser_tensors::Result<Self> {
        let adapter = lora::describe(found)?;
        let mut files = LocalFiles::default();
        let digests = files.add(&adapter.parts);
        let keep = |name: &str| {
            options.filter.admits(name) && !adapter.replaced.iter().any(|replaced| replaced == name)
        };
        let manifest = adapter.manifest(&digests, keep)?;
        let stored = adapter
            .products
            .iter()
            .map(|(info, product)| (info.name.clone(), format!("{} · {}", product.left, product.right)));
        let stored_names = stored.collect();
        let format = format!("LoRA adapter ({})", file_name(&found.weights));
        let mut overview = Overview::new(path, format, &adapter.parts, &manifest);
        overview.adapter = Some(AdapterRow::new(&adapter));
        Ok(Self { overview, stored_names, manifest, files })
    }

    /// All tensors, sorted by name.
    pub(super) fn infos(&self) -> Vec<TensorInfo> {
        self.manifest.tensors().iter().map(TensorEntry::info).collect()
    }

    pub(in crate::commands) fn source(&self) -> Result<Arc<dyn TensorSource>> {
        self.open_as(&self.manifest)
    }

    /// Opens a view of its tensors.
    pub(in crate::commands) fn open_as(&self, manifest: &Manifest) -> Result<Arc<dyn TensorSource>> {
        merganser_tensors::open(manifest, &self.files).map_err(Failure::user)
    }
}

impl Overview {
    fn new(path: &Path, format: String, parts: &[FilePart], manifest: &Manifest) -> Self {
        let infos: Vec<TensorInfo> = manifest.tensors().iter().map(TensorEntry::info).collect();
        let (family, family_problem) = match keymap::identify(&infos) {
            Ok(found) => (found, None),
            Err(problem) => (None, Some(problem.to_string())),
        };
        let mut dtypes = BTreeMap::new();
        for info in &infos {
            *dtypes.entry(info.dtype.name()).or_default() += 1;
        }
        let floats = infos.iter().filter(|info| info.dtype.is_float());
        Self {
            path: path.display().to_string(),
            format,
            bytes: parts.iter().map(|part| part.size).sum(),
            files: parts
                .iter()
                .map(|part| FileRow {
                    path: part.path.display().to_string(),
                    bytes: part.size,
                    tensors: part.tensors.len(),
                })
                .collect(),
            parameters: floats.map(|info| info.n_elements() as u64).fold(0, u64::saturating_add),
            dtypes,
            family: family.map(|family| FamilyRow {
                id: family.family.id,
                model: family.family.model,
                described: family.describe(),
                stripped: family.placement.stripped,
                root: family.placement.root,
                matched: family.n_matched,
                floats: family.n_floats,
            }),
            family_problem,
            adapter: None,
            notes: parts.iter().flat_map(|part| &part.notes).map(ToString::to_string).collect(),
        }
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!("{}\n", self.path);
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<8}  {value}");
        };
        let in_files = match self.files.len() {
            0 | 1 => String::new(),
            n => format!(" in {n} files"),
        };
        line("format", format!("{}, {}{in_files}", self.format, bytes(self.bytes)));
        let n: usize = self.dtypes.values().sum();
        let types: Vec<String> =
            self.dtypes.iter().map(|(dtype, count)| format!("{count} {dtype}")).collect();
        line("tensors", format!("{n} ({}), {} parameters", types.join(", "), thousands(self.parameters)));
        match (&self.family, &self.family_problem) {
            (Some(family), _) => {
                line("names", format!("{}: {} of {}", family.described, family.matched, family.floats));
            }
            (None, Some(problem)) => line("names", problem.clone()),
            (None, None) => line("names", "of no known family".to_owned()),
        }
        if let Some(adapter) = &self.adapter {
            line("adapter", adapter.text());
            if !adapter.replaced.is_empty() {
                line("replaces", format!("{} (not shown)", adapter.replaced.join(", ")));
            }
        }
        for note in &self.notes {
            line("note", note.clone());
        }
        text
    }
}

impl AdapterRow {
    fn new(adapter: &Adapter) -> Self {
        let settings = &adapter.settings;
        Self {
            rank: settings.rank,
            alpha: settings.alpha,
            rank_stabilized: settings.rank_stabilized,
            patterns: settings.has_patterns,
            targets: settings.targets.clone(),
            base: settings.base.clone(),
            replaced: adapter.replaced.clone(),
        }
    }

    fn text(&self) -> String {
        let factor = if self.rank_stabilized { "alpha/√rank" } else { "alpha/rank" };
        let mut text = format!("rank {}, alpha {} ({factor})", self.rank, self.alpha);
        if self.patterns {
            text += ", some modules with their own";
        }
        if !self.targets.is_empty() {
            let _ = write!(text, "; targets {}", self.targets.join(", "));
        }
        if let Some(base) = &self.base {
            let _ = write!(text, "; base {base}");
        }
        text
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// `87,456,000`.
fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_come_in_threes() {
        for (n, expected) in [(0, "0"), (999, "999"), (1000, "1,000"), (87_456_000, "87,456,000")] {
            assert_eq!(thousands(n), expected);
        }
    }
}
