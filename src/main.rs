//! merganser: declarative, cached pipelines for merging and compressing fine-tuned vision models.
//!
//! `cli` says what can be typed, `commands` has one file per command, `pipeline` turns the file into a graph, `inputs` gets what it needs from elsewhere,
//! `engine` plans and runs it,
//! `report` shows what happens. See ARCHITECTURE.md.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the application talks to the user; the libraries do not"
)]
#![allow(unreachable_pub, reason = "a binary has no public interface")]

#[macro_use]
mod output;

mod cli;
mod commands;
mod engine;
mod exit;
mod inputs;
mod pipeline;
mod report;
mod site;

use clap::Parser;
use std::io::Write;

fn main() -> std::process::ExitCode {
    let cli = cli::Cli::parse();
    let code = match commands::run(cli).and_then(output::finish) {
        Ok(code) => code,
        Err(failure) => {
            // Standard error may be closed; the exit code still tells.
            let _ = writeln!(std::io::stderr(), "{}", failure.message.trim_end());
            failure.code
        }
    };
    std::process::ExitCode::from(code as u8)
}
