//! Tests of the whole way from an ONNX file to outputs.

mod binding;
mod export_tools;
mod gradient;
mod hostile;
mod kernels;
mod merged;
mod modules;
mod provision;
mod published;
mod quantized;
mod refusals;
mod reproduces;
mod support;
mod taps;
