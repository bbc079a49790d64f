//! A graph with a model's weights in it, written as a file: tensors that are stored as codes stay codes.
//!
//! Every bound constant is filled with the model's tensor. Codes become, per tensor, what is exact and smallest:
//!
//! * `DequantizeLinear` on int8 (uint8 where the zero point is not in the middle): eight bits, one step per tensor or per output channel;
//! * `MatMulNBits` of ONNX Runtime: 2, 4 or 8 bits in blocks along the inputs of a `MatMul` or `Gemm`;
//! * nodes that unpack any codes when the graph is loaded (`unpack`): all else.
//!
//! INVARIANT: the weights that a graph computes with are bit by bit those that the codes stand for. A form that would round once more is not
//! taken. Codes are moved where the exporter moved the weights (transposed, reshaped), never quantized again.
//!
//! With ranges of activations, the inputs of layers with int8 weights are quantized as well (`QuantizeLinear`, `DequantizeLinear`), in the
//! arrangement that ONNX Runtime fuses to integer kernels; then outputs are those of integer arithmetic.

mod activations;
mod codes;
mod editor;
mod external_data;
mod forms;
mod unpack;
mod uses;

use std::collections::{BTreeMap, HashSet};

use prost::Message;

pub use self::activations::Range;
pub use self::codes::{Codes, Grid, PackedWeights};
use self::editor::{Editor, MICROSOFT, import, integer, node, raw_tensor};
use self::forms::{Blocks, Dequantize, ZeroPoints};
use self::uses::{Linear, Uses};
use crate::binding::{Binding, How, Source};
use crate::error::GraphError;
use crate::graph::Graph;
use crate::prepared::{Slot, stripped};
use crate::proto::{AttributeProto, DataType, GraphProto, ModelProto, NodeProto};
use crate::tensor::{FloatType, WeightsError};

/// The name that the data file of a graph is referred to by.
pub const DATA_FILE: &str = "model.onnx_data";

/// Since this version, operators that are added mean what they mean here.
const OLDEST_OPSET: i64 = 13;

/// Since this version, an initializer need not be an input.
const OLDEST_IR: i64 = 4;

/// How codes are put into a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Form {
    DequantizeLinear,
    MatMulNBits,
    /// unpacked by operators of the standard when the graph is loaded
    Unpacked,
    /// not as codes: single precision (or the graph's own float type)
    Floats,
}

/// Choices of [`write_model`].
#[derive(Clone, Debug)]
pub struct Choices {
    /// Taken where it is exact; without one, `DequantizeLinear` for eight bits, `MatMulNBits` for four bits in blocks.
    pub prefer: Option<Form>,
    /// By the name of a value in the graph: what it lies between. A layer with int8 weights whose input is named here computes with bytes.
    pub activations: BTreeMap<String, Range>,
    /// Beyond this many bytes of tensors they lie in a file of their own; protobuf ends at two gigabytes.
    pub inline_limit: u64,
}

impl Default for Choices {
    fn default() -> Self {
        Self { prefer: None, activations: BTreeMap::new(), inline_limit: 2_000_000_000 }
    }
}

/// A model as ONNX files.
#[derive(Debug)]
pub struct Written {
    pub model: Vec<u8>,
    /// The contents of [`DATA_FILE`], if the model refers to it.
    pub data: Option<Vec<u8>>,
    /// In the order of the binding.
    pub tensors: Vec<WrittenTensor>,
    /// layers whose inputs are quantized
    pub n_integer_layers: usize,
}

/// What became of one constant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenTensor {
    /// The checkpoint tensor; of one that is put together from several, the graph's name.
    pub name: String,
    pub n_values: usize,
    pub form: Form,
    /// Whether the checkpoint has it as codes.
    pub was_packed: bool,
    /// Bytes of codes, scales and zero points, or of floats; names and nodes not counted.
    pub bytes: u64,
}

/// Fills the bound constants of a graph with the tensors of `model`, which [`Binding::check`] must have accepted.
pub fn write_model(
    graph: &Graph,
    binding: &Binding,
    model: &dyn PackedWeights,
    choices: &Choices,
) -> Result<Written, GraphError> {
    let (mut proto, slots) = stripped(graph, binding)?;
    check_version(&proto)?;
    let original = proto.graph.take().unwrap_or_default();
    let uses = Uses::of(&original);
    let mut editor = Editor::new(&original);
    let mut layers = Layers::default();
    let mut tensors = Vec::with_capacity(slots.len());
    for slot in &slots {
        let before = editor.constants.len();
        let (form, was_packed) = write_slot(slot, model, choices, &uses, &mut editor, &mut layers)?;
        let added = &editor.constants[before..];
        let bytes = added.iter().map(|tensor| tensor.raw_data.as_ref().map_or(0, |data| data.len() as u64));
        let name = match &slot.source {
            Source::Tensor { name, .. } => name.clone(),
            Source::Rows { .. } => slot.name.clone(),
        };
        let n_values = slot.shape.iter().product();
        tensors.push(WrittenTensor { name, n_values, form, was_packed, bytes: bytes.sum() });
    }
    let filled: HashSet<&str> = slots.iter().map(|slot| slot.name.as_str()).collect();
    let n_integer_layers = layers.ranges.len();
    let nodes = rebuilt(&original, &mut editor, &layers);
    let mut graph = original;
    graph.initializer.retain(|tensor| !filled.contains(tensor.name()));
    graph.input.retain(|input| !filled.contains(input.name.as_deref().unwrap_or_default()));
    graph.initializer.extend(std::mem::take(&mut editor.constants));
    graph.node = nodes;
    tidy(&mut graph);
    proto.graph = Some(graph);
    finish(proto, tensors, n_integer_layers, choices.inline_limit)
}

/// What layers are changed to, by the index of their node.
#[derive(Default)]
struct Layers {
    /// inputs and attributes of the `MatMulNBits` that takes the node's place
    blocks: BTreeMap<usize, (Vec<String>, Vec<AttributeProto>)>,
    /// the matrix [inputs, outputs] that takes the place of a `Gemm`'s weight
    turned: BTreeMap<usize, String>,
    /// what the node's first input lies between
    ranges: BTreeMap<usize, Range>,
}

/// Adds one tensor; returns how, and whether it was stored as codes.
fn write_slot(
    slot: &Slot,
    model: &dyn PackedWeights,
    choices: &Choices,
    uses: &Uses<'_>,
    editor: &mut Editor,
    layers: &mut Layers,
) -> Result<(Form, bool), GraphError> {
    let was_packed = slot.source.tensors().into_iter().any(|name| model.is_packed(name));
    let terms = match &slot.source {
        Source::Tensor { name, how: How::SameBytes | How::Reshaped | How::Transposed }
            if slot.element == FloatType::F32 && choices.prefer != Some(Form::Floats) =>
        {
            model.codes(name)?
        }
        _ => Vec::new(),
    };
    let (Some(codes), Source::Tensor { name, how }) = (terms.first(), &slot.source) else {
        let values = slot.values(model)?;
        let tensor = raw_tensor(&slot.name, element(slot.element), &slot.shape, bytes(slot.element, &values));
        editor.constants.push(tensor);
        return Ok((Form::Floats, was_packed));
    };
    let shape = model.shape(name).unwrap_or_else(|| slot.shape.clone());
    let n = slot.shape.iter().product();
    if let Some(reason) = terms.iter().find_map(|codes| codes.problem(n)) {
        return Err(WeightsError { tensor: name.clone(), source: reason.into() }.into());
    }
    if terms.len() > 1 {
        unpacked(editor, slot, *how, &shape, &terms);
        return Ok((Form::Unpacked, true));
    }
    let linear = uses.linear(&slot.name);
    let nodes = linear.as_ref().map(|linear| linear.nodes.clone()).or_else(|| uses.convolutions(&slot.name));
    let ranges = nodes.and_then(|nodes| uses.input_ranges(nodes, &choices.activations));
    if let Some(ranges) = ranges
        && let Some(dequantize) = Dequantize::new(codes, *how, &shape, &slot.shape)
    {
        // Integer kernels take the matrix [inputs, outputs] only.
        let other_way = linear.as_ref().filter(|linear| !linear.inputs_first);
        match other_way.and_then(|_| turned(codes, *how, &shape, &slot.shape)) {
            Some(turned) => {
                let matrix = [slot.shape[1], slot.shape[0]];
                let value = dequantized(editor, &slot.name, &matrix, turned);
                layers.turned.extend(ranges.iter().map(|(node, _)| (*node, value.clone())));
            }
            None => dequantized_as(editor, slot, dequantize),
        }
        // A `Gemm` whose weight stays the other way round is left as it is, with rounded inputs.
        layers.ranges.extend(ranges);
        return Ok((Form::DequantizeLinear, true));
    }
    let wanted = choices.prefer.unwrap_or(match codes.bits {
        8 => Form::DequantizeLinear,
        4 => Form::MatMulNBits,
        _ => Form::Unpacked,
    });
    match wanted {
        Form::DequantizeLinear => {
            if let Some(dequantize) = Dequantize::new(codes, *how, &shape, &slot.shape) {
                dequantized_as(editor, slot, dequantize);
                return Ok((Form::DequantizeLinear, true));
            }
        }
        Form::MatMulNBits => {
            let finer = choices.prefer.is_some();
            let rows_are_outputs = |linear: &Linear| linear.inputs_first == (*how == How::Transposed);
            if let Some(linear) = linear.filter(rows_are_outputs)
                && let Some(blocks) = Blocks::new(codes, &shape, finer)
            {
                let inputs = block_inputs(editor, &slot.name, &blocks);
                let attributes = block_attributes(&blocks);
                layers.blocks.extend(
                    linear.nodes.into_iter().map(|node| (node, (inputs.clone(), attributes.clone()))),
                );
                return Ok((Form::MatMulNBits, true));
            }
        }
        Form::Unpacked | Form::Floats => {}
    }
    unpacked(editor, slot, *how, &shape, &terms);
    Ok((Form::Unpacked, true))
}

/// Adds the sum of what codes stand for, under the slot's own name.
fn unpacked(editor: &mut Editor, slot: &Slot, how: How, shape: &[usize], terms: &[Codes]) {
    let shape = if how == How::Transposed { shape } else { &slot.shape };
    let mut sum: Option<String> = None;
    for codes in terms {
        let value = unpack::unpack(editor, &slot.name, codes, shape);
        sum = Some(match sum {
            None => value,
            Some(sum) => editor.apply(&slot.name, "sum", "Add", &[&sum, &value], Vec::new()),
        });
    }
    if let (How::Transposed, Some(sum)) = (how, &sum) {
        unpack::transposed(editor, &slot.name, sum);
    }
    editor.rename_last(&slot.name);
}

/// The other way round from the graph.
fn turned(codes: &Codes, how: How, shape: &[usize], slot: &[usize]) -> Option<Dequantize> {
    let &[rows, columns] = slot else { return None };
    let other = if how == How::Transposed { How::SameBytes } else { How::Transposed };
    // A matrix that was reshaped on the way has no other way round of its own.
    if how == How::Reshaped && shape != slot {
        return None;
    }
    Dequantize::new(codes, other, shape, &[columns, rows])
}

fn dequantized(editor: &mut Editor, name: &str, shape: &[usize], form: Dequantize) -> String {
    let codes = editor.constant(name, "codes", form.element, shape, form.codes);
    let dims: &[usize] = if form.axis.is_some() { &[form.steps.len()] } else { &[] };
    let scale = editor.floats(name, "scale", dims, &form.steps);
    let zero = form.zero_points.map(|zeros| editor.constant(name, "zero_point", form.element, dims, zeros));
    let inputs: Vec<&str> = [&codes, &scale].into_iter().chain(&zero).map(String::as_str).collect();
    let attributes = form.axis.map(|axis| integer("axis", axis as i64)).into_iter().collect();
    editor.apply(name, "values", "DequantizeLinear", &inputs, attributes)
}

/// [`dequantized`], under the slot's own name.
fn dequantized_as(editor: &mut Editor, slot: &Slot, form: Dequantize) {
    dequantized(editor, &slot.name, &slot.shape, form);
    editor.rename_last(&slot.name);
}

/// Adds the constants of a `MatMulNBits`; returns its inputs after the first.
fn block_inputs(editor: &mut Editor, name: &str, blocks: &Blocks) -> Vec<String> {
    let n_blocks = blocks.inputs / blocks.block;
    let dims = [blocks.outputs, n_blocks];
    let blob = blocks.block * usize::from(blocks.bits) / 8;
    let codes = editor.constant(
        name,
        "codes",
        DataType::Uint8,
        &[blocks.outputs, n_blocks, blob],
        blocks.codes.clone(),
    );
    let scale = editor.floats(name, "scale", &dims, &blocks.steps);
    let zero = match &blocks.zero_points {
        ZeroPoints::Middle => None,
        ZeroPoints::Packed(bytes) => {
            let dims = [blocks.outputs, bytes.len() / blocks.outputs.max(1)];
            Some(editor.constant(name, "zero_point", DataType::Uint8, &dims, bytes.clone()))
        }
        ZeroPoints::Floats(values) => Some(editor.floats(name, "zero_point", &dims, values)),
    };
    [codes, scale].into_iter().chain(zero).collect()
}

fn block_attributes(blocks: &Blocks) -> Vec<AttributeProto> {
    vec![
        integer("K", blocks.inputs as i64),
        integer("N", blocks.outputs as i64),
        integer("bits", i64::from(blocks.bits)),
        integer("block_size", blocks.block as i64),
        // Products in single precision; without it a runtime may round the inputs to int8.
        integer("accuracy_level", 1),
    ]
}

/// The nodes of the graph with changed layers, after the nodes on constants.
fn rebuilt(graph: &GraphProto, editor: &mut Editor, layers: &Layers) -> Vec<NodeProto> {
    let mut added = Vec::with_capacity(graph.node.len());
    let mut inputs = activations::Inputs::default();
    for (index, original) in graph.node.iter().enumerate() {
        let mut layer = original.clone();
        if let Some(range) = layers.ranges.get(&index) {
            inputs.quantize(editor, &mut layer, *range, &mut added);
        }
        if let Some((inputs, attributes)) = layers.blocks.get(&index) {
            let product = node("MatMulNBits", MICROSOFT, &[], "", attributes.clone());
            replace(&layer, product, inputs, editor, &mut added);
        } else if let Some(weight) = layers.turned.get(&index) {
            let product = node("MatMul", "", &[], "", Vec::new());
            replace(&layer, product, std::slice::from_ref(weight), editor, &mut added);
        } else {
            added.push(layer);
        }
    }
    let mut nodes = std::mem::take(&mut editor.nodes);
    nodes.extend(added);
    nodes
}

/// Puts a product, less its inputs and output, in the place of a layer, and adds the bias of a `Gemm`.
fn replace(
    layer: &NodeProto,
    mut product: NodeProto,
    weight: &[String],
    editor: &mut Editor,
    nodes: &mut Vec<NodeProto>,
) {
    let output = layer.output[0].clone();
    let bias = layer.input.get(2).filter(|bias| layer.op_type() == "Gemm" && !bias.is_empty());
    let result = if bias.is_some() { editor.fresh(&output, "product") } else { output.clone() };
    product.name = if bias.is_some() { Some(result.clone()) } else { layer.name.clone() };
    product.input = layer.input[..1].iter().chain(weight).cloned().collect();
    product.output = vec![result.clone()];
    nodes.push(product);
    if let Some(bias) = bias {
        let sum = node("Add", "", &[&result, bias], &output, Vec::new());
        nodes.push(NodeProto { name: layer.name.clone(), ..sum });
    }
}

/// Takes out what exporters leave for people: texts, stack traces with paths of their machine, and shapes that follow from the rest.
fn tidy(graph: &mut GraphProto) {
    graph.value_info.clear();
    graph.doc_string = None;
    graph.metadata_props.clear();
    for node in &mut graph.node {
        node.doc_string = None;
        node.metadata_props.clear();
        for attribute in &mut node.attribute {
            attribute.g.iter_mut().chain(&mut attribute.graphs).for_each(tidy);
        }
    }
}

fn check_version(model: &ModelProto) -> Result<(), GraphError> {
    let standard =
        model.opset_import.iter().find(|set| matches!(set.domain.as_deref(), None | Some("" | "ai.onnx")));
    let version = standard.and_then(|set| set.version).unwrap_or(1);
    if version < OLDEST_OPSET { Err(GraphError::OldOpset { version, oldest: OLDEST_OPSET }) } else { Ok(()) }
}

fn finish(
    mut model: ModelProto,
    tensors: Vec<WrittenTensor>,
    n_integer_layers: usize,
    inline_limit: u64,
) -> Result<Written, GraphError> {
    let graph = model.graph.get_or_insert_default();
    let mut domains: Vec<&str> = graph.node.iter().filter_map(|node| node.domain.as_deref()).collect();
    domains.retain(|&domain| domain == MICROSOFT);
    if !domains.is_empty() {
        import(&mut model, MICROSOFT, 1);
    }
    model.ir_version = Some(model.ir_version.unwrap_or(0).max(OLDEST_IR));
    model.producer_name = Some("merganser".to_owned());
    model.producer_version = None;
    model.doc_string = None;
    model.metadata_props.clear();
    let data = external_data::move_out(model.graph.get_or_insert_default(), inline_limit);
    let encoded = model.encode_to_vec();
    if encoded.len() as u64 > i32::MAX as u64 {
        return Err(GraphError::TooLarge { tensor: "graph".to_owned() });
    }
    Ok(Written { model: encoded, data, tensors, n_integer_layers })
}

fn element(element: FloatType) -> DataType {
    match element {
        FloatType::F16 => DataType::Float16,
        FloatType::Bf16 => DataType::Bfloat16,
        FloatType::F32 => DataType::Float,
        FloatType::F64 => DataType::Double,
    }
}

fn bytes(element: FloatType, values: &[f32]) -> Vec<u8> {
    use half::{bf16, f16};
    match element {
        FloatType::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        FloatType::Bf16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        FloatType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        FloatType::F64 => values.iter().flat_map(|&value| f64::from(value).to_le_bytes()).collect(),
    }
}
