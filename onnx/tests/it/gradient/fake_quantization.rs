//! Fake quantization against its formulas, and gradients that go straight through.

use merganser_onnx::gradient::{Forward, Value, fake_quantization as fake};
use ndarray::{ArrayD, Axis, IxDyn};

use super::support::{Feeds, Numbers, Running, Small};

/// A graph with the input `x`, and others.
fn graph(opset: i64, shape: &[usize], others: &[(&str, &[usize])]) -> (Forward, Value, Vec<Value>) {
    let mut forward = Small::new(opset).input("x", shape).node("Identity", &["x"], vec![]).forward();
    let others = others.iter().map(|(name, shape)| forward.add_input(name, shape).unwrap()).collect();
    let x = forward.value("x").unwrap();
    (forward, x, others)
}

/// Differentiates Σ r·y by `variables`.
fn running(mut forward: Forward, y: &Value, r: &ArrayD<f32>, variables: &[&str]) -> Running {
    let tape = forward.tape();
    let weights = tape.floats(&y.shape, r.as_slice().unwrap());
    let product = tape.mul(&weights, y);
    let axes: Vec<usize> = (0..product.rank()).collect();
    let loss = tape.reduce_sum(&product, &axes, false);
    Running::new(forward.differentiate(&loss, variables, &[y]).unwrap())
}

fn feeds(all: &[(&str, &ArrayD<f32>)]) -> Feeds {
    all.iter().map(|(name, values)| ((*name).to_owned(), (*values).clone())).collect()
}

fn vector(values: &[f32]) -> ArrayD<f32> {
    ArrayD::from_shape_vec(IxDyn(&[values.len()]), values.to_vec()).unwrap()
}

/// The formula, one rounding per operation.
fn symmetric(x: &ArrayD<f32>, axis: usize, levels: &[f32]) -> ArrayD<f32> {
    let mut rounded = x.clone();
    for (mut channel, &levels) in rounded.axis_iter_mut(Axis(axis)).zip(levels) {
        let largest = channel.iter().fold(0f32, |most, x| most.max(x.abs()));
        if largest > 0.0 {
            let step = largest / levels;
            channel.mapv_inplace(|x| (x / step).round_ties_even() * step);
        }
    }
    rounded
}

#[test]
fn weights_are_rounded_per_channel_and_their_gradients_are_not() {
    let cases: [(&[usize], usize); 6] =
        [(&[3, 4], 0), (&[4, 3], 1), (&[3, 2, 2, 5], 0), (&[1, 1], 0), (&[3], 0), (&[3, 1], 0)];
    for opset in [17, 18] {
        for (shape, axis) in cases {
            let n = shape[axis];
            let (mut forward, x, levels) = graph(opset, shape, &[("levels", &[n])]);
            let y = fake::symmetric(forward.tape(), &x, axis, &levels[0]);
            let r = Numbers(2).array(shape);
            let mut running = running(forward, &y, &r, &["x"]);
            let mut values = Numbers(5).array(shape) * 3.0;
            if n > 2 {
                values.index_axis_mut(Axis(axis), 1).fill(0.0);
            }
            // One session for all widths, channels of different widths among them.
            for bits in [[2, 2, 2, 2], [3, 3, 3, 3], [8, 8, 8, 8], [4, 2, 16, 3]] {
                let levels: Vec<f32> = bits[..n].iter().map(|b| ((1 << (b - 1)) - 1) as f32).collect();
                let outputs = running.run(&feeds(&[("x", &values), ("levels", &vector(&levels))]));
                assert_eq!(outputs[&y.name], symmetric(&values, axis, &levels), "{shape:?} {bits:?}");
                assert_eq!(running.gradient(&outputs, "x"), r, "{shape:?} {bits:?}");
            }
        }
    }
}

/// Rounded weights lie close to themselves, and rounding them again changes nothing but a last place.
#[test]
fn rounding_is_within_half_a_step() {
    let shape = [5, 37];
    let (mut forward, x, levels) = graph(17, &shape, &[("levels", &[5])]);
    let y = fake::symmetric(forward.tape(), &x, 0, &levels[0]);
    let mut running = running(forward, &y, &ArrayD::zeros(IxDyn(&shape)), &["x"]);
    let levels = vector(&[1.0, 3.0, 7.0, 127.0, 32767.0]);
    let values = Numbers(9).array(&shape);
    let once = running.run(&feeds(&[("x", &values), ("levels", &levels)]))[&y.name].clone();
    let twice = running.run(&feeds(&[("x", &once), ("levels", &levels)]))[&y.name].clone();
    for (channel, levels) in levels.iter().enumerate() {
        let row = values.index_axis(Axis(0), channel);
        let largest = row.iter().fold(0f64, |most, x| most.max(f64::from(x.abs())));
        let step = largest / f64::from(*levels);
        for (i, x) in row.iter().enumerate() {
            let rounded = f64::from(once[[channel, i]]);
            assert!((rounded - f64::from(*x)).abs() <= 0.5 * step + 1e-6 * largest);
            assert!((f64::from(twice[[channel, i]]) - rounded).abs() <= 1e-6 * largest);
        }
    }
}

/// The largest magnitudes that there are, and the smallest.
#[test]
fn extreme_weights_stay_finite() {
    let (mut forward, x, levels) = graph(17, &[3, 2], &[("levels", &[3])]);
    let y = fake::symmetric(forward.tape(), &x, 0, &levels[0]);
    let mut running = running(forward, &y, &ArrayD::ones(IxDyn(&[3, 2])), &["x"]);
    let most = f32::MAX / 2.0;
    let values = [most, -most, f32::MIN_POSITIVE, -f32::MIN_POSITIVE, f32::from_bits(1), 0.0];
    let values = ArrayD::from_shape_vec(IxDyn(&[3, 2]), values.to_vec()).unwrap();
    let outputs = running.run(&feeds(&[("x", &values), ("levels", &vector(&[3.0, 3.0, 127.0]))]));
    for (rounded, value) in outputs[&y.name].iter().zip(&values) {
        let (rounded, value) = (f64::from(*rounded), f64::from(*value));
        assert!((rounded - value).abs() <= 1e-6 * value.abs(), "{rounded:e} for {value:e}");
    }
}

/// Where x/s lies within the bounds, clipped values and their slopes are LSQ's; where it does not, differences tell the same.
#[test]
fn learned_steps_follow_their_paper() {
    let shape = [3, 5];
    for (s, lowest, highest) in
        [(0.3f32, -4.0f32, 3.0f32), (0.05, -8.0, 7.0), (0.2, 0.0, 15.0), (2.0, -1.0, 1.0)]
    {
        let (mut forward, x, others) = graph(17, &shape, &[("step", &[]), ("lowest", &[]), ("highest", &[])]);
        let y = fake::learned(forward.tape(), &x, &others[0], &others[1], &others[2]);
        let r = Numbers(3).array(&shape);
        let mut running = running(forward, &y, &r, &["x", "step"]);
        let scalar = |v: f32| ArrayD::from_elem(IxDyn(&[]), v);
        let values = Numbers(8).array(&shape) * 2.0;
        let at = |s: f32| {
            feeds(&[
                ("x", &values),
                ("step", &scalar(s)),
                ("lowest", &scalar(lowest)),
                ("highest", &scalar(highest)),
            ])
        };
        let outputs = running.run(&at(s));
        let (rounded, of_x, of_step) =
            (&outputs[&y.name], running.gradient(&outputs, "x"), running.gradient(&outputs, "step"));
        let (mut expected, mut clipped_only) = (0.0, 0.0);
        for (i, x) in values.iter().enumerate() {
            let (scaled, r) = (f64::from(*x) / f64::from(s), f64::from(r.as_slice().unwrap()[i]));
            let clipped = scaled.clamp(f64::from(lowest), f64::from(highest));
            let value = clipped.round_ties_even() * f64::from(s);
            assert!((f64::from(rounded.as_slice().unwrap()[i]) - value).abs() < 1e-5);
            let inside = (scaled - clipped).abs() < 1e-12;
            let slope = if inside { r } else { 0.0 };
            assert!((f64::from(of_x.as_slice().unwrap()[i]) - slope).abs() < 1e-6);
            expected += r * if inside { scaled.round_ties_even() - scaled } else { clipped };
            clipped_only += if inside { 0.0 } else { r * clipped };
        }
        let actual = f64::from(of_step[IxDyn(&[])]);
        assert!((actual - expected).abs() < 1e-4, "{actual} for {expected}");
        // Values that are clipped are differentiable: what is left of a difference after those that are not.
        let mut clipped_sum = |s: f32| -> f64 {
            let outputs = running.run(&at(s));
            let terms = values.iter().zip(&outputs[&y.name]).zip(&r);
            let is_clipped = |x: f32| !(lowest..=highest).contains(&(x / s));
            terms.filter(|((x, _), _)| is_clipped(**x)).map(|((_, y), r)| f64::from(*y) * f64::from(*r)).sum()
        };
        let difference = (clipped_sum(s * 1.001) - clipped_sum(s * 0.999)) / (f64::from(s) * 0.002);
        assert!((difference - clipped_only).abs() < 1e-2, "{difference} for {clipped_only}");
    }
}

#[test]
fn steps_begin_and_scale_as_in_the_paper() {
    assert!((fake::first_step(0.5, 7.0) - 2.0 * 0.5 / 7f32.sqrt()).abs() < 1e-7);
    assert!((fake::gradient_scale(48, 3.0) - 1.0 / 12.0).abs() < 1e-7);
}
