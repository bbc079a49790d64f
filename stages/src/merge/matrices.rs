//! What methods that decompose matrices share: which tensors are matrices, reading them, and what happens to all other tensors.
//!
//! A matrix is a tensor of two dimensions, none of them 0; vectors, scalars and convolutions are merged element by element, as the
//! authors do. Matrices are read as f32, decomposed in f64, and rounded once, at the end.

use super::inputs::Operand;
use super::linear::{Linear, Rescale};
use super::method::Rule;
use crate::StageError;
use crate::filter::NameGlob;
use merganser_algebra as algebra;
use merganser_tensors::source::check_finite;
use merganser_tensors::{Result, Scratch};
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;
use std::ops::Range;

/// What a method does with a matrix.
pub(super) trait MatrixMethod: Send + Sync {
    /// Whether this tensor is merged as a matrix.
    fn treats(&self, operand: &Operand<'_>) -> bool;

    /// Writes the merged task vector of a matrix.
    fn merge(&self, operand: &Operand<'_>, out: &mut [f32]) -> std::result::Result<(), StageError>;
}

/// A method for matrices, and sums for everything else.
pub(super) struct Matrices<M> {
    pub method: M,
    pub others: Linear,
}

impl<M: MatrixMethod> Rule for Matrices<M> {
    fn needs_whole(&self, operand: &Operand<'_>) -> bool {
        self.method.treats(operand)
    }

    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        if self.others.coefficients.is_empty() {
            // What is not used is looked at all the same: a checkpoint with a NaN is broken.
            let mut values = scratch.take(range.len());
            for task in 0..operand.n_tasks() {
                operand.read(task, range.clone(), &mut values, scratch)?;
                check_finite(operand.name(), range.start, &values)?;
            }
            scratch.give_back(values);
        }
        self.others.block(operand, range, out, scratch)
    }

    fn tensor(&self, operand: &Operand<'_>, out: &mut [f32]) -> std::result::Result<(), StageError> {
        self.method.merge(operand, out)
    }
}

/// scale · mean of the task vectors.
pub(super) fn scaled_mean(n_tasks: usize, scale: f64) -> Linear {
    scaled_sum(n_tasks, scale / n_tasks as f64)
}

/// scale · sum of the task vectors.
pub(super) fn scaled_sum(n_tasks: usize, scale: f64) -> Linear {
    Linear { coefficients: vec![1.0; n_tasks], rescale: Rescale::Multiply(scale as f32), masks: Vec::new() }
}

/// Nothing: the base stays as it is.
pub(super) fn nothing() -> Linear {
    Linear { coefficients: Vec::new(), rescale: Rescale::Multiply(1.0), masks: Vec::new() }
}

/// The names of matrices that the authors of several methods leave out: the projection of CLIP's text side.
pub(super) fn text_projection() -> Vec<NameGlob> {
    globs(&["*text_projection*"])
}

/// Globs that are known to be well-formed.
pub(super) fn globs(patterns: &[&str]) -> Vec<NameGlob> {
    patterns
        .iter()
        .map(|pattern| NameGlob::new(pattern).expect("a constant pattern is well-formed"))
        .collect()
}

/// Whether it is a matrix that none of `left_out` matches.
pub(super) fn is_matrix(operand: &Operand<'_>, left_out: &[NameGlob]) -> bool {
    operand.as_matrix().is_some() && !left_out.iter().any(|glob| glob.matches(operand.name()))
}

/// The task vectors of a matrix in the order of the tasks, all finite.
pub(super) fn read_all(operand: &Operand<'_>) -> Result<Vec<Array2<f32>>> {
    (0..operand.n_tasks()).into_par_iter().map(|task| read(operand, task)).collect()
}

/// One task vector of a matrix, finite.
pub(super) fn read(operand: &Operand<'_>, task: usize) -> Result<Array2<f32>> {
    let values = operand.whole(task, &mut Scratch::new())?;
    Ok(shaped(operand, values))
}

/// Values of a tensor that [`Operand::as_matrix`] says is a matrix.
pub(super) fn shaped<T>(operand: &Operand<'_>, values: Vec<T>) -> Array2<T> {
    let shape = operand.as_matrix().expect("only matrices are read as such");
    Array2::from_shape_vec(shape, values).expect("a tensor has as many values as its shape says")
}

/// Σ_t τ_t in f64, in the order of the tasks.
pub(super) fn sum(matrices: &[Array2<f32>]) -> Array2<f64> {
    let mut total = matrices[0].mapv(f64::from);
    for matrix in &matrices[1..] {
        total.zip_mut_with(matrix, |total, value| *total += f64::from(*value));
    }
    total
}

/// Rounds scale · values to f32.
pub(super) fn store(out: &mut [f32], values: &Array2<f64>, scale: f64) {
    out.iter_mut().zip(values).for_each(|(out, value)| *out = (scale * value) as f32);
}

/// Matrices side by side.
pub(super) fn side_by_side(parts: &[Array2<f64>]) -> Array2<f64> {
    let views: Vec<ArrayView2<'_, f64>> = parts.iter().map(|part| part.view()).collect();
    ndarray::concatenate(ndarray::Axis(1), &views).expect("parts of one tensor have the same rows")
}

/// Says which tensor could not be decomposed.
pub(super) fn refused(operand: &Operand<'_>) -> impl Fn(algebra::Error) -> StageError {
    let name = operand.name().to_owned();
    move |error| StageError::input(format!("tensor `{name}`: {error}"))
}

/// Singular vectors of several tasks side by side are linearly dependent where their singular values, relative to the largest, are
/// below it. They are accurate to f64: much larger ones are already meant, and a direction more or less changes a flat spectrum.
pub(super) const DEPENDENT: f64 = 1e-10;

/// Directions with smaller singular values, relative to the largest, are noise of f32: max(rows, columns)·ε.
pub(super) fn noise(operand: &Operand<'_>) -> f64 {
    let (rows, columns) = operand.as_matrix().unwrap_or_default();
    algebra::default_cut_off(rows, columns)
}
