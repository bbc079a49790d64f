//! How a model was trained, as text.

use super::{Align, Table, number};
use merganser_stages::{Training, Validation};

/// A line per epoch, and what gradients were like.
pub fn training(found: &Training) -> String {
    let (trained, frozen) = (found.trained_values, found.frozen_values);
    let mut text =
        format!("  trained {trained} values beside {frozen} frozen ones on {} images", found.images);
    if found.validation_images > 0 {
        text += &format!(", validated on {}", found.validation_images);
    }
    text.push('\n');
    let right = Align::Right;
    let mut table = Table::new(&[
        ("  epoch", Align::Left),
        ("steps", right),
        ("loss", right),
        ("validation loss", right),
        ("validation accuracy", right),
    ]);
    let mut row = |epoch: String, steps: u64, loss: Option<f64>, validation: Option<Validation>| {
        table.row([
            epoch,
            steps.to_string(),
            loss.map_or_else(String::new, number),
            validation.map_or_else(String::new, |found| number(found.loss)),
            validation.map_or_else(String::new, |found| format!("{:.2} %", found.accuracy * 100.0)),
        ]);
    };
    if found.initial.is_some() {
        row("  before".to_owned(), 0, None, found.initial);
    }
    for epoch in &found.epochs {
        let mark = if epoch.epoch == found.kept { " (kept)" } else { "" };
        row(format!("  {}{mark}", epoch.epoch), epoch.steps, Some(epoch.loss), epoch.validation);
    }
    text += &table.to_string();
    if found.stopped_early {
        text += "  stopped early: validation did not get better\n";
    }
    let gradients = &found.gradients;
    text += &format!(
        "  gradient norms: mean {}, standard deviation {}, from {} to {}; stability {:.2}\n",
        number(gradients.mean),
        number(gradients.std),
        number(gradients.min),
        number(gradients.max),
        gradients.stability
    );
    if gradients.exploding > 0 {
        text += &format!("  exploding gradients: {} steps with a norm above 100\n", gradients.exploding);
    }
    if gradients.vanishing > 0 {
        text += &format!("  vanishing gradients: {} steps with a norm below 1e-6\n", gradients.vanishing);
    }
    text
}
