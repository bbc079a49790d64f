use serde_json::Value;

use super::*;

/// Trajectories of PyTorch's optimizers (see testdata/make_golden.py).
fn golden() -> Value {
    serde_json::from_str(include_str!("../testdata/optimizers.json")).unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn algorithm(case: &Value) -> Algorithm {
    let number = |name: &str| case["options"][name].as_f64().unwrap();
    if case["optimizer"] == "sgd" {
        let nesterov = case["options"]["nesterov"].as_bool().unwrap();
        let (momentum, weight_decay) = (number("momentum") as f32, number("weight_decay") as f32);
        Algorithm::Sgd(Sgd { momentum, nesterov, weight_decay })
    } else {
        let betas = &case["options"]["betas"];
        let beta = |i: usize| betas[i].as_f64().unwrap();
        Algorithm::AdamW(AdamW {
            beta1: beta(0),
            beta2: beta(1),
            epsilon: number("eps"),
            weight_decay: number("weight_decay"),
        })
    }
}

/// A step without clipping.
fn step(
    optimizer: &mut Optimizer,
    tensors: &mut Tensors,
    gradients: &Tensors,
    rate: f32,
) -> Result<(), TrainError> {
    let gradients: Vec<(&str, &[f32])> = gradients.iter().map(|(n, g)| (n.as_str(), g.as_slice())).collect();
    optimizer.step(tensors, &gradients, rate, f32::INFINITY).map(drop)
}

fn one(name: &str, values: Vec<f32>) -> Tensors {
    Tensors::from([(name.to_owned(), values)])
}

#[test]
fn steps_are_those_of_pytorch() {
    for case in golden().as_array().unwrap() {
        let mut optimizer = Optimizer::new(algorithm(case));
        let mut tensors = one("w", floats(&case["start"]));
        for (i, golden) in case["steps"].as_array().unwrap().iter().enumerate() {
            let rate = golden["rate"].as_f64().unwrap() as f32;
            step(&mut optimizer, &mut tensors, &one("w", floats(&golden["gradient"])), rate).unwrap();
            for (actual, expected) in tensors["w"].iter().zip(floats(&golden["after"])) {
                let error = (actual - expected).abs();
                assert!(
                    error <= 4.0 * f32::EPSILON * expected.abs().max(1.0),
                    "{} {} step {i}: {actual} for {expected}",
                    case["optimizer"],
                    case["options"]
                );
            }
        }
    }
}

fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 500.0 - 1.0).collect()
}

fn algorithms() -> Vec<Algorithm> {
    let sgd = |momentum, nesterov| Algorithm::Sgd(Sgd { momentum, nesterov, weight_decay: 0.01 });
    vec![sgd(0.0, false), sgd(0.9, false), sgd(0.9, true), Algorithm::AdamW(AdamW::default())]
}

fn run(optimizer: &mut Optimizer, tensors: &mut Tensors, steps: std::ops::Range<usize>) {
    for seed in steps {
        let gradients =
            tensors.iter().map(|(name, w)| (name.clone(), numbers(w.len(), seed + name.len()))).collect();
        step(optimizer, tensors, &gradients, 0.01).unwrap();
    }
}

fn start() -> Tensors {
    [("a", 0), ("bb", 1), ("ccc", 3), ("dddd", CHUNK - 1), ("e", CHUNK), ("ff", 2 * CHUNK + 1)]
        .into_iter()
        .map(|(name, n)| (name.to_owned(), numbers(n, 5)))
        .collect()
}

#[test]
fn a_resumed_run_gives_the_same_bits_on_any_number_of_threads() {
    for algorithm in algorithms() {
        let mut whole = start();
        run(&mut Optimizer::new(algorithm), &mut whole, 0..6);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let resumed = pool.install(|| {
                let mut tensors = start();
                let mut optimizer = Optimizer::new(algorithm);
                run(&mut optimizer, &mut tensors, 0..4);
                let stored = serde_json::to_string(optimizer.state()).unwrap();
                let state: State = serde_json::from_str(&stored).unwrap();
                run(&mut Optimizer::resume(algorithm, state), &mut tensors, 4..6);
                tensors
            });
            assert!(resumed == whole, "{algorithm:?}");
        }
    }
}

#[test]
fn a_tensor_without_a_gradient_stays() {
    for algorithm in algorithms() {
        let mut tensors = start();
        let gradients = one("ccc", vec![1.0, 1.0, 1.0]);
        step(&mut Optimizer::new(algorithm), &mut tensors, &gradients, 0.1).unwrap();
        assert!(tensors["ccc"] != start()["ccc"]);
        tensors.remove("ccc");
        assert!(tensors.iter().all(|(name, w)| *w == start()[name]));
    }
}

#[test]
fn what_does_not_fit_is_named_and_changes_nothing() {
    let adam = Algorithm::AdamW(AdamW::default());
    let refuse = |optimizer: &mut Optimizer, gradients: Tensors| {
        let (mut tensors, before) = (start(), optimizer.clone());
        let error = step(optimizer, &mut tensors, &gradients, 0.1).unwrap_err().to_string();
        assert!(tensors == start() && *optimizer == before);
        error
    };
    let mut optimizer = Optimizer::new(adam);
    let unknown = refuse(&mut optimizer, one("x", vec![]));
    assert_eq!(unknown, "there is a gradient of `x`, but no such tensor is trained");
    let short = refuse(&mut optimizer, one("ccc", vec![1.0]));
    assert_eq!(short, "tensor `ccc` has 3 values, its gradient 1");
    let mut gradients = one("ccc", vec![1.0, f32::NAN, 0.0]);
    gradients.insert("bb".to_owned(), vec![1.0]);
    assert_eq!(refuse(&mut optimizer, gradients), "the gradient of `ccc` holds NaN at element 1");
    let state = State { step: 3, moments: BTreeMap::from([("ccc".to_owned(), vec![vec![0.0; 3]])]) };
    let foreign = refuse(&mut Optimizer::resume(adam, state), one("ccc", vec![1.0; 3]));
    assert_eq!(foreign, "tensor `ccc` has 6 values, its optimizer state 3");
}

#[test]
fn a_gradient_over_the_norm_counts_as_one_of_that_norm() {
    let sgd = Algorithm::Sgd(Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.0 });
    for (largest, factor) in [(f32::INFINITY, 1.0), (10.0, 1.0), (1.0, 0.2)] {
        let mut tensors = Tensors::from([("a".to_owned(), vec![1.0, 1.0]), ("b".to_owned(), vec![1.0])]);
        let gradients: [(&str, &[f32]); 2] = [("a", &[3.0, 0.0]), ("b", &[-4.0])];
        let norm = Optimizer::new(sgd).step(&mut tensors, &gradients, 1.0, largest).unwrap();
        assert!((norm - 5.0).abs() < 1e-6);
        let expected = [1.0 - 3.0 * factor, 1.0, 1.0 + 4.0 * factor];
        let after = tensors.values().flatten();
        assert!(after.zip(expected).all(|(w, e)| (w - e).abs() < 1e-5), "{tensors:?}");
    }
}
