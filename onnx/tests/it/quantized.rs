//! Models written into graphs with their codes, and run as they are.

use std::collections::BTreeMap;
use std::sync::Arc;

use merganser_onnx::proto::{DataType, ModelProto};
use merganser_onnx::quantized::{
    Choices, Codes, DATA_FILE, Form, Grid, PackedWeights, Range, Written, write_model,
};
use merganser_onnx::{Binding, Graph, Input, Prepared, SessionOptions, Weights, WeightsError};
use ndarray::{ArrayD, IxDyn};
use proptest::prelude::*;
use prost::Message;

use crate::support::{Checkpoint, Fixture, graph_file, node, relative_error, runtime, tensor, value};

/// A checkpoint of which some tensors are codes.
#[derive(Clone, Default)]
struct Packed {
    plain: Checkpoint,
    codes: BTreeMap<String, Vec<Codes>>,
}

impl Packed {
    fn values_of(codes: &Codes) -> Vec<f32> {
        let value = |(element, &code): (usize, &u16)| {
            let group = element / codes.group;
            let q = f32::from(code);
            match &codes.grid {
                Grid::Step { step, zero_point } => (q - zero_point[group]) * step[group],
                Grid::Inverse { scale, zero_point } => (q - zero_point[group]) / scale[group],
                Grid::Table { table, scale } => table[usize::from(code)] * scale[group],
            }
        };
        codes.values.iter().enumerate().map(value).collect()
    }

    fn with(self, name: &str, shape: &[usize], codes: Codes) -> Self {
        self.with_sum(name, shape, vec![codes])
    }

    fn with_sum(mut self, name: &str, shape: &[usize], terms: Vec<Codes>) -> Self {
        let mut values = Self::values_of(&terms[0]);
        for codes in &terms[1..] {
            values.iter_mut().zip(Self::values_of(codes)).for_each(|(sum, value)| *sum += value);
        }
        self.plain = self.plain.with(name, shape, values);
        self.codes.insert(name.to_owned(), terms);
        self
    }

    /// Codes every tensor with at least two axes.
    fn of(model: &Checkpoint, scheme: impl Fn(&[usize], &[f32]) -> Codes) -> Self {
        let mut packed = Self { plain: model.clone(), codes: BTreeMap::new() };
        for (name, (shape, values)) in &model.0 {
            // Leading axes of one are those of tokens, which graphs expand.
            if shape.len() >= 2 && shape[0] > 1 {
                packed = packed.with(name, shape, scheme(shape, values));
            }
        }
        packed
    }
}

impl Weights for Packed {
    fn names(&self) -> Vec<String> {
        self.plain.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.plain.shape(name)
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        self.plain.values(name)
    }
}

impl PackedWeights for Packed {
    fn is_packed(&self, name: &str) -> bool {
        self.codes.contains_key(name)
    }

    fn codes(&self, name: &str) -> Result<Vec<Codes>, WeightsError> {
        Ok(self.codes.get(name).cloned().unwrap_or_default())
    }
}

/// Symmetric codes, a step per group.
fn symmetric(bits: u8, group: usize, values: &[f32]) -> Codes {
    let middle = f32::from(1u16 << (bits - 1));
    let largest = |group: &[f32]| group.iter().fold(0f32, |m, v| m.max(v.abs()));
    let step: Vec<f32> =
        values.chunks(group).map(|g| (largest(g) / (middle - 1.0).max(1.0)).max(1e-20)).collect();
    let top = 2.0 * middle - 1.0;
    let code = |(i, v): (usize, &f32)| ((v / step[i / group]).round() + middle).clamp(0.0, top) as u16;
    let codes = values.iter().enumerate().map(code).collect();
    let zero_point = vec![middle; step.len()];
    Codes { bits, values: codes, group, grid: Grid::Step { step, zero_point } }
}

/// Affine codes as task vector quantization has them: a scale that divides, and a zero point that may lie far outside of the codes.
fn affine(bits: u8, group: usize, values: &[f32]) -> Codes {
    let top = f32::from(u16::MAX >> (16 - bits));
    let ranges = values.chunks(group).map(|group| {
        let (low, high) = group.iter().fold((f32::MAX, f32::MIN), |(l, h), &v| (l.min(v), h.max(v)));
        let scale = if high > low { top / (high - low) } else { 1.0 };
        (scale, -(scale * low).round())
    });
    let (scale, zero_point): (Vec<f32>, Vec<f32>) = ranges.unzip();
    let code =
        |(i, v): (usize, &f32)| (v * scale[i / group] + zero_point[i / group]).round().clamp(0.0, top) as u16;
    let codes = values.iter().enumerate().map(code).collect();
    Codes { bits, values: codes, group, grid: Grid::Inverse { scale, zero_point } }
}

fn channel(shape: &[usize]) -> usize {
    shape[1..].iter().product()
}

fn write(fixture: &Fixture, model: &Packed, choices: &Choices) -> Written {
    let (graph, base) = (fixture.load(), fixture.base());
    let binding = Binding::find(&graph, &base).unwrap();
    assert_eq!(binding.check(model, &base).unwrap(), []);
    write_model(&graph, &binding, model, choices).unwrap()
}

fn run(
    written: &Written,
    inputs: impl Fn(&[String]) -> Vec<(String, ArrayD<f32>)>,
) -> Vec<(String, ArrayD<f32>)> {
    let data: Vec<(String, Arc<[u8]>)> =
        written.data.iter().map(|data| (DATA_FILE.to_owned(), Arc::from(data.as_slice()))).collect();
    let mut session = runtime().open("written", &written.model, &data, SessionOptions::default()).unwrap();
    let names: Vec<String> = session.input_names().map(str::to_owned).collect();
    let inputs = inputs(&names);
    let inputs: Vec<(&str, Input)> =
        inputs.iter().map(|(n, a)| (n.as_str(), Input::from(a.view()))).collect();
    session.run(&inputs).unwrap()
}

/// The largest difference between the written model and the same values in the graph as evaluations put them there.
fn difference(fixture: &Fixture, model: &Packed, written: &Written) -> f32 {
    let (graph, base, io) = (fixture.load(), fixture.base(), fixture.io());
    let binding = Binding::find(&graph, &base).unwrap();
    let prepared = Prepared::new(&graph, &binding).unwrap();
    let mut injected = runtime().session(&prepared, &model.plain, SessionOptions::default()).unwrap();
    let names: Vec<String> = injected.input_names().map(str::to_owned).collect();
    let expected = injected.run(&io.inputs(&names)).unwrap();
    let data: Vec<(String, Arc<[u8]>)> =
        written.data.iter().map(|data| (DATA_FILE.to_owned(), Arc::from(data.as_slice()))).collect();
    let mut session = runtime().open("written", &written.model, &data, SessionOptions::default()).unwrap();
    let actual = session.run(&io.inputs(&names)).unwrap();
    let pairs = actual.iter().zip(&expected);
    pairs.map(|((_, actual), (_, expected))| relative_error(actual, expected)).fold(0.0, f32::max)
}

fn fixtures() -> Vec<Fixture> {
    [("deit_timm", "model"), ("deit_hf", "model"), ("clip_hf", "vision"), ("clip_hf", "text")]
        .into_iter()
        .flat_map(|(folder, graph)| ["ts17", "dyn18"].map(|exporter| Fixture::new(folder, graph, exporter)))
        .collect()
}

fn count(written: &Written, form: Form) -> usize {
    written.tensors.iter().filter(|tensor| tensor.form == form).count()
}

#[test]
fn written_models_compute_what_their_dequantized_values_compute() {
    for fixture in fixtures() {
        let model = fixture.perturbed();
        let name = fixture.onnx().display().to_string();
        let int8 = Packed::of(&model, |shape, values| symmetric(8, channel(shape), values));
        let written = write(&fixture, &int8, &Choices::default());
        assert!(count(&written, Form::DequantizeLinear) >= 8, "{name}: {:?}", written.tensors);
        assert!(written.tensors.iter().all(|t| !t.was_packed || t.form != Form::Floats), "{name}");
        assert!(difference(&fixture, &int8, &written) < 2e-6, "{name} int8");

        let blocks = Packed::of(&model, |_, values| symmetric(4, 32, values));
        let written = write(&fixture, &blocks, &Choices::default());
        assert!(count(&written, Form::MatMulNBits) >= 8, "{name}: {:?}", written.tensors);
        assert!(difference(&fixture, &blocks, &written) < 2e-6, "{name} 4 bits in blocks");

        let odd = Packed::of(&model, |shape, values| affine(3, channel(shape), values));
        let written = write(&fixture, &odd, &Choices::default());
        assert!(count(&written, Form::Unpacked) >= 8, "{name}: {:?}", written.tensors);
        // The same weights in the same graph once constants are folded.
        assert!(difference(&fixture, &odd, &written) < 5e-7, "{name} 3 bits");
    }
}

#[test]
fn a_model_without_codes_is_written_as_it_is() {
    for fixture in fixtures() {
        let model = Packed { plain: fixture.perturbed(), codes: BTreeMap::new() };
        let written = write(&fixture, &model, &Choices::default());
        assert_eq!(count(&written, Form::Floats), written.tensors.len());
        assert_eq!(difference(&fixture, &model, &written), 0.0, "{}", fixture.onnx().display());
    }
}

#[test]
fn tensors_beyond_the_limit_lie_in_a_file_of_their_own() {
    let fixture = Fixture::new("deit_timm", "model", "ts17");
    let model = Packed::of(&fixture.perturbed(), |shape, values| symmetric(8, channel(shape), values));
    let inline = write(&fixture, &model, &Choices::default());
    let outside = write(&fixture, &model, &Choices { inline_limit: 10_000, ..Choices::default() });
    let data = outside.data.as_ref().unwrap();
    assert!(inline.data.is_none());
    assert!(outside.model.len() + data.len() < inline.model.len() + 10_000);
    assert!(difference(&fixture, &model, &outside) < 2e-6);
    // Other programs, and this one, read it from the folder.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    fs_err::write(&path, &outside.model).unwrap();
    fs_err::write(folder.path().join(DATA_FILE), data).unwrap();
    assert_eq!(Graph::load(&path).unwrap().files().len(), 2);
}

#[test]
fn integer_layers_compute_with_rounded_inputs() {
    for (folder, graph, exporter) in
        [("deit_timm", "model", "ts17"), ("deit_timm", "model", "dyn18"), ("clip_hf", "vision", "dyn18")]
    {
        let fixture = Fixture::new(folder, graph, exporter);
        let model = Packed::of(&fixture.perturbed(), |shape, values| symmetric(8, channel(shape), values));
        let range = Range { min: -8.0, max: 8.0 };
        // Every value of the graph: those that no layer multiplies do not count.
        let graph = fixture.load();
        let nodes = &graph.model().graph.as_ref().unwrap().node;
        let values = nodes.iter().flat_map(|node| node.input.iter().chain(&node.output));
        let activations = values.map(|name| (name.clone(), range)).collect();
        let written = write(&fixture, &model, &Choices { activations, ..Choices::default() });
        assert!(written.n_integer_layers >= 8, "{folder}: {}", written.n_integer_layers);
        let proto = ModelProto::decode(written.model.as_slice()).unwrap();
        let nodes = &proto.graph.as_ref().unwrap().node;
        let quantized = nodes.iter().filter(|node| node.op_type() == "QuantizeLinear").count();
        assert!(quantized >= 4 && quantized <= written.n_integer_layers, "{quantized}");
        let difference = difference(&fixture, &model, &written);
        // Steps of 1/16 in the inputs are felt, and are no more than that.
        assert!(difference > 1e-4 && difference < 0.3, "{folder}: {difference}");
    }
}

/// A layer `y = x·W` or `y = x·Wᵀ + b`, for a weight [outputs, inputs] that the exporter transposed or did not.
fn layer(outputs: usize, inputs: usize, gemm: bool) -> (Graph, Checkpoint) {
    let values: Vec<f32> = (0..outputs * inputs).map(|i| (i as f32 * 0.37).sin()).collect();
    let bias: Vec<f32> = (0..outputs).map(|i| i as f32).collect();
    let transposed: Vec<f32> = (0..inputs)
        .flat_map(|i| (0..outputs).map(move |o| (o, i)))
        .map(|(o, i)| values[o * inputs + i])
        .collect();
    let (rows, columns) = (inputs as i64, outputs as i64);
    let (nodes, constants) = if gemm {
        let mut layer = node("Gemm", "layer", &["x", "w", "b"], "y");
        layer.attribute.push(merganser_onnx::proto::AttributeProto {
            name: Some("transB".to_owned()),
            i: Some(1),
            r#type: Some(merganser_onnx::proto::AttributeType::Int as i32),
            ..Default::default()
        });
        let constants = vec![tensor("w", &[columns, rows], &values), tensor("b", &[columns], &bias)];
        (vec![layer], constants)
    } else {
        let product = node("MatMul", "layer", &["x", "onnx::MatMul_1"], "h");
        let constants =
            vec![tensor("onnx::MatMul_1", &[rows, columns], &transposed), tensor("b", &[columns], &bias)];
        (vec![product, node("Add", "sum", &["h", "b"], "y")], constants)
    };
    let x = value("x", DataType::Float, &[rows, rows]);
    let y = value("y", DataType::Float, &[rows, columns]);
    let graph = graph_file(nodes, constants, vec![x], vec![y]);
    (graph, Checkpoint::default().with("w", &[outputs, inputs], values).with("b", &[outputs], bias))
}

/// Runs the written layer on the unit matrix: the result is the weight, transposed, plus the bias. No product is rounded.
fn weight_of(graph: &Graph, origin: &Checkpoint, model: &Packed, choices: &Choices) -> (Form, Vec<f32>) {
    let binding = Binding::find(graph, origin).unwrap();
    let written = write_model(graph, &binding, model, choices).unwrap();
    let [outputs, inputs] = origin.0["w"].0[..] else { panic!("a matrix") };
    let outputs_of = run(&written, |_| {
        vec![(
            "x".to_owned(),
            ArrayD::from_shape_fn(IxDyn(&[inputs, inputs]), |i| f32::from(u8::from(i[0] == i[1]))),
        )]
    });
    let y = &outputs_of[0].1;
    let values = (0..outputs).flat_map(|o| (0..inputs).map(move |i| (o, i))).map(|(o, i)| y[[i, o]]);
    let form = written.tensors.iter().find(|tensor| tensor.name == "w").unwrap().form;
    (form, values.collect())
}

/// Checks that the weight of a written layer is what the codes stand for, without a bias, to the bit.
fn check_layer(outputs: usize, inputs: usize, gemm: bool, codes: Codes, choices: &Choices) -> Form {
    check_sum(outputs, inputs, gemm, vec![codes], choices)
}

/// [`check_layer`] for a sum of codes.
fn check_sum(outputs: usize, inputs: usize, gemm: bool, terms: Vec<Codes>, choices: &Choices) -> Form {
    let (graph, origin) = layer(outputs, inputs, gemm);
    let model = Packed { plain: origin.clone(), codes: BTreeMap::new() };
    let model = model.with_sum("w", &[outputs, inputs], terms);
    let zero = vec![0.0; outputs];
    let model = Packed { plain: model.plain.with("b", &[outputs], zero), ..model };
    let (form, actual) = weight_of(&graph, &origin, &model, choices);
    let expected = &model.plain.0["w"].1;
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        // 0 + −0 is 0.
        assert!(
            (actual + 0.0).to_bits() == (expected + 0.0).to_bits(),
            "element {i}: {actual} for {expected}"
        );
    }
    form
}

#[test]
fn every_width_group_and_grid_gives_the_exact_weight() {
    let values = |n: usize| -> Vec<f32> { (0..n).map(|i| (i as f32 * 1.7).sin() * 0.3 + 0.1).collect() };
    for gemm in [false, true] {
        for bits in [1, 2, 3, 4, 5, 6, 7, 8, 16] {
            // A row, all, blocks that do not end with rows, and blocks of which the last is short.
            for group in [48, 7 * 48, 16, 32, 100] {
                for codes in [symmetric(bits, group, &values(7 * 48)), affine(bits, group, &values(7 * 48))] {
                    check_layer(7, 48, gemm, codes, &Choices::default());
                }
            }
        }
        let table = (0..16).map(|i| (i as f32 - 7.3) * 0.1).collect();
        let codes = (0..7 * 48).map(|i| (i % 16) as u16).collect();
        let grid = Grid::Table { table, scale: vec![0.3, 0.7, 1.1, 0.2, 0.9, 1.3] };
        assert_eq!(
            check_layer(7, 48, gemm, Codes { bits: 4, values: codes, group: 64, grid }, &Choices::default()),
            Form::Unpacked
        );
    }
}

#[test]
fn the_form_that_is_asked_for_is_taken_where_it_is_exact() {
    let values: Vec<f32> = (0..8 * 64).map(|i| (i as f32 * 1.7).sin()).collect();
    let prefer = |form| Choices { prefer: Some(form), ..Choices::default() };
    for gemm in [false, true] {
        let check = |codes: Codes, form| check_layer(8, 64, gemm, codes, &prefer(form));
        assert_eq!(check(symmetric(4, 64, &values), Form::MatMulNBits), Form::MatMulNBits);
        assert_eq!(check(symmetric(2, 16, &values), Form::MatMulNBits), Form::MatMulNBits);
        assert_eq!(check(symmetric(8, 512, &values), Form::MatMulNBits), Form::MatMulNBits);
        assert_eq!(check(symmetric(3, 64, &values), Form::MatMulNBits), Form::Unpacked);
        assert_eq!(check(symmetric(8, 64, &values), Form::Unpacked), Form::Unpacked);
        assert_eq!(check(symmetric(8, 512, &values), Form::DequantizeLinear), Form::DequantizeLinear);
        assert_eq!(check(symmetric(8, 32, &values), Form::DequantizeLinear), Form::Unpacked);
        assert_eq!(check(symmetric(4, 64, &values), Form::Floats), Form::Floats);
    }
    // Zero points inside and outside of the range of codes, in steps that need no division.
    for zeros in [[0.0, 3.0, 15.0, 7.0], [0.5, -20.0, 8.0, 40.0]] {
        let step = vec![0.25, 0.5, 2.0, 0.125];
        let codes = (0..4 * 32).map(|i| (i * 7 % 16) as u16).collect();
        let grid = Grid::Step { step, zero_point: zeros.to_vec() };
        let codes = Codes { bits: 4, values: codes, group: 32, grid };
        assert_eq!(check_layer(4, 32, false, codes, &Choices::default()), Form::MatMulNBits, "{zeros:?}");
    }
    let grid = Grid::Step { step: vec![0.25; 4], zero_point: vec![3.0, 255.0, 0.0, 128.0] };
    let codes = Codes { bits: 8, values: (0..4 * 32).map(|i| i as u16).collect(), group: 32, grid };
    assert_eq!(check_layer(4, 32, true, codes, &Choices::default()), Form::DequantizeLinear);
}

#[test]
fn stages_of_codes_are_added_in_their_order() {
    let values: Vec<f32> = (0..8 * 40).map(|i| (i as f32 * 1.7).sin()).collect();
    let first = affine(2, 320, &values);
    let left: Vec<f32> =
        values.iter().zip(Packed::values_of(&first)).map(|(value, coded)| value - coded).collect();
    let second = affine(3, 320, &left);
    let third: Vec<f32> =
        left.iter().zip(Packed::values_of(&second)).map(|(value, coded)| value - coded).collect();
    for gemm in [false, true] {
        let terms = vec![first.clone(), second.clone(), affine(8, 320, &third)];
        assert_eq!(check_sum(8, 40, gemm, terms, &Choices::default()), Form::Unpacked);
    }
}

#[test]
fn the_bias_of_a_layer_stays() {
    let values: Vec<f32> = (0..8 * 64).map(|i| (i as f32 * 1.7).sin()).collect();
    let (graph, origin) = layer(8, 64, true);
    let model = Packed { plain: origin.clone(), codes: BTreeMap::new() };
    let model = model.with("w", &[8, 64], symmetric(4, 32, &values));
    let (form, actual) = weight_of(&graph, &origin, &model, &Choices::default());
    assert_eq!(form, Form::MatMulNBits);
    let expected = &model.plain.0["w"].1;
    assert!(actual.iter().zip(expected).enumerate().all(|(i, (a, w))| *a == w + (i / 64) as f32));
}

#[test]
fn the_file_is_as_large_as_its_codes() {
    let values: Vec<f32> = (0..512 * 1024).map(|i| (i as f32 * 1.7).sin()).collect();
    let (graph, origin) = layer(512, 1024, false);
    let n = values.len();
    for (codes, theory) in [
        (symmetric(8, 1024, &values), n + 512 * 4),
        (symmetric(4, 32, &values), n / 2 + n / 32 * 4),
        (symmetric(4, 1024, &values), n / 2 + 512 * 4),
        (affine(3, 1024, &values), n * 3 / 8 + 512 * 8),
        (affine(1, n, &values), n / 8 + 8),
    ] {
        let bits = codes.bits;
        let model = Packed { plain: origin.clone(), codes: BTreeMap::new() }.with("w", &[512, 1024], codes);
        let binding = Binding::find(&graph, &origin).unwrap();
        let written = write_model(&graph, &binding, &model, &Choices::default()).unwrap();
        let (actual, expected) = (written.model.len() as f64, (theory + 512 * 4) as f64);
        assert!((actual / expected - 1.0).abs() < 0.03, "{bits} bits: {actual} bytes, {expected} in theory");
    }
}

#[test]
fn damaged_codes_are_refused_by_name() {
    let (graph, origin) = layer(4, 32, false);
    let good = symmetric(4, 32, &origin.0["w"].1);
    let cases = [
        (Codes { bits: 9, ..good.clone() }, "1 to 8 or 16 bits, got 9"),
        (Codes { values: vec![0; 5], ..good.clone() }, "5 codes for 128 elements"),
        (Codes { values: vec![16; 128], ..good.clone() }, "code 16 has more than 4 bits"),
        (Codes { group: 0, ..good.clone() }, "a group has no elements"),
        (Codes { group: 16, ..good.clone() }, "for 4 of 8 groups"),
        (
            Codes { grid: Grid::Table { table: vec![0.0; 3], scale: vec![1.0; 4] }, ..good },
            "3 entries for 16 codes",
        ),
    ];
    for (codes, reason) in cases {
        let mut model = Packed { plain: origin.clone(), codes: BTreeMap::new() };
        model.codes.insert("w".to_owned(), vec![codes]);
        let binding = Binding::find(&graph, &origin).unwrap();
        let error = write_model(&graph, &binding, &model, &Choices::default()).unwrap_err();
        let text = format!(
            "{error}: {}",
            std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default()
        );
        assert!(text.contains("`w`") && text.contains(reason), "{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the codes are, the graph computes with what they stand for.
    #[test]
    fn any_codes_give_the_exact_weight(
        bits in prop_oneof![1u8..=8, Just(16)],
        group in 1usize..300,
        seeds in prop::collection::vec((any::<u16>(), 1e-3f32..10.0, -300f32..300.0), 8),
        inverse: bool,
        gemm: bool,
    ) {
        let (outputs, inputs) = (5usize, 33usize);
        let n = outputs * inputs;
        let groups = n.div_ceil(group);
        let mask = u16::MAX >> (16 - bits);
        let values = (0..n).map(|i| seeds[i % 8].0.rotate_left(i as u32) & mask).collect();
        let scale: Vec<f32> = (0..groups).map(|g| seeds[g % 8].1).collect();
        let zero_point: Vec<f32> = (0..groups).map(|g| seeds[g % 8].2.round()).collect();
        let grid = if inverse { Grid::Inverse { scale, zero_point } } else { Grid::Step { step: scale, zero_point } };
        check_layer(outputs, inputs, gemm, Codes { bits, values, group, grid }, &Choices::default());
    }
}
