//! From a decoded image to the floats that a vision model takes.
//!
//! [`Preprocess`] says what to do, as Hugging Face's `preprocessor_config.json` does; [`Preprocessor`] does it:
//! RGB → resize (bit-exact with Pillow) → centre crop → rescale → normalize → `[channel][row][column]`.

mod config;
mod error;
mod hf_config;
mod pipeline;
mod planes;
mod resize;
mod taps;

pub use config::{Normalize, Preprocess, Resize, Size};
pub use error::PreprocessError;
pub use pipeline::Preprocessor;
pub use taps::Filter;
