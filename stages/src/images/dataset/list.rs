//! Format `list`: a text file that names image files and their labels: CSV, TSV or JSON lines.
//!
//! - `.csv`, `.tsv`, `.txt`: a row per image, separated by commas, semicolons or tabs (the first line tells which). With a header the columns are
//!   found by name (`path`, `file_name`, `filename`, `image`; `label`, `class`, `ClassId`, …), without one they are path and label.
//! - `.jsonl`: an object per line, with the same names.
//!
//! A list without labels takes them from the first folder of each path (`banded/banded_0002.jpg`). Labels are numbers or names. With a `split`
//! only the rows count whose column `split` says so. Paths are relative to `images`, or else to the list, and stay inside that folder.

use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use super::decode::Decoding;
use super::error::DatasetError;
use super::image_type::Image;
use super::labels;
use super::registry::{Dataset, DatasetSpec, Format, PathParameter, SourceFile};
use super::stack::check_labels;

/// The `list` format.
pub struct List;

const PATHS: &[PathParameter] = &[
    PathParameter { name: "path", doc: "CSV, TSV or JSON-lines file of paths and labels", required: true },
    PathParameter {
        name: "images",
        doc: "folder that the paths are relative to (default: that of the list)",
        required: false,
    },
];

/// Names of columns, the likeliest first, compared without case.
const PATH_COLUMNS: &[&str] = &["path", "file_name", "filename", "filepath", "file", "image_path", "image"];
const LABEL_COLUMNS: &[&str] =
    &["label", "class", "classid", "class_id", "label_id", "class_name", "label_name", "target", "category"];
const SPLIT_COLUMN: &str = "split";

impl Format for List {
    fn id(&self) -> &'static str {
        "list"
    }

    fn summary(&self) -> &'static str {
        "CSV, TSV or JSON-lines file of image paths and labels"
    }

    fn paths(&self) -> &'static [PathParameter] {
        PATHS
    }

    fn files(&self, spec: &DatasetSpec) -> Result<Vec<SourceFile>, DatasetError> {
        let listing = Listing::read(self, spec)?;
        let list = SourceFile { path: spec.path(self, "path")?.to_owned(), role: "path", label: None };
        let images = listing.paths.into_iter().zip(listing.labels);
        let images = images.map(|(path, label)| SourceFile { path, role: "image", label: Some(label) });
        Ok(std::iter::once(list).chain(images).collect())
    }

    fn open(&self, spec: &DatasetSpec) -> Result<Box<dyn Dataset>, DatasetError> {
        Ok(Box::new(Listing::read(self, spec)?))
    }
}

struct Listing {
    paths: Vec<PathBuf>,
    labels: Vec<u32>,
    classes: Option<Vec<String>>,
    decoding: Decoding,
}

/// One image of a list, as it is written.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    path: String,
    label: Option<String>,
    split: Option<String>,
}

impl Listing {
    fn read(format: &List, spec: &DatasetSpec) -> Result<Self, DatasetError> {
        let list = spec.path(format, "path")?;
        let refuse = |reason: String| DatasetError::List { path: list.to_owned(), reason };
        let text = fs_err::read(list)?;
        let text = String::from_utf8(text).map_err(|_| refuse("it is not UTF-8 text".to_owned()))?;
        let is_json = list.extension().is_some_and(|e| e.eq_ignore_ascii_case("jsonl") || e == "ndjson");
        let rows = if is_json { json_rows(&text) } else { table_rows(&text) };
        let mut rows = rows.map_err(refuse)?;
        if let Some(split) = &spec.split {
            let mut known: Vec<String> = rows.iter().filter_map(|row| row.split.clone()).collect();
            rows.retain(|row| row.split.as_ref() == Some(split));
            if rows.is_empty() {
                known.sort_unstable();
                known.dedup();
                let known = known.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
                let known = if known.is_empty() { "no column `split`".to_owned() } else { known };
                return Err(DatasetError::UnknownSplit {
                    path: list.to_owned(),
                    split: split.clone(),
                    known,
                });
            }
        }
        let written = rows.iter().enumerate().map(|(row, found)| {
            let label = found.label.clone().or_else(|| folder_of(&found.path));
            label.ok_or_else(|| refuse(format!("row {} (`{}`) has no label", row + 1, found.path)))
        });
        // Labels of all rows decide the classes, whatever the limit.
        let written: Vec<String> = written.collect::<Result<_, _>>()?;
        let (mut labels, classes) = labels::resolve(list, &written, spec.classes.as_deref())?;
        let n = spec.limit.map_or(rows.len(), |limit| limit.min(rows.len()));
        rows.truncate(n);
        labels.truncate(n);
        if rows.is_empty() {
            return Err(DatasetError::Empty { path: list.to_owned() });
        }
        check_labels(list, &labels, classes.as_deref())?;
        let base = match spec.paths.get("images") {
            Some(folder) => folder.clone(),
            None => list.parent().map(Path::to_owned).unwrap_or_default(),
        };
        let paths = rows.iter().map(|row| inside(&base, &row.path).map_err(refuse));
        Ok(Self { paths: paths.collect::<Result<_, _>>()?, labels, classes, decoding: spec.decoding })
    }
}

impl Dataset for Listing {
    fn labels(&self) -> &[u32] {
        &self.labels
    }

    fn image(&self, index: usize) -> Result<Image, DatasetError> {
        let len = self.paths.len();
        self.decoding.file(self.paths.get(index).ok_or(DatasetError::IndexOutOfRange { index, len })?)
    }

    fn classes(&self) -> Option<&[String]> {
        self.classes.as_deref()
    }

    fn describe(&self, index: usize) -> String {
        match self.paths.get(index) {
            Some(path) => format!("`{}`", path.display()),
            None => format!("image {index}"),
        }
    }
}

/// A path of a list, which may not lead out of its folder.
fn inside(base: &Path, written: &str) -> Result<PathBuf, String> {
    let relative = Path::new(written);
    let stays = relative.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if written.is_empty() || !stays {
        return Err(format!(
            "path `{written}` leads out of the folder of the images (say `images = \"FOLDER\"`)"
        ));
    }
    Ok(base.join(relative))
}

/// The first folder of a path.
fn folder_of(path: &str) -> Option<String> {
    let (folder, _) = path.trim_start_matches("./").split_once('/')?;
    Some(folder.to_owned())
}

fn table_rows(text: &str) -> Result<Vec<Row>, String> {
    let text = text.trim_start_matches('\u{feff}');
    let first = text.lines().next().unwrap_or_default();
    let delimiter =
        [b'\t', b';', b','].into_iter().find(|&mark| first.contains(char::from(mark))).unwrap_or(b',');
    let mut reader = csv::ReaderBuilder::new();
    let mut reader =
        reader.has_headers(false).delimiter(delimiter).trim(csv::Trim::All).from_reader(text.as_bytes());
    let mut columns: Option<Columns> = None;
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| error.to_string())?;
        let columns = match &columns {
            Some(columns) => columns,
            None => match Columns::named(&record) {
                Some(named) => {
                    columns = Some(named);
                    continue;
                }
                None if record.len() <= 2 => {
                    let label = (record.len() == 2).then_some(1);
                    columns.insert(Columns { path: 0, label, split: None })
                }
                None => {
                    let found = record.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
                    return Err(format!("its first line names no column `path`; it has {found}"));
                }
            },
        };
        let field = |column: usize| record.get(column).unwrap_or_default().to_owned();
        rows.push(Row {
            path: field(columns.path),
            label: columns.label.map(field),
            split: columns.split.map(field),
        });
    }
    Ok(rows)
}

struct Columns {
    path: usize,
    label: Option<usize>,
    split: Option<usize>,
}

impl Columns {
    /// The columns of a header; `None` if it is none.
    fn named(header: &csv::StringRecord) -> Option<Self> {
        let position = |names: &[&str]| {
            names.iter().find_map(|name| header.iter().position(|found| found.eq_ignore_ascii_case(name)))
        };
        let path = position(PATH_COLUMNS)?;
        Some(Self { path, label: position(LABEL_COLUMNS), split: position(&[SPLIT_COLUMN]) })
    }
}

fn json_rows(text: &str) -> Result<Vec<Row>, String> {
    let mut rows = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line_number = number + 1;
        let object: Map<String, Value> =
            serde_json::from_str(line).map_err(|error| format!("line {line_number}: {error}"))?;
        let find = |names: &[&str]| {
            let matches = |name: &&str| object.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            names.iter().find_map(matches).map(|(_, value)| value)
        };
        let text = |value: &Value| match value {
            Value::String(text) => Ok(text.clone()),
            Value::Number(number) => Ok(number.to_string()),
            other => Err(format!("line {line_number}: `{other}` is neither text nor a number")),
        };
        let path = find(PATH_COLUMNS).ok_or_else(|| format!("line {line_number} has no `path`"))?;
        rows.push(Row {
            path: text(path)?,
            label: find(LABEL_COLUMNS).map(text).transpose()?,
            split: find(&[SPLIT_COLUMN]).map(text).transpose()?,
        });
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::super::registry::{files, open};
    use super::*;
    use proptest::prelude::*;

    fn folder(list: &str, text: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs_err::write(folder.path().join(list), text).unwrap();
        for (name, value) in [("a/1.png", 1), ("a/2.png", 2), ("b/3.png", 3)] {
            let path = folder.path().join(name);
            fs_err::create_dir_all(path.parent().unwrap()).unwrap();
            image::GrayImage::from_pixel(2, 2, image::Luma([value])).save(path).unwrap();
        }
        folder
    }

    fn spec(folder: &Path, list: &str) -> DatasetSpec {
        DatasetSpec {
            name: "pets".into(),
            format: "list".into(),
            paths: [("path".to_owned(), folder.join(list))].into(),
            ..DatasetSpec::default()
        }
    }

    /// The values of the first pixels, and the labels.
    fn read(list: &str, text: &str) -> Result<(Vec<u8>, Vec<u32>), String> {
        let folder = folder(list, text);
        let dataset = open(&spec(folder.path(), list))
            .map_err(|error| error.to_string().replace(&folder.path().display().to_string(), "ROOT"))?;
        let pixels = (0..dataset.len()).map(|index| dataset.image(index).unwrap().pixels()[0]).collect();
        Ok((pixels, dataset.labels().to_vec()))
    }

    #[test]
    fn tables_are_read_with_and_without_a_header() {
        let expected = Ok((vec![3, 1], vec![5, 0]));
        assert_eq!(read("l.csv", "b/3.png,5\na/1.png,0\n"), expected);
        assert_eq!(read("l.csv", "Filename;Width;ClassId\nb/3.png;29;5\na/1.png;30;0\n"), expected);
        assert_eq!(read("l.tsv", "label\tpath\n5\tb/3.png\n0\ta/1.png\n"), expected);
        assert_eq!(read("l.csv", "\u{feff}path, label\r\n\"b/3.png\", 5\r\na/1.png, 0\r\n"), expected);
        let lines =
            "{\"file_name\": \"b/3.png\", \"label\": 5}\n\n{\"label\": \"0\", \"file_name\": \"./a/1.png\"}";
        assert_eq!(read("l.jsonl", lines), expected);
        assert_eq!(
            read("l.txt", "b/3.png\na/1.png\n"),
            Ok((vec![3, 1], vec![1, 0])),
            "labels are the folders"
        );
    }

    #[test]
    fn splits_limits_and_names_choose_rows() {
        let text = "path,label,split\na/1.png,ant,train\nb/3.png,bee,test\na/2.png,ant,test\n";
        let folder = folder("l.csv", text);
        let of = |split: &str| DatasetSpec { split: Some(split.into()), ..spec(folder.path(), "l.csv") };
        let test = open(&of("test")).unwrap();
        assert_eq!(
            (test.labels(), test.classes().unwrap()),
            (&[1, 0][..], &["ant".to_owned(), "bee".into()][..])
        );
        let limited = DatasetSpec { limit: Some(1), ..of("test") };
        let named: Vec<_> = files(&limited).unwrap().iter().map(|file| (file.role, file.label)).collect();
        assert_eq!(named, [("path", None), ("image", Some(1))]);
        let said = open(&of("val")).err().unwrap().to_string();
        assert!(said.ends_with("has no split `val`; there is `test`, `train`"), "{said}");
        // Paths may be relative to another folder.
        let mut elsewhere = spec(folder.path(), "l.csv");
        fs_err::rename(folder.path().join("a"), folder.path().join("b/a")).unwrap();
        fs_err::create_dir(folder.path().join("b/b")).unwrap();
        fs_err::rename(folder.path().join("b/3.png"), folder.path().join("b/b/3.png")).unwrap();
        elsewhere.paths.insert("images".into(), folder.path().join("b"));
        assert_eq!(open(&elsewhere).unwrap().image(1).unwrap().pixels()[0], 3);
    }

    #[test]
    fn mistakes_name_the_list() {
        let said = |list: &str, text: &str| read(list, text).unwrap_err();
        assert_eq!(
            said("l.csv", "../secret.png,1\n"),
            "list `ROOT/l.csv`: path `../secret.png` leads out of the folder of the images (say `images = \"FOLDER\"`)"
        );
        assert!(said("l.csv", "/etc/passwd,1\n").contains("leads out"));
        assert_eq!(said("l.csv", "1.png\n"), "list `ROOT/l.csv`: row 1 (`1.png`) has no label");
        assert_eq!(
            said("l.csv", "x,y,z\n"),
            "list `ROOT/l.csv`: its first line names no column `path`; it has `x`, `y`, `z`"
        );
        assert_eq!(said("l.csv", ""), "`ROOT/l.csv` holds no images");
        assert!(said("l.csv", "a/1.png,1\na/2.png,1,9\n").contains("l.csv"));
        assert!(said("l.jsonl", "{\"path\": \"a\"").starts_with("list `ROOT/l.jsonl`: line 1: "));
        assert_eq!(said("l.jsonl", "{\"label\": 1}"), "list `ROOT/l.jsonl`: line 1 has no `path`");
        assert_eq!(
            said("l.jsonl", "{\"path\": \"a\", \"label\": [1]}"),
            "list `ROOT/l.jsonl`: line 1: `[1]` is neither text nor a number"
        );
    }

    proptest! {
        #[test]
        fn arbitrary_text_is_read_or_refused(text in "[a-z./,;\t\n\"{}:0-9]{0,200}") {
            for rows in [table_rows(&text), json_rows(&text)].into_iter().flatten() {
                prop_assert!(rows.len() <= text.lines().count());
            }
        }
    }
}
