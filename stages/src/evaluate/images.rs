//! The images of an evaluation: opened, without those that cannot be decoded if so asked, compared with the training images, and described for
//! the scores.

use super::params::{DatasetParams, OnError};
use super::scores::Images;
use crate::images::dataset::{self, Dataset, DatasetError, DatasetSpec};
use crate::images::preprocess::PreparedImages;
use crate::{Job, StageError};
use blake3::Hash;
use std::collections::HashMap;
use std::path::Path;

/// The images of a dataset for all models, and what their scores say about them.
pub(crate) struct Opened {
    pub images: PreparedImages,
    pub record: Images,
}

/// Opens the images of dataset `task`, with what the scores say about them.
pub(super) fn open(
    job: &Job<'_>,
    params: &DatasetParams,
    task: &str,
) -> Result<(Box<dyn Dataset>, Images), StageError> {
    let spec = params.spec(task);
    let all = dataset::open(&spec)?;
    let n_all = all.len();
    let (images, skipped) = match params.on_error {
        OnError::Fail => (all, Vec::new()),
        OnError::Skip => dataset::readable(all, job.cancelled)?,
    };
    if (job.cancelled)() {
        return Err(StageError::Cancelled);
    }
    if let Some(first) = skipped.first() {
        let n = skipped.len();
        let message =
            format!("`{task}`: {n} of {n_all} images cannot be decoded and are left out; the first is");
        job.warn(format!("{message} {}: {}", first.image, first.reason));
    }
    if images.is_empty() {
        return Err(StageError::input(format!("dataset `{task}` has no images")));
    }
    let in_training = params.train_spec(task).map(|train| shared(job, task, &*images, &train)).transpose()?;
    let record = Images {
        manifest: manifest(job, &spec)?,
        n: images.len() as u64,
        skipped: skipped.len() as u64,
        in_training,
    };
    Ok((images, record))
}

/// Counts the images that are training images too, and warns of them.
fn shared(job: &Job<'_>, task: &str, images: &dyn Dataset, train: &DatasetSpec) -> Result<u64, StageError> {
    let train = dataset::open(train)?;
    let overlap = dataset::overlap(images, &*train, job.cancelled);
    if (job.cancelled)() {
        return Err(StageError::Cancelled);
    }
    if let Some((scored, used)) = overlap.example {
        let (n, of) = (overlap.images, images.len());
        job.warn(format!(
            "`{task}`: {n} of {of} images that are scored are among the training images, such as {scored}, which is {used}"
        ));
    }
    Ok(overlap.images as u64)
}

/// The digest of the dataset, from the digests of its files that are in the key.
fn manifest(job: &Job<'_>, spec: &DatasetSpec) -> Result<Hash, StageError> {
    let digests: HashMap<&Path, Hash> =
        job.sources.iter().map(|source| (source.path.as_path(), source.source.digest)).collect();
    dataset::manifest_digest(spec, |path| {
        digests.get(path).copied().ok_or_else(|| {
            // Listed now, and not when the key was computed.
            StageError::Dataset(DatasetError::Changed { path: path.to_owned() })
        })
    })
}
