//! The parameters of `evaluate`, and the files that they name.

use super::graph::{self, Graphs};
use crate::StageError;
use crate::images::dataset::{self, DatasetSpec, Decoding, Subset};
use crate::images::preprocess::{Preprocess, PreprocessError};
use crate::kind::{SourceFile, SourceSet};
use crate::params::{FilePath, Params, PathOr, Problem, Span, did_you_mean, parse, to_value};
use indexmap::IndexMap;
use merganser_cache::Value;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::PathBuf;

const PREPROCESSOR_CONFIG: &str = "preprocessor_config.json";

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct EvaluateParams {
    /// The ONNX export that the weights are bound into; of CLIP `{ vision, text }` where text is needed; of a model that segments `{ encoder, decoder }`.
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
    /// Images per inference.
    #[serde(default = "default_batch_size")]
    pub batch_size: u32,
    /// Whether every member of a collection is scored on every dataset, not only on its own.
    #[serde(default)]
    pub cross: bool,
}

/// Keys as in Hugging Face's `preprocessor_config.json`.
type PreprocessTable = IndexMap<String, serde_json::Value>;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DatasetParams {
    /// How the images are stored: `idx` (MNIST's format, gzipped or not), `folder` (one folder per class), `cifar` (binary), `npz` (MedMNIST,
    /// Keras), `parquet` (the Hugging Face hub), `webdataset` (tar archives), `list` (CSV or JSON lines) or `svhn` (MATLAB).
    format: String,
    /// `idx`: the file of images; `list`: the folder that its paths are relative to (default: that of the list).
    #[serde(default)]
    images: Option<FilePath>,
    /// `idx`: the file of labels.
    #[serde(default)]
    labels: Option<FilePath>,
    /// `folder`: the folder that holds one folder per class; `npz`, `list`: the file; others: a file, or a folder of them, or a pattern of files
    /// (`webdataset`).
    #[serde(default)]
    path: Option<FilePath>,
    /// With `path`, the part that is meant, such as `test`: a folder inside it (`folder`), files (`cifar`, `parquet`, `webdataset`, `svhn`), arrays
    /// (`npz`) or rows (`list`).
    #[serde(default)]
    split: Option<String>,
    /// Class names in label order (`folder`: default the folders' names, sorted; `parquet`: those of its metadata).
    #[serde(default)]
    classes: Option<Vec<String>>,
    /// Use this many images: evenly from the classes (`folder`), or the first.
    #[serde(default)]
    limit: Option<u64>,
    /// Use `n` images chosen by `seed`; `balanced` takes equally many of every class.
    #[serde(default)]
    subset: Option<SubsetParams>,
    /// Whether images are turned as their Exif orientation says; Pillow, torchvision and transformers do not do so by themselves.
    #[serde(default)]
    exif_orientation: bool,
    /// Safetensors with `weight` [classes, features] and optionally `bias` [classes]; without it the graph's output is the logits.
    #[serde(default)]
    head: Option<FilePath>,
    /// Whether the features are L2-normalized before the head, as CLIP does.
    #[serde(default = "yes")]
    pub normalize: bool,
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

fn default_batch_size() -> u32 {
    64
}

fn yes() -> bool {
    true
}

impl EvaluateParams {
    /// What a stage of another kind takes that evaluates models on the way.
    pub(crate) const KEYS: &[&str] = &["graph", "input", "output", "dataset", "preprocess", "batch_size"];

    /// Parses such a stage's table of these keys, reporting every mistake.
    pub(crate) fn parse(params: &Params<'_>) -> Result<Self, Vec<Problem>> {
        let parsed: Self = parse(params)?;
        let problems = parsed.problems(params.span);
        if problems.is_empty() { Ok(parsed) } else { Err(problems) }
    }

    /// Adds these keys to the documentation of such a stage's own parameters, where `when` says when they are meant.
    pub(crate) fn document(mut parameters: Schema, when: &str) -> Schema {
        let mut own = schema_for!(Self);
        for section in ["properties", "$defs"] {
            let Some(Json::Object(mut ours)) = own.ensure_object().remove(section) else { continue };
            if section == "properties" {
                ours.retain(|key, _| Self::KEYS.contains(&key.as_str()));
                for property in ours.values_mut() {
                    if let Some(Json::String(text)) = property.get_mut("description") {
                        text.insert_str(0, when);
                    }
                }
            }
            let theirs = parameters.ensure_object().entry(section).or_insert_with(|| serde_json::json!({}));
            if let Some(theirs) = theirs.as_object_mut() {
                theirs.extend(ours);
            }
        }
        parameters
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
        if matches!(self.graph, Graphs::Segmenter { .. }) {
            complain("bad-value", "no dataset of this version has masks to segment".to_owned(), None);
        }
        if self.batch_size == 0 {
            complain("bad-value", "`batch_size` must be at least 1, got 0".to_owned(), None);
        }
        for (task, params) in &self.dataset {
            let known = dataset::FORMATS.iter().map(|format| format.id());
            let Some(format) = dataset::FORMATS.iter().find(|format| format.id() == params.format) else {
                let message = format!("dataset `{task}` has unknown format `{}`", params.format);
                complain("bad-value", message, did_you_mean(&params.format, known));
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
            if params.limit == Some(0) {
                complain("bad-value", format!("dataset `{task}`: `limit` must be at least 1, got 0"), None);
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
            let tables = [&params.preprocess, &self.preprocess];
            if let Some(PathOr::Value(table)) = tables.into_iter().flatten().next()
                && let Err(error) = preprocess_of_table(table)
            {
                complain("bad-value", error.to_string(), None);
            }
        }
        problems
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
            ("dataset".to_owned(), to_value(dataset)?),
            ("preprocess".to_owned(), table),
        ])))
    }

    /// The files behind a task's scores. Their number and order is the dataset's; what a folder says about labels is in the names.
    pub(crate) fn sources(&self, task: &str) -> Result<Vec<SourceSet>, StageError> {
        let dataset = &self.dataset[task];
        let mut sets = Vec::new();
        for (parameter, graph) in self.graph.named() {
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
        for (name, path) in dataset.paths() {
            if let Some(path) = path
                && !dataset::is_pattern(&path.path)
            {
                exists(&format!("dataset.{task}.{name}"), &path.path)?;
            }
        }
        sets.push(dataset_files("dataset", &dataset.spec(task))?);
        Ok(sets)
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
                let beside = self.graph.of_images().sibling(PREPROCESSOR_CONFIG);
                if beside.path.is_file() {
                    return Ok(Some(beside.path));
                }
                Err(StageError::input_help(
                    format!(
                        "there is no `{PREPROCESSOR_CONFIG}` beside `{}`",
                        self.graph.of_images().written
                    ),
                    "say how images are prepared: `preprocess = \"path/to/preprocessor_config.json\"`, or a table",
                ))
            }
        }
    }
}

impl DatasetParams {
    fn paths(&self) -> [(&'static str, Option<&FilePath>); 3] {
        [("images", self.images.as_ref()), ("labels", self.labels.as_ref()), ("path", self.path.as_ref())]
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
            limit: self.limit.map(|limit| usize::try_from(limit).unwrap_or(usize::MAX)),
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

fn preprocess_of_table(table: &PreprocessTable) -> Result<Preprocess, PreprocessError> {
    let value = serde_json::Value::Object(table.clone().into_iter().collect());
    Preprocess::from_value(&value, "preprocess")
}

fn exists(parameter: &str, path: &std::path::Path) -> Result<(), StageError> {
    if path.exists() {
        return Ok(());
    }
    Err(StageError::MissingFile { parameter: parameter.to_owned(), path: path.to_owned() })
}
