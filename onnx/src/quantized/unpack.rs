//! Codes that the graph itself unpacks with operators of the standard (`BitShift`, `Cast`, `Sub`, `Mul`, `Div`, `Gather`).
//!
//! For every width, group and code book. All inputs are constants, so a runtime that folds constants computes the weights once, when the
//! graph is loaded, and then runs as fast as in single precision: the file is small, and the values are exactly those that the
//! codes stand for. A code of `b` bits is cut into pieces of 4, 2 and 1 bits, each of which divides a byte: `b` bits per element at
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
    let dims: Vec<i64> = shape.iter().map(|&dim| dim as i64).collect();
    let dims = editor.shared_integers("shape", &dims);
    editor.apply(name, "values", "Reshape", &[&value, &dims], Vec::new())
}

/// Adds a transposition of a matrix.
pub(super) fn transposed(editor: &mut Editor, name: &str, value: &str) -> String {
    editor.apply(name, "transposed", "Transpose", &[value], vec![integer_list("perm", &[1, 0])])
}

/// Adds nodes that give codes as whole numbers in `f32`, a vector of `codes.len()`.
fn numbers(editor: &mut Editor, name: &str, codes: &[u16], bits: u8) -> String {
    let to_float = || vec![integer("to", DataType::Float as i64)];
    if bits == 8 || bits == 16 {
        let (element, bytes) = if bits == 8 {
            (DataType::Uint8, codes.iter().map(|&code| code as u8).collect())
        } else {
            (DataType::Uint16, codes.iter().flat_map(|code| code.to_le_bytes()).collect())
        };
        let stored = editor.constant(name, "codes", element, &[codes.len()], bytes);
        return editor.apply(name, "numbers", "Cast", &[&stored], to_float());
    }
    let mut sum: Option<String> = None;
    let mut shift = 0u8;
    for width in [4u8, 2, 1] {
        if bits & width == 0 {
            continue;
        }
        let per_byte = usize::from(8 / width);
        let bytes: Vec<u8> = codes
            .chunks(per_byte)
            .map(|codes| {
                let piece = |code: u16| (code >> shift) as u8 & ((1 << width) - 1);
                codes.iter().rev().fold(0u8, |byte, &code| (byte << width) | piece(code))
            })
            .collect();
        let n_bytes = bytes.len();
        let stored = editor.constant(name, &format!("codes{width}"), DataType::Uint8, &[n_bytes, 1], bytes);
        // Up until everything above the piece is gone, then down until everything below it is.
        let ups = (1..=8 / width).map(|piece| 8 - piece * width).collect();
        let up = editor.shared_bytes("up", &[1, per_byte], ups);
        let down = editor.shared_bytes("down", &[1], vec![8 - width]);
        let left = vec![text("direction", "LEFT")];
        let raised = editor.apply(name, "raised", "BitShift", &[&stored, &up], left);
        let right = vec![text("direction", "RIGHT")];
        let lowered = editor.apply(name, "lowered", "BitShift", &[&raised, &down], right);
        let mut piece = editor.apply(name, "pieces", "Cast", &[&lowered], to_float());
        let flat = editor.shared_integers("flat", &[-1]);
        piece = editor.apply(name, "flat_pieces", "Reshape", &[&piece, &flat], Vec::new());
        if n_bytes * per_byte != codes.len() {
            piece = first(editor, name, &piece, codes.len());
        }
        if shift > 0 {
            let weight = editor.shared_number("weight", f32::from(1u8 << shift));
            piece = editor.apply(name, "weighted", "Mul", &[&piece, &weight], Vec::new());
        }
        sum = Some(match sum {
            None => piece,
            Some(sum) => editor.apply(name, "numbers", "Add", &[&sum, &piece], Vec::new()),
        });
        shift += width;
    }
    sum.expect("a code has at least one bit")
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
