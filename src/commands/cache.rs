//! `merganser cache`: what is stored.

use super::setup;
use crate::cli::Global;
use crate::exit::{ExitCode, Failure, Result};
use crate::report::{Align, Table, bytes, shorten};
use merganser_cache::Value;
use serde::Serialize;

pub fn ls(global: &Global, json: bool) -> Result<ExitCode> {
    let workspace = setup::open_workspace(global)?;
    let mut rows: Vec<Row> = workspace
        .store
        .list()?
        .into_iter()
        .map(|listed| Row {
            key: listed.key.to_string(),
            kind: kind(&listed.record.preimage.operation),
            outputs: listed
                .record
                .outputs
                .iter()
                .map(|output| output.artifact.to_hex().to_string())
                .collect(),
            bytes: listed.size_bytes,
            complete: listed.complete,
            seconds: listed.record.outputs.first().map_or(0.0, |output| output.seconds),
            created: listed.record.outputs.first().map_or(0, |output| output.created_unix),
        })
        .collect();
    rows.sort_by(|a, b| (a.created, &a.key).cmp(&(b.created, &b.key)));
    if json {
        outln!("{}", serde_json::to_string_pretty(&rows).map_err(Failure::failed)?);
        return Ok(ExitCode::Done);
    }
    let mut table = Table::new(&[
        ("key", Align::Left),
        ("kind", Align::Left),
        ("bytes", Align::Right),
        ("seconds", Align::Right),
        ("created (UTC)", Align::Left),
    ]);
    for row in &rows {
        table.row([
            shorten(&row.key),
            row.kind.clone(),
            bytes(row.bytes),
            format!("{:.2}", row.seconds),
            utc(row.created),
        ]);
    }
    let usage = workspace.store.disk_usage()?;
    out!("{table}");
    outln!(
        "\n{} outputs, {} on disk in {}",
        rows.len(),
        bytes(usage.total_bytes()),
        workspace.store.root().display()
    );
    Ok(ExitCode::Done)
}

#[derive(Serialize)]
struct Row {
    key: String,
    kind: String,
    /// Digests of all distinct artifacts seen, the newest first.
    outputs: Vec<String>,
    bytes: u64,
    /// Whether everything that the newest output needs is there.
    complete: bool,
    seconds: f64,
    /// Unix time in seconds.
    created: u64,
}

fn kind(operation: &Value) -> String {
    let Value::Map(fields) = operation else { return String::new() };
    match fields.get("kind") {
        Some(Value::Text(kind)) => kind.clone(),
        _ => String::new(),
    }
}

fn utc(seconds: u64) -> String {
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| jiff::Timestamp::from_second(seconds).ok())
        .map(|time| time.strftime("%Y-%m-%d %H:%M:%S").to_string())
        .unwrap_or_default()
}
