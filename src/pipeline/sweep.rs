//! Axes of a sweep, and the choice of one value per axis that an instance stands for.

use super::problems::Problems;
use super::text::{same_value, write_loose};
use indexmap::IndexMap;
use merganser_stages::params::{NodeValue, Problem, Span};
use std::collections::BTreeSet;

/// More instances than this are a mistake in a sweep, and would exhaust memory before anything ran.
pub(super) const MAX_INSTANCES: usize = 10_000;

/// A swept variable.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    pub(super) name: String,
    pub(super) name_span: Span,
    /// At least one, all different.
    pub(super) values: Vec<NodeValue>,
}

/// Per axis of the pipeline, which of its values is meant; `None` on the axes that do not matter.
///
/// INVARIANT: as long as the pipeline has axes. The order of assignments is the order of the cartesian product.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Assignment(Vec<Option<usize>>);

impl Assignment {
    pub(super) fn none(n_axes: usize) -> Self {
        Self(vec![None; n_axes])
    }

    pub(super) fn get(&self, axis: usize) -> Option<usize> {
        self.0[axis]
    }

    pub(super) fn with(mut self, axis: usize, value: Option<usize>) -> Self {
        self.0[axis] = value;
        self
    }

    /// Joins two assignments, unless they disagree on an axis.
    pub(super) fn join(&self, other: &Self) -> Option<Self> {
        let join_axis = |(left, right): (&Option<usize>, &Option<usize>)| match (left, right) {
            (Some(left), Some(right)) if left != right => None,
            (left, right) => Some(left.or(*right)),
        };
        self.0.iter().zip(&other.0).map(join_axis).collect::<Option<Vec<_>>>().map(Self)
    }

    /// Returns the chosen values with the names of their axes, in axis order.
    pub(super) fn values<'a>(&'a self, axes: &'a [Axis]) -> impl Iterator<Item = (&'a str, &'a NodeValue)> {
        let chosen =
            |(axis, value): (&'a Axis, &Option<usize>)| Some((axis.name.as_str(), &axis.values[(*value)?]));
        axes.iter().zip(&self.0).filter_map(chosen)
    }
}

/// Returns every combination of values on the given axes, or nothing (and a problem) when there are too many.
pub(super) fn combinations(
    axes: &[Axis],
    which: &BTreeSet<usize>,
    problems: &mut Problems,
) -> Option<Vec<Assignment>> {
    let mut assignments = vec![Assignment::none(axes.len())];
    for &axis in which {
        let n_values = axes[axis].values.len();
        if assignments.len().saturating_mul(n_values) > MAX_INSTANCES {
            problems.error(too_many(axes));
            return None;
        }
        assignments = assignments
            .iter()
            .flat_map(|assignment| (0..n_values).map(move |value| assignment.clone().with(axis, Some(value))))
            .collect();
    }
    Some(assignments)
}

pub(super) fn too_many(axes: &[Axis]) -> Problem {
    let sizes: Vec<String> =
        axes.iter().map(|axis| format!("`{}` has {}", axis.name, axis.values.len())).collect();
    let mut problem =
        Problem::new("too-large", format!("the sweep makes more than {MAX_INSTANCES} instances"));
    problem.span = axes.first().map(|axis| axis.name_span);
    problem.help(format!("values per axis: {}", sizes.join(", ")))
}

/// Writes an instance's name: `packed[bits=3]`, or the stage's own name if it depends on no axis.
pub(super) fn label<'a>(stage: &str, values: impl Iterator<Item = (&'a str, &'a NodeValue)>) -> String {
    let values: Vec<String> = values.map(|(name, value)| format!("{name}={}", write_loose(value))).collect();
    if values.is_empty() { stage.to_owned() } else { format!("{stage}[{}]", values.join(",")) }
}

/// Returns the value as JSON.
pub(super) fn to_json(value: &NodeValue) -> serde_json::Value {
    match value {
        NodeValue::Bool(value) => (*value).into(),
        NodeValue::Integer(value) => (*value).into(),
        NodeValue::Float(value) => (*value).into(),
        NodeValue::String(value) => value.as_str().into(),
        NodeValue::Array(items) => items.iter().map(|item| to_json(&item.value)).collect(),
        NodeValue::Table(table) => {
            let entries: serde_json::Map<_, _> =
                table.iter().map(|(key, entry)| (key.clone(), to_json(&entry.node.value))).collect();
            entries.into()
        }
    }
}

/// Returns the values with their names, ready for `--json`.
pub(super) fn to_vars<'a>(
    values: impl Iterator<Item = (&'a str, &'a NodeValue)>,
) -> IndexMap<String, serde_json::Value> {
    values.map(|(name, value)| (name.to_owned(), to_json(value))).collect()
}

/// Finds the axis value that a pin means: the same type first (`1`), then the same number (`1.0`).
pub(super) fn find_value(values: &[NodeValue], wanted: &NodeValue) -> Option<usize> {
    values
        .iter()
        .position(|value| value == wanted)
        .or_else(|| values.iter().position(|value| same_value(value, wanted)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axes() -> Vec<Axis> {
        let axis = |name: &str, values: &[i64]| Axis {
            name: name.to_owned(),
            name_span: Span { file: 0, start: 0, end: 1 },
            values: values.iter().map(|&value| NodeValue::Integer(value)).collect(),
        };
        vec![axis("bits", &[2, 3]), axis("seed", &[0, 1, 2])]
    }

    fn labels(which: &[usize]) -> Vec<String> {
        let axes = axes();
        let which = which.iter().copied().collect();
        let assignments = combinations(&axes, &which, &mut Problems::default()).unwrap();
        assert!(assignments.is_sorted());
        assignments.iter().map(|assignment| label("s", assignment.values(&axes))).collect()
    }

    #[test]
    fn makes_the_cartesian_product_in_axis_order() {
        assert_eq!(labels(&[]), ["s"]);
        assert_eq!(labels(&[1]), ["s[seed=0]", "s[seed=1]", "s[seed=2]"]);
        assert_eq!(
            labels(&[0, 1])[..4],
            ["s[bits=2,seed=0]", "s[bits=2,seed=1]", "s[bits=2,seed=2]", "s[bits=3,seed=0]"]
        );
    }

    #[test]
    fn joins_what_agrees() {
        let none = Assignment::none(2);
        let left = none.clone().with(0, Some(1));
        let right = none.clone().with(1, Some(2));
        assert_eq!(left.join(&right), Some(none.clone().with(0, Some(1)).with(1, Some(2))));
        assert_eq!(left.join(&none.with(0, Some(0))), None);
    }

    #[test]
    fn refuses_products_that_would_exhaust_memory() {
        let many = |name: &str| Axis {
            values: (0..200).map(NodeValue::Integer).collect(),
            name: name.into(),
            ..axes()[0].clone()
        };
        let axes = [many("a"), many("b"), many("c"), many("d")];
        let mut problems = Problems::default();
        assert_eq!(combinations(&axes, &(0..4).collect(), &mut problems), None);
        assert_eq!(problems.into_errors()[0].code, "too-large");
    }
}
