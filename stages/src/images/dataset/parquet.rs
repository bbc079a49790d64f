//! Format `parquet`: image datasets as the Hugging Face hub stores them.
//!
//! A file has a column of images, a struct of `bytes` (an image file) and `path`, and a column of labels, whole numbers whose names a
//! `ClassLabel` in the file's metadata lists. `path` is a file, or a folder (of the dataset, or its `data`); then `split` says which files:
//! `<split>-00000-of-00003.parquet` and so on, in the order of their names. Columns are found by their type where there is no choice, else they
//! are `image` or `img` and `label` or `labels`.
//!
//! Pixels are read a row group at a time, when an image of it is asked for; labels are read when the dataset is opened.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ::parquet::basic::Type as PhysicalType;
use ::parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use ::parquet::data_type::{ByteArrayType, DataType, Int32Type, Int64Type};
use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};

use super::decode::Decoding;
use super::error::DatasetError;
use super::image_type::Image;
use super::registry::{Dataset, DatasetSpec, Format, PathParameter, SourceFile};
use super::stack::check_labels;

/// The `parquet` format.
pub struct Parquet;

const PATHS: &[PathParameter] = &[PathParameter {
    name: "path",
    doc: "parquet file, or the folder of a dataset from the Hugging Face hub",
    required: true,
}];

/// The encoded images of a row group.
type EncodedImages = Arc<Vec<Vec<u8>>>;

/// Names of columns of labels, the likeliest first.
const LABELS: [&str; 4] = ["label", "labels", "fine_label", "class"];

/// Row groups whose images are kept: readers go through a dataset in order, a few batches at once.
const KEPT_GROUPS: usize = 2;

impl Format for Parquet {
    fn id(&self) -> &'static str {
        "parquet"
    }

    fn summary(&self) -> &'static str {
        "parquet files of the Hugging Face hub: a column of encoded images, a column of labels"
    }

    fn paths(&self) -> &'static [PathParameter] {
        PATHS
    }

    fn files(&self, spec: &DatasetSpec) -> Result<Vec<SourceFile>, DatasetError> {
        let files = shards(spec.path(self, "path")?, spec.split.as_deref())?;
        Ok(files.into_iter().map(|path| SourceFile { path, role: "path", label: None }).collect())
    }

    fn open(&self, spec: &DatasetSpec) -> Result<Box<dyn Dataset>, DatasetError> {
        let path = spec.path(self, "path")?;
        let mut dataset = ParquetDataset {
            files: Vec::new(),
            groups: Vec::new(),
            labels: Vec::new(),
            classes: spec.classes.clone(),
            decoding: spec.decoding,
            kept: Mutex::default(),
        };
        for shard in shards(path, spec.split.as_deref())? {
            let full = spec.limit.is_some_and(|limit| dataset.labels.len() >= limit);
            if !full {
                dataset.add(shard)?;
            }
        }
        if let Some(limit) = spec.limit {
            dataset.labels.truncate(limit);
        }
        if dataset.labels.is_empty() {
            return Err(DatasetError::Empty { path: path.to_owned() });
        }
        check_labels(path, &dataset.labels, dataset.classes.as_deref())?;
        Ok(Box::new(dataset))
    }
}

struct ParquetDataset {
    files: Vec<Shard>,
    groups: Vec<Group>,
    labels: Vec<u32>,
    classes: Option<Vec<String>>,
    decoding: Decoding,
    /// The last row groups that were read, with their positions.
    kept: Mutex<Vec<(usize, EncodedImages)>>,
}

struct Shard {
    path: PathBuf,
    reader: SerializedFileReader<std::fs::File>,
    /// Position of the leaf column `image.bytes`.
    images: usize,
}

struct Group {
    shard: usize,
    /// Position in its file.
    index: usize,
    /// The first image of it in the dataset.
    first: usize,
    n_rows: usize,
}

impl ParquetDataset {
    /// Reads the labels of a file and notes where its images are.
    fn add(&mut self, path: PathBuf) -> Result<(), DatasetError> {
        let refuse = |reason: String| DatasetError::Parquet { path: path.clone(), reason };
        let file = fs_err::File::open(&path)?.into_parts().0;
        let reader = SerializedFileReader::new(file).map_err(|error| refuse(error.to_string()))?;
        let metadata = reader.metadata();
        let schema = metadata.file_metadata().schema_descr_ptr();
        let columns: Vec<(String, PhysicalType)> =
            schema.columns().iter().map(|column| (column.path().string(), column.physical_type())).collect();
        let images = image_column(&columns).map_err(refuse)?;
        let labels = label_column(&columns).map_err(refuse)?;
        for index in 0..reader.num_row_groups() {
            let group = reader.get_row_group(index).map_err(|error| refuse(error.to_string()))?;
            let n_rows = usize::try_from(group.metadata().num_rows()).unwrap_or(0);
            let column = group.get_column_reader(labels).map_err(|error| refuse(error.to_string()))?;
            let found = read_labels(column, n_rows).map_err(refuse)?;
            let first = self.labels.len();
            self.labels.extend(found);
            self.groups.push(Group { shard: self.files.len(), index, first, n_rows });
        }
        if self.classes.is_none() {
            let entries = metadata.file_metadata().key_value_metadata();
            let info = entries.and_then(|entries| entries.iter().find(|entry| entry.key == "huggingface"));
            let label = columns[labels].0.split('.').next().unwrap_or_default();
            self.classes = info.and_then(|entry| class_names(entry.value.as_deref()?, label));
        }
        self.files.push(Shard { path, reader, images });
        Ok(())
    }

    /// The encoded images of a row group.
    fn group(&self, position: usize) -> Result<EncodedImages, DatasetError> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, images)) = kept.iter().find(|(found, _)| *found == position) {
            return Ok(images.clone());
        }
        let group = &self.groups[position];
        let shard = &self.files[group.shard];
        let refuse = |reason: String| DatasetError::Parquet { path: shard.path.clone(), reason };
        let failed = |error: ParquetError| refuse(error.to_string());
        let reader = shard.reader.get_row_group(group.index).map_err(failed)?;
        let ColumnReader::ByteArrayColumnReader(mut column) =
            reader.get_column_reader(shard.images).map_err(failed)?
        else {
            return Err(refuse("its column of images does not hold bytes".to_owned()));
        };
        let values = read_column::<ByteArrayType>(&mut column, group.n_rows).map_err(refuse)?;
        let images = Arc::new(values.iter().map(|bytes| bytes.data().to_vec()).collect::<Vec<_>>());
        if kept.len() >= KEPT_GROUPS {
            kept.remove(0);
        }
        kept.push((position, images.clone()));
        Ok(images)
    }

    /// The row group of an image, and its place there.
    fn locate(&self, index: usize) -> Option<(usize, usize)> {
        let position = self.groups.partition_point(|group| group.first <= index).checked_sub(1)?;
        (index < self.labels.len()).then(|| (position, index - self.groups[position].first))
    }
}

impl Dataset for ParquetDataset {
    fn labels(&self) -> &[u32] {
        &self.labels
    }

    fn image(&self, index: usize) -> Result<Image, DatasetError> {
        let out_of_range = DatasetError::IndexOutOfRange { index, len: self.labels.len() };
        let (group, row) = self.locate(index).ok_or(out_of_range)?;
        let images = self.group(group)?;
        self.decoding.part(&images[row], || self.describe(index))
    }

    fn classes(&self) -> Option<&[String]> {
        self.classes.as_deref()
    }

    fn describe(&self, index: usize) -> String {
        match self.locate(index) {
            Some((group, row)) => {
                let group = &self.groups[group];
                let shard = &self.files[group.shard].path;
                format!("row {row} of row group {} of `{}`", group.index, shard.display())
            }
            None => format!("image {index}"),
        }
    }
}

/// The files that `path` and `split` mean.
fn shards(path: &Path, split: Option<&str>) -> Result<Vec<PathBuf>, DatasetError> {
    if !path.is_dir() {
        return match split {
            None => Ok(vec![path.to_owned()]),
            Some(_) => Err(DatasetError::SplitOfFile { path: path.to_owned() }),
        };
    }
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    for folder in [path.to_owned(), path.join("data")] {
        if !folder.is_dir() {
            continue;
        }
        for entry in fs_err::read_dir(&folder)? {
            let entry = entry?;
            if let Some(name) = entry.file_name().to_str().and_then(|name| name.strip_suffix(".parquet")) {
                found.push((name.to_owned(), entry.path()));
            }
        }
    }
    let split_of = |name: &str| name.split('-').next().unwrap_or_default().to_owned();
    let mut known: Vec<String> = found.iter().map(|(name, _)| format!("`{}`", split_of(name))).collect();
    known.sort_unstable();
    known.dedup();
    if let Some(split) = split {
        found.retain(|(name, _)| split_of(name) == split);
    }
    // Without a split, the only one there is.
    if found.is_empty() || (split.is_none() && known.len() > 1) {
        return Err(DatasetError::UnknownSplit {
            path: path.to_owned(),
            split: split.unwrap_or("none").to_owned(),
            known: known.join(", "),
        });
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

fn image_column(columns: &[(String, PhysicalType)]) -> Result<usize, String> {
    let is_image = |(name, kind): &(String, PhysicalType)| {
        *kind == PhysicalType::BYTE_ARRAY
            && (name.rsplit_once('.').is_some_and(|(_, field)| field == "bytes")
                || ["image", "img"].contains(&name.as_str()))
    };
    let found: Vec<usize> = (0..columns.len()).filter(|column| is_image(&columns[*column])).collect();
    match found[..] {
        [column] => Ok(column),
        [] => Err(format!("it has no column of encoded images; it has {}", listed(columns))),
        _ => found
            .into_iter()
            .find(|column| ["image.bytes", "img.bytes"].contains(&columns[*column].0.as_str()))
            .ok_or_else(|| format!("several of its columns could be the images: {}", listed(columns))),
    }
}

fn label_column(columns: &[(String, PhysicalType)]) -> Result<usize, String> {
    let whole = |kind: PhysicalType| matches!(kind, PhysicalType::INT32 | PhysicalType::INT64);
    let named =
        LABELS.iter().find_map(|name| columns.iter().position(|(found, kind)| found == name && whole(*kind)));
    let mut numbers = (0..columns.len()).filter(|column| whole(columns[*column].1));
    match (named, numbers.next(), numbers.next()) {
        (Some(column), _, _) | (None, Some(column), None) => Ok(column),
        _ => Err(format!("it has no column of labels; it has {}", listed(columns))),
    }
}

fn listed(columns: &[(String, PhysicalType)]) -> String {
    columns.iter().map(|(name, kind)| format!("`{name}` ({kind})")).collect::<Vec<_>>().join(", ")
}

fn read_labels(column: ColumnReader, n_rows: usize) -> Result<Vec<u32>, String> {
    let numbers: Vec<i64> = match column {
        ColumnReader::Int64ColumnReader(mut column) => read_column::<Int64Type>(&mut column, n_rows)?,
        ColumnReader::Int32ColumnReader(mut column) => {
            read_column::<Int32Type>(&mut column, n_rows)?.into_iter().map(i64::from).collect()
        }
        _ => return Err("its labels are not whole numbers".to_owned()),
    };
    numbers
        .into_iter()
        .enumerate()
        .map(|(row, label)| u32::try_from(label).map_err(|_| format!("row {row} has label {label}")))
        .collect()
}

/// All values of a column chunk; a row without one is refused.
fn read_column<T: DataType>(column: &mut ColumnReaderImpl<T>, n_rows: usize) -> Result<Vec<T::T>, String> {
    let mut values = Vec::new();
    let (mut levels, mut repetitions) = (Vec::new(), Vec::new());
    loop {
        let wanted = n_rows - values.len();
        let (records, _, _) = column
            .read_records(wanted, Some(&mut levels), Some(&mut repetitions), &mut values)
            .map_err(|error| error.to_string())?;
        if records == 0 || values.len() >= n_rows {
            break;
        }
    }
    if values.len() == n_rows {
        Ok(values)
    } else {
        Err(format!("{} of {n_rows} rows have a value", values.len()))
    }
}

/// The names that a `ClassLabel` of the hub's metadata gives to the values of column `label`.
fn class_names(metadata: &str, label: &str) -> Option<Vec<String>> {
    let metadata: serde_json::Value = serde_json::from_str(metadata).ok()?;
    let names = metadata.get("info")?.get("features")?.get(label)?.get("names")?.as_array()?;
    names.iter().map(|name| Some(name.as_str()?.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::parquet::data_type::ByteArray;
    use ::parquet::file::metadata::KeyValue;
    use ::parquet::file::properties::WriterProperties;
    use ::parquet::file::writer::SerializedFileWriter;
    use ::parquet::schema::parser::parse_message_type;

    const SCHEMA: &str = "message schema {
        optional group image { optional binary bytes; optional binary path (UTF8); }
        optional int64 label;
    }";

    fn png(value: u8) -> Vec<u8> {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let image = image::GrayImage::from_pixel(2, 1, image::Luma([value]));
        image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    /// Writes row groups of (grey value, label).
    fn write(path: &Path, schema: &str, groups: &[&[(u8, i64)]]) {
        let metadata =
            r#"{"info": {"features": {"label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"}}}}"#;
        let entry = KeyValue::new("huggingface".to_owned(), metadata.to_owned());
        let properties = WriterProperties::builder().set_key_value_metadata(Some(vec![entry])).build();
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let file = std::fs::File::create(path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
        for rows in groups {
            let mut group = writer.next_row_group().unwrap();
            let n = rows.len();
            let mut column = group.next_column().unwrap().unwrap();
            let images: Vec<ByteArray> = rows.iter().map(|(value, _)| ByteArray::from(png(*value))).collect();
            column.typed::<ByteArrayType>().write_batch(&images, Some(&vec![2; n]), None).unwrap();
            column.close().unwrap();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&[], Some(&vec![1; n]), None).unwrap();
            column.close().unwrap();
            let mut column = group.next_column().unwrap().unwrap();
            let labels: Vec<i64> =
                rows.iter().map(|(_, label)| *label).filter(|label| *label != i64::MIN).collect();
            let levels: Vec<i16> = rows.iter().map(|(_, label)| i16::from(*label != i64::MIN)).collect();
            column.typed::<Int64Type>().write_batch(&labels, Some(&levels), None).unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    fn open(path: &Path, split: Option<&str>, limit: Option<usize>) -> Result<Box<dyn Dataset>, String> {
        let spec = DatasetSpec {
            name: "animals".into(),
            format: "parquet".into(),
            paths: [("path".to_owned(), path.to_owned())].into(),
            split: split.map(str::to_owned),
            limit,
            ..DatasetSpec::default()
        };
        super::super::registry::open(&spec).map_err(|error| error.to_string())
    }

    #[test]
    fn shards_and_row_groups_are_one_dataset() {
        let folder = tempfile::tempdir().unwrap();
        fs_err::create_dir(folder.path().join("data")).unwrap();
        let shard = |name: &str| folder.path().join("data").join(name);
        write(&shard("test-00001-of-00002.parquet"), SCHEMA, &[&[(5, 2)]]);
        write(&shard("test-00000-of-00002.parquet"), SCHEMA, &[&[(1, 0), (2, 1)], &[(3, 2), (4, 0)]]);
        write(&shard("train-00000-of-00001.parquet"), SCHEMA, &[&[(9, 1)]]);
        let dataset = open(folder.path(), Some("test"), None).unwrap();
        assert_eq!(dataset.labels(), [0, 1, 2, 0, 2]);
        assert_eq!(dataset.classes().unwrap(), ["cat", "dog", "emu"]);
        // In any order: groups come and go.
        for index in [4, 0, 3, 1, 2, 4, 0] {
            assert_eq!(dataset.image(index).unwrap().pixels(), [index as u8 + 1; 2]);
        }
        let said = dataset.image(5).unwrap_err().to_string();
        assert_eq!(said, "image 5 was asked for, the dataset holds 5");
        assert_eq!(open(folder.path(), Some("test"), Some(3)).unwrap().labels(), [0, 1, 2]);
        assert_eq!(open(&shard("train-00000-of-00001.parquet"), None, None).unwrap().labels(), [1]);
    }

    #[test]
    fn mistakes_name_file_and_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("test-00000-of-00001.parquet");
        fs_err::write(&path, b"PAR1 is not enough").unwrap();
        let said = open(&path, None, None).err().unwrap();
        assert!(said.contains("parquet file") && said.contains("test-00000"), "{said}");
        write(&path, SCHEMA, &[&[(1, 3)]]);
        let said = open(&path, None, None).err().unwrap();
        assert!(said.contains("image 0 has label 3, but there are 3 classes"), "{said}");
        write(&path, SCHEMA, &[&[(1, 0), (1, i64::MIN)]]);
        let said = open(&path, None, None).err().unwrap();
        assert!(said.contains("1 of 2 rows have a value"), "{said}");
        write(&path, SCHEMA, &[&[(1, -1)]]);
        let said = open(&path, None, None).err().unwrap();
        assert!(said.contains("row 0 has label -1"), "{said}");
        let said = open(folder.path(), Some("validation"), None).err().unwrap();
        assert!(said.contains("no split `validation`; there is `test`"), "{said}");
    }

    #[test]
    fn columns_are_told_apart_by_type_and_name() {
        let columns = |found: &[(&str, PhysicalType)]| {
            found.iter().map(|(name, kind)| ((*name).to_owned(), *kind)).collect::<Vec<_>>()
        };
        let usual = columns(&[
            ("image.bytes", PhysicalType::BYTE_ARRAY),
            ("image.path", PhysicalType::BYTE_ARRAY),
            ("coarse", PhysicalType::INT64),
            ("fine_label", PhysicalType::INT64),
        ]);
        assert_eq!(image_column(&usual), Ok(0));
        assert_eq!(label_column(&usual), Ok(3));
        let odd = columns(&[
            ("img", PhysicalType::BYTE_ARRAY),
            ("a", PhysicalType::INT64),
            ("b", PhysicalType::INT64),
        ]);
        assert_eq!(image_column(&odd), Ok(0));
        assert_eq!(
            label_column(&odd).unwrap_err(),
            "it has no column of labels; it has `img` (BYTE_ARRAY), `a` (INT64), `b` (INT64)"
        );
    }
}
