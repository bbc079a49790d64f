//! Our own ops, as ONNX Runtime calls them, against their formulas in double precision.

use merganser_onnx::proto::{
    AttributeProto, AttributeType, DataType, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    ValueInfoProto,
};
use merganser_onnx::{Input, SessionOptions};
use ndarray::{ArrayD, ArrayView, IxDyn};
use prost::Message;

use crate::support::{runtime, value};

/// Elements that an op computes in one part.
const PART: usize = 1 << 14;

type Tensor = (Vec<usize>, Vec<f32>);

/// Runs one op and returns its outputs.
fn run(
    op: &str,
    attributes: &[AttributeProto],
    inputs: &[Tensor],
    n_outputs: usize,
    threads: usize,
) -> Vec<ArrayD<f32>> {
    let names: Vec<String> = (0..inputs.len()).map(|i| format!("x{i}")).collect();
    let outputs: Vec<String> = (0..n_outputs).map(|i| format!("y{i}")).collect();
    let dims = |shape: &[usize]| shape.iter().map(|&d| d as i64).collect::<Vec<i64>>();
    let own = OperatorSetIdProto { domain: Some("merganser.kernels".to_owned()), version: Some(1) };
    let model = ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }, own],
        graph: Some(GraphProto {
            name: Some("test".to_owned()),
            node: vec![NodeProto {
                op_type: Some(op.to_owned()),
                domain: Some("merganser.kernels".to_owned()),
                input: names.clone(),
                output: outputs.clone(),
                attribute: attributes.to_vec(),
                ..NodeProto::default()
            }],
            input: names
                .iter()
                .zip(inputs)
                .map(|(n, (shape, _))| value(n, DataType::Float, &dims(shape)))
                .collect(),
            output: outputs
                .iter()
                .map(|n| ValueInfoProto {
                    r#type: value(n, DataType::Float, &[]).r#type.map(free),
                    name: Some(n.clone()),
                    ..Default::default()
                })
                .collect(),
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    };
    let options = SessionOptions { intra_threads: threads, ..SessionOptions::default() };
    let mut session = runtime().open(op, &model.encode_to_vec(), &[], options).unwrap();
    let feeds: Vec<(&str, Input<'_>)> = names
        .iter()
        .zip(inputs)
        .map(|(n, (shape, values))| (n.as_str(), ArrayView::from_shape(IxDyn(shape), values).unwrap().into()))
        .collect();
    session.run(&feeds).unwrap().into_iter().map(|(_, array)| array).collect()
}

/// Forgets a shape.
fn free(mut r#type: merganser_onnx::proto::TypeProto) -> merganser_onnx::proto::TypeProto {
    if let Some(merganser_onnx::proto::type_proto::Value::TensorType(tensor)) = &mut r#type.value {
        tensor.shape = None;
    }
    r#type
}

/// Runs an op on one thread, and checks that other numbers of threads give the same bits.
fn run_on_any_threads(
    op: &str,
    attributes: &[AttributeProto],
    inputs: &[Tensor],
    n_outputs: usize,
) -> Vec<ArrayD<f32>> {
    let bits =
        |arrays: &[ArrayD<f32>]| -> Vec<u32> { arrays.iter().flatten().map(|v| v.to_bits()).collect() };
    let one = run(op, attributes, inputs, n_outputs, 1);
    for threads in [2, 3, 16] {
        assert!(
            bits(&run(op, attributes, inputs, n_outputs, threads)) == bits(&one),
            "{op} on {threads} threads"
        );
    }
    one
}

fn numbers(n: usize, seed: u64, scale: f32) -> Vec<f32> {
    let number = |i| {
        let z = (i as u64 ^ (seed << 32)).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let z = (z ^ (z >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        scale * ((z >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
    };
    (0..n).map(number).collect()
}

fn vector(values: Vec<f32>) -> Tensor {
    (vec![values.len()], values)
}

fn tensor(shape: &[usize], seed: u64) -> Tensor {
    (shape.to_vec(), numbers(shape.iter().product(), seed, 1.0))
}

/// Compares with a reference; `scale` is the size of what was added up.
fn close(actual: f32, expected: f64, scale: f64, what: &str) {
    let error = (f64::from(actual) - expected).abs();
    assert!(error <= 2e-6 * scale.max(1e-30), "{what}: {actual} for {expected}");
}

fn float(name: &str, value: f32) -> AttributeProto {
    let r#type = Some(AttributeType::Float as i32);
    AttributeProto { name: Some(name.to_owned()), r#type, f: Some(value), ..AttributeProto::default() }
}

fn ints(name: &str, values: &[usize]) -> AttributeProto {
    let ints = values.iter().map(|&v| v as i64).collect();
    let r#type = Some(AttributeType::Ints as i32);
    AttributeProto { name: Some(name.to_owned()), r#type, ints, ..AttributeProto::default() }
}

fn flag(name: &str, on: bool) -> AttributeProto {
    let r#type = Some(AttributeType::Int as i32);
    AttributeProto {
        name: Some(name.to_owned()),
        r#type,
        i: Some(i64::from(on)),
        ..AttributeProto::default()
    }
}

/// The normal distribution, by the series of the error function; beyond 6 it is 0 or 1 to more digits than `f32` has.
fn normal(x: f64) -> f64 {
    let z = x / std::f64::consts::SQRT_2;
    if z.abs() > 4.5 {
        return if z > 0.0 { 1.0 } else { 0.0 };
    }
    let (mut term, mut sum) = (z, z);
    for n in 1..200 {
        let n = f64::from(n);
        term *= -z * z / n;
        sum += term / (2.0 * n + 1.0);
    }
    0.5 + sum / std::f64::consts::PI.sqrt()
}

fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Sizes around those of a part, with values up to where everything is saturated, and special ones.
fn arguments() -> Vec<Vec<f32>> {
    let sizes = [0, 1, 15, 16, 17, PART - 1, PART, PART + 1];
    let mut all: Vec<Vec<f32>> = sizes.into_iter().map(|n| numbers(n, n as u64, 8.0)).collect();
    all.push(vec![
        0.0, -0.0, 1e-40, -1e-40, 1e-8, -1e-8, 0.9277, 0.9278, -1.312, 30.0, -30.0, 100.0, -100.0, 1e20,
        -1e20,
    ]);
    all
}

#[test]
fn activations_are_their_formulas() {
    let alpha = 1.702_f32;
    for x in arguments() {
        let y = &run_on_any_threads("Gelu", &[], &[vector(x.clone())], 1)[0];
        let quick = &run_on_any_threads("QuickGelu", &[float("alpha", alpha)], &[vector(x.clone())], 1)[0];
        for (i, &x) in x.iter().enumerate() {
            let wide = f64::from(x);
            close(y[i], wide * normal(wide), wide.abs(), &format!("gelu of {x}"));
            close(
                quick[i],
                wide * logistic(f64::from(alpha) * wide),
                wide.abs(),
                &format!("quick gelu of {x}"),
            );
        }
    }
}

#[test]
fn gradients_of_activations_are_their_formulas() {
    let alpha = 1.702_f32;
    for x in arguments() {
        let g = numbers(x.len(), 7, 1.0);
        let inputs = [vector(g.clone()), vector(x.clone())];
        let d = &run_on_any_threads("GeluGrad", &[], &inputs, 1)[0];
        let quick = &run_on_any_threads("QuickGeluGrad", &[float("alpha", alpha)], &inputs, 1)[0];
        for (i, (&x, &g)) in x.iter().zip(&g).enumerate() {
            let (x, g) = (f64::from(x), f64::from(g));
            let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
            close(d[i], g * (normal(x) + x * density), g.abs(), &format!("gelu's gradient at {x}"));
            let s = logistic(f64::from(alpha) * x);
            let slope = s * (1.0 + f64::from(alpha) * x * (1.0 - s));
            close(quick[i], g * slope, g.abs(), &format!("quick gelu's gradient at {x}"));
        }
    }
}

#[test]
fn a_nan_stays_one() {
    let nan = || vector(vec![f32::NAN, 1.0]);
    for (op, inputs) in [
        ("Gelu", vec![nan()]),
        ("QuickGelu", vec![nan()]),
        ("GeluGrad", vec![vector(vec![1.0, 1.0]), nan()]),
        ("QuickGeluGrad", vec![nan(), vector(vec![1.0, 1.0])]),
        ("SoftmaxGrad", vec![nan(), vector(vec![0.5, 0.5])]),
    ] {
        let y = &run(op, &[], &inputs, 1, 1)[0];
        assert!(y[0].is_nan(), "{op}");
        assert_eq!(y[1].is_nan(), op == "SoftmaxGrad", "{op}");
    }
}

/// Rows and their lengths: none, one, edges of what is computed together and of parts.
const ROWS: [(usize, usize); 9] = [
    (0, 5),
    (3, 1),
    (1, 16),
    (5, 15),
    (4, 33),
    (PART / 64 - 1, 64),
    (PART / 64, 64),
    (PART / 64 + 1, 64),
    (3, PART + 3),
];

#[test]
fn the_gradient_of_softmax_is_its_formula() {
    for (rows, n) in ROWS {
        let (g, y) = (tensor(&[rows, n], 1), tensor(&[rows, n], 2));
        let d = &run_on_any_threads("SoftmaxGrad", &[], &[g.clone(), y.clone()], 1)[0];
        for row in 0..rows {
            let at = |t: &Tensor, i: usize| f64::from(t.1[row * n + i]);
            let sum: f64 = (0..n).map(|i| at(&g, i) * at(&y, i)).sum();
            for i in 0..n {
                close(d[[row, i]], at(&y, i) * (at(&g, i) - sum), 1.0 + (n as f64).sqrt(), "softmax");
            }
        }
    }
}

#[test]
fn gradients_of_layer_normalization_are_their_formulas() {
    for (rows, n) in ROWS {
        let (g, x, scale) = (tensor(&[rows, n], 1), tensor(&[rows, n], 2), tensor(&[n], 3));
        let row = |t: &Tensor, r: usize| {
            t.1[r * n..(r + 1) * n].iter().map(|&v| f64::from(v)).collect::<Vec<f64>>()
        };
        let means: Vec<f64> = (0..rows).map(|r| row(&x, r).iter().sum::<f64>() / n as f64).collect();
        let inverses: Vec<f64> = (0..rows)
            .map(|r| {
                let variance = row(&x, r).iter().map(|v| (v - means[r]).powi(2)).sum::<f64>() / n as f64;
                1.0 / (variance + 1e-5).sqrt()
            })
            .collect();
        let narrow = |values: &[f64]| (vec![rows, 1], values.iter().map(|&v| v as f32).collect());
        let inputs = [g.clone(), x.clone(), scale.clone(), narrow(&means), narrow(&inverses)];
        let of = run_on_any_threads("LayerNormalizationGrad", &[], &inputs, 3);
        let (mut of_scale, mut of_bias) = (vec![0.0; n], vec![0.0; n]);
        for r in 0..rows {
            let (g, x) = (row(&g, r), row(&x, r));
            let normalized: Vec<f64> = x.iter().map(|x| (x - means[r]) * inverses[r]).collect();
            let h: Vec<f64> = g.iter().zip(&scale.1).map(|(g, &s)| g * f64::from(s)).collect();
            let mean = h.iter().sum::<f64>() / n as f64;
            let along = h.iter().zip(&normalized).map(|(h, x)| h * x).sum::<f64>() / n as f64;
            for i in 0..n {
                let expected = (h[i] - mean - normalized[i] * along) * inverses[r];
                // Of a row of one value, the deviation is that of ε alone.
                close(of[0][[r, i]], expected, 4.0 * inverses[r], "layer normalization");
                of_scale[i] += g[i] * normalized[i];
                of_bias[i] += g[i];
            }
        }
        for i in 0..n {
            close(of[1][i], of_scale[i], 2.0 * (1.0 + rows as f64).sqrt(), "scale");
            close(of[2][i], of_bias[i], (1.0 + rows as f64).sqrt(), "bias");
        }
    }
}

#[test]
fn what_is_not_asked_for_is_not_needed() {
    let (g, x, scale) = (tensor(&[4, 20], 1), tensor(&[4, 20], 2), tensor(&[20], 3));
    let inputs = [g, x, scale, (vec![4, 1], vec![0.1; 4]), (vec![4, 1], vec![2.0; 4])];
    let all = run("LayerNormalizationGrad", &[], &inputs, 3, 1);
    let one = run("LayerNormalizationGrad", &[], &inputs, 1, 1);
    assert_eq!(one, all[..1]);
}

#[test]
fn columns_are_summed() {
    for (rows, n) in ROWS.into_iter().chain([(1, 1), (7, 3), (2000, 24)]) {
        let x = tensor(&[rows, n], 4);
        let sums = &run_on_any_threads("ColumnSum", &[], std::slice::from_ref(&x), 1)[0];
        assert_eq!(sums.shape(), [n]);
        for i in 0..n {
            let expected: f64 = (0..rows).map(|r| f64::from(x.1[r * n + i])).sum();
            close(sums[i], expected, (1.0 + rows as f64).sqrt(), "a column");
        }
    }
    let x = tensor(&[2, 3, 4, 5], 5);
    let (all, flat) = (
        run("ColumnSum", &[], std::slice::from_ref(&x), 1, 1),
        run("ColumnSum", &[], &[(vec![24, 5], x.1)], 1, 1),
    );
    assert_eq!(all, flat);
}

/// Checks a product of two stacks of matrices, with and without a bias.
fn check_product(stack: &[usize], [m, k, n]: [usize; 3], transposed: [bool; 2]) {
    let shape = |[rows, columns]: [usize; 2], transposed| {
        let matrix = if transposed { [columns, rows] } else { [rows, columns] };
        stack.iter().copied().chain(matrix).collect::<Vec<usize>>()
    };
    let (a, b) = (tensor(&shape([m, k], transposed[0]), 1), tensor(&shape([k, n], transposed[1]), 2));
    let bias = tensor(&[n], 3);
    let attributes = [flag("transA", transposed[0]), flag("transB", transposed[1]), float("alpha", 0.5)];
    let plain = &run_on_any_threads("Product", &attributes, &[a.clone(), b.clone()], 1)[0];
    let biased = &run_on_any_threads("Product", &attributes, &[a.clone(), b.clone(), bias.clone()], 1)[0];
    assert_eq!(plain.shape(), shape([m, n], false));
    let (plain, biased) = (plain.as_slice().unwrap(), biased.as_slice().unwrap());
    for s in 0..stack.iter().product() {
        for i in 0..m {
            for j in 0..n {
                let left = |p| f64::from(a.1[s * m * k + if transposed[0] { p * m + i } else { i * k + p }]);
                let right = |p| f64::from(b.1[s * k * n + if transposed[1] { j * k + p } else { p * n + j }]);
                let expected = 0.5 * (0..k).map(|p| left(p) * right(p)).sum::<f64>();
                let at = s * m * n + i * n + j;
                let what = format!("{stack:?} {m} × {k} × {n} {transposed:?}");
                close(plain[at], expected, 1.0 + (k as f64).sqrt(), &what);
                close(biased[at], expected + f64::from(bias.1[j]), 1.0 + (k as f64).sqrt(), &what);
            }
        }
    }
}

#[test]
fn products_are_those_of_matrices() {
    let sizes =
        [[1, 1, 1], [3, 0, 4], [0, 3, 4], [1, 300, 5], [7, 300, 1], [5, 1, 6], [17, 33, 95], [40, 97, 130]];
    for size in sizes {
        for transposed in [[false, false], [false, true], [true, false], [true, true]] {
            check_product(&[], size, transposed);
        }
    }
    for size in [[5, 6, 7], [50, 16, 50], [50, 50, 16]] {
        check_product(&[2, 3], size, [false, false]);
        check_product(&[2, 3], size, [false, true]);
        check_product(&[6], size, [true, false]);
    }
    // Those that are cut into tiles.
    check_product(&[], [150, 140, 200], [false, false]);
    check_product(&[], [64, 200, 700], [false, true]);
    check_product(&[], [700, 130, 65], [true, false]);
}

#[test]
fn a_stack_times_one_matrix_is_its_rows_times_that_matrix() {
    let (a, b) = (tensor(&[2, 3, 4, 10], 1), tensor(&[10, 7], 2));
    let stacked = &run_on_any_threads("Product", &[], &[a.clone(), b.clone()], 1)[0];
    let flat = &run("Product", &[], &[(vec![24, 10], a.1), b], 1, 1)[0];
    assert_eq!(stacked.shape(), [2, 3, 4, 7]);
    assert!(stacked.iter().eq(flat));
}

/// Queries and keys of two heads, cut out of one tensor of [images, tokens, 3, heads, width], and the scores in the order images, tokens, heads, tokens.
#[test]
fn factors_are_read_where_they_lie_and_heads_written_beside_each_other() {
    let [images, tokens, heads, width] = [2, 70, 2, 40];
    let x = tensor(&[images, tokens, 3, heads, width], 1);
    let row = 3 * heads * width;
    let view = |part: usize| {
        let numbers = [part * heads * width, images, heads, tokens, width, tokens * row, width, row, 1];
        ints(["viewA", "viewB"][part], &numbers)
    };
    let attributes = [
        view(0),
        view(1),
        flag("transB", true),
        float("alpha", 0.25),
        AttributeProto { i: Some(heads as i64), ..flag("heads", true) },
        ints("shape", &[images, tokens, 1, heads, tokens]),
    ];
    let scores = &run_on_any_threads("Product", &attributes, &[x.clone(), x.clone()], 1)[0];
    assert_eq!(scores.shape(), [images, tokens, 1, heads, tokens]);
    let at = |image, token, part, head, i| {
        let index = (((image * tokens + token) * 3 + part) * heads + head) * width + i;
        f64::from(x.1[index])
    };
    for (index, &score) in scores.indexed_iter() {
        let [image, query, _, head, key] = [0, 1, 2, 3, 4].map(|axis| index[axis]);
        let sum: f64 = (0..width).map(|i| at(image, query, 0, head, i) * at(image, key, 1, head, i)).sum();
        close(score, 0.25 * sum, (width as f64).sqrt(), "a score");
    }
}

#[test]
fn views_that_leave_their_tensor_are_refused() {
    let refused = |view: &[usize]| {
        let inputs = [tensor(&[3, 4], 1), tensor(&[4, 2], 2)];
        std::panic::catch_unwind(|| run("Product", &[ints("viewA", view)], &inputs, 1, 1)).is_err()
    };
    assert!(!refused(&[0, 3, 4, 4, 1]));
    assert!(!refused(&[4, 2, 4, 4, 1]));
    assert!(refused(&[5, 2, 4, 4, 1]));
    assert!(refused(&[0, 3, 4, 5, 1]));
    assert!(refused(&[13, 1, 4, 4, 1]));
    // Neither rows nor columns lie together.
    assert!(refused(&[0, 2, 4, 6, 2]));
    assert!(refused(&[0, 3, 4, 4]));
}

#[test]
fn factors_that_do_not_fit_are_refused() {
    let refused = |a: &[usize], b: &[usize]| {
        let inputs = [tensor(a, 1), tensor(b, 2)];
        std::panic::catch_unwind(|| run("Product", &[], &inputs, 1, 1)).is_err()
    };
    assert!(refused(&[3, 4], &[5, 6]));
    assert!(refused(&[2, 3, 4], &[3, 4, 6]));
    assert!(refused(&[4], &[4, 6]));
    assert!(!refused(&[3, 4], &[4, 6]));
}
