//! Files that are broken or made to do harm: an error that says what is wrong, and nothing else.

use std::path::Path;

use merganser_onnx::proto::{GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto};
use merganser_onnx::{Binding, Graph, GraphError, Prepared};
use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;

use crate::support::Fixture;

fn decode(path: &Path) -> ModelProto {
    ModelProto::decode(fs_err::read(path).unwrap().as_slice()).unwrap()
}

#[test]
fn every_truncation_is_an_error_or_a_graph_but_never_a_panic() {
    let bytes = fs_err::read(Fixture::new("deit_timm", "model", "ts17").onnx()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.onnx");
    for length in (0..400).chain((400..bytes.len()).step_by(1511)) {
        fs_err::write(&path, &bytes[..length]).unwrap();
        let error = Graph::load(&path).unwrap_err();
        assert!(matches!(error, GraphError::NotOnnx { .. }), "{length}: {error}");
        assert!(error.to_string().contains("cut.onnx"), "{error}");
    }
}

#[test]
fn flipped_bytes_never_panic() {
    let fixture = Fixture::new("clip_hf", "text", "dyn18");
    let (bytes, base) = (fs_err::read(fixture.onnx()).unwrap(), fixture.base());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flipped.onnx");
    // A fixed sequence: every byte of the start, then a scatter over the file.
    let scatter = (0..120u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) as usize % bytes.len());
    for at in (0..120).chain(scatter) {
        let mut broken = bytes.clone();
        broken[at] ^= 1 << (at % 8);
        fs_err::write(&path, &broken).unwrap();
        if let Ok(graph) = Graph::load(&path)
            && let Ok(binding) = Binding::find(&graph, &base)
        {
            let _ = binding.check(&base, &base);
            let _ = Prepared::new(&graph, &binding);
        }
    }
}

#[test]
fn a_graph_survives_reading_and_writing() {
    for exporter in ["ts17", "dyn18"] {
        let path = Fixture::new("clip_hf", "vision", exporter).onnx();
        let model = decode(&path);
        let again = ModelProto::decode(model.encode_to_vec().as_slice()).unwrap();
        assert_eq!(model, again);
        // Protobuf writers may order fields differently, but nothing may get lost.
        assert_eq!(model.encoded_len(), fs_err::metadata(&path).unwrap().len() as usize);
    }
}

/// Moves the data of every initializer into a file beside the graph.
fn externalize(model: &mut ModelProto, folder: &Path, location: &str) {
    let mut data = vec![0u8; 16];
    for tensor in &mut model.graph.as_mut().unwrap().initializer {
        let Some(raw) = tensor.raw_data.take() else { continue };
        refer(tensor, location, data.len(), Some(raw.len()));
        data.extend_from_slice(&raw);
    }
    fs_err::write(folder.join("data.bin"), data).unwrap();
}

fn refer(tensor: &mut TensorProto, location: &str, offset: usize, length: Option<usize>) {
    let entry =
        |key: &str, value: String| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value) };
    tensor.data_location = Some(1);
    tensor.external_data = vec![entry("location", location.to_owned()), entry("offset", offset.to_string())];
    tensor.external_data.extend(length.map(|l| entry("length", l.to_string())));
}

#[test]
fn weights_in_a_file_beside_the_graph_bind_like_inline_ones() {
    let fixture = Fixture::new("deit_hf", "model", "ts17");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    let mut model = decode(&fixture.onnx());
    externalize(&mut model, folder.path(), "data.bin");
    fs_err::write(&path, model.encode_to_vec()).unwrap();
    let graph = Graph::load(&path).unwrap();
    assert_eq!(graph.files().len(), 2);
    let inline = Binding::find(&fixture.load(), &fixture.base()).unwrap();
    let external = Binding::find(&graph, &fixture.base()).unwrap();
    assert_eq!(inline.tensors, external.tensors);
    // The digest covers the data file.
    let before = graph.digest();
    let mut data = fs_err::read(folder.path().join("data.bin")).unwrap();
    *data.last_mut().unwrap() ^= 1;
    fs_err::write(folder.path().join("data.bin"), data).unwrap();
    assert_ne!(Graph::load(&path).unwrap().digest(), before);
}

fn with_reference(location: &str, offset: usize, length: Option<usize>) -> Result<Graph, GraphError> {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("graph");
    fs_err::create_dir(&folder).unwrap();
    fs_err::write(parent.path().join("secret.bin"), [0u8; 64]).unwrap();
    fs_err::write(folder.join("data.bin"), [0u8; 64]).unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink(parent.path().join("secret.bin"), folder.join("link.bin")).unwrap();
    let mut tensor = TensorProto {
        name: Some("w".to_owned()),
        dims: vec![4],
        data_type: Some(1),
        ..TensorProto::default()
    };
    refer(&mut tensor, location, offset, length);
    let graph =
        GraphProto { node: vec![NodeProto::default()], initializer: vec![tensor], ..GraphProto::default() };
    let path = folder.join("model.onnx");
    fs_err::write(&path, ModelProto { graph: Some(graph), ..ModelProto::default() }.encode_to_vec()).unwrap();
    Graph::load(&path)
}

#[test]
fn external_data_stays_in_the_folder_of_the_graph() {
    assert!(with_reference("data.bin", 0, Some(16)).is_ok());
    assert!(with_reference("./data.bin", 48, None).is_ok());
    for escape in ["../secret.bin", "/etc/hostname", "", "x/../../secret.bin", "link.bin"] {
        let error = with_reference(escape, 0, Some(16)).unwrap_err().to_string();
        assert!(error.contains("tensor `w` is stored in") && error.contains("outside"), "{escape}: {error}");
    }
}

#[test]
fn external_data_has_to_fit() {
    let error = |offset, length| with_reference("data.bin", offset, length).unwrap_err().to_string();
    assert!(error(60, Some(16)).contains("ends at byte 76 of"));
    assert!(error(60, None).contains("needs 16 bytes"));
    assert!(error(0, Some(12)).contains("needs 16 bytes"));
    assert!(error(usize::MAX, Some(16)).contains("overflow"));
    assert!(error(100, None).contains("which has 64 bytes"));
    assert!(with_reference("no.bin", 0, None).unwrap_err().to_string().contains("no.bin"));
    assert!(with_reference(".", 0, None).unwrap_err().to_string().contains("is not a file"));
}

#[cfg(unix)]
#[test]
fn a_graph_linked_from_a_folder_of_blobs_finds_its_data() {
    // The Hugging Face cache: both files are links into one folder.
    let parent = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (parent.path().join("blobs"), parent.path().join("snapshots"));
    fs_err::create_dir(&blobs).unwrap();
    fs_err::create_dir(&snapshot).unwrap();
    let mut model = decode(&Fixture::new("deit_hf", "model", "ts17").onnx());
    externalize(&mut model, &blobs, "model.onnx_data");
    fs_err::write(blobs.join("aa"), model.encode_to_vec()).unwrap();
    std::os::unix::fs::symlink(blobs.join("aa"), snapshot.join("model.onnx")).unwrap();
    std::os::unix::fs::symlink(blobs.join("data.bin"), snapshot.join("model.onnx_data")).unwrap();
    assert_eq!(Graph::load(&snapshot.join("model.onnx")).unwrap().files().len(), 2);
}

#[test]
fn counting_uses_is_bounded_where_paths_are_exponential() {
    let doubling = |i: usize| NodeProto {
        op_type: Some("Add".to_owned()),
        input: vec![format!("v{i}"); 2],
        output: vec![format!("v{}", i + 1)],
        ..NodeProto::default()
    };
    let first = TensorProto { name: Some("v0".to_owned()), data_type: Some(1), ..TensorProto::default() };
    let first = TensorProto { float_data: vec![1.5], ..first };
    let last = NodeProto { input: vec!["v200".to_owned(), "x".to_owned()], ..NodeProto::default() };
    let graph = GraphProto {
        node: (0..200).map(doubling).chain([last]).collect(),
        initializer: vec![first],
        ..GraphProto::default()
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep.onnx");
    fs_err::write(&path, ModelProto { graph: Some(graph), ..ModelProto::default() }.encode_to_vec()).unwrap();
    assert!(Graph::load(&path).unwrap().use_count("v0") > 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..600)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("any.onnx");
        fs_err::write(&path, bytes).unwrap();
        let _ = Graph::load(&path);
    }

    #[test]
    fn spliced_graphs_never_panic(at in 0usize..130_000, length in 0usize..64, bytes in vec(any::<u8>(), 0..64)) {
        let fixture = Fixture::new("deit_hf", "model", "dyn18");
        let mut file = fs_err::read(fixture.onnx()).unwrap();
        let start = at.min(file.len());
        let end = (start + length).min(file.len());
        file.splice(start..end, bytes);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("spliced.onnx");
        fs_err::write(&path, file).unwrap();
        if let Ok(graph) = Graph::load(&path) {
            let base = fixture.base();
            if let Ok(binding) = Binding::find(&graph, &base) {
                let _ = binding.check(&base, &base);
                let _ = Prepared::new(&graph, &binding);
            }
        }
    }
}
