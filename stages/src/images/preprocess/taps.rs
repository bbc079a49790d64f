//! Resampling filters and their fixed-point coefficients, as Pillow computes them.
//!
//! For output position `i` of an axis resized from `n` to `m`:
//!
//! ```text
//! scale   = n / m            stretch = max(scale, 1)       radius = support * stretch
//! centre  = (i + 0.5) * scale
//! taps    = [trunc(centre - radius + 0.5), trunc(centre + radius + 0.5))  within [0, n)
//! w[t]    = filter((t - centre + 0.5) / stretch), divided by their sum    (f64)
//! k[t]    = round half away from zero (w[t] * 2^22)                       (i32)
//! pixel   = clamp((2^21 + sum of byte[t] * k[t]) >> 22, 0, 255)
//! ```
//!
//! 22 bits leave room for the byte and for filters whose partial sums leave 0..1. Stretching the filter when
//! shrinking is what makes it antialias. Nearest neighbour takes byte `trunc((i + 0.5) * scale)`, with the
//! position accumulated by addition as Pillow does (rounding included).
//!
//! Source: Pillow 13, `src/libImaging/Resample.c` and `Geometry.c` (described, not copied). Bit-exact where the
//! platform's `sin` and `cos` are (Lanczos and Hamming use them).

use serde::Serialize;

/// Bits after the binary point of a coefficient.
pub(super) const PRECISION_BITS: u32 = 32 - 8 - 2;

/// A resampling filter, by Pillow's names and numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    Nearest,
    Lanczos,
    Bilinear,
    Bicubic,
    Box,
    Hamming,
}

impl Filter {
    /// Every filter, at the index of its number.
    pub const ALL: [Self; 6] =
        [Self::Nearest, Self::Lanczos, Self::Bilinear, Self::Bicubic, Self::Box, Self::Hamming];

    /// Finds a filter by Pillow's number.
    pub fn from_number(number: u64) -> Option<Self> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// Finds a filter by name, in any case, with or without Pillow's prefixes (`PIL.Image.BICUBIC`).
    pub fn from_name(name: &str) -> Option<Self> {
        let last = name.rsplit('.').next().unwrap_or(name);
        Self::ALL.into_iter().find(|filter| filter.name().eq_ignore_ascii_case(last))
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Nearest => "nearest",
            Self::Lanczos => "lanczos",
            Self::Bilinear => "bilinear",
            Self::Bicubic => "bicubic",
            Self::Box => "box",
            Self::Hamming => "hamming",
        }
    }

    /// Returns the radius beyond which the filter is zero; nearest neighbour is no convolution.
    fn support(self) -> f64 {
        match self {
            Self::Nearest => 0.0,
            Self::Lanczos => 3.0,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Bicubic => 2.0,
            Self::Box => 0.5,
        }
    }

    fn value(self, x: f64) -> f64 {
        match self {
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Nearest | Self::Lanczos => 0.0,
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
            Self::Bicubic => bicubic(x.abs()),
            Self::Box => f64::from(x > -0.5 && x <= 0.5),
            Self::Hamming => hamming(x.abs()),
        }
    }
}

/// Where an output position takes its value from, for a window of output positions.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taps {
    /// Source index, or none where rounding runs past the edge (black).
    Pick(Vec<Option<usize>>),
    /// Weighted sums.
    Sum { outputs: Vec<TapRange>, weights: Vec<i32> },
}

/// The taps of one output position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TapRange {
    /// First source index.
    pub(super) first: usize,
    pub(super) count: usize,
    /// Where its weights start.
    pub(super) weights_at: usize,
}

impl Taps {
    /// Computes the taps of output positions `start..end` of an axis resized from `source` to `target`.
    pub(super) fn new(filter: Filter, source: usize, target: usize, start: usize, end: usize) -> Self {
        let scale = source as f64 / target as f64;
        if filter == Filter::Nearest {
            let mut position = scale * 0.5;
            let mut picks = Vec::with_capacity(end - start);
            for output in 0..end {
                if output >= start {
                    picks.push(Some(position as usize).filter(|&index| index < source));
                }
                position += scale;
            }
            return Self::Pick(picks);
        }
        let stretch = scale.max(1.0);
        let radius = filter.support() * stretch;
        let inverse_stretch = 1.0 / stretch;
        let mut outputs = Vec::with_capacity(end - start);
        let mut weights = Vec::new();
        let mut exact = Vec::new();
        for output in start..end {
            let centre = (output as f64 + 0.5) * scale;
            // Casts of negative values give 0, which is where the axis starts.
            let first = (centre - radius + 0.5) as usize;
            let last = ((centre + radius + 0.5) as usize).min(source);
            exact.clear();
            exact
                .extend((first..last).map(|tap| filter.value((tap as f64 - centre + 0.5) * inverse_stretch)));
            let sum: f64 = exact.iter().fold(0.0, |sum, weight| sum + weight);
            outputs.push(TapRange { first, count: exact.len(), weights_at: weights.len() });
            let divisor = if sum == 0.0 { 1.0 } else { sum };
            weights.extend(exact.iter().map(|weight| fixed_point(weight / divisor)));
        }
        Self::Sum { outputs, weights }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Pick(picks) => picks.len(),
            Self::Sum { outputs, .. } => outputs.len(),
        }
    }

    /// Returns the range of source indices that are read.
    pub(super) fn source_range(&self) -> (usize, usize) {
        let (first, last) = match self {
            Self::Pick(picks) => {
                let used = || picks.iter().flatten().copied();
                (used().min(), used().max().map(|last| last + 1))
            }
            Self::Sum { outputs, .. } => (
                outputs.iter().map(|output| output.first).min(),
                outputs.iter().map(|output| output.first + output.count).max(),
            ),
        };
        (first.unwrap_or(0), last.unwrap_or(0))
    }
}

fn fixed_point(weight: f64) -> i32 {
    let scaled = weight * f64::from(1 << PRECISION_BITS);
    (if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn hamming(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    if x >= 1.0 {
        return 0.0;
    }
    let x = x * std::f64::consts::PI;
    // Pillow writes these two as single-precision literals.
    x.sin() / x * (f64::from(0.54_f32) + f64::from(0.46_f32) * x.cos())
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let x = x * std::f64::consts::PI;
    x.sin() / x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_those_of_pillow() {
        let names: Vec<_> = (0..6).map(|number| Filter::from_number(number).unwrap().name()).collect();
        assert_eq!(names, ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]);
        assert_eq!(Filter::from_number(6), None);
        assert_eq!(Filter::from_name("PIL.Image.BICUBIC"), Some(Filter::Bicubic));
        assert_eq!(Filter::from_name("cubic"), None);
    }

    #[test]
    fn a_window_has_the_taps_of_the_whole() {
        for filter in Filter::ALL {
            for (source, target) in [(10, 7), (7, 10), (5, 1), (1, 5), (6, 6)] {
                let whole = Taps::new(filter, source, target, 0, target);
                let window = Taps::new(filter, source, target, target / 3, target);
                match (&whole, &window) {
                    (Taps::Pick(whole), Taps::Pick(window)) => assert_eq!(&whole[target / 3..], window),
                    (
                        Taps::Sum { outputs, weights },
                        Taps::Sum { outputs: window_outputs, weights: window_weights },
                    ) => {
                        for (a, b) in outputs[target / 3..].iter().zip(window_outputs) {
                            assert_eq!((a.first, a.count), (b.first, b.count));
                            assert_eq!(
                                weights[a.weights_at..][..a.count],
                                window_weights[b.weights_at..][..b.count]
                            );
                        }
                    }
                    _ => unreachable!("one filter gives one kind of taps"),
                }
            }
        }
    }

    #[test]
    fn weights_sum_to_one_within_rounding() {
        for filter in &Filter::ALL[1..] {
            for (source, target) in [(300, 7), (7, 300), (13, 12)] {
                let Taps::Sum { outputs, weights } = Taps::new(*filter, source, target, 0, target) else {
                    panic!("{filter:?} is a convolution");
                };
                for output in outputs {
                    let sum: i64 =
                        weights[output.weights_at..][..output.count].iter().map(|&k| i64::from(k)).sum();
                    assert!((sum - (1 << PRECISION_BITS)).abs() <= output.count as i64);
                    assert!(output.count > 0 && output.first + output.count <= source);
                }
            }
        }
    }
}
