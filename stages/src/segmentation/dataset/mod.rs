//! Annotated images and videos on disk.
//!
//! A format is one file (`sa1b.rs`, `davis.rs`, …) and one line in [`registry::FORMATS`]. Opening a data set lists its files; images and masks are
//! decoded frame by frame on request.

mod davis;
mod index_png;
mod listing;
mod pairs;
mod registry;
mod sa1b;
mod sav;
#[cfg(test)]
mod tests;

pub use registry::{
    FORMATS, Format, Frame, FrameFiles, MaskedImages, Object, SourceFile, Spec, files, find, known, open,
};
