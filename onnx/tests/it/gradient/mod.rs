//! Gradients against PyTorch's autograd, against finite differences, and against their own definition.

mod losses;
mod models;
mod refusals;
mod rules;
mod support;
