//! Whether the rows of a head are about the classes that the labels mean.
//!
//! A head in another order than the labels gives numbers like any other, only low ones. What gives it away is that its wrong answers are
//! consistent: nearly all images of a class get the same other class.

use std::cmp::Reverse;
use std::collections::BTreeMap;

/// Share of the images of exchanged classes that get the other class, from which on they count as exchanged.
const CONSISTENT: f64 = 0.6;
/// Share of these images that may be answered correctly all the same.
const CORRECT: f64 = 0.2;
/// Fewer images of exchanged classes than this say nothing.
const FEWEST_IMAGES: u64 = 20;

/// Classes that seem to be exchanged.
#[derive(Clone, Debug, PartialEq)]
pub struct Exchanged {
    /// How many classes.
    pub classes: usize,
    /// The most consistent case: images labelled `label` are answered with `answer`, `times` of `images`.
    pub label: u32,
    pub answer: u32,
    pub times: u64,
    pub images: u64,
    /// Share of correct answers of all images, if these classes had each other's names.
    pub accuracy: f64,
}

/// Finds classes whose images are answered with each other's names, by matching labels with answers, the most frequent pair first.
///
/// Both lists are by image. Random answers, and a model that confuses similar classes, do not look like this: see the constants.
pub fn exchanged(predictions: &[u32], labels: &[u32]) -> Option<Exchanged> {
    let mut images: BTreeMap<u32, u64> = BTreeMap::new();
    let mut times: BTreeMap<(u32, u32), u64> = BTreeMap::new();
    for (&answer, &label) in predictions.iter().zip(labels) {
        *images.entry(label).or_default() += 1;
        *times.entry((label, answer)).or_default() += 1;
    }
    let mut pairs: Vec<((u32, u32), u64)> = times.iter().map(|(&pair, &n)| (pair, n)).collect();
    pairs.sort_by_key(|&(pair, n)| (Reverse(n), pair));
    let (mut answer_of, mut label_of) = (BTreeMap::new(), BTreeMap::new());
    for ((label, answer), n) in pairs {
        if !answer_of.contains_key(&label) && !label_of.contains_key(&answer) {
            answer_of.insert(label, (answer, n));
            label_of.insert(answer, label);
        }
    }
    let of = |label: u32| images.get(&label).copied().unwrap_or_default();
    let moved: Vec<(u32, u32, u64)> = answer_of
        .iter()
        .filter(|&(label, &(answer, _))| *label != answer)
        .map(|(&label, &(answer, n))| (label, answer, n))
        .collect();
    let correct = |label: u32| times.get(&(label, label)).copied().unwrap_or_default();
    let all: u64 = moved.iter().map(|&(label, ..)| of(label)).sum();
    let consistent: u64 = moved.iter().map(|&(.., n)| n).sum();
    let own: u64 = moved.iter().map(|&(label, ..)| correct(label)).sum();
    let enough = moved.len() >= 2 && all >= FEWEST_IMAGES;
    if !enough || (consistent as f64) < CONSISTENT * all as f64 || own as f64 > CORRECT * all as f64 {
        return None;
    }
    let share = |&(label, _, n): &(u32, u32, u64)| n as f64 / of(label) as f64;
    let worst = moved.iter().max_by(|a, b| share(a).total_cmp(&share(b)).then(b.0.cmp(&a.0)))?;
    let matched: u64 = answer_of.values().map(|&(_, n)| n).sum();
    Some(Exchanged {
        classes: moved.len(),
        label: worst.0,
        answer: worst.1,
        times: worst.2,
        images: of(worst.0),
        accuracy: matched as f64 / labels.len() as f64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Labels 0..classes in turn, and answers: what `name` makes of the label, every tenth the next class instead.
    fn answers(classes: u32, n: u32, name: impl Fn(u32) -> u32) -> (Vec<u32>, Vec<u32>) {
        let labels: Vec<u32> = (0..n).map(|i| i % classes).collect();
        let wrong = |i: u32| u32::from(i / classes % 10 == 9);
        let predictions = (0..n).zip(&labels).map(|(i, label)| (name(*label) + wrong(i)) % classes).collect();
        (predictions, labels)
    }

    #[test]
    fn a_head_in_another_order_is_noticed() {
        for (classes, name) in [(10, (|c| 9 - c) as fn(u32) -> u32), (7, |c| (c + 3) % 7), (2, |c| 1 - c)] {
            let (predictions, labels) = answers(classes, 700, name);
            let found = exchanged(&predictions, &labels).unwrap();
            assert!(found.classes as u32 >= classes - 1, "{found:?}");
            assert_eq!(found.answer, name(found.label));
            assert_eq!((found.times, found.images), (u64::from(630 / classes), u64::from(700 / classes)));
            assert!((found.accuracy - 0.9).abs() < 0.02, "{found:?}");
        }
    }

    #[test]
    fn two_exchanged_classes_among_many_are_noticed() {
        let swap = |c| match c {
            3 => 11,
            11 => 3,
            c => c,
        };
        let (predictions, labels) = answers(40, 2000, swap);
        let found = exchanged(&predictions, &labels).unwrap();
        assert_eq!((found.classes, found.label, found.answer), (2, 3, 11));
    }

    #[test]
    fn right_random_constant_and_confused_answers_are_not() {
        let (right, labels) = answers(10, 500, |c| c);
        assert_eq!(exchanged(&right, &labels), None);
        for classes in [2, 10, 100] {
            let labels: Vec<u32> = (0..500).map(|i| i % classes).collect();
            let random: Vec<u32> =
                (0..500u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) % classes).collect();
            assert_eq!(exchanged(&random, &labels), None, "{classes}");
            assert_eq!(exchanged(&vec![1; 500], &labels), None);
        }
        // Half of the images of either of two classes are taken for the other.
        let confused: Vec<u32> =
            labels.iter().enumerate().map(|(i, &c)| if c < 2 && i % 20 < 10 { 1 - c } else { c }).collect();
        assert_eq!(exchanged(&confused, &labels), None);
        assert_eq!(exchanged(&[], &[]), None);
        assert_eq!(exchanged(&[1, 0], &[0, 1]), None, "two images say nothing");
    }
}
