//! The task vectors whose coefficients are tuned: as they are, or, of AdaMerging++, what TIES leaves of them.

use crate::StageError;
use crate::merge::inputs::{MergeInputs, Operand};
use crate::merge::methods::ties::{TiesParams, TiesRule};
use crate::merge::pieces::{Piece, each_piece, merge_pieces, sums};
use merganser_tensors::kernels::{linear, reduce};
use merganser_tensors::stream::blocks;
use merganser_tensors::{Result, Scratch};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;

pub(super) struct Vectors {
    ties: Option<TiesRule>,
}

impl Vectors {
    /// `density`: of AdaMerging++, the share of entries that the trim keeps.
    pub(super) fn new(
        inputs: &MergeInputs<'_>,
        operands: &[&Operand<'_>],
        density: Option<f64>,
    ) -> std::result::Result<Self, StageError> {
        let ties = density.map(|density| TiesRule::new(&TiesParams::summing(density), inputs, operands));
        Ok(Self { ties: ties.transpose()? })
    }

    fn select(&self, operand: &Operand<'_>, piece: &mut Piece<'_>, scratch: &mut Scratch) {
        if let Some(ties) = &self.ties {
            ties.select(operand, piece, scratch);
        }
    }

    /// Σ_t λ_t·τ_t of elements `range`: products and sums in f32, in the order of the tasks.
    pub(super) fn sum(
        &self,
        operand: &Operand<'_>,
        coefficients: &[f32],
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        merge_pieces(operand, 1, range, out, scratch, |piece, out, scratch| {
            self.select(operand, piece, scratch);
            out.fill(0.0);
            for (values, coefficient) in piece.tasks().zip(coefficients) {
                linear::add_scaled(out, *coefficient, values);
            }
            Ok(())
        })
    }

    /// θ₀ + Σ_t λ_t·τ_t of all operands, by name; `coefficients` has those of each operand, in their order.
    pub(super) fn merged(
        &self,
        operands: &[&Operand<'_>],
        coefficients: &[&[f32]],
    ) -> Result<BTreeMap<String, Vec<f32>>> {
        let one = |(operand, coefficients): (&&Operand<'_>, &&[f32])| {
            let mut values = vec![0.0; operand.n_elements()];
            let mut scratch = Scratch::new();
            for range in blocks(values.len()) {
                let out = &mut values[range.clone()];
                self.sum(operand, coefficients, range.clone(), out, &mut scratch)?;
                operand.add_base(range, out, &mut scratch)?;
            }
            Ok((operand.name().to_owned(), values))
        };
        operands.par_iter().zip(coefficients).map(one).collect()
    }

    /// ⟨G, τ_t⟩ of every operand and task, in f64; 0 where there is no gradient.
    pub(super) fn products(
        &self,
        operands: &[&Operand<'_>],
        gradients: &BTreeMap<String, Vec<f32>>,
    ) -> Result<Vec<Vec<f64>>> {
        let n_tasks = operands.first().map_or(0, |operand| operand.n_tasks());
        sums(
            operands,
            |_| 1,
            &vec![0.0; n_tasks],
            |stretch, scratch| {
                let mut products = vec![0.0; n_tasks];
                let Some(gradient) = gradients.get(stretch.operand.name()) else { return Ok(products) };
                each_piece(stretch.operand, 1, stretch.range.clone(), scratch, |piece, scratch| {
                    self.select(stretch.operand, piece, scratch);
                    let gradient = &gradient[piece.range.clone()];
                    for (product, values) in products.iter_mut().zip(piece.tasks()) {
                        *product += reduce::chunk_dot(gradient, values);
                    }
                    Ok(())
                })?;
                Ok(products)
            },
            |total, part| total.iter_mut().zip(part).for_each(|(total, part)| *total += part),
        )
    }
}
