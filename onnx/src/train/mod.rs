//! Training: from gradients to new values.
//!
//! A step is: [`Accumulator`] averages the gradients of micro-batches, where there are several, [`Schedule`] says how far to go,
//! [`Optimizer`] bounds the norm and goes. Tensors are known by name and live in memory as `f32`.
//!
//! Everything is a function of its inputs to the bit, whatever the number of threads: values are computed one by one in
//! the order of operations that each function documents, norms are summed in `f64` over fixed chunks. An optimizer is its
//! [`State`] and nothing else, so a run that was interrupted goes on as if it had not been.

#![expect(
    clippy::inline_always,
    reason = "a loop is compiled for an instruction set only if all of it is inlined there"
)]

mod gradients;
mod optimizer;
mod schedule;

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::simd::{Loop, vectorized};

pub use self::gradients::Accumulator;
pub use self::optimizer::{AdamW, Algorithm, Optimizer, Sgd, State};
pub use self::schedule::{Decay, Schedule};

/// Values by the names of tensors, in row-major order.
pub type Tensors = BTreeMap<String, Vec<f32>>;

/// How many values one thread works on at a time, and the unit of sums.
const CHUNK: usize = 1 << 16;

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error("tensor `{tensor}` has {expected} values, its {what} {actual}")]
    Length { tensor: String, what: &'static str, expected: usize, actual: usize },
    #[error("there is a gradient of `{tensor}`, but no such tensor is trained")]
    UnknownTensor { tensor: String },
    #[error("the gradient of `{tensor}` holds {value} at element {index}")]
    NotFinite { tensor: String, index: usize, value: f32 },
    #[error("a batch has weight {weight}; it must be above zero")]
    BatchWeight { weight: f32 },
    #[error("there are no gradients: nothing was accumulated")]
    NoGradients,
}

/// Refuses a gradient with a NaN or an infinity, by its first place.
fn check_finite(tensor: &str, gradient: &[f32]) -> Result<(), TrainError> {
    if gradient.par_chunks(CHUNK).all(|chunk| vectorized(AllFinite(chunk))) {
        return Ok(());
    }
    match gradient.iter().position(|g| !g.is_finite()) {
        Some(index) => {
            Err(TrainError::NotFinite { tensor: tensor.to_owned(), index, value: gradient[index] })
        }
        None => Ok(()),
    }
}

struct AllFinite<'a>(&'a [f32]);

impl Loop for AllFinite<'_> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        // No early way out: this way it is one instruction for many elements.
        self.0.iter().fold(true, |all, g| all & g.is_finite())
    }
}
