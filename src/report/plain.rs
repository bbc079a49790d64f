//! Progress without a terminal: one line per thing that happened, so that logs stay readable.

use crate::engine::{Event, Reporter, Status, UnitName};
use merganser_stages::{Figures, Progress, ProgressUnit};
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How often a long unit says how far it is.
const INTERVAL: Duration = Duration::from_secs(10);

/// Writes lines to standard error.
#[derive(Default)]
pub struct Plain {
    last_progress: Mutex<Option<Instant>>,
    running: Mutex<HashMap<usize, Running>>,
}

/// A unit that counts something, since it told for the first time.
struct Running {
    name: UnitName,
    since: Option<(Instant, u64)>,
}

impl Plain {
    fn due(&self) -> bool {
        let mut last = self.last_progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let due = last.is_none_or(|then| then.elapsed() >= INTERVAL);
        if due {
            *last = Some(Instant::now());
        }
        due
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashMap<usize, Running>> {
        self.running.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// How far a unit that counts images or texts is, how fast it is and when it will be done: every now and then.
    fn counted(&self, id: usize, progress: &Progress) -> Option<String> {
        let what = match progress.unit {
            ProgressUnit::Bytes => return None,
            ProgressUnit::Images => "images",
            ProgressUnit::Texts => "texts",
            ProgressUnit::Steps => "steps",
        };
        let mut running = self.running();
        let unit = running.get_mut(&id)?;
        let (since, before) = *unit.since.get_or_insert_with(|| (Instant::now(), progress.done));
        let (seconds, done) = (since.elapsed().as_secs_f64(), progress.done.saturating_sub(before));
        if done == 0 || seconds < INTERVAL.as_secs_f64() || !self.due() {
            return None;
        }
        let rate = done as f64 / seconds;
        let left = progress.total.saturating_sub(progress.done) as f64 / rate;
        let rate = if rate < 10.0 { format!("{rate:.1}") } else { format!("{rate:.0}") };
        let done = format!("{} of {} {what}, {rate}/s", progress.done, progress.total);
        let mut parts = vec![done];
        parts.extend(figures(&progress.figures));
        parts.push(format!("{left:.0} s left"));
        Some(format!("at      {}: {}", unit.name, parts.join(", ")))
    }
}

impl Reporter for Plain {
    fn event(&self, event: &Event) {
        match event {
            Event::UnitStarted { id, name, .. } => {
                self.running().insert(*id, Running { name: name.clone(), since: None });
            }
            Event::UnitFinished { id, .. } => {
                self.running().remove(id);
            }
            _ => {}
        }
        let line = match event {
            Event::Hashing { path, done, total } if *total > 100_000_000 && self.due() => {
                format!("hashing {path}: {}", super::size::progress(*done, *total))
            }
            Event::Fetching { address, start: true, done, total } => {
                let size =
                    total.map_or_else(String::new, |total| format!(" ({})", super::size::bytes(total)));
                let resumed = if *done > 0 {
                    format!(", going on from {}", super::size::bytes(*done))
                } else {
                    String::new()
                };
                format!("fetch   {address}{size}{resumed}")
            }
            Event::Fetching { address, done, total, .. } if self.due() => {
                let progress = match total {
                    Some(total) => super::size::progress(*done, *total),
                    None => super::size::bytes(*done),
                };
                format!("fetch   {address}: {progress}")
            }
            Event::Fetched { address, size, seconds } => fetched(address, *size, *seconds),
            Event::UnitStarted { name, reason, .. } if !reason.is_empty() => {
                format!("start   {name} ({reason})")
            }
            Event::UnitStarted { name, .. } => format!("start   {name}"),
            Event::Waiting { name, holder, .. } => {
                format!("wait    {name}: {} is computing it", holder.as_deref().unwrap_or("another run"))
            }
            Event::UnitFinished { name, status: Status::Ran, seconds, .. } => {
                format!("ran     {name} in {seconds:.2} s")
            }
            Event::UnitFinished { name, status: Status::Failed, detail, .. } => {
                format!("FAILED  {name}: {detail}")
            }
            Event::UnitFinished { name, status: Status::Skipped, detail, .. } => {
                format!("skipped {name}: {detail}")
            }
            Event::UnitFinished { name, status: Status::Cached, detail, .. } if !detail.is_empty() => {
                format!("cached  {name}: {detail}")
            }
            Event::Progress { id, progress } => match self.counted(*id, progress) {
                Some(line) => line,
                None => return,
            },
            Event::Info { message } => message.clone(),
            Event::Warning { message } => format!("warning: {message}"),
            Event::Interrupted => interrupted().to_owned(),
            Event::RunFinished { ran, cached, failed, skipped, seconds } => {
                summary(*ran, *cached, *failed, *skipped, *seconds)
            }
            Event::RunStarted { .. }
            | Event::Hashing { .. }
            | Event::Fetching { .. }
            | Event::UnitFinished { .. } => return,
        };
        errln!("{line}");
    }
}

/// Numbers that a unit tells on its way: `loss 0.31416`.
pub fn figures(figures: &Figures) -> Vec<String> {
    figures.iter().flatten().map(|(name, value)| format!("{name} {}", super::number(*value))).collect()
}

/// What is said about a finished download.
pub fn fetched(address: &str, size: u64, seconds: f64) -> String {
    let rate = if seconds > 0.1 {
        format!(", {}/s", super::size::bytes((size as f64 / seconds) as u64))
    } else {
        String::new()
    };
    format!("fetched {address}: {} in {seconds:.2} s{rate}", super::size::bytes(size))
}

/// What an interrupted run says.
pub fn interrupted() -> &'static str {
    "interrupted: finished stages are kept; run the same command to go on"
}

/// The last line of a run: `3 ran, 12 cached in 0.42 s`.
pub fn summary(ran: usize, cached: usize, failed: usize, skipped: usize, seconds: f64) -> String {
    let mut parts = Vec::new();
    for (count, word) in [(ran, "ran"), (cached, "cached"), (failed, "failed"), (skipped, "skipped")] {
        if count > 0 {
            parts.push(format!("{count} {word}"));
        }
    }
    if parts.is_empty() {
        parts.push("nothing to do".to_owned());
    }
    let time = if seconds < 0.1 { format!("{:.0} ms", seconds * 1000.0) } else { format!("{seconds:.2} s") };
    format!("{} in {time}", parts.join(", "))
}
