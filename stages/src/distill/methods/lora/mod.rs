//! `lora`: low-rank factors beside frozen weights (Hu et al., LoRA, arXiv:2106.09685, §4.1).
//!
//! For an adapted weight W [outputs, inputs], y = x·Wᵀ becomes y = x·Wᵀ + s·(dropout(x)·Aᵀ)·Bᵀ with A [r, inputs], B [outputs, r] and
//! s = alpha / r. The branch runs beside the product, so no gradient of W is ever computed. A begins as PEFT's does, uniform within
//! ±1/√inputs, B as zero: the model begins as it is.
//!
//! The base is what comes in on port `model`: packed weights are unpacked once, and stay as they are (QLoRA, Dettmers et al.,
//! arXiv:2305.14314, §3). The result is a view: the base by reference, and the factors.
//!
//! Dropout masks are fed: 0 or 1/(1 − p), from a counter-based stream that seed, product, step and place name, so they depend on nothing
//! else.

mod adapter;
mod factors;

pub(crate) use adapter::{ADAPTER, CONFIG};

use crate::distill::classifier::Classifier;
use crate::distill::method::{Distill, Method, Setup};
use crate::distill::trainer::{self, Batch, Current, Objective, Trained, Training, Validation, Values};
use crate::filter::NameGlob;
use crate::params::{Params, Problem, parse, to_value};
use crate::{Draft, StageError, checkpoint};
use factors::{Factors, Target};
use merganser_cache::Value;
use merganser_onnx::gradient::{Differentiated, losses};
use merganser_onnx::train::Tensors;
use merganser_onnx::{Slot, Weights};
use merganser_tensors::TensorInfo;
use merganser_tensors::kernels::random::{Stream, happens, threshold};
use ndarray::{ArrayD, IxDyn};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

pub(in crate::distill) struct Lora;

/// The projections of attention, as timm, transformers and open_clip name them.
const ATTENTION: &[&str] = &[
    "*.attn.qkv.weight",
    "*.attn.proj.weight",
    "*.{q,k,v,out}_proj.weight",
    "*.in_proj_weight",
    "*.attention.{query,key,value}.weight",
    "*.attention.output.dense.weight",
];

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct LoraParams {
    /// r, the rank of the factors.
    #[serde(default = "usual_rank")]
    rank: u32,
    /// The factors' product counts alpha / r (default: 2·r).
    #[serde(default)]
    alpha: Option<f64>,
    /// The share of the factors' inputs that is left out of every step at random.
    #[serde(default)]
    dropout: f64,
    /// The weights that get factors (default: the projections of attention, by the names of timm, transformers and open_clip).
    #[serde(default = "usual_targets")]
    targets: Vec<NameGlob>,
    /// Tensors that are trained as a whole beside the factors, such as a classifier that a new dataset needs: `["head.*"]` (PEFT's
    /// `modules_to_save`).
    #[serde(default)]
    train: Vec<NameGlob>,
    /// How much of a label's probability is spread over all classes.
    #[serde(default)]
    label_smoothing: f64,
}

fn usual_rank() -> u32 {
    8
}

fn usual_targets() -> Vec<NameGlob> {
    ATTENTION.iter().map(|glob| NameGlob::new(glob).expect("these globs are valid")).collect()
}

impl Method for Lora {
    fn id(&self) -> &'static str {
        "lora"
    }

    fn summary(&self) -> &'static str {
        "trains low-rank factors beside frozen weights, which may be packed; the result is the base and the factors"
    }

    fn formula(&self) -> &'static str {
        "W' = W + (alpha / r)·B·A; L = CE(softmax z, y)"
    }

    fn source(&self) -> &'static str {
        "Hu et al., LoRA, arXiv:2106.09685, §4.1; Dettmers et al., QLoRA, arXiv:2305.14314, §3; initial values and files as PEFT"
    }

    fn schema(&self) -> Schema {
        schema_for!(LoraParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Distill>, Vec<Problem>> {
        let span_of = |key: &str| params.table.get(key).map_or(params.span, |entry| entry.node.span);
        let parsed: LoraParams = parse(params)?;
        let mut problems = Vec::new();
        let mut complain = |key: &str, message: String| {
            problems.push(Problem::new("bad-value", message).at(span_of(key)));
        };
        if parsed.rank == 0 {
            complain("rank", "`rank` must be at least 1, got 0".to_owned());
        }
        if let Some(alpha) = parsed.alpha.filter(|alpha| !(*alpha > 0.0 && alpha.is_finite())) {
            complain("alpha", format!("`alpha` must be above zero, got {alpha}"));
        }
        if !(0.0..1.0).contains(&parsed.dropout) {
            complain("dropout", format!("`dropout` must be at least 0 and below 1, got {}", parsed.dropout));
        }
        if !(0.0..=1.0).contains(&parsed.label_smoothing) {
            let message = format!("`label_smoothing` must be from 0 to 1, got {}", parsed.label_smoothing);
            complain("label_smoothing", message);
        }
        if problems.is_empty() { Ok(Box::new(parsed)) } else { Err(problems) }
    }
}

impl LoraParams {
    fn alpha(&self) -> f64 {
        self.alpha.unwrap_or(2.0 * f64::from(self.rank))
    }
}

impl Distill for LoraParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn run(&self, setup: &Setup<'_>) -> Result<Draft, StageError> {
        let job = setup.job;
        let model = checkpoint::Weights::new(Arc::clone(&setup.model));
        let classifier = Classifier::new(setup, &model)?;
        let listed = |globs: &[NameGlob], name: &str| {
            setup.filter.admits(name) && globs.iter().any(|glob| glob.matches(name))
        };
        let whole = classifier.tensors(&model, |name| listed(&self.train, name))?;
        let is_target = |name: &str| listed(&self.targets, name) && !whole.contains_key(name);
        let factors = Factors::new(
            classifier.tensors(&model, is_target)?,
            &model,
            self.rank as usize,
            self.alpha() / f64::from(self.rank),
        )?;
        let slots = classifier.slots(is_target)?;
        classifier.check(&model, &factors.merged(&factors.initial(setup.training.seed)))?;
        classifier.check(&model, &whole)?;
        let mut values = factors.initial(setup.training.seed);
        values.extend(whole.iter().map(|(name, values)| (name.clone(), values.clone())));
        let trained_slots = classifier.slots(|name| whole.contains_key(name))?;
        let trained_slots = trained_slots.into_iter().map(|slot| slot.name).collect();
        let mut objective = Adapted {
            params: self,
            seed: setup.training.seed,
            classifier: &classifier,
            model: &model,
            factors: &factors,
            slots,
            trained_slots,
            masks: BTreeMap::new(),
            classes: 0,
        };
        let n_samples = classifier.n_samples();
        let Trained { values, record } =
            trainer::train(job, job.preimage, setup.training, n_samples, values, &mut objective)?;
        let all: usize = setup.model.tensors().iter().map(TensorInfo::n_elements).sum();
        let record = Training {
            images: n_samples as u64,
            validation_images: classifier.n_validation() as u64,
            trained_values: values.values().map(Vec::len).sum::<usize>() as u64,
            frozen_values: (all - whole.values().map(Vec::len).sum::<usize>()) as u64,
            ..record
        };
        adapter::store(setup, self, &factors, &whole, &values, &record)
    }
}

/// A model with branches.
struct Adapted<'a> {
    params: &'a LoraParams,
    seed: u64,
    classifier: &'a Classifier<'a>,
    model: &'a checkpoint::Weights,
    factors: &'a Factors,
    /// Weights of the graph that get a branch.
    slots: Vec<Slot>,
    /// Weights of the graph that are trained as a whole.
    trained_slots: Vec<String>,
    /// By number of samples: inputs for dropout masks, and their shapes.
    masks: BTreeMap<usize, Vec<(String, Vec<usize>)>>,
    classes: usize,
}

/// What the graph is given beside images.
const TARGETS: &str = "merganser.targets";

impl Adapted<'_> {
    fn feed_masks(&self, batch: &Batch<'_>, fed: &mut Values) {
        let kept = threshold(1.0 - self.params.dropout);
        let factor = (1.0 / (1.0 - self.params.dropout)) as f32;
        for (name, shape) in self.masks.get(&batch.samples.len()).into_iter().flatten() {
            let mut words = vec![0u32; shape.iter().product()];
            let place = [batch.step.to_string(), batch.part.to_string()];
            Stream::new(self.seed, &["dropout", name, &place[0], &place[1]]).fill(0, &mut words);
            let values = words.into_iter().map(|word| if happens(word, kept) { factor } else { 0.0 });
            let mask = ArrayD::from_shape_vec(IxDyn(shape), values.collect()).expect("one value per element");
            fed.insert(name.clone(), mask);
        }
    }
}

impl Objective for Adapted<'_> {
    fn differentiate(&mut self, n: usize) -> Result<Differentiated, StageError> {
        let (mut forward, logits) = self.classifier.forward(n, &[])?;
        self.classes = logits.shape[1];
        let dropout = self.params.dropout > 0.0;
        self.masks.insert(n, self.factors.attach(&mut forward, &self.slots, dropout)?);
        let targets = forward.add_input(TARGETS, &logits.shape)?;
        let loss = losses::cross_entropy(forward.tape(), &logits, &targets)?;
        let names: Vec<String> = self.factors.targets.iter().flat_map(Target::inputs).collect();
        let variables: Vec<&str> = names.iter().chain(&self.trained_slots).map(String::as_str).collect();
        Ok(forward.differentiate(&loss, &variables, &[])?)
    }

    fn model(&self) -> &dyn Weights {
        self.model
    }

    fn feed(&mut self, batch: &Batch<'_>) -> Result<Values, StageError> {
        let mut fed = Values::from([self.classifier.feed(batch.samples)?]);
        let smoothing = self.params.label_smoothing as f32;
        fed.insert(TARGETS.to_owned(), self.classifier.targets(batch.samples, self.classes, smoothing));
        self.feed_masks(batch, &mut fed);
        Ok(fed)
    }

    fn validate(&mut self, trained: &Tensors) -> Result<Option<Validation>, StageError> {
        let mut changed = self.factors.merged(trained);
        let whole = trained.iter().filter(|(name, _)| !self.factors.owns(name));
        changed.extend(whole.map(|(name, values)| (name.clone(), values.clone())));
        self.classifier.validate(&Current { model: self.model, trained: &changed })
    }
}
