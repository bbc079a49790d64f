//! Masks against the authors' own, against naive references, and at the edges.

use super::*;
use crate::testing::{Input, Suite, Workbench, sha256};
use blake3::Hash;
use merganser_tensors::formats::masks;
use proptest::prelude::*;
use serde_json::{Value as Json, json};

/// A base and task vectors of one tensor `w`.
struct Models {
    bench: Workbench,
    base: Hash,
    deltas: Vec<(&'static str, Hash)>,
}

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

impl Models {
    fn new(base: &[f32], tuned: &[Vec<f32>]) -> Self {
        let bench = Workbench::new();
        let shape = [base.len()];
        let artifact = bench.checkpoint("base", &[("w", &shape, base)]);
        let deltas = NAMES.iter().zip(tuned).map(|(name, values)| {
            (*name, bench.diff(artifact, bench.checkpoint(name, &[("w", &shape, values)])))
        });
        let deltas = deltas.collect();
        Self { bench, base: artifact, deltas }
    }

    fn masks(&self, parameters: &Json) -> Vec<(String, Vec<f32>)> {
        let inputs = [Input::Members("deltas", &self.deltas), Input::One("base", self.base)];
        let found = self.bench.run("mask", parameters, &inputs).unwrap();
        found.into_iter().map(|(name, mask)| (name, self.bench.values(mask, "w"))).collect()
    }
}

/// From the definition, in f64; none where the two sides are too close to tell.
fn reference(base: &[f32], tuned: &[Vec<f32>], task: usize, lambda: f64) -> Vec<Option<f32>> {
    (0..base.len())
        .map(|i| {
            let base = f64::from(base[i]);
            let merged = base + tuned.iter().map(|tuned| f64::from(tuned[i]) - base).sum::<f64>();
            let (left, right) = (
                (base - f64::from(tuned[task][i])).abs(),
                lambda * (merged - f64::from(tuned[task][i])).abs(),
            );
            let is_close = (left - right).abs() <= 1e-5 * (left + right) && left + right > 0.0;
            (!is_close).then_some(f32::from(u8::from(left > right)))
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn tall_masks_follow_the_definition(
        rows in prop::collection::vec(prop::collection::vec(prop_oneof![Just(0.0f32), Just(0.25), -1f32..1.0], 3), 1..300),
        lambda in 0.0..1.5,
    ) {
        let column = |j: usize| rows.iter().map(|row| row[j]).collect::<Vec<f32>>();
        let (base, tuned) = (column(0), vec![column(1), column(2)]);
        let models = Models::new(&base, &tuned);
        let found = models.masks(&json!({ "method": "tall", "lambda": lambda }));
        for (task, (_, mask)) in found.iter().enumerate() {
            for (actual, expected) in mask.iter().zip(reference(&base, &tuned, task, lambda)) {
                prop_assert!(expected.is_none_or(|expected| *actual == expected));
            }
        }
        // Combinations are what they say of the masks of the tasks.
        let count = |i: usize| found.iter().filter(|(_, mask)| mask[i] == 1.0).count();
        for (combine, needed) in [("union", 1), ("intersection", 2), ("majority", 1)] {
            let one = models.masks(&json!({ "method": "tall", "lambda": lambda, "combine": combine }));
            prop_assert_eq!(one.len(), 1);
            prop_assert!((0..base.len()).all(|i| (one[0].1[i] == 1.0) == (count(i) >= needed)));
        }
        for k in 0..4 {
            let one = models.masks(&json!({ "method": "consensus", "lambda": lambda, "k": k }));
            prop_assert!((0..base.len()).all(|i| (one[0].1[i] == 1.0) == (count(i) >= k)));
        }
    }
}

#[test]
fn an_entry_that_did_not_change_is_in_no_mask() {
    let models = Models::new(&[1.0, 2.0], &[vec![1.0, 2.0], vec![1.0, 3.0]]);
    let found = models.masks(&json!({ "method": "tall", "lambda": 0.0 }));
    assert_eq!(found, [("a".to_owned(), vec![0.0, 0.0]), ("b".to_owned(), vec![0.0, 1.0])]);
}

#[test]
fn lambda_may_differ_by_task_and_must_name_every_task() {
    let models = Models::new(&[0.0; 3], &[vec![1.0, 1.0, 3.0], vec![1.0, 4.0, -3.0]]);
    let with = |lambda: f64| models.masks(&json!({ "method": "tall", "lambda": lambda }));
    let mixed = models.masks(&json!({ "method": "tall", "lambda": { "a": 0.2, "b": 0.9 } }));
    assert_eq!(mixed, [with(0.2)[0].clone(), with(0.9)[1].clone()]);
    let inputs = [Input::Members("deltas", &models.deltas), Input::One("base", models.base)];
    let refused = |lambda: Json| {
        let parameters = json!({ "method": "tall", "lambda": lambda });
        models.bench.run("mask", &parameters, &inputs).unwrap_err().to_string()
    };
    assert_eq!(refused(json!({ "a": 0.2 })), "`lambda` does not say what task `b` takes");
    assert_eq!(refused(json!({ "a": 0.2, "b": 0.3, "z": 1 })), "`lambda` names `z`, which is no task");
    assert_eq!(refused(json!(-1)), "`lambda` must be a finite number, 0 or more, got -1");
    assert!(refused(json!("best")).contains("unknown value") || refused(json!("best")).contains("`best`"));
}

#[test]
fn another_merge_can_be_localized() {
    let models = Models::new(&[0.0; 4], &[vec![1.0, 2.0, -1.0, 0.5], vec![-1.0, 2.0, 3.0, 0.0]]);
    let sum = models.bench.one(
        "merge",
        &json!({ "method": "task-arithmetic", "scale": 0.5 }),
        &[Input::One("base", models.base), Input::Members("vectors", &models.deltas)],
    );
    let inputs = [
        Input::Members("deltas", &models.deltas),
        Input::One("base", models.base),
        Input::One("merged", sum),
    ];
    let merged = models.bench.run("mask", &json!({ "method": "tall", "lambda": 0.7 }), &inputs).unwrap();
    let scaled = models.masks(&json!({ "method": "tall", "lambda": 0.7, "scale": 0.5 }));
    for ((_, merged), (_, scaled)) in merged.iter().zip(&scaled) {
        assert_eq!(models.bench.values(*merged, "w"), *scaled);
    }
}

#[test]
fn masks_take_a_bit_per_entry_and_are_the_same_for_any_number_of_threads() {
    let n = 70_001;
    let values = |seed: usize| (0..n).map(|i| ((i * 7919 + seed) % 1009) as f32 / 500.0 - 1.0).collect();
    let tuned: Vec<Vec<f32>> = (1..4).map(values).collect();
    let models = Models::new(&values(0), &tuned);
    let inputs = [Input::Members("deltas", &models.deltas), Input::One("base", models.base)];
    for (parameters, inputs) in [
        (json!({ "method": "tall" }), &inputs[..]),
        (json!({ "method": "consensus" }), &inputs[..]),
        (json!({ "method": "magnitude", "keep": 0.1, "combine": "majority" }), &inputs[..1]),
        (json!({ "method": "random", "keep": 0.3, "seed": 5 }), &inputs[..1]),
    ] {
        let mut seen = Vec::new();
        for threads in [1, 2, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            // Other stages with the same content: published anew each time.
            seen.push(pool.install(|| models.bench.run("mask", &parameters, inputs)).unwrap());
        }
        assert!(seen.iter().all(|found| *found == seen[0]), "{parameters}");
        let manifest: Json = serde_json::from_str(&models.bench.manifest(seen[0][0].1)).unwrap();
        let stored = manifest["layout"]["packed"]["tensors"][0]["length"].as_u64().unwrap();
        assert_eq!(stored, (n as u64).div_ceil(8));
    }
}

#[test]
fn a_single_task_scalars_and_empty_tensors_have_masks() {
    let bench = Workbench::new();
    let base =
        bench.checkpoint("base", &[("empty", &[0], &[]), ("one", &[], &[1.0]), ("two", &[2], &[1.0, 1.0])]);
    let tuned =
        bench.checkpoint("tuned", &[("empty", &[0], &[]), ("one", &[], &[2.0]), ("two", &[2], &[1.0, 3.0])]);
    let delta = bench.diff(base, tuned);
    let inputs = [Input::One("deltas", delta), Input::One("base", base)];
    for parameters in [
        json!({ "method": "tall", "lambda": { "only": 0.4 } }),
        json!({ "method": "tall", "combine": "intersection" }),
        json!({ "method": "consensus", "k": 1 }),
    ] {
        let mask = bench.one("mask", &parameters, &inputs);
        // θ_mt = θ_t: every entry that changed is kept.
        assert_eq!(bench.values(mask, "empty"), [0.0; 0]);
        assert_eq!(bench.values(mask, "one"), [1.0]);
        assert_eq!(bench.values(mask, "two"), [0.0, 1.0]);
    }
}

#[test]
fn values_that_are_not_finite_are_refused_by_tensor_and_task() {
    let models = Models::new(&[0.0, 0.0], &[vec![1.0, 2.0], vec![1.0, f32::INFINITY]]);
    let inputs = [Input::Members("deltas", &models.deltas), Input::One("base", models.base)];
    for parameters in [
        json!({ "method": "tall" }),
        json!({ "method": "consensus", "k": 1 }),
        json!({ "method": "magnitude", "keep": 0.5 }),
    ] {
        let inputs = if parameters["method"] == "magnitude" { &inputs[..1] } else { &inputs[..] };
        let refused = models.bench.run("mask", &parameters, inputs).unwrap_err();
        assert_eq!(refused.to_string(), "tensor `w` of task vector `b` is not finite: element 1 is inf");
    }
}

#[test]
fn ports_that_do_not_belong_are_refused_and_missing_ones_named() {
    let models = Models::new(&[0.0], &[vec![1.0]]);
    let refused = |parameters: Json, inputs: &[Input<'_>]| {
        models.bench.run("mask", &parameters, inputs).unwrap_err().to_string()
    };
    let deltas = || Input::Members("deltas", &models.deltas);
    let base = || Input::One("base", models.base);
    assert_eq!(refused(json!({ "method": "tall" }), &[deltas()]), "method `tall` needs port `base`");
    let message = refused(json!({ "method": "random", "keep": 0.5 }), &[deltas(), base()]);
    assert_eq!(message, "method `random` does not read port `base`");
    let message = refused(json!({ "method": "consensus" }), &[deltas()]);
    assert_eq!(message, "method `consensus` needs port `masks`, or `base` to make TALL masks");
    let message = refused(json!({ "method": "tall", "candidates": [0.1] }), &[deltas(), base()]);
    assert_eq!(message, "`candidates` is for a search");
    let message = refused(json!({ "method": "tall", "threshold": 0.1 }), &[deltas(), base()]);
    assert_eq!(message, "`threshold` goes with `combine = \"majority\"`");
    let message = refused(json!({ "method": "tall", "lambda": "search" }), &[deltas(), base()]);
    assert_eq!(message, "missing key `dataset`");
}

#[test]
fn masks_of_another_stage_are_counted() {
    let models = Models::new(&[0.0; 3], &[vec![1.0, 1.0, 3.0], vec![1.0, 4.0, -3.0], vec![2.0, 0.0, 0.0]]);
    let inputs = [Input::Members("deltas", &models.deltas), Input::One("base", models.base)];
    let made = models.bench.run("mask", &json!({ "method": "tall" }), &inputs).unwrap();
    let members: Vec<(&str, Hash)> = made.iter().map(|(name, mask)| (name.as_str(), *mask)).collect();
    let inputs = [Input::Members("deltas", &models.deltas), Input::Members("masks", &members)];
    for k in 0..=4 {
        let counted = models.bench.one("mask", &json!({ "method": "consensus", "k": k }), &inputs);
        let made = models.masks(&json!({ "method": "consensus", "lambda": 0.4, "k": k }));
        assert_eq!(models.bench.values(counted, "w"), made[0].1);
    }
    assert!(models.bench.warnings().iter().any(|text| text.contains("it needs 4 masks, and there are 3")));
}

#[test]
fn packed_bits_are_read_from_every_container() {
    let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tensors/tests/data/torch");
    let bench = Workbench::new();
    let base = bench.checkpoint("base", &[("v", &[7], &[0.0; 7]), ("w", &[13], &[0.0; 13])]);
    let delta = bench.diff(base, base);
    let deltas = [("task0Val", delta), ("TASK_1-val", delta)];
    let expected = masks::read(&fixtures.join("masks.npy")).unwrap();
    for file in ["masks.npy", "masks_array.pt", "masks_tensor.pt"] {
        let parameters = json!({ "method": "file", "path": fixtures.join(file).to_str().unwrap() });
        let found = bench.run("mask", &parameters, &[Input::Members("deltas", &deltas)]).unwrap();
        for ((_, mask), name) in found.iter().zip(["task0Val", "task1Val"]) {
            let bits: Vec<f32> = ["v", "w"].iter().flat_map(|name| bench.values(*mask, name)).collect();
            let stored = &expected[name];
            assert!((0..20).all(|i| bits[i] == f32::from(stored[i / 8] >> (7 - i % 8) & 1)), "{file}");
        }
        // The place of a bit does not depend on what is left out.
        let only = json!({ "method": "file", "path": fixtures.join(file).to_str().unwrap(), "only": ["w"] });
        let part = bench.run("mask", &only, &[Input::Members("deltas", &deltas)]).unwrap();
        assert_eq!(bench.values(part[0].1, "w"), bench.values(found[0].1, "w"));
        assert!(bench.tensors(part[0].1).index_of("v").is_none());
    }
    let parameters = json!({ "method": "file", "path": fixtures.join("masks.npy").to_str().unwrap() });
    let refused = |deltas: &[(&str, Hash)]| {
        bench.run("mask", &parameters, &[Input::Members("deltas", deltas)]).unwrap_err()
    };
    let error = refused(&[("mnist", delta)]);
    assert!(error.to_string().contains("holds no mask of task `mnist`"), "{error}");
    assert_eq!(error.help().unwrap(), "there is `task0Val`, `task1Val`, `task2Val`");
    let base = bench.checkpoint("larger", &[("w", &[26], &[0.0; 26])]);
    let error = refused(&[("task0Val", bench.diff(base, base))]).to_string();
    assert!(error.contains("has 3 bytes; the 26 entries of the task vectors take 4"), "{error}");
}

#[test]
fn masks_by_tensor_are_read_from_a_folder_or_a_file() {
    let bench = Workbench::new();
    let base = bench.checkpoint("base", &[("v", &[2], &[0.0; 2]), ("w", &[1, 3], &[0.0; 3])]);
    let delta = bench.diff(base, base);
    let folder = bench.folder().join("masks");
    fs_err::create_dir_all(folder.join("c")).unwrap();
    bench.checkpoint("masks/a_mask", &[("v", &[2], &[1.0, 0.0]), ("w", &[3], &[0.0, 1.0, 1.0])]);
    bench.checkpoint("masks/b", &[("w", &[1, 3], &[1.0, 0.0, 0.0])]);
    bench.checkpoint("masks/c/mask", &[("v", &[2], &[0.5, 0.0]), ("w", &[1, 3], &[0.0; 3])]);
    let deltas = [("a", delta), ("b", delta), ("c", delta)];
    let run = |path: &std::path::Path, combine: &str, deltas: &[(&str, Hash)]| {
        let parameters = json!({ "method": "file", "path": path.to_str().unwrap(), "combine": combine });
        bench.run("mask", &parameters, &[Input::Members("deltas", deltas)])
    };
    let found = run(&folder, "per-task", &deltas[..2]).unwrap();
    let bits = |mask: Hash| [bench.values(mask, "v"), bench.values(mask, "w")].concat();
    assert_eq!(bits(found[0].1), [1.0, 0.0, 0.0, 1.0, 1.0]);
    // A tensor that the file lacks is kept whole.
    assert_eq!(bits(found[1].1), [1.0, 1.0, 1.0, 0.0, 0.0]);
    assert!(bench.warnings().iter().any(|text| text.contains("the mask of task `b` has none of tensor `v`")));
    assert_eq!(bits(run(&folder, "intersection", &deltas[..2]).unwrap()[0].1), [1.0, 0.0, 0.0, 0.0, 0.0]);
    let one = run(&folder.join("b.safetensors"), "per-task", &deltas[..2]).unwrap();
    assert_eq!((bits(one[0].1), one[0].1), (bits(found[1].1), one[1].1));
    let error = run(&folder, "per-task", &deltas).unwrap_err().to_string();
    assert!(error.contains("of tensor `v`") && error.contains("element 0 is 0.5"), "{error}");
    let error = run(&folder, "per-task", &[("z", delta)]).unwrap_err().to_string();
    assert!(error.contains("holds no mask of task `z`"), "{error}");
    let other = bench.checkpoint("masks/other", &[("x", &[1], &[1.0])]);
    assert!(bench.tensors(other).index_of("x").is_some());
    let error = run(&folder.join("other.safetensors"), "per-task", &deltas).unwrap_err().to_string();
    assert!(error.contains("has no tensor of the task vectors"), "{error}");
}

#[test]
fn tall_and_consensus_masks_equal_the_authors_bit_by_bit() {
    let Some(suite) = Suite::open("tall_and_consensus_masks_equal_the_authors_bit_by_bit") else { return };
    let meta = suite.golden_json("tall_masks/meta.json");
    let inputs = [Input::Members("deltas", &suite.deltas), Input::One("base", suite.base)];
    let found = suite.bench.run("mask", &json!({ "method": "tall", "lambda": 0.4 }), &inputs).unwrap();
    for (task, mask) in &found {
        let golden = &meta["masks"][task];
        let bits = Suite::packed_bits(&*suite.bench.tensors(*mask));
        let count: u32 = bits.iter().map(|byte| byte.count_ones()).sum();
        assert_eq!(u64::from(count), golden["popcount"].as_u64().unwrap(), "{task}");
        assert_eq!(sha256(&bits), golden["packbits_sha256"].as_str().unwrap(), "{task}");
    }
    for k in 1..=3 {
        let mask = suite.bench.one("mask", &json!({ "method": "consensus", "k": k, "lambda": 0.4 }), &inputs);
        let golden = meta["consensus"][format!("k{k}")]["packbits_sha256"].as_str().unwrap();
        assert_eq!(sha256(&Suite::packed_bits(&*suite.bench.tensors(mask))), golden, "k = {k}");
    }
    // Coverage agrees with the authors' counts by parameter.
    let opened: Vec<_> = found.iter().map(|(_, mask)| suite.bench.tensors(*mask)).collect();
    let counted = coverage(&opened).unwrap();
    for ((task, _), coverage) in found.iter().zip(&counted) {
        let golden = &meta["masks"][task];
        assert_eq!(coverage.agreement.iter().sum::<u64>(), coverage.kept);
        assert!((coverage.share - golden["density"].as_f64().unwrap()).abs() < 1e-12);
        for row in &coverage.tensors {
            assert_eq!(Some(row.kept), golden["per_param"][&row.name].as_u64(), "{task} {}", row.name);
        }
    }
    // Σ over masks of the entries that exactly j masks have, divided by j, is their number; all but those of none are the union.
    let union: f64 =
        (1..=6).map(|j| counted.iter().map(|c| c.agreement[j - 1]).sum::<u64>() as f64 / j as f64).sum();
    assert!(
        (union / counted[0].entries as f64 - meta["consensus"]["k1"]["density"].as_f64().unwrap()).abs()
            < 1e-12
    );
}
