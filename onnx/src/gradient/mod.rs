//! Reverse-mode differentiation, from an ONNX graph to an ONNX graph.
//!
//! 1. [`Forward::new`] makes weights inputs, fixes shapes, lets ONNX Runtime simplify the graph and tells every shape.
//! 2. Losses ([`losses`]), adapters and fake quantization ([`fake_quantization`], [`Forward::rewire`]) are appended.
//! 3. [`Forward::differentiate`] appends d loss / d variable for every variable asked for, in ONNX's ops and a few of
//!    our own (`crate::kernels`). What is not asked for is frozen: it becomes an initializer again, and no gradient is
//!    computed for it.
//! 4. [`Differentiated::prepared`] runs like any other graph.
//! 5. Gradients of the graph's constants become gradients of the checkpoint's tensors ([`TensorGradients`]).
//!
//! Rules are in `rules`, a file per family of ops. Gradients flow through `f32` values only: whatever is integer or
//! boolean (shapes, indices, masks) ends them.
//!
//! Every value is computed by ONNX Runtime in the order that this module writes down, with the deterministic kernels
//! that [`Runtime`](crate::Runtime) asks for, and by ours.

mod backward;
mod checkpoint;
mod error;
pub mod fake_quantization;
mod forward;
mod fuse;
mod inspect;
pub mod losses;
mod products;
mod rules;
mod stored;
mod tape;
mod views;

use std::collections::{HashMap, HashSet};

use prost::Message;

use self::backward::Backward;
pub use self::checkpoint::TensorGradients;
pub use self::error::GradientError;
pub use self::forward::Forward;
use self::forward::Input;
pub use self::products::Product;
pub use self::tape::{Tape, Value};
use crate::graph::{Dimension, Port};
use crate::kernels::DOMAIN;
use crate::prepared::{Prepared, Slot, placeholder};
use crate::proto::{DataType, NodeProto, OperatorSetIdProto, TensorProto, value_info};
use crate::tensor::FloatType;

/// A graph that computes a loss and its gradients.
#[derive(Debug)]
pub struct Differentiated {
    prepared: Prepared,
    loss: String,
    gradients: Vec<Gradient>,
    weights: Vec<Slot>,
}

/// Where the gradient with respect to a variable comes out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gradient {
    /// a weight or an input of the graph
    pub variable: String,
    /// shape of the variable and of its gradient
    pub shape: Vec<usize>,
    /// name of the graph's output, which several variables may share; nothing if the loss does not depend on the
    /// variable
    pub output: Option<String>,
}

impl Differentiated {
    /// Returns the graph: variables are inputs beside the graph's own, frozen weights are its slots.
    pub fn prepared(&self) -> &Prepared {
        &self.prepared
    }

    /// Returns the name of the output that is the loss.
    pub fn loss(&self) -> &str {
        &self.loss
    }

    /// Returns the gradients, in the order in which variables were given.
    pub fn gradients(&self) -> &[Gradient] {
        &self.gradients
    }

    /// Returns the weights that have to be fed as inputs: those among the variables, or those that were asked for.
    pub fn trained_weights(&self) -> &[Slot] {
        &self.weights
    }
}

impl Forward {
    /// Writes down d `loss` / d `variables`.
    ///
    /// `variables`: weights, or float inputs. `outputs`: values that a run returns beside the loss and the gradients.
    ///
    /// # Errors
    ///
    /// If a variable does not exist, the loss is not a single number, or a gradient would have to pass through a node
    /// without a rule.
    pub fn differentiate(
        mut self,
        loss: &Value,
        variables: &[&str],
        outputs: &[&Value],
    ) -> Result<Differentiated, GradientError> {
        if loss.n_elements() != 1 {
            return Err(GradientError::LossShape { actual: loss.shape.clone() });
        }
        self.variables(variables)?;
        self.feed_as_stored(variables);
        let variables = self.variables(variables)?;
        self.tape.sort();
        let gradients = self.backward(loss, &variables)?;
        Ok(self.finish(loss, &variables, &gradients, outputs, &[]))
    }

    /// Writes down the loss alone: what [`differentiate`](Self::differentiate) gives, without gradients.
    ///
    /// `fed`: weights that are inputs, so that one session serves all their values.
    ///
    /// # Errors
    ///
    /// If a weight does not exist, or the loss is not a single number.
    pub fn evaluate(
        mut self,
        loss: &Value,
        fed: &[&str],
        outputs: &[&Value],
    ) -> Result<Differentiated, GradientError> {
        if loss.n_elements() != 1 {
            return Err(GradientError::LossShape { actual: loss.shape.clone() });
        }
        self.variables(fed)?;
        self.feed_as_stored(fed);
        let fed: Vec<String> = self.variables(fed)?.into_iter().map(|v| v.name).collect();
        self.tape.sort();
        Ok(self.finish(loss, &[], &HashMap::new(), outputs, &fed))
    }

    fn variables(&self, names: &[&str]) -> Result<Vec<Value>, GradientError> {
        let variable = |name: &&str| {
            let is_input = self.inputs.iter().any(|i| i.name == *name);
            let is_weight = self.weights.iter().any(|s| s.name == *name);
            let unknown =
                || GradientError::UnknownVariable { graph: self.graph.clone(), variable: (*name).to_owned() };
            if is_input || is_weight { self.value(name).map_err(|_| unknown()) } else { Err(unknown()) }
        };
        names.iter().map(variable).collect()
    }

    /// Appends the gradients of all values between the variables and the loss; returns them by value.
    fn backward(
        &mut self,
        loss: &Value,
        variables: &[Value],
    ) -> Result<HashMap<String, Value>, GradientError> {
        let forward: Vec<NodeProto> = self.tape.nodes.clone();
        let on_path = on_path(&forward, loss, variables, &self.values.elements);
        let differentiable: HashSet<String> =
            on_path.into_iter().chain(variables.iter().map(|v| v.name.clone())).collect();
        let constants = self.constants();
        let shapes = self.shapes();
        let one = self.tape.floats(&loss.shape, &[1.0]);
        let mut sums: HashMap<String, Value> = HashMap::from([(loss.name.clone(), one)]);
        let mut extra_outputs = Vec::new();
        for (idx, node) in forward.iter().enumerate().rev() {
            let gradients: Vec<Option<Value>> = node.output.iter().map(|o| sums.get(o).cloned()).collect();
            let wanted = node.input.iter().any(|i| differentiable.contains(i));
            if !wanted || gradients.iter().all(Option::is_none) {
                continue;
            }
            let refuse = |reason: String| GradientError::NoRule {
                graph: self.graph.clone(),
                // Simplification leaves some nodes without a name.
                node: Some(node.name()).filter(|n| !n.is_empty()).unwrap_or(&node.output[0]).to_owned(),
                op: node.op_type().to_owned(),
                reason,
                freeze: behind(&forward[..=idx], node, variables),
            };
            let rule = rules::find(node.domain(), node.op_type());
            let rule = rule.ok_or_else(|| refuse("there is no rule for this op".to_owned()))?;
            let tape = &mut self.tape;
            let mut backward = Backward::new(tape, node, &shapes, &constants, &differentiable, gradients);
            rule(&mut backward).map_err(refuse)?;
            let passed = backward.finish();
            extra_outputs.extend(passed.extra_outputs.into_iter().map(|extra| (idx, extra)));
            for (input, gradient) in passed.given {
                let sum = match sums.remove(&input) {
                    Some(before) => self.tape.add(&before, &gradient),
                    None => gradient,
                };
                sums.insert(input, sum);
            }
        }
        for (idx, (place, name)) in extra_outputs {
            let output = &mut self.tape.nodes[idx].output;
            output.resize(output.len().max(place + 1), String::new());
            output[place] = name;
        }
        Ok(sums)
    }

    /// Returns the shapes of all values, those that losses and adapters have added included.
    fn shapes(&self) -> HashMap<String, Vec<usize>> {
        let added = self.tape.shapes.iter();
        self.values.shapes.iter().chain(added).map(|(name, shape)| (name.clone(), shape.clone())).collect()
    }

    fn finish(
        mut self,
        loss: &Value,
        variables: &[Value],
        sums: &HashMap<String, Value>,
        outputs: &[&Value],
        fed: &[String],
    ) -> Differentiated {
        let shapes = self.shapes();
        let computed: HashSet<String> =
            self.tape.nodes.iter().flat_map(|n| n.output.iter().cloned()).collect();
        // An output of a graph has to be computed by a node.
        let as_output = |tape: &mut Tape, value: &Value| {
            if computed.contains(&value.name) { value.clone() } else { tape.unary("Identity", value) }
        };
        let loss = as_output(&mut self.tape, loss);
        let mut returned = vec![loss.clone()];
        returned.extend(outputs.iter().map(|v| as_output(&mut self.tape, v)));
        let mut gradients = Vec::new();
        for variable in variables {
            let gradient = sums.get(&variable.name).map(|g| as_output(&mut self.tape, g));
            gradients.push(Gradient {
                variable: variable.name.clone(),
                shape: variable.shape.clone(),
                output: gradient.as_ref().map(|g| g.name.clone()),
            });
            returned.extend(gradient);
        }
        let mut seen = HashSet::new();
        returned.retain(|v| seen.insert(v.name.clone()));
        self.tape.lower();
        prune(&mut self.tape.nodes, &seen);
        let needed = inputs_of(&self.tape.nodes);
        let trained = |name: &str| {
            gradients.iter().any(|g| g.variable == name && g.output.is_some())
                || (needed.contains(name) && fed.iter().any(|f| f == name))
        };
        self.own_products(&trained, &seen);
        let used = inputs_of(&self.tape.nodes);
        self.tape.initializers.retain(|t| used.contains(t.name()));
        let (weights, rest): (Vec<Slot>, Vec<Slot>) =
            self.weights.into_iter().partition(|s| trained(&s.name));
        let frozen: Vec<Slot> = rest.into_iter().filter(|s| used.contains(&s.name)).collect();
        let mut inputs = self.inputs;
        inputs.extend(weights.iter().map(|s| Input {
            name: s.name.clone(),
            element: DataType::Float,
            shape: s.shape.clone(),
        }));
        let graph = self.model.graph.get_or_insert_default();
        let mut offset = 0;
        let placeholders = frozen.iter().map(|s| placeholder(&s.name, &s.shape, FloatType::F32, &mut offset));
        graph.initializer = self.tape.initializers.into_iter().chain(placeholders).collect();
        graph.input = inputs.iter().map(|i| value_info(&i.name, i.element, &i.shape)).collect();
        graph.output = returned.iter().map(|v| value_info(&v.name, DataType::Float, &v.shape)).collect();
        // ONNX Runtime infers the shapes of its own ops only.
        let own = self.tape.nodes.iter().filter(|n| n.domain() == DOMAIN).flat_map(|n| &n.output);
        let infer = own.filter_map(|o| Some(value_info(o, DataType::Float, shapes.get(o)?)));
        graph.value_info = infer.filter(|v| !seen.contains(v.name())).collect();
        graph.node = self.tape.nodes;
        let import = OperatorSetIdProto { domain: Some(DOMAIN.to_owned()), version: Some(1) };
        self.model.opset_import.push(import);
        let port = |name: &str, element: DataType, shape: &[usize]| Port {
            name: name.to_owned(),
            element: Some(element),
            dimensions: Some(shape.iter().map(|&d| Dimension::Fixed(d)).collect()),
        };
        let prepared = Prepared::from_parts(
            self.graph,
            self.model.encode_to_vec(),
            frozen,
            inputs.iter().map(|i| port(&i.name, i.element, &i.shape)).collect(),
            returned.iter().map(|v| port(&v.name, DataType::Float, &v.shape)).collect(),
        );
        Differentiated { prepared, loss: loss.name, gradients, weights }
    }
}

impl Forward {
    /// Makes products ours whose factors are not constant, and spares them what only moves numbers. Outputs stay.
    fn own_products(&mut self, trained: &impl Fn(&str) -> bool, outputs: &HashSet<String>) {
        let shapes = self.shapes();
        let constants: HashSet<&str> = self
            .tape
            .initializers
            .iter()
            .map(TensorProto::name)
            .chain(self.weights.iter().map(|s| s.name.as_str()).filter(|name| !trained(name)))
            .collect();
        let floats = self.constants().floats;
        let numbers =
            floats.iter().filter(|(_, v)| v.len() == 1).map(|(name, v)| (name.clone(), v[0])).collect();
        let nodes = &mut self.tape.nodes;
        fuse::own_products(nodes, &shapes, |name| constants.contains(name));
        let known =
            views::Known { shapes: &shapes, numbers: &numbers, is_output: &|name| outputs.contains(name) };
        views::fold_factors(nodes, &known);
        prune(nodes, outputs);
        views::fold_results(nodes, &known);
        prune(nodes, outputs);
    }
}

/// Returns the float values that depend on a variable and that the loss depends on.
fn on_path(
    nodes: &[NodeProto],
    loss: &Value,
    variables: &[Value],
    elements: &HashMap<String, DataType>,
) -> HashSet<String> {
    let mut after: HashSet<&str> = variables.iter().map(|v| v.name.as_str()).collect();
    // Values that this module has added have no entry, and are floats where a gradient can reach them.
    let is_float = |name: &str| matches!(elements.get(name), None | Some(DataType::Float));
    for node in nodes {
        if node.input.iter().any(|i| after.contains(i.as_str())) {
            after.extend(node.output.iter().map(String::as_str).filter(|o| is_float(o)));
        }
    }
    let mut before: HashSet<&str> = HashSet::from([loss.name.as_str()]);
    for node in nodes.iter().rev() {
        if node.output.iter().any(|o| before.contains(o.as_str())) {
            before.extend(node.input.iter().map(String::as_str).filter(|i| !i.is_empty()));
        }
    }
    after.intersection(&before).map(|&n| n.to_owned()).collect()
}

/// Returns the variables that a node depends on. `nodes` are those up to the node.
fn behind(nodes: &[NodeProto], node: &NodeProto, variables: &[Value]) -> Vec<String> {
    let mut before: HashSet<&str> = node.input.iter().map(String::as_str).collect();
    for node in nodes.iter().rev() {
        if node.output.iter().any(|o| before.contains(o.as_str())) {
            before.extend(node.input.iter().map(String::as_str));
        }
    }
    variables.iter().map(|v| &v.name).filter(|n| before.contains(n.as_str())).cloned().collect()
}

fn inputs_of(nodes: &[NodeProto]) -> HashSet<String> {
    nodes.iter().flat_map(|n| n.input.iter().cloned()).collect()
}

/// Removes nodes that no output needs.
fn prune(nodes: &mut Vec<NodeProto>, outputs: &HashSet<String>) {
    let mut needed = outputs.clone();
    let mut keep = vec![false; nodes.len()];
    for (node, keep) in nodes.iter().zip(&mut keep).rev() {
        *keep = node.output.iter().any(|o| needed.contains(o));
        if *keep {
            needed.extend(node.input.iter().filter(|i| !i.is_empty()).cloned());
        }
    }
    let mut keep = keep.into_iter();
    nodes.retain(|_| keep.next().unwrap_or(true));
}
