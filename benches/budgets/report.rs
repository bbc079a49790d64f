//! How figures are taken and shown: medians of interleaved runs, one line per budget.

use crate::Result;

/// A measurement that can be repeated.
pub type Measure<'a> = &'a mut dyn FnMut() -> Result<f64>;

/// Repeats all measurements in turn, so that a busy moment hits all of them, and returns the median of each.
pub fn interleaved<const N: usize>(runs: usize, mut measures: [Measure<'_>; N]) -> Result<[Median; N]> {
    let mut taken: [(Vec<f64>, Vec<f64>); N] = std::array::from_fn(|_| (Vec::new(), Vec::new()));
    for _ in 0..runs {
        for (measure, (seconds, cpu_seconds)) in measures.iter_mut().zip(&mut taken) {
            let before = cpu_seconds_so_far();
            seconds.push(measure()?);
            cpu_seconds.push(cpu_seconds_so_far() - before);
        }
    }
    Ok(taken
        .map(|(seconds, cpu_seconds)| Median { cpu: Median::of(cpu_seconds).value, ..Median::of(seconds) }))
}

/// Processor time of this process and of those it has waited for, in Linux's hundredths of a second; elsewhere 0.
pub fn cpu_seconds_so_far() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The second field, a name in parentheses, may hold anything; utime, stime, cutime and cstime are fields 14 to 17.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    fields.skip(11).take(4).filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// The middle of several figures, with the extremes.
#[derive(Clone, Copy, Debug)]
pub struct Median {
    pub value: f64,
    pub low: f64,
    pub high: f64,
    /// Median processor time where it was taken: all threads together, and less at a busy machine's mercy than time is.
    pub cpu: f64,
}

/// Processor time is counted in steps of 10 ms; of short runs it says nothing.
const SHORTEST_CPU: f64 = 0.1;

impl Median {
    pub fn of(mut figures: Vec<f64>) -> Self {
        figures.sort_by(f64::total_cmp);
        let middle = figures.len() / 2;
        let value = if figures.len().is_multiple_of(2) {
            f64::midpoint(figures[middle - 1], figures[middle])
        } else {
            figures[middle]
        };
        Self { value, low: figures[0], high: figures[figures.len() - 1], cpu: 0.0 }
    }

    /// With the unit `s`.
    pub fn seconds(&self) -> String {
        let text = format!("{:.3} s ({:.3}–{:.3})", self.value, self.low, self.high);
        if self.cpu < SHORTEST_CPU { text } else { format!("{text}, {:.2} s of CPU", self.cpu) }
    }

    /// With the unit `ms`.
    pub fn milliseconds(&self) -> String {
        format!("{:.2} ms ({:.2}–{:.2})", self.value * 1e3, self.low * 1e3, self.high * 1e3)
    }
}

/// What a figure must not exceed, or must reach.
#[derive(Clone, Copy, Debug)]
pub enum Budget {
    AtMost(f64),
    AtLeast(f64),
}

pub fn section(title: &str) {
    println!("\n== {title}");
}

/// One figure without a budget.
pub fn figure(what: &str, value: impl std::fmt::Display) {
    println!("  {what:<58} {value}");
}

/// One figure with its budget. Says whether it is kept; nothing fails.
pub fn budget(what: &str, value: f64, unit: &str, budget: Budget) {
    let (kept, text) = match budget {
        Budget::AtMost(limit) => (value <= limit, format!("at most {limit}{unit}")),
        Budget::AtLeast(limit) => (value >= limit, format!("at least {limit}{unit}")),
    };
    let verdict = if kept { "kept" } else { "MISSED" };
    println!("  {what:<58} {value:.2}{unit}   budget {text}: {verdict}");
}
