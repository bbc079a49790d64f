//! Bindings equal the ground truth that was found independently.

use std::collections::BTreeSet;

use merganser_onnx::{Binding, How, Source};
use serde_json::Value;

use crate::support::Fixture;

/// Compares every entry of `<graph>.<exporter>.binding.json`.
pub(crate) fn check_against_truth(fixture: &Fixture) {
    let place = fixture.onnx().display().to_string();
    let binding = Binding::find(&fixture.load(), &fixture.base()).unwrap();
    let truth = fixture.truth();
    let truth = truth["tensors"].as_object().unwrap();
    let base = fixture.base();
    let equal = |a: &str, b: &str| base.0[a].1 == base.0[b].1;
    let mut seen = BTreeSet::new();
    for bound in &binding.tensors {
        if bound.place == merganser_onnx::Place::Identity {
            continue;
        }
        let expected = truth.get(&bound.name).unwrap_or_else(|| panic!("{place}: {} is bound", bound.name));
        seen.insert(bound.name.as_str());
        let how = expected["how"].as_str().unwrap();
        match &bound.source {
            Source::Tensor { name, how: actual } => {
                assert_eq!(actual.to_string(), how, "{place}: {}", bound.name);
                let from = expected["from"].as_str().unwrap();
                assert!(name == from || equal(name, from), "{place}: {} is {from}, not {name}", bound.name);
                let same_shape = Value::from(base.0[name].0.clone()) == expected["shape"];
                assert!(*actual != How::SameBytes || same_shape, "{place}: {}", bound.name);
            }
            Source::Rows { runs, transposed } => {
                assert_eq!(how, "rows", "{place}: {}", bound.name);
                assert!(!transposed);
                let rows: Vec<Value> = runs
                    .iter()
                    .flat_map(|r| (0..r.n_rows).map(|i| serde_json::json!([r.tensor, r.first_row + i])))
                    .collect();
                assert_eq!(Value::from(rows), expected["rows"], "{place}: {}", bound.name);
            }
        }
    }
    for (name, expected) in truth {
        let bound = expected["how"] != "not from the checkpoint as stored";
        assert_eq!(seen.contains(name.as_str()), bound, "{place}: {name}: {expected}");
    }
}

#[test]
fn bindings_equal_the_ground_truth() {
    let graphs = [("clip_hf", "vision"), ("clip_hf", "text"), ("deit_timm", "model"), ("deit_hf", "model")];
    for (folder, graph) in graphs {
        for exporter in ["ts17", "ts17raw", "dyn18"] {
            check_against_truth(&Fixture::new(folder, graph, exporter));
        }
    }
    check_against_truth(&Fixture::new("clip_hf", "model", "dyn18"));
}

#[test]
fn the_other_tower_is_unused_and_nothing_is_under_suspicion() {
    let fixture = Fixture::new("clip_hf", "vision", "ts17");
    let binding = Binding::find(&fixture.load(), &fixture.base()).unwrap();
    assert!(binding.unused.iter().any(|n| n.starts_with("text_model.")));
    assert!(binding.unused.contains(&"logit_scale".to_owned()));
    assert!(!binding.unused.iter().any(|n| n.starts_with("vision_model.")), "{:?}", binding.unused);
    assert_eq!(binding.fixed_tensors(), Vec::<&str>::new());
    assert_eq!(binding.coverage(), 1.0);
}

#[test]
fn a_binding_survives_storage() {
    let fixture = Fixture::new("clip_hf", "model", "dyn18");
    let binding = Binding::find(&fixture.load(), &fixture.base()).unwrap();
    let text = serde_json::to_string(&binding).unwrap();
    assert_eq!(serde_json::from_str::<Binding>(&text).unwrap(), binding);
}
