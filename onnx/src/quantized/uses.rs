//! Where a weight is used: whether it is the matrix of linear layers, and which way round.

use std::collections::{BTreeMap, HashMap};

use super::activations::Range;
use crate::proto::{GraphProto, NodeProto};

/// The nodes that use each value.
pub(super) struct Uses<'a> {
    graph: &'a GraphProto,
    /// node of the main graph and position among its inputs
    direct: HashMap<&'a str, Vec<(usize, usize)>>,
    /// values that nested graphs use, and outputs of the graph
    elsewhere: HashMap<&'a str, usize>,
}

/// Layers that use a matrix as their weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Linear {
    /// indices of nodes `MatMul` and `Gemm`
    pub(super) nodes: Vec<usize>,
    /// whether the graph's matrix is [inputs, outputs], not [outputs, inputs]
    pub(super) inputs_first: bool,
}

impl<'a> Uses<'a> {
    pub(super) fn of(graph: &'a GraphProto) -> Self {
        let mut uses = Self { graph, direct: HashMap::new(), elsewhere: HashMap::new() };
        for (index, node) in graph.node.iter().enumerate() {
            for (position, input) in node.input.iter().enumerate() {
                uses.direct.entry(input).or_default().push((index, position));
            }
            for nested in nested(node) {
                uses.count(nested);
            }
        }
        for output in graph.output.iter().filter_map(|output| output.name.as_deref()) {
            *uses.elsewhere.entry(output).or_default() += 1;
        }
        uses
    }

    fn count(&mut self, graph: &'a GraphProto) {
        for node in &graph.node {
            for input in &node.input {
                *self.elsewhere.entry(input).or_default() += 1;
            }
            for graph in nested(node) {
                self.count(graph);
            }
        }
    }

    /// Returns the linear layers that a matrix is the weight of, if it is used for nothing else.
    pub(super) fn linear(&self, name: &str) -> Option<Linear> {
        if self.elsewhere.contains_key(name) {
            return None;
        }
        let uses = self.direct.get(name)?;
        let mut inputs_first = None;
        for &(index, position) in uses {
            let first = weight_orientation(&self.graph.node[index]).filter(|_| position == 1)?;
            if *inputs_first.get_or_insert(first) != first {
                return None;
            }
        }
        let nodes = uses.iter().map(|&(index, _)| index).collect();
        Some(Linear { nodes, inputs_first: inputs_first? })
    }

    /// Returns the convolutions that a tensor is the weight of, if it is used for nothing else.
    pub(super) fn convolutions(&self, name: &str) -> Option<Vec<usize>> {
        let uses = self.direct.get(name).filter(|_| !self.elsewhere.contains_key(name))?;
        let is_weight = |&(index, position): &(usize, usize)| {
            let node = &self.graph.node[index];
            position == 1 && node.op_type() == "Conv" && node.domain().is_empty()
        };
        uses.iter().all(is_weight).then(|| uses.iter().map(|&(index, _)| index).collect())
    }
}

impl Uses<'_> {
    /// Returns what the first input of every node lies between, if that is known of all.
    pub(super) fn input_ranges(
        &self,
        nodes: Vec<usize>,
        ranges: &BTreeMap<String, Range>,
    ) -> Option<Vec<(usize, Range)>> {
        let range = |node: usize| Some((node, *ranges.get(self.graph.node[node].input.first()?)?));
        nodes.into_iter().map(range).collect()
    }
}

/// Returns whether the second input of a node is a matrix [inputs, outputs] (or [outputs, inputs]); nothing for other nodes, and for a
/// `Gemm` that does more than `x·W + b`.
fn weight_orientation(node: &NodeProto) -> Option<bool> {
    if !node.domain().is_empty() {
        return None;
    }
    match node.op_type() {
        "MatMul" => Some(true),
        "Gemm" => {
            let attribute = |name: &str| node.attribute.iter().find(|attribute| attribute.name() == name);
            let is_one = |name: &str| attribute(name).is_none_or(|attribute| attribute.f == Some(1.0));
            let is_set = |name: &str| attribute(name).is_some_and(|attribute| attribute.i.unwrap_or(0) != 0);
            (is_one("alpha") && is_one("beta") && !is_set("transA")).then(|| !is_set("transB"))
        }
        _ => None,
    }
}

fn nested(node: &NodeProto) -> impl Iterator<Item = &GraphProto> {
    node.attribute.iter().flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs))
}
