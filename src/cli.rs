//! The command line, as typed. Parsing does no I/O; `commands` does the work.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Declarative, cached pipelines for merging and compressing fine-tuned vision models.
#[derive(Debug, Parser)]
#[command(name = "merganser", version, max_term_width = 110, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    a stage failed
  2    a mistake in the command line or the pipeline, or a missing file
  3    a goal was not met
  4    outputs are not reproducible
  5    the cache is damaged and could not be repaired
  130  interrupted (finished work is kept)

Results go to standard output, everything else to standard error.";

/// Options of every command.
#[derive(Debug, Args)]
pub struct Global {
    /// The cache folder [default: the user's cache folder]
    #[arg(long, global = true, env = "MERGANSER_CACHE", value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// A file of facts about this machine, such as the execution provider
    #[arg(long, global = true, env = "MERGANSER_SITE", value_name = "FILE")]
    pub site: Option<PathBuf>,
    /// CPU threads to use [default: all]
    #[arg(long, global = true, env = "MERGANSER_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Never go to the network: nothing is downloaded, and ONNX Runtime is not installed if it is missing
    #[arg(long, global = true, env = "MERGANSER_OFFLINE", value_parser = clap::builder::FalseyValueParser::new())]
    pub offline: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a pipeline; what is cached is not run again
    Run(RunArgs),
    /// Show what a run would do, and why
    Plan(PlanArgs),
    /// Explain why a stage would run: its old key against the new, field by field
    Why(StageArgs),
    /// Find every mistake that can be found without reading tensors
    Check(PipelineArgs),
    /// Show what a stage's output holds: tensors, shapes, bits, bytes, scores
    Show(ShowArgs),
    /// Copy a stage's output out of the cache
    Export(ExportArgs),
    /// Draw the pipeline
    Graph(GraphArgs),
    /// Show what a checkpoint file holds, or how two differ
    Inspect(InspectArgs),
    /// Show how a checkpoint's tensors bind to an ONNX export
    Bind(BindArgs),
    /// Describe the kinds of stages, their methods and parameters
    Stages(StagesArgs),
    /// List the classification tasks of the literature, their class names and prompts
    Tasks(TasksArgs),
    /// Look after the cache
    Cache {
        #[command(subcommand)]
        command: CacheCommand,
    },
}

/// A pipeline with overrides.
#[derive(Clone, Debug, Args)]
pub struct PipelineArgs {
    /// The pipeline file
    pub file: PathBuf,
    /// Override a var: `bits=3`; commas sweep (`bits=2,3`), brackets are a list (`'tasks=["a","b"]'`)
    #[arg(long = "set", value_name = "VAR=VALUE")]
    pub set: Vec<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "one per switch of the command line")]
pub struct RunArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// Only this stage, instance (`packed[bits=3]`) or member (`packed[digits]`), and what it needs
    #[arg(long, value_name = "STAGE")]
    pub stage: Vec<String>,
    /// Stages at once
    #[arg(long, short, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub jobs: u16,
    /// After a failure, go on with the stages that do not depend on it
    #[arg(long)]
    pub keep_going: bool,
    /// Run this stage even if it is cached
    #[arg(long, value_name = "STAGE")]
    pub force: Vec<String>,
    /// Of a sweep, run so many of the combinations that are not finished, and leave the others for later
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..), conflicts_with = "dry_run")]
    pub max: Option<u16>,
    /// Only show the plan
    #[arg(long)]
    pub dry_run: bool,
    /// Find remote inputs anew and write them, with all outputs, into the lock file
    #[arg(long, conflicts_with = "frozen")]
    pub update_lock: bool,
    /// Refuse remote inputs and outputs that are not what the lock file says
    #[arg(long)]
    pub frozen: bool,
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// Only this stage and what it needs
    #[arg(long, value_name = "STAGE")]
    pub stage: Vec<String>,
    /// As if this stage were not cached
    #[arg(long, value_name = "STAGE")]
    pub force: Vec<String>,
}

#[derive(Debug, Args)]
pub struct StageArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// A stage, an instance (`packed[bits=3]`) or a member (`packed[digits]`)
    #[arg(index = 2)]
    pub stage: String,
}

#[derive(Debug, Args)]
pub struct ShowArgs {
    #[command(flatten)]
    pub stage: StageArgs,
    /// Compare scores with those of this stage, image by image
    #[arg(long, value_name = "STAGE")]
    pub against: Option<String>,
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// A stage, an instance (`packed[bits=3]`) or a member (`packed[digits]`)
    #[arg(index = 2)]
    pub stage: String,
    /// Where to write; created if missing
    #[arg(index = 3)]
    pub dir: PathBuf,
    /// Replace files that are already there
    #[arg(long)]
    pub overwrite: bool,
}

#[derive(Debug, Args)]
pub struct GraphArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[arg(long, value_enum, default_value_t = GraphFormat::Mermaid)]
    pub format: GraphFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum GraphFormat {
    Mermaid,
    Dot,
    Svg,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A checkpoint: safetensors, PyTorch or NumPy, an index of shards, a folder, a LoRA adapter
    pub file: PathBuf,
    /// A second one to compare with it
    #[arg(value_name = "FILE")]
    pub other: Option<PathBuf>,
    /// Only tensors whose name matches this glob
    #[arg(long, value_name = "GLOB")]
    pub only: Vec<String>,
    /// Not the tensors whose name matches this glob
    #[arg(long, value_name = "GLOB")]
    pub skip: Vec<String>,
    /// The entry of a PyTorch file that holds the tensors, such as `model_ema`
    #[arg(long, value_name = "KEY")]
    pub key: Option<String>,
    /// Remove this from names that begin with it; `""` shows all as stored [default: what wrappers add]
    #[arg(long, value_name = "PREFIX")]
    pub strip_prefix: Option<String>,
    /// Read no values: instant, whatever the size
    #[arg(long)]
    pub no_norms: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BindArgs {
    /// The ONNX export
    pub graph: PathBuf,
    /// The checkpoint that it was exported from
    pub origin: PathBuf,
    /// A checkpoint that is to be run in it
    pub model: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct StagesArgs {
    /// A kind, such as `merge`
    pub kind: Option<String>,
    /// A method of that kind, such as `task-arithmetic`
    pub method: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct TasksArgs {
    /// A task, such as `eurosat`; any spelling and the usual other names will do
    pub task: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// List what is stored: kind, bytes, when, how long it took
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}
