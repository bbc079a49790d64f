//! Format `mask-png`: folders `images` and `masks` with files of the same names, a mask being a PNG file whose pixels say which object they
//! belong to.
//!
//! 0 is the background. In a palette 255 is void, as in PASCAL VOC and DAVIS; in grey files every other value is an object, so that a black and
//! white file has one.

use super::super::SegmentationError;
use super::index_png::Indices;
use super::listing::entries;
use super::registry::{Format, Frame, FrameFiles, Object};
use crate::images::dataset::Decoding;
use std::path::Path;

pub(super) struct Pairs;

/// The index of pixels that count for nobody, in files with a palette.
const VOID: u16 = 255;

impl Format for Pairs {
    fn id(&self) -> &'static str {
        "mask-png"
    }

    fn summary(&self) -> &'static str {
        "folders `images` and `masks` of the same names, masks as PNG with a value or palette index per object"
    }

    fn frames(&self, path: &Path, split: Option<&str>) -> Result<Vec<FrameFiles>, SegmentationError> {
        let folder = split.map_or_else(|| path.to_owned(), |split| path.join(split));
        let masks = folder.join("masks");
        let mut frames = Vec::new();
        for image in entries(&folder.join("images"))?.into_iter().filter(super::listing::Entry::is_image) {
            let mask = masks.join(format!("{}.png", image.stem));
            if !mask.is_file() {
                let needed_by = format!("`{}`", image.path.display());
                return Err(SegmentationError::Missing { path: mask, needed_by });
            }
            frames.push(FrameFiles {
                sequence: image.stem,
                frame: String::new(),
                image: image.path,
                annotations: vec![(String::new(), mask)],
            });
        }
        if frames.is_empty() {
            let expected = "expected folders `images` and `masks` with files of the same names";
            return Err(SegmentationError::Nothing { path: folder, expected });
        }
        Ok(frames)
    }

    fn load(&self, files: &FrameFiles) -> Result<Frame, SegmentationError> {
        load(files)
    }
}

/// Reads a frame whose objects are in one PNG file.
pub(super) fn load(files: &FrameFiles) -> Result<Frame, SegmentationError> {
    let image = Decoding::default().file(&files.image)?;
    let path = &files.annotations[0].1;
    let indices = Indices::read(path, image.height(), image.width())?;
    let values = indices.objects();
    let is_void = |value: u16| indices.is_palette && value == VOID;
    let objects = values
        .iter()
        .filter(|&&value| !is_void(value))
        .map(|&value| Object {
            name: value.to_string(),
            mask: indices.mask(|pixel| pixel == value),
            points: Vec::new(),
            bounds: None,
        })
        .collect();
    let void = values.iter().any(|&value| is_void(value)).then(|| indices.mask(is_void));
    Ok(Frame { image, annotation: path.clone(), objects, void })
}
