//! One file per command. A command returns its exit code, or a failure that is already worded for the user.

mod bind;
mod cache;
mod check;
mod compared;
mod export;
mod graph;
mod inspect;
mod limit;
mod plan;
mod remote;
mod run;
mod setup;
mod show;
mod stages;
mod tasks;
mod why;

use crate::cli::{CacheCommand, Cli, Command};
use crate::exit::{ExitCode, Result};

/// Runs the command that was typed.
pub fn run(cli: Cli) -> Result<ExitCode> {
    let global = cli.global;
    match cli.command {
        Command::Run(args) => run::run(&global, &args),
        Command::Plan(args) => plan::plan(&global, &args),
        Command::Why(args) => why::why(&global, &args),
        Command::Check(args) => check::check(&global, &args),
        Command::Show(args) => show::show(&global, &args),
        Command::Export(args) => export::export(&global, &args),
        Command::Graph(args) => graph::graph(&global, &args),
        Command::Inspect(args) => inspect::inspect(&global, &args),
        Command::Bind(args) => bind::bind(&global, &args),
        Command::Stages(args) => stages::stages(&args),
        Command::Tasks(args) => tasks::tasks(&args),
        Command::Cache { command: CacheCommand::Ls { json } } => cache::ls(&global, json),
    }
}
