//! Checkpoint formats, lazy tensor views and streaming kernels.
//!
//! The path of a tensor through this crate:
//!
//! 1. [`formats`] says which files a checkpoint consists of and where in them each tensor lies;
//! 2. a [`Manifest`] describes an artifact of tensors: file regions, linear views of other artifacts, or packed codes;
//! 3. [`open`] turns a manifest into a [`TensorSource`], from which blocks are read as `f32`;
//! 4. [`stream`] runs passes over tensors, and [`writer`] writes computed tensors as canonical safetensors.
//!
//! Invariants:
//! * Output bytes are a function of the input values: not of thread counts, insertion order or block boundaries.
//! * Private memory is bounded by the number of threads, never by the number or size of tensors.
//! * Bytes from strangers are checked before they are used and never decide how much memory is allocated.
//! * Element-wise arithmetic is `f32` in the documented order; reductions are chunked in `f64` ([`kernels::reduce`]).
//!
//! What this crate does not know: caches and their paths, stages, pipeline files. It does not print, read the environment or
//! look at the clock. Stored numbers are little-endian, and so must the machine be.

pub mod encoding;
pub mod formats;
pub mod kernels;
pub mod keymap;
pub mod lora;
pub mod manifest;
pub mod source;
pub mod statistics;
pub mod stream;
pub mod views;
pub mod writer;

mod arrangement;
mod dtype;
mod error;
mod local;
mod read_at;
mod scratch;
#[cfg(test)]
mod testing;

pub use arrangement::Arrangement;
pub use dtype::{DType, TensorInfo};
pub use encoding::{AffineStage, Encoding, Grouped};
pub use error::{Error, OutputProblem, Result};
pub use kernels::pack::Bits;
pub use local::LocalFiles;
pub use manifest::Manifest;
pub use read_at::{FileReader, ReadAt};
pub use scratch::Scratch;
pub use source::{PackedCodes, Resolver, TensorSource, open};

#[cfg(target_endian = "big")]
compile_error!("stored tensors are little-endian and are read without swapping bytes");
