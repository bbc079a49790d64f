//! What happens during a run, as data. The engine tells; reporters (bars, plain log, run record) listen and never feed back.

use merganser_stages::Progress;
use serde::{Deserialize, Serialize};

/// A unit of work as people know it and as commands accept it: `base`, `tuned[digits]`, `packed[bits=3,digits]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnitName(pub String);

impl std::fmt::Display for UnitName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// How a unit ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Ran,
    Cached,
    Failed,
    Skipped,
}

/// One thing that happened.
#[derive(Clone, Debug)]
pub enum Event {
    RunStarted {
        pipeline: String,
        units: usize,
    },
    /// A large user file is being hashed for the first time.
    Hashing {
        path: String,
        done: u64,
        total: u64,
    },
    /// A remote input is being downloaded; `start` is the first that is told of it.
    Fetching {
        address: String,
        start: bool,
        done: u64,
        total: Option<u64>,
    },
    Fetched {
        address: String,
        size: u64,
        seconds: f64,
    },
    UnitStarted {
        id: usize,
        name: UnitName,
        reason: String,
    },
    Progress {
        id: usize,
        progress: Progress,
    },
    /// Another process is computing the same key.
    Waiting {
        id: usize,
        name: UnitName,
        holder: Option<String>,
    },
    Info {
        message: String,
    },
    Warning {
        message: String,
    },
    UnitFinished {
        id: usize,
        name: UnitName,
        status: Status,
        seconds: f64,
        detail: String,
    },
    Interrupted,
    RunFinished {
        ran: usize,
        cached: usize,
        failed: usize,
        skipped: usize,
        seconds: f64,
    },
}

/// A consumer of events. Called from several threads.
pub trait Reporter: Sync {
    fn event(&self, event: &Event);
}
