//! Methods whose merged tensor is a linear combination of the base and the task vectors, with coefficients that depend on the angles between them.
//!
//! One streaming pass computes the inner products of each tensor in f64; whatever the method iterates, it iterates on these few numbers; a
//! second pass adds up. A combination of fine-tuned parameters Σ c_t (θ₀ + τ_t) is written θ₀ + (Σ c_t − 1)·θ₀ + Σ c_t τ_t: the base is added
//! last, with coefficients whose errors do not multiply it.

use super::inputs::Operand;
use super::method::Rule;
use super::pieces::{each_piece, merge_pieces, sums};
use merganser_tensors::kernels::{linear, reduce};
use merganser_tensors::{Result, Scratch};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ops::Range;

/// What vectors the angles are between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Between {
    /// The fine-tuned parameters θ₀ + τ_t.
    #[default]
    Models,
    /// The task vectors τ_t.
    TaskVectors,
}

/// Inner products of the vectors of one tensor.
pub(super) struct Gram {
    n: usize,
    products: Vec<f64>,
}

impl Gram {
    /// Of vectors that are at hand.
    pub(super) fn of_rows(rows: &[&[f32]]) -> Self {
        let n = rows.len();
        let mut products = Vec::with_capacity(n * (n + 1) / 2);
        for (i, a) in rows.iter().enumerate() {
            products.extend(rows[..=i].iter().map(|b| reduce::chunk_dot(a, b)));
        }
        Self { n, products }
    }

    pub(super) fn n(&self) -> usize {
        self.n
    }

    pub(super) fn dot(&self, a: usize, b: usize) -> f64 {
        let (high, low) = (a.max(b), a.min(b));
        self.products[high * (high + 1) / 2 + low]
    }

    pub(super) fn norm(&self, a: usize) -> f64 {
        self.dot(a, a).sqrt()
    }
}

/// The inner products of every tensor.
pub(super) fn grams(operands: &[&Operand<'_>], between: Between) -> Result<Vec<Gram>> {
    let n = operands.first().map_or(0, |operand| operand.n_tasks());
    let products = sums(
        operands,
        |_| 1,
        &vec![0.0; n * (n + 1) / 2],
        |stretch, scratch| {
            let mut sums = vec![0.0; n * (n + 1) / 2];
            each_piece(stretch.operand, 1, stretch.range.clone(), scratch, |piece, scratch| {
                if between == Between::Models {
                    let mut base = scratch.take(piece.len());
                    stretch.operand.read_base(piece.range.clone(), &mut base, scratch)?;
                    piece.tasks_mut().for_each(|values| linear::add_scaled(values, 1.0, &base));
                    scratch.give_back(base);
                }
                let all: Vec<&[f32]> = piece.tasks().collect();
                let own = Gram::of_rows(&all);
                sums.iter_mut().zip(&own.products).for_each(|(sum, own)| *sum += own);
                Ok(())
            })?;
            Ok(sums)
        },
        |sum, part| sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part),
    )?;
    Ok(products.into_iter().map(|products| Gram { n, products }).collect())
}

/// What a tensor is a combination of.
pub(super) struct Coefficients {
    /// Of the base, besides the 1 of θ₀ itself.
    base: f32,
    tasks: Vec<f32>,
}

impl Coefficients {
    /// Coefficients of the vectors that the angles were between.
    pub(super) fn new(between: Between, tasks: &[f64]) -> Self {
        let base = match between {
            Between::Models => tasks.iter().sum::<f64>() - 1.0,
            Between::TaskVectors => 0.0,
        };
        Self { base: base as f32, tasks: tasks.iter().map(|own| *own as f32).collect() }
    }
}

/// Δ = b·θ₀ + Σ_t c_t τ_t with coefficients of its own for each tensor.
pub(super) struct Span(HashMap<usize, Coefficients>);

impl Span {
    pub(super) fn new(operands: &[&Operand<'_>], coefficients: impl Iterator<Item = Coefficients>) -> Self {
        Self(operands.iter().map(|operand| operand.index).zip(coefficients).collect())
    }
}

impl Rule for Span {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Coefficients { base, tasks } = &self.0[&operand.index];
        merge_pieces(operand, 1, range, out, scratch, |piece, out, scratch| {
            out.fill(0.0);
            if *base != 0.0 {
                operand.read_base(piece.range.clone(), out, scratch)?;
                linear::scale(out, *base);
            }
            for (values, coefficient) in piece.tasks().zip(tasks) {
                linear::add_scaled(out, *coefficient, values);
            }
            Ok(())
        })
    }
}
