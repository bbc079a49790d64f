//! `regmean`: the linear layer whose outputs are nearest to those of all fine-tuned layers, each on its own task's inputs.
//!
//! With the second moments G_t of a layer's inputs on task t, W = (Σ_t W_t·G_t)·(Σ_t G_t)⁻¹ minimizes Σ_t E‖(W − W_t)·x_t‖²; off the diagonal,
//! G_t is multiplied by `off_diagonal` first. The moments are means over images (the authors sum over their examples), so a dataset
//! counts the same however many images were looked at.
//!
//! It is written for task vectors, so that packed ones do: Δ = τ̄ + (Σ_t (τ_t − τ̄)·G_t)·(Σ_t G_t)⁻¹ is the same where the inverse exists. What no
//! task's inputs ever show is left at the mean τ̄, as is every tensor that no layer multiplies. Moments are scaled to ones on the
//! diagonal before they are factored: then, with an `off_diagonal` below one, eigenvalues are at least 1 − `off_diagonal`.

use crate::StageError;
use crate::decomposition::Decomposition;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::linear::Linear;
use crate::merge::matrices;
use crate::merge::method::{Merge, Method, Need, Rule};
use crate::merge::numbers;
use crate::merge::statistics::TaskStatistics;
use crate::params::{Params, Problem, parse, to_value};
use merganser_algebra as algebra;
use merganser_cache::Value;
use merganser_tensors::Scratch;
use ndarray::Array2;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::ops::Range;

pub(super) struct RegMean;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RegMeanParams {
    /// What entries of G_t off the diagonal are multiplied by; above 0, at most 1. Less trusts the moments of few images less.
    #[serde(default = "usual_off_diagonal", deserialize_with = "numbers::share")]
    off_diagonal: f64,
    /// Who computes the decompositions; only with `off_diagonal = 1` there is one.
    #[serde(default)]
    backend: Decomposition,
}

fn usual_off_diagonal() -> f64 {
    0.9
}

impl Method for RegMean {
    fn id(&self) -> &'static str {
        "regmean"
    }

    fn summary(&self) -> &'static str {
        "least squares on the inputs that each fine-tuned layer sees of its task"
    }

    fn formula(&self) -> &'static str {
        "W = (Σ_t W_t G_t) (Σ_t G_t)⁻¹, G_t = E[x xᵀ] over the inputs x of the layer on task t, off the diagonal times `off_diagonal`; other tensors: mean"
    }

    fn source(&self) -> &'static str {
        "Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, arXiv:2212.09849, §3"
    }

    fn schema(&self) -> Schema {
        schema_for!(RegMeanParams)
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>> {
        Ok(Box::new(parse::<RegMeanParams>(params)?))
    }
}

impl Merge for RegMeanParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn statistics(&self) -> Need {
        Need::Required
    }

    fn multiplies_matrices(&self) -> bool {
        true
    }

    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        operands: &[&Operand<'a>],
    ) -> Result<Box<dyn Rule + 'a>, StageError> {
        let statistics = TaskStatistics::open(inputs)?;
        if !operands.is_empty() && !operands.iter().any(|operand| statistics.know(operand)) {
            return Err(StageError::input_help(
                "the statistics are about none of the tensors to merge",
                "`calibrate` models whose tensors have the names of the base",
            ));
        }
        let others = matrices::scaled_mean(inputs.vectors.len(), 1.0);
        Ok(Box::new(Regression { params: self, statistics, others }))
    }
}

struct Regression<'a> {
    params: &'a RegMeanParams,
    statistics: TaskStatistics,
    /// The mean.
    others: Linear,
}

impl Rule for Regression<'_> {
    fn needs_whole(&self, operand: &Operand<'_>) -> bool {
        self.statistics.know(operand)
    }

    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        self.others.block(operand, range, out, scratch)
    }

    fn tensor(&self, operand: &Operand<'_>, out: &mut [f32]) -> Result<(), StageError> {
        let mut scratch = Scratch::new();
        let deltas: Vec<Vec<f32>> = (0..operand.n_tasks())
            .map(|task| operand.whole(task, &mut scratch))
            .collect::<merganser_tensors::Result<_>>()?;
        let mut mean = vec![0.0f64; out.len()];
        for delta in &deltas {
            mean.iter_mut().zip(delta).for_each(|(sum, value)| *sum += f64::from(*value));
        }
        for sum in &mut mean {
            *sum /= deltas.len() as f64;
        }
        let mut merged = mean.clone();
        for (part, moments) in self.statistics.layers(operand)? {
            let center =
                Array2::from_shape_fn((part.n_outputs(), part.n_inputs()), |(o, i)| mean[part.element(o, i)]);
            let n = part.n_inputs();
            let (mut weighted, mut total) = (Array2::zeros(center.dim()), Array2::zeros((n, n)));
            for (delta, own) in deltas.iter().zip(moments) {
                let own = self.params.reduced(own);
                let apart = part.weights(delta) - &center;
                weighted += &algebra::product(apart.view(), own.view());
                total += &own;
            }
            let correction = self.params.divide(weighted, total).map_err(matrices::refused(operand))?;
            for ((output, input), value) in correction.indexed_iter() {
                merged[part.element(output, input)] += value;
            }
        }
        out.iter_mut().zip(&merged).for_each(|(out, value)| *out = *value as f32);
        Ok(())
    }
}

impl RegMeanParams {
    /// G_t with less off the diagonal.
    fn reduced(&self, mut moments: Array2<f64>) -> Array2<f64> {
        let diagonal = moments.diag().to_owned();
        moments *= self.off_diagonal;
        moments.diag_mut().assign(&diagonal);
        moments
    }

    /// B·C⁻¹; in directions that C knows nothing of, nothing.
    fn divide(&self, mut b: Array2<f64>, mut c: Array2<f64>) -> algebra::Result<Array2<f64>> {
        // An input that is always zero has no moments, and no column of B.
        let scale = c.diag().mapv(|square| if square > 0.0 { 1.0 / square.sqrt() } else { 0.0 });
        for ((row, column), value) in c.indexed_iter_mut() {
            *value *= scale[row] * scale[column];
        }
        c.diag_mut().fill(1.0);
        b *= &scale;
        let mut quotient = if self.off_diagonal < 1.0 {
            algebra::divide_by_positive_definite(b.view(), c.view())?
        } else {
            let cut_off = algebra::default_cut_off(c.nrows(), c.ncols());
            algebra::divide_by_symmetric(b.view(), c.view(), cut_off, self.backend.backend())?.quotient
        };
        quotient *= &scale;
        Ok(quotient)
    }
}

#[cfg(test)]
mod tests {
    use crate::Summed;
    use crate::merge::test_support::naive;
    use crate::testing::{Input, Workbench};
    use blake3::Hash;
    use ndarray::Array2;
    use serde_json::{Value, json};

    const TASKS: [&str; 3] = ["a", "b", "c"];

    /// A weight with more inputs than one task shows, one of them zero in all tasks, stored either way round, and a bias.
    struct Layer {
        bench: Workbench,
        inputs: Summed,
        base: Hash,
        deltas: Vec<(&'static str, Hash)>,
        statistics: Vec<(&'static str, Hash)>,
        /// Of the tasks, outputs × inputs.
        tuned: Vec<Array2<f64>>,
        moments: Vec<Array2<f64>>,
    }

    const OUTPUTS: usize = 4;
    const INPUTS: usize = 7;

    impl Layer {
        fn new(inputs: Summed, n_vectors: usize) -> Self {
            let bench = Workbench::new();
            let shape = match inputs {
                Summed::Columns => [OUTPUTS, INPUTS],
                Summed::Rows => [INPUTS, OUTPUTS],
            };
            let weights = |seed| naive::noise(OUTPUTS * INPUTS, seed);
            let checkpoint = |name: &str, seed: u64| {
                let bias = naive::noise(OUTPUTS, seed + 50);
                bench.checkpoint(name, &[("w", &shape, &weights(seed)), ("w.bias", &[OUTPUTS], &bias)])
            };
            let base = checkpoint("base", 1);
            let (mut deltas, mut statistics, mut tuned, mut moments) = (vec![], vec![], vec![], vec![]);
            for (index, task) in TASKS.into_iter().enumerate() {
                let seed = index as u64 + 2;
                deltas.push((task, bench.diff(base, checkpoint(task, seed))));
                let stored = Array2::from_shape_vec(shape, weights(seed)).unwrap().mapv(f64::from);
                tuned.push(if inputs == Summed::Rows { stored.t().to_owned() } else { stored });
                let mut x =
                    Array2::from_shape_vec((n_vectors, INPUTS), naive::noise(n_vectors * INPUTS, seed))
                        .unwrap()
                        .mapv(f64::from);
                x.column_mut(3).fill(0.0);
                let own = x.t().dot(&x).mapv(|value| f64::from(value as f32));
                statistics.push((task, bench.statistics(&[("w", inputs, OUTPUTS, &own)])));
                moments.push(own);
            }
            Self { bench, inputs, base, deltas, statistics, tuned, moments }
        }

        fn merge(&self, parameters: &Value, statistics: &[(&'static str, Hash)]) -> Result<Hash, String> {
            let inputs = [
                Input::One("base", self.base),
                Input::Members("vectors", &self.deltas),
                Input::Members("statistics", statistics),
            ];
            let merged = self.bench.run("merge", parameters, &inputs);
            merged.map(|merged| merged[0].1).map_err(|error| error.to_string())
        }

        /// The merged weight, outputs × inputs.
        fn weight(&self, merged: Hash) -> Array2<f64> {
            let values: Vec<f64> = self.bench.values(merged, "w").into_iter().map(f64::from).collect();
            match self.inputs {
                Summed::Columns => Array2::from_shape_vec((OUTPUTS, INPUTS), values).unwrap(),
                Summed::Rows => Array2::from_shape_vec((INPUTS, OUTPUTS), values).unwrap().t().to_owned(),
            }
        }

        /// (Σ W_t·G_t)·(Σ G_t)⁺ as it is written.
        fn formula(&self, off_diagonal: f64) -> Array2<f64> {
            let mut total = Array2::<f64>::zeros((INPUTS, INPUTS));
            let mut weighted = Array2::<f64>::zeros((OUTPUTS, INPUTS));
            for (weight, own) in self.tuned.iter().zip(&self.moments) {
                let g = Array2::from_shape_fn(own.dim(), |(i, j)| {
                    own[[i, j]] * if i == j { 1.0 } else { off_diagonal }
                });
                weighted += &weight.dot(&g);
                total += &g;
            }
            weighted.dot(&naive::pseudo_inverse(&total, 1e-9))
        }

        fn mean(&self) -> Array2<f64> {
            let sum = self.tuned.iter().fold(Array2::zeros((OUTPUTS, INPUTS)), |sum, weight| sum + weight);
            sum / TASKS.len() as f64
        }
    }

    #[track_caller]
    fn close(found: &Array2<f64>, expected: &Array2<f64>) {
        for (place, found) in found.indexed_iter() {
            assert!((found - expected[place]).abs() < 2e-5, "{place:?}: {found} and {}", expected[place]);
        }
    }

    #[test]
    fn layers_equal_the_formula_and_all_else_is_the_mean() {
        for inputs in [Summed::Columns, Summed::Rows] {
            // Two vectors per task: not even all tasks together show every direction.
            for n_vectors in [9, 2] {
                let layer = Layer::new(inputs, n_vectors);
                for off_diagonal in [0.9, 0.5, 1.0] {
                    if (n_vectors, off_diagonal) == (2, 1.0) {
                        continue;
                    }
                    let parameters = json!({ "method": "regmean", "off_diagonal": off_diagonal });
                    let merged = layer.merge(&parameters, &layer.statistics).unwrap();
                    let mut expected = layer.formula(off_diagonal);
                    // The input that is always zero.
                    expected.column_mut(3).assign(&layer.mean().column(3));
                    close(&layer.weight(merged), &expected);
                    let bias = |artifact| layer.bench.values(artifact, "w.bias");
                    let mean = layer.bench.run(
                        "merge",
                        &json!({ "method": "average" }),
                        &[Input::One("base", layer.base), Input::Members("vectors", &layer.deltas)],
                    );
                    for (found, expected) in bias(merged).iter().zip(bias(mean.unwrap()[0].1)) {
                        assert!((found - expected).abs() < 1e-6);
                    }
                }
            }
        }
    }

    #[test]
    fn what_no_input_shows_is_the_mean() {
        let layer = Layer::new(Summed::Columns, 1);
        let parameters = json!({ "method": "regmean", "off_diagonal": 1.0 });
        let merged = layer.weight(layer.merge(&parameters, &layer.statistics).unwrap());
        let total = layer.moments.iter().fold(Array2::zeros((INPUTS, INPUTS)), |sum, own| sum + own);
        let seen = total.dot(&naive::pseudo_inverse(&total, 1e-9));
        let unseen = Array2::<f64>::eye(INPUTS) - &seen;
        assert!(unseen.diag().sum() > 3.9, "three vectors show three directions of seven at most");
        // The part along the inputs is the formula's, the rest the mean's. The scale of the inputs decides what is nearest to what, so this is
        // asked of outputs: of inputs that were seen, and of none.
        close(&merged.dot(&total), &layer.formula(1.0).dot(&total));
        let dead = merged.column(3).to_owned() - layer.mean().column(3);
        assert!(dead.iter().all(|value: &f64| value.abs() < 1e-6));
    }

    #[test]
    fn statistics_must_be_about_every_task_and_about_these_tensors() {
        let layer = Layer::new(Summed::Columns, 5);
        let parameters = json!({ "method": "regmean" });
        let refused = layer.merge(&parameters, &layer.statistics[..2]).unwrap_err();
        assert_eq!(refused, "port `statistics` has no member `c`");
        let others = layer.bench.statistics(&[("other", Summed::Columns, OUTPUTS, &layer.moments[0])]);
        let others = TASKS.map(|task| (task, others));
        let refused = layer.merge(&parameters, &others).unwrap_err();
        assert_eq!(refused, "the statistics are about none of the tensors to merge");
        let inputs = [Input::One("base", layer.base), Input::Members("vectors", &layer.deltas)];
        let refused = layer.bench.run("merge", &parameters, &inputs).unwrap_err();
        assert_eq!(refused.to_string(), "method `regmean` needs port `statistics`");
        let parameters = json!({ "method": "regmean", "off_diagonal": 1.5 });
        let refused = layer.merge(&parameters, &layer.statistics).unwrap_err();
        assert!(refused.contains("expected above 0 and at most 1, got 1.5"), "{refused}");
    }
}
