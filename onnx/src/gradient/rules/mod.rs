//! What each op does to a gradient, a file per family.
//!
//! A rule reads the gradients of the node's outputs and gives gradients to those inputs that need one. `g` is the
//! gradient of the output `y`. A new op is a function and its line in the table of its family.

mod convolution;
mod elementwise;
mod indexing;
mod layout;
mod normalization;
mod pieces;
mod pooling;
mod products;
mod reductions;

use super::backward::{Backward, Unsupported};
use super::tape::OWN_DOMAIN;
use crate::kernels::DOMAIN;

type Rule = fn(&mut Backward<'_>) -> Result<(), Unsupported>;
type Rules = &'static [(&'static str, Rule)];

static FAMILIES: &[Rules] = &[
    elementwise::RULES,
    products::RULES,
    normalization::RULES,
    reductions::RULES,
    layout::RULES,
    pieces::RULES,
    indexing::RULES,
    convolution::RULES,
    pooling::RULES,
];

/// Returns the rule for an op of the standard domain, or of ours.
pub(super) fn find(domain: &str, op: &str) -> Option<Rule> {
    let families = match domain {
        "" | "ai.onnx" | OWN_DOMAIN => FAMILIES,
        DOMAIN => &[elementwise::OWN_RULES],
        _ => &[],
    };
    families.iter().flat_map(|rules| rules.iter()).find(|(name, _)| *name == op).map(|(_, rule)| *rule)
}
