//! Two models on the same images: is one better, or was it luck?
//!
//! - McNemar's test, exact (Psychometrika 12, 1947): of the images that only one model answers correctly, either model
//!   is as likely to be the one; two-sided binomial probability of what was seen or worse.
//! - The difference of accuracies with a 95 % interval from paired bootstrap: images are drawn, with both answers.

use super::resample::{interval, replicates};
use serde::Serialize;

/// What became of two models' answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Paired {
    pub n: u64,
    /// Images that only the first model answers correctly.
    pub only_first: u64,
    /// Images that only the second model answers correctly.
    pub only_second: u64,
    /// Accuracy of the first less that of the second.
    pub difference: f64,
    pub low: f64,
    pub high: f64,
    /// Of McNemar's test.
    pub p_value: f64,
}

/// Compares which images two models answer correctly, in the same order; `None` without images or for different numbers of them.
pub fn compare(first: &[bool], second: &[bool]) -> Option<Paired> {
    let n = first.len();
    if n == 0 || n != second.len() {
        return None;
    }
    let gains: Vec<i8> = first.iter().zip(second).map(|(&a, &b)| i8::from(a) - i8::from(b)).collect();
    let count = |sign: i8| gains.iter().filter(|gain| **gain == sign).count() as u64;
    let (only_first, only_second) = (count(1), count(-1));
    let of_total = |sum: i64| sum as f64 / n as f64;
    let drawn =
        replicates(n, |drawn| [of_total(drawn.iter().map(|&index| i64::from(gains[index as usize])).sum())]);
    let (low, high) = interval(drawn.into_iter().map(|[difference]| difference))?;
    Some(Paired {
        n: n as u64,
        only_first,
        only_second,
        difference: of_total(only_first as i64 - only_second as i64),
        low,
        high,
        p_value: mcnemar(only_first, only_second),
    })
}

/// 2 · P(X ≤ min(b, c)) for X ~ Binomial(b + c, ½), at most 1.
fn mcnemar(b: u64, c: u64) -> f64 {
    let (n, k) = (b + c, b.min(c));
    // The terms as multiples of the last one, which is the largest: ln C(n, k) by sums of logarithms, the rest by ratios.
    let ln_last: f64 = (0..k).map(|i| ((n - i) as f64 / (i + 1) as f64).ln()).sum::<f64>()
        - n as f64 * std::f64::consts::LN_2;
    let (mut term, mut sum) = (1.0, 0.0);
    for i in (0..=k).rev() {
        sum += term;
        term *= i as f64 / (n - i + 1) as f64;
    }
    (2.0 * ln_last.exp() * sum).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mcnemar_is_the_binomial_test() {
        // scipy.stats.binomtest(k, n, 0.5).pvalue of SciPy 1.17
        for (b, c, p) in [
            (0, 0, 1.0),
            (1, 0, 1.0),
            (5, 0, 0.0625),
            (1, 9, 0.021_484_375),
            (10, 10, 1.0),
            (0, 10, 0.001_953_125),
        ] {
            assert!((mcnemar(b, c) - p).abs() < 1e-14, "{b} {c}: {}", mcnemar(b, c));
        }
        // By exact whole numbers, for all small tables.
        for n in 1..40u64 {
            for b in 0..=n {
                let k = b.min(n - b);
                let (mut choose, mut sum) = (1u128, 0u128);
                for i in 0..=k {
                    sum += choose;
                    choose = choose * u128::from(n - i) / u128::from(i + 1);
                }
                let exact = (2.0 * sum as f64 / (1u128 << n) as f64).min(1.0);
                assert!((mcnemar(b, n - b) - exact).abs() < 1e-12 * exact, "{b} of {n}");
            }
        }
        // Large tables neither overflow nor vanish too early.
        let p = mcnemar(50_000, 50_700);
        assert!(p > 0.02 && p < 0.04, "{p}");
        assert!(mcnemar(100_000, 0) == 0.0);
    }

    #[test]
    fn a_difference_is_signed_and_its_interval_covers_it() {
        let first: Vec<bool> = (0..500).map(|i| i % 10 != 0).collect();
        let second: Vec<bool> = (0..500).map(|i| i % 5 != 1).collect();
        let found = compare(&first, &second).unwrap();
        assert_eq!((found.only_first, found.only_second, found.n), (100, 50, 500));
        assert!((found.difference - 0.1).abs() < 1e-12);
        assert!(found.low < 0.1 && 0.1 < found.high && found.low > 0.0, "{found:?}");
        // The standard error of the mean of ±1s: √((150 − 50²/500) / 500²).
        let error = (145.0f64 / 250_000.0).sqrt();
        assert!((found.high - found.low - 2.0 * 1.96 * error).abs() < 0.01, "{found:?}");
        let turned = compare(&second, &first).unwrap();
        assert_eq!((turned.difference, turned.p_value), (-found.difference, found.p_value));
        let same = compare(&first, &first).unwrap();
        assert_eq!((same.difference, same.low, same.high, same.p_value), (0.0, 0.0, 0.0, 1.0));
    }

    #[test]
    fn nothing_and_unequal_numbers_do_not_compare() {
        assert_eq!(compare(&[], &[]), None);
        assert_eq!(compare(&[true], &[]), None);
    }
}
