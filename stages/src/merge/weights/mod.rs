//! Task weights: how much each task vector counts.
//!
//! | `weights =` | meaning |
//! |---|---|
//! | `"uniform"` | every task counts 1 |
//! | `{ mnist = 1.0, fashion = -0.5 }` | as given |
//! | `{ performance = …, temperature = 1.0 }` | T · softmax(accuracy / temperature) |
//! | `{ cluster = 3, … }` | T · (share of the cluster) · (share within it) |
//!
//! Weights that are computed have the mean 1, as uniform ones do; methods that average divide by their sum. Because all methods that
//! take weights are linear in them, merging inside clusters first and across clusters then is the product of the two shares.

mod cluster;
mod performance;
mod syntax;

pub(super) use cluster::Clusters;
pub(super) use performance::{Accuracies, Performance};

use super::inputs::{MergeInputs, Operand};
use super::method::Need;
use crate::gram::{Place, TaskVectors};
use crate::params::{Problem, did_you_mean};
use crate::{SourceSet, StageError};
use indexmap::IndexMap;
use std::sync::Arc;

/// How much each task vector counts; see the module.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum TaskWeights {
    #[default]
    Uniform,
    Explicit(IndexMap<String, f64>),
    Performance(Performance),
    Cluster(Clusters),
}

impl TaskWeights {
    /// The weight of each task vector of a merge, in their order. Clusters are found in the tensors `operands`.
    pub(super) fn of(
        &self,
        inputs: &MergeInputs<'_>,
        operands: &[&Operand<'_>],
    ) -> Result<Vec<f64>, StageError> {
        self.with_grams(inputs, || task_gram(inputs, operands))
    }

    /// [`Self::of`], with the inner products of the task vectors (T × T) from elsewhere; only clusters ask for them.
    pub(super) fn with_grams(
        &self,
        inputs: &MergeInputs<'_>,
        gram: impl FnOnce() -> Result<Vec<f64>, StageError>,
    ) -> Result<Vec<f64>, StageError> {
        let names: Vec<&str> = inputs.vectors.iter().map(|vector| vector.name.as_str()).collect();
        match self {
            Self::Uniform => Ok(vec![1.0; names.len()]),
            Self::Explicit(weights) => {
                Ok(names.iter().map(|name| weights.get(*name).copied().unwrap_or(0.0)).collect())
            }
            Self::Performance(performance) => performance.weights(inputs.job, &names),
            Self::Cluster(clusters) => clusters.weights(inputs.job, &names, &gram()?),
        }
    }

    /// The sum of weights that are given; `None` if they are computed, which always add up to the number of tasks.
    pub(super) fn given_sum(&self) -> Option<f64> {
        match self {
            Self::Explicit(weights) => Some(weights.values().sum()),
            _ => None,
        }
    }

    /// Explicit weights must be finite and name exactly the members.
    pub(super) fn check(&self, members: &[String]) -> Result<(), Problem> {
        let weights = match self {
            Self::Explicit(weights) => weights,
            Self::Cluster(clusters) => return clusters.check(members),
            Self::Uniform | Self::Performance(_) => return Ok(()),
        };
        if let Some((name, weight)) = weights.iter().find(|(_, weight)| !weight.is_finite()) {
            return Err(Problem::new(
                "bad-value",
                format!("the weight of `{name}` must be finite, got {weight}"),
            ));
        }
        if let Some(name) = weights.keys().find(|name| !members.contains(name)) {
            let help = did_you_mean(name, members.iter().map(String::as_str));
            return Err(Problem {
                help,
                ..Problem::new("unknown-member", format!("`weights` names `{name}`, which is no task"))
            });
        }
        if let Some(member) = members.iter().find(|member| !weights.contains_key(*member)) {
            return Err(Problem::new(
                "unknown-member",
                format!("`weights` does not say how much task `{member}` counts"),
            )
            .help("give every task a weight; 0 leaves it out"));
        }
        Ok(())
    }

    /// Whether the port `scores` is read.
    pub(super) fn scores(&self) -> Need {
        match self.accuracies() {
            Some(Accuracies::Scores) => Need::Required,
            _ => Need::No,
        }
    }

    /// The file of accuracies, if there is one.
    pub(super) fn sources(&self) -> Result<Vec<SourceSet>, StageError> {
        match self.accuracies() {
            Some(Accuracies::File(file)) if !file.path.is_file() => Err(StageError::MissingFile {
                parameter: "weights.performance".to_owned(),
                path: file.path.clone(),
            }),
            Some(Accuracies::File(file)) => Ok(vec![SourceSet::one(performance::PARAMETER, &file.path)]),
            _ => Ok(Vec::new()),
        }
    }

    fn accuracies(&self) -> Option<&Accuracies> {
        match self {
            Self::Performance(performance) => Some(&performance.accuracies),
            Self::Cluster(clusters) => {
                clusters.performance.as_ref().map(|performance| &performance.accuracies)
            }
            Self::Uniform | Self::Explicit(_) => None,
        }
    }
}

/// The inner products of whole task vectors, over all `operands`: a streaming pass.
fn task_gram(inputs: &MergeInputs<'_>, operands: &[&Operand<'_>]) -> Result<Vec<f64>, StageError> {
    let vectors = TaskVectors {
        names: inputs.vectors.iter().map(|vector| vector.name.clone()).collect(),
        sources: inputs.vectors.iter().map(|vector| Arc::clone(&vector.tensors)).collect(),
        masks: None,
    };
    let place = |operand: &&Operand<'_>| Place {
        vectors: operand.positions().to_vec(),
        mask: None,
        n_elements: operand.n_elements(),
    };
    let n = vectors.sources.len();
    let mut total = vec![0.0; n * n];
    for gram in vectors.grams(&operands.iter().map(place).collect::<Vec<_>>())? {
        total.iter_mut().zip(gram.signal).for_each(|(sum, x)| *sum += x);
    }
    Ok(total)
}
