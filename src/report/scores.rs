//! The result of a run: scores collected from evaluations, and the table that ends it.

use super::{Align, Table, bytes, ratio, stored};
use crate::engine::{GoalRecord, Pace, Resolver, RunOutcome, ScoreRecord, SeenRecord, UnitId, UnitOutcome};
use indexmap::{IndexMap, IndexSet};
use merganser_stages::{Content, SEEN, ScoreRow, Scores, Seen};
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

/// The port of `evaluate` that holds what is scored.
const MODEL_PORT: &str = "model";

/// Reads the scores of all evaluations that ended well.
pub fn collect(resolver: &Resolver<'_>, outcome: &RunOutcome) -> Vec<ScoreRecord> {
    let units = &resolver.units;
    let artifacts = artifacts(outcome);
    let evaluated = outcome.units.iter().filter_map(|unit| Some((unit, read(resolver, unit)?)));
    evaluated
        .flat_map(|(unit, (model, scores))| {
            let instance = units.instance(unit.id);
            let seen = seen(resolver, &artifacts, model);
            let images = scores.images.clone();
            let seen = move |task: &str| {
                let all = seen.iter().flat_map(|seen| seen.all().map(move |(name, own)| (seen, name, own)));
                let own = all.filter(|(_, name, _)| *name == task);
                own.map(|(seen, _, own)| SeenRecord {
                    labels: seen.labels,
                    scored: images.as_ref().is_some_and(|images| images.manifest == own.manifest),
                })
                .reduce(|a, b| SeenRecord { labels: a.labels || b.labels, scored: a.scored || b.scored })
            };
            scores.rows.into_iter().map(move |row| ScoreRecord {
                stage: instance.stage.clone(),
                vars: instance.vars.clone(),
                model: units.instance(model).stage.clone(),
                member: units.entries[model].member.clone(),
                seen: seen(&row.task),
                row,
            })
        })
        .collect()
}

fn artifacts(outcome: &RunOutcome) -> HashMap<UnitId, blake3::Hash> {
    outcome.units.iter().filter_map(|unit| Some((unit.id, unit.artifact?))).collect()
}

/// The images that a model was made with, on its whole way from files.
fn seen(resolver: &Resolver<'_>, artifacts: &HashMap<UnitId, blake3::Hash>, model: UnitId) -> Vec<Seen> {
    let store = &resolver.workspace.store;
    let read = |unit: UnitId| {
        let artifact = store.load_artifact(artifacts.get(&unit)?).ok()?;
        let blob = artifact.blobs.iter().find(|blob| blob.name == SEEN)?;
        let file = store.open_blob(&blob.digest, blob.size).ok()?;
        Seen::from_json(&fs_err::read(&file.path).ok()?)
    };
    let mut open = BTreeSet::from([model]);
    let mut found = Vec::new();
    // A unit's inputs have smaller numbers: each is looked at once.
    while let Some(unit) = open.pop_last() {
        found.extend(read(unit));
        open.extend(resolver.units.entries[unit].inputs.iter().map(|input| input.from));
    }
    found
}

/// The goals that evaluations did not meet, whether they ran or were cached.
pub fn missed_goals(resolver: &Resolver<'_>, outcome: &RunOutcome) -> Vec<GoalRecord> {
    let units = &resolver.units;
    let missed = outcome.units.iter().filter_map(|unit| {
        let goals = units.stage(unit.id).goals().filter(|goals| !goals.is_empty())?;
        let (_, scores) = read(resolver, unit)?;
        Some((unit.id, merganser_stages::missed(goals, &scores)))
    });
    let records = missed.flat_map(|(id, missed)| {
        missed.into_iter().map(move |missed| GoalRecord {
            unit: units.entries[id].name.to_string(),
            stage: units.instance(id).stage.clone(),
            vars: units.instance(id).vars.clone(),
            missed,
        })
    });
    records.collect()
}

/// The scores of an evaluation, and the unit whose output was scored.
fn read(resolver: &Resolver<'_>, unit: &UnitOutcome) -> Option<(UnitId, Scores)> {
    let units = &resolver.units;
    let artifact = unit.artifact.filter(|_| units.instance(unit.id).content == Content::Scores)?;
    let model = units.entries[unit.id].inputs.iter().find(|input| input.port == MODEL_PORT)?.from;
    let stored = resolver.workspace.store.load_artifact(&artifact).ok()?;
    Some((model, Scores::from_json(&stored.manifest)?))
}

/// Models by tasks: accuracy in percent, measured bytes, compression against single precision. Empty if nothing was evaluated.
pub fn table(resolver: &Resolver<'_>, outcome: &RunOutcome) -> String {
    let units = &resolver.units;
    let artifacts = artifacts(outcome);
    let mut tasks: IndexSet<String> = IndexSet::new();
    let mut models: IndexMap<usize, HashMap<String, f64>> = IndexMap::new();
    let mut paces: HashMap<usize, Pace> = HashMap::new();
    let mut made_with: IndexMap<usize, BTreeSet<Made>> = IndexMap::new();
    let evaluated = outcome.units.iter().filter_map(|unit| Some((unit, read(resolver, unit)?)));
    for (unit, (model, scores)) in evaluated {
        if let Some(pace) = unit.pace {
            let sum = paces.entry(units.entries[model].instance).or_insert(Pace { images: 0, seconds: 0.0 });
            *sum = Pace { images: sum.images + pace.images, seconds: sum.seconds + pace.seconds };
        }
        for seen in seen(resolver, &artifacts, model) {
            for (name, own) in seen.all() {
                let scored = scores.images.as_ref().is_some_and(|images| images.manifest == own.manifest);
                let made = Made { labels: seen.labels, scored, name: name.to_owned() };
                // Of a dataset that others are scored on, this score says nothing.
                if scored || scores.rows.iter().any(|row| row.task == name) {
                    made_with.entry(units.entries[model].instance).or_default().insert(made);
                }
            }
        }
        for (column, value) in scores.rows.iter().filter_map(|row| Some((column(row)?, row.value))) {
            tasks.insert(column.clone());
            models.entry(units.entries[model].instance).or_default().insert(column, value);
        }
    }
    if models.is_empty() {
        return String::new();
    }
    models.sort_keys();
    // How fast models are is asked where they run as different graphs.
    let is_graph = |instance: &usize| units.pipeline.instances[*instance].content == Content::Graph;
    let with_pace = models.keys().any(is_graph);
    let mut columns = vec![("model".to_owned(), Align::Left)];
    let numbers = ["mean", "bytes", "ratio"].into_iter().chain(with_pace.then_some("images/s"));
    columns.extend(tasks.iter().cloned().chain(numbers.map(str::to_owned)).map(|name| (name, Align::Right)));
    let mut table = Table::new(&columns);
    for (instance, accuracies) in &models {
        let mut cells = vec![units.pipeline.instances[*instance].label.clone()];
        cells.extend(
            tasks.iter().map(|task| accuracies.get(task).map_or_else(String::new, |value| percent(*value))),
        );
        // In one order, and of all tasks or none: a mean of some would be compared with means of all.
        let sum: Option<f64> = tasks.iter().map(|task| accuracies.get(task)).sum();
        cells.push(sum.map_or_else(String::new, |sum| percent(sum / tasks.len() as f64)));
        match stored(resolver, *instance, &artifacts) {
            Some(kept) => cells.extend([bytes(kept.bytes), ratio(kept.ratio())]),
            None => cells.extend([String::new(), String::new()]),
        }
        if with_pace {
            let pace = paces.get(instance);
            cells.push(
                pace.map_or_else(String::new, |pace| format!("{:.0}", pace.images as f64 / pace.seconds)),
            );
        }
        table.row(cells);
    }
    let accuracy = if tasks.iter().all(|column| column.ends_with(" point") || column.ends_with(" box")) {
        "mean IoU"
    } else {
        "accuracy"
    };
    let of_pace = if with_pace { "; images/s with preprocessing, when they were evaluated" } else { "" };
    made_with.sort_keys();
    let label = |instance: &usize| &units.pipeline.instances[*instance].label;
    let notes: Vec<String> =
        made_with.iter().map(|(instance, made)| format!("{} {}\n", label(instance), listed(made))).collect();
    let notes = notes.concat();
    format!(
        "\n{table}\n{accuracy} in %; bytes as measured for all experts of a row; ratio to the same experts in single precision{of_pace}\n{notes}"
    )
}

/// Images of a scored dataset that a model was made with.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Made {
    labels: bool,
    /// Whether they are the very images that are scored.
    scored: bool,
    name: String,
}

/// Says what a model has seen of the datasets that it is scored on.
fn listed(made: &BTreeSet<Made>) -> String {
    let made: Vec<&Made> = made.iter().collect();
    let groups = made.chunk_by(|a, b| (a.labels, a.scored) == (b.labels, b.scored)).map(|group| {
        let names: Vec<&str> = group.iter().map(|made| made.name.as_str()).collect();
        let labels = if group[0].labels { "with" } else { "without" };
        let scored = if group[0].scored { "the scored images" } else { "images" };
        format!("{scored} of {}, {labels} their labels", names.join(", "))
    });
    format!("was made with {}", groups.collect::<Vec<_>>().join("; "))
}

/// The column of what the table shows: the accuracy of a task, or the mean IoU for each kind of prompt.
fn column(row: &ScoreRow) -> Option<String> {
    match row.metric.strip_suffix("_miou") {
        Some(prompt) => Some(format!("{} {prompt}", row.task)),
        None => (row.metric == "accuracy").then(|| row.task.clone()),
    }
}

fn percent(value: f64) -> String {
    format!("{:.2}", value * 100.0)
}

/// One line about what to try next: a value of a swept var that this run does not have.
pub fn next_step(resolver: &Resolver<'_>, file: &Path) -> String {
    let mut axes: IndexMap<&str, Vec<&serde_json::Value>> = IndexMap::new();
    for instance in &resolver.units.pipeline.instances {
        for (name, value) in &instance.vars {
            let seen = axes.entry(name).or_default();
            if !seen.contains(&value) {
                seen.push(value);
            }
        }
    }
    let untried = axes.iter().find_map(|(name, values)| {
        let whole: Vec<i64> = values.iter().map(|value| value.as_i64()).collect::<Option<_>>()?;
        // Between values that work there is one that works; beyond them, nobody knows.
        let (low, high) = (*whole.iter().min()?, *whole.iter().max()?);
        let next = (low + 1..high).find(|value| !whole.contains(value))?;
        Some(format!("{name}={next}"))
    });
    let file = file.display();
    match untried {
        Some(set) => format!("next: `merganser run {file} --set {set}` runs only what depends on it\n"),
        None => format!("next: edit {file} and run it again; `merganser plan {file}` tells what will run\n"),
    }
}
