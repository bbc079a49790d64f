//! `merganser check`: every mistake that can be known without reading tensors.

use super::setup;
use crate::cli::{Global, PipelineArgs};
use crate::engine::Units;
use crate::exit::{ExitCode, Failure, Result};
use crate::inputs::{Inputs, LockUse};
use crate::pipeline::{Files, ProblemReport};
use crate::report;
use merganser_stages::Problem;
use serde_json::json;
use std::sync::Arc;

pub fn check(global: &Global, args: &PipelineArgs) -> Result<ExitCode> {
    let inputs = setup::open_inputs(global, args, LockUse::Follow, Arc::new(|_| ()))?;
    if args.json {
        return check_json(global, args, &inputs);
    }
    let pipeline = match setup::parse(args, &inputs) {
        Err(failure) if setup::may_be_no_mistakes(&failure, &inputs) => {
            outln!("no mistakes so far; what fits is known when the inputs are here");
            return Ok(say_missing(&inputs));
        }
        parsed => parsed.map_err(|failure| setup::parse_failure(&failure, &inputs))?,
    };
    setup::print_warnings(&pipeline);
    let units = Units::new(&pipeline);
    let all = vec![true; units.entries.len()];
    crate::engine::list_sources(&units, &all, &|path| setup::was_seen(global, path)).map_err(|problems| {
        Failure {
            code: ExitCode::UserError,
            message: pipeline.files.render(&problems, report::problem_style()),
        }
    })?;
    if let Some(description) = &pipeline.description {
        outln!("{}: {description}", pipeline.name);
    }
    outln!(
        "{}: {} stages, {} units of work, no mistakes",
        pipeline.name,
        pipeline.instances.len(),
        units.entries.len()
    );
    Ok(say_missing(&inputs))
}

/// Says what has not been looked at because it is not here; that is no mistake.
fn say_missing(inputs: &Inputs) -> ExitCode {
    for missing in inputs.missing().values() {
        outln!("{missing}");
    }
    ExitCode::Done
}

fn reports(files: &Files, problems: &[Problem]) -> Vec<ProblemReport> {
    problems.iter().map(|problem| files.report(problem)).collect()
}

fn check_json(global: &Global, args: &PipelineArgs, inputs: &Arc<Inputs>) -> Result<ExitCode> {
    let (problems, warnings) = match setup::parse(args, inputs) {
        Ok(pipeline) => {
            let units = Units::new(&pipeline);
            let all = vec![true; units.entries.len()];
            let problems = crate::engine::list_sources(&units, &all, &|path| setup::was_seen(global, path))
                .err()
                .unwrap_or_default();
            (reports(&pipeline.files, &problems), reports(&pipeline.files, &pipeline.warnings))
        }
        Err(failure) if setup::may_be_no_mistakes(&failure, inputs) => (Vec::new(), Vec::new()),
        Err(failure) => (reports(&failure.files, &failure.problems), Vec::new()),
    };
    let code = if problems.is_empty() { ExitCode::Done } else { ExitCode::UserError };
    let missing: Vec<String> = inputs.missing().into_keys().collect();
    let mut report = json!({ "problems": problems, "warnings": warnings });
    if !missing.is_empty() {
        report["missing"] = json!(missing);
    }
    outln!("{}", serde_json::to_string_pretty(&report).map_err(Failure::failed)?);
    Ok(code)
}
