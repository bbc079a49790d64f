//! Format `sa-v`: the folders of SA-V, the videos of SAM 2.
//!
//! Validation and test: `JPEGImages_24fps/<video>/00000.jpg`, `Annotations_6fps/<video>/<object>/00000.png` (every pixel that is not 0 belongs to
//! the object; objects may overlap), `<split>.txt` with the videos of a split. Training: `<video>_manual.json` (or, if there is none,
//! `<video>_auto.json`) with run lengths for every fourth frame, and the frames, extracted from `<video>.mp4`, in `<video>/00000.jpg`. A video
//! itself cannot be decoded here.

use super::super::SegmentationError;
use super::super::rle::Rle;
use super::index_png::Indices;
use super::listing::{Entry, entries, folders, names};
use super::registry::{Format, Frame, FrameFiles, Object};
use crate::images::dataset::Decoding;
use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};

pub(super) struct SaV;

/// Frames from one annotation to the next: 24 a second, of which 6 are annotated.
const FRAMES_PER_ANNOTATION: usize = 4;

const IMAGES: &str = "JPEGImages_24fps";
const MASKS: &str = "Annotations_6fps";

/// Records of masks, the first that is there.
const RECORDS: &[&str] = &["manual", "auto"];

#[derive(Deserialize)]
struct Masklets {
    /// By annotated frame and object.
    masklet: Vec<Vec<Option<Value>>>,
    masklet_id: Vec<Value>,
}

impl Format for SaV {
    fn id(&self) -> &'static str {
        "sa-v"
    }

    fn summary(&self) -> &'static str {
        "SA-V: folders of JPEG frames, with PNG masks per object or JSON records of run lengths"
    }

    fn frames(&self, path: &Path, split: Option<&str>) -> Result<Vec<FrameFiles>, SegmentationError> {
        let frames = if path.join(MASKS).is_dir() {
            frames_of_pngs(path, split)?
        } else {
            frames_of_records(&split.map_or_else(|| path.to_owned(), |split| path.join(split)))?
        };
        if frames.is_empty() {
            let expected = "expected videos in `Annotations_6fps`, or records `<video>_manual.json`";
            return Err(SegmentationError::Nothing { path: path.to_owned(), expected });
        }
        Ok(frames)
    }

    fn load(&self, files: &FrameFiles) -> Result<Frame, SegmentationError> {
        let image = Decoding::default().file(&files.image)?;
        let annotation = files.annotations[0].1.clone();
        let objects = if annotation.extension().is_some_and(|extension| extension == "json") {
            objects_of_record(&annotation, files)?
        } else {
            let object = |(name, path): &(String, PathBuf)| {
                let indices = Indices::read(path, image.height(), image.width())?;
                let mask = indices.mask(|value| value != 0);
                Ok(Object { name: name.clone(), mask, points: Vec::new(), bounds: None })
            };
            let objects: Vec<Object> =
                files.annotations.iter().map(object).collect::<Result<_, SegmentationError>>()?;
            visible(objects)
        };
        Ok(Frame { image, annotation, objects, void: None })
    }
}

/// Objects that are hidden in a frame have an empty mask there; nobody is asked to find them.
fn visible(objects: Vec<Object>) -> Vec<Object> {
    objects.into_iter().filter(|object| object.mask.area() > 0).collect()
}

fn frames_of_pngs(path: &Path, split: Option<&str>) -> Result<Vec<FrameFiles>, SegmentationError> {
    let videos = match split {
        Some(split) => names(&path.join(format!("{split}.txt")))?,
        None => folders(&path.join(MASKS))?,
    };
    let mut frames = Vec::new();
    for video in videos {
        let masks = path.join(MASKS).join(&video);
        let mut of_video: std::collections::BTreeMap<String, Vec<(String, PathBuf)>> =
            std::collections::BTreeMap::new();
        for object in folders(&masks)? {
            for mask in entries(&masks.join(&object))?.into_iter().filter(|entry| entry.extension == "png") {
                of_video.entry(mask.stem).or_default().push((object.clone(), mask.path));
            }
        }
        for (frame, annotations) in of_video {
            let image = path.join(IMAGES).join(&video).join(format!("{frame}.jpg"));
            if !image.is_file() {
                let needed_by = format!("`{}`", annotations[0].1.display());
                return Err(SegmentationError::Missing { path: image, needed_by });
            }
            frames.push(FrameFiles { sequence: video.clone(), frame, image, annotations });
        }
    }
    Ok(frames)
}

fn frames_of_records(folder: &Path) -> Result<Vec<FrameFiles>, SegmentationError> {
    let entries = entries(folder)?;
    let mut frames = Vec::new();
    for record in entries.iter().filter(|entry| entry.extension == "json") {
        let Some((video, kind)) = record.stem.rsplit_once('_').filter(|(_, kind)| RECORDS.contains(kind))
        else {
            continue;
        };
        let better = RECORDS.iter().take_while(|other| **other != kind).any(|other| {
            let name = format!("{video}_{other}");
            entries.iter().any(|entry| entry.extension == "json" && entry.stem == name)
        });
        if better {
            continue;
        }
        frames.extend(annotated(folder, video, record)?);
    }
    Ok(frames)
}

/// The extracted frames of a video for which its record has masks.
fn annotated(folder: &Path, video: &str, record: &Entry) -> Result<Vec<FrameFiles>, SegmentationError> {
    let images = folder.join(video);
    if !images.is_dir() {
        let film = folder.join(format!("{video}.mp4"));
        if film.is_file() {
            return Err(SegmentationError::Video { path: film });
        }
        let needed_by = format!("`{}`", record.path.display());
        return Err(SegmentationError::Missing { path: images.join("00000.jpg"), needed_by });
    }
    let is_annotated = |image: &Entry| {
        image.is_image()
            && image.stem.parse::<usize>().is_ok_and(|number| number % FRAMES_PER_ANNOTATION == 0)
    };
    let frames = entries(&images)?.into_iter().filter(is_annotated);
    let frame = |image: Entry| FrameFiles {
        sequence: video.to_owned(),
        frame: image.stem,
        image: image.path,
        annotations: vec![(String::new(), record.path.clone())],
    };
    Ok(frames.map(frame).collect())
}

fn objects_of_record(path: &Path, files: &FrameFiles) -> Result<Vec<Object>, SegmentationError> {
    let wrong = |reason: String| SegmentationError::Annotation { path: path.to_owned(), reason };
    let record: Masklets =
        serde_json::from_slice(&fs_err::read(path)?).map_err(|error| wrong(error.to_string()))?;
    let number: usize =
        files.frame.parse().map_err(|_| wrong(format!("frame `{}` has no number", files.frame)))?;
    // Videos may go on after their last annotation.
    let Some(masks) = record.masklet.into_iter().nth(number / FRAMES_PER_ANNOTATION) else {
        return Ok(Vec::new());
    };
    if masks.len() != record.masklet_id.len() {
        return Err(wrong(format!(
            "frame {number} has {} masks, but there are {} objects",
            masks.len(),
            record.masklet_id.len()
        )));
    }
    let mut objects = Vec::new();
    for (id, mask) in record.masklet_id.iter().zip(masks) {
        let Some(mask) = mask else { continue };
        let mask: Rle = serde_json::from_value(mask)
            .map_err(|error| wrong(format!("the mask of object `{id}` in frame {number}: {error}")))?;
        objects.push(Object { name: id.to_string(), mask, points: Vec::new(), bounds: None });
    }
    Ok(visible(objects))
}
