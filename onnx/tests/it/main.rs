//! Tests of the whole way from an ONNX file to outputs.

mod binding;
mod hostile;
mod merged;
mod provision;
mod published;
mod refusals;
mod reproduces;
mod support;
mod taps;
