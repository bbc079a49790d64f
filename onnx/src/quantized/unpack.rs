//! Codes that the graph itself unpacks with operators of the standard (`BitShift`, `Cast`, `Sub`, `Mul`, `Div`, `Gather`).
//!
//! For every width, group and code book. All inputs are constants, so a runtime that folds constants computes the weights once, when the
//! graph is loaded, and then runs as fast as in single precision: the file is small, and the values are exactly those that the
//! codes stand for. Codes of 1, 2 and 4 bits share bytes; of 3, 5, 6 and 7 bits there is a plane of single bits for each: `b` bits per element at
//! every width.

use super::codes::{Codes, Grid};
use super::editor::{Editor, integer, integer_list, text};
use crate::proto::DataType;

/// Adds nodes that compute the values of a tensor of `shape`; returns the name of their result.
pub(super) fn unpack(editor: &mut Editor, name: &str, codes: &Codes, shape: &[usize]) -> String {
    let n = codes.values.len();
    // Whole groups, so that a matrix of groups has a row for each.
    let padded = codes.n_groups() * codes.group;
    let mut whole = codes.values.clone();
    whole.resize(padded, 0);
    let unpacked = numbers(editor, name, &whole, codes.bits);
    let column = [codes.n_groups(), 1];
    let by_group = editor.shared_integers("shape", &[codes.n_groups() as i64, codes.group as i64]);
    let grouped = |editor: &mut Editor, codes: &str| {
        editor.apply(name, "grouped", "Reshape", &[codes, &by_group], Vec::new())
    };
    let mut value = match &codes.grid {
        Grid::Step { step: scale, zero_point } | Grid::Inverse { scale, zero_point } => {
            let mut value = grouped(editor, &unpacked);
            if zero_point.iter().any(|&zero| zero != 0.0) {
                let zero = column_or_scalar(editor, name, "zero_point", zero_point, column);
                value = editor.apply(name, "centred", "Sub", &[&value, &zero], Vec::new());
            }
            let op = if matches!(codes.grid, Grid::Step { .. }) { "Mul" } else { "Div" };
            let scale = column_or_scalar(editor, name, "scale", scale, column);
            editor.apply(name, "scaled", op, &[&value, &scale], Vec::new())
        }
        Grid::Table { table, scale } => {
            let to = vec![integer("to", DataType::Int32 as i64)];
            let index = editor.apply(name, "index", "Cast", &[&unpacked], to);
            let table = editor.floats(name, "table", &[table.len()], table);
            let value = editor.apply(name, "entries", "Gather", &[&table, &index], Vec::new());
            let value = grouped(editor, &value);
            let scale = column_or_scalar(editor, name, "scale", scale, column);
            editor.apply(name, "scaled", "Mul", &[&value, &scale], Vec::new())
        }
    };
    if padded != n {
        let flat = editor.shared_integers("flat", &[-1]);
        value = editor.apply(name, "all", "Reshape", &[&value, &flat], Vec::new());
        value = first(editor, name, &value, n);
    }
    if padded == n && shape == [codes.n_groups(), codes.group] {
        return value;
    }
    let dims: Vec<i64> = shape.iter().map(|&dim| dim as i64).collect();
    let dims = editor.shared_integers("shape", &dims);
    editor.apply(name, "values", "Reshape", &[&value, &dims], Vec::new())
}

/// Adds a transposition of a matrix.
pub(super) fn transposed(editor: &mut Editor, name: &str, value: &str) -> String {
    editor.apply(name, "transposed", "Transpose", &[value], vec![integer_list("perm", &[1, 0])])
}

/// Adds nodes that give codes as whole numbers in `f32`: `codes.len()` of them, in an array of some shape.
fn numbers(editor: &mut Editor, name: &str, codes: &[u16], bits: u8) -> String {
    let to_float = || vec![integer("to", DataType::Float as i64)];
    let (values, n_values) = match bits {
        8 => {
            let bytes = codes.iter().map(|&code| code as u8).collect();
            let stored = editor.constant(name, "codes", DataType::Uint8, &[codes.len()], bytes);
            (editor.apply(name, "numbers", "Cast", &[&stored], to_float()), codes.len())
        }
        16 => {
            let bytes = codes.iter().flat_map(|code| code.to_le_bytes()).collect();
            let stored = editor.constant(name, "codes", DataType::Uint16, &[codes.len()], bytes);
            (editor.apply(name, "numbers", "Cast", &[&stored], to_float()), codes.len())
        }
        1 | 2 | 4 => {
            let bytes = packed(codes, bits);
            let n_bytes = bytes.len();
            let stored = editor.constant(name, "codes", DataType::Uint8, &[n_bytes, 1], bytes);
            let pieces = cut(editor, name, &stored, bits);
            (editor.apply(name, "numbers", "Cast", &[&pieces], to_float()), n_bytes * usize::from(8 / bits))
        }
        _ => {
            let planes: Vec<Vec<u8>> = (0..bits)
                .map(|bit| packed(&codes.iter().map(|code| code >> bit & 1).collect::<Vec<_>>(), 1))
                .collect();
            let n_bytes = planes[0].len();
            let dims = [usize::from(bits), n_bytes, 1];
            let stored = editor.constant(name, "codes", DataType::Uint8, &dims, planes.concat());
            let single = cut(editor, name, &stored, 1);
            let single = editor.apply(name, "bits", "Cast", &[&single], to_float());
            let rows = editor.shared_integers("shape", &[i64::from(bits), -1]);
            let rows = editor.apply(name, "planes", "Reshape", &[&single, &rows], Vec::new());
            // Sums of powers of two are exact.
            let weights: Vec<f32> = (0..bits).map(|bit| f32::from(1u8 << bit)).collect();
            let weights = editor.shared_floats("weights", &[1, usize::from(bits)], &weights);
            (editor.apply(name, "numbers", "MatMul", &[&weights, &rows], Vec::new()), n_bytes * 8)
        }
    };
    if n_values == codes.len() {
        return values;
    }
    let flat = editor.shared_integers("flat", &[-1]);
    let values = editor.apply(name, "all", "Reshape", &[&values, &flat], Vec::new());
    first(editor, name, &values, codes.len())
}

/// Codes of 1, 2 or 4 bits in bytes, the first in the lowest bits.
fn packed(codes: &[u16], bits: u8) -> Vec<u8> {
    let byte = |codes: &[u16]| codes.iter().rev().fold(0u8, |byte, &code| (byte << bits) | code as u8);
    codes.chunks(usize::from(8 / bits)).map(byte).collect()
}

/// Adds nodes that cut bytes `[…, 1]` into pieces of 1, 2 or 4 bits `[…, pieces]`.
fn cut(editor: &mut Editor, name: &str, bytes: &str, bits: u8) -> String {
    // Up until everything above the piece is gone, then down until everything below it is.
    let ups: Vec<u8> = (1..=8 / bits).map(|piece| 8 - piece * bits).collect();
    let up = editor.shared_bytes("up", &[ups.len()], ups);
    let down = editor.shared_bytes("down", &[1], vec![8 - bits]);
    let raised = editor.apply(name, "raised", "BitShift", &[bytes, &up], vec![text("direction", "LEFT")]);
    editor.apply(name, "pieces", "BitShift", &[&raised, &down], vec![text("direction", "RIGHT")])
}

/// Adds a node that keeps the first `n` entries of a vector.
fn first(editor: &mut Editor, name: &str, vector: &str, n: usize) -> String {
    let start = editor.shared_integers("start", &[0]);
    let end = editor.shared_integers("end", &[n as i64]);
    editor.apply(name, "first", "Slice", &[vector, &start, &end], Vec::new())
}

/// One number where all are equal, otherwise one per group.
fn column_or_scalar(
    editor: &mut Editor,
    name: &str,
    suffix: &str,
    values: &[f32],
    column: [usize; 2],
) -> String {
    match values {
        [first, rest @ ..] if rest.iter().all(|value| value.to_bits() == first.to_bits()) => {
            editor.shared_number(suffix, *first)
        }
        _ => editor.floats(name, suffix, &column, values),
    }
}
