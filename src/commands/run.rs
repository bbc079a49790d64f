//! `merganser run`: the whole journey, and its summary.

use super::{plan, setup};
use crate::cli::{Global, PlanArgs, RunArgs};
use crate::engine::{
    self, Event, Reporter, Resolver, RunOptions, RunOutcome, RunRecord, StageRecord, Status, Units,
    cancelled, run_id,
};
use crate::exit::{ExitCode, Failure, Result};
use crate::inputs::{Drift, Inputs, LockFile, LockUse};
use crate::pipeline::Pipeline;
use crate::report::{self, scores};
use merganser_sources::{Error as DownloadError, Event as Download};
use merganser_stages::StageError;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

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
    let lock_use = match (args.frozen, args.update_lock) {
        (true, _) => LockUse::Frozen,
        (_, true) => LockUse::Update,
        _ => LockUse::Follow,
    };
    let inputs = setup::open_inputs(global, &args.pipeline, lock_use, on_download(&reporter))?;
    // Mistakes are told before anything is downloaded.
    let first = match setup::parse(&args.pipeline, &inputs) {
        Ok(pipeline) => Some(pipeline),
        Err(failure) if setup::may_be_no_mistakes(&failure, &inputs) => None,
        Err(failure) => return Err(setup::parse_failure(&failure, &inputs)),
    };
    let workspace = setup::open_workspace(global)?;
    let pipeline = match first {
        Some(pipeline) if pipeline.missing.is_empty() => pipeline,
        first => {
            let missing: BTreeSet<String> = inputs.missing().into_keys().collect();
            let wanted = match &first {
                Some(pipeline) => &needed(pipeline, args)? & &missing,
                None => missing,
            };
            inputs.fetch(&wanted).map_err(refused)?;
            setup::parse(&args.pipeline, &inputs)
                .map_err(|failure| setup::parse_failure(&failure, &inputs))?
        }
    };
    setup::print_warnings(&pipeline);
    let targets = setup::select_or_all(&pipeline, &args.stage)?;
    let forced = setup::select_all(&pipeline, &args.force)?;
    let hashing = Arc::clone(&reporter);
    let tell_hashing = move |path: &Path, done, total| {
        hashing.event(&Event::Hashing { path: path.display().to_string(), done, total });
    };
    let is_all = args.stage.is_empty() && args.pipeline.set.is_empty();
    let addresses = needed(&pipeline, args)?;
    let mut lock = inputs.verify(&addresses, is_all, &workspace.store, &tell_hashing).map_err(refused)?;
    // Before anything runs: an interrupted run must not be continued with other inputs.
    save_lock(&inputs, &lock);
    let resolver = setup::resolver(&workspace, &pipeline, &targets, &forced, Box::new(tell_hashing))?;
    let options = RunOptions { jobs: usize::from(args.jobs), keep_going: args.keep_going };
    let outcome = engine::run(&resolver, options, &*reporter);
    let record = record(&resolver, &outcome);
    let copied = copy_to_destinations(&resolver, &outcome);
    let kept = workspace.history.save(&pipeline.path, &record);
    // With other values of variables the same names mean other outputs.
    let drift = if inputs.keep_lock() && args.pipeline.set.is_empty() {
        settle_outputs(&inputs, &mut lock, &resolver, &outcome, args)
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
    if let Err(error) = kept {
        errln!("warning: the run was not recorded: {error}");
    }
    let lock_path = inputs.lock_path().display();
    for unit in &drift {
        errln!("error: the output of `{unit}` is not what `{lock_path}` says");
    }
    Ok(match copied {
        Ok(()) if !drift.is_empty() => ExitCode::NotReproducible,
        Ok(()) => exit_code(&outcome),
        Err(failure) => {
            errln!("{}", failure.message);
            ExitCode::StageFailed
        }
    })
}

/// The addresses of everything that the stages that were asked for read, directly or through others.
fn needed(pipeline: &Pipeline, args: &RunArgs) -> Result<BTreeSet<String>> {
    let targets = setup::select_or_all(pipeline, &args.stage)?;
    let units = Units::new(pipeline);
    let needed = units.needed_for(&targets);
    let ids = (0..units.entries.len()).filter(|id| needed[*id]);
    Ok(ids.flat_map(|id| units.addresses(id).iter().cloned()).collect())
}

/// Turns what downloads tell into events of the run.
fn on_download(reporter: &Arc<dyn Reporter + Send>) -> Arc<dyn Fn(Download) + Send + Sync> {
    let reporter = Mutex::new((Arc::clone(reporter), Instant::now()));
    Arc::new(move |event| {
        let mut state = reporter.lock().unwrap_or_else(PoisonError::into_inner);
        let event = match event {
            Download::Started { address, done, total } => {
                state.1 = Instant::now();
                Event::Fetching { address, start: true, done, total }
            }
            Download::Progress { address, done, total } => {
                Event::Fetching { address, start: false, done, total }
            }
            Download::Finished { address, size } => {
                Event::Fetched { address, size, seconds: state.1.elapsed().as_secs_f64() }
            }
            Download::Retrying { address, reason, wait } => {
                let seconds = wait.as_secs_f64();
                Event::Info { message: format!("{address}: {reason}; trying again in {seconds:.0} s") }
            }
            Download::Waiting { address } => {
                Event::Info { message: format!("wait    {address}: another process is downloading it") }
            }
        };
        state.0.event(&event);
    })
}

/// Why inputs cannot be used, as an exit code and a text.
fn refused(drift: Drift) -> Failure {
    let code = match &drift {
        Drift::Unavailable(errors)
            if errors.iter().any(|error| matches!(error, DownloadError::Cancelled)) =>
        {
            ExitCode::Interrupted
        }
        Drift::Unavailable(errors) if !errors.iter().all(DownloadError::is_users) => ExitCode::StageFailed,
        Drift::Store(_) => ExitCode::StageFailed,
        Drift::Unavailable(_) | Drift::Unpinned { .. } | Drift::Changed { .. } => ExitCode::UserError,
    };
    Failure { code, ..Failure::user_help(&drift, drift.help()) }
}

fn save_lock(inputs: &Inputs, lock: &LockFile) {
    match inputs.save(lock) {
        Ok(true) => errln!("wrote   {}", inputs.lock_path().display()),
        Ok(false) => {}
        Err(error) => {
            errln!("warning: the lock file was not written, the next run finds inputs anew: {error}")
        }
    }
}

/// Writes the outputs into the lock file, or, with `--frozen`, returns the units whose output is not what the lock file says.
fn settle_outputs(
    inputs: &Inputs,
    lock: &mut LockFile,
    resolver: &Resolver<'_>,
    outcome: &RunOutcome,
    args: &RunArgs,
) -> Vec<String> {
    let names = resolver.units.entries.iter().map(|entry| entry.name.to_string());
    let finished = outcome.units.iter().filter_map(|unit| Some((unit.id, unit.artifact?)));
    let outputs: BTreeMap<String, blake3::Hash> =
        finished.map(|(id, artifact)| (resolver.units.entries[id].name.to_string(), artifact)).collect();
    if args.frozen {
        let differs =
            |(name, artifact): &(&String, &blake3::Hash)| lock.outputs.get(*name) != Some(*artifact);
        return outputs.iter().filter(differs).map(|(name, _)| name.clone()).collect();
    }
    let names: BTreeSet<String> = names.collect();
    lock.outputs.retain(|name, _| names.contains(name));
    lock.outputs.extend(outputs);
    // Told once is enough; the inputs have been written before.
    if let Err(error) = inputs.save(lock) {
        errln!("warning: outputs were not written into the lock file: {error}");
    }
    Vec::new()
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
        super::export::place_blobs(&resolver.workspace.store, &artifact, &folder)?;
    }
    Ok(())
}
