//! Everything that is drawn: progress from events, tables, sizes. Nothing here computes a result.

mod adaptation;
mod bars;
mod diagnostics;
mod plain;
mod quantization;
mod reductions;
pub mod scores;
mod size;
mod storage;
mod table;
mod training;

pub use adaptation::{adaptation, seen};
pub use diagnostics::diagnostics;
pub use quantization::quantization;
pub use reductions::reductions;
pub use size::{bytes, number, ratio, shorten};
pub use storage::{kept_bytes, own_files, stored};
pub use table::{Align, Table};
pub use training::training;

use crate::engine::Reporter;
use crate::pipeline::RenderStyle;
use std::io::IsTerminal;
use std::sync::Arc;

/// Bars on a terminal, plain lines elsewhere.
pub fn progress_reporter() -> Arc<dyn Reporter + Send> {
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    if std::io::stderr().is_terminal() && !dumb {
        Arc::new(bars::Bars::new())
    } else {
        Arc::new(plain::Plain::default())
    }
}

/// How mistakes are shown on this terminal.
pub fn problem_style() -> RenderStyle {
    let color =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let width = usize::from(console::Term::stderr().size().1).clamp(40, 160);
    let unicode = std::io::stderr().is_terminal();
    RenderStyle { color, unicode, width }
}
