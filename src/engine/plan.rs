//! What a run would do, by the code that does it.

use super::events::UnitName;
use super::resolver::{Lookup, Resolver};
use super::units::UnitId;
use blake3::Hash;
use merganser_cache::StageKey;
use merganser_stages::StageError;
use serde::Serialize;
use std::collections::HashMap;

/// What is known about a unit before a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Forecast {
    /// It will not be executed.
    Cached,
    /// It will be executed.
    Run,
    /// An input will be recomputed; if that gives what it gave before, this is cached.
    Maybe,
}

/// A unit's forecast.
#[derive(Clone, Debug)]
pub struct PlannedUnit {
    pub id: UnitId,
    pub name: UnitName,
    pub forecast: Forecast,
    pub key: Option<StageKey>,
    pub artifact: Option<Hash>,
    pub reason: String,
}

/// Forecasts every needed unit, in topological order.
///
/// INVARIANT: a unit forecast `Cached` is not executed by a run that starts from the same state, and an executed one was `Run` or `Maybe`.
pub fn plan(resolver: &Resolver<'_>) -> Result<Vec<PlannedUnit>, (UnitName, StageError)> {
    let mut artifacts: HashMap<UnitId, Hash> = HashMap::new();
    let mut planned: Vec<PlannedUnit> = Vec::new();
    let mut by_id: HashMap<UnitId, usize> = HashMap::new();
    for (id, entry) in resolver.units.entries.iter().enumerate().filter(|(id, _)| resolver.needed[*id]) {
        let name = entry.name.clone();
        let fail = |error| (name.clone(), error);
        let unknown = entry.inputs.iter().find(|input| !artifacts.contains_key(&input.from));
        let unit = if let Some(missing) = resolver.units.missing(id) {
            // Once it is here, it may turn out to be what the last run had.
            let has_run = !resolver.forced[id] && resolver.previous().contains_key(&name.0);
            let forecast = if has_run { Forecast::Maybe } else { Forecast::Run };
            PlannedUnit { id, name, forecast, key: None, artifact: None, reason: missing.to_owned() }
        } else if let Some(input) = unknown {
            let upstream = &planned[by_id[&input.from]];
            let root = root_cause(upstream);
            let (forecast, reason) = if resolver.forced[id] {
                (Forecast::Run, "forced".to_owned())
            } else if resolver.family_seen(id).map_err(fail)? {
                (Forecast::Maybe, root)
            } else {
                (Forecast::Run, root)
            };
            PlannedUnit { id, name, forecast, key: None, artifact: None, reason }
        } else {
            match resolver.lookup(id, &artifacts, resolver.forced[id]).map_err(fail)? {
                Lookup::Hit { key, artifact } => {
                    artifacts.insert(id, artifact);
                    PlannedUnit {
                        id,
                        name,
                        forecast: Forecast::Cached,
                        key: Some(key),
                        artifact: Some(artifact),
                        reason: String::new(),
                    }
                }
                Lookup::Miss { key, reason, .. } => {
                    PlannedUnit { id, name, forecast: Forecast::Run, key: Some(key), artifact: None, reason }
                }
            }
        };
        by_id.insert(id, planned.len());
        planned.push(unit);
    }
    Ok(planned)
}

/// "`packed` runs: bits 4 → 3": the first cause, not the chain in between.
fn root_cause(upstream: &PlannedUnit) -> String {
    if upstream.key.is_some() || upstream.reason == "forced" {
        format!("`{}` runs: {}", upstream.name, upstream.reason)
    } else {
        upstream.reason.clone()
    }
}
