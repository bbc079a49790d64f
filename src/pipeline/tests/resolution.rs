//! What pipelines resolve to.

use super::*;
use merganser_cache::Value;
use merganser_stages::Content;
use std::io::Write as _;

const FULL: &str = r#"#:schema ../schema/pipeline.json
include = ["common.toml"]

[pipeline]
name = "svd-hybrid"
description = "everything at once"

[vars]
bits  = 4
tasks = ["mnist", "fashion"]
suffix = "b${bits}"

[stage.base]
kind = "load"
path = "data/base.safetensors"

[stage.tuned]
kind = "load"
each = { task = "${tasks}" }
path = "data/ft_${task}.safetensors"
only = ["*.${suffix}", "$${literal}"]

[stage.deltas]
kind = "diff"
from = { tuned = "tuned", base = "base" }

[stage.packed]
kind = "pack"
from = "deltas"
bits = "${bits}"
rules = [{ match = "*.attn.*", bits = 6 }]

[stage.merged]
kind = "merge"
from = { base = "base", vectors = "packed" }
method = "task-arithmetic"

[stage.one]
kind = "pack"
from = "packed[bits=3,task=mnist]"
bits = 8

[stage.scores]
kind = "scores"
from = { model = "merged", baseline = "tuned" }
datasets = "${tasks}"

[sweep]
bits = [2, 3]
"#;

fn full(overrides: &[&str]) -> Pipeline {
    let common = "[vars]\nbits = 1\n[stage.shared]\nkind = \"load\"\npath = \"shared.safetensors\"\n";
    let result = load_files(&[("p.toml", FULL), ("common.toml", common)], overrides);
    result.unwrap_or_else(|failure| panic!("{}", drawn(&failure.files, &failure.problems)))
}

fn loaded(text: &str, overrides: &[&str]) -> Pipeline {
    load_text(text, overrides)
        .unwrap_or_else(|failure| panic!("{}", drawn(&failure.files, &failure.problems)))
}

fn labels(pipeline: &Pipeline) -> Vec<&str> {
    pipeline.instances.iter().map(|instance| instance.label.as_str()).collect()
}

fn parameters(pipeline: &Pipeline, label: &str) -> Vec<serde_json::Value> {
    let instance = &pipeline.instances[pipeline.select(label).unwrap().instances[0]];
    let text_of = |unit: &super::super::plan::PlannedUnit| match instance.bodies[unit.body]
        .parameters(&unit.unit)
        .unwrap()
    {
        Value::Text(text) => serde_json::from_str(&text).unwrap(),
        other => panic!("a fake stage's parameters are text, got {other:?}"),
    };
    instance.units.iter().map(text_of).collect()
}

/// `port <- producer[members taken]` for a unit.
fn takes(pipeline: &Pipeline, label: &str, unit: usize) -> Vec<String> {
    let instance = &pipeline.instances[pipeline.select(label).unwrap().instances[0]];
    let describe = |take: &super::super::ResolvedTake| {
        let producer = &pipeline.instances[take.from];
        let units: Vec<_> =
            take.units.iter().map(|&unit| producer.units[unit].member.as_deref().unwrap_or("-")).collect();
        format!("{} <- {} {}", take.port, producer.label, units.join("+"))
    };
    instance.units[unit].takes.iter().map(describe).collect()
}

#[test]
fn resolves_a_pipeline_that_uses_everything() {
    let pipeline = full(&[]);
    assert_eq!(
        (pipeline.name.as_str(), pipeline.description.as_deref()),
        ("svd-hybrid", Some("everything at once"))
    );
    assert!(pipeline.path.is_absolute());
    assert_eq!(pipeline.warnings, []);
    assert_eq!(
        labels(&pipeline),
        [
            "shared",
            "base",
            "tuned[bits=2]",
            "tuned[bits=3]",
            "deltas[bits=2]",
            "deltas[bits=3]",
            "packed[bits=2]",
            "packed[bits=3]",
            "merged[bits=2]",
            "merged[bits=3]",
            "one",
            "scores[bits=2]",
            "scores[bits=3]",
        ]
    );
    let scores = &pipeline.instances[pipeline.select("scores[bits=3]").unwrap().instances[0]];
    assert_eq!(scores.members.as_deref().unwrap(), ["mnist", "fashion"]);
    assert_eq!(scores.content, Content::Scores);
    assert_eq!(serde_json::to_string(&scores.vars).unwrap(), r#"{"bits":3}"#);
    assert_eq!(
        takes(&pipeline, "scores[bits=3]", 1),
        ["model <- merged[bits=3] -", "baseline <- tuned[bits=3] mnist+fashion"]
    );
    assert_eq!(
        takes(&pipeline, "merged[bits=2]", 0),
        ["base <- base -", "vectors <- packed[bits=2] mnist+fashion"]
    );
    assert_eq!(takes(&pipeline, "deltas[bits=2]", 1), ["base <- base -", "tuned <- tuned[bits=2] fashion"]);
    assert_eq!(takes(&pipeline, "one", 0), ["tensors <- packed[bits=3] mnist"]);
    assert_eq!(pipeline.instances[pipeline.select("one").unwrap().instances[0]].members, None);
}

#[test]
fn keeps_the_types_of_variables() {
    let pipeline = full(&[]);
    let packed = parameters(&pipeline, "packed[bits=3]");
    assert_eq!(packed[0]["bits"], 3);
    let tuned = parameters(&pipeline, "tuned[bits=2]");
    assert_eq!(tuned[0]["only"], serde_json::json!(["*.b2", "${literal}"]));
    assert!(tuned[1]["path"].as_str().unwrap().ends_with("data/ft_fashion.safetensors"));
    let floats = loaded(
        "[vars]\nx = 0.5\nn = 2\non = true\n[stage.a]\nkind = \"load\"\npath = \"${x}/${n}/${on}\"\n[stage.b]\nkind = \"pack\"\nfrom = \"a\"\nbits = \"${n}\"\nscale = \"${x}\"\n",
        &[],
    );
    assert!(parameters(&floats, "a")[0]["path"].as_str().unwrap().ends_with("0.5/2/true"));
    assert_eq!(parameters(&floats, "b")[0]["scale"], 0.5);
}

#[test]
fn shares_what_no_axis_touches() {
    let text = "[vars]\nbits = 4\nseed = 0\n[stage.a]\nkind = \"load\"\npath = \"a\"\n\
                [stage.b]\nkind = \"pack\"\nfrom = \"a\"\nbits = \"${bits}\"\n\
                [stage.c]\nkind = \"pack\"\nfrom = \"a\"\nbits = 8\nscheme = \"s${seed}\"\n\
                [stage.d]\nkind = \"note\"\nfrom = \"b\"\ntext = \"${seed}-\"\n[stage.e]\nkind = \"note\"\nfrom = \"c\"\n";
    let pipeline = loaded(text, &["bits=2,3", "seed=0,1"]);
    let expected = [
        "a",
        "b[bits=2]",
        "b[bits=3]",
        "c[seed=0]",
        "c[seed=1]",
        "d[bits=2,seed=0]",
        "d[bits=2,seed=1]",
        "d[bits=3,seed=0]",
        "d[bits=3,seed=1]",
        "e[seed=0]",
        "e[seed=1]",
    ];
    assert_eq!(labels(&pipeline), expected);
    assert_eq!(takes(&pipeline, "d[bits=3,seed=0]", 0), ["about <- b[bits=3] -"]);
    assert_eq!(pipeline.select("d[seed=1]").unwrap().instances, [6, 8]);
    assert_eq!(pipeline.select("d").unwrap().instances, [5, 6, 7, 8]);
}

#[test]
fn joins_axes_that_meet_again_and_leaves_out_pinned_ones() {
    let text = "[vars]\nbits = 4\nscale = 0.5\n[stage.a]\nkind = \"load\"\npath = \"a\"\n\
                [stage.b]\nkind = \"load\"\npath = \"b\"\n\
                [stage.d]\nkind = \"diff\"\nfrom = { base = \"a\", tuned = \"b\" }\n\
                [stage.p]\nkind = \"pack\"\nfrom = \"d\"\nbits = \"${bits}\"\nscale = \"${scale}\"\n\
                [stage.m]\nkind = \"merge\"\nfrom = { base = \"a\", vectors = \"p\" }\nmethod = \"average\"\n\
                [stage.again]\nkind = \"diff\"\nfrom = { base = \"m\", tuned = \"m[scale=1]\" }\n\
                [sweep]\nbits = [2, 3]\nscale = [0.5, 1.0]\n";
    let pipeline = loaded(text, &[]);
    let again: Vec<&str> = labels(&pipeline).into_iter().filter(|label| label.starts_with("again")).collect();
    assert_eq!(
        again,
        [
            "again[bits=2,scale=0.5]",
            "again[bits=2,scale=1.0]",
            "again[bits=3,scale=0.5]",
            "again[bits=3,scale=1.0]"
        ]
    );
    assert_eq!(
        takes(&pipeline, "again[bits=3,scale=0.5]", 0),
        ["base <- m[bits=3,scale=0.5] -", "tuned <- m[bits=3,scale=1.0] -"]
    );
    let mut seen = std::collections::HashSet::new();
    assert!(pipeline.instances.iter().all(|instance| seen.insert(&instance.label)), "labels are unique");
}

#[test]
fn inherits_only_the_axes_of_the_stage_that_is_meant() {
    // `x` takes from `a` or from `p`, of which only `p` depends on `bits`.
    let text = "[vars]\nbits = 4\nsource = \"a\"\n[stage.a]\nkind = \"load\"\npath = \"a\"\n\
                [stage.p]\nkind = \"pack\"\nfrom = \"a\"\nbits = \"${bits}\"\n\
                [stage.x]\nkind = \"note\"\nfrom = \"${source}\"\n[sweep]\nsource = [\"a\", \"p\"]\nbits = [2, 3]\n";
    let pipeline = loaded(text, &[]);
    assert_eq!(labels(&pipeline)[3..], ["x[source=a]", "x[source=p,bits=2]", "x[source=p,bits=3]"]);
}

#[test]
fn takes_values_from_the_command_line() {
    let swept = |overrides: &[&str]| {
        let pipeline = full(overrides);
        pipeline
            .select("packed")
            .unwrap()
            .instances
            .iter()
            .map(|&index| pipeline.instances[index].label.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(swept(&["bits=3"]), ["packed[bits=3]"]);
    assert_eq!(swept(&["bits=3,5,8"]), ["packed[bits=3]", "packed[bits=5]", "packed[bits=8]"]);
    let pipeline = full(&["tasks=[\"mnist\"]"]);
    assert_eq!(
        pipeline.instances[pipeline.select("tuned[bits=2]").unwrap().instances[0]]
            .members
            .as_deref()
            .unwrap(),
        ["mnist"]
    );
    let text = "[vars]\nmode = \"slow\"\n[stage.a]\nkind = \"load\"\npath = \"${mode}.pt\"\n";
    let pipeline = loaded(text, &["mode=fast"]);
    assert_eq!(labels(&pipeline), ["a"]);
    assert!(parameters(&pipeline, "a")[0]["path"].as_str().unwrap().ends_with("/fast.pt"));
    let pipeline = loaded(text, &["mode=fast,\"two words\",3"]);
    assert_eq!(labels(&pipeline), ["a[mode=fast]", "a[mode=\"two words\"]", "a[mode=3]"]);
}

#[test]
fn narrows_collections_to_the_member_of_each() {
    let text = "[vars]\ntasks = [\"a\", \"b\", 3]\n[stage.base]\nkind = \"load\"\npath = \"base\"\n\
                [stage.tuned]\nkind = \"load\"\neach = { task = \"${tasks}\" }\npath = \"${task}.pt\"\n\
                [stage.d]\nkind = \"diff\"\nfrom = { base = \"base\", tuned = \"tuned\" }\n\
                [stage.single]\nkind = \"merge\"\neach = { task = [\"b\", \"a\"] }\nfrom = { base = \"base\", vectors = \"d\" }\nmethod = \"average\"\n\
                [stage.scaled]\nkind = \"merge\"\neach = { scale = [0, 1] }\nfrom = { base = \"base\", vectors = \"d\" }\nmethod = \"average\"\nscale = \"${scale}\"\n\
                [stage.gathered]\nkind = \"pack\"\neach = { source = [\"base\", \"x\"] }\nfrom = \"d_${source}\"\nbits = 3\n\
                [stage.d_base]\nkind = \"load\"\npath = \"p\"\n[stage.d_x]\nkind = \"load\"\npath = \"q\"\n";
    let pipeline = loaded(text, &[]);
    let members = |label: &str| {
        pipeline.instances[pipeline.select(label).unwrap().instances[0]].members.clone().unwrap()
    };
    assert_eq!(members("tuned"), ["a", "b", "3"]);
    assert_eq!(members("d"), ["a", "b", "3"]);
    assert_eq!(members("single"), ["b", "a"]);
    assert_eq!(takes(&pipeline, "single", 0), ["base <- base -", "vectors <- d b"]);
    assert_eq!(
        takes(&pipeline, "scaled", 1),
        ["base <- base -", "vectors <- d a+b+3"],
        "members of another sort stay whole"
    );
    assert_eq!(parameters(&pipeline, "scaled")[1]["scale"], 1.0);
    assert_eq!(takes(&pipeline, "gathered", 1), ["tensors <- d_x -"]);
    let single = &pipeline.instances[pipeline.select("single").unwrap().instances[0]];
    assert_eq!((single.bodies.len(), single.units[1].body, single.inputs.len()), (2, 1, 3));
}

#[test]
fn picks_members_by_name() {
    let text = "[stage.base]\nkind = \"load\"\npath = \"base\"\n\
                [stage.tuned]\nkind = \"load\"\neach = { task = [\"digits\", \"letters\"] }\npath = \"${task}\"\n\
                [stage.d]\nkind = \"diff\"\nfrom = { base = \"base\", tuned = \"tuned\" }\n\
                [stage.x]\nkind = \"pack\"\nfrom = \"d[letters]\"\nbits = 2\n\
                [stage.y]\nkind = \"pack\"\nfrom = \"d[task=digits]\"\nbits = 2\n";
    let pipeline = loaded(text, &[]);
    assert_eq!(takes(&pipeline, "x", 0), ["tensors <- d letters"]);
    assert_eq!(takes(&pipeline, "y", 0), ["tensors <- d digits"]);
    let selection = pipeline.select("d[task=letters]").unwrap();
    assert_eq!((selection.instances, selection.member.as_deref()), (vec![2], Some("letters")));
    assert_eq!(pipeline.instances[2].artifact_label(Some("letters")), "d[letters]");
    assert_eq!(full(&[]).instances[2].artifact_label(Some("a b")), "tuned[bits=2,\"a b\"]");
    assert_eq!(
        pipeline.select("d[numbers]").unwrap_err().help.unwrap(),
        "there is `d` with members digits, letters"
    );
}

#[test]
fn suggests_what_was_meant_on_the_command_line() {
    let pipeline = full(&[]);
    assert_eq!(pipeline.select("pakced").unwrap_err().help.as_deref(), Some("did you mean `packed`?"));
    let problem = pipeline.select("merged[bits=7]").unwrap_err();
    assert_eq!(problem.help.as_deref(), Some("there is `merged[bits=2]`, `merged[bits=3]`"));
    assert_eq!(pipeline.select("merged[bits=7").unwrap_err().code, "bad-stage-name");
}

#[test]
fn merges_included_files_and_points_into_them() {
    let main = "include = [\"sub/common.toml\", \"sub/more.toml\"]\n[stage.a]\npath = \"own\"\n";
    let common =
        "include = [\"deep.toml\"]\n[vars]\nx = \"one\"\n[stage.a]\nkind = \"load\"\npath = \"${x}\"\n";
    let more = "[vars]\nx = \"two\"\n[stage.b]\nkind = \"load\"\npath = \"${x}\"\n";
    let deep = "[stage.c]\nkind = \"load\"\npath = \"${x}\"\n";
    let files =
        [("p.toml", main), ("sub/common.toml", common), ("sub/more.toml", more), ("sub/deep.toml", deep)];
    let pipeline = load_files(&files, &[])
        .unwrap_or_else(|failure| panic!("{}", drawn(&failure.files, &failure.problems)));
    let path = |label: &str| parameters(&pipeline, label)[0]["path"].as_str().unwrap().to_owned();
    assert!(
        path("a").ends_with("/own") && !path("a").ends_with("sub/own"),
        "the including file wins: {}",
        path("a")
    );
    assert!(path("b").ends_with("/sub/two"), "later wins, and paths start from their file: {}", path("b"));
    assert!(path("c").ends_with("/sub/two"), "{}", path("c"));

    let broken =
        [("p.toml", main), ("sub/common.toml", "[stage.a]\nkind = \"laod\"\n"), ("sub/more.toml", "")];
    let failure = load_files(&broken, &[]).err().unwrap();
    assert!(drawn(&failure.files, &failure.problems).contains("[sub/common.toml:2:8]"));
}

#[test]
fn warns_of_variables_that_nothing_uses() {
    let text = "[vars]\nused = 1\nvia = \"${used}\"\nidle = 2\nswept = 3\n[stage.a]\nkind = \"load\"\npath = \"${via}.pt\"\n[sweep]\nswept = [1, 2]\n";
    let pipeline = loaded(text, &[]);
    let messages: Vec<_> = pipeline.warnings.iter().map(|warning| warning.message.as_str()).collect();
    assert_eq!(
        messages,
        ["variable `idle` is never used", "sweeping over `swept` changes nothing: no stage uses it"]
    );
    assert!(pipeline.warnings.iter().all(|warning| warning.code == "unused-variable"));
    let drawn = pipeline.files.render_warnings(&pipeline.warnings, PLAIN);
    assert!(drawn.ends_with("2 warnings\n"), "{drawn}");
    assert_eq!(
        loaded(text, &["via=7", "swept=1"]).warnings.len(),
        2,
        "a value from the command line makes nothing unused"
    );
}

#[test]
fn names_a_pipeline_after_its_file() {
    assert_eq!(loaded("[stage.a]\nkind = \"load\"\npath = \"a\"\n", &[]).name, "p");
}

/// Not a limit: prints how long the largest pipeline that anyone writes by hand takes.
#[test]
fn resolves_a_hundred_stages() {
    let mut text = String::from(
        "[vars]\nbits = 4\ntasks = [\"a\", \"b\", \"c\", \"d\"]\n[stage.base]\nkind = \"load\"\npath = \"base\"\n",
    );
    for index in 0..33 {
        write!(
            text,
            "[stage.tuned{index}]\nkind = \"load\"\neach = {{ task = \"${{tasks}}\" }}\npath = \"data/${{task}}_{index}.safetensors\"\n\
             [stage.deltas{index}]\nkind = \"diff\"\nfrom = {{ base = \"base\", tuned = \"tuned{index}\" }}\n\
             [stage.packed{index}]\nkind = \"pack\"\nfrom = \"deltas{index}\"\nbits = \"${{bits}}\"\n"
        )
        .expect(TO_STRING);
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.toml");
    std::fs::write(&path, &text).unwrap();
    let mut best = std::time::Duration::MAX;
    for _ in 0..20 {
        let start = std::time::Instant::now();
        let pipeline =
            load(&path, &[], &kinds::KINDS, None).unwrap_or_else(|failure| panic!("{:?}", failure.problems));
        best = best.min(start.elapsed());
        assert_eq!(pipeline.instances.len(), 100);
        assert_eq!(
            pipeline.instances.iter().map(|instance| instance.units.len()).sum::<usize>(),
            1 + 33 * 12
        );
    }
    writeln!(std::io::stderr(), "100 stages, 397 units: {best:?}").unwrap();
}
