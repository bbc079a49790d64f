//! Element-wise methods against the values of the authors' own code and of mergekit.
//!
//! Tolerances are relative to the norm of the difference from the base: a few ulp of parameters that are some hundred times larger than
//! their change. Selected entries at a threshold may flip where the last bits differ.

use crate::testing::{Input, Suite, Tolerance};
use serde_json::{Value, json};

/// The same operations in f32 in the same order, and the same entries selected: bit for bit. Norms are sums of squares in another order.
const EXACT: Tolerance = Tolerance { relative_l2: 0.0, norm: 1e-12 };

/// What rounding leaves when a factor differs in its last bit and the base is added.
const ROUNDING: Tolerance = Tolerance { relative_l2: 3e-6, norm: 3e-6 };

/// A handful of entries whose sum cancels, or that are equal at a threshold, may go the other way.
const SELECTION: Tolerance = Tolerance { relative_l2: 1e-5, norm: 3e-5 };

#[test]
fn ties_equals_the_authors_values() {
    let Some(suite) = Suite::open("ties_equals_the_authors_values") else { return };
    for (density, agg, scale, config) in [
        (0.2, "mean", 1.0, "k20_dis-mean_lambda1"),
        (0.2, "sum", 0.3, "k20_dis-sum_lambda0.3"),
        (0.2, "max", 0.5, "k20_dis-max_lambda0.5"),
        (0.1, "mean", 1.0, "k10_dis-mean_lambda1"),
    ] {
        let parameters = json!({ "method": "ties", "density": density, "agg": agg, "scale": scale });
        suite.check(&parameters, "ties", config, EXACT);
    }
}

#[test]
fn breadcrumbs_equals_the_authors_values() {
    let Some(suite) = Suite::open("breadcrumbs_equals_the_authors_values") else { return };
    for (density, gamma, scale, config) in [
        (0.15, 0.006, 0.2, "keep0.15_remove0.006_alpha0.2"),
        (0.1, 0.01, 1.0, "keep0.1_remove0.01_alpha1.0"),
        (0.5, 0.05, 0.3, "keep0.5_remove0.05_alpha0.3"),
    ] {
        let parameters =
            json!({ "method": "breadcrumbs", "density": density, "gamma": gamma, "scale": scale });
        suite.check(&parameters, "breadcrumbs", config, EXACT);
    }
}

#[test]
fn lines_equals_the_authors_values() {
    let Some(suite) = Suite::open("lines_equals_the_authors_values") else { return };
    for beta in [0.3, 0.5] {
        let parameters = json!({ "method": "lines", "on": "task-arithmetic", "beta": beta });
        suite.check(&parameters, "lines", &format!("ta_beta{beta}"), EXACT);
        let parameters = json!({ "method": "lines", "on": "ties", "beta": beta });
        suite.check(&parameters, "lines", &format!("ties_sum_beta{beta}"), ROUNDING);
    }
    let merged = suite.merge(&json!({ "method": "lines", "on": "single-task", "beta": 0.6 }));
    let names: Vec<&str> = merged.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, Suite::TASKS);
    suite.compare(merged[0].1, "lines", "single_mnist_c0.4", EXACT);
}

#[test]
fn pcb_equals_the_authors_values() {
    let Some(suite) = Suite::open("pcb_equals_the_authors_values") else { return };
    let tolerance = Tolerance { relative_l2: 5e-7, norm: 5e-7 };
    let parameters = json!({ "method": "pcb", "ratio": 0.1 });
    suite.check(&parameters, "pcb", "root_ratio0.1_lambda1.2", tolerance);
    // λ_t = 1.2 for every task, as the script has it
    let weights: serde_json::Map<String, Value> =
        Suite::TASKS.iter().map(|task| ((*task).to_owned(), json!(1.2))).collect();
    let parameters =
        json!({ "method": "pcb", "version": "vision", "ratio": 0.05, "scale": 1.0, "weights": weights });
    suite.check(&parameters, "pcb", "vision_ratio0.05_lams1.2", tolerance);
    let parameters = json!({ "method": "pcb", "version": "vision", "ratio": 0.05 });
    suite.check(&parameters, "pcb", "vision_ratio0.05_lams1.2", tolerance);
}

/// The same weight for every task.
fn weights(each: f64) -> Value {
    Value::Object(Suite::TASKS.iter().map(|task| ((*task).to_owned(), json!(each))).collect())
}

#[test]
fn selection_per_tensor_equals_mergekit() {
    let Some(suite) = Suite::open("selection_per_tensor_equals_mergekit") else { return };
    let mean = json!({
        "method": "ties", "scope": "tensor", "density": 0.2, "mean_by": "weights", "tie": "positive",
    });
    suite.check(&mean, "mergekit", "ties_d0.2_w1_norm", EXACT);
    let sum = json!({
        "method": "ties", "scope": "tensor", "density": 0.2, "agg": "sum", "tie": "positive",
        "weights": weights(0.3),
    });
    suite.check(&sum, "mergekit", "ties_d0.2_w0.3_nonorm", EXACT);
    let band = json!({
        "method": "breadcrumbs", "scope": "tensor", "density": 0.9, "gamma": 0.01, "weights": weights(0.3),
    });
    suite.check(&band, "mergekit", "breadcrumbs_d0.9_g0.01_w0.3", EXACT);
    let band = json!({
        "method": "breadcrumbs", "scope": "tensor", "density": 0.3, "gamma": 0.01, "weights": weights(0.3),
        "aggregation": "ties-sum",
    });
    suite.check(&band, "mergekit", "breadcrumbs_ties_d0.3_g0.01_w0.3", SELECTION);
    let sce = json!({ "method": "sce", "select_topk": 0.5 });
    suite.check(&sce, "mergekit", "sce_topk0.5", ROUNDING);
}

/// mergekit computes angles in f32 and multiplies whole parameters; here they are computed in f64 and multiply differences.
#[test]
fn means_by_angles_equal_mergekit() {
    let Some(suite) = Suite::open("means_by_angles_equal_mergekit") else { return };
    let tolerance = Tolerance { relative_l2: 1e-4, norm: 1e-4 };
    suite.check(&json!({ "method": "karcher" }), "mergekit", "karcher", tolerance);
    suite.check(&json!({ "method": "model-stock" }), "mergekit", "model_stock", tolerance);
    let filter_wise = json!({ "method": "model-stock", "filter_wise": true });
    suite.check(&filter_wise, "mergekit", "model_stock_filterwise", tolerance);
    let two = [suite.deltas[0], suite.deltas[1]];
    for t in [0.3, 0.5] {
        let inputs = [Input::One("base", suite.base), Input::Members("vectors", &two)];
        let merged = suite.bench.run("merge", &json!({ "method": "slerp", "t": t }), &inputs).unwrap();
        suite.compare(merged[0].1, "mergekit", &format!("slerp_t{t}"), tolerance);
    }
}

/// mergekit draws from torch's generator, so that only what does not depend on the draw can be compared: how many entries all tasks
/// dropped, how long the merged task vector is, and how much of the sum of all task vectors it holds.
#[test]
fn random_dropping_has_the_statistics_of_mergekit() {
    let Some(suite) = Suite::open("random_dropping_has_the_statistics_of_mergekit") else { return };
    let name = "vision_model.encoder.layers.2.self_attn.q_proj.weight";
    let base = suite.bench.values(suite.base, name);
    let deltas: Vec<Vec<f32>> =
        suite.deltas.iter().map(|(_, delta)| suite.bench.values(*delta, name)).collect();
    let statistics = |merged: &[f32]| {
        let (mut zeros, mut squares, mut along, mut total) = (0, 0.0, 0.0, 0.0);
        for i in 0..base.len() {
            let sum: f64 = deltas.iter().map(|delta| f64::from(delta[i])).sum::<f64>() * 0.3;
            let own = f64::from(merged[i]) - f64::from(base[i]);
            zeros += usize::from(own == 0.0);
            squares += own * own;
            along += own * sum;
            total += sum * sum;
        }
        (zeros as f64 / base.len() as f64, squares.sqrt(), along / total)
    };
    // Six tasks, half of the entries each: one of 64 is dropped by all; the sum is held whole on average.
    let (zeros, norm, along) = (1.0 / 64.0, 1.0, 1.0);
    for (parameters, config) in [
        (
            json!({ "method": "dare", "drop": 0.5, "rescale": "l1", "weights": weights(0.3), "seed": 42 }),
            "dare_linear_d0.5_w0.3_seed42",
        ),
        (
            json!({
                "method": "della", "density": 0.5, "epsilon": 0.1, "rescale": "l1", "aggregation": "sum",
                "weights": weights(0.3), "seed": 42,
            }),
            "della_d0.5_w0.3_eps0.1_seed42",
        ),
    ] {
        let merged = suite.merge(&parameters);
        let own = statistics(&suite.bench.values(merged[0].1, name));
        let stats = &suite.golden_json("mergekit/stats.json")["configs"][config];
        let golden_norm = stats[name][4].as_f64().unwrap();
        // 16384 entries: five standard deviations of the share of zeros
        assert!((own.0 - zeros).abs() < 0.006, "{config}: {} dropped by all", own.0);
        assert!((own.1 / golden_norm - norm).abs() < 0.03, "{config}: {} against {golden_norm}", own.1);
        let expected = if config.starts_with("dare") { along } else { 1.03 };
        assert!((own.2 - expected).abs() < 0.06, "{config}: {} of the sum", own.2);
    }
}
