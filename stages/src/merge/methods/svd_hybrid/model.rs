//! Basis and coefficients of a merge, and what sums of experts look like in terms of either.

use crate::StageError;
use crate::factors::{Basis, BasisParameter, BasisRegion, Coefficients};
use crate::gram::form;
use crate::merge::inputs::MergeInputs;

/// A basis with the coefficients of the tasks that are merged.
pub(super) struct Model {
    pub basis: Basis,
    pub coefficients: Vec<Coefficients>,
    /// Per parameter of the basis, region and task: ‖μ‖, then the coefficients (none where the region contributes nothing); what is
    /// dropped is 0.
    values: Vec<Vec<Vec<Vec<f64>>>>,
}

impl Model {
    /// Reads the coefficients, which must all be of one basis.
    pub(super) fn open(inputs: &MergeInputs<'_>, keep_low: bool) -> Result<Self, StageError> {
        let job = inputs.job;
        let opened: Result<Vec<Coefficients>, StageError> =
            job.inputs_on("vectors").map(|input| Coefficients::open(job, input)).collect();
        let coefficients = opened?;
        let Some(first) = coefficients.first() else {
            return Err(StageError::input("there are no coefficients to merge"));
        };
        if let Some(other) = coefficients.iter().position(|other| other.basis != first.basis) {
            return Err(StageError::input(format!(
                "the coefficients of task `{}` belong to another basis than those of task `{}`",
                inputs.vectors[other].name, inputs.vectors[0].name
            )));
        }
        let basis = Basis::open(job, &first.basis)?;
        let mut values = Vec::with_capacity(basis.parameters.len());
        for parameter in &basis.parameters {
            let mut of_regions = Vec::with_capacity(parameter.regions.len());
            for region in &parameter.regions {
                let Some(factors) = &region.factors else {
                    of_regions.push(vec![Vec::new(); coefficients.len()]);
                    continue;
                };
                let of_task = |coefficients: &Coefficients| {
                    let (high, low) = coefficients.region(&parameter.info.name, region.region, factors)?;
                    let low = low.into_iter().map(|c| if keep_low { c } else { 0.0 });
                    Ok([factors.sigma[0]].into_iter().chain(high).chain(low).collect())
                };
                of_regions
                    .push(coefficients.iter().map(of_task).collect::<Result<Vec<Vec<f64>>, StageError>>()?);
            }
            values.push(of_regions);
        }
        Ok(Self { basis, coefficients, values })
    }

    /// Every parameter of the basis must be one of the base.
    pub(super) fn check_base(&self, inputs: &MergeInputs<'_>) -> Result<(), StageError> {
        for parameter in &self.basis.parameters {
            let info = &parameter.info;
            let Some(index) = inputs.base.index_of(&info.name) else {
                let message = format!("the base has no tensor `{}`, which the basis has", info.name);
                return Err(StageError::input(message));
            };
            let shape = &inputs.base.tensors()[index].shape;
            if *shape != info.shape {
                return Err(StageError::input(format!(
                    "tensor `{}` has shape {:?} in the basis and {shape:?} in the base",
                    info.name, info.shape
                )));
            }
        }
        Ok(())
    }

    /// The position of a parameter.
    pub(super) fn position(&self, parameter: &str) -> Option<usize> {
        let parameters = &self.basis.parameters;
        parameters.binary_search_by(|known| known.info.name.as_str().cmp(parameter)).ok()
    }

    pub(super) fn parameter(&self, position: usize) -> &BasisParameter {
        &self.basis.parameters[position]
    }

    /// The regions of a parameter, with a weighted sum of the coefficients of all tasks: factors of the directions, the mean first.
    /// Empty where the region contributes nothing.
    pub(super) fn combined(&self, position: usize, weights: &[f64]) -> Vec<(&BasisRegion, Vec<f64>)> {
        let regions = self.parameter(position).regions.iter().zip(&self.values[position]);
        regions
            .map(|(region, of_tasks)| {
                let width = of_tasks.first().map_or(0, Vec::len);
                let mut sum = vec![0.0; width];
                for (weight, values) in weights.iter().zip(of_tasks) {
                    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += weight * value);
                }
                (region, sum)
            })
            .collect()
    }

    /// The regions of a parameter with a task's own coefficients.
    pub(super) fn of_task(&self, position: usize, task: usize) -> Vec<(&BasisRegion, Vec<f64>)> {
        let regions = self.parameter(position).regions.iter().zip(&self.values[position]);
        regions.map(|(region, of_tasks)| (region, of_tasks[task].clone())).collect()
    }

    /// All coefficients of a parameter, high-energy ones first.
    pub(super) fn parts(&self, position: usize) -> impl Iterator<Item = (&[f64], &[f64])> {
        let regions = self.parameter(position).regions.iter().zip(&self.values[position]);
        regions
            .filter_map(|(region, of_tasks)| Some((region.factors.as_ref()?.rank, of_tasks)))
            .flat_map(|(rank, of_tasks)| of_tasks.iter().map(move |values| values[1..].split_at(rank)))
    }

    /// The inner products of the tasks as their coefficients give them back.
    pub(super) fn gram(&self) -> Vec<f64> {
        let n = self.coefficients.len();
        let mut total = vec![0.0; n * n];
        for position in 0..self.basis.parameters.len() {
            let of_tasks: Vec<Vec<Vec<f64>>> = (0..n)
                .map(|task| {
                    self.of_task(position, task)
                        .iter()
                        .map(|(region, values)| in_tasks(region, values))
                        .collect()
                })
                .collect();
            for (index, region) in self.parameter(position).regions.iter().enumerate() {
                for s in 0..n {
                    for t in 0..n {
                        total[s * n + t] += form(&region.gram, &of_tasks[s][index], &of_tasks[t][index]);
                    }
                }
            }
        }
        total
    }
}

/// Factors of the directions of a region as factors of the task vectors that the basis was made from.
pub(super) fn in_tasks(region: &BasisRegion, of_directions: &[f64]) -> Vec<f64> {
    match &region.factors {
        Some(factors) => factors.of_tasks(of_directions),
        None => vec![0.0; region.gram.len().isqrt()],
    }
}
