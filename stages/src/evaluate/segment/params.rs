//! What a dataset of masks takes.

use super::super::params::DatasetParams;
use super::decoder::Wanted;
use crate::StageError;
use crate::images::dataset as labelled;
use crate::kind::{SourceFile, SourceSet};
use crate::params::did_you_mean;
use crate::segmentation::dataset::{self, Spec};
use crate::segmentation::prompt::PromptKind;
use std::collections::HashSet;

/// How objects are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SegmentParams {
    pub(super) prompts: Vec<PromptKind>,
    /// Whether prompts follow from the masks even where the dataset has some of its own.
    pub(super) derived_prompts: bool,
    /// Whether the best of several masks is taken, or the one for clear prompts; by default it follows from the prompt.
    multimask: Option<bool>,
}

impl SegmentParams {
    pub(super) fn of(dataset: &DatasetParams) -> Self {
        Self {
            prompts: dataset.prompts.clone().unwrap_or_else(|| vec![PromptKind::Point, PromptKind::Box]),
            derived_prompts: dataset.derived_prompts,
            multimask: dataset.multimask,
        }
    }

    pub(super) fn wanted(&self, kind: PromptKind) -> Wanted {
        let is_single = self.multimask.map_or(kind.is_clear(), |several| !several);
        match (is_single, self.multimask) {
            (false, _) => Wanted::BestOfSeveral,
            (true, Some(_)) => Wanted::Single,
            (true, None) => Wanted::SingleIfThere,
        }
    }
}

impl DatasetParams {
    /// The dataset as the reader of masks wants it.
    pub(super) fn spec_of_masks(&self) -> Spec {
        Spec {
            format: self.format.clone(),
            path: self.path.as_ref().map(|path| path.path.clone()).unwrap_or_default(),
            split: self.split.clone(),
            limit: self.limit(),
        }
    }

    /// The files of a dataset of masks, in its order.
    pub(in super::super) fn files_of_masks(&self) -> Result<SourceSet, StageError> {
        let files = dataset::files(&self.spec_of_masks())?.into_iter();
        let files = files.map(|file| SourceFile { label: file.label, path: file.path }).collect();
        Ok(SourceSet { parameter: "dataset".to_owned(), files })
    }

    /// Keys that go with datasets of the other kind, and what is wrong with a dataset of masks.
    pub(in super::super) fn mistakes_of_kind(
        &self,
        task: &str,
        segments: bool,
        complain: &mut impl FnMut(&'static str, String, Option<String>),
    ) {
        for (name, is_given, goes_with_masks) in self.particular() {
            if is_given && goes_with_masks != segments {
                let graph = if goes_with_masks { "`graph = { encoder, decoder }`" } else { "classifiers" };
                complain("unknown-key", format!("dataset `{task}`: `{name}` goes with {graph}"), None);
            }
        }
        if !segments {
            return;
        }
        if dataset::find(&self.format).is_none() {
            let message = format!("dataset `{task}` has unknown format `{}`", self.format);
            let help = if labelled::FORMATS.iter().any(|format| format.id() == self.format) {
                Some("it holds labels: of masks there are ".to_owned() + &dataset::known())
            } else {
                did_you_mean(&self.format, dataset::FORMATS.iter().map(|format| format.id()))
            };
            complain("bad-value", message, help);
        }
        if self.path.is_none() {
            complain("missing-key", format!("dataset `{task}`: format `{}` needs `path`", self.format), None);
        }
        let prompts = self.prompts.as_deref().unwrap_or(&[PromptKind::Point]);
        let mut seen = HashSet::new();
        if prompts.is_empty() || !prompts.iter().all(|prompt| seen.insert(*prompt)) {
            let message = format!("dataset `{task}`: `prompts` are `point`, `box`, or both, each once");
            complain("bad-value", message, None);
        }
    }
}
