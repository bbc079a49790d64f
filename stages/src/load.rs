//! `load`: checkpoint files as they are, without copying a byte.
//!
//! The artifact is a view: per tensor a region of a user file, whose digest is part of the key. What the view holds is pinned by these
//! digests; where the files lie is known to the store's stat cache only.
//!
//! A LoRA adapter is loaded as task vectors, whose products are computed where they are read. Names are changed in this order: what
//! wrappers add (or `strip_prefix`), `rename`, `family`; `only` and `skip` mean the names after that.

use crate::filter::NameFilter;
use crate::kind::{self, Connection, MethodDoc, Ports, SourceFile, SourceSet, Stage, StageKind, Unit};
use crate::names::NameRules;
use crate::params::{FilePath, Params, Problem, one_map, parse, to_value};
use crate::{Draft, Job, Notice, StageError, checkpoint};
use blake3::Hash;
use merganser_cache::Value;
use merganser_tensors::Manifest;
use merganser_tensors::formats::{self, Selection};
use merganser_tensors::lora::{self, AdapterFiles};
use merganser_tensors::manifest::Content;
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

pub(crate) struct Load;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct LoadParams {
    /// A safetensors, PyTorch (`.pt`, `.pth`, `.bin`, `.ckpt`) or NumPy file, an index of shards, or a folder that holds one; a PEFT LoRA
    /// adapter (a folder with `adapter_config.json`) gives task vectors. Or the address of one: `hf://org/repo`, `https://…`, `s3://…`.
    path: FilePath,
    /// Entry of a PyTorch file that holds the tensors, such as `model_ema` (default: the only one that can be meant).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    /// Removed from names that begin with it; `""` keeps all as stored (default: what wrappers add, such as `module.`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    strip_prefix: Option<String>,
}

impl StageKind for Load {
    fn id(&self) -> &'static str {
        "load"
    }

    fn summary(&self) -> &'static str {
        "reads a checkpoint: safetensors, PyTorch or NumPy, without executing anything"
    }

    fn ports(&self) -> Ports {
        Ports::NONE
    }

    fn methods(&self) -> Vec<MethodDoc> {
        vec![MethodDoc {
            id: "load",
            summary: self.summary(),
            formula: "θ: tensors by name, f32, f16 or bf16 as stored (widened to f32 where they are used)",
            source: "the safetensors format; Hugging Face's sharded index; files of torch.save, pickle.dump and numpy.save",
            schema: NameFilter::document(NameRules::document(schema_for!(LoadParams))),
        }]
    }

    fn parse(&self, mut params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        let filter = NameFilter::take(&mut params);
        let rules = NameRules::take(&mut params);
        let parsed = parse(&params);
        match (filter, rules, parsed) {
            (Ok(filter), Ok(rules), Ok(params)) => Ok(Box::new(LoadStage { params, rules, filter })),
            (filter, rules, parsed) => {
                Err(filter.err().into_iter().chain(rules.err()).chain(parsed.err()).flatten().collect())
            }
        }
    }
}

struct LoadStage {
    params: LoadParams,
    rules: NameRules,
    filter: NameFilter,
}

/// What the configuration of an adapter is called in the key.
const ADAPTER_CONFIG: &str = "adapter_config.json";

impl Stage for LoadStage {
    fn version(&self) -> u32 {
        1
    }

    fn output(&self, _: &[Connection]) -> Result<kind::Content, Problem> {
        // Known from which files are there, as every path is: an adapter is a difference from its base, and a package says what it is.
        Ok(match (self.adapter(), self.content()) {
            (Some(_), _) | (None, Content::TaskVectors) => kind::Content::TaskVectors,
            _ => kind::Content::Checkpoint,
        })
    }

    fn parameters(&self, _: &Unit) -> Result<Value, StageError> {
        Ok(one_map([to_value(&self.params)?, to_value(&self.rules)?, to_value(&self.filter)?]))
    }

    fn sources(&self, _: &Unit) -> Result<Vec<SourceSet>, StageError> {
        let path = &self.params.path.path;
        // Whether it is known what was here is not for a stage to say.
        if !path.exists() {
            let files = vec![SourceFile { label: String::new(), path: path.clone() }];
            return Ok(vec![SourceSet { parameter: "path".to_owned(), files }]);
        }
        if let Some(adapter) = self.adapter() {
            let file =
                |label: &str, path: &PathBuf| SourceFile { label: label.to_owned(), path: path.clone() };
            let files = vec![file(ADAPTER_CONFIG, &adapter.config), file("adapter_model", &adapter.weights)];
            return Ok(vec![SourceSet { parameter: "path".to_owned(), files }]);
        }
        let files = formats::files(path)?;
        // A single file's name says nothing; a shard's name is what the index refers to it by.
        let named = files.len() > 1;
        let files = files
            .into_iter()
            .map(|path| {
                let name =
                    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
                SourceFile { label: if named { name } else { String::new() }, path }
            })
            .collect();
        Ok(vec![SourceSet { parameter: "path".to_owned(), files }])
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        if let Some(adapter) = self.adapter() {
            return self.run_adapter(job, &adapter);
        }
        let LoadParams { path, key, strip_prefix } = &self.params;
        let selection = Selection { key: key.clone(), strip_prefix: strip_prefix.clone() };
        let mut parts = formats::describe_selected(&path.path, &selection)?;
        for note in parts.iter().flat_map(|part| &part.notes) {
            (job.notify)(Notice::Info(format!("`{}`: {note}", path.written)));
        }
        self.rules.rename_parts(&mut parts)?;
        let digests = pinned(job, parts.iter().map(|part| part.path.as_path()))?;
        for (part, digest) in parts.iter().zip(&digests) {
            if let Some(expected) = part.base.filter(|expected| expected != digest) {
                let base = part.path.display();
                return Err(StageError::input_help(
                    format!(
                        "the base `{base}` of `{}` has BLAKE3 digest {digest}, the package asks for {expected}",
                        path.written
                    ),
                    "copy the package again, with the base that was written with it",
                ));
            }
        }
        // A conversion needs tensors under their old names, the filter means the new ones.
        let manifest = Manifest::of_checkpoint(self.content(), &parts, &digests, |tensor| {
            self.rules.converts() || self.filter.admits(&tensor.name)
        })?;
        self.finish(manifest, job)
    }
}

impl LoadStage {
    /// The adapter at the path, if there is one.
    fn adapter(&self) -> Option<AdapterFiles> {
        lora::locate(&self.params.path.path)
    }

    /// What the tensors mean; a checkpoint's, unless the file says that they are task vectors. What is wrong with a file is said when it is
    /// read.
    fn content(&self) -> Content {
        match formats::content(&self.params.path.path) {
            Ok(Some(Content::TaskVectors)) => Content::TaskVectors,
            _ => Content::Checkpoint,
        }
    }

    /// Describes an adapter's products; nothing is multiplied before it is read.
    fn run_adapter(&self, job: &Job<'_>, files: &AdapterFiles) -> Result<Draft, StageError> {
        if self.params.key.is_some() || self.params.strip_prefix.is_some() {
            return Err(StageError::input_help(
                format!(
                    "`key` and `strip_prefix` are not for adapters such as `{}`",
                    self.params.path.written
                ),
                "names of an adapter are those of its base; `rename` changes them",
            ));
        }
        let mut adapter = lora::describe(files)?;
        let names = adapter.products.iter_mut().map(|(info, _)| &mut info.name);
        self.rules.rename(names.chain(&mut adapter.replaced).collect())?;
        // Read just now: it must still be what the key says when the stage is done.
        pinned(job, std::iter::once(files.config.as_path()))?;
        let digests = pinned(job, adapter.parts.iter().map(|part| part.path.as_path()))?;
        // What cannot be converted is left out by the names it has.
        let convertible =
            |name: &str| self.rules.converts() && adapter.products.iter().any(|(info, _)| info.name == name);
        let manifest = adapter.manifest(&digests, |name| convertible(name) || self.filter.admits(name))?;
        self.finish(manifest, job)
    }

    /// Converts names if that is asked for.
    fn finish(&self, manifest: Manifest, job: &Job<'_>) -> Result<Draft, StageError> {
        let manifest = self.rules.convert(manifest, &self.filter, job)?;
        if manifest.tensors().is_empty() {
            return Err(StageError::input_help(
                format!("`{}` has no tensor that `only` and `skip` admit", self.params.path.written),
                "globs match whole tensor names: `*.attn.*`, not `attn`",
            ));
        }
        Ok(checkpoint::view(&manifest))
    }
}

/// Remembers files that are read, and returns their digests.
fn pinned<'a>(job: &Job<'_>, paths: impl Iterator<Item = &'a Path>) -> Result<Vec<Hash>, StageError> {
    let digests = paths.map(|path| {
        let found = job.sources_of("path").find(|source| source.path == path);
        let source = found
            .ok_or_else(|| StageError::Internal(format!("`{}` is not part of the key", path.display())))?;
        job.files.pin(&source.source)?;
        Ok(source.source.digest)
    });
    digests.collect()
}
