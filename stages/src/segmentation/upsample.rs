//! Low-resolution logits to a mask of the image's size.
//!
//! Bilinear as PyTorch's `interpolate(…, mode="bilinear", align_corners=False)`, in its arithmetic: output position i lies at
//! `max(0, (i + ½)·in/out − ½)` of the input, in f32; rows are interpolated before columns. Then a pixel is inside if its logit is positive.

use super::mask::Mask;
use ndarray::ArrayRef2;

/// Returns where the logits are positive after resizing them to the given size.
///
/// # Panics
/// If there are no logits.
pub fn positive(logits: &ArrayRef2<f32>, height: usize, width: usize) -> Mask {
    let mut pixels = Vec::with_capacity(height * width);
    resize(logits, height, width, |row| pixels.extend(row.iter().map(|&logit| logit > 0.0)));
    Mask::new(height, width, pixels)
}

/// Hands over the resized rows, from top to bottom.
fn resize(logits: &ArrayRef2<f32>, height: usize, width: usize, mut take: impl FnMut(&[f32])) {
    let (rows, columns) = logits.dim();
    assert!(rows > 0 && columns > 0, "logits of {rows}x{columns}");
    let (down, across) = (taps(rows, height), taps(columns, width));
    let interpolate = |row: usize, out: &mut Vec<f32>| {
        let row = logits.row(row);
        out.clear();
        out.extend(across.iter().map(|tap| tap.of(row[tap.first], row[tap.second])));
    };
    // The two input rows that the last output row came from.
    let mut kept: [(Option<usize>, Vec<f32>); 2] = Default::default();
    let mut out = Vec::with_capacity(width);
    for tap in &down {
        if kept[1].0 == Some(tap.first) {
            kept.swap(0, 1);
        }
        for (kept, row) in kept.iter_mut().zip([tap.first, tap.second]) {
            if kept.0 != Some(row) {
                interpolate(row, &mut kept.1);
                kept.0 = Some(row);
            }
        }
        out.clear();
        out.extend(kept[0].1.iter().zip(&kept[1].1).map(|(&above, &below)| tap.of(above, below)));
        take(&out);
    }
}

/// Where an output position lies between two input positions.
struct Tap {
    first: usize,
    second: usize,
    weights: [f32; 2],
}

impl Tap {
    fn of(&self, first: f32, second: f32) -> f32 {
        self.weights[0] * first + self.weights[1] * second
    }
}

fn taps(from: usize, to: usize) -> Vec<Tap> {
    let scale = from as f32 / to as f32;
    (0..to)
        .map(|at| {
            let position = (scale * (at as f32 + 0.5) - 0.5).max(0.0);
            let first = (position as usize).min(from - 1);
            let weight = (position - first as f32).clamp(0.0, 1.0);
            Tap { first, second: (first + 1).min(from - 1), weights: [1.0 - weight, weight] }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;
    use serde_json::Value;

    use super::*;

    fn resized(logits: &Array2<f32>, height: usize, width: usize) -> Vec<f32> {
        let mut values = Vec::new();
        resize(logits, height, width, |row| values.extend_from_slice(row));
        values
    }

    #[test]
    fn equals_pytorch() {
        let golden: Value = serde_json::from_str(include_str!("testdata/interpolate.json")).unwrap();
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() >= 8);
        for case in cases {
            let side = |name: &str| case[name].as_u64().unwrap() as usize;
            let floats = |name: &str| -> Vec<f32> { serde_json::from_value(case[name].clone()).unwrap() };
            let logits = Array2::from_shape_vec((side("in_h"), side("in_w")), floats("input")).unwrap();
            let (height, width) = (side("out_h"), side("out_w"));
            let expected = floats("output");
            for (actual, expected) in resized(&logits, height, width).iter().zip(&expected) {
                // Positions reach 12, and neighbours differ by up to 16: a unit in the last place of the one, times the other.
                assert!((actual - expected).abs() <= 1.5e-5, "{actual}, PyTorch {expected}: {case}");
            }
            let mask = positive(&logits, height, width);
            let clear = |at: usize| expected[at].abs() > 1.5e-5;
            assert!(
                expected
                    .iter()
                    .enumerate()
                    .all(|(at, &value)| !clear(at) || mask.pixels()[at] == (value > 0.0))
            );
        }
    }

    #[test]
    fn equals_the_formula_in_double_precision() {
        for (rows, columns, height, width) in
            [(1, 1, 3, 2), (3, 5, 3, 5), (4, 4, 16, 16), (7, 3, 5, 11), (5, 8, 1, 1), (2, 9, 1, 40)]
        {
            let logits =
                Array2::from_shape_fn((rows, columns), |(y, x)| ((y * 31 + x * 17) % 23) as f32 - 11.3);
            let position = |at: usize, from: usize, to: usize| {
                ((at as f64 + 0.5) * from as f64 / to as f64 - 0.5).clamp(0.0, from as f64 - 1.0)
            };
            for (at, actual) in resized(&logits, height, width).into_iter().enumerate() {
                let (y, x) = (position(at / width, rows, height), position(at % width, columns, width));
                let mut expected = 0.0;
                for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
                    let weight =
                        (1.0 - (y - row as f64).abs()).max(0.0) * (1.0 - (x - column as f64).abs()).max(0.0);
                    expected += weight * f64::from(logits[[row, column]]);
                }
                assert!((f64::from(actual) - expected).abs() < 1e-5, "{actual} {expected}");
            }
        }
    }

    #[test]
    fn zero_is_outside() {
        let mask = positive(&Array2::<f32>::zeros((2, 2)), 5, 3);
        assert_eq!(mask.area(), 0);
    }
}
