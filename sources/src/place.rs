//! The folder of downloads: where files from the web and from object stores are kept.
//!
//! ```text
//! <host>-<digest of the folder's address>/     one per remote folder, so that shards lie beside their index
//!     model.safetensors                        whole, as the server gave it
//!     .state/model.safetensors.version         the version that the server called it (an entity tag)
//!     .state/model.safetensors.partial         what has been received of it
//!     .state/model.safetensors.partial-version which version that is
//!     .state/model.safetensors.lock            held while it is downloaded
//! ```
//!
//! Unlike the hub's, these addresses have no history: a new version replaces the old one.

use crate::checkpoint::Tree;
use crate::download::{Check, Opened, Resume, Transfer, keep};
use crate::error::{Error, Result};
use crate::file_lock::FileLock;
use crate::settings::{Event, Settings};
use crate::sources::{Mode, Pins, RemoteFile};
use ring::digest::{SHA256, digest};
use std::path::{Path, PathBuf};

/// A remote folder that files can be had from.
pub(crate) trait Remote {
    /// How a file is called in messages and in pins.
    fn address(&self, name: &str) -> String;

    /// The version of a file that is there now.
    fn version(&mut self, name: &str) -> Result<Version>;

    /// Begins to read a file; `None` if there is no such file.
    fn open(&mut self, name: &str, resume: &Resume) -> Result<Option<Opened>>;
}

/// What is known of a remote file without getting it.
pub(crate) enum Version {
    /// There is no such file.
    Missing,
    /// The server does not say.
    Unknown,
    /// It has this entity tag.
    Tag(String),
}

impl Version {
    pub(crate) fn of(tag: Option<String>) -> Self {
        tag.map_or(Self::Unknown, Self::Tag)
    }
}

/// A remote folder with what is kept of it here.
pub(crate) struct Kept<'a, R> {
    pub(crate) remote: R,
    pub(crate) folder: PathBuf,
    pub(crate) pins: &'a Pins,
    pub(crate) mode: Mode,
    pub(crate) settings: &'a Settings,
    /// What the user says that the file is: its name and SHA-256.
    pub(crate) expected: Option<(String, String)>,
    /// What has been got.
    pub(crate) files: Vec<RemoteFile>,
}

/// Where files of a remote folder are kept.
pub(crate) fn folder_for(downloads: &Path, host: &str, folder_address: &str) -> PathBuf {
    let digest = crate::download::hex(digest(&SHA256, folder_address.as_bytes()).as_ref());
    let readable: String = host
        .chars()
        .map(
            |character| {
                if character.is_ascii_alphanumeric() || ".-".contains(character) { character } else { '_' }
            },
        )
        .take(60)
        .collect();
    downloads.join(format!("{}-{}", readable.trim_matches('.'), &digest[..16]))
}

fn state(folder: &Path, name: &str, what: &str) -> PathBuf {
    folder.join(".state").join(format!("{name}.{what}"))
}

/// Forgets a file, so that it is downloaded again.
pub(crate) fn discard(path: &Path) -> Result<()> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Ok(());
    };
    for path in [state(folder, name, "version"), path.to_owned()] {
        match fs_err::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}

impl<R: Remote> Tree for Kept<'_, R> {
    fn address(&self, name: &str) -> String {
        self.remote.address(name)
    }

    fn file(&mut self, name: &str) -> Result<Option<PathBuf>> {
        let address = self.remote.address(name);
        let place = self.folder.join(name);
        let (is_here, is_pinned) = (place.is_file(), self.pins.has_file(&address));
        let is_known = is_here && (is_pinned || self.mode == Mode::Offline);
        if !is_known {
            match self.mode {
                Mode::Local => return Err(Error::NotCached { address, offline: false }),
                Mode::Offline => return Err(Error::NotCached { address, offline: true }),
                Mode::Network => {
                    if !self.fetch(name, &address, &place)? {
                        return Ok(None);
                    }
                }
            }
        }
        self.files.push(RemoteFile { address, path: place.clone() });
        Ok(Some(place))
    }

    fn is_pinned(&self, name: &str) -> bool {
        self.pins.has_file(&self.remote.address(name))
    }

    fn may_guess(&self) -> bool {
        self.mode != Mode::Local
    }
}

impl<R: Remote> Kept<'_, R> {
    /// Downloads a file unless the version here is the one there; returns whether there is such a file.
    fn fetch(&mut self, name: &str, address: &str, place: &Path) -> Result<bool> {
        let version = state(&self.folder, name, "version");
        let _lock = FileLock::acquire(&state(&self.folder, name, "lock"), address, self.settings)?;
        if place.is_file()
            && let Ok(here) = fs_err::read_to_string(&version)
        {
            match self.remote.version(name)? {
                Version::Missing => return Ok(false),
                Version::Tag(there) if there == here => return Ok(true),
                Version::Tag(_) | Version::Unknown => {}
            }
        }
        let check = match &self.expected {
            Some((expected_name, digest)) if expected_name == name => Check::Sha256(digest.clone()),
            _ => Check::Nothing,
        };
        let partial = state(&self.folder, name, "partial");
        let partial_version = state(&self.folder, name, "partial-version");
        let transfer = Transfer {
            address,
            partial: &partial,
            validator: Some(partial_version.clone()),
            size: None,
            check,
        };
        let (mut is_missing, mut current) = (false, None);
        let remote = &mut self.remote;
        let size = transfer.run(self.settings, &mut |resume| {
            if let Some(opened) = remote.open(name, resume)? {
                current.clone_from(&opened.validator);
                return Ok(opened);
            }
            is_missing = true;
            let (address, missing) = (address.to_owned(), name.to_owned());
            Err(Error::NotFound { url: address.clone(), address, what: "file", missing })
        });
        if is_missing {
            transfer.remove()?;
            return Ok(false);
        }
        let size = size?;
        // In this order: a version must never stand beside a file that it does not describe.
        let _ = fs_err::remove_file(&version);
        keep(&partial, place)?;
        let _ = fs_err::remove_file(&partial_version);
        if let Some(current) = current {
            fs_err::write(&version, current)?;
        }
        (self.settings.on_event)(Event::Finished { address: address.to_owned(), size });
        Ok(true)
    }
}
