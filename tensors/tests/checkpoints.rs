//! Files that PyTorch and NumPy wrote, read to exactly the tensors that these programs see in them.
//!
//! The small files in `data/torch` come with what they hold as safetensors; `data/torch/generate.py` writes both. The larger ones
//! are in the folder that `MERGANSER_TEST_DATA` names; without it these tests say that they were skipped.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blake3::Hash;
use merganser_tensors::formats::{self, Note, Selection, masks};
use merganser_tensors::manifest::{Content, FileRef};
use merganser_tensors::{DType, FileReader, Manifest, ReadAt, Resolver, Result, Scratch, TensorSource, open};

/// Name, element type, shape and little-endian row-major bytes.
type Tensors = BTreeMap<String, (DType, Vec<usize>, Vec<u8>)>;

#[track_caller]
fn check(file: &str, expected: &str) -> Vec<Note> {
    check_selected(file, expected, &Selection::default())
}

#[track_caller]
fn check_selected(file: &str, expected: &str, selection: &Selection) -> Vec<Note> {
    let (actual, notes) = read(&fixture(file), selection);
    let (expected, _) = read(&fixture(&format!("{expected}.safetensors")), &Selection::default());
    assert_eq!(names(&actual), names(&expected), "{file}");
    for (name, expected) in &expected {
        assert_eq!(&actual[name], expected, "{file}: `{name}`");
    }
    notes
}

#[track_caller]
fn check_refused(file: &str, expected: &str) {
    let path = fixture(&format!("refused/{file}"));
    let message = formats::describe(&path).unwrap_err().to_string();
    assert!(message.contains(expected), "{message}");
    assert!(message.contains(file), "{message}");
}

fn selection(key: Option<&str>, strip_prefix: Option<&str>) -> Selection {
    Selection { key: key.map(str::to_owned), strip_prefix: strip_prefix.map(str::to_owned) }
}

fn shown(notes: &[Note]) -> Vec<String> {
    notes.iter().map(Note::to_string).collect()
}

/// What `versions.py` wrote: the kinds of files that people share, by the oldest torch that can be had and by a new one.
const VERSIONS: [&str; 2] = ["1.13.1", "2.15.0"];

#[test]
fn whole_encoders_of_old_and_new_torch_read_without_their_classes() {
    for version in VERSIONS {
        let folder = format!("torch-{version}");
        for file in ["image_encoder.pt", "image_encoder_legacy.pt", "image_encoder_raw.pt"] {
            let notes = check(&format!("{folder}/{file}"), &format!("{folder}/image_encoder"));
            assert_eq!(
                shown(&notes),
                [
                    "read the pickled module `src.modeling.ImageEncoder` without executing it",
                    "stripped `model.` from 9 names"
                ]
            );
        }
    }
}

#[test]
fn state_dicts_heads_and_training_dictionaries_of_old_and_new_torch() {
    for version in VERSIONS {
        let folder = format!("torch-{version}");
        let check =
            |file: &str, expected: &str| check(&format!("{folder}/{file}"), &format!("{folder}/{expected}"));
        let notes = check("nonlinear_finetuned.pt", "nonlinear_finetuned");
        assert_eq!(shown(&notes), [""; 0], "a plain state dict keeps its names");
        let notes = check("head_MNISTVal.pt", "head_MNISTVal");
        let class = "read the pickled module `src.models.modeling.ClassificationHead` without executing it";
        assert_eq!(shown(&notes), [class]);
        check("training.pt", "head_MNISTVal");
        check("mnist_head.pt", "mnist_head");
        check("finetuned_quantized.pt", "finetuned_quantized");
    }
}

#[test]
fn every_element_type_reads_as_torch_sees_it() {
    check("types.pt", "types");
    check("types_legacy.pt", "types_legacy");
}

#[test]
fn views_strides_and_shared_storages_in_every_container_and_protocol() {
    for protocol in 2..=5 {
        check(&format!("views_{protocol}.pt"), "views");
        check(&format!("views_legacy_{protocol}.pt"), "views");
    }
    for protocol in 3..=5 {
        check(&format!("views_{protocol}.pkl"), "views");
    }
    let parts = formats::describe(&fixture("views_2.pt")).unwrap();
    let offset = |name: &str| parts[0].tensors.iter().find(|t| t.info.name == name).unwrap().offset;
    assert_eq!(offset("tied"), offset("tied_again"), "tied tensors are one region");
}

#[test]
fn a_block_of_a_view_reads_like_that_part_of_the_whole() {
    let (source, _) = opened(&fixture("views_4.pt"), &Selection::default());
    let mut scratch = Scratch::new();
    for tensor in 0..source.tensors().len() {
        let n = source.tensors()[tensor].n_elements();
        let mut whole = vec![0.0; n];
        source.read_f32(tensor, 0..n, &mut whole, &mut scratch).unwrap();
        let bytes = source.tensors()[tensor].size_bytes();
        let mut all = vec![0; bytes as usize];
        source.read_bytes(tensor, 0..bytes, &mut all, &mut scratch).unwrap();
        for start in 0..=n {
            let mut part = vec![0.0; n - start];
            source.read_f32(tensor, start..n, &mut part, &mut scratch).unwrap();
            assert_eq!(part, whole[start..]);
            let start = (start as u64 + 1).min(bytes);
            let mut part = vec![0; (bytes - start) as usize];
            source.read_bytes(tensor, start..bytes, &mut part, &mut scratch).unwrap();
            assert_eq!(part, all[start as usize..]);
        }
    }
}

#[test]
fn big_endian_files_read_as_on_the_machine_that_wrote_them() {
    check("big_endian.pt", "big_endian");
    check("big_endian.npy", "big_endian.npy");
}

#[test]
fn a_whole_module_gives_what_its_state_dict_would() {
    for file in ["module.pt", "module_legacy.pt", "module_raw.pt"] {
        let notes = check(file, "module");
        assert_eq!(
            shown(&notes),
            [
                "read the pickled module `src.modeling.ImageEncoder` without executing it",
                "stripped `model.` from 23 names",
            ],
            "{file}"
        );
        check_selected(file, "module_stored", &selection(None, Some("")));
    }
    let notes = check("module_parallel.pt", "module");
    assert_eq!(
        shown(&notes),
        [
            "read the pickled module `torch.nn.parallel.data_parallel.DataParallel` without executing it",
            "stripped `module.` from 23 names",
            "stripped `model.` from 23 names",
        ]
    );
    check_selected("module_parallel.pt", "module_stored", &selection(None, Some("module.")));
    check("head.pt", "head");
    let parts = formats::describe(&fixture("module.pt")).unwrap();
    let proj = parts[0].tensors.iter().find(|tensor| tensor.info.name == "proj").unwrap();
    assert_eq!(proj.stored_name.as_deref(), Some("model.proj"));
}

#[test]
fn nested_state_dicts_are_found_and_what_is_left_out_is_said() {
    let notes = check("nested_state_dict.pt", "small");
    assert_eq!(
        shown(&notes),
        [
            "read the tensors under `state_dict`",
            "left out 4 entries such as `epoch`: a number",
            "stripped `module.` from 2 names"
        ]
    );
    let notes = check("nested_model.pt", "small");
    assert_eq!(shown(&notes)[1], "left out `model_ema`: a dictionary");
    check("nested_model_state_dict.pt", "small");
    check("parameters.pt", "small");
    let notes = check("with_extras.pt", "small");
    assert_eq!(shown(&notes), ["left out 3 entries such as `note`: text"]);
    check("sharded", "small");
}

#[test]
fn a_key_chooses_an_entry() {
    check_selected("nested_key.pt", "small", &selection(Some("weights.encoder"), None));
    check_selected("nested_state_dict.pt", "small", &selection(Some("state_dict"), None));
    let (ema, _) = read(&fixture("nested_model.pt"), &selection(Some("model_ema"), None));
    assert_eq!(names(&ema), ["a.weight", "b"]);
    let describe = |file: &str, key| {
        formats::describe_selected(&fixture(file), &selection(Some(key), None)).unwrap_err().to_string()
    };
    let message = describe("nested_key.pt", "weight");
    assert!(message.ends_with("it has no entry `weight`; it has `weights`, `other`"), "{message}");
    let message = describe("small.safetensors", "weight");
    assert!(message.ends_with("no entries to choose from, so `key` cannot be `weight`"), "{message}");
    let message = describe("arrays.npz", "weight");
    assert!(message.ends_with("no entries to choose from, so `key` cannot be `weight`"), "{message}");
    check_refused("ambiguous.pt", "several entries hold tensors: `first`, `second`; choose one with `key`");
    check_refused("ambiguous_known.pt", "several entries hold tensors: `state_dict`, `model`");
}

#[test]
fn a_single_tensor_and_a_list_have_names() {
    check("single.pt", "single");
    check("list.pt", "list");
}

#[test]
fn numpy_arrays_in_any_order_and_type() {
    check("c_order.npy", "c_order.npy");
    check("fortran.npy", "fortran.npy");
    check("arrays.npz", "arrays");
}

#[test]
fn packed_masks_are_read_from_every_container() {
    let (expected, _) = read(&fixture("masks.safetensors"), &Selection::default());
    let expected: BTreeMap<String, Vec<u8>> =
        expected.into_iter().map(|(task, (_, _, bytes))| (task, bytes)).collect();
    for file in ["masks.npy", "masks_array.pt", "masks_array_4.pt", "masks_tensor.pt", "masks_5.pkl"] {
        assert_eq!(masks::read(&fixture(file)).unwrap(), expected, "{file}");
    }
    for file in ["masks.npy", "masks_array_4.pt", "masks_tensor.pt", "masks_5.pkl"] {
        check(file, "masks");
    }
    let message = masks::read(&fixture("types.pt")).unwrap_err().to_string();
    assert!(message.contains("tensor `f64` has unsupported element type `F64`"), "{message}");
    let message = masks::read(&fixture("c_order.npy")).unwrap_err().to_string();
    assert!(message.contains("holds no masks"), "{message}");
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    check_refused(
        "quantized.pt",
        "tensor `q` is built by `torch._utils._rebuild_qtensor`, which is not supported: it is quantized",
    );
    check_refused("sparse.pt", "tensor `s` is built by `torch._utils._rebuild_sparse_tensor`");
    check_refused("conjugated.pt", "tensor `c` is lazily conjugated");
    check_refused("complex128.pt", "tensor `c` has unsupported element type `torch.ComplexDoubleStorage`");
    check_refused("meta.pt", "it is on the meta device and has no values");
    check_refused("script.pt", "it is a TorchScript archive");
    for protocol in 0..=2 {
        check_refused(&format!("text_{protocol}.pkl"), "tensor `w` has its values stored as text");
    }
    check_refused("compressed.npz", "member `values.npy` is compressed (method 8)");
    check_refused("objects.npy", "tensor `tensor` has unsupported element type `|O8`");
    check_refused("text.npy", "array `tensor` has unsupported element type `<U1`");
    check_refused("complex.npy", "array `tensor` has unsupported element type `<c16`");
}

#[test]
fn calls_are_not_made() {
    let command = "it holds no tensors: it is a record of `posix.system`; nothing of it was executed";
    check_refused("evil.pt", command);
    for protocol in [0, 2, 4] {
        check_refused(&format!("evil_{protocol}.pkl"), command);
    }
    check_refused("evil_module.pt", "module `child` is a record of `posix.system`");
    let notes = check("evil_extra.pt", "small");
    assert_eq!(shown(&notes), ["left out `payload`: a record of `posix.system`"]);
    assert!(!Path::new("executed").exists());
}

#[test]
fn formats_are_told_by_content_and_not_by_extension() {
    let folder = tempfile::tempdir().unwrap();
    let files =
        ["types.pt", "views_3.pkl", "views_legacy_2.pt", "c_order.npy", "arrays.npz", "small.safetensors"];
    for (i, file) in files.into_iter().enumerate() {
        let expected = formats::describe(&fixture(file)).unwrap();
        for extension in ["pt", "safetensors", "bin", "ckpt", "weights"] {
            let path = folder.path().join(format!("{i}.{extension}"));
            fs_err::copy(fixture(file), &path).unwrap();
            assert_eq!(formats::describe(&path).unwrap()[0].tensors, expected[0].tensors, "{file}");
        }
    }
}

/// The length of a header may be the bytes with which a pickle begins, such as `\x80\x02` or `(d`.
#[test]
fn safetensors_of_every_length_are_not_taken_for_pickles() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.bin");
    for length in [u16::from_le_bytes(*b"\x80\x02"), u16::from_le_bytes(*b"(d"), u16::from_le_bytes(*b"}q")] {
        let json = format!(
            "{:width$}",
            r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#,
            width = length.into()
        );
        fs_err::write(&path, [&u64::from(length).to_le_bytes()[..], json.as_bytes(), &[7]].concat()).unwrap();
        let (tensors, _) = read(&path, &Selection::default());
        assert_eq!(tensors["a"].2, [7]);
    }
}

#[test]
fn suite_state_dict_in_bf16_equals_the_rounded_checkpoint() {
    let Some(data) = test_data("suite_state_dict_in_bf16_equals_the_rounded_checkpoint") else { return };
    let clip = data.join("suite/clip");
    let notes = check_rounded(
        &clip.join("pt/ft_mnist_state_dict_bf16.pt"),
        &clip.join("ft_mnist.safetensors"),
        DType::BF16,
        |x| half::bf16::from_f32(x).to_le_bytes(),
    );
    assert_eq!(shown(&notes), [""; 0]);
}

#[test]
fn suite_nested_checkpoint_in_f16_equals_the_rounded_checkpoint() {
    let Some(data) = test_data("suite_nested_checkpoint_in_f16_equals_the_rounded_checkpoint") else {
        return;
    };
    let clip = data.join("suite/clip");
    let notes = check_rounded(
        &clip.join("pt/ft_fashion_nested_fp16.pt"),
        &clip.join("ft_fashion.safetensors"),
        DType::F16,
        |x| half::f16::from_f32(x).to_le_bytes(),
    );
    assert_eq!(shown(&notes)[0], "read the tensors under `state_dict`");
    assert_eq!(shown(&notes).last().unwrap(), "stripped `module.` from 104 names");
}

#[test]
fn suite_module_equals_the_checkpoint() {
    let Some(data) = test_data("suite_module_equals_the_checkpoint") else { return };
    let clip = data.join("suite/clip");
    let path = clip.join("pt/ft_cifar10_module.pt");
    let (actual, notes) = read(&path, &Selection::default());
    let (expected, _) = read(&clip.join("ft_cifar10.safetensors"), &Selection::default());
    assert!(actual == expected, "values differ");
    assert_eq!(
        shown(&notes),
        [
            "read the pickled module `src.modeling.ImageEncoder` without executing it",
            "stripped `model.` from 104 names"
        ]
    );
    let (stored, _) = read(&path, &selection(None, Some("")));
    let with_prefix: Vec<String> = expected.keys().map(|name| format!("model.{name}")).collect();
    assert_eq!(names(&stored), with_prefix);
}

#[track_caller]
fn check_rounded(path: &Path, original: &Path, dtype: DType, round: fn(f32) -> [u8; 2]) -> Vec<Note> {
    let (actual, notes) = read(path, &Selection::default());
    let (original, _) = read(original, &Selection::default());
    assert_eq!(names(&actual), names(&original));
    for (name, (original_dtype, shape, bytes)) in &original {
        assert_eq!(*original_dtype, DType::F32);
        let (values, rest) = bytes.as_chunks::<4>();
        assert!(rest.is_empty());
        let expected: Vec<u8> = values.iter().flat_map(|bytes| round(f32::from_le_bytes(*bytes))).collect();
        assert!(actual[name] == (dtype, shape.clone(), expected), "`{name}`");
    }
    notes
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/torch").join(name)
}

/// Returns the folder of test data that does not belong to the repository, or says that `test` is skipped: past the test
/// harness, which hides what passing tests print, and in one piece, so that the lines can be counted.
fn test_data(test: &str) -> Option<PathBuf> {
    let folder =
        std::env::var_os("MERGANSER_TEST_DATA").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    if folder.is_none() {
        let line = format!("skipped: {test} (MERGANSER_TEST_DATA is not set)\n");
        std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).unwrap();
    }
    folder
}

fn names(tensors: &Tensors) -> Vec<&str> {
    tensors.keys().map(String::as_str).collect()
}

/// Files by digest.
struct Files(HashMap<Hash, PathBuf>);

impl Resolver for Files {
    fn file(&self, file: &FileRef) -> Result<Arc<dyn ReadAt>> {
        Ok(Arc::new(FileReader::open(&self.0[&file.digest])?))
    }

    fn manifest(&self, artifact: &Hash) -> Result<Manifest> {
        panic!("no artifact {artifact} is referred to")
    }
}

/// Opens a checkpoint the way a pipeline does: by a manifest that survives JSON.
fn opened(path: &Path, selection: &Selection) -> (Arc<dyn TensorSource>, Vec<Note>) {
    let parts = formats::describe_selected(path, selection).unwrap();
    let digests: Vec<Hash> =
        parts.iter().map(|part| blake3::hash(&fs_err::read(&part.path).unwrap())).collect();
    let manifest = Manifest::of_checkpoint(Content::Checkpoint, &parts, &digests, |_| true).unwrap();
    let manifest = Manifest::from_json(&manifest.to_json()).unwrap();
    let files = digests.into_iter().zip(parts.iter().map(|part| part.path.clone())).collect();
    let notes = parts.into_iter().flat_map(|part| part.notes).collect();
    (open(&manifest, &Files(files)).unwrap(), notes)
}

fn read(path: &Path, selection: &Selection) -> (Tensors, Vec<Note>) {
    let (source, notes) = opened(path, selection);
    let mut scratch = Scratch::new();
    let mut tensors = Tensors::new();
    for (i, info) in source.tensors().iter().enumerate() {
        let mut bytes = vec![0; info.size_bytes() as usize];
        source.read_bytes(i, 0..info.size_bytes(), &mut bytes, &mut scratch).unwrap();
        tensors.insert(info.name.clone(), (info.dtype, info.shape.clone(), bytes));
    }
    (tensors, notes)
}
