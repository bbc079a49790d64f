//! The bytes of every output are a function of its key: any number of threads and of stages at once gives the same.

use crate::util::{Lab, PARITY, Run, quickstart, shipped};
use std::collections::BTreeSet;
use std::time::Instant;

/// Fails unless all outputs of `pipeline.toml` are the same for any number of threads and of stages at once.
#[track_caller]
fn same_for_all_threads(lab: &Lab, args: &[&str]) -> Run {
    let mut first: Option<Run> = None;
    for (threads, jobs) in [("1", "1"), ("2", "1"), ("8", "1"), ("2", "4"), ("8", "4")] {
        fs_err::remove_dir_all(&lab.cache)
            .or_else(|error| if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
            .unwrap();
        let started = Instant::now();
        let run = lab.run(&[["--threads", threads, "--jobs", jobs].as_slice(), args].concat());
        println!("{threads} threads, {jobs} jobs: {:.2} s", started.elapsed().as_secs_f64());
        // Units with the same key are one piece of work.
        let keys: BTreeSet<_> = run.units.values().map(|unit| &unit.key).collect();
        assert_eq!(run.ran().len(), keys.len());
        let first = first.get_or_insert_with(|| run.clone());
        assert_eq!(run.artifacts(), first.artifacts(), "{threads} threads, {jobs} jobs");
    }
    first.unwrap()
}

#[test]
fn outputs_do_not_depend_on_threads_or_jobs() {
    let lab = Lab::small();
    lab.edit("pipeline.toml", "[\"digits\", \"negative\"]", "[\"digits\", \"negative\", \"parity\"]");
    lab.append("pipeline.toml", PARITY);
    lab.append(
        "pipeline.toml",
        "\n[stage.experts]\nkind = \"evaluate\"\nfrom = { model = \"tuned\", origin = \"base\" }\ngraph = \"data/clip_vision.onnx\"\ndataset = \"${datasets}\"\n\
         \n[stage.averaged]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"deltas\" }\nmethod = \"average\"\n\
         \n[stage.negated]\nkind = \"combine\"\nfrom = { digits = \"deltas[digits]\", parity = \"deltas[parity]\" }\nscale = { digits = -1.0, parity = 0.5 }\n\
         \n[stage.shared]\nkind = \"quantize\"\nfrom = \"deltas\"\nscheme = \"rtvq\"\nbits = 2\nclip = \"mse\"\n\
         \n[stage.groups]\nkind = \"quantize\"\nfrom = \"deltas[digits]\"\nscheme = \"nf4\"\ndouble_quantization = true\nresidual_stages = 2\n\
         \n[stage.files]\nkind = \"export\"\nfrom = \"averaged\"\nto = \"out\"\ndtype = \"f16\"\nmax_shard_bytes = 300000\n\
         \n[stage.package]\nkind = \"export\"\nformat = \"package\"\nfrom = \"packed\"\n\
         \n[stage.small]\nkind = \"quantize\"\nfrom = \"averaged\"\nbits = 8\n\
         \n[stage.graph]\nkind = \"export\"\nformat = \"onnx\"\nfrom = { model = \"small\", origin = \"base\" }\ngraph = \"data/clip_vision.onnx\"\n\
         \n[stage.activations]\nkind = \"calibrate\"\nfrom = { model = \"base\", origin = \"base\" }\ngraph = \"data/clip_vision.onnx\"\ndataset = \"${datasets}\"\nsensitivity_images = 8\n\
         \n[stage.seen]\nkind = \"calibrate\"\nfrom = { model = \"tuned\", origin = \"base\" }\ngraph = \"data/clip_vision.onnx\"\ndataset = \"${datasets}\"\n\
         sensitivity_images = 0\nfisher_images = 3\n\
         \n[stage.regression]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"deltas\", statistics = \"seen\" }\nmethod = \"regmean\"\n\
         \n[stage.informed]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"deltas\", statistics = \"seen\" }\nmethod = \"fisher\"\n\
         \n[stage.adapted]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"packed\", origin = \"base\" }\nmethod = \"adamerging\"\nsteps = 4\nplus = true\n\
         graph = \"data/clip_vision.onnx\"\ndataset = \"${datasets}\"\n\
         \n[stage.integers]\nkind = \"export\"\nformat = \"onnx\"\nfrom = { model = \"small\", origin = \"base\", statistics = \"activations\" }\ngraph = \"data/clip_vision.onnx\"\n\
         \n[stage.calibrated]\nkind = \"quantize\"\nfrom = { tensors = \"base\", statistics = \"activations\" }\nscheme = \"symmetric\"\nselect = \"tvq\"\n\
         bits = \"auto\"\nbudget = { bits_per_weight = 3.0 }\nwidths = [2, 3, 4]\nrounding = \"descent\"\n",
    );
    // A number of images that no batch size divides, more bits than one, and absmax beside the default.
    let sweep = ["--set", "limit=157", "--set", "bits=3,8"];
    let run = same_for_all_threads(&lab, &sweep);
    assert_eq!(run.ran().len(), run.units.len());
}

/// Ways to merge beside those of `pipelines/methods.toml`: what differs from them in the code that runs.
const OTHER_WAYS: &[&str] = &[
    "method = 'average'\npost = 'svc'",
    "method = 'task-arithmetic'\nweights = { digits = 2.0, rotated = 1.0, negative = 0.5, parity = 1.0 }\nscale = [0.2, 0.4]",
    "method = 'ties'\nscope = 'tensor'\nagg = 'sum'",
    "method = 'ties'\nagg = 'max'\nrules = [{ match = '*self_attn*', density = 0.5 }]",
    "method = 'dare'\nrescale = 'l1'\naggregation = 'ties-mean'",
    "method = 'della'\naggregation = 'sum'",
    "method = 'breadcrumbs'\nscope = 'tensor'\naggregation = 'ties-sum'",
    "method = 'lines'\non = 'ties'",
    "method = 'lines'\non = 'single-task'",
    "method = 'pcb'\nversion = 'vision'",
    "method = 'sce'\nselect_topk = 0.5",
    "method = 'model-stock'\nfilter_wise = true",
    "method = 'karcher'\nbetween = 'task-vectors'",
    "method = 'tsv-m'\northogonalization = 'svd'",
    "method = 'tsv-m'\nlossless = true\npost = { method = 'svc', floor = 1.0 }",
    "method = 'knots'\nunmerged = ['*embedding*']",
    "method = 'wudi'\nsolver = 'exact'",
    "method = 'wudi'\nmha = 'fused'\nsteps = 20",
    "method = 'emr'\nunified = true",
];

/// Ways to decompose, to store coefficients and to mask, each with a merge of what comes of it.
const OTHER_STORAGE: &str = "
[stage.in_low_rank]
kind = 'svd'
from = { deltas = 'deltas' }
mode = 'matrix'
algorithm = '${algorithm}'
max_rank = 8

[stage.of_low_rank]
kind = 'merge'
from = { base = 'base', vectors = 'in_low_rank' }
method = 'tsv-m'

[stage.union]
kind = 'mask'
from = { deltas = 'deltas', base = 'base' }
method = 'tall'
combine = 'union'

[stage.stored_basis]
kind = 'svd'
from = { deltas = 'deltas', masks = 'union' }
include_noise = true
store = 'basis'
basis_bits = 4

[stage.stored_coefficients]
kind = 'compress'
from = { deltas = 'deltas', basis = 'stored_basis' }

[stage.few_bits]
kind = 'quantize'
from = 'stored_coefficients'
bits = 3
residual_stages = 2

[stage.experts]
kind = 'merge'
from = { base = 'base', vectors = 'few_bits' }
method = 'svd-hybrid'
output = 'per-task'

[stage.clustered]
kind = 'merge'
from = { base = 'base', vectors = 'few_bits' }
method = 'svd-hybrid'
weights = { cluster = 2 }

[stage.largest]
kind = 'mask'
from = { deltas = 'deltas' }
method = 'magnitude'
keep = 0.3

[stage.drawn]
kind = 'mask'
from = { deltas = 'deltas' }
method = 'random'
keep = 0.3

[stage.of_the_largest]
kind = 'merge'
from = { base = 'base', vectors = 'deltas', masks = 'largest' }
method = 'tall'

[stage.of_some]
kind = 'merge'
from = { base = 'base', vectors = 'deltas', masks = 'drawn' }
method = 'consensus'
k = 1
";

/// Every method that there is, as `pipelines/methods.toml` uses it and in the other ways that it can be computed.
#[test]
fn no_merge_depends_on_threads_or_jobs() {
    let text = shipped("methods.toml");
    let (merges, rest) =
        text.split_once("# --- the same questions to all of them").expect("the part that merges");
    let images = &rest[rest.find("[vars.images.digits]").expect("images without labels")..];
    let mut text = format!("{merges}{images}{OTHER_STORAGE}");
    for (index, parameters) in OTHER_WAYS.iter().enumerate() {
        text += &format!(
            "\n[stage.way{index}]\nkind = 'merge'\nfrom = {{ base = 'base', vectors = 'deltas' }}\n{parameters}\n"
        );
    }
    // What trains and what looks at images, for a few steps and images; their arithmetic is the same for all.
    for (from, to) in [
        ("steps = 150", "steps = 3"),
        ("fisher_images = 50", "fisher_images = 3"),
        ("labels.idx.gz\"", "labels.idx.gz\"\nlimit = 70"),
        ("[vars]\n", "[vars]\nalgorithm = \"truncated\"\n"),
        ("quickstart/", &format!("{}/", quickstart().display())),
    ] {
        assert!(text.contains(from), "no `{from}`");
        text = text.replace(from, to);
    }
    let lab = Lab::empty();
    lab.write("pipeline.toml", &text);
    for method in lab.json(&["stages", "merge"])["methods"].as_array().unwrap() {
        let id = method["id"].as_str().unwrap();
        let named = ['"', '\''].iter().any(|quote| text.contains(&format!("method = {quote}{id}{quote}")));
        assert!(named, "the method {id} is not compared");
    }
    let run = same_for_all_threads(&lab, &["--set", "algorithm=exact,truncated,randomized"]);
    assert!(run.units.len() > 70, "only {} units", run.units.len());
}

#[test]
fn running_again_gives_the_same_bytes() {
    let lab = Lab::small();
    let first = lab.run(&[]);
    let all: Vec<&str> = ["base", "tuned", "deltas", "packed", "merged", "base_scores", "scores"]
        .iter()
        .flat_map(|stage| ["--force", stage])
        .collect();
    let outcome = lab.try_run("pipeline.toml", &all);
    assert!(!outcome.stderr.contains("not deterministic"), "{outcome}");
    let again = outcome.run();
    assert_eq!(again.ran().len(), again.units.len());
    assert_eq!(again.artifacts(), first.artifacts());
}
