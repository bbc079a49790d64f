//! What a progressive reduction of widths did, as text.

use super::{Align, Table, number};
use merganser_stages::{BitReductions, EpochWidths};

/// Contributions to the loss that are told by epoch.
const SHOWN: usize = 3;

/// A line per epoch, one per attempt, and the widths that layers ended with.
pub fn reductions(found: &BitReductions) -> String {
    let right = Align::Right;
    let mut epochs = Table::new(&[
        ("  epoch", right),
        ("loss", right),
        ("candidates", right),
        ("accepted", right),
        ("mean increase", right),
        ("bits per layer", right),
        ("bits per weight", right),
        ("most of the loss", Align::Left),
    ]);
    let mut attempts = Table::new(&[
        ("  epoch", right),
        ("layer", Align::Left),
        ("bits", Align::Left),
        ("loss", right),
        ("increase", right),
        ("", Align::Left),
    ]);
    for epoch in &found.epochs {
        epochs.row(epoch_row(epoch));
        for attempt in epoch.reduction.iter().flat_map(|reduction| &reduction.attempts) {
            attempts.row([
                format!("  {}", epoch.epoch),
                attempt.layer.clone(),
                format!("{} to {}", attempt.from, attempt.to),
                attempt.loss.map_or_else(|| "not a number".to_owned(), number),
                attempt.increase.map_or_else(String::new, percent),
                if attempt.accepted { "accepted" } else { "rolled back" }.to_owned(),
            ]);
        }
    }
    let mut layers = Table::new(&[("  layer", Align::Left), ("bits", right), ("weights", right)]);
    for layer in &found.layers {
        layers.row([format!("  {}", layer.name), layer.bits.to_string(), layer.weights.to_string()]);
    }
    let mut text = epochs.to_string();
    if !attempts.is_empty() {
        text += &attempts.to_string();
    }
    text += &layers.to_string();
    if !found.activations.is_empty() {
        let mut activations = Table::new(&[
            ("  activation", Align::Left),
            ("bits", right),
            ("step", right),
            ("of", Align::Left),
        ]);
        for activation in &found.activations {
            activations.row([
                format!("  {}", activation.value),
                activation.bits.to_string(),
                number(f64::from(activation.step)),
                activation.layers.join(", "),
            ]);
        }
        text += &activations.to_string();
    }
    text + &format!(
        "  {:.2} bits per layer, {:.2} per weight of these layers; loss {}\n",
        found.average_bits,
        found.bits_per_weight,
        number(found.loss)
    )
}

fn epoch_row(epoch: &EpochWidths) -> [String; 8] {
    let reduction = epoch.reduction.as_ref();
    let attempts = reduction.map(|reduction| reduction.attempts.len()).unwrap_or_default();
    let accepted = reduction.map(|reduction| reduction.attempts.iter().filter(|a| a.accepted).count());
    let mut shares: Vec<(&String, f64)> = epoch
        .contributions
        .iter()
        .map(|(name, part)| (name, if epoch.loss > 0.0 { part / epoch.loss } else { 0.0 }))
        .collect();
    shares.sort_by(|a, b| b.1.total_cmp(&a.1));
    let most: Vec<String> =
        shares.iter().take(SHOWN).map(|(name, share)| format!("{name} {}", percent(*share))).collect();
    [
        format!("  {}", epoch.epoch),
        number(epoch.loss),
        reduction.map_or_else(String::new, |reduction| reduction.candidates.len().to_string()),
        accepted.map_or_else(String::new, |accepted| format!("{accepted} of {attempts}")),
        reduction.and_then(|reduction| reduction.mean_increase).map_or_else(String::new, percent),
        format!("{:.2}", epoch.average_bits),
        format!("{:.2}", epoch.bits_per_weight),
        most.join(", "),
    ]
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}
