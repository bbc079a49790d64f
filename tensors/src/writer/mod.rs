//! Writing computed tensors as canonical safetensors, in a stream.
//!
//! # Canonical form
//!
//! Tensors are ordered by element type (widest first, the order of `safetensors::Dtype` reversed), then by name, without gaps;
//! the header is compact JSON in that order, at most one metadata key before it, padded with spaces to a multiple of 8 bytes. These are
//! the bytes that the `safetensors` crate writes, except that they never depend on a hash map's order. The same
//! tensors give the same bytes in whatever order they were passed.
//!
//! # How
//!
//! The file is cut into blocks of [`BLOCK_ELEMENTS`](crate::stream::BLOCK_ELEMENTS), blocks are gathered into waves of
//! about [`WAVE_BYTES`]. The blocks of a wave are computed in parallel while the wave before is hashed and written, in order. Two
//! waves and one set of block buffers per thread are all the memory that is used, for any number of tensors and inputs.
//!
//! Packed codes are stored as `U8` tensors of the codes' bytes, so that any safetensors reader can open the file; what
//! they mean is in the manifest.

mod layout;
mod write;

pub use layout::{OutputTensor, Payload, Written, WrittenTensor};
pub use write::{Block, WAVE_BYTES, WriteOptions, write_f32_tensors, write_tensors};
