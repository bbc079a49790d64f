//! Runs one model over one dataset: preprocessing and inference overlap, logits are kept.

use super::params::EvaluateParams;
use super::scores::{ScoreRow, Scores};
use crate::images::dataset;
use crate::images::head::Head;
use crate::images::metrics;
use crate::images::preprocess::Preprocessor;
use crate::job::{JobSource, ProgressUnit};
use crate::{Draft, Job, StageError, checkpoint};
use merganser_onnx::{Input, Session, SessionOptions};
use ndarray::{Array1, Array2, Array4, Axis, Ix2, s};
use std::ops::Range;
use std::sync::mpsc;

/// Batches that are prepared ahead of inference.
const BATCHES_AHEAD: usize = 2;

pub(super) fn run(job: &Job<'_>, params: &EvaluateParams, task: &str) -> Result<Draft, StageError> {
    let dataset_params = &params.dataset[task];
    for source in &job.sources {
        job.files.pin(&source.source)?;
    }
    let config = job.sources_of("preprocess").next().map(|source| job.read(source)).transpose()?;
    let preprocessor = Preprocessor::new(params.preprocess(task, config.as_deref())?)?;
    let head = job.sources_of("head").next().map(|source| read_head(job, source, dataset_params.normalize)).transpose()?;
    let images = dataset::open(&dataset_params.spec(task))?;

    let graph_files: Vec<_> = job.sources_of("graph").collect();
    let (model, origin) = (job.input("model")?, job.input("origin")?);
    let model_weights = checkpoint::Weights::new(job.tensors(model)?);
    let origin_weights = checkpoint::Weights::new(job.tensors(origin)?);
    let graph = job.services.bound_graph(&graph_files, &origin.artifact, &origin_weights)?;
    if model.artifact != origin.artifact {
        graph.check(&model_weights, &origin_weights)?;
    }
    let input = graph.input(params.input.as_deref())?;
    let output = graph.output(params.output.as_deref())?;
    let options = SessionOptions { intra_threads: job.threads, ..SessionOptions::default() };
    let mut session = job.services.session(&graph, &model_weights, options, job.notify)?;

    let labels = images.labels();
    let batch_size = params.batch_size as usize;
    let ranges: Vec<Range<usize>> =
        (0..labels.len()).step_by(batch_size).map(|start| start..(start + batch_size).min(labels.len())).collect();
    let mut logits: Option<Array2<f32>> = None;
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel(BATCHES_AHEAD);
        let (images, preprocessor, ranges) = (&*images, &preprocessor, &ranges);
        scope.spawn(move || {
            for range in ranges {
                // The receiver is gone when inference failed or was interrupted; there is nothing left to prepare for.
                if sender.send(preprocessor.batch(images, range.clone())).is_err() {
                    return;
                }
            }
        });
        for range in ranges {
            if (job.cancelled)() {
                return Err(StageError::Cancelled);
            }
            let batch = receiver.recv().map_err(|_| StageError::Internal("preprocessing ended early".to_owned()))?;
            let batch = batch?;
            let features = infer(&mut session, &input, &output, &batch)?;
            let rows = match &head {
                Some(head) => fitted(job, head, &features)?,
                None => features,
            };
            let all = logits.get_or_insert_with(|| Array2::zeros((labels.len(), rows.ncols())));
            all.slice_mut(s![range.clone(), ..]).assign(&rows);
            job.progress(range.end as u64, labels.len() as u64, ProgressUnit::Images);
        }
        Ok(())
    })?;
    let logits = logits.ok_or_else(|| StageError::input(format!("dataset `{task}` has no images")))?;
    let counts = metrics::score(&logits, labels, task, 0)?;
    let rows = vec![
        ScoreRow::share(task, "accuracy", counts.top1, counts.images),
        ScoreRow::share(task, "top5", counts.top5, counts.images),
    ];
    let scores = Scores::new(rows, images.classes().unwrap_or_default().to_vec());
    let blob = checkpoint::write_logits(job.staging, &logits, labels)?;
    Ok(Draft { manifest: scores.to_json(), blobs: vec![blob], operands: Vec::new(), sources: Vec::new() })
}

/// Applies the head; one that does not fit the graph's output is named.
fn fitted(job: &Job<'_>, head: &Head, features: &Array2<f32>) -> Result<Array2<f32>, StageError> {
    head.logits(features).map_err(|error| match job.sources_of("head").next() {
        Some(source) => StageError::input(format!("`{}`: {error}", source.path.display())),
        None => error.into(),
    })
}

fn infer(session: &mut Session, input: &str, output: &str, batch: &Array4<f32>) -> Result<Array2<f32>, StageError> {
    let n_images = batch.len_of(Axis(0));
    let outputs = session.run(&[(input, Input::F32(batch.view().into_dyn()))])?;
    let found = outputs.into_iter().find(|(name, _)| name == output);
    let (_, values) = found.ok_or_else(|| StageError::Internal(format!("the graph did not give `{output}`")))?;
    let shape = values.shape().to_vec();
    let values = values.into_dimensionality::<Ix2>().map_err(|_| {
        StageError::input(format!("output `{output}` of the graph has shape {shape:?}, expected [images, features]"))
    })?;
    if values.nrows() != n_images {
        return Err(StageError::input(format!("output `{output}` of the graph has {} rows for {n_images} images", values.nrows())));
    }
    Ok(values)
}

/// A head is a small checkpoint: `weight` [classes, features], and `bias` [classes] unless it has none.
fn read_head(job: &Job<'_>, source: &JobSource, normalize: bool) -> Result<Head, StageError> {
    let tensors = checkpoint::read_small(job, source)?;
    let file = source.path.display();
    let weight = tensors.get("weight").ok_or_else(|| StageError::input(format!("head `{file}` has no tensor `weight`")))?;
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
    Ok(Head::new(weight, bias, normalize)?)
}
