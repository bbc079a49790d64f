//! Two checkpoints side by side: tensors that only one has, other shapes and types, and how far values are apart.
//!
//! When the names are those of different libraries, the second checkpoint is compared under the names of the first.

use super::opened::{Opened, Overview};
use super::{Described, Options};
use crate::exit::{ExitCode, Failure, Result};
use crate::report::{Align, Table, number};
use merganser_tensors::manifest::TensorEntry;
use merganser_tensors::statistics::{self, Difference};
use merganser_tensors::{Manifest, TensorInfo, keymap};
use serde::Serialize;
use std::collections::BTreeMap;

pub(super) fn compare(first: Opened, second: Opened, options: &Options, json: bool) -> Result<ExitCode> {
    let report = Comparison::new(first, second, options)?;
    if json {
        outln!("{}", serde_json::to_string_pretty(&report).map_err(Failure::failed)?);
    } else {
        out!("{}", report.text());
    }
    Ok(ExitCode::Done)
}

/// `inspect FILE FILE --json`.
#[derive(Serialize)]
struct Comparison {
    /// Whether both hold the same tensors with the same values and types; absent when values were not read.
    #[serde(skip_serializing_if = "Option::is_none")]
    identical: Option<bool>,
    /// Tensors in both that differ in any way.
    different: usize,
    first: Overview,
    second: Overview,
    /// How the names of the second became those of the first, or why they did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    mapped: Option<String>,
    only_first: Vec<String>,
    only_second: Vec<String>,
    /// Tensors that both have.
    tensors: Vec<Row>,
    #[serde(skip)]
    values_read: bool,
}

/// A tensor of both, as the first has it.
#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    info: Described,
    /// As the second has it, when that is something else.
    #[serde(skip_serializing_if = "Option::is_none")]
    other_dtype: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    other_shape: Option<Vec<usize>>,
    #[serde(flatten)]
    values: Option<Values>,
}

/// How far values are apart.
#[derive(Serialize)]
struct Values {
    different_elements: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    l2: Option<f64>,
    /// Null when only the first is zero.
    #[serde(skip_serializing_if = "Option::is_none")]
    relative_l2: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_abs: Option<f64>,
}

impl Row {
    fn differs(&self) -> bool {
        self.other_dtype.is_some()
            || self.other_shape.is_some()
            || self.values.as_ref().is_some_and(|values| values.different_elements > 0)
    }
}

impl From<Difference> for Values {
    fn from(difference: Difference) -> Self {
        Self {
            different_elements: difference.n_different,
            l2: difference.distance.map(|(distance, _)| distance.l2()),
            relative_l2: difference.relative_l2(),
            max_abs: difference.distance.map(|(distance, _)| distance.max_abs),
        }
    }
}

impl Comparison {
    fn new(first: Opened, second: Opened, options: &Options) -> Result<Self> {
        let (view, mapped) = reconciled(&first, &second)?;
        let view = view.as_ref().unwrap_or(&second.manifest);
        let left = first.infos();
        let right: Vec<TensorInfo> = view.tensors().iter().map(TensorEntry::info).collect();
        let position: BTreeMap<&str, usize> =
            right.iter().enumerate().map(|(index, info)| (info.name.as_str(), index)).collect();
        let common: Vec<(usize, usize)> = left
            .iter()
            .enumerate()
            .filter_map(|(index, info)| Some((index, *position.get(info.name.as_str())?)))
            .collect();
        let comparable: Vec<(usize, usize)> = common
            .iter()
            .copied()
            .filter(|&(a, b)| options.norms && left[a].shape == right[b].shape)
            .collect();
        let mut values: BTreeMap<usize, Values> = BTreeMap::new();
        if !comparable.is_empty() {
            let (one, other) = (first.source()?, second.open_as(view)?);
            let found = statistics::differences(&*one, &*other, &comparable).map_err(Failure::user)?;
            let found = comparable.iter().zip(found);
            values.extend(found.filter_map(|(&(a, _), found)| Some((a, Values::from(found?)))));
        }
        let tensors: Vec<Row> = common
            .iter()
            .map(|&(a, b)| Row {
                info: Described::new(&left[a]),
                other_dtype: (left[a].dtype != right[b].dtype).then(|| right[b].dtype.name()),
                other_shape: (left[a].shape != right[b].shape).then(|| right[b].shape.clone()),
                values: values.remove(&a),
            })
            .collect();
        let missing = |from: &[TensorInfo], in_other: &dyn Fn(&str) -> bool| -> Vec<String> {
            from.iter().map(|info| info.name.clone()).filter(|name| !in_other(name)).collect()
        };
        let only_first = missing(&left, &|name| position.contains_key(name));
        let only_second =
            missing(&right, &|name| left.binary_search_by(|info| info.name.as_str().cmp(name)).is_ok());
        let different = tensors.iter().filter(|row| row.differs()).count();
        let agree = different == 0 && only_first.is_empty() && only_second.is_empty();
        // what was not read is not known to be the same
        let identical = if agree { options.norms.then_some(true) } else { Some(false) };
        let (first, second) = (first.overview, second.overview);
        let values_read = options.norms;
        Ok(Self {
            identical,
            different,
            first,
            second,
            mapped,
            only_first,
            only_second,
            tensors,
            values_read,
        })
    }

    fn text(&self) -> String {
        let mut text = self.first.text() + &self.second.text();
        if let Some(mapped) = &self.mapped {
            text += &format!("{mapped}\n");
        }
        for (file, names) in [(&self.first, &self.only_first), (&self.second, &self.only_second)] {
            if !names.is_empty() {
                text += &format!("only in {}:\n", file.path);
                text.extend(names.iter().map(|name| format!("  {name}\n")));
            }
        }
        let rows: Vec<&Row> = self.tensors.iter().filter(|row| row.differs()).collect();
        if !rows.is_empty() {
            let mut columns =
                vec![("  tensor that differs", Align::Left), ("dtype", Align::Left), ("shape", Align::Left)];
            if self.values_read {
                let right = Align::Right;
                columns.extend([
                    ("elements", right),
                    ("L2", right),
                    ("relative L2", right),
                    ("max |y−x|", right),
                ]);
            }
            let mut table = Table::new(&columns);
            for row in rows {
                table.row(row.cells(self.values_read));
            }
            text += &table.to_string();
        }
        text + &self.verdict()
    }

    fn verdict(&self) -> String {
        let n = self.tensors.len();
        let mut verdict = match (self.different, self.values_read) {
            (0, true) if n == 0 => "no tensor is in both".to_owned(),
            (0, true) if self.identical == Some(true) => format!("identical: {n} tensors"),
            (0, true) => format!("the {n} tensors in both are identical"),
            (0, false) => format!("{n} tensors in both, of the same types and shapes; values were not read"),
            (different, _) => format!("{different} of {n} tensors differ"),
        };
        let (first, second) = (self.only_first.len(), self.only_second.len());
        if first + second > 0 {
            verdict += &format!("; {first} only in the first, {second} only in the second");
        }
        verdict + "\n"
    }
}

impl Row {
    fn cells(&self, values: bool) -> Vec<String> {
        let both = |first: String, second: Option<String>| match second {
            Some(second) => format!("{first} → {second}"),
            None => first,
        };
        let mut cells = vec![
            format!("  {}", self.info.name),
            both(self.info.dtype.to_owned(), self.other_dtype.map(str::to_owned)),
            both(
                format!("{:?}", self.info.shape),
                self.other_shape.as_ref().map(|shape| format!("{shape:?}")),
            ),
        ];
        if values {
            let found = self.values.as_ref();
            let cell = |value: Option<f64>| value.map_or_else(String::new, number);
            cells.push(found.map_or_else(String::new, |values| values.different_elements.to_string()));
            cells.push(cell(found.and_then(|values| values.l2)));
            cells.push(cell(found.and_then(|values| values.relative_l2)));
            cells.push(cell(found.and_then(|values| values.max_abs)));
        }
        cells
    }
}

/// The second checkpoint under the names of the first, when both are the same model with names of different libraries; and what is said
/// about it.
pub(in crate::commands) fn reconciled(
    first: &Opened,
    second: &Opened,
) -> Result<(Option<Manifest>, Option<String>)> {
    match keymap::reconcile(&first.manifest, &second.manifest) {
        Ok(None) => Ok((None, None)),
        Ok(Some(found)) => {
            let view = found.mapping.view_of(second.manifest.clone()).map_err(Failure::user)?;
            // the sentence of a pipeline, where the other side is a base
            let notice =
                found.notice.replace("the base", "the first file").replace("it has", "the second file has");
            Ok((Some(view), Some(notice)))
        }
        Err(problem) => Ok((None, Some(format!("names are compared as they are: {problem}")))),
    }
}
