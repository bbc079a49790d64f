//! Records: which artifacts a key has produced, and under what circumstances.
//!
//! A record is a small JSON file that people may read. It keeps the whole preimage, so that two keys can be compared
//! field by field, and every distinct output seen for the key, newest first: a second one means that the operation is
//! not a function of its key, which is reported and never papered over.

use std::io;
use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::artifact::Artifact;
use crate::error::{Error, Miss, Result};
use crate::event::CacheEvent;
use crate::hex::hex_digest;
use crate::key::{FamilyKey, Preimage, StageKey};
use crate::lock::exclusively;
use crate::objects::read_all;
use crate::stat::FileStat;
use crate::store::{Inner, Store};

/// Everything the store knows about one key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What the key is the hash of.
    pub preimage: Preimage,
    /// All distinct outputs, the most recently produced first; never empty.
    pub outputs: Vec<Output>,
}

/// One output of a key and the last run that produced it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Output {
    /// Digest of the artifact.
    #[serde(with = "hex_digest")]
    pub artifact: blake3::Hash,
    /// How long computing it took.
    pub seconds: f64,
    /// The machine that computed it.
    pub host: String,
    /// Version of the tool that computed it.
    pub tool_version: String,
    /// When it was published, in seconds since 1970.
    pub created_unix: u64,
}

/// What became of a publication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The key.
    pub key: StageKey,
    /// Digest of the artifact.
    pub artifact: blake3::Hash,
    /// All distinct outputs of the key, this one first. More than one: the operation is not deterministic.
    pub outputs: Vec<blake3::Hash>,
}

impl Store {
    /// Records that `preimage` produced `artifact` in `elapsed`; its blobs and operands must be in the store.
    ///
    /// Raises [`CacheEvent::NonDeterministic`] when the key has produced anything else before.
    pub fn publish(&self, preimage: &Preimage, artifact: &Artifact, elapsed: Duration) -> Result<Published> {
        self.inner.publish(preimage, artifact, elapsed)
    }

    /// Returns the record of a key, whether or not its outputs are still complete.
    pub fn record(&self, key: &StageKey) -> Result<Record, Miss> {
        self.inner.read_record(key)
    }

    /// Returns true if the operation has ever been published, on whatever inputs; costs one `stat`.
    pub fn family_seen(&self, family: &FamilyKey) -> bool {
        self.inner.layout.family(family).exists()
    }

    /// Returns the key under which the operation was published last, on whatever inputs.
    pub fn family_newest(&self, family: &FamilyKey) -> Option<StageKey> {
        fs_err::read_to_string(self.inner.layout.family(family)).ok()?.parse().ok()
    }
}

/// A record is read whole; a larger file is not one of ours.
const MAX_RECORD_BYTES: u64 = 64 << 20;

impl Inner {
    /// Reads a record; one that cannot be what was written is moved to quarantine.
    pub(crate) fn read_record(&self, key: &StageKey) -> Result<Record, Miss> {
        let path = self.layout.record(key);
        let unreadable = |error: io::Error| {
            let reason = error.to_string();
            (self.on_event)(CacheEvent::Unreadable { path: path.clone(), reason: reason.clone() });
            Miss::Unreadable { reason }
        };
        let file = match fs_err::File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Miss::Unknown),
            other => other.map_err(unreadable)?,
        };
        let metadata = file.metadata().map_err(unreadable)?;
        let parsed = if metadata.len() > MAX_RECORD_BYTES {
            Err(format!("{} bytes are too many for a record", metadata.len()))
        } else {
            parse(&read_all(file, metadata.len()).map_err(unreadable)?, key)
        };
        match parsed {
            Ok(record) => {
                // The time of last use, for garbage collection.
                self.touch(&path, &metadata);
                Ok(record)
            }
            Err(reason) => {
                self.quarantine(&path, Some(&FileStat::of(&metadata)), &reason);
                Err(Miss::Unreadable { reason })
            }
        }
    }

    fn publish(&self, preimage: &Preimage, artifact: &Artifact, elapsed: Duration) -> Result<Published> {
        let key = preimage.key();
        let digest = self.store_artifact(artifact)?;
        let created = (self.clock)().duration_since(UNIX_EPOCH).unwrap_or_default();
        let output = Output {
            artifact: digest,
            seconds: elapsed.as_secs_f64(),
            host: self.host.clone(),
            tool_version: self.tool_version.clone(),
            created_unix: created.as_secs(),
        };
        let outputs = exclusively(&self.layout.records_lock(&key), || {
            // Whatever is wrong with an existing record, the new one takes its place.
            let mut outputs = self.read_record(&key).map_or_else(|_| Vec::new(), |record| record.outputs);
            outputs.retain(|old| old.artifact != digest);
            outputs.insert(0, output);
            let record = Record { preimage: preimage.clone(), outputs };
            let bytes = serde_json::to_vec(&record).map_err(|error| Error::Io(error.into()))?;
            self.write_atomically(&self.layout.record(&key), &bytes, false)?;
            Ok(record.outputs.iter().map(|output| output.artifact).collect::<Vec<_>>())
        })?;
        self.write_atomically(&self.layout.family(&preimage.family()), key.to_string().as_bytes(), false)?;
        if outputs.len() > 1 {
            (self.on_event)(CacheEvent::NonDeterministic { key, outputs: outputs.clone() });
        }
        Ok(Published { key, artifact: digest, outputs })
    }
}

fn parse(bytes: &[u8], key: &StageKey) -> Result<Record, String> {
    let record: Record = serde_json::from_slice(bytes).map_err(|error| format!("not a record: {error}"))?;
    if record.preimage.key() != *key {
        return Err(format!("it belongs to key {}", record.preimage.key()));
    }
    if record.outputs.is_empty() {
        return Err("it names no output".to_owned());
    }
    Ok(record)
}
