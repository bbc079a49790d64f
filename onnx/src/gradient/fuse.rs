//! Chains of ops that are one op of our own.
//!
//! The last node of a chain becomes that op. What came before it stays for whoever else uses it, and goes with what nobody needs.

use std::collections::HashMap;
use std::f32::consts::{FRAC_1_SQRT_2, SQRT_2};

use super::Forward;
use super::backward::Constants;
use super::tape::float_attribute;
use crate::kernels::DOMAIN;
use crate::proto::NodeProto;

/// How far an exporter's √2 may be from ours, relatively.
const TOLERANCE: f32 = 1e-6;

impl Forward {
    /// Replaces the ways in which exporters write GELU.
    pub(super) fn fuse_activations(&mut self) {
        let constants = self.constants();
        let nodes = Nodes::new(&self.tape.nodes, &constants);
        let found: Vec<(usize, NodeProto)> = (0..self.tape.nodes.len())
            .filter_map(|i| {
                let node = &self.tape.nodes[i];
                let (op, x, attribute) = if let Some(x) = nodes.gelu(node) {
                    ("Gelu", x, None)
                } else {
                    let (x, alpha) = nodes.quick_gelu(node)?;
                    ("QuickGelu", x, Some(float_attribute("alpha", alpha)))
                };
                let mut fused = own(op, vec![x.to_owned()], node);
                fused.attribute.extend(attribute);
                Some((i, fused))
            })
            .collect();
        for (i, fused) in found {
            self.tape.nodes[i] = fused;
        }
    }
}

/// Makes products ours where no factor is constant: where one is, ONNX Runtime arranges it once, and is as fast.
pub(super) fn own_products(
    nodes: &mut [NodeProto],
    shapes: &HashMap<String, Vec<usize>>,
    is_constant: impl Fn(&str) -> bool,
) {
    for node in nodes {
        let [Some(a), Some(b)] = [0, 1].map(|i| node.input.get(i)) else { continue };
        let [Some(a_shape), Some(b_shape)] = [a, b].map(|name| shapes.get(name)) else { continue };
        if !node.domain().is_empty() || is_constant(b) || a_shape.len() < 2 || b_shape.len() < 2 {
            continue;
        }
        let product = match node.op_type() {
            "MatMul" => b_shape.len() == 2 || a_shape[..a_shape.len() - 2] == b_shape[..b_shape.len() - 2],
            "Gemm" => {
                let columns = node.output.first().and_then(|y| shapes.get(y)?.last());
                let bias = node.input.get(2).filter(|c| !c.is_empty()).map(|c| shapes.get(c));
                let beta = node.attribute.iter().find(|a| a.name.as_deref() == Some("beta"));
                bias.is_none_or(|shape| {
                    beta.and_then(|b| b.f).unwrap_or(1.0) == 1.0
                        && shape.is_some_and(|s| s.len() == 1 && s.first() == columns)
                })
            }
            _ => false,
        };
        if product {
            let mut fused = own("Product", node.input.clone(), node);
            fused.attribute = std::mem::take(&mut node.attribute);
            fused.attribute.retain(|a| a.name.as_deref() != Some("beta"));
            *node = fused;
        }
    }
}

/// Returns one of our ops in the place of a node.
fn own(op: &str, input: Vec<String>, node: &NodeProto) -> NodeProto {
    NodeProto {
        op_type: Some(op.to_owned()),
        domain: Some(DOMAIN.to_owned()),
        input,
        output: node.output.clone(),
        name: node.name.clone(),
        ..NodeProto::default()
    }
}

/// Nodes by what they compute.
struct Nodes<'a> {
    by_output: HashMap<&'a str, &'a NodeProto>,
    constants: &'a Constants,
}

impl<'a> Nodes<'a> {
    fn new(nodes: &'a [NodeProto], constants: &'a Constants) -> Self {
        let by_output = nodes.iter().flat_map(|n| n.output.iter().map(move |o| (o.as_str(), n))).collect();
        Self { by_output, constants }
    }

    /// Returns the inputs of the node that computes a value, if it is of this op and has two inputs.
    fn binary(&self, op: &str, value: &str) -> Option<[&'a str; 2]> {
        self.by_output.get(value).and_then(|node| binary(op, node))
    }

    fn unary(&self, op: &str, value: &str) -> Option<&'a str> {
        let node = self.by_output.get(value)?;
        (node.op_type() == op && node.domain().is_empty()).then(|| node.input.first().map(String::as_str))?
    }

    /// Returns the number that a value is.
    fn number(&self, value: &str) -> Option<f32> {
        match self.constants.floats.get(value).map(Vec::as_slice) {
            Some([number]) => Some(*number),
            _ => None,
        }
    }

    fn is(&self, value: &str, number: f32) -> bool {
        self.number(value).is_some_and(|v| (v - number).abs() <= TOLERANCE * number.abs())
    }

    /// Returns x where the inputs are x and a number.
    fn times(&self, [a, b]: [&'a str; 2], number: f32) -> Option<&'a str> {
        match (self.is(a, number), self.is(b, number)) {
            (false, true) => Some(a),
            (true, false) => Some(b),
            _ => None,
        }
    }

    /// Returns x where the node gives x·(1 + erf(x/√2))/2, in whatever order the factors are.
    fn gelu(&self, last: &'a NodeProto) -> Option<&'a str> {
        let factors = binary("Mul", last)?;
        // (x·t)/2
        if let Some(product) = self.times(factors, 0.5) {
            let [a, b] = self.binary("Mul", product)?;
            return [(a, b), (b, a)]
                .into_iter()
                .find(|(x, t)| self.doubled_distribution(t) == Some(x))
                .map(|(x, _)| x);
        }
        // (x/2)·t, or x·(t/2)
        [(factors[0], factors[1]), (factors[1], factors[0])].into_iter().find_map(|(a, b)| {
            let halved = |value| self.times(self.binary("Mul", value)?, 0.5);
            let whole = halved(a).filter(|x| self.doubled_distribution(b) == Some(x));
            whole.or_else(|| (self.doubled_distribution(halved(b)?)? == a).then_some(a))
        })
    }

    /// Returns x where a value is 1 + erf(x/√2).
    fn doubled_distribution(&self, value: &str) -> Option<&'a str> {
        let erf = self.times(self.binary("Add", value)?, 1.0)?;
        let scaled = self.unary("Erf", erf)?;
        if let Some([x, divisor]) = self.binary("Div", scaled) {
            return self.is(divisor, SQRT_2).then_some(x);
        }
        self.times(self.binary("Mul", scaled)?, FRAC_1_SQRT_2)
    }

    /// Returns x and α where the node gives x·σ(αx).
    fn quick_gelu(&self, last: &'a NodeProto) -> Option<(&'a str, f32)> {
        let [a, b] = binary("Mul", last)?;
        [(a, b), (b, a)].into_iter().find_map(|(x, sigmoid)| {
            let argument = self.unary("Sigmoid", sigmoid)?;
            if argument == x {
                return Some((x, 1.0));
            }
            let [c, d] = self.binary("Mul", argument)?;
            let alpha = if c == x { self.number(d) } else { self.number(c).filter(|_| d == x) };
            Some((x, alpha?))
        })
    }
}

fn binary<'a>(op: &str, node: &'a NodeProto) -> Option<[&'a str; 2]> {
    match &node.input[..] {
        [a, b] if node.op_type() == op && node.domain().is_empty() => Some([a, b]),
        _ => None,
    }
}
