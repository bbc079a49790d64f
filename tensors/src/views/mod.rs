//! Lazy views whose tensors are arranged or computed from those of other artifacts.
//!
//! * sums with coefficients (`linear`);
//! * [`Part`]: a tensor as a sequence of rows, columns or wholes of other tensors: renamed, split, fused, transposed, reshaped,
//!   exact to the bit ([`mapped`]);
//! * [`LowRankTensor`]: a product of two thin matrices, computed where it is read ([`low_rank`]);
//! * a base plus the masked entries of a vector, element by element ([`masked`]).
//!
//! None holds a tensor in memory: a block is read when it is asked for, in tiles of a fixed size. Working memory of
//! arrangements and products is a [`Scratch`](crate::Scratch) of their own below the caller's, because they read other tensors and other ranges than the caller asked
//! for, and the caller's shared blocks must survive that.

pub(crate) mod linear;
pub mod low_rank;
pub mod mapped;
pub mod masked;

mod description;

pub use description::{LowRankTensor, Part};

/// Elements of a tile, whatever the shape of the tensors: the unit of working memory.
const TILE: usize = 1 << 16;
