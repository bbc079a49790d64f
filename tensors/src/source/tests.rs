//! Reading through every layout, and who shares what.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::DType;
use crate::kernels::pack::Bits;
use crate::kernels::reduce::min_max;
use crate::manifest::{Content, PackedTensor, TensorEntry};
use crate::stream::BLOCK_ELEMENTS;
use crate::testing::{Store, values};

fn read_all(source: &dyn TensorSource, tensor: usize) -> Vec<f32> {
    let n = source.tensors()[tensor].n_elements();
    let mut out = vec![f32::NAN; n];
    source.read_f32(tensor, 0..n, &mut out, &mut Scratch::new()).unwrap();
    out
}

#[test]
fn every_float_type_is_widened_and_every_other_refused_by_name() {
    let mut store = Store::default();
    for dtype in DType::ALL {
        let bytes = vec![0x3C; 3 * dtype.size_bytes()];
        let manifest = store.checkpoint(&[("odd", DType::U8, &[3], &[1; 3]), ("t", dtype, &[3], &bytes)]);
        let source = store.open(&manifest).unwrap();
        let tensor = source.index_of("t").unwrap();
        let mut out = [f32::NAN; 2];
        let result = source.read_f32(tensor, 1..3, &mut out, &mut Scratch::new());
        if dtype.is_float() {
            result.unwrap();
            assert!(out.iter().all(|x| x.is_finite() && *x > 0.0), "{dtype}: {out:?}");
        } else {
            let expected = format!("tensor `t` holds {dtype} values, which are not read as f32");
            assert_eq!(result.unwrap_err().to_string(), expected);
        }
        let mut verbatim = vec![0; bytes.len() - 1];
        source.read_bytes(tensor, 1..bytes.len() as u64, &mut verbatim, &mut Scratch::new()).unwrap();
        assert_eq!(verbatim, bytes[1..]);
    }
}

#[test]
fn a_difference_is_exactly_the_difference_of_the_widened_values() {
    let (tuned, base) = (values(1000, 3), values(1000, 9));
    let mut store = Store::default();
    let half: Vec<f16> = tuned.iter().map(|x| f16::from_f32(*x)).collect();
    let brain: Vec<bf16> = base.iter().map(|x| bf16::from_f32(*x)).collect();
    let tuned = store.checkpoint(&[("w", DType::F16, &[10, 100], bytemuck::cast_slice(&half))]);
    let base = store.checkpoint(&[("w", DType::BF16, &[10, 100], bytemuck::cast_slice(&brain))]);
    let terms = [(1.0, store.add(tuned)), (-1.0, store.add(base))];
    let manifest = Store::linear(&[("w", &[10, 100])], &terms).unwrap();
    let source = store.open(&manifest).unwrap();
    let expected: Vec<u32> =
        half.iter().zip(&brain).map(|(t, b)| (t.to_f32() - b.to_f32()).to_bits()).collect();
    let actual = read_all(&*source, 0);
    assert_eq!(actual.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), expected);
    assert_eq!(source.tensors()[0].dtype, DType::F32);
    assert_eq!(source.stored_bytes(), 0);
}

proptest! {
    #[test]
    fn sums_follow_the_order_of_the_terms(
        coefficients in prop::collection::vec(prop_oneof![Just(1.0), Just(-1.0), -2f64..2.0], 1..5),
        n in 1usize..200, a in 0usize..200, b in 0usize..200,
    ) {
        let (a, b) = (a % (n + 1), b % (n + 1));
        let range = a.min(b)..a.max(b);
        let mut store = Store::default();
        let operands: Vec<Vec<f32>> = (0..coefficients.len()).map(|seed| values(n, seed * 31)).collect();
        let terms: Vec<(f64, Hash)> =
            coefficients.iter().zip(&operands).map(|(c, x)| (*c, store.one("w", x))).collect();
        let manifest = Store::linear(&[("w", &[n])], &terms).unwrap();
        let source = store.open(&manifest).unwrap();
        let mut out = vec![0.0; range.len()];
        source.read_f32(0, range.clone(), &mut out, &mut Scratch::new()).unwrap();
        for (i, actual) in range.clone().zip(out) {
            let mut expected = coefficients[0] as f32 * operands[0][i];
            for (c, x) in coefficients.iter().zip(&operands).skip(1) {
                expected += *c as f32 * x[i];
            }
            prop_assert_eq!(actual, expected);
        }
        let mut bytes = vec![0; range.len()];
        source.read_bytes(0, a.min(b) as u64..a.max(b) as u64, &mut bytes, &mut Scratch::new()).unwrap();
        let whole = read_all(&*source, 0);
        prop_assert_eq!(&bytes[..], &bytemuck::cast_slice::<f32, u8>(&whole)[range]);
    }
}

#[test]
fn a_base_shared_by_eight_views_is_read_once_per_block() {
    let n = 3 * BLOCK_ELEMENTS + 17;
    let mut store = Store::default();
    let base = values(n, 0);
    let base = (store.one("w", &base), base);
    let opened_base = store.open(&store.manifest(&base.0).unwrap()).unwrap();
    let mut views = Vec::new();
    for task in 1..=8 {
        let tuned = store.one("w", &values(n, task));
        let manifest = Store::linear(&[("w", &[n])], &[(1.0, tuned), (-1.0, base.0)]).unwrap();
        // opened one by one: sharing is by content, not by handle
        views.push(store.open(&manifest).unwrap());
    }
    let mut scratch = Scratch::new();
    for range in crate::stream::blocks(n) {
        let mut out = vec![0.0; range.len()];
        opened_base.read_f32(0, range.clone(), &mut out, &mut scratch).unwrap();
        assert_eq!(out, base.1[range.clone()]);
        for view in &views {
            view.add_scaled(0, range.clone(), 0.3, &mut out, &mut scratch).unwrap();
        }
        assert_eq!(store.take_reads(), 1 + 8, "{range:?}");
    }
}

#[test]
fn packed_tensors_read_as_their_decoded_values() {
    let x = values(1000, 5);
    let bits = Bits::new(3).unwrap();
    let encoding = Encoding::affine(bits, min_max(&x)).unwrap();
    let mut codes = vec![0; encoding.stored_len(DType::F32, x.len()) as usize];
    let (form, tables) = (encoding.form(x.len()).unwrap(), encoding.tables().unwrap());
    form.encode(0, &x, &tables, &mut codes);
    let mut expected = vec![0.0; x.len()];
    form.decode(0, &codes, &tables, &mut expected);

    let mut store = Store::default();
    let file = store.add_file([vec![9; 5], codes.clone(), vec![1, 2, 3]].concat());
    let entry =
        |name: &str, dtype, n| TensorEntry::view(TensorInfo { name: name.into(), dtype, shape: vec![n] });
    let tensors = vec![
        (entry("w", DType::F32, 1000), PackedTensor { encoding, offset: 5, length: codes.len() as u64 }),
        (
            entry("i", DType::U8, 3),
            PackedTensor { encoding: Encoding::Plain, offset: 5 + codes.len() as u64, length: 3 },
        ),
    ];
    let manifest = Manifest::packed(Content::TaskVectors, file.clone(), tensors).unwrap();
    let source = store.open(&manifest).unwrap();
    assert_eq!(read_all(&*source, 1), expected);
    assert_eq!(source.stored_bytes(), file.size);
    let mut part = vec![0.0; 300];
    source.read_f32(1, 100..400, &mut part, &mut Scratch::new()).unwrap();
    assert_eq!(part, expected[100..400]);
    let mut bytes = [0; 3];
    source.read_bytes(0, 0..3, &mut bytes, &mut Scratch::new()).unwrap();
    assert_eq!(bytes, [1, 2, 3]);
    let mut bytes = [0; 7];
    source.read_bytes(1, 401..408, &mut bytes, &mut Scratch::new()).unwrap();
    assert_eq!(bytes, bytemuck::cast_slice::<f32, u8>(&expected)[401..408]);
}

#[test]
fn what_does_not_fit_is_refused_when_opening() {
    let mut store = Store::default();
    let a = store.one("w", &[1.0, 2.0]);
    let b = store.one("v", &[1.0, 2.0]);
    let c = store.one("w", &[1.0]);
    let integers = store.checkpoint(&[("w", DType::I32, &[2], &[0; 8])]);
    let d = store.add(integers);
    let error = |other| {
        let manifest = Store::linear(&[("w", &[2])], &[(1.0, a), (-1.0, other)]).unwrap();
        store.open(&manifest).err().unwrap().to_string()
    };
    assert!(error(b).contains("tensor `w` is not in artifact"));
    assert!(error(c).contains("tensor `w` has shape [1] in artifact"));
    assert!(error(d).contains("tensor `w` holds I32 values in artifact"));
}

#[test]
fn endless_views_are_refused() {
    let mut store = Store::default();
    let mut artifact = store.one("w", &[1.0, 2.0]);
    for _ in 0..20 {
        let doubled = Store::linear(&[("w", &[2])], &[(1.0, artifact), (1.0, artifact)]).unwrap();
        artifact = store.add(doubled);
    }
    let manifest = store.manifest(&artifact).unwrap();
    assert!(store.open(&manifest).err().unwrap().to_string().contains("too many levels or terms"));
    let mut artifact = store.one("w", &[1.0, 2.0]);
    for _ in 0..100 {
        let nested = Store::linear(&[("w", &[2])], &[(1.0, artifact)]).unwrap();
        artifact = store.add(nested);
    }
    let manifest = store.manifest(&artifact).unwrap();
    assert!(store.open(&manifest).err().unwrap().to_string().contains("too many levels or terms"));
}

#[test]
fn reading_beyond_a_tensor_and_non_finite_values_are_named() {
    let mut store = Store::default();
    let artifact = store.one("w", &[1.0, f32::INFINITY, f32::NAN]);
    let source = store.open(&store.manifest(&artifact).unwrap()).unwrap();
    let mut out = [0.0; 2];
    let mut scratch = Scratch::new();
    let message = source.read_f32(0, 2..4, &mut out, &mut scratch).unwrap_err().to_string();
    assert_eq!(message, "tensor `w` has 3 elements, asked for 2 to 4");
    let message = read_finite_f32(&*source, 0, 1..3, &mut out, &mut scratch).unwrap_err().to_string();
    assert_eq!(message, "tensor `w` is not finite: element 1 is inf");
}

#[test]
fn a_file_of_another_size_is_refused() {
    let mut store = Store::default();
    let artifact = store.one("w", &[1.0, 2.0]);
    let manifest = store.manifest(&artifact).unwrap();
    let mut file = manifest.files()[0].clone();
    file.size += 1;
    let tensors = vec![(
        manifest.tensors()[0].clone(),
        crate::manifest::Region { file: 0, offset: 0, length: 8, arrangement: None },
    )];
    let manifest = Manifest::regions(Content::Checkpoint, vec![file], tensors).unwrap();
    assert!(store.open(&manifest).err().unwrap().to_string().contains("has 8 bytes, expected 9"));
}
