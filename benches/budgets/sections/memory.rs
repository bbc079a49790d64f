//! Private memory of diff → quantize → merge over eight encoders, and the same within a memory cgroup.

use super::Section;
use crate::report::{Budget, Median, budget, figure};
use crate::tool::{Lab, succeed, watched};
use crate::{Bench, Result};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

pub const SECTION: Section =
    Section { name: "memory", title: "private memory of diff → quantize → merge", run };

const LIMIT_MEGABYTES: f64 = 600.0;
const CGROUP_BYTES: u64 = 1 << 30;

const STAGES: &str = "[stage.packed]\nkind = \"quantize\"\nfrom = \"deltas\"\nbits = 4\n\n\
                      [stage.merged]\nkind = \"merge\"\nmethod = \"task-arithmetic\"\nscale = 0.3\n\
                      from = { base = \"base\", vectors = \"packed\" }\n\n\
                      [stage.direct]\nkind = \"merge\"\nmethod = \"task-arithmetic\"\nscale = 0.3\n\
                      from = { base = \"base\", vectors = \"deltas\" }\n";

fn run(bench: &Bench) -> Result<()> {
    let encoders = bench.encoders()?;
    let lab = Lab::new(bench.root(), "memory")?;
    let pipeline = lab.write("pipeline.toml", &encoders.pipeline(STAGES))?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).to_string();
    for threads in [threads.as_str(), "8"] {
        let mut peaks = Vec::new();
        let mut times = Vec::new();
        for _ in 0..bench.runs {
            lab.clear_cache()?;
            let spent = watched(&mut lab.run(&pipeline, &["--threads", threads]))?;
            peaks.push(spent.private_bytes as f64 / 1e6);
            times.push(spent.seconds);
        }
        let what = format!("highest RssAnon + RssShmem, {threads} threads");
        budget(&what, Median::of(peaks).high, " MB", Budget::AtMost(LIMIT_MEGABYTES));
        figure("    whole run, hashing included", Median::of(times).seconds());
    }
    lab.clear_cache()?;
    let what = "completes within a memory cgroup of 1 GiB";
    match Confinement::find() {
        None => figure(what, "not measured: no cgroup can be made here, and systemd-run does not work"),
        Some(confinement) => {
            let done = succeed(&mut confinement.confine(&lab.run(&pipeline, &[])));
            match done {
                Ok(()) => figure(what, format!("yes ({})", confinement.name())),
                Err(error) => figure(what, format!("NO: {error}")),
            }
        }
    }
    Ok(())
}

/// A way to limit the memory of a process and its page cache.
enum Confinement {
    /// A folder of the cgroup file system; removed when dropped.
    Cgroup(PathBuf),
    SystemdRun,
}

impl Confinement {
    fn find() -> Option<Self> {
        // Version 2, version 1.
        for (parent, limit) in
            [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")]
        {
            let group = Path::new(parent).join(format!("merganser-bench-{}", std::process::id()));
            if std::fs::create_dir(&group).is_err() {
                continue;
            }
            // On a file system that is not a cgroup's, this file does not exist.
            let limit = group.join(limit);
            if limit.exists() && std::fs::write(&limit, CGROUP_BYTES.to_string()).is_ok() {
                return Some(Self::Cgroup(group));
            }
            let _ = std::fs::remove_dir(&group);
        }
        let works = succeed(Command::new("systemd-run").args(["--user", "--scope", "--quiet", "true"]));
        works.is_ok().then_some(Self::SystemdRun)
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Cgroup(_) => "a cgroup of its own",
            Self::SystemdRun => "systemd-run",
        }
    }

    /// The same command, confined.
    fn confine(&self, command: &Command) -> Command {
        let mut confined = match self {
            Self::Cgroup(group) => {
                let mut shell = Command::new("sh");
                let mut procs = OsString::from(group);
                procs.push("/cgroup.procs");
                shell.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(procs);
                shell
            }
            Self::SystemdRun => {
                let mut run = Command::new("systemd-run");
                run.args(["--user", "--scope", "--quiet", "-p", "MemorySwapMax=0", "-p"]);
                run.arg(format!("MemoryMax={CGROUP_BYTES}"));
                run
            }
        };
        confined.arg(command.get_program()).args(command.get_args());
        confined
    }
}

impl Drop for Confinement {
    fn drop(&mut self) {
        if let Self::Cgroup(group) = self {
            let _ = std::fs::remove_dir(group);
        }
    }
}
