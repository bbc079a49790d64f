//! Lazy views whose tensors are arranged or computed from those of one other artifact.
//!
//! * [`Part`]: a tensor as a sequence of rows, columns or wholes of other tensors: renamed, split, fused, transposed, reshaped,
//!   exact to the bit ([`mapped`]);
//! * [`LowRankTensor`]: a product of two thin matrices, computed where it is read ([`low_rank`]).
//!
//! Neither holds a tensor in memory: a block is read when it is asked for, in tiles of a fixed size. Working memory is a
//! [`Scratch`](crate::Scratch) of their own below the caller's, because they read other tensors and other ranges than the caller asked
//! for, and the caller's shared blocks must survive that.

pub mod low_rank;
pub mod mapped;

mod description;

pub use description::{LowRankTensor, Part};

/// Elements of a tile, whatever the shape of the tensors: the unit of working memory.
const TILE: usize = 1 << 16;
