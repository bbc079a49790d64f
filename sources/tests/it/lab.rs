//! A machine to download to: folders, settings, and a record of what happened. Waiting takes no time here.

use crate::server::Hub;
use merganser_sources::{
    Error, Event, HubSettings, Located, Patience, Pins, ProxySettings, Reach, Settings, Sources,
};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;

pub(crate) struct Lab {
    pub(crate) folder: TempDir,
    pub(crate) endpoint: String,
    pub(crate) token: Option<String>,
    pub(crate) offline: bool,
    pub(crate) variables: Vec<(String, String)>,
    pub(crate) pins: Pins,
    pub(crate) waits: Arc<Mutex<Vec<Duration>>>,
    pub(crate) events: Arc<Mutex<Vec<Event>>>,
    pub(crate) cancelled: Arc<AtomicBool>,
    /// Ask to stop after so many progress reports.
    pub(crate) stop_after: Arc<AtomicUsize>,
}

impl Lab {
    pub(crate) fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            endpoint: "http://127.0.0.1:1".to_owned(),
            token: None,
            offline: false,
            variables: Vec::new(),
            pins: Pins::default(),
            waits: Arc::default(),
            events: Arc::default(),
            cancelled: Arc::default(),
            stop_after: Arc::new(AtomicUsize::new(usize::MAX)),
        }
    }

    pub(crate) fn of(hub: &Hub) -> Self {
        Self { endpoint: hub.endpoint(), ..Self::new() }
    }

    pub(crate) fn sources(&self) -> Sources {
        let (waits, events) = (Arc::clone(&self.waits), Arc::clone(&self.events));
        let (cancelled, stop_after) = (Arc::clone(&self.cancelled), Arc::clone(&self.stop_after));
        let stop = Arc::clone(&self.cancelled);
        Sources::new(Settings {
            downloads_dir: self.path("downloads"),
            offline: self.offline,
            hub: HubSettings {
                endpoint: self.endpoint.clone(),
                token: self.token.clone(),
                cache_dir: self.path("hub"),
                offline: false,
            },
            object_stores: self.variables.clone(),
            proxy: ProxySettings::default(),
            root_certificates: None,
            user_agent: "merganser/test".to_owned(),
            patience: Patience { attempts: 4, silence: Duration::from_secs(5), ..Patience::default() },
            wait: Arc::new(move |wait| {
                waits.lock().unwrap().push(wait);
                // Waiting for a lock is for another thread to go on.
                if wait < Duration::from_millis(100) {
                    std::thread::sleep(wait);
                }
            }),
            cancelled: Arc::new(move || cancelled.load(Ordering::Relaxed)),
            on_event: Arc::new(move |event| {
                if matches!(event, Event::Progress { .. }) && stop_after.fetch_sub(1, Ordering::Relaxed) == 1
                {
                    stop.store(true, Ordering::Relaxed);
                }
                events.lock().unwrap().push(event);
            }),
        })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn get(&self, address: &str) -> Result<Located, Error> {
        self.sources().get(address, &self.pins, Reach::Network)
    }

    /// Gets a single file and reads it.
    #[track_caller]
    pub(crate) fn read(&self, address: &str) -> Vec<u8> {
        let located = self.get(address).unwrap_or_else(|error| panic!("{error}"));
        fs_err::read(located.path).unwrap()
    }

    #[track_caller]
    pub(crate) fn fails(&self, address: &str) -> Error {
        self.get(address).expect_err("it cannot be had")
    }

    /// Pins what was found, as a run does.
    pub(crate) fn pin(&mut self, located: &Located) {
        self.pins.revisions.extend(located.revision.iter().map(|it| (it.asked.clone(), it.commit.clone())));
        self.pins.files.extend(located.files.iter().map(|file| file.address.clone()));
    }

    /// Every file below a folder, by its path there.
    pub(crate) fn files(&self, folder: &str) -> Vec<String> {
        let root = self.path(folder);
        let mut found = Vec::new();
        let mut open = vec![root.clone()];
        while let Some(folder) = open.pop() {
            let Ok(entries) = fs_err::read_dir(&folder) else { continue };
            for entry in entries.map(Result::unwrap) {
                if entry.file_type().unwrap().is_dir() {
                    open.push(entry.path());
                } else {
                    found.push(relative(&root, &entry.path()));
                }
            }
        }
        found.sort();
        found
    }

    pub(crate) fn retries(&self) -> usize {
        self.events.lock().unwrap().iter().filter(|event| matches!(event, Event::Retrying { .. })).count()
    }
}

fn relative(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap().to_str().unwrap().to_owned()
}
