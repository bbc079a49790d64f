//! The two operators that take codes as they are: `DequantizeLinear`, and ONNX Runtime's `MatMulNBits`.

use super::codes::Codes;
use crate::binding::How;
use crate::proto::DataType;

/// Block sizes that `MatMulNBits` computes with.
const BLOCKS: [usize; 5] = [16, 32, 64, 128, 256];

/// Codes of eight bits in the graph's order, as inputs of `DequantizeLinear`.
pub(super) struct Dequantize {
    pub(super) element: DataType,
    pub(super) codes: Vec<u8>,
    pub(super) steps: Vec<f32>,
    /// Of the codes' type; none where it is zero.
    pub(super) zero_points: Option<Vec<u8>>,
    /// The axis that has a step per index; none where one step serves all.
    pub(super) axis: Option<usize>,
}

impl Dequantize {
    /// Returns them if they give exactly the values that the codes stand for. `shape` is the checkpoint's, `slot` the graph's.
    pub(super) fn new(codes: &Codes, how: How, shape: &[usize], slot: &[usize]) -> Option<Self> {
        if codes.bits != 8 {
            return None;
        }
        let (steps, zero_points) = codes.steps()?;
        let axis = match steps.len() {
            1 => None,
            channels if shape.first() == Some(&channels) && codes.group * channels == codes.values.len() => {
                match how {
                    How::Transposed => Some(1),
                    _ if slot.first() == Some(&channels) => Some(0),
                    _ => return None,
                }
            }
            _ => return None,
        };
        let is_byte = |zero: &f32| zero.fract() == 0.0 && (0.0..=255.0).contains(zero);
        let centred = zero_points.iter().all(|&zero| zero == 128.0);
        if !centred && !zero_points.iter().all(is_byte) {
            return None;
        }
        let in_order = match (how, shape) {
            (How::Transposed, &[rows, columns]) => transpose(&codes.values, rows, columns),
            _ => codes.values.clone(),
        };
        let bytes = in_order.iter().map(|&code| code as u8);
        Some(if centred {
            // Offset binary with the offset taken away is two's complement.
            let codes = bytes.map(|code| code ^ 0x80).collect();
            Self { element: DataType::Int8, codes, steps, zero_points: None, axis }
        } else {
            let zero_points = Some(zero_points.iter().map(|&zero| zero as u8).collect());
            Self { element: DataType::Uint8, codes: bytes.collect(), steps, zero_points, axis }
        })
    }
}

/// A matrix [outputs, inputs] in blocks along its inputs.
pub(super) struct Blocks {
    pub(super) bits: u8,
    pub(super) block: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// [outputs, blocks, block·bits/8], the first code of a byte in its lowest bits
    pub(super) codes: Vec<u8>,
    /// [outputs, blocks]
    pub(super) steps: Vec<f32>,
    pub(super) zero_points: ZeroPoints,
}

/// `MatMulNBits` takes half the range unless it is told otherwise.
pub(super) enum ZeroPoints {
    Middle,
    /// packed like the codes, each output's row ending on a byte
    Packed(Vec<u8>),
    /// [outputs, blocks]
    Floats(Vec<f32>),
}

impl Blocks {
    /// Returns them if they give exactly the values that the codes stand for, `shape` being [outputs, inputs]. `finer` allows blocks
    /// smaller than the groups, whose scales are then repeated.
    pub(super) fn new(codes: &Codes, shape: &[usize], finer: bool) -> Option<Self> {
        let &[outputs, inputs] = shape else { return None };
        if !matches!(codes.bits, 2 | 4 | 8) {
            return None;
        }
        let (steps, zeros) = codes.steps()?;
        let group = codes.group;
        let block = if BLOCKS.contains(&group) && inputs.is_multiple_of(group) {
            group
        } else {
            // Rows, or the whole matrix.
            let whole_rows = group.is_multiple_of(inputs);
            *BLOCKS.iter().rev().find(|&&block| finer && whole_rows && inputs.is_multiple_of(block))?
        };
        let blocks = inputs / block;
        let of_block = |index: usize| index * block / group;
        let per_byte = 8 / usize::from(codes.bits);
        let zero_of = |index: usize| zeros[of_block(index)];
        let middle = f32::from(1u8 << (codes.bits - 1));
        let highest = f32::from(u8::MAX >> (8 - codes.bits));
        let fits = |zero: f32| zero.fract() == 0.0 && (0.0..=highest).contains(&zero);
        let all = 0..outputs * blocks;
        let zero_points = if all.clone().all(|index| zero_of(index) == middle) {
            ZeroPoints::Middle
        } else if all.clone().all(|index| fits(zero_of(index))) {
            let rows = (0..outputs).flat_map(|output| {
                let row: Vec<u16> =
                    (output * blocks..(output + 1) * blocks).map(|index| zero_of(index) as u16).collect();
                pack(&row, codes.bits, per_byte)
            });
            ZeroPoints::Packed(rows.collect())
        } else if codes.bits == 8 {
            return None;
        } else {
            ZeroPoints::Floats(all.clone().map(zero_of).collect())
        };
        Some(Self {
            bits: codes.bits,
            block,
            outputs,
            inputs,
            codes: pack(&codes.values, codes.bits, per_byte),
            steps: all.map(|index| steps[of_block(index)]).collect(),
            zero_points,
        })
    }
}

/// Packs codes, the first in the lowest bits.
fn pack(codes: &[u16], bits: u8, per_byte: usize) -> Vec<u8> {
    let byte = |codes: &[u16]| {
        codes.iter().rev().fold(0u8, |byte, &code| byte.unbounded_shl(bits.into()) | code as u8)
    };
    codes.chunks(per_byte).map(byte).collect()
}

fn transpose(values: &[u16], rows: usize, columns: usize) -> Vec<u16> {
    let mut out = Vec::with_capacity(values.len());
    for column in 0..columns {
        out.extend((0..rows).map(|row| values[row * columns + column]));
    }
    out
}
