//! Means over masks, objects and videos, with intervals.
//!
//! `miou` is the mean J of all masks. For J and F of a video, DAVIS first takes the mean over the frames of every object, then over the objects;
//! J&F is the mean of the two. In still images every object has one mask, so that J equals `miou`.
//!
//! Intervals are percentile bootstrap intervals over images or videos, not over masks: those of one image resemble each other.

use merganser_tensors::kernels::random::Stream;
use std::collections::BTreeMap;

/// How one mask was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// The image or video.
    pub sequence: usize,
    /// The object within it.
    pub object: usize,
    /// J
    pub jaccard: f64,
    /// F
    pub boundary: f64,
}

/// A mean with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    pub value: f64,
    /// What it is the mean of: masks, or objects.
    pub n: u64,
    pub low: f64,
    pub high: f64,
}

/// What is told about all masks of a data set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    pub miou: Estimate,
    pub j: Estimate,
    pub f: Estimate,
    pub j_and_f: Estimate,
}

/// Resamples of the bootstrap.
const RESAMPLES: usize = 2000;

const SEED: u64 = 0;

/// A sum over one sequence, and of how many.
type Part = (f64, u64);

/// Summarizes; `None` without masks.
pub fn summarize(measured: &[Measured]) -> Option<Summary> {
    if measured.is_empty() {
        return None;
    }
    let mut masks: BTreeMap<usize, Part> = BTreeMap::new();
    let mut objects: BTreeMap<(usize, usize), (f64, f64, u64)> = BTreeMap::new();
    for mask in measured {
        let part = masks.entry(mask.sequence).or_default();
        *part = (part.0 + mask.jaccard, part.1 + 1);
        let object = objects.entry((mask.sequence, mask.object)).or_default();
        *object = (object.0 + mask.jaccard, object.1 + mask.boundary, object.2 + 1);
    }
    let of_objects = |mean: &dyn Fn(f64, f64) -> f64| {
        let mut parts: BTreeMap<usize, Part> = BTreeMap::new();
        for (&(sequence, _), &(j, f, frames)) in &objects {
            let part = parts.entry(sequence).or_default();
            *part = (part.0 + mean(j / frames as f64, f / frames as f64), part.1 + 1);
        }
        estimate(&parts.into_values().collect::<Vec<_>>())
    };
    Some(Summary {
        miou: estimate(&masks.into_values().collect::<Vec<_>>()),
        j: of_objects(&|j, _| j),
        f: of_objects(&|_, f| f),
        j_and_f: of_objects(&|j, f| f64::midpoint(j, f)),
    })
}

/// The mean over all parts. With a single one nothing is known about how others would be.
fn estimate(parts: &[Part]) -> Estimate {
    let mean = |parts: &mut dyn Iterator<Item = Part>| {
        let (sum, n) = parts.fold((0.0, 0), |(sum, n), part| (sum + part.0, n + part.1));
        (sum / n as f64, n)
    };
    let (value, n) = mean(&mut parts.iter().copied());
    if parts.len() < 2 {
        return Estimate { value, n, low: 0.0, high: 1.0 };
    }
    let stream = Stream::new(SEED, &["bootstrap"]);
    let mut words = vec![0; parts.len()];
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|resample| {
            stream.fill(resample * parts.len(), &mut words);
            let pick = |word: &u32| parts[((u64::from(*word) * parts.len() as u64) >> 32) as usize];
            mean(&mut words.iter().map(pick)).0
        })
        .collect();
    means.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| means[((RESAMPLES - 1) as f64 * share).round() as usize];
    Estimate { value, n, low: at(0.025), high: at(0.975) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(sequence: usize, object: usize, jaccard: f64, boundary: f64) -> Measured {
        Measured { sequence, object, jaccard, boundary }
    }

    #[test]
    fn frames_come_before_objects_and_objects_before_all() {
        // One object in two frames, another in one.
        let summary =
            summarize(&[measured(0, 0, 0.2, 0.1), measured(0, 0, 0.4, 0.3), measured(1, 0, 0.9, 0.8)])
                .unwrap();
        assert!((summary.miou.value - 0.5).abs() < 1e-12 && summary.miou.n == 3);
        assert!((summary.j.value - 0.6).abs() < 1e-12 && summary.j.n == 2);
        assert!((summary.f.value - 0.5).abs() < 1e-12);
        assert!((summary.j_and_f.value - 0.55).abs() < 1e-12);
        assert_eq!(summarize(&[]), None);
    }

    #[test]
    fn the_interval_is_that_of_the_normal_approximation_for_many_images() {
        let values: Vec<Measured> = (0..400).map(|i| measured(i, 0, (i % 10) as f64 / 10.0, 0.5)).collect();
        let summary = summarize(&values).unwrap();
        // The standard deviation of 0, 0.1, …, 0.9 is 0.287.
        let half = 1.96 * 0.2872 / 20.0;
        assert!((summary.miou.low - (0.45 - half)).abs() < 0.004, "{:?}", summary.miou);
        assert!((summary.miou.high - (0.45 + half)).abs() < 0.004, "{:?}", summary.miou);
        assert_eq!((summary.f.low, summary.f.high), (0.5, 0.5));
    }

    #[test]
    fn masks_of_one_image_are_drawn_together() {
        let apart: Vec<Measured> =
            (0..100).map(|i| measured(i, 0, f64::from(u8::from(i < 50)), 1.0)).collect();
        let together: Vec<Measured> =
            apart.iter().map(|m| Measured { sequence: m.sequence / 25, object: m.sequence, ..*m }).collect();
        let width = |values: &[Measured]| {
            let estimate = summarize(values).unwrap().miou;
            estimate.high - estimate.low
        };
        assert!(width(&together) > 2.0 * width(&apart));
        // Of a single image nothing follows for others.
        let single = summarize(&[measured(0, 0, 0.5, 0.5)]).unwrap().j;
        assert_eq!((single.low, single.high), (0.0, 1.0));
    }
}
