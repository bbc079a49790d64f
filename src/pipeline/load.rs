//! Reads a pipeline file with its overrides and resolves it, or reports everything that is wrong with it.

use super::document::{self, Definition, Document, StageTable, SweptVariable, folder_of};
use super::order::{ReadStage, Unreadable};
use super::overrides::{self, Override};
use super::plan::{Instance, Pipeline};
use super::problems::Problems;
use super::resolve::resolve;
use super::source::Files;
use super::stage::{StageReader, bound_name};
use super::sweep::{Assignment, Axis, combinations};
use super::text::write_loose;
use super::vars::{self, Budget, Environment, Scope, Substitution, Variables};
use indexmap::IndexMap;
use merganser_stages::StageKind;
use merganser_stages::params::{Node, NodeValue, ParseContext, Problem, Remotes, did_you_mean};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

/// Why a pipeline could not be loaded: every mistake in it, and the texts that they are in.
#[derive(Debug)]
pub struct Failure {
    pub files: Files,
    /// In the order of files and positions; at least one.
    pub problems: Vec<Problem>,
}

/// Loads the pipeline file at `path`, with `--set` overrides, for the given stage kinds. What has an address is where `remotes` says.
pub fn load(
    path: &Path,
    overrides: &[String],
    kinds: &[&'static dyn StageKind],
    remotes: Option<Arc<dyn Remotes>>,
) -> Result<Pipeline, Failure> {
    let (mut files, mut problems) = (Files::default(), Problems::default());
    let document = document::read(path, &mut files, &mut problems);
    let overrides = overrides::read(overrides, &folder_of(path), &mut files, &mut problems);
    let pipeline = document.and_then(|document| {
        let Document { name, description, variables, stages, sweep, unreadable_stages } = document;
        let sources = Sources {
            variables,
            sweep,
            unreadable: Unreadable { stages: unreadable_stages, axes: HashSet::new() },
        };
        let context = ParseContext { folders: files.folders(), remotes, ..ParseContext::default() };
        let resolved =
            sources.apply(overrides, &mut problems).resolve(&stages, kinds, &context, &mut problems)?;
        let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        Some(Pipeline {
            name: name.or(stem).unwrap_or_default(),
            description,
            path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
            files: Files::default(),
            instances: resolved,
            warnings: Vec::new(),
            missing: BTreeMap::new(),
        })
    });
    match pipeline {
        Some(pipeline) if !problems.has_errors() => {
            Ok(Pipeline { files, warnings: problems.into_warnings(), ..pipeline })
        }
        _ => Err(Failure { files, problems: problems.into_errors() }),
    }
}

/// The values that stages are written with.
struct Sources {
    variables: IndexMap<String, Definition>,
    sweep: Vec<SweptVariable>,
    unreadable: Unreadable,
}

impl Sources {
    /// Puts the command line's values in place of the file's.
    fn apply(mut self, overrides: Vec<Override>, problems: &mut Problems) -> Self {
        for Override { name, name_span, mut values } in overrides {
            let Some(definition) = self.variables.get_mut(&name) else {
                let mut problem =
                    Problem::new("unknown-variable", format!("unknown variable `{name}`")).at(name_span);
                problem.help = did_you_mean(&name, self.variables.keys().map(String::as_str))
                    .or_else(|| Some("the pipeline has no `[vars]` to set".to_owned()));
                problems.error(problem);
                continue;
            };
            let span = values.first().map_or(name_span, |first| first.span);
            if let Some(swept) = self.sweep.iter_mut().find(|swept| swept.name == name) {
                *swept = SweptVariable { name, name_span, span, values };
            } else if values.len() > 1 {
                self.sweep.push(SweptVariable { name, name_span, span, values });
            } else if let Some(node) = values.pop() {
                definition.node = node;
            }
        }
        self
    }

    fn resolve(
        mut self,
        stages: &[StageTable],
        kinds: &[&'static dyn StageKind],
        context: &ParseContext,
        problems: &mut Problems,
    ) -> Option<Vec<Instance>> {
        let mut budget = Budget::default();
        self.check_axis_names(problems);
        let axis_names: Vec<String> = self.sweep.iter().map(|swept| swept.name.clone()).collect();
        let mut mentioned: Vec<String> =
            self.sweep.iter().flat_map(|swept| &swept.values).flat_map(vars::mentions).collect();
        let variables = Variables::new(self.variables, &axis_names, problems);
        let axes = axes(&self.sweep, &variables, &mut budget, problems);
        for axis in axes.iter().filter(|axis| axis.is_stand_in) {
            self.unreadable.axes.insert(axis.axis.name.clone());
        }
        let axes: Vec<Axis> = axes.into_iter().map(|axis| axis.axis).collect();
        let mut environments: HashMap<Assignment, Environment> = HashMap::new();
        let mut read_stages = Vec::with_capacity(stages.len());
        for stage in stages {
            let bound = bound_name(&stage.table);
            let node = Node { span: stage.name_span, value: NodeValue::Table(stage.table.clone()) };
            let uses: Vec<String> =
                vars::mentions(&node).into_iter().filter(|name| bound != Some(name.as_str())).collect();
            mentioned.extend(uses.iter().cloned());
            let own_axes = variables.axes_of(uses.iter());
            let Some(assignments) = combinations(&axes, &own_axes, problems) else {
                read_stages.push(ReadStage { table: stage, variants: Vec::new(), is_incomplete: true });
                continue;
            };
            let mut variants = Vec::with_capacity(assignments.len());
            for assignment in assignments {
                let environment = environments
                    .entry(assignment.clone())
                    .or_insert_with(|| variables.environment(&assignment, &axes, &mut budget, problems));
                let mut reader =
                    StageReader { kinds, variables: &variables, context, budget: &mut budget, problems };
                variants.push(reader.read(stage, &assignment, environment));
            }
            read_stages.push(ReadStage { table: stage, variants, is_incomplete: false });
        }
        // Mistakes in variables that no stage uses are mistakes too.
        environments
            .entry(Assignment::none(axes.len()))
            .or_insert_with_key(|none| variables.environment(none, &axes, &mut budget, problems));
        variables.warn_of_unused(mentioned, problems);
        resolve(&read_stages, &axes, &self.unreadable, problems)
    }

    /// Leaves out axes that are no variables.
    fn check_axis_names(&mut self, problems: &mut Problems) {
        let (variables, unreadable) = (&self.variables, &mut self.unreadable);
        self.sweep.retain(|swept| {
            if variables.contains_key(&swept.name) {
                return true;
            }
            let message = format!("cannot sweep over `{}`, which is no variable", swept.name);
            let mut problem = Problem::new("unknown-variable", message).at(swept.name_span);
            problem.help = did_you_mean(&swept.name, variables.keys().map(String::as_str))
                .or_else(|| Some(format!("give it a value in `[vars]`: `{} = …`", swept.name)));
            problems.error(problem);
            unreadable.axes.insert(swept.name.clone());
            false
        });
    }
}

struct CheckedAxis {
    axis: Axis,
    /// Whether its values could not be read, and one that was never written holds its place.
    is_stand_in: bool,
}

/// Computes the values of the axes; those with mistakes get a stand-in so that stages can be read all the same.
fn axes(
    sweep: &[SweptVariable],
    variables: &Variables,
    budget: &mut Budget,
    problems: &mut Problems,
) -> Vec<CheckedAxis> {
    let none = Assignment::none(sweep.len());
    let environment = variables.environment(&none, &[], budget, problems);
    let mut axes = Vec::with_capacity(sweep.len());
    for swept in sweep {
        let mut values: Vec<NodeValue> = Vec::new();
        let mut seen = HashSet::new();
        let mut is_sound = true;
        for node in &swept.values {
            let scope = Scope { variables, environment: &environment, bound: None };
            let mut substitution = Substitution::new(scope, budget, problems);
            let value = substitution.node(node).value;
            if substitution.is_broken {
                is_sound = false;
            } else if seen.insert(write_loose(&value)) {
                values.push(value);
            } else {
                let message = format!("`{}` is swept over {} twice", swept.name, write_loose(&value));
                problems.error(Problem::new("bad-sweep", message).at(node.span));
                is_sound = false;
            }
        }
        if swept.values.is_empty() {
            let message = format!("`{}` is swept over no values", swept.name);
            problems.error(
                Problem::new("bad-sweep", message).at(swept.span).help("leave it out, or give it values"),
            );
            is_sound = false;
        }
        if !is_sound && values.is_empty() {
            values.extend(variables.definition(&swept.name).map(|definition| definition.node.value.clone()));
        }
        let axis = Axis { name: swept.name.clone(), name_span: swept.name_span, values };
        axes.push(CheckedAxis { axis, is_stand_in: !is_sound });
    }
    axes
}
