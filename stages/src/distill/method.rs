//! What a way to train is: how it describes itself, and what it makes of a model and a dataset.

use super::classifier::Validating;
use super::training::TrainingParams;
use crate::evaluate::Evaluation;
use crate::filter::NameFilter;
pub(super) use crate::merge::Need;
use crate::params::{Params, Problem};
use crate::seen::Seen;
use crate::{Draft, Job, StageError};
use merganser_cache::Value;
use merganser_tensors::TensorSource;
use schemars::Schema;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A way to train; one file each.
pub(super) trait Method: Sync {
    /// What `method = "…"` says.
    fn id(&self) -> &'static str;

    fn summary(&self) -> &'static str;

    fn formula(&self) -> &'static str;

    fn source(&self) -> &'static str;

    fn schema(&self) -> Schema;

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Distill>, Vec<Problem>>;
}

/// A method with its parameters.
pub(super) trait Distill: Send + Sync {
    /// Raised whenever the method's numbers change.
    fn version(&self) -> u32;

    fn parameters(&self) -> Result<Value, StageError>;

    /// Whether it works with the port `teacher`.
    fn teacher(&self) -> Need {
        Need::No
    }

    /// Which images decide what comes out. Unless a method does it otherwise: those that are trained on, with their labels, and those for
    /// validation where they stop training or choose an epoch.
    fn seen(&self, setup: &Setup<'_>) -> Seen {
        setup.seen(true, setup.training.selects())
    }

    /// Trains, and stores the result.
    fn run(&self, setup: &Setup<'_>) -> Result<Draft, StageError>;
}

/// A model with the images to train it on.
pub(super) struct Setup<'a> {
    pub job: &'a Job<'a>,
    pub task: &'a str,
    pub training: &'a TrainingParams,
    /// Which tensors may be trained.
    pub filter: &'a NameFilter,
    pub evaluation: Evaluation<'a>,
    /// Under the names of the origin.
    pub model: Arc<dyn TensorSource>,
    /// The images to train on, by their positions in the dataset.
    pub images: Vec<usize>,
    pub validating: Option<Validating<'a>>,
}

impl<'a> Setup<'a> {
    /// Where the images for validation are, and their positions there.
    pub(super) fn validation(&self) -> Option<(&Evaluation<'a>, &[usize])> {
        let Validating { elsewhere, images } = self.validating.as_ref()?;
        Some((elsewhere.as_ref().unwrap_or(&self.evaluation), images))
    }

    /// The images of the dataset, set aside or not, and those for validation elsewhere if they decide anything.
    ///
    /// Set aside or not, because scores on a dataset are told by the whole of it: they count those that were trained on in any case.
    pub(super) fn seen(&self, labels: bool, validation_decides: bool) -> Seen {
        let of_task = |evaluation: &Evaluation<'_>| (self.task.to_owned(), evaluation.record().clone());
        let elsewhere = self.validating.as_ref().and_then(|validating| validating.elsewhere.as_ref());
        Seen {
            labels,
            images: BTreeMap::from([of_task(&self.evaluation)]),
            validation: elsewhere.filter(|_| validation_decides).map(of_task).into_iter().collect(),
        }
    }
}
