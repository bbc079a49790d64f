//! The canonical JSON, and what a manifest refuses.

use proptest::prelude::*;

use super::*;
use crate::encoding::{Code, Grouped, Scales, Whole};
use crate::kernels::pack::Bits;

fn entry(name: &str, dtype: DType, shape: &[usize]) -> TensorEntry {
    TensorEntry { name: name.to_owned(), dtype, shape: shape.to_vec(), digest: None }
}

fn file(size: u64) -> FileRef {
    FileRef { digest: blake3::hash(b"file"), size, kind: FileKind::Blob }
}

fn region(offset: u64, length: u64) -> Region {
    Region { file: 0, offset, length, arrangement: None }
}

#[track_caller]
fn check_refused(manifest: Result<Manifest>, expected: &str) {
    let message = manifest.unwrap_err().to_string();
    assert!(message.contains(expected), "{message}");
}

#[test]
fn json_is_stable_and_independent_of_the_order_of_insertion() {
    let digest = Some(blake3::hash(b"a"));
    let tensors = [
        (TensorEntry { digest, ..entry("a", DType::F32, &[2]) }, region(0, 8)),
        (entry("b", DType::I64, &[]), region(8, 8)),
    ];
    let reversed = tensors.iter().rev().cloned().collect();
    let one = Manifest::regions(Content::Checkpoint, vec![file(16)], tensors.to_vec()).unwrap();
    let other = Manifest::regions(Content::Checkpoint, vec![file(16)], reversed).unwrap();
    let json = one.to_json();
    assert_eq!(json, other.to_json());
    assert_eq!(Manifest::from_json(&json).unwrap(), one);
    let hex = blake3::hash(b"a").to_hex();
    let text = String::from_utf8(json).unwrap();
    let start = format!(
        r#"{{"version":1,"content":"checkpoint","tensors":[{{"name":"a","dtype":"F32","shape":[2],"digest":"{hex}"}},{{"name":"b","dtype":"I64","shape":[]}}],"layout":{{"regions":{{"files":["#
    );
    assert!(text.starts_with(&start), "{text}");
    assert_eq!((one.stored_bytes(), one.f32_bytes()), (16, 8));
}

#[test]
fn scales_survive_json_bit_by_bit() {
    for scale in [0.1f32, 1.0 / 3.0, f32::MIN_POSITIVE, 1e-45, f32::MAX, 18_979.672] {
        let bits = Bits::new(8).unwrap();
        let encoding =
            Encoding::Affine { bits, granularity: Whole::Tensor, scale: [scale], zero_point: [-scale] };
        let packed = PackedTensor { encoding, offset: 0, length: 3 };
        let manifest =
            Manifest::packed(Content::TaskVectors, file(3), vec![(entry("a", DType::F32, &[3]), packed)]);
        let manifest = manifest.unwrap();
        assert_eq!(Manifest::from_json(&manifest.to_json()).unwrap(), manifest);
    }
}

#[test]
fn refuses_what_cannot_be_read() {
    let regions = |tensors| Manifest::regions(Content::Checkpoint, vec![file(16)], tensors);
    let a = || entry("a", DType::F32, &[2]);
    check_refused(regions(vec![(a(), region(0, 8)), (a(), region(8, 8))]), "tensor `a` is listed twice");
    check_refused(regions(vec![(a(), region(0, 4))]), "tensor `a` needs 8 bytes, its region has 4");
    check_refused(regions(vec![(a(), region(9, 8))]), "tensor `a` ends at byte 17 of a file of 16");
    check_refused(regions(vec![(a(), region(u64::MAX, 8))]), "of a file of 16");
    let elsewhere = Region { file: 3, ..region(0, 8) };
    check_refused(regions(vec![(a(), elsewhere)]), "tensor `a` lies in file 3, there are 1");
    let huge = entry("a", DType::F32, &[usize::MAX, 4]);
    check_refused(regions(vec![(huge, region(0, 8))]), "size overflows");

    let linear = |dtype, terms| {
        let info = TensorInfo { name: "a".into(), dtype, shape: vec![2] };
        Manifest::linear(Content::TaskVectors, vec![info], terms)
    };
    let term = |coefficient| Term::new(coefficient, blake3::hash(b"x"));
    check_refused(linear(DType::F32, vec![]), "at least one term");
    check_refused(linear(DType::F32, vec![term(1e300)]), "not a finite f32");
    check_refused(linear(DType::F16, vec![term(1.0)]), "must be F32");
}

#[test]
fn factors_name_what_they_are_about() {
    let [basis, masks] = [blake3::hash(b"basis"), blake3::hash(b"masks")];
    let link = |role: &str, artifact| Link {
        role: role.to_owned(),
        member: String::new(),
        artifact,
        provenance: role == "task",
    };
    let parameter = TensorInfo { name: "w".into(), dtype: DType::F32, shape: vec![10, 10] };
    let tensors = vec![(entry("w:high", DType::F32, &[2]), region(0, 8))];
    let manifest =
        Manifest::regions(Content::Coefficients, vec![file(16)], tensors).unwrap().with_links(vec![
            link("basis", basis),
            link("masks", masks),
            link("task", blake3::hash(b"made from it")),
        ]);
    assert_eq!(manifest.f32_bytes(), 8);
    let manifest = manifest.with_parameters(vec![parameter.clone()]).unwrap();
    assert_eq!(Manifest::from_json(&manifest.to_json()).unwrap(), manifest);
    assert_eq!(manifest.operands().collect::<Vec<_>>(), [&basis, &masks]);
    assert_eq!(manifest.linked("basis").map(|link| link.artifact).collect::<Vec<_>>(), [basis]);
    assert_eq!(manifest.f32_bytes(), 400);
    check_refused(manifest.with_parameters(vec![parameter.clone(), parameter]), "tensor `w` is listed twice");
}

#[test]
fn refuses_foreign_json() {
    let good = Manifest::regions(Content::Masks, vec![], vec![]).unwrap().to_json();
    let good = String::from_utf8(good).unwrap();
    let parse = |json: &str| Manifest::from_json(json.as_bytes());
    parse(&good).unwrap();
    check_refused(parse(&good.replace("\"version\":1", "\"version\":2")), "it has version 2");
    check_refused(parse(&good.replace("masks", "faces")), "unknown variant `faces`");
    check_refused(parse(&good.replace("\"content\"", "\"extra\":1,\"content\"")), "unknown field `extra`");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// What is accepted after damage is valid all the same: it can be written, read again and summed up.
    #[test]
    fn damaged_json_never_panics(
        mutations in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(b"0123456789-e.,[]{}\"a".to_vec())), 1..4),
    ) {
        let bits = Bits::new(3).unwrap();
        let affine = Encoding::Affine { bits, granularity: Whole::Tensor, scale: [1.5], zero_point: [0.5] };
        let (elements, scales) = (10, Scales::Double);
        let grouped = Encoding::Grouped(Grouped { bits: Bits::new(4).unwrap(), code: Code::Nf4, elements, scales, stages: 2 });
        let tensors = vec![
            (entry("a", DType::F32, &[4, 5]), PackedTensor { encoding: affine, offset: 1, length: 8 }),
            (entry("b", DType::F32, &[4, 5]), PackedTensor { encoding: grouped, offset: 9, length: 40 }),
        ];
        let mut json = Manifest::packed(Content::TaskVectors, file(90), tensors).unwrap().to_json();
        for (position, byte) in mutations {
            let position = position.index(json.len());
            json[position] = byte;
        }
        if let Ok(manifest) = Manifest::from_json(&json) {
            let _ = (manifest.stored_bytes(), manifest.f32_bytes());
            prop_assert_eq!(Manifest::from_json(&manifest.to_json()).unwrap(), manifest);
        }
    }
}

#[test]
fn a_checkpoint_view_mentions_only_files_it_needs() {
    let part = |path: &str, name: &str| FilePart {
        path: path.into(),
        size: 100,
        tensors: vec![crate::formats::TensorRegion {
            info: TensorInfo { name: name.into(), dtype: DType::F32, shape: vec![2] },
            offset: 80,
            length: 8,
            arrangement: None,
            encoding: None,
            stored_name: None,
        }],
        notes: vec![],
        base: None,
    };
    let digests = [blake3::hash(b"1"), blake3::hash(b"2")];
    let parts = [part("1", "b"), part("2", "a")];
    let manifest =
        Manifest::of_checkpoint(Content::Checkpoint, &parts, &digests, |info| info.name == "a").unwrap();
    assert_eq!(manifest.tensors().len(), 1);
    assert_eq!(manifest.files(), [FileRef { digest: digests[1], size: 100, kind: FileKind::Source }]);
    assert_eq!(manifest.stored_bytes(), 0);
    let both = Manifest::of_checkpoint(Content::Checkpoint, &parts, &digests, |_| true).unwrap();
    let Layout::Regions { regions, .. } = both.layout() else { panic!("regions") };
    assert_eq!(regions.iter().map(|region| region.file).collect::<Vec<_>>(), [1, 0]);
}
