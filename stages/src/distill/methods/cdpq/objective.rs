//! `cdpq` as an objective of training: what a batch feeds, what is remembered of losses, and the reduction at the end of an epoch.

use super::activations::{self, QuantizedActivation};
use super::confidence::{Layer, Reduction, average_bits, bits_per_weight};
use super::layers::{self, Feature, QuantizedConstant, QuantizedLayer};
use super::params::CdpqParams;
use super::record::{BitReductions, EpochWidths, LayerWidth};
use super::student::{Blueprint, StudentGraph, levels_input, step_input};
use super::teacher::Teacher;
use crate::distill::method::Setup;
use crate::distill::trainer::{Batch, Current, Epoch, Objective, Values};
use crate::{StageError, checkpoint};
use merganser_onnx::gradient::Differentiated;
use merganser_onnx::train::Tensors;
use merganser_onnx::{Input, Runtime, Session, Slot, Weights};
use ndarray::{Array1, ArrayView, IxDyn};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};

pub(super) struct Progressive<'a> {
    params: &'a CdpqParams,
    setup: &'a Setup<'a>,
    model: &'a checkpoint::Weights,
    runtime: Runtime,
    /// The shape of one image.
    image: Vec<usize>,
    quantized: Vec<QuantizedLayer>,
    features: Vec<Feature>,
    constants: Vec<QuantizedConstant>,
    activations: Vec<QuantizedActivation>,
    /// Tensors that are trained.
    trained: BTreeSet<String>,
    teacher: Teacher,
    /// By the number of images of a graph.
    losses: HashMap<usize, Losses>,
    evaluators: HashMap<usize, Evaluator>,
    memory: Memory,
}

/// What a run that goes on has to know.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Memory {
    layers: Vec<Layer>,
    epochs: Vec<EpochWidths>,
    /// Of this epoch so far: Σ loss · images by what it comes from, and images.
    sums: BTreeMap<String, f64>,
    images: u64,
}

/// Where the losses of a graph come out.
#[derive(Clone)]
struct Losses {
    features: Vec<String>,
    logits: Option<String>,
}

/// The student without gradients, ready to run.
struct Evaluator {
    graph: Differentiated,
    session: Session,
}

/// What is trained: tensors of the checkpoint, and steps of activations as graphs take them.
struct Fixed<'t> {
    trained: &'t Tensors,
    steps: Values,
}

/// What the loss of logits is called among those of features.
const LOGITS: &str = "logits";

impl<'a> Progressive<'a> {
    pub(super) fn new(
        params: &'a CdpqParams,
        setup: &'a Setup<'a>,
        model: &'a checkpoint::Weights,
        teacher: &checkpoint::Weights,
    ) -> Result<Self, StageError> {
        let (job, evaluation) = (setup.job, &setup.evaluation);
        let (graph, input) = evaluation.graph()?;
        let modules = graph.modules()?;
        let shape = |tensor: &str| model.shape(tensor);
        let admits = |tensor: &str| params.layers.admits(tensor);
        let quantized = layers::layers(&modules, shape, admits, params.split_qkv);
        if quantized.is_empty() {
            return Err(StageError::input_help(
                "no layer of the graph is to be quantized",
                "`layers` takes globs over names of tensors: `*.attn.*`, not `attn`",
            ));
        }
        let features =
            layers::features(&params.features, &quantized, &modules, |name| graph.values_named(name))?;
        let slots = graph.prepared().slots();
        let constants = layers::constants(slots, &quantized, shape)?;
        let tensors = slots.iter().flat_map(|slot| slot.source.tensors());
        let trained = tensors.filter(|tensor| setup.filter.admits(tensor)).map(str::to_owned).collect();
        let activations = match &params.activations {
            Some(params) => activations::find(params, setup, model, &quantized, &modules)?,
            None => Vec::new(),
        };
        let one = evaluation.images(&setup.images[..1], Vec::new())?;
        let layer = |layer: &QuantizedLayer| Layer {
            name: layer.name.clone(),
            bits: params.start_bits,
            weights: (layer.rows.len() * layer.columns) as u64,
            history: Vec::new(),
            reduced_at: 0,
        };
        let memory = Memory { layers: quantized.iter().map(layer).collect(), ..Memory::default() };
        let runtime = job.services.runtime(job.notify)?;
        let logits = (params.losses.logits > 0.0).then(|| evaluation.output()).transpose()?;
        let pieces = features.iter().flat_map(|feature| &feature.pieces);
        let compared: BTreeSet<&str> = pieces.map(|piece| piece.value.as_str()).chain(logits).collect();
        let teacher = Teacher::new(job, graph, input, teacher, compared.into_iter().collect())?;
        Ok(Self {
            params,
            setup,
            model,
            runtime,
            image: one.shape()[1..].to_vec(),
            quantized,
            features,
            constants,
            activations,
            trained,
            teacher,
            losses: HashMap::new(),
            evaluators: HashMap::new(),
            memory,
        })
    }

    /// What is trained: tensors, and steps of activations.
    pub(super) fn values(&self) -> Result<Tensors, StageError> {
        let steps = self.activations.iter();
        let steps = steps.map(|activation| Ok((step_input(&activation.value), vec![activation.step])));
        let tensors = self.trained.iter().map(|name| Ok((name.clone(), self.model.values(name)?)));
        tensors.chain(steps).collect()
    }

    /// What is to be told of the whole run.
    pub(super) fn finish(mut self, trained: &Tensors) -> Result<BitReductions, StageError> {
        let layers = std::mem::take(&mut self.memory.layers);
        let loss = self.evaluate(&layers, &self.fixed(trained))?;
        let step = |activation: QuantizedActivation| {
            let step = activation.fed(trained).1.first().copied().unwrap_or(activation.step);
            QuantizedActivation { step, ..activation }
        };
        let widths = layers.iter().zip(&self.quantized).map(|(layer, quantized)| LayerWidth {
            name: layer.name.clone(),
            tensor: quantized.tensor.clone(),
            bits: layer.bits,
            rows: quantized.rows.len() as u64,
            weights: layer.weights,
        });
        Ok(BitReductions {
            layers: widths.collect(),
            average_bits: average_bits(&layers),
            bits_per_weight: bits_per_weight(&layers),
            loss,
            activations: self.activations.into_iter().map(step).collect(),
            epochs: self.memory.epochs,
        })
    }

    fn blueprint(&self) -> Result<Blueprint<'_>, StageError> {
        let (graph, input) = self.setup.evaluation.graph()?;
        Ok(Blueprint {
            runtime: &self.runtime,
            prepared: graph.prepared(),
            input,
            image: &self.image,
            output: self.setup.evaluation.output()?,
            features: &self.features,
            constants: &self.constants,
            activations: &self.activations,
            losses: &self.params.losses,
            compared: self.teacher.compared(),
            scratch: self.setup.job.staging.path()?,
        })
    }

    fn is_trained(&self, slot: &Slot) -> bool {
        slot.source.tensors().into_iter().any(|tensor| self.trained.contains(tensor))
    }

    /// The highest code of every channel, for the constants of the graph.
    fn levels(&self, layers: &[Layer]) -> Values {
        let bits: Vec<u8> = layers.iter().map(|layer| layer.bits).collect();
        let levels = |constant: &QuantizedConstant| Array1::from(constant.levels(&bits)).into_dyn();
        self.constants.iter().map(|constant| (levels_input(&constant.name), levels(constant))).collect()
    }

    /// What is trained, as graphs without gradients are fed with it.
    fn fixed<'t>(&self, trained: &'t Tensors) -> Fixed<'t> {
        let steps = self.activations.iter().map(|activation| activation.fed(trained)).collect();
        Fixed { trained, steps }
    }

    /// The loss of the student with these widths and weights: the mean over the images for validation, or those trained on if there are none.
    fn evaluate(&mut self, layers: &[Layer], fixed: &Fixed<'_>) -> Result<f64, StageError> {
        let setup = self.setup;
        let (evaluation, images) = setup.validation().unwrap_or((&setup.evaluation, &setup.images));
        let mut fed = self.levels(layers);
        let mut sum = 0.0;
        let size = setup.training.micro_batch.unwrap_or(setup.training.batch_size) as usize;
        for (index, chunk) in images.chunks(size).enumerate() {
            if (setup.job.cancelled)() {
                return Err(StageError::Cancelled);
            }
            let batch = evaluation.images(chunk, Vec::new())?.into_dyn();
            let said = self.teacher.kept(index, &batch)?;
            self.ready(chunk.len())?;
            let evaluator = self.evaluators.get_mut(&chunk.len()).expect("it was made ready");
            fed.insert(evaluation.graph()?.1.to_owned(), batch);
            let loss = evaluator
                .run(&[&fed, &said, &fixed.steps], &Current { model: self.model, trained: fixed.trained })?;
            sum += f64::from(loss) * chunk.len() as f64;
        }
        Ok(sum / images.len().max(1) as f64)
    }

    /// Makes a graph for batches of that size.
    fn ready(&mut self, n: usize) -> Result<(), StageError> {
        if self.evaluators.contains_key(&n) {
            return Ok(());
        }
        let StudentGraph { graph, .. } = self.blueprint()?.evaluation(n, |slot| self.is_trained(slot))?;
        let job = self.setup.job;
        let session = job.services.gradient_session(graph.prepared(), self.model, job.threads, job.notify)?;
        self.evaluators.insert(n, Evaluator { graph, session });
        Ok(())
    }

    /// Whether layers may lose bits at the end of an epoch.
    fn reduces_after(&self, epoch: u64) -> bool {
        let last = u64::from(self.setup.training.epochs.saturating_sub(self.params.settle));
        epoch.is_multiple_of(u64::from(self.params.reduce_every)) && epoch <= last
    }

    fn reduce(&mut self, trained: &Tensors) -> Result<Reduction, StageError> {
        let fixed = self.fixed(trained);
        let policy = self.params.policy();
        let mut layers = std::mem::take(&mut self.memory.layers);
        let reduction = policy.reduce(&mut layers, |layers| self.evaluate(layers, &fixed));
        self.memory.layers = layers;
        reduction
    }
}

impl Evaluator {
    fn run(&mut self, fed: &[&Values], current: &Current<'_>) -> Result<f32, StageError> {
        let Self { graph, session } = self;
        let mut inputs: Vec<(&str, Input<'_>)> = fed
            .iter()
            .flat_map(|values| values.iter())
            .map(|(name, array)| (name.as_str(), Input::from(array.view())))
            .collect();
        // In the layout that the graph asks for, which need not be that of its constants.
        let weights = graph.trained_weights().iter().map(|slot| Ok((slot, slot.values(current)?)));
        let weights = weights.collect::<Result<Vec<_>, StageError>>()?;
        for (slot, values) in &weights {
            let view = ArrayView::from_shape(IxDyn(&slot.shape), values);
            let view = view.map_err(|error| StageError::Internal(error.to_string()))?;
            inputs.push((&slot.name, Input::from(view)));
        }
        let outputs = session.run(&inputs)?;
        let loss = outputs.iter().find(|(name, _)| name == graph.loss()).and_then(|(_, loss)| loss.first());
        loss.copied().ok_or_else(|| StageError::Internal("the graph gave no loss".to_owned()))
    }
}

impl Objective for Progressive<'_> {
    fn differentiate(&mut self, n: usize) -> Result<Differentiated, StageError> {
        let student = self.blueprint()?.training(n, |slot| self.is_trained(slot))?;
        let StudentGraph { graph, feature_losses, logits_loss } = student;
        self.losses.insert(n, Losses { features: feature_losses, logits: logits_loss });
        Ok(graph)
    }

    fn model(&self) -> &dyn Weights {
        self.model
    }

    fn feed(&mut self, batch: &Batch<'_>) -> Result<Values, StageError> {
        let images: Vec<usize> = batch.samples.iter().map(|&sample| self.setup.images[sample]).collect();
        let evaluation = &self.setup.evaluation;
        let batch = evaluation.images(&images, Vec::new())?.into_dyn();
        let mut fed = self.teacher.says(&batch)?;
        fed.extend(self.levels(&self.memory.layers));
        fed.insert(evaluation.graph()?.1.to_owned(), batch);
        Ok(fed)
    }

    fn seen(&mut self, batch: &Batch<'_>, outputs: &Values) -> Result<(), StageError> {
        let n = batch.samples.len();
        let loss = |output: &String| {
            let loss = outputs.get(output).and_then(|loss| loss.first().copied());
            loss.ok_or_else(|| StageError::Internal(format!("the graph did not give `{output}`")))
        };
        let Some(Losses { features, logits }) = self.losses.get(&n).cloned() else { return Ok(()) };
        let params = &self.params.losses;
        let memory = &mut self.memory;
        for (feature, output) in self.features.iter().zip(&features) {
            let loss = loss(output)?;
            if let Some(layer) = memory.layers.iter_mut().find(|layer| layer.name == feature.name) {
                layer.history.push(loss);
            }
            let part = f64::from(loss) * f64::from(params.weight(&feature.name));
            *memory.sums.entry(feature.name.clone()).or_default() += part * n as f64;
        }
        if let Some(output) = &logits {
            let part = f64::from(loss(output)?) * params.logits;
            *memory.sums.entry(LOGITS.to_owned()).or_default() += part * n as f64;
        }
        memory.images += n as u64;
        Ok(())
    }

    /// Steps stay above zero.
    fn constrain(&self, trained: &mut Tensors) {
        for activation in &self.activations {
            if let Some(step) = trained.get_mut(&step_input(&activation.value)) {
                for step in step.iter_mut() {
                    *step = step.max(f32::MIN_POSITIVE);
                }
            }
        }
    }

    fn epoch_ended(&mut self, epoch: &Epoch, trained: &mut Tensors) -> Result<bool, StageError> {
        let reduction = if self.reduces_after(epoch.epoch) { Some(self.reduce(trained)?) } else { None };
        let memory = &mut self.memory;
        let images = std::mem::take(&mut memory.images).max(1) as f64;
        let sums = std::mem::take(&mut memory.sums);
        memory.epochs.push(EpochWidths {
            epoch: epoch.epoch,
            loss: epoch.loss,
            contributions: sums.into_iter().map(|(name, sum)| (name, sum / images)).collect(),
            reduction,
            average_bits: average_bits(&memory.layers),
            bits_per_weight: bits_per_weight(&memory.layers),
        });
        Ok(true)
    }

    fn state(&self) -> serde_json::Value {
        serde_json::to_value(&self.memory).expect("names and finite numbers can be written")
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<(), StageError> {
        self.memory = serde_json::from_value(state)
            .map_err(|error| StageError::Internal(format!("a checkpoint cannot be read: {error}")))?;
        Ok(())
    }

    fn figure(&self) -> Option<(&'static str, f64)> {
        Some(("bits", bits_per_weight(&self.memory.layers)))
    }
}
