//! Real images against the pixels and logits that Pillow and PyTorch computed from them.
//!
//! Needs the test data that does not belong to the repository, see [`super::test_support::test_data`].

use std::io::Read;
use std::path::Path;

use ndarray::{Array1, Array2};
use serde_json::Value;

use super::dataset::{self, Dataset, DatasetSpec};
use super::head::Head;
use super::metrics;
use super::preprocess::{Preprocess, Preprocessor};
use super::test_support::test_data;

/// Reads the data of one array of an npz file.
///
/// `numpy.savez` writes entries in order, with the sizes in their local headers or, for `force_zip64`
/// archives, in the extra field: the central directory has them in either case.
fn npz_array(path: &Path, name: &str) -> Vec<u8> {
    let bytes = fs_err::read(path).unwrap();
    let u16_at = |at: usize| usize::from(u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()));
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let end = bytes.windows(4).rposition(|window| window == b"PK\x05\x06").unwrap();
    let mut at = u32_at(end + 16);
    for _ in 0..u16_at(end + 10) {
        let (method, compressed) = (u16_at(at + 10), u32_at(at + 20));
        let (name_len, extra, comment, local) =
            (u16_at(at + 28), u16_at(at + 30), u16_at(at + 32), u32_at(at + 42));
        if &bytes[at + 46..at + 46 + name_len] == format!("{name}.npy").as_bytes() {
            let start = local + 30 + u16_at(local + 26) + u16_at(local + 28);
            let raw = &bytes[start..start + compressed];
            let mut array = Vec::new();
            match method {
                0 => array.extend_from_slice(raw),
                _ => drop(flate2::read::DeflateDecoder::new(raw).read_to_end(&mut array).unwrap()),
            }
            assert_eq!(&array[..6], b"\x93NUMPY");
            let header = usize::from(u16::from_le_bytes([array[8], array[9]]));
            return array.split_off(10 + header);
        }
        at += 46 + name_len + extra + comment;
    }
    panic!("`{}` holds no array `{name}`", path.display());
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn spec(root: &Path, task: &str, format: &str, files: &[(&str, &str)]) -> DatasetSpec {
    let classes: Value =
        serde_json::from_slice(&fs_err::read(root.join("suite/data/classes.json")).unwrap()).unwrap();
    DatasetSpec {
        name: task.into(),
        format: format.into(),
        paths: files
            .iter()
            .map(|(name, file)| ((*name).to_owned(), root.join("suite/data").join(task).join(file)))
            .collect(),
        classes: Some(serde_json::from_value(classes[task].clone()).unwrap()),
        ..DatasetSpec::default()
    }
}

/// Compares the images at `order` with the 32 golden ones.
fn check_pixels(root: &Path, task: &str, dataset: &dyn Dataset, order: &[usize]) {
    let reference = root.join(format!("suite/reference/{task}_first32.npz"));
    let golden = npz_array(&reference, "pixel_values_u8"); // [image][channel][row][column]
    let labels = npz_array(&reference, "labels");
    let config = Preprocess::from_file(&root.join("suite/clip/base/preprocessor_config.json")).unwrap();
    let preprocessor = Preprocessor::new(config).unwrap();
    assert_eq!(order.len(), 32);
    for (nth, &index) in order.iter().enumerate() {
        let label = i64::from_le_bytes(labels[nth * 8..][..8].try_into().unwrap());
        assert_eq!(i64::from(dataset.label(index)), label, "{}", dataset.describe(index));
        let pixels = preprocessor.pixels(&dataset.image(index).unwrap()).unwrap();
        assert_eq!((pixels.height(), pixels.width(), pixels.channels()), (32, 32, 3));
        for (at, &byte) in pixels.pixels().iter().enumerate() {
            let (position, channel) = (at / 3, at % 3);
            assert_eq!(byte, golden[(nth * 3 + channel) * 1024 + position], "{}", dataset.describe(index));
        }
    }
}

#[test]
fn mnist_pixels_from_gzip_idx_files_are_exact() {
    let Some(root) = test_data("mnist_pixels_from_gzip_idx_files_are_exact") else { return };
    let files = [("images", "t10k-images-idx3-ubyte.gz"), ("labels", "t10k-labels-idx1-ubyte.gz")];
    let dataset = dataset::open(&spec(&root, "mnist", "idx", &files)).unwrap();
    assert_eq!(dataset.len(), 1000);
    check_pixels(&root, "mnist", &*dataset, &(0..32).collect::<Vec<_>>());
}

#[test]
fn notmnist_pixels_from_plain_idx_files_are_exact() {
    let Some(root) = test_data("notmnist_pixels_from_plain_idx_files_are_exact") else { return };
    let files = [("images", "t10k-images-idx3-ubyte"), ("labels", "t10k-labels-idx1-ubyte")];
    let dataset = dataset::open(&spec(&root, "notmnist", "idx", &files)).unwrap();
    assert_eq!(dataset.len(), 1000);
    check_pixels(&root, "notmnist", &*dataset, &(0..32).collect::<Vec<_>>());
}

#[test]
fn fashion_pixels_from_an_image_folder_are_exact() {
    let Some(root) = test_data("fashion_pixels_from_an_image_folder_are_exact") else { return };
    let spec = spec(&root, "fashion", "folder", &[("path", "test")]);
    let dataset = dataset::open(&spec).unwrap();
    assert_eq!(dataset.len(), 1200);
    // The order of the reference is that of the numbers in the file names.
    let files = dataset::files(&spec).unwrap();
    let mut order: Vec<usize> = (0..files.len()).collect();
    order.sort_by_key(|&index| files[index].path.file_stem().unwrap().to_owned());
    check_pixels(&root, "fashion", &*dataset, &order[..32]);
}

/// Opens `path` of a task's data, `split` of it, in one of the formats that hold several splits.
fn open_split(root: &Path, task: &str, format: &str, path: &str, split: &str) -> Box<dyn Dataset> {
    let spec = DatasetSpec { split: Some(split.to_owned()), ..spec(root, task, format, &[("path", path)]) };
    dataset::open(&spec).unwrap()
}

#[test]
fn cifar_pixels_from_a_binary_batch_are_exact() {
    let Some(root) = test_data("cifar_pixels_from_a_binary_batch_are_exact") else { return };
    let dataset = open_split(&root, "cifar10", "cifar", "", "test");
    assert_eq!(dataset.len(), 1000);
    check_pixels(&root, "cifar10", &*dataset, &(0..32).collect::<Vec<_>>());
    assert_eq!(open_split(&root, "cifar10", "cifar", "", "train").len(), 600);
}

#[test]
fn gtsrb_pixels_from_a_parquet_file_are_exact() {
    let Some(root) = test_data("gtsrb_pixels_from_a_parquet_file_are_exact") else { return };
    let dataset = open_split(&root, "gtsrb", "parquet", "", "test");
    assert_eq!(dataset.len(), 1000);
    check_pixels(&root, "gtsrb", &*dataset, &(0..32).collect::<Vec<_>>());
    // Its metadata names the classes too.
    let unnamed = DatasetSpec {
        classes: None,
        split: Some("train".to_owned()),
        ..spec(&root, "gtsrb", "parquet", &[("path", "data")])
    };
    let dataset = dataset::open(&unnamed).unwrap();
    assert_eq!(dataset.classes().unwrap().len(), 43);
    assert_eq!(dataset.classes().unwrap()[7], "sign_07");
}

#[test]
fn pneumonia_pixels_from_a_numpy_archive_are_exact() {
    let Some(root) = test_data("pneumonia_pixels_from_a_numpy_archive_are_exact") else { return };
    let dataset = open_split(&root, "pneumonia", "npz", "pneumoniamnist.npz", "test");
    assert_eq!(dataset.len(), 624);
    check_pixels(&root, "pneumonia", &*dataset, &(0..32).collect::<Vec<_>>());
}

/// Reads tensor `name` of a safetensors file in single precision.
fn tensor(path: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let bytes = fs_err::read(path).unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
    assert_eq!(header[name]["dtype"], "F32");
    let shape: Vec<usize> = serde_json::from_value(header[name]["shape"].clone()).unwrap();
    let [start, end]: [usize; 2] = serde_json::from_value(header[name]["data_offsets"].clone()).unwrap();
    (shape, floats(&bytes[8 + header_len..][start..end]))
}

#[test]
fn head_logits_agree_with_pytorch() {
    let Some(root) = test_data("head_logits_agree_with_pytorch") else { return };
    for task in ["mnist", "fashion", "notmnist", "cifar10", "gtsrb", "pneumonia"] {
        let file = root.join(format!("suite/clip/head_{task}.safetensors"));
        let (shape, weight) = tensor(&file, "weight");
        let weight = Array2::from_shape_vec((shape[0], shape[1]), weight).unwrap();
        let head = Head::new(weight, Array1::from_vec(tensor(&file, "bias").1), true).unwrap();
        let reference = root.join(format!("suite/reference/{task}_first32.npz"));
        for model in ["base", "ft"] {
            let embeddings = floats(&npz_array(&reference, &format!("embeds_{model}")));
            let embeddings = Array2::from_shape_vec((32, head.features()), embeddings).unwrap();
            let expected = floats(&npz_array(&reference, &format!("logits_{model}")));
            let expected = Array2::from_shape_vec((32, head.classes()), expected).unwrap();
            let logits = head.logits(&embeddings).unwrap();
            for (logit, expected) in logits.iter().zip(&expected) {
                // Logits reach 16 (the length of the weight rows); single precision leaves about 1e-6 of that.
                assert!((logit - expected).abs() < 2e-5, "{task}/{model}: {logit} against {expected}");
            }
            assert_eq!(
                metrics::predictions(&logits, 0).unwrap(),
                metrics::predictions(&expected, 0).unwrap()
            );
        }
    }
}
