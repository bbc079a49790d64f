//! Bootstrap resampling: percentile intervals (Efron, Annals of Statistics 7, 1979) that anyone gets again.
//!
//! Replicate `b` draws its images from a stream of random numbers named after `b`, so intervals depend neither on the
//! number of threads nor on the machine.

use merganser_tensors::kernels::random::Stream;
use rayon::prelude::*;

/// Replicates per interval: the ends of a 95 % interval then rest on 25 values each.
pub(crate) const REPLICATES: usize = 1000;

const SEED: u64 = 0;

/// The share of replicates on either side of a 95 % interval.
const TAIL: f64 = 0.025;

/// Draws `REPLICATES` samples of `n` of the indices `0..n` with replacement, and returns what `statistics` makes of each.
pub(crate) fn replicates<const N: usize>(
    n: usize,
    statistics: impl Fn(&[u32]) -> [f64; N] + Sync,
) -> Vec<[f64; N]> {
    (0..REPLICATES)
        .into_par_iter()
        .map_init(Vec::new, |drawn: &mut Vec<u32>, replicate| {
            drawn.resize(n, 0);
            Stream::new(SEED, &["bootstrap", &replicate.to_string()]).fill(0, drawn);
            for word in drawn.iter_mut() {
                // 2³² is not a multiple of n: some images are more likely by less than n/2³².
                *word = ((u64::from(*word) * n as u64) >> 32) as u32;
            }
            statistics(drawn)
        })
        .collect()
}

/// The 95 % interval of one of the statistics, interpolated between replicates; `None` if one of them is not a number.
pub(crate) fn interval(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let mut values: Vec<f64> = values.collect();
    if values.is_empty() || values.iter().any(|value| value.is_nan()) {
        return None;
    }
    values.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| {
        let position = share * (values.len() - 1) as f64;
        let (below, part) = (position.floor() as usize, position.fract());
        let above = (below + 1).min(values.len() - 1);
        if part == 0.0 { values[below] } else { values[below] * (1.0 - part) + values[above] * part }
    };
    Some((at(TAIL), at(1.0 - TAIL)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_the_same_for_any_number_of_threads_and_evenly_spread() {
        let draw = || replicates(7, |drawn| [f64::from(drawn.iter().sum::<u32>()), f64::from(drawn[0])]);
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(draw);
        let three = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap().install(draw);
        assert_eq!(one, three);
        let mean = one.iter().map(|[sum, _]| sum / 7.0).sum::<f64>() / one.len() as f64;
        // The mean of 0..=6 is 3, with the standard deviation 2 of one draw.
        assert!((mean - 3.0).abs() < 5.0 * 2.0 / (7000f64).sqrt(), "{mean}");
        assert!(one.iter().all(|[_, first]| *first < 7.0));
    }

    #[test]
    fn the_interval_of_a_mean_is_that_of_the_normal_distribution() {
        // 400 images, every second one correct: the standard error is 0.025.
        let values = replicates(400, |drawn| [drawn.iter().filter(|i| **i % 2 == 0).count() as f64 / 400.0]);
        let (low, high) = interval(values.into_iter().map(|[value]| value)).unwrap();
        assert!((low - 0.451).abs() < 0.009 && (high - 0.549).abs() < 0.009, "{low} {high}");
    }

    #[test]
    fn an_interval_is_interpolated_and_needs_numbers() {
        assert_eq!(interval((0..=40).map(f64::from)), Some((1.0, 39.0)));
        assert_eq!(interval((0..=20).map(f64::from)), Some((0.5, 19.5)));
        assert_eq!(interval([5.0].into_iter()), Some((5.0, 5.0)));
        assert_eq!(interval([1.0, f64::NAN].into_iter()), None);
        assert_eq!(interval(std::iter::empty()), None);
    }
}
