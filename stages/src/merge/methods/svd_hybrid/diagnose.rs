//! How far reconstructed experts are from the real ones, and the merge from simpler ones.
//!
//! Lengths follow from the inner products of the task vectors that the basis keeps: with e the difference of two models in terms of the
//! task vectors, ‖Σ_s e_s τ_s‖² = eᵀGe, without reading anything. The rounding of stored directions is not in it. Where the port `deltas`
//! is connected, the task vectors themselves are read and compared: everything is in that, and largest and mean errors come with it.

use super::model::in_tasks;
use super::rule::{HybridRule, Plan};
use crate::StageError;
use crate::diagnostics::{
    Diagnostics, HistogramBin, MergedDiagnostics, ParameterDiagnostics, RegionDiagnostics, TaskDiagnostics,
    TaskWeight,
};
use crate::factors::stored_bytes;
use crate::gram::form;
use crate::merge::inputs::Operand;
use merganser_tensors::TensorSource;
use merganser_tensors::stream::over_blocks;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The factor of task arithmetic that a merge is compared with.
const USUAL_SCALE: f64 = 0.3;

pub(super) fn diagnose(rule: &HybridRule<'_>, operands: &[&Operand<'_>]) -> Result<Diagnostics, StageError> {
    let model = &rule.model;
    let positions: Vec<usize> =
        operands.iter().filter_map(|operand| model.position(operand.name())).collect();
    let mut parameters: Vec<ParameterDiagnostics> =
        positions.iter().map(|position| of_parameter(rule, *position)).collect();
    measure(rule, &positions, &mut parameters)?;
    let mut histogram: BTreeMap<i32, (u64, u64)> = BTreeMap::new();
    for position in &positions {
        for (high, low) in model.parts(*position) {
            let exponent = |c: &f64| (*c != 0.0).then(|| c.abs().log10().floor() as i32);
            high.iter().filter_map(exponent).for_each(|e| histogram.entry(e).or_default().0 += 1);
            low.iter().filter_map(exponent).for_each(|e| histogram.entry(e).or_default().1 += 1);
        }
    }
    let mut diagnostics = Diagnostics::of(parameters);
    diagnostics.histogram =
        histogram.into_iter().map(|(exponent, (high, low))| HistogramBin { exponent, high, low }).collect();
    let names = rule.inputs.vectors.iter().map(|vector| vector.name.clone());
    diagnostics.weights =
        names.zip(&rule.weights).map(|(task, weight)| TaskWeight { task, weight: *weight }).collect();
    Ok(diagnostics)
}

/// The tasks that are reported: the one that is reconstructed, or all.
fn reported(rule: &HybridRule<'_>) -> Vec<usize> {
    match rule.inputs.task {
        Some(task) => vec![task],
        None => (0..rule.inputs.vectors.len()).collect(),
    }
}

/// What follows from the inner products.
fn of_parameter(rule: &HybridRule<'_>, position: usize) -> ParameterDiagnostics {
    let model = &rule.model;
    let parameter = model.parameter(position);
    let n_elements = parameter.info.n_elements() as u64;
    let mut tasks = Vec::new();
    for task in reported(rule) {
        let name = &rule.inputs.vectors[task].name;
        // A task that the basis was not made from is known by its coefficients only.
        let Some(own) = model.basis.tasks.iter().position(|known| known.member == *name) else { continue };
        let (mut error, mut norm) = (0.0, 0.0);
        for (region, values) in model.of_task(position, task) {
            let mut off = in_tasks(region, &values);
            off[own] -= 1.0;
            error += form(&region.gram, &off, &off);
            norm += region.gram[own * off.len() + own];
        }
        tasks.push(TaskDiagnostics::of_norms(name, error.max(0.0).sqrt(), norm.max(0.0).sqrt()));
    }
    let merged = rule.inputs.task.is_none().then(|| {
        let mut squares = [0.0; 5];
        for (region, values) in model.combined(position, &rule.weights) {
            let scale = rule.scales[region.region as usize];
            let delta: Vec<f64> =
                in_tasks(region, &values).into_iter().map(|factor| factor * scale).collect();
            let square = |factors: &[f64]| form(&region.gram, factors, factors);
            let less = |other: f64| square(&delta.iter().map(|factor| factor - other).collect::<Vec<_>>());
            let all = |value: f64| square(&vec![value; delta.len()]);
            let average = 1.0 / delta.len() as f64;
            let found = [square(&delta), less(average), all(average), less(USUAL_SCALE), all(USUAL_SCALE)];
            squares.iter_mut().zip(found).for_each(|(sum, square)| *sum += square);
        }
        MergedDiagnostics::of_squares(squares)
    });
    let regions = parameter.regions.iter().filter_map(|region| {
        let factors = region.factors.as_ref()?;
        Some(RegionDiagnostics {
            region: region.region.label().to_owned(),
            n_entries: factors.n_entries as u64,
            rank: factors.rank,
            n_directions: factors.n_directions(),
            energy_retained: factors.energy_retained(),
        })
    });
    let coefficients: u64 =
        model.coefficients.iter().map(|coefficients| coefficients.stored_bytes(&parameter.info.name)).sum();
    let parts = ["gram", "sigma", "directions", "rank", "basis"];
    let mut basis = stored_bytes(&model.basis.manifest, &parameter.info.name, &parts);
    if !model.basis.is_stored {
        basis += 4 * n_elements * model.basis.tasks.len() as u64;
    }
    ParameterDiagnostics {
        name: parameter.info.name.clone(),
        n_elements,
        regions: regions.collect(),
        stored_bytes: coefficients + basis,
        plain_bytes: 4 * n_elements * model.coefficients.len() as u64,
        tasks,
        merged,
    }
}

/// Sums over the entries of a block.
#[derive(Clone, Copy, Default)]
struct Errors {
    squares: f64,
    magnitudes: f64,
    largest: f64,
    norm: f64,
}

/// Compares with the task vectors themselves, if they are there.
fn measure(
    rule: &HybridRule<'_>,
    positions: &[usize],
    parameters: &mut [ParameterDiagnostics],
) -> Result<(), StageError> {
    let job = rule.inputs.job;
    let mut known: Vec<(usize, Arc<dyn TensorSource>)> = Vec::new();
    for task in reported(rule) {
        let name = &rule.inputs.vectors[task].name;
        if let Some(input) =
            job.inputs_on("deltas").find(|input| input.member.as_deref().unwrap_or_default() == name)
        {
            known.push((task, job.tensors(input)?));
        }
    }
    if known.is_empty() {
        return Ok(());
    }
    let model = &rule.model;
    let sizes: Vec<usize> =
        positions.iter().map(|position| model.parameter(*position).info.n_elements()).collect();
    let plan = |position: &usize, task: usize| {
        Plan::new(model, *position, &model.of_task(*position, task), [1.0; 2])
    };
    let plans: Vec<Vec<Plan>> = positions
        .iter()
        .map(|position| known.iter().map(|(task, _)| plan(position, *task)).collect())
        .collect();
    let mut tensors = Vec::with_capacity(positions.len());
    for position in positions {
        let info = &model.parameter(*position).info;
        let find = |(_, source): &(usize, Arc<dyn TensorSource>)| {
            source.index_of(&info.name).filter(|index| source.tensors()[*index].shape == info.shape)
        };
        let found: Option<Vec<usize>> = known.iter().map(find).collect();
        tensors.push(found.ok_or_else(|| {
            StageError::input(format!(
                "a task vector on port `deltas` has no tensor `{}` of shape {:?}, which the basis has",
                info.name, info.shape
            ))
        })?);
    }
    let blocks = over_blocks(&sizes, |index, range, scratch, memory: &mut [Vec<f32>; 2]| {
        let [model, real] = memory;
        model.resize(range.len(), 0.0);
        real.resize(range.len(), 0.0);
        let mut found = Vec::with_capacity(known.len());
        for ((plan, tensor), (_, source)) in plans[index].iter().zip(&tensors[index]).zip(&known) {
            rule.reader.block(plan, range.clone(), model, scratch)?;
            source.read_f32(*tensor, range.clone(), real, scratch)?;
            let mut errors = Errors::default();
            for (model, real) in model.iter().zip(&*real) {
                let off = (f64::from(*model) - f64::from(*real)).abs();
                errors.squares += off * off;
                errors.magnitudes += off;
                errors.largest = errors.largest.max(off);
                errors.norm += f64::from(*real) * f64::from(*real);
            }
            found.push(errors);
        }
        Ok(found)
    })?;
    for (parameter, blocks) in parameters.iter_mut().zip(blocks) {
        let mut measured = Vec::with_capacity(known.len());
        for (index, (task, _)) in known.iter().enumerate() {
            let mut total = Errors::default();
            for errors in blocks.iter().map(|block| block[index]) {
                total.squares += errors.squares;
                total.magnitudes += errors.magnitudes;
                total.largest = total.largest.max(errors.largest);
                total.norm += errors.norm;
            }
            let name = &rule.inputs.vectors[*task].name;
            measured.push(TaskDiagnostics {
                max: Some(total.largest),
                mean_absolute: Some(total.magnitudes / parameter.n_elements.max(1) as f64),
                ..TaskDiagnostics::of_norms(name, total.squares.sqrt(), total.norm.sqrt())
            });
        }
        parameter.tasks = measured;
    }
    Ok(())
}
