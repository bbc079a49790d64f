//! The JSON of a manifest; reading it checks it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Content, Layout, Link, MANIFEST_VERSION, Manifest, ManifestProblem, TensorEntry};

/// The manifest as written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawManifest {
    version: u32,
    content: Content,
    tensors: Vec<TensorEntry>,
    layout: Layout,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    views: Vec<Manifest>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    links: Vec<Link>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    parameters: Vec<TensorEntry>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    figures: BTreeMap<String, f64>,
}

impl From<Manifest> for RawManifest {
    fn from(manifest: Manifest) -> Self {
        let Manifest { content, tensors, layout, views, links, parameters, figures } = manifest;
        Self { version: MANIFEST_VERSION, content, tensors, layout, views, links, parameters, figures }
    }
}

impl TryFrom<RawManifest> for Manifest {
    type Error = ManifestProblem;

    fn try_from(raw: RawManifest) -> Result<Self, ManifestProblem> {
        if raw.version != MANIFEST_VERSION {
            return Err(ManifestProblem::Version(raw.version));
        }
        let RawManifest { content, tensors, layout, views, links, parameters, figures, .. } = raw;
        let manifest = Self { content, tensors, layout, views, links, parameters, figures };
        manifest.check()?;
        Ok(manifest)
    }
}

/// Digests as 64 hexadecimal digits.
pub mod hex {
    use blake3::Hash;
    use serde::de::{Deserializer, Error};
    use serde::{Deserialize, Serializer};

    pub fn serialize<S: Serializer>(digest: &Hash, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&digest.to_hex())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Hash, D::Error> {
        let text = String::deserialize(deserializer)?;
        Hash::from_hex(&text).map_err(|problem| D::Error::custom(format!("digest `{text}`: {problem}")))
    }
}

/// [`hex`] for a digest that may be absent.
pub(super) mod optional_hex {
    use blake3::Hash;
    use serde::de::Deserializer;
    use serde::{Deserialize, Serializer};

    #[expect(clippy::ref_option, reason = "the signature that serde asks for")]
    pub(in crate::manifest) fn serialize<S: Serializer>(
        digest: &Option<Hash>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match digest {
            Some(digest) => super::hex::serialize(digest, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub(in crate::manifest) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Hash>, D::Error> {
        #[derive(Deserialize)]
        struct Digest(#[serde(with = "super::hex")] Hash);
        Ok(Option::<Digest>::deserialize(deserializer)?.map(|digest| digest.0))
    }
}
