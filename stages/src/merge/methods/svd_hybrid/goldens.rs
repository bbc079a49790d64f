//! The chain against the values of the original implementation.
//!
//! The sign of each singular vector is free in the original and fixed here, so coefficients are compared after aligning signs, and merged
//! tensors within the steps of the quantization. The original rounds its directions to fp16 and computes in f32.

use crate::diagnostics::Diagnostics;
use crate::factors::Region;
use crate::testing::{Input, Suite};
use blake3::Hash;
use merganser_tensors::Bits;
use merganser_tensors::kernels::quantize::{CodeMap, quantize_affine};
use merganser_tensors::kernels::reduce::chunk_min_max;
use serde_json::{Value, json};
use std::collections::{BTreeSet, HashMap};

/// One run of the original.
struct Config<'a> {
    name: &'a str,
    settings: &'a Value,
    weights: &'a Value,
}

impl Config<'_> {
    fn setting(&self, name: &str) -> Option<&Value> {
        Some(&self.settings[format!("svd_{name}")]).filter(|value| !value.is_null())
    }

    fn number(&self, name: &str, usual: f64) -> f64 {
        self.setting(name).map_or(usual, |value| value.as_f64().unwrap())
    }

    fn bits(&self) -> u8 {
        self.number("low_bits", 4.0) as u8
    }

    fn stages(&self) -> u8 {
        self.number("rtvq_stages", 2.0) as u8
    }

    fn svd(&self) -> Value {
        json!({
            "energy": self.number("energy_threshold", 0.95),
            "max_rank": self.number("max_rank", 64.0) as u64,
            "center": self.setting("center").is_none_or(|value| value == true),
            "include_noise": self.setting("include_noise").is_some_and(|value| value == true),
        })
    }

    fn merge(&self, suite: &Suite, is_flat: bool) -> Value {
        let weights = match self.setting("weighting").and_then(Value::as_str) {
            Some("performance") => json!({
                "performance": suite.golden("svd_hybrid/accuracies.json").to_str().unwrap(),
                "temperature": self.number("weighting_temperature", 5.0),
            }),
            Some("cluster") if is_flat => json!({ "cluster": self.number("cluster_k", 2.0) as u64 }),
            // It reports flat weights, but merges inside clusters and then across them by the softmax of the mean weight inside each.
            Some("cluster") => json!({
                "cluster": self.number("cluster_k", 2.0) as u64,
                "across": "performance",
                "performance": self.weights,
                "temperature": 1.0,
            }),
            _ => json!("uniform"),
        };
        json!({ "method": "svd-hybrid", "weights": weights, "noise_shrink": self.number("noise_shrink", 0.5) })
    }

    /// The mask that the original uses; union where it has masks and says nothing else.
    fn masks(&self) -> Option<&str> {
        let is_masked = self.setting("mask_strategy").is_some() || self.setting("include_noise").is_some();
        is_masked.then(|| self.setting("mask_strategy").map_or("union", |value| value.as_str().unwrap()))
    }
}

/// Everything that a configuration leads to here.
struct Made {
    basis: Hash,
    coefficients: Vec<(String, Hash)>,
    packed: Vec<(String, Hash)>,
    merged: Hash,
    /// The same with weights as they are reported.
    flat: Hash,
}

fn make(suite: &Suite, config: &Config<'_>, masks: &HashMap<&str, Hash>) -> Made {
    let bench = &suite.bench;
    let mut inputs = vec![Input::Members("deltas", &suite.deltas)];
    inputs.extend(config.masks().map(|strategy| Input::One("masks", masks[strategy])));
    let basis = bench.one("svd", &config.svd(), &inputs);
    let inputs = [Input::Members("deltas", &suite.deltas), Input::One("basis", basis)];
    let coefficients = bench.run("compress", &json!({}), &inputs).unwrap();
    let named = |members: &[(String, Hash)]| -> Vec<(&'static str, Hash)> {
        Suite::TASKS.into_iter().zip(members).map(|(task, (_, artifact))| (task, *artifact)).collect()
    };
    let parameters = json!({ "bits": config.bits(), "residual_stages": config.stages() });
    let listed = named(&coefficients);
    let packed = bench.run("quantize", &parameters, &[Input::Members("tensors", &listed)]).unwrap();
    let listed = named(&packed);
    let inputs = [Input::One("base", suite.base), Input::Members("vectors", &listed)];
    let [merged, flat] =
        [false, true].map(|is_flat| bench.one("merge", &config.merge(suite, is_flat), &inputs));
    Made { basis, coefficients, packed, merged, flat }
}

#[test]
fn every_finite_configuration_agrees_with_the_original() {
    let Some(suite) = Suite::open("every_finite_configuration_agrees_with_the_original") else { return };
    let meta = suite.golden_json("svd_hybrid/meta.json");
    let masks: HashMap<&str, Hash> = ["union", "majority", "intersection"]
        .into_iter()
        .map(|strategy| {
            let inputs = [Input::Members("deltas", &suite.deltas), Input::One("base", suite.base)];
            let parameters = json!({ "method": "tall", "lambda": 0.4, "combine": strategy });
            (strategy, suite.bench.one("mask", &parameters, &inputs))
        })
        .collect();
    let golden = suite.bench.load(&suite.golden("svd_hybrid/coefficients.safetensors"));
    let mut problems = Vec::new();
    for (name, described) in meta["configs"].as_object().unwrap() {
        let config = Config { name, settings: &described["config"], weights: &described["weights"] };
        let made = make(&suite, &config, &masks);
        check_weights(&suite, &config, &made, &mut problems);
        check_factors(&suite, &config, &made, &mut problems);
        check_coefficients(&suite, golden, &config, &made, &mut problems);
        if described["params_with_nonfinite_low_coefficients"] == 0 {
            check_merged(&suite, &config, &made, &mut problems);
        }
        let all_finite = suite.bench.tensors(made.merged).tensors().iter().all(|info| {
            !info.dtype.is_float()
                || suite.bench.values(made.merged, &info.name).iter().all(|x| x.is_finite())
        });
        assert!(all_finite, "{name}: what the original made NaN of is finite here");
    }
    assert!(
        problems.is_empty(),
        "{} problems:\n{}",
        problems.len(),
        problems[..problems.len().min(30)].join("\n")
    );
}

fn check_weights(suite: &Suite, config: &Config<'_>, made: &Made, problems: &mut Vec<String>) {
    let found = Diagnostics::from_json(&suite.bench.blob(made.flat, "diagnostics.json")).unwrap();
    for weight in &found.weights {
        let expected = config.weights[&weight.task].as_f64().unwrap();
        if (weight.weight - expected).abs() > 1e-6 {
            problems.push(format!(
                "{}: weight of {} is {}, not {expected}",
                config.name, weight.task, weight.weight
            ));
        }
    }
}

/// Ranks, energies and singular values of every parameter.
fn check_factors(suite: &Suite, config: &Config<'_>, made: &Made, problems: &mut Vec<String>) {
    let stats = suite.golden_json(&format!("svd_hybrid/params_{}.stats.json", config.name));
    let basis = suite.bench.tensors(made.basis);
    let numbers = |name: &str| -> Option<Vec<f64>> {
        let index = basis.index_of(name)?;
        let mut values = vec![0f64; basis.tensors()[index].n_elements()];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        basis
            .read_bytes(index, 0..bytes.len() as u64, bytes, &mut merganser_tensors::Scratch::new())
            .unwrap();
        Some(values)
    };
    for (parameter, regions) in stats.as_object().unwrap() {
        for (label, region) in [("masked", Region::Signal), ("unmasked", Region::Noise)] {
            let expected = &regions[label];
            // regions of fewer than ten entries contribute nothing here, on either side of the mask
            if expected.is_null() || expected["D"].as_u64().unwrap() < 10 {
                continue;
            }
            let what = format!("{}: {parameter} {label}", config.name);
            let Some(rank) = numbers(&region.tensor(parameter, "rank")) else {
                problems.push(format!("{what} is missing"));
                continue;
            };
            let found = [rank[0] as u64, rank[1] as u64];
            if found != [expected["k"].as_u64().unwrap(), expected["D"].as_u64().unwrap()] {
                problems.push(format!(
                    "{what}: k and D are {found:?}, not {} and {}",
                    expected["k"], expected["D"]
                ));
                continue;
            }
            let sigma = numbers(&region.tensor(parameter, "sigma")).unwrap();
            let golden: Vec<f64> =
                expected["singular_values"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
            let off = sigma[1..].iter().zip(&golden).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            if golden.len() != sigma.len() - 1 || off > 2e-5 * golden[0] {
                problems.push(format!("{what}: singular values {:?}, not {golden:?}", &sigma[1..]));
            }
            let energy = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>();
            let retained = energy(&sigma[1..=rank[0] as usize]) / energy(&sigma[1..]);
            if (retained - expected["energy_retained"].as_f64().unwrap()).abs() > 1e-5 {
                problems.push(format!("{what}: energy {retained}, not {}", expected["energy_retained"]));
            }
        }
    }
}

/// The first step of the codes of a low part, and the last one that can follow from it.
fn steps(suite: &Suite, packed: Hash, name: &str, bits: u8, stages: u8) -> Option<f64> {
    let described: Value = serde_json::from_str(&suite.bench.manifest(packed)).unwrap();
    let index = described["tensors"].as_array().unwrap().iter().position(|tensor| tensor["name"] == name)?;
    let encoding = &described["layout"]["packed"]["tensors"][index]["encoding"];
    let scale = match encoding.get("affine") {
        Some(affine) => affine["scale"][0].as_f64()?,
        None => encoding["residual"]["stages"][0]["scale"].as_f64()?,
    };
    // what a stage leaves is at most one step to either side
    let levels = f64::from((1u16 << bits) - 1);
    Some(1.0 / scale * (2.0 / levels).powi(i32::from(stages) - 1))
}

/// High and low coefficients of the golden parameters, after aligning signs; codes of the first stage of the first task.
fn check_coefficients(
    suite: &Suite,
    golden: Hash,
    config: &Config<'_>,
    made: &Made,
    problems: &mut Vec<String>,
) {
    let listed = suite.bench.tensors(golden);
    let stats = suite.golden_json(&format!("svd_hybrid/params_{}.stats.json", config.name));
    let mut groups: BTreeSet<(String, String)> = BTreeSet::new();
    for info in listed.tensors() {
        let parts: Vec<&str> = info.name.split('|').collect();
        if parts[0] == config.name {
            groups.insert((parts[1].to_owned(), parts[2].to_owned()));
        }
    }
    assert!(!groups.is_empty(), "{} has golden coefficients", config.name);
    for (parameter, label) in groups {
        let region = if label == "masked" { Region::Signal } else { Region::Noise };
        if stats[&parameter][&label]["D"].as_u64().unwrap() < 10 {
            continue;
        }
        let what = format!("{}: {parameter} {label}", config.name);
        let theirs = |task: &str| -> Vec<f64> {
            ["c_high", "c_low_dequant"]
                .iter()
                .flat_map(|part| {
                    suite.bench.values(golden, &format!("{}|{parameter}|{label}|{task}|{part}", config.name))
                })
                .map(f64::from)
                .collect()
        };
        let ours = |artifact: Hash| -> Vec<f64> {
            ["high", "low"]
                .iter()
                .flat_map(|part| suite.bench.values(artifact, &region.tensor(&parameter, part)))
                .map(f64::from)
                .collect()
        };
        let all: Vec<(Vec<f64>, Vec<f64>)> =
            made.coefficients.iter().map(|(task, artifact)| (ours(*artifact), theirs(task))).collect();
        if all.iter().any(|(_, theirs)| theirs.iter().any(|c| !c.is_finite())) {
            continue;
        }
        let rank = stats[&parameter][&label]["k"].as_u64().unwrap() as usize;
        let signs: Vec<f64> = (0..all[0].0.len())
            .map(|i| all.iter().map(|(ours, theirs)| ours[i] * theirs[i]).sum::<f64>())
            .map(|along| if along < 0.0 { -1.0 } else { 1.0 })
            .collect();
        for ((task, _), ((ours, theirs), (_, packed))) in
            made.coefficients.iter().zip(all.iter().zip(&made.packed))
        {
            let norm = ours.iter().map(|c| c * c).sum::<f64>().sqrt();
            let low = region.tensor(&parameter, "low");
            let step = steps(suite, *packed, &low, config.bits(), config.stages()).unwrap_or(0.0);
            for i in 0..ours.len() {
                let allowed = 3e-3 * norm + if i < rank { 0.0 } else { 2.0 * step };
                if (ours[i] * signs[i] - theirs[i]).abs() > allowed {
                    problems.push(format!(
                        "{what}: c_{i} of {task} is {}, not {}",
                        ours[i] * signs[i],
                        theirs[i]
                    ));
                }
            }
        }
        let (first, _) = &all[0];
        let low: Vec<f32> = (rank..first.len()).map(|i| (first[i] * signs[i]) as f32).collect();
        let range = chunk_min_max(&low);
        let expected: Vec<i64> = stats[&parameter][&label]["quant_first_task"][0]["codes"]
            .as_array()
            .map(|codes| codes.iter().map(|code| code.as_i64().unwrap()).collect())
            .unwrap_or_default();
        // where there is no range the original's codes mean nothing
        if low.len() < 2
            || range.max - range.min < 1e-4 * first.iter().fold(0.0f64, |a, b| a.max(b.abs())) as f32
        {
            continue;
        }
        let bits = Bits::new(config.bits()).unwrap();
        let mut codes = vec![0u8; low.len()];
        quantize_affine(&low, CodeMap::affine(range.min, range.max, bits).unwrap(), bits, &mut codes);
        if codes.iter().zip(&expected).any(|(ours, theirs)| (i64::from(*ours) - theirs).abs() > 1) {
            problems.push(format!("{what}: codes {codes:?}, not {expected:?}"));
        }
    }
}

/// Merged tensors within the steps of both quantizations and the rounding to fp16.
fn check_merged(suite: &Suite, config: &Config<'_>, made: &Made, problems: &mut Vec<String>) {
    let golden = suite.bench.load(&suite.golden(&format!("svd_hybrid/{}.safetensors", config.name)));
    for info in suite.bench.tensors(golden).tensors() {
        // of large tensors only the first rows are kept: `name[0:16]`
        let name = info.name.split('[').next().unwrap();
        let (expected, found) =
            (suite.bench.values(golden, &info.name), suite.bench.values(made.merged, name));
        let base = suite.bench.values(suite.base, name);
        let square =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        let (off, norm) = (square(&found, &expected).sqrt(), square(&expected, &base).sqrt());
        let mut allowed = 1.5e-3 * norm + 1e-7 * square(&base, &vec![0.0; expected.len()]).sqrt();
        for region in Region::ALL {
            for ((task, packed), (_, coefficients)) in made.packed.iter().zip(&made.coefficients) {
                let low = region.tensor(name, "low");
                let Some(step) = steps(suite, *packed, &low, config.bits(), config.stages()) else {
                    continue;
                };
                let low = suite.bench.values(*coefficients, &low);
                let high = suite.bench.values(*coefficients, &region.tensor(name, "high"));
                let own = high.iter().chain(&low).map(|c| f64::from(*c).powi(2)).sum::<f64>().sqrt();
                let weight = config.weights[task].as_f64().unwrap();
                allowed += weight * (2.0 * step * (low.len() as f64).sqrt() + 2e-3 * own);
            }
        }
        if off > allowed {
            problems.push(format!(
                "{}: `{name}` is {off:.3e} off, {allowed:.3e} allowed, of {norm:.3e}",
                config.name
            ));
        }
    }
}
