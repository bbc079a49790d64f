//! Constants that an exporter computed from weights, recognized by computing them again.
//!
//! Only to know *which* tensors are inside: such a constant is not replaced, so a model must have these
//! tensors unchanged. Without this every unbound tensor of the model would be under suspicion.
//!
//! * SAM 2's dense position encoding, from a random matrix `G` of shape `[2, m]`: at the pixel with centre
//!   `(x, y)` in `[-1, 1]²`, `[sin(2π (x, y) G), cos(2π (x, y) G)]`.
//! * SAM 2's windowed position embedding: `pos_embed` `[1, c, h, w]` resized (bicubic, a = -0.75, half-pixel
//!   centres, clamped at the border) plus `pos_embed_window` `[1, c, p, q]` repeated over the whole map; also
//!   each of the two alone.
//! * An embedding of `c` values repeated at every pixel (SAM 2's `no_mask_embed`).

use rayon::prelude::*;

use super::digests::Origin;
use crate::graph::GraphTensor;
use crate::tensor::{Weights, WeightsError};

/// Returns the checkpoint tensors that a constant was computed from, if a known formula gives its values.
pub(super) fn sources(
    tensor: &GraphTensor,
    origin: &Origin,
    weights: &dyn Weights,
) -> Result<Option<Vec<String>>, WeightsError> {
    for map in Map::layouts(&tensor.shape) {
        let found = sources_of_map(&tensor.values(), map, origin, weights)?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

fn sources_of_map(
    values: &[f32],
    map: Map,
    origin: &Origin,
    weights: &dyn Weights,
) -> Result<Option<Vec<String>>, WeightsError> {
    let mut found: Vec<String> = Vec::new();
    for matrix in origin.tensors.iter().filter(|t| matches!(t.shape[..], [2, m] if 2 * m == map.channels)) {
        if map.fits(values, 1e-3, &dense_encoding(&weights.values(&matrix.name)?, map)) {
            found.push(matrix.name.clone());
        }
    }
    if !found.is_empty() {
        return Ok(Some(found));
    }
    let n_values = |shape: &[usize]| shape.iter().product::<usize>();
    let embeddings = origin.tensors.iter().filter_map(|t| match t.shape[..] {
        [1, c, h, w] if c == map.channels && h * w > 0 => Some((&t.name, (h, w))),
        _ => (n_values(&t.shape) == map.channels).then_some((&t.name, (1, 1))),
    });
    let mut resized = Vec::new();
    let mut tiled = Vec::new();
    for (name, size) in embeddings {
        let embedding = weights.values(name)?;
        if size != (1, 1) {
            resized.push((name, resize(&embedding, size, map)));
        }
        if map.height.is_multiple_of(size.0) && map.width.is_multiple_of(size.1) {
            tiled.push((name, tile(&embedding, size, map)));
        }
    }
    for (name, computed) in resized.iter().chain(&tiled) {
        if map.fits(values, 1e-4, computed) {
            found.push((*name).clone());
        }
    }
    if !found.is_empty() {
        return Ok(Some(found));
    }
    for (global, whole) in &resized {
        for (window, repeated) in tiled.iter().filter(|(window, _)| window != global) {
            let sum: Vec<f32> = whole.iter().zip(repeated).map(|(a, b)| a + b).collect();
            if map.fits(values, 1e-4, &sum) {
                return Ok(Some(vec![(*global).clone(), (*window).clone()]));
            }
        }
    }
    Ok(None)
}

/// A map of `channels` per pixel; `channels_last` is how the constant stores it.
#[derive(Clone, Copy)]
struct Map {
    channels: usize,
    height: usize,
    width: usize,
    channels_last: bool,
}

impl Map {
    /// Returns the ways in which a constant of this shape may be a map: channels first or last, and flattened if
    /// the map is a square.
    fn layouts(shape: &[usize]) -> Vec<Self> {
        let start = shape.iter().position(|&d| d != 1).unwrap_or(shape.len());
        let square = |n: usize| Some(n.isqrt()).filter(|side| side * side == n);
        let map = |channels, height, width, channels_last| Self { channels, height, width, channels_last };
        let mut maps = match shape[start..] {
            [a, b, c] => vec![map(a, b, c, false), map(c, a, b, true)],
            [a, b] => {
                let first = square(b).map(|side| map(a, side, side, false));
                first.into_iter().chain(square(a).map(|side| map(b, side, side, true))).collect()
            }
            _ => Vec::new(),
        };
        maps.retain(|m| m.channels * m.height * m.width > 0);
        maps
    }

    /// Returns whether `computed` (channels first) gives the constant's values, relative to the largest one.
    fn fits(self, values: &[f32], tolerance: f32, computed: &[f32]) -> bool {
        let n_pixels = self.height * self.width;
        let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        values.len() == computed.len()
            && values.iter().enumerate().all(|(i, v)| {
                let at =
                    if self.channels_last { (i % self.channels) * n_pixels + i / self.channels } else { i };
                (v - computed[at]).abs() <= tolerance * largest
            })
    }
}

fn dense_encoding(matrix: &[f32], map: Map) -> Vec<f32> {
    let (m, n_pixels) = (map.channels / 2, map.height * map.width);
    let mut out = vec![0.0f32; map.channels * n_pixels];
    out.par_chunks_mut(n_pixels).enumerate().for_each(|(channel, pixels)| {
        for (i, out) in pixels.iter_mut().enumerate() {
            let x = 2.0 * ((i % map.width) as f64 + 0.5) / map.width as f64 - 1.0;
            let y = 2.0 * ((i / map.width) as f64 + 0.5) / map.height as f64 - 1.0;
            let column = channel % m;
            let angle =
                std::f64::consts::TAU * (x * f64::from(matrix[column]) + y * f64::from(matrix[m + column]));
            *out = if channel < m { angle.sin() } else { angle.cos() } as f32;
        }
    });
    out
}

/// Repeats each channel's `(p, q)` values over the map.
fn tile(values: &[f32], (p, q): (usize, usize), map: Map) -> Vec<f32> {
    let n_pixels = map.height * map.width;
    (0..map.channels * n_pixels)
        .map(|i| {
            let (c, y, x) = (i / n_pixels, i / map.width % map.height, i % map.width);
            values[(c * p + y % p) * q + x % q]
        })
        .collect()
}

/// Bicubic interpolation of each channel from `(h, w)` to the size of the map.
fn resize(values: &[f32], (h, w): (usize, usize), map: Map) -> Vec<f32> {
    let rows = taps(h, map.height);
    let columns = taps(w, map.width);
    let n_pixels = map.height * map.width;
    let mut out = vec![0.0f32; map.channels * n_pixels];
    out.par_chunks_mut(n_pixels).zip(values.par_chunks(h * w)).for_each(|(out, channel)| {
        for (i, out) in out.iter_mut().enumerate() {
            let (row, column) = (&rows[i / map.width], &columns[i % map.width]);
            let mut sum = 0.0f64;
            for (y, wy) in row {
                for (x, wx) in column {
                    sum += wy * wx * f64::from(channel[y * w + x]);
                }
            }
            *out = sum as f32;
        }
    });
    out
}

/// Returns, for each output position, four input positions and their weights.
fn taps(n_in: usize, n_out: usize) -> Vec<[(usize, f64); 4]> {
    const A: f64 = -0.75;
    let near = |d: f64| ((A + 2.0) * d - (A + 3.0)) * d * d + 1.0;
    let far = |d: f64| ((A * d - 5.0 * A) * d + 8.0 * A) * d - 4.0 * A;
    (0..n_out)
        .map(|i| {
            let centre = (i as f64 + 0.5) * n_in as f64 / n_out as f64 - 0.5;
            let t = centre - centre.floor();
            let weights = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
            std::array::from_fn(|k| {
                let at = centre.floor() as i64 + k as i64 - 1;
                (at.clamp(0, n_in as i64 - 1) as usize, weights[k])
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resizing_to_the_same_size_changes_nothing_and_a_constant_stays_one() {
        let map = Map { channels: 2, height: 3, width: 4, channels_last: false };
        let values: Vec<f32> = (0..24).map(|i| (i as f32).sin()).collect();
        assert!(map.fits(&values, 1e-6, &resize(&values, (3, 4), map)));
        let resized = resize(&[0.5, 0.5, 0.5, 0.5, -2.0, -2.0, -2.0, -2.0], (2, 2), map);
        assert!(resized[..12].iter().all(|v| (v - 0.5).abs() < 1e-6));
        assert!(resized[12..].iter().all(|v| (v + 2.0).abs() < 1e-6));
    }

    #[test]
    fn a_map_fits_in_both_layouts() {
        let values: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let [first, last] = Map::layouts(&[1, 2, 3, 4])[..] else { panic!("two layouts") };
        assert!(first.fits(&values, 0.0, &values));
        let channels_first: Vec<f32> = (0..4).flat_map(|c| (0..6).map(move |i| (i * 4 + c) as f32)).collect();
        assert!(last.fits(&values, 0.0, &channels_first));
        assert_eq!(Map::layouts(&[1, 9, 5]).len(), 1);
        assert!(Map::layouts(&[0, 2, 2]).is_empty() && Map::layouts(&[]).is_empty());
    }
}
