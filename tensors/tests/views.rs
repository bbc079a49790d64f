//! Mapped and low-rank views against naive materialization, at odd sizes and through other views.

mod support;

use std::sync::atomic::Ordering;

use merganser_tensors::manifest::{Content, Layout, Term};
use merganser_tensors::stream::{blocks, map_blocks};
use merganser_tensors::views::{LowRankTensor, Part};
use merganser_tensors::{DType, Manifest, Scratch};
use proptest::prelude::*;
use support::{Data, Memory, Tensor, info, read, read_bytes};

fn whole(tensor: &str) -> Part {
    Part::Whole { tensor: tensor.to_owned() }
}

fn rows(tensor: &str, start: usize, end: usize) -> Part {
    Part::Rows { tensor: tensor.to_owned(), start, end }
}

fn columns(tensor: &str, start: usize, end: usize) -> Part {
    Part::Columns { tensor: tensor.to_owned(), start, end }
}

/// What a list of parts is, written from the definition.
fn materialized(tensors: &[Tensor], parts: &[Part], size: usize) -> Vec<u8> {
    let find = |name: &str| tensors.iter().find(|tensor| tensor.name == name).unwrap();
    let mut bytes = Vec::new();
    for part in parts {
        match part {
            Part::Whole { tensor } => bytes.extend(find(tensor).elements().0),
            Part::Rows { tensor, start, end } => {
                let (elements, size) = find(tensor).elements();
                let row = find(tensor).shape[1..].iter().product::<usize>() * size;
                bytes.extend(&elements[start * row..end * row]);
            }
            Part::Columns { tensor, start, end } => {
                let (elements, size) = find(tensor).elements();
                let [n_rows, n_columns] = find(tensor).shape[..] else { panic!("a matrix") };
                for column in *start..*end {
                    for row in 0..n_rows {
                        bytes.extend(&elements[(row * n_columns + column) * size..][..size]);
                    }
                }
            }
            Part::Zeros { elements } => bytes.extend(std::iter::repeat_n(0, elements * size)),
        }
    }
    bytes
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect()
}

/// A mapped artifact of one tensor `w`.
fn mapped(memory: &mut Memory, tensors: &[Tensor], dtype: DType, parts: Vec<Part>) -> Manifest {
    let checkpoint = memory.checkpoint(tensors);
    let artifact = memory.add(&checkpoint);
    let n = materialized(tensors, &parts, dtype.size_bytes()).len() / dtype.size_bytes();
    Manifest::mapped(Content::Checkpoint, artifact, vec![(info("w", dtype, &[n]), parts)]).unwrap()
}

fn any_part(extents: (usize, usize)) -> impl Strategy<Value = Part> {
    let (n_rows, n_columns) = extents;
    prop_oneof![
        Just(whole("a")),
        Just(whole("b")),
        (0..=n_rows, 0..=n_rows).prop_map(|(i, j)| rows("a", i.min(j), i.max(j))),
        (0..=n_columns, 0..=n_columns).prop_map(|(i, j)| columns("a", i.min(j), i.max(j))),
        (0usize..20).prop_map(|elements| Part::Zeros { elements }),
    ]
}

proptest! {
    #[test]
    fn any_range_of_any_parts_is_what_the_parts_say(
        (extents, parts) in (0usize..9, 0usize..9).prop_flat_map(|extents| {
            (Just(extents), prop::collection::vec(any_part(extents), 0..6))
        }),
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::I64, DType::U8]),
        a in any::<prop::sample::Index>(), b in any::<prop::sample::Index>(),
    ) {
        let tensors = [
            Tensor::bytes("a", dtype, &[extents.0, extents.1]),
            Tensor::bytes("b", dtype, &[3, 1, 2]),
        ];
        let mut memory = Memory::default();
        let manifest = mapped(&mut memory, &tensors, dtype, parts.clone());
        prop_assert_eq!(&Manifest::from_json(&manifest.to_json()).unwrap(), &manifest);
        let source = memory.open(&manifest);
        let expected = materialized(&tensors, &parts, dtype.size_bytes());
        prop_assert_eq!(read_bytes(&*source, "w"), &expected[..]);
        let (a, b) = (a.index(expected.len() + 1), b.index(expected.len() + 1));
        let range = a.min(b)..a.max(b);
        let mut bytes = vec![0; range.len()];
        source.read_bytes(0, range.start as u64..range.end as u64, &mut bytes, &mut Scratch::new()).unwrap();
        prop_assert_eq!(&bytes[..], &expected[range.clone()]);
        if dtype == DType::F32 {
            let range = range.start / 4..range.end / 4;
            let mut values = vec![0.0; range.len()];
            source.read_f32(0, range.clone(), &mut values, &mut Scratch::new()).unwrap();
            let same = values.iter().zip(&floats(&expected)[range]).all(|(x, y)| x.to_bits() == y.to_bits());
            prop_assert!(same);
        }
    }

    #[test]
    fn products_are_the_rounded_sums_whatever_is_asked_for(
        (m, r, n) in (1usize..7, 0usize..5, 1usize..7), transposed in any::<bool>(), scale in -3f64..3.0,
        a in any::<prop::sample::Index>(), b in any::<prop::sample::Index>(),
    ) {
        let tensors = [Tensor::numbered("left", &[m, r]), Tensor::numbered("right", &[r, n])];
        let expected = product(&tensors, scale, transposed);
        let mut memory = Memory::default();
        let manifest = low_rank(&mut memory, &tensors, scale, transposed);
        prop_assert_eq!(&Manifest::from_json(&manifest.to_json()).unwrap(), &manifest);
        let source = memory.open(&manifest);
        prop_assert_eq!(read(&*source, "w"), &expected[..]);
        let (a, b) = (a.index(expected.len() + 1), b.index(expected.len() + 1));
        let range = a.min(b)..a.max(b);
        let mut values = vec![0.0; range.len()];
        source.read_f32(0, range.clone(), &mut values, &mut Scratch::new()).unwrap();
        prop_assert_eq!(values, &expected[range]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// What is accepted after damage is valid all the same, and opening it never panics.
    #[test]
    fn damaged_descriptions_of_views_never_panic(
        mutations in prop::collection::vec(
            (any::<prop::sample::Index>(), prop::sample::select(b"0123456789-e.,[]{}\"ab".to_vec())), 1..4,
        ),
        which in any::<bool>(),
    ) {
        let mut memory = Memory::default();
        let checkpoint = memory.checkpoint(&[Tensor::numbered("a", &[4, 2]), Tensor::numbered("b", &[2, 3])]);
        let artifact = checkpoint.view_digest();
        memory.add(&checkpoint);
        let manifest = if which {
            let parts = vec![whole("a"), rows("b", 0, 1), columns("a", 1, 2), Part::Zeros { elements: 5 }];
            Manifest::mapped(Content::Checkpoint, artifact, vec![(info("w", DType::F32, &[4, 5]), parts)])
        } else {
            let product = LowRankTensor { left: "a".into(), right: "b".into(), scale: 0.5, transposed: true };
            Manifest::low_rank(Content::TaskVectors, artifact, vec![(info("w", DType::F32, &[3, 4]), product)])
        };
        let mut json = manifest.unwrap().with_views(vec![checkpoint]).unwrap().to_json();
        for (position, byte) in mutations {
            let position = position.index(json.len());
            json[position] = byte;
        }
        if let Ok(manifest) = Manifest::from_json(&json) {
            prop_assert_eq!(&Manifest::from_json(&manifest.to_json()).unwrap(), &manifest);
            let _ = (manifest.stored_bytes(), manifest.f32_bytes(), manifest.operands().count());
            if let Ok(source) = merganser_tensors::open(&manifest, &memory) {
                for tensor in source.tensors().iter().filter(|tensor| tensor.n_elements() < 1000) {
                    read_bytes(&*source, &tensor.name);
                }
            }
        }
    }
}

#[test]
fn blocks_of_transposes_are_exact_for_narrow_wide_and_thin_matrices() {
    // Around the width up to which whole rows are read, and more than one tile either way.
    for (n_rows, n_columns) in
        [(1, 70_001), (70_001, 1), (97, 2047), (97, 2048), (41, 2049), (5003, 97), (3, 70_001), (300, 301)]
    {
        let tensors = [Tensor::numbered("a", &[n_rows, n_columns])];
        let mut memory = Memory::default();
        let (from, to) = (n_columns / 5, n_columns - n_columns / 7);
        for parts in [vec![columns("a", 0, n_columns)], vec![columns("a", from, to)]] {
            let manifest = mapped(&mut memory, &tensors, DType::F32, parts.clone());
            let source = memory.open(&manifest);
            let expected = floats(&materialized(&tensors, &parts, 4));
            let mut scratch = Scratch::new();
            for range in blocks(expected.len()) {
                let mut values = vec![0.0; range.len()];
                source.read_f32(0, range.clone(), &mut values, &mut scratch).unwrap();
                assert_eq!(values, expected[range.clone()], "{n_rows} × {n_columns}, {range:?}");
            }
            assert_eq!(read(&*source, "w"), expected);
            let bytes: Vec<u8> = expected.iter().flat_map(|value| value.to_le_bytes()).collect();
            assert_eq!(read_bytes(&*source, "w"), bytes);
        }
    }
}

#[test]
fn a_split_and_a_join_read_each_row_once() {
    let mut memory = Memory::default();
    let fused = Tensor::numbered("fused", &[3 * 400, 300]);
    let checkpoint = memory.checkpoint(std::slice::from_ref(&fused));
    let artifact = memory.add(&checkpoint);
    let part = |name: &str, index: usize| {
        (info(name, DType::F32, &[400, 300]), vec![rows("fused", index * 400, (index + 1) * 400)])
    };
    let split =
        Manifest::mapped(Content::Checkpoint, artifact, vec![part("q", 0), part("k", 1), part("v", 2)])
            .unwrap();
    let split_artifact = memory.add(&split);
    let joined = vec![(info("fused", DType::F32, &[1200, 300]), vec![whole("q"), whole("k"), whole("v")])];
    let joined = Manifest::mapped(Content::Checkpoint, split_artifact, joined).unwrap();
    let source = memory.open(&joined);
    let n_blocks = blocks(1200 * 300).len();
    memory.reads.store(0, Ordering::Relaxed);
    let Data::Values(expected) = &fused.data else { panic!("values") };
    let same = map_blocks(&*source, 0, |range, values| Ok(values == &expected[range])).unwrap();
    assert!(same.iter().all(|same| *same));
    // A block that crosses from one part to the next is two reads, one of them for each.
    assert_eq!(memory.reads.load(Ordering::Relaxed), n_blocks + 2);
}

#[test]
fn a_difference_from_a_mapped_checkpoint_is_the_difference_of_its_values() {
    let mut memory = Memory::default();
    let base = Tensor::numbered("w", &[5, 7]);
    let tuned = Tensor::numbered("theirs", &[7, 5]);
    let base_manifest = memory.checkpoint(std::slice::from_ref(&base));
    let base_artifact = memory.add(&base_manifest);
    let tuned_manifest = memory.checkpoint(std::slice::from_ref(&tuned));
    let tuned_artifact = memory.add(&tuned_manifest);
    let renamed = vec![(info("w", DType::F32, &[5, 7]), vec![columns("theirs", 0, 5)])];
    let renamed = Manifest::mapped(Content::Checkpoint, tuned_artifact, renamed).unwrap();
    let terms = vec![Term::new(1.0, renamed.view_digest()), Term::new(-1.0, base_artifact)];
    let delta = Manifest::linear(Content::TaskVectors, vec![info("w", DType::F32, &[5, 7])], terms).unwrap();
    let unresolved = memory.refused(&delta);
    assert!(unresolved.contains("not found"), "{unresolved}");
    let delta = delta.with_views(vec![renamed]).unwrap();
    assert_eq!(Manifest::from_json(&delta.to_json()).unwrap(), delta);
    // What the store must hold for it: not the view that it describes itself, but what that is made of.
    assert_eq!(delta.operands().copied().collect::<Vec<_>>(), [base_artifact, tuned_artifact]);
    assert!(delta.files().is_empty());
    let actual = read(&*memory.open(&delta), "w");
    let theirs = floats(&materialized(&[tuned], &[columns("theirs", 0, 5)], 4));
    let Data::Values(ours) = base.data else { panic!("values") };
    let expected: Vec<f32> = theirs.iter().zip(&ours).map(|(tuned, base)| tuned - base).collect();
    assert_eq!(actual, expected);
}

#[test]
fn a_base_stays_shared_among_differences_from_mapped_checkpoints() {
    let n = 3 * 65_536 + 5;
    let mut memory = Memory::default();
    let base = memory.checkpoint(&[Tensor::numbered("w", &[n])]);
    let base_artifact = memory.add(&base);
    let deltas: Vec<Manifest> = (0..8)
        .map(|task| {
            let tuned = memory.checkpoint(&[Tensor::numbered(&format!("module.w{task}"), &[n])]);
            let part = whole(&format!("module.w{task}"));
            let tuned_artifact = memory.add(&tuned);
            let view = Manifest::mapped(
                Content::Checkpoint,
                tuned_artifact,
                vec![(info("w", DType::F32, &[n]), vec![part])],
            );
            let view = view.unwrap();
            let terms = vec![Term::new(1.0, view.view_digest()), Term::new(-1.0, base_artifact)];
            let delta =
                Manifest::linear(Content::TaskVectors, vec![info("w", DType::F32, &[n])], terms).unwrap();
            delta.with_views(vec![view]).unwrap()
        })
        .collect();
    let sources: Vec<_> = deltas.iter().map(|delta| memory.open(delta)).collect();
    let mut scratch = Scratch::new();
    for range in blocks(n) {
        memory.reads.store(0, Ordering::Relaxed);
        let mut out = vec![0.0; range.len()];
        for source in &sources {
            source.add_scaled(0, range.clone(), 0.5, &mut out, &mut scratch).unwrap();
        }
        assert_eq!(memory.reads.load(Ordering::Relaxed), 8 + 1, "{range:?}");
    }
}

#[test]
fn parts_of_several_types_are_read_as_f32() {
    let half: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect();
    let tensors = [
        Tensor { name: "half".into(), shape: vec![2], data: Data::Bytes(DType::F16, half) },
        Tensor::values("single", &[1], vec![0.1]),
    ];
    let mut memory = Memory::default();
    let checkpoint = memory.checkpoint(&tensors);
    let artifact = memory.add(&checkpoint);
    let make =
        |dtype, parts| Manifest::mapped(Content::Checkpoint, artifact, vec![(info("w", dtype, &[3]), parts)]);
    let source = memory.open(&make(DType::F32, vec![whole("half"), whole("single")]).unwrap());
    assert_eq!(read(&*source, "w"), [1.5, -2.0, 0.1]);
    assert_eq!(floats(&read_bytes(&*source, "w")), [1.5, -2.0, 0.1]);
    let message = memory.refused(&make(DType::F16, vec![whole("half"), whole("single")]).unwrap());
    assert!(message.contains("it is F16, its part `single` is F32"), "{message}");
}

#[test]
fn what_does_not_fit_is_refused_when_opening() {
    let mut memory = Memory::default();
    let tensors = [
        Tensor::numbered("a", &[4, 3]),
        Tensor::numbered("scalar", &[]),
        Tensor::numbered("cube", &[2, 2, 2]),
    ];
    let checkpoint = memory.checkpoint(&tensors);
    let artifact = memory.add(&checkpoint);
    let refused = |shape: &[usize], parts| {
        let tensors = vec![(info("w", DType::F32, shape), parts)];
        memory.refused(&Manifest::mapped(Content::Checkpoint, artifact, tensors).unwrap())
    };
    for (shape, parts, expected) in [
        (&[4, 3][..], vec![whole("b")], "its part `b` is not there"),
        (&[4, 4], vec![whole("a")], "shape [4, 4] has 16 elements, its parts have 12"),
        (&[6], vec![rows("a", 3, 5)], "it takes 3 to 5 of `a`, whose shape is [4, 3]"),
        (&[6], vec![rows("a", 3, 2)], "it takes 3 to 2 of `a`"),
        (&[1], vec![rows("scalar", 0, 1)], "it takes 0 to 1 of `scalar`, whose shape is []"),
        (&[8], vec![columns("a", 2, 4)], "it takes 2 to 4 of `a`"),
        (&[8], vec![columns("cube", 0, 2)], "it transposes `cube`, which is not a matrix: [2, 2, 2]"),
        (&[1], vec![Part::Zeros { elements: usize::MAX }, Part::Zeros { elements: 2 }], "too many elements"),
    ] {
        let message = refused(shape, parts);
        assert!(message.contains("tensor `w` of a view") && message.contains(expected), "{message}");
    }
    let endless = vec![whole("scalar"); (1 << 16) + 1];
    assert!(refused(&[(1 << 16) + 1], endless).contains("too many levels or terms"));
}

#[test]
fn a_view_is_described_once() {
    let mut memory = Memory::default();
    let checkpoint = memory.checkpoint(&[Tensor::numbered("a", &[2])]);
    let view = Manifest::mapped(
        Content::Checkpoint,
        checkpoint.view_digest(),
        vec![(info("w", DType::F32, &[2]), vec![whole("a")])],
    )
    .unwrap();
    let contained = view.clone().with_views(vec![checkpoint.clone()]).unwrap();
    assert_eq!(contained.files(), checkpoint.files());
    assert_eq!(contained.stored_bytes(), checkpoint.stored_bytes());
    assert_eq!(contained.operands().count(), 0);
    assert_eq!(read(&*memory.open(&contained), "w").len(), 2);
    let message = view.with_views(vec![checkpoint.clone(), checkpoint]).unwrap_err().to_string();
    assert!(message.contains("twice"), "{message}");
}

/// The product from its definition.
fn product(tensors: &[Tensor], scale: f64, transposed: bool) -> Vec<f32> {
    let [left, right] = tensors else { panic!("two factors") };
    let (Data::Values(b), Data::Values(a)) = (&left.data, &right.data) else { panic!("values") };
    let (m, r) = (left.shape[0], left.shape[1]);
    let n = right.shape[1..].iter().product::<usize>();
    let element = |i: usize, j: usize| {
        let sum = (0..r).fold(0.0, |sum, p| sum + f64::from(b[i * r + p]) * f64::from(a[p * n + j]));
        (scale * sum) as f32
    };
    if transposed {
        (0..n).flat_map(|j| (0..m).map(move |i| (i, j))).map(|(i, j)| element(i, j)).collect()
    } else {
        (0..m).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| element(i, j)).collect()
    }
}

fn low_rank(memory: &mut Memory, factors: &[Tensor], scale: f64, transposed: bool) -> Manifest {
    let checkpoint = memory.checkpoint(factors);
    let artifact = memory.add(&checkpoint);
    let n = factors[0].shape[0] * factors[1].shape[1..].iter().product::<usize>();
    let tensor =
        LowRankTensor { left: factors[0].name.clone(), right: factors[1].name.clone(), scale, transposed };
    Manifest::low_rank(Content::TaskVectors, artifact, vec![(info("w", DType::F32, &[n]), tensor)]).unwrap()
}

#[test]
fn products_of_odd_sizes_are_the_same_for_any_number_of_threads() {
    for (m, r, n) in [(1, 1, 70_001), (70_001, 1, 1), (257, 16, 511), (9, 300, 801), (65, 1030, 67)] {
        let factors = [Tensor::numbered("left", &[m, r]), Tensor::numbered("right", &[r, n])];
        for transposed in [false, true] {
            let expected = product(&factors, 0.3, transposed);
            let mut memory = Memory::default();
            let manifest = low_rank(&mut memory, &factors, 0.3, transposed);
            let source = memory.open(&manifest);
            assert_eq!(read(&*source, "w"), expected, "{m} × {r} × {n}");
            for threads in [1, 2, 8] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let same =
                    pool.install(|| map_blocks(&*source, 0, |range, values| Ok(values == &expected[range])));
                assert!(same.unwrap().iter().all(|same| *same), "{m} × {r} × {n}, {threads} threads");
            }
        }
    }
}

#[test]
fn kernels_are_products_over_flattened_axes() {
    let factors = [Tensor::numbered("left", &[6, 2, 1, 1]), Tensor::numbered("right", &[2, 3, 2, 2])];
    let flat = [Tensor::numbered("left", &[6, 2]), Tensor::numbered("right", &[2, 12])];
    let mut memory = Memory::default();
    let manifest = low_rank(&mut memory, &factors, 1.0, false);
    assert_eq!(read(&*memory.open(&manifest), "w"), product(&flat, 1.0, false));
}

#[test]
fn products_that_cannot_be_are_refused() {
    let mut memory = Memory::default();
    let left = Tensor::numbered("left", &[4, 2]);
    let refused = |memory: &mut Memory, factors: &[Tensor]| {
        let manifest = low_rank(memory, factors, 1.0, false);
        memory.refused(&manifest)
    };
    let message = refused(&mut memory, &[left.clone(), Tensor::numbered("right", &[3, 5])]);
    assert!(message.contains("its factors `left` and `right` have ranks 2 and 3"), "{message}");
    let message = refused(&mut memory, &[left.clone(), Tensor::bytes("right", DType::I32, &[2, 5])]);
    assert!(message.contains("its factor `right` is I32"), "{message}");
    let message = refused(&mut memory, &[left.clone(), Tensor::numbered("right", &[2])]);
    assert!(message.contains("its factor `right` has shape [2], which is not a matrix"), "{message}");
    let checkpoint = memory.checkpoint(&[left]);
    let product = |scale, dtype| {
        let tensor = LowRankTensor { left: "left".into(), right: "left".into(), scale, transposed: false };
        Manifest::low_rank(
            Content::TaskVectors,
            checkpoint.view_digest(),
            vec![(info("w", dtype, &[8]), tensor)],
        )
    };
    assert!(product(f64::NAN, DType::F32).unwrap_err().to_string().contains("its scale is NaN"));
    assert!(product(1.0, DType::F16).unwrap_err().to_string().contains("it is F16"));
    assert!(matches!(product(1.0, DType::F32).unwrap().layout(), Layout::LowRank { .. }));
}
