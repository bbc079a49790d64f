//! The table `text`: how class names become a head, and where the tokenizer lies.

use super::params::exists;
use super::tokens;
use crate::StageError;
use crate::kind::{SourceFile, SourceSet};
use crate::params::FilePath;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// How class names become a head.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TextParams {
    /// `tokenizer.json`, or `vocab.json` with `merges.txt` beside it (default: beside the text export, or in the folder above).
    #[serde(default)]
    tokenizer: Option<FilePath>,
    /// Whose text tower: the model's, or the origin's.
    #[serde(default)]
    pub weights: Tower,
    /// The factor of the logits (default: exp of the tensor `logit_scale`).
    #[serde(default)]
    pub scale: Option<f64>,
    /// Tokens that the text tower takes at most (default: what the export says, or 77).
    #[serde(default)]
    pub context: Option<u32>,
    /// The text export's output (default: `text_embeds`, or the only one).
    #[serde(default)]
    pub output: Option<String>,
}

impl TextParams {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The files of the tokenizer: those that are named, or what lies beside the text export or in the folder above it.
    pub(super) fn tokenizer(&self, text: &Path) -> Result<SourceSet, StageError> {
        let pair = |vocabulary: &Path| {
            let merges = vocabulary.with_file_name(tokens::MERGES);
            [vocabulary.to_owned(), merges].map(|path| SourceFile { label: String::new(), path }).to_vec()
        };
        let set = |files| SourceSet { parameter: tokens::SOURCE.to_owned(), files };
        if let Some(file) = &self.tokenizer {
            exists(tokens::SOURCE, &file.path)?;
            if file.path.file_name().is_some_and(|name| name == tokens::VOCABULARY) {
                let files = pair(&file.path);
                exists(tokens::SOURCE, &files[1].path)?;
                return Ok(set(files));
            }
            return Ok(SourceSet::one(tokens::SOURCE, &file.path));
        }
        let folders = [text.parent(), text.parent().and_then(Path::parent)];
        for folder in folders.into_iter().flatten() {
            if folder.join(tokens::TOKENIZER).is_file() {
                return Ok(SourceSet::one(tokens::SOURCE, folder.join(tokens::TOKENIZER)));
            }
            let files = pair(&folder.join(tokens::VOCABULARY));
            if files.iter().all(|file| file.path.is_file()) {
                return Ok(set(files));
            }
        }
        Err(StageError::input_help(
            format!(
                "there is neither `{}` nor `{}` with `{}` beside `{}`",
                tokens::TOKENIZER,
                tokens::VOCABULARY,
                tokens::MERGES,
                text.display()
            ),
            "say how texts become tokens: `text = { tokenizer = \"path/to/tokenizer.json\" }`",
        ))
    }
}

/// Whose text tower makes a head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Tower {
    #[default]
    Model,
    Origin,
}
