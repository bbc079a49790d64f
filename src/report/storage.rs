//! What it takes to keep some models: measured bytes, and the ratio to the same models in single precision.

use crate::engine::{Resolver, UnitId};
use blake3::Hash;
use merganser_cache::{Artifact, Blob, Store};
use merganser_stages::{
    ADAPTATION, DIAGNOSTICS, ExportedGraph, FLOAT_STUDENT, PROGRESS, QUANTIZATION, SEEN, TRAINING,
};
use merganser_tensors::Manifest;
use std::collections::{HashMap, HashSet};

/// Measured bytes against plain ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stored {
    /// Bytes of all files that are needed, headers included; shared ones once; the base not counted for task vectors.
    pub bytes: u64,
    /// Bytes of the same tensors in f32.
    pub plain_bytes: u64,
}

impl Stored {
    pub fn ratio(&self) -> f64 {
        self.plain_bytes as f64 / (self.bytes as f64).max(1.0)
    }
}

/// What has to be kept to have the models of an instance again: its own output, or what the kind says they are made from
/// (a merge: the task vectors; where models share a vector and have masks, these), less the base that everyone has.
pub fn stored(resolver: &Resolver<'_>, instance: usize, artifacts: &HashMap<UnitId, Hash>) -> Option<Stored> {
    let units = &resolver.units;
    let store = &resolver.workspace.store;
    let kept_port = units.pipeline.instances[instance].kind.storage_port();
    let mut kept: HashSet<Hash> = HashSet::new();
    let mut assumed: HashSet<Hash> = HashSet::new();
    for id in units.of_instance[instance].iter().filter(|id| !units.entries[**id].is_part()) {
        let is_own = kept_port.is_none() || units.stage(*id).holds_all_but_the_base();
        if is_own {
            kept.insert(*artifacts.get(id)?);
        }
        let Some(port) = kept_port else { continue };
        // Other ports are read to make or to measure it: what lies there need not be at hand later.
        for input in &units.entries[*id].inputs {
            if input.port == "base" {
                assumed.insert(*artifacts.get(&input.from)?);
            } else if input.port == port && !is_own {
                kept.insert(*artifacts.get(&input.from)?);
            }
        }
    }
    let mut files = HashMap::new();
    let mut without = HashMap::new();
    let mut plain_bytes = 0;
    for artifact in &kept {
        reach(store, artifact, &mut files)?;
        plain_bytes += plain(store, artifact)?;
    }
    for artifact in &assumed {
        reach(store, artifact, &mut without)?;
    }
    let bytes = files.iter().filter(|(digest, _)| !without.contains_key(*digest)).map(|(_, size)| size).sum();
    Some(Stored { bytes, plain_bytes })
}

/// Bytes in f32 of the tensors of an artifact; of coefficients, of the parameters that they stand for, which their basis knows.
fn plain(store: &Store, artifact: &Hash) -> Option<u64> {
    let artifact = store.load_artifact(artifact).ok()?;
    if let Some(graph) = ExportedGraph::from_json(&artifact.manifest) {
        return Some(graph.f32_bytes);
    }
    let manifest = Manifest::from_json(artifact.manifest.as_bytes()).ok()?;
    match manifest.linked("basis").next() {
        Some(basis) => plain(store, &basis.artifact),
        None => Some(manifest.f32_bytes()),
    }
}

/// Bytes of an artifact's own files that it needs.
pub fn kept_bytes(artifact: &Artifact) -> u64 {
    own_files(artifact).map(|blob| blob.size).sum()
}

/// The files of an artifact without those that only tell about it.
pub fn own_files(artifact: &Artifact) -> impl Iterator<Item = &Blob> {
    const TOLD: [&str; 7] = [DIAGNOSTICS, QUANTIZATION, TRAINING, PROGRESS, FLOAT_STUDENT, ADAPTATION, SEEN];
    artifact.blobs.iter().filter(|blob| !TOLD.contains(&blob.name.as_str()))
}

/// All files that an artifact needs, by digest: its own description (which holds the scales), blobs, user files, and those of its operands.
fn reach(store: &Store, digest: &Hash, files: &mut HashMap<Hash, u64>) -> Option<()> {
    let artifact = store.load_artifact(digest).ok()?;
    if !artifact.blobs.is_empty() {
        files.insert(*digest, artifact.to_bytes().len() as u64);
    }
    files.extend(own_files(&artifact).map(|blob| (blob.digest, blob.size)));
    files.extend(artifact.sources.iter().map(|source| (source.digest, source.size)));
    artifact.operands.iter().try_for_each(|operand| reach(store, operand, files))
}
