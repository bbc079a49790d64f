//! What `run` does about inputs that lie elsewhere: gets them before anything runs, and keeps the lock file.

use super::setup;
use crate::cli::{Global, RunArgs};
use crate::engine::{Event, Reporter, Resolver, RunOutcome, Units, Workspace, list_sources};
use crate::exit::{ExitCode, Failure, Result};
use crate::inputs::{Drift, Hashing, Inputs, LockFile, LockUse};
use crate::pipeline::Pipeline;
use crate::report;
use merganser_sources::{Error as DownloadError, Event as Download};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A pipeline with everything here that the run needs.
pub(super) struct Ready {
    pub(super) pipeline: Pipeline,
    pub(super) inputs: Arc<Inputs>,
    pub(super) workspace: Workspace,
}

/// Reads the pipeline, downloads what the run needs and is not here, and reads it again with that.
pub(super) fn get(global: &Global, args: &RunArgs, reporter: &Arc<dyn Reporter + Send>) -> Result<Ready> {
    let lock_use = match (args.frozen, args.update_lock) {
        (true, _) => LockUse::Frozen,
        (_, true) => LockUse::Update,
        _ => LockUse::Follow,
    };
    let inputs = setup::open_inputs(global, &args.pipeline, lock_use, on_download(reporter))?;
    // Mistakes are told before anything is downloaded.
    let first = match setup::parse(&args.pipeline, &inputs) {
        Ok(pipeline) => Some(pipeline),
        Err(failure) if setup::may_be_no_mistakes(&failure, &inputs) => None,
        Err(failure) => return Err(setup::parse_failure(&failure, &inputs)),
    };
    let workspace = setup::open_workspace(global)?;
    let missing: BTreeSet<String> = inputs.missing().into_keys().collect();
    let wanted = match first {
        Some(pipeline) if missing.is_empty() => {
            setup::print_warnings(&pipeline);
            return Ok(Ready { pipeline, inputs, workspace });
        }
        Some(pipeline) => {
            check_files(&pipeline, args, &workspace)?;
            &needed(&pipeline, args)? & &missing
        }
        None => missing,
    };
    inputs.fetch(&wanted).map_err(|drift| refused(&drift))?;
    let pipeline =
        setup::parse(&args.pipeline, &inputs).map_err(|failure| setup::parse_failure(&failure, &inputs))?;
    setup::print_warnings(&pipeline);
    Ok(Ready { pipeline, inputs, workspace })
}

/// Reports files of this machine that are missing.
fn check_files(pipeline: &Pipeline, args: &RunArgs, workspace: &Workspace) -> Result<()> {
    let targets = setup::select_or_all(pipeline, &args.stage)?;
    let units = Units::new(pipeline);
    let needed = units.needed_for(&targets);
    let was_seen = |path: &Path| workspace.store.last_digest(path).is_some();
    list_sources(&units, &needed, &was_seen).map(drop).map_err(|problems| Failure {
        code: ExitCode::UserError,
        message: pipeline.files.render(&problems, report::problem_style()),
    })
}

/// Compares the inputs of the run with the lock file, and writes down what is new; returns the lock file as it is then.
pub(super) fn pin(
    inputs: &Inputs,
    pipeline: &Pipeline,
    args: &RunArgs,
    workspace: &Workspace,
    hashing: Hashing<'_>,
) -> Result<LockFile> {
    let is_all = args.stage.is_empty() && args.pipeline.set.is_empty();
    let addresses = needed(pipeline, args)?;
    let lock =
        inputs.verify(&addresses, is_all, &workspace.store, hashing).map_err(|drift| refused(&drift))?;
    // Before anything runs: an interrupted run must not be continued with other inputs.
    save_lock(inputs, &lock);
    Ok(lock)
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
fn refused(drift: &Drift) -> Failure {
    let code = match drift {
        Drift::Unavailable(errors)
            if errors.iter().any(|error| matches!(error, DownloadError::Cancelled)) =>
        {
            ExitCode::Interrupted
        }
        Drift::Unavailable(errors) if !errors.iter().all(DownloadError::is_users) => ExitCode::StageFailed,
        Drift::Store(_) => ExitCode::StageFailed,
        Drift::Unavailable(_) | Drift::Unpinned { .. } | Drift::Changed { .. } => ExitCode::UserError,
    };
    Failure { code, ..Failure::user_help(drift, drift.help()) }
}

fn save_lock(inputs: &Inputs, lock: &LockFile) {
    match inputs.save(lock) {
        Ok(true) => errln!("wrote   {}", inputs.lock_path().display()),
        Ok(false) => {}
        Err(error) => {
            errln!("warning: the lock file was not written, the next run finds inputs anew: {error}");
        }
    }
}

/// Writes the outputs into the lock file, or, with `--frozen`, returns the units whose output is not what the lock file says.
pub(super) fn settle_outputs(
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
