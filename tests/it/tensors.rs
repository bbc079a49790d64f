//! Reading and writing checkpoints independently of the tool, by the safetensors crate.

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::path::Path;

/// Float tensors by name: shape and values, widened to f32.
pub(crate) type Floats = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A tensor as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

/// All tensors of a file as they are stored.
pub(crate) fn read_stored(path: &Path) -> BTreeMap<String, Stored> {
    let bytes = fs_err::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let stored = |view: &TensorView<'_>| Stored {
        dtype: view.dtype(),
        shape: view.shape().to_vec(),
        data: view.data().to_vec(),
    };
    tensors.tensors().iter().map(|(name, view)| (name.clone(), stored(view))).collect()
}

pub(crate) fn write_stored(path: &Path, tensors: &BTreeMap<String, Stored>) {
    let views = tensors.iter().map(|(name, tensor)| {
        (name.clone(), TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data).unwrap())
    });
    fs_err::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Rewrites a checkpoint.
pub(crate) fn change(path: &Path, change: impl FnOnce(&mut BTreeMap<String, Stored>)) {
    let mut tensors = read_stored(path);
    change(&mut tensors);
    write_stored(path, &tensors);
}

/// All float tensors of a file.
pub(crate) fn read(path: &Path) -> Floats {
    let stored = read_stored(path).into_iter();
    stored.filter_map(|(name, tensor)| Some((name, (tensor.shape.clone(), widened(&tensor)?)))).collect()
}

fn widened(tensor: &Stored) -> Option<Vec<f32>> {
    let data = &tensor.data;
    Some(match tensor.dtype {
        Dtype::F32 => data.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect(),
        Dtype::F16 => data.chunks_exact(2).map(|c| f16::from_le_bytes([c[0], c[1]]).to_f32()).collect(),
        Dtype::BF16 => data.chunks_exact(2).map(|c| bf16::from_le_bytes([c[0], c[1]]).to_f32()).collect(),
        _ => return None,
    })
}

/// A tensor in single precision.
pub(crate) fn single(shape: &[usize], values: &[f32]) -> Stored {
    Stored {
        dtype: Dtype::F32,
        shape: shape.to_vec(),
        data: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

/// Combines checkpoints tensor by tensor and value by value; all must have the same tensors.
pub(crate) fn combine(operands: &[&Floats], rule: impl Fn(&[f32]) -> f32) -> Floats {
    let names: Vec<&String> = operands[0].keys().collect();
    for operand in operands {
        assert_eq!(operand.keys().collect::<Vec<_>>(), names);
    }
    let tensor = |name: &String| {
        let (shape, first) = &operands[0][name];
        let values = (0..first.len()).map(|index| {
            let row: Vec<f32> = operands.iter().map(|operand| operand[name].1[index]).collect();
            rule(&row)
        });
        (name.clone(), (shape.clone(), values.collect()))
    };
    names.into_iter().map(tensor).collect()
}

/// Fails unless both hold the same tensors with the same bits.
#[track_caller]
pub(crate) fn assert_same(actual: &Floats, expected: &Floats) {
    assert_eq!(actual.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, (shape, values)) in expected {
        assert_eq!(actual[name].0, *shape, "{name}");
        let odd = actual[name]
            .1
            .iter()
            .zip(values)
            .position(|(a, b)| a.to_bits() != b.to_bits() && (*a != 0.0 || *b != 0.0));
        assert_eq!(odd, None, "{name}: {:?}", odd.map(|index| (actual[name].1[index], values[index])));
    }
}

/// Fails unless each value is within 4 units in the last place or 1e-6 relative of what is expected.
#[track_caller]
pub(crate) fn assert_close(name: &str, actual: &[f32], expected: &[f32]) {
    assert_eq!(actual.len(), expected.len(), "{name}");
    for (index, (a, b)) in actual.iter().zip(expected).enumerate() {
        let ulps = (ordered(*a) - ordered(*b)).abs();
        let relative = (a - b).abs() / b.abs().max(f32::MIN_POSITIVE);
        assert!(ulps <= 4 || relative <= 1e-6, "{name}[{index}] is {a:e}, expected {b:e} ({ulps} ulp)");
    }
}

/// Floats as integers in the same order: neighbours differ by one.
fn ordered(value: f32) -> i64 {
    let bits = i64::from(value.to_bits() & 0x7fff_ffff);
    if value.is_sign_negative() { -bits } else { bits }
}
