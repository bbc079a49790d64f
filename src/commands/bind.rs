//! `merganser bind`: which tensor of a checkpoint is which constant of an ONNX export, and what stands in the way of another model's.

use super::inspect::{Opened, Options, reconciled};
use super::setup;
use crate::cli::{BindArgs, Global};
use crate::exit::{ExitCode, Failure, Result};
use crate::report::{Align, Table};
use merganser_onnx::{Binding, BoundTensor, Constant, ConstantKind, Graph, Place, Refusal, RowRun, Source};
use merganser_stages::Weights;
use serde::Serialize;
use std::path::Path;

pub fn bind(global: &Global, args: &BindArgs) -> Result<ExitCode> {
    setup::use_threads(global);
    if !args.graph.exists() {
        return Err(Failure::user(format!("`{}` does not exist", args.graph.display())));
    }
    let graph = Graph::load(&args.graph).map_err(Failure::user)?;
    let opened = Opened::open(&args.origin, &Options::default())?;
    let origin = Weights::new(opened.source()?);
    let binding = Binding::find(&graph, &origin).map_err(Failure::user)?;
    let report = match &args.model {
        None => Report::new(args, &binding, None, &binding.check_origin()),
        Some(path) => {
            let other = Opened::open(path, &Options::default())?;
            let (view, mapped) = reconciled(&opened, &other)?;
            let model = Weights::new(match &view {
                Some(view) => other.open_as(view)?,
                None => other.source()?,
            });
            let refusals = binding.check(&model, &origin).map_err(|error| unreadable(path, &error))?;
            Report::new(args, &binding, mapped, &refusals)
        }
    };
    if args.json {
        outln!("{}", serde_json::to_string_pretty(&report).map_err(Failure::failed)?);
    } else {
        out!("{}", report.text());
    }
    Ok(if report.binds { ExitCode::Done } else { ExitCode::StageFailed })
}

fn unreadable(path: &Path, error: &dyn std::error::Error) -> Failure {
    let mut message = format!("`{}`: {error}", path.display());
    let mut cause = error.source();
    while let Some(inner) = cause {
        message += &format!(": {inner}");
        cause = inner.source();
    }
    Failure::user(message)
}

/// `bind --json`.
#[derive(Serialize)]
struct Report {
    graph: String,
    origin: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    /// Whether MODEL (without one: every model of the origin's names and shapes) can be run in the graph.
    binds: bool,
    /// The share of the graph's float values that a model replaces; scalars and masks count on neither side.
    coverage: f64,
    /// How the names of MODEL became those of the origin, or why they did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    mapped: Option<String>,
    tensors: Vec<BoundRow>,
    constants: Vec<ConstantRow>,
    /// Tensors of the origin that the graph was computed from (or may have been) beyond what is injected: a model must have them unchanged.
    fixed: Vec<String>,
    /// Tensors of the origin that the graph does not use.
    unused: Vec<String>,
    refusals: Vec<String>,
}

/// A constant of the graph that takes a model's values.
#[derive(Serialize)]
struct BoundRow {
    /// What the graph calls it.
    name: String,
    shape: Vec<usize>,
    element: String,
    place: Place,
    /// The tensors that it is made of.
    from: Vec<String>,
    how: String,
    /// Runs of rows, where it is put together from some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rows: Vec<RowRun>,
    /// Tensors that were equal to it in the origin and have to be in a model.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    merged: Vec<String>,
}

/// A float constant that stays as it is.
#[derive(Serialize)]
struct ConstantRow {
    name: String,
    shape: Vec<usize>,
    kind: ConstantKind,
    /// Tensors that it was computed from, or may have been.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    from: Vec<String>,
}

impl Report {
    fn new(args: &BindArgs, binding: &Binding, mapped: Option<String>, refusals: &[Refusal]) -> Self {
        let fixed: Vec<String> = binding.fixed_tensors().into_iter().map(str::to_owned).collect();
        // Of a model it is known whether it differs in them; without one, some model will.
        let binds = refusals.is_empty() && (args.model.is_some() || fixed.is_empty());
        Self {
            graph: args.graph.display().to_string(),
            origin: args.origin.display().to_string(),
            model: args.model.as_ref().map(|path| path.display().to_string()),
            binds,
            coverage: binding.coverage(),
            mapped,
            tensors: binding.tensors.iter().map(BoundRow::new).collect(),
            constants: binding.constants.iter().map(ConstantRow::new).collect(),
            fixed,
            unused: binding.unused.clone(),
            refusals: refusals.iter().map(ToString::to_string).collect(),
        }
    }

    fn text(&self) -> String {
        let mut text = format!("{}\n  origin  {}\n", self.graph, self.origin);
        if let Some(model) = &self.model {
            text += &format!("  model   {model}\n");
        }
        if let Some(mapped) = &self.mapped {
            text += &format!("  names   {mapped}\n");
        }
        if !self.tensors.is_empty() {
            text += &self.tensor_table().to_string();
        }
        // Scalars, masks and grids are no weights; `--json` lists them.
        let kept: Vec<&ConstantRow> =
            self.constants.iter().filter(|constant| !constant.from.is_empty()).collect();
        if !kept.is_empty() {
            let mut table = Table::new(&[
                ("  kept as it is", Align::Left),
                ("shape", Align::Left),
                ("what it is", Align::Left),
                ("may be made of", Align::Left),
            ]);
            for constant in kept {
                table.row([
                    format!("  {}", constant.name),
                    format!("{:?}", constant.shape),
                    kind_in_words(constant.kind).to_owned(),
                    some(&constant.from),
                ]);
            }
            text += &table.to_string();
        }
        text += &format!(
            "{} constants take the values of {} tensors; {} tensors are not in this graph{}\n",
            self.tensors.len(),
            self.sources(),
            self.unused.len(),
            if self.unused.is_empty() { String::new() } else { format!(": {}", some(&self.unused)) },
        );
        for refusal in &self.refusals {
            text += &format!("refused: {refusal}\n");
        }
        text += &match (self.binds, &self.model) {
            (true, Some(_)) => "this model can be run in this graph\n".to_owned(),
            (true, None) => {
                "every model with the names and shapes of the origin can be run in this graph\n".to_owned()
            }
            (false, None) if self.refusals.is_empty() => {
                format!("only models that leave {} as they are can be run in this graph\n", some(&self.fixed))
            }
            (false, _) => "this cannot be run in this graph\n".to_owned(),
        };
        text
    }

    fn tensor_table(&self) -> Table {
        let mut table = Table::new(&[
            ("  constant", Align::Left),
            ("type", Align::Left),
            ("shape", Align::Left),
            ("how", Align::Left),
            ("tensor", Align::Left),
        ]);
        for row in &self.tensors {
            let mut from = if row.rows.is_empty() {
                row.from.join(", ")
            } else {
                let runs = row
                    .rows
                    .iter()
                    .map(|run| format!("{}[{}..{}]", run.tensor, run.first_row, run.first_row + run.n_rows));
                some(&runs.collect::<Vec<_>>())
            };
            if !row.merged.is_empty() {
                from += &format!(" = {}", some(&row.merged));
            }
            table.row([
                format!("  {}", row.name),
                row.element.clone(),
                format!("{:?}", row.shape),
                row.how.clone(),
                from,
            ]);
        }
        table
    }

    /// Tensors that are in the graph.
    fn sources(&self) -> usize {
        let mut names: Vec<&String> =
            self.tensors.iter().flat_map(|row| row.from.iter().chain(&row.merged)).collect();
        names.sort_unstable();
        names.dedup();
        names.len()
    }
}

impl BoundRow {
    fn new(bound: &BoundTensor) -> Self {
        let (how, rows) = match &bound.source {
            Source::Tensor { how, .. } => (how.to_string(), Vec::new()),
            Source::Rows { runs, transposed: false } => ("rows".to_owned(), runs.clone()),
            Source::Rows { runs, transposed: true } => ("rows, transposed".to_owned(), runs.clone()),
        };
        Self {
            name: bound.name.clone(),
            shape: bound.shape.clone(),
            element: bound.element.to_string(),
            place: bound.place,
            from: bound.source.tensors().into_iter().map(str::to_owned).collect(),
            how,
            rows,
            merged: bound.merged.clone(),
        }
    }
}

impl ConstantRow {
    fn new(constant: &Constant) -> Self {
        Self {
            name: constant.name.clone(),
            shape: constant.shape.clone(),
            kind: constant.kind,
            from: constant.sources.clone(),
        }
    }
}

fn kind_in_words(kind: ConstantKind) -> &'static str {
    match kind {
        ConstantKind::Small => "a few numbers",
        ConstantKind::CausalMask => "a causal mask",
        ConstantKind::CoordinateGrid => "a grid of coordinates",
        ConstantKind::Uniform => "one value",
        ConstantKind::Computed => "computed by the exporter",
        ConstantKind::Unexplained => "of unknown origin",
        ConstantKind::Opaque => "quantized or sparse",
        ConstantKind::Different => "of another checkpoint",
    }
}

/// The first few of many names.
fn some(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
