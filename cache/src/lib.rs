//! A content-addressed store for the outputs of pipeline stages.
//!
//! What it holds: **blobs** (opaque bytes named by their BLAKE3 digest), **artifacts** (an opaque manifest, the
//! blobs it needs, the artifacts it is computed from and the user files it points into), and **records** (which
//! artifact a [`Preimage`] produced, when, where, in how many seconds). It knows no pipeline files, no tensors and
//! no stages; what a manifest means is its writer's business.
//!
//! What it promises:
//! - *Complete or miss.* [`Store::lookup`] answers with a [`Hit`] only when everything the artifact needs is there.
//! - *Verified on read.* Sizes are checked always, digests on first use per [`Store`]; a bad object is moved to
//!   quarantine and reported, so a broken cache is a miss: never a wrong answer, never a panic.
//! - *All or nothing.* Objects and records appear by `rename`; a process killed at any moment leaves nothing but a
//!   staging folder that the next writer removes.
//! - *Many processes at once.* Nothing is locked while reading; [`Store::lock_key`] gives single flight per key.
//! - *Nothing is forgotten.* All distinct outputs seen for one key are kept and reported as non-determinism.
//!
//! What it deliberately does not do: print, read the environment or the clock (both are passed in through
//! [`Options`]), decide what to delete, or follow anything a manifest says.
//!
//! # Layout
//!
//! Every bucket's name carries its own format version: a new format is a new folder, never a migration.
//!
//! ```text
//! CACHEDIR.TAG                 backup programs skip the folder
//! objects-v1/ab/cdef…          blobs and artifacts, read-only, named by BLAKE3 of their bytes
//! keys-v1/ab/cdef….json        StageKey -> record: preimage, every distinct output, timings, host, version;
//!                              modification time = last use (refreshed at most once an hour)
//! families-v1/ab/cdef…         FamilyKey -> newest StageKey: "this operation has run, on whatever inputs"
//! staging-v1/<session>/        files being written; <session>.lock is locked by the process that writes them
//! locks-v1/<key>.lock          single flight per key (removed when released); also *.records and stat.lock
//! quarantine-v1/               damaged files, moved out of the way for inspection
//! stat-v1/<host>               digests of user files by path and stat, see `stat_cache`
//! ```
//!
//! # Rayon
//!
//! Large files are hashed on a small pool of the crate's own, so a caller outside rayon may block the global pool
//! without blocking the store. A caller *inside* a rayon task must not hold a lock that other rayon tasks take
//! while it calls the store: while it waits, rayon may run one of those tasks on the same thread.

mod artifact;
mod error;
mod event;
mod export;
mod hash;
mod hex;
mod in_flight;
mod key;
mod layout;
mod listing;
mod lock;
mod objects;
mod record;
mod source;
mod staging;
mod stat;
mod stat_cache;
mod store;
mod value;

pub use artifact::{Artifact, Blob, Source};
pub use error::{Damage, Error, Miss, Part, Result};
pub use event::CacheEvent;
pub use export::{ExportMode, Exported};
pub use hex::hex_digest;
pub use key::{Change, FamilyKey, Preimage, StageKey, diff};
pub use listing::{BucketUsage, DiskUsage, Listed};
pub use lock::{KeyLock, Waiting};
pub use objects::BlobFile;
pub use record::{Output, Published, Record};
pub use source::{FileDigest, SourceFile};
pub use staging::{BlobWriter, Staging};
pub use stat::FileStat;
pub use store::{Hit, Options, Store};
pub use value::Value;
