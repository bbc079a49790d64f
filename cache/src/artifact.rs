//! Artifacts: what one stage produced, described by a small canonical document.
//!
//! An artifact is stored as an object like any other: the bytes of [`Artifact::to_bytes`], named by their BLAKE3
//! digest, which is the artifact's identity and what keys of later stages contain. Equal outputs therefore have
//! equal digests. INVARIANT: nothing in an artifact depends on a path, a clock or a host.
//!
//! The manifest is opaque here. The other fields repeat what the store must know to say whether an artifact is
//! complete without understanding the manifest: its blobs, the artifacts that it is computed from when read (a view
//! such as "difference of two checkpoints"), and the user's files that it points into.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::hex::hex_digest;

/// Description of one output: an opaque manifest and all that is needed to read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Artifact {
    /// What the writer wants to know again; opaque to the store.
    pub manifest: String,
    /// Bytes that belong to this artifact, in the writer's order, names distinct.
    pub blobs: Vec<Blob>,
    /// Digests of the artifacts that a view is computed from.
    #[serde(with = "hex_digest::list")]
    pub operands: Vec<blake3::Hash>,
    /// User files that a view points into, by content.
    pub sources: Vec<Source>,
}

/// A named object of an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blob {
    /// Name within the artifact.
    pub name: String,
    /// BLAKE3 of the bytes.
    #[serde(with = "hex_digest")]
    pub digest: blake3::Hash,
    /// Length in bytes.
    pub size: u64,
}

/// A user file, by content; where it lies is known to the stat cache only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// BLAKE3 of the whole file.
    #[serde(with = "hex_digest")]
    pub digest: blake3::Hash,
    /// Length in bytes.
    pub size: u64,
}

impl Artifact {
    /// Returns the canonical bytes: compact JSON, fields in the order of the type.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("text, numbers and lists always serialize")
    }

    /// Returns the digest of [`Artifact::to_bytes`].
    pub fn digest(&self) -> blake3::Hash {
        blake3::hash(&self.to_bytes())
    }

    /// Returns the bytes of the blobs, one that is listed twice counted once.
    pub fn blob_bytes(&self) -> u64 {
        let distinct: HashSet<_> = self.blobs.iter().map(|blob| (blob.digest, blob.size)).collect();
        distinct.iter().fold(0, |sum: u64, (_, size)| sum.saturating_add(*size))
    }

    /// Reads the bytes of an artifact; the caller has checked that they have the right digest.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let artifact: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        artifact.check()?;
        Ok(artifact)
    }

    /// Checks what the types cannot: that blob names are distinct.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut names = HashSet::new();
        match self.blobs.iter().find(|blob| !names.insert(blob.name.as_str())) {
            Some(blob) => Err(format!("two blobs are named `{}`", blob.name)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn artifact() -> Artifact {
        Artifact {
            manifest: "{\"kind\":\"checkpoint\"}".into(),
            blobs: vec![Blob { name: "w".into(), digest: blake3::hash(b"w"), size: 1 }],
            operands: vec![blake3::hash(b"operand")],
            sources: vec![Source { digest: blake3::hash(b"source"), size: 6 }],
        }
    }

    #[test]
    fn bytes_are_canonical_and_pinned() {
        let bytes = artifact().to_bytes();
        assert_eq!(Artifact::from_bytes(&bytes), Ok(artifact()));
        assert_eq!(
            artifact().digest().to_string(),
            "8524500df3ac29bbed39f806c21ffbc764bcb761cbc426ec1f38b792fa5e0bfa"
        );
        assert!(Artifact::from_bytes(&bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn rejects_two_blobs_of_one_name() {
        let mut artifact = artifact();
        artifact.blobs.push(artifact.blobs[0].clone());
        assert!(artifact.check().unwrap_err().contains("`w`"));
        assert!(Artifact::from_bytes(&artifact.to_bytes()).is_err());
    }

    #[test]
    fn shared_bytes_count_once() {
        let mut artifact = artifact();
        artifact.blobs.push(Blob { name: "v".into(), ..artifact.blobs[0].clone() });
        assert_eq!(artifact.blob_bytes(), 1);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Artifact::from_bytes(&bytes);
        }
    }
}
