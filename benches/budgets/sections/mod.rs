//! The sections, one file each.

mod dataloader;
mod evaluation;
mod memory;
mod mergekit;
mod methods;
mod no_op;
mod opening;
mod overhead;
mod packing;
mod streaming;
pub mod training;

use crate::{Bench, Result};

/// Some budgets that are measured together.
pub struct Section {
    pub name: &'static str,
    pub title: &'static str,
    pub run: fn(&Bench) -> Result<()>,
}

/// In the order in which they are run.
pub const ALL: &[Section] = &[
    no_op::SECTION,
    overhead::SECTION,
    streaming::SECTION,
    packing::SECTION,
    opening::SECTION,
    memory::SECTION,
    evaluation::SECTION,
    dataloader::SECTION,
    mergekit::SECTION,
    methods::SECTION,
    training::SECTION,
];
