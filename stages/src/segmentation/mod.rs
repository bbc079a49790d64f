//! What an evaluator of promptable segmentation needs: images with the masks of their objects, prompts, masks from logits, metrics.
//!
//! - [`dataset`]: annotated images and videos on disk, one file per format and one registry line;
//! - [`rle`], [`mask`]: masks as they are stored, and as they are worked with;
//! - [`prompt`]: points and boxes, from the annotation or from the object's mask;
//! - [`upsample`]: low-resolution logits to a mask of the image's size, as PyTorch's `interpolate`;
//! - [`measure`]: region similarity J and boundary accuracy F of one mask, as DAVIS defines them;
//! - [`summary`]: their means over objects and videos, with intervals.
//!
//! Knows nothing of stages, caches, pipeline files or ONNX: plain values in, plain values out. Results do not depend on the number of threads.

pub mod dataset;
mod distance;
mod error;
pub mod mask;
pub mod measure;
pub mod prompt;
pub mod rle;
pub mod summary;
pub mod upsample;

pub use error::SegmentationError;
