//! The bytes of every output are a function of its key: any number of threads and of stages at once gives the same.

use crate::util::{Lab, PARITY};
use std::time::Instant;

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
    let mut expected: Option<Vec<(String, String)>> = None;
    for (threads, jobs) in [("1", "1"), ("2", "1"), ("8", "1"), ("2", "4"), ("8", "4")] {
        fs_err::remove_dir_all(&lab.cache)
            .or_else(|error| if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
            .unwrap();
        let started = Instant::now();
        let run = lab.run(&[["--threads", threads, "--jobs", jobs].as_slice(), &sweep].concat());
        println!("{threads} threads, {jobs} jobs: {:.2} s", started.elapsed().as_secs_f64());
        assert_eq!(run.ran().len(), run.units.len());
        let artifacts: Vec<(String, String)> = run
            .artifacts()
            .into_iter()
            .map(|(unit, artifact)| (unit.to_owned(), artifact.to_owned()))
            .collect();
        let expected = expected.get_or_insert_with(|| artifacts.clone());
        assert_eq!(artifacts, *expected, "{threads} threads, {jobs} jobs");
    }
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
