//! Format `webdataset`: shards that are tar archives, in which the files of one sample lie side by side under one name.
//!
//! `sample.jpg` and `sample.cls`: the image, and the label as text (a number, or a class name); or `sample.json` with `label` or `cls`. `path` is
//! an archive (`.tar`, or gzipped), a folder of them (`split` is a folder in it, or what their names begin with), or a pattern
//! (`test-{000..012}.tar`, `shards/*.tar`). Classes are those of a `classnames.txt` beside the shards or one folder above, a name per line.
//!
//! Opening reads the headers and the labels. Images are read from their places when they are asked for; a gzipped shard has no places, so it is
//! unpacked as a whole, the last two that were needed.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use flate2::read::MultiGzDecoder;
use tar::{Archive, Entry};

use super::decode::{Decoding, READABLE};
use super::error::DatasetError;
use super::image_type::Image;
use super::labels;
use super::patterns;
use super::registry::{Dataset, DatasetSpec, Format, PathParameter, SourceFile};
use super::stack::check_labels;

/// The `webdataset` format.
pub struct WebDataset;

const PATHS: &[PathParameter] = &[PathParameter {
    name: "path",
    doc: "tar archive, folder of them, or pattern such as `test-{000..012}.tar`",
    required: true,
}];

/// Names of files of class names.
const CLASS_NAMES: &str = "classnames.txt";

/// The largest label file; the largest image.
const MAX_LABEL: u64 = 1 << 20;
const MAX_IMAGE: u64 = 1 << 28;

/// Gzipped shards that stay unpacked: readers go through a dataset in order, a few batches at once.
const KEPT_SHARDS: usize = 2;

impl Format for WebDataset {
    fn id(&self) -> &'static str {
        "webdataset"
    }

    fn summary(&self) -> &'static str {
        "WebDataset: tar archives with an image and a label per sample"
    }

    fn paths(&self) -> &'static [PathParameter] {
        PATHS
    }

    fn files(&self, spec: &DatasetSpec) -> Result<Vec<SourceFile>, DatasetError> {
        let shards = shards(spec.path(self, "path")?, spec.split.as_deref())?;
        let names =
            class_names_file(spec, &shards).map(|path| SourceFile { path, role: "classes", label: None });
        let shards = shards.into_iter().map(|path| SourceFile { path, role: "path", label: None });
        Ok(names.into_iter().chain(shards).collect())
    }

    fn open(&self, spec: &DatasetSpec) -> Result<Box<dyn Dataset>, DatasetError> {
        let path = spec.path(self, "path")?;
        let paths = shards(path, spec.split.as_deref())?;
        let classes = match (&spec.classes, class_names_file(spec, &paths)) {
            (Some(classes), _) => Some(classes.clone()),
            (None, Some(file)) => {
                Some(fs_err::read_to_string(file)?.lines().map(|line| line.trim().to_owned()).collect())
            }
            (None, None) => None,
        };
        let (mut shards, mut samples, mut written) = (Vec::new(), Vec::new(), Vec::new());
        for path in paths {
            if spec.limit.is_some_and(|limit| samples.len() >= limit) {
                break;
            }
            let shard = Shard::open(path)?;
            for found in shard.index()? {
                samples.push(Sample {
                    shard: shards.len(),
                    place: found.place,
                    len: found.len,
                    key: found.key,
                });
                written.push(found.label);
            }
            shards.push(shard);
        }
        if samples.is_empty() {
            return Err(DatasetError::Empty { path: path.to_owned() });
        }
        let (mut labels, classes) = labels::resolve(path, &written, classes.as_deref())?;
        if let Some(limit) = spec.limit {
            samples.truncate(limit);
            labels.truncate(limit);
        }
        check_labels(path, &labels, classes.as_deref())?;
        let kept = Mutex::default();
        Ok(Box::new(Opened { shards, samples, labels, classes, decoding: spec.decoding, kept }))
    }
}

struct Opened {
    shards: Vec<Shard>,
    samples: Vec<Sample>,
    labels: Vec<u32>,
    classes: Option<Vec<String>>,
    decoding: Decoding,
    /// The last gzipped shards that were unpacked, with their positions.
    kept: Mutex<Vec<(usize, EncodedImages)>>,
}

/// The encoded images of a shard.
type EncodedImages = Arc<Vec<Vec<u8>>>;

struct Shard {
    path: PathBuf,
    compressed: bool,
}

struct Sample {
    shard: usize,
    /// Offset of the image in its shard; in a gzipped one, its number among the images.
    place: u64,
    len: u64,
    key: String,
}

impl Dataset for Opened {
    fn labels(&self) -> &[u32] {
        &self.labels
    }

    fn image(&self, index: usize) -> Result<Image, DatasetError> {
        let out_of_range = DatasetError::IndexOutOfRange { index, len: self.samples.len() };
        let sample = self.samples.get(index).ok_or(out_of_range)?;
        let shard = &self.shards[sample.shard];
        let name = || self.describe(index);
        if shard.compressed {
            let images = self.unpacked(sample.shard)?;
            let image =
                images.get(sample.place as usize).ok_or_else(|| shard.refuse("it changed".to_owned()))?;
            return self.decoding.part(image, name);
        }
        let mut file = fs_err::File::open(&shard.path)?;
        file.seek(SeekFrom::Start(sample.place))?;
        let mut bytes = Vec::new();
        file.take(sample.len).read_to_end(&mut bytes)?;
        self.decoding.part(&bytes, name)
    }

    fn classes(&self) -> Option<&[String]> {
        self.classes.as_deref()
    }

    fn describe(&self, index: usize) -> String {
        match self.samples.get(index) {
            Some(sample) => format!("`{}` of `{}`", sample.key, self.shards[sample.shard].path.display()),
            None => format!("image {index}"),
        }
    }
}

impl Opened {
    fn unpacked(&self, position: usize) -> Result<EncodedImages, DatasetError> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, images)) = kept.iter().find(|(found, _)| *found == position) {
            return Ok(images.clone());
        }
        let mut images = Vec::new();
        self.shards[position].walk(&mut |entry, name| {
            if name.is_image() {
                let mut bytes = Vec::new();
                entry.take(MAX_IMAGE).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
                images.push(bytes);
            }
            Ok(())
        })?;
        let images = Arc::new(images);
        if kept.len() >= KEPT_SHARDS {
            kept.remove(0);
        }
        kept.push((position, images.clone()));
        Ok(images)
    }
}

/// A sample as its shard has it.
struct Found {
    key: String,
    place: u64,
    len: u64,
    label: String,
}

/// The name of a file in a shard: what it shares with the other files of its sample, and what it is.
struct EntryName {
    key: String,
    kind: String,
}

impl EntryName {
    /// The key ends at the first dot of the last component.
    fn new(path: &str) -> Option<Self> {
        let start = path.rfind('/').map_or(0, |slash| slash + 1);
        let (name, kind) = path[start..].split_once('.')?;
        let kind = kind.to_ascii_lowercase();
        (!name.is_empty()).then(|| Self { key: format!("{}{name}", &path[..start]), kind })
    }

    fn is_image(&self) -> bool {
        READABLE.contains(&self.kind.as_str())
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, DatasetError> {
        let mut start = [0; 2];
        let n = fs_err::File::open(&path)?.take(2).read(&mut start)?;
        Ok(Self { path, compressed: n == 2 && start == [0x1F, 0x8B] })
    }

    fn refuse(&self, reason: String) -> DatasetError {
        DatasetError::WebDataset { path: self.path.clone(), reason }
    }

    /// Calls `visit` with every file of the archive, in order.
    fn walk(
        &self,
        visit: &mut dyn FnMut(&mut dyn EntryBytes, &EntryName) -> Result<(), String>,
    ) -> Result<(), DatasetError> {
        let file = fs_err::File::open(&self.path)?.into_parts().0;
        let walked = if self.compressed {
            let mut archive = Archive::new(MultiGzDecoder::new(std::io::BufReader::new(file)));
            archive.entries().map(|entries| visit_all(entries, visit))
        } else {
            let mut archive = Archive::new(std::io::BufReader::new(file));
            archive.entries_with_seek().map(|entries| visit_all(entries, visit))
        };
        walked.map_err(|error| error.to_string()).flatten().map_err(|reason| self.refuse(reason))
    }

    /// Lists the samples.
    fn index(&self) -> Result<Vec<Found>, DatasetError> {
        let length = fs_err::metadata(&self.path)?.len();
        let mut samples: Vec<Found> = Vec::new();
        let mut open: Option<Partial> = None;
        let mut n_images = 0;
        self.walk(&mut |entry, name| {
            if open.as_ref().is_none_or(|open| open.key != name.key) {
                samples.extend(open.take().map(Partial::finish).transpose()?.flatten());
                open = Some(Partial { key: name.key.clone(), image: None, label: None });
            }
            let Some(sample) = &mut open else { return Ok(()) };
            if name.is_image() {
                let (place, len) = (entry.place(), entry.len());
                let fits = self.compressed || place.checked_add(len).is_some_and(|end| end <= length);
                if len > MAX_IMAGE || !fits {
                    return Err(format!("`{}.{}` claims {len} bytes", name.key, name.kind));
                }
                sample.image.get_or_insert((if self.compressed { n_images } else { place }, len));
                n_images += 1;
            } else if name.kind == "cls" || name.kind == "json" {
                let mut text = String::new();
                entry.take(MAX_LABEL).read_to_string(&mut text).map_err(|error| error.to_string())?;
                let label =
                    if name.kind == "cls" { Some(text.trim().to_owned()) } else { label_of_json(&text) };
                // A `.cls` file wins over a description.
                if name.kind == "cls" || sample.label.is_none() {
                    sample.label = label;
                }
            }
            Ok(())
        })?;
        let last = open.map(Partial::finish).transpose().map_err(|reason| self.refuse(reason))?;
        samples.extend(last.flatten());
        Ok(samples)
    }
}

/// What is known of a sample while its files are read.
struct Partial {
    key: String,
    image: Option<(u64, u64)>,
    label: Option<String>,
}

impl Partial {
    /// The sample; `None` if its files are about something else.
    fn finish(self) -> Result<Option<Found>, String> {
        let key = self.key;
        match (self.image, self.label) {
            (Some((place, len)), Some(label)) => Ok(Some(Found { key, place, len, label })),
            (None, None) => Ok(None),
            (Some(_), None) => {
                Err(format!("sample `{key}` has no label (`.cls`, or `label` in its `.json`)"))
            }
            (None, Some(_)) => Err(format!("sample `{key}` has no image that can be read")),
        }
    }
}

/// A file of an archive.
trait EntryBytes: Read {
    /// Its offset in the archive.
    fn place(&self) -> u64;
    fn len(&self) -> u64;
}

impl<R: Read> EntryBytes for Entry<'_, R> {
    fn place(&self) -> u64 {
        self.raw_file_position()
    }

    fn len(&self) -> u64 {
        self.size()
    }
}

fn visit_all<R: Read>(
    entries: tar::Entries<'_, R>,
    visit: &mut dyn FnMut(&mut dyn EntryBytes, &EntryName) -> Result<(), String>,
) -> Result<(), String> {
    for entry in entries {
        let mut entry = entry.map_err(|error| error.to_string())?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = entry.path_bytes().into_owned();
        let path =
            String::from_utf8(path).map_err(|_| "the name of a file in it is not Unicode".to_owned())?;
        if let Some(name) = EntryName::new(&path) {
            visit(&mut entry, &name)?;
        }
    }
    Ok(())
}

/// `label` or `cls` of a description.
fn label_of_json(text: &str) -> Option<String> {
    let description: serde_json::Value = serde_json::from_str(text).ok()?;
    match description.get("label").or(description.get("cls"))? {
        serde_json::Value::String(label) => Some(label.clone()),
        serde_json::Value::Number(label) => Some(label.to_string()),
        _ => None,
    }
}

/// The archives that `path` and `split` mean.
fn shards(path: &Path, split: Option<&str>) -> Result<Vec<PathBuf>, DatasetError> {
    let is_shard = |name: &str| [".tar", ".tar.gz", ".tgz"].iter().any(|end| name.ends_with(end));
    if path.is_dir() {
        let inside = split.map(|split| path.join(split)).filter(|folder| folder.is_dir());
        let prefix = if inside.is_some() { "" } else { split.unwrap_or("") };
        let folder = inside.as_deref().unwrap_or(path);
        let found = patterns::files(folder, |name| is_shard(name) && name.starts_with(prefix))?;
        return match (found.is_empty(), split) {
            (false, _) => Ok(found),
            (true, Some(split)) => {
                let (path, split, known) = (path.to_owned(), split.to_owned(), "no such archive".to_owned());
                Err(DatasetError::UnknownSplit { path, split, known })
            }
            (true, None) => Err(DatasetError::NoBatches { path: path.to_owned() }),
        };
    }
    if split.is_some() {
        return Err(DatasetError::SplitOfFile { path: path.to_owned() });
    }
    patterns::expand(path)
}

fn class_names_file(spec: &DatasetSpec, shards: &[PathBuf]) -> Option<PathBuf> {
    if spec.classes.is_some() {
        return None;
    }
    let folder = shards.first()?.parent()?;
    let beside = [Some(folder), folder.parent()].into_iter().flatten().map(|folder| folder.join(CLASS_NAMES));
    beside.into_iter().find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::super::registry::{files, open};
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;
    use std::io::Write;

    fn png(value: u8) -> Vec<u8> {
        let mut bytes = std::io::Cursor::new(Vec::new());
        image::GrayImage::from_pixel(2, 3, image::Luma([value]))
            .write_to(&mut bytes, image::ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    }

    fn tar(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, &bytes[..]).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn samples(values: &[u8]) -> Vec<u8> {
        let files = values.iter().flat_map(|&value| {
            let label = format!("{}\n", value % 3).into_bytes();
            [(format!("s/{value:04}.cls"), label), (format!("s/{value:04}.png"), png(value))]
        });
        let files: Vec<_> = files.collect();
        tar(&files.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect::<Vec<_>>())
    }

    fn spec(path: &Path) -> DatasetSpec {
        DatasetSpec {
            name: "shards".into(),
            format: "webdataset".into(),
            paths: [("path".to_owned(), path.to_owned())].into(),
            ..DatasetSpec::default()
        }
    }

    fn values(dataset: &dyn Dataset) -> Vec<u8> {
        (0..dataset.len()).map(|index| dataset.image(index).unwrap().pixels()[0]).collect()
    }

    #[test]
    fn shards_are_one_dataset_in_the_order_of_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs_err::create_dir(at("test")).unwrap();
        fs_err::write(at("test/2.tar"), samples(&[21, 22])).unwrap();
        fs_err::write(at("test/10.tar"), gzip(&samples(&[101, 102]))).unwrap();
        fs_err::write(at("test/1.tar"), samples(&[11])).unwrap();
        fs_err::write(at("classnames.txt"), "ant\nbee\ncat\n").unwrap();
        let test = DatasetSpec { split: Some("test".into()), ..spec(folder.path()) };
        let dataset = open(&test).unwrap();
        assert_eq!(values(&*dataset), [11, 21, 22, 101, 102]);
        assert_eq!(dataset.labels(), [2, 0, 1, 2, 0]);
        assert_eq!(dataset.classes().unwrap(), ["ant", "bee", "cat"]);
        assert!(dataset.describe(4).starts_with("`s/0102` of `"));
        assert_eq!(files(&test).unwrap().len(), 4);
        assert_eq!(files(&test).unwrap()[0].role, "classes");

        let pattern = spec(&at("test/{1..2}.tar"));
        assert_eq!(values(&*open(&pattern).unwrap()), [11, 21, 22]);
        let starred = DatasetSpec { limit: Some(2), ..spec(&at("test/?.tar")) };
        assert_eq!(values(&*open(&starred).unwrap()), [11, 21]);
    }

    #[test]
    fn labels_may_be_names_or_in_a_description() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tar");
        let files = [
            ("x.json", br#"{"label": "dog", "url": 1}"#.to_vec()),
            ("x.png", png(1)),
            ("x.txt", b"a dog".to_vec()),
            ("y.PNG", png(2)),
            ("y.cls", b"cat".to_vec()),
            ("README.md", b"".to_vec()),
        ];
        fs_err::write(&path, tar(&files)).unwrap();
        let dataset = open(&spec(&path)).unwrap();
        assert_eq!(
            (dataset.labels(), dataset.classes().unwrap()),
            (&[1, 0][..], &["cat".to_owned(), "dog".into()][..])
        );
        assert_eq!(values(&*dataset), [1, 2]);
    }

    #[test]
    fn mistakes_name_shard_and_sample() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tar");
        let said = |bytes: Vec<u8>| {
            fs_err::write(&path, bytes).unwrap();
            open(&spec(&path))
                .err()
                .unwrap()
                .to_string()
                .replace(&folder.path().display().to_string(), "ROOT")
        };
        assert_eq!(
            said(tar(&[("x.png", png(1))])),
            "shard `ROOT/a.tar`: sample `x` has no label (`.cls`, or `label` in its `.json`)"
        );
        assert_eq!(
            said(tar(&[("x.cls", b"1".to_vec()), ("y.png", png(1)), ("y.cls", b"1".to_vec())])),
            "shard `ROOT/a.tar`: sample `x` has no image that can be read"
        );
        assert_eq!(said(tar(&[])), "`ROOT/a.tar` holds no images");
        assert!(said(b"no archive at all, but long enough".repeat(40)).starts_with("shard `ROOT/a.tar`: "));
        let whole = samples(&[1, 2]);
        assert!(said(whole[..whole.len() / 2].to_vec()).starts_with("shard `ROOT/a.tar`: "));
        let missing = open(&spec(&folder.path().join("b-{0..3}.tar"))).err().unwrap().to_string();
        assert!(missing.contains("b-0.tar"), "{missing}");
        let none = open(&spec(&folder.path().join("c-*.tar"))).err().unwrap().to_string();
        assert!(none.contains("c-*.tar"), "{none}");
    }

    proptest! {
        #[test]
        fn damaged_archives_are_read_or_refused(
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            compressed in any::<bool>(), end in any::<prop::sample::Index>(),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.tar");
            let mut bytes = samples(&[1, 2, 3]);
            for (at, value) in damage {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes.truncate(end.index(2 * bytes.len()) + 1);
            fs_err::write(&path, if compressed { gzip(&bytes) } else { bytes }).unwrap();
            if let Ok(dataset) = open(&spec(&path)) {
                for index in 0..dataset.len() {
                    drop(dataset.image(index));
                }
            }
        }
    }
}
