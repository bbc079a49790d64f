//! Numeric kernels over plain slices: no files, no threads of their own unless the name says so.
//!
//! Element-wise kernels are exact: they perform the documented `f32` operations in the documented order,
//! so their results do not depend on the instruction set or on how a tensor was cut into blocks.
//! Kernels that are marked `#[inline(always)]` run on wide vector units ([`wide`]).
//! Reductions use fixed chunks and lanes ([`reduce`]) and do not depend on the number of threads.

#![expect(clippy::inline_always, reason = "what is not inlined is not compiled for wide vector units")]

pub mod codebook;
pub mod convert;
pub mod counts;
pub mod differences;
pub mod elementary;
pub mod finite;
pub mod gram;
pub mod linear;
mod lookup;
pub mod pack;
pub mod quantize;
pub mod random;
pub mod reduce;
pub mod select;
pub mod wide;
