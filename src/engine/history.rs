//! Run records: what ran, from what, with which result. They live beside the store, one JSON file per run and pipeline.
//!
//! A record is written once, when the run has ended, to a temporary file that is then renamed. A record that cannot be read is skipped: history
//! explains, it never decides.

use super::events::Status;
use super::pace::Pace;
use indexmap::IndexMap;
use merganser_stages::{Missed, ScoreRow};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// One run, as `run --json` prints it and as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunRecord {
    /// Sorts by time.
    pub run: String,
    pub pipeline: String,
    pub seconds: f64,
    pub stages: Vec<StageRecord>,
    pub scores: Vec<ScoreRecord>,
    /// Goals that were not met.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub goals: Vec<GoalRecord>,
}

/// A goal that an evaluation did not meet.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GoalRecord {
    /// The evaluation, as commands accept it.
    pub unit: String,
    pub stage: String,
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    pub vars: IndexMap<String, serde_json::Value>,
    #[serde(flatten)]
    pub missed: Missed,
}

/// One unit of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StageRecord {
    pub stage: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<String>,
    /// The swept vars that the instance depends on.
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    pub vars: IndexMap<String, serde_json::Value>,
    pub kind: String,
    pub status: Status,
    pub key: Option<String>,
    pub artifact: Option<String>,
    pub seconds: f64,
    /// How fast images were evaluated when this was computed; of a cached unit, as an earlier record has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pace: Option<Pace>,
    pub reason: String,
    /// Names the unit as commands accept it: `packed[bits=3,digits]`.
    pub unit: String,
}

/// One number of an evaluation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScoreRecord {
    pub stage: String,
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    pub vars: IndexMap<String, serde_json::Value>,
    /// The stage on the `model` port.
    pub model: String,
    /// The member of that stage, when it is a collection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<String>,
    /// Which images of the scored task the model was made with, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<SeenRecord>,
    #[serde(flatten)]
    pub row: ScoreRow,
}

/// Images that a scored model was made with, anywhere on its way: trained or tuned on, selected on, calibrated with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenRecord {
    /// Whether with their labels.
    pub labels: bool,
    /// Whether they are the very images that are scored.
    pub scored: bool,
}

/// The folder of run records.
pub struct History {
    root: PathBuf,
}

impl History {
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    fn folder(&self, pipeline: &Path) -> PathBuf {
        let digest = blake3::hash(pipeline.as_os_str().as_encoded_bytes()).to_hex();
        self.root.join(&digest[..16])
    }

    /// Keeps a record.
    pub fn save(&self, pipeline: &Path, record: &RunRecord) -> std::io::Result<()> {
        let folder = self.folder(pipeline);
        fs_err::create_dir_all(&folder)?;
        let json = serde_json::to_vec(record)?;
        let staged = folder.join(format!(".{}.tmp", record.run));
        fs_err::write(&staged, json)?;
        fs_err::rename(&staged, folder.join(format!("{}.json", record.run)))
    }

    /// Reads the records of a pipeline file, the latest first; each is read only when it is asked for.
    pub fn latest(&self, pipeline: &Path) -> impl Iterator<Item = RunRecord> {
        let mut paths: Vec<PathBuf> = std::fs::read_dir(self.folder(pipeline))
            .map(|entries| {
                entries
                    .flatten()
                    .map(|entry| entry.path())
                    .filter(|path| path.extension().is_some_and(|e| e == "json"))
                    .collect()
            })
            .unwrap_or_default();
        paths.sort_unstable_by(|a, b| b.cmp(a));
        paths.into_iter().filter_map(|path| serde_json::from_slice(&std::fs::read(path).ok()?).ok())
    }
}

/// Names a run by its start: `20261120-134513-007-1a2b` (UTC, milliseconds, process), so that names sort by time.
pub fn run_id() -> String {
    let now = jiff::Timestamp::now();
    let stamp = now.strftime("%Y%m%d-%H%M%S");
    format!("{stamp}-{:03}-{:04x}", now.subsec_millisecond(), std::process::id() & 0xffff)
}
