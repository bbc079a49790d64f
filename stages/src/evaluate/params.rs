//! The parameters of `evaluate`, and the files that they name.

use super::batch::BatchSize;
use super::goal::{Goal, Goals};
use super::graph::{self, Graphs};
use super::segment;
use super::text::TextParams;
use crate::images::dataset::{self, DatasetSpec, Decoding, Subset};
use crate::images::preprocess::{Preprocess, PreprocessError};
use crate::images::tasks::{self, Task};
use crate::kind::{SourceFile, SourceSet};
use crate::params::{FilePath, Params, PathOr, Problem, Span, did_you_mean, parse, to_value};
use crate::segmentation::dataset as masks;
use crate::segmentation::prompt::PromptKind;
use crate::{Job, StageError};
use indexmap::IndexMap;
use merganser_cache::Value;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The metrics that can have goals: those that are stored.
const METRICS: &[&str] = &["accuracy", "top5"];

const PREPROCESSOR_CONFIG: &str = "preprocessor_config.json";

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct EvaluateParams {
    /// The ONNX export that the weights are bound into; of CLIP `{ vision, text }` where text is needed; of a model that segments `{ encoder, decoder }`.
    /// Not for a model that is a graph.
    #[serde(default)]
    pub graph: Graphs,
    /// The graph's input for images; needed only if it has several.
    #[serde(default)]
    pub input: Option<String>,
    /// The graph's output: embeddings (with a head) or logits; needed only if it has several.
    #[serde(default)]
    pub output: Option<String>,
    /// The datasets by task name.
    pub dataset: IndexMap<String, DatasetParams>,
    /// A `preprocessor_config.json`, or its contents as a table (default: the file beside the graph).
    #[serde(default)]
    preprocess: Option<PathOr<PreprocessTable>>,
    /// Images per inference; `auto` takes the fastest size that changes no logit against 64.
    #[serde(default)]
    pub batch_size: BatchSize,
    /// How heads are made of class names, where a dataset has `templates`: `tokenizer`, `weights` (`model` or `origin`), `scale`, `context`, `output`.
    #[serde(default, skip_serializing_if = "TextParams::is_default")]
    pub text: TextParams,
    /// What scores have to reach, by metric: `goal.accuracy = { min = 85, max_drop = 0.5 }`, in percent. A run whose scores do not ends with exit code 3.
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    pub goal: Goals,
    /// Whether every member of a collection is scored on every dataset, not only on its own.
    #[serde(default)]
    pub cross: bool,
}

/// Keys as in Hugging Face's `preprocessor_config.json`.
type PreprocessTable = IndexMap<String, serde_json::Value>;

#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DatasetParams {
    /// How the images are stored: `idx` (MNIST's format, gzipped or not), `folder` (one folder per class), `cifar` (binary), `npz` (MedMNIST,
    /// Keras), `parquet` (the Hugging Face hub), `webdataset` (tar archives), `list` (CSV or JSON lines) or `svhn` (MATLAB); of
    /// masks `sa1b` (SA-1B), `mask-png` (folders `images` and `masks`), `davis` or `sa-v` (SA-V).
    pub format: String,
    /// `idx`: the file of images; `list`: the folder that its paths are relative to (default: that of the list).
    #[serde(default)]
    images: Option<FilePath>,
    /// `idx`: the file of labels.
    #[serde(default)]
    labels: Option<FilePath>,
    /// `folder`: the folder that holds one folder per class; `npz`, `list`: the file; others: a file, or a folder of them, or a pattern of files
    /// (`webdataset`).
    #[serde(default)]
    pub path: Option<FilePath>,
    /// With `path`, the part that is meant, such as `test`: a folder inside it (`folder`), files (`cifar`, `parquet`, `webdataset`, `svhn`), arrays
    /// (`npz`) or rows (`list`).
    #[serde(default)]
    pub split: Option<String>,
    /// Class names in label order (`folder`: default the folders' names, sorted; `parquet`: those of its metadata).
    #[serde(default)]
    classes: Option<Vec<String>>,
    /// Use this many images: evenly from the classes (`folder`), or the first.
    #[serde(default)]
    limit: Option<u64>,
    /// What an image does that cannot be decoded: `fail` stops, `skip` leaves it out of the scores, and counts it.
    #[serde(default)]
    pub(super) on_error: OnError,
    /// The training images of the models, with the same keys as far as they differ (`{ split = "train" }`): images that are scored and are also
    /// among these are counted, with a warning.
    #[serde(default)]
    train: Option<Place>,
    /// Use `n` images chosen by `seed`; `balanced` takes equally many of every class.
    #[serde(default)]
    subset: Option<SubsetParams>,
    /// Whether images are turned as their Exif orientation says; Pillow, torchvision and transformers do not do so by themselves.
    #[serde(default)]
    exif_orientation: bool,
    /// A file with `weight` [classes, features] and optionally `bias` [classes], or with the classifier of a transformers or timm checkpoint; without it the graph's output is the logits.
    #[serde(default)]
    head: Option<FilePath>,
    /// Sentences with `{}` for the class name, or a JSON file of them: the head is made of them by the text export.
    #[serde(default)]
    templates: Option<PathOr<Vec<String>>>,
    /// A task of the literature, such as `dtd`: the head is made of its class names and prompts by the text export (`merganser tasks` lists them).
    #[serde(default)]
    task: Option<String>,
    /// Whether the features are L2-normalized before the head (default: as CLIP does, and not before a classifier of transformers or timm).
    #[serde(default)]
    pub normalize: Option<bool>,
    /// Of masks, what a model is told about an object, each alone (default: both).
    #[serde(default)]
    pub prompts: Option<Vec<PromptKind>>,
    /// Whether prompts follow from the masks even where the dataset has some of its own.
    #[serde(default)]
    pub derived_prompts: bool,
    /// Whether the best of several masks by predicted IoU is taken, or the one for clear prompts (default: the best of several for a point, the one
    /// for clear prompts for a box if the decoder gives it).
    #[serde(default)]
    pub multimask: Option<bool>,
    /// Overrides the stage's `preprocess` for this dataset.
    #[serde(default)]
    preprocess: Option<PathOr<PreprocessTable>>,
}

/// A seeded choice of images.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SubsetParams {
    /// How many images.
    n: u64,
    /// Which ones: a larger subset of the same seed contains the smaller.
    #[serde(default)]
    seed: u64,
    /// Whether every class gets equally many.
    #[serde(default)]
    balanced: bool,
}

/// What an image does that cannot be decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum OnError {
    #[default]
    Fail,
    Skip,
}

/// Where other images of a task lie, as far as it is not where those of the dataset are.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Place {
    /// As `format` of the dataset.
    #[serde(default)]
    pub format: Option<String>,
    /// As `images` of the dataset.
    #[serde(default)]
    pub images: Option<FilePath>,
    /// As `labels` of the dataset.
    #[serde(default)]
    pub labels: Option<FilePath>,
    /// As `path` of the dataset.
    #[serde(default)]
    pub path: Option<FilePath>,
    /// As `split` of the dataset.
    #[serde(default)]
    pub split: Option<String>,
}

impl EvaluateParams {
    /// What a stage of another kind takes that evaluates models on the way.
    pub(crate) const KEYS: &[&str] =
        &["graph", "input", "output", "dataset", "preprocess", "batch_size", "text"];

    /// Parses such a stage's table of these keys, reporting every mistake.
    pub(crate) fn parse(params: &Params<'_>) -> Result<Self, Vec<Problem>> {
        let parsed: Self = parse(params)?;
        let problems = parsed.mistakes(params.span);
        if problems.is_empty() { Ok(parsed) } else { Err(problems) }
    }

    /// Mistakes in such a stage's keys that types do not catch.
    pub(crate) fn mistakes(&self, span: Span) -> Vec<Problem> {
        let mut problems = self.problems(span);
        if self.graph == Graphs::Own {
            problems.push(Problem::new("missing-key", "missing key `graph`").at(span));
        }
        if matches!(self.graph, Graphs::Segmenter { .. }) {
            let message = "models that segment are scored by `evaluate` only";
            problems.push(Problem::new("bad-value", message).at(span));
        }
        problems
    }

    /// Adds these keys to the documentation of such a stage's own parameters, where `when` says when they are meant.
    pub(crate) fn document(mut parameters: Schema, when: &str) -> Schema {
        let mut own = schema_for!(Self);
        for section in ["properties", "$defs"] {
            let Some(Json::Object(mut ours)) = own.ensure_object().remove(section) else { continue };
            let theirs = parameters.ensure_object().entry(section).or_insert_with(|| serde_json::json!({}));
            let Some(theirs) = theirs.as_object_mut() else { continue };
            if section == "properties" {
                // A key that means something else there stays as it is.
                ours.retain(|key, _| Self::KEYS.contains(&key.as_str()) && !theirs.contains_key(key));
                for property in ours.values_mut() {
                    if let Some(Json::String(text)) = property.get_mut("description") {
                        text.insert_str(0, when);
                    }
                }
            }
            theirs.extend(ours);
        }
        parameters
    }

    /// The same with every dataset's images taken from another place.
    pub(crate) fn elsewhere(&self, place: &Place) -> Self {
        let dataset = self.dataset.iter().map(|(task, dataset)| (task.clone(), dataset.elsewhere(place)));
        Self { dataset: dataset.collect(), ..self.clone() }
    }

    /// The files of a task's images.
    pub(crate) fn image_files(&self, parameter: &str, task: &str) -> Result<SourceSet, StageError> {
        dataset_files(parameter, &self.dataset[task].spec(task))
    }

    /// The tasks that have a dataset.
    pub(crate) fn tasks(&self) -> impl Iterator<Item = &str> {
        self.dataset.keys().map(String::as_str)
    }

    /// Mistakes that types do not catch.
    pub(super) fn problems(&self, span: Span) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut complain = |code, message: String, help: Option<String>| {
            problems.push(Problem { help, ..Problem::new(code, message).at(span) });
        };
        if self.dataset.is_empty() {
            complain("missing-dataset", "`evaluate` needs at least one `dataset.<task>`".to_owned(), None);
        }
        if self.text.scale.is_some_and(|scale| !(scale > 0.0 && scale.is_finite())) {
            complain("bad-value", "`text.scale` must be a positive number".to_owned(), None);
        }
        if self.text.context.is_some_and(|context| context < 2) {
            complain(
                "bad-value",
                "`text.context` must be at least 2: a text has a first and a last token".to_owned(),
                None,
            );
        }
        let segments = matches!(self.graph, Graphs::Segmenter { .. });
        if segments && self.output.is_some() {
            let message = "`output` goes with classifiers: the outputs of an encoder and a decoder are known";
            complain("unknown-key", message.to_owned(), None);
        }
        for (task, params) in &self.dataset {
            let tables = [&params.preprocess, &self.preprocess];
            if let Some(PathOr::Value(table)) = tables.into_iter().flatten().next()
                && let Err(error) = preprocess_of_table(table)
            {
                complain("bad-value", error.to_string(), None);
            }
            if params.limit == Some(0) {
                complain("bad-value", format!("dataset `{task}`: `limit` must be at least 1, got 0"), None);
            }
            params.mistakes_of_kind(task, segments, &mut complain);
            if segments {
                continue;
            }
            let known = dataset::FORMATS.iter().map(|format| format.id());
            let Some(format) = dataset::FORMATS.iter().find(|format| format.id() == params.format) else {
                let message = format!("dataset `{task}` has unknown format `{}`", params.format);
                let help = if masks::find(&params.format).is_some() {
                    Some(
                        "it holds masks: name both graphs, `graph = { encoder = …, decoder = … }`".to_owned(),
                    )
                } else {
                    did_you_mean(&params.format, known)
                };
                complain("bad-value", message, help);
                continue;
            };
            for (name, given) in params.paths() {
                let takes = format.paths().iter().find(|path| path.name == name);
                let (code, verb) = match takes {
                    None if given.is_some() => ("unknown-key", "takes no"),
                    Some(path) if path.required && given.is_none() => ("missing-key", "needs"),
                    _ => continue,
                };
                let message = format!("dataset `{task}`: format `{}` {verb} `{name}`", params.format);
                complain(code, message, None);
            }
            if params.split.is_some() && params.path.is_none() {
                complain("unknown-key", format!("dataset `{task}`: `split` goes with `path`"), None);
            }
            if let Some(name) = params.task.as_ref().filter(|_| params.literature().is_none()) {
                let message = format!("dataset `{task}`: there is no task `{name}` of the literature");
                let known = tasks::all().iter().map(|task| task.id.as_str());
                complain("bad-value", message, did_you_mean(name, known));
            }
            let made_of = if params.templates.is_some() { "templates" } else { "task" };
            if params.is_zero_shot() && params.head.is_some() {
                let message = format!("dataset `{task}` has both a `head` and `{made_of}` to make one of");
                complain("bad-value", message, None);
            }
            if params.is_zero_shot() && !self.graph.has_text() {
                let message =
                    format!("dataset `{task}`: to make a head of `{made_of}`, the text export is needed");
                let help = "name both: `graph = { vision = \"…\", text = \"…\" }`";
                complain("missing-key", message, Some(help.to_owned()));
            }
            if params.subset.is_some_and(|subset| subset.n == 0) {
                complain(
                    "bad-value",
                    format!("dataset `{task}`: `subset.n` must be at least 1, got 0"),
                    None,
                );
            }
            if params.subset.is_some() && params.limit.is_some() {
                complain(
                    "bad-value",
                    format!("dataset `{task}`: `limit` and `subset` exclude each other"),
                    None,
                );
            }
        }
        let metrics = if segments { segment::METRICS } else { METRICS };
        problems.extend(Goal::problems(&self.goal, metrics, span));
        problems
    }

    /// What of the parameters a task's pixels depend on, beside the contents of files.
    pub(super) fn pixels(&self, task: &str) -> Result<Value, StageError> {
        let dataset = &self.dataset[task];
        let table = match dataset.preprocess.as_ref().or(self.preprocess.as_ref()) {
            Some(PathOr::Value(table)) => to_value(table)?,
            _ => Value::Null,
        };
        Ok(Value::List(vec![Value::Text(task.to_owned()), to_value(dataset)?, table]))
    }

    /// What of the parameters a task's scores depend on.
    pub(crate) fn for_task(&self, task: &str) -> Result<Value, StageError> {
        let dataset = &self.dataset[task];
        let table = match dataset.preprocess.as_ref().or(self.preprocess.as_ref()) {
            Some(PathOr::Value(table)) => to_value(table)?,
            _ => Value::Null,
        };
        Ok(Value::Map(BTreeMap::from([
            ("task".to_owned(), Value::Text(task.to_owned())),
            ("input".to_owned(), to_value(&self.input)?),
            ("output".to_owned(), to_value(&self.output)?),
            ("batch_size".to_owned(), to_value(&self.batch_size)?),
            ("text".to_owned(), if dataset.is_zero_shot() { to_value(&self.text)? } else { Value::Null }),
            ("prompts".to_owned(), dataset.literature().map_or(Value::Null, prompts_value)),
            ("dataset".to_owned(), to_value(dataset)?),
            ("preprocess".to_owned(), table),
        ])))
    }

    /// The files behind a task's scores. Their number and order is the dataset's; what a folder says about labels is in the names.
    pub(crate) fn sources(&self, task: &str) -> Result<Vec<SourceSet>, StageError> {
        let dataset = &self.dataset[task];
        let mut sets = Vec::new();
        let is_used = |parameter: &str| parameter != graph::TEXT || dataset.is_zero_shot();
        for (parameter, graph) in self.graph.named().filter(|(parameter, _)| is_used(parameter)) {
            exists(parameter, &graph.path)?;
            sets.push(graph::files(parameter, graph));
        }
        if let Some(path) = self.preprocess_file(task)? {
            sets.push(SourceSet::one("preprocess", path));
        }
        if let Some(head) = &dataset.head {
            let parameter = format!("dataset.{task}.head");
            exists(&parameter, &head.path)?;
            sets.push(SourceSet::one("head", &head.path));
        }
        if dataset.is_zero_shot() {
            let text = self.graph.of_text().map_or(Path::new(""), |text| text.path.as_path());
            sets.push(self.text.tokenizer(text)?);
        }
        if let Some(PathOr::Path(file)) = &dataset.templates {
            exists(&format!("dataset.{task}.templates"), &file.path)?;
            sets.push(SourceSet::one("templates", &file.path));
        }
        for (name, path) in dataset.paths() {
            if let Some(path) = path
                && !dataset::is_pattern(&path.path)
            {
                exists(&format!("dataset.{task}.{name}"), &path.path)?;
            }
        }
        let files = match &self.graph {
            Graphs::Own | Graphs::Classifier { .. } => dataset_files("dataset", &dataset.spec(task))?,
            Graphs::Segmenter { .. } => dataset.files_of_masks()?,
        };
        sets.push(files);
        if let Some(train) = dataset.train_spec(task) {
            sets.push(dataset_files("train", &train)?);
        }
        Ok(sets)
    }

    /// The templates that are given for a task's class names.
    pub(super) fn templates(&self, task: &str, job: &Job<'_>) -> Result<Option<Vec<String>>, StageError> {
        match &self.dataset[task].templates {
            Some(PathOr::Value(templates)) => Ok(Some(templates.clone())),
            Some(PathOr::Path(file)) => {
                let json = job.read(job.source("templates")?)?;
                serde_json::from_slice(&json).map(Some).map_err(|error| {
                    StageError::input(format!("`{}` is not a JSON list of templates: {error}", file.written))
                })
            }
            None => Ok(None),
        }
    }

    /// The preprocessing of a task, `file` being the contents of the preprocessor file if it has one.
    pub(super) fn preprocess(&self, task: &str, file: Option<&[u8]>) -> Result<Preprocess, StageError> {
        match (self.dataset[task].preprocess.as_ref().or(self.preprocess.as_ref()), file) {
            (Some(PathOr::Value(table)), _) => Ok(preprocess_of_table(table)?),
            (_, Some(bytes)) => {
                let path = self.preprocess_file(task)?.unwrap_or_default().display().to_string();
                let value = serde_json::from_slice(bytes)
                    .map_err(|error| StageError::input(format!("`{path}` is not valid JSON: {error}")))?;
                Ok(Preprocess::from_value(&value, &path)?)
            }
            (_, None) => Err(StageError::Internal("no preprocessing was resolved".to_owned())),
        }
    }

    fn preprocess_file(&self, task: &str) -> Result<Option<PathBuf>, StageError> {
        match self.dataset[task].preprocess.as_ref().or(self.preprocess.as_ref()) {
            Some(PathOr::Value(_)) => Ok(None),
            Some(PathOr::Path(file)) => {
                exists("preprocess", &file.path)?;
                Ok(Some(file.path.clone()))
            }
            None => {
                const HELP: &str = "say how images are prepared: `preprocess = \"path/to/preprocessor_config.json\"`, or a table";
                let Some(graph) = self.graph.of_images() else {
                    let message = "a model that is a graph does not say how images are prepared";
                    return Err(StageError::input_help(message, HELP));
                };
                let beside = graph.sibling(PREPROCESSOR_CONFIG);
                if beside.path.is_file() {
                    return Ok(Some(beside.path));
                }
                let message = format!("there is no `{PREPROCESSOR_CONFIG}` beside `{}`", graph.written);
                Err(StageError::input_help(message, HELP))
            }
        }
    }
}

impl DatasetParams {
    /// Whether its head is made of class names.
    pub(super) fn is_zero_shot(&self) -> bool {
        self.templates.is_some() || self.task.is_some()
    }

    /// The task of the literature that it is.
    pub(super) fn literature(&self) -> Option<&'static Task> {
        tasks::find(self.task.as_deref()?)
    }

    fn paths(&self) -> [(&'static str, Option<&FilePath>); 3] {
        [("images", self.images.as_ref()), ("labels", self.labels.as_ref()), ("path", self.path.as_ref())]
    }

    pub(super) fn limit(&self) -> Option<usize> {
        self.limit.map(|limit| usize::try_from(limit).unwrap_or(usize::MAX))
    }

    /// Parameters of datasets of one kind: name, whether given, whether they are about masks rather than labels.
    pub(super) fn particular(&self) -> [(&'static str, bool, bool); 13] {
        [
            ("images", self.images.is_some(), false),
            ("labels", self.labels.is_some(), false),
            ("classes", self.classes.is_some(), false),
            ("subset", self.subset.is_some(), false),
            ("exif_orientation", self.exif_orientation, false),
            ("on_error", self.on_error == OnError::Skip, false),
            ("train", self.train.is_some(), false),
            ("head", self.head.is_some(), false),
            ("templates", self.templates.is_some(), false),
            ("task", self.task.is_some(), false),
            ("prompts", self.prompts.is_some(), true),
            ("derived_prompts", self.derived_prompts, true),
            ("multimask", self.multimask.is_some(), true),
        ]
    }

    /// The training images, if they are named.
    pub(super) fn train_spec(&self, task: &str) -> Option<DatasetSpec> {
        let train = self.elsewhere(self.train.as_ref()?);
        Some(DatasetSpec { classes: None, ..train.spec(&format!("{task}.train")) })
    }

    /// The same with all images of another place.
    fn elsewhere(&self, place: &Place) -> Self {
        let Place { format, images, labels, path, split } = place;
        let moved = format.is_some() || images.is_some() || labels.is_some() || path.is_some();
        // Paths of another format say nothing.
        let or_ours = |theirs: &Option<FilePath>, ours: &Option<FilePath>| {
            theirs.clone().or_else(|| ours.clone().filter(|_| format.is_none()))
        };
        Self {
            format: format.clone().unwrap_or_else(|| self.format.clone()),
            images: or_ours(images, &self.images),
            labels: or_ours(labels, &self.labels),
            path: or_ours(path, &self.path),
            // A split of the one place says nothing about another.
            split: split.clone().or_else(|| self.split.clone().filter(|_| !moved)),
            limit: None,
            subset: None,
            train: None,
            ..self.clone()
        }
    }

    /// The dataset as its reader wants it.
    pub(super) fn spec(&self, task: &str) -> DatasetSpec {
        let paths = self.paths().into_iter();
        let paths = paths.filter_map(|(name, path)| Some((name.to_owned(), path?.path.clone())));
        DatasetSpec {
            name: task.to_owned(),
            format: self.format.clone(),
            paths: paths.collect(),
            split: self.split.clone(),
            classes: self.classes.clone(),
            limit: self.limit(),
            subset: self.subset.map(|SubsetParams { n, seed, balanced }| Subset {
                n: usize::try_from(n).unwrap_or(usize::MAX),
                seed,
                balanced,
            }),
            decoding: Decoding { exif_orientation: self.exif_orientation },
        }
    }
}

/// The files of a dataset, in its order.
fn dataset_files(parameter: &str, spec: &DatasetSpec) -> Result<SourceSet, StageError> {
    let files = dataset::files(spec)?.into_iter().map(|file| SourceFile {
        label: match file.label {
            Some(label) => format!("{} {label}", file.role),
            None => file.role.to_owned(),
        },
        path: file.path,
    });
    Ok(SourceSet { parameter: parameter.to_owned(), files: files.collect() })
}

/// Class names and prompts are part of the program: a key has to tell which ones.
fn prompts_value(task: &Task) -> Value {
    let facts = serde_json::to_vec(task).expect("names can be written");
    Value::Digest(blake3::hash(&facts))
}

fn preprocess_of_table(table: &PreprocessTable) -> Result<Preprocess, PreprocessError> {
    let value = serde_json::Value::Object(table.clone().into_iter().collect());
    Preprocess::from_value(&value, "preprocess")
}

pub(super) fn exists(parameter: &str, path: &Path) -> Result<(), StageError> {
    if path.exists() {
        return Ok(());
    }
    Err(StageError::MissingFile { parameter: parameter.to_owned(), path: path.to_owned() })
}
