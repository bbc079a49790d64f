//! Progress on a terminal: a line per running unit, finished ones scroll away above.

use super::plain;
use crate::engine::{Event, Reporter, Status, UnitName};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use merganser_stages::ProgressUnit;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Draws with indicatif on standard error; it respects NO_COLOR and the terminal's width by itself.
pub struct Bars {
    multi: MultiProgress,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    total: Option<ProgressBar>,
    hashing: Option<(String, ProgressBar)>,
    fetching: Option<(String, ProgressBar)>,
    units: HashMap<usize, ProgressBar>,
}

impl Bars {
    pub fn new() -> Self {
        Self { multi: MultiProgress::new(), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, line: &str) {
        // A terminal that went away is no reason to stop working.
        let _ = self.multi.println(line);
    }

    fn bar(&self, name: &UnitName, state: &State) -> ProgressBar {
        let bar = ProgressBar::new_spinner()
            .with_style(style("{spinner} {prefix} {msg} {elapsed}"))
            .with_prefix(name.to_string());
        bar.enable_steady_tick(Duration::from_millis(120));
        match &state.total {
            Some(total) => self.multi.insert_before(total, bar),
            None => self.multi.add(bar),
        }
    }
}

impl Reporter for Bars {
    fn event(&self, event: &Event) {
        let mut state = self.state();
        if !matches!(event, Event::Hashing { .. })
            && let Some((_, bar)) = state.hashing.take()
        {
            bar.finish_and_clear();
        }
        match event {
            Event::RunStarted { pipeline, units } => {
                let bar =
                    ProgressBar::new(*units as u64).with_style(style("{prefix} {wide_bar:.dim} {pos}/{len}"));
                state.total = Some(self.multi.add(bar.with_prefix(pipeline.clone())));
            }
            Event::Hashing { path, done, total } if *total > 100_000_000 => {
                if state.hashing.as_ref().is_none_or(|(current, _)| current != path) {
                    let bar = ProgressBar::new(*total)
                        .with_style(style("hashing {prefix} {wide_bar:.dim} {bytes_per_sec} {eta}"));
                    state.hashing = Some((path.clone(), self.multi.add(bar.with_prefix(path.clone()))));
                }
                if let Some((_, bar)) = &state.hashing {
                    bar.set_position(*done);
                }
            }
            Event::Hashing { .. } => {}
            Event::Fetching { address, done, total, .. } => {
                if state.fetching.as_ref().is_none_or(|(current, _)| current != address) {
                    if let Some((_, bar)) = state.fetching.take() {
                        bar.finish_and_clear();
                    }
                    let bar = ProgressBar::new_spinner()
                        .with_style(style("fetching {prefix} {bytes} {bytes_per_sec}"))
                        .with_prefix(address.clone());
                    state.fetching = Some((address.clone(), self.multi.add(bar)));
                }
                if let Some((_, bar)) = &state.fetching {
                    if bar.length() != *total && total.is_some() {
                        bar.set_length(total.unwrap_or_default());
                        bar.set_style(style("fetching {prefix} {wide_bar:.dim} {bytes_per_sec} {eta}"));
                    }
                    bar.set_position(*done);
                }
            }
            Event::Fetched { address, size, seconds } => {
                if let Some((_, bar)) = state.fetching.take() {
                    bar.finish_and_clear();
                }
                self.say(&plain::fetched(address, *size, *seconds));
            }
            Event::UnitStarted { id, name, .. } => {
                let bar = self.bar(name, &state);
                state.units.insert(*id, bar);
            }
            Event::Progress { id, progress } => {
                let Some(bar) = state.units.get(id) else { return };
                if bar.length() != Some(progress.total) {
                    bar.set_length(progress.total);
                    bar.set_style(style(match progress.unit {
                        ProgressUnit::Bytes => "{spinner} {prefix} {wide_bar:.dim} {bytes_per_sec} {eta}",
                        ProgressUnit::Images => "{spinner} {prefix} {wide_bar:.dim} {per_sec} images {eta}",
                        ProgressUnit::Texts => "{spinner} {prefix} {wide_bar:.dim} {per_sec} texts {eta}",
                        ProgressUnit::Steps => {
                            "{spinner} {prefix} {wide_bar:.dim} {per_sec} steps {msg} {eta}"
                        }
                    }));
                }
                bar.set_message(plain::figures(&progress.figures).join(" "));
                bar.set_position(progress.done);
            }
            Event::Waiting { id, name, holder } => {
                let bar = self.bar(name, &state);
                bar.set_message(format!("waits for {}", holder.as_deref().unwrap_or("another run")));
                state.units.insert(*id, bar);
            }
            Event::Info { message } => self.say(message),
            Event::Warning { message } => self.say(&format!("warning: {message}")),
            Event::UnitFinished { id, name, status, seconds, detail, .. } => {
                if let Some(bar) = state.units.remove(id) {
                    bar.finish_and_clear();
                }
                if let Some(total) = &state.total {
                    total.inc(1);
                }
                match status {
                    Status::Ran => self.say(&format!("ran     {name} in {seconds:.2} s")),
                    Status::Failed => self.say(&format!("FAILED  {name}: {detail}")),
                    Status::Skipped => self.say(&format!("skipped {name}: {detail}")),
                    Status::Cached => {}
                }
            }
            Event::Interrupted => self.say(plain::interrupted()),
            Event::RunFinished { ran, cached, failed, skipped, seconds } => {
                if let Some(total) = state.total.take() {
                    total.finish_and_clear();
                }
                self.say(&plain::summary(*ran, *cached, *failed, *skipped, *seconds));
            }
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates of this file are valid")
}
