//! The packed package: a safetensors file whose metadata says which of its tensors are codes, and how to read them.
//!
//! The specification for other programs is docs/export.md. In short: the metadata key [`KEY`] holds JSON that lists packed tensors with
//! their shapes and encodings; the file has a list of bytes (U8) of each one's name, which is what the store keeps of it too: codes, and
//! scales behind them. Tensors that are not listed are stored as they are. So a package is read in place, like any other checkpoint.
//!
//! What several packages share may be a package of its own, the base, which their descriptions name: every value is then the sum of
//! both.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use blake3::Hash;
use serde::{Deserialize, Serialize};

use crate::DType;
use crate::dtype::{TensorInfo, byte_size, n_elements};
use crate::encoding::Encoding;
use crate::formats::safetensors::Header;
use crate::formats::{FilePart, FormatProblem, TensorRegion};
use crate::manifest::{Content, hex};

/// The metadata key of a package.
pub const KEY: &str = "merganser.package";

/// The version of the specification for packages that stand alone.
pub const VERSION: u32 = 1;

/// The version for packages whose values are sums with those of a base.
pub const VERSION_WITH_BASE: u32 = 2;

/// The value of [`KEY`].
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    version: u32,
    content: Content,
    tensors: BTreeMap<String, Packed>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base: Option<Base>,
}

/// The file that has what a package shares with others.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Its name, without a folder: it lies beside the package, or in the folder above.
    pub file: String,
    pub size: u64,
    /// BLAKE3 of its bytes.
    #[serde(with = "hex")]
    pub digest: Hash,
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
    #[error("the package has version {0}, this program reads versions {VERSION} and {VERSION_WITH_BASE}")]
    Version(u32),
    #[error("the base of the package must be the name of a file, it is `{0}`")]
    BaseName(String),
    #[error(
        "the base of the package, `{file}`, is neither beside it nor in the folder above (BLAKE3 {digest})"
    )]
    NoBase { file: String, digest: Hash },
    #[error("the package needs a base, which is possible only for one that is read on its own")]
    NeedsBase,
    #[error("the base `{}` has {actual} bytes, the package asks for one of {expected}", file.display())]
    BaseSize { file: PathBuf, expected: u64, actual: u64 },
    #[error("tensor `{tensor}` of the base `{}` is not in the package", file.display())]
    NotInPackage { tensor: String, file: PathBuf },
    #[error("tensor `{tensor}` has shape {actual:?} in the base `{}`, the package has {expected:?}", file.display())]
    BaseShape { tensor: String, file: PathBuf, expected: Vec<usize>, actual: Vec<usize> },
    #[error("tensor `{tensor}` in `{}` holds {dtype}, with a base all values are F32", file.display())]
    BaseDType { tensor: String, file: PathBuf, dtype: DType },
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
        Self { version: VERSION, content, tensors: packed.collect(), base: None }
    }

    /// Says that values are sums with those of a base.
    #[must_use]
    pub fn with_base(self, base: Base) -> Self {
        Self { version: VERSION_WITH_BASE, base: Some(base), ..self }
    }

    /// Reads the description in a header, if there is one.
    pub fn of(header: &Header) -> Option<Result<Self, PackageProblem>> {
        let text = header.metadata.get(KEY)?;
        let parsed: Result<Self, _> = serde_json::from_str(text);
        Some(match parsed {
            Err(error) => Err(PackageProblem::Description(error.to_string())),
            Ok(description) => match (description.version, &description.base) {
                (VERSION, None) | (VERSION_WITH_BASE, Some(_)) => Ok(description),
                (VERSION, Some(_)) => Err(PackageProblem::Description("version 1 has no `base`".to_owned())),
                (VERSION_WITH_BASE, None) => {
                    Err(PackageProblem::Description("version 2 needs a `base`".to_owned()))
                }
                (other, _) => Err(PackageProblem::Version(other)),
            },
        })
    }

    /// What the tensors mean.
    pub fn content(&self) -> Content {
        self.content
    }

    /// What the values are sums with.
    pub fn base(&self) -> Option<&Base> {
        self.base.as_ref()
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

impl Base {
    /// Finds the file: beside the package, or in the folder above, where a collection has it once for all members.
    pub(super) fn locate(&self, package: &Path) -> Result<PathBuf, PackageProblem> {
        let mut components = Path::new(&self.file).components();
        let plain = matches!((components.next(), components.next()), (Some(Component::Normal(name)), None) if name == self.file.as_str());
        if !plain {
            return Err(PackageProblem::BaseName(self.file.clone()));
        }
        let folder = package.parent().unwrap_or(Path::new(""));
        let above = match (folder.file_name(), folder.parent()) {
            (Some(_), Some(above)) => above.to_owned(),
            _ => folder.join(".."),
        };
        let mut candidates = [folder, &above].into_iter().map(|folder| folder.join(&self.file));
        let missing = || PackageProblem::NoBase { file: self.file.clone(), digest: self.digest };
        candidates.find(|candidate| candidate.is_file()).ok_or_else(missing)
    }

    /// Checks that a base fits a package, as far as headers tell.
    pub(super) fn check(&self, package: &FilePart, base: &FilePart) -> Result<(), PackageProblem> {
        if base.size != self.size {
            let (expected, actual) = (self.size, base.size);
            return Err(PackageProblem::BaseSize { file: base.path.clone(), expected, actual });
        }
        for part in [package, base] {
            if let Some(odd) = part.tensors.iter().find(|tensor| tensor.info.dtype != DType::F32) {
                let (tensor, dtype) = (odd.info.name.clone(), odd.info.dtype);
                return Err(PackageProblem::BaseDType { tensor, file: part.path.clone(), dtype });
            }
        }
        for TensorRegion { info: shared, .. } in &base.tensors {
            let found = package.tensors.binary_search_by(|own| own.info.name.cmp(&shared.name));
            let (tensor, file) = (shared.name.clone(), base.path.clone());
            let Ok(found) = found else { return Err(PackageProblem::NotInPackage { tensor, file }) };
            let (expected, actual) = (package.tensors[found].info.shape.clone(), shared.shape.clone());
            if expected != actual {
                return Err(PackageProblem::BaseShape { tensor, file, expected, actual });
            }
        }
        Ok(())
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
        says("has version 3, this program reads versions 1 and 2", &|d| d["version"] = 3.into());
        says("version 2 needs a `base`", &|d| d["version"] = 2.into());
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

    /// A base of one tensor, and in a folder below it a package of all, as changed.
    fn with_base(folder: &Path, change: impl Fn(&mut serde_json::Value)) -> PathBuf {
        let base = folder.join("base.safetensors");
        let described = described();
        write(&base, &described.to_json());
        let bytes = fs_err::read(&base).unwrap();
        let base = Base {
            file: "base.safetensors".to_owned(),
            size: bytes.len() as u64,
            digest: blake3::hash(&bytes),
        };
        let mut description = serde_json::from_str(&described.with_base(base).to_json()).unwrap();
        change(&mut description);
        fs_err::create_dir_all(folder.join("task")).unwrap();
        let path = folder.join("task/model.safetensors");
        write(&path, &description.to_string());
        path
    }

    fn values(path: &Path, name: &str) -> Vec<f32> {
        let parts = formats::describe(path).unwrap();
        assert_eq!(
            formats::files(path).unwrap(),
            parts.iter().map(|part| part.path.clone()).collect::<Vec<_>>()
        );
        let mut files = LocalFiles::default();
        let digests = files.add(&parts);
        let manifest = Manifest::of_checkpoint(Content::TaskVectors, &parts, &digests, |_| true).unwrap();
        let source = crate::open(&manifest, &files).unwrap();
        let tensor = source.index_of(name).unwrap();
        let mut values = vec![0.0; source.tensors()[tensor].n_elements()];
        source.read_f32(tensor, 0..values.len(), &mut values, &mut Scratch::default()).unwrap();
        values
    }

    #[test]
    fn values_are_sums_with_the_base_wherever_it_lies() {
        let folder = tempfile::tempdir().unwrap();
        let path = with_base(folder.path(), |_| ());
        let base = folder.path().join("base.safetensors");
        for name in ["bias", "grouped", "whole"] {
            let doubled: Vec<f32> = values(&base, name).iter().map(|x| x + x).collect();
            assert!(doubled.iter().any(|x| *x != 0.0));
            assert_eq!(values(&path, name), doubled, "{name}");
        }
        let above = values(&path, "whole");
        fs_err::rename(&base, path.with_file_name("base.safetensors")).unwrap();
        assert_eq!(values(&path, "whole"), above);
        // Of a package that needs another file, one file is not enough.
        assert!(safetensors::describe_file(&path).unwrap_err().to_string().contains("needs a base"));
    }

    #[test]
    fn every_damage_of_a_base_is_named() {
        let refused = |path: &Path| {
            let error = formats::describe(path).unwrap_err().to_string();
            assert!(error.contains("model.safetensors"), "{error}");
            error
        };
        let says = |text: &str, change: &dyn Fn(&mut serde_json::Value)| {
            let folder = tempfile::tempdir().unwrap();
            let error = refused(&with_base(folder.path(), change));
            assert!(error.contains(text), "{error}");
        };
        says("version 1 has no `base`", &|d| d["version"] = 1.into());
        says("has version 7, this program reads versions 1 and 2", &|d| d["version"] = 7.into());
        says("`absent.safetensors`, is neither beside it nor in the folder above", &|d| {
            d["base"]["file"] = "absent.safetensors".into();
        });
        for name in ["../base.safetensors", "/etc/passwd", "..", "", "a/b", "base.safetensors/"] {
            says("must be the name of a file", &|d| d["base"]["file"] = name.into());
        }
        says("the package asks for one of 7", &|d| d["base"]["size"] = 7.into());
        says("tensor `whole` has shape [7, 3] in the base", &|d| {
            d["tensors"]["whole"]["shape"] = serde_json::json!([3, 7]);
        });
        says("tensor `whole` in", &|d| {
            d["tensors"].as_object_mut().unwrap().remove("whole");
        });
        says("not valid", &|d| d["base"]["digest"] = "12".into());
        let folder = tempfile::tempdir().unwrap();
        let path = with_base(folder.path(), |_| ());
        // a base that has more
        let mut parts = formats::describe(&path).unwrap();
        let (shared, mut own) = (parts.pop().unwrap(), parts.pop().unwrap());
        own.tensors.retain(|tensor| tensor.info.name != "whole");
        let named =
            Base { file: "base.safetensors".to_owned(), size: shared.size, digest: shared.base.unwrap() };
        let error = named.check(&own, &shared).unwrap_err().to_string();
        assert!(error.contains("tensor `whole` of the base"), "{error}");
        // a base that needs a base, and one that is gone
        let package = fs_err::read(&path).unwrap();
        let base = folder.path().join("base.safetensors");
        fs_err::write(&base, &package).unwrap();
        let error = formats::describe(&path).unwrap_err().to_string();
        assert!(error.contains("base.safetensors") && error.contains("needs a base"), "{error}");
        fs_err::remove_file(&base).unwrap();
        assert!(refused(&path).contains("`base.safetensors`, is neither"));
        assert!(formats::files(&path).unwrap_err().to_string().contains("neither beside it"));
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
