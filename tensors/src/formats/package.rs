//! The packed package: a safetensors file whose metadata says which of its tensors are codes, and how to read them.
//!
//! The specification for other programs is docs/export.md. In short: the metadata key [`KEY`] holds JSON that lists packed tensors with
//! their shapes and encodings; the file has a list of bytes (U8) of each one's name, which is what the store keeps of it too: codes, and
//! scales behind them. Tensors that are not listed are stored as they are. So a package is read in place, like any other checkpoint.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::DType;
use crate::dtype::{TensorInfo, byte_size, n_elements};
use crate::encoding::Encoding;
use crate::formats::safetensors::Header;
use crate::formats::{FormatProblem, TensorRegion};
use crate::manifest::Content;

/// The metadata key of a package.
pub const KEY: &str = "merganser.package";

/// The version of the specification that is written and read.
pub const VERSION: u32 = 1;

/// The value of [`KEY`].
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    version: u32,
    content: Content,
    tensors: BTreeMap<String, Packed>,
}

/// A tensor that is stored as codes.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Packed {
    shape: Vec<usize>,
    encoding: Encoding,
}

/// Why a package is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackageProblem {
    #[error("the description of the package is not valid: {0}")]
    Description(String),
    #[error("the package has version {0}, this program reads version {VERSION}")]
    Version(u32),
    #[error("packed tensor `{tensor}` has a shape whose size overflows: {shape:?}")]
    ShapeOverflow { tensor: String, shape: Vec<usize> },
    #[error("packed tensor `{0}` is described, but not in the file")]
    Missing(String),
    #[error(
        "packed tensor `{tensor}` is stored as {dtype} of shape {shape:?}, it must be a list of bytes (U8)"
    )]
    NotBytes { tensor: String, dtype: DType, shape: Vec<usize> },
    #[error("packed tensor `{tensor}` needs {expected} bytes, the file has {actual}")]
    Length { tensor: String, expected: u64, actual: u64 },
    #[error("packed tensor `{tensor}` is encoded in a way that cannot be read: {reason}")]
    Encoding { tensor: String, reason: String },
}

impl Description {
    /// Describes a package of some packed tensors: names, shapes and encodings.
    pub fn new<'a>(
        content: Content,
        packed: impl IntoIterator<Item = (&'a str, &'a [usize], &'a Encoding)>,
    ) -> Self {
        let packed = packed.into_iter().map(|(name, shape, encoding)| {
            (name.to_owned(), Packed { shape: shape.to_vec(), encoding: encoding.clone() })
        });
        Self { version: VERSION, content, tensors: packed.collect() }
    }

    /// Reads the description in a header, if there is one.
    pub fn of(header: &Header) -> Option<Result<Self, PackageProblem>> {
        let text = header.metadata.get(KEY)?;
        let parsed: Result<Self, _> = serde_json::from_str(text);
        Some(match parsed {
            Err(error) => Err(PackageProblem::Description(error.to_string())),
            Ok(description) if description.version != VERSION => {
                Err(PackageProblem::Version(description.version))
            }
            Ok(description) => Ok(description),
        })
    }

    /// What the tensors mean.
    pub fn content(&self) -> Content {
        self.content
    }

    /// The value of [`KEY`].
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("names and finite numbers can be written")
    }

    /// Puts what the stored bytes stand for in their places.
    pub(super) fn unpack(self, mut stored: Vec<TensorRegion>) -> Result<Vec<TensorRegion>, FormatProblem> {
        for (tensor, packed) in self.tensors {
            let found = stored.binary_search_by(|region| region.info.name.as_str().cmp(&tensor));
            let Ok(index) = found else { return Err(PackageProblem::Missing(tensor).into()) };
            stored[index] = packed.region(tensor, &stored[index])?;
        }
        Ok(stored)
    }
}

impl Packed {
    fn region(self, tensor: String, stored: &TensorRegion) -> Result<TensorRegion, PackageProblem> {
        let Self { shape, encoding } = self;
        let TensorInfo { dtype, shape: stored_shape, .. } = &stored.info;
        if *dtype != DType::U8 || stored_shape.len() != 1 {
            return Err(PackageProblem::NotBytes { tensor, dtype: *dtype, shape: stored_shape.clone() });
        }
        let (Some(_), Some(n)) = (byte_size(DType::F32, &shape), n_elements(&shape)) else {
            return Err(PackageProblem::ShapeOverflow { tensor, shape });
        };
        if encoding == Encoding::Plain {
            return Err(PackageProblem::Encoding { tensor, reason: "it has no codes".to_owned() });
        }
        if let Err(reason) = encoding.check(DType::F32, n) {
            return Err(PackageProblem::Encoding { tensor, reason });
        }
        let (expected, actual) = (encoding.stored_len(DType::F32, n), stored.length);
        if expected != actual {
            return Err(PackageProblem::Length { tensor, expected, actual });
        }
        let info = TensorInfo { name: tensor, dtype: DType::F32, shape };
        let plain = TensorRegion::plain(info, stored.offset, stored.length);
        Ok(TensorRegion { encoding: Some(encoding), ..plain })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::{Code, Grouped, Scales};
    use crate::formats::{self, safetensors};
    use crate::local::LocalFiles;
    use crate::manifest::Manifest;
    use crate::writer::{Block, OutputTensor, Payload, WriteOptions, write_tensors};
    use crate::{Bits, Scratch};
    use proptest::prelude::*;
    use std::path::{Path, PathBuf};

    /// Two packed tensors (one with its scales behind the codes) and one that is stored as it is.
    fn tensors() -> Vec<(&'static str, Vec<usize>, Option<Encoding>)> {
        let grouped = Grouped {
            bits: Bits::new(4).unwrap(),
            code: Code::Symmetric,
            elements: 8,
            scales: Scales::Single,
            stages: 1,
        };
        let whole = serde_json::json!({ "absmax": { "bits": 3, "granularity": "tensor", "scale": [2.5] } });
        vec![
            ("bias", vec![5], None),
            ("grouped", vec![3, 8], Some(Encoding::Grouped(grouped))),
            ("whole", vec![7, 3], Some(serde_json::from_value(whole).unwrap())),
        ]
    }

    fn write(path: &Path, description: &str) {
        let outputs: Vec<OutputTensor> = tensors()
            .into_iter()
            .map(|(name, shape, encoding)| {
                let n = shape.iter().product();
                let (shape, payload) = match encoding {
                    Some(encoding) => {
                        (vec![encoding.stored_len(DType::F32, n) as usize], Payload::Bytes(DType::U8))
                    }
                    None => (shape, Payload::Values(DType::F32)),
                };
                OutputTensor { name: name.to_owned(), shape, payload }
            })
            .collect();
        let fill = |_: usize, range: std::ops::Range<usize>, block: Block<'_>, _: &mut Scratch| {
            match block {
                Block::Values(values) => values.iter_mut().zip(range).for_each(|(v, i)| *v = i as f32),
                // Scales of a quarter behind codes that count up.
                Block::Bytes(bytes) => bytes.iter_mut().zip(range).for_each(|(byte, i)| {
                    *byte = if i >= 12 { 0.25f32.to_le_bytes()[i % 4] } else { i as u8 };
                }),
            }
            Ok(())
        };
        let mut file = fs_err::File::create(path).unwrap();
        let options = WriteOptions { metadata: Some((KEY, description)), ..WriteOptions::default() };
        write_tensors(&mut file, &outputs, fill, &options).unwrap();
    }

    fn described() -> Description {
        let tensors = tensors();
        let packed = tensors
            .iter()
            .filter_map(|(name, shape, encoding)| Some((*name, shape.as_slice(), encoding.as_ref()?)));
        Description::new(Content::TaskVectors, packed)
    }

    fn package(description: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        write(&path, description);
        (folder, path)
    }

    fn refusal(change: impl Fn(&mut serde_json::Value)) -> String {
        let mut description: serde_json::Value = serde_json::from_str(&described().to_json()).unwrap();
        change(&mut description);
        let (_folder, path) = package(&description.to_string());
        let error = formats::describe(&path).unwrap_err().to_string();
        assert!(error.contains("model.safetensors"), "{error}");
        error
    }

    #[test]
    fn a_package_is_read_in_place() {
        let (_folder, path) = package(&described().to_json());
        assert_eq!(formats::content(&path).unwrap(), Some(Content::TaskVectors));
        let parts = formats::describe(&path).unwrap();
        let found: Vec<_> = parts[0]
            .tensors
            .iter()
            .map(|t| (t.info.name.as_str(), t.info.shape.clone(), t.encoding.clone()))
            .collect();
        assert_eq!(found, tensors());
        let mut files = LocalFiles::default();
        let digests = files.add(&parts);
        let manifest = Manifest::of_checkpoint(Content::TaskVectors, &parts, &digests, |_| true).unwrap();
        let source = crate::open(&manifest, &files).unwrap();
        let mut values = vec![0.0; 24];
        source.read_f32(1, 0..24, &mut values, &mut Scratch::default()).unwrap();
        // Byte i holds the codes of elements 2i and 2i + 1.
        let codes = (0..12u8).flat_map(|byte| [byte & 15, byte >> 4]);
        let expected: Vec<f32> = codes.map(|code| (f32::from(code) - 8.0) * 0.25).collect();
        assert_eq!(values, expected);
        // A package keeps its description even where only some tensors are wanted.
        let some =
            Manifest::of_checkpoint(Content::TaskVectors, &parts, &digests, |info| info.name == "whole")
                .unwrap();
        assert_eq!(some.tensors().len(), 1);
    }

    #[test]
    fn a_file_without_a_description_is_no_package() {
        let (_folder, path) = package("{}");
        assert!(formats::describe(&path).is_err());
        let plain = path.with_file_name("plain.safetensors");
        fs_err::write(
            &plain,
            fs_err::read(&path)
                .unwrap()
                .iter()
                .map(|b| if *b == b'k' { b'q' } else { *b })
                .collect::<Vec<u8>>(),
        )
        .unwrap();
        // `merganser.paqage`: another program's metadata.
        assert_eq!(formats::content(&plain).unwrap(), None);
        assert_eq!(formats::describe(&plain).unwrap()[0].tensors[1].info.dtype, DType::U8);
    }

    #[test]
    fn every_kind_of_damage_is_named() {
        let says = |text: &str, change: &dyn Fn(&mut serde_json::Value)| {
            let message = refusal(change);
            assert!(message.contains(text), "{message}");
        };
        says("has version 2, this program reads version 1", &|d| d["version"] = 2.into());
        says("description of the package is not valid", &|d| d["surprise"] = 1.into());
        says("packed tensor `absent` is described, but not in the file", &|d| {
            let tensor = d["tensors"]["whole"].clone();
            d["tensors"]["absent"] = tensor;
        });
        says("packed tensor `bias` is stored as F32 of shape [5]", &|d| {
            let tensor = d["tensors"]["whole"].clone();
            d["tensors"]["bias"] = tensor;
        });
        says("packed tensor `whole` needs 9 bytes, the file has 8", &|d| {
            d["tensors"]["whole"]["shape"] = serde_json::json!([8, 3]);
        });
        says("whose size overflows", &|d| {
            d["tensors"]["whole"]["shape"] = serde_json::json!([u64::MAX, 8]);
        });
        says("`whole` is encoded in a way that cannot be read: it has no codes", &|d| {
            d["tensors"]["whole"]["encoding"] = "plain".into();
        });
        says("`whole` is encoded in a way that cannot be read: its scales must be positive", &|d| {
            d["tensors"]["whole"]["encoding"]["absmax"]["scale"][0] = (-1.0).into();
        });
        says("not valid", &|d| d["tensors"]["whole"]["encoding"]["absmax"]["bits"] = 99.into());
    }

    proptest! {
        /// Whatever the description says, it is refused or describes what lies inside the file.
        #[test]
        fn damaged_descriptions_never_reach_outside(at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>()) {
            let mut text = described().to_json().into_bytes();
            let i = at.index(text.len());
            text[i] = byte;
            if byte % 3 == 0 {
                text.truncate(cut.index(text.len()));
            }
            let Ok(text) = String::from_utf8(text) else { return Ok(()) };
            let (_folder, path) = package(&text);
            let Ok(parts) = formats::describe(&path) else { return Ok(()) };
            let mut files = LocalFiles::default();
            let digests = files.add(&parts);
            let manifest = Manifest::of_checkpoint(Content::Checkpoint, &parts, &digests, |_| true).unwrap();
            let source = crate::open(&manifest, &files).unwrap();
            for (tensor, info) in source.tensors().iter().enumerate().filter(|(_, info)| info.dtype.is_float()) {
                let mut values = vec![0.0; info.n_elements()];
                // Scales that lie in the file may be anything: refused, or read.
                let _ = source.read_f32(tensor, 0..values.len(), &mut values, &mut Scratch::default());
            }
            prop_assert!(safetensors::describe_file(&path).is_ok());
        }
    }
}
