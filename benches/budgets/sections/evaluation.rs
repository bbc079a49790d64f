//! Evaluation, whole process, against a loop that only runs ONNX Runtime on batches that were prepared before.

use super::Section;
use crate::report::{Budget, budget, figure, interleaved};
use crate::tool::{Lab, output, seconds};
use crate::{Bench, Result};
use merganser_onnx::provision::{self, Environment};
use merganser_onnx::{Binding, Graph, Input, Prepared, Runtime, SessionOptions, Weights, WeightsError};
use merganser_stages::images::dataset::{self, DatasetSpec};
use merganser_stages::images::preprocess::{Preprocess, Preprocessor};
use safetensors::SafeTensors;
use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub const SECTION: Section =
    Section { name: "evaluation", title: "evaluation against a bare ONNX Runtime loop", run };

const LIMIT: f64 = 0.95;
/// The quickstart's 600 test images, this many times over.
const REPEATS: usize = 60;
const BATCH_SIZE: usize = 64;
const DIGITS: usize = 600;

fn run(bench: &Bench) -> Result<()> {
    let quickstart = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines/quickstart");
    let lab = Lab::new(bench.root(), "evaluation")?;
    let images = repeated(&quickstart.join("data/digits-images.idx.gz"), 16)?;
    let labels = repeated(&quickstart.join("data/digits-labels.idx.gz"), 8)?;
    let paths = BTreeMap::from([
        ("images".to_owned(), write(&lab, "images.idx", &images)?),
        ("labels".to_owned(), write(&lab, "labels.idx", &labels)?),
    ]);
    let pipeline = lab.write("pipeline.toml", &pipeline(&quickstart, &paths))?;
    let library = library()?;
    let command = |arguments: &[&str]| {
        let mut command = lab.run(&pipeline, arguments);
        command.env("ORT_DYLIB_PATH", &library);
        command
    };
    seconds(&mut command(&[]))?;

    let spec =
        DatasetSpec { name: "digits".to_owned(), format: "idx".to_owned(), paths, ..DatasetSpec::default() };
    let dataset = dataset::open(&spec)?;
    let config = serde_json::from_slice(&fs_err::read(quickstart.join("preprocessor_config.json"))?)?;
    let preprocessor = Preprocessor::new(Preprocess::from_value(&config, "preprocessor_config.json")?)?;
    // Distinct batches in turn: one alone would stay in the cache of the processor.
    let batches = (0..DIGITS.div_ceil(BATCH_SIZE))
        .map(|i| preprocessor.batch(&*dataset, i * BATCH_SIZE..(i + 1) * BATCH_SIZE))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let graph = Graph::load(&quickstart.join("clip_vision.onnx"))?;
    let weights = Checkpoint::read(&quickstart.join("base.safetensors"))?;
    let prepared = Prepared::new(&graph, &Binding::find(&graph, &weights)?)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let options = SessionOptions { intra_threads: threads, ..SessionOptions::default() };
    let mut session = Runtime::load(&library)?.session(&prepared, &weights, options)?;
    let input = prepared.inputs().first().ok_or("the graph has no input")?.name.clone();

    let n_images = DIGITS * REPEATS;
    let n_batches = n_images.div_ceil(BATCH_SIZE);
    let mut stage_seconds = Vec::new();
    let [whole, bare] = interleaved(
        bench.runs,
        [
            &mut || {
                let started = Instant::now();
                let said = output(&mut command(&["--force", "scores", "--json"]))?;
                let taken = started.elapsed().as_secs_f64();
                let record: serde_json::Value = serde_json::from_str(&said)?;
                let stages = record["stages"].as_array().ok_or("`run --json` lists no stages")?;
                let scores = stages
                    .iter()
                    .find(|stage| stage["stage"] == "scores")
                    .ok_or("there is no stage `scores`")?;
                stage_seconds.push(scores["seconds"].as_f64().ok_or("the stage has no time")?);
                Ok(taken)
            },
            &mut || {
                let started = Instant::now();
                for batch in batches.iter().cycle().take(n_batches) {
                    session.run(&[(&input, Input::F32(batch.view().into_dyn()))])?;
                }
                Ok(started.elapsed().as_secs_f64())
            },
        ],
    )?;
    let stage = crate::report::Median::of(stage_seconds);
    let rate = |seconds: f64| format!("{:.0} images/s", n_images as f64 / seconds);
    figure(&format!("bare loop, {n_images} images of 32 x 32"), rate(bare.value));
    figure("    spread", bare.seconds());
    figure("whole process", rate(whole.value));
    figure("    spread", whole.seconds());
    figure("the stage alone", rate(stage.value));
    budget(
        "whole process, of the bare loop's images/s",
        bare.value / whole.value,
        "",
        Budget::AtLeast(LIMIT),
    );
    Ok(())
}

fn pipeline(quickstart: &Path, paths: &BTreeMap<String, PathBuf>) -> String {
    let folder = quickstart.display();
    format!(
        "[pipeline]\nname = \"evaluation\"\n\n[stage.base]\nkind = \"load\"\npath = '{folder}/base.safetensors'\n\n\
         [stage.scores]\nkind = \"evaluate\"\nfrom = {{ model = \"base\", origin = \"base\" }}\n\
         graph = '{folder}/clip_vision.onnx'\nbatch_size = {BATCH_SIZE}\n\n[stage.scores.dataset.digits]\nformat = \"idx\"\n\
         images = '{}'\nlabels = '{}'\nhead = '{folder}/head_digits.safetensors'\n",
        paths["images"].display(),
        paths["labels"].display(),
    )
}

/// An idx file's content with its items repeated; `header` is the length of what comes before them.
fn repeated(path: &Path, header: usize) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    flate2::read::MultiGzDecoder::new(fs_err::File::open(path)?).read_to_end(&mut content)?;
    let (head, items) = content.split_at_checked(header).ok_or("an idx file is longer than its header")?;
    let mut repeated = head.to_vec();
    // The number of items follows the four bytes of the type.
    repeated[4..8].copy_from_slice(&u32::try_from(DIGITS * REPEATS)?.to_be_bytes());
    repeated.extend(items.repeat(REPEATS));
    Ok(repeated)
}

fn write(lab: &Lab, name: &str, bytes: &[u8]) -> Result<PathBuf> {
    let path = lab.path(name);
    fs_err::write(&path, bytes)?;
    Ok(path)
}

/// ONNX Runtime as the tool finds or installs it for a user.
pub(super) fn library() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let caches = set("XDG_CACHE_HOME")
        .or_else(|| Some(set("HOME")?.join(".cache")))
        .unwrap_or_else(std::env::temp_dir);
    let environment = Environment {
        ort_dylib_path: set("ORT_DYLIB_PATH"),
        python: vec!["python3".into(), "python".into()],
        library_dirs: provision::default_library_dirs(),
        cache_dir: caches.join("merganser"),
        offline: false,
        on_event: &|_| {},
    };
    Ok(provision::resolve(&environment)?.path)
}

/// A small checkpoint in memory.
pub(super) struct Checkpoint(HashMap<String, (Vec<usize>, Vec<f32>)>);

impl Checkpoint {
    pub(super) fn get(&self, name: &str) -> Option<(&[usize], &[f32])> {
        self.0.get(name).map(|(shape, values)| (shape.as_slice(), values.as_slice()))
    }

    pub(super) fn read(path: &Path) -> Result<Self> {
        let bytes = fs_err::read(path)?;
        let tensors = SafeTensors::deserialize(&bytes)?;
        let floats = tensors.iter().filter(|(_, tensor)| tensor.dtype() == safetensors::Dtype::F32).map(
            |(name, tensor)| {
                let (values, _) = tensor.data().as_chunks::<4>();
                let values = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
                (name.to_owned(), (tensor.shape().to_vec(), values))
            },
        );
        Ok(Self(floats.collect()))
    }
}

impl Weights for Checkpoint {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).map(|(shape, _)| shape.clone())
    }

    fn values(&self, name: &str) -> std::result::Result<Vec<f32>, WeightsError> {
        let missing = || WeightsError { tensor: name.to_owned(), source: "there is no such tensor".into() };
        self.0.get(name).map(|(_, values)| values.clone()).ok_or_else(missing)
    }
}
