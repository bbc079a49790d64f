//! Every merge method on the suite's six tasks, through the built tool: its models answer as those that the authors' own code merged.
//!
//! The merged tensors are compared element by element in the tests of the methods (`stages/src/merge/`), with the same parameters; here is
//! what users see of them. Methods that make a model per task are in `masks.rs`.

use crate::suite::{TASKS, compare, evaluate, json, pipeline, shipped_stages};
use crate::tuned::with_calibration;
use crate::util::{Lab, test_data};
use std::fmt::Write;

/// A row of the published answers, and the parameters of the stage that merges the same.
const ROWS: &[(&str, &str)] = &[
    ("basic/weight_average", "method = 'average'"),
    ("basic/task_arithmetic_0.1", "method = 'task-arithmetic'\nscale = 0.1"),
    ("basic/task_arithmetic_0.2", "method = 'task-arithmetic'\nscale = 0.2"),
    ("basic/task_arithmetic_0.3", "method = 'task-arithmetic'\nscale = 0.3"),
    ("ties/k20_dis-mean_lambda1", "method = 'ties'\ndensity = 0.2\nagg = 'mean'\nscale = 1.0"),
    ("ties/k20_dis-sum_lambda0.3", "method = 'ties'\ndensity = 0.2\nagg = 'sum'\nscale = 0.3"),
    ("ties/k20_dis-max_lambda0.5", "method = 'ties'\ndensity = 0.2\nagg = 'max'\nscale = 0.5"),
    ("ties/k10_dis-mean_lambda1", "method = 'ties'\ndensity = 0.1\nagg = 'mean'\nscale = 1.0"),
    (
        "mergekit/ties_d0.2_w1_norm",
        "method = 'ties'\nscope = 'tensor'\ndensity = 0.2\nmean_by = 'weights'\ntie = 'positive'",
    ),
    (
        "mergekit/ties_d0.2_w0.3_nonorm",
        "method = 'ties'\nscope = 'tensor'\ndensity = 0.2\nagg = 'sum'\ntie = 'positive'\nscale = 0.3",
    ),
    (
        "breadcrumbs/keep0.15_remove0.006_alpha0.2",
        "method = 'breadcrumbs'\ndensity = 0.15\ngamma = 0.006\nscale = 0.2",
    ),
    (
        "breadcrumbs/keep0.1_remove0.01_alpha1.0",
        "method = 'breadcrumbs'\ndensity = 0.1\ngamma = 0.01\nscale = 1.0",
    ),
    (
        "breadcrumbs/keep0.5_remove0.05_alpha0.3",
        "method = 'breadcrumbs'\ndensity = 0.5\ngamma = 0.05\nscale = 0.3",
    ),
    (
        "mergekit/breadcrumbs_d0.9_g0.01_w0.3",
        "method = 'breadcrumbs'\nscope = 'tensor'\ndensity = 0.9\ngamma = 0.01\nscale = 0.3",
    ),
    ("lines/ta_beta0.3", "method = 'lines'\non = 'task-arithmetic'\nbeta = 0.3"),
    ("lines/ta_beta0.5", "method = 'lines'\non = 'task-arithmetic'\nbeta = 0.5"),
    ("lines/ties_sum_beta0.3", "method = 'lines'\non = 'ties'\nbeta = 0.3"),
    ("lines/ties_sum_beta0.5", "method = 'lines'\non = 'ties'\nbeta = 0.5"),
    ("pcb/root_ratio0.05_lambda1.2", "method = 'pcb'\nratio = 0.05"),
    ("pcb/root_ratio0.1_lambda1.2", "method = 'pcb'\nratio = 0.1"),
    ("pcb/vision_ratio0.05_lams1.2", "method = 'pcb'\nversion = 'vision'\nratio = 0.05"),
    ("mergekit/sce_topk0.5", "method = 'sce'\nselect_topk = 0.5"),
    ("mergekit/karcher", "method = 'karcher'"),
    ("mergekit/model_stock", "method = 'model-stock'"),
    ("mergekit/model_stock_filterwise", "method = 'model-stock'\nfilter_wise = true"),
    ("tsvm/tsvm_alpha1", "method = 'tsv-m'"),
    ("tsvm/tsvm2_eigh_alpha1", "method = 'tsv-m'"),
    ("tsvm/tsvm_lossless_alpha1", "method = 'tsv-m'\nlossless = true"),
    ("iso/iso_c_alpha1.0", "method = 'iso-c'"),
    ("iso/iso_c_alpha1.5", "method = 'iso-c'\nscale = 1.5"),
    ("iso/iso_cts_alpha1.0", "method = 'iso-cts'"),
    ("iso/iso_cts_alpha1.5", "method = 'iso-cts'\nscale = 1.5"),
    ("knots/knots_ties_top20_scale0.6_all2d", "method = 'knots'\nunmerged = ['*embedding*']"),
    ("knots/knots_ties_top20_scale0.6_attn_qkvo", "method = 'knots'\nonly = ['*.self_attn.*']"),
    ("actmat_rtol/actmat_f64_rtol_f32", "method = 'actmat'"),
    ("actmat_rtol/tact_f64_rtol_f32", "method = 'tact'"),
    ("wudi/split_300it", "method = 'wudi'"),
    ("wudi/fused_300it", "method = 'wudi'\nmha = 'fused'"),
    ("wudi/split_0it", "method = 'wudi'\nsteps = 0"),
    ("actmat/actmat", "method = 'actmat'"),
    ("actmat/tact", "method = 'tact'"),
    ("actmat/tsv", "method = 'tsv-m'"),
    ("emr/unified", "method = 'emr'\nunified = true"),
    ("mergekit/linear", "method = 'average'"),
    ("mergekit/task_arithmetic_0.3", "method = 'task-arithmetic'\nscale = 0.3"),
    (
        "mergekit/breadcrumbs_ties_d0.3_g0.01_w0.3",
        "method = 'breadcrumbs'\nscope = 'tensor'\ndensity = 0.3\ngamma = 0.01\naggregation = 'ties-sum'\nscale = 0.3",
    ),
    ("svc/ta_alpha_1_over_T", "method = 'svc'"),
    ("svc/ta_alpha_1", "method = 'svc'\nfloor = 1.0"),
    ("svc/tsvm_alpha_1", "method = 'tsv-m'\npost = { method = 'svc', floor = 1.0 }"),
];

#[test]
fn merged_models_answer_as_those_of_the_authors() {
    let Some(data) = test_data("merged_models_answer_as_those_of_the_authors") else { return };
    let lab = Lab::empty();
    let mut stages = String::new();
    for (index, (_, parameters)) in ROWS.iter().enumerate() {
        write!(
            stages,
            "[stage.m{index}]\nkind = \"merge\"\nfrom = {{ base = \"base\", vectors = \"deltas\" }}\n{parameters}\n"
        )
        .unwrap();
        stages += &evaluate(&data, &format!("s{index}"), &format!("m{index}"));
    }
    lab.write("pipeline.toml", &pipeline(&data, &stages));
    let run = lab.run(&[]);
    let goldens = json(&data.join("goldens/public/accuracy.json"))["results"].clone();
    for (index, (row, _)) in ROWS.iter().enumerate() {
        print!("{row}: ");
        compare(&run, &format!("s{index}"), "", |task| goldens[*row][task].clone());
    }
}

/// A row of SVD-Hybrid: its name, the parameters of `svd`, bits and stages of `quantize`, how masks are combined if there are any, and what else
/// the merge says.
struct Hybrid(&'static str, &'static str, &'static str, Option<&'static str>, &'static str);

/// Rows in which the original's models are not finite are left out (ours are), and those with two bits and no centring: there the rounding
/// depends on the signs of the singular vectors, which are free; other signs are other models, up to 6 of 1000 answers apart.
const HYBRIDS: &[Hybrid] = &[
    Hybrid("center_2b1s", "max_rank = 4\ncenter = true", "bits = 2\nresidual_stages = 1", None, ""),
    Hybrid("center_4b2s", "max_rank = 4\ncenter = true", "bits = 4\nresidual_stages = 2", None, ""),
    Hybrid("nocenter_4b1s", "max_rank = 4\ncenter = false", "bits = 4\nresidual_stages = 1", None, ""),
    Hybrid("nocenter_4b2s_rank2", "max_rank = 2\ncenter = false", "bits = 4\nresidual_stages = 2", None, ""),
    Hybrid("center_4b2s_rank2", "max_rank = 2\ncenter = true", "bits = 4\nresidual_stages = 2", None, ""),
    Hybrid(
        "center_4b2s_rank2_fp32basis",
        "max_rank = 2\ncenter = true\nstore = 'basis'\nprecision = 'fp32'",
        "bits = 4\nresidual_stages = 2",
        None,
        "",
    ),
    Hybrid(
        "center_4b2s_rank2_perf_T5",
        "max_rank = 2\ncenter = true",
        "bits = 4\nresidual_stages = 2",
        None,
        "weights = { performance = 'accuracies.json', temperature = 5.0 }",
    ),
    Hybrid(
        "center_4b2s_rank2_perf_T0.05",
        "max_rank = 2\ncenter = true",
        "bits = 4\nresidual_stages = 2",
        None,
        "weights = { performance = 'accuracies.json', temperature = 0.05 }",
    ),
    Hybrid(
        "center_4b2s_rank2_cluster_k2",
        "max_rank = 2\ncenter = true",
        "bits = 4\nresidual_stages = 2",
        None,
        "weights = { cluster = 2, across = 'performance', temperature = 1.0, performance = { mnist = 0.1, fashion = 0.1, notmnist = 0.1, cifar10 = 0.1, gtsrb = 0.5, pneumonia = 0.1 } }",
    ),
    Hybrid(
        "center_4b2s_rank2_union",
        "max_rank = 2\ncenter = true",
        "bits = 4\nresidual_stages = 2",
        Some("union"),
        "",
    ),
    Hybrid(
        "center_4b2s_rank2_majority",
        "max_rank = 2\ncenter = true",
        "bits = 4\nresidual_stages = 2",
        Some("majority"),
        "",
    ),
    Hybrid(
        "center_4b2s_rank2_intersection",
        "max_rank = 2\ncenter = true",
        "bits = 4\nresidual_stages = 2",
        Some("intersection"),
        "",
    ),
];

#[test]
fn svd_hybrid_models_answer_as_those_of_the_original() {
    let Some(data) = test_data("svd_hybrid_models_answer_as_those_of_the_original") else { return };
    let lab = Lab::empty();
    let accuracies = fs_err::read_to_string(data.join("goldens/public/svd_hybrid/accuracies.json")).unwrap();
    lab.write("accuracies.json", &accuracies);
    let mut stages = String::new();
    for combine in ["union", "majority", "intersection"] {
        write!(
            stages,
            "[stage.{combine}]\nkind = \"mask\"\nfrom = {{ deltas = \"deltas\", base = \"base\" }}\nmethod = \"tall\"\nlambda = 0.4\ncombine = \"{combine}\"\n"
        )
        .unwrap();
    }
    for (index, Hybrid(_, basis, codes, masks, further)) in HYBRIDS.iter().enumerate() {
        let masks = masks.map_or(String::new(), |name| format!(", masks = \"{name}\""));
        write!(
            stages,
            "[stage.b{index}]\nkind = \"svd\"\nfrom = {{ deltas = \"deltas\"{masks} }}\nenergy = 0.9\n{basis}\n\
             [stage.c{index}]\nkind = \"compress\"\nfrom = {{ deltas = \"deltas\", basis = \"b{index}\" }}\n\
             [stage.p{index}]\nkind = \"quantize\"\nfrom = \"c{index}\"\n{codes}\n\
             [stage.m{index}]\nkind = \"merge\"\nfrom = {{ base = \"base\", vectors = \"p{index}\" }}\nmethod = \"svd-hybrid\"\n{further}\n"
        )
        .unwrap();
        stages += &evaluate(&data, &format!("s{index}"), &format!("m{index}"));
    }
    lab.write("pipeline.toml", &pipeline(&data, &stages));
    let run = lab.run(&[]);
    let goldens = json(&data.join("goldens/public/accuracy.json"))["results"].clone();
    for (index, Hybrid(row, ..)) in HYBRIDS.iter().enumerate() {
        print!("{row}: ");
        compare(&run, &format!("s{index}"), "", |task| goldens[format!("svd_hybrid/{row}")][task].clone());
    }
}

/// `pipelines/methods.toml` on the suite. Where a method's usual parameters are those of a published row, its answers are that row's; all
/// others must have made a model that knows more than the base.
#[test]
fn the_comparison_of_methods_scores_as_published() {
    let Some(data) = test_data("the_comparison_of_methods_scores_as_published") else { return };
    let lab = Lab::empty();
    let stages = shipped_stages(&data, "methods.toml", "# --- sums");
    let (stages, _) = stages.split_once("[vars.datasets.digits]").expect("datasets");
    // The suite has calibration images of its own; few of them, and few steps, are enough to see that these merges run.
    let mut stages = stages.to_owned();
    for (from, to) in [
        ("${images}", "${seen}".to_owned()),
        ("fisher_images = 50", "fisher_images = 5".to_owned()),
        ("steps = 150", "steps = 10".to_owned()),
        ("quickstart/ft_", format!("{}/suite/clip/ft_", data.display())),
    ] {
        assert!(stages.contains(from), "no `{from}`");
        stages = stages.replace(from, &to);
    }
    let vars = "pair = [\"mnist\", \"fashion\"]\ndensity = 0.2\n";
    lab.write("pipeline.toml", &with_calibration(&data, vars, Some(64), &stages));
    let run = lab.run(&[]);

    let results = json(&data.join("suite/results.json"));
    let goldens = json(&data.join("goldens/public/accuracy.json"))["results"].clone();
    compare(&run, "base_scores", "", |task| results["base"][task].clone());
    compare(&run, "tuned_scores", "", |task| results["finetuned"][task].clone());
    for (stage, row) in [
        ("average", "basic/weight_average"),
        ("ties", "ties/k20_dis-mean_lambda1"),
        ("karcher", "mergekit/karcher"),
        ("model_stock", "mergekit/model_stock"),
        ("tsv_m", "tsvm/tsvm_alpha1"),
        ("iso_c", "iso/iso_c_alpha1.0"),
        ("iso_cts", "iso/iso_cts_alpha1.0"),
        ("actmat", "actmat_rtol/actmat_f64_rtol_f32"),
        ("tact", "actmat_rtol/tact_f64_rtol_f32"),
        ("wudi", "wudi/split_300it"),
        ("svc", "svc/ta_alpha_1_over_T"),
    ] {
        compare(&run, &format!("{stage}_scores"), "", |task| goldens[row][task].clone());
    }
    for (stage, row) in [("tall", "tall_masks/localized"), ("emr", "emr/reconstructed")] {
        compare(&run, &format!("{stage}_scores"), "", |task| goldens[format!("{row}_{task}")][task].clone());
    }
    let correct = run.correct();
    let evaluated = stages.matches("kind = \"evaluate\"").count();
    assert_eq!(correct.len(), evaluated * TASKS.len());
    let total = |stage: &str| -> u64 {
        let rows = correct.iter().filter(|((scored, ..), _)| scored == stage);
        rows.map(|(_, (correct, _))| correct).sum()
    };
    let base = total("base_scores");
    for stage in correct.keys().map(|(stage, ..)| stage).filter(|stage| *stage != "base_scores") {
        assert!(total(stage) > base, "{stage}: {} of all answers, {base} of the base", total(stage));
    }
}

/// `pipelines/svd-hybrid.toml` on the suite: as it is shipped, and with the parameters of a row that is published.
#[test]
fn the_svd_hybrid_pipeline_scores_as_published() {
    let Some(data) = test_data("the_svd_hybrid_pipeline_scores_as_published") else { return };
    let lab = Lab::empty();
    let stages = shipped_stages(&data, "svd-hybrid.toml", "# One pass over all task vectors.");
    let (stages, _) = stages.split_once("[vars.datasets.digits]").expect("datasets");
    let rounded = "basis_bits = 4";
    assert!(stages.contains(rounded));
    let text = pipeline(&data, stages).replacen("[vars]\n", "[vars]\nenergy = 0.6\nscale = 1.2\n", 1);
    lab.write("pipeline.toml", &text);
    let run = lab.run(&[]);
    let results = json(&data.join("suite/results.json"));
    compare(&run, "tuned_scores", "", |task| results["finetuned"][task].clone());
    // Experts from coefficients of a few bits know nearly all that they knew, and lie in a fraction of their bytes.
    let correct = run.correct();
    for task in TASKS {
        let of = |stage: &str| correct[&(stage.to_owned(), String::new(), task.to_owned())];
        let ((tuned, n), (rebuilt, _), (base, _)) =
            (of("tuned_scores"), of("experts_scores"), of("base_scores"));
        println!("{task}: {tuned} as tuned, {rebuilt} as rebuilt, {base} of the base, of {n}");
        assert!(rebuilt + n / 50 >= tuned, "{task}: {rebuilt} answers of a rebuilt expert, {tuned} before");
    }
    lab.write("published.toml", &text.replace(rounded, "precision = \"fp32\"\nmax_rank = 2"));
    let run = lab.run_file("published.toml", &["--set", "energy=0.9", "--set", "scale=1.0"]);
    let goldens = json(&data.join("goldens/public/accuracy.json"))["results"].clone();
    compare(&run, "scores", "", |task| goldens["svd_hybrid/center_4b2s_rank2_fp32basis"][task].clone());
}
