//! Format `cifar`: the binary version of CIFAR-10 and CIFAR-100, as its authors distribute it.
//!
//! A record is the label (one byte; CIFAR-100 has the coarse one before the fine one), then 3072 bytes: the red, green and blue plane of an
//! image of 32×32. `path` is such a file, or a folder of them; then `split` says which: `test` (`test_batch.bin`, `test.bin`) or `train`
//! (`data_batch_*.bin` in order, `train.bin`). Which of the two it is follows from the files' sizes and, where both would fit, from their names.

use std::path::{Path, PathBuf};

use super::error::DatasetError;
use super::registry::{Dataset, DatasetSpec, Format, PathParameter, SourceFile};
use super::stack::Stack;

/// The `cifar` format.
pub struct Cifar;

const PATHS: &[PathParameter] = &[PathParameter {
    name: "path",
    doc: "a `.bin` file, or the folder `cifar-10-batches-bin` or `cifar-100-binary`",
    required: true,
}];

const SIDE: usize = 32;
const PLANE: usize = SIDE * SIDE;

impl Format for Cifar {
    fn id(&self) -> &'static str {
        "cifar"
    }

    fn summary(&self) -> &'static str {
        "CIFAR-10 and CIFAR-100, binary version"
    }

    fn paths(&self) -> &'static [PathParameter] {
        PATHS
    }

    fn files(&self, spec: &DatasetSpec) -> Result<Vec<SourceFile>, DatasetError> {
        let files = batches(spec.path(self, "path")?, spec.split.as_deref())?;
        Ok(files.into_iter().map(|path| SourceFile { path, role: "path", label: None }).collect())
    }

    fn open(&self, spec: &DatasetSpec) -> Result<Box<dyn Dataset>, DatasetError> {
        let path = spec.path(self, "path")?;
        let mut stack = Stack {
            path: path.to_owned(),
            height: SIDE,
            width: SIDE,
            channels: 3,
            pixels: Vec::new(),
            labels: Vec::new(),
            classes: spec.classes.clone(),
        };
        for file in batches(path, spec.split.as_deref())? {
            read_batch(&file, &mut stack)?;
        }
        stack.checked(spec)
    }
}

/// The files that `path` and `split` mean.
fn batches(path: &Path, split: Option<&str>) -> Result<Vec<PathBuf>, DatasetError> {
    if !path.is_dir() {
        return match split {
            None => Ok(vec![path.to_owned()]),
            Some(_) => Err(DatasetError::SplitOfFile { path: path.to_owned() }),
        };
    }
    let wrong_split = |found: Option<&str>| DatasetError::UnknownSplit {
        path: path.to_owned(),
        split: found.unwrap_or("none").to_owned(),
        known: "`train`, `test`".to_owned(),
    };
    let belongs = |name: &str| match split {
        Some("test") => ["test_batch.bin", "test.bin"].contains(&name),
        Some("train") => name == "train.bin" || name.starts_with("data_batch_"),
        _ => false,
    };
    if !matches!(split, Some("test" | "train")) {
        return Err(wrong_split(split));
    }
    let mut found = Vec::new();
    for entry in fs_err::read_dir(path)? {
        let name = entry?.file_name();
        let is_batch = |name: &&str| name.to_ascii_lowercase().ends_with(".bin") && belongs(name);
        if name.to_str().as_ref().is_some_and(is_batch) {
            found.push(path.join(name));
        }
    }
    // `data_batch_10` would come after `data_batch_9`: by length first.
    found.sort_by(|a, b| (a.as_os_str().len(), a).cmp(&(b.as_os_str().len(), b)));
    if found.is_empty() { Err(DatasetError::NoBatches { path: path.to_owned() }) } else { Ok(found) }
}

fn read_batch(path: &Path, stack: &mut Stack) -> Result<(), DatasetError> {
    let bytes = fs_err::read(path)?;
    let fits = |labels: usize| !bytes.is_empty() && bytes.len().is_multiple_of(labels + 3 * PLANE);
    let fine = path.file_name().is_some_and(|name| name == "test.bin" || name == "train.bin");
    let n_labels = match (fits(1), fits(2)) {
        (true, true) if fine => 2,
        (true, _) => 1,
        (false, true) => 2,
        (false, false) => {
            let (path, actual) = (path.to_owned(), bytes.len() as u64);
            return Err(DatasetError::CifarSize { path, actual });
        }
    };
    for record in bytes.chunks_exact(n_labels + 3 * PLANE) {
        let (labels, planes) = record.split_at(n_labels);
        stack.labels.push(u32::from(labels[n_labels - 1]));
        let (red, rest) = planes.split_at(PLANE);
        let (green, blue) = rest.split_at(PLANE);
        let pixels = red.iter().zip(green).zip(blue);
        stack.pixels.extend(pixels.flat_map(|((red, green), blue)| [*red, *green, *blue]));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(labels: &[u8], value: u8) -> Vec<u8> {
        let mut bytes = labels.to_vec();
        for plane in 0..3 {
            bytes.extend(std::iter::repeat_n(value + plane, PLANE));
        }
        bytes
    }

    fn spec(path: &Path, split: Option<&str>) -> DatasetSpec {
        DatasetSpec {
            name: "cifar".into(),
            format: "cifar".into(),
            paths: [("path".to_owned(), path.to_owned())].into(),
            split: split.map(str::to_owned),
            ..DatasetSpec::default()
        }
    }

    fn open(spec: &DatasetSpec) -> Result<Box<dyn Dataset>, String> {
        super::super::registry::open(spec).map_err(|error| error.to_string())
    }

    #[test]
    fn planes_become_pixels_and_batches_keep_their_order() {
        let folder = tempfile::tempdir().unwrap();
        for (name, label) in [
            ("data_batch_10.bin", 3),
            ("data_batch_2.bin", 2),
            ("data_batch_1.bin", 1),
            ("test_batch.bin", 9),
        ] {
            fs_err::write(folder.path().join(name), record(&[label], label * 10)).unwrap();
        }
        let train = open(&spec(folder.path(), Some("train"))).unwrap();
        assert_eq!(train.labels(), [1, 2, 3]);
        let image = train.image(1).unwrap();
        assert_eq!((image.height(), image.width(), image.channels()), (32, 32, 3));
        assert_eq!(image.pixels()[..6], [20, 21, 22, 20, 21, 22]);
        assert_eq!(open(&spec(folder.path(), Some("test"))).unwrap().labels(), [9]);
    }

    #[test]
    fn cifar_100_gives_the_fine_label() {
        let folder = tempfile::tempdir().unwrap();
        fs_err::write(folder.path().join("test.bin"), [record(&[1, 77], 0), record(&[2, 78], 5)].concat())
            .unwrap();
        let test = open(&spec(folder.path(), Some("test"))).unwrap();
        assert_eq!(test.labels(), [77, 78]);
    }

    #[test]
    fn mistakes_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("test_batch.bin");
        fs_err::write(&path, [0; 100]).unwrap();
        let said = open(&spec(&path, None)).err().unwrap();
        assert!(said.contains("test_batch.bin") && said.contains("100"), "{said}");
        let said = open(&spec(&path, Some("test"))).err().unwrap();
        assert!(said.contains("is a file"), "{said}");
        let said = open(&spec(folder.path(), Some("validation"))).err().unwrap();
        assert!(said.contains("`validation`") && said.contains("`train`, `test`"), "{said}");
        let said = open(&spec(folder.path(), Some("train"))).err().unwrap();
        assert!(said.contains("no file"), "{said}");
        fs_err::write(&path, record(&[11], 0)).unwrap();
        let classes = (0..10).map(|class| class.to_string()).collect();
        let said = open(&DatasetSpec { classes: Some(classes), ..spec(&path, None) }).err().unwrap();
        assert!(said.contains("label 11") && said.contains("10 classes"), "{said}");
    }
}
