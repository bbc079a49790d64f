//! The safetensors format: 8 bytes of header length, a JSON header, then the tensors without gaps.
//!
//! The header is parsed here rather than by the `safetensors` crate because its errors name neither the file nor what was
//! expected; the two are held to the same verdict by a property test. Stricter in one point: names that appear twice are
//! refused instead of the last one winning. Element types smaller than a byte are not supported.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::DType;
use crate::dtype::{TensorInfo, byte_size};
use crate::error::{Error, Result};
use crate::formats::package::{Description, PackageProblem};
use crate::formats::{FilePart, Format, FormatProblem, Selection, TensorRegion, lfs_hint};
use crate::formats::{npy, pytorch, zip};
use crate::manifest::Content;
use crate::read_at::{FileReader, ReadAt, read_exact};

/// Largest header that is accepted, the limit of the `safetensors` crate.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Name in the header that is not a tensor.
pub const METADATA_KEY: &str = "__metadata__";

/// The format's entry in the registry.
pub struct SafeTensors;

impl Format for SafeTensors {
    fn name(&self) -> &'static str {
        "safetensors"
    }

    fn recognizes(&self, path: &Path, start: &[u8]) -> bool {
        let by_name = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("safetensors"));
        let by_content = match start.first_chunk::<8>() {
            Some(length) => start.get(8) == Some(&b'{') && u64::from_le_bytes(*length) <= MAX_HEADER_BYTES,
            None => false,
        };
        // a header's length may look like the beginning of a pickle, but none goes on like one
        by_content || (by_name && !looks_like_another_format(start))
    }

    fn files(&self, path: &Path) -> Result<Vec<PathBuf>> {
        // What is wrong with a header is said when the tensors are described.
        let description =
            read_header(&FileReader::open(path)?)?.ok().and_then(|header| Description::of(&header));
        let mut files = vec![path.to_owned()];
        if let Some(base) = description.and_then(Result::ok).as_ref().and_then(Description::base) {
            files.push(
                base.locate(path).map_err(|problem| Error::format(path, FormatProblem::from(problem)))?,
            );
        }
        Ok(files)
    }

    fn describe(&self, path: &Path, selection: &Selection) -> Result<Vec<FilePart>> {
        if let Some(key) = &selection.key {
            return Err(Error::format(path, FormatProblem::NoKeys(key.clone())));
        }
        let refused = |problem: FormatProblem| Error::format(path, problem);
        let file = FileReader::open(path)?;
        let header = read_header(&file)?.map_err(refused)?;
        let Some(description) = Description::of(&header) else {
            return Ok(vec![part(path, &file, header.tensors)]);
        };
        let description = description.map_err(|problem| refused(problem.into()))?;
        let base = description.base().cloned();
        let own = part(path, &file, description.unpack(header.tensors).map_err(refused)?);
        let Some(base) = base else { return Ok(vec![own]) };
        let found = base.locate(path).map_err(|problem| refused(problem.into()))?;
        let mut shared = describe_file(&found)?;
        base.check(&own, &shared).map_err(|problem| refused(problem.into()))?;
        shared.base = Some(base.digest);
        Ok(vec![own, shared])
    }

    fn content(&self, path: &Path) -> Result<Option<Content>> {
        let header = read_header(&FileReader::open(path)?)?;
        let description = header.ok().and_then(|header| Description::of(&header));
        Ok(description.and_then(Result::ok).map(|description| description.content()))
    }
}

fn looks_like_another_format(start: &[u8]) -> bool {
    start.starts_with(&zip::SIGNATURE) || start.starts_with(npy::MAGIC) || pytorch::is_pickle(start)
}

/// Returns the tensors of one safetensors file; of a package, those that it stands for.
pub fn describe_file(path: &Path) -> Result<FilePart> {
    let file = FileReader::open(path)?;
    let tensors = read_tensors(&file)?.map_err(|problem| Error::format(path, problem))?;
    Ok(part(path, &file, tensors))
}

fn part(path: &Path, file: &FileReader, tensors: Vec<TensorRegion>) -> FilePart {
    FilePart { path: path.to_owned(), size: file.size(), tensors, notes: Vec::new(), base: None }
}

/// The tensors of [`describe_file`]. The outer error is one of reading, the inner one of content.
pub fn read_tensors(file: &dyn ReadAt) -> Result<Result<Vec<TensorRegion>, FormatProblem>> {
    Ok(read_header(file)?.and_then(|header| match Description::of(&header) {
        Some(description) => match description? {
            // Its values are not in this file alone.
            description if description.base().is_some() => Err(PackageProblem::NeedsBase.into()),
            description => description.unpack(header.tensors),
        },
        None => Ok(header.tensors),
    }))
}

/// A checked header.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// Sorted by name; offsets count from the beginning of the file.
    pub tensors: Vec<TensorRegion>,
    /// Free-form strings of the writer.
    pub metadata: BTreeMap<String, String>,
}

/// Reads and checks a header. The outer error is one of reading, the inner one of content.
pub fn read_header(file: &dyn ReadAt) -> Result<Result<Header, FormatProblem>> {
    let file_size = file.size();
    if file_size < 8 {
        return Ok(Err(FormatProblem::NoHeader { actual: file_size }));
    }
    let mut length = [0; 8];
    read_exact(file, &mut length, 0)?;
    let claimed = u64::from_le_bytes(length);
    if claimed > file_size - 8 {
        let hint = lfs_hint(&length);
        return Ok(Err(FormatProblem::HeaderLargerThanFile { claimed, file_size, hint }));
    }
    if claimed > MAX_HEADER_BYTES {
        return Ok(Err(FormatProblem::HeaderTooLarge { claimed, limit: MAX_HEADER_BYTES }));
    }
    let mut json = vec![0; claimed as usize];
    read_exact(file, &mut json, 8)?;
    Ok(parse_header(&json, 8 + claimed, file_size))
}

fn parse_header(json: &[u8], data_start: u64, file_size: u64) -> Result<Header, FormatProblem> {
    let raw: RawHeader =
        serde_json::from_slice(json).map_err(|problem| FormatProblem::Header(problem.to_string()))?;
    let mut entries = raw.tensors;
    entries.sort_by(|(left_name, left), (right_name, right)| {
        left.data_offsets.cmp(&right.data_offsets).then_with(|| left_name.cmp(right_name))
    });

    let mut tensors: Vec<TensorRegion> = Vec::with_capacity(entries.len());
    let mut previous_end = 0;
    for (name, entry) in entries {
        let (start, end) = entry.data_offsets;
        let Some(dtype) = DType::from_name(&entry.dtype) else {
            return Err(FormatProblem::UnknownDType { tensor: name, dtype: entry.dtype });
        };
        let shape = entry.shape;
        let Some(expected) = byte_size(dtype, &shape) else {
            return Err(FormatProblem::ShapeOverflow { tensor: name, shape });
        };
        if end.checked_sub(start) != Some(expected) {
            return Err(FormatProblem::WrongLength { tensor: name, dtype, shape, expected, start, end });
        }
        if start > previous_end {
            return Err(FormatProblem::Gap { tensor: name, start, previous_end });
        }
        if start < previous_end {
            let other = tensors.pop().map(|other| other.info.name).unwrap_or_default();
            return Err(FormatProblem::Overlap { tensor: name, other, start, other_end: previous_end });
        }
        previous_end = end;
        let info = TensorInfo { name, dtype, shape };
        // Data that ends beyond the file is refused below, so this sum cannot matter once it saturates.
        tensors.push(TensorRegion::plain(info, data_start.saturating_add(start), expected));
    }

    let expected = data_start.saturating_add(previous_end);
    match expected.cmp(&file_size) {
        std::cmp::Ordering::Greater => {
            return Err(FormatProblem::Truncated { expected, actual: file_size });
        }
        std::cmp::Ordering::Less => {
            return Err(FormatProblem::TrailingBytes { expected, actual: file_size });
        }
        std::cmp::Ordering::Equal => {}
    }

    tensors.sort_by(|left, right| left.info.name.cmp(&right.info.name));
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].info.name == pair[1].info.name) {
        return Err(FormatProblem::DuplicateTensor(pair[0].info.name.clone()));
    }
    Ok(Header { tensors, metadata: raw.metadata })
}

/// The header as written, before any check. Keeps names that appear twice.
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader { tensors: Vec::new(), metadata: BTreeMap::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA_KEY {
                        header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                    } else {
                        let tensor = map
                            .next_value()
                            .map_err(|problem| A::Error::custom(format!("tensor `{name}`: {problem}")))?;
                        header.tensors.push((name, tensor));
                    }
                }
                Ok(header)
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    fn parse(bytes: &Vec<u8>) -> Result<Header, FormatProblem> {
        read_header(bytes).expect("memory can be read")
    }

    #[track_caller]
    fn check_refused(header: &str, data: &[u8], expected: &str) {
        let problem = parse(&file(header, data)).unwrap_err();
        assert_eq!(problem.to_string(), expected);
    }

    const TWO: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[],"data_offsets":[8,9]},"__metadata__":{"format":"pt"}}"#;

    #[test]
    fn reads_names_types_shapes_offsets_and_metadata() {
        let header = parse(&file(TWO, &[0; 9])).unwrap();
        let start = 8 + TWO.len() as u64;
        assert_eq!(
            header.tensors[0].info,
            TensorInfo { name: "a".into(), dtype: DType::F32, shape: vec![2] }
        );
        assert_eq!((header.tensors[0].offset, header.tensors[0].length), (start, 8));
        assert_eq!((header.tensors[1].offset, header.tensors[1].length), (start + 8, 1));
        assert_eq!(header.metadata["format"], "pt");
    }

    #[test]
    fn a_truncated_file_is_reported_with_both_sizes() {
        let size = file(TWO, &[0; 9]).len();
        let expected =
            format!("the file is truncated: its header describes {size} bytes, it has {}", size - 4);
        check_refused(TWO, &[0; 5], &expected);
        assert_eq!(
            parse(&vec![1, 2, 3]).unwrap_err().to_string(),
            "the file has 3 bytes, too few for a header"
        );
    }

    #[test]
    fn refuses_trailing_bytes() {
        let size = file(TWO, &[0; 9]).len();
        let expected =
            format!("the file has 2 bytes after its last tensor: expected {size} bytes, it has {}", size + 2);
        check_refused(TWO, &[0; 11], &expected);
    }

    #[test]
    fn refuses_a_header_larger_than_the_file() {
        let mut bytes = file(TWO, &[0; 9]);
        bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        let problem = parse(&bytes).unwrap_err();
        assert!(matches!(problem, FormatProblem::HeaderLargerThanFile { claimed: u64::MAX, .. }));
    }

    #[test]
    fn refuses_overlaps_gaps_and_wrong_lengths_by_name() {
        check_refused(
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#,
            &[0; 6],
            "tensor `b` overlaps tensor `a`: it starts at 2, the other ends at 4",
        );
        check_refused(
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[6,10]}}"#,
            &[0; 10],
            "there is a gap before tensor `b`: it starts at 6, the data before it ends at 4",
        );
        check_refused(
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}"#,
            &[0; 4],
            "tensor `a` of dtype F32 and shape [4] needs 16 bytes, its offsets 0 to 4 hold 4",
        );
        check_refused(
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[8,4]}}"#,
            &[0; 4],
            "tensor `a` of dtype F32 and shape [4] needs 16 bytes, its offsets 8 to 4 hold 0",
        );
    }

    #[test]
    fn refuses_bad_types_shapes_and_names() {
        let problem =
            parse(&file(r#"{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}"#, &[0])).unwrap_err();
        assert!(
            problem.to_string().starts_with("tensor `a` has unsupported dtype `F4`; supported: BOOL, U8")
        );
        check_refused(
            r#"{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#,
            &[],
            "tensor `a` has a shape whose size overflows: [4294967296, 4294967296]",
        );
        check_refused(
            r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
            &[0; 2],
            "tensor `a` is listed twice",
        );
        let problem =
            parse(&file(r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,0]}}"#, &[])).unwrap_err();
        assert!(problem.to_string().starts_with("the header is not valid: tensor `a`: "), "{problem}");
        let problem = parse(&file("[]", &[])).unwrap_err();
        assert!(problem.to_string().contains("expected an object of tensors"), "{problem}");
    }

    #[test]
    fn empty_tensors_and_empty_files_are_valid() {
        let header = parse(&file(
            r#"{"a":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]},"b":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#,
            &[],
        ));
        assert_eq!(header.unwrap().tensors.len(), 2);
        assert_eq!(parse(&file("{}", &[])).unwrap().tensors, []);
    }

    /// Names and bytes that matter to the parser, so that mutations reach deep.
    fn mutation() -> impl Strategy<Value = (usize, u8)> {
        let byte =
            prop_oneof![any::<u8>(), prop::sample::select(b"0123456789{}[]\",:-eE.\\ FUBab".to_vec()),];
        (any::<usize>(), byte)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Damaged files are refused or read consistently, and never panic. Allocation is bounded by the checks before
        /// it: the header is read only when the file is at least that long.
        #[test]
        fn damaged_files_never_panic_and_agree_with_the_safetensors_crate(
            mutations in prop::collection::vec(mutation(), 0..6),
            keep in any::<prop::sample::Index>(),
            truncate in prop::bool::weighted(0.2),
        ) {
            let mut bytes = file(TWO, &[7; 9]);
            for (position, byte) in mutations {
                let position = position % bytes.len();
                bytes[position] = byte;
            }
            if truncate {
                bytes.truncate(keep.index(bytes.len() + 1));
            }
            let theirs = safetensors::SafeTensors::deserialize(&bytes);
            match parse(&bytes) {
                Ok(header) => {
                    let theirs = theirs.expect("we accept nothing that the reference refuses");
                    prop_assert_eq!(theirs.len(), header.tensors.len());
                    for tensor in &header.tensors {
                        let view = theirs.tensor(&tensor.info.name).unwrap();
                        prop_assert_eq!(view.shape(), &tensor.info.shape[..]);
                        let region = tensor.offset as usize..(tensor.offset + tensor.length) as usize;
                        prop_assert_eq!(view.data(), &bytes[region]);
                    }
                }
                Err(FormatProblem::DuplicateTensor(_) | FormatProblem::UnknownDType { .. }) => {}
                Err(problem) => prop_assert!(theirs.is_err(), "only we refuse: {problem}"),
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse(&bytes);
        }
    }
}
