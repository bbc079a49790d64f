//! A model swapped into a graph computes what PyTorch computes.

use merganser_onnx::proto::{DataType, ModelProto};
use merganser_onnx::{
    Binding, FloatType, Graph, Optimization, Prepared, Runtime, RuntimeError, SessionOptions, provision,
};
use prost::Message;

use crate::support::{Fixture, runtime, user_environment};

/// The fixtures' own errors are about 1e-6; a wrong or old weight gives 1e-2 and more.
const TOLERANCE: f32 = 1e-4;

fn check(folder: &str, graph: &str) {
    for exporter in ["ts17", "ts17raw", "dyn18"] {
        let fixture = Fixture::new(folder, graph, exporter);
        for optimization in [Optimization::None, Optimization::Basic, Optimization::All] {
            let error = fixture.error(&fixture.perturbed(), "perturbed", optimization);
            assert!(error <= TOLERANCE, "{folder}/{graph}.{exporter} {optimization:?}: {error:e}");
        }
        let error = fixture.error(&fixture.base(), "base", Optimization::All);
        assert!(error <= TOLERANCE, "{folder}/{graph}.{exporter} base: {error:e}");
    }
}

#[test]
fn clip_vision() {
    check("clip_hf", "vision");
}

#[test]
fn clip_text() {
    check("clip_hf", "text");
}

#[test]
fn deit_of_timm() {
    check("deit_timm", "model");
}

#[test]
fn deit_of_transformers() {
    check("deit_hf", "model");
}

#[test]
fn a_folded_exponential_is_computed_again() {
    let fixture = Fixture::new("clip_hf", "model", "dyn18");
    let error = fixture.error(&fixture.perturbed(), "perturbed", Optimization::All);
    assert!(error <= TOLERANCE, "{error:e}");
}

#[test]
fn another_model_really_changes_the_outputs() {
    let fixture = Fixture::new("deit_timm", "model", "ts17");
    let error = fixture.error(&fixture.base(), "perturbed", Optimization::All);
    assert!(error > 0.1, "{error:e}");
}

#[test]
fn a_graph_of_a_widened_half_precision_checkpoint_binds() {
    let fixture = Fixture::new("deit_timm", "model", "ts17");
    let mut model = ModelProto::decode(fs_err::read(fixture.onnx()).unwrap().as_slice()).unwrap();
    for tensor in &mut model.graph.as_mut().unwrap().initializer {
        if tensor.data_type != Some(DataType::Float as i32) {
            continue;
        }
        let raw = tensor.raw_data.take().unwrap();
        let mut values: Vec<f32> = raw.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
        FloatType::F16.round(&mut values);
        tensor.raw_data = Some(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into());
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("half.onnx");
    fs_err::write(&path, model.encode_to_vec()).unwrap();
    let mut half = fixture.base();
    half.0.values_mut().for_each(|(_, values)| FloatType::F16.round(values));
    let binding = Binding::find(&Graph::load(&path).unwrap(), &half).unwrap();
    let single = Binding::find(&fixture.load(), &fixture.base()).unwrap();
    assert_eq!(binding.tensors, single.tensors);
    assert_eq!(binding.check(&fixture.perturbed(), &half).unwrap(), []);
}

#[test]
fn outputs_do_not_depend_on_the_number_of_threads() {
    let fixture = Fixture::new("clip_hf", "vision", "ts17");
    let (graph, base, io) = (fixture.load(), fixture.base(), fixture.io());
    let prepared = Prepared::new(&graph, &Binding::find(&graph, &base).unwrap()).unwrap();
    let outputs = |intra_threads: usize| {
        let options = SessionOptions { intra_threads, ..SessionOptions::default() };
        let mut session = runtime().session(&prepared, &base, options).unwrap();
        session.run(&io.inputs(&["pixel_values".to_owned()])).unwrap()
    };
    let one = outputs(1);
    assert_eq!(one, outputs(2));
    assert_eq!(one, outputs(8));
}

#[test]
fn a_process_has_one_library() {
    let located = provision::resolve(&user_environment()).unwrap();
    runtime();
    assert!(Runtime::load(&located.path).is_ok());
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("libonnxruntime.so");
    fs_err::write(&other, b"").unwrap();
    assert!(matches!(Runtime::load(&other), Err(RuntimeError::AlreadyLoaded { .. })));
    assert!(matches!(Runtime::load(&folder.path().join("none")), Err(RuntimeError::Load { .. })));
}
