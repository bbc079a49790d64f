//! `hf://org/repo[@revision][/path]`: repositories of the hub, in the cache that Hugging Face's own tools use, so that nothing they have
//! is downloaded again, and the other way round.
//!
//! ```text
//! models--org--repo/
//!     refs/main                         the commit that `main` stood for when it was last asked for
//!     blobs/<etag>                      content: SHA-256 of large files, Git's blob id of small ones
//!     blobs/<etag>.incomplete           what has been received of it
//!     snapshots/<commit>/path           a link to its blob
//! .locks/models--org--repo/<etag>.lock
//! ```
//!
//! A revision is resolved once per address; all that belongs to the address is of that commit. `hf://datasets/org/repo/…` and
//! `hf://spaces/org/repo/…` are repositories of these kinds.

mod address;
mod cache;
mod protocol;

use crate::checkpoint::{Shape, Tree, select};
use crate::download::{Check, Transfer};
use crate::error::{Error, Result};
use crate::file_lock::FileLock;
use crate::settings::Event;
use crate::sources::{Context, Located, Mode, Pins, RemoteFile, Revision, Source};
use address::{HubAddress, is_commit};
use cache::RepoCache;
pub(crate) use cache::discard;
use protocol::Metadata;
use std::path::PathBuf;

pub(crate) struct Hub;

impl Source for Hub {
    fn schemes(&self) -> &'static [&'static str] {
        &["hf"]
    }

    fn check(&self, address: &str) -> Result<()> {
        HubAddress::parse(address).map(drop)
    }

    fn canonical(&self, address: &str) -> String {
        HubAddress::parse(address).map_or_else(
            |_| address.to_owned(),
            |address| address.of_file(address.path.trim_end_matches('/')),
        )
    }

    fn get(&self, context: &Context<'_>, text: &str, pins: &Pins) -> Result<Located> {
        let address = HubAddress::parse(text)?;
        let settings = context.settings;
        let mode = context.mode(settings.offline || settings.hub.offline);
        let cache = RepoCache::new(&settings.hub.cache_dir, &address);
        let pinned = pins.revisions.get(&address.asked());
        let commit = if is_commit(&address.revision) {
            Some(address.revision.clone())
        } else {
            // A lock file is text that somebody may have edited.
            pinned.filter(|commit| is_commit(commit)).cloned()
        };
        let commit = match (commit, mode) {
            (None, Mode::Offline) => cache.commit_of(&address.revision),
            (commit, _) => commit,
        };
        let mut tree =
            Repository { context, text, address: &address, cache, pins, mode, commit, files: Vec::new() };
        let name = address.path.trim_end_matches('/');
        let is_folder = name.is_empty() || address.path.ends_with('/');
        let shape = if is_folder { Shape::Folder } else { Shape::Either };
        let path = select(&mut tree, name, shape)?.ok_or_else(|| Error::NotFound {
            address: text.to_owned(),
            what: if is_folder { "checkpoint" } else { "file" },
            missing: if name.is_empty() { "model.safetensors".to_owned() } else { name.to_owned() },
            url: protocol::page(&settings.hub.endpoint, &address),
        })?;
        let revision = tree
            .commit
            .filter(|_| !is_commit(&address.revision))
            .map(|commit| Revision { asked: address.asked(), commit });
        Ok(Located { path, revision, files: tree.files })
    }
}

/// The files of one repository at one commit, which may not be known yet.
struct Repository<'a> {
    context: &'a Context<'a>,
    /// As the user wrote it.
    text: &'a str,
    address: &'a HubAddress,
    cache: RepoCache,
    pins: &'a Pins,
    mode: Mode,
    commit: Option<String>,
    files: Vec<RemoteFile>,
}

impl Tree for Repository<'_> {
    fn address(&self, name: &str) -> String {
        self.address.of_file(name)
    }

    fn file(&mut self, name: &str) -> Result<Option<PathBuf>> {
        if let Some(commit) = &self.commit {
            let path = self.cache.file(commit, name);
            if path.is_file() {
                return Ok(Some(self.found(name, path)));
            }
        }
        if self.mode != Mode::Network {
            let is_offline = self.mode == Mode::Offline;
            return Err(Error::NotCached { address: self.address.of_file(name), offline: is_offline });
        }
        let revision = self.commit.as_ref().unwrap_or(&self.address.revision);
        let hub = protocol::Hub { context: self.context, text: self.text, address: self.address };
        let Some(metadata) = hub.metadata(revision, name)? else { return Ok(None) };
        if let Some(expected) = self.commit.as_ref().filter(|commit| **commit != metadata.commit) {
            let reason = format!("it has commit {}, asked for {expected}", metadata.commit);
            return Err(Error::Protocol { address: self.text.to_owned(), url: metadata.url, reason });
        }
        if self.commit.is_none() {
            self.cache.remember(&self.address.revision, &metadata.commit)?;
            self.commit = Some(metadata.commit.clone());
        }
        let path = self.fetch(&hub, name, &metadata)?;
        Ok(Some(self.found(name, path)))
    }

    fn is_pinned(&self, name: &str) -> bool {
        self.pins.has_file(&self.address.of_file(name))
    }

    fn may_guess(&self) -> bool {
        self.mode != Mode::Local
    }
}

impl Repository<'_> {
    fn found(&mut self, name: &str, path: PathBuf) -> PathBuf {
        self.files.push(RemoteFile { address: self.address.of_file(name), path: path.clone() });
        path
    }

    /// Puts a file into the cache, by download unless another commit has the same content.
    fn fetch(&self, hub: &protocol::Hub<'_>, name: &str, metadata: &Metadata) -> Result<PathBuf> {
        let settings = self.context.settings;
        let blob = self.cache.blob(&metadata.etag);
        if !blob.is_file() {
            let file_address = self.address.of_file(name);
            let lock = self.cache.lock(&metadata.etag);
            let _lock = FileLock::acquire(&lock, &file_address, settings)?;
            // Another process may have got it while this one waited.
            if !blob.is_file() {
                let partial = self.cache.incomplete(&metadata.etag);
                let transfer = Transfer {
                    address: &file_address,
                    partial: &partial,
                    // Named by content: what is there is of this version.
                    validator: None,
                    size: metadata.size,
                    check: check(metadata),
                };
                let size = transfer
                    .run(settings, &mut |resume| hub.open(&metadata.commit, name, &file_address, resume))?;
                crate::download::keep(&partial, &blob)?;
                (settings.on_event)(Event::Finished { address: file_address.clone(), size });
            }
        }
        self.cache.link(&metadata.commit, name, &metadata.etag)
    }
}

/// An entity tag of the hub is a digest: SHA-256 of large files, Git's blob id of small ones.
fn check(metadata: &Metadata) -> Check {
    let is_hex = metadata.etag.chars().all(|digit| matches!(digit, '0'..='9' | 'a'..='f'));
    match (metadata.etag.len(), metadata.size) {
        (64, _) if is_hex => Check::Sha256(metadata.etag.clone()),
        (40, Some(size)) if is_hex => Check::Git { id: metadata.etag.clone(), size },
        _ => Check::Nothing,
    }
}
