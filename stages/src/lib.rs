//! Stages: what a pipeline can do, one file or folder per kind.
//!
//! A kind is listed in [`kinds`], a merge method in `merge`, a quantization scheme in `quantize`, a dataset format in
//! [`images::dataset`]: one file and one line each. This crate parses parameters, describes itself, computes artifacts, and knows nothing
//! of pipeline files, terminals, or where the cache lies. See [`kind`] for the contract of a stage.

pub mod images;
pub mod kind;
pub mod params;
pub mod segmentation;

mod calibrate;
mod checkpoint;
mod combine;
mod compress;
mod decomposition;
mod diagnostics;
mod diff;
mod distill;
mod error;
mod evaluate;
mod export;
mod factors;
mod filter;
mod gradients;
mod gram;
mod job;
mod load;
mod mask;
mod merge;
mod names;
mod numerics;
mod quantize;
mod replaced;
mod seen;
mod services;
mod svd;
#[cfg(test)]
mod testing;

pub use calibrate::{
    FisherInformation, FisherLabels, InputStatistics, LayerPart, STATISTICS, Statistics, Summed, ValueRange,
};
pub use checkpoint::Weights;
pub use diagnostics::{
    DIAGNOSTICS, Diagnostics, HistogramBin, MergedDiagnostics, ParameterDiagnostics, RegionDiagnostics,
    TaskDiagnostics, TaskWeight, Totals,
};
pub use distill::{
    Attempt, BitReductions, Epoch, EpochWidths, FLOAT_STUDENT, GradientSummary, LayerWidth, PROGRESS,
    QuantizedActivation, Reduction, TRAINING, Training, Validation,
};
pub use error::StageError;
pub use evaluate::{
    Analysis, Answers, Baseline, ClassRow, Goal, Goals, Missed, ScoreRow, ScoredImages, Scores, missed,
};
pub use export::{ExportedForm, ExportedGraph};
pub use filter::{NameFilter, NameGlob};
pub use job::{Figures, Job, JobInput, JobSource, Notice, OpenFiles, Progress, ProgressUnit};
pub use kind::{
    Arity, Connection, Content, MethodDoc, Port, Ports, SourceFile, SourceSet, Stage, StageKind, Take, Unit,
};
pub use mask::{Coverage, CoverageRow, coverage};
pub use merge::{ADAPTATION, Adaptation, TunedTensor};
pub use numerics::numerics_class;
pub use params::{Problem, did_you_mean};
pub use quantize::{Histogram, QUANTIZATION, QuantizationDiagnostics, TensorError};
pub use seen::{SEEN, Seen};
pub use services::{BoundGraph, RuntimeSettings, Services};

/// What a stage computed, not yet published: its description and the blobs it has written.
pub type Draft = merganser_cache::Artifact;

/// All kinds, in the order in which they are listed.
pub fn kinds() -> &'static [&'static dyn StageKind] {
    &[
        &load::Load,
        &diff::Diff,
        &combine::Combine,
        &svd::Svd,
        &compress::Compress,
        &calibrate::Calibrate,
        &distill::DistillKind,
        &quantize::Quantize,
        &mask::Mask,
        &merge::MergeKind,
        &evaluate::Evaluate,
        &export::Export,
    ]
}
