//! Merging as least squares on the activations that a task vector itself suggests; what `actmat`, `tact` and `wudi` share.
//!
//! A task's unknown second moments of activations are estimated by C_t = τ_tᵀ·τ_t. Then Δ = (Σ_t τ_t·C_t)·(Σ_t C_t)⁺ minimizes
//! Σ_t ‖(Δ − τ_t)·C_t^(1/2)‖². Weights of the tasks multiply C_t.
//!
//! Fused attention projections: with `mha`, the rows of query, key and value are treated as three matrices or as one. Rows never mix
//! in the formula, so all that changes is whose rows make up C_t.

use super::inputs::Operand;
use super::matrices;
use crate::StageError;
use merganser_algebra as algebra;
use ndarray::{Array2, s};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What to do with the projections of queries, keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Attention {
    /// Each tensor is a matrix, fused or not.
    #[default]
    AsStored,
    /// The three parts of a fused tensor (`in_proj_weight`, `qkv.weight`) are a matrix each.
    Split,
    /// Separate tensors (`q_proj`, `k_proj`, `v_proj` or `query`, `key`, `value`) are one matrix.
    Fused,
}

/// Names of separate projections that belong together.
const SEPARATE: [[&str; 3]; 3] =
    [["q_proj", "k_proj", "v_proj"], ["query", "key", "value"], ["to_q", "to_k", "to_v"]];

/// Ends of names of fused projections.
const FUSED: [&str; 3] = ["in_proj_weight", "qkv.weight", "qkv_proj.weight"];

/// Which operands make up one matrix.
pub(super) struct Groups<'a> {
    attention: Attention,
    operands: BTreeMap<String, Operand<'a>>,
}

/// Part of a tensor that is merged on its own: its rows, and the task vectors whose rows make up C_t.
pub(super) struct Part {
    /// Rows of the tensor, as first and one past the last.
    pub rows: (usize, usize),
    /// The task vectors of these rows.
    pub deltas: Vec<Array2<f32>>,
    /// Task vectors with the same columns whose rows count in C_t as well.
    pub beside: Vec<Vec<Array2<f32>>>,
}

impl<'a> Groups<'a> {
    pub(super) fn new(attention: Attention, operands: &[&Operand<'a>]) -> Self {
        let operands =
            operands.iter().map(|operand| (operand.name().to_owned(), (*operand).clone())).collect();
        Self { attention, operands }
    }

    /// Reads the task vectors of a tensor and divides it into parts.
    pub(super) fn parts(&self, operand: &Operand<'_>) -> merganser_tensors::Result<Vec<Part>> {
        let (rows, _) = operand.as_matrix().unwrap_or_default();
        let deltas = matrices::read_all(operand)?;
        let n_parts = if self.attention == Attention::Split && is_fused(operand.name()) && rows % 3 == 0 {
            3
        } else {
            1
        };
        let size = rows / n_parts;
        let beside = if self.attention == Attention::Fused { self.siblings(operand) } else { Vec::new() };
        let beside =
            beside.into_iter().map(matrices::read_all).collect::<merganser_tensors::Result<Vec<_>>>()?;
        if n_parts == 1 {
            return Ok(vec![Part { rows: (0, rows), deltas, beside }]);
        }
        let part = |index: usize| {
            let range = (index * size, (index + 1) * size);
            let deltas =
                deltas.iter().map(|delta| delta.slice(s![range.0..range.1, ..]).to_owned()).collect();
            Part { rows: range, deltas, beside: Vec::new() }
        };
        Ok((0..n_parts).map(part).collect())
    }

    /// The other two of three separate projections.
    fn siblings(&self, operand: &Operand<'_>) -> Vec<&Operand<'a>> {
        let name = operand.name();
        let columns = operand.as_matrix().map(|(_, columns)| columns);
        for names in SEPARATE {
            let Some(own) = names.iter().find(|part| name.split('.').any(|word| word == **part)) else {
                continue;
            };
            let others = names.iter().filter(|part| *part != own);
            let found = others.filter_map(|other| self.operands.get(&name.replace(own, other)));
            return found.filter(|other| other.as_matrix().map(|(_, columns)| columns) == columns).collect();
        }
        Vec::new()
    }
}

fn is_fused(name: &str) -> bool {
    FUSED.iter().any(|end| name.ends_with(end))
}

/// Sums over the tasks.
pub(super) struct Moments {
    /// Σ_t w_t·τ_t·C_t.
    pub weighted: Array2<f64>,
    /// Σ_t w_t·C_t.
    pub total: Array2<f64>,
}

/// `estimate` makes the matrix that C_t is computed from; `weight` is asked with ‖τ_t‖² over all rows that count.
pub(super) fn moments(
    part: &Part,
    estimate: impl Fn(&Array2<f32>) -> Array2<f32>,
    weight: impl Fn(f64) -> f64,
) -> Moments {
    let (rows, columns) = part.deltas[0].dim();
    let mut weighted = Array2::zeros((rows, columns));
    let mut total = Array2::zeros((columns, columns));
    for (task, delta) in part.deltas.iter().enumerate() {
        let mut own = algebra::gram(estimate(delta).view());
        let mut squares = algebra::frobenius_squared(delta.view());
        for other in &part.beside {
            own += &algebra::gram(estimate(&other[task]).view());
            squares += algebra::frobenius_squared(other[task].view());
        }
        own *= weight(squares);
        weighted += &algebra::product(delta.view(), own.view());
        total += &own;
    }
    Moments { weighted, total }
}

/// Writes the merged rows of every part, times `scale`.
pub(super) fn merge_parts(
    groups: &Groups<'_>,
    operand: &Operand<'_>,
    out: &mut [f32],
    scale: f64,
    solve: impl Fn(&Part) -> algebra::Result<Array2<f64>>,
) -> Result<(), StageError> {
    let (_, columns) = operand.as_matrix().unwrap_or_default();
    for part in groups.parts(operand)? {
        let merged = solve(&part).map_err(matrices::refused(operand))?;
        let (first, end) = part.rows;
        matrices::store(&mut out[first * columns..end * columns], &merged, scale);
    }
    Ok(())
}

/// (Σ w_t·τ_t·C_t)·(Σ w_t·C_t)⁺, the solution of the least norm.
pub(super) fn minimizer(
    moments: &Moments,
    rtol: Option<f64>,
    backend: algebra::Backend,
) -> algebra::Result<Array2<f64>> {
    let n = moments.total.ncols();
    let rtol = rtol.unwrap_or_else(|| algebra::default_cut_off(n, n));
    let divided = algebra::divide_by_symmetric(moments.weighted.view(), moments.total.view(), rtol, backend)?;
    Ok(divided.quotient)
}
