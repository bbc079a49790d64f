//! Optimizers, with the arithmetic of PyTorch's: `f32`, one rounding per operation, in the order written here.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::gradients::{clip_factor, norm};
use super::{CHUNK, Tensors, TrainError};
use crate::simd::{Loop, vectorized};

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

    /// Changes `tensors` by one step along `gradients`, wherever they lie; tensors without a gradient stay as they are.
    ///
    /// While they are read, gradients are scaled by min(1, `largest_norm` / (‖g‖ + 1e-6)), where the norm is over all tensors together (as
    /// PyTorch's `clip_grad_norm_`). Returns the norm before.
    ///
    /// # Errors
    ///
    /// If a gradient is not finite, or belongs to no tensor, or lengths differ (those of a resumed state included).
    /// Nothing has changed then.
    pub fn step(
        &mut self,
        tensors: &mut Tensors,
        gradients: &[(&str, &[f32])],
        rate: f32,
        largest_norm: f32,
    ) -> Result<f32, TrainError> {
        for (name, gradient) in gradients {
            self.check(name, tensors.get(*name), gradient)?;
        }
        let norm = norm(gradients.iter().copied())?;
        let clip = clip_factor(norm, largest_norm);
        self.state.step += 1;
        for &(name, gradient) in gradients {
            let Some(values) = tensors.get_mut(name) else { continue };
            match self.algorithm {
                Algorithm::Sgd(sgd) => sgd.step(values, gradient, clip, rate, name, &mut self.state.moments),
                Algorithm::AdamW(adam) => {
                    let moments = self
                        .state
                        .moments
                        .entry(name.to_owned())
                        .or_insert_with(|| vec![vec![0.0; gradient.len()], vec![0.0; gradient.len()]]);
                    let [first, second] = &mut moments[..] else { continue };
                    adam.step(values, gradient, [first, second], clip, rate, self.state.step);
                }
            }
        }
        Ok(norm as f32)
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
        Ok(())
    }
}

impl Sgd {
    fn step(
        self,
        values: &mut [f32],
        gradient: &[f32],
        clip: f32,
        rate: f32,
        name: &str,
        moments: &mut BTreeMap<String, Vec<Vec<f32>>>,
    ) {
        let Self { momentum, nesterov, weight_decay } = self;
        if momentum == 0.0 {
            let chunks = values.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
            chunks.for_each(|(w, g)| {
                w.iter_mut().zip(g).for_each(|(w, g)| *w -= rate * (clip * g + weight_decay * *w));
            });
            return;
        }
        let first = !moments.contains_key(name);
        let state = moments.entry(name.to_owned()).or_insert_with(|| vec![vec![0.0; gradient.len()]]);
        let chunks = values.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        chunks.zip(state[0].par_chunks_mut(CHUNK)).for_each(|((w, g), m)| {
            for ((w, g), m) in w.iter_mut().zip(g).zip(m) {
                let g = clip * g + weight_decay * *w;
                *m = if first { g } else { momentum * *m + g };
                *w -= rate * if nesterov { g + momentum * *m } else { *m };
            }
        });
    }
}

impl AdamW {
    fn step(
        self,
        values: &mut [f32],
        gradient: &[f32],
        moments: [&mut Vec<f32>; 2],
        clip: f32,
        rate: f32,
        t: u64,
    ) {
        let rate = f64::from(rate);
        let t = i32::try_from(t).unwrap_or(i32::MAX);
        let factors = Factors {
            clip,
            kept: (1.0 - rate * self.weight_decay) as f32,
            new1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            new2: (1.0 - self.beta2) as f32,
            size: -(rate / (1.0 - self.beta1.powi(t))) as f32,
            correction: (1.0 - self.beta2.powi(t)).sqrt() as f32,
            epsilon: self.epsilon as f32,
        };
        let [first, second] = moments;
        let chunks = values.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        let moments = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
        chunks.zip(moments).for_each(|((w, g), (m, v))| vectorized(AdamWStep { w, g, m, v, factors }));
    }
}

/// What is the same for all elements of a step of AdamW.
#[derive(Clone, Copy)]
struct Factors {
    clip: f32,
    kept: f32,
    new1: f32,
    beta2: f32,
    new2: f32,
    size: f32,
    correction: f32,
    epsilon: f32,
}

struct AdamWStep<'a> {
    w: &'a mut [f32],
    g: &'a [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    factors: Factors,
}

impl Loop for AdamWStep<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let f = self.factors;
        for ((w, g), (m, v)) in self.w.iter_mut().zip(self.g).zip(self.m.iter_mut().zip(self.v)) {
            let g = f.clip * g;
            *w *= f.kept;
            *m += f.new1 * (g - *m);
            *v = f.beta2 * *v + f.new2 * g * g;
            *w += f.size * *m / (v.sqrt() / f.correction + f.epsilon);
        }
    }
}

#[cfg(test)]
mod tests;
