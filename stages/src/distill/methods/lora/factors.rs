//! Factors: which weights have them, where they enter the graph, and what they add up to.

use crate::StageError;
use merganser_onnx::gradient::{Forward, Tape, Value};
use merganser_onnx::train::Tensors;
use merganser_onnx::{How, RowRun, Slot, Source, Weights};
use merganser_tensors::kernels::random::Stream;
use rayon::prelude::*;

/// All factors of a model.
pub(super) struct Factors {
    pub targets: Vec<Target>,
    pub scale: f64,
    pub rank: usize,
    /// The weights that they are added to.
    base: Tensors,
}

/// A weight that has factors: [outputs, …inputs], seen as a matrix.
pub(super) struct Target {
    pub name: String,
    pub shape: Vec<usize>,
    pub outputs: usize,
    pub inputs: usize,
}

impl Target {
    /// What A and B are called as trained values.
    pub(super) fn inputs(&self) -> [String; 2] {
        [self.left_right().1, self.left_right().0]
    }

    fn left_right(&self) -> (String, String) {
        (format!("{}.lora_B", self.name), format!("{}.lora_A", self.name))
    }
}

/// An input of the graph that takes a dropout mask, and its shape.
type Mask = (String, Vec<usize>);

impl Factors {
    pub(super) fn new(
        base: Tensors,
        model: &dyn Weights,
        rank: usize,
        scale: f64,
    ) -> Result<Self, StageError> {
        if base.is_empty() {
            return Err(StageError::input_help(
                "no weight that the graph computes with is a target of factors",
                "`targets` matches whole tensor names: `*.attn.*.weight`, not `attn`",
            ));
        }
        let targets = base.keys().map(|name| {
            let shape = model.shape(name).unwrap_or_default();
            let [outputs, rest @ ..] = shape.as_slice() else { return Err(no_matrix(name, &shape)) };
            if rest.is_empty() {
                return Err(no_matrix(name, &shape));
            }
            let (outputs, inputs) = (*outputs, rest.iter().product());
            Ok(Target { name: name.clone(), shape, outputs, inputs })
        });
        Ok(Self { targets: targets.collect::<Result<_, _>>()?, scale, rank, base })
    }

    /// The first values: A uniform within ±1/√inputs (Kaiming's with a = √5, as PEFT), B zero.
    pub(super) fn initial(&self, seed: u64) -> Tensors {
        let mut values = Tensors::new();
        for target in &self.targets {
            let mut words = vec![0u32; self.rank * target.inputs];
            Stream::new(seed, &["lora_A", &target.name]).fill(0, &mut words);
            let bound = 1.0 / (target.inputs as f64).sqrt();
            // 24 random bits, from −1 to 1.
            let uniform = |word: u32| f64::from(word >> 8) / f64::from(1 << 23) - 1.0;
            let (left, right) = target.left_right();
            values.insert(right, words.into_iter().map(|word| (bound * uniform(word)) as f32).collect());
            values.insert(left, vec![0.0; target.outputs * self.rank]);
        }
        values
    }

    /// Whether a trained value is a factor.
    pub(super) fn owns(&self, name: &str) -> bool {
        self.targets.iter().any(|target| target.inputs().iter().any(|input| input == name))
    }

    /// The weights with what the factors add up to: `f32(W + f32(scale·Σ B·A))`, with the sums in f64, which is what the stored view reads.
    pub(super) fn merged(&self, values: &Tensors) -> Tensors {
        let merged = self.targets.par_iter().map(|target| {
            let (left, right) = target.left_right();
            let (left, right) = (&values[&left], &values[&right]);
            let mut weights = self.base[&target.name].clone();
            let mut sums = vec![0.0f64; target.inputs];
            for (row, coefficients) in
                weights.chunks_exact_mut(target.inputs).zip(left.chunks_exact(self.rank))
            {
                sums.fill(0.0);
                for (coefficient, factors) in coefficients.iter().zip(right.chunks_exact(target.inputs)) {
                    for (sum, factor) in sums.iter_mut().zip(factors) {
                        *sum += f64::from(*coefficient) * f64::from(*factor);
                    }
                }
                row.iter_mut().zip(&sums).for_each(|(w, sum)| *w += (self.scale * sum) as f32);
            }
            (target.name.clone(), weights)
        });
        merged.collect::<Vec<_>>().into_iter().collect()
    }

    /// Adds the factors as inputs, and a branch beside every product of a weight that has them. Returns inputs for dropout masks.
    pub(super) fn attach(
        &self,
        forward: &mut Forward,
        slots: &[Slot],
        dropout: bool,
    ) -> Result<Vec<Mask>, StageError> {
        let mut inputs = Vec::with_capacity(self.targets.len());
        for target in &self.targets {
            let [a, b] = target.inputs();
            let a = forward.add_input(&a, &[self.rank, target.inputs])?;
            let b = forward.add_input(&b, &[target.outputs, self.rank])?;
            inputs.push((target, a, b));
        }
        let mut masks = Vec::new();
        for slot in slots {
            let (runs, transposed) = runs(slot, &self.targets);
            let parts: Vec<Option<Part<'_>>> = runs.iter().map(|run| part(run, &inputs)).collect();
            let products = match forward.products(&slot.name) {
                Ok(products) if products.iter().all(|product| product.sums_rows == transposed) => products,
                Ok(_) => return Err(turned(slot)),
                // A convolution, say: then the weight itself is changed.
                Err(_) if !dropout => {
                    self.change(forward, slot, &parts, transposed)?;
                    continue;
                }
                Err(error) => {
                    return Err(StageError::input_help(
                        error.to_string(),
                        "`dropout` is for weights that are multiplied only: leave this one out of `targets`, or set `dropout = 0`",
                    ));
                }
            };
            for (index, product) in products.iter().enumerate() {
                let mut x = product.input.clone();
                if dropout {
                    let name = format!("merganser.dropout.{index}.{}", slot.name);
                    let mask = forward.add_input(&name, &x.shape)?;
                    masks.push((name, x.shape.clone()));
                    x = forward.tape().mul(&x, &mask);
                }
                let addend = self.branch(forward.tape(), &x, &parts, &runs);
                forward.add_to(product, &addend);
            }
        }
        Ok(masks)
    }

    /// `s·(x·Aᵀ)·Bᵀ`, for the rows that the weight is made of.
    fn branch(&self, tape: &mut Tape, x: &Value, parts: &[Option<Part<'_>>], runs: &[RowRun]) -> Value {
        let leading = &x.shape[..x.rank() - 1];
        let pieces: Vec<Value> = parts
            .iter()
            .zip(runs)
            .map(|(part, run)| {
                let Some(part) = part else {
                    // Rows of a tensor that has no factors.
                    let shape: Vec<usize> = leading.iter().copied().chain([run.n_rows]).collect();
                    return tape.floats(&shape, &vec![0.0; shape.iter().product()]);
                };
                let a = tape.transpose(part.a, &[1, 0]);
                let inner = tape.matmul(x, &a);
                let inner = tape.scale(&inner, self.scale as f32);
                let b = tape.slice(part.b, &[0], &[run.first_row], &[run.first_row + run.n_rows]);
                let b = tape.transpose(&b, &[1, 0]);
                tape.matmul(&inner, &b)
            })
            .collect();
        match pieces.as_slice() {
            [only] => only.clone(),
            _ => tape.concat(&pieces, x.rank() - 1),
        }
    }

    /// W + s·B·A in place of W.
    fn change(
        &self,
        forward: &mut Forward,
        slot: &Slot,
        parts: &[Option<Part<'_>>],
        transposed: bool,
    ) -> Result<(), StageError> {
        let [Some(part)] = parts else { return Err(turned(slot)) };
        let change = |tape: &mut Tape, weight: &Value| {
            let product = tape.matmul(part.b, part.a);
            let product = tape.scale(&product, self.scale as f32);
            let product = if transposed { tape.transpose(&product, &[1, 0]) } else { product };
            let product = tape.reshape(&product, &weight.shape);
            tape.add(weight, &product)
        };
        forward.rewire(&slot.name, change)?;
        Ok(())
    }
}

/// The factors of some rows.
struct Part<'a> {
    a: &'a Value,
    b: &'a Value,
}

fn part<'a>(run: &RowRun, inputs: &'a [(&Target, Value, Value)]) -> Option<Part<'a>> {
    inputs.iter().find(|(target, ..)| target.name == run.tensor).map(|(_, a, b)| Part { a, b })
}

/// The rows of tensors that a weight of the graph is made of, and whether they are its columns.
fn runs(slot: &Slot, targets: &[Target]) -> (Vec<RowRun>, bool) {
    match &slot.source {
        Source::Tensor { name, how } => {
            let n_rows =
                targets.iter().find(|target| target.name == *name).map_or(0, |target| target.outputs);
            (vec![RowRun { tensor: name.clone(), first_row: 0, n_rows }], *how == How::Transposed)
        }
        Source::Rows { runs, transposed } => (runs.clone(), *transposed),
    }
}

fn no_matrix(name: &str, shape: &[usize]) -> StageError {
    StageError::input_help(
        format!("tensor `{name}` has shape {shape:?}: factors need a matrix [outputs, inputs], or a kernel"),
        "leave it out of `targets`; `train` trains a tensor as a whole",
    )
}

fn turned(slot: &Slot) -> StageError {
    let tensors = slot.source.tensors().join("`, `");
    StageError::input(format!(
        "`{tensors}` is multiplied along its outputs in the graph's `{}`: factors need [outputs, inputs]",
        slot.name
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use merganser_onnx::WeightsError;

    struct One;

    impl Weights for One {
        fn names(&self) -> Vec<String> {
            vec!["w".to_owned()]
        }

        fn shape(&self, _: &str) -> Option<Vec<usize>> {
            Some(vec![3, 2, 2])
        }

        fn values(&self, _: &str) -> Result<Vec<f32>, WeightsError> {
            Ok((0..12).map(|i| i as f32).collect())
        }
    }

    fn factors() -> Factors {
        let base = Tensors::from([("w".to_owned(), One.values("w").unwrap())]);
        Factors::new(base, &One, 2, 0.5).unwrap()
    }

    #[test]
    fn the_model_begins_as_it_is() {
        let factors = factors();
        let first = factors.initial(3);
        assert_eq!(first["w.lora_B"], [0.0; 6]);
        let a = &first["w.lora_A"];
        assert!(a.len() == 8 && a.iter().all(|a| a.abs() <= 0.5) && a.iter().any(|a| a.abs() > 0.1));
        assert_ne!(first["w.lora_A"], factors.initial(4)["w.lora_A"]);
        assert_eq!(factors.merged(&first)["w"], One.values("w").unwrap());
        assert!(factors.owns("w.lora_A") && !factors.owns("w"));
    }

    #[test]
    fn first_values_are_uniform() {
        let base = Tensors::from([("w".to_owned(), vec![0.0; 12])]);
        let factors = Factors::new(base, &One, 5000, 1.0).unwrap();
        let a = factors.initial(1).remove("w.lora_A").unwrap();
        let n = a.len() as f64;
        let mean = a.iter().map(|&a| f64::from(a)).sum::<f64>() / n;
        let square = a.iter().map(|&a| f64::from(a).powi(2)).sum::<f64>() / n;
        // Within ±1/2 the variance is 1/12; five deviations of both estimates.
        assert!(mean.abs() < 5.0 * (1.0 / 12.0 / n).sqrt(), "{mean}");
        assert!((square - 1.0 / 12.0).abs() < 5.0 * (1.0 / 180.0 / n).sqrt(), "{square}");
    }

    #[test]
    fn products_are_added_in_f64() {
        let factors = factors();
        let b = vec![0.5, -1.25, 3.0, 0.0, -0.125, 7.0];
        let a = vec![0.1, -0.7, 0.3, 11.0, 2.5, 0.9, -4.0, 0.01];
        let values = Tensors::from([("w.lora_A".to_owned(), a.clone()), ("w.lora_B".to_owned(), b.clone())]);
        let merged = factors.merged(&values);
        for (i, value) in merged["w"].iter().enumerate() {
            let (row, column) = (i / 4, i % 4);
            let sum: f64 = (0..2).map(|p| f64::from(b[2 * row + p]) * f64::from(a[4 * p + column])).sum();
            assert_eq!(*value, i as f32 + (0.5 * sum) as f32);
        }
    }
}
