//! What an annotated data set is, and the formats there are.
//!
//! To add a format: one file with a unit struct that implements [`Format`], one line in [`FORMATS`].

use super::super::SegmentationError;
use super::super::rle::Rle;
use super::{davis, pairs, sa1b, sav};
use crate::images::dataset::Image;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Every format, in the order in which they are listed to the user.
pub static FORMATS: &[&dyn Format] = &[&sa1b::Sa1b, &pairs::Pairs, &davis::Davis, &sav::SaV];

/// Where a data set lies and how to read it.
#[derive(Clone, Debug, Default)]
pub struct Spec {
    /// The id of a [`Format`].
    pub format: String,
    pub path: PathBuf,
    /// The part of the data set that is meant, where a folder holds several.
    pub split: Option<String>,
    /// Use this many frames, the first ones.
    pub limit: Option<usize>,
}

/// One way in which annotated images are stored.
pub trait Format: Send + Sync {
    /// Returns the name that the user types.
    fn id(&self) -> &'static str;

    /// Describes the format in one line.
    fn summary(&self) -> &'static str;

    /// Lists the frames in order, without reading images or masks.
    fn frames(&self, path: &Path, split: Option<&str>) -> Result<Vec<FrameFiles>, SegmentationError>;

    /// Reads the image of a frame and the masks of its objects.
    fn load(&self, files: &FrameFiles) -> Result<Frame, SegmentationError>;
}

/// The files of one frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameFiles {
    /// The image's or video's name.
    pub sequence: String,
    /// The frame's name within a video; empty for a still image.
    pub frame: String,
    pub image: PathBuf,
    /// Files of masks, each with the object that it is of (empty if the file says so itself).
    pub annotations: Vec<(String, PathBuf)>,
}

/// An image and the objects in it.
#[derive(Clone, Debug)]
pub struct Frame {
    pub image: Image,
    /// Where the masks come from, for messages.
    pub annotation: PathBuf,
    /// In the order of the annotation.
    pub objects: Vec<Object>,
    /// Pixels that count for nobody.
    pub void: Option<Rle>,
}

/// An object in an image.
#[derive(Clone, Debug)]
pub struct Object {
    /// Its name, the same in all frames of a video.
    pub name: String,
    pub mask: Rle,
    /// Points inside that the data set gives as a prompt, as x, y.
    pub points: Vec<[f64; 2]>,
    /// The box that the data set gives, as left, top, right, bottom.
    pub bounds: Option<[f64; 4]>,
}

/// A file whose content matters, under a name that does not depend on where the data set lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    pub label: String,
    pub path: PathBuf,
}

/// A data set, listed.
pub struct MaskedImages {
    format: &'static dyn Format,
    frames: Vec<FrameFiles>,
}

impl MaskedImages {
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Returns the frames, in order; those of a video follow each other.
    pub fn frames(&self) -> &[FrameFiles] {
        &self.frames
    }

    /// Reads a frame.
    ///
    /// # Panics
    /// If `index` is not below [`MaskedImages::len`].
    pub fn load(&self, index: usize) -> Result<Frame, SegmentationError> {
        self.format.load(&self.frames[index])
    }
}

/// Finds a format by its name.
pub fn find(id: &str) -> Option<&'static dyn Format> {
    FORMATS.iter().copied().find(|format| format.id() == id)
}

/// Lists the formats for messages.
pub fn known() -> String {
    FORMATS.iter().map(|format| format!("`{}`", format.id())).collect::<Vec<_>>().join(", ")
}

/// Lists a data set.
pub fn open(spec: &Spec) -> Result<MaskedImages, SegmentationError> {
    let format = find(&spec.format)
        .ok_or_else(|| SegmentationError::UnknownFormat { format: spec.format.clone(), known: known() })?;
    let mut frames = format.frames(&spec.path, spec.split.as_deref())?;
    frames.truncate(spec.limit.unwrap_or(usize::MAX));
    Ok(MaskedImages { format, frames })
}

/// Lists the files whose content matters, each once, in the data set's order.
pub fn files(spec: &Spec) -> Result<Vec<SourceFile>, SegmentationError> {
    let mut files: Vec<SourceFile> = Vec::new();
    let mut listed: HashSet<PathBuf> = HashSet::new();
    let mut list = |label: String, path: &PathBuf| {
        // A file that holds all frames of a video belongs to many.
        if listed.insert(path.clone()) {
            files.push(SourceFile { label, path: path.clone() });
        }
    };
    for frame in &open(spec)?.frames {
        let name = format!("{}/{}", frame.sequence, frame.frame);
        list(format!("image {name}"), &frame.image);
        for (object, path) in &frame.annotations {
            list(format!("mask {name} {object}"), path);
        }
    }
    Ok(files)
}
