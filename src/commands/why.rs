//! `merganser why`: a stage's old key against its new one, field by field.

use super::setup;
use crate::cli::{Global, StageArgs};
use crate::engine::{Forecast, Resolver, UnitId, explain};
use crate::exit::{ExitCode, Failure, Result};
use crate::report::{Align, Table, shorten};
use merganser_cache::{Change, Preimage, StageKey};
use serde::Serialize;
use std::collections::HashMap;

pub fn why(global: &Global, args: &StageArgs) -> Result<ExitCode> {
    let pipeline = setup::load_pipeline(global, &args.pipeline)?;
    let workspace = setup::open_workspace(global)?;
    let selection = setup::select(&pipeline, &args.stage)?;
    let resolver = setup::resolver(&workspace, &pipeline, &[selection], &[], Box::new(|_, _, _| ()))?;
    let planned = setup::plan(&resolver)?;
    let artifacts: HashMap<UnitId, blake3::Hash> =
        planned.iter().filter_map(|unit| Some((unit.id, unit.artifact?))).collect();
    let asked = planned.iter().filter(|unit| resolver.selected[unit.id]);
    let mut answers = Vec::new();
    for unit in asked {
        let entry = &resolver.units.entries[unit.id];
        let known = resolver.units.missing(unit.id).is_none()
            && entry.inputs.iter().all(|input| artifacts.contains_key(&input.from));
        let new = if known { Some(preimage(&resolver, unit.id, &artifacts)?) } else { None };
        let old =
            previous(&resolver, unit.id, new.as_ref().map(Preimage::key), unit.forecast == Forecast::Cached);
        let changes = match (&old, &new) {
            (Some(old), Some(new)) => merganser_cache::diff(&old.1, new),
            _ => Vec::new(),
        };
        answers.push(Answer {
            stage: unit.name.to_string(),
            status: unit.forecast,
            reason: unit.reason.clone(),
            old_key: old.as_ref().map(|(key, _)| key.to_string()),
            new_key: new.as_ref().map(|preimage| preimage.key().to_string()),
            changes: changes.iter().map(ChangeRow::from).collect(),
            new_preimage: new,
        });
    }
    if args.pipeline.json {
        outln!("{}", serde_json::to_string_pretty(&answers).map_err(Failure::failed)?);
    } else {
        for answer in &answers {
            out!("{}", answer.text());
        }
    }
    Ok(ExitCode::Done)
}

fn preimage(
    resolver: &Resolver<'_>,
    id: UnitId,
    artifacts: &HashMap<UnitId, blake3::Hash>,
) -> Result<Preimage> {
    resolver.preimage(id, artifacts).map_err(|error| Failure::failed(error.with_causes()))
}

/// The key to compare with: the latest that differs from `new` and that the unit had in this pipeline, or its stage with other values unless
/// the unit is `cached` (then there is nothing to explain by others); `new` itself if there is no other.
fn previous(
    resolver: &Resolver<'_>,
    id: UnitId,
    new: Option<StageKey>,
    cached: bool,
) -> Option<(StageKey, Preimage)> {
    let old = resolver
        .history(id, !cached)
        .into_iter()
        .filter_map(|key| Some((key, resolver.workspace.store.record(&key).ok()?.preimage)));
    let mut same = None;
    for (key, preimage) in old {
        if Some(key) != new {
            return Some((key, preimage));
        }
        same.get_or_insert((key, preimage));
    }
    same
}

#[derive(Serialize)]
struct Answer {
    stage: String,
    status: Forecast,
    reason: String,
    old_key: Option<String>,
    new_key: Option<String>,
    changes: Vec<ChangeRow>,
    /// Everything that the new key is made of.
    new_preimage: Option<Preimage>,
}

#[derive(Serialize)]
struct ChangeRow {
    field: String,
    old: String,
    new: String,
    #[serde(skip)]
    described: String,
}

impl From<&Change> for ChangeRow {
    fn from(change: &Change) -> Self {
        Self {
            field: change.path.clone(),
            old: explain::shown(change.old.as_ref()),
            new: explain::shown(change.new.as_ref()),
            described: explain::describe(change),
        }
    }
}

impl Answer {
    fn text(&self) -> String {
        let status = match self.status {
            Forecast::Cached => "cached",
            Forecast::Run => "would run",
            Forecast::Maybe => "may run",
        };
        let mut text = format!("{}: {status}", self.stage);
        if !self.reason.is_empty() {
            text += &format!(" ({})", self.reason);
        }
        text.push('\n');
        match (&self.old_key, &self.new_key) {
            (_, None) => text += "  its new key is not known until its inputs have been computed\n",
            (None, Some(new)) => {
                text += &format!("  new key {}; it has not run in this pipeline before\n", shorten(new));
            }
            (Some(old), Some(new)) if old == new => {
                text += &format!("  key {} is unchanged since it last ran\n", shorten(new));
            }
            (Some(old), Some(new)) => {
                text += &format!("  old key {}, new key {}\n", shorten(old), shorten(new));
                let mut table =
                    Table::new(&[("  field", Align::Left), ("old", Align::Left), ("new", Align::Left)]);
                for change in &self.changes {
                    table.row([format!("  {}", change.field), change.old.clone(), change.new.clone()]);
                }
                text += &table.to_string();
                let mut told: Vec<&str> =
                    self.changes.iter().map(|change| change.described.as_str()).collect();
                told.dedup();
                text += &format!("  in short: {}\n", told.join("; "));
            }
        }
        text
    }
}
