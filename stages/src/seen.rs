//! Which images a stage has looked at to make its output: kept beside it, so that scores of what comes of it can tell.

use crate::{ScoredImages, StageError};
use merganser_cache::{Blob, Staging};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;

/// The name of the blob.
pub const SEEN: &str = "seen.json";

/// Images that something was made with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seen {
    /// Whether their labels were used, too.
    pub labels: bool,
    /// By dataset.
    pub images: BTreeMap<String, ScoredImages>,
    /// By dataset: images elsewhere that decided which of several versions it is, as those for validation do. Absent in what is made without.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub validation: BTreeMap<String, ScoredImages>,
}

impl Seen {
    /// Reads the blob; `None` if it is not one.
    pub fn from_json(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }

    /// All of them, with the names of their datasets: one can occur twice, with images of its own and with others for validation.
    pub fn all(&self) -> impl Iterator<Item = (&str, &ScoredImages)> {
        self.images.iter().chain(&self.validation).map(|(name, images)| (name.as_str(), images))
    }

    pub(crate) fn write(&self, staging: &Staging) -> Result<Blob, StageError> {
        let mut writer = staging.writer(SEEN)?;
        writer.write_all(&serde_json::to_vec(self).expect("names and numbers can be written"))?;
        Ok(writer.finish()?)
    }
}
