//! A list of ONNX nodes that grows: the forward computation, then losses, then gradients.
//!
//! Every method appends one node (or none, where nothing is to be done) and returns its result with its shape, so that
//! whoever builds on a tape can see at once that shapes fit. Shapes are always known and fixed.

use std::collections::{HashMap, HashSet};

use crate::kernels::DOMAIN;
use crate::proto::{AttributeProto, AttributeType, DataType, NodeProto, TensorProto};

/// The domain of ops that exist only until the graph is written: rules know them, ONNX Runtime never sees them.
pub(super) const OWN_DOMAIN: &str = "merganser";
/// Has the values of its second input and the gradient of its first.
pub(super) const STRAIGHT_THROUGH: &str = "StraightThrough";

/// A tensor of the graph: its name and its shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    pub name: String,
    pub shape: Vec<usize>,
}

/// Nodes and the constants they use.
#[derive(Debug)]
pub struct Tape {
    pub(super) nodes: Vec<NodeProto>,
    pub(super) initializers: Vec<TensorProto>,
    /// names that are taken
    pub(super) names: HashSet<String>,
    /// shapes of the values that were appended
    pub(super) shapes: HashMap<String, Vec<usize>>,
    constants: HashMap<Constant, Value>,
    opset: i64,
    n_fresh: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Constant {
    Scalar(u32),
    Ints(Vec<i64>, Vec<usize>),
}

impl Value {
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Tape {
    pub(super) fn new(
        opset: i64,
        nodes: Vec<NodeProto>,
        initializers: Vec<TensorProto>,
        names: HashSet<String>,
    ) -> Self {
        Self {
            nodes,
            initializers,
            names,
            shapes: HashMap::new(),
            constants: HashMap::new(),
            opset,
            n_fresh: 0,
        }
    }

    /// Returns a name that nothing in the graph has.
    pub(super) fn fresh(&mut self, op: &str) -> String {
        loop {
            let name = format!("merganser.{op}.{}", self.n_fresh);
            self.n_fresh += 1;
            if self.names.insert(name.clone()) {
                return name;
            }
        }
    }

    /// Appends a node with one output of the given shape.
    pub(super) fn emit(
        &mut self,
        op: &str,
        inputs: &[&Value],
        attributes: Vec<AttributeProto>,
        shape: Vec<usize>,
    ) -> Value {
        let inputs = inputs.iter().map(|v| v.name.clone()).collect();
        let name = self.fresh(op);
        self.nodes.push(node(op, inputs, vec![name.clone()], attributes));
        self.shapes.insert(name.clone(), shape.clone());
        Value { name, shape }
    }

    /// Appends one of our own ops (`crate::kernels`), with one output of the given shape.
    pub(super) fn emit_own(
        &mut self,
        op: &str,
        inputs: &[&Value],
        attributes: Vec<AttributeProto>,
        shape: Vec<usize>,
    ) -> Value {
        let value = self.emit(op, inputs, attributes, shape);
        self.make_own();
        value
    }

    /// Appends one of our own ops with outputs of the given shapes, as far as they are asked for.
    pub(super) fn emit_own_several<const N: usize>(
        &mut self,
        op: &str,
        inputs: &[&Value],
        shapes: [Vec<usize>; N],
        asked_for: [bool; N],
    ) -> [Value; N] {
        let values = shapes.map(|shape| Value { name: self.fresh(op), shape });
        let names = values
            .iter()
            .zip(asked_for)
            .map(|(value, asked_for)| if asked_for { value.name.clone() } else { String::new() });
        let outputs: Vec<String> = names.collect();
        let inputs = inputs.iter().map(|v| v.name.clone()).collect();
        self.nodes.push(node(op, inputs, outputs, vec![]));
        self.make_own();
        self.shapes.extend(values.iter().map(|value| (value.name.clone(), value.shape.clone())));
        values
    }

    /// Moves the last node into the domain of our own ops.
    pub(super) fn make_own(&mut self) {
        if let Some(node) = self.nodes.last_mut() {
            node.domain = Some(DOMAIN.to_owned());
        }
    }

    /// Returns a constant scalar.
    pub fn scalar(&mut self, value: f32) -> Value {
        self.constant(Constant::Scalar(value.to_bits()))
    }

    /// Returns a constant vector of integers.
    pub(super) fn ints(&mut self, values: &[i64]) -> Value {
        self.constant(Constant::Ints(values.to_vec(), vec![values.len()]))
    }

    /// Returns a constant scalar integer.
    pub(super) fn int(&mut self, value: i64) -> Value {
        self.constant(Constant::Ints(vec![value], vec![]))
    }

    fn constant(&mut self, constant: Constant) -> Value {
        if let Some(value) = self.constants.get(&constant) {
            return value.clone();
        }
        let name = self.fresh("Constant");
        let (data_type, shape, bytes): (DataType, Vec<usize>, Vec<u8>) = match &constant {
            Constant::Scalar(bits) => (DataType::Float, vec![], bits.to_le_bytes().to_vec()),
            Constant::Ints(values, shape) => {
                (DataType::Int64, shape.clone(), values.iter().flat_map(|v| v.to_le_bytes()).collect())
            }
        };
        self.initializers.push(tensor(&name, data_type, &shape, bytes));
        self.shapes.insert(name.clone(), shape.clone());
        let value = Value { name, shape };
        self.constants.insert(constant, value.clone());
        value
    }

    /// Returns a constant tensor of floats.
    ///
    /// # Panics
    ///
    /// If there are not as many values as the shape says.
    pub fn floats(&mut self, shape: &[usize], values: &[f32]) -> Value {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "a constant has one value per element");
        let name = self.fresh("Constant");
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.initializers.push(tensor(&name, DataType::Float, shape, bytes));
        self.shapes.insert(name.clone(), shape.to_vec());
        Value { name, shape: shape.to_vec() }
    }

    pub(super) fn zeros(&mut self, shape: &[usize]) -> Value {
        let dims = self.ints(&signed(shape));
        self.emit("ConstantOfShape", &[&dims], vec![], shape.to_vec())
    }

    /// Appends an op that works element by element.
    pub fn unary(&mut self, op: &str, x: &Value) -> Value {
        self.emit(op, &[x], vec![], x.shape.clone())
    }

    /// Appends an op on two tensors of broadcastable shapes.
    ///
    /// # Panics
    ///
    /// If the shapes cannot be broadcast.
    pub fn binary(&mut self, op: &str, a: &Value, b: &Value) -> Value {
        let shape = broadcast(&a.shape, &b.shape)
            .unwrap_or_else(|| panic!("{op} of shapes {:?} and {:?}", a.shape, b.shape));
        self.emit(op, &[a, b], vec![], shape)
    }

    pub fn add(&mut self, a: &Value, b: &Value) -> Value {
        self.binary("Add", a, b)
    }

    pub fn sub(&mut self, a: &Value, b: &Value) -> Value {
        self.binary("Sub", a, b)
    }

    pub fn mul(&mut self, a: &Value, b: &Value) -> Value {
        self.binary("Mul", a, b)
    }

    pub fn div(&mut self, a: &Value, b: &Value) -> Value {
        self.binary("Div", a, b)
    }

    /// Returns `factor · x`.
    pub fn scale(&mut self, x: &Value, factor: f32) -> Value {
        #[expect(clippy::float_cmp, reason = "a factor of exactly one needs no node")]
        if factor == 1.0 {
            return x.clone();
        }
        let factor = self.scalar(factor);
        self.mul(x, &factor)
    }

    /// Returns `condition ? a : b`, element by element.
    pub(super) fn select(&mut self, condition: &Value, a: &Value, b: &Value) -> Value {
        let shape = broadcast(&a.shape, &b.shape)
            .and_then(|shape| broadcast(&shape, &condition.shape))
            .unwrap_or_else(|| panic!("Where of {:?}, {:?}, {:?}", condition.shape, a.shape, b.shape));
        self.emit("Where", &[condition, a, b], vec![], shape)
    }

    /// Returns `stand_in`, as if it were `x` on the way back: its gradient goes to `x` as it is, and none to whatever `stand_in` was
    /// computed from (the straight-through estimator: Bengio et al. 2013).
    ///
    /// # Panics
    ///
    /// If the shapes differ.
    pub fn straight_through(&mut self, x: &Value, stand_in: &Value) -> Value {
        assert_eq!(x.shape, stand_in.shape, "what stands in for a value has its shape");
        let value = self.emit(STRAIGHT_THROUGH, &[x, stand_in], vec![], x.shape.clone());
        if let Some(node) = self.nodes.last_mut() {
            node.domain = Some(OWN_DOMAIN.to_owned());
        }
        value
    }

    /// Writes the ops of [`OWN_DOMAIN`] as standard ones.
    pub(super) fn lower(&mut self) {
        for node in self.nodes.iter_mut().filter(|n| n.domain() == OWN_DOMAIN) {
            node.domain = None;
            node.op_type = Some("Identity".to_owned());
            node.input.remove(0);
        }
    }

    /// Returns the product of two tensors of at least two axes; leading axes are broadcast.
    ///
    /// # Panics
    ///
    /// If the shapes do not fit.
    pub fn matmul(&mut self, a: &Value, b: &Value) -> Value {
        let (batch_a, [m, k]) = matrix(&a.shape);
        let (batch_b, [k_b, n]) = matrix(&b.shape);
        assert_eq!(k, k_b, "MatMul of shapes {:?} and {:?}", a.shape, b.shape);
        let mut shape = broadcast(batch_a, batch_b)
            .unwrap_or_else(|| panic!("MatMul of shapes {:?} and {:?}", a.shape, b.shape));
        shape.extend([m, n]);
        self.emit("MatMul", &[a, b], vec![], shape)
    }

    /// Returns `α · A′ B′` of two matrices, transposed where told.
    pub(super) fn gemm(&mut self, a: (&Value, bool), b: (&Value, bool), alpha: f32) -> Value {
        let side = |(v, transposed): (&Value, bool)| {
            let (_, [rows, columns]) = matrix(&v.shape);
            if transposed { [columns, rows] } else { [rows, columns] }
        };
        let shape = vec![side(a)[0], side(b)[1]];
        let flag = |name: &str, on: bool| on.then(|| int_attribute(name, 1));
        let mut attributes: Vec<_> = flag("transA", a.1).into_iter().chain(flag("transB", b.1)).collect();
        #[expect(clippy::float_cmp, reason = "a factor of exactly one is the default")]
        if alpha != 1.0 {
            attributes.push(float_attribute("alpha", alpha));
        }
        self.emit("Gemm", &[a.0, b.0], attributes, shape)
    }

    /// Reorders axes: axis `i` of the result is axis `order[i]` of `x`.
    pub fn transpose(&mut self, x: &Value, order: &[usize]) -> Value {
        if order.iter().enumerate().all(|(i, &o)| i == o) {
            return x.clone();
        }
        let shape = order.iter().map(|&o| x.shape[o]).collect();
        self.emit("Transpose", &[x], vec![ints_attribute("perm", &signed(order))], shape)
    }

    /// Swaps the last two axes.
    pub(super) fn transpose_matrices(&mut self, x: &Value) -> Value {
        let mut order: Vec<usize> = (0..x.rank()).collect();
        order.swap(x.rank() - 2, x.rank() - 1);
        self.transpose(x, &order)
    }

    /// # Panics
    ///
    /// If the shapes have different numbers of elements.
    pub fn reshape(&mut self, x: &Value, shape: &[usize]) -> Value {
        assert_eq!(x.n_elements(), shape.iter().product::<usize>(), "Reshape {:?} to {shape:?}", x.shape);
        if x.shape == shape {
            return x.clone();
        }
        let dims = self.ints(&signed(shape));
        // Without `allowzero` a 0 would mean: as in the input.
        let attributes = if shape.contains(&0) { vec![int_attribute("allowzero", 1)] } else { vec![] };
        self.emit("Reshape", &[x, &dims], attributes, shape.to_vec())
    }

    /// Sums over axes, which stay as axes of length 1 if `keep`.
    pub fn reduce_sum(&mut self, x: &Value, axes: &[usize], keep: bool) -> Value {
        if axes.is_empty() {
            return x.clone();
        }
        let shape = reduced(&x.shape, axes, keep);
        let axes = self.ints(&signed(axes));
        self.emit("ReduceSum", &[x, &axes], vec![int_attribute("keepdims", i64::from(keep))], shape)
    }

    /// Averages over axes, which stay as axes of length 1 if `keep`.
    pub fn reduce_mean(&mut self, x: &Value, axes: &[usize], keep: bool) -> Value {
        let n: usize = axes.iter().map(|&a| x.shape[a]).product();
        let sum = self.reduce_sum(x, axes, keep);
        self.scale(&sum, 1.0 / n as f32)
    }

    /// Returns the Euclidean norm over axes, which stay as axes of length 1.
    pub fn norm(&mut self, x: &Value, axes: &[usize]) -> Value {
        self.reduce_along("ReduceL2", x, axes)
    }

    /// Appends a reduction whose axes are an attribute up to opset 17 and an input after.
    fn reduce_along(&mut self, op: &str, x: &Value, axes: &[usize]) -> Value {
        let shape = reduced(&x.shape, axes, true);
        let axes = signed(axes);
        if self.opset < 18 {
            return self.emit(op, &[x], vec![ints_attribute("axes", &axes)], shape);
        }
        let axes = self.ints(&axes);
        self.emit(op, &[x, &axes], vec![], shape)
    }

    /// Returns the largest value over axes, which stay as axes of length 1.
    pub(super) fn largest(&mut self, x: &Value, axes: &[usize]) -> Value {
        if axes.is_empty() {
            return x.clone();
        }
        self.reduce_along("ReduceMax", x, axes)
    }

    /// Averages over everything.
    pub fn mean(&mut self, x: &Value) -> Value {
        let axes: Vec<usize> = (0..x.rank()).collect();
        self.reduce_mean(x, &axes, false)
    }

    /// Repeats along axes of length 1, and along new leading axes.
    pub(super) fn expand(&mut self, x: &Value, shape: &[usize]) -> Value {
        if x.shape == shape {
            return x.clone();
        }
        let dims = self.ints(&signed(shape));
        self.emit("Expand", &[x, &dims], vec![], shape.to_vec())
    }

    /// Sums `x` over all axes along which a tensor of `shape` was repeated to give the shape of `x`.
    pub(super) fn sum_to(&mut self, x: &Value, shape: &[usize]) -> Value {
        if x.shape == shape {
            return x.clone();
        }
        let new = x.rank().saturating_sub(shape.len());
        let repeated = |axis: &usize| *axis < new || (shape[*axis - new] == 1 && x.shape[*axis] != 1);
        let axes: Vec<usize> = (0..x.rank()).filter(repeated).collect();
        if axes.len() + 1 == x.rank() && axes.iter().enumerate().all(|(i, &axis)| i == axis) {
            let sum = self.emit_own("ColumnSum", &[x], vec![], x.shape[axes.len()..].to_vec());
            return self.reshape(&sum, shape);
        }
        let sum = self.reduce_sum(x, &axes, false);
        if sum.n_elements() == shape.iter().product::<usize>() { self.reshape(&sum, shape) } else { sum }
    }

    /// Cuts the range `starts[i]..ends[i]` out of axis `axes[i]`.
    pub fn slice(&mut self, x: &Value, axes: &[usize], starts: &[usize], ends: &[usize]) -> Value {
        let mut shape = x.shape.clone();
        for (i, &axis) in axes.iter().enumerate() {
            shape[axis] = ends[i] - starts[i];
        }
        if shape == x.shape {
            return x.clone();
        }
        let inputs = [signed(starts), signed(ends), signed(axes)].map(|v| self.ints(&v));
        self.emit("Slice", &[x, &inputs[0], &inputs[1], &inputs[2]], vec![], shape)
    }

    /// Reverses one axis.
    pub(super) fn reverse(&mut self, x: &Value, axis: usize) -> Value {
        let inputs = [vec![-1], vec![i64::MIN + 1], vec![axis as i64], vec![-1]].map(|v| self.ints(&v));
        let [starts, ends, axes, steps] = &inputs;
        self.emit("Slice", &[x, starts, ends, axes, steps], vec![], x.shape.clone())
    }

    /// Puts zeros before and after each axis; a negative number cuts off.
    pub(super) fn pad(&mut self, x: &Value, before: &[i64], after: &[i64]) -> Value {
        if before.iter().chain(after).all(|&n| n == 0) {
            return x.clone();
        }
        let padded = |(axis, &d): (usize, &usize)| (d as i64 + before[axis] + after[axis]).max(0) as usize;
        let shape = x.shape.iter().enumerate().map(padded).collect();
        let pads = self.ints(&before.iter().chain(after).copied().collect::<Vec<_>>());
        self.emit("Pad", &[x, &pads], vec![], shape)
    }

    /// Joins tensors along an axis; all other axes must agree.
    pub fn concat(&mut self, parts: &[Value], axis: usize) -> Value {
        let mut shape = parts[0].shape.clone();
        shape[axis] = parts.iter().map(|p| p.shape[axis]).sum();
        let parts: Vec<&Value> = parts.iter().collect();
        self.emit("Concat", &parts, vec![int_attribute("axis", axis as i64)], shape)
    }

    pub fn softmax(&mut self, x: &Value, axis: usize) -> Value {
        self.emit("Softmax", &[x], vec![int_attribute("axis", axis as i64)], x.shape.clone())
    }

    pub fn log_softmax(&mut self, x: &Value, axis: usize) -> Value {
        self.emit("LogSoftmax", &[x], vec![int_attribute("axis", axis as i64)], x.shape.clone())
    }

    /// Puts nodes into an order in which every value is computed before it is used, otherwise as they are.
    pub(super) fn sort(&mut self) {
        let mut waiting: HashSet<String> = self.nodes.iter().flat_map(|n| n.output.iter().cloned()).collect();
        let mut left = std::mem::take(&mut self.nodes);
        while !left.is_empty() {
            let mut blocked = Vec::new();
            let before = self.nodes.len();
            for node in left {
                if node.input.iter().any(|i| !i.is_empty() && waiting.contains(i)) {
                    blocked.push(node);
                } else {
                    for output in &node.output {
                        waiting.remove(output);
                    }
                    self.nodes.push(node);
                }
            }
            if self.nodes.len() == before {
                // A cycle: ONNX Runtime refuses it with its own words.
                self.nodes.append(&mut blocked);
            }
            left = blocked;
        }
    }
}

pub(super) fn node(
    op: &str,
    input: Vec<String>,
    output: Vec<String>,
    attribute: Vec<AttributeProto>,
) -> NodeProto {
    let name = output.first().cloned();
    NodeProto { op_type: Some(op.to_owned()), name, input, output, attribute, ..NodeProto::default() }
}

fn tensor(name: &str, data_type: DataType, shape: &[usize], bytes: Vec<u8>) -> TensorProto {
    TensorProto {
        name: Some(name.to_owned()),
        dims: signed(shape),
        data_type: Some(data_type as i32),
        raw_data: Some(bytes.into()),
        ..TensorProto::default()
    }
}

pub(super) fn int_attribute(name: &str, value: i64) -> AttributeProto {
    AttributeProto { i: Some(value), ..attribute(name, AttributeType::Int) }
}

pub(super) fn ints_attribute(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto { ints: values.to_vec(), ..attribute(name, AttributeType::Ints) }
}

pub(super) fn float_attribute(name: &str, value: f32) -> AttributeProto {
    AttributeProto { f: Some(value), ..attribute(name, AttributeType::Float) }
}

pub(super) fn string_attribute(name: &str, value: &'static str) -> AttributeProto {
    AttributeProto { s: Some(value.as_bytes().into()), ..attribute(name, AttributeType::String) }
}

fn attribute(name: &str, kind: AttributeType) -> AttributeProto {
    AttributeProto { name: Some(name.to_owned()), r#type: Some(kind as i32), ..AttributeProto::default() }
}

/// Returns the shape that two shapes are broadcast to, by ONNX's (NumPy's) rule.
pub(super) fn broadcast(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let at = |s: &[usize], i: usize| (i + s.len()).checked_sub(rank).map_or(1, |i| s[i]);
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Some(x),
            (1, y) => Some(y),
            (x, 1) => Some(x),
            _ => None,
        })
        .collect()
}

pub(super) fn reduced(shape: &[usize], axes: &[usize], keep: bool) -> Vec<usize> {
    let all = shape.iter().enumerate();
    if keep {
        all.map(|(i, &d)| if axes.contains(&i) { 1 } else { d }).collect()
    } else {
        all.filter(|(i, _)| !axes.contains(i)).map(|(_, &d)| d).collect()
    }
}

/// Splits a shape into leading axes and the last two.
fn matrix(shape: &[usize]) -> (&[usize], [usize; 2]) {
    match shape {
        [batch @ .., rows, columns] => (batch, [*rows, *columns]),
        _ => panic!("a matrix has two axes, not shape {shape:?}"),
    }
}

pub(super) fn signed(values: &[usize]) -> Vec<i64> {
    values.iter().map(|&v| v as i64).collect()
}
