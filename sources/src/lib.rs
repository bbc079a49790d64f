//! Files that lie elsewhere: found, downloaded, verified, kept.
//!
//! [`Sources`] takes an address and gives a path on this machine. Each kind of address is a file of this crate and a line in the
//! registry: `hub` (`hf://org/repo@rev/file`, in the cache that Hugging Face's own tools use), `web` (`https://`), `object` (`s3://`,
//! `gs://`, `az://`). What lies beside a file and belongs to it comes along: the shards of an index, the configuration of an adapter.
//!
//! What it promises:
//! - *Whole or not there.* A file appears under its name by `rename`, after its size and, where the server tells it, its digest are right.
//!   What was received of an interrupted download is kept and gone on from.
//! - *Nothing twice.* What is there is not asked for again when [`Pins`] say what is meant.
//! - *Many processes at once.* One lock file per download; the second process takes what the first one got.
//! - *Credentials stay home.* A token goes to the host that it is for, never to where that host redirects.
//! - *It ends.* Redirects, retries and waiting are bounded, and [`Settings::cancelled`] is looked at between blocks.
//!
//! What it deliberately does not do: upload, list, keep a lock file of inputs (it is told what is pinned), judge content beyond its
//! digest, read the environment or the clock (both are passed in through [`Settings`]).

mod address;
mod checkpoint;
mod connector;
mod download;
mod error;
mod file_lock;
mod http;
mod hub;
mod object;
mod place;
mod settings;
mod sources;
mod web;

pub use address::{is_address, scheme_of};
pub use error::{Error, Result};
pub use settings::{Event, HubSettings, Patience, ProxySettings, Settings};
pub use sources::{Located, Pins, Reach, RemoteFile, Revision, Sources};
