//! What the artifact of an ONNX export says about itself.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The manifest of an exported graph; its blobs are the files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportedGraph {
    content: Tag,
    /// The blob that is the graph; all others are files that it refers to, or that lie beside it.
    pub graph: String,
    /// Bytes of the weights in the file: codes, scales and zero points, or floats.
    pub weight_bytes: u64,
    /// Bytes of the same weights in single precision.
    pub f32_bytes: u64,
    /// By the way in which they are stored.
    pub forms: BTreeMap<String, ExportedForm>,
    /// Layers that compute with integers.
    pub integer_layers: usize,
}

/// Weights that are stored in the same way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportedForm {
    pub tensors: usize,
    pub bytes: u64,
}

/// Tells exported graphs from other manifests.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Tag {
    Graph,
}

impl ExportedGraph {
    pub(super) fn new(
        graph: &str,
        f32_bytes: u64,
        forms: BTreeMap<String, ExportedForm>,
        integer_layers: usize,
    ) -> Self {
        let weight_bytes = forms.values().map(|form| form.bytes).sum();
        Self { content: Tag::Graph, graph: graph.to_owned(), weight_bytes, f32_bytes, forms, integer_layers }
    }

    /// Canonical JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("names and whole numbers can be written")
    }

    /// Reads a manifest; `None` if it is not one of an exported graph.
    pub fn from_json(manifest: &str) -> Option<Self> {
        serde_json::from_str(manifest).ok()
    }
}
