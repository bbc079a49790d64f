//! Codes, scales, zero points and decoded values against those of the original TVQ implementation, on really trained models.
//!
//! The data is in the folder that `MERGANSER_TEST_DATA` names; without it these tests say that they were skipped.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blake3::Hash;
use merganser_tensors::formats;
use merganser_tensors::kernels::pack::{packed_len, unpack};
use merganser_tensors::kernels::quantize::QuantizeError;
use merganser_tensors::kernels::reduce::MinMax;
use merganser_tensors::manifest::{Content, FileKind, FileRef, Layout, Term};
use merganser_tensors::stream::summarize;
use merganser_tensors::writer::{Block, OutputTensor, Payload, WriteOptions, write_tensors};
use merganser_tensors::{
    Bits, DType, Encoding, Error, FileReader, Manifest, ReadAt, Resolver, Result, Scratch, TensorInfo,
    TensorSource, open,
};

const TASKS: [&str; 6] = ["mnist", "fashion", "notmnist", "cifar10", "gtsrb", "pneumonia"];

#[test]
fn affine_codes_equal_the_original() {
    let Some(data) = test_data("affine_codes_equal_the_original") else { return };
    for bits in [8, 4, 3, 2] {
        let compared =
            check_scheme(&data, [&format!("tvq{bits}"), &format!("asym{bits}")], bits, Encoding::affine, 0);
        let counted = if bits < 4 { 6 * 104 } else { 0 };
        assert_eq!(compared, (12, 6 * 104, counted), "tensors in full and by their statistics, {bits} bits");
    }
}

#[test]
fn absmax_codes_equal_the_original() {
    let Some(data) = test_data("absmax_codes_equal_the_original") else { return };
    for bits in [8, 4] {
        let name = format!("absmax{bits}");
        let compared = check_scheme(&data, [&name, &name], bits, Encoding::absmax, 1 << (bits - 1));
        assert_eq!(compared, (3, 6 * 104, 0), "tensors in full and by their statistics, {bits} bits");
    }
}

#[test]
fn a_sharded_checkpoint_reads_like_the_single_file() {
    let Some(data) = test_data("a_sharded_checkpoint_reads_like_the_single_file") else { return };
    let mut files = Files::default();
    let single = files.load(&data.join("suite/clip/base"));
    let sharded = files.load(&data.join("suite/clip/base_sharded"));
    let (single, sharded) = (open(&single, &files).unwrap(), open(&sharded, &files).unwrap());
    assert_eq!(single.tensors(), sharded.tensors());
    assert_eq!(single.tensors().len(), 104);
    for tensor in 0..single.tensors().len() {
        assert_eq!(read(&*single, tensor), read(&*sharded, tensor));
    }
}

type Encode = fn(Bits, MinMax) -> Result<Encoding, QuantizeError>;

/// Quantizes every task vector as the goldens did; returns the number of tensors compared in full, by statistics and by the
/// numbers of codes. (Hashes of the codes are compared where stages quantize.)
/// `names` are the scheme's names in the goldens' tensors and statistics; `offset` is what is added to signed
/// codes before they are stored.
fn check_scheme(
    data: &Path,
    names: [&str; 2],
    bits: u8,
    encode: Encode,
    offset: u8,
) -> (usize, usize, usize) {
    let [prefix, stats_name] = names;
    let bits = Bits::new(bits).unwrap();
    let mut files = Files::default();
    let goldens = files.load(&data.join("goldens/public/tvq/tensors.safetensors"));
    let goldens = open(&goldens, &files).unwrap();
    let base = files.load(&data.join("suite/clip/base"));
    let stats = fs_err::read(data.join("goldens/public/tvq/quant.stats.json")).unwrap();
    let stats: serde_json::Value = serde_json::from_slice(&stats).unwrap();
    let mut compared = (0, 0, 0);
    for task in TASKS {
        let tuned = files.load(&data.join(format!("suite/clip/ft_{task}.safetensors")));
        let deltas = files.difference(&tuned, &base);
        let source = open(&deltas, &files).unwrap();
        let infos = source.tensors();
        let all: Vec<usize> = (0..infos.len()).collect();
        let summaries = summarize(&*source, &all).unwrap();
        let encodings: Vec<Encoding> =
            summaries.iter().map(|summary| encode(bits, summary.range).unwrap()).collect();

        // through the writer, a stored artifact and back
        let outputs: Vec<OutputTensor> = infos
            .iter()
            .zip(&encodings)
            .map(|(info, encoding)| OutputTensor {
                name: info.name.clone(),
                shape: info.shape.clone(),
                payload: Payload::Codes(encoding.clone()),
            })
            .collect();
        let fill = |tensor: usize, range, block: Block<'_>, scratch: &mut Scratch| match block {
            Block::Values(values) => source.read_f32(tensor, range, values, scratch),
            Block::Bytes(_) => unreachable!("codes are made of values"),
        };
        let mut bytes = Vec::new();
        let written = write_tensors(&mut bytes, &outputs, fill, &WriteOptions::default()).unwrap();
        let file = FileRef { digest: blake3::hash(&bytes), size: written.size, kind: FileKind::Blob };
        let packed = written.into_manifest(Content::TaskVectors, file.clone()).unwrap();
        files.opened.insert(*file.digest.as_bytes(), Arc::new(bytes.clone()));
        let decoded = open(&packed, &files).unwrap();
        let Layout::Packed { tensors: stored, .. } = packed.layout() else { panic!("packed") };

        for (tensor, info) in infos.iter().enumerate() {
            let golden = |what: &str| goldens.index_of(&format!("{prefix}|{task}|{}|{what}", info.name));
            let what = format!("{prefix} {task} {}", info.name);
            let n = info.n_elements();
            let mut actual = vec![0u8; n];
            let start = stored[tensor].offset as usize;
            unpack(&bytes[start..start + packed_len(n, bits)], bits, &mut actual);
            let values = read(&*decoded, tensor);

            let stats = &stats[stats_name][task][&info.name];
            let parameters = match &stored[tensor].encoding {
                Encoding::Affine { scale, zero_point, .. } => [scale[0], zero_point[0]],
                Encoding::Absmax { scale, .. } => [scale[0], 0.0],
                _ => panic!("{what} was not quantized"),
            };
            let expected = [&stats["scale"], &stats["zero_point"]].map(|x| x.as_f64().unwrap() as f32);
            assert_eq!(parameters, expected, "scale and zero point of {what}");
            let code_sum: i64 = actual.iter().map(|code| i64::from(*code) - i64::from(offset)).sum();
            assert_eq!(code_sum, stats["code_sum"].as_i64().unwrap(), "sum of the codes of {what}");
            let max_abs = values.iter().fold(0f32, |max, x| max.max(x.abs()));
            assert_eq!(f64::from(max_abs), stats["dequant"][2].as_f64().unwrap(), "largest value of {what}");
            let figures = |name: &str, i: usize| stats[name][i].as_f64().unwrap();
            let (sum, size) = values
                .iter()
                .fold((0.0, 0.0), |(sum, size), x| (sum + f64::from(*x), size + f64::from(x.abs())));
            assert!(
                (sum - figures("dequant", 0)).abs() <= 1e-12 * size,
                "sum of the values of {what}: {sum}"
            );
            let near = |actual: f64, expected: f64, kind: &str| {
                assert!(
                    (actual - expected).abs() <= 1e-11 * expected,
                    "{kind} of {what}: {actual}, expected {expected}"
                );
            };
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
            near(norm(&mut values.iter().map(|x| f64::from(*x))), figures("dequant", 1), "norm");
            let originals = read(&*source, tensor);
            let errors = &mut values.iter().zip(&originals).map(|(x, y)| f64::from(*x) - f64::from(*y));
            // Of differences that torch takes in f32.
            let (error, expected) = (norm(errors), stats["err_l2"].as_f64().unwrap());
            assert!(
                (error - expected).abs() <= 1e-6 * expected,
                "error of {what}: {error}, expected {expected}"
            );
            if let Some(histogram) = stats.get("hist") {
                let mut counted = vec![0u64; 1 << bits.get()];
                for code in &actual {
                    counted[usize::from(*code)] += 1;
                }
                assert_eq!(serde_json::json!(counted), *histogram, "codes of {what}");
                compared.2 += 1;
            }
            compared.1 += 1;

            let Some(codes) = golden("codes") else { continue };
            let mut expected = vec![0u8; n];
            goldens.read_bytes(codes, 0..n as u64, &mut expected, &mut Scratch::new()).unwrap();
            for code in &mut expected {
                *code = code.wrapping_add(offset);
            }
            let wrong = actual.iter().zip(&expected).filter(|(actual, expected)| actual != expected).count();
            assert_eq!(wrong, 0, "wrong codes of {what}, out of {n}");
            assert_eq!(
                parameters[..],
                read(&*goldens, golden("scale_zp").expect("beside the codes")),
                "{what}"
            );
            if let Some(dequant) = golden("dequant") {
                let expected = read(&*goldens, dequant);
                assert!(values == expected, "decoded values of {what}");
            }
            compared.0 += 1;
        }
    }
    compared
}

fn read(source: &dyn TensorSource, tensor: usize) -> Vec<f32> {
    let n = source.tensors()[tensor].n_elements();
    let mut values = vec![f32::NAN; n];
    source.read_f32(tensor, 0..n, &mut values, &mut Scratch::new()).unwrap();
    values
}

/// Files and artifacts by digest.
#[derive(Default)]
struct Files {
    opened: BTreeMap<[u8; 32], Arc<dyn ReadAt>>,
    manifests: BTreeMap<[u8; 32], Manifest>,
}

impl Files {
    fn load(&mut self, path: &Path) -> Manifest {
        let parts = formats::describe(path).unwrap();
        let mut digests = Vec::new();
        for part in &parts {
            let digest = blake3::hash(&fs_err::read(&part.path).unwrap());
            self.opened.insert(*digest.as_bytes(), Arc::new(FileReader::open(&part.path).unwrap()));
            digests.push(digest);
        }
        Manifest::of_checkpoint(Content::Checkpoint, &parts, &digests, |_| true).unwrap()
    }

    fn difference(&mut self, tuned: &Manifest, base: &Manifest) -> Manifest {
        let floats = tuned.tensors().iter().filter(|tensor| tensor.dtype.is_float());
        let infos = floats.map(|tensor| TensorInfo { dtype: DType::F32, ..tensor.info() }).collect();
        let terms = [(1.0, tuned), (-1.0, base)].map(|(coefficient, manifest)| {
            let artifact = blake3::hash(&manifest.to_json());
            self.manifests.insert(*artifact.as_bytes(), manifest.clone());
            Term::new(coefficient, artifact)
        });
        Manifest::linear(Content::TaskVectors, infos, terms.to_vec()).unwrap()
    }
}

impl Resolver for Files {
    fn file(&self, file: &FileRef) -> Result<Arc<dyn ReadAt>> {
        self.opened.get(file.digest.as_bytes()).cloned().ok_or_else(not_found)
    }

    fn manifest(&self, artifact: &Hash) -> Result<Manifest> {
        self.manifests.get(artifact.as_bytes()).cloned().ok_or_else(not_found)
    }
}

fn not_found() -> Error {
    Error::Io(std::io::ErrorKind::NotFound.into())
}

/// Returns the folder of test data that does not belong to the repository, or says that `test` is skipped: past the test
/// harness, which hides what passing tests print, and in one piece, so that the lines can be counted.
fn test_data(test: &str) -> Option<PathBuf> {
    let folder =
        std::env::var_os("MERGANSER_TEST_DATA").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    if folder.is_none() {
        let line = format!("skipped: {test} (MERGANSER_TEST_DATA is not set)\n");
        std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).unwrap();
    }
    folder
}
