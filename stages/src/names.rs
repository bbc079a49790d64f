//! Tensor names that do not suit: renamed by rules, converted to another library's family, or brought in line with another checkpoint.
//!
//! Nothing is copied: the result is a view over the tensors as they are. What was done is said as a notice.

use crate::job::Notice;
use crate::params::{Params, Problem, parse};
use crate::{Job, JobInput, NameFilter, StageError};
use merganser_tensors::formats::FilePart;
use merganser_tensors::keymap::{self, Family, KeymapError, RenameRule, Target};
use merganser_tensors::manifest::TensorEntry;
use merganser_tensors::{Manifest, TensorInfo, TensorSource};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What `load` takes about names.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NameRules {
    /// Renames tensors, the first rule that matches each: `[{ from = "backbone.*", to = "vit.*" }]`; every `*` stands for any run of
    /// characters, the same on both sides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    rename: Vec<Rename>,
    /// Converts names and layouts to those of a library, such as `open-clip`, `transformers-clip`, `timm-vit`, `meta-sam2` (default: as they are).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    family: Option<String>,
}

#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Rename {
    /// The name, or a pattern of it.
    from: String,
    /// The new name.
    to: String,
}

impl NameRules {
    /// Takes the keys out of a stage's table and checks them.
    pub(crate) fn take(params: &mut Params<'_>) -> Result<Self, Vec<Problem>> {
        let own = params.split_off(&["rename", "family"]);
        let rules: Self = parse(&own)?;
        let mut problems = Vec::new();
        if let Err(problem) = rules.renames() {
            problems.push(Problem::new("bad-value", problem.to_string()).at(own.span));
        }
        if let Err(problem) = rules.target() {
            let known = keymap::FAMILIES.iter().map(|family| family.id);
            let mut problem = Problem::new("bad-value", problem.to_string()).at(own.span);
            problem.help = crate::did_you_mean(rules.family.as_deref().unwrap_or_default(), known);
            problems.push(problem);
        }
        if problems.is_empty() { Ok(rules) } else { Err(problems) }
    }

    /// Adds the keys to the documentation of a kind's own parameters.
    pub(crate) fn document(mut parameters: Schema) -> Schema {
        let mut own = schema_for!(Self);
        for section in ["properties", "$defs"] {
            let Some(ours) = own.ensure_object().remove(section) else { continue };
            let theirs = parameters.ensure_object().entry(section).or_insert_with(|| serde_json::json!({}));
            if let (Some(theirs), serde_json::Value::Object(ours)) = (theirs.as_object_mut(), ours) {
                theirs.extend(ours);
            }
        }
        parameters
    }

    pub(crate) fn converts(&self) -> bool {
        self.family.is_some()
    }

    /// Renames the tensors of files.
    pub(crate) fn rename_parts(&self, parts: &mut [FilePart]) -> Result<(), StageError> {
        // A base has the names of what it is added to.
        if parts.iter().any(|part| part.base.is_some()) {
            let names = |part: &mut FilePart| -> Result<(), StageError> {
                self.rename(part.tensors.iter_mut().map(|tensor| &mut tensor.info.name).collect())
            };
            return parts.iter_mut().try_for_each(names);
        }
        self.rename(
            parts.iter_mut().flat_map(|part| &mut part.tensors).map(|tensor| &mut tensor.info.name).collect(),
        )
    }

    /// Renames all tensors of a checkpoint.
    pub(crate) fn rename(&self, mut names: Vec<&mut String>) -> Result<(), StageError> {
        if self.rename.is_empty() {
            return Ok(());
        }
        let old: Vec<&str> = names.iter().map(|name| name.as_str()).collect();
        let rules = self.renames().map_err(unusable)?;
        let new = keymap::rename(&old, &rules).map_err(unusable)?;
        for (name, new) in names.iter_mut().zip(new) {
            **name = new;
        }
        Ok(())
    }

    /// Converts a description to the family that was asked for, keeping the tensors that the filter admits under their new names.
    pub(crate) fn convert(
        &self,
        manifest: Manifest,
        filter: &NameFilter,
        job: &Job<'_>,
    ) -> Result<Manifest, StageError> {
        let Some(family) = self.target().map_err(unusable)? else { return Ok(manifest) };
        let infos: Vec<TensorInfo> = manifest.tensors().iter().map(TensorEntry::info).collect();
        let examples =
            || infos.iter().take(3).map(|info| format!("`{}`", info.name)).collect::<Vec<_>>().join(", ");
        let from = keymap::identify(&infos).map_err(unusable)?;
        let from = from.ok_or_else(|| unusable(KeymapError::Unidentified { examples: examples() }))?;
        let mut mapping =
            keymap::map(&infos, manifest.content(), &from, &Target::of(family)).map_err(unusable)?;
        let left_out: Vec<&str> = mapping.unmapped.iter().map(String::as_str).collect();
        let message = format!("names of {} become those of `{}`", from.describe(), family.id);
        if left_out.is_empty() {
            (job.notify)(Notice::Info(message));
        } else {
            let left_out = crate::diff::listed(&left_out);
            job.warn(format!("{message}, which has none for {left_out}: left out"));
        }
        mapping.tensors.retain(|(info, _)| filter.admits(&info.name));
        Ok(mapping.view_of(manifest)?)
    }

    fn renames(&self) -> Result<Vec<RenameRule>, KeymapError> {
        self.rename.iter().map(|rule| RenameRule::new(&rule.from, &rule.to)).collect()
    }

    fn target(&self) -> Result<Option<&'static Family>, KeymapError> {
        let Some(id) = &self.family else { return Ok(None) };
        let found = Family::find(id);
        found
            .map(Some)
            .ok_or_else(|| KeymapError::UnknownFamily { family: id.clone(), known: Family::known() })
    }
}

/// A view of `input` under the names of `base`, when the two have the same model under names of different libraries, with a notice;
/// `None` when there is nothing to do.
pub(crate) fn reconciled(
    job: &Job<'_>,
    base: &Manifest,
    input: &JobInput,
    manifest: &Manifest,
) -> Result<Option<Manifest>, StageError> {
    let found = keymap::reconcile(base, manifest).map_err(|problem| {
        StageError::input_help(
            format!(
                "the names on port `{}` cannot be brought in line with the base's: {problem}",
                input.port
            ),
            "`family`, `rename` and `strip_prefix` of `load` say what is meant",
        )
    })?;
    let Some(found) = found else { return Ok(None) };
    (job.notify)(Notice::Info(format!("port `{}`: {}", input.port, found.notice)));
    Ok(Some(found.mapping.manifest(manifest.content(), input.artifact)?))
}

/// Opens `input` under the names of `base`.
pub(crate) fn open_like(
    job: &Job<'_>,
    base: &JobInput,
    input: &JobInput,
) -> Result<Arc<dyn TensorSource>, StageError> {
    let manifest = job.files.manifest(&input.artifact)?;
    let view = reconciled(job, &job.files.manifest(&base.artifact)?, input, &manifest)?;
    Ok(merganser_tensors::open(&view.unwrap_or(manifest), &job.files)?)
}

#[expect(clippy::needless_pass_by_value, reason = "what `map_err` hands over")]
fn unusable(problem: KeymapError) -> StageError {
    StageError::input(problem.to_string())
}
