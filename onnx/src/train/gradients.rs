//! What happens to gradients before an optimizer sees them.

use rayon::prelude::*;

use super::{CHUNK, Tensors, TrainError, check_finite};
use crate::simd::{Loop, vectorized};

/// A weighted mean of gradients, so that several small batches count as a large one.
///
/// Losses are means over a batch, so a batch's weight is its number of samples; batches may differ in size.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Accumulator {
    sums: Tensors,
    weight: f32,
}

impl Accumulator {
    /// Adds `weight · gradient` to each sum, each product and each sum rounded to `f32`.
    ///
    /// # Errors
    ///
    /// If the weight is not above zero, a gradient is not finite, or its length is not that of the batches before.
    pub fn add<'a>(
        &mut self,
        gradients: impl IntoIterator<Item = (&'a str, &'a [f32])>,
        weight: f32,
    ) -> Result<(), TrainError> {
        if !(weight.is_finite() && weight > 0.0) {
            return Err(TrainError::BatchWeight { weight });
        }
        for (name, gradient) in gradients {
            check_finite(name, gradient)?;
            let Some(sum) = self.sums.get_mut(name) else {
                let mut sum = vec![0.0; gradient.len()];
                sum.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK)).for_each(|(sum, gradient)| {
                    sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum = weight * g);
                });
                self.sums.insert(name.to_owned(), sum);
                continue;
            };
            if sum.len() != gradient.len() {
                return Err(TrainError::Length {
                    tensor: name.to_owned(),
                    what: "gradient",
                    expected: sum.len(),
                    actual: gradient.len(),
                });
            }
            sum.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK)).for_each(|(sum, gradient)| {
                sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += weight * g);
            });
        }
        self.weight += weight;
        Ok(())
    }

    /// Returns the mean and starts anew.
    pub fn take(&mut self) -> Result<Tensors, TrainError> {
        if self.weight == 0.0 {
            return Err(TrainError::NoGradients);
        }
        let mut mean = std::mem::take(&mut self.sums);
        let weight = std::mem::take(&mut self.weight);
        for gradient in mean.values_mut() {
            gradient.par_chunks_mut(CHUNK).for_each(|chunk| chunk.iter_mut().for_each(|g| *g /= weight));
        }
        Ok(mean)
    }
}

/// Returns the norm of all gradients together; refuses what is not finite.
pub(super) fn norm<'a>(gradients: impl Iterator<Item = (&'a str, &'a [f32])>) -> Result<f64, TrainError> {
    let mut squares = 0.0f64;
    for (name, gradient) in gradients {
        let chunks: Vec<f64> =
            gradient.par_chunks(CHUNK).map(|chunk| vectorized(SumOfSquares(chunk))).collect();
        let sum = chunks.into_iter().sum::<f64>();
        // Squares of finite f32 cannot overflow f64, nor can their sum.
        if !sum.is_finite() {
            check_finite(name, gradient)?;
        }
        squares += sum;
    }
    Ok(squares.sqrt())
}

/// Returns what gradients of a norm are multiplied with so that it is at most `largest`.
pub(super) fn clip_factor(norm: f64, largest: f32) -> f32 {
    (f64::from(largest) / (norm + 1e-6)).min(1.0) as f32
}

/// Σ g² in `f64`: eight sums beside each other, then in pairs.
struct SumOfSquares<'a>(&'a [f32]);

impl Loop for SumOfSquares<'_> {
    type Output = f64;

    #[inline(always)]
    fn run(self) -> f64 {
        let (eights, rest) = self.0.as_chunks::<8>();
        let mut sums = [0.0f64; 8];
        for eight in eights {
            for (sum, &g) in sums.iter_mut().zip(eight) {
                *sum += f64::from(g) * f64::from(g);
            }
        }
        for (sum, &g) in sums.iter_mut().zip(rest) {
            *sum += f64::from(g) * f64::from(g);
        }
        let [a, b, c, d, e, f, g, h] = sums;
        ((a + b) + (c + d)) + ((e + f) + (g + h))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(all: &[(&str, Vec<f32>)]) -> Tensors {
        all.iter().map(|(name, values)| ((*name).to_owned(), values.clone())).collect()
    }

    fn pairs(tensors: &Tensors) -> impl Iterator<Item = (&str, &[f32])> {
        tensors.iter().map(|(name, values)| (name.as_str(), values.as_slice()))
    }

    #[test]
    fn batches_of_different_sizes_count_by_their_samples() {
        let mut sums = Accumulator::default();
        sums.add(pairs(&tensors(&[("a", vec![1.0, -2.0]), ("b", vec![])])), 3.0).unwrap();
        sums.add(pairs(&tensors(&[("a", vec![5.0, 6.0]), ("b", vec![])])), 1.0).unwrap();
        assert_eq!(sums.take().unwrap(), tensors(&[("a", vec![2.0, 0.0]), ("b", vec![])]));
        assert!(matches!(sums.take(), Err(TrainError::NoGradients)));
    }

    #[test]
    fn one_batch_of_weight_one_is_unchanged() {
        let gradients = tensors(&[("a", vec![0.1, 1e-30, -3.7e8])]);
        let mut sums = Accumulator::default();
        sums.add(pairs(&gradients), 1.0).unwrap();
        assert_eq!(sums.take().unwrap(), gradients);
    }

    #[test]
    fn bad_gradients_are_named() {
        let mut sums = Accumulator::default();
        let error = sums.add(pairs(&tensors(&[("a", vec![0.0, f32::NAN])])), 1.0).unwrap_err();
        assert_eq!(error.to_string(), "the gradient of `a` holds NaN at element 1");
        let mut sums = Accumulator::default();
        sums.add(pairs(&tensors(&[("a", vec![0.0])])), 1.0).unwrap();
        let error = sums.add(pairs(&tensors(&[("a", vec![0.0; 2])])), 1.0).unwrap_err();
        assert_eq!(error.to_string(), "tensor `a` has 1 values, its gradient 2");
        for weight in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert!(matches!(sums.add([], weight), Err(TrainError::BatchWeight { .. })));
        }
        let infinite = tensors(&[("a", vec![1.0]), ("b", vec![f32::INFINITY])]);
        let error = norm(pairs(&infinite)).unwrap_err();
        assert_eq!(error.to_string(), "the gradient of `b` holds inf at element 0");
    }

    #[test]
    fn norms_over_the_limit_are_scaled_to_it() {
        for n in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1] {
            let values = |k: usize| (0..n).map(|i| ((i * k) % 17) as f32 - 8.0).collect::<Vec<f32>>();
            let before = tensors(&[("a", values(3)), ("b", values(5))]);
            let expected = before.values().flatten().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let found = norm(pairs(&before)).unwrap();
            assert!((found - expected).abs() <= 1e-12 * expected);
            let clipped = f64::from(clip_factor(found, 0.5)) * expected;
            assert!((clipped - expected.min(0.5)).abs() < 1e-5, "{clipped}");
            assert!((clip_factor(found, 1e9) - 1.0).abs() < f32::EPSILON);
        }
    }
}
