//! ONNX graphs for merganser: read, bound to checkpoints, and run.
//!
//! The way from a file to logits:
//!
//! 1. [`Graph::load`] reads a graph and its data files.
//! 2. [`Binding::find`] traces every float constant of the graph to a tensor of the checkpoint that the graph
//!    was exported from. Once per graph and origin; it can be stored.
//! 3. [`Binding::check`] tells whether another checkpoint can take the origin's place.
//! 4. [`Prepared::new`] takes the traced constants out of the graph, once.
//! 5. [`Runtime::session`] injects a model's tensors, and [`Session::run`] computes.
//!
//! [`LinearUse::find`] tells which activation every weight is multiplied with, and [`Prepared::with_outputs`] takes it out of the graph.
//!
//! [`gradient`] makes a graph of a model into a graph of a loss and its gradients; [`train`] uses them.
//!
//! [`quantized`] writes a graph with a model's weights in it, packed ones as codes; [`Runtime::open`] runs such a file as it is.
//!
//! [`provision`] finds ONNX Runtime on the machine, or installs it.
//!
//! This crate knows no checkpoint format (see [`Weights`]), no pipeline and no cache, reads no environment
//! variable and prints nothing.

mod binding;
mod detach;
mod error;
mod external;
pub mod gradient;
mod graph;
mod kernels;
mod modules;
mod prepared;
pub mod proto;
mod provider;
pub mod provision;
pub mod quantized;
mod runtime;
mod simd;
mod taps;
mod tensor;
pub mod train;

pub use binding::{Binding, BoundTensor, Constant, ConstantKind, How, Refusal, RowRun, Source};
pub use error::GraphError;
pub use graph::{Dimension, Graph, GraphTensor, Identity, Place, Port};
pub use modules::Module;
pub use prepared::{Prepared, Slot};
pub use provider::Provider;
pub use runtime::{Floats, Input, Optimization, Outputs, Runtime, RuntimeError, Session, SessionOptions};
pub use taps::{Layout, LinearUse, Side, Windows};
pub use tensor::{FloatType, Weights, WeightsError};
