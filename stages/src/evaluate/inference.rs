//! Images through a graph: decoding, preprocessing and inference overlap, and a long evaluation that was killed goes on where it was.

use super::batch::{self, BatchSize};
use super::head::{self, misfit};
use super::images::{self, Opened};
use super::params::EvaluateParams;
use super::parts;
use super::scores::Images;
use super::zero_shot;
use crate::images::dataset::Dataset;
use crate::images::head::Head;
use crate::images::metrics::{self, Counts};
use crate::images::preprocess::{PreparedImages, Preprocessor};
use crate::job::ProgressUnit;
use crate::services::{BoundGraph, ProbeKey, port};
use crate::{Draft, Job, JobInput, Notice, StageError, checkpoint, names};
use blake3::Hash;
use merganser_cache::Preimage;
use merganser_onnx::{Input, Session, Weights};
use merganser_tensors::TensorSource;
use ndarray::{Array2, Array4, ArrayD, ArrayView4, Axis, Ix2, Ix3, s};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, mpsc};

/// Batches that are prepared ahead of inference.
const BATCHES_AHEAD: usize = 2;

/// The logits of about so many images are kept while a longer evaluation runs, so that a kill costs no more than these.
const SHARD_IMAGES: usize = 1024;

/// Everything about a dataset and a graph that does not depend on the model.
pub(crate) struct Evaluation<'a> {
    job: &'a Job<'a>,
    params: &'a EvaluateParams,
    task: &'a str,
    opened: Arc<Opened>,
    head: Heading,
    /// What checkpoints are put into; none where models are graphs themselves.
    bound: Option<Bound>,
}

/// A graph, and the checkpoint that it was exported from.
struct Bound {
    origin: checkpoint::Weights,
    graph: Arc<BoundGraph>,
    input: String,
    output: String,
}

/// What is run.
#[derive(Clone, Copy)]
enum Model<'a> {
    Weights(&'a checkpoint::Weights),
    /// An exported graph.
    Graph(&'a JobInput),
}

/// A model that is ready to run.
struct Running {
    session: Session,
    /// Of the graph.
    digest: Hash,
    input: String,
    output: String,
    /// How many images the graph takes at once, if that is fixed: the last batch is filled up.
    fixed_batch: Option<usize>,
}

impl Bound {
    fn new(job: &Job<'_>, params: &EvaluateParams, origin: &JobInput) -> Result<Self, StageError> {
        let files: Vec<_> = job.sources_of("graph").collect();
        let weights = checkpoint::Weights::new(job.tensors(origin)?);
        let graph = job.services.bound_graph(&files, &origin.artifact, &weights)?;
        let input = graph.input(params.input.as_deref())?;
        let output = graph.output(params.output.as_deref())?;
        let fixed = graph.fixed_batch(&input);
        check_batch(graph.name(), &input, fixed, params.batch_size.reference())?;
        Ok(Self { origin: weights, graph, input, output })
    }
}

/// What turns the graph's output into logits.
enum Heading {
    /// It gives logits.
    None,
    /// One head; of a distilled model two, whose logits are averaged. With what messages call them.
    Given { heads: Vec<Head>, name: String },
    /// Made of class names, by the model's text tower.
    ZeroShot,
}

impl<'a> Evaluation<'a> {
    pub(crate) fn prepare(
        job: &'a Job<'a>,
        params: &'a EvaluateParams,
        task: &'a str,
    ) -> Result<Self, StageError> {
        for source in &job.sources {
            job.files.pin(&source.source)?;
        }
        let opened = job.services.images(pixels_key(job, params, task)?, |room| {
            let config = job.sources_of("preprocess").next().map(|source| job.read(source)).transpose()?;
            let preprocessor = Preprocessor::new(params.preprocess(task, config.as_deref())?)?;
            let (images, record) = images::open(job, &params.dataset[task], task)?;
            Ok(Opened { images: PreparedImages::new(images, preprocessor, room), record })
        })?;
        let head = match job.sources_of("head").next() {
            Some(source) => {
                let heads = head::read(job, source, params.dataset[task].normalize)?;
                let name = source.path.display().to_string();
                check_classes(task, opened.images.dataset(), &heads[0], &name)?;
                Heading::Given { heads, name }
            }
            None if params.dataset[task].is_zero_shot() => Heading::ZeroShot,
            None => Heading::None,
        };
        let bound = job.optional("origin").map(|origin| Bound::new(job, params, origin)).transpose()?;
        Ok(Self { job, params, task, opened, head, bound })
    }

    fn bound(&self) -> Result<&Bound, StageError> {
        self.bound.as_ref().ok_or_else(|| StageError::Internal("there is no graph to bind to".to_owned()))
    }

    /// The dataset without its pixels.
    pub(super) fn dataset(&self) -> &dyn Dataset {
        self.opened.images.dataset()
    }

    /// What the scores say about the images.
    pub(crate) fn record(&self) -> &Images {
        &self.opened.record
    }

    /// The logits of a model, [images, classes]. `preimage` says what they are a function of, so that parts of them can be kept.
    pub(super) fn logits(&self, model: &JobInput, preimage: &Preimage) -> Result<Array2<f32>, StageError> {
        if self.bound.is_none() {
            return self.kept_logits(Model::Graph(model), preimage);
        }
        let weights = checkpoint::Weights::new(self.model(model)?);
        self.kept_logits(Model::Weights(&weights), preimage)
    }

    /// The logits of a model; what an earlier process has left of them is not computed again.
    fn kept_logits(&self, model: Model<'_>, preimage: &Preimage) -> Result<Array2<f32>, StageError> {
        let job = self.job;
        let n_images = self.dataset().len();
        let mut shards = Shards::new(self, n_images, preimage)?;
        if shards.is_complete() {
            return shards.logits();
        }
        let done = n_images - shards.missing().iter().map(Range::len).sum::<usize>();
        parts::tell_of_earlier_work(job, self.task, done, n_images);
        let missing = shards.missing();
        // Keeping a part waits for the disk; meanwhile the next images are inferred.
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel::<Finished>();
            let keeper = shards.keeper;
            let keeping = scope.spawn(move || {
                receiver.into_iter().try_for_each(|(images, logits)| keeper.keep(&images, &logits))
            });
            let inferred = self.infer(model, &missing, done, |range, rows| {
                if let Some(finished) = shards.add(range, &rows)? {
                    // The receiver is gone when a part could not be kept, which is told below.
                    let _ = sender.send(finished);
                }
                Ok(())
            });
            drop(sender);
            let kept = keeping.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            inferred.and(kept)
        })?;
        shards.logits()
    }

    /// The tensors of a model, under the origin's names; refuses one that the graph cannot be run with.
    pub(crate) fn model(&self, model: &JobInput) -> Result<Arc<dyn TensorSource>, StageError> {
        let origin = self.job.input("origin")?;
        // A model with another library's names is bound under those of the origin, which the binding knows.
        let tensors = names::open_like(self.job, origin, model)?;
        if model.artifact != origin.artifact {
            let bound = self.bound()?;
            bound.graph.check(&checkpoint::Weights::new(Arc::clone(&tensors)), &bound.origin)?;
        }
        Ok(tensors)
    }

    /// Refuses a model that is not an artifact, with the tensors of the origin, if it cannot be run with the graph.
    pub(crate) fn check(&self, model: &dyn Weights) -> Result<(), StageError> {
        let bound = self.bound()?;
        bound.graph.check(model, &bound.origin)
    }

    /// The graph, and its input for images.
    pub(crate) fn graph(&self) -> Result<(&BoundGraph, &str), StageError> {
        let bound = self.bound()?;
        Ok((&bound.graph, &bound.input))
    }

    pub(crate) fn n_images(&self) -> usize {
        self.dataset().len()
    }

    /// All images in batches, each prepared when it is asked for.
    pub(crate) fn batches(&self) -> impl Iterator<Item = Result<Array4<f32>, StageError>> {
        let size = self.params.batch_size.reference();
        let batches = batch::batches(0..self.n_images(), size, size).into_iter();
        batches.map(|range| Ok(self.opened.images.batch(range, Vec::new())?))
    }

    /// The logits of at most `n` images, spread evenly (datasets are often sorted by class): [images, classes].
    pub(crate) fn some_logits(
        &self,
        model: Arc<dyn TensorSource>,
        n: usize,
    ) -> Result<Array2<f32>, StageError> {
        let (all, n) = (self.n_images(), n.min(self.n_images()));
        let images: Vec<Range<usize>> = (0..n).map(|i| i * all / n).map(|image| image..image + 1).collect();
        let mut logits = Rows::new(0..n);
        let mut done = 0;
        self.infer(Model::Weights(&checkpoint::Weights::new(model)), &images, 0, |range, rows| {
            done += range.len();
            logits.add(&(done - range.len()..done), &rows)
        })?;
        logits.logits()
    }

    /// The correct answers of a model that is not an artifact; its tensors have the names of the origin's.
    pub(crate) fn score_tensors(&self, model: Arc<dyn TensorSource>) -> Result<Counts, StageError> {
        let weights = checkpoint::Weights::new(model);
        let bound = self.bound()?;
        bound.graph.check(&weights, &bound.origin)?;
        let n_images = self.dataset().len();
        let mut all = Rows::new(0..n_images);
        self.infer(Model::Weights(&weights), std::slice::from_ref(&(0..n_images)), 0, |range, rows| {
            all.add(range, &rows)
        })?;
        Ok(metrics::score(&all.logits()?, self.dataset().labels(), self.task, 0)?)
    }

    /// Calls `take` with the logits of one batch after the other, in order.
    fn infer(
        &self,
        model: Model<'_>,
        ranges: &[Range<usize>],
        mut done: usize,
        mut take: impl FnMut(&Range<usize>, Array2<f32>) -> Result<(), StageError>,
    ) -> Result<(), StageError> {
        let job = self.job;
        let heads = match model {
            Model::Weights(weights) => self.heads(Some(weights))?,
            Model::Graph(_) => self.heads(None)?,
        };
        let (heads, name) = (&*heads, self.head_name());
        let mut running = self.start(model)?;
        let size = self.batch_size(&mut running)?;
        let reference = self.params.batch_size.reference();
        let batches: Vec<Range<usize>> =
            ranges.iter().flat_map(|range| batch::batches(range.clone(), size, reference)).collect();
        let n_images = self.dataset().len();
        // From here on images are counted against the clock.
        job.progress(done as u64, n_images as u64, ProgressUnit::Images);
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::sync_channel(BATCHES_AHEAD);
            // Used batches go back to be filled again: fresh memory costs more than filling it.
            let (give_back, spare) = mpsc::channel::<Vec<f32>>();
            let (images, all) = (&self.opened.images, &batches);
            scope.spawn(move || {
                for range in all {
                    let buffer = spare.try_recv().unwrap_or_default();
                    // The receiver is gone when inference failed or was interrupted; there is nothing left to prepare for.
                    if sender.send(images.batch(range.clone(), buffer)).is_err() {
                        return;
                    }
                }
            });
            for range in &batches {
                if (job.cancelled)() {
                    return Err(StageError::Cancelled);
                }
                let batch: Array4<f32> = receiver
                    .recv()
                    .map_err(|_| StageError::Internal("preprocessing ended early".to_owned()))??;
                let rows = running.logits(&batch.view(), heads, name)?;
                // The other side may have prepared its last batch already.
                let _ = give_back.send(batch.into_raw_vec_and_offset().0);
                take(range, rows)?;
                done += range.len();
                job.progress(done as u64, n_images as u64, ProgressUnit::Images);
            }
            Ok(())
        })
    }

    /// The size of batches: as given, or what the probe says, once per process, graph and size of images.
    fn batch_size(&self, model: &mut Running) -> Result<usize, StageError> {
        let is_given = self.params.batch_size != BatchSize::Auto || model.fixed_batch.is_some();
        if is_given || self.dataset().len() < batch::LEAST_IMAGES {
            return Ok(self.params.batch_size.reference());
        }
        let job = self.job;
        let images = self.opened.images.batch(0..batch::PROBE_IMAGES, Vec::new())?;
        let key = ProbeKey { graph: model.digest, image: images.shape()[1..].to_vec(), threads: job.threads };
        job.services.batch_size(key, || {
            let infer = |batch: &ArrayView4<'_, f32>| {
                let values = model.run(batch)?;
                let (rows, all) = (values.len_of(Axis(0)), values.len());
                Array2::from_shape_vec((rows, all / rows.max(1)), values.into_iter().collect())
                    .map_err(|error| StageError::Internal(error.to_string()))
            };
            let size = batch::probe(&images.view(), job.clock, infer)?;
            (job.notify)(Notice::Info(format!(
                "`{}`: batches of {size} images are the fastest here",
                self.task
            )));
            Ok(size)
        })
    }

    /// What turns the graph's output into logits: nothing, a head, or two of a distilled model.
    pub(crate) fn heads(&self, model: Option<&checkpoint::Weights>) -> Result<Cow<'_, [Head]>, StageError> {
        let heads = match (&self.head, model) {
            (Heading::None, _) => Cow::Borrowed(&[][..]),
            (Heading::Given { heads, .. }, _) => Cow::Borrowed(heads.as_slice()),
            (Heading::ZeroShot, Some(model)) => {
                let origin = &self.bound()?.origin;
                let head = zero_shot::head(self.job, self.params, self.task, self.dataset(), model, origin)?;
                Cow::Owned(vec![head])
            }
            (Heading::ZeroShot, None) => {
                return Err(StageError::input(
                    "an exported graph of images has no text tower to make a head with",
                ));
            }
        };
        if let Some(head) = heads.first() {
            metrics::check_labels(self.task, self.dataset().labels(), head.classes())?;
        }
        Ok(heads)
    }

    fn head_name(&self) -> &str {
        match &self.head {
            Heading::None => "",
            Heading::Given { name, .. } => name,
            Heading::ZeroShot => "head of class names",
        }
    }

    /// The model's inputs for chosen images, in the order given, in the memory of an earlier batch.
    pub(crate) fn images(&self, images: &[usize], buffer: Vec<f32>) -> Result<Array4<f32>, StageError> {
        Ok(self.opened.images.gather(images, buffer)?)
    }

    pub(crate) fn labels(&self) -> &[u32] {
        self.dataset().labels()
    }

    /// The graph's output: logits, or what heads make logits of.
    pub(crate) fn output(&self) -> Result<&str, StageError> {
        Ok(&self.bound()?.output)
    }

    /// The logits of chosen images by a model that is not an artifact: [images, classes].
    pub(crate) fn logits_of(
        &self,
        model: &dyn Weights,
        heads: &[Head],
        images: &[usize],
    ) -> Result<Array2<f32>, StageError> {
        let job = self.job;
        let mut running = self.with_weights(model)?;
        let mut all = Rows::new(0..images.len());
        let (mut done, mut buffer) = (0, Vec::new());
        for chunk in images.chunks(self.params.batch_size.reference()) {
            if (job.cancelled)() {
                return Err(StageError::Cancelled);
            }
            let batch = self.images(chunk, buffer)?;
            let rows = running.logits(&batch.view(), heads, self.head_name())?;
            buffer = batch.into_raw_vec_and_offset().0;
            all.add(&(done..done + chunk.len()), &rows)?;
            done += chunk.len();
        }
        all.logits()
    }

    /// Opens a session of the bound graph.
    fn with_weights(&self, model: &dyn Weights) -> Result<Running, StageError> {
        let job = self.job;
        let Bound { graph, input, output, .. } = self.bound()?;
        let session = job.services.session(graph, model, job.threads, job.notify)?;
        let (input, output) = (input.clone(), output.clone());
        let fixed_batch = session.fixed_batch(&input);
        Ok(Running { session, digest: graph.digest(), input, output, fixed_batch })
    }

    /// Opens a session of a model.
    fn start(&self, model: Model<'_>) -> Result<Running, StageError> {
        let job = self.job;
        match model {
            Model::Weights(weights) => self.with_weights(weights),
            Model::Graph(exported) => {
                let session = job.services.open_graph(job, exported)?;
                let name = "the exported graph";
                let input = port(name, "input", session.input_names(), self.params.input.as_deref())?;
                let output = port(name, "output", session.output_names(), self.params.output.as_deref())?;
                let fixed_batch = session.fixed_batch(&input);
                check_batch(name, &input, fixed_batch, self.params.batch_size.reference())?;
                Ok(Running { session, digest: exported.artifact, input, output, fixed_batch })
            }
        }
    }
}

impl Running {
    fn run(&mut self, batch: &ArrayView4<'_, f32>) -> Result<ArrayD<f32>, StageError> {
        let Self { session, input, output, fixed_batch, .. } = self;
        let n_images = batch.len_of(Axis(0));
        let filled = fixed_batch.filter(|size| n_images < *size).map(|size| {
            let mut filled = Array4::zeros((size, batch.dim().1, batch.dim().2, batch.dim().3));
            filled.slice_mut(s![..n_images, .., .., ..]).assign(batch);
            filled
        });
        let images = filled.as_ref().map_or(*batch, |filled| filled.view());
        let outputs = session.run(&[(input.as_str(), Input::F32(images.into_dyn()))])?;
        let found = outputs.into_iter().find(|(name, _)| name == output);
        let (_, mut values) =
            found.ok_or_else(|| StageError::Internal(format!("the graph did not give `{output}`")))?;
        if filled.is_some() && values.ndim() > 0 {
            let rows = values.len_of(Axis(0)).min(n_images);
            values.slice_axis_inplace(Axis(0), (..rows).into());
        }
        Ok(values)
    }

    /// The logits of one batch.
    fn logits(
        &mut self,
        batch: &ArrayView4<'_, f32>,
        heads: &[Head],
        head_name: &str,
    ) -> Result<Array2<f32>, StageError> {
        let n_images = batch.len_of(Axis(0));
        let values = self.run(batch)?;
        let shape = values.shape().to_vec();
        let wrong = |expected: &str| {
            StageError::input(format!(
                "output `{}` of the graph has shape {shape:?}, expected {expected}",
                self.output
            ))
        };
        if shape.first() != Some(&n_images) {
            return Err(wrong(&format!("{n_images} rows, one per image")));
        }
        let misfit = |error| misfit(head_name, &error);
        match heads {
            [] => values.into_dimensionality::<Ix2>().map_err(|_| wrong("[images, classes]")),
            [head] => {
                let features =
                    values.into_dimensionality::<Ix2>().map_err(|_| wrong("[images, features]"))?;
                head.logits(&features).map_err(misfit)
            }
            // A distilled model answers twice, from its class token and its distillation token; the mean counts.
            [class, distillation, ..] => {
                let tokens = values.into_dimensionality::<Ix3>().ok().filter(|tokens| tokens.dim().1 == 2);
                let tokens = tokens.ok_or_else(|| {
                    wrong("[images, 2, features]: `head` has a classifier for either token")
                })?;
                let logits = class.logits(&tokens.slice(s![.., 0, ..])).map_err(misfit)?;
                Ok((logits + distillation.logits(&tokens.slice(s![.., 1, ..])).map_err(misfit)?) / 2.0)
            }
        }
    }
}

/// Everything that decides the pixels of a dataset.
fn pixels_key(job: &Job<'_>, params: &EvaluateParams, task: &str) -> Result<Hash, StageError> {
    let mut encoded = Vec::new();
    params.pixels(task)?.encode(&mut encoded);
    // Which files are meant: a job that trains has the files of two datasets of a task, and the same sources for both.
    for (name, path) in params.dataset[task].spec(task).paths {
        for part in [name.as_bytes(), path.as_os_str().as_encoded_bytes()] {
            encoded.extend_from_slice(&(part.len() as u64).to_le_bytes());
            encoded.extend_from_slice(part);
        }
    }
    for parameter in ["preprocess", "dataset", "train", "validation"] {
        for source in job.sources_of(parameter) {
            encoded.extend_from_slice(source.source.digest.as_bytes());
            // Where it lies, too: a dataset reads its files by their paths.
            encoded.extend_from_slice(source.path.as_os_str().as_encoded_bytes());
        }
    }
    Ok(blake3::hash(&encoded))
}

/// Refuses a size of batches that a graph cannot take.
fn check_batch(graph: &str, input: &str, fixed: Option<usize>, size: usize) -> Result<(), StageError> {
    match fixed {
        Some(fixed) if fixed != size => Err(StageError::input_help(
            format!("input `{input}` of `{graph}` takes {fixed} images at once, not {size}"),
            format!("set `batch_size = {fixed}`, or export the graph with a free batch dimension"),
        )),
        _ => Ok(()),
    }
}

/// Refuses a head that cannot be about the dataset's classes.
fn check_classes(task: &str, images: &dyn Dataset, head: &Head, name: &str) -> Result<(), StageError> {
    if let Some(classes) = images.classes()
        && classes.len() != head.classes()
    {
        return Err(StageError::input_help(
            format!("dataset `{task}` has {} classes, head `{name}` has {}", classes.len(), head.classes()),
            "label i is row i of the head: both must list the same classes in the same order",
        ));
    }
    Ok(metrics::check_labels(task, images.labels(), head.classes())?)
}

/// Logits of a range of images, as they come in.
struct Rows {
    images: Range<usize>,
    logits: Option<Array2<f32>>,
}

impl Rows {
    fn new(images: Range<usize>) -> Self {
        Self { images, logits: None }
    }

    fn add(&mut self, range: &Range<usize>, rows: &Array2<f32>) -> Result<(), StageError> {
        let all = self.logits.get_or_insert_with(|| Array2::zeros((self.images.len(), rows.ncols())));
        if all.ncols() != rows.ncols() {
            let (before, now) = (all.ncols(), rows.ncols());
            return Err(StageError::input(format!(
                "the graph gave {before} logits per image, and then {now}"
            )));
        }
        let start = range.start - self.images.start;
        all.slice_mut(s![start..start + range.len(), ..]).assign(rows);
        Ok(())
    }

    fn logits(self) -> Result<Array2<f32>, StageError> {
        self.logits.ok_or_else(|| StageError::Internal("there was no batch".to_owned()))
    }
}

/// The logits of an evaluation in parts that outlive a kill.
struct Shards<'a> {
    keeper: Keeper<'a>,
    parts: Vec<Shard>,
}

/// Stores parts and finds them again.
#[derive(Clone, Copy)]
struct Keeper<'a> {
    job: &'a Job<'a>,
    labels: &'a [u32],
    preimage: &'a Preimage,
}

/// A shard that is complete: its images, and their logits.
type Finished = (Range<usize>, Array2<f32>);

struct Shard {
    rows: Rows,
    is_done: bool,
}

impl<'a> Shards<'a> {
    /// Cuts `n` images at multiples of the batch, and finds what an earlier process has left.
    fn new(evaluation: &'a Evaluation<'a>, n: usize, preimage: &'a Preimage) -> Result<Self, StageError> {
        let ranges = parts::cut(n, evaluation.params.batch_size.reference(), SHARD_IMAGES);
        let keeper = Keeper { job: evaluation.job, labels: evaluation.dataset().labels(), preimage };
        let is_only = ranges.len() == 1;
        let mut parts = Vec::with_capacity(ranges.len());
        for range in ranges {
            let mut rows = Rows::new(range);
            rows.logits = if is_only { None } else { keeper.find(&rows.images)? };
            let is_done = rows.logits.is_some();
            parts.push(Shard { rows, is_done });
        }
        Ok(Self { keeper, parts })
    }

    fn is_complete(&self) -> bool {
        self.parts.iter().all(|shard| shard.is_done)
    }

    /// The images whose logits are not there, one range per shard.
    fn missing(&self) -> Vec<Range<usize>> {
        self.parts.iter().filter(|shard| !shard.is_done).map(|shard| shard.rows.images.clone()).collect()
    }

    /// Takes the logits of a batch; returns the shard that they complete, if it is to be kept.
    fn add(&mut self, range: &Range<usize>, rows: &Array2<f32>) -> Result<Option<Finished>, StageError> {
        let n_shards = self.parts.len();
        let shard = self.parts.iter_mut().find(|shard| shard.rows.images.contains(&range.start));
        let shard = shard.ok_or_else(|| StageError::Internal("a batch belongs to no shard".to_owned()))?;
        shard.rows.add(range, rows)?;
        if range.end < shard.rows.images.end {
            return Ok(None);
        }
        shard.is_done = true;
        let finished = shard.rows.logits.clone().map(|logits| (shard.rows.images.clone(), logits));
        Ok(finished.filter(|_| n_shards > 1))
    }

    /// All logits, in order.
    fn logits(self) -> Result<Array2<f32>, StageError> {
        let parts = self.parts.into_iter().map(|shard| shard.rows.logits()).collect::<Result<Vec<_>, _>>()?;
        if let [_] = parts.as_slice() {
            return Ok(parts.into_iter().next().unwrap_or_default());
        }
        let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
        ndarray::concatenate(Axis(0), &views)
            .map_err(|_| StageError::input("the graph gave different numbers of logits per image"))
    }
}

impl Keeper<'_> {
    /// The logits that an earlier process has left.
    fn find(&self, images: &Range<usize>) -> Result<Option<Array2<f32>>, StageError> {
        let Some(artifact) = self.job.stored(&parts::preimage(self.preimage, images)) else {
            return Ok(None);
        };
        let path = self.job.files.find_blob(&artifact, checkpoint::LOGITS)?;
        path.map(|path| Ok(checkpoint::read_logits(&path)?.0)).transpose()
    }

    fn keep(&self, images: &Range<usize>, logits: &Array2<f32>) -> Result<(), StageError> {
        self.job.part(&parts::preimage(self.preimage, images), |staging| {
            let manifest = serde_json::json!({ "content": "logits" }).to_string();
            let blob = checkpoint::write_logits(staging, logits, &self.labels[images.clone()])?;
            Ok(Draft { manifest, blobs: vec![blob], operands: Vec::new(), sources: Vec::new() })
        })?;
        Ok(())
    }
}
