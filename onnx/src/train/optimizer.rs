//! Optimizers, with the arithmetic of PyTorch's: `f32`, one rounding per operation, in the order written here.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{CHUNK, Tensors, TrainError, check_finite};

/// Which optimizer, and its constants.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    Sgd(Sgd),
    AdamW(AdamW),
}

/// Stochastic gradient descent: g ← g + decay·w; with momentum, m ← momentum·m + g (first m = g), and g ← m, or
/// g + momentum·m with Nesterov's variant; w ← w − rate·g.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Sgd {
    pub momentum: f32,
    pub nesterov: bool,
    pub weight_decay: f32,
}

/// Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), at step t = 1, 2, …:
///
/// w ← w·(1 − rate·decay), m ← m + (1−β₁)(g − m), v ← β₂v + (1−β₂)g²,
/// w ← w − rate/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε).
///
/// Factors that do not depend on the element are computed in `f64` and rounded once.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 }
    }
}

/// What an optimizer remembers between steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// steps taken
    pub step: u64,
    /// by tensor: the momentum of SGD; first and second moment of AdamW. Nothing for what has had no gradient so far.
    pub moments: BTreeMap<String, Vec<Vec<f32>>>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    algorithm: Algorithm,
    state: State,
}

impl Optimizer {
    pub fn new(algorithm: Algorithm) -> Self {
        Self { algorithm, state: State::default() }
    }

    /// Goes on from the state of another optimizer of the same algorithm.
    pub fn resume(algorithm: Algorithm, state: State) -> Self {
        Self { algorithm, state }
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    /// Changes `tensors` by one step along `gradients`. Tensors without a gradient stay as they are.
    ///
    /// # Errors
    ///
    /// If a gradient is not finite, or belongs to no tensor, or lengths differ (those of a resumed state included).
    /// Nothing has changed then.
    pub fn step(&mut self, tensors: &mut Tensors, gradients: &Tensors, rate: f32) -> Result<(), TrainError> {
        for (name, gradient) in gradients {
            self.check(name, tensors.get(name), gradient)?;
        }
        self.state.step += 1;
        for (name, gradient) in gradients {
            let Some(values) = tensors.get_mut(name) else { continue };
            match self.algorithm {
                Algorithm::Sgd(sgd) => sgd.step(values, gradient, rate, name, &mut self.state.moments),
                Algorithm::AdamW(adam) => {
                    let moments = self
                        .state
                        .moments
                        .entry(name.clone())
                        .or_insert_with(|| vec![vec![0.0; gradient.len()], vec![0.0; gradient.len()]]);
                    let [first, second] = &mut moments[..] else { continue };
                    adam.step(values, gradient, [first, second], rate, self.state.step);
                }
            }
        }
        Ok(())
    }

    fn check(&self, name: &str, values: Option<&Vec<f32>>, gradient: &[f32]) -> Result<(), TrainError> {
        let length = |what, expected, actual| {
            Err(TrainError::Length { tensor: name.to_owned(), what, expected, actual })
        };
        let Some(values) = values else {
            return Err(TrainError::UnknownTensor { tensor: name.to_owned() });
        };
        if values.len() != gradient.len() {
            return length("gradient", values.len(), gradient.len());
        }
        if let Some(moments) = self.state.moments.get(name) {
            let expected = if matches!(self.algorithm, Algorithm::Sgd(_)) { 1 } else { 2 };
            let actual: usize = moments.iter().map(Vec::len).sum();
            if moments.len() != expected || moments.iter().any(|m| m.len() != values.len()) {
                return length("optimizer state", expected * values.len(), actual);
            }
        }
        check_finite(name, gradient)
    }
}

impl Sgd {
    fn step(
        self,
        values: &mut [f32],
        gradient: &[f32],
        rate: f32,
        name: &str,
        moments: &mut BTreeMap<String, Vec<Vec<f32>>>,
    ) {
        let Self { momentum, nesterov, weight_decay } = self;
        if momentum == 0.0 {
            let chunks = values.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
            chunks.for_each(|(w, g)| {
                w.iter_mut().zip(g).for_each(|(w, g)| *w -= rate * (g + weight_decay * *w));
            });
            return;
        }
        let first = !moments.contains_key(name);
        let state = moments.entry(name.to_owned()).or_insert_with(|| vec![vec![0.0; gradient.len()]]);
        let chunks = values.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        chunks.zip(state[0].par_chunks_mut(CHUNK)).for_each(|((w, g), m)| {
            for ((w, g), m) in w.iter_mut().zip(g).zip(m) {
                let g = g + weight_decay * *w;
                *m = if first { g } else { momentum * *m + g };
                *w -= rate * if nesterov { g + momentum * *m } else { *m };
            }
        });
    }
}

impl AdamW {
    fn step(self, values: &mut [f32], gradient: &[f32], moments: [&mut Vec<f32>; 2], rate: f32, t: u64) {
        let rate = f64::from(rate);
        let t = i32::try_from(t).unwrap_or(i32::MAX);
        let kept = (1.0 - rate * self.weight_decay) as f32;
        let (new1, beta2, new2) = ((1.0 - self.beta1) as f32, self.beta2 as f32, (1.0 - self.beta2) as f32);
        let size = -(rate / (1.0 - self.beta1.powi(t))) as f32;
        let correction = (1.0 - self.beta2.powi(t)).sqrt() as f32;
        let epsilon = self.epsilon as f32;
        let [first, second] = moments;
        let chunks = values.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        let moments = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
        chunks.zip(moments).for_each(|((w, g), (m, v))| {
            for ((w, &g), (m, v)) in w.iter_mut().zip(g).zip(m.iter_mut().zip(v)) {
                *w *= kept;
                *m += new1 * (g - *m);
                *v = beta2 * *v + new2 * g * g;
                *w += size * *m / (v.sqrt() / correction + epsilon);
            }
        });
    }
}

#[cfg(test)]
mod tests;
