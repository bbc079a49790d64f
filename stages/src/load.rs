//! `load`: checkpoint files as they are, without copying a byte.
//!
//! The artifact is a view: per tensor a region of a user file, whose digest is part of the key. What the view holds is pinned by these
//! digests; where the files lie is known to the store's stat cache only.

use crate::filter::NameFilter;
use crate::kind::{self, Connection, MethodDoc, Ports, SourceFile, SourceSet, Stage, StageKind, Unit};
use crate::params::{FilePath, Params, Problem, one_map, parse, to_value};
use crate::{Draft, Job, StageError, checkpoint};
use merganser_cache::{Source, Value};
use merganser_tensors::manifest::Content;
use merganser_tensors::{Manifest, formats};
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};

pub(crate) struct Load;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct LoadParams {
    /// A safetensors file, a `model.safetensors.index.json`, or a folder that holds one of them.
    path: FilePath,
}

impl StageKind for Load {
    fn id(&self) -> &'static str {
        "load"
    }

    fn summary(&self) -> &'static str {
        "reads a checkpoint: safetensors, single or sharded"
    }

    fn ports(&self) -> Ports {
        Ports::NONE
    }

    fn methods(&self) -> Vec<MethodDoc> {
        vec![MethodDoc {
            id: "load",
            summary: self.summary(),
            formula: "θ: tensors by name, f32, f16 or bf16 as stored (widened to f32 where they are used)",
            source: "the safetensors format; Hugging Face's sharded index",
            schema: NameFilter::document(schema_for!(LoadParams)),
        }]
    }

    fn parse(&self, mut params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        let filter = NameFilter::take(&mut params);
        let parsed = parse(&params);
        match (filter, parsed) {
            (Ok(filter), Ok(params)) => Ok(Box::new(LoadStage { params, filter })),
            (filter, parsed) => Err(filter.err().into_iter().chain(parsed.err()).flatten().collect()),
        }
    }
}

struct LoadStage {
    params: LoadParams,
    filter: NameFilter,
}

impl Stage for LoadStage {
    fn version(&self) -> u32 {
        1
    }

    fn output(&self, _: &[Connection]) -> Result<kind::Content, Problem> {
        Ok(kind::Content::Checkpoint)
    }

    fn parameters(&self, _: &Unit) -> Result<Value, StageError> {
        Ok(one_map([to_value(&self.params)?, to_value(&self.filter)?]))
    }

    fn sources(&self, _: &Unit) -> Result<Vec<SourceSet>, StageError> {
        let path = &self.params.path.path;
        if !path.exists() {
            return Err(StageError::MissingFile { parameter: "path".to_owned(), path: path.clone() });
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
        let parts = formats::describe(&self.params.path.path)?;
        let sources = parts.iter().map(|part| {
            let found = job.sources_of("path").find(|source| source.path == part.path);
            found.ok_or_else(|| {
                StageError::Internal(format!("`{}` is not part of the key", part.path.display()))
            })
        });
        let sources: Vec<Source> =
            sources.map(|found| found.map(|found| found.source)).collect::<Result<_, _>>()?;
        for source in &sources {
            job.files.pin(source)?;
        }
        let digests: Vec<_> = sources.iter().map(|source| source.digest).collect();
        let manifest = Manifest::of_checkpoint(Content::Checkpoint, &parts, &digests, |tensor| {
            self.filter.admits(&tensor.name)
        })?;
        if manifest.tensors().is_empty() {
            return Err(StageError::input_help(
                format!("`{}` has no tensor that `only` and `skip` admit", self.params.path.written),
                "globs match whole tensor names: `*.attn.*`, not `attn`",
            ));
        }
        Ok(checkpoint::view(&manifest))
    }
}
