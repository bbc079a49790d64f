//! Whether a model's tensors can take the places of the origin's.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::{Binding, ConstantKind};
use crate::tensor::{FloatType, Weights, WeightsError};

/// One reason why a graph cannot be run with a model; every message names the tensors.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("no tensor of the origin was found in the graph: was it exported from another checkpoint?")]
    NothingBound,
    #[error(
        "the graph's `{graph_tensor}` has other values than the origin's `{tensor}`: the graph was exported from another checkpoint"
    )]
    DifferentOrigin { tensor: String, graph_tensor: String },
    #[error("the model has no tensor `{tensor}`, which the graph's `{graph_tensor}` is made of")]
    Missing { tensor: String, graph_tensor: String },
    #[error("tensor `{tensor}` has shape {actual:?}, the origin has {expected:?}")]
    WrongShape { tensor: String, expected: Vec<usize>, actual: Vec<usize> },
    #[error(
        "tensor `{tensor}` differs from the origin, but the exporter computed constants from it (or may have): {}",
        list(.constants)
    )]
    Computed { tensor: String, constants: Vec<String> },
    #[error("tensors {} differ, but the exporter merged them into the graph's `{graph_tensor}`", list(.tensors))]
    Merged { tensors: Vec<String>, graph_tensor: String },
}

impl Binding {
    /// Returns every reason why `model` cannot be run in this graph; none means that it can.
    ///
    /// Tensors are compared with the origin only where the graph may hold them in a form that is not replaced.
    pub fn check(&self, model: &dyn Weights, origin: &dyn Weights) -> Result<Vec<Refusal>, WeightsError> {
        let mut refusals = self.check_origin();
        let mut shapes = BTreeMap::new();
        for bound in &self.tensors {
            for tensor in bound.source.tensors().into_iter().chain(bound.merged.iter().map(String::as_str)) {
                shapes.entry(tensor).or_insert_with(|| self.check_shape(model, tensor, &bound.name));
            }
        }
        refusals.extend(shapes.values().flatten().cloned());
        let readable = |tensor: &str| matches!(shapes.get(tensor), Some(None));
        let merged = self
            .tensors
            .par_iter()
            .filter(|t| !t.merged.is_empty())
            .map(|bound| {
                let mut tensors = bound.source.tensors();
                tensors.extend(bound.merged.iter().map(String::as_str));
                tensors.retain(|t| readable(t));
                let differ = differing(model, &tensors, bound.element)?;
                Ok(differ.map(|tensors| Refusal::Merged { tensors, graph_tensor: bound.name.clone() }))
            })
            .collect::<Result<Vec<_>, WeightsError>>()?;
        refusals.extend(merged.into_iter().flatten());
        refusals.extend(self.check_fixed(model, origin)?);
        Ok(refusals)
    }

    /// Returns what already rules out the origin itself.
    pub fn check_origin(&self) -> Vec<Refusal> {
        let different = self.constants.iter().filter(|c| c.kind == ConstantKind::Different).flat_map(|c| {
            c.sources
                .iter()
                .map(|s| Refusal::DifferentOrigin { tensor: s.clone(), graph_tensor: c.name.clone() })
        });
        let nothing = self.tensors.is_empty().then_some(Refusal::NothingBound);
        nothing.into_iter().chain(different).chain(self.look_alikes()).collect()
    }

    /// Finds tensors of the origin that are nowhere in the graph although a constant of unknown origin has their shape, or that shape
    /// transposed: exporters rename weights, but they do not change values. A graph of another checkpoint would run with its own weights.
    fn look_alikes(&self) -> impl Iterator<Item = Refusal> {
        let unexplained =
            self.constants.iter().filter(|c| c.kind == ConstantKind::Unexplained && c.shape.len() >= 2);
        unexplained.filter_map(|constant| {
            let transposed: Vec<usize> = constant.shape.iter().rev().copied().collect();
            let alike = constant.sources.iter().find(|source| {
                let shape = self.origin_shapes.get(*source);
                shape.is_some_and(|shape| *shape == constant.shape || *shape == transposed)
            })?;
            Some(Refusal::DifferentOrigin { tensor: alike.clone(), graph_tensor: constant.name.clone() })
        })
    }

    fn check_shape(&self, model: &dyn Weights, tensor: &str, graph_tensor: &str) -> Option<Refusal> {
        let expected = self.origin_shapes.get(tensor)?;
        match model.shape(tensor) {
            None => {
                Some(Refusal::Missing { tensor: tensor.to_owned(), graph_tensor: graph_tensor.to_owned() })
            }
            Some(actual) if actual != *expected => {
                Some(Refusal::WrongShape { tensor: tensor.to_owned(), expected: expected.clone(), actual })
            }
            Some(_) => None,
        }
    }

    fn check_fixed(&self, model: &dyn Weights, origin: &dyn Weights) -> Result<Vec<Refusal>, WeightsError> {
        let mut inside: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for constant in self.constants.iter().filter(|c| c.kind != ConstantKind::Different) {
            for source in &constant.sources {
                inside.entry(source).or_default().push(constant.name.clone());
            }
        }
        let refusals = inside
            .into_par_iter()
            .map(|(tensor, constants)| {
                let unchanged = model.shape(tensor) == origin.shape(tensor)
                    && same_bits(&model.values(tensor)?, &origin.values(tensor)?);
                Ok((!unchanged).then(|| Refusal::Computed { tensor: tensor.to_owned(), constants }))
            })
            .collect::<Result<Vec<_>, WeightsError>>()?;
        Ok(refusals.into_iter().flatten().collect())
    }
}

/// Returns the tensors, if they are not all equal in the precision of the graph.
fn differing(
    model: &dyn Weights,
    tensors: &[&str],
    element: FloatType,
) -> Result<Option<Vec<String>>, WeightsError> {
    let Some((first, rest)) = tensors.split_first() else { return Ok(None) };
    let read = |name: &str| -> Result<Vec<f32>, WeightsError> {
        let mut values = model.values(name)?;
        element.round(&mut values);
        Ok(values)
    };
    let expected = read(first)?;
    let mut differ = Vec::new();
    for name in rest {
        if !same_bits(&expected, &read(name)?) {
            differ.push((*name).to_owned());
        }
    }
    if !differ.is_empty() {
        differ.insert(0, (*first).to_owned());
    }
    Ok((!differ.is_empty()).then_some(differ))
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

fn list(names: &[String]) -> String {
    const MOST: usize = 8;
    let text = names.iter().take(MOST).map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(MOST) {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}
