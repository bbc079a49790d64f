//! What a constant that holds no checkpoint tensor is, and which tensors may be inside one that is unexplained.

use std::collections::{BTreeMap, BTreeSet};

use super::ConstantKind;
use super::digests::is_uniform;

/// Recognizes constants that no weight is needed to explain.
pub(super) fn recognize(shape: &[usize], values: &[f32]) -> Option<ConstantKind> {
    if values.len() <= 4 {
        Some(ConstantKind::Small)
    } else if is_uniform(values) {
        Some(ConstantKind::Uniform)
    } else if is_mask(shape, values) {
        Some(ConstantKind::CausalMask)
    } else if is_grid(shape, values) {
        Some(ConstantKind::CoordinateGrid)
    } else {
        None
    }
}

/// Returns the unbound tensors that a computed constant may hide.
///
/// That is every unbound tensor, except those of a part of the model that the graph does not contain: a module
/// of at least four tensors, none of which is bound, in the first two levels of names (only the first level
/// when `coarse`: a quantized graph binds nothing of modules that it does contain).
pub(super) fn suspects(all: &[&str], bound: &BTreeSet<&str>, coarse: bool) -> Vec<String> {
    const SMALLEST_PART: usize = 4;
    let skip = common_prefix(all);
    let mut parts: BTreeMap<&str, (usize, bool)> = BTreeMap::new();
    for name in all {
        for part in parts_of(name, skip, coarse) {
            let entry = parts.entry(part).or_default();
            entry.0 += 1;
            entry.1 |= bound.contains(name);
        }
    }
    all.iter()
        .filter(|name| !bound.contains(*name))
        .filter(|name| {
            !parts_of(name, skip, coarse).into_iter().any(|p| {
                let (n_tensors, any_bound) = parts[p];
                n_tensors >= SMALLEST_PART && !any_bound
            })
        })
        .map(|name| (*name).to_owned())
        .collect()
}

/// Returns how many leading bytes all names share, up to a dot (a wrapper such as `model.`).
fn common_prefix(names: &[&str]) -> usize {
    let Some(first) = names.first() else { return 0 };
    let mut prefix = 0;
    while let Some(dot) = first[prefix..].find('.') {
        let end = prefix + dot + 1;
        if !names.iter().all(|n| n.starts_with(&first[..end])) {
            break;
        }
        prefix = end;
    }
    prefix
}

fn parts_of(name: &str, skip: usize, coarse: bool) -> Vec<&str> {
    let levels = if coarse { 1 } else { 2 };
    name.match_indices('.').map(|(i, _)| i).filter(|&i| i >= skip).take(levels).map(|i| &name[..i]).collect()
}

/// Zero where attention is allowed and a very large negative number elsewhere, or a triangle of ones.
fn is_mask(shape: &[usize], values: &[f32]) -> bool {
    if values.iter().all(|&v| v == 0.0 || v <= -1e4) {
        return true;
    }
    let [.., rows, columns] = *shape else { return false };
    values.iter().all(|&v| v == 0.0 || v == 1.0)
        && values.chunks_exact(rows * columns).all(|matrix| {
            let at = |keep: fn(usize, usize) -> bool| {
                matrix.iter().enumerate().all(|(i, &v)| (v == 1.0) == keep(i / columns, i % columns))
            };
            let triangles: [fn(usize, usize) -> bool; 4] =
                [|r, c| c <= r, |r, c| c >= r, |r, c| c < r, |r, c| c > r];
            triangles.into_iter().any(at)
        })
}

/// Linear in the position, as a whole or for each of up to four channels (first or last axis).
fn is_grid(shape: &[usize], values: &[f32]) -> bool {
    let n_values = values.len();
    let channels_last = shape.last().copied().filter(|&n| n <= 4 && n_values / n > 4);
    let channels_first = shape.iter().copied().find(|&n| n != 1).filter(|&n| n <= 4 && n_values / n > 4);
    let last = || {
        channels_last.is_some_and(|n| {
            let channel = |c: usize| values.iter().skip(c).step_by(n).copied().collect::<Vec<_>>();
            (0..n).all(|c| is_linear(&shape[..shape.len() - 1], &channel(c)))
        })
    };
    let first = || {
        channels_first.is_some_and(|n| {
            let axis = shape.iter().position(|&d| d != 1).expect("found above");
            values.chunks_exact(n_values / n).all(|channel| is_linear(&shape[axis + 1..], channel))
        })
    };
    is_linear(shape, values) || last() || first()
}

/// Returns whether the value is `v₀ + Σ slope·index`, within a rounding error of the range of values.
fn is_linear(shape: &[usize], values: &[f32]) -> bool {
    let first = f64::from(values[0]);
    let (mut lowest, mut highest) = (first, first);
    for &v in values {
        lowest = lowest.min(f64::from(v));
        highest = highest.max(f64::from(v));
    }
    let tolerance = 1e-5 * (highest - lowest).max(highest.abs()).max(lowest.abs());
    if !tolerance.is_finite() {
        return false;
    }
    let mut strides = vec![1usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    // The slope along an axis from its two ends, which keeps rounding of single steps out.
    let slopes: Vec<f64> = shape
        .iter()
        .zip(&strides)
        .map(
            |(&n, &stride)| {
                if n < 2 { 0.0 } else { (f64::from(values[(n - 1) * stride]) - first) / (n - 1) as f64 }
            },
        )
        .collect();
    values.iter().enumerate().all(|(i, &v)| {
        let linear: f64 = shape
            .iter()
            .zip(&strides)
            .zip(&slopes)
            .map(|((&n, &stride), &s)| s * ((i / stride) % n) as f64)
            .sum();
        (f64::from(v) - first - linear).abs() <= tolerance
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recognizes_masks() {
        let causal =
            |fill: f32| -> Vec<f32> { (0..25).map(|i| if i % 5 > i / 5 { fill } else { 0.0 }).collect() };
        for fill in [f32::NEG_INFINITY, f32::MIN, -65504.0, -1e4, 1.0] {
            assert_eq!(recognize(&[1, 1, 5, 5], &causal(fill)), Some(ConstantKind::CausalMask), "{fill}");
        }
        assert_eq!(recognize(&[1, 1, 5, 5], &causal(-3.0)), None);
    }

    #[test]
    fn recognizes_grids_in_every_layout() {
        let (h, w) = (6usize, 4usize);
        let x = |i: usize| ((i % w) as f32 + 0.5) / w as f32 * 2.0 - 1.0;
        let y = |i: usize| ((i / w) as f32 + 0.5) / h as f32 * 2.0 - 1.0;
        let last: Vec<f32> = (0..h * w).flat_map(|i| [x(i), y(i)]).collect();
        let first: Vec<f32> = (0..h * w).map(x).chain((0..h * w).map(y)).collect();
        let line: Vec<f32> = (0..7).map(|i| i as f32 * 0.3).collect();
        assert_eq!(recognize(&[h, w, 2], &last), Some(ConstantKind::CoordinateGrid));
        assert_eq!(recognize(&[1, 2, h, w], &first), Some(ConstantKind::CoordinateGrid));
        assert_eq!(recognize(&[1, 7], &line), Some(ConstantKind::CoordinateGrid));
        let mut broken = last.clone();
        broken[9] += 0.01;
        assert_eq!(recognize(&[h, w, 2], &broken), None);
        assert_eq!(recognize(&[5], &[1.0, 2.0, f32::NAN, 4.0, 5.0]), None);
    }

    #[test]
    fn another_tower_is_no_suspect() {
        let all = [
            "m.logit_scale",
            "m.text.0.weight",
            "m.text.1.weight",
            "m.text.2.weight",
            "m.text.3.weight",
            "m.vision.0.weight",
            "m.vision.pos_embed",
        ];
        let bound = BTreeSet::from(["m.vision.0.weight"]);
        assert_eq!(suspects(&all, &bound, false), ["m.logit_scale", "m.vision.pos_embed"]);
    }
}
