//! Gradients against PyTorch's autograd, against finite differences, and against their own definition.

mod fake_quantization;
mod losses;
mod models;
mod products;
mod refusals;
mod rules;
mod support;
