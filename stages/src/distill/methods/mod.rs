//! The methods of training, a file each, and their registry.

mod finetune;
pub(crate) mod lora;

use super::method::Method;

/// All methods, in the order in which they are listed.
pub(super) const METHODS: &[&dyn Method] = &[&finetune::FineTune, &lora::Lora];
