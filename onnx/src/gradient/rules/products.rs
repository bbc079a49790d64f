//! Matrix products.

use super::super::backward::{Backward, Unsupported};
use super::super::tape::Value;
use super::Rules;

pub(super) static RULES: Rules = &[("Gemm", gemm), ("MatMul", matmul)];

/// Y = A B: dA = g Bᵀ, dB = Aᵀ g.
fn matmul(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, left, right) = (b.gradient()?, b.input(0)?, b.input(1)?);
    if left.rank() == 0 || right.rank() == 0 {
        return Err("a scalar has no matrix product".to_owned());
    }
    // Vectors are matrices with one row, or one column, that the result does not have.
    let (rows, columns) = (left.rank() == 1, right.rank() == 1);
    let mut shape = g.shape.clone();
    if rows {
        shape.insert(shape.len() - usize::from(!columns), 1);
    }
    if columns {
        shape.push(1);
    }
    let matrix = |b: &mut Backward<'_>, v: &Value, vector: bool, shape: [usize; 2]| {
        if vector { b.tape.reshape(v, &shape) } else { v.clone() }
    };
    let g = b.tape.reshape(&g, &shape);
    let a = matrix(b, &left, rows, [1, left.n_elements()]);
    let w = matrix(b, &right, columns, [right.n_elements(), 1]);
    if b.needs(0) {
        let gradient = times_transposed(b, &g, &w);
        let gradient = b.tape.sum_to(&gradient, &a.shape);
        let gradient = b.tape.reshape(&gradient, &left.shape);
        b.give(0, &gradient)?;
    }
    if b.needs(1) {
        let gradient = if w.rank() == 2 {
            let (a, g) = (flat(b, &a), flat(b, &g));
            b.tape.gemm((&a, true), (&g, false), 1.0)
        } else {
            let transposed = b.tape.transpose_matrices(&a);
            let product = b.tape.matmul(&transposed, &g);
            b.tape.sum_to(&product, &w.shape)
        };
        let gradient = b.tape.reshape(&gradient, &right.shape);
        b.give(1, &gradient)?;
    }
    Ok(())
}

fn times_transposed(b: &mut Backward<'_>, g: &Value, w: &Value) -> Value {
    if w.rank() == 2 {
        let rows = flat(b, g);
        let product = b.tape.gemm((&rows, false), (w, true), 1.0);
        let mut shape = g.shape.clone();
        shape[g.rank() - 1] = w.shape[0];
        return b.tape.reshape(&product, &shape);
    }
    let transposed = b.tape.transpose_matrices(w);
    b.tape.matmul(g, &transposed)
}

/// Makes one matrix of a stack of matrices: all their rows.
fn flat(b: &mut Backward<'_>, x: &Value) -> Value {
    let columns = x.shape[x.rank() - 1];
    let rows = x.shape[..x.rank() - 1].iter().product();
    b.tape.reshape(x, &[rows, columns])
}

/// Y = α A′ B′ + β C, where A′ and B′ may be transposes.
fn gemm(b: &mut Backward<'_>) -> Result<(), Unsupported> {
    let (g, left, right) = (b.gradient()?, b.input(0)?, b.input(1)?);
    let (ta, tb) = (b.int("transA", 0) != 0, b.int("transB", 0) != 0);
    let (alpha, beta) = (b.float("alpha", 1.0), b.float("beta", 1.0));
    if b.needs(0) {
        let gradient = if ta {
            b.tape.gemm((&right, tb), (&g, true), alpha)
        } else {
            b.tape.gemm((&g, false), (&right, !tb), alpha)
        };
        b.give(0, &gradient)?;
    }
    if b.needs(1) {
        let gradient = if tb {
            b.tape.gemm((&g, true), (&left, ta), alpha)
        } else {
            b.tape.gemm((&left, !ta), (&g, false), alpha)
        };
        b.give(1, &gradient)?;
    }
    if b.needs(2) {
        let scaled = b.tape.scale(&g, beta);
        b.give(2, &scaled)?;
    }
    Ok(())
}
