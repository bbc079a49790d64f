//! Adding up task vectors, or only those entries that agree with an elected sign (TIES, steps 2 and 3).
//!
//! Everything is f32 in the order of the tasks, branch-free over the elements of a piece.

use super::pieces::Piece;
use merganser_tensors::Scratch;
use merganser_tensors::kernels::linear;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How sparsified task vectors become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Aggregation {
    /// The sum of all.
    #[default]
    Sum,
    /// The sum of the entries that have the elected sign: that of the sum, + where it is 0.
    TiesSum,
    /// Their mean: the sum of the weighted entries divided by the sum of their weights.
    TiesMean,
}

impl Aggregation {
    /// The consensus that it means, if any.
    pub(super) fn consensus(self, weights: &[f32]) -> Option<Consensus> {
        let together = match self {
            Self::Sum => return None,
            Self::TiesSum => Together::Sum,
            Self::TiesMean => Together::MeanByWeight,
        };
        Some(Consensus { together, tie: 1.0, weights: weights.to_vec() })
    }
}

/// What becomes of the entries that agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Together {
    Sum,
    /// Divided by how many there are.
    MeanByCount,
    /// Divided by the sum of their weights.
    MeanByWeight,
    /// The largest magnitude, with the elected sign.
    Largest,
}

/// Sign election and merging of what agrees.
pub(super) struct Consensus {
    pub together: Together,
    /// The sign where the sum is exactly zero: 1, −1 or, for none, 0.
    pub tie: f32,
    /// Of the tasks; the values are weighted already.
    pub weights: Vec<f32>,
}

impl Consensus {
    /// Merges trimmed and weighted values.
    pub(super) fn merge(&self, piece: &Piece<'_>, out: &mut [f32], scratch: &mut Scratch) {
        let mut signs = scratch.take(piece.len());
        elect(piece, self.tie, &mut signs);
        out.fill(0.0);
        match self.together {
            Together::Sum => add_agreeing(piece, &signs, out),
            Together::Largest => {
                for values in piece.tasks() {
                    for ((largest, value), sign) in out.iter_mut().zip(values).zip(&signs) {
                        // positive where the signs agree
                        let size = value * sign;
                        *largest = if size > *largest { size } else { *largest };
                    }
                }
                out.iter_mut().zip(&signs).for_each(|(largest, sign)| *largest *= sign);
            }
            Together::MeanByCount | Together::MeanByWeight => {
                let mut counts = scratch.take(piece.len());
                counts.fill(0.0);
                for (values, weight) in piece.tasks().zip(&self.weights) {
                    let weight = if self.together == Together::MeanByCount { 1.0 } else { *weight };
                    let sums = out.iter_mut().zip(&mut counts);
                    for (((sum, count), value), sign) in sums.zip(values).zip(&signs) {
                        let agrees = value * sign > 0.0;
                        *sum += if agrees { *value } else { 0.0 };
                        *count += if agrees { weight } else { 0.0 };
                    }
                }
                for (sum, count) in out.iter_mut().zip(&counts) {
                    *sum /= if *count == 0.0 { 1.0 } else { *count };
                }
                scratch.give_back(counts);
            }
        }
        scratch.give_back(signs);
    }

    /// Sets trimmed and weighted values to zero that do not agree with the elected sign.
    pub(super) fn keep_agreeing(&self, piece: &mut Piece<'_>, scratch: &mut Scratch) {
        let mut signs = scratch.take(piece.len());
        elect(piece, self.tie, &mut signs);
        for values in piece.tasks_mut() {
            for (value, sign) in values.iter_mut().zip(&signs) {
                *value = if *value * sign > 0.0 { *value } else { 0.0 };
            }
        }
        scratch.give_back(signs);
    }
}

/// The signs of the sums; `tie` where a sum is zero.
fn elect(piece: &Piece<'_>, tie: f32, signs: &mut [f32]) {
    signs.fill(0.0);
    for values in piece.tasks() {
        linear::add_scaled(signs, 1.0, values);
    }
    for sign in signs {
        let negative = if *sign < 0.0 { -1.0 } else { tie };
        *sign = if *sign > 0.0 { 1.0 } else { negative };
    }
}

fn add_agreeing(piece: &Piece<'_>, signs: &[f32], out: &mut [f32]) {
    for values in piece.tasks() {
        for ((sum, value), sign) in out.iter_mut().zip(values).zip(signs) {
            *sum += if value * sign > 0.0 { *value } else { 0.0 };
        }
    }
}

/// Merges weighted values: adds them up, or by consensus; then scales.
pub(super) fn combine(
    consensus: Option<&Consensus>,
    scale: f32,
    piece: &Piece<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    if let Some(consensus) = consensus {
        consensus.merge(piece, out, scratch);
    } else {
        out.fill(0.0);
        for values in piece.tasks() {
            linear::add_scaled(out, 1.0, values);
        }
    }
    linear::scale(out, scale);
}

/// How many more sums of a piece are positive than negative.
pub(super) fn majority(piece: &Piece<'_>, scratch: &mut Scratch) -> i64 {
    let mut signs = scratch.take(piece.len());
    elect(piece, 0.0, &mut signs);
    let balance: i32 = signs.iter().map(|sign| i32::from(*sign > 0.0) - i32::from(*sign < 0.0)).sum();
    scratch.give_back(signs);
    i64::from(balance)
}
