//! Bits per tensor, chosen so that a budget is used where it does most good.
//!
//! Every tensor is coded at every width, and its error measured (see [`Rounder::error`]); the widths of least total error within a budget
//! of bytes, or of fewest bytes within a budget of error, are a multiple-choice knapsack.

use super::calibrated::Rounder;
use super::choose::Chosen;
use super::knapsack::{self, Choice};
use super::scheme::Setting;
use super::values::Memory;
use crate::calibrate::Calibration;
use crate::job::Notice;
use crate::params::Problem;
use crate::{Job, StageError};
use merganser_tensors::{Bits, TensorSource};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;

/// What the tensors whose widths are chosen may cost together.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Budget {
    /// Bits of codes per element on average, scales aside.
    BitsPerWeight(f64),
    /// Bytes of codes and scales.
    Bytes(u64),
    /// Relative error: of the model's output where sensitivities were measured; else the root mean square over tensors of that of the layer's
    /// output, where its inputs are known, or of the tensor.
    RelativeError(f64),
}

impl Budget {
    /// What is wrong with the number.
    pub(super) fn problem(self) -> Option<Problem> {
        let (key, number) = match self {
            Self::BitsPerWeight(number) => ("bits_per_weight", number),
            Self::RelativeError(number) => ("relative_error", number),
            Self::Bytes(_) => return None,
        };
        (!(number.is_finite() && number > 0.0)).then(|| {
            Problem::new("bad-value", format!("`budget.{key}` must be a positive number, got {number}"))
        })
    }
}

/// A tensor whose width is to be chosen.
pub(super) struct Open {
    /// Position among the outputs.
    pub(super) output: usize,
    /// Position in the source.
    pub(super) tensor: usize,
}

/// A tensor at one width.
struct Coded {
    codes: u64,
    bytes: u64,
    error: f64,
}

/// Sets the widths of some tensors.
pub(super) fn allocate(
    job: &Job<'_>,
    source: &dyn TensorSource,
    open: &[Open],
    settings: &mut [Option<Setting>],
    widths: &[Bits],
    budget: Budget,
    rounder: &Rounder,
) -> Result<(), StageError> {
    // What calibration does not know (norms, biases, embeddings) cannot be weighed against the rest: it is small, and gets most bits.
    let is_known = |open: &Open| {
        let name = &source.tensors()[open.tensor].name;
        rounder.calibration.as_ref().is_none_or(|calibration| calibration.knows(name))
    };
    let measured: Vec<Vec<Coded>> = open
        .par_iter()
        .map(|open| {
            let setting =
                settings[open.output].ok_or_else(|| StageError::Internal("nothing to choose".to_owned()))?;
            let widths = if is_known(open) { widths } else { &widths[widths.len() - 1..] };
            let coded = widths.iter().map(|bits| {
                if (job.cancelled)() {
                    return Err(StageError::Cancelled);
                }
                coded(source, open.tensor, &Setting { bits: *bits, ..setting }, rounder, is_known(open))
            });
            coded.collect()
        })
        .collect::<Result<_, StageError>>()?;
    let n_elements: u64 = open.iter().map(|open| source.tensors()[open.tensor].n_elements() as u64).sum();
    let n_known = open.iter().filter(|open| is_known(open)).count();
    let items = |choice: &dyn Fn(&Coded) -> Choice| -> Vec<Vec<Choice>> {
        measured.iter().map(|coded| coded.iter().map(choice).collect()).collect()
    };
    let squared = !rounder.calibration.as_ref().is_some_and(Calibration::measures_sensitivity);
    // Of an output errors add up; of tensors they are averaged.
    let errors_per_unit = if squared { n_known.max(1) as f64 } else { 1.0 };
    let (items, limit) = match budget {
        Budget::BitsPerWeight(bits) => {
            let of = |coded: &Coded| Choice { weight: coded.codes as f64, value: coded.error };
            (items(&of), bits * n_elements as f64 / 8.0)
        }
        Budget::Bytes(bytes) => {
            let of = |coded: &Coded| Choice { weight: coded.bytes as f64, value: coded.error };
            (items(&of), bytes as f64)
        }
        Budget::RelativeError(error) => {
            let of = |coded: &Coded| Choice { weight: coded.error, value: coded.bytes as f64 };
            (items(&of), error.powi(2) * errors_per_unit)
        }
    };
    let Some(solution) = knapsack::solve(&items, limit) else {
        return Err(out_of_reach(budget, &items, n_elements, errors_per_unit));
    };
    let mut counts: BTreeMap<u8, usize> = BTreeMap::new();
    let (mut codes, mut error) = (0, 0.0);
    for ((open, coded), pick) in open.iter().zip(&measured).zip(&solution.picks) {
        let bits = if is_known(open) { widths[*pick] } else { widths[widths.len() - 1] };
        if let Some(setting) = &mut settings[open.output] {
            setting.bits = bits;
        }
        *counts.entry(bits.get()).or_default() += 1;
        codes += coded[*pick].codes;
        error += coded[*pick].error;
    }
    let mut text = String::from("widths chosen:");
    for (bits, count) in counts {
        let _ = write!(text, " {count} × {bits} bit,");
    }
    let average = 8.0 * codes as f64 / n_elements.max(1) as f64;
    let error = (error / errors_per_unit).sqrt();
    let _ = write!(text, " {average:.3} bits per weight, relative error {error:.4}");
    (job.notify)(Notice::Info(text));
    Ok(())
}

fn coded(
    source: &dyn TensorSource,
    tensor: usize,
    setting: &Setting,
    rounder: &Rounder,
    is_known: bool,
) -> Result<Coded, StageError> {
    let info = &source.tensors()[tensor];
    let (n, encoding) = (info.n_elements(), setting.encoding(info));
    let codes = encoding.codes_len(info.dtype, n);
    let bytes = codes + encoding.scale_bytes(n);
    if !is_known {
        return Ok(Coded { codes, bytes, error: 0.0 });
    }
    let chosen = Chosen::new(source, tensor, setting, &Memory::default())?;
    Ok(Coded { codes, bytes, error: rounder.error(&info.name, &chosen)? })
}

/// A budget that no widths keep.
fn out_of_reach(budget: Budget, items: &[Vec<Choice>], n_elements: u64, errors_per_unit: f64) -> StageError {
    let lightest =
        items.iter().map(|choices| choices.iter().map(|choice| choice.weight).fold(f64::INFINITY, f64::min));
    let least: f64 = lightest.sum();
    let (asked, least) = match budget {
        Budget::BitsPerWeight(bits) => {
            (format!("{bits} bits per weight"), format!("{:.4}", 8.0 * least / n_elements as f64))
        }
        Budget::Bytes(bytes) => (format!("{bytes} bytes"), format!("{least}")),
        Budget::RelativeError(error) => {
            (format!("a relative error of {error}"), format!("{:.2e}", (least / errors_per_unit).sqrt()))
        }
    };
    StageError::input_help(
        format!("no choice of widths keeps the budget of {asked}; the least possible is {least}"),
        "`widths` says which are tried; `select` and `rules` say of which tensors",
    )
}
