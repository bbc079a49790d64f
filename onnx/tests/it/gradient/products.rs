//! Branches beside products: `x · W + branch(x)` against the same weight changed.

use merganser_onnx::gradient::{Forward, GradientError};
use ndarray::{ArrayD, IxDyn};

use super::support::{Feeds, Numbers, Running, Small, float, int, ints, weighted};

/// Adds `x · (B·A)ᵀ` to all products of `w` [inputs, outputs] (or transposed); returns gradients of A and B.
fn adapted(mut forward: Forward, weights: &ArrayD<f32>, feeds: &Feeds) -> [ArrayD<f32>; 3] {
    let (rank, inputs, outputs) = (2, 3, 4);
    let a = forward.add_input("a", &[rank, inputs]).unwrap();
    let b = forward.add_input("b", &[outputs, rank]).unwrap();
    for product in forward.products("w").unwrap() {
        let tape = forward.tape();
        let (a, b) = (tape.transpose(&a, &[1, 0]), tape.transpose(&b, &[1, 0]));
        let inner = tape.matmul(&product.input, &a);
        let addend = tape.matmul(&inner, &b);
        forward.add_to(&product, &addend);
    }
    let loss = weighted(&mut forward, weights);
    let y = forward.value("y").unwrap();
    let mut running = Running::new(forward.differentiate(&loss, &["a", "b"], &[&y]).unwrap());
    let outputs = running.run(feeds);
    [running.gradient(&outputs, "a"), running.gradient(&outputs, "b"), outputs["y"].clone()]
}

fn matrix(rows: usize, columns: usize, of: impl Fn(usize, usize) -> f64) -> ArrayD<f32> {
    let values = (0..rows * columns).map(|i| of(i / columns, i % columns) as f32).collect();
    ArrayD::from_shape_vec(IxDyn(&[rows, columns]), values).unwrap()
}

#[test]
fn a_branch_is_a_change_of_the_weight() {
    let mut numbers = Numbers(9);
    let (x, w) = (numbers.array(&[5, 3]), numbers.array(&[3, 4]));
    let (a, b) = (numbers.array(&[2, 3]), numbers.array(&[4, 2]));
    let weights = numbers.array(&[5, 4]);
    let at = |m: &ArrayD<f32>, i: usize, j: usize| f64::from(m[[i, j]]);
    // y = x·(w + (b·a)ᵀ), and what its definition gives for Σ r·y.
    let changed =
        |i: usize, o: usize| at(&w, i, o) + (0..2).map(|p| at(&b, o, p) * at(&a, p, i)).sum::<f64>();
    let y = matrix(5, 4, |n, o| (0..3).map(|i| at(&x, n, i) * changed(i, o)).sum());
    let dw = |i: usize, o: usize| (0..5).map(|n| at(&x, n, i) * at(&weights, n, o)).sum::<f64>();
    let da = matrix(2, 3, |p, i| (0..4).map(|o| at(&b, o, p) * dw(i, o)).sum());
    let db = matrix(4, 2, |o, p| (0..3).map(|i| at(&a, p, i) * dw(i, o)).sum());
    let w_transposed = ArrayD::from_shape_fn(IxDyn(&[4, 3]), |at| w[[at[1], at[0]]]);
    let base = |weight: &ArrayD<f32>| Small::new(17).input("x", &[5, 3]).input("w", weight.shape());
    let cases =
        [
            (base(&w).node("MatMul", &["x", "w"], vec![]), &w),
            (base(&w).node("Gemm", &["x", "w"], vec![]), &w),
            (base(&w_transposed).node("Gemm", &["x", "w"], vec![int("transB", 1)]), &w_transposed),
            (
                base(&w_transposed)
                    .node_to("Transpose", &["w"], &["turned"], vec![ints("perm", &[1, 0])])
                    .node("MatMul", &["x", "turned"], vec![]),
                &w_transposed,
            ),
        ];
    for (graph, weight) in cases {
        let feeds: Feeds = [("x", &x), ("w", weight), ("a", &a), ("b", &b)]
            .map(|(name, values)| (name.to_owned(), values.clone()))
            .into();
        let found = adapted(graph.forward(), &weights, &feeds);
        for (found, expected) in found.iter().zip([&da, &db, &y]) {
            let largest = (found - expected).iter().fold(0.0f32, |most, d| most.max(d.abs()));
            assert!(largest < 1e-5, "{:?}: {found} for {expected}", graph.nodes);
        }
    }
}

#[test]
fn other_uses_of_a_weight_are_refused_by_node() {
    let base = || Small::new(17).input("x", &[3, 3]).input("w", &[3, 3]);
    let cases = [
        base().node("MatMul", &["w", "x"], vec![]),
        base().node("Add", &["x", "w"], vec![]),
        base().node("Gemm", &["x", "w"], vec![float("alpha", 2.0)]),
        base().node_to("MatMul", &["x", "w"], &["z"], vec![]).node("Mul", &["z", "w"], vec![]),
    ];
    for graph in cases {
        let error = graph.forward().products("w").unwrap_err();
        assert!(matches!(&error, GradientError::NotAProduct { weight, .. } if weight == "w"), "{error}");
    }
}
