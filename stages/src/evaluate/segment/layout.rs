//! How exports of SAM 2 call what goes into them and comes out.
//!
//! Two conventions are in use, for the same tensors (a third differs from the second in what it leaves out):
//!
//! | | transformers | Segment Anything |
//! |---|---|---|
//! | who | transformers.js, `onnx-community/sam2*-ONNX` | samexporter and its descendants |
//! | embeddings | `image_embeddings.0`, `.1`, `.2` | `high_res_feats_0`, `high_res_feats_1`, `image_embed` |
//! | points, labels | `input_points` [1, objects, points, 2], `input_labels` | `point_coords` [objects, points, 2], `point_labels` |
//! | also taken | `input_boxes` [1, boxes, 4] | `mask_input`, `has_mask_input`, `orig_im_size` |
//! | masks, scores | `pred_masks`, `iou_scores` | `masks` or `low_res_masks`, `iou_predictions` |
//!
//! Points are in pixels of the encoder's input; the decoders add ½ themselves. Where there is no input for boxes, they are given as two points,
//! labels 2 and 3. After points SAM 2 wants one that is none (label −1, at the origin). The graphs of samexporter, which are those that take an
//! earlier mask, add it themselves; the others are given it. Where there is an input for boxes, a point alone needs the graph without it
//! ([`Prepared::detached`](merganser_onnx::Prepared::detached) says why); such a graph is still given a box, which it does not use.

use crate::StageError;
use merganser_onnx::{Dimension, Input, Port};
use ndarray::{Array, ArrayD, ArrayViewD, IxDyn};

/// The tensors that go from the encoder to the decoder, the finest first.
pub(super) const EMBEDDINGS: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Convention {
    Transformers,
    SegmentAnything,
}

const CONVENTIONS: [Convention; 2] = [Convention::Transformers, Convention::SegmentAnything];

impl Convention {
    fn embeddings(self) -> [&'static str; EMBEDDINGS] {
        match self {
            Self::Transformers => ["image_embeddings.0", "image_embeddings.1", "image_embeddings.2"],
            Self::SegmentAnything => ["high_res_feats_0", "high_res_feats_1", "image_embed"],
        }
    }

    fn points_and_labels(self) -> [&'static str; 2] {
        match self {
            Self::Transformers => [POINTS, "input_labels"],
            Self::SegmentAnything => ["point_coords", "point_labels"],
        }
    }

    fn also_taken(self) -> &'static [&'static str] {
        match self {
            Self::Transformers => &[BOXES],
            Self::SegmentAnything => &["mask_input", "has_mask_input", "orig_im_size"],
        }
    }

    fn masks(self) -> &'static [&'static str] {
        match self {
            Self::Transformers => &["pred_masks"],
            Self::SegmentAnything => &["masks", "low_res_masks"],
        }
    }

    fn scores(self) -> &'static str {
        match self {
            Self::Transformers => "iou_scores",
            Self::SegmentAnything => "iou_predictions",
        }
    }

    fn inputs(self) -> Vec<&'static str> {
        self.embeddings().into_iter().chain(self.points_and_labels()).collect()
    }
}

/// The names of an encoder's outputs.
#[derive(Debug)]
pub(super) struct EncoderLayout {
    pub(super) embeddings: [&'static str; EMBEDDINGS],
    /// Images that the graph takes at once, if it says.
    pub(super) batch: Option<usize>,
}

/// The names of a decoder's inputs and outputs.
#[derive(Debug)]
pub(super) struct DecoderLayout {
    convention: Convention,
    masks: &'static str,
    /// Which of the inputs that may be left out there are.
    also: Vec<&'static str>,
}

impl EncoderLayout {
    /// Recognizes an image encoder; `input` is the input that takes the image.
    pub(super) fn of(name: &str, input: &str, inputs: &[Port], outputs: &[Port]) -> Result<Self, StageError> {
        let has = |wanted: &str| outputs.iter().any(|port| port.name == wanted);
        let known = CONVENTIONS.iter().map(|convention| convention.embeddings());
        let embeddings = known.clone().find(|names| names.iter().all(|name| has(name))).ok_or_else(|| {
            let expected: Vec<String> = known.map(|names| listed(names.into_iter())).collect();
            StageError::input_help(
                format!(
                    "`{name}` is not an image encoder of SAM 2: its outputs are {}",
                    listed(outputs.iter().map(|port| port.name.as_str()))
                ),
                format!("expected are {}", expected.join(" or ")),
            )
        })?;
        let dimensions =
            inputs.iter().find(|port| port.name == input).and_then(|port| port.dimensions.as_ref());
        let batch = match dimensions.and_then(|dimensions| dimensions.first()) {
            Some(Dimension::Fixed(images)) => Some(*images),
            _ => None,
        };
        Ok(Self { embeddings, batch })
    }
}

impl DecoderLayout {
    /// Recognizes a prompt encoder with mask decoder.
    pub(super) fn of(name: &str, inputs: &[Port], outputs: &[Port]) -> Result<Self, StageError> {
        let has = |ports: &[Port], wanted: &str| ports.iter().any(|port| port.name == wanted);
        let convention = CONVENTIONS
            .into_iter()
            .find(|convention| convention.inputs().iter().all(|wanted| has(inputs, wanted)))
            .ok_or_else(|| {
                let expected: Vec<String> =
                    CONVENTIONS.iter().map(|convention| listed(convention.inputs().into_iter())).collect();
                StageError::input_help(
                    format!(
                        "`{name}` is not a mask decoder of SAM 2: its inputs are {}",
                        listed(inputs.iter().map(|port| port.name.as_str()))
                    ),
                    format!("expected are {}", expected.join(" or ")),
                )
            })?;
        let known =
            |input: &str| convention.inputs().contains(&input) || convention.also_taken().contains(&input);
        if let Some(unknown) = inputs.iter().find(|port| !known(&port.name)) {
            return Err(StageError::input_help(
                format!("`{name}` has an input `{}`, which is not known of mask decoders", unknown.name),
                format!(
                    "known are {}",
                    listed(convention.inputs().into_iter().chain(convention.also_taken().iter().copied()))
                ),
            ));
        }
        let masks = convention.masks().iter().copied().find(|masks| has(outputs, masks));
        let (Some(masks), true) = (masks, has(outputs, convention.scores())) else {
            return Err(StageError::input_help(
                format!(
                    "`{name}` gives no masks: its outputs are {}",
                    listed(outputs.iter().map(|port| port.name.as_str()))
                ),
                format!(
                    "expected are {} and `{}`",
                    listed(convention.masks().iter().copied()),
                    convention.scores()
                ),
            ));
        };
        let also = convention.also_taken().iter().copied().filter(|also| has(inputs, also)).collect();
        Ok(Self { convention, masks, also })
    }

    pub(super) fn masks(&self) -> &'static str {
        self.masks
    }

    pub(super) fn scores(&self) -> &'static str {
        self.convention.scores()
    }

    /// Arranges the inputs of one object: embeddings [1, channels, height, width], points in pixels of the encoder's input, the image's height and
    /// width.
    pub(super) fn inputs<'a>(
        &self,
        embeddings: [ArrayViewD<'a, f32>; EMBEDDINGS],
        points: &[[f32; 2]],
        labels: &[i64],
        size: (usize, usize),
    ) -> Vec<(&'static str, Value<'a>)> {
        let is_box = self.takes_boxes() && labels == BOX;
        let (points, corners) = if is_box { (&[][..], points) } else { (points, &[[0.0; 2]; 2][..]) };
        let (mut coordinates, corners) = (points.concat(), corners.concat());
        let mut labels = if is_box { Vec::new() } else { labels.to_vec() };
        if self.is_given_no_point() && !is_box {
            coordinates.extend([0.0; 2]);
            labels.push(NO_POINT);
        }
        let n = labels.len();
        let objects: &[usize] =
            if self.convention == Convention::Transformers { &[1, 1, n] } else { &[1, n] };
        let of_points = objects.iter().copied().chain([2]).collect::<Vec<_>>();
        let &[_, _, height, width] = embeddings[EMBEDDINGS - 1].shape() else {
            unreachable!("embeddings have four dimensions, which was checked")
        };
        let [coordinates_name, labels_name] = self.convention.points_and_labels();
        let mut inputs: Vec<(&str, Value<'a>)> =
            self.convention.embeddings().into_iter().zip(embeddings.map(Value::View)).collect();
        inputs.push((coordinates_name, Value::F32(array(&of_points, coordinates))));
        inputs.push((labels_name, Value::I64(array(objects, labels))));
        for &also in &self.also {
            let value = match also {
                BOXES => Value::F32(array(&[1, 1, 4], corners.clone())),
                // Four times as fine as the coarsest embedding.
                "mask_input" => Value::F32(ArrayD::zeros(IxDyn(&[1, 1, 4 * height, 4 * width]))),
                "has_mask_input" => Value::F32(array(&[1], vec![0.0])),
                _ => Value::I64(array(&[2], vec![size.0 as i64, size.1 as i64])),
            };
            inputs.push((also, value));
        }
        inputs
    }

    /// Whether boxes have an input of their own, which leaves no way to ask with a point alone.
    pub(super) fn takes_boxes(&self) -> bool {
        self.also.contains(&BOXES)
    }

    /// Whether the point that is none has to be given, because the graph does not add it.
    fn is_given_no_point(&self) -> bool {
        !self.also.contains(&"mask_input")
    }
}

/// The inputs for boxes and for points of the convention that has both.
pub(super) const BOXES: &str = "input_boxes";
pub(super) const POINTS: &str = "input_points";

/// The labels of the corners of a box.
pub(super) const BOX: [i64; 2] = [2, 3];

/// The label of a point that is none.
const NO_POINT: i64 = -1;

/// One input of the decoder.
pub(super) enum Value<'a> {
    View(ArrayViewD<'a, f32>),
    F32(ArrayD<f32>),
    I64(ArrayD<i64>),
}

impl Value<'_> {
    pub(super) fn as_input(&self) -> Input<'_> {
        match self {
            Self::View(values) => Input::F32(values.view()),
            Self::F32(values) => Input::F32(values.view()),
            Self::I64(values) => Input::I64(values.view()),
        }
    }
}

fn array<T>(shape: &[usize], values: Vec<T>) -> ArrayD<T> {
    Array::from_shape_vec(IxDyn(shape), values).expect("one value per element")
}

fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(names: &[&str]) -> Vec<Port> {
        names
            .iter()
            .map(|name| Port {
                name: (*name).to_owned(),
                element: None,
                dimensions: Some(vec![Dimension::Fixed(1)]),
            })
            .collect()
    }

    const TRANSFORMERS: &[&str] = &[
        "input_points",
        "input_labels",
        "input_boxes",
        "image_embeddings.0",
        "image_embeddings.1",
        "image_embeddings.2",
    ];
    const SAMEXPORTER: &[&str] = &[
        "image_embed",
        "high_res_feats_0",
        "high_res_feats_1",
        "point_coords",
        "point_labels",
        "mask_input",
        "has_mask_input",
    ];

    fn decoder(inputs: &[&str], outputs: &[&str]) -> Result<DecoderLayout, StageError> {
        DecoderLayout::of("d.onnx", &ports(inputs), &ports(outputs))
    }

    /// Shapes of what a decoder is given for a prompt.
    fn shapes(
        layout: &DecoderLayout,
        points: &[[f32; 2]],
        labels: &[i64],
    ) -> Vec<(&'static str, Vec<usize>)> {
        let fine = ArrayD::zeros(IxDyn(&[1, 8, 32, 32]));
        let coarse = ArrayD::zeros(IxDyn(&[1, 32, 8, 8]));
        let embeddings = [fine.view(), fine.view(), coarse.view()];
        let inputs = layout.inputs(embeddings, points, labels, (100, 200));
        let shape = |value: &Value<'_>| match value {
            Value::View(values) => values.shape().to_vec(),
            Value::F32(values) => values.shape().to_vec(),
            Value::I64(values) => values.shape().to_vec(),
        };
        inputs.iter().skip(EMBEDDINGS).map(|(name, value)| (*name, shape(value))).collect()
    }

    fn owned(expected: &[(&'static str, &[usize])]) -> Vec<(&'static str, Vec<usize>)> {
        expected.iter().map(|(name, shape)| (*name, shape.to_vec())).collect()
    }

    #[test]
    fn all_layouts_are_recognized_and_fed() {
        let corners = [[1.0, 2.0], [3.0, 4.0]];
        let layout = decoder(TRANSFORMERS, &["iou_scores", "pred_masks", "object_score_logits"]).unwrap();
        let expected: &[(&'static str, &[usize])] =
            &[("input_points", &[1, 1, 0, 2]), ("input_labels", &[1, 1, 0]), ("input_boxes", &[1, 1, 4])];
        assert_eq!(shapes(&layout, &corners, &BOX), owned(expected));
        let expected: &[(&'static str, &[usize])] =
            &[("input_points", &[1, 1, 2, 2]), ("input_labels", &[1, 1, 2]), ("input_boxes", &[1, 1, 4])];
        assert_eq!(shapes(&layout, &corners[..1], &[1]), owned(expected));
        assert_eq!((layout.masks(), layout.scores()), ("pred_masks", "iou_scores"));
        let layout =
            decoder(&[&TRANSFORMERS[..2], &TRANSFORMERS[3..]].concat(), &["iou_scores", "pred_masks"])
                .unwrap();
        let expected: &[(&'static str, &[usize])] =
            &[("input_points", &[1, 1, 3, 2]), ("input_labels", &[1, 1, 3])];
        assert_eq!(shapes(&layout, &corners, &BOX), owned(expected));

        // It adds the point that is none itself.
        let layout = decoder(SAMEXPORTER, &["masks", "iou_predictions"]).unwrap();
        let expected: &[(&'static str, &[usize])] = &[
            ("point_coords", &[1, 2, 2]),
            ("point_labels", &[1, 2]),
            ("mask_input", &[1, 1, 32, 32]),
            ("has_mask_input", &[1]),
        ];
        assert_eq!(shapes(&layout, &corners, &BOX), owned(expected));

        let layout = decoder(&SAMEXPORTER[..5], &["low_res_masks", "iou_predictions"]).unwrap();
        let expected: &[(&'static str, &[usize])] =
            &[("point_coords", &[1, 3, 2]), ("point_labels", &[1, 3])];
        assert_eq!(shapes(&layout, &corners, &BOX), owned(expected));
    }

    #[test]
    fn what_is_no_decoder_is_refused_with_its_inputs() {
        let error = decoder(&["pixel_values"], &["logits"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`d.onnx` is not a mask decoder of SAM 2: its inputs are `pixel_values`"
        );
        assert!(error.help().unwrap().starts_with("expected are `image_embeddings.0`, "));
        let unknown = [SAMEXPORTER, &["memory"]].concat();
        let error = decoder(&unknown, &["masks", "iou_predictions"]).unwrap_err();
        assert_eq!(error.to_string(), "`d.onnx` has an input `memory`, which is not known of mask decoders");
        let error = decoder(SAMEXPORTER, &["masks"]).unwrap_err();
        assert_eq!(error.to_string(), "`d.onnx` gives no masks: its outputs are `masks`");
    }

    #[test]
    fn encoders_are_recognized_by_their_outputs() {
        let encoder =
            |outputs: &[&str]| EncoderLayout::of("e.onnx", "image", &ports(&["image"]), &ports(outputs));
        let layout = encoder(&["high_res_feats_0", "high_res_feats_1", "image_embed"]).unwrap();
        assert_eq!((layout.embeddings[2], layout.batch), ("image_embed", Some(1)));
        assert_eq!(
            encoder(&["image_embeds"]).unwrap_err().to_string(),
            "`e.onnx` is not an image encoder of SAM 2: its outputs are `image_embeds`"
        );
    }
}
