//! Equal tensors that exporters merge, and constants in unusual places, in graphs made for the purpose.

use merganser_onnx::proto::{AttributeProto, AttributeType, DataType, GraphProto, NodeProto, TensorProto};
use merganser_onnx::{
    Binding, FloatType, Graph, How, Input, Place, Prepared, Refusal, SessionOptions, Source,
};
use ndarray::{ArrayD, IxDyn, arr1};

use crate::support::{Checkpoint, graph_file, node, runtime, tensor, value};

fn constant(name: &str, tensor: TensorProto) -> NodeProto {
    let attribute = AttributeProto {
        name: Some("value".to_owned()),
        t: Some(tensor),
        r#type: Some(AttributeType::Tensor as i32),
        ..AttributeProto::default()
    };
    NodeProto { attribute: vec![attribute], ..node("Constant", "", &[], name) }
}

/// Writes a graph from `x` to `y`, both float vectors of four values, and reads it again.
fn graph(nodes: Vec<NodeProto>, initializers: Vec<TensorProto>) -> Graph {
    graph_of(nodes, initializers, DataType::Float)
}

fn graph_of(nodes: Vec<NodeProto>, initializers: Vec<TensorProto>, element: DataType) -> Graph {
    graph_file(nodes, initializers, vec![value("x", element, &[4])], vec![value("y", element, &[4])])
}

/// Runs a model on `x = [1, 2, 3, 4]`.
fn run(graph: &Graph, binding: &Binding, model: &Checkpoint) -> Vec<f32> {
    let prepared = Prepared::new(graph, binding).unwrap();
    let mut session = runtime().session(&prepared, model, SessionOptions::default()).unwrap();
    let x: ArrayD<f32> = arr1(&[1.0f32, 2.0, 3.0, 4.0]).into_dyn();
    let outputs = session.run(&[("x", Input::from(x.view()))]).unwrap();
    assert_eq!(outputs[0].0, "y");
    outputs[0].1.iter().copied().collect()
}

const ORIGIN: [f32; 4] = [0.1, 0.2, 0.3, 0.4];

fn twins() -> Checkpoint {
    Checkpoint::default().with("first.bias", &[4], ORIGIN.to_vec()).with("second.bias", &[4], ORIGIN.to_vec())
}

fn different_twins() -> Checkpoint {
    twins().with("second.bias", &[4], vec![10.0, 20.0, 30.0, 40.0])
}

#[test]
fn tensors_merged_without_a_trace_must_stay_equal() {
    let graph = graph(
        vec![node("Add", "", &["x", "first.bias"], "h"), node("Mul", "", &["h", "first.bias"], "y")],
        vec![tensor("first.bias", &[4], &ORIGIN)],
    );
    let binding = Binding::find(&graph, &twins()).unwrap();
    assert_eq!(binding.tensors[0].merged, ["second.bias"]);
    assert_eq!(binding.check(&twins(), &twins()).unwrap(), []);
    let refusals = binding.check(&different_twins(), &twins()).unwrap();
    assert_eq!(
        refusals[0].to_string(),
        "tensors `first.bias`, `second.bias` differ, but the exporter merged them into the graph's `first.bias`"
    );
    assert_eq!(refusals.len(), 1);
}

#[test]
fn a_tensor_used_once_was_not_merged() {
    let graph =
        graph(vec![node("Add", "", &["x", "first.bias"], "y")], vec![tensor("first.bias", &[4], &ORIGIN)]);
    let binding = Binding::find(&graph, &twins()).unwrap();
    assert_eq!(binding.check(&different_twins(), &twins()).unwrap(), []);
    assert_eq!(binding.unused, ["second.bias"]);
}

#[test]
fn an_identity_that_names_the_merged_tensor_is_split() {
    let graph = graph(
        vec![
            node("Identity", "", &["first.bias"], "second.bias"),
            node("Add", "", &["x", "first.bias"], "h"),
            node("Mul", "", &["h", "second.bias"], "y"),
        ],
        vec![tensor("first.bias", &[4], &ORIGIN)],
    );
    let binding = Binding::find(&graph, &twins()).unwrap();
    assert_eq!(binding.tensors.len(), 2);
    assert_eq!(binding.tensors[1].place, Place::Identity);
    assert_eq!(binding.check(&different_twins(), &twins()).unwrap(), []);
    let y = run(&graph, &binding, &different_twins());
    let expected = [1.1f32 * 10.0, 2.2 * 20.0, 3.3 * 30.0, 4.4 * 40.0];
    assert!(y.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4), "{y:?}");
}

#[test]
fn nodes_named_after_modules_tell_equal_tensors_apart() {
    let graph = graph(
        vec![
            node("Add", "/model/second/Add", &["x", "onnx::Add_1"], "h"),
            node("Mul", "/model/first/Mul", &["h", "onnx::Mul_2"], "y"),
        ],
        vec![tensor("onnx::Add_1", &[4], &ORIGIN), tensor("onnx::Mul_2", &[4], &ORIGIN)],
    );
    let binding = Binding::find(&graph, &twins()).unwrap();
    let sources: Vec<_> = binding.tensors.iter().flat_map(|t| t.source.tensors()).collect();
    assert_eq!(sources, ["second.bias", "first.bias"]);
    assert_eq!(binding.check(&different_twins(), &twins()).unwrap(), []);
}

#[test]
fn equal_tensors_that_nothing_tells_apart_must_stay_equal() {
    let graph = graph(
        vec![node("Add", "", &["x", "val_1"], "h"), node("Mul", "", &["h", "val_2"], "y")],
        vec![tensor("val_1", &[4], &ORIGIN), tensor("val_2", &[4], &ORIGIN)],
    );
    let binding = Binding::find(&graph, &twins()).unwrap();
    let refusals = binding.check(&different_twins(), &twins()).unwrap();
    assert!(matches!(&refusals[0], Refusal::Merged { tensors, .. } if tensors.len() == 2), "{refusals:?}");
}

#[test]
fn a_name_behind_a_wrapper_is_enough() {
    let graph = graph(
        vec![node("Add", "", &["x", "m.second.bias"], "h"), node("Mul", "", &["h", "m.first.bias"], "y")],
        vec![tensor("m.first.bias", &[4], &ORIGIN), tensor("m.second.bias", &[4], &ORIGIN)],
    );
    let binding = Binding::find(&graph, &twins()).unwrap();
    let y = run(&graph, &binding, &different_twins());
    assert!((y[0] - 11.0 * 0.1).abs() < 1e-5, "{y:?}");
}

#[test]
fn a_constant_node_becomes_an_initializer() {
    let graph =
        graph(vec![constant("c", tensor("", &[4], &ORIGIN)), node("Add", "", &["x", "c"], "y")], Vec::new());
    let origin = Checkpoint::default().with("bias", &[2, 2], ORIGIN.to_vec());
    let binding = Binding::find(&graph, &origin).unwrap();
    assert_eq!(binding.tensors[0].place, Place::Constant);
    assert_eq!(binding.tensors[0].source, Source::Tensor { name: "bias".to_owned(), how: How::Reshaped });
    let model = Checkpoint::default().with("bias", &[2, 2], vec![1.0, 1.0, 1.0, 1.0]);
    assert_eq!(run(&graph, &binding, &model), [2.0, 3.0, 4.0, 5.0]);
}

#[test]
fn a_weight_in_a_branch_is_lifted_out() {
    let branch = |name: &str, output: &str, op: &str, values: &[f32]| GraphProto {
        name: Some(name.to_owned()),
        node: vec![
            constant(&format!("{name}_c"), tensor("", &[4], values)),
            node(op, "", &["x", &format!("{name}_c")], output),
        ],
        output: vec![value(output, DataType::Float, &[4])],
        ..GraphProto::default()
    };
    let attribute = |name: &str, graph: GraphProto| AttributeProto {
        name: Some(name.to_owned()),
        g: Some(graph),
        r#type: Some(AttributeType::Graph as i32),
        ..AttributeProto::default()
    };
    let condition = TensorProto {
        name: Some("condition".to_owned()),
        data_type: Some(DataType::Bool as i32),
        int32_data: vec![1],
        ..TensorProto::default()
    };
    let branches = NodeProto {
        attribute: vec![
            attribute("then_branch", branch("then", "then_y", "Add", &ORIGIN)),
            attribute("else_branch", branch("else", "else_y", "Mul", &[9.0, 8.0, 7.0, 5.0])),
        ],
        ..node("If", "", &["condition"], "y")
    };
    let graph = graph(vec![branches], vec![condition]);
    let origin = Checkpoint::default().with("bias", &[4], ORIGIN.to_vec()).with(
        "scale",
        &[4],
        vec![9.0, 8.0, 7.0, 5.0],
    );
    let binding = Binding::find(&graph, &origin).unwrap();
    assert!(binding.tensors.iter().all(|t| t.place == Place::Nested) && binding.tensors.len() == 2);
    let model = origin.clone().with("bias", &[4], vec![1.0, 1.0, 1.0, 1.0]);
    assert_eq!(run(&graph, &binding, &model), [2.0, 3.0, 4.0, 5.0]);
}

#[test]
fn a_half_precision_graph_takes_the_rounded_model() {
    // None of these values is a half-precision number.
    let exact = [0.1f32, 0.2, 0.3, 0.7];
    let mut half = tensor("onnx::Add_1", &[4], &[]);
    half.data_type = Some(DataType::Float16 as i32);
    half.int32_data = exact.iter().map(|v| i32::from(half::f16::from_f32(*v).to_bits())).collect();
    let graph = graph_of(vec![node("Add", "", &["x", "onnx::Add_1"], "y")], vec![half], DataType::Float16);
    let origin = Checkpoint::default().with("bias", &[4], exact.to_vec());
    let binding = Binding::find(&graph, &origin).unwrap();
    assert_eq!(binding.tensors[0].element, FloatType::F16);
    let model = Checkpoint::default().with("bias", &[4], vec![0.5, 0.25, 1.0, -4.0]);
    assert_eq!(run(&graph, &binding, &model), [1.5, 2.25, 4.0, 0.0]);
}

#[test]
fn a_fill_that_looks_like_named_tensors_is_a_plain_constant() {
    let zeros = [0.0f32; 5];
    let named = |i: usize| format!("layers.{i}.bias");
    let mut nodes = vec![node("Sub", "", &["pad", "onnx::Sub_1"], "unused")];
    let mut origin = Checkpoint::default().with("weight", &[4], ORIGIN.to_vec());
    let mut initializers = vec![tensor("onnx::Sub_1", &[5], &zeros), tensor("pad", &[5], &[1.0; 5])];
    for i in 0..2 {
        origin = origin.with(&named(i), &[5], zeros.to_vec());
        initializers.push(tensor(&named(i), &[5], &zeros));
        nodes.push(node("Add", "", &["pad", &named(i)], &format!("h{i}")));
    }
    nodes.push(node("Add", "", &["x", "weight"], "y"));
    initializers.push(tensor("weight", &[4], &ORIGIN));
    let graph = graph(nodes, initializers);
    let binding = Binding::find(&graph, &origin).unwrap();
    let changed = origin.clone().nudge(&named(1));
    assert_eq!(binding.check(&changed, &origin).unwrap(), []);
    assert!(binding.constants.iter().any(|c| c.name == "onnx::Sub_1" && c.sources.is_empty()));
}

#[test]
fn rows_are_put_together_again() {
    let rows = |range: std::ops::Range<i32>| range.map(|v| (v as f32).sin()).collect::<Vec<_>>();
    let (a, b) = (rows(0..8), rows(20..24));
    let tokens = [a.clone(), b.clone()].concat();
    let graph = graph(
        vec![
            node("ReduceSum", "", &["tokens", "axes"], "sum"),
            node("Add", "", &["x", "sum"], "h"),
            node("Add", "", &["h", "row"], "y"),
        ],
        vec![
            tensor("tokens", &[3, 4], &tokens),
            tensor("row", &[4], &a[4..]),
            TensorProto {
                name: Some("axes".to_owned()),
                dims: vec![1],
                data_type: Some(DataType::Int64 as i32),
                int64_data: vec![0],
                ..TensorProto::default()
            },
        ],
    );
    // `keepdims` is on by default; the sum is [1, 4] and the output therefore [1, 4].
    let origin = Checkpoint::default().with("a.weight", &[2, 4], a).with("b.weight", &[1, 4], b);
    let binding = Binding::find(&graph, &origin).unwrap();
    assert_eq!(binding.tensors.len(), 2, "{binding:?}");
    let prepared = Prepared::new(&graph, &binding).unwrap();
    let model = Checkpoint::default().with("a.weight", &[2, 4], (0..8).map(|v| v as f32).collect()).with(
        "b.weight",
        &[1, 4],
        vec![100.0; 4],
    );
    let values: Vec<Vec<f32>> = prepared.slots().iter().map(|s| s.values(&model).unwrap()).collect();
    assert_eq!(values[0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 100.0, 100.0, 100.0, 100.0]);
    assert_eq!(values[1], [4.0, 5.0, 6.0, 7.0]);
    let short = model.with("a.weight", &[1, 4], vec![0.0; 4]);
    assert!(prepared.slots()[0].values(&short).is_err());
}

#[test]
fn a_quantized_graph_takes_no_other_model() {
    let mut codes = tensor("codes", &[4, 2], &[]);
    codes.data_type = Some(DataType::Int8 as i32);
    codes.int32_data = vec![1, 2, 3, 4, 5, 6, 7, 8];
    let graph = graph(
        vec![node("DequantizeLinear", "", &["codes", "scale"], "w"), node("Add", "", &["x", "bias"], "y")],
        vec![codes, tensor("scale", &[], &[0.1]), tensor("bias", &[4], &ORIGIN)],
    );
    let origin =
        Checkpoint::default().with("fc.bias", &[4], ORIGIN.to_vec()).with("fc.weight", &[4, 2], vec![0.3; 8]);
    let binding = Binding::find(&graph, &origin).unwrap();
    let refusals = binding.check(&origin.clone().nudge("fc.weight"), &origin).unwrap();
    assert!(refusals[0].to_string().contains("`fc.weight` differs"), "{refusals:?}");
    assert_eq!(binding.check(&origin.clone().nudge("fc.bias"), &origin).unwrap(), []);
}

#[test]
fn inputs_are_checked_before_they_reach_the_runtime() {
    let graph = graph(vec![node("Add", "", &["x", "bias"], "y")], vec![tensor("bias", &[4], &ORIGIN)]);
    let origin = Checkpoint::default().with("bias", &[4], ORIGIN.to_vec());
    let binding = Binding::find(&graph, &origin).unwrap();
    let prepared = Prepared::new(&graph, &binding).unwrap();
    let mut session = runtime().session(&prepared, &origin, SessionOptions::default()).unwrap();
    let array = |shape: &[usize]| ArrayD::<f32>::zeros(IxDyn(shape));
    let error = |session: &mut merganser_onnx::Session, name: &str, input: Input| {
        session.run(&[(name, input)]).unwrap_err().to_string()
    };
    let (right, wrong) = (array(&[4]), array(&[5]));
    assert!(
        error(&mut session, "z", Input::from(right.view())).contains("has no input `z`; its inputs are `x`")
    );
    assert!(error(&mut session, "x", Input::from(wrong.view())).contains("f32 [5]"));
    assert!(session.run(&[]).unwrap_err().to_string().contains("needs input `x`"));
    assert!(session.run(&[("x", Input::from(right.view()))]).is_ok());
}

#[test]
fn a_matrix_of_zeros_is_bound_the_right_way_round_or_not_at_all() {
    let axes = TensorProto {
        name: Some("shape".to_owned()),
        dims: vec![2],
        data_type: Some(DataType::Int64 as i32),
        int64_data: vec![1, 4],
        ..TensorProto::default()
    };
    let graph_with = |name: &str, dims: &[i64]| {
        let zeros = vec![0.0; dims.iter().product::<i64>() as usize];
        graph(
            vec![
                node("Reshape", "", &["x", "shape"], "row"),
                node("MatMul", "", &["row", name], "h"),
                node("Add", "", &["x", "bias"], "y"),
            ],
            vec![axes.clone(), tensor(name, dims, &zeros), tensor("bias", &[4], &ORIGIN)],
        )
    };
    let origin = |shape: &[usize]| {
        let zeros = vec![0.0; shape.iter().product()];
        Checkpoint::default().with("fc.weight", shape, zeros).with("bias", &[4], ORIGIN.to_vec())
    };
    let how = |graph: &Graph, origin: &Checkpoint| {
        let binding = Binding::find(graph, origin).unwrap();
        let changed = origin.clone().nudge("fc.weight");
        let refusals = binding.check(&changed, origin).unwrap();
        let bound = binding.tensors.iter().find(|t| t.source.tensors() == ["fc.weight"]);
        match bound.map(|t| t.source.clone()) {
            Some(Source::Tensor { how, .. }) if refusals.is_empty() => Ok(how),
            _ => Err(refusals),
        }
    };
    assert_eq!(how(&graph_with("val_1", &[4, 3]), &origin(&[3, 4])), Ok(How::Transposed));
    assert_eq!(how(&graph_with("fc.weight", &[4, 4]), &origin(&[4, 4])), Ok(How::SameBytes));
    let refusals = how(&graph_with("val_1", &[4, 4]), &origin(&[4, 4])).unwrap_err();
    assert!(refusals[0].to_string().contains("`fc.weight` differs"), "{refusals:?}");
}

#[test]
fn a_scalar_of_the_same_name_and_another_value_means_another_origin() {
    let graph = graph(
        vec![node("Add", "", &["x", "bias"], "h"), node("Mul", "", &["h", "scale"], "y")],
        vec![tensor("bias", &[4], &ORIGIN), tensor("scale", &[], &[2.5])],
    );
    let origin = Checkpoint::default().with("bias", &[4], ORIGIN.to_vec()).with("scale", &[], vec![2.75]);
    let binding = Binding::find(&graph, &origin).unwrap();
    let refusals = binding.check(&origin, &origin).unwrap();
    assert!(
        matches!(&refusals[..], [Refusal::DifferentOrigin { tensor, .. }] if tensor == "scale"),
        "{refusals:?}"
    );
}
