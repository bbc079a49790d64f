//! How well one mask fits another: region similarity J and boundary accuracy F, as DAVIS defines them.
//!
//! Perazzi et al., A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation, CVPR 2016, §4; the details (which pixels are a
//! boundary, how far is near, what empty masks score) are those of the benchmark's own program, davis2017-evaluation, to which results are equal.

use super::distance::squared_distances;
use super::mask::{Bounds, Mask};

/// How far a boundary pixel may be from the other boundary, as a share of the image's diagonal (rounded up to whole pixels).
pub const BOUNDARY_TOLERANCE: f64 = 0.008;

/// J: the pixels that both have by the pixels that at least one has; 1 if neither has any. Both in the same image, without its void pixels.
pub fn jaccard(found: &Mask, truth: &Mask) -> f64 {
    let pairs = || found.pixels().iter().zip(truth.pixels());
    let both = pairs().filter(|&(&a, &b)| a && b).count();
    let either = pairs().filter(|&(&a, &b)| a || b).count();
    if either == 0 { 1.0 } else { both as f64 / either as f64 }
}

/// F: the harmonic mean of precision and recall of the boundary, where a pixel counts if the other boundary is within the tolerance of it.
pub fn boundary_accuracy(found: &Mask, truth: &Mask) -> f64 {
    let (height, width) = (found.height() as f64, found.width() as f64);
    let radius = (BOUNDARY_TOLERANCE * (height * height + width * width).sqrt()).ceil() as u64;
    let (found, truth) = (boundary(found), boundary(truth));
    let (precision, recall) = match (found.bounds(), truth.bounds()) {
        (None, None) => (1.0, 1.0),
        (None, Some(_)) => (1.0, 0.0),
        (Some(_), None) => (0.0, 1.0),
        (Some(a), Some(b)) => {
            let area = a.union(b);
            (share_near(&found, &truth, area, radius), share_near(&truth, &found, area, radius))
        }
    };
    if precision + recall == 0.0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) }
}

/// The share of the pixels of `of` that have one of `to` within `radius`; both lie within `area`.
fn share_near(of: &Mask, to: &Mask, area: Bounds, radius: u64) -> f64 {
    let (height, width) = (area.height(), area.width());
    let distances =
        squared_distances(height, width, |row, column| to.get(area.top + row, area.left + column));
    let (mut near, mut all) = (0_u64, 0_u64);
    for row in 0..height {
        for column in 0..width {
            if of.get(area.top + row, area.left + column) {
                all += 1;
                near += u64::from(distances[row * width + column] <= radius * radius);
            }
        }
    }
    near as f64 / all as f64
}

/// The pixels that differ from their neighbour to the right, below, or diagonally below; the last row has only the first, the last column only
/// the second.
fn boundary(mask: &Mask) -> Mask {
    let (height, width) = (mask.height(), mask.width());
    Mask::from_fn(height, width, |row, column| {
        let own = mask.get(row, column);
        let differs = |down: usize, right: usize| {
            row + down < height && column + right < width && mask.get(row + down, column + right) != own
        };
        differs(0, 1) || differs(1, 0) || differs(1, 1)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::rle::Rle;
    use super::*;

    fn mask(golden: &Value) -> Mask {
        let side = |index: usize| golden["size"][index].as_u64().unwrap() as usize;
        serde_json::from_value::<Rle>(golden.clone()).unwrap().to_mask(side(0), side(1)).unwrap()
    }

    #[test]
    fn equals_the_reference() {
        let golden: Value = serde_json::from_str(include_str!("testdata/measures.json")).unwrap();
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() >= 50);
        for case in cases {
            let (found, truth) = (mask(&case["found"]), mask(&case["truth"]));
            assert!((jaccard(&found, &truth) - case["j"].as_f64().unwrap()).abs() < 1e-12, "{case}");
            assert!(
                (boundary_accuracy(&found, &truth) - case["f"].as_f64().unwrap()).abs() < 1e-12,
                "{case}"
            );
        }
    }

    #[test]
    fn the_boundary_is_at_the_upper_left_of_a_change() {
        let square = Mask::from_fn(5, 5, |row, column| (2..4).contains(&row) && (2..4).contains(&column));
        let rows: Vec<String> = boundary(&square)
            .pixels()
            .chunks(5)
            .map(|row| row.iter().map(|&pixel| if pixel { '#' } else { '.' }).collect())
            .collect();
        assert_eq!(rows, [".....", ".###.", ".#.#.", ".###.", "....."]);
        // An object that fills the image has none.
        assert_eq!(boundary(&Mask::from_fn(4, 4, |_, _| true)).area(), 0);
    }

    #[test]
    fn empty_masks_score_as_defined() {
        let empty = Mask::from_fn(9, 9, |_, _| false);
        let dot = Mask::from_fn(9, 9, |row, column| row == 4 && column == 4);
        let score = |a: &Mask, b: &Mask| (jaccard(a, b), boundary_accuracy(a, b));
        assert_eq!(score(&empty, &empty), (1.0, 1.0));
        assert_eq!(score(&empty, &dot), (0.0, 0.0));
        assert_eq!(score(&dot, &empty), (0.0, 0.0));
        assert_eq!(score(&dot, &dot), (1.0, 1.0));
    }
}
