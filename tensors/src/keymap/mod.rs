//! Tensor names of the same model in different libraries.
//!
//! * [`FAMILIES`] lists the known families of names; each model's tables, with their sources, are in a file of their own
//!   ([`clip`], [`vit`], [`sam2`]);
//! * [`identify`] tells from names which family a checkpoint has, and what stands before its names;
//! * [`map()`] says, tensor by tensor, how they get another family's names: renamed, transposed, split or put together, as
//!   [`Part`](crate::views::Part)s of a lazy view, exact to the bit and invertible;
//! * [`reconcile`] does both for two checkpoints whose names should agree;
//! * [`rename()`] is for names that nobody foresaw.
//!
//! Invariants: mapping there and back gives the same tensors (tested for every pair of families of a model); nothing is mapped on a guess:
//! names that fit two models, and tensors whose parts are not all there, are refused by name.
//!
//! Adding a family: a function that returns its table, a line in [`FAMILIES`], and its names in the tests.

pub mod clip;
pub mod sam2;
pub mod vit;

mod error;
mod family;
mod identify;
mod mapping;
mod pattern;
mod reconcile;
mod rename;

pub use error::KeymapError;
pub(crate) use error::listed;
pub use family::{FAMILIES, Family};
pub use identify::{Identified, Placement, identify};
pub use mapping::{Mapping, Target, map};
pub use reconcile::{Reconciled, reconcile};
pub use rename::{RenameRule, rename};
