//! Measures the tool against its budgets, as whole processes and beside its peers.
//!
//! `cargo bench --bench budgets -- [--small] [--runs N] [SECTION…]`; sections are listed by `--help`. Figures are printed and never asserted:
//! they are the machine's business. What each section measures, and what it gave once: `benches/README.md`.
//!
//! Inputs (3.2 GB, or 200 MB with `--small`) are written once into `MERGANSER_BENCH_DATA`, or into a temporary folder that is removed at the
//! end. Caches and outputs lie in the same folder and are removed.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the figures are what this program is for")]
#![allow(unreachable_pub, reason = "a program has no public interface")]

mod inputs;
mod report;
mod sections;
mod tool;

use inputs::{Encoders, Scale};
use std::path::{Path, PathBuf};

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What the sections have in common.
pub struct Bench {
    /// Where inputs, caches and outputs lie.
    root: PathBuf,
    scale: Scale,
    /// Repetitions of each measurement.
    pub runs: usize,
}

impl Bench {
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The base and eight fine-tuned encoders, written on first use.
    pub fn encoders(&self) -> Result<Encoders> {
        Encoders::prepare(&self.root, self.scale)
    }

    pub fn tiny_encoders(&self) -> Result<Encoders> {
        Encoders::prepare(&self.root, Scale::Tiny)
    }
}

struct Options {
    sections: Vec<String>,
    scale: Scale,
    runs: usize,
}

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some((sections::training::CHILD, rest)) =
        arguments.split_first().map(|(first, rest)| (first.as_str(), rest))
    {
        return sections::training::child(rest);
    }
    let Some(options) = parse(arguments.into_iter())? else { return Ok(()) };
    let set = std::env::var_os("MERGANSER_BENCH_DATA").filter(|folder| !folder.is_empty());
    let temporary = if set.is_some() {
        None
    } else {
        Some(tempfile::Builder::new().prefix("merganser-bench-").tempdir()?)
    };
    let root = set.map(PathBuf::from).or_else(|| temporary.as_ref().map(|folder| folder.path().to_owned()));
    let root = std::path::absolute(root.ok_or("no folder for the inputs")?)?;
    fs_err::create_dir_all(&root)?;
    let bench = Bench { root, scale: options.scale, runs: options.runs };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "merganser {}, {threads} cores, medians of {} runs (lowest–highest)",
        env!("CARGO_PKG_VERSION"),
        options.runs
    );
    if options.scale == Scale::Small {
        println!("--small: inputs of a sixteenth of the size; ratios to peers say little");
    }
    for section in sections::ALL {
        if options.sections.is_empty() || options.sections.iter().any(|name| name == section.name) {
            report::section(section.title);
            (section.run)(&bench)?;
        }
    }
    Ok(())
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Option<Options>> {
    let mut options = Options { sections: Vec::new(), scale: Scale::Full, runs: 5 };
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            // `cargo bench` passes it to every benchmark.
            "--bench" => {}
            "--small" => options.scale = Scale::Small,
            "--runs" => {
                options.runs = arguments.next().ok_or("`--runs` needs a number")?.parse::<usize>()?.max(1);
            }
            "--help" | "-h" => {
                println!("cargo bench --bench budgets -- [--small] [--runs N] [SECTION…]\n\nsections:");
                for section in sections::ALL {
                    println!("  {:<12} {}", section.name, section.title);
                }
                return Ok(None);
            }
            name if sections::ALL.iter().any(|section| section.name == name) => {
                options.sections.push(name.to_owned());
            }
            other => return Err(format!("unknown section or option `{other}`; see `--help`").into()),
        }
    }
    Ok(Some(options))
}
