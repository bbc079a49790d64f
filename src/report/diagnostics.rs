//! How good an artifact made of factors is, as text.

use super::{Align, Table, bytes, ratio};
use merganser_stages::{Diagnostics, MergedDiagnostics, TaskDiagnostics};

/// Totals by task, distances from simpler merges, and a line per parameter.
pub fn diagnostics(found: &Diagnostics) -> String {
    let mut text = String::new();
    if !found.weights.is_empty() {
        let weights: Vec<String> =
            found.weights.iter().map(|weight| format!("{} {:.4}", weight.task, weight.weight)).collect();
        text += &format!("  weights: {}\n", weights.join(", "));
    }
    if !found.totals.tasks.is_empty() {
        text += &tasks(&found.totals.tasks);
    }
    if let Some(merged) = &found.totals.merged {
        text += &distances(merged);
    }
    let right = Align::Right;
    let mut table = Table::new(&[
        ("  parameter", Align::Left),
        ("region", Align::Left),
        ("entries", right),
        ("rank", right),
        ("energy kept", right),
        ("worst error", right),
    ]);
    for parameter in &found.parameters {
        let worst = parameter.tasks.iter().map(|task| task.relative).fold(0.0, f64::max);
        for (index, region) in parameter.regions.iter().enumerate() {
            let first = |text: String| if index == 0 { text } else { String::new() };
            table.row([
                first(format!("  {}", parameter.name)),
                region.region.clone(),
                region.n_entries.to_string(),
                format!("{} of {}", region.rank, region.n_directions),
                percent(region.energy_retained),
                first(percent(worst)),
            ]);
        }
    }
    text += &table.to_string();
    let coefficients: Vec<String> = found
        .histogram
        .iter()
        .map(|bin| format!("1e{}: {} high, {} low", bin.exponent, bin.high, bin.low))
        .collect();
    if !coefficients.is_empty() {
        text += &format!("  coefficients by magnitude: {}\n", coefficients.join("; "));
    }
    let totals = &found.totals;
    let shrunk = ratio(totals.plain_bytes as f64 / (totals.stored_bytes as f64).max(1.0));
    text + &format!(
        "  {} of task vectors from {} of factors, {shrunk}\n",
        bytes(totals.plain_bytes),
        bytes(totals.stored_bytes)
    )
}

fn tasks(tasks: &[TaskDiagnostics]) -> String {
    let right = Align::Right;
    let mut table = Table::new(&[
        ("  task", Align::Left),
        ("error (L2)", right),
        ("relative", right),
        ("largest", right),
        ("mean", right),
    ]);
    let small = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2e}"));
    for task in tasks {
        table.row([
            format!("  {}", task.task),
            format!("{:.4}", task.absolute),
            percent(task.relative),
            small(task.max),
            small(task.mean_absolute),
        ]);
    }
    table.to_string()
}

fn distances(merged: &MergedDiagnostics) -> String {
    let share = |part: f64, whole: f64| if part == 0.0 { percent(0.0) } else { percent(part / whole) };
    format!(
        "  the difference from the base is {:.4} long; it is {} from the average of the task vectors and {} from 0.3 times their sum\n",
        merged.norm,
        share(merged.from_average, merged.average_norm),
        share(merged.from_task_arithmetic, merged.task_arithmetic_norm)
    )
}

fn percent(share: f64) -> String {
    format!("{:.2} %", share * 100.0)
}
