//! Every rule against finite differences of the op that it belongs to, run by ONNX Runtime in small graphs.

use merganser_onnx::gradient::Forward;
use merganser_onnx::proto::AttributeProto;
use ndarray::ArrayD;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::support::{Feeds, Numbers, Running, Small, float, int, ints, text, weighted};

/// Runs a property; shapes are small, and every case makes several sessions.
fn property<S: Strategy>(n_cases: u32, strategy: S, test: impl Fn(S::Value)) {
    let config = Config { cases: n_cases, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&strategy, |value| {
            test(value);
            Ok(())
        })
        .unwrap();
}

/// Compares gradients of Σ r·y with respect to all inputs.
fn check(small: &Small) {
    check_at(small, Numbers::array);
}

/// The same at inputs of one's own choice.
fn check_at(small: &Small, values: impl Fn(&mut Numbers, &[usize]) -> ArrayD<f32>) {
    let mut numbers = Numbers(7);
    let feeds: Feeds =
        small.inputs.iter().map(|(name, shape)| (name.clone(), values(&mut numbers, shape))).collect();
    let names: Vec<&str> = small.inputs.iter().map(|(name, _)| name.as_str()).collect();
    check_differences(small.forward(), &feeds, &names);
}

fn check_differences(mut forward: Forward, feeds: &Feeds, variables: &[&str]) {
    let y = forward.value("y").unwrap();
    let weights = Numbers(11).array(&y.shape);
    let loss = weighted(&mut forward, &weights);
    let mut running =
        Running::new(forward.differentiate(&loss, variables, &[&y]).unwrap_or_else(|e| panic!("{e}")));
    let outputs = running.run(feeds);
    let gradients: Vec<ArrayD<f32>> = variables.iter().map(|v| running.gradient(&outputs, v)).collect();
    // Summed in f64, so that only the op itself is single precision.
    let mut value = |feeds: &Feeds| -> f64 {
        let outputs = running.run(feeds);
        let y = outputs.iter().find(|(name, _)| *name == "y").map(|(_, y)| y.clone()).unwrap();
        y.iter().zip(&weights).map(|(y, r)| f64::from(*y) * f64::from(*r)).sum()
    };
    for (variable, gradient) in variables.iter().zip(&gradients) {
        let at = feeds.iter().position(|(name, _)| name == variable).unwrap();
        assert_eq!(gradient.shape(), feeds[at].1.shape());
        let largest = gradient.iter().fold(0.1f64, |m, g| m.max(f64::from(g.abs())));
        for i in 0..gradient.len() {
            let mut difference = |step: f32| {
                let mut moved = feeds.clone();
                let x = moved[at].1.as_slice_mut().unwrap();
                let (up, down) = (x[i] + step, x[i] - step);
                x[i] = up;
                let above = value(&moved);
                moved[at].1.as_slice_mut().unwrap()[i] = down;
                (above - value(&moved)) / f64::from(up - down)
            };
            // Richardson: the error of h² cancels.
            let (wide, narrow) = (difference(0.02), difference(0.01));
            let expected = (4.0 * narrow - wide) / 3.0;
            let actual = f64::from(gradient.as_slice().unwrap()[i]);
            assert!(
                (actual - expected).abs() <= 2e-3 * largest,
                "{variable}[{i}]: {actual} for {expected} of {largest}"
            );
        }
    }
}

fn shape(ranks: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(1usize..=4, ranks)
}

/// A shape, and two that are broadcast to it.
fn broadcast_pair() -> impl Strategy<Value = (Vec<usize>, Vec<usize>)> {
    (shape(0..=3), any::<u8>(), 0usize..=3, any::<bool>()).prop_map(|(full, ones, cut, swap)| {
        let mut partial = full.clone();
        for (axis, d) in partial.iter_mut().enumerate() {
            if ones >> axis & 1 == 1 {
                *d = 1;
            }
        }
        let partial = partial.split_off(cut.min(full.len()));
        if swap { (partial, full) } else { (full, partial) }
    })
}

fn unary(op: &str, shape: &[usize], attributes: Vec<AttributeProto>) -> Small {
    Small::new(17).input("x", shape).node(op, &["x"], attributes)
}

/// Away from zero, where there is a kink or a pole.
fn away_from_zero(numbers: &mut Numbers, shape: &[usize]) -> ArrayD<f32> {
    numbers.array(shape).mapv(|v| v + 0.2f32.copysign(v))
}

fn positive(numbers: &mut Numbers, shape: &[usize]) -> ArrayD<f32> {
    numbers.array(shape).mapv(|v| v.abs() + 0.5)
}

#[test]
fn functions_of_one_number() {
    property(2, shape(0..=3), |shape| {
        for op in ["Neg", "Exp", "Erf", "Sigmoid", "Tanh", "Sin", "Cos", "Identity"] {
            check(&unary(op, &shape, vec![]));
        }
        for op in ["Sqrt", "Log", "Reciprocal"] {
            check_at(&unary(op, &shape, vec![]), positive);
        }
        for op in ["Relu", "Abs"] {
            check_at(&unary(op, &shape, vec![]), away_from_zero);
        }
        check(&unary("Cast", &shape, vec![int("to", 1)]));
        let gelu = Small::new(20).input("x", &shape).node("Gelu", &["x"], vec![]);
        check(&gelu);
        for exponent in [2.0, 3.0, -1.5] {
            let pow = Small::new(17).input("x", &shape).floats("p", &[], &[exponent]).node(
                "Pow",
                &["x", "p"],
                vec![],
            );
            check_at(&pow, positive);
        }
    });
}

#[test]
fn steps_have_no_gradient() {
    for op in ["Floor", "Ceil", "Round", "Sign"] {
        let mut forward = unary(op, &[3], vec![]).forward();
        let loss = weighted(&mut forward, &Numbers(1).array(&[3]));
        let differentiated = forward.differentiate(&loss, &["x"], &[]).unwrap();
        assert_eq!(differentiated.gradients()[0].output, None, "{op}");
    }
}

#[test]
fn clip_with_one_two_and_no_bounds() {
    for bounds in [vec![], vec!["low"], vec!["", "high"], vec!["low", "high"]] {
        let inputs: Vec<&str> = std::iter::once("x").chain(bounds).collect();
        let small = Small::new(17)
            .input("x", &[3, 5])
            .floats("low", &[], &[-0.413])
            .floats("high", &[], &[0.377])
            .node("Clip", &inputs, vec![]);
        // No value within a step of a bound.
        check_at(&small, |numbers, shape| {
            numbers.array(shape).mapv(|v| if (v.abs() - 0.4).abs() < 0.05 { 0.9 * v.signum() } else { v })
        });
    }
}

#[test]
fn functions_of_two_numbers_broadcast() {
    property(8, broadcast_pair(), |(left, right)| {
        for op in ["Add", "Sub", "Mul"] {
            check(&Small::new(17).input("a", &left).input("b", &right).node(op, &["a", "b"], vec![]));
        }
        let div = Small::new(17).input("a", &left).input("b", &right).node("Div", &["a", "b"], vec![]);
        check_at(&div, positive);
        let sum = Small::new(17).input("a", &left).input("b", &right).node("Sum", &["a", "b", "a"], vec![]);
        check(&sum);
    });
}

#[test]
fn where_broadcasts_all_three() {
    property(6, broadcast_pair(), |(left, right)| {
        let small = Small::new(17)
            .input("a", &left)
            .input("b", &right)
            .floats("row", &[1], &[0.1])
            .node_to("Greater", &["a", "row"], &["condition"], vec![])
            .node("Where", &["condition", "a", "b"], vec![]);
        check_at(&small, |numbers, shape| {
            numbers.array(shape).mapv(|v| if (v - 0.1).abs() < 0.03 { 0.5 } else { v })
        });
    });
}

#[test]
fn matmul_of_stacks_matrices_and_vectors() {
    let cases: [(&[usize], &[usize]); 9] = [
        (&[3, 4], &[4, 2]),
        (&[2, 3, 4], &[4, 5]),
        (&[2, 3, 4], &[2, 4, 2]),
        (&[2, 1, 3, 4], &[3, 4, 2]),
        (&[3, 4], &[2, 4, 2]),
        (&[4], &[4, 3]),
        (&[2, 3, 4], &[4]),
        (&[4], &[4]),
        (&[4], &[2, 4, 3]),
    ];
    for (left, right) in cases {
        check(&Small::new(17).input("a", left).input("b", right).node("MatMul", &["a", "b"], vec![]));
    }
}

#[test]
fn gemm_with_all_transpositions() {
    for flags in 0..8 {
        let (ta, tb, scaled) = (flags & 1, flags >> 1 & 1, flags >> 2 == 1);
        let (a, b) = (if ta == 1 { [4, 3] } else { [3, 4] }, if tb == 1 { [2, 4] } else { [4, 2] });
        let bias: &[usize] = [&[2][..], &[3, 1], &[3, 2], &[], &[1]][flags as usize % 5];
        let mut attributes = vec![int("transA", ta), int("transB", tb)];
        if scaled {
            attributes.extend([float("alpha", 0.5), float("beta", -1.5)]);
        }
        let small = Small::new(17).input("a", &a).input("b", &b).input("c", bias);
        check(&small.node("Gemm", &["a", "b", "c"], attributes));
    }
    check(&Small::new(17).input("a", &[3, 4]).input("b", &[4, 2]).node("Gemm", &["a", "b"], vec![]));
}

#[test]
fn softmax_over_any_axis() {
    property(6, (shape(1..=3), -3i64..3), |(shape, axis)| {
        let axis = axis.rem_euclid(shape.len() as i64) - shape.len() as i64 * i64::from(axis < 0);
        for op in ["Softmax", "LogSoftmax"] {
            check(&unary(op, &shape, vec![int("axis", axis)]));
        }
    });
}

#[test]
fn layer_normalization_over_one_and_more_axes() {
    for (shape, axis) in [(vec![3, 5], -1), (vec![2, 3, 4], -1), (vec![2, 3, 4], 1), (vec![2, 2, 3], -2)] {
        let first = if axis < 0 { shape.len() as i64 + axis } else { axis } as usize;
        let small =
            Small::new(17).input("x", &shape).input("scale", &shape[first..]).input("bias", &shape[first..]);
        let attributes = vec![int("axis", axis), float("epsilon", 1e-5)];
        check(&small.clone().node("LayerNormalization", &["x", "scale", "bias"], attributes.clone()));
        let mut without = small;
        without.inputs.pop();
        check(&without.node("LayerNormalization", &["x", "scale"], attributes));
    }
}

#[test]
fn reductions_over_any_axes() {
    property(5, (shape(1..=3), any::<u8>(), any::<bool>()), |(shape, chosen, keep)| {
        let axes: Vec<i64> = (0..shape.len() as i64).filter(|a| chosen >> a & 1 == 1).collect();
        let negative: Vec<i64> = axes.iter().map(|a| a - shape.len() as i64).collect();
        let keep = int("keepdims", i64::from(keep));
        let sum = Small::new(17).input("x", &shape).ints("axes", &negative);
        check(&sum.node("ReduceSum", &["x", "axes"], vec![keep.clone()]));
        if !axes.is_empty() {
            for op in ["ReduceMean", "ReduceL2"] {
                check_at(&unary(op, &shape, vec![ints("axes", &axes), keep.clone()]), positive);
            }
            let mean = Small::new(18).input("x", &shape).ints("axes", &axes);
            check(&mean.node("ReduceMean", &["x", "axes"], vec![keep.clone()]));
        }
        check(&unary("ReduceMean", &shape, vec![keep.clone()]));
        // All values differ by more than two steps, so that the maximum stays where it is.
        let spread = |_: &mut Numbers, shape: &[usize]| {
            let mut i = 0.0;
            ArrayD::from_shape_simple_fn(shape, || {
                i += 1.0;
                (i * 7.0) % 64.0 / 16.0
            })
        };
        check_at(&unary("ReduceMax", &shape, vec![keep]), spread);
    });
    check(&unary("GlobalAveragePool", &[2, 3, 4, 5], vec![]));
}

#[test]
fn layouts() {
    let x = || Small::new(17).input("x", &[2, 3, 4]);
    check(&x().ints("s", &[4, -1]).node("Reshape", &["x", "s"], vec![]));
    check(&x().ints("s", &[0, 12]).node("Reshape", &["x", "s"], vec![]));
    check(&x().node("Flatten", &["x"], vec![int("axis", 2)]));
    check(&x().ints("a", &[0, -1]).node("Unsqueeze", &["x", "a"], vec![]));
    let ones = || Small::new(17).input("x", &[1, 3, 1, 2]);
    check(&ones().ints("a", &[0, -2]).node("Squeeze", &["x", "a"], vec![]));
    check(&ones().node("Squeeze", &["x"], vec![]));
    check(&ones().ints("s", &[4, 1, 5, 1]).node("Expand", &["x", "s"], vec![]));
    check(&ones().ints("s", &[2, 2, 3, 1, 2]).node("Expand", &["x", "s"], vec![]));
    check(&x().ints("r", &[2, 1, 3]).node("Tile", &["x", "r"], vec![]));
    check(&x().node("Transpose", &["x"], vec![]));
    property(6, Just(vec![0i64, 1, 2]).prop_shuffle(), |order| {
        check(&x().node("Transpose", &["x"], vec![ints("perm", &order)]));
    });
}

#[test]
fn slices_with_steps_in_both_directions() {
    let range = || (-8i64..8, -8i64..8, prop::sample::select(vec![1i64, 1, 2, 3, -1, -2]));
    property(16, (range(), range(), 1usize..=6), |(first, second, length)| {
        let small = Small::new(17)
            .input("x", &[length, 5])
            .ints("starts", &[first.0, second.0])
            .ints("ends", &[first.1, second.1])
            .ints("axes", &[-1, 0])
            .ints("steps", &[first.2, second.2])
            .node("Slice", &["x", "starts", "ends", "axes", "steps"], vec![]);
        check(&small);
    });
    let to_the_end = Small::new(17).input("x", &[4, 3]).ints("s", &[1]).ints("e", &[i64::MAX]);
    check(&to_the_end.node("Slice", &["x", "s", "e"], vec![]));
    let backwards = Small::new(17)
        .input("x", &[4, 3])
        .ints("s", &[-1])
        .ints("e", &[i64::MIN])
        .ints("a", &[0])
        .ints("t", &[-1]);
    check(&backwards.node("Slice", &["x", "s", "e", "a", "t"], vec![]));
}

#[test]
fn pads_that_add_and_cut() {
    property(8, prop::collection::vec(-1i64..3, 4), |pads| {
        check(&Small::new(17).input("x", &[3, 4]).ints("p", &pads).node("Pad", &["x", "p"], vec![]));
    });
    let axes = Small::new(18).input("x", &[3, 4]).ints("p", &[1, 2]).ints("a", &[-1]);
    check(&axes.node("Pad", &["x", "p", "", "a"], vec![]));
}

#[test]
fn pieces_are_split_and_joined() {
    for axis in [0, 1, -1] {
        let mut shapes = [[2, 3], [2, 3], [2, 3]];
        shapes[1][usize::from(axis != 0)] = 1;
        let small = Small::new(17).input("a", &shapes[0]).input("b", &shapes[1]).input("c", &shapes[2]);
        check(&small.node("Concat", &["a", "b", "c", "a"], vec![int("axis", axis)]));
    }
    // The middle piece is not used.
    let split = |small: Small, inputs: &[&str], attributes: Vec<AttributeProto>| {
        small.node_to("Split", inputs, &["p", "q", "r"], attributes).node("Add", &["p", "r"], vec![])
    };
    let x = |opset| Small::new(opset).input("x", &[2, 5]);
    check(&split(x(17).ints("s", &[2, 1, 2]), &["x", "s"], vec![int("axis", 1)]));
    let even = Small::new(18).input("x", &[6, 2]);
    check(&split(even, &["x"], vec![int("num_outputs", 3)]));
}

#[test]
fn gathers_add_up_where_an_index_comes_again() {
    let x = || Small::new(17).input("x", &[3, 4, 2]);
    for axis in [0, 1, -1] {
        let scalar = x().ints_of("i", &[], &[-1]);
        check(&scalar.node("Gather", &["x", "i"], vec![int("axis", axis)]));
        let many = x().ints_of("i", &[2, 3], &[0, 1, 1, -1, 0, 1]);
        check(&many.node("Gather", &["x", "i"], vec![int("axis", axis)]));
        let elements = x().ints_of("i", &[2, 2, 2], &[0, 1, 1, -1, 0, 1, 1, 1]);
        check(&elements.node("GatherElements", &["x", "i"], vec![int("axis", axis)]));
    }
    let tuples = x().ints_of("i", &[3, 2], &[0, 1, 2, -1, 0, 1]);
    check(&tuples.node("GatherND", &["x", "i"], vec![]));
    let full = x().ints_of("i", &[2, 1, 3], &[0, 1, 1, -1, -2, 0]);
    check(&full.node("GatherND", &["x", "i"], vec![]));
}

#[test]
fn scatters_write_over_or_add() {
    let both = |updates: &[usize]| Small::new(17).input("x", &[4, 3]).input("u", updates);
    let nd = both(&[2, 3]).ints_of("i", &[2, 1], &[3, 0]);
    check(&nd.node("ScatterND", &["x", "i", "u"], vec![]));
    let points = both(&[3]).ints_of("i", &[3, 2], &[0, 1, 3, 2, 1, 1]);
    check(&points.node("ScatterND", &["x", "i", "u"], vec![]));
    let elements = || both(&[2, 3]).ints_of("i", &[2, 3], &[0, 3, 1, 2, 0, 2]);
    check(&elements().node("ScatterElements", &["x", "i", "u"], vec![]));
    let again = both(&[2, 3]).ints_of("i", &[2, 3], &[0, 3, 1, 0, 3, 2]);
    check(&again.node("ScatterElements", &["x", "i", "u"], vec![text("reduction", "add")]));
    let columns = both(&[4, 1]).ints_of("i", &[4, 1], &[0, 2, 1, -1]);
    check(&columns.node("ScatterElements", &["x", "i", "u"], vec![int("axis", 1)]));
}

fn convolution(op: &str, x: &[usize], w: &[usize], attributes: Vec<AttributeProto>) {
    let channels = if op == "Conv" { w[0] } else { w[1] };
    let small = Small::new(17).input("x", x).input("w", w).input("b", &[channels]);
    check(&small.node(op, &["x", "w", "b"], attributes));
}

#[test]
fn convolutions() {
    // patches; 1×1; what is left over; overlap, padding and strides as in the stem of SAM 2; dilation; one axis
    convolution("Conv", &[2, 2, 4, 6], &[3, 2, 2, 3], vec![ints("strides", &[2, 3])]);
    convolution("Conv", &[2, 3, 2, 3], &[2, 3, 1, 1], vec![]);
    convolution("Conv", &[1, 2, 5, 5], &[2, 2, 2, 2], vec![ints("strides", &[2, 2])]);
    let stem = vec![ints("strides", &[4, 4]), ints("pads", &[3, 3, 3, 3])];
    convolution("Conv", &[1, 1, 8, 9], &[2, 1, 7, 7], stem);
    let uneven = vec![ints("strides", &[2, 1]), ints("pads", &[1, 0, 0, 2]), ints("dilations", &[1, 2])];
    convolution("Conv", &[2, 2, 6, 6], &[2, 2, 3, 2], uneven);
    convolution("Conv", &[2, 2, 7], &[3, 2, 3], vec![ints("pads", &[1, 1])]);
}

#[test]
fn transposed_convolutions() {
    convolution("ConvTranspose", &[2, 3, 2, 3], &[3, 2, 2, 2], vec![ints("strides", &[2, 2])]);
    let overlapping =
        vec![ints("strides", &[2, 2]), ints("pads", &[1, 1, 1, 1]), ints("output_padding", &[1, 0])];
    convolution("ConvTranspose", &[1, 2, 3, 3], &[2, 2, 3, 3], overlapping);
    convolution("ConvTranspose", &[1, 2, 4], &[2, 3, 3], vec![ints("dilations", &[2])]);
}

#[test]
fn max_pools() {
    // Values that are far apart, so that no maximum changes its place within a step.
    let apart = |numbers: &mut Numbers, shape: &[usize]| {
        let n: usize = shape.iter().product();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by_cached_key(|_| numbers.next().to_bits());
        ArrayD::from_shape_vec(shape, order.into_iter().map(|i| i as f32 * 0.1).collect()).unwrap()
    };
    let pool = |x: &[usize], attributes| unary("MaxPool", x, attributes);
    let halves = vec![ints("kernel_shape", &[2, 2]), ints("strides", &[2, 2])];
    check_at(&pool(&[2, 2, 4, 6], halves.clone()), apart);
    check_at(&pool(&[1, 2, 5, 5], halves), apart);
    let overlapping =
        vec![ints("kernel_shape", &[3, 3]), ints("strides", &[2, 1]), ints("pads", &[1, 1, 1, 1])];
    check_at(&pool(&[1, 2, 5, 4], overlapping), apart);
}

#[test]
fn resizes_of_every_kind() {
    let by_scales = |mode: Vec<AttributeProto>, scales: &[f32]| {
        let small = Small::new(17).input("x", &[1, 2, 3, 4]).floats("s", &[4], scales);
        check(&small.node("Resize", &["x", "", "s"], mode));
    };
    let by_sizes = |mode: Vec<AttributeProto>, sizes: &[i64]| {
        let small = Small::new(17).input("x", &[1, 2, 3, 4]).ints("s", sizes);
        check(&small.node("Resize", &["x", "", "", "s"], mode));
    };
    let mode =
        |mode, coordinates| vec![text("mode", mode), text("coordinate_transformation_mode", coordinates)];
    let repeat = || {
        let mut nearest = mode("nearest", "asymmetric");
        nearest.push(text("nearest_mode", "floor"));
        nearest
    };
    by_scales(repeat(), &[1.0, 1.0, 2.0, 2.0]);
    by_scales(repeat(), &[1.0, 1.0, 2.2, 1.0]);
    by_sizes(repeat(), &[1, 2, 6, 12]);
    by_sizes(mode("nearest", "half_pixel"), &[1, 2, 5, 7]);
    for coordinates in ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"] {
        by_sizes(mode("linear", coordinates), &[1, 2, 5, 2]);
        by_sizes(mode("cubic", coordinates), &[1, 2, 7, 5]);
    }
    by_scales(mode("cubic", "half_pixel"), &[1.0, 1.0, 1.7, 2.5]);
    let mut cubic = mode("cubic", "half_pixel");
    cubic.push(float("cubic_coeff_a", -0.5));
    by_sizes(cubic, &[1, 2, 7, 3]);
}

/// Norms as opset 14 writes them, attention scaled twice, and a value that is used three times.
#[test]
fn chains_that_share_values() {
    let small = Small::new(14)
        .input("x", &[2, 3, 4])
        .input("w", &[4])
        .floats("two", &[], &[2.0])
        .floats("tiny", &[], &[1e-5])
        .node_to("ReduceMean", &["x"], &["mean"], vec![ints("axes", &[-1])])
        .node_to("Sub", &["x", "mean"], &["c"], vec![])
        .node_to("Pow", &["c", "two"], &["square"], vec![])
        .node_to("ReduceMean", &["square"], &["variance"], vec![ints("axes", &[-1])])
        .node_to("Add", &["variance", "tiny"], &["safe"], vec![])
        .node_to("Sqrt", &["safe"], &["std"], vec![])
        .node_to("Div", &["c", "std"], &["n"], vec![])
        .node_to("Mul", &["n", "w"], &["scaled"], vec![])
        .node_to("Transpose", &["scaled"], &["t"], vec![ints("perm", &[0, 2, 1])])
        .node_to("MatMul", &["scaled", "t"], &["scores"], vec![])
        .node_to("Softmax", &["scores"], &["p"], vec![])
        .node_to("MatMul", &["p", "scaled"], &["mixed"], vec![])
        .node("Add", &["mixed", "x"], vec![]);
    check(&small);
}
