//! GPTQ: one input after the other is rounded, and the weights of the others make up for its error.
//!
//! Frantar et al., GPTQ, arXiv:2210.17323, algorithm 1, with static scales and the inputs in descending order of H's diagonal
//! (`act_order`). The same numbers come from fewer products in the form of Babai's nearest plane (Chen et al., The Geometry of LLM
//! Quantization, arXiv:2507.18553): with H = L·Lᵀ the error of a row e is `‖e·L‖² = Σ_j (Σ_{i ≥ j} e_i·L_ij)²`. Input by input, the last
//! row of L first, the term of input j is least for the value nearest to `w_j + Σ_{i > j} e_i·L_ij / L_jj`.

use super::Curvature;
use ndarray::ArrayView1;

/// Rounds one row.
pub(super) fn round(
    weights: ArrayView1<'_, f64>,
    curvature: &Curvature,
    nearest: &dyn Fn(usize, f64) -> f64,
) -> Vec<f64> {
    let n = curvature.n_inputs();
    let mut rounded = vec![0.0; n];
    // Σ_{i > j} e_i·L_ij for every j that is still open: row i of L is added when e_i is known, so that memory is read in order.
    let mut owed = vec![0.0f64; n];
    for (place, &input) in (0..n).rev().zip(&curvature.order) {
        let row = curvature.factor.row(place);
        let row = row.to_slice().expect("the factor is in standard layout");
        let (before, on_diagonal) = (&row[..place], row[place]);
        rounded[input] = nearest(input, weights[input] + owed[place] / on_diagonal);
        let error = weights[input] - rounded[input];
        if error != 0.0 {
            owed[..place].iter_mut().zip(before).for_each(|(owed, l)| *owed += error * l);
        }
    }
    rounded
}
