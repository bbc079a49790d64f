//! What stages share across units of one process: ONNX Runtime, and graphs bound to their origin.

use crate::job::JobSource;
use crate::{Notice, StageError};
use blake3::Hash;
use merganser_onnx::provision::{self, Event};
use merganser_onnx::{Binding, Graph, Prepared, Runtime, Session, SessionOptions, Weights};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Where ONNX Runtime is looked for and installed; the application reads the environment and fills this in.
#[derive(Clone, Debug)]
pub struct RuntimeSettings {
    /// The value of `ORT_DYLIB_PATH`, if set.
    pub ort_dylib_path: Option<PathBuf>,
    /// Python commands, tried in order.
    pub python: Vec<PathBuf>,
    /// Folders to search before the system's own.
    pub library_dirs: Vec<PathBuf>,
    pub cache_dir: PathBuf,
    pub offline: bool,
}

/// Digests of a graph's files, and of its origin.
type GraphKey = (Vec<Hash>, Hash);

/// Shared services. Nothing is loaded or installed until a stage needs it.
pub struct Services {
    settings: RuntimeSettings,
    version: OnceLock<String>,
    runtime: Mutex<Option<Runtime>>,
    graphs: Mutex<HashMap<GraphKey, Arc<BoundGraph>>>,
    baselines: Mutex<HashMap<BaselineKey, f64>>,
}

/// Everything that a baseline's accuracy depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BaselineKey(pub(crate) Hash);

impl Services {
    pub fn new(settings: RuntimeSettings) -> Self {
        Self {
            settings,
            version: OnceLock::new(),
            runtime: Mutex::default(),
            graphs: Mutex::default(),
            baselines: Mutex::default(),
        }
    }

    /// The version of ONNX Runtime that runs will use. Loads and installs nothing.
    pub fn onnxruntime_version(&self) -> Result<String, StageError> {
        if let Some(version) = self.version.get() {
            return Ok(version.clone());
        }
        let planned = self.with_environment(&|_| (), provision::resolve_version_without_loading)?;
        Ok(self.version.get_or_init(|| planned.version.to_string()).clone())
    }

    /// ONNX Runtime, loaded; installed first if the machine has none.
    pub fn runtime(&self, notify: &(dyn Fn(Notice) + Sync)) -> Result<Runtime, StageError> {
        let mut runtime = self.runtime.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(runtime) = &*runtime {
            return Ok(runtime.clone());
        }
        let located = self.with_environment(&|event| notify(notice(event)), provision::resolve)?;
        let keyed = self.onnxruntime_version()?;
        if located.version.to_string() != keyed {
            return Err(StageError::input_help(
                format!(
                    "ONNX Runtime {} is there now, but this run was planned with {keyed}",
                    located.version
                ),
                "run the same command again",
            ));
        }
        Ok(runtime.insert(Runtime::load(&located.path)?).clone())
    }

    /// A session of a bound graph with a model's weights.
    pub fn session(
        &self,
        graph: &BoundGraph,
        model: &dyn Weights,
        options: SessionOptions,
        notify: &(dyn Fn(Notice) + Sync),
    ) -> Result<Session, StageError> {
        Ok(self.runtime(notify)?.session(&graph.prepared, model, options)?)
    }

    /// A graph bound to the checkpoint that it was exported from. Bound once per process, graph and origin.
    pub(crate) fn bound_graph(
        &self,
        files: &[&JobSource],
        origin: &Hash,
        weights: &dyn Weights,
    ) -> Result<Arc<BoundGraph>, StageError> {
        let key = (files.iter().map(|file| file.source.digest).collect(), *origin);
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(graph) = graphs.get(&key) {
            return Ok(Arc::clone(graph));
        }
        let main = files.first().ok_or_else(|| StageError::Internal("no graph was resolved".to_owned()))?;
        let graph = Graph::load(&main.path)?;
        if let Some(unlisted) =
            graph.files().iter().find(|path| files.iter().all(|file| !same_file(&file.path, path)))
        {
            return Err(StageError::input_help(
                format!("`{}` keeps weights in `{}`", main.path.display(), unlisted.display()),
                "external data must lie beside the graph, under the graph's name with `_data` or `.data` at its end",
            ));
        }
        let binding = Binding::find(&graph, weights)?;
        let name = main.path.display().to_string();
        let refusals = binding.check_origin();
        if !refusals.is_empty() {
            return Err(refused(&name, &refusals));
        }
        let prepared = Prepared::new(&graph, &binding)?;
        let bound = Arc::new(BoundGraph { name, binding, prepared });
        graphs.insert(key, Arc::clone(&bound));
        Ok(bound)
    }

    /// The accuracy of a baseline, computed once per process. While it is computed, others wait for it rather than do the same.
    pub(crate) fn baseline_accuracy(
        &self,
        key: BaselineKey,
        compute: impl FnOnce() -> Result<f64, StageError>,
    ) -> Result<f64, StageError> {
        let mut baselines = self.baselines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(accuracy) = baselines.get(&key) {
            return Ok(*accuracy);
        }
        let accuracy = compute()?;
        baselines.insert(key, accuracy);
        Ok(accuracy)
    }

    fn with_environment<T>(
        &self,
        on_event: &(dyn Fn(&Event) + Sync),
        work: impl FnOnce(&provision::Environment<'_>) -> Result<T, provision::ProvisionError>,
    ) -> Result<T, StageError> {
        let RuntimeSettings { ort_dylib_path, python, library_dirs, cache_dir, offline } =
            self.settings.clone();
        let library_dirs = library_dirs.into_iter().chain(provision::default_library_dirs()).collect();
        Ok(work(&provision::Environment {
            ort_dylib_path,
            python,
            library_dirs,
            cache_dir,
            offline,
            on_event,
        })?)
    }
}

/// A graph whose weights can be swapped.
pub struct BoundGraph {
    name: String,
    binding: Binding,
    prepared: Prepared,
}

impl BoundGraph {
    /// Refuses a model whose tensors cannot all take their places, naming them.
    pub fn check(&self, model: &dyn Weights, origin: &dyn Weights) -> Result<(), StageError> {
        let refusals = self.binding.check(model, origin)?;
        if refusals.is_empty() { Ok(()) } else { Err(refused(&self.name, &refusals)) }
    }

    /// The input that takes images: the one that was named, or the only one.
    pub fn input(&self, named: Option<&str>) -> Result<String, StageError> {
        self.port("input", self.prepared.inputs().iter().map(|port| port.name.as_str()), named)
    }

    /// The output to score: the one that was named, or the only one.
    pub fn output(&self, named: Option<&str>) -> Result<String, StageError> {
        self.port("output", self.prepared.outputs().iter().map(|port| port.name.as_str()), named)
    }

    fn port<'a>(
        &'a self,
        what: &str,
        names: impl Iterator<Item = &'a str>,
        named: Option<&str>,
    ) -> Result<String, StageError> {
        let names: Vec<&str> = names.collect();
        let listed = || names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        match (named, names.as_slice()) {
            (Some(named), _) if names.contains(&named) => Ok(named.to_owned()),
            (Some(named), _) => Err(StageError::input(format!(
                "`{}` has no {what} `{named}`; it has {}",
                self.name,
                listed()
            ))),
            (None, [only]) => Ok((*only).to_owned()),
            (None, _) => Err(StageError::input_help(
                format!("`{}` has {} {what}s: {}", self.name, names.len(), listed()),
                format!("say which one with `{what} = \"…\"`"),
            )),
        }
    }
}

fn refused(graph: &str, refusals: &[merganser_onnx::Refusal]) -> StageError {
    const SHOWN: usize = 5;
    let mut reasons: Vec<String> = refusals.iter().take(SHOWN).map(ToString::to_string).collect();
    if refusals.len() > SHOWN {
        reasons.push(format!("and {} more reasons", refusals.len() - SHOWN));
    }
    StageError::input(format!("the model cannot be bound into `{graph}`: {}", reasons.join("; ")))
}

fn same_file(a: &std::path::Path, b: &std::path::Path) -> bool {
    a == b || matches!((fs_err::canonicalize(a), fs_err::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

fn notice(event: &Event) -> Notice {
    Notice::Info(match event {
        Event::Skipped { path, version } => {
            format!(
                "ONNX Runtime {version} at `{}` is too old (at least {} is needed)",
                path.display(),
                provision::OLDEST_VERSION
            )
        }
        Event::Waiting { lock } => {
            format!("another process is installing ONNX Runtime (`{}`); waiting", lock.display())
        }
        Event::Installing { version, target } => {
            format!("installing ONNX Runtime {version} into `{}` (once, with pip)", target.display())
        }
        Event::Installed { path, version } => {
            format!("installed ONNX Runtime {version}: `{}`", path.display())
        }
    })
}
