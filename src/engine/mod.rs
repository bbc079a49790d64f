//! From a pipeline to results: keys, plan, execution, history.

mod events;
pub mod explain;
mod history;
mod keys;
mod pace;
mod plan;
mod resolver;
mod run;
mod units;
mod workspace;

pub use events::{Event, Reporter, Status, UnitName};
pub use history::{GoalRecord, RunRecord, ScoreRecord, SeenRecord, StageRecord, run_id};
pub use keys::{Hashing, list_sources};
pub use pace::Pace;
pub use plan::{Forecast, PlannedUnit, plan};
pub use resolver::Resolver;
pub use run::{RunOptions, RunOutcome, UnitOutcome, run};
pub use units::{UnitId, Units};
pub use workspace::{Settings, Workspace, cancel, cancelled, default_cache_dir};
