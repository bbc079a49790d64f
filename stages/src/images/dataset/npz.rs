//! Format `npz`: arrays of images and labels in one NumPy archive, as MedMNIST and Keras distribute them.
//!
//! `split` chooses the arrays: `<split>_images` and `<split>_labels` (MedMNIST), or `x_<split>` and `y_<split>` (Keras); without a split, `images` and
//! `labels`. Images are unsigned bytes `[n, h, w]` or `[n, h, w, c]`, labels whole numbers `[n]` or `[n, 1]`.
//!
//! INVARIANT: memory follows the bytes that are really there: an archive's claim is compared with the most that its compressed size could
//! expand to before anything is allocated. Arrays of objects, which are pickles, are refused.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use zip::ZipArchive;

use super::error::DatasetError;
use super::registry::{Dataset, DatasetSpec, Format, PathParameter, SourceFile};
use super::stack::Stack;

/// The `npz` format.
pub struct Npz;

const PATHS: &[PathParameter] =
    &[PathParameter { name: "path", doc: "`.npz` archive of images and labels", required: true }];

/// DEFLATE emits at most 258 bytes for every two bits.
const MAX_EXPANSION: u64 = 1032;

impl Format for Npz {
    fn id(&self) -> &'static str {
        "npz"
    }

    fn summary(&self) -> &'static str {
        "NumPy archive with arrays of images and labels (MedMNIST, Keras)"
    }

    fn paths(&self) -> &'static [PathParameter] {
        PATHS
    }

    fn files(&self, spec: &DatasetSpec) -> Result<Vec<SourceFile>, DatasetError> {
        let path = spec.path(self, "path")?.to_owned();
        Ok(vec![SourceFile { path, role: "path", label: None }])
    }

    fn open(&self, spec: &DatasetSpec) -> Result<Box<dyn Dataset>, DatasetError> {
        let path = spec.path(self, "path")?;
        let mut archive = Archive::open(path)?;
        let (images_name, labels_name) = archive.names(spec.split.as_deref())?;
        let labels = archive.array(&labels_name)?;
        let images = archive.array(&images_name)?;
        let refuse = |member: &str, reason: String| DatasetError::Npz {
            path: path.to_owned(),
            member: member.to_owned(),
            reason,
        };
        let (n, height, width, channels) = match images.shape[..] {
            [n, height, width] => (n, height, width, 1),
            [n, height, width, channels @ (1 | 3)] => (n, height, width, channels),
            _ => {
                let found =
                    format!("expected images [n, h, w] or [n, h, w, 1 or 3], found {:?}", images.shape);
                return Err(refuse(&images_name, found));
            }
        };
        if images.dtype != "|u1" {
            return Err(refuse(
                &images_name,
                format!("expected unsigned bytes (`|u1`), found `{}`", images.dtype),
            ));
        }
        if !matches!(labels.shape[..], [_] | [_, 1]) {
            return Err(refuse(
                &labels_name,
                format!("expected labels [n] or [n, 1], found {:?}", labels.shape),
            ));
        }
        let labels = labels.whole_numbers().map_err(|reason| refuse(&labels_name, reason))?;
        if labels.len() != n {
            let (images, count) = (path.join(&images_name), labels.len());
            return Err(DatasetError::CountMismatch {
                images,
                labels: path.join(&labels_name),
                images_count: n,
                labels_count: count,
            });
        }
        let stack = Stack {
            path: path.to_owned(),
            height,
            width,
            channels,
            pixels: images.data,
            labels,
            classes: spec.classes.clone(),
        };
        stack.checked(spec)
    }
}

struct Archive<'a> {
    path: &'a Path,
    zip: ZipArchive<BufReader<File>>,
}

/// An array of an archive; `data` holds exactly as many bytes as type and shape say.
struct Array {
    /// As NumPy writes it, such as `<i8`.
    dtype: String,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl<'a> Archive<'a> {
    fn open(path: &'a Path) -> Result<Self, DatasetError> {
        let file = BufReader::new(fs_err::File::open(path)?.into_parts().0);
        let zip = ZipArchive::new(file).map_err(|error| DatasetError::NotAnArchive {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Self { path, zip })
    }

    /// The names of the arrays of images and of labels.
    fn names(&self, split: Option<&str>) -> Result<(String, String), DatasetError> {
        let candidates = match split {
            Some(split) => vec![
                (format!("{split}_images"), format!("{split}_labels")),
                (format!("x_{split}"), format!("y_{split}")),
            ],
            None => vec![("images".to_owned(), "labels".to_owned())],
        };
        let has = |name: &str| self.zip.index_for_name(&format!("{name}.npy")).is_some();
        let found = candidates.into_iter().find(|(images, labels)| has(images) && has(labels));
        found.ok_or_else(|| {
            let members = self.zip.file_names().filter_map(Result::ok);
            let mut known: Vec<String> =
                members.map(|name| format!("`{}`", name.trim_end_matches(".npy"))).collect();
            known.sort_unstable();
            DatasetError::UnknownSplit {
                path: self.path.to_owned(),
                split: split.unwrap_or("none").to_owned(),
                known: known.join(", "),
            }
        })
    }

    fn array(&mut self, name: &str) -> Result<Array, DatasetError> {
        let refuse = |reason: String| DatasetError::Npz {
            path: self.path.to_owned(),
            member: name.to_owned(),
            reason,
        };
        let mut member =
            self.zip.by_name(&format!("{name}.npy")).map_err(|error| refuse(error.to_string()))?;
        let (claimed, compressed) = (member.size(), member.compressed_size());
        if claimed > compressed.saturating_mul(MAX_EXPANSION) {
            return Err(refuse(format!(
                "{compressed} compressed bytes cannot hold the {claimed} that it claims"
            )));
        }
        let mut bytes = Vec::new();
        member.by_ref().take(claimed).read_to_end(&mut bytes).map_err(|error| refuse(error.to_string()))?;
        Array::parse(bytes).map_err(refuse)
    }
}

impl Array {
    /// Reads what `numpy.save` wrote.
    fn parse(mut bytes: Vec<u8>) -> Result<Self, String> {
        let too_short = || "it ends inside its header".to_owned();
        if !bytes.starts_with(b"\x93NUMPY") {
            return Err("it does not begin as a NumPy array does".to_owned());
        }
        let (length, start) = match bytes.get(6).ok_or_else(too_short)? {
            1 => (bytes.get(8..10).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]]))), 10),
            2 | 3 => (bytes.get(8..12).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize), 12),
            version => return Err(format!("it has format version {version}, known are 1 to 3")),
        };
        let end = start + length.ok_or_else(too_short)?;
        let header = bytes.get(start..end).ok_or_else(too_short)?;
        let header = std::str::from_utf8(header).map_err(|_| "its header is not text".to_owned())?;
        let dtype =
            value_of(header, "descr").and_then(quoted).ok_or("its header has no plain type")?.to_owned();
        if value_of(header, "fortran_order").is_none_or(|value| !value.starts_with("False")) {
            return Err("it is not in C order".to_owned());
        }
        let shape = value_of(header, "shape").and_then(|value| value.strip_prefix('(')?.split_once(')'));
        let (shape, _) = shape.ok_or("its header has no shape")?;
        let shape = shape.split(',').map(str::trim).filter(|part| !part.is_empty());
        let shape: Vec<usize> = shape
            .map(|part| part.parse().map_err(|_| format!("its shape has `{part}`")))
            .collect::<Result<_, _>>()?;
        let item: usize = dtype
            .get(2..)
            .and_then(|size| size.parse().ok())
            .ok_or_else(|| format!("it holds `{dtype}`, not numbers"))?;
        if !["u", "i"].iter().any(|kind| dtype[1..].starts_with(kind)) {
            return Err(format!("it holds `{dtype}`, not whole numbers"));
        }
        let expected = shape.iter().try_fold(item, |product, n| product.checked_mul(*n));
        let actual = bytes.len() - end;
        if expected != Some(actual) {
            return Err(format!("shape {shape:?} of `{dtype}` needs {expected:?} bytes, found {actual}"));
        }
        bytes.drain(..end);
        Ok(Self { dtype, shape, data: bytes })
    }

    /// The values of a label array.
    fn whole_numbers(&self) -> Result<Vec<u32>, String> {
        let (order, size) = (self.dtype.as_bytes()[0], self.dtype[2..].parse::<usize>().unwrap_or(0));
        if !matches!(size, 1 | 2 | 4 | 8) {
            return Err(format!("it holds `{}`, expected whole numbers of 1 to 8 bytes", self.dtype));
        }
        let signed = self.dtype.as_bytes()[1] == b'i';
        let value = |(index, bytes): (usize, &[u8])| {
            let mut wide = [0u8; 8];
            for (place, byte) in wide.iter_mut().zip(bytes) {
                *place = *byte;
            }
            if order == b'>' {
                wide[..size].reverse();
            }
            let value = u64::from_le_bytes(wide);
            let negative = signed && value >> (8 * size - 1) == 1;
            u32::try_from(value)
                .ok()
                .filter(|_| !negative)
                .ok_or_else(|| format!("label {index} is no class number"))
        };
        self.data.chunks_exact(size).enumerate().map(value).collect()
    }
}

/// What follows `'key':` in the header, a Python dictionary.
fn value_of<'a>(header: &'a str, key: &str) -> Option<&'a str> {
    let (_, rest) = header.split_once(&format!("'{key}':"))?;
    Some(rest.trim_start())
}

fn quoted(value: &str) -> Option<&str> {
    let (text, _) = value.strip_prefix('\'')?.split_once('\'')?;
    (text.len() >= 3 && text.is_ascii()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use zip::CompressionMethod;
    use zip::write::{SimpleFileOptions, ZipWriter};

    fn npy(dtype: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let mut header = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}");
        while (10 + header.len() + 1) % 64 != 0 {
            header.push(' ');
        }
        header.push('\n');
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn archive(members: &[(&str, Vec<u8>)]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut zip = ZipWriter::new(file.reopen().unwrap());
        for (name, bytes) in members {
            let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
            zip.start_file(format!("{name}.npy"), options).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
        file
    }

    fn open(path: &Path, split: Option<&str>) -> Result<Box<dyn Dataset>, String> {
        let spec = DatasetSpec {
            name: "scans".into(),
            format: "npz".into(),
            paths: [("path".to_owned(), path.to_owned())].into(),
            split: split.map(str::to_owned),
            ..DatasetSpec::default()
        };
        super::super::registry::open(&spec).map_err(|error| error.to_string())
    }

    #[test]
    fn splits_of_medmnist_and_keras_are_found() {
        let images = npy("|u1", "(2, 1, 2)", &[1, 2, 3, 4]);
        let file = archive(&[
            ("test_images", images.clone()),
            (
                "test_labels",
                npy("<i8", "(2, 1)", &[[5, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]].concat()),
            ),
            ("x_train", images),
            ("y_train", npy(">u2", "(2,)", &[0, 7, 1, 0])),
        ]);
        let test = open(file.path(), Some("test")).unwrap();
        assert_eq!(test.labels(), [5, 257]);
        assert_eq!(test.image(1).unwrap().pixels(), [3, 4]);
        assert_eq!(open(file.path(), Some("train")).unwrap().labels(), [7, 256]);
    }

    #[test]
    fn mistakes_name_file_member_and_reason() {
        let images = npy("|u1", "(2, 1, 2)", &[1, 2, 3, 4]);
        let said = |members: &[(&str, Vec<u8>)]| open(archive(members).path(), None).err().unwrap();
        let text = said(&[("images", images.clone())]);
        assert!(text.contains("split `none`") && text.contains("`images`"), "{text}");
        let text = said(&[("images", images.clone()), ("labels", npy("<f4", "(1,)", &[0; 4]))]);
        assert!(text.contains("`labels`") && text.contains("<f4"), "{text}");
        let text = said(&[("images", images.clone()), ("labels", npy("|i1", "(2,)", &[0, 255]))]);
        assert!(text.contains("label 1 is no class number"), "{text}");
        let text = said(&[("images", images.clone()), ("labels", npy("|u1", "(3,)", &[0, 1, 2]))]);
        assert!(text.contains("2 images, 3 labels"), "{text}");
        let text =
            said(&[("images", npy("|u1", "(9, 9, 9)", &[1])), ("labels", npy("|u1", "(2,)", &[0, 1]))]);
        assert!(text.contains("needs Some(729) bytes, found 1"), "{text}");
        let text = said(&[("images", npy("|O", "(1,)", &[1])), ("labels", npy("|u1", "(1,)", &[0]))]);
        assert!(text.contains("its header has no plain type"), "{text}");
    }

    #[test]
    fn a_file_that_is_no_archive_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs_err::write(file.path(), b"not an archive").unwrap();
        assert!(open(file.path(), None).err().unwrap().contains("is not a NumPy archive"));
    }
}
