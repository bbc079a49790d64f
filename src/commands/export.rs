//! `merganser export`: a stage's output as ordinary files. Stored bytes are cloned or copied, views are computed.

use super::setup;
use crate::cli::{ExportArgs, Global};
use crate::engine::{self, Forecast};
use crate::exit::{ExitCode, Failure, Result};
use crate::report::{bytes, own_files};
use blake3::Hash;
use merganser_cache::{ExportMode, Store};
use merganser_stages::{Content, OpenFiles, StageError};
use merganser_tensors::manifest::{self, Layout};
use merganser_tensors::writer::{Block, OutputTensor, Payload, WriteOptions, write_tensors};
use merganser_tensors::{DType, Manifest, Scratch};
use std::path::{Path, PathBuf};

pub fn export(global: &Global, args: &ExportArgs) -> Result<ExitCode> {
    setup::stop_on_interrupt();
    let pipeline = setup::load_pipeline(global, &args.pipeline)?;
    let workspace = setup::open_workspace(global)?;
    let selection = setup::select(&pipeline, &args.stage)?;
    let resolver = setup::resolver(&workspace, &pipeline, &[selection], &[], Box::new(|_, _, _| ()))?;
    let planned = setup::plan(&resolver)?;
    let asked = planned.iter().filter(|unit| resolver.selected[unit.id]);
    let asked: Vec<_> = asked.filter(|unit| !resolver.units.entries[unit.id].is_part()).collect();
    if let Some(unit) = asked.iter().find(|unit| unit.forecast != Forecast::Cached) {
        return Err(Failure::user_help(
            format!("`{}` is not in the cache ({})", unit.name, unit.reason),
            Some(format!(
                "`merganser run {} --stage {}` computes it",
                args.pipeline.file.display(),
                args.stage
            )),
        ));
    }
    let mut exported = Vec::new();
    for unit in asked {
        let Some(artifact) = unit.artifact else { continue };
        let name = file_name(&unit.name.to_string());
        match resolver.units.instance(unit.id).content {
            Content::Checkpoint
            | Content::TaskVectors
            | Content::Masks
            | Content::Basis
            | Content::Coefficients
            | Content::Statistics => {
                exported.extend(export_tensors(
                    &workspace.store,
                    &artifact,
                    &args.dir,
                    &name,
                    args.overwrite,
                )?);
            }
            Content::Scores | Content::Graph | Content::Files => {
                exported.extend(place_blobs(&workspace.store, &artifact, &args.dir.join(&name))?);
            }
        }
    }
    if args.pipeline.json {
        let files: Vec<String> = exported.iter().map(|path| path.display().to_string()).collect();
        outln!("{}", serde_json::to_string_pretty(&files).map_err(Failure::failed)?);
    } else {
        for path in &exported {
            let size = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
            outln!("{} ({})", path.display(), bytes(size));
        }
    }
    Ok(ExitCode::Done)
}

/// `packed[bits=3,digits]` as a file name: `packed-bits=3-digits`.
fn file_name(unit: &str) -> String {
    unit.replace(['[', ','], "-").replace(['/', '\\', '"'], "_").replace(']', "")
}

/// Puts the blobs of an artifact into a folder under their names. A file that holds the same bytes already is left alone.
pub fn place_blobs(store: &Store, artifact: &Hash, folder: &Path) -> Result<Vec<PathBuf>> {
    place_blobs_in(store, artifact, &|_| folder)
}

/// [`place_blobs`] into the folder that each name has.
pub fn place_blobs_in<'a>(
    store: &Store,
    artifact: &Hash,
    folder: &dyn Fn(&str) -> &'a Path,
) -> Result<Vec<PathBuf>> {
    let found = store.load_artifact(artifact)?;
    let mut placed = Vec::new();
    for blob in &found.blobs {
        let folder = folder(&blob.name);
        fs_err::create_dir_all(folder).map_err(Failure::failed)?;
        let path = folder.join(&blob.name);
        let same = path.is_file()
            && store.digest_file(&path, &|_| ()).is_ok_and(|digest| digest.digest == blob.digest);
        if !same {
            if path.exists() {
                fs_err::remove_file(&path).map_err(Failure::failed)?;
            }
            store.export_blob(&blob.digest, blob.size, &path, ExportMode::Own)?;
        }
        placed.push(path);
    }
    Ok(placed)
}

fn export_tensors(
    store: &Store,
    artifact: &Hash,
    dir: &Path,
    name: &str,
    overwrite: bool,
) -> Result<Vec<PathBuf>> {
    fs_err::create_dir_all(dir).map_err(Failure::failed)?;
    let found = store.load_artifact(artifact)?;
    let manifest = Manifest::from_json(found.manifest.as_bytes()).map_err(Failure::failed)?;
    let path = dir.join(format!("{name}.safetensors"));
    if path.exists() {
        if !overwrite {
            return Err(Failure::user_help(
                format!("`{}` is already there", path.display()),
                Some("`--overwrite` replaces it"),
            ));
        }
        fs_err::remove_file(&path).map_err(Failure::failed)?;
    }
    let mut written = vec![path.clone()];
    match (own_files(&found).collect::<Vec<_>>().as_slice(), manifest.layout()) {
        // One byte per entry is what other programs read.
        _ if manifest.content() == manifest::Content::Masks => {
            materialize(store, &manifest, &path).map_err(|error| Failure::failed(error.with_causes()))?;
        }
        ([blob], Layout::Packed { .. }) => {
            // The codes alone say nothing: the scales and widths are in the description.
            store.export_blob(&blob.digest, blob.size, &path, ExportMode::Own)?;
            let description = dir.join(format!("{name}.manifest.json"));
            fs_err::write(&description, &found.manifest).map_err(Failure::failed)?;
            written.push(description);
        }
        ([blob], Layout::Regions { .. }) => {
            store.export_blob(&blob.digest, blob.size, &path, ExportMode::Own)?;
        }
        // What views make of the bytes that they own (offsets, factors) is the artifact, not these bytes.
        _ => materialize(store, &manifest, &path).map_err(|error| Failure::failed(error.with_causes()))?,
    }
    Ok(written)
}

/// Computes a view into a file, which appears only when it is complete.
fn materialize(store: &Store, manifest: &Manifest, path: &Path) -> std::result::Result<(), StageError> {
    let files = OpenFiles::new(store);
    let source = merganser_tensors::open(manifest, &files)?;
    let is_mask = manifest.content() == manifest::Content::Masks;
    let outputs: Vec<OutputTensor> = source
        .tensors()
        .iter()
        .map(|info| {
            let computed = match manifest.layout() {
                Layout::Linear { .. } | Layout::LowRank { .. } => true,
                Layout::Masked { .. } => info.dtype.is_float(),
                _ => false,
            };
            let payload = if is_mask {
                Payload::Bytes(DType::BOOL)
            } else if computed {
                Payload::Values(DType::F32)
            } else {
                Payload::Bytes(info.dtype)
            };
            OutputTensor { name: info.name.clone(), shape: info.shape.clone(), payload }
        })
        .collect();
    let staged = path.with_extension("safetensors.part");
    let mut out = std::io::BufWriter::new(fs_err::File::create(&staged)?);
    let options = WriteOptions {
        cancelled: &engine::cancelled,
        tensor_digests: false,
        metadata: Some(("format", "pt")),
        ..WriteOptions::default()
    };
    let fill =
        |tensor: usize, range: std::ops::Range<usize>, block: Block<'_>, scratch: &mut Scratch| match block {
            Block::Values(values) => source.read_f32(tensor, range, values, scratch),
            Block::Bytes(bytes) if is_mask => {
                let mut values = scratch.take(range.len());
                source.read_f32(tensor, range, &mut values, scratch)?;
                bytes.iter_mut().zip(&values).for_each(|(byte, value)| *byte = u8::from(*value != 0.0));
                scratch.give_back(values);
                Ok(())
            }
            Block::Bytes(bytes) => {
                let size = source.tensors()[tensor].dtype.size_bytes() as u64;
                source.read_bytes(tensor, range.start as u64 * size..range.end as u64 * size, bytes, scratch)
            }
        };
    let result = write_tensors(&mut out, &outputs, fill, &options).map_err(StageError::from);
    let result =
        result.and_then(|_| files.check_unchanged()).and_then(|()| Ok(fs_err::rename(&staged, path)?));
    if result.is_err() {
        // Half a file helps nobody; if it cannot be removed either, the error that is reported says enough.
        let _ = std::fs::remove_file(&staged);
    }
    result
}
