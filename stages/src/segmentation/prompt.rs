//! What a model is told about an object: a point or a box, in pixels of the image.
//!
//! A data set's own prompts are used where it has some. Otherwise they follow from the mask, as in SAM 2's own evaluation: the box is that of the
//! outermost pixels; the point is the pixel deepest inside, that is farthest from everything outside (the image's border counts as outside), the
//! first of several in reading order. Coordinates are those of pixels: 0 is the first column, and decoders add ½ to reach its centre.

use super::SegmentationError;
use super::dataset::Object;
use super::distance::squared_distances;
use super::mask::Mask;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A kind of prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PromptKind {
    Point,
    Box,
}

/// Points with their meaning, as SAM encodes them: 1 a point inside, 2 and 3 the upper left and lower right corners of a box.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// x, y
    pub points: Vec<[f64; 2]>,
    pub labels: Vec<i64>,
}

impl PromptKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Point => "point",
            Self::Box => "box",
        }
    }

    /// Whether one mask is expected rather than the best of several: a box says what is meant, a point does not.
    pub fn is_clear(self) -> bool {
        self == Self::Box
    }

    /// Returns the prompt for an object whose mask is `mask`, from the mask alone if `derived` says so; `annotation` is where the object comes
    /// from, for messages.
    pub fn of(
        self,
        annotation: &Path,
        object: &Object,
        mask: &Mask,
        derived: bool,
    ) -> Result<Prompt, SegmentationError> {
        let empty =
            || SegmentationError::EmptyMask { path: annotation.to_owned(), object: object.name.clone() };
        let (width, height) = (mask.width(), mask.height());
        let (points, labels) = match self {
            Self::Point if object.points.is_empty() || derived => {
                (vec![deepest(mask).ok_or_else(empty)?], vec![1])
            }
            Self::Point => (object.points.clone(), vec![1; object.points.len()]),
            Self::Box => {
                let corners = if let Some([left, top, right, bottom]) = object.bounds.filter(|_| !derived) {
                    vec![[left, top], [right, bottom]]
                } else {
                    let bounds = mask.bounds().ok_or_else(empty)?;
                    let corner = |x: usize, y: usize| [x as f64, y as f64];
                    vec![corner(bounds.left, bounds.top), corner(bounds.right, bounds.bottom)]
                };
                (corners, vec![2, 3])
            }
        };
        let inside =
            |[x, y]: &[f64; 2]| (0.0..=width as f64).contains(x) && (0.0..=height as f64).contains(y);
        let ordered = self == Self::Point || (points[0][0] <= points[1][0] && points[0][1] <= points[1][1]);
        if !ordered || !points.iter().all(inside) {
            let found = points.iter().map(|[x, y]| format!("({x}, {y})")).collect::<Vec<_>>().join(" to ");
            let (path, object) = (annotation.to_owned(), object.name.clone());
            return Err(SegmentationError::Outside { path, object, what: self.name(), width, height, found });
        }
        Ok(Prompt { points, labels })
    }
}

/// The pixel that is farthest from everything outside the mask, as x, y; `None` if the mask is empty.
fn deepest(mask: &Mask) -> Option<[f64; 2]> {
    let bounds = mask.bounds()?;
    // With a margin of one pixel, which is outside: nothing farther away can be nearer than it.
    let (height, width) = (bounds.height() + 2, bounds.width() + 2);
    let outside = |row: usize, column: usize| {
        let margin = row == 0 || column == 0 || row == height - 1 || column == width - 1;
        margin || !mask.get(bounds.top + row - 1, bounds.left + column - 1)
    };
    let distances = squared_distances(height, width, outside);
    let mut best = 0;
    for (at, &distance) in distances.iter().enumerate() {
        if distance > distances[best] {
            best = at;
        }
    }
    Some([(bounds.left + best % width - 1) as f64, (bounds.top + best / width - 1) as f64])
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::rle::Rle;
    use super::*;

    fn object(mask: &Mask, points: &[[f64; 2]], bounds: Option<[f64; 4]>) -> Object {
        Object { name: "7".to_owned(), mask: Rle::of(mask), points: points.to_vec(), bounds }
    }

    fn prompt(
        kind: PromptKind,
        object: &Object,
        mask: &Mask,
        derived: bool,
    ) -> Result<Prompt, SegmentationError> {
        kind.of(Path::new("a.json"), object, mask, derived)
    }

    #[test]
    fn derived_prompts_are_those_of_the_reference() {
        let golden: Value = serde_json::from_str(include_str!("testdata/prompts.json")).unwrap();
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() >= 10);
        for case in cases {
            let side = |index: usize| case["mask"]["size"][index].as_u64().unwrap() as usize;
            let mask: Rle = serde_json::from_value(case["mask"].clone()).unwrap();
            let mask = mask.to_mask(side(0), side(1)).unwrap();
            // Prompts of the data set are left aside.
            let object = object(&mask, &[[0.0, 0.0]], Some([0.0; 4]));
            let point = prompt(PromptKind::Point, &object, &mask, true).unwrap();
            assert_eq!(
                point.points,
                serde_json::from_value::<Vec<[f64; 2]>>(case["point"].clone()).unwrap(),
                "{case}"
            );
            let corners = prompt(PromptKind::Box, &object, &mask, true).unwrap();
            assert_eq!(
                corners.points,
                serde_json::from_value::<Vec<[f64; 2]>>(case["box"].clone()).unwrap(),
                "{case}"
            );
            assert_eq!((point.labels, corners.labels), (vec![1], vec![2, 3]));
        }
    }

    #[test]
    fn a_data_set_s_own_prompts_come_first() {
        let mask = Mask::from_fn(6, 8, |row, column| row == 2 && column > 3);
        let with = object(&mask, &[[5.5, 2.0], [6.0, 2.0]], Some([4.0, 2.0, 8.0, 3.0]));
        assert_eq!(prompt(PromptKind::Point, &with, &mask, false).unwrap().points, [[5.5, 2.0], [6.0, 2.0]]);
        assert_eq!(prompt(PromptKind::Box, &with, &mask, false).unwrap().points, [[4.0, 2.0], [8.0, 3.0]]);
        let without = object(&mask, &[], None);
        assert_eq!(prompt(PromptKind::Box, &without, &mask, false).unwrap().points, [[4.0, 2.0], [7.0, 2.0]]);
    }

    #[test]
    fn prompts_outside_the_image_and_empty_masks_are_named() {
        let mask = Mask::from_fn(6, 8, |row, _| row == 2);
        let error = |points: &[[f64; 2]], bounds: Option<[f64; 4]>, kind: PromptKind| {
            let object = object(&mask, points, bounds);
            prompt(kind, &object, &mask, false).unwrap_err().to_string()
        };
        let lies = "lies outside the image of 8x6 pixels";
        assert_eq!(
            error(&[[8.5, 1.0]], None, PromptKind::Point),
            format!("`a.json`: the point of object `7` {lies}: (8.5, 1)")
        );
        assert_eq!(
            error(&[[f64::NAN, 1.0]], None, PromptKind::Point),
            format!("`a.json`: the point of object `7` {lies}: (NaN, 1)")
        );
        assert_eq!(
            error(&[], Some([3.0, 1.0, 2.0, 4.0]), PromptKind::Box),
            format!("`a.json`: the box of object `7` {lies}: (3, 1) to (2, 4)")
        );
        let nothing = Mask::from_fn(6, 8, |_, _| false);
        let object = object(&nothing, &[], None);
        for kind in [PromptKind::Point, PromptKind::Box] {
            assert_eq!(
                prompt(kind, &object, &nothing, false).unwrap_err().to_string(),
                "`a.json`: the mask of object `7` is empty: there is nothing to find"
            );
        }
    }
}
