//! `export`: a model as files for other programs, in the cache and where the user wants them.
//!
//! The artifact holds the finished files. Copying them to `to` is the application's part and not part of the key. What was written is what
//! later stages read: a package is the checkpoint that its own bytes say, an ONNX file is what `evaluate` runs.
//!
//! A format is one file and one line in [`FORMATS`].

mod graph;
mod onnx;
mod package;
mod peft;
mod safetensors;

pub use graph::{ExportedForm, ExportedGraph};

use crate::kind::{
    Arity, Connection, Content, MethodDoc, Port, Ports, SourceFile, SourceSet, Stage, StageKind,
};
use crate::params::{FilePath, Params, Problem};
use crate::{Job, StageError};
use merganser_cache::Blob;
use std::io::Write;

pub(crate) struct Export;

/// What a model can be written as.
trait Format: Sync {
    /// What `format = "…"` says, and how it is described.
    fn document(&self) -> MethodDoc;

    /// Parses the stage's table, less `format`, reporting every mistake.
    fn parse(&self, params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>>;
}

/// All formats; the first is the default.
const FORMATS: &[&dyn Format] = &[&safetensors::SafeTensors, &package::Package, &onnx::Onnx, &peft::Peft];

const PORTS: &[Port] = &[
    Port {
        name: "model",
        doc: "the checkpoint (or task vectors) to write; a collection is written member by member",
        accepts: &[Content::Checkpoint, Content::TaskVectors],
        arity: Arity::PerMember,
        required: true,
    },
    Port {
        name: "origin",
        doc: "`onnx`: the checkpoint that the graph was exported from: tells which tensor is which initializer",
        accepts: &[Content::Checkpoint],
        arity: Arity::All,
        required: false,
    },
    Port {
        name: "statistics",
        doc: "`onnx`: what `calibrate` has seen of activations: layers with eight-bit weights take their inputs as bytes, within these ranges",
        accepts: &[Content::Statistics],
        arity: Arity::All,
        required: false,
    },
];

impl StageKind for Export {
    fn id(&self) -> &'static str {
        "export"
    }

    fn summary(&self) -> &'static str {
        "writes a model as files: safetensors, a packed package, ONNX, or an adapter"
    }

    fn ports(&self) -> Ports {
        Ports { named: PORTS, open: None }
    }

    fn method_key(&self) -> Option<&'static str> {
        Some("format")
    }

    fn methods(&self) -> Vec<MethodDoc> {
        FORMATS.iter().map(|format| format.document()).collect()
    }

    fn parse(&self, mut params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        let format = params
            .choose("format", FORMATS, |format| format.document().id, Some(FORMATS[0]))
            .map_err(|problem| vec![problem])?;
        format.parse(params)
    }
}

/// Refuses what a format has no use for.
fn only_model(inputs: &[Connection], format: &str) -> Result<(), Problem> {
    match inputs.iter().find(|input| input.port != "model") {
        None => Ok(()),
        Some(other) => {
            let message = format!("format `{format}` takes nothing on port `{}`", other.port);
            Err(Problem::new("wrong-content", message).help("format `onnx` does"))
        }
    }
}

/// The source set of files to put beside the model.
fn included(include: &[FilePath]) -> Result<Option<SourceSet>, StageError> {
    let files = include.iter().map(|file| {
        if !file.path.is_file() {
            return Err(StageError::MissingFile { parameter: "include".to_owned(), path: file.path.clone() });
        }
        let label = file.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(SourceFile { label, path: file.path.clone() })
    });
    let files = files.collect::<Result<Vec<_>, _>>()?;
    Ok((!files.is_empty()).then(|| SourceSet { parameter: "include".to_owned(), files }))
}

/// Writes the files to put beside the model.
fn write_included(job: &Job<'_>, blobs: &mut Vec<Blob>) -> Result<(), StageError> {
    for file in job.sources_of("include") {
        if blobs.iter().any(|blob| blob.name == file.label) {
            return Err(StageError::input(format!("`include` names two files `{}`", file.label)));
        }
        blobs.push(write_whole(job, &file.label, &job.read(file)?)?);
    }
    Ok(())
}

fn write_whole(job: &Job<'_>, name: &str, bytes: &[u8]) -> Result<Blob, StageError> {
    let mut writer = job.staging.writer(name)?;
    writer.write_all(bytes)?;
    Ok(writer.finish()?)
}
