//! The activations of a model over a dataset, reduced while they come.

use super::statistics::{InputStatistics, LayerPart, Statistics, ValueRange};
use crate::evaluate::Evaluation;
use crate::job::ProgressUnit;
use crate::services::BoundGraph;
use crate::{Job, StageError, checkpoint};
use merganser_algebra::gram;
use merganser_onnx::{Input, Layout, LinearUse};
use merganser_tensors::TensorSource;
use merganser_tensors::kernels::reduce::{MinMax, chunk_min_max};
use ndarray::{Array2, ArrayD};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Second moments of one input.
pub(super) struct Moments {
    pub(super) name: String,
    /// Σ x·xᵀ in f64, batch after batch: the same bits for any number of threads.
    pub(super) sum: Array2<f64>,
}

/// Everything that is looked at.
struct Capture<'a> {
    layers: &'a [LinearUse],
    /// The distinct inputs; the position of each layer's among them.
    inputs: Vec<(&'a LinearUse, InputStatistics, Array2<f64>)>,
    of_layer: Vec<usize>,
    ranges: BTreeMap<&'a str, MinMax>,
}

/// Runs the model over all images. Memory: the second moments, and the activations of one batch.
pub(super) fn capture(
    job: &Job<'_>,
    evaluation: &Evaluation<'_>,
    model: &Arc<dyn TensorSource>,
) -> Result<(Statistics, Vec<Moments>), StageError> {
    let (graph, input) = evaluation.graph()?;
    let layers = graph.layers()?;
    let mut capture = Capture::new(&layers);
    let values: Vec<&str> = capture.ranges.keys().copied().collect();
    let (graph, names) = graph.with_outputs(&values)?;
    // Under which name each value leaves the graph.
    let outputs: HashMap<String, &str> = names.into_iter().zip(values).collect();
    let images = capture.run(job, evaluation, (&graph, input), model, &outputs)?;
    Ok(capture.finish(images))
}

impl<'a> Capture<'a> {
    fn new(layers: &'a [LinearUse]) -> Self {
        let mut inputs: Vec<(&LinearUse, InputStatistics, Array2<f64>)> = Vec::new();
        let mut known: HashMap<(&str, &Layout, usize), usize> = HashMap::new();
        let mut of_layer = Vec::with_capacity(layers.len());
        let mut ranges = BTreeMap::new();
        for layer in layers {
            let width = layer.n_inputs();
            let index = *known.entry((&layer.activation, &layer.layout, width)).or_insert_with(|| {
                let moments = format!("moments.{}", inputs.len());
                let value = layer.activation.clone();
                let statistics = InputStatistics { value, moments, width, vectors: 0 };
                inputs.push((layer, statistics, Array2::zeros((width, width))));
                inputs.len() - 1
            });
            of_layer.push(index);
            for value in [&layer.activation, &layer.output] {
                ranges.insert(value.as_str(), MinMax::EMPTY);
            }
        }
        Self { layers, inputs, of_layer, ranges }
    }

    fn run(
        &mut self,
        job: &Job<'_>,
        evaluation: &Evaluation<'_>,
        (graph, input): (&BoundGraph, &str),
        model: &Arc<dyn TensorSource>,
        outputs: &HashMap<String, &'a str>,
    ) -> Result<u64, StageError> {
        let weights = checkpoint::Weights::new(Arc::clone(model));
        let mut session = job.services.session(graph, &weights, job.threads, job.notify)?;
        let n_images = evaluation.n_images() as u64;
        let mut done = 0;
        for batch in evaluation.batches() {
            if (job.cancelled)() {
                return Err(StageError::Cancelled);
            }
            let batch = batch?;
            done += batch.len_of(ndarray::Axis(0)) as u64;
            let values = session.run(&[(input, Input::F32(batch.view().into_dyn()))])?;
            let values: HashMap<&str, ArrayD<f32>> =
                values.into_iter().filter_map(|(name, array)| Some((*outputs.get(&name)?, array))).collect();
            self.take(&values, done)?;
            job.progress(done, n_images, ProgressUnit::Images);
        }
        Ok(n_images)
    }

    fn take(&mut self, values: &HashMap<&str, ArrayD<f32>>, n_seen: u64) -> Result<(), StageError> {
        let value = |name: &str| {
            values.get(name).ok_or_else(|| StageError::Internal(format!("the graph did not give `{name}`")))
        };
        for (name, range) in &mut self.ranges {
            let array = value(name)?.as_standard_layout();
            let values = array.as_slice().expect("standard layout is contiguous");
            if values.iter().any(|value| !value.is_finite()) {
                let message =
                    format!("value `{name}` of the graph is not finite, among the first {n_seen} images");
                return Err(StageError::input_help(
                    message,
                    "does the model answer anything on this dataset?",
                ));
            }
            *range = range.merge(chunk_min_max(values));
        }
        for (layer, statistics, sum) in &mut self.inputs {
            let activation = value(&layer.activation)?;
            let vectors = layer.layout.vectors(&activation.view(), statistics.width).ok_or_else(|| {
                StageError::input(format!(
                    "value `{}` of the graph has shape {:?}, which tensor `{}` with {} inputs cannot be multiplied with",
                    layer.activation,
                    activation.shape(),
                    layer.tensor,
                    statistics.width
                ))
            })?;
            statistics.vectors += vectors.nrows() as u64;
            *sum += &gram(vectors.view());
        }
        Ok(())
    }

    fn finish(self, images: u64) -> (Statistics, Vec<Moments>) {
        let mut layers: BTreeMap<String, Vec<LayerPart>> = BTreeMap::new();
        for (layer, &input) in self.layers.iter().zip(&self.of_layer) {
            layers.entry(layer.tensor.clone()).or_default().push(LayerPart {
                first_row: layer.first_row,
                n_rows: layer.n_rows,
                columns: layer.columns,
                inputs: layer.inputs.into(),
                input,
            });
        }
        let ranges = self.ranges.into_iter().filter(|(_, range)| !range.is_empty());
        let ranges =
            ranges.map(|(name, MinMax { min, max })| (name.to_owned(), ValueRange { min, max })).collect();
        let (mut inputs, mut moments) = (Vec::new(), Vec::new());
        for (_, statistics, sum) in self.inputs {
            moments.push(Moments { name: statistics.moments.clone(), sum });
            inputs.push(statistics);
        }
        (Statistics { images, inputs, layers, ranges, ..Statistics::default() }, moments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use merganser_onnx::Side;
    use ndarray::IxDyn;

    fn layer(tensor: &str, activation: &str, layout: Layout, n_inputs: usize) -> LinearUse {
        LinearUse {
            tensor: tensor.to_owned(),
            columns: n_inputs,
            first_row: 0,
            n_rows: 2,
            inputs: Side::Columns,
            node: String::new(),
            activation: activation.to_owned(),
            layout,
            output: format!("{tensor} output"),
        }
    }

    fn made_up(shape: &[usize], seed: usize) -> ArrayD<f32> {
        let n: usize = shape.iter().product();
        let values = (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 500.0 - 1.0).collect();
        ArrayD::from_shape_vec(IxDyn(shape), values).unwrap()
    }

    #[test]
    fn moments_are_sums_of_products_over_all_batches_and_shared_by_layers() {
        let layers = [
            layer("query", "tokens", Layout::Last, 5),
            layer("key", "tokens", Layout::Last, 5),
            layer("mixed", "tokens", Layout::LastButOne, 3),
        ];
        let mut capture = Capture::new(&layers);
        let batches = [made_up(&[4, 3, 5], 1), made_up(&[1, 3, 5], 2), made_up(&[0, 3, 5], 3)];
        for (index, tokens) in batches.iter().enumerate() {
            let mut values: HashMap<&str, ArrayD<f32>> =
                layers.iter().map(|layer| (layer.output.as_str(), made_up(&[2], index))).collect();
            values.insert("tokens", tokens.clone());
            capture.take(&values, 5).unwrap();
        }
        let (statistics, moments) = capture.finish(5);
        assert_eq!(statistics.inputs.len(), 2, "query and key share their input");
        assert_eq!(statistics.layers["query"][0].input, statistics.layers["key"][0].input);
        assert_eq!((statistics.inputs[0].vectors, statistics.inputs[1].vectors), (15, 25));
        for i in 0..5 {
            for j in 0..5 {
                let mut sum = 0.0;
                for tokens in &batches {
                    for image in 0..tokens.shape()[0] {
                        for token in 0..3 {
                            sum +=
                                f64::from(tokens[[image, token, i]]) * f64::from(tokens[[image, token, j]]);
                        }
                    }
                }
                assert!((moments[0].sum[[i, j]] - sum).abs() < 1e-12);
            }
        }
        let all = || batches.iter().flat_map(|batch| batch.iter().copied());
        let range = statistics.ranges["tokens"];
        assert_eq!((range.min, range.max), (all().fold(9.0, f32::min), all().fold(-9.0, f32::max)));
    }

    #[test]
    fn values_that_are_not_finite_or_do_not_fit_are_named() {
        let layers = [layer("query", "tokens", Layout::Last, 5)];
        let take = |tokens: ArrayD<f32>| {
            let values = HashMap::from([("tokens", tokens), ("query output", made_up(&[2], 1))]);
            Capture::new(&layers).take(&values, 64).unwrap_err().to_string()
        };
        let mut broken = made_up(&[2, 5], 1);
        broken[[1, 2]] = f32::NAN;
        assert_eq!(take(broken), "value `tokens` of the graph is not finite, among the first 64 images");
        assert_eq!(
            take(made_up(&[2, 4], 1)),
            "value `tokens` of the graph has shape [2, 4], which tensor `query` with 5 inputs cannot be multiplied with"
        );
    }
}
