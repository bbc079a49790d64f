//! What a command works with besides the pipeline: the store, the services that stages use, and the machine's facts.
//!
//! The environment, the clock and the user's folders are read here and passed on; no library reads them.

use super::history::History;
use crate::site::OnnxRuntime;
use merganser_cache::{CacheEvent, Store};
use merganser_stages::{RuntimeSettings, Services};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

/// Set by Ctrl-C; long work looks at it between blocks.
static CANCELLED: AtomicBool = AtomicBool::new(false);

/// Where things are and how much of the machine may be used.
#[derive(Debug)]
pub struct Settings {
    pub cache_dir: PathBuf,
    pub threads: usize,
    pub offline: bool,
    pub site: OnnxRuntime,
}

/// An opened store with everything that stages need.
pub struct Workspace {
    pub store: Store,
    pub services: Services,
    pub history: History,
    pub threads: usize,
    messages: Messages,
}

/// What the store reported since it was last asked.
type Messages = Arc<Mutex<Vec<String>>>;

impl Workspace {
    /// Opens the store, creating it on first use.
    pub fn open(settings: &Settings) -> Result<Self, merganser_cache::Error> {
        let messages = Messages::default();
        let sink = Arc::clone(&messages);
        let store = Store::open(
            &settings.cache_dir,
            merganser_cache::Options {
                clock: Arc::new(SystemTime::now),
                host: host_name(),
                tool_version: env!("CARGO_PKG_VERSION").to_owned(),
                on_event: Arc::new(move |event: CacheEvent| push(&sink, describe(&event))),
            },
        )?;
        let services = Services::new(RuntimeSettings {
            ort_dylib_path: std::env::var_os("ORT_DYLIB_PATH")
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
            python: vec!["python3".into(), "python".into()],
            library_dirs: std::env::var_os("LD_LIBRARY_PATH")
                .map(|paths| std::env::split_paths(&paths).collect())
                .unwrap_or_default(),
            cache_dir: settings.cache_dir.clone(),
            offline: settings.offline,
            provider: settings.site.provider.unwrap_or_default(),
            device: settings.site.device,
            image_room: free_memory() / 4,
        });
        let history = History::new(settings.cache_dir.join("runs-v1"));
        Ok(Self { store, services, history, threads: settings.threads, messages })
    }

    /// Adds to what will be told, once.
    pub fn note(&self, message: String) {
        let mut messages = self.messages.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !messages.contains(&message) {
            messages.push(message);
        }
    }

    /// Takes what the store reported: damage that it found, outputs that differ.
    pub fn take_messages(&self) -> Vec<String> {
        std::mem::take(&mut *self.messages.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

fn push(messages: &Messages, message: String) {
    messages.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(message);
}

/// Whether the user asked to stop.
pub fn cancelled() -> bool {
    CANCELLED.load(Ordering::Relaxed)
}

/// Asks everything to stop at its next safe point; returns whether it had been asked before.
pub fn cancel() -> bool {
    CANCELLED.swap(true, Ordering::Relaxed)
}

/// The user's cache folder for this tool.
pub fn default_cache_dir() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(folder) = set("XDG_CACHE_HOME").filter(|folder| folder.is_absolute()) {
        return Some(folder.join("merganser"));
    }
    let home = std::env::home_dir().filter(|home| !home.as_os_str().is_empty())?;
    let caches = if cfg!(target_os = "macos") { Path::new("Library/Caches") } else { Path::new(".cache") };
    Some(home.join(caches).join("merganser"))
}

/// Words for what the store noticed.
fn describe(event: &CacheEvent) -> String {
    match event {
        CacheEvent::Quarantined { path, reason, .. } => {
            format!(
                "damaged in the cache and set aside: `{}`: {reason}; what made it will run again",
                path.display()
            )
        }
        CacheEvent::Unreadable { path, reason } => {
            format!("cannot read `{}` in the cache: {reason}", path.display())
        }
        CacheEvent::NonDeterministic { key, outputs } => {
            format!(
                "not deterministic: key {key} has given {} different outputs; all are kept",
                outputs.len()
            )
        }
        CacheEvent::LeftoversRemoved { n_folders } => {
            format!("removed what {n_folders} killed run(s) left behind")
        }
        CacheEvent::StatCacheDamaged { path, n_kept } => {
            format!(
                "`{}` was damaged; {n_kept} known digests are kept, other files are hashed again",
                path.display()
            )
        }
        CacheEvent::StatCacheNotSaved { path, reason } => {
            format!(
                "known digests could not be saved to `{}`: {reason}; the next run hashes those files again",
                path.display()
            )
        }
    }
}

/// Memory in bytes that the system would give without swapping, or a modest guess.
fn free_memory() -> usize {
    const GUESS: usize = 2 << 30;
    let kilobytes = || -> Option<usize> {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.split_whitespace().next()?.parse().ok()
    };
    kilobytes().map_or(GUESS, |n| n.saturating_mul(1024))
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .or_else(|_| std::env::var("HOSTNAME"))
        .unwrap_or_default()
}
