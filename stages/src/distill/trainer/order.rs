//! The order in which images are trained on.

use merganser_tensors::kernels::random::Stream;

/// Positions 0 to `n` in the order of an epoch: by random 64-bit words of a stream that the seed and the epoch name.
pub(in crate::distill) fn shuffled(n: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut words = vec![0u32; 2 * n];
    Stream::new(seed, &["order", &epoch.to_string()]).fill(0, &mut words);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_key(|&i| (words[2 * i], words[2 * i + 1], i));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_has_all_in_another_order() {
        let first = shuffled(100, 7, 0);
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        assert_eq!(first, shuffled(100, 7, 0));
        assert_ne!(first, shuffled(100, 7, 1));
        assert_ne!(first, shuffled(100, 8, 0));
        assert_eq!(shuffled(1, 0, 0), [0]);
        assert!(shuffled(0, 0, 0).is_empty());
    }

    #[test]
    fn places_are_uniform() {
        // Over 2000 epochs the first place is taken by each of 5 about 400 times: within five deviations of √(2000·0.2·0.8).
        let mut counts = [0i32; 5];
        (0..2000).for_each(|epoch| counts[shuffled(5, 3, epoch)[0]] += 1);
        assert!(counts.iter().all(|count| (count - 400).abs() < 90), "{counts:?}");
    }
}
