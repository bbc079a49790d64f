//! What comes out: the base by reference, and beside it the adapter in PEFT's format.
//!
//! | blob | what it is |
//! |---|---|
//! | `adapter_model.safetensors` | factors, and whole tensors (`modules_to_save`), under PEFT's names |
//! | `adapter_config.json` | PEFT's configuration |
//! | `differences.safetensors` | trained whole tensors less those of the base, if there are any |
//! | `training.json` | how it was trained |
//!
//! The artifact is the checkpoint `base + scale·B·A + differences`, computed when it is read. A whole tensor comes out as
//! `f32(base + f32(trained − base))`, in the adapter too. Where the base has other names than the origin, or tensors that are no floats,
//! the sum is stored instead.

use super::LoraParams;
use super::factors::{Factors, Target};
use crate::distill::method::Setup;
use crate::distill::output;
use crate::distill::trainer::Training;
use crate::{Draft, Job, StageError, checkpoint};
use merganser_cache::Blob;
use merganser_onnx::train::Tensors;
use merganser_tensors::manifest::{Content, FileKind, FileRef, Term};
use merganser_tensors::views::LowRankTensor;
use merganser_tensors::writer::{OutputTensor, Payload, WriteOptions, Written, write_tensors};
use merganser_tensors::{DType, Manifest, Scratch, TensorInfo, TensorSource};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::ops::Range;

/// The names that PEFT gives the two files.
pub(crate) const ADAPTER: &str = "adapter_model.safetensors";
pub(crate) const CONFIG: &str = "adapter_config.json";

const DIFFERENCES: &str = "differences.safetensors";

/// What PEFT puts before the names of the base.
const PREFIX: &str = "base_model.model.";

/// Tensors to be written, with their shapes.
type Listed = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

pub(super) fn store(
    setup: &Setup<'_>,
    params: &LoraParams,
    factors: &Factors,
    whole: &Tensors,
    values: &Tensors,
    record: &Training,
) -> Result<Draft, StageError> {
    let job = setup.job;
    let differences: Tensors = whole
        .iter()
        .map(|(name, before)| {
            let after = &values[name];
            (name.clone(), after.iter().zip(before).map(|(after, before)| after - before).collect())
        })
        .collect();
    let added = |(difference, before): (&f32, &f32)| before + difference;
    let whole: Tensors = whole
        .iter()
        .map(|(name, before)| (name.clone(), differences[name].iter().zip(before).map(added).collect()))
        .collect();
    let modules = Modules::new(factors, &whole, &*setup.model)?;
    let (written, adapter) = write(job, ADAPTER, &modules.tensors(factors, values, &whole, &*setup.model)?)?;
    let config = modules.config(params, whole_text(job, &modules));
    let mut blobs = vec![adapter, write_bytes(job, CONFIG, config.as_bytes())?];
    let base = job.input("model")?.artifact;
    let manifest = job.files.manifest(&base)?;
    let tensors: Vec<TensorInfo> = setup.model.tensors().to_vec();
    let same = tensors.len() == manifest.tensors().len()
        && tensors.iter().all(|info| manifest.tensors().iter().any(|entry| entry.name == info.name));
    if !same || tensors.iter().any(|info| !info.dtype.is_float()) {
        let mut changed = factors.merged(values);
        changed.extend(whole);
        let draft = output::store(job, &*setup.model, &changed, record)?;
        blobs.extend(draft.blobs);
        return Ok(Draft { blobs, ..draft });
    }
    let adapter = described(written, &blobs[0])?;
    let products = factors.targets.iter().map(|target| {
        let (left, right) = modules.factors(&target.name);
        let info = TensorInfo { name: target.name.clone(), dtype: DType::F32, shape: target.shape.clone() };
        (info, LowRankTensor { left, right, scale: factors.scale, transposed: false })
    });
    let products = Manifest::low_rank(Content::TaskVectors, adapter.view_digest(), products.collect())?;
    let products = products.with_views(vec![adapter])?;
    let mut terms = vec![
        Term::new(1.0, base),
        Term { coefficient: 1.0, artifact: products.view_digest(), partial: true },
    ];
    let mut views = vec![products];
    if !differences.is_empty() {
        let shape = |name: &String| shape_of(&*setup.model, name);
        let listed =
            differences.into_iter().map(|(name, values)| Ok((name.clone(), (shape(&name)?, values))));
        let (written, blob) = write(job, DIFFERENCES, &listed.collect::<Result<Listed, StageError>>()?)?;
        let differences = described(written, &blob)?;
        terms.push(Term { coefficient: 1.0, artifact: differences.view_digest(), partial: true });
        views.push(differences);
        blobs.push(blob);
    }
    let plain = tensors.into_iter().map(|info| TensorInfo { dtype: DType::F32, ..info }).collect();
    let manifest = Manifest::linear(Content::Checkpoint, plain, terms)?.with_views(views)?;
    blobs.push(record.write(job.staging)?);
    Ok(Draft { blobs, ..checkpoint::view(&manifest) })
}

/// Tells about tensors that PEFT has no way to put back; returns the modules that it has.
fn whole_text(job: &Job<'_>, modules: &Modules) -> Vec<String> {
    let lost: Vec<&str> = modules.parameters.iter().map(String::as_str).collect();
    if !lost.is_empty() {
        let names = lost.join("`, `");
        job.warn(format!(
            "`{names}` are parameters of the model itself: they are in the adapter, but PEFT puts back whole modules only"
        ));
    }
    modules.whole.iter().cloned().collect()
}

fn shape_of(model: &dyn TensorSource, name: &str) -> Result<Vec<usize>, StageError> {
    let tensor = model.index_of(name);
    let tensor = tensor.ok_or_else(|| StageError::Internal(format!("there is no tensor `{name}`")))?;
    Ok(model.tensors()[tensor].shape.clone())
}

fn write(job: &Job<'_>, name: &str, tensors: &Listed) -> Result<(Written, Blob), StageError> {
    let outputs: Vec<OutputTensor> = tensors
        .iter()
        .map(|(name, (shape, _))| OutputTensor {
            name: name.clone(),
            shape: shape.clone(),
            payload: Payload::Values(DType::F32),
        })
        .collect();
    let values: Vec<&[f32]> = tensors.values().map(|(_, values)| values.as_slice()).collect();
    let fill =
        |tensor: usize, range: Range<usize>, block: merganser_tensors::writer::Block<'_>, _: &mut Scratch| {
            if let merganser_tensors::writer::Block::Values(out) = block {
                out.copy_from_slice(&values[tensor][range]);
            }
            Ok(())
        };
    let mut writer = job.staging.writer(name)?;
    // What transformers and PEFT ask for.
    let options = WriteOptions { metadata: Some(("format", "pt")), ..WriteOptions::default() };
    let written = write_tensors(&mut writer, &outputs, fill, &options)?;
    Ok((written, writer.finish()?))
}

fn write_bytes(job: &Job<'_>, name: &str, bytes: &[u8]) -> Result<Blob, StageError> {
    let mut writer = job.staging.writer(name)?;
    writer.write_all(bytes)?;
    Ok(writer.finish()?)
}

fn described(written: Written, blob: &Blob) -> Result<Manifest, StageError> {
    let file = FileRef { digest: blob.digest, size: blob.size, kind: FileKind::Blob };
    Ok(written.into_manifest(Content::Checkpoint, file)?)
}

/// What PEFT calls the parts of a model.
struct Modules {
    /// By adapted tensor: the module as factors name it, and as `target_modules` does.
    adapted: BTreeMap<String, (String, String)>,
    /// Modules that are trained as a whole.
    whole: BTreeSet<String>,
    /// Whole tensors that belong to no module.
    parameters: BTreeSet<String>,
}

impl Modules {
    fn new(factors: &Factors, whole: &Tensors, model: &dyn TensorSource) -> Result<Self, StageError> {
        let names: BTreeSet<&str> = factors.targets.iter().map(|target| target.name.as_str()).collect();
        let mut adapted = BTreeMap::new();
        for name in &names {
            let module = if let Some(attention) = name.strip_suffix(".in_proj_weight") {
                // `nn.MultiheadAttention` is wrapped as one module with both projections.
                if !names.contains(format!("{attention}.out_proj.weight").as_str()) {
                    return Err(StageError::input_help(
                        format!("`{name}` gets factors, `{attention}.out_proj.weight` does not"),
                        "they are one module to PEFT: have both in `targets`, or neither",
                    ));
                }
                (attention.to_owned(), attention.to_owned())
            } else {
                let module = name.strip_suffix(".weight").ok_or_else(|| {
                    StageError::input_help(
                        format!("tensor `{name}` is not the weight of a module: it cannot have factors"),
                        "leave it out of `targets`; `train` trains a tensor as a whole",
                    )
                })?;
                match module.strip_suffix(".out_proj") {
                    Some(attention) if names.contains(format!("{attention}.in_proj_weight").as_str()) => {
                        (format!("{attention}.base_layer.out_proj"), attention.to_owned())
                    }
                    _ => (module.to_owned(), module.to_owned()),
                }
            };
            adapted.insert((*name).to_owned(), module);
        }
        let (mut modules, mut parameters) = (BTreeSet::new(), BTreeSet::new());
        for name in whole.keys() {
            match name.rsplit_once('.') {
                Some((module, "weight" | "bias")) => drop(modules.insert(module.to_owned())),
                _ => drop(parameters.insert(name.clone())),
            }
        }
        debug_assert!(whole.keys().all(|name| model.index_of(name).is_some()));
        Ok(Self { adapted, whole: modules, parameters })
    }

    /// The names of B and A.
    fn factors(&self, name: &str) -> (String, String) {
        let (module, _) = &self.adapted[name];
        (format!("{PREFIX}{module}.lora_B.weight"), format!("{PREFIX}{module}.lora_A.weight"))
    }

    /// Everything that is in the file: factors, and all tensors of modules that are trained as a whole.
    fn tensors(
        &self,
        factors: &Factors,
        values: &Tensors,
        whole: &Tensors,
        model: &dyn TensorSource,
    ) -> Result<Listed, StageError> {
        let mut listed = Listed::new();
        for target in &factors.targets {
            let (left, right) = self.factors(&target.name);
            let [a, b] = target.inputs();
            let (left_shape, right_shape) = shapes(target, factors.rank);
            listed.insert(left, (left_shape, values[&b].clone()));
            listed.insert(right, (right_shape, values[&a].clone()));
        }
        for (tensor, info) in model.tensors().iter().enumerate() {
            let is_of_module =
                info.name.rsplit_once('.').is_some_and(|(module, _)| self.whole.contains(module));
            if !is_of_module && !self.parameters.contains(&info.name) {
                continue;
            }
            let mut values = vec![0.0; info.n_elements()];
            match whole.get(&info.name) {
                Some(trained) => values.clone_from(trained),
                None => model.read_f32(tensor, 0..values.len(), &mut values, &mut Scratch::default())?,
            }
            listed.insert(format!("{PREFIX}{}", info.name), (info.shape.clone(), values));
        }
        Ok(listed)
    }

    /// `adapter_config.json`, with what PEFT writes by default.
    fn config(&self, params: &LoraParams, whole: Vec<String>) -> String {
        let targets: BTreeSet<&String> = self.adapted.values().map(|(_, module)| module).collect();
        let config = serde_json::json!({
            "alpha_pattern": {},
            "base_model_name_or_path": null,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": params.alpha(),
            "lora_dropout": params.dropout,
            "modules_to_save": if whole.is_empty() { None } else { Some(whole) },
            "peft_type": "LORA",
            "r": params.rank,
            "rank_pattern": {},
            "target_modules": targets,
            "task_type": null,
            "use_dora": false,
            "use_rslora": false,
        });
        format!("{config:#}\n")
    }
}

/// Shapes of B and A in a file: of a kernel, B is 1×1.
fn shapes(target: &Target, rank: usize) -> (Vec<usize>, Vec<usize>) {
    let rest = &target.shape[1..];
    let ones = rest[1..].iter().map(|_| 1);
    let left = [target.outputs, rank].into_iter().chain(ones).collect();
    let right = std::iter::once(rank).chain(rest.iter().copied()).collect();
    (left, right)
}
