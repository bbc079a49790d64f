//! Looks units up: the one place where a key meets the store. `plan` and `run` differ only in what they do about a miss.

use super::events::Status;
use super::explain;
use super::history::{RunRecord, StageRecord};
use super::keys::{self, Hashing, Resolved};
use super::units::{UnitId, Units};
use super::workspace::Workspace;
use crate::pipeline::Selection;
use blake3::Hash;
use merganser_cache::{Damage, Hit, Miss, Part, Preimage, StageKey, Value};
use merganser_stages::{JobSource, Problem, SourceSet, StageError};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::OnceLock;

/// What the store knows about a unit.
pub enum Lookup {
    /// Its output is there and whole.
    Hit { key: StageKey, artifact: Hash },
    /// It has to run.
    Miss { key: StageKey, resolved: Box<Resolved>, reason: String },
}

/// A pipeline against a store.
pub struct Resolver<'w> {
    pub workspace: &'w Workspace,
    pub units: Units<'w>,
    /// The units that the command is about, with all they need.
    pub needed: Vec<bool>,
    /// The units that were asked for by name.
    pub selected: Vec<bool>,
    /// The units that run even if they are cached.
    pub forced: Vec<bool>,
    sources: Vec<Vec<SourceSet>>,
    previous: OnceLock<BTreeMap<String, StageRecord>>,
    hashing: Box<dyn Hashing + 'w>,
    digests: keys::Digests,
}

impl<'w> Resolver<'w> {
    /// Lists the files of every unit; all that are missing are reported together.
    pub fn new(
        workspace: &'w Workspace,
        units: Units<'w>,
        targets: &[Selection],
        forced: &[Selection],
        hashing: Box<dyn Hashing + 'w>,
    ) -> Result<Self, Vec<Problem>> {
        let needed = units.needed_for(targets);
        let was_seen = |path: &Path| {
            let was_seen = workspace.store.last_digest(path).is_some();
            if was_seen {
                let path = path.display();
                workspace.note(format!("`{path}` is gone: it counts as what it was when it was last here"));
            }
            was_seen
        };
        let sources = keys::list_sources(&units, &needed, &was_seen)?;
        let (selected, forced) = (units.selected(targets), units.selected(forced));
        Ok(Self {
            workspace,
            units,
            needed,
            selected,
            forced,
            sources,
            previous: OnceLock::new(),
            hashing,
            digests: keys::Digests::default(),
        })
    }

    /// Computes a unit's key from the artifacts of its inputs and looks it up. A forced unit is a miss.
    pub fn lookup(
        &self,
        id: UnitId,
        artifacts: &HashMap<UnitId, Hash>,
        forced: bool,
    ) -> Result<Lookup, StageError> {
        let Resolved { preimage, inputs, sources } = self.resolve(id, artifacts)?;
        let key = preimage.key();
        let miss = match self.look(&key) {
            Ok(hit) if !forced => return Ok(Lookup::Hit { key, artifact: hit.artifact_digest }),
            Ok(_) => None,
            Err(miss) => Some(miss),
        };
        let reason = miss.map_or_else(|| "forced".to_owned(), |miss| self.reason(id, &key, &preimage, &miss));
        Ok(Lookup::Miss { key, resolved: Box::new(Resolved { preimage, inputs, sources }), reason })
    }

    /// An output that points into files which are gone is still what the units after it are keyed by.
    fn look(&self, key: &StageKey) -> Result<Hit, Miss> {
        let store = &self.workspace.store;
        match store.lookup(key) {
            Err(Miss::Incomplete(Damage { part: Part::Source { digest }, .. }))
                if !store.gone(&digest).is_empty() =>
            {
                store.lookup_without_sources(key)
            }
            found => found,
        }
    }

    /// What a unit's key is made of.
    pub fn preimage(&self, id: UnitId, artifacts: &HashMap<UnitId, Hash>) -> Result<Preimage, StageError> {
        Ok(self.resolve(id, artifacts)?.preimage)
    }

    fn resolve(&self, id: UnitId, artifacts: &HashMap<UnitId, Hash>) -> Result<Resolved, StageError> {
        let (operation, sources) = self.operation(id)?;
        let (key_inputs, inputs) = keys::inputs(&self.units.entries[id], |from| artifacts[&from]);
        Ok(Resolved { preimage: Preimage { operation, inputs: key_inputs }, inputs, sources })
    }

    fn operation(&self, id: UnitId) -> Result<(Value, Vec<JobSource>), StageError> {
        keys::operation(self.workspace, &self.units, id, &self.sources[id], &self.digests, &*self.hashing)
    }

    /// Whether the same operation has been run before on any inputs; if not, a unit with unknown inputs is sure to run.
    pub fn family_seen(&self, id: UnitId) -> Result<bool, StageError> {
        let (operation, _) = self.operation(id)?;
        let family = Preimage { operation, inputs: merganser_cache::Value::Null }.family();
        Ok(self.workspace.store.family_seen(&family))
    }

    /// Why a unit is not cached: what changed since it last ran in this pipeline.
    fn reason(&self, id: UnitId, key: &StageKey, preimage: &Preimage, miss: &Miss) -> String {
        if *miss != Miss::Unknown {
            return miss.to_string();
        }
        let Some(record) = self.previous_of(id) else { return "never run before".to_owned() };
        let Some(old_key) = record.key.as_deref().and_then(|key| key.parse::<StageKey>().ok()) else {
            return "did not finish last time".to_owned();
        };
        match record.status {
            Status::Failed => return "it failed last time".to_owned(),
            Status::Skipped => return "it did not finish last time".to_owned(),
            Status::Ran | Status::Cached => {}
        }
        if old_key == *key {
            return "its output is no longer in the cache".to_owned();
        }
        match self.workspace.store.record(&old_key) {
            Ok(old) => explain::summary(&merganser_cache::diff(&old.preimage, preimage)),
            Err(_) => "its last key is no longer in the cache".to_owned(),
        }
    }

    /// The keys that a unit had in past runs of this pipeline, the latest first; `with_others` adds those of its stage with other
    /// swept values.
    pub fn history(&self, id: UnitId, with_others: bool) -> Vec<StageKey> {
        let entry = &self.units.entries[id];
        let stage = &self.units.instance(id).stage;
        let records = self
            .workspace
            .history
            .latest(&self.units.pipeline.path)
            .flat_map(|RunRecord { stages, .. }| stages);
        let alike = records.filter(|record| record.stage == *stage && record.member == entry.member);
        let (own, others): (Vec<_>, Vec<_>) = alike.partition(|record| record.unit == entry.name.0);
        own.into_iter()
            .chain(others.into_iter().filter(|_| with_others))
            .filter_map(|record| record.key?.parse().ok())
            .collect()
    }

    /// The last run of a unit; of one that has not run yet in a sweep, the last run of its stage with other values.
    fn previous_of(&self, id: UnitId) -> Option<&StageRecord> {
        let entry = &self.units.entries[id];
        let previous = self.previous();
        previous.get(&entry.name.0).or_else(|| {
            let stage = &self.units.instance(id).stage;
            previous.values().rfind(|record| record.stage == *stage && record.member == entry.member)
        })
    }

    /// The units of the last runs of this pipeline, by name: the newest record of each.
    pub fn previous(&self) -> &BTreeMap<String, StageRecord> {
        self.previous.get_or_init(|| {
            let mut seen = BTreeMap::new();
            let records = self.workspace.history.latest(&self.units.pipeline.path).take(8);
            for record in
                records.flat_map(|RunRecord { stages, .. }| stages).filter(|stage| stage.key.is_some())
            {
                seen.entry(record.unit.clone()).or_insert(record);
            }
            seen
        })
    }
}
