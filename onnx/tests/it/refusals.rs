//! What cannot be run is refused, and the refusal names the tensors.

use merganser_onnx::{Binding, ConstantKind, GraphError, Prepared, Refusal};

use crate::support::{Checkpoint, Fixture};

fn check(fixture: &Fixture, change: impl FnOnce(&mut Checkpoint)) -> Vec<Refusal> {
    let base = fixture.base();
    let binding = Binding::find(&fixture.load(), &base).unwrap();
    let mut model = fixture.perturbed();
    change(&mut model);
    binding.check(&model, &base).unwrap()
}

#[test]
fn a_missing_tensor() {
    let fixture = Fixture::new("deit_timm", "model", "ts17");
    let refusals = check(&fixture, |m| {
        let norm = m.0.remove("norm.weight").unwrap();
        m.0.insert("final_norm.weight".to_owned(), norm);
    });
    let [refusal] = &refusals[..] else { panic!("{refusals:?}") };
    assert_eq!(
        refusal.to_string(),
        "the model has no tensor `norm.weight`, which the graph's `norm.weight` is made of"
    );
}

#[test]
fn a_tensor_of_another_shape() {
    let fixture = Fixture::new("deit_timm", "model", "dyn18");
    let refusals = check(&fixture, |m| {
        m.0.insert("blocks.0.attn.qkv.weight".to_owned(), (vec![32, 96], vec![0.0; 32 * 96]));
    });
    let [refusal] = &refusals[..] else { panic!("{refusals:?}") };
    assert_eq!(
        refusal.to_string(),
        "tensor `blocks.0.attn.qkv.weight` has shape [32, 96], the origin has [96, 32]"
    );
}

#[test]
fn all_mistakes_at_once() {
    let fixture = Fixture::new("clip_hf", "text", "ts17");
    let refusals = check(&fixture, |m| {
        m.0.remove("text_projection.weight").unwrap();
        m.0.remove("text_model.final_layer_norm.bias").unwrap();
        m.0.insert("text_model.embeddings.token_embedding.weight".to_owned(), (vec![2], vec![0.0; 2]));
    });
    assert_eq!(refusals.len(), 3, "{refusals:?}");
}

#[test]
fn tensors_that_the_graph_does_not_use_may_be_anything() {
    let fixture = Fixture::new("clip_hf", "vision", "dyn18");
    let refusals = check(&fixture, |m| {
        m.0.retain(|name, _| !name.starts_with("text_model."));
        m.0.insert("logit_scale".to_owned(), (vec![3], vec![0.0; 3]));
    });
    assert_eq!(refusals, []);
}

#[test]
fn an_origin_that_the_graph_was_not_exported_from() {
    let fixture = Fixture::new("deit_hf", "model", "ts17");
    let other = Fixture::new("clip_hf", "vision", "ts17").base();
    let binding = Binding::find(&fixture.load(), &other).unwrap();
    assert_eq!(binding.check(&other, &other).unwrap()[0], Refusal::NothingBound);

    // Right names, other values: the perturbed checkpoint is not what was exported.
    let wrong = fixture.perturbed();
    let binding = Binding::find(&fixture.load(), &wrong).unwrap();
    let refusals = binding.check(&wrong, &wrong).unwrap();
    let named = |wanted: &str| {
        refusals.iter().any(|r| matches!(r, Refusal::DifferentOrigin { tensor, .. } if tensor == wanted))
    };
    assert!(named("deit.embeddings.cls_token"), "{refusals:?}");
}

#[test]
fn one_tensor_that_differs_between_origin_and_graph() {
    let fixture = Fixture::new("deit_timm", "model", "ts17raw");
    let origin = fixture.base().nudge("blocks.1.norm2.bias");
    let binding = Binding::find(&fixture.load(), &origin).unwrap();
    let refusals = binding.check(&origin, &origin).unwrap();
    assert_eq!(
        refusals,
        [Refusal::DifferentOrigin {
            tensor: "blocks.1.norm2.bias".to_owned(),
            graph_tensor: "blocks.1.norm2.bias".to_owned()
        }]
    );
}

#[test]
fn a_scalar_that_went_into_several_constants() {
    // A checkpoint with two scalars of one value: which of them the graph's exponential comes from is open.
    let fixture = Fixture::new("clip_hf", "model", "dyn18");
    let scale = fixture.base().0["logit_scale"].1.clone();
    let origin = fixture.base().with("other_scale", &[], scale.clone());
    let binding = Binding::find(&fixture.load(), &origin).unwrap();
    assert_eq!(binding.check(&origin, &origin).unwrap(), []);
    let bound = binding.tensors.iter().find(|t| t.name == "exp");
    let changed = origin.clone().nudge("logit_scale").nudge("other_scale");
    let refusals = binding.check(&changed, &origin).unwrap();
    let text = refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    assert!(bound.is_none(), "{bound:?}");
    assert!(text.contains("`logit_scale` differs") && text.contains("`exp`"), "{text}");
    assert!(binding.constants.iter().any(|c| c.name == "exp" && c.kind == ConstantKind::Computed));
}

#[test]
fn a_binding_of_another_graph() {
    let fixture = Fixture::new("deit_timm", "model", "ts17");
    let binding = Binding::find(&fixture.load(), &fixture.base()).unwrap();
    let other = Fixture::new("deit_timm", "model", "dyn18").load();
    assert!(matches!(Prepared::new(&other, &binding), Err(GraphError::OtherGraph { .. })));
}
