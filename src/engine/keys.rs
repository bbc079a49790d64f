//! From a unit and the artifacts it consumes to its key. Planning and running both come through here, so they cannot disagree.

use super::units::{UnitEntry, UnitId, Units};
use super::workspace::Workspace;
use blake3::Hash;
use merganser_cache::{Preimage, Source, Value};
use merganser_stages::{JobInput, JobSource, Problem, SourceSet, StageError};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The files of every unit, listed before anything is read; one that is missing is a problem of its stage, unless `was_seen` knows what
/// it held: then it is as good as there while nobody reads it.
pub fn list_sources(
    units: &Units<'_>,
    needed: &[bool],
    was_seen: &dyn Fn(&Path) -> bool,
) -> Result<Vec<Vec<SourceSet>>, Vec<Problem>> {
    let mut problems: Vec<Problem> = Vec::new();
    let sources = (0..units.entries.len())
        .map(|id| {
            // What is not downloaded yet cannot be looked at; whoever needs it says so.
            if !needed[id] || units.missing(id).is_some() {
                return Vec::new();
            }
            let listed = units.stage(id).sources(&units.entries[id].unit);
            listed.and_then(|sets| refuse_missing(sets, was_seen)).unwrap_or_else(|error| {
                let instance = units.instance(id);
                let message = format!("stage `{}`: {error}", units.entries[id].name);
                let problem = Problem {
                    help: error.help(),
                    ..Problem::new(error.code(), message).at(instance.kind_span)
                };
                if !problems.contains(&problem) {
                    problems.push(problem);
                }
                Vec::new()
            })
        })
        .collect();
    if problems.is_empty() { Ok(sources) } else { Err(problems) }
}

/// Longer lists are of folders that have just been read.
fn refuse_missing(
    sets: Vec<SourceSet>,
    was_seen: &dyn Fn(&Path) -> bool,
) -> Result<Vec<SourceSet>, StageError> {
    for set in sets.iter().filter(|set| set.files.len() <= LISTED_FILES) {
        if let Some(file) = set.files.iter().find(|file| !file.path.exists() && !was_seen(&file.path)) {
            let (parameter, path) = (set.parameter.clone(), file.path.clone());
            return Err(StageError::MissingFile { parameter, path });
        }
    }
    Ok(sets)
}

/// Digests taken in this process, by path. Every unit of a run sees a file as it was when the run first looked at it; a unit that
/// reads a file fails if it has changed since.
#[derive(Default)]
pub struct Digests(Mutex<HashMap<PathBuf, Source>>);

impl Digests {
    fn of(&self, workspace: &Workspace, path: &Path, hashing: &dyn Hashing) -> Result<Source, StageError> {
        if let Some(source) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(path) {
            return Ok(*source);
        }
        let total = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
        let digest = match workspace.store.digest_file(path, &|done| hashing(path, done, total)) {
            Err(error) if !path.exists() => workspace.store.last_digest(path).ok_or(error)?,
            digest => digest?,
        };
        let source = Source { digest: digest.digest, size: digest.size };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned(), source);
        Ok(source)
    }
}

/// Called with a path, bytes hashed and bytes to hash.
pub trait Hashing: Fn(&Path, u64, u64) + Sync {}

impl<F: Fn(&Path, u64, u64) + Sync> Hashing for F {}

/// Key values beyond this many files are replaced by their digest: a key must stay readable and small for a folder of 50 000 images.
const LISTED_FILES: usize = 16;

fn summarized(contents: Vec<Value>) -> Value {
    if contents.len() <= LISTED_FILES {
        return Value::List(contents);
    }
    let n_files = contents.len() as i64;
    let mut encoded = Vec::new();
    Value::List(contents).encode(&mut encoded);
    let digest = blake3::derive_key("merganser 2026-11 list of files in a key v1", &encoded);
    Value::Map(BTreeMap::from([
        ("files".to_owned(), Value::Int(n_files)),
        ("digest".to_owned(), Value::Digest(Hash::from_bytes(digest))),
    ]))
}

/// A unit ready to be looked up or run.
pub struct Resolved {
    pub preimage: Preimage,
    pub inputs: Vec<JobInput>,
    pub sources: Vec<JobSource>,
}

/// The part of the key that does not depend on other stages: kind, version, parameters, file contents, environment.
pub fn operation(
    workspace: &Workspace,
    units: &Units<'_>,
    id: UnitId,
    sources: &[SourceSet],
    digests: &Digests,
    hashing: &dyn Hashing,
) -> Result<(Value, Vec<JobSource>), StageError> {
    let stage = units.stage(id);
    let mut opened = Vec::new();
    let mut files = BTreeMap::new();
    for set in sources {
        let mut contents = Vec::with_capacity(set.files.len());
        for file in &set.files {
            let source = digests.of(workspace, &file.path, hashing)?;
            let mut content = BTreeMap::from([("digest".to_owned(), Value::Digest(source.digest))]);
            if !file.label.is_empty() {
                content.insert("name".to_owned(), Value::Text(file.label.clone()));
            }
            contents.push(Value::Map(content));
            opened.push(JobSource {
                parameter: set.parameter.clone(),
                label: file.label.clone(),
                path: file.path.clone(),
                source,
            });
        }
        if files.insert(set.parameter.clone(), summarized(contents)).is_some() {
            let message = format!(
                "two sets of files are called `{}`: one would be missing from the key",
                set.parameter
            );
            return Err(StageError::Internal(message));
        }
    }
    let operation = Value::Map(BTreeMap::from([
        ("kind".to_owned(), Value::Text(units.instance(id).kind.id().to_owned())),
        ("version".to_owned(), Value::Int(i64::from(stage.version()))),
        ("parameters".to_owned(), stage.parameters(&units.entries[id].unit)?),
        ("files".to_owned(), Value::Map(files)),
        ("environment".to_owned(), stage.environment(&workspace.services)?),
    ]));
    Ok((operation, opened))
}

/// The part of the key that names the artifacts consumed: by content digest, with member names where a whole collection is taken.
pub fn inputs(entry: &UnitEntry, artifact_of: impl Fn(UnitId) -> Hash) -> (Value, Vec<JobInput>) {
    let mut ports: BTreeMap<String, Value> = BTreeMap::new();
    let mut job_inputs = Vec::with_capacity(entry.inputs.len());
    for input in &entry.inputs {
        let artifact = artifact_of(input.from);
        job_inputs.push(JobInput { port: input.port.clone(), member: input.member.clone(), artifact });
        if !input.whole {
            ports.insert(input.port.clone(), Value::Digest(artifact));
            continue;
        }
        let member = Value::Map(BTreeMap::from([
            ("member".to_owned(), Value::Text(input.member.clone().unwrap_or_default())),
            ("artifact".to_owned(), Value::Digest(artifact)),
        ]));
        match ports.entry(input.port.clone()).or_insert_with(|| Value::List(Vec::new())) {
            Value::List(members) => members.push(member),
            _ => unreachable!("a port holds a collection or a single artifact, not both"),
        }
    }
    (Value::Map(ports), job_inputs)
}
