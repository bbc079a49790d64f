//! What cannot be differentiated, and what is left out because nobody asked for it.

use merganser_onnx::gradient::Forward;
use merganser_onnx::{Binding, Prepared, SessionOptions};

use super::support::{Numbers, Small, int, ints, text, weighted};
use crate::support::{Fixture, runtime};

fn refusal(small: &Small, variables: &[&str]) -> String {
    let mut forward = small.forward();
    let shape = forward.value("y").unwrap().shape;
    let loss = weighted(&mut forward, &Numbers(3).array(&shape));
    forward.differentiate(&loss, variables, &[]).unwrap_err().to_string()
}

#[test]
fn an_op_without_a_rule_is_named_with_what_to_freeze() {
    let small = Small::new(17)
        .input("a", &[3])
        .input("b", &[3])
        .input("c", &[3])
        .node_to("Mul", &["a", "b"], &["ab"], vec![])
        .node_to("Cosh", &["ab"], &["m"], vec![])
        .node("Add", &["m", "c"], vec![]);
    let error = refusal(&small, &["a", "b", "c"]);
    assert!(error.starts_with("no gradient passes through node `Cosh 0` (Cosh) of `"), "{error}");
    assert!(error.ends_with(": there is no rule for this op; to go on, freeze `a`, `b`"), "{error}");
    // Frozen, it is in nobody's way.
    let mut forward = small.forward();
    let loss = weighted(&mut forward, &Numbers(3).array(&[3]));
    assert!(forward.differentiate(&loss, &["c"], &[]).is_ok());
}

#[test]
fn uses_that_a_rule_does_not_cover_say_so() {
    let x = |shape: &[usize]| Small::new(17).input("x", shape);
    let grouped = x(&[1, 2, 4, 4]).input("w", &[2, 1, 3, 3]);
    let error = refusal(&grouped.node("Conv", &["x", "w"], vec![int("group", 2)]), &["w"]);
    assert!(error.contains("convolutions in groups have no rule"), "{error}");
    let reflected = x(&[3]).ints("p", &[1, 1]).node("Pad", &["x", "p"], vec![text("mode", "reflect")]);
    assert!(refusal(&reflected, &["x"]).contains("mode `reflect` has no rule"));
    let power = x(&[3]).input("p", &[3]).node("Pow", &["x", "p"], vec![]);
    assert!(refusal(&power, &["p"]).contains("the exponent of `Pow` has no rule"));
    let same = x(&[1, 1, 4]).input("w", &[1, 1, 3]);
    let attributes = vec![text("auto_pad", "SAME_UPPER"), ints("strides", &[2])];
    assert!(refusal(&same.node("Conv", &["x", "w"], attributes), &["w"]).contains("padding"));
}

#[test]
fn questions_without_an_answer() {
    let small = Small::new(17).input("x", &[3]).node("Exp", &["x"], vec![]);
    let forward = small.forward();
    let y = forward.value("y").unwrap();
    let error = forward.differentiate(&y, &["x"], &[]).unwrap_err().to_string();
    assert_eq!(error, "the loss has shape [3]; it must be one number");
    let mut forward = small.forward();
    let loss = weighted(&mut forward, &Numbers(3).array(&[3]));
    let error = forward.differentiate(&loss, &["z"], &[]).unwrap_err().to_string();
    assert!(error.ends_with("has no float input or weight `z`"), "{error}");
    let mut forward = small.forward();
    assert!(forward.add_input("x", &[1]).unwrap_err().to_string().ends_with("already has a value `x`"));
    let old = Small { opset: 12, ..small };
    let scratch = tempfile::tempdir().unwrap();
    let error = Forward::new(runtime(), &old.prepared(), &[], &[], scratch.path()).unwrap_err().to_string();
    assert!(error.ends_with("uses opset 12; gradients need 13 to 21"), "{error}");
}

#[test]
fn inputs_need_shapes_that_fit() {
    let fixture = Fixture::new("deit_timm", "model", "ts17");
    let graph = fixture.load();
    let prepared = Prepared::new(&graph, &Binding::find(&graph, &fixture.base()).unwrap()).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let new = |shapes: &[(&str, &[usize])], keep: &[&str]| {
        Forward::new(runtime(), &prepared, shapes, keep, scratch.path()).map(|_| ()).unwrap_err().to_string()
    };
    assert!(new(&[], &[]).ends_with("has free dimensions, and no shape is given for it"));
    assert!(new(&[("pixels", &[1, 3, 32, 32])], &[]).contains("has no input `pixels`"));
    let error = new(&[("pixel_values", &[1, 4, 32, 32])], &[]);
    assert!(error.contains("is [batch, 3, 32, 32], so its shape cannot be [1, 4, 32, 32]"), "{error}");
    let error = new(&[("pixel_values", &[1, 3, 32, 32])], &["no such value"]);
    assert!(error.ends_with("has no float value `no such value` of known shape"), "{error}");
    let left: Vec<_> = fs_err::read_dir(scratch.path()).unwrap().collect();
    assert_eq!(left.len(), 0);
}

/// Frozen weights are initializers again, and nothing is computed for them.
#[test]
fn only_what_is_asked_for_is_differentiated() {
    let fixture = Fixture::new("deit_timm", "model", "ts17");
    let graph = fixture.load();
    let prepared = Prepared::new(&graph, &Binding::find(&graph, &fixture.base()).unwrap()).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let differentiate = |wanted: &dyn Fn(&str) -> bool| {
        let shapes: &[(&str, &[usize])] = &[("pixel_values", &[2, 3, 32, 32])];
        let mut forward = Forward::new(runtime(), &prepared, shapes, &[], scratch.path()).unwrap();
        let logits = forward.value("logits").unwrap();
        let square = forward.tape().mul(&logits, &logits);
        let loss = forward.tape().mean(&square);
        let of = |slot: &merganser_onnx::Slot| slot.source.tensors()[0].to_owned();
        let names: Vec<String> =
            forward.weights().iter().filter(|s| wanted(&of(s))).map(|s| s.name.clone()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        forward.differentiate(&loss, &names, &[]).unwrap()
    };
    let n_nodes = |d: &merganser_onnx::gradient::Differentiated| {
        let model =
            <merganser_onnx::proto::ModelProto as prost::Message>::decode(d.prepared().bytes()).unwrap();
        model.graph.unwrap().node.len()
    };
    let (all, head, none) =
        (differentiate(&|_| true), differentiate(&|n| n.starts_with("head.")), differentiate(&|_| false));
    assert_eq!(all.prepared().slots().len(), 0);
    assert_eq!(head.trained_weights().len(), 2);
    assert_eq!(head.prepared().slots().len() + 2, all.trained_weights().len());
    assert!(n_nodes(&head) <= n_nodes(&none) + 8, "{} and {}", n_nodes(&head), n_nodes(&none));
    assert!(n_nodes(&all) > 2 * n_nodes(&head));
    assert!(runtime().session(head.prepared(), &fixture.base(), SessionOptions::default()).is_ok());
}
