//! What quantization did to every tensor, as text.

use super::{Align, Table, bytes};
use merganser_stages::{QuantizationDiagnostics, TensorError};

/// A line per quantized tensor, and one for all of them.
pub fn quantization(found: &QuantizationDiagnostics) -> String {
    let right = Align::Right;
    let mut table = Table::new(&[
        ("  quantized", Align::Left),
        ("bits", right),
        ("bytes", right),
        ("by calculation", right),
        ("L1 error", right),
        ("L2 error", right),
        ("largest", right),
        ("SNR", right),
        ("zeros", right),
    ]);
    let mut row = |name: &str, tensor: &TensorError| {
        table.row([
            format!("  {name}"),
            format!("{}", (tensor.bits * 100.0).round() / 100.0),
            bytes(tensor.stored_bytes),
            bytes(tensor.theoretical_bytes.ceil() as u64),
            percent(tensor.l1_relative),
            percent(tensor.l2_relative),
            format!("{:.2e}", tensor.max),
            tensor.snr.map_or_else(String::new, |snr| format!("{snr:.1} dB")),
            percent(tensor.zeros),
        ]);
    };
    for tensor in &found.tensors {
        row(&tensor.name, tensor);
    }
    row("all of them", &found.total);
    table.to_string()
}

fn percent(share: f64) -> String {
    format!("{:.2} %", share * 100.0)
}
