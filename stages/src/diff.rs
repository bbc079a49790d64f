//! `diff`: task vectors, τ = θ − θ₀, as views that copy nothing.
//!
//! Both sides are widened to f32 and subtracted in f32 whenever a block is read. Integer tensors (position ids, counters) have no difference
//! and are left out; the merge takes them from the base.
//!
//! A fine-tuned checkpoint with another library's names for the same model is read under the names of the base, with a notice.

use crate::filter::NameFilter;
use crate::kind::{Arity, Connection, Content, MethodDoc, Port, Ports, Stage, StageKind, Unit};
use crate::params::{Params, Problem, one_map, parse, to_value};
use crate::{Draft, Job, StageError, checkpoint, names};
use merganser_cache::Value;
use merganser_tensors::manifest::{self, TensorEntry, Term};
use merganser_tensors::{DType, Manifest, TensorInfo};
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

pub(crate) struct Diff;

/// What to do about a tensor of the base that the fine-tuned checkpoint lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Missing {
    /// Refuse, naming the tensors.
    #[default]
    Error,
    /// Leave them out, with a warning.
    Skip,
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct DiffParams {
    /// What to do about tensors of the base that the fine-tuned checkpoint lacks: `error` or `skip`.
    #[serde(default)]
    missing: Missing,
}

const PORTS: &[Port] = &[
    Port {
        name: "base",
        doc: "θ₀, the pretrained checkpoint",
        accepts: &[Content::Checkpoint],
        arity: Arity::PerMember,
        required: true,
    },
    Port {
        name: "tuned",
        doc: "θ, a fine-tuned checkpoint; a collection gives a collection of task vectors",
        accepts: &[Content::Checkpoint],
        arity: Arity::PerMember,
        required: true,
    },
];

impl StageKind for Diff {
    fn id(&self) -> &'static str {
        "diff"
    }

    fn summary(&self) -> &'static str {
        "task vectors: fine-tuned less base"
    }

    fn ports(&self) -> Ports {
        Ports { named: PORTS, open: None }
    }

    fn methods(&self) -> Vec<MethodDoc> {
        vec![MethodDoc {
            id: "diff",
            summary: self.summary(),
            formula: "τ = θ − θ₀ in f32",
            source: "Ilharco et al., Editing Models with Task Arithmetic, arXiv:2212.04089, §2",
            schema: NameFilter::document(schema_for!(DiffParams)),
        }]
    }

    fn parse(&self, mut params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        let filter = NameFilter::take(&mut params);
        match (filter, parse(&params)) {
            (Ok(filter), Ok(params)) => Ok(Box::new(DiffStage { params, filter })),
            (filter, parsed) => Err(filter.err().into_iter().chain(parsed.err()).flatten().collect()),
        }
    }
}

struct DiffStage {
    params: DiffParams,
    filter: NameFilter,
}

impl Stage for DiffStage {
    fn version(&self) -> u32 {
        2
    }

    fn output(&self, _: &[Connection]) -> Result<Content, Problem> {
        Ok(Content::TaskVectors)
    }

    fn parameters(&self, _: &Unit) -> Result<Value, StageError> {
        Ok(one_map([to_value(&self.params)?, to_value(&self.filter)?]))
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        let (base, tuned) = (job.input("base")?, job.input("tuned")?);
        let base_manifest = job.files.manifest(&base.artifact)?;
        let stored = job.files.manifest(&tuned.artifact)?;
        let renamed = names::reconciled(job, &base_manifest, tuned, &stored)?;
        let base_tensors = by_name(&base_manifest);
        let tuned_tensors = by_name(renamed.as_ref().unwrap_or(&stored));
        let admitted = |name: &str| self.filter.admits(name);
        let mut entries = Vec::new();
        let mut missing = Vec::new();
        for (&name, &info) in
            base_tensors.iter().filter(|(name, info)| info.dtype.is_float() && admitted(name))
        {
            let Some(other) = tuned_tensors.get(name) else {
                missing.push(name);
                continue;
            };
            if other.shape != info.shape {
                return Err(StageError::input(format!(
                    "tensor `{name}` has shape {:?} in the base and {:?} in the fine-tuned checkpoint",
                    info.shape, other.shape
                )));
            }
            if !other.dtype.is_float() {
                return Err(StageError::input(format!(
                    "tensor `{name}` is {} in the base and {} in the fine-tuned checkpoint",
                    info.dtype, other.dtype
                )));
            }
            entries.push(TensorInfo { name: name.to_owned(), dtype: DType::F32, shape: info.shape.clone() });
        }
        if !missing.is_empty() {
            let message = format!("the fine-tuned checkpoint lacks {}", listed(&missing));
            match self.params.missing {
                Missing::Error => {
                    return Err(StageError::input_help(
                        message,
                        "`missing = \"skip\"` leaves them as in the base",
                    ));
                }
                Missing::Skip => job.warn(message),
            }
        }
        let extra: Vec<&str> = tuned_tensors
            .keys()
            .filter(|name| !base_tensors.contains_key(*name) && admitted(name))
            .copied()
            .collect();
        if !extra.is_empty() {
            job.warn(format!("the base lacks {}: left out of the task vector", listed(&extra)));
        }
        if entries.is_empty() {
            return Err(StageError::input("base and fine-tuned checkpoint have no float tensor in common"));
        }
        let terms = vec![
            Term::new(1.0, renamed.as_ref().map_or(tuned.artifact, Manifest::view_digest)),
            Term::new(-1.0, base.artifact),
        ];
        let difference = Manifest::linear(manifest::Content::TaskVectors, entries, terms)?;
        Ok(checkpoint::view(&difference.with_views(renamed.into_iter().collect())?))
    }
}

fn by_name(manifest: &Manifest) -> BTreeMap<&str, &TensorEntry> {
    manifest.tensors().iter().map(|entry| (entry.name.as_str(), entry)).collect()
}

/// "tensor `a`", "3 tensors: `a`, `b`, `c`"; long lists are cut.
pub(crate) fn listed(names: &[&str]) -> String {
    const SHOWN: usize = 6;
    let mut quoted: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
    if names.len() > SHOWN {
        quoted.push(format!("and {} more", names.len() - SHOWN));
    }
    match names.len() {
        1 => format!("tensor {}", quoted[0]),
        n => format!("{n} tensors: {}", quoted.join(", ")),
    }
}
