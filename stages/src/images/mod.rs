//! What an image-classification evaluator needs: labelled images, pixels for the model, scores.
//!
//! - [`tasks`]: class names and prompts of the usual benchmarks, by name;
//! - [`dataset`]: labelled images on disk, one file per format and one registry line;
//! - [`preprocess`]: from decoded images to model input, bit-exact with Pillow's resize and with the
//!   float arithmetic of transformers' image processors;
//! - [`jpeg`]: JPEG files, bit-exact with what Pillow decodes;
//! - [`head`]: a linear classification head on (normalized) embeddings;
//! - [`metrics`]: top-1 and top-5 counts.
//!
//! Knows nothing of stages, caches, pipeline files or ONNX: plain values in, plain values out. Results do
//! not depend on the number of threads.

pub mod dataset;
pub mod head;
pub mod jpeg;
pub mod metrics;
pub mod preprocess;
pub mod tasks;

#[cfg(test)]
mod suite_tests;
#[cfg(test)]
pub(crate) mod test_support;
