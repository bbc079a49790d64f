//! `merganser graph`: the pipeline as a picture.

use super::setup;
use crate::cli::{Global, GraphArgs, GraphFormat};
use crate::exit::{ExitCode, Failure, Result};
use crate::pipeline::Pipeline;
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt::Write;

pub fn graph(global: &Global, args: &GraphArgs) -> Result<ExitCode> {
    let pipeline = setup::load_pipeline(global, &args.pipeline)?;
    let text = if args.pipeline.json {
        format!("{}\n", serde_json::to_string_pretty(&as_json(&pipeline)).map_err(Failure::failed)?)
    } else {
        match args.format {
            GraphFormat::Mermaid => mermaid(&pipeline),
            GraphFormat::Dot => dot(&pipeline),
            GraphFormat::Svg => svg(&pipeline),
        }
    };
    out!("{text}");
    Ok(ExitCode::Done)
}

/// Edges by instance, with the ports they enter; each pair once.
fn edges(pipeline: &Pipeline) -> BTreeMap<(usize, usize), String> {
    let mut edges: BTreeMap<(usize, usize), String> = BTreeMap::new();
    for (to, instance) in pipeline.instances.iter().enumerate() {
        for edge in &instance.inputs {
            let label = edges.entry((edge.from, to)).or_default();
            if !label.is_empty() {
                label.push_str(", ");
            }
            label.push_str(&edge.port);
        }
    }
    edges
}

fn members(pipeline: &Pipeline, instance: usize) -> String {
    match &pipeline.instances[instance].members {
        Some(members) => format!("{} × {}", pipeline.instances[instance].kind.id(), members.len()),
        None => pipeline.instances[instance].kind.id().to_owned(),
    }
}

fn mermaid(pipeline: &Pipeline) -> String {
    let mut text = String::from("flowchart LR\n");
    for (id, instance) in pipeline.instances.iter().enumerate() {
        let _ = writeln!(
            text,
            "  s{id}[\"{}<br/><small>{}</small>\"]",
            escape(&instance.label),
            members(pipeline, id)
        );
    }
    for ((from, to), port) in edges(pipeline) {
        let _ = writeln!(text, "  s{from} -->|{port}| s{to}");
    }
    text
}

fn dot(pipeline: &Pipeline) -> String {
    let mut text =
        String::from("digraph pipeline {\n  rankdir=LR;\n  node [shape=box, fontname=\"sans-serif\"];\n");
    for (id, instance) in pipeline.instances.iter().enumerate() {
        let label = instance.label.replace('\\', "\\\\").replace('"', "\\\"");
        let _ = writeln!(text, "  s{id} [label=\"{label}\\n{}\"];", members(pipeline, id));
    }
    for ((from, to), port) in edges(pipeline) {
        let _ = writeln!(text, "  s{from} -> s{to} [label=\"{port}\"];");
    }
    text + "}\n"
}

/// Columns by depth, boxes in file order, straight edges: enough for pipelines of the size that people draw.
fn svg(pipeline: &Pipeline) -> String {
    const WIDTH: usize = 190;
    const HEIGHT: usize = 46;
    const GAP_X: usize = 70;
    const GAP_Y: usize = 18;
    let mut depth = vec![0usize; pipeline.instances.len()];
    let mut rows: BTreeMap<usize, usize> = BTreeMap::new();
    let mut place = Vec::new();
    for (id, instance) in pipeline.instances.iter().enumerate() {
        depth[id] = instance.inputs.iter().map(|edge| depth[edge.from] + 1).max().unwrap_or(0);
        let row = rows.entry(depth[id]).or_insert(0);
        place.push((20 + depth[id] * (WIDTH + GAP_X), 20 + *row * (HEIGHT + GAP_Y)));
        *row += 1;
    }
    let width = 40 + (rows.len().max(1)) * (WIDTH + GAP_X) - GAP_X;
    let height = 40 + rows.values().max().copied().unwrap_or(1) * (HEIGHT + GAP_Y) - GAP_Y;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <defs><marker id=\"a\" viewBox=\"0 0 8 8\" refX=\"8\" refY=\"4\" markerWidth=\"7\" markerHeight=\"7\" orient=\"auto\">\
         <path d=\"M0 0L8 4L0 8z\" fill=\"#667\"/></marker></defs>\n"
    );
    for ((from, to), port) in edges(pipeline) {
        let (x1, y1) = (place[from].0 + WIDTH, place[from].1 + HEIGHT / 2);
        let (x2, y2) = (place[to].0, place[to].1 + HEIGHT / 2);
        let middle = usize::midpoint(x1, x2);
        let _ = writeln!(
            text,
            "<path d=\"M{x1} {y1}C{middle} {y1} {middle} {y2} {x2} {y2}\" fill=\"none\" stroke=\"#667\" marker-end=\"url(#a)\">\
             <title>{}</title></path>",
            escape(&port)
        );
    }
    for (id, instance) in pipeline.instances.iter().enumerate() {
        let (x, y) = place[id];
        let (center, first, second) = (x + WIDTH / 2, y + 19, y + 36);
        let _ = writeln!(
            text,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" rx=\"6\" fill=\"#f4f6fa\" stroke=\"#456\"/>\
             <text x=\"{center}\" y=\"{first}\" text-anchor=\"middle\">{}</text>\
             <text x=\"{center}\" y=\"{second}\" text-anchor=\"middle\" fill=\"#667\" font-size=\"11\">{}</text>",
            escape(&instance.label),
            escape(&members(pipeline, id))
        );
    }
    text + "</svg>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn as_json(pipeline: &Pipeline) -> serde_json::Value {
    let label = |id: usize| pipeline.instances[id].label.clone();
    let stages: Vec<_> = pipeline
        .instances
        .iter()
        .map(|instance| {
            json!({
                "stage": instance.stage, "instance": instance.label, "kind": instance.kind.id(),
                "vars": instance.vars, "members": instance.members,
            })
        })
        .collect();
    let edges: Vec<_> = edges(pipeline)
        .into_iter()
        .map(|((from, to), port)| json!({ "from": label(from), "to": label(to), "port": port }))
        .collect();
    json!({ "pipeline": pipeline.name, "stages": stages, "edges": edges })
}
