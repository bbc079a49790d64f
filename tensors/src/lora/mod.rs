//! PEFT LoRA adapters as task vectors, without computing anything until it is read.
//!
//! An adapter is `adapter_config.json` and `adapter_model.safetensors` (or `.bin`). For every adapted module it holds two factors, and the
//! difference from the base is
//!
//! ```text
//! ΔW = scale · B·A        scale = alpha / r, or alpha / √r with `use_rslora`
//! ```
//!
//! with `r` and `alpha` from `rank_pattern` and `alpha_pattern` where one matches the module. The arithmetic is that of
//! [`views::low_rank`](crate::views::low_rank): `f64` sums of exact products, one rounding to `f32` (PEFT computes the same in the
//! adapter's type).
//!
//! | factors | adapted tensor | ΔW |
//! |---|---|---|
//! | `M.lora_A.weight` `[r, in]`, `M.lora_B.weight` `[out, r]` | `M.weight` `[out, in]` | `B·A` |
//! | the same with `fan_in_fan_out` | `M.weight` `[in, out]` | `(B·A)ᵀ` |
//! | `M.lora_A.weight` `[r, in, …]`, `M.lora_B.weight` `[out, r, 1, …]` | convolution `M.weight` `[out, in, …]` | `B·A` over the flattened axes |
//! | `M.lora_embedding_A` `[r, n]`, `M.lora_embedding_B` `[d, r]` | embedding `M.weight` `[n, d]` | `(B·A)ᵀ` |
//! | `M.lora_A`, and `M.base_layer.out_proj.lora_A` beside it | `M.in_proj_weight`, `M.out_proj.weight` of `nn.MultiheadAttention` | `B·A` |
//!
//! `base_model.model.` before names and an adapter's name after `lora_A` are dropped, so tensors have the names of the base. A tensor that
//! the adapter does not touch is simply absent.
//!
//! Refused by name: DoRA (`lora_magnitude_vector`), other kinds of adapters, factors whose rank is not the configured one, and initializations
//! that change the base (PiSSA, OLoRA, CorDA, LoftQ). Whole tensors in the adapter (`modules_to_save`, trained biases) are not differences:
//! they are listed in [`Adapter::replaced`], and keeping one of them is refused, because what it changed is known only beside the base.
//!
//! Source: PEFT `tuners/lora/{config,layer,model}.py` and `utils/save_and_load.py`.

mod config;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blake3::Hash;

use crate::DType;
use crate::dtype::TensorInfo;
use crate::error::{Error, Result};
use crate::formats::{self, FilePart, Selection};
use crate::manifest::{Content, Manifest};
use crate::views::LowRankTensor;
pub use config::Settings;
use config::{Config, MAX_CONFIG_BYTES, Scaling};

/// The two files of an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterFiles {
    pub config: PathBuf,
    pub weights: PathBuf,
}

/// An adapter whose factors have been found and checked; nothing has been multiplied.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Sorted by name: the tensors of the base that it changes, and how.
    pub products: Vec<(TensorInfo, LowRankTensor)>,
    /// Tensors of the base that it replaces as a whole, sorted.
    pub replaced: Vec<String>,
    /// The file of weights and what lies in it.
    pub parts: Vec<FilePart>,
    pub settings: Settings,
    weights: PathBuf,
}

/// Why an adapter is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoraProblem {
    #[error("its configuration is not valid: {0}")]
    Config(String),
    #[error("its configuration has {actual} bytes, the limit is {limit}")]
    ConfigTooLarge { actual: u64, limit: u64 },
    #[error("it is of type `{0}`, only `LORA` is known")]
    OtherType(String),
    #[error("`{what}` is not supported: {why}")]
    Unsupported { what: &'static str, why: &'static str },
    #[error(
        "it was initialized by `{0}`, which changed the base: save it with `path_initial_model_for_weight_conversion`, which makes it relative to the original base"
    )]
    ChangedBase(String),
    #[error("pattern `{pattern}` cannot be read: {reason}")]
    Pattern { pattern: String, reason: String },
    #[error("tensor `{0}` belongs to DoRA, which rescales the whole weight and is not a sum with the base")]
    Dora(String),
    #[error("tensor `{0}` is not part of an adapter that is known here")]
    UnknownTensor(String),
    #[error("it holds several adapters: `{first}` and `{second}`; save one of them")]
    SeveralAdapters { first: String, second: String },
    #[error("tensor `{present}` has no counterpart `{missing}`")]
    Unpaired { present: String, missing: String },
    #[error("factors `{left}` {left_shape:?} and `{right}` {right_shape:?} do not fit: {reason}")]
    Factors { left: String, left_shape: Vec<usize>, right: String, right_shape: Vec<usize>, reason: String },
    #[error("two pairs of factors adapt `{0}`")]
    AdaptedTwice(String),
    #[error(
        "it replaces {names} as a whole (`modules_to_save` or trained biases), which is not a difference; `skip` them, or load a checkpoint with the adapter merged"
    )]
    Replaced { names: String },
}

/// What the configuration is called.
const CONFIG: &str = "adapter_config.json";

/// What weights are called, in the order in which PEFT looks for them.
const WEIGHTS: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];

/// Returns the files of the adapter at `path`: a folder, or its file of weights. `None` when it is something else.
pub fn locate(path: &Path) -> Option<AdapterFiles> {
    let (folder, candidates) = if path.is_dir() {
        (path, WEIGHTS.map(|name| path.join(name)).to_vec())
    } else {
        let name = path.file_name()?.to_str()?;
        (path.parent()?, WEIGHTS.contains(&name).then(|| path.to_owned()).into_iter().collect())
    };
    let config = Some(folder.join(CONFIG)).filter(|config| config.is_file())?;
    let weights = candidates.into_iter().find(|weights| weights.is_file())?;
    Some(AdapterFiles { config, weights })
}

/// Reads the configuration and the header of the weights, and pairs the factors.
pub fn describe(files: &AdapterFiles) -> Result<Adapter> {
    let problem = |problem: LoraProblem| Error::adapter(&files.weights, problem);
    let size = fs_err::metadata(&files.config)?.len();
    if size > MAX_CONFIG_BYTES {
        return Err(problem(LoraProblem::ConfigTooLarge { actual: size, limit: MAX_CONFIG_BYTES }));
    }
    let config = fs_err::read(&files.config)?;
    // As stored: what stands before the names says where they belong.
    let as_stored = Selection { key: None, strip_prefix: Some(String::new()) };
    let parts = formats::describe_selected(&files.weights, &as_stored)?;
    Adapter::new(&config, parts, &files.weights)
}

impl Adapter {
    /// Reads a configuration and pairs the factors among the tensors of `parts`; `weights` is for messages.
    pub fn new(config: &[u8], parts: Vec<FilePart>, weights: &Path) -> Result<Self> {
        let found = Config::parse(config).and_then(|config| {
            let infos: Vec<&TensorInfo> =
                parts.iter().flat_map(|part| &part.tensors).map(|tensor| &tensor.info).collect();
            Ok((pair(&infos, &config)?, config.settings()))
        });
        let ((products, replaced), settings) = found.map_err(|problem| Error::adapter(weights, problem))?;
        Ok(Self { products, replaced, parts, settings, weights: weights.to_owned() })
    }

    /// Describes the task vectors of those tensors that `keep` selects by name, given the digests of the files of
    /// [`parts`](Self::parts).
    pub fn manifest(&self, digests: &[Hash], keep: impl Fn(&str) -> bool) -> Result<Manifest> {
        let whole: Vec<&str> = self.replaced.iter().map(String::as_str).filter(|name| keep(name)).collect();
        if !whole.is_empty() {
            let names = crate::keymap::listed(whole);
            return Err(Error::adapter(&self.weights, LoraProblem::Replaced { names }));
        }
        let kept: Vec<_> = self.products.iter().filter(|(info, _)| keep(&info.name)).cloned().collect();
        let used =
            |name: &String| kept.iter().any(|(_, product)| product.left == *name || product.right == *name);
        let factors =
            Manifest::of_checkpoint(Content::Checkpoint, &self.parts, digests, |info| used(&info.name))?;
        Manifest::low_rank(Content::TaskVectors, factors.view_digest(), kept)?.with_views(vec![factors])
    }
}

/// The two factors of a module, as they are found.
#[derive(Default)]
struct Factors<'a> {
    left: Option<&'a TensorInfo>,
    right: Option<&'a TensorInfo>,
}

type Found = (Vec<(TensorInfo, LowRankTensor)>, Vec<String>);

fn pair(infos: &[&TensorInfo], config: &Config) -> Result<Found, LoraProblem> {
    let scaling = config.scaling()?;
    let mut modules: BTreeMap<(String, Kind), Factors<'_>> = BTreeMap::new();
    let mut replaced = Vec::new();
    let mut adapter: Option<String> = None;
    for &info in infos {
        let Some(name) = AdapterName::parse(&info.name)? else {
            replaced.extend(replaced_tensor(&info.name)?);
            continue;
        };
        if let Some(called) = name.adapter {
            match &adapter {
                Some(first) if first != called => {
                    let (first, second) = (first.clone(), called.to_owned());
                    return Err(LoraProblem::SeveralAdapters { first, second });
                }
                _ => adapter = Some(called.to_owned()),
            }
        }
        let factors = modules.entry((name.module.to_owned(), name.kind)).or_default();
        let place = if name.is_left { &mut factors.left } else { &mut factors.right };
        if place.replace(info).is_some() {
            return Err(LoraProblem::AdaptedTwice(name.module.to_owned()));
        }
    }
    let mut products = BTreeMap::new();
    for ((module, kind), factors) in &modules {
        let attention = modules.contains_key(&(format!("{module}{OUT_PROJ}"), Kind::Layer));
        let name = adapted_name(module, attention);
        let (left, right) = factors.both()?;
        let product = product(name.clone(), left, right, *kind, config.fan_in_fan_out, &scaling, module)?;
        if products.insert(name.clone(), product).is_some() {
            return Err(LoraProblem::AdaptedTwice(name));
        }
    }
    replaced.sort();
    Ok((products.into_values().collect(), replaced))
}

/// What kind of module the factors are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// A linear layer or a convolution.
    Layer,
    Embedding,
}

/// The name of a factor, taken apart.
struct AdapterName<'a> {
    /// Without `base_model.model.`.
    module: &'a str,
    kind: Kind,
    /// Whether it is `B`.
    is_left: bool,
    adapter: Option<&'a str>,
}

/// Where `nn.MultiheadAttention` keeps its output projection once it is wrapped.
const OUT_PROJ: &str = ".base_layer.out_proj";

impl<'a> AdapterName<'a> {
    /// `None` when it is not the name of a factor.
    fn parse(name: &'a str) -> Result<Option<Self>, LoraProblem> {
        const MARKS: [(&str, Kind, bool); 4] = [
            ("lora_A", Kind::Layer, false),
            ("lora_B", Kind::Layer, true),
            ("lora_embedding_A", Kind::Embedding, false),
            ("lora_embedding_B", Kind::Embedding, true),
        ];
        let segments: Vec<&str> = name.split('.').collect();
        if segments.contains(&"lora_magnitude_vector") {
            return Err(LoraProblem::Dora(name.to_owned()));
        }
        let mark = segments.iter().enumerate().rev().find_map(|(position, segment)| {
            let mark = MARKS.iter().find(|(mark, ..)| mark == segment)?;
            Some((position, *mark))
        });
        let Some((position, (mark, kind, is_left))) = mark else { return Ok(None) };
        let adapter = match (&segments[position + 1..], kind) {
            ([] | ["weight"], _) => None,
            ([adapter, "weight"], _) | ([adapter], Kind::Embedding) => Some(*adapter),
            _ => return Err(LoraProblem::UnknownTensor(name.to_owned())),
        };
        let before: usize = segments[..position].iter().map(|segment| segment.len() + 1).sum();
        debug_assert!(name[before..].starts_with(mark));
        let module = unwrapped(name[..before].trim_end_matches('.'));
        Ok(Some(Self { module, kind, is_left, adapter }))
    }
}

impl<'a> Factors<'a> {
    fn both(&self) -> Result<(&'a TensorInfo, &'a TensorInfo), LoraProblem> {
        let unpaired = |present: &TensorInfo, has: &str, lacks: &str| {
            let missing = present.name.replace(has, lacks);
            LoraProblem::Unpaired { present: present.name.clone(), missing }
        };
        match (self.left, self.right) {
            (Some(left), Some(right)) => Ok((left, right)),
            (Some(left), None) => Err(unpaired(left, "_B", "_A")),
            (None, Some(right)) => Err(unpaired(right, "_A", "_B")),
            (None, None) => Err(LoraProblem::UnknownTensor(String::new())),
        }
    }
}

/// Drops what PEFT puts before the names of the base.
fn unwrapped(name: &str) -> &str {
    name.strip_prefix("base_model.model.").unwrap_or(name)
}

/// The tensor of the base that a module's factors adapt.
fn adapted_name(module: &str, attention: bool) -> String {
    if let Some(parent) = module.strip_suffix(OUT_PROJ) {
        format!("{parent}.out_proj.weight")
    } else if attention {
        format!("{module}.in_proj_weight")
    } else {
        format!("{module}.weight")
    }
}

/// The tensor of the base that a whole tensor in an adapter replaces; `None` for one that is not used.
fn replaced_tensor(name: &str) -> Result<Option<String>, LoraProblem> {
    let segments: Vec<&str> = unwrapped(name).split('.').collect();
    if segments.iter().any(|segment| segment.contains("trainable_tokens") || segment.starts_with("lora_")) {
        return Err(LoraProblem::UnknownTensor(name.to_owned()));
    }
    if segments.contains(&"original_module") {
        return Ok(None);
    }
    let mut kept: Vec<&str> = Vec::with_capacity(segments.len());
    let mut segments = segments.into_iter();
    while let Some(segment) = segments.next() {
        match segment {
            "base_layer" => {}
            // followed by the adapter's name
            "modules_to_save" => drop(segments.next()),
            other => kept.push(other),
        }
    }
    Ok(Some(kept.join(".")))
}

fn product(
    name: String,
    left: &TensorInfo,
    right: &TensorInfo,
    kind: Kind,
    fan_in_fan_out: bool,
    scaling: &Scaling,
    module: &str,
) -> Result<(TensorInfo, LowRankTensor), LoraProblem> {
    let refused = |reason: String| LoraProblem::Factors {
        left: left.name.clone(),
        left_shape: left.shape.clone(),
        right: right.name.clone(),
        right_shape: right.shape.clone(),
        reason,
    };
    if let Some(other) = [left, right].into_iter().find(|factor| !factor.dtype.is_float()) {
        return Err(refused(format!("`{}` is {}", other.name, other.dtype)));
    }
    let ([out, left_rank, left_rest @ ..], [right_rank, right_rest @ ..]) =
        (&left.shape[..], &right.shape[..])
    else {
        return Err(refused("both must be matrices or kernels".to_owned()));
    };
    if left_rank != right_rank {
        return Err(refused(format!("their ranks are {left_rank} and {right_rank}")));
    }
    if right_rest.is_empty() || left_rest.len() + 1 != right_rest.len() {
        return Err(refused("they have different numbers of axes".to_owned()));
    }
    if left_rest.iter().any(|extent| *extent != 1) {
        return Err(refused("the kernel of `lora_B` must have one position".to_owned()));
    }
    let (rank, scale) = scaling.of(module);
    if rank != *left_rank as u64 {
        return Err(refused(format!("the configuration says rank {rank} for `{module}`")));
    }
    if !scale.is_finite() {
        return Err(refused(format!("the configuration gives factor {scale} for `{module}`")));
    }
    let transposed = kind == Kind::Embedding || fan_in_fan_out;
    let mut shape = vec![*out];
    shape.extend(right_rest);
    if transposed {
        if shape.len() != 2 {
            return Err(refused("`fan_in_fan_out` is for matrices".to_owned()));
        }
        shape.reverse();
    }
    let tensor = LowRankTensor { left: left.name.clone(), right: right.name.clone(), scale, transposed };
    Ok((TensorInfo { name, dtype: DType::F32, shape }, tensor))
}
