//! What stages share across units of one process: ONNX Runtime, and graphs bound to their origin.

use crate::evaluate::Opened;
use crate::images::preprocess::Room;
use crate::job::JobSource;
use crate::{ExportedGraph, Job, JobInput, Notice, StageError};
use blake3::Hash;
use merganser_onnx::provision::{self, Event};
use merganser_onnx::quantized::DATA_FILE;
use merganser_onnx::{
    Binding, Dimension, Graph, LinearUse, Module, Port, Prepared, Provider, Runtime, Session, SessionOptions,
    Weights,
};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
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
    /// What runs graphs, and on which of several devices.
    pub provider: Provider,
    pub device: Option<u16>,
    /// Bytes of memory for decoded images that several models look at.
    pub image_room: usize,
}

/// Digests of a graph's files, and of its origin.
type GraphKey = (Vec<Hash>, Hash);

/// Shared services. Nothing is loaded or installed until a stage needs it.
pub struct Services {
    settings: RuntimeSettings,
    version: OnceLock<String>,
    runtime: Mutex<Option<Runtime>>,
    graphs: Mutex<HashMap<GraphKey, Arc<BoundGraph>>>,
    batch_sizes: Mutex<HashMap<ProbeKey, usize>>,
    room: Room,
    images: Mutex<HashMap<Hash, Arc<Opened>>>,
    /// Whether the user knows that gradients do not go where the rest goes.
    told_of_gradients: AtomicBool,
}

/// What the fastest number of images at once depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ProbeKey {
    pub graph: Hash,
    /// The shape of one image.
    pub image: Vec<usize>,
    pub threads: usize,
}

impl Services {
    pub fn new(settings: RuntimeSettings) -> Self {
        Self {
            room: Room::new(settings.image_room),
            images: Mutex::default(),
            settings,
            version: OnceLock::new(),
            runtime: Mutex::default(),
            graphs: Mutex::default(),
            batch_sizes: Mutex::default(),
            told_of_gradients: AtomicBool::new(false),
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

    /// What runs graphs here.
    pub fn provider(&self) -> Provider {
        self.settings.provider
    }

    /// A session of a bound graph with a model's weights.
    pub fn session(
        &self,
        graph: &BoundGraph,
        model: &dyn Weights,
        threads: usize,
        notify: &(dyn Fn(Notice) + Sync),
    ) -> Result<Session, StageError> {
        Ok(self.runtime(notify)?.session(&graph.prepared, model, self.options(threads))?)
    }

    /// A session of a graph of gradients. It has ops of our own, which are computed on the processor: with another provider, what lies
    /// between them would be carried there and back at every one.
    pub(crate) fn gradient_session(
        &self,
        graph: &Prepared,
        model: &dyn Weights,
        threads: usize,
        notify: &(dyn Fn(Notice) + Sync),
    ) -> Result<Session, StageError> {
        let provider = self.settings.provider;
        if provider != Provider::Cpu && !self.told_of_gradients.swap(true, Ordering::Relaxed) {
            let text = format!("gradients are computed on the processor; `{provider}` runs the rest");
            notify(Notice::Info(text));
        }
        let options = SessionOptions { provider: Provider::Cpu, device: None, ..self.options(threads) };
        Ok(self.runtime(notify)?.session(graph, model, options)?)
    }

    /// A session of an exported graph, with its own weights.
    pub(crate) fn open_graph(&self, job: &Job<'_>, input: &JobInput) -> Result<Session, StageError> {
        let artifact = &input.artifact;
        let missing = |name: &str| StageError::Internal(format!("artifact {artifact} has no `{name}`"));
        let described = ExportedGraph::from_json(&job.files.description(artifact)?);
        let graph = described.ok_or_else(|| missing("graph"))?.graph;
        let model = job.files.optional_blob(artifact, &graph)?.ok_or_else(|| missing(&graph))?;
        let data = job.files.optional_blob(artifact, DATA_FILE)?;
        let data: Vec<_> = data.into_iter().map(|data| (DATA_FILE.to_owned(), Arc::from(data))).collect();
        Ok(self.runtime(job.notify)?.open(&graph, &model, &data, self.options(job.threads))?)
    }

    fn options(&self, threads: usize) -> SessionOptions {
        let RuntimeSettings { provider, device, .. } = self.settings;
        SessionOptions { intra_threads: threads, provider, device, ..SessionOptions::default() }
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
        let (graph, binding) = bind(files, weights)?;
        let name = graph.path().display().to_string();
        let prepared = Prepared::new(&graph, &binding)?;
        let bound = Arc::new(BoundGraph { name, binding, prepared });
        graphs.insert(key, Arc::clone(&bound));
        Ok(bound)
    }

    /// A dataset with its preprocessing, opened once per process, so that the models of a run share what is decoded. `key` covers all that
    /// decides its pixels.
    pub(crate) fn images(
        &self,
        key: Hash,
        open: impl FnOnce(Room) -> Result<Opened, StageError>,
    ) -> Result<Arc<Opened>, StageError> {
        let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(opened) = images.get(&key) {
            return Ok(Arc::clone(opened));
        }
        let opened = Arc::new(open(self.room.clone())?);
        images.insert(key, Arc::clone(&opened));
        Ok(opened)
    }

    /// The size of batches that a probe has found, once per process. While it probes, others wait: they would only measure each other.
    pub(crate) fn batch_size(
        &self,
        key: ProbeKey,
        probe: impl FnOnce() -> Result<usize, StageError>,
    ) -> Result<usize, StageError> {
        let mut sizes = self.batch_sizes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(size) = sizes.get(&key) {
            return Ok(*size);
        }
        let size = probe()?;
        sizes.insert(key, size);
        Ok(size)
    }

    fn with_environment<T>(
        &self,
        on_event: &(dyn Fn(&Event) + Sync),
        work: impl FnOnce(&provision::Environment<'_>) -> Result<T, provision::ProvisionError>,
    ) -> Result<T, StageError> {
        let RuntimeSettings { ort_dylib_path, python, library_dirs, cache_dir, offline, .. } =
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

/// Reads a graph and binds it to the checkpoint that it was exported from.
pub(crate) fn bind(files: &[&JobSource], origin: &dyn Weights) -> Result<(Graph, Binding), StageError> {
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
    let binding = Binding::find(&graph, origin)?;
    refuse(&graph.path().display().to_string(), &binding.check_origin())?;
    Ok((graph, binding))
}

/// Refuses a model whose tensors cannot all take their places in `graph`, naming them.
pub(crate) fn refuse(graph: &str, refusals: &[merganser_onnx::Refusal]) -> Result<(), StageError> {
    if refusals.is_empty() { Ok(()) } else { Err(refused(graph, refusals)) }
}

/// A graph whose weights can be swapped.
#[derive(Clone)]
pub struct BoundGraph {
    name: String,
    binding: Binding,
    prepared: Prepared,
}

impl BoundGraph {
    /// This graph without what input `dropped` adds where it is joined with `kept`; `None` unless they are joined at one place.
    pub(crate) fn detached(&self, dropped: &str, kept: &str) -> Result<Option<Self>, StageError> {
        let prepared = self.prepared.detached(dropped, kept)?;
        Ok(prepared.map(|prepared| Self { name: self.name.clone(), binding: self.binding.clone(), prepared }))
    }

    /// Refuses a model whose tensors cannot all take their places, naming them.
    pub fn check(&self, model: &dyn Weights, origin: &dyn Weights) -> Result<(), StageError> {
        refuse(&self.name, &self.binding.check(model, origin)?)
    }

    /// The path of the graph, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Of the graph as it was exported.
    pub fn digest(&self) -> Hash {
        self.binding.graph_digest
    }

    pub fn inputs(&self) -> &[Port] {
        self.prepared.inputs()
    }

    /// The graph without its weights: what gradients are made from.
    pub(crate) fn prepared(&self) -> &Prepared {
        &self.prepared
    }

    pub(crate) fn outputs(&self) -> &[Port] {
        self.prepared.outputs()
    }

    /// A digest of all values that a model puts into the graph: models that agree in these compute the same.
    pub(crate) fn values_digest(&self, model: &dyn Weights) -> Result<Hash, StageError> {
        let mut hasher = blake3::Hasher::new();
        for slot in self.prepared.slots() {
            let values = slot.values(model)?;
            hasher.update(&(values.len() as u64).to_le_bytes());
            hasher.update(bytemuck::cast_slice(&values));
        }
        Ok(hasher.finalize())
    }

    /// How many images an input takes at once, if that is fixed.
    pub(crate) fn fixed_batch(&self, input: &str) -> Option<usize> {
        let port = self.inputs().iter().find(|port| port.name == input)?;
        match port.dimensions.as_ref()?.first()? {
            Dimension::Fixed(size) => Some(*size),
            Dimension::Free(_) => None,
        }
    }

    /// The output that was named, the one of a usual name, or the only one.
    pub(crate) fn named_output(&self, named: Option<&str>, usual: &str) -> Result<String, StageError> {
        let has_usual = self.prepared.outputs().iter().any(|port| port.name == usual);
        self.output(named.or(has_usual.then_some(usual)))
    }

    /// The products of tensors with activations.
    pub(crate) fn layers(&self) -> Result<Vec<LinearUse>, StageError> {
        Ok(LinearUse::find(&self.prepared, &self.binding)?)
    }

    /// The layers of a library that the graph computes, with what they give out.
    pub(crate) fn modules(&self) -> Result<Vec<Module>, StageError> {
        Ok(Module::find(&self.prepared, &self.binding)?)
    }

    /// The values that a name stands for: a value itself, or what the node of that name gives out.
    pub(crate) fn values_named(&self, name: &str) -> Result<Vec<String>, StageError> {
        Ok(self.prepared.values_named(name)?)
    }

    /// The same graph with some of its values as further outputs, and their names there.
    pub(crate) fn with_outputs(&self, values: &[&str]) -> Result<(Self, Vec<String>), StageError> {
        let (prepared, names) = self.prepared.with_outputs(values)?;
        Ok((Self { prepared, ..self.clone() }, names))
    }

    /// The input that takes images: the one that was named, or the only one.
    pub fn input(&self, named: Option<&str>) -> Result<String, StageError> {
        port(&self.name, "input", self.prepared.inputs().iter().map(|port| port.name.as_str()), named)
    }

    /// The output to score: the one that was named, or the only one.
    pub fn output(&self, named: Option<&str>) -> Result<String, StageError> {
        port(&self.name, "output", self.prepared.outputs().iter().map(|port| port.name.as_str()), named)
    }
}

/// Chooses an input or output of a graph: the one that was named, or the only one.
pub(crate) fn port<'a>(
    graph: &str,
    what: &str,
    names: impl Iterator<Item = &'a str>,
    named: Option<&str>,
) -> Result<String, StageError> {
    let names: Vec<&str> = names.collect();
    let listed = || names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    match (named, names.as_slice()) {
        (Some(named), _) if names.contains(&named) => Ok(named.to_owned()),
        (Some(named), _) => {
            Err(StageError::input(format!("`{graph}` has no {what} `{named}`; it has {}", listed())))
        }
        (None, [only]) => Ok((*only).to_owned()),
        (None, _) => Err(StageError::input_help(
            format!("`{graph}` has {} {what}s: {}", names.len(), listed()),
            format!("say which one with `{what} = \"…\"`"),
        )),
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
