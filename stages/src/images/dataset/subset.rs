//! Subsets: some images of a dataset, chosen by a seed.
//!
//! Every image has a rank that depends on the seed and its position alone (SplitMix64, Steele, Lea and Flood, OOPSLA 2014); the images of lowest
//! rank are taken, in the dataset's order. So a larger subset of the same seed contains the smaller one, and nothing depends on threads or on
//! the platform.

use std::collections::BTreeMap;

use super::chosen::Chosen;
use super::registry::Dataset;

/// How many images are taken, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subset {
    pub n: usize,
    pub seed: u64,
    /// Takes the same number from every class, as far as it has them.
    pub balanced: bool,
}

/// Takes a subset of a dataset; all of it if it has no more images.
pub(super) fn take(whole: Box<dyn Dataset>, subset: Subset) -> Box<dyn Dataset> {
    let indices = choose(whole.labels(), subset);
    Box::new(Chosen::new(whole, indices))
}

/// Returns the positions of the images that a subset takes, in order.
pub fn choose(labels: &[u32], subset: Subset) -> Vec<usize> {
    let mut ranked: Vec<usize> = (0..labels.len()).collect();
    ranked.sort_by_key(|&index| (rank(subset.seed, index as u64), index));
    let mut chosen = if subset.balanced {
        let mut sizes: BTreeMap<u32, usize> = BTreeMap::new();
        for &label in labels {
            *sizes.entry(label).or_default() += 1;
        }
        let counts = even_counts(&sizes.values().copied().collect::<Vec<_>>(), Some(subset.n));
        let mut left: BTreeMap<u32, usize> = sizes.into_keys().zip(counts).collect();
        ranked.retain(|&index| {
            let left = left.entry(labels[index]).or_default();
            let takes = *left > 0;
            *left -= usize::from(takes);
            takes
        });
        ranked
    } else {
        ranked.truncate(subset.n);
        ranked
    };
    chosen.sort_unstable();
    chosen
}

/// SplitMix64's output for a counter.
fn rank(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(index.wrapping_add(1)));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Splits `limit` over classes of the given sizes by dealing one image to each class in turn.
pub(super) fn even_counts(sizes: &[usize], limit: Option<usize>) -> Vec<usize> {
    let total: usize = sizes.iter().sum();
    let mut left = limit.unwrap_or(total).min(total);
    let mut counts = vec![0; sizes.len()];
    while left > 0 {
        let open: Vec<usize> = (0..sizes.len()).filter(|&class| counts[class] < sizes[class]).collect();
        let smallest_room = open.iter().map(|&class| sizes[class] - counts[class]).min().unwrap_or(0);
        let rounds = smallest_room.min(left / open.len());
        if rounds == 0 {
            for &class in &open[..left] {
                counts[class] += 1;
            }
            break;
        }
        for &class in &open {
            counts[class] += rounds;
        }
        left -= rounds * open.len();
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn subset(n: usize, seed: u64, balanced: bool) -> Subset {
        Subset { n, seed, balanced }
    }

    #[test]
    fn ranks_are_those_of_splitmix64() {
        // The first outputs of the authors' generator for seed 1234567.
        let expected = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!([0, 1, 2].map(|index| rank(1_234_567, index)), expected);
    }

    #[test]
    fn subsets_are_in_order_nested_and_follow_the_seed() {
        let labels: Vec<u32> = (0..1000).map(|index| index % 7).collect();
        let small = choose(&labels, subset(50, 3, false));
        let large = choose(&labels, subset(200, 3, false));
        assert!(small.is_sorted() && small.len() == 50);
        let within: HashSet<_> = large.iter().collect();
        assert!(small.iter().all(|index| within.contains(index)));
        assert_ne!(small, choose(&labels, subset(50, 4, false)));
        assert_eq!(choose(&labels, subset(2000, 0, false)), (0..1000).collect::<Vec<_>>());
        // About as many from anywhere: the choice is not the first ones.
        assert!((50..90).contains(&large.iter().filter(|&&index| index < 350).count()));
    }

    #[test]
    fn balanced_subsets_have_equally_many_of_every_class() {
        let labels: Vec<u32> = (0..100).map(|index| if index < 90 { 0 } else { 1 + index % 2 }).collect();
        let chosen = choose(&labels, subset(12, 9, true));
        let counts = [0, 1, 2].map(|class| chosen.iter().filter(|&&index| labels[index] == class).count());
        assert_eq!(counts, [4, 4, 4]);
        let all_of_the_small = choose(&labels, subset(30, 9, true));
        let of_first = all_of_the_small.iter().filter(|&&index| labels[index] == 0).count();
        assert_eq!((all_of_the_small.len(), of_first), (30, 20));
        assert!(choose(&[], subset(5, 0, true)).is_empty());
    }

    #[test]
    fn a_limit_deals_images_to_the_classes_in_turn() {
        assert_eq!(even_counts(&[5, 1, 3], None), [5, 1, 3]);
        assert_eq!(even_counts(&[5, 1, 3], Some(2)), [1, 1, 0]);
        assert_eq!(even_counts(&[5, 1, 3], Some(4)), [2, 1, 1]);
        assert_eq!(even_counts(&[5, 1, 3], Some(6)), [3, 1, 2]);
        assert_eq!(even_counts(&[5, 1, 3], Some(100)), [5, 1, 3]);
    }
}
