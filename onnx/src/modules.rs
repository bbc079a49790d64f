//! What layers give out, and other values that a model can be looked at by.
//!
//! An exporter writes a `Linear` as a product and an addition of its bias, and only the sum is what the layer of the library gives out.
//! [`LinearUse`] tells of the product; here the bias is followed.

use std::collections::{HashMap, HashSet};

use crate::binding::Binding;
use crate::error::GraphError;
use crate::prepared::Prepared;
use crate::proto::{GraphProto, NodeProto};
use crate::taps::{Layout, LinearUse, Side};

/// A layer of a library (`Linear`, `Conv`), as a graph computes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    /// The tensor of the checkpoint that is its weight, or the rows of it that take part.
    pub weight: LinearUse,
    /// What it gives out: the product, with the bias where there is one.
    pub output: String,
    /// Where in that value the channels lie.
    pub channels: Layout,
    /// Whether what it multiplies goes to such layers only, so that rounding it changes nothing else.
    pub owns_activation: bool,
}

impl Module {
    /// Finds the layers of a prepared graph whose weights are `[outputs, inputs, …]`, in the order in which they are computed.
    pub fn find(prepared: &Prepared, binding: &Binding) -> Result<Vec<Self>, GraphError> {
        let model = prepared.model()?;
        let graph = model.graph.unwrap_or_default();
        let consumers = consumers(&graph);
        let constants: HashSet<&str> =
            graph.initializer.iter().map(crate::proto::TensorProto::name).collect();
        let uses = LinearUse::find(prepared, binding)?;
        let products: HashSet<&str> = uses.iter().map(|layer| layer.output.as_str()).collect();
        let places: HashMap<&str, usize> = graph
            .node
            .iter()
            .enumerate()
            .flat_map(|(place, node)| node.output.iter().map(move |output| (output.as_str(), place)))
            .collect();
        // Whoever asks for a shape does not look at values.
        let is_product = |node: &&NodeProto| {
            node.op_type() == "Shape" || node.output.iter().any(|output| products.contains(output.as_str()))
        };
        let owns =
            |activation: &str| consumers.get(activation).is_some_and(|nodes| nodes.iter().all(is_product));
        let place = |layer: &LinearUse| places.get(layer.output.as_str()).copied().unwrap_or_default();
        let modules = uses.iter().filter(|layer| layer.inputs == Side::Columns);
        let mut modules: Vec<Self> = modules
            .map(|layer| Self {
                output: with_bias(&layer.output, &consumers, &constants).to_owned(),
                channels: channels(layer, &graph.node[place(layer)]),
                owns_activation: owns(&layer.activation),
                weight: layer.clone(),
            })
            .collect();
        // Stable: parts of one product stay in the order of its channels.
        modules.sort_by_key(|module| place(&module.weight));
        Ok(modules)
    }
}

impl Prepared {
    /// Returns the float values of the graph that a name stands for: a value itself, or what the node of that name gives out.
    pub fn values_named(&self, name: &str) -> Result<Vec<String>, GraphError> {
        let model = self.model()?;
        let graph = model.graph.unwrap_or_default();
        let mut found = Vec::new();
        for node in &graph.node {
            for (i, output) in node.output.iter().enumerate() {
                if !output.is_empty() && (output == name || (i == 0 && node.name() == name)) {
                    found.push(output.clone());
                }
            }
        }
        Ok(found)
    }
}

/// Returns where the outputs of a layer lie in what its node computes: `x·W` has them last, `W·x` last but one.
fn channels(layer: &LinearUse, node: &NodeProto) -> Layout {
    match layer.layout {
        Layout::Windows(_) | Layout::Channels => Layout::Channels,
        Layout::Last | Layout::LastButOne => {
            let is_left = node.input.first().is_some_and(|input| *input == layer.activation);
            if is_left { Layout::Last } else { Layout::LastButOne }
        }
    }
}

type Consumers<'a> = HashMap<&'a str, Vec<&'a NodeProto>>;

fn consumers(graph: &GraphProto) -> Consumers<'_> {
    let mut consumers: Consumers<'_> = HashMap::new();
    for node in &graph.node {
        let inputs: HashSet<&str> = node.input.iter().map(String::as_str).collect();
        for input in inputs {
            consumers.entry(input).or_default().push(node);
        }
    }
    consumers
}

/// Returns the sum of a product and its bias; the product itself if it goes anywhere else than to an addition of a constant.
fn with_bias<'a>(product: &'a str, consumers: &Consumers<'a>, constants: &HashSet<&str>) -> &'a str {
    let Some([addition]) = consumers.get(product).map(Vec::as_slice) else { return product };
    let is_bias = |input: &String| input != product && constants.contains(input.as_str());
    match addition.output.first() {
        Some(sum) if addition.op_type() == "Add" && addition.input.iter().any(is_bias) => sum,
        _ => product,
    }
}
