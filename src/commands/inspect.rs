//! `merganser inspect`: what a checkpoint file holds, and how two of them differ.
//!
//! Reads files where they lie: no cache, no pipeline, no digest. With `--no-norms` only headers are read, whatever the size.

mod compare;
mod opened;

use super::setup;
use crate::cli::{Global, InspectArgs};
use crate::exit::{ExitCode, Failure, Result};
use crate::report::{Align, Table, number};
pub(super) use compare::reconciled;
use merganser_stages::{NameFilter, NameGlob};
use merganser_tensors::kernels::reduce::Norms;
use merganser_tensors::{TensorInfo, statistics};
pub(super) use opened::Opened;
use opened::Overview;
use serde::Serialize;

pub fn inspect(global: &Global, args: &InspectArgs) -> Result<ExitCode> {
    setup::use_threads(global);
    let options = Options {
        key: args.key.clone(),
        strip_prefix: args.strip_prefix.clone(),
        filter: NameFilter { only: globs(&args.only)?, skip: globs(&args.skip)? },
        norms: !args.no_norms,
    };
    let first = Opened::open(&args.file, &options)?;
    if let Some(second) = &args.other {
        return compare::compare(first, Opened::open(second, &options)?, &options, args.json);
    }
    let report = Report::new(first, &options)?;
    if args.json {
        outln!("{}", serde_json::to_string_pretty(&report).map_err(Failure::failed)?);
    } else {
        out!("{}", report.text());
    }
    Ok(ExitCode::Done)
}

/// What the command line asks for.
#[derive(Default)]
pub(super) struct Options {
    key: Option<String>,
    strip_prefix: Option<String>,
    filter: NameFilter,
    norms: bool,
}

fn globs(patterns: &[String]) -> Result<Vec<NameGlob>> {
    let glob = |pattern: &String| {
        NameGlob::new(pattern)
            .map_err(|error| Failure::user(format!("`{pattern}` is not a glob: {}", error.kind())))
    };
    patterns.iter().map(glob).collect()
}

/// `inspect FILE --json`.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    overview: Overview,
    tensors: Vec<TensorRow>,
}

#[derive(Serialize)]
struct TensorRow {
    #[serde(flatten)]
    info: Described,
    /// What the file calls it, when that is not its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    stored_name: Option<String>,
    bytes: u64,
    #[serde(flatten)]
    norms: Option<NormRow>,
}

#[derive(Serialize)]
struct Described {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
}

impl Described {
    fn new(info: &TensorInfo) -> Self {
        Self { name: info.name.clone(), dtype: info.dtype.name(), shape: info.shape.clone() }
    }
}

#[derive(Serialize)]
struct NormRow {
    l2: f64,
    max_abs: f64,
    non_finite: u64,
}

impl From<Norms> for NormRow {
    fn from(norms: Norms) -> Self {
        Self { l2: norms.l2(), max_abs: norms.max_abs, non_finite: norms.n_non_finite }
    }
}

impl Report {
    fn new(mut opened: Opened, options: &Options) -> Result<Self> {
        let infos = opened.infos();
        let norms = if options.norms {
            let indices: Vec<usize> = (0..infos.len()).collect();
            statistics::norms(&*opened.source()?, &indices).map_err(Failure::user)?
        } else {
            vec![None; infos.len()]
        };
        let rows = infos.iter().zip(norms).map(|(info, norms)| TensorRow {
            info: Described::new(info),
            stored_name: opened.stored_names.remove(&info.name),
            bytes: info.size_bytes(),
            norms: norms.map(NormRow::from),
        });
        let tensors = rows.collect();
        Ok(Self { overview: opened.overview, tensors })
    }

    fn text(&self) -> String {
        let mut text = self.overview.text();
        let norms = || self.tensors.iter().filter_map(|row| row.norms.as_ref());
        let has_norms = norms().next().is_some();
        let is_broken = norms().any(|norms| norms.non_finite > 0);
        let is_renamed = self.tensors.iter().any(|row| row.stored_name.is_some());
        let mut columns = vec![("  tensor", Align::Left), ("dtype", Align::Left), ("shape", Align::Left)];
        if has_norms {
            columns.extend([("L2", Align::Right), ("max |x|", Align::Right)]);
        }
        if is_broken {
            columns.push(("not finite", Align::Right));
        }
        if is_renamed {
            columns.push(("stored as", Align::Left));
        }
        let mut table = Table::new(&columns);
        for row in &self.tensors {
            let info = &row.info;
            let mut cells =
                vec![format!("  {}", info.name), info.dtype.to_owned(), format!("{:?}", info.shape)];
            let cell = |value: fn(&NormRow) -> String| row.norms.as_ref().map_or_else(String::new, value);
            if has_norms {
                cells.extend([cell(|norms| number(norms.l2)), cell(|norms| number(norms.max_abs))]);
            }
            if is_broken {
                cells.push(cell(|norms| norms.non_finite.to_string()));
            }
            if is_renamed {
                cells.push(row.stored_name.clone().unwrap_or_default());
            }
            table.row(cells);
        }
        if !table.is_empty() {
            text += &table.to_string();
        }
        if is_broken {
            let count = norms().filter(|norms| norms.non_finite > 0).count();
            let tensors =
                if count == 1 { "1 tensor has".to_owned() } else { format!("{count} tensors have") };
            text += &format!("{tensors} values that are NaN or infinite; norms leave them out\n");
        }
        text
    }
}
