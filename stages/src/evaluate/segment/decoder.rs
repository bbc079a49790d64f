//! The sessions of encoder and decoder, and the choice among the masks that they give.

use super::layout::{BOX, BOXES, DecoderLayout, EMBEDDINGS, EncoderLayout, POINTS};
use crate::services::BoundGraph;
use crate::{Job, StageError};
use merganser_onnx::{Input, Session, Weights};
use ndarray::{Array2, Array4, ArrayD, Axis, Slice};

/// A model that finds what a prompt means.
pub(super) struct Segmenter {
    encoder: Half,
    input: String,
    encoder_layout: EncoderLayout,
    decoder: Half,
    /// The decoder for points alone, where another is needed.
    of_points: Option<Half>,
    decoder_layout: DecoderLayout,
}

/// A session and the file it came from.
struct Half {
    name: String,
    session: Session,
}

/// Embeddings of a batch of images, the finest first.
pub(super) type Embeddings = [ArrayD<f32>; EMBEDDINGS];

/// The mask that was chosen.
#[derive(Debug)]
pub(super) struct Candidate {
    /// [rows, columns]
    pub(super) logits: Array2<f32>,
    pub(super) predicted_iou: f32,
}

impl Segmenter {
    /// Recognizes both graphs and builds their sessions; `points` says whether points will be asked about.
    pub(super) fn new(
        job: &Job<'_>,
        input: Option<&str>,
        encoder: &BoundGraph,
        decoder: &BoundGraph,
        weights: &dyn Weights,
        points: bool,
    ) -> Result<Self, StageError> {
        let input = encoder.input(input)?;
        let encoder_layout = EncoderLayout::of(encoder.name(), &input, encoder.inputs(), encoder.outputs())?;
        let decoder_layout = DecoderLayout::of(decoder.name(), decoder.inputs(), decoder.outputs())?;
        let half = |graph: &BoundGraph| {
            let session = job.services.session(graph, weights, job.threads, job.notify)?;
            Ok::<_, StageError>(Half { name: graph.name().to_owned(), session })
        };
        let of_points = if decoder_layout.takes_boxes() && points {
            let detached = decoder.detached(BOXES, POINTS)?.ok_or_else(|| {
                StageError::input_help(
                    format!(
                        "`{}` cannot be asked with a point alone: where it joins `{POINTS}` and `{BOXES}` is not clear",
                        decoder.name()
                    ),
                    "ask with boxes, `prompts = [\"box\"]`, or export the decoder with `tools/export/sam2_transformers.py`",
                )
            })?;
            Some(half(&detached)?)
        } else {
            None
        };
        Ok(Self {
            encoder: half(encoder)?,
            input,
            encoder_layout,
            decoder: half(decoder)?,
            of_points,
            decoder_layout,
        })
    }

    /// Images per inference: as many as are wanted, unless the graph takes a fixed number.
    pub(super) fn batch_size(&self, wanted: usize) -> usize {
        self.encoder_layout.batch.unwrap_or(wanted).max(1)
    }

    /// Encodes images, [images, channels, rows, columns].
    pub(super) fn encode(&mut self, pixels: &Array4<f32>) -> Result<Embeddings, StageError> {
        let n_images = pixels.len_of(Axis(0));
        let given = [(self.input.as_str(), Input::F32(pixels.view().into_dyn()))];
        let mut outputs = self.encoder.session.run(&given)?;
        let mut take = |name: &str| {
            let position = outputs.iter().position(|(output, _)| output == name);
            let (_, values) = outputs.swap_remove(position.expect("recognized by its outputs"));
            match values.shape() {
                &[images, _, _, _] if images == n_images => Ok(values),
                shape => Err(StageError::input(format!(
                    "output `{name}` of `{}` has shape {shape:?}, expected [{n_images}, channels, rows, columns]",
                    self.encoder.name
                ))),
            }
        };
        let [fine, middle, coarse] = self.encoder_layout.embeddings;
        Ok([take(fine)?, take(middle)?, take(coarse)?])
    }

    /// Finds one object in image `position` of a batch.
    pub(super) fn decode(
        &mut self,
        embeddings: &Embeddings,
        position: usize,
        (points, labels): &(Vec<[f32; 2]>, Vec<i64>),
        size: (usize, usize),
        wanted: Wanted,
    ) -> Result<Candidate, StageError> {
        let one = embeddings
            .each_ref()
            .map(|values| values.slice_axis(Axis(0), Slice::from(position..position + 1)));
        let inputs = self.decoder_layout.inputs(one, points, labels, size);
        let given: Vec<(&str, Input<'_>)> =
            inputs.iter().map(|(name, value)| (*name, value.as_input())).collect();
        let decoder = match &mut self.of_points {
            Some(of_points) if *labels != BOX => of_points,
            _ => &mut self.decoder,
        };
        let outputs = decoder.session.run(&given)?;
        let find = |name: &str| {
            let (_, values) =
                outputs.iter().find(|(output, _)| output == name).expect("recognized by its outputs");
            values
        };
        let (masks, scores) = (find(self.decoder_layout.masks()), find(self.decoder_layout.scores()));
        choose(masks, scores, wanted)
            .map_err(|reason| StageError::input(format!("`{}`: {reason}", decoder.name)))
    }
}

/// Which of a decoder's masks is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// The best of those for an unclear prompt.
    BestOfSeveral,
    /// That for a clear prompt.
    Single,
    /// That for a clear prompt if there is one.
    SingleIfThere,
}

/// Masks [1, …, masks, rows, columns] and their predicted IoU. Of four, the first is for clear prompts; three are for unclear ones; one is what there is.
fn choose(masks: &ArrayD<f32>, scores: &ArrayD<f32>, wanted: Wanted) -> Result<Candidate, String> {
    let shape = masks.shape();
    let &[.., n_masks, rows, columns] = shape else {
        return Err(format!("the masks have shape {shape:?}, expected [objects, masks, rows, columns]"));
    };
    if masks.len() != n_masks * rows * columns || scores.len() != n_masks || masks.is_empty() {
        return Err(format!(
            "the masks of one object have shape {shape:?}, and their scores {:?}",
            scores.shape()
        ));
    }
    let scores: Vec<f32> = scores.iter().copied().collect();
    let range = match (n_masks, wanted) {
        (1, _) | (4, Wanted::Single | Wanted::SingleIfThere) => 0..1,
        (4, Wanted::BestOfSeveral) => 1..4,
        (3, Wanted::BestOfSeveral | Wanted::SingleIfThere) => 0..3,
        (3, Wanted::Single) => {
            return Err("it gives three masks, for unclear prompts, and none for clear ones: leave out `multimask = false`".to_owned());
        }
        _ => return Err(format!("it gives {n_masks} masks of an object, expected 1, 3 or 4")),
    };
    let mut best = range.start;
    for index in range {
        if scores[index].is_nan() {
            return Err(format!("the predicted IoU of mask {index} is not a number"));
        }
        if scores[index] > scores[best] {
            best = index;
        }
    }
    let all = masks.to_shape((n_masks, rows, columns)).map_err(|error| error.to_string())?;
    let logits = all.index_axis(Axis(0), best).to_owned();
    if logits.iter().any(|logit| logit.is_nan()) {
        return Err(format!("the logits of mask {best} are not numbers"));
    }
    Ok(Candidate { logits, predicted_iou: scores[best] })
}

#[cfg(test)]
mod tests {
    use ndarray::{Array, IxDyn};

    use super::*;

    fn masks(shape: &[usize]) -> ArrayD<f32> {
        let n: usize = shape.iter().product();
        let per_mask: usize = shape.iter().rev().take(2).product();
        Array::from_shape_fn(IxDyn(shape), |_| 0.0)
            .into_shape_with_order(IxDyn(&[n]))
            .unwrap()
            .into_iter()
            .enumerate()
            .map(|(at, _)| (at / per_mask) as f32)
            .collect::<Array<f32, _>>()
            .into_shape_with_order(IxDyn(shape))
            .unwrap()
    }

    fn chosen(shape: &[usize], scores: &[f32], wanted: Wanted) -> Result<(f32, f32), String> {
        let scores = ArrayD::from_shape_vec(IxDyn(&[1, scores.len()]), scores.to_vec()).unwrap();
        let candidate = choose(&masks(shape), &scores, wanted)?;
        assert_eq!(candidate.logits.shape(), &shape[shape.len() - 2..]);
        Ok((candidate.logits[[0, 0]], candidate.predicted_iou))
    }

    #[test]
    fn the_first_of_four_is_for_clear_prompts_and_the_best_of_three_for_others() {
        let scores = [0.9, 0.1, 0.5, 0.5];
        assert_eq!(chosen(&[1, 4, 2, 2], &scores, Wanted::SingleIfThere), Ok((0.0, 0.9)));
        assert_eq!(chosen(&[1, 4, 2, 2], &scores, Wanted::Single), Ok((0.0, 0.9)));
        // Of equals the first.
        assert_eq!(chosen(&[1, 4, 2, 2], &scores, Wanted::BestOfSeveral), Ok((2.0, 0.5)));
        assert_eq!(chosen(&[1, 1, 3, 2, 5], &scores[..3], Wanted::SingleIfThere), Ok((0.0, 0.9)));
        assert_eq!(chosen(&[1, 1, 3, 2, 5], &scores[1..], Wanted::BestOfSeveral), Ok((1.0, 0.5)));
        assert_eq!(chosen(&[1, 1, 2, 2], &scores[3..], Wanted::BestOfSeveral), Ok((0.0, 0.5)));
    }

    #[test]
    fn what_cannot_be_chosen_is_refused() {
        let refused = |shape: &[usize], scores: &[f32], wanted| chosen(shape, scores, wanted).unwrap_err();
        assert!(refused(&[1, 3, 2, 2], &[0.0; 3], Wanted::Single).contains("none for clear ones"));
        assert_eq!(
            refused(&[1, 2, 2, 2], &[0.0; 2], Wanted::SingleIfThere),
            "it gives 2 masks of an object, expected 1, 3 or 4"
        );
        assert_eq!(
            refused(&[2, 3, 2, 2], &[0.0; 3], Wanted::SingleIfThere),
            "the masks of one object have shape [2, 3, 2, 2], and their scores [1, 3]"
        );
        assert_eq!(
            refused(&[1, 3, 2, 2], &[0.0, f32::NAN, 1.0], Wanted::BestOfSeveral),
            "the predicted IoU of mask 1 is not a number"
        );
    }
}
