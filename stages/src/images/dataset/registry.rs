//! What a dataset is, and the formats there are.
//!
//! To add a format: one file with a unit struct that implements [`Format`], one line in [`FORMATS`].

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use super::cifar::Cifar;
use super::decode::Decoding;
use super::error::DatasetError;
use super::folder::Folder;
use super::idx::Idx;
use super::image_type::Image;
use super::list::List;
use super::npz::Npz;
use super::parquet::Parquet;
use super::subset::{self, Subset};
use super::svhn::Svhn;
use super::webdataset::WebDataset;

/// Every dataset format, in the order in which they are listed to the user.
pub static FORMATS: &[&dyn Format] = &[&Idx, &Folder, &Cifar, &Npz, &Parquet, &WebDataset, &List, &Svhn];

/// Where a dataset lies and how to read it.
#[derive(Clone, Debug, Default)]
pub struct DatasetSpec {
    /// The task's name; used in messages only.
    pub name: String,
    /// The id of a [`Format`].
    pub format: String,
    /// The format's paths by parameter name, see [`Format::paths`].
    pub paths: BTreeMap<String, PathBuf>,
    /// The part of the dataset that is meant, where a path holds several.
    pub split: Option<String>,
    /// Class names; label i is entry i. `folder` derives them from its directories when absent.
    pub classes: Option<Vec<String>>,
    /// Use this many images: `folder` takes them evenly from the classes, the others the first ones.
    pub limit: Option<usize>,
    /// Use some images, chosen by a seed; excludes `limit`.
    pub subset: Option<Subset>,
    /// How image files are decoded.
    pub decoding: Decoding,
}

/// Labelled images, open for reading. Every label is below the number of classes where that is known.
pub trait Dataset: Send + Sync {
    /// Returns the label of every image, in the dataset's order.
    fn labels(&self) -> &[u32];

    /// Decodes image `index`.
    fn image(&self, index: usize) -> Result<Image, DatasetError>;

    /// Returns the class names, if they are known.
    fn classes(&self) -> Option<&[String]>;

    /// Returns a name of image `index` for messages, such as its path.
    fn describe(&self, index: usize) -> String;

    fn len(&self) -> usize {
        self.labels().len()
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the label of image `index`.
    ///
    /// # Panics
    /// If `index` is not below [`Dataset::len`].
    fn label(&self, index: usize) -> u32 {
        self.labels()[index]
    }
}

/// One way in which datasets are stored.
pub trait Format: Send + Sync {
    /// Returns the name that the user types.
    fn id(&self) -> &'static str;

    /// Describes the format in one line.
    fn summary(&self) -> &'static str;

    /// Lists the paths that the format takes.
    fn paths(&self) -> &'static [PathParameter];

    /// Lists the files whose content matters, in the dataset's order, without reading them.
    fn files(&self, spec: &DatasetSpec) -> Result<Vec<SourceFile>, DatasetError>;

    /// Opens a dataset: checks its structure, reads no more pixels than it must.
    fn open(&self, spec: &DatasetSpec) -> Result<Box<dyn Dataset>, DatasetError>;
}

/// A path that a format takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathParameter {
    pub name: &'static str,
    pub doc: &'static str,
    pub required: bool,
}

/// A file whose content matters to a dataset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    pub path: PathBuf,
    /// What the file is for: its path parameter, or `image` for one image of a folder.
    pub role: &'static str,
    /// The label that the file's place gives to it, where there is one.
    pub label: Option<u32>,
}

/// Opens a dataset.
pub fn open(spec: &DatasetSpec) -> Result<Box<dyn Dataset>, DatasetError> {
    let whole = checked_format(spec)?.open(spec)?;
    Ok(match spec.subset {
        Some(subset) => subset::take(whole, subset),
        None => whole,
    })
}

/// Lists the files whose content matters, in the dataset's order, without reading them.
pub fn files(spec: &DatasetSpec) -> Result<Vec<SourceFile>, DatasetError> {
    checked_format(spec)?.files(spec)
}

/// Digests everything that decides the dataset's images and labels, given the digest of each file.
///
/// Covers the format, the split, the limit or subset, how files are decoded, the number of classes, and each file's role, label and content in the
/// dataset's order. Paths do not enter (moving a dataset keeps its digest); neither do the classes' names,
/// which decide labels only through the folder layout, where the labels themselves are covered.
pub fn manifest_digest<E: From<DatasetError>>(
    spec: &DatasetSpec,
    mut digest_of: impl FnMut(&Path) -> Result<blake3::Hash, E>,
) -> Result<blake3::Hash, E> {
    let mut hasher = blake3::Hasher::new_derive_key("merganser image dataset manifest v2");
    let mut put = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    put(spec.format.as_bytes());
    put(spec.split.as_deref().unwrap_or_default().as_bytes());
    put(&optional_bytes(spec.limit.map(|limit| limit as u64)));
    let subset = spec.subset.map(|Subset { n, seed, balanced }| [n as u64, seed, u64::from(balanced)]);
    put(&subset.map(|words| words.map(u64::to_le_bytes).concat()).unwrap_or_default());
    put(&[u8::from(spec.decoding.exif_orientation)]);
    put(&optional_bytes(spec.classes.as_ref().map(|classes| classes.len() as u64)));
    for file in files(spec)? {
        put(file.role.as_bytes());
        put(&optional_bytes(file.label.map(u64::from)));
        put(digest_of(&file.path)?.as_bytes());
    }
    Ok(hasher.finalize())
}

impl DatasetSpec {
    /// Returns the path given for `parameter` of `format`.
    pub(super) fn path(&self, format: &dyn Format, parameter: &'static str) -> Result<&Path, DatasetError> {
        self.paths.get(parameter).map(PathBuf::as_path).ok_or_else(|| DatasetError::MissingPath {
            dataset: self.name.clone(),
            format: format.id(),
            parameter,
        })
    }
}

/// Finds the format and checks what does not depend on files.
fn checked_format(spec: &DatasetSpec) -> Result<&'static dyn Format, DatasetError> {
    let format = FORMATS.iter().find(|format| format.id() == spec.format).ok_or_else(|| {
        DatasetError::UnknownFormat {
            format: spec.format.clone(),
            known: FORMATS.iter().map(|format| format!("`{}`", format.id())).collect::<Vec<_>>().join(", "),
        }
    })?;
    let known = format.paths();
    for parameter in known.iter().filter(|parameter| parameter.required) {
        spec.path(*format, parameter.name)?;
    }
    if let Some(parameter) = spec.paths.keys().find(|name| known.iter().all(|known| known.name != **name)) {
        return Err(DatasetError::UnknownPath {
            dataset: spec.name.clone(),
            format: format.id(),
            parameter: parameter.clone(),
            known: known.iter().map(|known| format!("`{}`", known.name)).collect::<Vec<_>>().join(", "),
        });
    }
    if spec.limit.is_some() && spec.subset.is_some() {
        return Err(DatasetError::LimitAndSubset { dataset: spec.name.clone() });
    }
    if spec.limit == Some(0) || spec.subset.is_some_and(|subset| subset.n == 0) {
        return Err(DatasetError::ZeroLimit { dataset: spec.name.clone() });
    }
    let mut seen = HashSet::new();
    if let Some(class) = spec.classes.iter().flatten().find(|class| !seen.insert(class.as_str())) {
        return Err(DatasetError::DuplicateClass { dataset: spec.name.clone(), class: class.clone() });
    }
    Ok(*format)
}

fn optional_bytes(value: Option<u64>) -> Vec<u8> {
    value.map(|value| value.to_le_bytes().to_vec()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(format: &str, paths: &[(&str, &str)]) -> DatasetSpec {
        DatasetSpec {
            name: "digits".into(),
            format: format.into(),
            paths: paths.iter().map(|(name, path)| ((*name).into(), (*path).into())).collect(),
            ..DatasetSpec::default()
        }
    }

    fn message(spec: &DatasetSpec) -> String {
        open(spec).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn names_the_known_formats_when_the_format_is_unknown() {
        assert_eq!(
            message(&spec("idxx", &[])),
            "unknown dataset format `idxx`; known formats: `idx`, `folder`, `cifar`, `npz`, `parquet`, `webdataset`, `list`, \
             `svhn`"
        );
    }

    #[test]
    fn names_a_missing_and_an_unknown_path() {
        assert_eq!(
            message(&spec("idx", &[("images", "a")])),
            "dataset `digits`: format `idx` needs the path `labels`"
        );
        assert_eq!(
            message(&spec("folder", &[("path", "a"), ("labels", "b")])),
            "dataset `digits`: format `folder` has no path `labels`; it takes `path`"
        );
    }

    #[test]
    fn refuses_a_limit_of_zero_and_repeated_classes() {
        let paths = [("path", "a")];
        let zero = DatasetSpec { limit: Some(0), ..spec("folder", &paths) };
        assert_eq!(message(&zero), "dataset `digits`: `limit` and `subset.n` must be at least 1");
        let subset = Some(Subset { n: 5, seed: 0, balanced: false });
        let both = DatasetSpec { limit: Some(3), subset, ..spec("folder", &paths) };
        assert_eq!(message(&both), "dataset `digits`: `limit` and `subset` exclude each other");
        let twice =
            DatasetSpec { classes: Some(vec!["x".into(), "y".into(), "x".into()]), ..spec("folder", &paths) };
        assert_eq!(message(&twice), "dataset `digits`: class `x` is listed twice");
    }

    #[test]
    fn format_ids_are_unique() {
        let ids: HashSet<_> = FORMATS.iter().map(|format| format.id()).collect();
        assert_eq!(ids.len(), FORMATS.len());
    }

    #[test]
    fn the_manifest_digest_follows_content_and_limit_but_not_paths() {
        let digest = |spec: &DatasetSpec, content: u8| {
            manifest_digest::<DatasetError>(spec, |_| Ok(blake3::hash(&[content]))).unwrap()
        };
        let here = spec("idx", &[("images", "here/i"), ("labels", "here/l")]);
        let there = spec("idx", &[("images", "there/i"), ("labels", "there/l")]);
        let limited = DatasetSpec { limit: Some(5), ..here.clone() };
        assert_eq!(digest(&here, 1), digest(&there, 1));
        assert_ne!(digest(&here, 1), digest(&here, 2));
        assert_ne!(digest(&here, 1), digest(&limited, 1));
        let subset =
            |seed| DatasetSpec { subset: Some(Subset { n: 5, seed, balanced: false }), ..here.clone() };
        assert_ne!(digest(&subset(0), 1), digest(&subset(1), 1));
    }
}
