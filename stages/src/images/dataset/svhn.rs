//! Format `svhn`: the cropped digits of Street View House Numbers, a MATLAB 5 file of images `X` [32, 32, 3, n] and labels `y` [n, 1].
//!
//! Label 10 is the digit 0. `path` is the file (`test_32x32.mat`), or the folder of them, with a `split` (`train`, `test`, `extra`). Any file with
//! two such arrays of bytes is read. Format: MAT-File Format, The MathWorks, chapter 1 (level 5): tagged elements, mostly compressed with zlib,
//! arrays in column order.
//!
//! INVARIANT: memory follows the bytes that are really there; what an element claims to hold is compared with what it can.

use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::ZlibDecoder;

use super::error::DatasetError;
use super::registry::{Dataset, DatasetSpec, Format, PathParameter, SourceFile};
use super::stack::Stack;

/// The `svhn` format.
pub struct Svhn;

const PATHS: &[PathParameter] = &[PathParameter {
    name: "path",
    doc: "`.mat` file, or the folder of `train_32x32.mat`, `test_32x32.mat` and `extra_32x32.mat`",
    required: true,
}];

/// Types of elements.
const INT8: u32 = 1;
const UINT8: u32 = 2;
const INT32: u32 = 5;
const UINT32: u32 = 6;
const DOUBLE: u32 = 9;
const MATRIX: u32 = 14;
const COMPRESSED: u32 = 15;

impl Format for Svhn {
    fn id(&self) -> &'static str {
        "svhn"
    }

    fn summary(&self) -> &'static str {
        "Street View House Numbers: MATLAB file of images and labels"
    }

    fn paths(&self) -> &'static [PathParameter] {
        PATHS
    }

    fn files(&self, spec: &DatasetSpec) -> Result<Vec<SourceFile>, DatasetError> {
        let path = file(spec.path(self, "path")?, spec.split.as_deref())?;
        Ok(vec![SourceFile { path, role: "path", label: None }])
    }

    fn open(&self, spec: &DatasetSpec) -> Result<Box<dyn Dataset>, DatasetError> {
        let path = file(spec.path(self, "path")?, spec.split.as_deref())?;
        let refuse = |reason: String| DatasetError::Matlab { path: path.clone(), reason };
        let arrays = read(&fs_err::read(&path)?).map_err(refuse)?;
        let array = |name: &str| {
            let found = arrays.iter().find(|array| array.name == name);
            found.ok_or_else(|| {
                let known: Vec<_> = arrays.iter().map(|array| format!("`{}`", array.name)).collect();
                refuse(format!("it has no array `{name}`; it has {}", known.join(", ")))
            })
        };
        let (images, labels) = (array("X")?, array("y")?);
        let &[height, width, 3, n] = &images.shape[..] else {
            return Err(refuse(format!("expected images `X` [h, w, 3, n], found {:?}", images.shape)));
        };
        let Values::Bytes(columns) = &images.values else {
            return Err(refuse("its images `X` are not unsigned bytes".to_owned()));
        };
        let labels = labels.labels().map_err(refuse)?;
        if labels.len() != n {
            return Err(DatasetError::CountMismatch {
                images: path.join("X"),
                labels: path.join("y"),
                images_count: n,
                labels_count: labels.len(),
            });
        }
        let used = spec.limit.map_or(n, |limit| limit.min(n));
        let mut pixels = Vec::with_capacity(used * height * width * 3);
        // Column order: the first index runs fastest.
        for image in columns.chunks_exact((height * width * 3).max(1)).take(used) {
            for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
                pixels.extend((0..3).map(|channel| image[y + height * (x + width * channel)]));
            }
        }
        let labels = labels.into_iter().take(used).collect();
        let classes = spec.classes.clone();
        Stack { path: path.clone(), height, width, channels: 3, pixels, labels, classes }.checked(spec)
    }
}

/// The file that `path` and `split` mean.
fn file(path: &Path, split: Option<&str>) -> Result<PathBuf, DatasetError> {
    match (path.is_dir(), split) {
        (false, None) => Ok(path.to_owned()),
        (false, Some(_)) => Err(DatasetError::SplitOfFile { path: path.to_owned() }),
        (true, split) => {
            let found =
                split.map(|split| path.join(format!("{split}_32x32.mat"))).filter(|file| file.is_file());
            found.ok_or_else(|| DatasetError::UnknownSplit {
                path: path.to_owned(),
                split: split.unwrap_or("none").to_owned(),
                known: "`train`, `test`, `extra`, each a file `…_32x32.mat`".to_owned(),
            })
        }
    }
}

/// An array of numbers.
struct Array {
    name: String,
    shape: Vec<usize>,
    values: Values,
}

enum Values {
    Bytes(Vec<u8>),
    Doubles(Vec<f64>),
}

impl Array {
    /// The values as labels of digits, of which 10 stands for 0.
    fn labels(&self) -> Result<Vec<u32>, String> {
        let values: Vec<f64> = match &self.values {
            Values::Bytes(bytes) => bytes.iter().map(|&byte| f64::from(byte)).collect(),
            Values::Doubles(doubles) => doubles.clone(),
        };
        let label = |(index, value): (usize, f64)| match value {
            10.0 => Ok(0),
            _ if value >= 0.0 && value.fract() == 0.0 && value < f64::from(u16::MAX) => Ok(value as u32),
            _ => Err(format!("label {index} is {value}, which is no class number")),
        };
        values.into_iter().enumerate().map(label).collect()
    }
}

/// Reads the numeric arrays of a MATLAB 5 file.
fn read(bytes: &[u8]) -> Result<Vec<Array>, String> {
    if bytes.starts_with(b"\x89HDF") || bytes.starts_with(b"MATLAB 7.3") {
        return Err("it is a MATLAB 7.3 file (HDF5); save it with `-v7`".to_owned());
    }
    let header = bytes.get(..128).ok_or("it ends inside its header")?;
    match &header[126..] {
        b"IM" => {}
        b"MI" => return Err("it is big-endian".to_owned()),
        _ => return Err("it is no MATLAB 5 file".to_owned()),
    }
    let mut arrays = Vec::new();
    let mut rest = &bytes[128..];
    while !rest.is_empty() {
        let (element, tail) = Element::split(rest)?;
        rest = tail;
        match element.kind {
            COMPRESSED => {
                let mut inner = Vec::new();
                ZlibDecoder::new(element.data).read_to_end(&mut inner).map_err(|error| error.to_string())?;
                let (element, _) = Element::split(&inner)?;
                arrays.extend(matrix(&element)?);
            }
            _ => arrays.extend(matrix(&element)?),
        }
    }
    Ok(arrays)
}

/// A tagged piece of a file.
struct Element<'a> {
    kind: u32,
    data: &'a [u8],
}

impl<'a> Element<'a> {
    /// Splits off the first element.
    fn split(bytes: &'a [u8]) -> Result<(Self, &'a [u8]), String> {
        let short = || "it ends inside an element".to_owned();
        let word = |at: usize| {
            let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk()).ok_or_else(short)?;
            Ok::<u32, String>(u32::from_le_bytes(*bytes))
        };
        let tag = word(0)?;
        if tag >> 16 != 0 {
            // A small element: length, type and up to four bytes in eight.
            let (kind, length) = (tag & 0xFFFF, (tag >> 16) as usize);
            let data = bytes.get(4..4 + length).filter(|_| length <= 4).ok_or_else(short)?;
            return Ok((Self { kind, data }, bytes.get(8..).unwrap_or_default()));
        }
        let length = word(4)? as usize;
        let data = bytes.get(8..).and_then(|rest| rest.get(..length)).ok_or_else(short)?;
        // Elements begin at multiples of eight bytes, except after compressed ones.
        let padded = if tag == COMPRESSED { length } else { length.next_multiple_of(8) };
        Ok((Self { kind: tag, data }, bytes.get(8 + padded..).unwrap_or_default()))
    }
}

/// An array of numbers; other kinds (cells, structures, text) are passed over.
fn matrix(element: &Element<'_>) -> Result<Option<Array>, String> {
    if element.kind != MATRIX {
        return Ok(None);
    }
    let (flags, rest) = Element::split(element.data)?;
    let (dimensions, rest) = Element::split(rest)?;
    let (name, rest) = Element::split(rest)?;
    let class = flags.data.first().copied().filter(|_| flags.kind == UINT32);
    let is_complex = flags.data.get(1).is_some_and(|flags| flags & 8 != 0);
    // Classes 6 to 13 are doubles, singles and whole numbers.
    if !class.is_some_and(|class| (6..=13).contains(&class)) || is_complex {
        return Ok(None);
    }
    let name = match name.kind {
        INT8 | UINT8 => String::from_utf8_lossy(name.data).into_owned(),
        _ => return Err("the name of an array is not text".to_owned()),
    };
    let corrupt = || format!("array `{name}` has no valid shape");
    if dimensions.kind != INT32 || !dimensions.data.len().is_multiple_of(4) {
        return Err(corrupt());
    }
    let sizes = dimensions.data.as_chunks::<4>().0.iter();
    let shape: Vec<usize> = sizes
        .map(|size| usize::try_from(i32::from_le_bytes(*size)))
        .collect::<Result<_, _>>()
        .map_err(|_| corrupt())?;
    let (values, _) = Element::split(rest)?;
    let expected = shape.iter().try_fold(1_usize, |product, size| product.checked_mul(*size));
    let values = match values.kind {
        UINT8 => Values::Bytes(values.data.to_vec()),
        DOUBLE => Values::Doubles(
            values.data.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect(),
        ),
        _ => return Ok(None),
    };
    let found = match &values {
        Values::Bytes(bytes) => bytes.len(),
        Values::Doubles(doubles) => doubles.len(),
    };
    if expected != Some(found) {
        return Err(format!("array `{name}` of shape {shape:?} has {found} values"));
    }
    Ok(Some(Array { name, shape, values }))
}

#[cfg(test)]
mod tests {
    use super::super::super::test_support::from_hex;
    use super::super::registry::open;
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    fn golden() -> Value {
        serde_json::from_str(include_str!("testdata/svhn.json")).unwrap()
    }

    fn write(folder: &Path, name: &str, bytes: &[u8]) -> DatasetSpec {
        let path = folder.join(name);
        fs_err::write(&path, bytes).unwrap();
        DatasetSpec {
            name: "digits".into(),
            format: "svhn".into(),
            paths: [("path".to_owned(), path)].into(),
            ..DatasetSpec::default()
        }
    }

    #[test]
    fn files_that_scipy_wrote_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let golden = golden();
        for case in golden["cases"].as_array().unwrap() {
            let spec = write(folder.path(), "test_32x32.mat", &from_hex(&case["file"]));
            let dataset = open(&spec).unwrap();
            assert_eq!(dataset.labels(), [1, 0, 9], "{}", case["name"]);
            for index in 0..3 {
                let image = dataset.image(index).unwrap();
                assert_eq!((image.height(), image.width()), (4, 5));
                assert_eq!(image.pixels(), from_hex(&case["images"][index]), "{} {index}", case["name"]);
            }
            let limited = open(&DatasetSpec { limit: Some(2), ..spec.clone() }).unwrap();
            assert_eq!(limited.len(), 2);
            let folder = [("path".to_owned(), folder.path().to_owned())].into();
            let split = DatasetSpec { paths: folder, split: Some("test".into()), ..spec };
            assert_eq!(open(&split).unwrap().len(), 3);
            let said = open(&DatasetSpec { split: Some("val".into()), ..split }).err().unwrap().to_string();
            assert!(said.contains("has no split `val`; there is `train`, `test`"), "{said}");
        }
    }

    #[test]
    fn mistakes_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let whole = from_hex(&golden()["cases"][0]["file"]);
        let said = |bytes: &[u8]| {
            let spec = write(folder.path(), "a.mat", bytes);
            open(&spec).err().unwrap().to_string().replace(&folder.path().display().to_string(), "ROOT")
        };
        assert_eq!(said(b"text"), "`ROOT/a.mat`: it ends inside its header");
        assert_eq!(said(&[b'x'; 200]), "`ROOT/a.mat`: it is no MATLAB 5 file");
        assert_eq!(
            said(b"\x89HDF\r\n\x1a\n"),
            "`ROOT/a.mat`: it is a MATLAB 7.3 file (HDF5); save it with `-v7`"
        );
        assert_eq!(said(&whole[..128]), "`ROOT/a.mat`: it has no array `X`; it has ");
        assert_eq!(said(&whole[..whole.len() - 9]), "`ROOT/a.mat`: it ends inside an element");
    }

    proptest! {
        #[test]
        fn damaged_files_are_read_or_refused(
            which in 0_usize..2,
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            end in any::<Option<prop::sample::Index>>(),
        ) {
            let mut bytes = from_hex(&golden()["cases"][which]["file"]);
            for (at, value) in damage {
                let at = 128 + at.index(bytes.len() - 128);
                bytes[at] = value;
            }
            if let Some(end) = end {
                bytes.truncate(end.index(bytes.len()));
            }
            drop(read(&bytes));
        }
    }
}
