//! `merganser check`: every mistake that can be known without reading tensors.

use super::setup;
use crate::cli::{Global, PipelineArgs};
use crate::engine::Units;
use crate::exit::{ExitCode, Failure, Result};
use crate::pipeline::{self, Files, ProblemReport};
use crate::report;
use merganser_stages::{Problem, kinds};
use serde_json::json;

pub fn check(_: &Global, args: &PipelineArgs) -> Result<ExitCode> {
    if args.json {
        return check_json(args);
    }
    let pipeline = setup::load_pipeline(args)?;
    let units = Units::new(&pipeline);
    let all = vec![true; units.entries.len()];
    crate::engine::list_sources(&units, &all).map_err(|problems| Failure {
        code: ExitCode::UserError,
        message: pipeline.files.render(&problems, report::problem_style()),
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
    Ok(ExitCode::Done)
}

fn reports(files: &Files, problems: &[Problem]) -> Vec<ProblemReport> {
    problems.iter().map(|problem| files.report(problem)).collect()
}

fn check_json(args: &PipelineArgs) -> Result<ExitCode> {
    let (problems, warnings) = match pipeline::load(&args.file, &args.set, kinds()) {
        Ok(pipeline) => {
            let units = Units::new(&pipeline);
            let all = vec![true; units.entries.len()];
            let problems = crate::engine::list_sources(&units, &all).err().unwrap_or_default();
            (reports(&pipeline.files, &problems), reports(&pipeline.files, &pipeline.warnings))
        }
        Err(failure) => (reports(&failure.files, &failure.problems), Vec::new()),
    };
    let code = if problems.is_empty() { ExitCode::Done } else { ExitCode::UserError };
    let report = json!({ "problems": problems, "warnings": warnings });
    outln!("{}", serde_json::to_string_pretty(&report).map_err(Failure::failed)?);
    Ok(code)
}
