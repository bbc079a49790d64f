//! `peft`: the adapter of a model that was trained with factors, as PEFT reads it.

use super::{Format, included, only_model, write_included, write_whole};
use crate::distill::{ADAPTER, CONFIG};
use crate::kind::{Connection, Content, MethodDoc, SourceSet, Stage, Unit};
use crate::params::{FilePath, OutputPath, Params, Problem, one_map, parse, to_value};
use crate::{Draft, Job, StageError};
use merganser_cache::Value;
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};

pub(super) struct Peft;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct PeftParams {
    /// The folder to write to; a collection gets a folder per member inside it. Existing files of the same names are replaced.
    to: OutputPath,
    /// What the adapter is for, as PEFT finds it: a repository of the hub, or a folder (`base_model_name_or_path`).
    #[serde(default)]
    base: Option<String>,
    /// Files to put beside the adapter, such as `README.md`.
    #[serde(default)]
    include: Vec<FilePath>,
}

impl Format for Peft {
    fn document(&self) -> MethodDoc {
        MethodDoc {
            id: "peft",
            summary: "the adapter of a model from `distill` with method `lora`, as PEFT and `load` read it",
            formula: "adapter_model.safetensors: A, B and whole tensors as they were trained; adapter_config.json",
            source: "PEFT `utils/save_and_load.py`",
            schema: schema_for!(PeftParams),
        }
    }

    fn parse(&self, params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        Ok(Box::new(PeftStage { params: parse(&params)? }))
    }
}

struct PeftStage {
    params: PeftParams,
}

impl Stage for PeftStage {
    fn version(&self) -> u32 {
        1
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        only_model(inputs, "peft")?;
        Ok(Content::Files)
    }

    fn parameters(&self, _: &Unit) -> Result<Value, StageError> {
        Ok(one_map([Value::map([("format", "peft")]), to_value(&self.params)?]))
    }

    fn sources(&self, _: &Unit) -> Result<Vec<SourceSet>, StageError> {
        Ok(included(&self.params.include)?.into_iter().collect())
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        let artifact = job.input("model")?.artifact;
        let blob = |name: &str| {
            job.files.optional_blob(&artifact, name)?.ok_or_else(|| {
                StageError::input_help(
                    "the model on port `model` has no adapter",
                    "format `peft` takes what `distill` with method `lora` made, before anything else was done to it",
                )
            })
        };
        let (adapter, mut config) = (blob(ADAPTER)?, blob(CONFIG)?);
        if let Some(base) = &self.params.base {
            let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&config)
                .map_err(|error| StageError::Internal(format!("`{CONFIG}` cannot be read: {error}")))?;
            fields.insert("base_model_name_or_path".to_owned(), serde_json::json!(base));
            config = format!("{:#}\n", serde_json::Value::Object(fields)).into_bytes();
        }
        let mut blobs = vec![write_whole(job, CONFIG, &config)?, write_whole(job, ADAPTER, &adapter)?];
        write_included(job, &mut blobs)?;
        let files: Vec<&str> = blobs.iter().map(|blob| blob.name.as_str()).collect();
        let manifest = serde_json::json!({ "content": "files", "files": files }).to_string();
        Ok(Draft { manifest, blobs, operands: Vec::new(), sources: Vec::new() })
    }

    fn destination(&self) -> Option<&FilePath> {
        Some(&self.params.to.0)
    }
}
