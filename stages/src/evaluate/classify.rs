//! Runs models over one dataset: preprocessing and inference overlap, logits are kept.

use super::params::EvaluateParams;
use super::scores::{ScoreRow, Scores};
use crate::images::dataset::{self, Dataset};
use crate::images::head::{Head, HeadError};
use crate::images::metrics::{self, Counts};
use crate::images::preprocess::Preprocessor;
use crate::job::{JobSource, ProgressUnit};
use crate::services::{BaselineKey, BoundGraph};
use crate::{Draft, Job, JobInput, StageError, checkpoint, names};
use merganser_onnx::{Input, Session, SessionOptions};
use merganser_tensors::TensorSource;
use ndarray::{Array1, Array2, Array4, Axis, Ix2, s};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

/// Batches that are prepared ahead of inference.
const BATCHES_AHEAD: usize = 2;

/// Scores the model on dataset `task`, and divides by the baseline if there is one.
pub(super) fn run(job: &Job<'_>, params: &EvaluateParams, task: &str) -> Result<Draft, StageError> {
    let evaluation = Evaluation::prepare(job, params, task)?;
    let logits = evaluation.logits(job.input("model")?)?;
    let labels = evaluation.images.labels();
    let counts = metrics::score(&logits, labels, task, 0)?;
    let accuracy = ScoreRow::share(task, "accuracy", counts.top1, counts.images);
    let top5 = ScoreRow::share(task, "top5", counts.top5, counts.images);
    let mut rows = vec![accuracy, top5];
    if let Some(baseline) = job.optional("baseline") {
        match rows[0].normalized(evaluation.baseline_accuracy(baseline)?) {
            Some(row) => rows.push(row),
            None => job.warn(format!(
                "the baseline has no correct answer on `{task}`: there is nothing to normalize by"
            )),
        }
    }
    let scores = Scores::new(rows, evaluation.images.classes().unwrap_or_default().to_vec());
    let blob = checkpoint::write_logits(job.staging, &logits, labels)?;
    Ok(Draft { manifest: scores.to_json(), blobs: vec![blob], operands: Vec::new(), sources: Vec::new() })
}

/// Everything about a dataset and a graph that does not depend on the model.
pub(crate) struct Evaluation<'a> {
    job: &'a Job<'a>,
    params: &'a EvaluateParams,
    task: &'a str,
    images: Box<dyn Dataset>,
    preprocessor: Preprocessor,
    /// With the file that it was read from.
    head: Option<(Head, PathBuf)>,
    origin: checkpoint::Weights,
    graph: Arc<BoundGraph>,
    input: String,
    output: String,
}

impl<'a> Evaluation<'a> {
    pub(crate) fn prepare(job: &'a Job<'a>, params: &'a EvaluateParams, task: &'a str) -> Result<Self, StageError> {
        let dataset_params = &params.dataset[task];
        for source in &job.sources {
            job.files.pin(&source.source)?;
        }
        let config = job.sources_of("preprocess").next().map(|source| job.read(source)).transpose()?;
        let preprocessor = Preprocessor::new(params.preprocess(task, config.as_deref())?)?;
        let head = job
            .sources_of("head")
            .next()
            .map(|source| read_head(job, source, dataset_params.normalize))
            .transpose()?;
        let images = dataset::open(&dataset_params.spec(task))?;
        if images.is_empty() {
            return Err(StageError::input(format!("dataset `{task}` has no images")));
        }
        if let Some((head, _)) = &head {
            metrics::check_labels(task, images.labels(), head.classes())?;
        }
        let graph_files: Vec<_> = job.sources_of("graph").collect();
        let origin_input = job.input("origin")?;
        let origin = checkpoint::Weights::new(job.tensors(origin_input)?);
        let graph = job.services.bound_graph(&graph_files, &origin_input.artifact, &origin)?;
        let input = graph.input(params.input.as_deref())?;
        let output = graph.output(params.output.as_deref())?;
        Ok(Self { job, params, task, images, preprocessor, head, origin, graph, input, output })
    }

    /// The logits of a model, [images, classes].
    fn logits(&self, model: &JobInput) -> Result<Array2<f32>, StageError> {
        let job = self.job;
        let origin = job.input("origin")?;
        // A model with another library's names is bound under those of the origin, which the binding knows.
        let weights = checkpoint::Weights::new(names::open_like(job, origin, model)?);
        if model.artifact != origin.artifact {
            self.graph.check(&weights, &self.origin)?;
        }
        self.logits_of(&weights)
    }

    /// The correct answers of a model that is not an artifact; its tensors have the names of the origin's.
    pub(crate) fn score_tensors(&self, model: Arc<dyn TensorSource>) -> Result<Counts, StageError> {
        let weights = checkpoint::Weights::new(model);
        self.graph.check(&weights, &self.origin)?;
        Ok(metrics::score(&self.logits_of(&weights)?, self.images.labels(), self.task, 0)?)
    }

    fn logits_of(&self, weights: &checkpoint::Weights) -> Result<Array2<f32>, StageError> {
        let job = self.job;
        let options = SessionOptions { intra_threads: job.threads, ..SessionOptions::default() };
        let mut session = job.services.session(&self.graph, weights, options, job.notify)?;
        let n_images = self.images.len();
        let batch_size = self.params.batch_size as usize;
        let ranges: Vec<Range<usize>> = (0..n_images)
            .step_by(batch_size)
            .map(|start| start..(start + batch_size).min(n_images))
            .collect();
        let mut logits: Option<Array2<f32>> = None;
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::sync_channel(BATCHES_AHEAD);
            // Used batches go back to be filled again: fresh memory costs more than filling it.
            let (give_back, spare) = mpsc::channel::<Vec<f32>>();
            let (images, preprocessor, ranges) = (&*self.images, &self.preprocessor, &ranges);
            scope.spawn(move || {
                for range in ranges {
                    let buffer = spare.try_recv().unwrap_or_default();
                    // The receiver is gone when inference failed or was interrupted; there is nothing left to prepare for.
                    if sender.send(preprocessor.batch_into(images, range.clone(), buffer)).is_err() {
                        return;
                    }
                }
            });
            for range in ranges {
                if (job.cancelled)() {
                    return Err(StageError::Cancelled);
                }
                let batch = receiver
                    .recv()
                    .map_err(|_| StageError::Internal("preprocessing ended early".to_owned()))??;
                let features = infer(&mut session, &self.input, &self.output, &batch)?;
                // The other side may have prepared its last batch already.
                let _ = give_back.send(batch.into_raw_vec_and_offset().0);
                let rows = match &self.head {
                    Some((head, file)) => head.logits(&features).map_err(|error| misfit(file, &error))?,
                    None => features,
                };
                let all = logits.get_or_insert_with(|| Array2::zeros((n_images, rows.ncols())));
                if all.ncols() != rows.ncols() {
                    let (before, now) = (all.ncols(), rows.ncols());
                    return Err(StageError::input(format!(
                        "the graph gave {before} logits per image, and then {now}"
                    )));
                }
                all.slice_mut(s![range.clone(), ..]).assign(&rows);
                job.progress(range.end as u64, n_images as u64, ProgressUnit::Images);
            }
            Ok(())
        })?;
        logits.ok_or_else(|| StageError::Internal("there was no batch".to_owned()))
    }

    /// The baseline's accuracy on this dataset. In a sweep every model has the same baseline, so it is scored once per process.
    fn baseline_accuracy(&self, baseline: &JobInput) -> Result<f64, StageError> {
        let mut of_dataset = Vec::new();
        self.params.for_task(self.task)?.encode(&mut of_dataset);
        let origin = self.job.input("origin")?.artifact;
        let digests = [baseline.artifact, origin]
            .into_iter()
            .chain(self.job.sources.iter().map(|source| source.source.digest));
        for digest in digests {
            of_dataset.extend_from_slice(digest.as_bytes());
        }
        let key = BaselineKey(blake3::hash(&of_dataset));
        self.job.services.baseline_accuracy(key, || {
            let logits = self.logits(baseline)?;
            let counts = metrics::score(&logits, self.images.labels(), self.task, 0)?;
            Ok(counts.top1 as f64 / counts.images as f64)
        })
    }
}

fn infer(
    session: &mut Session,
    input: &str,
    output: &str,
    batch: &Array4<f32>,
) -> Result<Array2<f32>, StageError> {
    let n_images = batch.len_of(Axis(0));
    let outputs = session.run(&[(input, Input::F32(batch.view().into_dyn()))])?;
    let found = outputs.into_iter().find(|(name, _)| name == output);
    let (_, values) =
        found.ok_or_else(|| StageError::Internal(format!("the graph did not give `{output}`")))?;
    let shape = values.shape().to_vec();
    let values = values.into_dimensionality::<Ix2>().map_err(|_| {
        StageError::input(format!(
            "output `{output}` of the graph has shape {shape:?}, expected [images, features]"
        ))
    })?;
    if values.nrows() != n_images {
        return Err(StageError::input(format!(
            "output `{output}` of the graph has {} rows for {n_images} images",
            values.nrows()
        )));
    }
    Ok(values)
}

/// A head is a small checkpoint: `weight` [classes, features], and `bias` [classes] unless it has none.
fn read_head(job: &Job<'_>, source: &JobSource, normalize: bool) -> Result<(Head, PathBuf), StageError> {
    let tensors = checkpoint::read_small(job, source)?;
    let file = source.path.display();
    let weight = tensors
        .get("weight")
        .ok_or_else(|| StageError::input(format!("head `{file}` has no tensor `weight`")))?;
    let &[classes, features] = weight.shape.as_slice() else {
        return Err(StageError::input(format!(
            "tensor `weight` of head `{file}` has shape {:?}, expected [classes, features]",
            weight.shape
        )));
    };
    let bias = match tensors.get("bias") {
        Some(bias) if bias.shape == [classes] => Array1::from_vec(bias.values.clone()),
        Some(bias) => {
            return Err(StageError::input(format!(
                "tensor `bias` of head `{file}` has shape {:?}, expected [{classes}]",
                bias.shape
            )));
        }
        None => Array1::zeros(classes),
    };
    let weight = Array2::from_shape_vec((classes, features), weight.values.clone())
        .map_err(|error| StageError::Internal(error.to_string()))?;
    let head = Head::new(weight, bias, normalize).map_err(|error| misfit(&source.path, &error))?;
    Ok((head, source.path.clone()))
}

/// What is wrong with a head, and which file it is.
fn misfit(file: &Path, error: &HeadError) -> StageError {
    StageError::input(format!("`{}`: {error}", file.display()))
}
