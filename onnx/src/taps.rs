//! Where weights meet activations: which value of the graph every linear layer multiplies, and how to take it out.
//!
//! Calibration needs the inputs of every linear layer. Exporters write such a layer as `MatMul` (of a folded or unfolded transpose),
//! `Gemm` or `Conv`, fuse several of them or split one; names say nothing about it. So layers are found forward from the bound constants:
//! past nodes that only copy or transpose a constant, to the node that multiplies it, and back to the checkpoint through the binding.
//!
//! [`Prepared::with_outputs`] makes the values outputs, and [`Layout::vectors`] cuts them into the vectors that the layer multiplies.

use std::collections::{HashMap, HashSet};

use ndarray::{Array2, ArrayViewD, Axis, Ix4};
use prost::Message;

use crate::binding::{Binding, BoundTensor, How, Source};
use crate::error::GraphError;
use crate::prepared::Prepared;
use crate::proto::{ModelProto, NodeProto, ValueInfoProto};

/// A product of a checkpoint tensor, or of some rows of it, with an activation.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearUse {
    pub tensor: String,
    /// The tensor seen as a row-major matrix has this many columns.
    pub columns: usize,
    /// The rows of that matrix which take part.
    pub first_row: usize,
    pub n_rows: usize,
    /// The side of the matrix that is summed over.
    pub inputs: Side,
    /// The node that multiplies; for messages.
    pub node: String,
    /// The value that is multiplied.
    pub activation: String,
    pub layout: Layout,
    /// The value that the node computes.
    pub output: String,
}

/// A side of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// `y_i = Σ_j w_ij·x_j`, as in `Linear` and `Conv`
    Columns,
    /// `y_j = Σ_i w_ij·x_i`, as for a projection that is stored `[inputs, outputs]`
    Rows,
}

/// Where in an activation the vectors lie that a layer multiplies.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// along the last axis
    Last,
    /// along the last but one
    LastButOne,
    /// along the second axis, one per place of a map `[images, channels, …]`
    Channels,
    /// the windows of a convolution over `[images, channels, height, width]`, each flattened as the weight is: channel, row, column
    Windows(Windows),
}

/// The windows of a convolution: sizes along height and width.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Windows {
    pub kernel: [usize; 2],
    pub strides: [usize; 2],
    pub dilations: [usize; 2],
    /// zeros before the first row and column
    pub pads_before: [usize; 2],
    /// zeros after the last ones
    pub pads_after: [usize; 2],
}

impl LinearUse {
    /// Finds the layers of a prepared graph, in the order of its bound constants, then of its nodes. Constants that no layer multiplies
    /// (biases, norms, embeddings), and layers of other forms (grouped convolutions), have none.
    pub fn find(prepared: &Prepared, binding: &Binding) -> Result<Vec<Self>, GraphError> {
        let model = prepared.model()?;
        let nodes = model.graph.as_ref().map(|graph| graph.node.as_slice()).unwrap_or_default();
        let mut consumers: Consumers<'_> = HashMap::new();
        for (index, node) in nodes.iter().enumerate() {
            let inputs: HashSet<&str> = node.input.iter().map(String::as_str).collect();
            for input in inputs {
                consumers.entry(input).or_default().push((index, node));
            }
        }
        let bound: HashSet<&str> = binding.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        let mut uses = Vec::new();
        for tensor in &binding.tensors {
            for meeting in meetings(tensor, &consumers, &bound) {
                uses.extend(meeting.of_checkpoint(tensor));
            }
        }
        Ok(uses)
    }

    /// The number of values of a vector that the layer multiplies.
    pub fn n_inputs(&self) -> usize {
        match self.inputs {
            Side::Columns => self.columns,
            Side::Rows => self.n_rows,
        }
    }
}

impl Prepared {
    /// The same graph with some of its values as further outputs, and their names there: as they are, except for inputs of the graph,
    /// which leave it under a name of their own.
    pub fn with_outputs(&self, values: &[&str]) -> Result<(Self, Vec<String>), GraphError> {
        let mut model = self.model()?;
        let graph = model.graph.get_or_insert_default();
        let computed: HashSet<String> =
            graph.node.iter().flat_map(|node| node.output.iter().cloned()).collect();
        let mut outputs: HashSet<String> = graph.output.iter().filter_map(|o| o.name.clone()).collect();
        let mut names = Vec::with_capacity(values.len());
        for &value in values {
            let is_input = self.inputs().iter().any(|input| input.name == value);
            let name = if is_input { format!("{value}/tapped") } else { value.to_owned() };
            if !is_input && !computed.contains(value) {
                return Err(GraphError::NoSuchValue { value: value.to_owned() });
            }
            if outputs.insert(name.clone()) {
                if is_input {
                    graph.node.push(NodeProto {
                        op_type: Some("Identity".to_owned()),
                        name: Some(name.clone()),
                        input: vec![value.to_owned()],
                        output: vec![name.clone()],
                        ..NodeProto::default()
                    });
                }
                // Without a type: ONNX Runtime infers it.
                graph.output.push(ValueInfoProto { name: Some(name.clone()), ..ValueInfoProto::default() });
            }
            names.push(name);
        }
        Ok((self.with_bytes(model.encode_to_vec()), names))
    }
}

impl Layout {
    /// The vectors that a layer of `n_inputs` inputs multiplies, one per row; nothing if the activation has another shape.
    pub fn vectors(&self, activation: &ArrayViewD<'_, f32>, n_inputs: usize) -> Option<Array2<f32>> {
        let rank = activation.ndim();
        let axis = match self {
            Self::Last => rank.checked_sub(1)?,
            Self::LastButOne => rank.checked_sub(2)?,
            Self::Channels => 1,
            Self::Windows(windows) => return windows.vectors(activation, n_inputs),
        };
        if axis >= rank || activation.len_of(Axis(axis)) != n_inputs {
            return None;
        }
        let mut moved = activation.view();
        for axis in axis..rank - 1 {
            moved.swap_axes(axis, axis + 1);
        }
        let n_vectors = activation.len().checked_div(n_inputs).unwrap_or(0);
        let values: Vec<f32> = moved.iter().copied().collect();
        Array2::from_shape_vec((n_vectors, n_inputs), values).ok()
    }
}

impl Windows {
    fn vectors(&self, activation: &ArrayViewD<'_, f32>, n_inputs: usize) -> Option<Array2<f32>> {
        let maps = activation.view().into_dimensionality::<Ix4>().ok()?;
        let (images, channels, height, width) = maps.dim();
        let [rows, columns] = self.kernel;
        if channels * rows * columns != n_inputs {
            return None;
        }
        let (down, across) = (self.places(0, height), self.places(1, width));
        let mut out = Array2::zeros((images * down * across, n_inputs));
        for (index, mut vector) in out.outer_iter_mut().enumerate() {
            let (image, y, x) = (index / (down * across), index / across % down, index % across);
            for (at, value) in vector.iter_mut().enumerate() {
                let (channel, row, column) = (at / (rows * columns), at / columns % rows, at % columns);
                let source = self.source(0, y, row, height).zip(self.source(1, x, column, width));
                if let Some((y, x)) = source {
                    *value = maps[[image, channel, y, x]];
                }
            }
        }
        Some(out)
    }

    /// The number of windows along an axis of `size` places.
    fn places(&self, axis: usize, size: usize) -> usize {
        let extent = (self.kernel[axis].saturating_sub(1)).saturating_mul(self.dilations[axis]) + 1;
        let padded = size + self.pads_before[axis] + self.pads_after[axis];
        padded.checked_sub(extent).map_or(0, |room| room / self.strides[axis] + 1)
    }

    /// The place that an element of a window lies on; nothing where it is padding.
    fn source(&self, axis: usize, window: usize, element: usize, size: usize) -> Option<usize> {
        let at = window * self.strides[axis] + element * self.dilations[axis];
        at.checked_sub(self.pads_before[axis]).filter(|at| *at < size)
    }
}

/// The nodes, with their positions, that take a value.
type Consumers<'a> = HashMap<&'a str, Vec<(usize, &'a NodeProto)>>;

/// A node that multiplies a constant.
struct Meeting<'a> {
    node: &'a NodeProto,
    activation: &'a str,
    layout: Layout,
    /// Whether the leading axis of the constant is summed over, or all axes but the leading one.
    sums_leading: bool,
}

/// Finds the products of a constant of two dimensions or more.
fn meetings<'a>(tensor: &BoundTensor, consumers: &Consumers<'a>, bound: &HashSet<&str>) -> Vec<Meeting<'a>> {
    if tensor.shape.len() < 2 {
        return Vec::new();
    }
    let mut found: Vec<(usize, Meeting<'a>)> = Vec::new();
    let is_matrix = tensor.shape.len() == 2;
    // Names under which the constant is known, and whether it is the other way round there. Nodes come in topological order, so
    // that none is its own input; in a file that breaks this, no name is visited twice.
    let mut open: Vec<(&str, bool)> = vec![(&tensor.name, false)];
    let mut seen: HashSet<&str> = HashSet::new();
    while let Some((name, turned)) = open.pop() {
        if !seen.insert(name) {
            continue;
        }
        for &(index, node) in consumers.get(name).into_iter().flatten() {
            if !node.domain().is_empty() {
                continue;
            }
            let mut follow = |turned: bool| {
                // The output of an `Identity` that was split is a constant of its own.
                if let Some(output) = node.output.first().filter(|output| !bound.contains(output.as_str())) {
                    open.push((output, turned));
                }
            };
            let meeting = match node.op_type() {
                "Identity" | "Cast" => {
                    follow(turned);
                    None
                }
                "Transpose" if is_matrix && swaps(node) => {
                    follow(!turned);
                    None
                }
                "MatMul" | "Gemm" if is_matrix => product(node, name, turned),
                "Conv" if !turned => convolution(node, name, &tensor.shape),
                "ConvTranspose" if !turned => transposed_convolution(node, name),
                _ => None,
            };
            found.extend(meeting.map(|meeting| (index, meeting)));
        }
    }
    found.sort_by_key(|(index, _)| *index);
    found.into_iter().map(|(_, meeting)| meeting).collect()
}

fn product<'a>(node: &'a NodeProto, constant: &str, turned: bool) -> Option<Meeting<'a>> {
    let [a, b, ..] = node.input.as_slice() else { return None };
    if a == b {
        return None;
    }
    let is_right = b == constant;
    let transposed = |name: &str| node.op_type() == "Gemm" && integer(node, name).unwrap_or(0) != 0;
    let (constant_transposed, other_transposed) = if is_right {
        (transposed("transB"), transposed("transA"))
    } else {
        (transposed("transA"), transposed("transB"))
    };
    // x·W sums over the rows of W, W·x over its columns.
    let sums_leading = is_right != (constant_transposed != turned);
    let layout = if is_right == other_transposed { Layout::LastButOne } else { Layout::Last };
    Some(Meeting { node, activation: if is_right { a } else { b }, layout, sums_leading })
}

fn convolution<'a>(node: &'a NodeProto, constant: &str, shape: &[usize]) -> Option<Meeting<'a>> {
    let [activation, weight, ..] = node.input.as_slice() else { return None };
    let &[_, _, rows, columns] = shape else { return None };
    let is_plain = integer(node, "group").unwrap_or(1) == 1 && is_not_padded_automatically(node);
    if weight != constant || activation == weight || !is_plain {
        return None;
    }
    let pair = |name: &str, default: usize| match integers(node, name) {
        None => Some([default; 2]),
        Some(&[a, b]) => Some([usize::try_from(a).ok()?, usize::try_from(b).ok()?]),
        Some(_) => None,
    };
    let (pads_before, pads_after) = match integers(node, "pads") {
        None => ([0; 2], [0; 2]),
        Some(pads) => {
            let pads: Vec<usize> =
                pads.iter().map(|&pad| usize::try_from(pad).ok()).collect::<Option<_>>()?;
            let &[top, left, bottom, right] = pads.as_slice() else { return None };
            ([top, left], [bottom, right])
        }
    };
    let windows = Windows {
        kernel: [rows, columns],
        strides: pair("strides", 1)?,
        dilations: pair("dilations", 1)?,
        pads_before,
        pads_after,
    };
    if windows.strides.contains(&0) || windows.dilations.contains(&0) {
        return None;
    }
    Some(Meeting { node, activation, layout: Layout::Windows(windows), sums_leading: false })
}

/// Every place of the input is multiplied by the whole weight `[inputs, outputs, …]`; where the results are added up does not matter here.
fn transposed_convolution<'a>(node: &'a NodeProto, constant: &str) -> Option<Meeting<'a>> {
    let [activation, weight, ..] = node.input.as_slice() else { return None };
    let is_plain = integer(node, "group").unwrap_or(1) == 1;
    (weight == constant && activation != weight && is_plain).then_some(Meeting {
        node,
        activation,
        layout: Layout::Channels,
        sums_leading: true,
    })
}

impl Meeting<'_> {
    /// The product in terms of the checkpoint's tensors; none if it sums over parts of several.
    fn of_checkpoint(&self, tensor: &BoundTensor) -> Vec<LinearUse> {
        let Some(output) = self.node.output.first() else { return Vec::new() };
        let leading = tensor.shape[0];
        let rest: usize = tensor.shape[1..].iter().product();
        let part = |name: &str, columns: usize, first_row: usize, n_rows: usize, inputs: Side| LinearUse {
            tensor: name.to_owned(),
            columns,
            first_row,
            n_rows,
            inputs,
            node: self.node.name().to_owned(),
            activation: self.activation.to_owned(),
            layout: self.layout.clone(),
            output: output.clone(),
        };
        let side = |sums_leading: bool| if sums_leading { Side::Rows } else { Side::Columns };
        match &tensor.source {
            Source::Tensor { how: How::Exp, .. } => Vec::new(),
            Source::Tensor { name, how } => {
                let names = std::iter::once(name).chain(&tensor.merged);
                let (rows, columns, sums_leading) = match how {
                    How::Transposed => (rest, leading, !self.sums_leading),
                    _ => (leading, rest, self.sums_leading),
                };
                names.map(|name| part(name, columns, 0, rows, side(sums_leading))).collect()
            }
            Source::Rows { runs, transposed } => {
                if *transposed != self.sums_leading {
                    return Vec::new();
                }
                let columns = if *transposed { leading } else { rest };
                runs.iter()
                    .map(|run| part(&run.tensor, columns, run.first_row, run.n_rows, Side::Columns))
                    .collect()
            }
        }
    }
}

/// Whether a `Transpose` of a matrix swaps its axes.
fn swaps(node: &NodeProto) -> bool {
    integers(node, "perm").is_none_or(|perm| perm == [1, 0])
}

fn is_not_padded_automatically(node: &NodeProto) -> bool {
    let attribute = node.attribute.iter().find(|attribute| attribute.name.as_deref() == Some("auto_pad"));
    attribute.is_none_or(|attribute| matches!(attribute.s.as_deref(), None | Some(b"" | b"NOTSET")))
}

fn integer(node: &NodeProto, name: &str) -> Option<i64> {
    node.attribute.iter().find(|attribute| attribute.name.as_deref() == Some(name))?.i
}

fn integers<'a>(node: &'a NodeProto, name: &str) -> Option<&'a [i64]> {
    let attribute = node.attribute.iter().find(|attribute| attribute.name.as_deref() == Some(name))?;
    (!attribute.ints.is_empty()).then_some(&attribute.ints)
}

impl Prepared {
    pub(crate) fn model(&self) -> Result<ModelProto, GraphError> {
        ModelProto::decode(self.bytes())
            .map_err(|error| GraphError::NotOnnx { path: self.name().into(), reason: error.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{ArrayD, IxDyn};

    fn counted(shape: &[usize]) -> ArrayD<f32> {
        let n: usize = shape.iter().product();
        ArrayD::from_shape_vec(IxDyn(shape), (0..n).map(|i| i as f32 + 1.0).collect()).unwrap()
    }

    #[test]
    fn vectors_lie_along_their_axis() {
        let activation = counted(&[2, 3, 4]);
        let vectors = |layout: Layout, n: usize| layout.vectors(&activation.view(), n);
        let last = vectors(Layout::Last, 4).unwrap();
        assert_eq!((last.dim(), last[[5, 3]]), ((6, 4), activation[[1, 2, 3]]));
        let but_one = vectors(Layout::LastButOne, 3).unwrap();
        assert_eq!((but_one.dim(), but_one[[5, 2]]), ((8, 3), activation[[1, 2, 1]]));
        let channels = vectors(Layout::Channels, 3).unwrap();
        assert_eq!((channels.dim(), channels[[6, 1]]), ((8, 3), activation[[1, 1, 2]]));
        assert_eq!(vectors(Layout::Last, 3), None);
        assert_eq!(Layout::LastButOne.vectors(&counted(&[3]).view(), 3), None);
        assert_eq!(Layout::Channels.vectors(&counted(&[3]).view(), 3), None);
        assert_eq!(Layout::Last.vectors(&counted(&[0, 4]).view(), 4).unwrap().dim(), (0, 4));
    }

    /// The definition: a loop over images, places and elements, with padding added for real.
    fn naive_windows(windows: &Windows, maps: &ArrayD<f32>) -> Vec<Vec<f32>> {
        let &[images, channels, height, width] = maps.shape() else { panic!("four axes") };
        let padded = |axis: usize, size: usize| windows.pads_before[axis] + size + windows.pads_after[axis];
        let value = |image: usize, channel: usize, y: usize, x: usize| {
            let inside = |at: usize, axis: usize, size: usize| {
                at >= windows.pads_before[axis] && at < windows.pads_before[axis] + size
            };
            if inside(y, 0, height) && inside(x, 1, width) {
                maps[[image, channel, y - windows.pads_before[0], x - windows.pads_before[1]]]
            } else {
                0.0
            }
        };
        let mut found = Vec::new();
        for image in 0..images {
            let mut top = 0;
            while top + (windows.kernel[0] - 1) * windows.dilations[0] < padded(0, height) {
                let mut left = 0;
                while left + (windows.kernel[1] - 1) * windows.dilations[1] < padded(1, width) {
                    let mut vector = Vec::new();
                    for channel in 0..channels {
                        for row in 0..windows.kernel[0] {
                            for column in 0..windows.kernel[1] {
                                let (y, x) =
                                    (top + row * windows.dilations[0], left + column * windows.dilations[1]);
                                vector.push(value(image, channel, y, x));
                            }
                        }
                    }
                    found.push(vector);
                    left += windows.strides[1];
                }
                top += windows.strides[0];
            }
        }
        found
    }

    #[test]
    fn windows_follow_the_definition() {
        let plain = Windows {
            kernel: [2, 2],
            strides: [2, 2],
            dilations: [1, 1],
            pads_before: [0, 0],
            pads_after: [0, 0],
        };
        let cases = [
            plain.clone(),
            Windows { kernel: [1, 1], strides: [1, 1], ..plain.clone() },
            Windows {
                kernel: [3, 2],
                strides: [1, 2],
                pads_before: [1, 0],
                pads_after: [1, 1],
                ..plain.clone()
            },
            Windows { dilations: [2, 1], strides: [1, 1], pads_before: [2, 2], ..plain.clone() },
            Windows { kernel: [9, 9], ..plain.clone() },
        ];
        for windows in cases {
            for size in [[1, 1, 4, 4], [2, 3, 5, 7], [1, 2, 2, 3], [0, 1, 4, 4]] {
                let maps = counted(&size);
                let n_inputs = size[1] * windows.kernel[0] * windows.kernel[1];
                let layout = Layout::Windows(windows.clone());
                let found = layout.vectors(&maps.view(), n_inputs).unwrap();
                let found: Vec<Vec<f32>> = found.outer_iter().map(|vector| vector.to_vec()).collect();
                assert_eq!(found, naive_windows(&windows, &maps), "{windows:?} {size:?}");
                assert_eq!(layout.vectors(&maps.view(), n_inputs + 1), None);
            }
        }
    }
}
