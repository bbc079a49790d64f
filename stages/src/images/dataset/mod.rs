//! Labelled images on disk.
//!
//! A format is one file (`idx.rs`, `folder.rs`, …) and one line in [`registry::FORMATS`]. Opening a dataset
//! checks its structure (headers, counts, directories, labels); pixels are decoded image by image on request.

mod chosen;
mod cifar;
mod decode;
mod error;
mod folder;
mod idx;
mod image_type;
mod labels;
mod list;
mod npz;
mod overlap;
mod parquet;
mod patterns;
mod registry;
mod stack;
mod subset;
mod svhn;
mod webdataset;

pub use chosen::{Skipped, readable};
pub use cifar::Cifar;
pub use decode::{DecodeError, Decoding};
pub use error::DatasetError;
pub use folder::Folder;
pub use idx::Idx;
pub use image_type::Image;
pub use list::List;
pub use npz::Npz;
pub use overlap::{Overlap, overlap};
pub use parquet::Parquet;
pub use patterns::is_pattern;
pub use registry::{
    Dataset, DatasetSpec, FORMATS, Format, PathParameter, SourceFile, files, manifest_digest, open,
};
pub use subset::{Subset, choose};
pub use svhn::Svhn;
pub use webdataset::WebDataset;
