//! Format `sa1b`: a folder of images, each with a JSON record of the same name, as SA-1B is distributed (`sa_1.jpg`, `sa_1.json`).
//!
//! `{"image": {"height", "width", …}, "annotations": [{"id", "segmentation": {"size", "counts"}, "bbox": [x, y, width, height],
//! "point_coords": [[x, y]], …}]}`. `bbox` and `point_coords` are prompts; both may be left out. Further keys are ignored.

use super::super::SegmentationError;
use super::super::rle::Rle;
use super::listing::entries;
use super::registry::{Format, Frame, FrameFiles, Object};
use crate::images::dataset::Decoding;
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub(super) struct Sa1b;

#[derive(Deserialize)]
struct Record {
    annotations: Vec<Annotation>,
}

#[derive(Deserialize)]
struct Annotation {
    id: Value,
    segmentation: Value,
    #[serde(default)]
    bbox: Option<[f64; 4]>,
    #[serde(default)]
    point_coords: Vec<[f64; 2]>,
}

impl Format for Sa1b {
    fn id(&self) -> &'static str {
        "sa1b"
    }

    fn summary(&self) -> &'static str {
        "SA-1B: a folder of images, each with a JSON record of masks and prompts beside it"
    }

    fn frames(&self, path: &Path, split: Option<&str>) -> Result<Vec<FrameFiles>, SegmentationError> {
        let folder = split.map_or_else(|| path.to_owned(), |split| path.join(split));
        let entries = entries(&folder)?;
        let mut images: HashMap<&str, &PathBuf> = HashMap::new();
        for image in entries.iter().filter(|entry| entry.is_image()) {
            images.insert(&image.stem, &image.path);
        }
        let mut frames = Vec::new();
        for record in entries.iter().filter(|entry| entry.extension == "json") {
            let Some(&image) = images.get(record.stem.as_str()) else {
                return Err(SegmentationError::Missing {
                    path: record.path.with_extension("jpg"),
                    needed_by: format!("`{}`", record.path.display()),
                });
            };
            frames.push(FrameFiles {
                sequence: record.stem.clone(),
                frame: String::new(),
                image: image.clone(),
                annotations: vec![(String::new(), record.path.clone())],
            });
        }
        if frames.is_empty() {
            let expected = "expected images with a JSON record of the same name (`sa_1.jpg`, `sa_1.json`)";
            return Err(SegmentationError::Nothing { path: folder, expected });
        }
        Ok(frames)
    }

    fn load(&self, files: &FrameFiles) -> Result<Frame, SegmentationError> {
        let image = Decoding::default().file(&files.image)?;
        let path = &files.annotations[0].1;
        let wrong = |reason: String| SegmentationError::Annotation { path: path.clone(), reason };
        let record: Record =
            serde_json::from_slice(&fs_err::read(path)?).map_err(|error| wrong(error.to_string()))?;
        let object = |annotation: Annotation| {
            let name = match &annotation.id {
                Value::String(name) => name.clone(),
                id => id.to_string(),
            };
            if annotation.segmentation.is_array() {
                return Err(wrong(format!("object `{name}` is a polygon, expected run lengths")));
            }
            let mask: Rle = serde_json::from_value(annotation.segmentation)
                .map_err(|error| wrong(format!("the mask of object `{name}`: {error}")))?;
            Ok(Object {
                name,
                mask,
                points: annotation.point_coords,
                bounds: annotation.bbox.map(|[x, y, width, height]| [x, y, x + width, y + height]),
            })
        };
        let objects = record.annotations.into_iter().map(object).collect::<Result<_, _>>()?;
        Ok(Frame { image, annotation: path.clone(), objects, void: None })
    }
}
