//! The entrance: an address in, a path out.

use crate::address::scheme_of;
use crate::error::{Error, Result};
use crate::http::Client;
use crate::settings::Settings;
use crate::{hub, object, place, web};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

/// Every kind of address.
static SOURCES: &[&dyn Source] = &[&hub::Hub, &web::Web, &object::ObjectStores];

/// How far to go for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Only what is here and pinned, so that the answer does not depend on what else happens to be here.
    Local,
    /// To the network, unless the settings forbid it.
    Network,
}

/// What is known to be meant, from earlier runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pins {
    /// Commits by what was asked for: `hf://org/repo@branch`.
    pub revisions: BTreeMap<String, String>,
    /// Addresses of single files.
    pub files: BTreeSet<String>,
}

impl Pins {
    pub(crate) fn has_file(&self, address: &str) -> bool {
        self.files.contains(address)
    }
}

/// What an address stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The file, or the folder of an adapter.
    pub path: PathBuf,
    /// What the address left open, and how it was decided.
    pub revision: Option<Revision>,
    /// Every file that the address means.
    pub files: Vec<RemoteFile>,
}

/// A branch or tag and the commit that it stands for: an entry of [`Pins::revisions`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revision {
    pub asked: String,
    pub commit: String,
}

/// A file of a remote place, here.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RemoteFile {
    /// The same address always gives the same file, given the pinned revision.
    pub address: String,
    pub path: PathBuf,
}

/// Gets files.
#[derive(Debug)]
pub struct Sources {
    settings: Arc<Settings>,
    client: OnceLock<Client>,
}

impl Sources {
    pub fn new(settings: Settings) -> Self {
        Self { settings: Arc::new(settings), client: OnceLock::new() }
    }

    /// Finds mistakes in an address, without looking anywhere.
    pub fn check(&self, address: &str) -> Result<()> {
        source_of(address)?.check(address)
    }

    /// Gets everything that an address means.
    pub fn get(&self, address: &str, pins: &Pins, reach: Reach) -> Result<Located> {
        let context = Context { settings: &self.settings, client: &self.client, reach };
        let mut located = source_of(address)?.get(&context, address, pins)?;
        located.files.sort_unstable();
        located.files.dedup();
        Ok(located)
    }

    /// An address as it is written in [`Pins`] and in [`RemoteFile`].
    pub fn canonical(&self, address: &str) -> String {
        source_of(address).map_or_else(|_| address.to_owned(), |source| source.canonical(address))
    }

    /// Whether the settings forbid to go to the network for an address.
    pub fn is_offline(&self, address: &str) -> bool {
        self.settings.offline || self.settings.hub.offline && scheme_of(address) == Some("hf")
    }

    /// Forgets a file that turned out to be wrong, so that it is downloaded again.
    pub fn discard(&self, file: &RemoteFile) -> Result<()> {
        match scheme_of(&file.address) {
            Some("hf") => hub::discard(&file.path),
            _ => place::discard(&file.path),
        }
    }
}

fn source_of(address: &str) -> Result<&'static dyn Source> {
    let scheme = scheme_of(address).unwrap_or_default();
    let known = SOURCES.iter().find(|source| source.schemes().contains(&scheme));
    known.copied().ok_or_else(|| {
        let known: Vec<String> =
            SOURCES.iter().flat_map(|source| source.schemes()).map(|scheme| format!("`{scheme}`")).collect();
        let reason = format!("`{scheme}` is not among {}", known.join(", "));
        Error::BadAddress { address: address.to_owned(), reason }
    })
}

/// A kind of address.
pub(crate) trait Source: Sync {
    fn schemes(&self) -> &'static [&'static str];

    fn check(&self, address: &str) -> Result<()>;

    /// One way to write what can be written in several.
    fn canonical(&self, address: &str) -> String {
        web::without_fragment(address)
    }

    fn get(&self, context: &Context<'_>, address: &str, pins: &Pins) -> Result<Located>;
}

/// What a source works with.
pub(crate) struct Context<'a> {
    pub(crate) settings: &'a Arc<Settings>,
    client: &'a OnceLock<Client>,
    reach: Reach,
}

/// [`Reach`] with what the settings make of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Local,
    /// What is here, pinned or not.
    Offline,
    Network,
}

impl Context<'_> {
    pub(crate) fn mode(&self, is_offline: bool) -> Mode {
        match self.reach {
            // Offline nothing can move, so what is here is what a run takes.
            _ if is_offline => Mode::Offline,
            Reach::Local => Mode::Local,
            Reach::Network => Mode::Network,
        }
    }

    /// The client, made when it is first needed.
    pub(crate) fn client(&self) -> Result<&Client> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let client = Client::new(self.settings)?;
        Ok(self.client.get_or_init(|| client))
    }
}
