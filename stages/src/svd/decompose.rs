//! From inner products to factors: M = UΣVᵀ by the eigenvectors of MᵀM.
//!
//! With G the T × T inner products of the task vectors and J = I − 11ᵀ/T (or I without centring), MᵀM = JGJ = VΣ²Vᵀ. A singular value
//! below [`NEGLIGIBLE`] of the largest norm is a rounding error of f32 entries and counts as 0; its direction is all zeros.

use crate::factors::{Factors, NO_ENERGY};
use merganser_algebra::{Backend, Result, symmetric_eigen};
use ndarray::Array2;

/// Square of the relative size below which a singular value counts as 0.
const NEGLIGIBLE: f64 = 1e-13;

/// How many directions are high-energy.
#[derive(Clone, Copy, Debug)]
pub(super) struct RankRule {
    pub energy: f64,
    pub max_rank: usize,
}

/// Factors of a region of `n_entries` entries with inner products `gram`.
pub(super) fn factors(
    gram: &[f64],
    n_tasks: usize,
    n_entries: usize,
    center: bool,
    rule: RankRule,
    backend: Backend,
) -> Result<Factors> {
    let share = 1.0 / n_tasks as f64;
    let mean_of = |row: usize| gram[row * n_tasks..(row + 1) * n_tasks].iter().sum::<f64>() * share;
    let means: Vec<f64> = (0..n_tasks).map(mean_of).collect();
    let mean_squared = means.iter().sum::<f64>() * share;
    let mut matrix = Array2::zeros((n_tasks, n_tasks));
    for ((s, t), value) in matrix.indexed_iter_mut() {
        // the same formula on both sides of the diagonal: exactly symmetric
        let centring = if center { means[s] + means[t] - mean_squared } else { 0.0 };
        *value = gram[s * n_tasks + t] - centring;
    }
    let trace: f64 = (0..n_tasks).map(|t| gram[t * n_tasks + t]).sum();
    let eigen = symmetric_eigen(matrix.view(), backend)?;
    let n_directions = n_entries.min(n_tasks);
    let mean_norm = if center { mean_squared.max(0.0).sqrt() } else { 0.0 };
    let mut sigma = vec![mean_norm];
    let mut directions = vec![if mean_norm > 0.0 { share / mean_norm } else { 0.0 }; n_tasks];
    for index in 0..n_directions {
        let value = eigen.values[index];
        let value = if value > NEGLIGIBLE * trace { value.sqrt() } else { 0.0 };
        sigma.push(value);
        let mut vector: Vec<f64> = eigen.vectors.column(index).to_vec();
        if center {
            // exactly orthogonal to (1 … 1), so that no rounding error of V brings the mean back
            let off = vector.iter().sum::<f64>() * share;
            for x in &mut vector {
                *x -= off;
            }
        }
        let sign = sign_of(&vector);
        directions.extend(vector.iter().map(|x| if value > 0.0 { sign * x / value } else { 0.0 }));
    }
    let rank = rank(&sigma[1..], rule);
    Ok(Factors { rank, n_entries, sigma, directions })
}

/// The smallest k that keeps the energy; at least 1 where there is a direction, at most `max_rank`.
fn rank(sigma: &[f64], rule: RankRule) -> usize {
    let total: f64 = sigma.iter().map(|sigma| sigma * sigma).sum();
    let mut kept = 0.0;
    let enough = sigma.iter().position(|sigma| {
        kept += sigma * sigma;
        total < NO_ENERGY || kept / total >= rule.energy
    });
    enough.map_or(sigma.len(), |index| index + 1).min(rule.max_rank.max(1)).min(sigma.len())
}

/// What makes the entry of largest magnitude positive; the first of those that are equal up to rounding.
fn sign_of(vector: &[f64]) -> f64 {
    let largest = vector.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
    let first = vector.iter().find(|x| x.abs() >= largest * (1.0 - 1e-9));
    if first.is_some_and(|x| *x < 0.0) { -1.0 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RULE: RankRule = RankRule { energy: 0.9, max_rank: 64 };

    fn gram(vectors: &[Vec<f64>]) -> Vec<f64> {
        let dot = |a: &Vec<f64>, b: &Vec<f64>| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        vectors.iter().flat_map(|a| vectors.iter().map(move |b| dot(a, b))).collect()
    }

    /// Column `index` of [μ/‖μ‖, U], from the vectors themselves.
    fn direction(factors: &Factors, vectors: &[Vec<f64>], index: usize) -> Vec<f64> {
        let mut sum = vec![0.0; vectors[0].len()];
        for (weight, vector) in factors.direction(index).iter().zip(vectors) {
            sum.iter_mut().zip(vector).for_each(|(sum, x)| *sum += weight * x);
        }
        sum
    }

    fn made(vectors: &[Vec<f64>], center: bool) -> Factors {
        factors(&gram(vectors), vectors.len(), vectors[0].len(), center, RULE, Backend::Faer).unwrap()
    }

    proptest! {
        /// Directions are orthonormal, and mean and coefficients give every task vector back.
        #[test]
        fn factors_reconstruct_the_task_vectors(
            n in 1usize..7,
            d in 1usize..40,
            center in any::<bool>(),
            values in prop::collection::vec(-1f64..1.0, 280),
        ) {
            let vectors: Vec<Vec<f64>> = (0..n).map(|t| values[t * 40..t * 40 + d].to_vec()).collect();
            let factors = made(&vectors, center);
            prop_assert_eq!(factors.n_directions(), n.min(d));
            for i in 1..factors.sigma.len() {
                let u = direction(&factors, &vectors, i);
                let norm: f64 = u.iter().map(|x| x * x).sum();
                // small singular values come from squares: they lose half of the digits
                prop_assert!(factors.sigma[i] == 0.0 || (norm - 1.0).abs() < 1e-2, "{} {}", factors.sigma[i], norm);
                prop_assert!(i == 1 || factors.sigma[i] <= factors.sigma[i - 1]);
            }
            for (t, vector) in vectors.iter().enumerate() {
                let mut sum: Vec<f64> = direction(&factors, &vectors, 0).iter().map(|x| x * factors.sigma[0]).collect();
                for (i, c) in factors.coefficients(t).into_iter().enumerate() {
                    let u = direction(&factors, &vectors, i + 1);
                    sum.iter_mut().zip(&u).for_each(|(sum, u)| *sum += c * u);
                }
                for (a, b) in sum.iter().zip(vector) {
                    prop_assert!((a - b).abs() < 1e-5, "{} {}", a, b);
                }
            }
        }
    }

    #[test]
    fn a_centred_single_task_is_its_mean() {
        let factors = made(&[vec![3.0, 4.0]], true);
        assert_eq!((factors.sigma.clone(), factors.rank), (vec![5.0, 0.0], 1));
        assert_eq!(factors.energy_retained(), 1.0);
        assert_eq!(factors.of_tasks(&[5.0, 0.0]), [1.0]);
    }

    #[test]
    fn zeros_have_no_directions_and_rank_one() {
        let factors = made(&vec![vec![0.0; 12]; 3], true);
        assert_eq!((factors.rank, factors.energy_retained()), (1, 1.0));
        assert!(factors.sigma.iter().chain(&factors.directions).all(|x| *x == 0.0));
    }

    #[test]
    fn equal_task_vectors_have_one_direction() {
        let vectors = vec![vec![1.0, 2.0, 2.0]; 4];
        let plain = made(&vectors, false);
        assert!((plain.sigma[1] - 6.0).abs() < 1e-12 && plain.sigma[2..].iter().all(|x| *x == 0.0));
        assert!(plain.direction(1).iter().all(|x| *x > 0.0), "the sign is fixed");
        let centred = made(&vectors, true);
        assert!((centred.sigma[0] - 3.0).abs() < 1e-12 && centred.sigma[1..].iter().all(|x| *x == 0.0));
    }

    #[test]
    fn the_rank_is_the_smallest_that_keeps_the_energy() {
        let rule = |energy, max_rank| RankRule { energy, max_rank };
        assert_eq!(rank(&[3.0, 2.0, 1.0], rule(0.5, 9)), 1);
        assert_eq!(rank(&[3.0, 2.0, 1.0], rule(0.9, 9)), 2);
        assert_eq!(rank(&[3.0, 2.0, 1.0], rule(1.0, 9)), 3);
        assert_eq!(rank(&[3.0, 2.0, 1.0], rule(1.0, 2)), 2);
        assert_eq!(rank(&[3.0, 2.0, 1.0], rule(0.0, 9)), 1);
        assert_eq!(rank(&[1e-6, 1e-7], rule(1.0, 9)), 1);
        assert_eq!(rank(&[], rule(1.0, 9)), 0);
    }
}
