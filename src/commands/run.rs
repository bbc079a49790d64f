//! `merganser run`: the whole journey, and its summary.

use super::{limit, plan, remote, setup};
use crate::cli::{Global, PlanArgs, RunArgs};
use crate::engine::{
    self, Event, Pace, Reporter, Resolver, RunOptions, RunOutcome, RunRecord, StageRecord, Status,
    UnitOutcome, Workspace, cancelled, run_id,
};
use crate::exit::{ExitCode, Failure, Result};
use crate::report::{self, scores};
use merganser_stages::StageError;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

pub fn run(global: &Global, args: &RunArgs) -> Result<ExitCode> {
    if args.dry_run {
        let planned = PlanArgs {
            pipeline: args.pipeline.clone(),
            stage: args.stage.clone(),
            force: args.force.clone(),
        };
        return plan::plan(global, &planned);
    }
    setup::stop_on_interrupt();
    let reporter: Arc<dyn Reporter + Send> = report::progress_reporter();
    let remote::Ready { pipeline, inputs, workspace } = remote::get(global, args, &reporter)?;
    let targets = setup::select_or_all(&pipeline, &args.stage)?;
    let forced = setup::select_all(&pipeline, &args.force)?;
    let (targets, left) = match args.max {
        Some(most) => limit::at_most(&workspace, &pipeline, targets, &forced, usize::from(most))?,
        None => (targets, 0),
    };
    let hashing = Arc::clone(&reporter);
    let tell_hashing = move |path: &Path, done, total| {
        hashing.event(&Event::Hashing { path: path.display().to_string(), done, total });
    };
    let mut lock = remote::pin(&inputs, &pipeline, args, &workspace, &tell_hashing)?;
    let resolver = setup::resolver(&workspace, &pipeline, &targets, &forced, Box::new(tell_hashing))?;
    let options = RunOptions { jobs: usize::from(args.jobs), keep_going: args.keep_going };
    let mut outcome = engine::run(&resolver, options, &*reporter);
    remember_paces(&workspace, &pipeline.path, &mut outcome);
    let record = record(&resolver, &outcome);
    let copied = copy_to_destinations(&resolver, &outcome);
    let kept = workspace.history.save(&pipeline.path, &record);
    // With other values of variables the same names mean other outputs.
    let drift = if inputs.keep_lock() && args.pipeline.set.is_empty() {
        remote::settle_outputs(&inputs, &mut lock, &resolver, &outcome, args)
    } else {
        Vec::new()
    };
    drop(reporter);
    if args.pipeline.json {
        outln!("{}", serde_json::to_string_pretty(&record).map_err(Failure::failed)?);
    } else {
        out!("{}", scores::table(&resolver, &outcome));
        if outcome.units.iter().all(|unit| matches!(unit.status, Status::Ran | Status::Cached)) {
            out!("{}", scores::next_step(&resolver, &args.pipeline.file));
        }
    }
    for goal in &record.goals {
        errln!("goal missed: `{}`: {}", goal.unit, goal.missed);
    }
    if left > 0 {
        errln!("{left} combinations are left: run the same command to go on");
    }
    if let Err(error) = kept {
        errln!("warning: the run was not recorded: {error}");
    }
    let lock_path = inputs.lock_path().display();
    for unit in &drift {
        errln!("error: the output of `{unit}` is not what `{lock_path}` says");
    }
    Ok(match copied {
        Ok(()) => match exit_code(&outcome) {
            ExitCode::Done if !drift.is_empty() => ExitCode::NotReproducible,
            ExitCode::Done if !record.goals.is_empty() => ExitCode::GoalNotMet,
            code => code,
        },
        Err(failure) => {
            errln!("{}", failure.message);
            ExitCode::StageFailed
        }
    })
}

/// Of cached evaluations, takes over how fast they were when they were computed, as the latest records have it.
fn remember_paces(workspace: &Workspace, pipeline: &Path, outcome: &mut RunOutcome) {
    const RECORDS: usize = 3;
    let without = |unit: &UnitOutcome| unit.status == Status::Cached && unit.pace.is_none();
    if !outcome.units.iter().any(without) {
        return;
    }
    for record in workspace.history.latest(pipeline).take(RECORDS) {
        let known: HashMap<&str, Pace> =
            record.stages.iter().filter_map(|stage| Some((stage.key.as_deref()?, stage.pace?))).collect();
        for unit in outcome.units.iter_mut().filter(|unit| without(unit)) {
            unit.pace = unit.key.and_then(|key| known.get(key.to_string().as_str()).copied());
        }
    }
}

fn exit_code(outcome: &RunOutcome) -> ExitCode {
    if outcome.unrepairable {
        ExitCode::DamagedStore
    } else if outcome.units.iter().any(|unit| unit.status == Status::Failed) {
        ExitCode::StageFailed
    } else if outcome.interrupted || cancelled() {
        ExitCode::Interrupted
    } else {
        ExitCode::Done
    }
}

fn record(resolver: &Resolver<'_>, outcome: &RunOutcome) -> RunRecord {
    let units = &resolver.units;
    let stages = outcome
        .units
        .iter()
        .map(|unit| {
            let instance = units.instance(unit.id);
            StageRecord {
                stage: instance.stage.clone(),
                member: units.entries[unit.id].member.clone(),
                vars: instance.vars.clone(),
                kind: instance.kind.id().to_owned(),
                status: unit.status,
                key: unit.key.map(|key| key.to_string()),
                artifact: unit.artifact.map(|artifact| artifact.to_hex().to_string()),
                seconds: unit.seconds,
                pace: unit.pace,
                reason: unit.error.as_ref().map_or_else(|| unit.reason.clone(), StageError::with_causes),
                unit: units.entries[unit.id].name.to_string(),
            }
        })
        .collect();
    RunRecord {
        run: run_id(),
        pipeline: units.pipeline.name.clone(),
        seconds: outcome.seconds,
        stages,
        scores: scores::collect(resolver, outcome),
        goals: scores::missed_goals(resolver, outcome),
    }
}

/// Copies the outputs of `export` stages to where the user wants them.
fn copy_to_destinations(resolver: &Resolver<'_>, outcome: &RunOutcome) -> Result<()> {
    for unit in &outcome.units {
        let (Some(artifact), Some(destination)) =
            (unit.artifact, resolver.units.stage(unit.id).destination())
        else {
            continue;
        };
        let folder = match &resolver.units.entries[unit.id].member {
            Some(member) if resolver.units.instance(unit.id).bodies.len() == 1 => {
                destination.path.join(member)
            }
            _ => destination.path.clone(),
        };
        let stage = resolver.units.stage(unit.id);
        super::export::place_blobs_in(&resolver.workspace.store, &artifact, &|name| {
            if stage.is_shared_file(name) { &destination.path } else { &folder }
        })?;
    }
    Ok(())
}
