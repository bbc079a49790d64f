//! `merganser plan`: what a run would do, and the root cause of each miss.

use super::setup;
use crate::cli::{Global, PlanArgs};
use crate::engine::{Forecast, PlannedUnit, Resolver};
use crate::exit::{ExitCode, Failure, Result};
use crate::report::{Align, Table, shorten};
use indexmap::IndexMap;
use serde::Serialize;

pub fn plan(global: &Global, args: &PlanArgs) -> Result<ExitCode> {
    let pipeline = setup::load_pipeline(global, &args.pipeline)?;
    let workspace = setup::open_workspace(global)?;
    let targets = setup::select_or_all(&pipeline, &args.stage)?;
    let forced = setup::select_all(&pipeline, &args.force)?;
    let resolver = setup::resolver(&workspace, &pipeline, &targets, &forced, Box::new(|_, _, _| ()))?;
    let planned = setup::plan(&resolver)?;
    if args.pipeline.json {
        let report = PlanReport {
            pipeline: &pipeline.name,
            stages: planned.iter().map(|unit| row(&resolver, unit)).collect(),
        };
        outln!("{}", serde_json::to_string_pretty(&report).map_err(Failure::failed)?);
    } else {
        out!("{}", table(&planned));
    }
    Ok(ExitCode::Done)
}

/// `plan --json`.
#[derive(Serialize)]
struct PlanReport<'a> {
    pipeline: &'a str,
    stages: Vec<PlanRow>,
}

#[derive(Serialize)]
struct PlanRow {
    stage: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    member: Option<String>,
    #[serde(skip_serializing_if = "IndexMap::is_empty")]
    vars: IndexMap<String, serde_json::Value>,
    unit: String,
    kind: &'static str,
    status: Forecast,
    key: Option<String>,
    artifact: Option<String>,
    reason: String,
}

fn row(resolver: &Resolver<'_>, unit: &PlannedUnit) -> PlanRow {
    let instance = resolver.units.instance(unit.id);
    PlanRow {
        stage: instance.stage.clone(),
        member: resolver.units.entries[unit.id].member.clone(),
        vars: instance.vars.clone(),
        unit: unit.name.to_string(),
        kind: instance.kind.id(),
        status: unit.forecast,
        key: unit.key.map(|key| key.to_string()),
        artifact: unit.artifact.map(|artifact| artifact.to_hex().to_string()),
        reason: unit.reason.clone(),
    }
}

fn table(planned: &[PlannedUnit]) -> String {
    let mut table =
        Table::new(&[("", Align::Left), ("stage", Align::Left), ("key", Align::Left), ("why", Align::Left)]);
    for unit in planned {
        let word = match unit.forecast {
            Forecast::Cached => "cached",
            Forecast::Run => "run",
            Forecast::Maybe => "maybe",
        };
        let key = unit.key.map_or_else(|| "?".to_owned(), |key| shorten(&key.to_string()));
        table.row([word.to_owned(), unit.name.to_string(), key, unit.reason.clone()]);
    }
    let count = |forecast| planned.iter().filter(|unit| unit.forecast == forecast).count();
    format!(
        "{table}\n{} to run, {} maybe, {} cached\n",
        count(Forecast::Run),
        count(Forecast::Maybe),
        count(Forecast::Cached)
    )
}
