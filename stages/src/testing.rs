//! A workbench for tests of stages: runs them on a store of its own, without the application.
//!
//! Parameters are written as JSON and become the same nodes that a pipeline file becomes. Keys, plans and reports are not involved.

#![cfg(test)]

use crate::params::{Entry, Node, NodeValue, Params, ParseContext, Problem, Span, Table};
use crate::services::RuntimeSettings;
use crate::{
    Connection, InputStatistics, Job, JobInput, JobSource, LayerPart, Notice, OpenFiles, Services,
    StageError, Statistics, Summed, Unit, kinds,
};
use blake3::Hash;
use merganser_cache::{Options, Preimage, Source, Store, Value};
use merganser_tensors::writer::{WriteOptions, write_f32_tensors};
use merganser_tensors::{DType, Manifest, Scratch, TensorSource};
use ndarray::Array2;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;

const SPAN: Span = Span { file: 0, start: 0, end: 0 };

/// A store, and what stages said.
pub(crate) struct Workbench {
    folder: TempDir,
    store: Store,
    services: Services,
    notices: Mutex<Vec<Notice>>,
    /// Files that were named by counting.
    files: AtomicUsize,
}

/// What is connected to a port of the stage that is run.
pub(crate) enum Input<'a> {
    One(&'a str, Hash),
    /// Members with their names, in order.
    Members(&'a str, &'a [(&'a str, Hash)]),
}

impl Workbench {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), options()).unwrap();
        // ONNX Runtime is shared: what the machine has, else one installation in the user's cache folder.
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let caches = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
        let services = Services::new(RuntimeSettings {
            ort_dylib_path: set("ORT_DYLIB_PATH"),
            python: vec!["python3".into(), "python".into()],
            library_dirs: Vec::new(),
            cache_dir: caches.unwrap_or_else(std::env::temp_dir).join("merganser"),
            offline: false,
            provider: merganser_onnx::Provider::Cpu,
            device: None,
            image_room: 1 << 20,
        });
        Self { folder, store, services, notices: Mutex::default(), files: AtomicUsize::default() }
    }

    /// A folder for files of the test.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a safetensors file of f32 tensors and loads it.
    pub(crate) fn checkpoint(&self, name: &str, tensors: &[(&str, &[usize], &[f32])]) -> Hash {
        let path = self.folder.path().join(format!("{name}.safetensors"));
        let mut file = fs_err::File::create(&path).unwrap();
        let listed: Vec<(String, Vec<usize>)> =
            tensors.iter().map(|(name, shape, _)| ((*name).to_owned(), shape.to_vec())).collect();
        let fill = |tensor: usize, range: std::ops::Range<usize>, out: &mut [f32], _: &mut Scratch| {
            out.copy_from_slice(&tensors[tensor].2[range]);
            Ok(())
        };
        let options = WriteOptions { allow_non_finite: true, ..WriteOptions::default() };
        write_f32_tensors(&mut file, &listed, DType::F32, fill, &options).unwrap();
        self.load(&path)
    }

    /// Runs `load` on a file or folder.
    pub(crate) fn load(&self, path: &Path) -> Hash {
        self.one("load", &json!({ "path": path.to_str().unwrap() }), &[])
    }

    /// Runs `diff`.
    pub(crate) fn diff(&self, base: Hash, tuned: Hash) -> Hash {
        self.one("diff", &json!({}), &[Input::One("base", base), Input::One("tuned", tuned)])
    }

    /// Runs a stage of one unit.
    pub(crate) fn one(&self, kind: &str, parameters: &serde_json::Value, inputs: &[Input<'_>]) -> Hash {
        let mut artifacts = self.run(kind, parameters, inputs).unwrap();
        assert_eq!(artifacts.len(), 1, "`{kind}` has one unit");
        artifacts.remove(0).1
    }

    /// Runs all units of a stage; returns their members' names and artifacts.
    pub(crate) fn run(
        &self,
        kind: &str,
        parameters: &serde_json::Value,
        inputs: &[Input<'_>],
    ) -> Result<Vec<(String, Hash)>, StageError> {
        let kind = *kinds().iter().find(|found| found.id() == kind).unwrap();
        let context =
            ParseContext { folders: vec![self.folder.path().to_owned()], ..ParseContext::default() };
        let params = Params { span: SPAN, table: table(parameters), context: &context };
        let stage = kind.parse(params).map_err(refused)?;
        let connections: Vec<Connection> = inputs.iter().map(|input| self.connection(input)).collect();
        stage.output(&connections).map_err(|problem| refused(vec![problem]))?;
        let units = stage.units(&connections, &kind.ports()).map_err(|problem| refused(vec![problem]))?;
        let mut parts: Vec<(&'static str, Hash)> = Vec::new();
        let mut results = Vec::new();
        for unit in units {
            let (name, part) = (unit.member.clone().unwrap_or_default(), unit.part);
            let artifact = self.unit(&*stage, unit, inputs, &parts)?;
            match part {
                Some(part) => parts.push((part, artifact)),
                None => results.push((name, artifact)),
            }
        }
        Ok(results)
    }

    /// Opens an artifact.
    pub(crate) fn tensors(&self, artifact: Hash) -> Arc<dyn TensorSource> {
        self.open(&Manifest::from_json(self.manifest(artifact).as_bytes()).unwrap())
    }

    /// Opens what a manifest describes.
    pub(crate) fn open(&self, manifest: &Manifest) -> Arc<dyn TensorSource> {
        merganser_tensors::open(manifest, &OpenFiles::new(&self.store)).unwrap()
    }

    /// All values of a tensor.
    pub(crate) fn values(&self, artifact: Hash, name: &str) -> Vec<f32> {
        let source = self.tensors(artifact);
        let tensor = source.index_of(name).unwrap_or_else(|| panic!("there is no tensor `{name}`"));
        let n = source.tensors()[tensor].n_elements();
        let mut values = vec![0.0; n];
        source.read_f32(tensor, 0..n, &mut values, &mut Scratch::new()).unwrap();
        values
    }

    /// What an artifact says of itself.
    pub(crate) fn manifest(&self, artifact: Hash) -> String {
        self.store.load_artifact(&artifact).unwrap().manifest.clone()
    }

    /// The tensors of a checkpoint as masks.
    pub(crate) fn as_masks(&self, checkpoint: Hash) -> Hash {
        let mut draft = (*self.store.load_artifact(&checkpoint).unwrap()).clone();
        draft.manifest = draft.manifest.replacen(r#""content":"checkpoint""#, r#""content":"masks""#, 1);
        let operation = Value::map([("test", "masks")]);
        let preimage = Preimage { operation, inputs: Value::List(vec![Value::Digest(checkpoint)]) };
        self.store.publish(&preimage, &draft, Duration::ZERO).unwrap().artifact
    }

    /// What a calibration might have found: of layers with weights `name` [outputs, inputs] (or the other way round), the second moments of
    /// their inputs.
    pub(crate) fn statistics(&self, layers: &[(&str, Summed, usize, &Array2<f64>)]) -> Hash {
        let mut statistics = Statistics { images: 1, ..Statistics::default() };
        let mut tensors = Vec::new();
        for (index, (name, inputs, n_outputs, moments)) in layers.iter().enumerate() {
            let width = moments.nrows();
            let (n_rows, columns) = match inputs {
                Summed::Columns => (*n_outputs, width),
                Summed::Rows => (width, *n_outputs),
            };
            let part = LayerPart { first_row: 0, n_rows, columns, inputs: *inputs, input: index };
            statistics.layers.insert((*name).to_owned(), vec![part]);
            let (value, moments_name) = (format!("value {index}"), format!("moments.{index}"));
            statistics.inputs.push(InputStatistics {
                value,
                moments: moments_name.clone(),
                width,
                vectors: 1,
            });
            tensors.push((
                moments_name,
                [width, width],
                moments.iter().map(|m| *m as f32).collect::<Vec<f32>>(),
            ));
        }
        let listed: Vec<(&str, &[usize], &[f32])> = tensors
            .iter()
            .map(|(name, shape, values)| (name.as_str(), shape.as_slice(), values.as_slice()))
            .collect();
        let name = format!("moments {}", self.files.fetch_add(1, Ordering::Relaxed));
        let mut draft = (*self.store.load_artifact(&self.checkpoint(&name, &listed)).unwrap()).clone();
        draft.manifest = draft.manifest.replacen(r#""content":"checkpoint""#, r#""content":"statistics""#, 1);
        draft.blobs.push(statistics.write(&self.store.staging().unwrap()).unwrap());
        let operation = Value::map([("test", Value::Text(format!("statistics {name}")))]);
        let preimage = Preimage { operation, inputs: Value::List(Vec::new()) };
        self.store.publish(&preimage, &draft, Duration::ZERO).unwrap().artifact
    }

    /// The bytes of a named blob of an artifact.
    pub(crate) fn blob(&self, artifact: Hash, name: &str) -> Vec<u8> {
        let stored = self.store.load_artifact(&artifact).unwrap();
        let blob = stored.blobs.iter().find(|blob| blob.name == name).unwrap();
        fs_err::read(self.store.open_blob(&blob.digest, blob.size).unwrap().path).unwrap()
    }

    /// Warnings so far.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let notices = self.notices.lock().unwrap();
        let text = |notice: &Notice| match notice {
            Notice::Warning(text) => Some(text.clone()),
            _ => None,
        };
        notices.iter().filter_map(text).collect()
    }

    fn connection(&self, input: &Input<'_>) -> Connection {
        let (port, artifact, members) = match input {
            Input::One(port, artifact) => (port, artifact, None),
            Input::Members(port, members) => {
                (port, &members[0].1, Some(members.iter().map(|(name, _)| (*name).to_owned()).collect()))
            }
        };
        Connection { port: (*port).to_owned(), content: self.content(artifact), members }
    }

    fn content(&self, artifact: &Hash) -> crate::Content {
        use merganser_tensors::manifest::Content;
        match OpenFiles::new(&self.store).manifest(artifact).map(|manifest| manifest.content()) {
            Ok(Content::Checkpoint) => crate::Content::Checkpoint,
            Ok(Content::TaskVectors) => crate::Content::TaskVectors,
            Ok(Content::Masks) => crate::Content::Masks,
            Ok(Content::Basis) => crate::Content::Basis,
            Ok(Content::Coefficients) => crate::Content::Coefficients,
            Ok(Content::Statistics) => crate::Content::Statistics,
            Err(_) => crate::Content::Scores,
        }
    }

    fn unit(
        &self,
        stage: &dyn crate::Stage,
        unit: Unit,
        inputs: &[Input<'_>],
        parts: &[(&'static str, Hash)],
    ) -> Result<Hash, StageError> {
        let mut taken = Vec::new();
        for take in &unit.takes {
            let part = parts.iter().find(|(part, _)| *part == take.port);
            taken.extend(part.map(|(part, artifact)| JobInput {
                port: (*part).to_owned(),
                member: None,
                artifact: *artifact,
            }));
            let found = inputs.iter().flat_map(|input| match input {
                Input::One(port, artifact) => vec![(*port, None, *artifact)],
                Input::Members(port, members) => members
                    .iter()
                    .map(|(name, artifact)| (*port, Some((*name).to_owned()), *artifact))
                    .collect(),
            });
            taken.extend(
                found
                    .filter(|(port, member, _)| {
                        *port == take.port && (take.member.is_none() || *member == take.member)
                    })
                    .map(|(port, member, artifact)| JobInput { port: port.to_owned(), member, artifact }),
            );
        }
        let mut sources = Vec::new();
        for set in stage.sources(&unit)? {
            for file in set.files {
                let digest = self.store.digest_file(&file.path, &|_| ())?;
                sources.push(JobSource {
                    parameter: set.parameter.clone(),
                    label: file.label,
                    path: file.path,
                    source: Source { digest: digest.digest, size: digest.size },
                });
            }
        }
        let operation =
            Value::map([("test", Value::Text(format!("{:?}{unit:?}", stage.parameters(&unit)?)))]);
        let listed = taken.iter().map(|input| Value::Digest(input.artifact)).collect();
        let preimage = Preimage { operation, inputs: Value::List(listed) };
        let staging = self.store.staging()?;
        let notify = |notice| self.notices.lock().unwrap().push(notice);
        let job = Job {
            unit,
            inputs: taken,
            sources,
            preimage: &preimage,
            services: &self.services,
            threads: 2,
            staging: &staging,
            notify: &notify,
            clock: &|| Duration::ZERO,
            cancelled: &|| false,
            files: OpenFiles::new(&self.store),
            forced: false,
        };
        let draft = stage.run(&job)?;
        job.files.check_unchanged()?;
        Ok(self.store.publish(&preimage, &draft, Duration::ZERO)?.artifact)
    }
}

/// The suite's CLIP encoders and the values that the authors' own code merged them to.
pub(crate) struct Suite {
    pub bench: Workbench,
    pub base: Hash,
    /// Task vectors, in the order of the goldens.
    pub deltas: Vec<(&'static str, Hash)>,
    folder: PathBuf,
}

/// How far from the golden values a merge may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tolerance {
    /// ‖Δ − Δ_golden‖₂ / ‖Δ_golden‖₂ of every golden tensor.
    pub relative_l2: f64,
    /// The same of the norm ‖Δ‖₂ of every tensor, golden or not.
    pub norm: f64,
}

impl Suite {
    /// The tasks in the order of the goldens.
    pub(crate) const TASKS: [&'static str; 6] =
        ["mnist", "fashion", "notmnist", "cifar10", "gtsrb", "pneumonia"];

    /// Loads the checkpoints; `None` (and a line that says so) without the test data.
    pub(crate) fn open(test: &str) -> Option<Self> {
        let folder = crate::images::test_support::test_data(test)?;
        let bench = Workbench::new();
        let clip = folder.join("suite/clip");
        let base = bench.load(&clip.join("base/model.safetensors"));
        let deltas = Self::TASKS
            .map(|task| (task, bench.diff(base, bench.load(&clip.join(format!("ft_{task}.safetensors"))))));
        Some(Self { bench, base, deltas: deltas.to_vec(), folder })
    }

    /// The path of a file or folder of the goldens, such as `tall_masks/masks.safetensors`.
    pub(crate) fn golden(&self, name: &str) -> PathBuf {
        self.folder.join("goldens/public").join(name)
    }

    /// A JSON file of the goldens.
    pub(crate) fn golden_json(&self, name: &str) -> serde_json::Value {
        serde_json::from_slice(&fs_err::read(self.golden(name)).unwrap()).unwrap()
    }

    /// The TALL masks of all tasks.
    pub(crate) fn masks(&self, lambda: f64) -> Vec<(String, Hash)> {
        let inputs = [Input::Members("deltas", &self.deltas), Input::One("base", self.base)];
        self.bench.run("mask", &json!({ "method": "tall", "lambda": lambda }), &inputs).unwrap()
    }

    /// The bits of a mask as the goldens have them: all tensors in the order of their sorted names, the first bit in the most significant
    /// place.
    pub(crate) fn packed_bits(mask: &dyn TensorSource) -> Vec<u8> {
        let bits = mask.tensors().iter().enumerate().flat_map(|(tensor, info)| {
            let mut values = vec![0.0; info.n_elements()];
            mask.read_f32(tensor, 0..values.len(), &mut values, &mut Scratch::new()).unwrap();
            values
        });
        let bits: Vec<f32> = bits.collect();
        bits.chunks(8)
            .map(|byte| byte.iter().enumerate().fold(0, |sum, (i, bit)| sum | (*bit as u8) << (7 - i)))
            .collect()
    }

    /// Merges all task vectors; returns members and artifacts.
    pub(crate) fn merge(&self, parameters: &serde_json::Value) -> Vec<(String, Hash)> {
        let inputs = [Input::One("base", self.base), Input::Members("vectors", &self.deltas)];
        self.bench.run("merge", parameters, &inputs).unwrap()
    }

    /// Merges all task vectors into one checkpoint and compares it with the golden values `config` of `method`.
    #[track_caller]
    pub(crate) fn check(
        &self,
        parameters: &serde_json::Value,
        method: &str,
        config: &str,
        tolerance: Tolerance,
    ) {
        let merged = self.merge(parameters);
        assert_eq!(merged.len(), 1, "one checkpoint");
        self.compare(merged[0].1, method, config, tolerance);
    }

    /// Compares a merged checkpoint with the golden values: tensors element by element, and the norm of every difference from the base.
    #[track_caller]
    pub(crate) fn compare(&self, artifact: Hash, method: &str, config: &str, tolerance: Tolerance) {
        // Of some configurations only the norms are there.
        let golden =
            Some(self.golden(&format!("{method}/{config}.safetensors"))).filter(|path| path.exists());
        let golden = golden.map(|path| self.bench.load(&path));
        let listed = golden.map(|golden| self.bench.tensors(golden));
        let mut worst = (0.0, String::new());
        for (info, golden) in
            listed.iter().flat_map(|listed| listed.tensors()).zip(golden.iter().cycle().copied())
        {
            let name = info.name.split('[').next().unwrap();
            let expected = self.bench.values(golden, &info.name);
            let (actual, base) = (self.bench.values(artifact, name), self.bench.values(self.base, name));
            let (mut off, mut norm) = (0.0f64, 0.0f64);
            for ((expected, actual), base) in expected.iter().zip(&actual).zip(&base) {
                off += (f64::from(*actual) - f64::from(*expected)).powi(2);
                norm += (f64::from(*expected) - f64::from(*base)).powi(2);
            }
            let relative = if off == 0.0 { 0.0 } else { (off / norm).sqrt() };
            if relative > worst.0 || relative.is_nan() {
                worst = (relative, info.name.clone());
            }
        }
        assert!(
            worst.0 <= tolerance.relative_l2,
            "{method}/{config}: `{}` is {:.3e} off, {:.3e} allowed",
            worst.1,
            worst.0,
            tolerance.relative_l2
        );
        // Where norms may be further off than golden tensors are, an element may be selected otherwise elsewhere: ‖Δ‖ changes by the share t
        // if it was √(2t)·‖Δ‖ large.
        let Tolerance { relative_l2, norm } = tolerance;
        let elements = if norm > relative_l2 { (2.0 * norm).sqrt() } else { relative_l2 };
        self.compare_statistics(artifact, method, config, norm, elements);
    }

    /// Compares all statistics that are listed of every tensor, for golden values without tensors: sum, L2 norm and largest magnitude of the
    /// merged tensor, and of its difference Δ from the base. ‖Δ‖ is within `tolerance` of its own size. The others follow: errors of elements
    /// that are together as large as `tolerance·‖Δ‖` move a largest magnitude and a norm by no more than that, and a sum by √n times as much.
    #[track_caller]
    pub(crate) fn compare_norms(&self, artifact: Hash, method: &str, config: &str, tolerance: f64) {
        self.compare_statistics(artifact, method, config, tolerance, tolerance);
    }

    /// [`Self::compare_norms`], with another tolerance for what depends on single elements.
    #[track_caller]
    fn compare_statistics(&self, artifact: Hash, method: &str, config: &str, tolerance: f64, elements: f64) {
        const NAMES: [&str; 6] =
            ["sum", "norm", "largest magnitude", "sum of Δ", "norm of Δ", "largest magnitude of Δ"];
        let mut worst = (0.0, String::new());
        let stats = self.golden_json(&format!("{method}/stats.json"));
        let listed = stats["configs"][config].as_object().unwrap();
        assert!(!listed.is_empty(), "{method}/{config}");
        for (name, expected) in listed {
            let (merged, base) = (self.bench.values(artifact, name), self.bench.values(self.base, name));
            let delta: Vec<f64> =
                merged.iter().zip(&base).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
            let merged: Vec<f64> = merged.iter().map(|x| f64::from(*x)).collect();
            let delta_norm = expected[4].as_f64().unwrap();
            for (i, statistic) in NAMES.iter().enumerate() {
                let (values, expected) =
                    (if i < 3 { &merged } else { &delta }, expected[i].as_f64().unwrap());
                let actual = match i % 3 {
                    0 => values.iter().sum::<f64>(),
                    1 => values.iter().map(|x| x * x).sum::<f64>().sqrt(),
                    _ => values.iter().fold(0f64, |largest, x| largest.max(x.abs())),
                };
                // Sums in another order differ, however exact the elements are; those of a merged tensor are rounded to f32.
                let unit = if tolerance > 1e-9 { f64::from(f32::EPSILON) / 2.0 } else { 1e-12 };
                let rounding = unit * merged.iter().map(|x| x.abs()).sum::<f64>();
                let allowed = match i {
                    4 => tolerance * delta_norm,
                    0 | 3 => elements * delta_norm * (values.len() as f64).sqrt() + rounding,
                    _ => elements * delta_norm + rounding / (values.len() as f64).sqrt(),
                };
                let off = (actual - expected).abs();
                let share = if off == 0.0 { 0.0 } else { off / allowed };
                if share > worst.0 || share.is_nan() {
                    let text = format!(
                        "the {statistic} of `{name}` is {actual:e}, expected {expected:e} ± {allowed:.3e}"
                    );
                    worst = (share, text);
                }
            }
        }
        assert!(worst.0 <= 1.0, "{method}/{config}: {}", worst.1);
    }
}

/// SHA-256 (FIPS 180-4) in hexadecimal, for goldens that are hashes.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    // the first 32 bits of the fractional parts of the roots of the first primes
    let primes: Vec<u32> = (2u32..).filter(|n| (2..*n).all(|d| n % d != 0)).take(64).collect();
    let fraction = |root: f64| ((root - root.floor()) * 4_294_967_296.0) as u32;
    let mut state: Vec<u32> = primes[..8].iter().map(|p| fraction(f64::from(*p).sqrt())).collect();
    let constants: Vec<u32> = primes.iter().map(|p| fraction(f64::from(*p).cbrt())).collect();
    let mut padded = bytes.to_vec();
    padded.push(0x80);
    while padded.len() % 64 != 56 {
        padded.push(0);
    }
    padded.extend((bytes.len() as u64 * 8).to_be_bytes());
    for block in padded.chunks_exact(64) {
        let mut words: Vec<u32> =
            block.chunks_exact(4).map(|word| u32::from_be_bytes(word.try_into().unwrap())).collect();
        for i in 16..64 {
            let (a, b) = (words[i - 15], words[i - 2]);
            let low = a.rotate_right(7) ^ a.rotate_right(18) ^ (a >> 3);
            let high = b.rotate_right(17) ^ b.rotate_right(19) ^ (b >> 10);
            words.push(words[i - 16].wrapping_add(low).wrapping_add(words[i - 7]).wrapping_add(high));
        }
        let mut s: [u32; 8] = state.as_slice().try_into().unwrap();
        for (word, constant) in words.iter().zip(&constants) {
            let choice = (s[4] & s[5]) ^ (!s[4] & s[6]);
            let majority = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);
            let sum0 = s[0].rotate_right(2) ^ s[0].rotate_right(13) ^ s[0].rotate_right(22);
            let sum1 = s[4].rotate_right(6) ^ s[4].rotate_right(11) ^ s[4].rotate_right(25);
            let first =
                s[7].wrapping_add(sum1).wrapping_add(choice).wrapping_add(*constant).wrapping_add(*word);
            s.rotate_right(1);
            s[4] = s[4].wrapping_add(first);
            s[0] = first.wrapping_add(sum0).wrapping_add(majority);
        }
        state.iter_mut().zip(s).for_each(|(state, s)| *state = state.wrapping_add(s));
    }
    state.iter().fold(String::new(), |text, word| text + &format!("{word:08x}"))
}

fn options() -> Options {
    Options {
        clock: Arc::new(std::time::SystemTime::now),
        host: "test".to_owned(),
        tool_version: "test".to_owned(),
        on_event: Arc::new(|_| ()),
    }
}

fn refused(problems: Vec<Problem>) -> StageError {
    let messages: Vec<String> = problems.into_iter().map(|problem| problem.message).collect();
    StageError::input(messages.join("; "))
}

fn table(json: &serde_json::Value) -> Table {
    let entries = json.as_object().expect("parameters are an object").iter();
    entries.map(|(key, value)| (key.clone(), Entry { key_span: SPAN, node: node(value) })).collect()
}

fn node(json: &serde_json::Value) -> Node {
    let value = match json {
        serde_json::Value::Null => panic!("TOML has no null"),
        serde_json::Value::Bool(value) => NodeValue::Bool(*value),
        serde_json::Value::Number(value) => match value.as_i64() {
            Some(value) => NodeValue::Integer(value),
            None => NodeValue::Float(value.as_f64().unwrap()),
        },
        serde_json::Value::String(value) => NodeValue::String(value.clone()),
        serde_json::Value::Array(items) => NodeValue::Array(items.iter().map(node).collect()),
        serde_json::Value::Object(_) => NodeValue::Table(table(json)),
    };
    Node { span: SPAN, value }
}
