//! `merganser show`: what a stage's output holds.

use super::compared::{Against, Details};
use super::setup;
use crate::cli::{Global, ShowArgs};
use crate::exit::{ExitCode, Failure, Result};
use crate::report::{self, Align, Table, bytes, ratio, shorten};
use blake3::Hash;
use merganser_cache::{Artifact, Store};
use merganser_stages::{
    ADAPTATION, Adaptation, BitReductions, Content, Coverage, DIAGNOSTICS, Diagnostics, ExportedGraph,
    OpenFiles, PROGRESS, QUANTIZATION, QuantizationDiagnostics, SEEN, ScoredImages, Scores, Seen, TRAINING,
    Training, coverage,
};
use merganser_tensors::Manifest;
use merganser_tensors::manifest::Layout;
use serde::Serialize;
use std::collections::BTreeMap;

pub fn show(global: &Global, args: &ShowArgs) -> Result<ExitCode> {
    let ShowArgs { stage: args, against } = args;
    let pipeline = setup::load_pipeline(global, &args.pipeline)?;
    let workspace = setup::open_workspace(global)?;
    let selection = setup::select(&pipeline, &args.stage)?;
    let resolver = setup::resolver(&workspace, &pipeline, &[selection], &[], Box::new(|_, _, _| ()))?;
    let planned = setup::plan(&resolver)?;
    let against = match against {
        Some(name) => Against::read(&workspace, &pipeline, name)?,
        None => Against::default(),
    };
    let mut shown = Vec::new();
    let mut masks = Vec::new();
    for unit in planned.iter().filter(|unit| resolver.selected[unit.id]) {
        let content = resolver.units.instance(unit.id).content;
        let output = match unit.artifact {
            Some(artifact) => Some(describe(&workspace.store, content, &artifact, &against)?),
            None => None,
        };
        if let (Content::Masks, Some(artifact)) = (content, unit.artifact) {
            let label = resolver.units.instance(unit.id).label.clone();
            masks.push((label, shown.len(), artifact));
        }
        shown.push(Shown {
            unit: unit.name.to_string(),
            kind: resolver.units.instance(unit.id).kind.id(),
            content: content.label(),
            output,
        });
    }
    add_coverage(&workspace.store, &mut shown, &masks)?;
    if args.pipeline.json {
        outln!("{}", serde_json::to_string_pretty(&shown).map_err(Failure::failed)?);
    } else {
        let texts: Vec<String> = shown.iter().map(Shown::text).collect();
        out!("{}", texts.join("\n"));
    }
    Ok(ExitCode::Done)
}

#[derive(Serialize)]
struct Shown {
    unit: String,
    kind: &'static str,
    content: &'static str,
    /// `None` when it is not in the cache.
    output: Option<Output>,
}

#[derive(Serialize)]
struct Output {
    artifact: String,
    /// Bytes of its own files; a view has none.
    stored_bytes: u64,
    /// How the values come about.
    layout: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tensors: Vec<TensorRow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    f32_bytes: Option<u64>,
    /// Numbers that came up while it was made, such as a parameter that was searched for.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    figures: BTreeMap<String, f64>,
    /// What a mask keeps.
    #[serde(skip_serializing_if = "Option::is_none")]
    coverage: Option<Coverage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scores: Option<Scores>,
    /// What kept logits say beyond the scores.
    #[serde(flatten)]
    details: Details,
    /// How the weights of an exported graph are stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    graph: Option<ExportedGraph>,
    /// How good it is, if it is made of factors.
    #[serde(skip_serializing_if = "Option::is_none")]
    diagnostics: Option<Diagnostics>,
    /// What quantization did to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    quantization: Option<QuantizationDiagnostics>,
    /// How it was trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    training: Option<Training>,
    /// How its layers came to their widths.
    #[serde(skip_serializing_if = "Option::is_none")]
    reductions: Option<BitReductions>,
    /// Coefficients that were tuned.
    #[serde(skip_serializing_if = "Option::is_none")]
    adaptation: Option<Adaptation>,
    /// Images that it was made with.
    #[serde(skip_serializing_if = "Option::is_none")]
    seen: Option<Seen>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    files: Vec<FileRow>,
}

#[derive(Serialize)]
struct TensorRow {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    /// Bits per element as stored; none for a view.
    #[serde(skip_serializing_if = "Option::is_none")]
    bits: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
}

#[derive(Serialize)]
struct FileRow {
    name: String,
    bytes: u64,
    digest: String,
}

fn describe(store: &Store, content: Content, digest: &Hash, against: &Against) -> Result<Output> {
    let artifact = store.load_artifact(digest)?;
    let mut output = Output {
        artifact: digest.to_hex().to_string(),
        stored_bytes: report::kept_bytes(&artifact),
        layout: "files",
        tensors: Vec::new(),
        f32_bytes: None,
        figures: BTreeMap::new(),
        coverage: None,
        scores: None,
        details: Details::default(),
        graph: None,
        diagnostics: read_blob(store, &artifact, DIAGNOSTICS, Diagnostics::from_json)?,
        quantization: read_blob(store, &artifact, QUANTIZATION, QuantizationDiagnostics::from_json)?,
        training: read_blob(store, &artifact, TRAINING, Training::from_json)?,
        reductions: read_blob(store, &artifact, PROGRESS, BitReductions::from_json)?,
        adaptation: read_blob(store, &artifact, ADAPTATION, Adaptation::from_json)?,
        seen: read_blob(store, &artifact, SEEN, Seen::from_json)?,
        files: files(&artifact),
    };
    match content {
        Content::Checkpoint
        | Content::TaskVectors
        | Content::Masks
        | Content::Basis
        | Content::Coefficients
        | Content::Statistics => {
            let manifest = Manifest::from_json(artifact.manifest.as_bytes()).map_err(Failure::failed)?;
            output.layout = match manifest.layout() {
                Layout::Regions { .. } if artifact.blobs.is_empty() => "view of files",
                Layout::Regions { .. } => "stored",
                Layout::Packed { .. } => "packed",
                Layout::Masked { .. } if !artifact.blobs.is_empty() => "view of its parts",
                _ => "view, computed when read",
            };
            output.f32_bytes = Some(manifest.f32_bytes());
            output.figures = manifest.figures().clone();
            output.tensors = tensors(&manifest);
        }
        Content::Scores => {
            output.scores = Scores::from_json(&artifact.manifest);
            output.details = Details::of(store, digest, output.scores.as_ref(), against)?;
        }
        Content::Graph => output.graph = ExportedGraph::from_json(&artifact.manifest),
        Content::Files => {}
    }
    Ok(output)
}

/// Counts what masks keep and, of masks of one stage, how many of them agree on an entry.
fn add_coverage(store: &Store, shown: &mut [Shown], masks: &[(String, usize, Hash)]) -> Result<()> {
    for stage in masks.chunk_by(|a, b| a.0 == b.0) {
        let files = OpenFiles::new(store);
        let open = |(_, _, artifact): &(String, usize, Hash)| {
            let manifest = files.manifest(artifact).map_err(|error| Failure::failed(error.with_causes()))?;
            merganser_tensors::open(&manifest, &files).map_err(Failure::failed)
        };
        let opened = stage.iter().map(open).collect::<Result<Vec<_>>>()?;
        let counted = coverage(&opened).map_err(Failure::failed)?;
        for ((_, index, _), coverage) in stage.iter().zip(counted) {
            if let Some(output) = &mut shown[*index].output {
                output.coverage = Some(coverage);
            }
        }
    }
    Ok(())
}

/// Ways of storing weights, and what they take.
fn graph_text(graph: &ExportedGraph) -> String {
    let right = Align::Right;
    let mut table = Table::new(&[("  weights as", Align::Left), ("tensors", right), ("bytes", right)]);
    for (form, stored) in &graph.forms {
        table.row([format!("  {form}"), stored.tensors.to_string(), stored.bytes.to_string()]);
    }
    let shrunk = ratio(graph.f32_bytes as f64 / graph.weight_bytes.max(1) as f64);
    let integers = match graph.integer_layers {
        0 => String::new(),
        n => format!("; {n} layers compute with integers"),
    };
    format!(
        "{table}  weights: {} of {} in single precision, {shrunk}{integers}\n",
        bytes(graph.weight_bytes),
        bytes(graph.f32_bytes)
    )
}

/// Shares of ones, by layer, and how much of a mask others have too.
fn coverage_text(coverage: &Coverage) -> String {
    let percent = |part: u64, whole: u64| format!("{:.2} %", 100.0 * part as f64 / (whole as f64).max(1.0));
    let mut text = format!(
        "  keeps {} of {} entries ({})\n",
        coverage.kept,
        coverage.entries,
        percent(coverage.kept, coverage.entries)
    );
    let shared = coverage.agreement.iter().enumerate().map(|(others, count)| {
        let share = percent(*count, coverage.kept);
        match others {
            0 => format!("{share} in no other mask"),
            others => format!("{share} in {others} other{}", if others == 1 { "" } else { "s" }),
        }
    });
    if !coverage.agreement.is_empty() {
        text += &format!("  of these, {}\n", shared.collect::<Vec<_>>().join(", "));
    }
    let mut table = Table::new(&[
        ("  part", Align::Left),
        ("kept", Align::Right),
        ("of", Align::Right),
        ("share", Align::Right),
    ]);
    for row in &coverage.layers {
        let share = percent(row.kept, row.entries);
        table.row([format!("  {}", row.name), row.kept.to_string(), row.entries.to_string(), share]);
    }
    text + &table.to_string()
}

/// Reads what was kept beside an artifact under a name.
fn read_blob<T>(
    store: &Store,
    artifact: &Artifact,
    name: &str,
    parse: impl Fn(&[u8]) -> Option<T>,
) -> Result<Option<T>> {
    let Some(blob) = artifact.blobs.iter().find(|blob| blob.name == name) else { return Ok(None) };
    let file = store.open_blob(&blob.digest, blob.size)?;
    Ok(parse(&fs_err::read(&file.path).map_err(Failure::failed)?))
}

fn files(artifact: &Artifact) -> Vec<FileRow> {
    let row = |name: String, size, digest: &Hash| FileRow {
        name,
        bytes: size,
        digest: digest.to_hex().to_string(),
    };
    let blobs = artifact.blobs.iter().map(|blob| row(blob.name.clone(), blob.size, &blob.digest));
    let sources =
        artifact.sources.iter().map(|source| row("(your file)".to_owned(), source.size, &source.digest));
    blobs.chain(sources).collect()
}

fn tensors(manifest: &Manifest) -> Vec<TensorRow> {
    let stored = |index: usize| match manifest.layout() {
        Layout::Regions { regions, .. } => Some((None, regions[index].length)),
        Layout::Packed { tensors, .. } => {
            let packed = &tensors[index];
            let n_codes = packed.encoding.n_codes() as u32;
            let bits = packed.encoding.bits().map(|bits| u32::from(bits.get()) * n_codes);
            Some((bits, packed.length))
        }
        _ => None,
    };
    let rows = manifest.tensors().iter().enumerate().map(|(index, tensor)| {
        let (bits, length) = stored(index).unzip();
        TensorRow {
            name: tensor.name.clone(),
            dtype: tensor.dtype.to_string(),
            shape: tensor.shape.clone(),
            bits: bits.map(|bits: Option<u32>| bits.unwrap_or(8 * tensor.dtype.size_bytes() as u32)),
            bytes: length,
        }
    });
    rows.collect()
}

/// Which images were scored, in a line.
fn images_text(images: &ScoredImages) -> String {
    let mut text = format!("  {} images, manifest {}", images.n, shorten(&images.manifest.to_hex()));
    if images.skipped > 0 {
        text += &format!("; {} that cannot be decoded left out", images.skipped);
    }
    if let Some(n) = images.in_training {
        text += &format!("; {n} are training images too");
    }
    text + "\n"
}

impl Shown {
    fn text(&self) -> String {
        let Some(output) = &self.output else {
            return format!("{} ({}): not in the cache\n", self.unit, self.kind);
        };
        let mut text = format!(
            "{} ({}): {}, {}, artifact {}\n",
            self.unit,
            self.kind,
            self.content,
            output.layout,
            shorten(&output.artifact)
        );
        if let Some(scores) = &output.scores {
            let right = Align::Right;
            let mut table = Table::new(&[
                ("  task", Align::Left),
                ("metric", Align::Left),
                ("value", right),
                ("correct", right),
                ("n", right),
                ("95 % interval", Align::Left),
            ]);
            for row in &scores.rows {
                let percent = |value: f64| format!("{:.2}", value * 100.0);
                let interval = format!("{} – {}", percent(row.low), percent(row.high));
                let task = format!("  {}", row.task);
                table.row([
                    task,
                    row.metric.clone(),
                    percent(row.value),
                    row.correct.map_or_else(String::new, |correct| correct.to_string()),
                    row.n.to_string(),
                    interval,
                ]);
            }
            for row in output.details.rows(scores) {
                table.row(row);
            }
            text += &table.to_string();
            text += &output.details.text();
            text += &scores.images.as_ref().map(images_text).unwrap_or_default();
        }
        for (name, value) in &output.figures {
            text += &format!("  {name}: {value}\n");
        }
        if let Some(graph) = &output.graph {
            text += &graph_text(graph);
        }
        if let Some(coverage) = &output.coverage {
            text += &coverage_text(coverage);
        }
        if let Some(found) = &output.diagnostics {
            text += &report::diagnostics(found);
        }
        if let Some(found) = &output.quantization {
            text += &report::quantization(found);
        }
        if let Some(found) = &output.training {
            text += &report::training(found);
        }
        if let Some(found) = &output.reductions {
            text += &report::reductions(found);
        }
        if let Some(found) = &output.adaptation {
            text += &report::adaptation(found);
        }
        if let Some(found) = &output.seen {
            text += &report::seen(found);
        }
        if !output.tensors.is_empty() {
            let mut table = Table::new(&[
                ("  tensor", Align::Left),
                ("dtype", Align::Left),
                ("bits", Align::Right),
                ("bytes", Align::Right),
                ("shape", Align::Left),
            ]);
            for tensor in &output.tensors {
                let bits = tensor.bits.map_or_else(String::new, |bits| bits.to_string());
                let size = tensor.bytes.map_or_else(String::new, |size| size.to_string());
                table.row([
                    format!("  {}", tensor.name),
                    tensor.dtype.clone(),
                    bits,
                    size,
                    format!("{:?}", tensor.shape),
                ]);
            }
            text += &table.to_string();
        }
        for file in &output.files {
            text += &format!("  {} {} blake3:{}\n", file.name, bytes(file.bytes), shorten(&file.digest));
        }
        if let Some(plain) = output.f32_bytes {
            text += &format!("  {} tensors, {} in single precision", output.tensors.len(), bytes(plain));
            if output.stored_bytes > 0 {
                let shrunk = ratio(plain as f64 / output.stored_bytes as f64);
                text += &format!(", {} stored, {shrunk}", bytes(output.stored_bytes));
            }
            text.push('\n');
        }
        text
    }
}
