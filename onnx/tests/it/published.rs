//! All exports of the project's test data.

use std::time::Instant;

use merganser_onnx::{Binding, Graph, Optimization, Prepared, SessionOptions};

use crate::binding::check_against_truth;
use crate::support::{Checkpoint, Fixture, runtime, test_data};

/// The optimizer of the exporter has computed constants from weights here; a changed model has to be refused.
const REFUSED: [&str; 4] = [
    "sam2_hf/prompt_encoder_mask_decoder.dyn18",
    "sam2_hf/vision_encoder.dyn18",
    "sam2_meta/decoder.dyn18",
    "sam2_meta/encoder.dyn18",
];

#[test]
fn every_fixture_graph_reproduces_or_is_refused() {
    let Some(data) = test_data("every_fixture_graph_reproduces_or_is_refused") else { return };
    let mut n_graphs = 0;
    for folder in fs_err::read_dir(data.join("onnx-fixtures")).unwrap().map(|e| e.unwrap().path()) {
        if !folder.is_dir() {
            continue;
        }
        for file in fs_err::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()) {
            let file = file.to_str().unwrap();
            let Some((graph, exporter)) = file.strip_suffix(".onnx").and_then(|f| f.split_once('.')) else {
                continue;
            };
            let fixture =
                Fixture { folder: folder.clone(), graph: graph.to_owned(), exporter: exporter.to_owned() };
            let label = format!("{}/{graph}.{exporter}", folder.file_name().unwrap().to_str().unwrap());
            check_against_truth(&fixture);
            if REFUSED.contains(&label.as_str()) {
                let binding = Binding::find(&fixture.load(), &fixture.base()).unwrap();
                assert_eq!(binding.check(&fixture.base(), &fixture.base()).unwrap(), [], "{label}");
                let refusals = binding.check(&fixture.perturbed(), &fixture.base()).unwrap();
                let text = refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
                assert!(text.contains("pos"), "{label}: {text}");
                assert_eq!(refusals.len(), binding.fixed_tensors().len(), "{label}: {text}");
                assert!(refusals.len() <= 3, "{label}: {text}");
                assert!(fixture.error(&fixture.base(), "base", Optimization::All) <= 1e-4, "{label}");
            } else {
                for optimization in [Optimization::None, Optimization::All] {
                    let error = fixture.error(&fixture.perturbed(), "perturbed", optimization);
                    assert!(error <= 1e-4, "{label} {optimization:?}: {error:e}");
                }
            }
            n_graphs += 1;
        }
    }
    assert_eq!(n_graphs, 37);
}

#[test]
fn the_trained_models_bind_to_their_exports() {
    let Some(data) = test_data("the_trained_models_bind_to_their_exports") else { return };
    let cases = [
        ("suite/onnx/clip_base.onnx", "suite/clip/base/model.safetensors", 1.0),
        ("suite/onnx/deit.onnx", "suite/deit/model.safetensors", 1.0),
        ("quickstart/clip_vision.onnx", "quickstart/base.safetensors", 1.0),
        ("suite/onnx/sam2_encoder.onnx", "suite/sam2/model.safetensors", 0.5),
        ("suite/onnx/sam2_decoder.onnx", "suite/sam2/model.safetensors", 0.5),
    ];
    for (graph, checkpoint, least_coverage) in cases {
        let origin = Checkpoint::read(&data.join(checkpoint));
        let started = Instant::now();
        let graph = Graph::load(&data.join(graph)).unwrap();
        let binding = Binding::find(&graph, &origin).unwrap();
        let found = started.elapsed();
        assert_eq!(binding.check(&origin, &origin).unwrap(), []);
        assert!(binding.coverage() >= least_coverage, "{}: {}", graph.path().display(), binding.coverage());
        let started = Instant::now();
        let prepared = Prepared::new(&graph, &binding).unwrap();
        let prepared_in = started.elapsed();
        let started = Instant::now();
        runtime().session(&prepared, &origin, SessionOptions::default()).unwrap();
        report(&graph, &binding, [found, prepared_in, started.elapsed()]);
    }
}

#[expect(clippy::print_stderr, reason = "seen only with --nocapture")]
fn report(graph: &Graph, binding: &Binding, [found, prepared, session]: [std::time::Duration; 3]) {
    eprintln!(
        "{}: {} bound, coverage {:.4}, fixed {:?}; load and bind {found:?}, prepare {prepared:?}, session {session:?}",
        graph.path().display(),
        binding.tensors.len(),
        binding.coverage(),
        binding.fixed_tensors(),
    );
}
