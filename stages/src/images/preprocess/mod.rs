//! From a decoded image to the floats that a vision model takes.
//!
//! [`Preprocess`] says what to do, as the configuration files of transformers, timm and open_clip do; [`Preprocessor`] does it:
//! RGB → resize (bit-exact with Pillow) → centre crop → rescale → normalize → `[channel][row][column]`.

mod config;
mod error;
mod fields;
mod hf_config;
mod pipeline;
mod planes;
mod prepared;
mod resize;
mod taps;
mod torch_config;

pub use config::{CropRounding, Normalize, Preprocess, Resize, Size};
pub use error::PreprocessError;
pub use pipeline::Preprocessor;
pub use prepared::{PreparedImages, Room};
pub use taps::Filter;
