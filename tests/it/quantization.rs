//! Quantized experts as the storage of merges, and the comparison of ways to store them.

use crate::suite::{TASKS, compare, json, pipeline, shipped_stages};
use crate::tensors::{assert_same, combine, read};
use crate::util::{Lab, slow, test_data};
use std::collections::BTreeSet;
use std::fmt::Write;

/// Ways to store experts: stage names and parameters.
const STORAGE: [(&str, &str); 12] = [
    ("asymmetric", "bits = 4"),
    ("asymmetric16", "bits = 16"),
    ("channels", "bits = 3\ngranularity = \"channel\""),
    ("residual", "bits = 2\nresidual_stages = 3\ngranularity = { group = 100 }"),
    ("absmax", "scheme = \"absmax\"\nbits = 4\nselect = \"tvq\""),
    ("symmetric", "scheme = \"symmetric\"\nbits = 4\nclip = \"mse\""),
    ("int8_block", "scheme = \"int8-block\""),
    ("nf4", "scheme = \"nf4\"\nrules = [{ match = \"*layer_norm*\", keep = true }]"),
    ("nf4_double", "scheme = \"nf4\"\ndouble_quantization = true"),
    ("fp4", "scheme = \"fp4\"\nclip = { percentile = 99.5 }"),
    ("rtvq", "scheme = \"rtvq\"\nbits = 2"),
    ("rtvq_kept", "scheme = \"rtvq\"\nbits = 2\nbase_bits = 4\nselect = \"tvq\"\nerror_correction = false"),
];

/// A merge reads codes through: it equals plain arithmetic on what is exported as decoded values.
#[test]
fn every_scheme_can_store_experts_that_are_merged() {
    let lab = Lab::small();
    let mut stages = String::new();
    for (name, parameters) in STORAGE {
        write!(
            stages,
            "\n[stage.{name}]\nkind = \"quantize\"\nfrom = \"deltas\"\n{parameters}\n\
             \n[stage.{name}_values]\nkind = \"combine\"\nfrom = {{ vectors = \"{name}\" }}\nscale = {{ vectors = 1.0 }}\n\
             \n[stage.{name}_merged]\nkind = \"merge\"\nfrom = {{ base = \"base\", vectors = \"{name}\" }}\n\
             method = \"task-arithmetic\"\nscale = 0.4\n"
        )
        .unwrap();
    }
    lab.append("pipeline.toml", &stages);
    let wanted: Vec<String> =
        STORAGE.iter().flat_map(|(name, _)| [format!("{name}_values"), format!("{name}_merged")]).collect();
    let run: Vec<&str> = wanted.iter().flat_map(|stage| ["--stage", stage]).collect();
    lab.run(&run);
    let exported = |unit: &str| {
        lab.ok(["export", "pipeline.toml", unit, "out", "--overwrite"]);
        read(&lab.path(format!("out/{}.safetensors", unit.replace('[', "-").replace(']', ""))))
    };
    let base = read(&lab.path("data/base.safetensors"));
    for (name, _) in STORAGE {
        let parts = ["digits", "negative"].map(|task| exported(&format!("{name}_values[{task}]")));
        let expected = combine(&[&base, &parts[0], &parts[1]], |v| v[0] + 0.4 * (v[1] + v[2]));
        assert_same(&exported(&format!("{name}_merged")), &expected);
        if name.starts_with("rtvq") {
            // What a member stores means nothing without the shared base, so a member's file has what both make.
            assert_same(&exported(&format!("{name}[digits]")), &parts[0]);
        }
    }
}

/// What members share is computed once, stored once and counted once; what does not go into it leaves it alone.
#[test]
fn a_shared_base_is_stored_once_and_its_parts_are_cached() {
    let lab = Lab::small();
    lab.append(
        "pipeline.toml",
        "\n[stage.shared]\nkind = \"quantize\"\nfrom = \"deltas\"\nscheme = \"rtvq\"\nbits = \"${bits}\"\n\
         \n[stage.shared_merged]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"shared\" }\nmethod = \"average\"\n",
    );
    let of = |stage: &str| ["--stage", stage].map(str::to_owned);
    let run = |bits: &str| {
        let set = ["--set".to_owned(), format!("bits={bits}")];
        let args: Vec<String> = of("shared_merged").into_iter().chain(set).collect();
        lab.run(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let first = run("2");
    let parts = ["shared (mean)", "shared (shared)"];
    for part in parts {
        assert!(first.ran().contains(part), "{:?}", first.ran());
    }
    // other offsets, the same base
    let ran = run("3");
    let expected: BTreeSet<&str> = ["shared[digits]", "shared[negative]", "shared_merged"].into();
    assert_eq!(ran.ran(), expected);
    let artifacts = first.artifacts();
    assert_eq!(artifacts[parts[1]], ran.artifacts()[parts[1]]);
    // one member's bytes are offsets of 2 bits; the base has 3 bits
    let shown = lab.json(&["show", "pipeline.toml", "shared", "--set", "bits=2"]);
    let bytes: Vec<u64> = shown
        .as_array()
        .unwrap()
        .iter()
        .map(|unit| unit["output"]["stored_bytes"].as_u64().unwrap())
        .collect();
    let (mean, base, members) = (bytes[0], bytes[1], &bytes[2..]);
    assert!(mean > 9 * base && base > members[0] && members[0] == members[1], "{bytes:?}");
    // and an export has the members' values only
    let out = lab.ok(["export", "pipeline.toml", "shared", "out", "--set", "bits=2", "--json"]);
    assert_eq!(out.json().as_array().unwrap().len(), 2, "{out}");
}

/// The structure of `pipelines/tvq.toml` on the suite, against every cell that is published.
#[test]
fn the_comparison_of_storage_scores_as_published() {
    let Some(data) = test_data("the_comparison_of_storage_scores_as_published") else { return };
    let lab = Lab::empty();
    let stages = shipped_stages(&data, "tvq.toml", "# --- how experts are stored");
    let vars = "select = \"all\"\nstorage = \"deltas\"\nmethod = \"task_arithmetic\"\n";
    let text = pipeline(&data, &stages).replacen("bits = 4\n", vars, 1);
    lab.write("pipeline.toml", &text);
    let results = json(&data.join("suite/results.json"))["merge_public6"].clone();
    let goldens = json(&data.join("goldens/public/accuracy.json"))["results"].clone();

    let all = "deltas,fq8,fq4,tvq8,tvq4,tvq3,tvq2,rtvq";
    let run = lab.run(&["--set", "method=task_arithmetic", "--set", &format!("storage={all}")]);
    let vars = |method: &str, storage: &str| format!("method=\"{method}\",storage=\"{storage}\"");
    let cell = |storage: &str, task: &str| match storage {
        "deltas" => results["task_arithmetic"]["0.3"][task].clone(),
        "rtvq" => results["rtvq_base3_offset2"]["0.3"][task].clone(),
        _ => {
            let bits = storage.trim_start_matches(|c: char| !c.is_ascii_digit());
            let table = if storage.starts_with("fq") {
                "finetuned_checkpoint_quant_task_arithmetic"
            } else {
                "tvq_task_arithmetic"
            };
            results[table][format!("int{bits}")]["0.3"][task].clone()
        }
    };
    for storage in all.split(',') {
        compare(&run, "scores", &vars("task_arithmetic", storage), |task| cell(storage, task));
    }
    // fine-tuned models in 4 bits are no storage for merging, task vectors in 4 bits are
    let mut correct = run.correct();
    let total = |storage: &str| -> u64 {
        let rows = correct.iter().filter(|((_, own, _), _)| *own == vars("task_arithmetic", storage));
        rows.map(|(_, (correct, _))| correct).sum()
    };
    assert!(total("fq4") + 150 < total("tvq4"), "{} against {}", total("fq4"), total("tvq4"));

    // Measured bytes of a task: codes to the bit, and names, shapes and scales within what a header takes.
    for (storage, bits) in [("tvq8", 8), ("tvq4", 4), ("tvq3", 3), ("tvq2", 2)] {
        let set = ["--set", "method=task_arithmetic", "--set"].map(str::to_owned);
        let set: Vec<String> = set.into_iter().chain([format!("storage={storage}")]).collect();
        let show = ["show", "pipeline.toml", storage].map(str::to_owned);
        let args: Vec<String> = show.into_iter().chain(set).collect();
        let shown = lab.json(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let output = &shown[0]["output"];
        let (mut codes, mut asked) = (0, 0);
        for tensor in output["tensors"].as_array().unwrap() {
            let n: u64 = tensor["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).product();
            assert_eq!(tensor["bytes"], (n * bits).div_ceil(8), "{storage}: {tensor}");
            codes += (n * bits).div_ceil(8);
            asked += n * bits;
        }
        let stored = output["stored_bytes"].as_u64().unwrap();
        let beyond = stored as f64 / (asked as f64 / 8.0) - 1.0;
        println!(
            "{storage}: {codes} bytes of codes, {stored} stored, {:.2} % more than the bits asked for",
            100.0 * beyond
        );
        assert!(stored > codes && beyond <= 0.06, "{storage}: {stored} bytes for {asked} bits");
    }

    // The other methods: every way to store the experts, or those that are compared below.
    let others = ["ties", "lines", "consensus", "emr"];
    let every = slow("the other methods with every way to store experts");
    let wanted = if every { all } else { "deltas,fq4,tvq8,tvq4" };
    let run =
        lab.run(&["--set", &format!("storage={wanted}"), "--set", &format!("method={}", others.join(","))]);
    for (method, golden) in [
        ("ties", "ties/k20_dis-sum_lambda0.3"),
        ("lines", "lines/ta_beta0.3"),
        ("consensus", "tall_masks/consensus_ta_k2_alpha0.3"),
        ("emr", "emr/reconstructed"),
    ] {
        compare(&run, "scores", &vars(method, "deltas"), |task| {
            let own = if method == "emr" { format!("{golden}_{task}") } else { golden.to_owned() };
            goldens[own][task].clone()
        });
    }
    correct.extend(run.correct());
    // As the figure shows: 8 and 4 bits of task vectors are as good as floats, 4 bits of models are not.
    for method in ["task_arithmetic"].into_iter().chain(others) {
        let mean = |storage: &str| -> f64 {
            let own = vars(method, storage);
            let rows = correct.iter().filter(|((_, vars, _), _)| *vars == own);
            let accuracies: Vec<f64> =
                rows.map(|(_, (correct, n))| 100.0 * *correct as f64 / *n as f64).collect();
            assert_eq!(accuracies.len(), TASKS.len(), "{own}");
            accuracies.iter().sum::<f64>() / accuracies.len() as f64
        };
        let means: Vec<String> =
            wanted.split(',').map(|storage| format!("{storage} {:.2}", mean(storage))).collect();
        println!("{method}: {}", means.join(", "));
        for storage in ["tvq8", "tvq4"] {
            let off = mean(storage) - mean("deltas");
            assert!(off.abs() <= 1.5, "{method}: {storage} is {off:.2} points from single precision");
        }
        assert!(mean("fq4") + 1.0 < mean("tvq4"), "{method}: {} and {}", mean("fq4"), mean("tvq4"));
    }
}
