//! Format `davis`: the folders of DAVIS 2016 and 2017. `JPEGImages/480p/<sequence>/00000.jpg`, `Annotations/480p/<sequence>/00000.png` with a
//! palette index per object (255 is void), `ImageSets/<year>/<split>.txt` with the sequences of a split.
//!
//! The split is the name of a list, such as `val` (of 2017 if there are several years) or `2016/val`; without one all annotated sequences count.
//! `Full-Resolution` is read where there is no `480p`. Frames without an annotation are left out.

use super::super::SegmentationError;
use super::listing::{Entry, entries, folders, names};
use super::pairs;
use super::registry::{Format, Frame, FrameFiles};
use std::path::{Path, PathBuf};

pub(super) struct Davis;

const RESOLUTIONS: &[&str] = &["480p", "Full-Resolution"];

/// Years whose lists are looked at, the first first.
const YEARS: &[&str] = &["2017", "2016"];

impl Format for Davis {
    fn id(&self) -> &'static str {
        "davis"
    }

    fn summary(&self) -> &'static str {
        "DAVIS 2016 and 2017: folders of JPEG frames and of PNG masks with a palette index per object"
    }

    fn frames(&self, path: &Path, split: Option<&str>) -> Result<Vec<FrameFiles>, SegmentationError> {
        let annotations = path.join("Annotations");
        let resolution = RESOLUTIONS.iter().find(|name| annotations.join(name).is_dir());
        let Some(resolution) = resolution else {
            let needed_by = format!("`{}`", path.display());
            return Err(SegmentationError::Missing { path: annotations.join(RESOLUTIONS[0]), needed_by });
        };
        let (masks, images) = (annotations.join(resolution), path.join("JPEGImages").join(resolution));
        let sequences = match split {
            Some(split) => names(&list(path, split)?)?,
            None => folders(&masks)?,
        };
        let mut frames = Vec::new();
        for sequence in sequences {
            for mask in entries(&masks.join(&sequence))?.into_iter().filter(|entry| entry.extension == "png")
            {
                let image = images.join(&sequence).join(format!("{}.jpg", mask.stem));
                if !image.is_file() {
                    let needed_by = format!("`{}`", mask.path.display());
                    return Err(SegmentationError::Missing { path: image, needed_by });
                }
                let Entry { stem, path, .. } = mask;
                let annotations = vec![(String::new(), path)];
                frames.push(FrameFiles { sequence: sequence.clone(), frame: stem, image, annotations });
            }
        }
        if frames.is_empty() {
            let expected = "expected sequences of PNG masks";
            return Err(SegmentationError::Nothing { path: masks, expected });
        }
        Ok(frames)
    }

    fn load(&self, files: &FrameFiles) -> Result<Frame, SegmentationError> {
        pairs::load(files)
    }
}

/// The file that lists the sequences of a split.
fn list(path: &Path, split: &str) -> Result<PathBuf, SegmentationError> {
    let sets = path.join("ImageSets");
    let candidates = match split.split_once('/') {
        Some((year, name)) => vec![sets.join(year).join(format!("{name}.txt"))],
        None => YEARS.iter().map(|year| sets.join(year).join(format!("{split}.txt"))).collect(),
    };
    let found = candidates.iter().find(|list| list.is_file()).cloned();
    found.ok_or_else(|| SegmentationError::Missing {
        path: candidates[0].clone(),
        needed_by: format!("split `{split}`"),
    })
}
