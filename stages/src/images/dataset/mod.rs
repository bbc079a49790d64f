//! Labelled images on disk.
//!
//! A format is one file (`idx.rs`, `folder.rs`, …) and one line in [`registry::FORMATS`]. Opening a dataset
//! checks its structure (headers, counts, directories, labels); pixels are decoded image by image on request.

mod cifar;
mod decode;
mod error;
mod folder;
mod idx;
mod image_type;
mod npz;
mod parquet;
mod registry;
mod stack;

pub use cifar::Cifar;
pub use decode::decode_image_file;
pub use error::DatasetError;
pub use folder::Folder;
pub use idx::Idx;
pub use image_type::Image;
pub use npz::Npz;
pub use parquet::Parquet;
pub use registry::{
    Dataset, DatasetSpec, FORMATS, Format, PathParameter, SourceFile, files, manifest_digest, open,
};
