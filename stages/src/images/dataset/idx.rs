//! Format `idx`: the files of MNIST and its descendants, plain or gzip-compressed.
//!
//! An idx file is `00 00 <type> <dimensions>`, the dimensions as big-endian `u32`, then the values. Images are
//! unsigned bytes `[n, height, width]` or `[n, height, width, channels]`, labels are unsigned bytes `[n]`.
//! Compression is recognized by content (`1f 8b`), not by name.
//!
//! INVARIANT: memory follows the bytes that are really there. A header's claim is compared with the file's
//! size before anything is allocated (for gzip with the most that its size could expand to), and
//! decompression grows with its output.
//!
//! Images stay in memory as bytes; other element types and dimensions are refused.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;

use super::error::DatasetError;
use super::registry::{Dataset, DatasetSpec, Format, PathParameter, SourceFile};
use super::stack::{Stack, check_labels};

/// The `idx` format.
pub struct Idx;

const PATHS: &[PathParameter] = &[
    PathParameter {
        name: "images",
        doc: "idx file of unsigned bytes [n, h, w] or [n, h, w, c], plain or gzip",
        required: true,
    },
    PathParameter { name: "labels", doc: "idx file of unsigned bytes [n], plain or gzip", required: true },
];

/// DEFLATE emits at most 258 bytes for every two bits.
const GZIP_MAX_EXPANSION: u64 = 1032;

impl Format for Idx {
    fn id(&self) -> &'static str {
        "idx"
    }

    fn summary(&self) -> &'static str {
        "idx image and label files (MNIST), plain or gzip"
    }

    fn paths(&self) -> &'static [PathParameter] {
        PATHS
    }

    fn files(&self, spec: &DatasetSpec) -> Result<Vec<SourceFile>, DatasetError> {
        PATHS
            .iter()
            .map(|parameter| {
                let path = spec.path(self, parameter.name)?.to_owned();
                Ok(SourceFile { path, role: parameter.name, label: None })
            })
            .collect()
    }

    fn open(&self, spec: &DatasetSpec) -> Result<Box<dyn Dataset>, DatasetError> {
        let images_path = spec.path(self, "images")?.to_owned();
        let labels_path = spec.path(self, "labels")?.to_owned();
        let labels = read_idx(&labels_path)?;
        let [n_labels] = labels.dims[..] else {
            return Err(dimensions_error(labels_path, "labels", "1", &labels));
        };
        let images = read_idx(&images_path)?;
        let (n_images, height, width, channels) = match images.dims[..] {
            [n, h, w] => (n as usize, h as usize, w as usize, 1),
            [n, h, w, c] => (n as usize, h as usize, w as usize, c as usize),
            _ => return Err(dimensions_error(images_path, "images", "3 or 4", &images)),
        };
        if n_images != n_labels as usize {
            return Err(DatasetError::CountMismatch {
                images: images_path,
                labels: labels_path,
                images_count: n_images,
                labels_count: n_labels as usize,
            });
        }
        if channels != 1 && channels != 3 {
            return Err(DatasetError::IdxChannels { path: images_path, actual: channels });
        }

        let mut labels: Vec<u32> = labels.data.iter().map(|&label| u32::from(label)).collect();
        labels.truncate(spec.limit.unwrap_or(n_images));
        check_labels(&labels_path, &labels, spec.classes.as_deref())?;
        let (pixels, classes) = (images.data, spec.classes.clone());
        Stack { path: images_path, height, width, channels, pixels, labels, classes }.checked(spec)
    }
}

/// A parsed idx file; `data` holds exactly as many bytes as `dims` multiply to.
#[derive(Debug)]
struct IdxFile {
    dims: Vec<u32>,
    data: Vec<u8>,
}

fn read_idx(path: &Path) -> Result<IdxFile, DatasetError> {
    let file = fs_err::File::open(path)?;
    let file_bytes = file.metadata()?.len();
    parse_idx(path, BufReader::with_capacity(1 << 16, file), file_bytes)
}

/// Parses an idx file of `file_bytes` bytes, plain or gzip.
fn parse_idx(path: &Path, mut reader: impl BufRead, file_bytes: u64) -> Result<IdxFile, DatasetError> {
    let start = reader.fill_buf().map_err(|source| DatasetError::Read { path: path.to_owned(), source })?;
    if start.starts_with(&[0x1f, 0x8b]) {
        let most = file_bytes.saturating_mul(GZIP_MAX_EXPANSION);
        parse_plain(path, MultiGzDecoder::new(reader), most, false)
    } else {
        parse_plain(path, reader, file_bytes, true)
    }
}

/// Parses uncompressed idx bytes, of which there are `bytes` (`exact`) or at most `bytes`.
fn parse_plain(path: &Path, mut reader: impl Read, bytes: u64, exact: bool) -> Result<IdxFile, DatasetError> {
    let mut magic = [0_u8; 4];
    let found = read_up_to(&mut reader, &mut magic, path)?;
    if !(magic[..found].starts_with(&[0, 0, 8]) || (found < 4 && [0, 0, 8].starts_with(&magic[..found]))) {
        let found = magic[..found].iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
        return Err(DatasetError::IdxMagic { path: path.to_owned(), found });
    }
    if found < 4 {
        return Err(DatasetError::IdxHeader { path: path.to_owned(), expected: 4, actual: found });
    }
    let n_dims = usize::from(magic[3]);
    let mut dim_bytes = vec![0_u8; 4 * n_dims];
    let dims_found = read_up_to(&mut reader, &mut dim_bytes, path)?;
    let header_bytes = 4 + 4 * n_dims;
    if dims_found < dim_bytes.len() {
        let actual = 4 + dims_found;
        return Err(DatasetError::IdxHeader { path: path.to_owned(), expected: header_bytes, actual });
    }
    let (groups, _) = dim_bytes.as_chunks::<4>();
    let dims: Vec<u32> = groups.iter().map(|group| u32::from_be_bytes(*group)).collect();

    // Saturating: a product beyond u128 is beyond every file.
    let expected = dims.iter().fold(1_u128, |product, &dim| product.saturating_mul(u128::from(dim)));
    let size_error = |actual: String| DatasetError::IdxSize {
        path: path.to_owned(),
        dims: dims.clone(),
        expected,
        actual,
    };
    let available = bytes.saturating_sub(header_bytes as u64);
    if exact && expected != u128::from(available) {
        return Err(size_error(available.to_string()));
    }
    if expected > u128::from(available) {
        return Err(size_error(format!("at most {available} after decompression")));
    }

    let mut data = Vec::new();
    // One byte more than expected: surplus data shows, and the end of a gzip stream (its checksum) is read.
    reader
        .take(expected as u64 + 1)
        .read_to_end(&mut data)
        .map_err(|source| DatasetError::Read { path: path.to_owned(), source })?;
    if data.len() as u128 > expected {
        return Err(size_error("more".into()));
    }
    if data.len() as u128 != expected {
        return Err(size_error(data.len().to_string()));
    }
    Ok(IdxFile { dims, data })
}

/// Fills `buffer` as far as the data go.
fn read_up_to(reader: &mut impl Read, buffer: &mut [u8], path: &Path) -> Result<usize, DatasetError> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(source) => return Err(DatasetError::Read { path: path.to_owned(), source }),
        }
    }
    Ok(filled)
}

fn dimensions_error(
    path: PathBuf,
    what: &'static str,
    expected: &'static str,
    file: &IdxFile,
) -> DatasetError {
    DatasetError::IdxDimensions { path, what, expected, actual: file.dims.len() }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};
    use proptest::prelude::*;

    use super::super::registry::open;
    use super::*;

    fn idx_bytes(dims: &[u32], data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, 8, dims.len() as u8];
        bytes.extend(dims.iter().flat_map(|dim| dim.to_be_bytes()));
        bytes.extend_from_slice(data);
        bytes
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn parse(bytes: &[u8]) -> Result<IdxFile, DatasetError> {
        parse_idx(Path::new("some.idx"), bytes, bytes.len() as u64)
    }

    fn open_files(
        images: &[u8],
        labels: &[u8],
        change: impl FnOnce(&mut DatasetSpec),
    ) -> Result<Box<dyn Dataset>, String> {
        let folder = tempfile::tempdir().unwrap();
        let mut spec = DatasetSpec { name: "digits".into(), format: "idx".into(), ..DatasetSpec::default() };
        for (name, bytes) in [("images", images), ("labels", labels)] {
            fs_err::write(folder.path().join(name), bytes).unwrap();
            spec.paths.insert(name.into(), folder.path().join(name));
        }
        change(&mut spec);
        let prefix = format!("{}/", folder.path().display());
        open(&spec).map_err(|error| error.to_string().replace(&prefix, ""))
    }

    fn error(images: &[u8], labels: &[u8]) -> String {
        open_files(images, labels, |_| {}).map(|_| ()).unwrap_err()
    }

    #[test]
    fn reads_plain_and_gzip_grey_and_rgb() {
        let grey = idx_bytes(&[2, 1, 3], &[1, 2, 3, 4, 5, 6]);
        let rgb = idx_bytes(&[2, 1, 1, 3], &[1, 2, 3, 4, 5, 6]);
        let labels = idx_bytes(&[2], &[7, 0]);
        for (images, shape) in [(&grey, (1, 3, 1)), (&rgb, (1, 1, 3))] {
            for (images, labels) in [(images.clone(), labels.clone()), (gzip(images), gzip(&labels))] {
                let dataset = open_files(&images, &labels, |_| {}).unwrap();
                assert_eq!(dataset.len(), 2);
                assert_eq!((dataset.label(0), dataset.label(1)), (7, 0));
                assert!(dataset.classes().is_none());
                let image = dataset.image(1).unwrap();
                assert_eq!((image.height(), image.width(), image.channels()), shape);
                assert_eq!(image.pixels(), [4, 5, 6]);
                assert!(matches!(dataset.image(2), Err(DatasetError::IndexOutOfRange { index: 2, len: 2 })));
            }
        }
    }

    #[test]
    fn limit_takes_the_first_images() {
        let images = idx_bytes(&[3, 1, 1], &[1, 2, 3]);
        let labels = idx_bytes(&[3], &[9, 8, 7]);
        for (limit, len) in [(2, 2), (3, 3), (100, 3)] {
            let dataset = open_files(&images, &labels, |spec| spec.limit = Some(limit)).unwrap();
            assert_eq!(dataset.len(), len);
            assert_eq!(dataset.image(len - 1).unwrap().pixels(), [len as u8]);
            assert!(dataset.image(len).is_err());
        }
    }

    #[test]
    fn reports_header_claims_that_the_file_does_not_back() {
        let labels = idx_bytes(&[2], &[0, 1]);
        assert_eq!(
            error(&idx_bytes(&[2, 1, 3], &[1, 2, 3, 4, 5]), &labels),
            "idx file `images`: the header [2, 1, 3] claims 6 bytes of data, the file holds 5"
        );
        assert_eq!(
            error(&idx_bytes(&[2, 1, 3], &[0; 7]), &labels),
            "idx file `images`: the header [2, 1, 3] claims 6 bytes of data, the file holds 7"
        );
        assert_eq!(
            error(&gzip(&idx_bytes(&[2, 1, 3], &[0; 5])), &labels),
            "idx file `images`: the header [2, 1, 3] claims 6 bytes of data, the file holds 5"
        );
        assert_eq!(
            error(&gzip(&idx_bytes(&[2, 1, 3], &[0; 7])), &labels),
            "idx file `images`: the header [2, 1, 3] claims 6 bytes of data, the file holds more"
        );
        assert!(error(&gzip(&idx_bytes(&[u32::MAX, u32::MAX, u32::MAX], &[])), &labels).contains("at most"));
    }

    #[test]
    fn reports_what_is_not_an_idx_file() {
        let labels = idx_bytes(&[2], &[0, 1]);
        assert_eq!(
            error(b"\x89PNG....", &labels),
            "`images` is not an idx file of unsigned bytes: expected it to start with 00 00 08, found 89 50 4e 47"
        );
        assert_eq!(
            error(&[0, 0, 0x0d, 3, 0], &labels),
            "`images` is not an idx file of unsigned bytes: expected it to start with 00 00 08, found 00 00 0d 03"
        );
        assert_eq!(
            error(&[0, 0, 8, 3, 0, 0], &labels),
            "idx file `images` ends inside its header: expected 16 bytes, found 6"
        );
        assert_eq!(
            error(&[], &labels),
            "idx file `images` ends inside its header: expected 4 bytes, found 0"
        );
    }

    #[test]
    fn reports_images_and_labels_that_do_not_fit() {
        let images = idx_bytes(&[2, 1, 1], &[1, 2]);
        let labels = idx_bytes(&[2], &[0, 1]);
        assert_eq!(
            error(&images, &idx_bytes(&[3], &[0, 1, 2])),
            "`images` and `labels` do not belong together: 2 images, 3 labels"
        );
        assert_eq!(
            error(&labels, &labels),
            "idx file `images` holds images: expected 3 or 4 dimensions, found 1"
        );
        assert_eq!(error(&images, &images), "idx file `labels` holds labels: expected 1 dimensions, found 3");
        assert_eq!(
            error(&idx_bytes(&[2, 1, 1, 2], &[0; 4]), &labels),
            "idx file `images`: expected images of 1 or 3 channels, found 2"
        );
        assert_eq!(error(&idx_bytes(&[0, 4, 4], &[]), &idx_bytes(&[0], &[])), "`images` holds no images");
        assert_eq!(error(&idx_bytes(&[2, 0, 4], &[]), &labels), "`images` holds no images");
    }

    #[test]
    fn reports_a_label_beyond_the_classes() {
        let images = idx_bytes(&[3, 1, 1], &[1, 2, 3]);
        let labels = idx_bytes(&[3], &[0, 1, 2]);
        let classes = Some(vec!["a".to_owned(), "b".to_owned()]);
        let message = open_files(&images, &labels, |spec| spec.classes.clone_from(&classes)).map(|_| ());
        assert_eq!(message.unwrap_err(), "`labels`: image 2 has label 2, but there are 2 classes");
    }

    #[test]
    fn reports_a_damaged_gzip_stream_and_a_missing_file() {
        let mut bytes = gzip(&idx_bytes(&[64, 1, 1], &[3; 64]));
        let last = bytes.len() - 6; // inside the checksum
        bytes[last] ^= 1;
        assert!(matches!(parse(&bytes), Err(DatasetError::Read { .. })));
        let whole = gzip(&idx_bytes(&[64, 1, 1], &[3; 64]));
        assert!(matches!(parse(&whole[..whole.len() - 9]), Err(DatasetError::Read { .. })));
        let missing = read_idx(Path::new("no/such/file")).unwrap_err().to_string();
        assert!(missing.contains("no/such/file"), "{missing}");
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic_nor_allocate_beyond_the_file(
            head in prop_oneof![
                Just(vec![]),
                Just(vec![0, 0, 8]),
                Just(vec![0, 0, 8, 3]),
                Just(vec![0x1f, 0x8b]),
                Just(vec![0x1f, 0x8b, 8, 0]),
            ],
            tail in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let bytes = [head, tail].concat();
            if let Ok(file) = parse(&bytes) {
                prop_assert!(file.data.capacity() <= bytes.len() * GZIP_MAX_EXPANSION as usize);
            }
        }

        #[test]
        fn hostile_headers_inside_gzip_never_allocate_by_their_claim(
            dims in proptest::collection::vec(any::<u32>(), 0..6),
            data in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let bytes = idx_bytes(&dims, &data);
            for bytes in [gzip(&bytes), bytes] {
                if let Ok(file) = parse(&bytes) {
                    prop_assert!(file.data.capacity() <= 256 + 2 * data.len());
                }
            }
        }

        #[test]
        fn whatever_is_written_is_read_back(
            n in 1_u32..5, h in 1_u32..5, w in 1_u32..5, seed in any::<u8>(), compressed in any::<bool>(),
        ) {
            let data: Vec<u8> = (0..n * h * w).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect();
            let bytes = idx_bytes(&[n, h, w], &data);
            let file = parse(&if compressed { gzip(&bytes) } else { bytes }).unwrap();
            prop_assert_eq!(file.dims, vec![n, h, w]);
            prop_assert_eq!(file.data, data);
        }
    }
}
