//! Inputs of layers as eight-bit integers, with ranges that were measured beforehand.

use std::collections::HashMap;

use super::editor::{Editor, node};
use crate::proto::NodeProto;

/// What the values of an activation lie between; finite.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    pub min: f32,
    pub max: f32,
}

impl Range {
    /// Returns step and zero point of unsigned bytes: `(max − min)/255`, with zero represented exactly.
    fn bytes(self) -> (f32, u8) {
        let (min, max) = (self.min.min(0.0), self.max.max(0.0));
        let step = (max - min) / 255.0;
        if step > 0.0 && step.is_finite() {
            (step, (-min / step).round_ties_even().clamp(0.0, 255.0) as u8)
        } else {
            (1.0, 0)
        }
    }
}

/// Activations that are quantized already: layers that read the same values share them.
#[derive(Default)]
pub(super) struct Inputs(HashMap<(String, u32, u8), String>);

impl Inputs {
    /// Lets a layer read its first input through bytes; adds the nodes that this takes.
    pub(super) fn quantize(
        &mut self,
        editor: &mut Editor,
        layer: &mut NodeProto,
        range: Range,
        nodes: &mut Vec<NodeProto>,
    ) {
        let input = layer.input[0].clone();
        let (step, zero) = range.bytes();
        let rounded = self.0.entry((input.clone(), step.to_bits(), zero)).or_insert_with(|| {
            let step = editor.shared_number("step", step);
            let zero = editor.shared_bytes("zero", &[], vec![zero]);
            let codes = editor.fresh(&input, "codes");
            let values = editor.fresh(&input, "rounded");
            nodes.push(node("QuantizeLinear", "", &[&input, &step, &zero], &codes, Vec::new()));
            nodes.push(node("DequantizeLinear", "", &[&codes, &step, &zero], &values, Vec::new()));
            values
        });
        layer.input[0].clone_from(rounded);
    }
}
