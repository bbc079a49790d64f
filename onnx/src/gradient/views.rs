//! Products that read their factors where they lie, and write what they give where it is wanted.
//!
//! Attention cuts queries, keys and values out of one tensor, turns them into matrices per head, scales them, and turns what comes out back: all of
//! this only moves numbers. A product takes a factor as a [`View`] instead, a scale as its `alpha`, and puts the matrices of heads beside each
//! other. What nobody needs any more is removed by whoever calls this.

use std::collections::HashMap;

use super::tape::{float_attribute, int_attribute, ints_attribute, signed};
use crate::kernels::{DOMAIN, View};
use crate::proto::{AttributeProto, NodeProto};

/// What is known about the values of a graph.
pub(super) struct Known<'a> {
    pub(super) shapes: &'a HashMap<String, Vec<usize>>,
    /// constants of one element
    pub(super) numbers: &'a HashMap<String, f32>,
    /// the graph's outputs, which have to stay
    pub(super) is_output: &'a dyn Fn(&str) -> bool,
}

/// Lets products take views of their factors.
pub(super) fn fold_factors(nodes: &mut [NodeProto], known: &Known<'_>) {
    let graph = Graph::new(nodes, known);
    let folded: Vec<_> = products(nodes).filter_map(|i| Some((i, with_views(&nodes[i], &graph)?))).collect();
    for (i, node) in folded {
        nodes[i] = node;
    }
}

/// Lets products give what the nodes behind them make of it.
pub(super) fn fold_results(nodes: &mut [NodeProto], known: &Known<'_>) {
    let graph = Graph::new(nodes, known);
    let folded: Vec<_> = products(nodes).filter_map(|i| Some((i, in_layout(&nodes[i], &graph)?))).collect();
    for (i, (node, last)) in folded {
        nodes[i] = node;
        // Its output is computed by the product now; a node that gives nothing is one that nobody needs.
        nodes[last].output.clear();
    }
}

fn products(nodes: &[NodeProto]) -> impl Iterator<Item = usize> {
    (0..nodes.len()).filter(|&i| nodes[i].domain() == DOMAIN && nodes[i].op_type() == "Product")
}

/// Returns a product with views of its factors.
fn with_views(product: &NodeProto, graph: &Graph<'_>) -> Option<NodeProto> {
    let mut node = product.clone();
    let ranks = [0, 1].map(|side| graph.known.shapes.get(&node.input[side]).map(Vec::len));
    if ranks[0] != ranks[1] {
        // A stack times one matrix needs rows that follow each other.
        return None;
    }
    let mut alpha = take_float(&mut node, "alpha").unwrap_or(1.0);
    for (side, attribute) in ["viewA", "viewB"].into_iter().enumerate() {
        let (source, view, factor) = graph.trace(&product.input[side])?;
        if source != product.input[side] && view.has_matrices() {
            alpha *= factor;
            node.attribute.push(ints_attribute(attribute, &view.to_attribute()));
            source.clone_into(&mut node.input[side]);
        }
    }
    node.attribute.push(float_attribute("alpha", alpha));
    Some(node)
}

/// Returns a product that gives what the last of the nodes behind it gives, and that node.
fn in_layout(product: &NodeProto, graph: &Graph<'_>) -> Option<(NodeProto, usize)> {
    let mut node = product.clone();
    let shape = graph.known.shapes.get(node.output.first()?)?;
    let has_bias = node.input.get(2).is_some_and(|bias| !bias.is_empty());
    let alpha = take_float(&mut node, "alpha").unwrap_or(1.0);
    let mut behind = Behind {
        value: product.output.first()?,
        order: (0..shape.len()).filter(|&axis| shape[axis] != 1).collect(),
        factor: alpha,
    };
    let mut best = None;
    while let Some((user, next)) = behind.next(graph, has_bias) {
        if let Some(layout) = layout(shape, &next.order, has_bias, is_stacked(&node, graph)) {
            best = Some((user, next.factor, layout));
        }
        behind = next;
    }
    let (last, alpha, layout) = best?;
    let output = graph.nodes[last].output.first()?;
    node.attribute.push(float_attribute("alpha", alpha));
    node.attribute.push(ints_attribute("shape", &signed(graph.known.shapes.get(output)?)));
    if matches!(layout, Layout::Heads | Layout::TurnedHeads) {
        node.attribute.push(int_attribute("heads", *shape.get(shape.len().checked_sub(3)?)? as i64));
    }
    if matches!(layout, Layout::Turned | Layout::TurnedHeads) {
        swap_factors(&mut node);
    }
    node.output[0].clone_from(output);
    Some((node, last))
}

/// A value that is the result of a product with its axes in another order, times a number.
struct Behind<'a> {
    value: &'a str,
    /// Axes of the product in the order in which they lie; those of length 1 lie nowhere.
    order: Vec<usize>,
    factor: f32,
}

impl<'a> Behind<'a> {
    /// Goes over the only node that uses the value, if it only moves or scales it.
    fn next(&self, graph: &Graph<'a>, has_bias: bool) -> Option<(usize, Self)> {
        let user = graph.only_user(self.value)?;
        let node = &graph.nodes[user];
        let shape = graph.known.shapes.get(self.value)?;
        let value = node.output.first()?.as_str();
        let mut next = Self { value, order: self.order.clone(), factor: self.factor };
        match (node.domain(), node.op_type()) {
            ("", "Mul") if !has_bias => next.factor *= graph.factor(node, self.value)?,
            ("", "Transpose") => {
                // Which axis of the product an axis of the value is.
                let mut own = self.order.iter().copied();
                let axes: Vec<Option<usize>> =
                    shape.iter().map(|&n| if n == 1 { None } else { own.next() }).collect();
                let turned =
                    permutation(node)?.into_iter().filter_map(|axis| axes.get(axis).copied().flatten());
                next.order = turned.collect();
            }
            ("", "Reshape" | "Squeeze" | "Unsqueeze") => {
                let long = |shape: &[usize]| shape.iter().copied().filter(|&n| n != 1).collect::<Vec<_>>();
                if long(shape) != long(graph.known.shapes.get(value)?) {
                    return None;
                }
            }
            _ => return None,
        }
        Some((user, next))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    Plain,
    /// The transposed product.
    Turned,
    /// Stacks, rows, heads, columns.
    Heads,
    /// The same of the transposed product.
    TurnedHeads,
}

/// Returns how a product is written so that its axes lie in this order.
fn layout(shape: &[usize], order: &[usize], has_bias: bool, is_stacked: bool) -> Option<Layout> {
    let rank = shape.len();
    let is = |axes: Vec<usize>| axes.into_iter().filter(|&axis| shape[axis] != 1).eq(order.iter().copied());
    if is((0..rank).collect()) {
        return Some(Layout::Plain);
    }
    if is_stacked {
        return None;
    }
    if rank >= 2 && !has_bias && is((0..rank - 2).chain([rank - 1, rank - 2]).collect()) {
        return Some(Layout::Turned);
    }
    let with = |tail: [usize; 3]| (0..rank - 3).chain(tail.map(|back| rank - back)).collect();
    if rank < 3 {
        return None;
    }
    if is(with([2, 3, 1])) {
        return Some(Layout::Heads);
    }
    (!has_bias && is(with([1, 3, 2]))).then_some(Layout::TurnedHeads)
}

/// Whether a product is one of a stack with one matrix, whose factors cannot be swapped, and which is computed as one product of matrices.
fn is_stacked(product: &NodeProto, graph: &Graph<'_>) -> bool {
    // Factors that are views have equal ranks.
    let views = product.attribute.iter().any(|a| matches!(a.name.as_deref(), Some("viewA" | "viewB")));
    let [a, b] = [0, 1].map(|side| graph.known.shapes.get(&product.input[side]).map(Vec::len));
    !views && a != b
}

/// Makes AB into BᵀAᵀ.
fn swap_factors(node: &mut NodeProto) {
    node.input.swap(0, 1);
    let [a, b] = ["transA", "transB"].map(|name| take(node, name).and_then(|a| a.i).unwrap_or(0) != 0);
    node.attribute.push(int_attribute("transA", i64::from(!b)));
    node.attribute.push(int_attribute("transB", i64::from(!a)));
    for attribute in &mut node.attribute {
        let other = match attribute.name.as_deref() {
            Some("viewA") => "viewB",
            Some("viewB") => "viewA",
            _ => continue,
        };
        attribute.name = Some(other.to_owned());
    }
}

fn take(node: &mut NodeProto, name: &str) -> Option<AttributeProto> {
    let at = node.attribute.iter().position(|a| a.name.as_deref() == Some(name))?;
    Some(node.attribute.remove(at))
}

fn take_float(node: &mut NodeProto, name: &str) -> Option<f32> {
    take(node, name)?.f
}

/// Nodes by the values that they compute and use.
struct Graph<'a> {
    nodes: &'a [NodeProto],
    by_output: HashMap<&'a str, &'a NodeProto>,
    users: HashMap<&'a str, Vec<usize>>,
    known: &'a Known<'a>,
}

impl<'a> Graph<'a> {
    fn new(nodes: &'a [NodeProto], known: &'a Known<'a>) -> Self {
        let by_output = nodes.iter().flat_map(|n| n.output.iter().map(move |o| (o.as_str(), n))).collect();
        let mut users: HashMap<&str, Vec<usize>> = HashMap::new();
        for (i, node) in nodes.iter().enumerate().filter(|(_, node)| !node.output.is_empty()) {
            for input in &node.input {
                users.entry(input.as_str()).or_default().push(i);
            }
        }
        Self { nodes, by_output, users, known }
    }

    /// Returns the node that uses a value, if it is the only one.
    fn only_user(&self, value: &str) -> Option<usize> {
        match self.users.get(value).map(Vec::as_slice) {
            Some(&[user]) if !(self.known.is_output)(value) => Some(user),
            _ => None,
        }
    }

    /// Returns the number that a node multiplies a value with, whose shape it keeps.
    fn factor(&self, mul: &NodeProto, value: &str) -> Option<f32> {
        let [a, b] = &mul.input[..] else { return None };
        let other = if a == value { b } else { a };
        let shape = |name: &str| self.known.shapes.get(name);
        let number = *self.known.numbers.get(other)?;
        (a != b && shape(value)? == shape(mul.output.first()?)?).then_some(number)
    }

    /// Returns what a value is a view of, times which number.
    fn trace<'n>(&'n self, value: &'n str) -> Option<(&'n str, View, f32)> {
        let as_it_is = || Some((value, View::whole(self.known.shapes.get(value)?.clone()), 1.0));
        self.by_output
            .get(value)
            .filter(|node| node.domain().is_empty())
            .and_then(|node| self.trace_through(node, value))
            .or_else(as_it_is)
    }

    fn trace_through<'n>(&'n self, node: &'n NodeProto, value: &str) -> Option<(&'n str, View, f32)> {
        let shape = self.known.shapes.get(value)?;
        match node.op_type() {
            "Transpose" => {
                let (source, view, factor) = self.trace(node.input.first()?)?;
                Some((source, view.transposed(&permutation(node)?)?, factor))
            }
            "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Identity" => {
                let (source, view, factor) = self.trace(node.input.first()?)?;
                Some((source, view.reshaped(shape)?, factor))
            }
            "Split" => {
                let (source, view, factor) = self.trace(node.input.first()?)?;
                let axis =
                    node.attribute.iter().find(|a| a.name.as_deref() == Some("axis")).and_then(|a| a.i);
                let axis = axis_of(axis.unwrap_or(0), shape.len())?;
                let before = node.output.iter().take_while(|o| *o != value);
                let start: usize =
                    before.map(|o| self.known.shapes.get(o)?.get(axis).copied()).sum::<Option<usize>>()?;
                Some((source, view.cut(axis, start, shape[axis])?, factor))
            }
            "Mul" => {
                let scaled = node.input.iter().find(|i| !self.known.numbers.contains_key(*i))?;
                let number = self.factor(node, scaled)?;
                let (source, view, factor) = self.trace(scaled)?;
                Some((source, view, factor * number))
            }
            _ => None,
        }
    }
}

fn permutation(transpose: &NodeProto) -> Option<Vec<usize>> {
    let order = transpose.attribute.iter().find(|a| a.name.as_deref() == Some("perm"))?;
    order.ints.iter().map(|&axis| usize::try_from(axis).ok()).collect()
}

fn axis_of(axis: i64, rank: usize) -> Option<usize> {
    usize::try_from(if axis < 0 { axis + rank as i64 } else { axis }).ok().filter(|&axis| axis < rank)
}
