//! Coefficients that were tuned, and images that were seen on the way, as text.

use super::{Align, Table};
use merganser_stages::{Adaptation, Seen};

/// By task: the entropy of its answers before and after, and its coefficients over the tensors.
pub fn adaptation(found: &Adaptation) -> String {
    let right = Align::Right;
    let mut table = Table::new(&[
        ("  task", Align::Left),
        ("entropy before", right),
        ("after", right),
        ("coefficients: mean", right),
        ("least", right),
        ("most", right),
    ]);
    let entropy = |step: Option<&Vec<f32>>, task: usize| {
        let value = step.and_then(|step| step.get(task));
        value.map_or_else(String::new, |value| format!("{value:.4}"))
    };
    for (task, name) in found.tasks.iter().enumerate() {
        let values: Vec<f32> =
            found.coefficients.iter().filter_map(|own| own.values.get(task)).copied().collect();
        let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len().max(1) as f64;
        table.row([
            format!("  {name}"),
            entropy(found.entropies.first(), task),
            entropy(found.entropies.last(), task),
            format!("{mean:.4}"),
            format!("{:.4}", values.iter().copied().fold(f32::INFINITY, f32::min)),
            format!("{:.4}", values.iter().copied().fold(f32::NEG_INFINITY, f32::max)),
        ]);
    }
    format!("{table}  after {} steps, on one batch per task each\n", found.entropies.len())
}

/// Which images something was made with.
pub fn seen(found: &Seen) -> String {
    let images = found.images.iter().map(|(name, images)| format!("`{name}` ({})", images.n));
    let validation = found.validation.iter();
    let validation = validation.map(|(name, images)| format!("`{name}` ({} for validation)", images.n));
    let labels = if found.labels { "with" } else { "without" };
    format!(
        "  made with images of {}, {labels} their labels\n",
        images.chain(validation).collect::<Vec<_>>().join(", ")
    )
}
