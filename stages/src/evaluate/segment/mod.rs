//! Runs a model that segments what a prompt means over one annotated data set.
//!
//! Every image is encoded once; every object in it is then asked for with every kind of prompt, alone. The mask that the decoder gives is resized to
//! the image, and compared with the object's. Reading and resizing overlap with inference. What was found is kept part by part, so that an
//! evaluation that was killed goes on where it was; scores are computed from what is kept.

mod decoder;
mod layout;
mod params;

use super::params::EvaluateParams;
use super::parts;
use super::scores::{ScoreRow, Scores};
use crate::images::preprocess::Preprocessor;
use crate::job::ProgressUnit;
use crate::segmentation::dataset::{self, MaskedImages, Object};
use crate::segmentation::mask::Mask;
use crate::segmentation::prompt::{Prompt, PromptKind};
use crate::segmentation::rle::Rle;
use crate::segmentation::summary::{Estimate, Measured, summarize};
use crate::segmentation::{SegmentationError, measure, upsample};
use crate::{Draft, Job, StageError, checkpoint, names};
use decoder::{Candidate, Segmenter};
use ndarray::{Array3, Array4, Axis};
use params::SegmentParams;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::mpsc;

/// The metrics that can have goals.
pub(super) const METRICS: &[&str] =
    &["point_miou", "point_j", "point_f", "point_j_and_f", "box_miou", "box_j", "box_f", "box_j_and_f"];

/// Batches that are prepared ahead of inference.
const BATCHES_AHEAD: usize = 2;

/// The most pixels that are encoded at once: one image of the released models, whose encoders need gigabytes for each.
const MOST_PIXELS: usize = 1 << 20;

/// The masks of about so many images are kept while a longer evaluation runs, so that a kill costs no more than these.
const PART_IMAGES: usize = 32;

/// The masks that were found, so that further metrics cost no inference.
const BLOB: &str = "masks.jsonl";

/// Scores the model on data set `task`.
pub(super) fn run(job: &Job<'_>, params: &EvaluateParams, task: &str) -> Result<Draft, StageError> {
    for source in &job.sources {
        job.files.pin(&source.source)?;
    }
    let spec = params.dataset[task].spec_of_masks();
    let images = dataset::open(&spec)?;
    let config = job.sources_of("preprocess").next().map(|source| job.read(source)).transpose()?;
    let preprocessor = Preprocessor::new(params.preprocess(task, config.as_deref())?)?;
    let asked = SegmentParams::of(&params.dataset[task]);
    let mut segmenter = bind(job, params, asked.prompts.contains(&PromptKind::Point))?;
    let evaluation = Evaluation { job, task, images: &images, preprocessor: &preprocessor, params: asked };
    let lines = evaluation.find(&mut segmenter, params.batch_size.reference())?;
    let found = measured(&lines)?;
    let mut rows = Vec::new();
    for &kind in &evaluation.params.prompts {
        let of_kind: Vec<Measured> =
            found.iter().filter(|(prompt, _)| *prompt == kind).map(|(_, measured)| *measured).collect();
        let summary = summarize(&of_kind).ok_or_else(|| {
            StageError::input(format!("dataset `{task}` has no object in its {} images", images.len()))
        })?;
        let mut row = |metric: &str, estimate: Estimate| {
            let metric = format!("{}_{metric}", kind.name());
            rows.push(ScoreRow::mean(
                task,
                metric,
                estimate.value,
                estimate.n,
                (estimate.low, estimate.high),
            ));
        };
        row("miou", summary.miou);
        row("j", summary.j);
        row("f", summary.f);
        row("j_and_f", summary.j_and_f);
    }
    let mut writer = job.staging.writer(BLOB)?;
    writer.write_all(&lines)?;
    let scores = Scores::new(rows, Vec::new());
    Ok(Draft {
        manifest: scores.to_json(),
        blobs: vec![writer.finish()?],
        operands: Vec::new(),
        sources: Vec::new(),
    })
}

/// Both halves with the model's weights in them.
fn bind(job: &Job<'_>, params: &EvaluateParams, points: bool) -> Result<Segmenter, StageError> {
    let (model, origin_input) = (job.input("model")?, job.input("origin")?);
    let origin = checkpoint::Weights::new(job.tensors(origin_input)?);
    // A model with another library's names is bound under those of the origin, which the binding knows.
    let weights = checkpoint::Weights::new(names::open_like(job, origin_input, model)?);
    let half = |parameter: &str| {
        let files: Vec<_> = job.sources_of(parameter).collect();
        let graph = job.services.bound_graph(&files, &origin_input.artifact, &origin)?;
        if model.artifact != origin_input.artifact {
            graph.check(&weights, &origin)?;
        }
        Ok::<_, StageError>(graph)
    };
    let (encoder, decoder) = (half("graph.encoder")?, half("graph.decoder")?);
    Segmenter::new(job, params.input.as_deref(), &encoder, &decoder, &weights, points)
}

/// What does not depend on the model.
struct Evaluation<'a> {
    job: &'a Job<'a>,
    task: &'a str,
    images: &'a MaskedImages,
    preprocessor: &'a Preprocessor,
    params: SegmentParams,
}

/// Images that are ready to be encoded: those of a batch that have objects.
struct Batch {
    /// [images, channels, rows, columns]
    pixels: Array4<f32>,
    scenes: Vec<Scene>,
}

/// An image without its pixels.
struct Scene {
    index: usize,
    /// height, width
    size: (usize, usize),
    annotation: PathBuf,
    objects: Vec<Object>,
    void: Option<Rle>,
}

/// One line of the stored masks.
#[derive(Serialize)]
struct Line<'a> {
    image: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    frame: &'a str,
    object: &'a str,
    prompt: PromptKind,
    j: f64,
    f: f64,
    predicted_iou: f32,
    mask: Rle,
}

/// What scores need of a line.
#[derive(Deserialize)]
struct FoundLine {
    image: String,
    object: String,
    prompt: PromptKind,
    j: f64,
    f: f64,
}

impl Evaluation<'_> {
    /// Finds all objects; returns the masks as lines of JSON.
    fn find(&self, segmenter: &mut Segmenter, batch_size: usize) -> Result<Vec<u8>, StageError> {
        let job = self.job;
        let n_images = self.images.len();
        let most =
            self.preprocessor.config().output_size().map(|size| MOST_PIXELS / (size.height * size.width));
        let batch_size = segmenter.batch_size(batch_size.min(most.unwrap_or(1)));
        let ranges = parts::cut(n_images, batch_size, PART_IMAGES);
        let mut kept: Vec<Option<Vec<u8>>> = match ranges.as_slice() {
            [_] => vec![None],
            ranges => ranges.iter().map(|range| self.kept(range)).collect::<Result<_, _>>()?,
        };
        let is_kept = |(range, kept): (&Range<usize>, &Option<_>)| kept.as_ref().map_or(0, |_| range.len());
        let mut done = ranges.iter().zip(&kept).map(is_kept).sum::<usize>();
        parts::tell_of_earlier_work(job, self.task, done, n_images);
        // Batches with the part that they belong to.
        let batches: Vec<(usize, Range<usize>)> = ranges
            .iter()
            .enumerate()
            .filter(|(part, _)| kept[*part].is_none())
            .flat_map(|(part, range)| {
                let starts = range.clone().step_by(batch_size);
                starts.map(move |start| (part, start..(start + batch_size).min(range.end)))
            })
            .collect();
        job.progress(done as u64, n_images as u64, ProgressUnit::Images);
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::sync_channel(BATCHES_AHEAD);
            let batches = &batches;
            scope.spawn(move || {
                for (_, range) in batches {
                    // The receiver is gone when inference failed or was interrupted.
                    if sender.send(self.prepare(range.clone())).is_err() {
                        return;
                    }
                }
            });
            let mut lines = Vec::new();
            for (part, range) in batches {
                let batch = receiver
                    .recv()
                    .map_err(|_| StageError::Internal("preprocessing ended early".to_owned()))??;
                self.find_in(segmenter, &batch, &mut lines)?;
                if range.end == ranges[*part].end {
                    let lines = std::mem::take(&mut lines);
                    if ranges.len() > 1 {
                        self.keep(&ranges[*part], &lines)?;
                    }
                    kept[*part] = Some(lines);
                }
                done += range.len();
                job.progress(done as u64, n_images as u64, ProgressUnit::Images);
            }
            Ok::<_, StageError>(())
        })?;
        Ok(kept.into_iter().flatten().flatten().collect())
    }

    /// What an earlier process has found in these images.
    fn kept(&self, images: &Range<usize>) -> Result<Option<Vec<u8>>, StageError> {
        let preimage = parts::preimage(self.job.preimage, images);
        let Some(artifact) = self.job.stored(&preimage) else { return Ok(None) };
        let path = self.job.files.find_blob(&artifact, BLOB)?;
        path.map(|path| Ok(fs_err::read(path)?)).transpose()
    }

    fn keep(&self, images: &Range<usize>, lines: &[u8]) -> Result<(), StageError> {
        self.job.part(&parts::preimage(self.job.preimage, images), |staging| {
            let manifest = serde_json::json!({ "content": "masks of objects" }).to_string();
            let mut writer = staging.writer(BLOB)?;
            writer.write_all(lines)?;
            Ok(Draft { manifest, blobs: vec![writer.finish()?], operands: Vec::new(), sources: Vec::new() })
        })?;
        Ok(())
    }

    /// Asks for every object in the images of a batch.
    fn find_in(
        &self,
        segmenter: &mut Segmenter,
        batch: &Batch,
        lines: &mut Vec<u8>,
    ) -> Result<(), StageError> {
        if batch.scenes.is_empty() {
            return Ok(());
        }
        let embeddings = segmenter.encode(&batch.pixels)?;
        let model_size = (batch.pixels.len_of(Axis(2)), batch.pixels.len_of(Axis(3)));
        for (position, scene) in batch.scenes.iter().enumerate() {
            if (self.job.cancelled)() {
                return Err(StageError::Cancelled);
            }
            let asked = self.asked(scene)?;
            let mut candidates = Vec::with_capacity(asked.len());
            for (_, kind, prompt) in &asked {
                let prompt = scaled(prompt, scene.size, model_size);
                let wanted = self.params.wanted(*kind);
                candidates.push(segmenter.decode(&embeddings, position, &prompt, scene.size, wanted)?);
            }
            self.measure(scene, &asked, &candidates, lines)?;
        }
        Ok(())
    }

    /// Reads and prepares images.
    fn prepare(&self, range: Range<usize>) -> Result<Batch, StageError> {
        let prepared: Vec<Option<(Array3<f32>, Scene)>> = range
            .into_par_iter()
            .map(|index| {
                let dataset::Frame { image, annotation, objects, void } = self.images.load(index)?;
                if objects.is_empty() {
                    return Ok(None);
                }
                let pixels = self.preprocessor.input(&image)?;
                let size = (image.height(), image.width());
                Ok(Some((pixels, Scene { index, size, annotation, objects, void })))
            })
            .collect::<Result<_, StageError>>()?;
        let (pixels, scenes): (Vec<_>, Vec<_>) = prepared.into_iter().flatten().unzip();
        if pixels.is_empty() {
            return Ok(Batch { pixels: Array4::zeros((0, 3, 0, 0)), scenes });
        }
        let views: Vec<_> = pixels.iter().map(|pixels| pixels.view()).collect();
        let pixels = ndarray::stack(Axis(0), &views).map_err(|_| {
            StageError::input_help(
                "images of one batch become inputs of different sizes",
                "say one size in `preprocess`: `size = { height = 1024, width = 1024 }`",
            )
        })?;
        Ok(Batch { pixels, scenes })
    }

    /// What is asked about an image: object, kind of prompt, prompt.
    fn asked(&self, scene: &Scene) -> Result<Vec<(usize, PromptKind, Prompt)>, StageError> {
        let of_object = |(index, object): (usize, &Object)| {
            let mask = scene.mask(object)?;
            self.params
                .prompts
                .iter()
                .map(|&kind| {
                    let prompt = kind.of(&scene.annotation, object, &mask, self.params.derived_prompts)?;
                    Ok((index, kind, prompt))
                })
                .collect::<Result<Vec<_>, SegmentationError>>()
        };
        let asked: Vec<Vec<_>> =
            scene.objects.par_iter().enumerate().map(of_object).collect::<Result<_, _>>()?;
        Ok(asked.into_iter().flatten().collect())
    }

    /// Measures the masks of an image, and writes a line for each.
    fn measure(
        &self,
        scene: &Scene,
        asked: &[(usize, PromptKind, Prompt)],
        candidates: &[Candidate],
        lines: &mut Vec<u8>,
    ) -> Result<(), StageError> {
        let (height, width) = scene.size;
        let void = scene.void.as_ref().map(|void| scene.decoded(void, "void")).transpose()?;
        let measured: Vec<(f64, f64, Rle)> = asked
            .par_iter()
            .zip(candidates)
            .map(|((object, ..), candidate)| {
                let mut found = upsample::positive(&candidate.logits, height, width);
                let mut truth = scene.mask(&scene.objects[*object])?;
                let mask = Rle::of(&found);
                if let Some(void) = &void {
                    found.remove(void);
                    truth.remove(void);
                }
                Ok((measure::jaccard(&found, &truth), measure::boundary_accuracy(&found, &truth), mask))
            })
            .collect::<Result<_, SegmentationError>>()?;
        let files = &self.images.frames()[scene.index];
        for (((object, kind, _), candidate), (jaccard, boundary, mask)) in
            asked.iter().zip(candidates).zip(measured)
        {
            let line = Line {
                image: &files.sequence,
                frame: &files.frame,
                object: &scene.objects[*object].name,
                prompt: *kind,
                j: jaccard,
                f: boundary,
                predicted_iou: candidate.predicted_iou,
                mask,
            };
            serde_json::to_writer(&mut *lines, &line).expect("numbers and names can be written");
            lines.push(b'\n');
        }
        Ok(())
    }
}

impl Scene {
    fn mask(&self, object: &Object) -> Result<Mask, SegmentationError> {
        self.decoded(&object.mask, &object.name)
    }

    fn decoded(&self, mask: &Rle, name: &str) -> Result<Mask, SegmentationError> {
        mask.to_mask(self.size.0, self.size.1).map_err(|source| SegmentationError::Mask {
            path: self.annotation.clone(),
            object: name.to_owned(),
            source,
        })
    }
}

/// How well the objects were found, from the lines of all images. Numbers are read as they were written, to the bit.
fn measured(lines: &[u8]) -> Result<Vec<(PromptKind, Measured)>, StageError> {
    let mut sequences = HashMap::new();
    let mut objects = HashMap::new();
    let mut found = Vec::new();
    for line in serde_json::Deserializer::from_slice(lines).into_iter::<FoundLine>() {
        let line = line.map_err(|error| StageError::Internal(format!("a kept mask: {error}")))?;
        let next = sequences.len();
        let sequence = *sequences.entry(line.image).or_insert(next);
        let next = objects.len();
        let object = *objects.entry((sequence, line.object)).or_insert(next);
        found.push((line.prompt, Measured { sequence, object, jaccard: line.j, boundary: line.f }));
    }
    Ok(found)
}

/// A prompt in pixels of the encoder's input: SAM 2 squashes the image into it.
fn scaled(prompt: &Prompt, image: (usize, usize), model: (usize, usize)) -> (Vec<[f32; 2]>, Vec<i64>) {
    let scale = |value: f64, from: usize, to: usize| (value / from as f64 * to as f64) as f32;
    let points = prompt
        .points
        .iter()
        .map(|&[x, y]| [scale(x, image.1, model.1), scale(y, image.0, model.0)])
        .collect();
    (points, prompt.labels.clone())
}
