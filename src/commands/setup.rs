//! What most commands start with: the pipeline, the store, a resolver.

use crate::cli::{Global, PipelineArgs};
use crate::engine::{
    self, Hashing, PlannedUnit, Resolver, Settings, Units, Workspace, cancel, default_cache_dir,
};
use crate::exit::{ExitCode, Failure, Result};
use crate::inputs::{Environment, Inputs, LockUse};
use crate::pipeline::{self, Pipeline, Selection};
use crate::report;
use crate::site::Site;
use merganser_stages::params::Remotes;
use merganser_stages::{Problem, kinds};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Parses the pipeline; prints its warnings; fails with every mistake in it. What is not downloaded is marked as missing.
pub fn load_pipeline(global: &Global, args: &PipelineArgs) -> Result<Pipeline> {
    let inputs = open_inputs(global, args, LockUse::Follow, Arc::new(|_| ()))?;
    let pipeline = parse(args, &inputs).map_err(|failure| parse_failure(&failure, &inputs))?;
    print_warnings(&pipeline);
    Ok(pipeline)
}

/// The remote inputs of a pipeline that is about to be read.
pub fn open_inputs(
    global: &Global,
    args: &PipelineArgs,
    lock_use: LockUse,
    on_event: Arc<dyn Fn(merganser_sources::Event) + Send + Sync>,
) -> Result<Arc<Inputs>> {
    // Commands that need no cache do without; a download then fails at the folder that cannot be made.
    let cache_dir = cache_dir(global).unwrap_or_default();
    let environment = Environment { cache_dir, offline: global.offline };
    Inputs::open(&args.file, lock_use, environment, on_event).map(Arc::new).map_err(Failure::user)
}

/// Reads the pipeline with what is known about its remote inputs.
pub fn parse(args: &PipelineArgs, inputs: &Arc<Inputs>) -> Result<Pipeline, pipeline::LoadFailure> {
    let remotes: Arc<dyn Remotes> = Arc::clone(inputs) as Arc<dyn Remotes>;
    let mut pipeline = pipeline::load(&args.file, &args.set, kinds(), Some(remotes))?;
    pipeline.missing = inputs.missing();
    Ok(pipeline)
}

/// Whether the mistakes may be none: what an address holds decides what fits, and it is not here yet.
pub fn may_be_no_mistakes(failure: &pipeline::LoadFailure, inputs: &Inputs) -> bool {
    !inputs.missing().is_empty() && failure.problems.iter().all(|problem| problem.code == "wrong-content")
}

/// The mistakes in a pipeline, as they are shown.
pub fn parse_failure(failure: &pipeline::LoadFailure, inputs: &Inputs) -> Failure {
    let mut message = failure.files.render(&failure.problems, report::problem_style());
    if may_be_no_mistakes(failure, inputs) {
        let missing: Vec<String> = inputs.missing().into_values().collect();
        message = format!(
            "{}\n  help: {}; whether it fits is known when `merganser run` has got it",
            message.trim_end(),
            missing.join(", ")
        );
    }
    Failure { code: ExitCode::UserError, message }
}

/// Prints what is questionable in a pipeline.
pub fn print_warnings(pipeline: &Pipeline) {
    if !pipeline.warnings.is_empty() {
        errln!("{}", pipeline.files.render_warnings(&pipeline.warnings, report::problem_style()).trim_end());
    }
}

fn cache_dir(global: &Global) -> Option<PathBuf> {
    let cache_dir = global.cache.clone().or_else(default_cache_dir)?;
    Some(std::path::absolute(&cache_dir).unwrap_or(cache_dir))
}

/// Makes kernels use as many threads as the user allows, and returns how many.
pub fn use_threads(global: &Global) -> usize {
    let threads = match global.threads {
        Some(threads) => usize::from(threads),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    // The pool can be built once per process, and a process runs one command.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    threads
}

/// Opens the store where the user wants it.
pub fn open_workspace(global: &Global) -> Result<Workspace> {
    let Some(cache_dir) = cache_dir(global) else {
        return Err(Failure::user("no cache folder: set `--cache DIR` or `MERGANSER_CACHE`"));
    };
    let site = Site::read(global.site.as_deref())?.onnxruntime;
    let threads = use_threads(global);
    Ok(Workspace::open(&Settings { cache_dir, threads, offline: global.offline, site })?)
}

/// Resolves names of stages, instances and members; no names mean the whole pipeline.
pub fn select_or_all(pipeline: &Pipeline, names: &[String]) -> Result<Vec<Selection>> {
    if names.is_empty() {
        return Ok(vec![Selection { instances: (0..pipeline.instances.len()).collect(), member: None }]);
    }
    select_all(pipeline, names)
}

/// Resolves names of stages, instances and members.
pub fn select_all(pipeline: &Pipeline, names: &[String]) -> Result<Vec<Selection>> {
    names.iter().map(|name| select(pipeline, name)).collect()
}

/// Resolves a name that may go down to a member: `packed[bits=3,digits]`.
pub fn select(pipeline: &Pipeline, name: &str) -> Result<Selection> {
    pipeline.select(name).map_err(|problem| user_problem(&problem))
}

/// A resolver over the given targets; missing files are reported with the pipeline's lines.
pub fn resolver<'w>(
    workspace: &'w Workspace,
    pipeline: &'w Pipeline,
    targets: &[Selection],
    forced: &[Selection],
    hashing: Box<dyn Hashing + 'w>,
) -> Result<Resolver<'w>> {
    Resolver::new(workspace, Units::new(pipeline), targets, forced, hashing).map_err(|problems| Failure {
        code: ExitCode::UserError,
        message: pipeline.files.render(&problems, report::problem_style()),
    })
}

/// Whether an earlier run saw a file that is not there now.
pub fn was_seen(global: &Global, path: &Path) -> bool {
    open_workspace(global).is_ok_and(|workspace| workspace.store.last_digest(path).is_some())
}

/// The plan of all that a resolver needs.
pub fn plan(resolver: &Resolver<'_>) -> Result<Vec<PlannedUnit>> {
    engine::plan(resolver)
        .map_err(|(unit, error)| Failure::failed(format!("`{unit}`: {}", error.with_causes())))
}

/// A mistake on the command line, which has no line to show.
pub fn user_problem(problem: &Problem) -> Failure {
    Failure::user_help(&problem.message, problem.help.as_ref())
}

/// Makes Ctrl-C stop at the next safe point; a second one stops at once.
pub fn stop_on_interrupt() {
    let installed = ctrlc::set_handler(|| {
        if cancel() {
            // Staging folders are cleaned up by the next run.
            #[expect(clippy::exit, reason = "the user asked twice")]
            std::process::exit(ExitCode::Interrupted as i32);
        }
    });
    if let Err(error) = installed {
        errln!("warning: Ctrl-C will not stop cleanly: {error}");
    }
}
