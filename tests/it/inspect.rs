//! `merganser inspect`: checkpoints of every kind described, and compared with each other.

use crate::names::as_open_clip;
use crate::tensors::{Stored, change, read, read_stored, single, write_stored};
use crate::util::{Lab, test_data};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const BASE: &str = "data/base.safetensors";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tensors/tests/data/torch").join(name)
}

fn inspect(lab: &Lab, args: &[&str]) -> Value {
    lab.json(&[&["inspect"], args].concat())
}

fn tensor<'a>(report: &'a Value, name: &str) -> &'a Value {
    let found = report["tensors"].as_array().unwrap().iter().find(|tensor| tensor["name"] == name);
    found.unwrap_or_else(|| panic!("no tensor `{name}` in {report:#}"))
}

fn names(report: &Value) -> Vec<&str> {
    report["tensors"].as_array().unwrap().iter().map(|tensor| tensor["name"].as_str().unwrap()).collect()
}

#[test]
fn a_checkpoint_is_described_with_norms() {
    let lab = Lab::small();
    let report = inspect(&lab, &[BASE]);
    let stored = read_stored(&lab.path(BASE));
    assert_eq!(names(&report), stored.keys().collect::<Vec<_>>());
    assert_eq!(report["format"], "safetensors");
    assert_eq!(report["bytes"], fs_err::metadata(lab.path(BASE)).unwrap().len());
    assert_eq!(report["family"]["id"], "transformers-clip");
    let mut parameters = 0;
    for (name, (shape, values)) in read(&lab.path(BASE)) {
        let found = tensor(&report, &name);
        assert_eq!((&found["dtype"], &found["shape"]), (&json!("F16"), &json!(shape)), "{name}");
        assert_eq!(found["bytes"], 2 * values.len());
        let squares: f64 = values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        assert!((found["l2"].as_f64().unwrap() - squares.sqrt()).abs() <= 1e-9 * squares.sqrt(), "{name}");
        assert_eq!(
            (&found["max_abs"], &found["non_finite"]),
            (&json!(f64::from(largest)), &json!(0)),
            "{name}"
        );
        parameters += values.len();
    }
    assert_eq!(report["parameters"], parameters);
    for threads in ["1", "3"] {
        assert_eq!(inspect(&lab, &[BASE, "--threads", threads]), report, "threads change nothing");
    }
    let text = lab.ok(["inspect", BASE]).stdout;
    assert!(text.contains("names     `transformers-clip`: 72 of 72") && text.contains("max |x|"), "{text}");
}

#[test]
fn names_can_be_chosen_and_values_left_alone() {
    let lab = Lab::small();
    let report = inspect(&lab, &[BASE, "--no-norms", "--only", "*_norm*", "--skip", "*.bias"]);
    let found = names(&report);
    assert!(!found.is_empty() && found.iter().all(|name| name.contains("_norm") && !name.contains(".bias")));
    assert!(tensor(&report, found[0]).get("l2").is_none());
    let outcome = lab.call(["inspect", BASE, "--only", "a[b"]);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&["`a[b` is not a glob"]);
}

#[test]
fn what_is_not_finite_is_counted_and_left_out_of_norms() {
    let lab = Lab::empty();
    let broken = [3.0, f32::NAN, f32::INFINITY, -4.0];
    let tensors =
        [("a", single(&[2, 2], &broken)), ("b", single(&[1], &[0.5]))].map(|(n, t)| (n.to_owned(), t));
    write_stored(&lab.path("broken.safetensors"), &BTreeMap::from(tensors));
    let report = inspect(&lab, &["broken.safetensors"]);
    let found = tensor(&report, "a");
    assert_eq!(
        (&found["l2"], &found["max_abs"], &found["non_finite"]),
        (&json!(5.0), &json!(4.0), &json!(2))
    );
    assert_eq!(report["family"], Value::Null);
    let text = lab.ok(["inspect", "broken.safetensors"]).stdout;
    assert!(text.contains("1 tensor has values that are NaN or infinite"), "{text}");
    assert!(text.contains("of no known family"), "{text}");
}

#[test]
fn doubles_keep_their_precision_and_integers_have_no_norm() {
    let lab = Lab::empty();
    let double =
        |value: f64| Stored { dtype: Dtype::F64, shape: vec![1], data: value.to_le_bytes().to_vec() };
    let integers = |last: u8| Stored { dtype: Dtype::U16, shape: vec![2], data: vec![1, 0, last, 0] };
    for (file, value, last) in [("a", 1.0 + 1e-12, 2), ("b", 1.0, 3)] {
        let tensors = [("d".to_owned(), double(value)), ("i".to_owned(), integers(last))];
        write_stored(&lab.path(format!("{file}.safetensors")), &BTreeMap::from(tensors));
    }
    let report = inspect(&lab, &["a.safetensors"]);
    assert_eq!(tensor(&report, "d")["max_abs"], 1.0 + 1e-12);
    assert!(tensor(&report, "i").get("l2").is_none());
    let report = inspect(&lab, &["a.safetensors", "b.safetensors"]);
    assert_eq!(tensor(&report, "d")["l2"], 1.0 + 1e-12 - 1.0);
    assert_eq!(tensor(&report, "i")["different_elements"], 1);
    assert_eq!(report["different"], 2);
}

#[test]
fn a_pickled_module_shows_what_became_of_its_names() {
    let lab = Lab::empty();
    let path = fixture("module.pt");
    let report = inspect(&lab, &[path.to_str().unwrap()]);
    assert_eq!(report["format"], "PyTorch");
    assert_eq!(
        report["notes"],
        json!([
            "read the pickled module `src.modeling.ImageEncoder` without executing it",
            "stripped `model.` from 23 names"
        ])
    );
    assert_eq!(tensor(&report, "proj")["stored_name"], "model.proj");
    let text = lab.ok(["inspect", path.to_str().unwrap()]).stdout;
    assert!(text.contains("stored as") && text.contains("model.proj"), "{text}");
    let report = inspect(&lab, &[path.to_str().unwrap(), "--strip-prefix", ""]);
    assert!(tensor(&report, "model.proj").get("stored_name").is_none());
    let nested = fixture("nested_model.pt");
    let report = inspect(&lab, &[nested.to_str().unwrap(), "--key", "model_ema"]);
    assert_eq!(names(&report), ["a.weight", "b"]);
}

#[test]
fn every_container_is_inspected() {
    let lab = Lab::empty();
    for (file, format, n) in [
        ("arrays.npz", "NumPy", 15),
        ("masks.npy", "NumPy", 3),
        ("types_legacy.pt", "PyTorch", 12),
        ("views_5.pkl", "PyTorch", 11),
        ("sharded", "sharded", 2),
        ("sharded/pytorch_model.bin.index.json", "sharded", 2),
        ("single.pt", "PyTorch", 1),
    ] {
        let report = inspect(&lab, &[fixture(file).to_str().unwrap()]);
        assert_eq!(report["format"], format, "{file}");
        assert_eq!(names(&report).len(), n, "{file}");
    }
}

#[test]
fn a_lora_adapter_is_shown_by_what_it_changes() {
    let lab = Lab::empty();
    let adapter = fixture("torch-1.13.1/adapter");
    let report = inspect(&lab, &[adapter.to_str().unwrap()]);
    assert_eq!(report["adapter"]["rank"], 2);
    assert_eq!(report["adapter"]["alpha"], 4.0);
    assert_eq!(report["adapter"]["targets"], json!(["q_proj"]));
    assert_eq!(report["format"], "LoRA adapter (adapter_model.bin)");
    assert!(names(&report).iter().all(|name| name.ends_with("_proj.weight")), "{report:#}");
    let text = lab.ok(["inspect", adapter.to_str().unwrap()]).stdout;
    assert!(text.contains("rank 2, alpha 4 (alpha/rank); targets q_proj"), "{text}");
}

#[test]
fn the_same_twice_is_identical() {
    let lab = Lab::small();
    let report = inspect(&lab, &[BASE, BASE]);
    assert_eq!((&report["identical"], &report["different"]), (&json!(true), &json!(0)));
    assert_eq!(names(&report).len(), read(&lab.path(BASE)).len());
    let text = lab.ok(["inspect", BASE, BASE]).stdout;
    assert!(text.ends_with("identical: 72 tensors\n"), "{text}");
    let report = inspect(&lab, &[BASE, BASE, "--no-norms"]);
    assert!(report.get("identical").is_none(), "values were not read");
}

#[test]
fn differences_are_listed_with_their_size() {
    const CHANGED: &str = "vision_model.post_layernorm.weight";
    const RETYPED: &str = "vision_model.post_layernorm.bias";
    const RESHAPED: &str = "visual_projection.weight";
    let lab = Lab::small();
    let before = read(&lab.path(BASE));
    fs_err::copy(lab.path(BASE), lab.path("other.safetensors")).unwrap();
    change(&lab.path("other.safetensors"), |tensors| {
        let mut values = before[CHANGED].1.clone();
        values[1] += 0.5;
        tensors.insert(CHANGED.to_owned(), half(&before[CHANGED].0, &values));
        tensors.insert(RETYPED.to_owned(), single(&before[RETYPED].0, &before[RETYPED].1));
        let reshaped = single(&[before[RESHAPED].1.len()], &before[RESHAPED].1);
        tensors.insert(RESHAPED.to_owned(), reshaped);
        let moved = tensors.remove("vision_model.embeddings.class_embedding").unwrap();
        tensors.insert("extra".to_owned(), moved);
    });
    let report = inspect(&lab, &[BASE, "other.safetensors"]);
    assert_eq!(report["only_first"], json!(["vision_model.embeddings.class_embedding"]));
    assert_eq!(report["only_second"], json!(["extra"]));
    assert_eq!((&report["identical"], &report["different"]), (&json!(false), &json!(3)));
    let changed = tensor(&report, CHANGED);
    let after = read(&lab.path("other.safetensors"));
    let apart = f64::from(after[CHANGED].1[1]) - f64::from(before[CHANGED].1[1]);
    let norm = before[CHANGED].1.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    assert_eq!(changed["different_elements"], 1);
    assert_eq!((&changed["l2"], &changed["max_abs"]), (&json!(apart), &json!(apart)));
    assert!((changed["relative_l2"].as_f64().unwrap() - apart / norm).abs() < 1e-12);
    let retyped = tensor(&report, RETYPED);
    assert_eq!((&retyped["other_dtype"], &retyped["different_elements"]), (&json!("F32"), &json!(0)));
    let reshaped = tensor(&report, RESHAPED);
    assert_eq!(reshaped["other_shape"], json!([before[RESHAPED].1.len()]));
    assert!(reshaped.get("l2").is_none());
    let text = lab.ok(["inspect", BASE, "other.safetensors"]).stdout;
    assert!(text.ends_with("3 of 71 tensors differ; 1 only in the first, 1 only in the second\n"), "{text}");
    assert!(text.contains("F16 → F32"), "{text}");
}

fn half(shape: &[usize], values: &[f32]) -> Stored {
    let data = values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect();
    Stored { dtype: Dtype::F16, shape: shape.to_vec(), data }
}

#[test]
fn the_same_model_under_another_librarys_names_has_the_same_values() {
    let lab = Lab::small();
    write_stored(&lab.path("clip.safetensors"), &as_open_clip(&read(&lab.path(BASE))));
    let report = inspect(&lab, &[BASE, "clip.safetensors"]);
    let mapped = report["mapped"].as_str().unwrap();
    assert!(
        mapped.starts_with("the second file has the names of `open-clip`, the first file those of"),
        "{mapped}"
    );
    assert_eq!((&report["only_first"], &report["only_second"]), (&json!([]), &json!([])));
    for row in report["tensors"].as_array().unwrap() {
        assert_eq!(row["different_elements"], 0, "{row}");
        assert_eq!(row["other_dtype"], "F32", "{row}");
    }
}

#[test]
fn what_cannot_be_read_is_named_with_its_reason() {
    let lab = Lab::empty();
    lab.write("text.safetensors", "not a checkpoint");
    fs_err::write(lab.path("empty"), b"").unwrap();
    for (file, reason) in [
        ("absent.pt".to_owned(), "does not exist"),
        ("text.safetensors".to_owned(), "the header claims"),
        ("empty".to_owned(), "it is empty"),
        (fixture("refused/evil.pt").display().to_string(), "`posix.system`; nothing of it was executed"),
        (fixture("refused/compressed.npz").display().to_string(), "is compressed"),
    ] {
        let outcome = lab.call(["inspect", &file]);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""), "{outcome}");
        outcome.tells(&[file.as_str(), reason]);
    }
    let outcome = lab.call(["inspect", fixture("single.pt").to_str().unwrap(), "--key", "x"]);
    assert_eq!(outcome.code, 2, "{outcome}");
    assert!(!lab.cache.exists(), "nothing is cached");
}

/// What `tensors/tests/data/hostile/generate.py` wrote.
#[test]
fn files_that_were_made_to_do_harm_are_refused_with_their_name_and_the_reason() {
    let lab = Lab::empty();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tensors/tests/data/hostile");
    let reasons = [
        ("bomb.pt", "member `a/data/0` is compressed (method 8); only stored members can be read in place"),
        ("bomb_of_opcodes.pt", "member `a/data.pkl` is compressed (method 8)"),
        ("enormous.pt", "tensor `w` has shape [1152921504606846976]"),
        ("enormous.safetensors", "needs 4611686018427387904 bytes, its offsets 0 to 8 hold 8"),
        ("long_header.safetensors", "the header claims 1099511627776 bytes, more than the file has: 10"),
        ("negative_strides.pt", "tensor `w` has the negative size, stride or offset -2"),
        ("os_system.pt", "it is a record of `os.system`; nothing of it was executed"),
        ("outside.pt", "member `a/data/../../../0` has a name that points out of the archive"),
        ("overlapping.safetensors", "tensor `b` overlaps tensor `a`"),
    ];
    for (file, reason) in reasons {
        let path = folder.join(file).display().to_string();
        for args in [vec!["inspect", &path], vec!["inspect", &path, "--no-norms", "--json"]] {
            let outcome = lab.call(args);
            assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""), "{outcome}");
            outcome.tells(&[&path, reason]);
        }
    }
    assert!(!lab.path("executed").exists() && !Path::new("executed").exists());
    let files = fs_err::read_dir(&folder).unwrap().count();
    assert_eq!(files, reasons.len() + 1, "every file but the script has a reason");
}

/// A sparse file: what is read is its header.
#[test]
fn a_file_of_10_gb_is_listed_by_its_header() {
    let lab = Lab::empty();
    let elements = 2_600_000_000u64;
    let header =
        format!(r#"{{"w":{{"dtype":"F32","shape":[{elements}],"data_offsets":[0,{}]}}}}"#, 4 * elements);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    fs_err::write(lab.path("large.safetensors"), &file).unwrap();
    let large = fs_err::OpenOptions::new().write(true).open(lab.path("large.safetensors")).unwrap();
    large.set_len(file.len() as u64 + 4 * elements).unwrap();
    let report = inspect(&lab, &["large.safetensors", "--no-norms"]);
    assert_eq!(tensor(&report, "w")["bytes"], 4 * elements);
    assert_eq!(report["parameters"], elements);
}

#[test]
fn files_of_the_suite_in_other_containers_have_the_values_of_their_checkpoints() {
    let Some(data) = test_data("files_of_the_suite_in_other_containers_have_the_values_of_their_checkpoints")
    else {
        return;
    };
    let lab = Lab::empty();
    let clip = data.join("suite/clip");
    let file = |name: &str| clip.join(name).display().to_string();
    let report = inspect(&lab, &[&file("ft_cifar10.safetensors"), &file("pt/ft_cifar10_module.pt")]);
    assert_eq!(report["identical"], true);
    // Rounded to 16 bits: within half a unit in the last place.
    for (stored, original, bound) in [
        ("pt/ft_fashion_nested_fp16.pt", "ft_fashion.safetensors", 2f64.powi(-10)),
        ("pt/ft_mnist_state_dict_bf16.pt", "ft_mnist.safetensors", 2f64.powi(-8)),
    ] {
        let report = inspect(&lab, &[&file(original), &file(stored)]);
        assert_eq!((&report["only_first"], &report["only_second"]), (&json!([]), &json!([])));
        for row in report["tensors"].as_array().unwrap() {
            assert!(row["relative_l2"].as_f64().is_none_or(|relative| relative <= bound), "{stored}: {row}");
        }
    }
}
