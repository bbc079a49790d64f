//! The methods of training, a file each, and their registry.

mod cdpq;
mod finetune;
pub(crate) mod lora;

pub use cdpq::{
    Attempt, BitReductions, EpochWidths, FLOAT_STUDENT, LayerWidth, PROGRESS, QuantizedActivation, Reduction,
};

use super::method::Method;

/// All methods, in the order in which they are listed.
pub(super) const METHODS: &[&dyn Method] = &[&finetune::FineTune, &lora::Lora, &cdpq::Cdpq];
