//! Zero-shot heads: class names in sentences, through CLIP's text tower.
//!
//! w_c = normalize(mean_t(normalize(text(template_t(class_c))))), and logits = s · x/‖x‖ · Wᵀ with s = exp(logit_scale) (Radford et al.,
//! arXiv:2103.00020, §3.1.4; openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb). Means and norms are in f64, in the order of the
//! templates.
//!
//! A head depends on the text tower alone, which most fine-tuning leaves as it is: it is kept under a key of its own, by the values of the
//! tensors that the text export is made of, so that all models with the same text tower share it.

use super::params::EvaluateParams;
use super::text::Tower;
use super::tokens::Tokens;
use crate::images::dataset::Dataset;
use crate::images::head::Head;
use crate::images::tasks;
use crate::job::ProgressUnit;
use crate::services::BoundGraph;
use crate::{Draft, Job, StageError, checkpoint};
use merganser_cache::{Preimage, Staging, Value};
use merganser_onnx::{Dimension, Input, Port, Session, Weights as _};
use ndarray::{Array1, Array2, ArrayD, Ix2};
use std::collections::BTreeMap;

/// Raised when the numbers change.
const VERSION: i64 = 1;

/// Texts per inference.
const BATCH: usize = 64;

/// What a transformers export calls the projected embeddings.
const EMBEDDINGS: &str = "text_embeds";

const BLOB: &str = "head.safetensors";

/// The head of a dataset's class names by the text tower of `model`, or of the origin if the parameters say so.
pub(super) fn head(
    job: &Job<'_>,
    params: &EvaluateParams,
    task: &str,
    images: &dyn Dataset,
    model: &checkpoint::Weights,
    origin: &checkpoint::Weights,
) -> Result<Head, StageError> {
    let prompts = prompts(job, params, task, images.classes().unwrap_or_default())?;
    let files: Vec<_> = job.sources_of("graph.text").collect();
    let graph = job.services.bound_graph(&files, &job.input("origin")?.artifact, origin)?;
    let weights = match params.text.weights {
        Tower::Origin => origin,
        Tower::Model => {
            graph.check(model, origin).map_err(|error| {
                StageError::input_help(
                    error.to_string(),
                    "models without a text tower take that of the origin: `text = { weights = \"origin\" }`",
                )
            })?;
            model
        }
    };
    let text = Text {
        job,
        graph: &graph,
        weights,
        prompts,
        scale: scale(params, weights)?,
        tokens: Tokens::read(job)?,
        context: params.text.context,
        output: graph.named_output(params.text.output.as_deref(), EMBEDDINGS)?,
    };
    let artifact = job.part(&text.preimage()?, |staging| text.embed(staging))?;
    let path = job.files.find_blob(&artifact, BLOB)?;
    let path = path.ok_or_else(|| StageError::Internal(format!("a head without `{BLOB}`")))?;
    let matrix = checkpoint::read_matrix(&path, "weight")?;
    let n_classes = matrix.nrows();
    Head::new(matrix, Array1::zeros(n_classes), params.dataset[task].normalize.unwrap_or(true))
        .map_err(|error| super::head::misfit("head of class names", &error))
}

/// One class with the sentences that it is embedded by.
struct Prompts {
    class: String,
    sentences: Vec<String>,
}

/// The sentences of every label: those of a task of the literature, or given templates with the dataset's class names.
fn prompts(
    job: &Job<'_>,
    params: &EvaluateParams,
    task: &str,
    found: &[String],
) -> Result<Vec<Prompts>, StageError> {
    let templates = params.templates(task, job)?;
    if let Some(template) = templates.iter().flatten().find(|template| !template.contains("{}")) {
        return Err(StageError::input(format!(
            "dataset `{task}`: template `{template}` has no `{{}}` for the class name"
        )));
    }
    if templates.as_ref().is_some_and(Vec::is_empty) {
        return Err(StageError::input(format!("dataset `{task}` has no templates")));
    }
    let of = |templates: &[String], class: &str| -> Vec<String> {
        templates.iter().map(|template| tasks::fill(template, class)).collect()
    };
    if let Some(known) = params.dataset[task].literature() {
        // A dataset without names has the labels of the literature.
        let order: Vec<usize> = if found.is_empty() {
            (0..known.classes.len()).collect()
        } else {
            known.order(found).map_err(|error| StageError::input(format!("dataset `{task}`: {error}")))?
        };
        let prompts = order.into_iter().map(|place| {
            let class = known.classes[place].name.clone();
            let sentences = match &templates {
                Some(templates) => of(templates, &class),
                None => known.prompts(place),
            };
            Prompts { class, sentences }
        });
        return Ok(prompts.collect());
    }
    if found.is_empty() {
        return Err(StageError::input_help(
            format!("dataset `{task}` has no class names to make a head of"),
            "give them in label order: `classes = [\"…\"]`",
        ));
    }
    let templates = templates.unwrap_or_default();
    Ok(found.iter().map(|class| Prompts { class: class.clone(), sentences: of(&templates, class) }).collect())
}

/// The factor of the logits: given, or exp(logit_scale).
fn scale(params: &EvaluateParams, weights: &checkpoint::Weights) -> Result<f64, StageError> {
    if let Some(scale) = params.text.scale {
        return Ok(scale);
    }
    if weights.shape("logit_scale").is_none() {
        return Err(StageError::input_help(
            "the checkpoint has no tensor `logit_scale` to multiply logits by",
            "give the factor, such as CLIP's: `text = { scale = 100.0 }`",
        ));
    }
    let value = weights.values("logit_scale")?;
    match value.as_slice() {
        [value] => Ok(f64::from(*value).exp()),
        _ => Err(StageError::input(format!("tensor `logit_scale` has {} values, expected 1", value.len()))),
    }
}

/// Everything that a head is made of.
struct Text<'a> {
    job: &'a Job<'a>,
    graph: &'a BoundGraph,
    weights: &'a checkpoint::Weights,
    prompts: Vec<Prompts>,
    scale: f64,
    tokens: Tokens,
    /// Tokens per text, where the parameters say so.
    context: Option<u32>,
    output: String,
}

impl Text<'_> {
    fn preimage(&self) -> Result<Preimage, StageError> {
        let texts = |texts: &[String]| Value::List(texts.iter().cloned().map(Value::Text).collect());
        let prompts = self.prompts.iter().map(|prompts| texts(&prompts.sentences)).collect();
        let digest = Value::Digest(self.graph.values_digest(self.weights)?);
        let operation = BTreeMap::from([
            ("kind".to_owned(), Value::Text("zero-shot head".to_owned())),
            ("version".to_owned(), Value::Int(VERSION)),
            ("prompts".to_owned(), Value::List(prompts)),
            ("scale".to_owned(), Value::Float(self.scale)),
            ("context".to_owned(), self.context.map_or(Value::Null, |n| Value::Int(i64::from(n)))),
            ("output".to_owned(), Value::Text(self.output.clone())),
            ("graph".to_owned(), Value::Digest(self.graph.digest())),
            ("tokenizer".to_owned(), Value::Digest(self.tokens.digest())),
            ("environment".to_owned(), super::environment(self.job.services)?),
        ]);
        Ok(Preimage {
            operation: Value::Map(operation),
            inputs: Value::Map(BTreeMap::from([("text_tower".to_owned(), digest)])),
        })
    }

    /// Embeds all sentences, and keeps the head.
    fn embed(&self, staging: &Staging) -> Result<Draft, StageError> {
        let inputs = TextInputs::of(self.graph)?;
        let (classes, sentences): (Vec<usize>, Vec<String>) = self
            .prompts
            .iter()
            .enumerate()
            .flat_map(|(class, prompts)| {
                prompts.sentences.iter().map(move |sentence| (class, sentence.clone()))
            })
            .unzip();
        let (rows, cut) = self.tokens.encode(&sentences, inputs.length, self.context)?;
        if cut > 0 {
            self.job.warn(format!("{cut} of {} texts are longer than the text tower takes: cut", rows.len()));
        }
        let mut session =
            self.job.services.session(self.graph, self.weights, self.job.threads, self.job.notify)?;
        let size = inputs.batch.unwrap_or(BATCH);
        let mut sums = Sums::default();
        for (nth, batch) in rows.chunks(size).enumerate() {
            if (self.job.cancelled)() {
                return Err(StageError::Cancelled);
            }
            let embeddings = self.run(&mut session, &inputs, batch, size)?;
            for (row, embedding) in embeddings.rows().into_iter().take(batch.len()).enumerate() {
                let class = classes[nth * size + row];
                sums.add(class, &embedding.to_vec()).map_err(|()| {
                    StageError::input(format!(
                        "the embedding of class name `{}` is zero or not a number",
                        self.prompts[class].class
                    ))
                })?;
            }
            let done = (nth * size + batch.len()) as u64;
            self.job.progress(done, rows.len() as u64, ProgressUnit::Texts);
        }
        let head = sums.head(self.scale);
        let blob = checkpoint::write_matrix(staging, BLOB, "weight", &head)?;
        let names: Vec<&String> = self.prompts.iter().map(|prompts| &prompts.class).collect();
        let manifest = serde_json::json!({ "content": "head", "classes": names }).to_string();
        Ok(Draft { manifest, blobs: vec![blob], operands: Vec::new(), sources: Vec::new() })
    }

    /// Embeddings of a batch; filled up with its last text to `size` where the graph takes no fewer.
    fn run(
        &self,
        session: &mut Session,
        inputs: &TextInputs,
        batch: &[Vec<i64>],
        size: usize,
    ) -> Result<Array2<f32>, StageError> {
        let n = if inputs.batch.is_some() { size } else { batch.len() };
        let length = batch.first().map_or(0, Vec::len);
        let row = |i: usize| &batch[i.min(batch.len() - 1)];
        let array = |value: &dyn Fn(usize, usize) -> i64| -> ArrayD<i64> {
            Array2::from_shape_fn((n, length), |(i, j)| value(i, j)).into_dyn()
        };
        let ids = array(&|i, j| row(i)[j]);
        let mask = array(&|i, j| i64::from(j < self.tokens.length(row(i))));
        let positions = array(&|_, j| j as i64);
        let mut values = vec![(inputs.ids.as_str(), Input::I64(ids.view()))];
        if let Some(name) = &inputs.mask {
            values.push((name, Input::I64(mask.view())));
        }
        if let Some(name) = &inputs.positions {
            values.push((name, Input::I64(positions.view())));
        }
        let outputs = session.run(&values)?;
        let found = outputs.into_iter().find(|(name, _)| *name == self.output);
        let (_, values) =
            found.ok_or_else(|| StageError::Internal(format!("the graph did not give `{}`", self.output)))?;
        let shape = values.shape().to_vec();
        values.into_dimensionality::<Ix2>().ok().filter(|values| values.nrows() == n).ok_or_else(|| {
            StageError::input_help(
                format!(
                    "output `{}` of the text export has shape {shape:?}, expected [{n} texts, features]",
                    self.output
                ),
                "the export must give projected embeddings, one per text (`CLIPTextModelWithProjection`)",
            )
        })
    }
}

/// What a text export asks for.
struct TextInputs {
    ids: String,
    mask: Option<String>,
    positions: Option<String>,
    /// Texts at once, where the graph takes no other number.
    batch: Option<usize>,
    /// Tokens per text, likewise.
    length: Option<usize>,
}

impl TextInputs {
    fn of(graph: &BoundGraph) -> Result<Self, StageError> {
        let ports = graph.inputs();
        let named = |name: &str| ports.iter().find(|port| port.name == name).map(|port| port.name.clone());
        let (mask, positions) = (named("attention_mask"), named("position_ids"));
        let others: Vec<&Port> = ports
            .iter()
            .filter(|port| Some(&port.name) != mask.as_ref() && Some(&port.name) != positions.as_ref())
            .collect();
        let [ids] = others.as_slice() else {
            let listed = ports.iter().map(|port| format!("`{}`", port.name)).collect::<Vec<_>>().join(", ");
            return Err(StageError::input_help(
                format!("the text export `{}` has inputs {listed}", graph.name()),
                "expected token ids, and at most `attention_mask` and `position_ids` beside them",
            ));
        };
        let fixed = |axis: usize| match ids.dimensions.as_ref().and_then(|all| all.get(axis)) {
            Some(Dimension::Fixed(n)) => Some(*n),
            _ => None,
        };
        Ok(Self {
            ids: ids.name.clone(),
            mask,
            positions,
            batch: fixed(0).filter(|n| *n > 0),
            length: fixed(1),
        })
    }
}

/// Normalized embeddings, added up by class.
#[derive(Default)]
struct Sums(Vec<Vec<f64>>);

impl Sums {
    fn add(&mut self, class: usize, embedding: &[f32]) -> Result<(), ()> {
        let norm = norm(embedding.iter().map(|value| f64::from(*value)));
        if !(norm.is_finite() && norm > 0.0) {
            return Err(());
        }
        if self.0.len() <= class {
            self.0.resize(class + 1, vec![0.0; embedding.len()]);
        }
        for (sum, value) in self.0[class].iter_mut().zip(embedding) {
            *sum += f64::from(*value) / norm;
        }
        Ok(())
    }

    /// The means, normalized and scaled, [classes, features]; of a mean of zero nothing is left to normalize.
    fn head(&self, scale: f64) -> Array2<f32> {
        let features = self.0.first().map_or(0, Vec::len);
        let values = self.0.iter().flat_map(|sum| {
            let norm = norm(sum.iter().copied()).max(f64::MIN_POSITIVE);
            sum.iter().map(move |value| (value / norm * scale) as f32)
        });
        Array2::from_shape_vec((self.0.len(), features), values.collect()).unwrap_or_default()
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |sum, value| sum + value * value).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_is_the_normalized_mean_of_normalized_embeddings() {
        let mut sums = Sums::default();
        sums.add(0, &[3.0, 4.0]).unwrap();
        sums.add(0, &[0.0, 10.0]).unwrap();
        sums.add(1, &[-2.0, 0.0]).unwrap();
        let head = sums.head(100.0);
        // (0.6, 0.8) + (0, 1) = (0.6, 1.8), of length √3.6
        let expected = [0.6 / 3.6f64.sqrt() * 100.0, 1.8 / 3.6f64.sqrt() * 100.0, -100.0, 0.0];
        for (value, expected) in head.iter().zip(expected) {
            assert!((f64::from(*value) - expected).abs() < 1e-5, "{head}");
        }
        assert_eq!(sums.add(0, &[0.0, 0.0]), Err(()));
        assert_eq!(sums.add(0, &[f32::NAN, 0.0]), Err(()));
    }
}
