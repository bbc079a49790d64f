//! A checkpoint tensor as it is stored: codes, and what turns them into values.

use crate::tensor::{Weights, WeightsError};

/// A checkpoint whose tensors may be stored as codes.
pub trait PackedWeights: Weights {
    /// Returns whether a tensor is stored as codes of any kind.
    fn is_packed(&self, name: &str) -> bool;

    /// Returns the codes of a tensor: its values are the sum of what they stand for, added in `f32` in this order. Nothing if the values are
    /// stored as they are, or in a way that [`Codes`] cannot say.
    fn codes(&self, name: &str) -> Result<Vec<Codes>, WeightsError>;
}

/// The codes of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Codes {
    /// width of a code: 1 to 8, or 16
    pub bits: u8,
    /// One per element, row-major in the checkpoint's shape; below `2^bits`.
    pub values: Vec<u16>,
    /// Row-major neighbours that share a scale; the last group may be shorter.
    pub group: usize,
    pub grid: Grid,
}

/// What the codes of a group stand for; every list but `table` has one entry per group. All in `f32`, each operation rounded.
#[derive(Clone, Debug, PartialEq)]
pub enum Grid {
    /// `x = (q − zero_point)·step`
    Step { step: Vec<f32>, zero_point: Vec<f32> },
    /// `x = (q − zero_point)/scale`
    Inverse { scale: Vec<f32>, zero_point: Vec<f32> },
    /// `x = table[q]·scale`
    Table { table: Vec<f32>, scale: Vec<f32> },
}

impl Codes {
    /// Returns why these are no codes of a tensor of `n` elements.
    pub(super) fn problem(&self, n: usize) -> Option<String> {
        if !matches!(self.bits, 1..=8 | 16) {
            return Some(format!("codes have 1 to 8 or 16 bits, got {}", self.bits));
        }
        if self.values.len() != n {
            return Some(format!("it has {} codes for {n} elements", self.values.len()));
        }
        if self.group == 0 {
            return Some("a group has no elements".to_owned());
        }
        let levels = 1usize << self.bits;
        if let Some(code) = self.values.iter().find(|&&code| usize::from(code) >= levels) {
            return Some(format!("code {code} has more than {} bits", self.bits));
        }
        let groups = n.div_ceil(self.group);
        let (first, second) = match &self.grid {
            Grid::Step { step: scale, zero_point } | Grid::Inverse { scale, zero_point } => {
                (scale, Some(zero_point))
            }
            Grid::Table { table, scale } => {
                if table.len() != levels {
                    return Some(format!("its code book has {} entries for {levels} codes", table.len()));
                }
                (scale, None)
            }
        };
        let wrong = std::iter::once(first).chain(second).find(|list| list.len() != groups)?;
        Some(format!("it has scales or zero points for {} of {groups} groups", wrong.len()))
    }

    pub(super) fn n_groups(&self) -> usize {
        self.values.len().div_ceil(self.group)
    }

    /// Returns steps and zero points with which `(q − zero_point)·step` is exactly what every code stands for, if there are such.
    pub(super) fn steps(&self) -> Option<(Vec<f32>, &[f32])> {
        match &self.grid {
            Grid::Step { step, zero_point } => Some((step.clone(), zero_point)),
            Grid::Inverse { scale, zero_point } => {
                let step: Vec<f32> = scale.iter().map(|scale| scale.recip()).collect();
                let same = |q: u16, group: usize| {
                    let code = f32::from(q) - zero_point[group];
                    (code / scale[group]).to_bits() == (code * step[group]).to_bits()
                };
                let groups = self.values.chunks(self.group).enumerate();
                let exact = |(group, codes): (usize, &[u16])| codes.iter().all(|&q| same(q, group));
                groups.into_iter().all(exact).then_some((step, zero_point.as_slice()))
            }
            Grid::Table { .. } => None,
        }
    }
}
