//! The canonical bytes, and what the writer refuses.

use std::cell::Cell;

use proptest::prelude::*;
use safetensors::tensor::TensorView;

use super::*;
use crate::formats::safetensors::read_header;
use crate::kernels::pack::Bits;
use crate::kernels::reduce::min_max;
use crate::manifest::{Content, FileKind, FileRef};
use crate::stream::BLOCK_ELEMENTS;
use crate::testing::{Store, values};

fn write_bytes(
    tensors: &[(String, DType, Vec<usize>, Vec<u8>)],
    options: &WriteOptions<'_>,
) -> (Vec<u8>, Written) {
    let outputs: Vec<OutputTensor> = tensors
        .iter()
        .map(|(name, dtype, shape, _)| OutputTensor {
            name: name.clone(),
            shape: shape.clone(),
            payload: Payload::Bytes(*dtype),
        })
        .collect();
    let fill = |tensor: usize, range: Range<usize>, block: Block<'_>, _: &mut Scratch| {
        let (_, dtype, _, bytes) = &tensors[tensor];
        let Block::Bytes(out) = block else { panic!("bytes were announced") };
        out.copy_from_slice(&bytes[range.start * dtype.size_bytes()..range.end * dtype.size_bytes()]);
        Ok(())
    };
    let mut out = Vec::new();
    let written = write_tensors(&mut out, &outputs, fill, options).unwrap();
    (out, written)
}

proptest! {
    /// The reference crate's own bytes, in whatever order the tensors come.
    #[test]
    fn output_is_what_the_safetensors_crate_writes(
        tensors in prop::collection::btree_map(".{0,12}", (prop::sample::select(&DType::ALL[..]), prop::collection::vec(0usize..4, 0..4)), 0..12),
        rotate in any::<prop::sample::Index>(),
        metadata in prop::option::of((".{0,5}", ".{0,5}")),
    ) {
        let mut tensors: Vec<_> = tensors
            .into_iter()
            .filter(|(name, _)| name != "__metadata__")
            .map(|(name, (dtype, shape))| {
                let n = shape.iter().product::<usize>() * dtype.size_bytes();
                let bytes = (0..n).map(|i| (i + name.len()) as u8).collect::<Vec<u8>>();
                (name, dtype, shape, bytes)
            })
            .collect();
        let map = metadata.clone().map(|(key, value)| [(key, value)].into());
        let views: Vec<(&str, TensorView<'_>)> = tensors.iter().map(|(name, dtype, shape, bytes)| {
                            (name.as_str(), TensorView::new((*dtype).into(), shape.clone(), bytes).unwrap())
        }).collect();
        let expected = safetensors::serialize(views, map).unwrap();

        let middle = if tensors.is_empty() { 0 } else { rotate.index(tensors.len()) };
        tensors.rotate_left(middle);
        let metadata = metadata.as_ref().map(|(key, value)| (key.as_str(), value.as_str()));
        let options = WriteOptions { metadata, ..WriteOptions::default() };
        let (actual, written) = write_bytes(&tensors, &options);
        prop_assert_eq!(&actual, &expected);
        prop_assert_eq!(written.size, actual.len() as u64);

        let header = read_header(&actual).unwrap().unwrap();
        for (tensor, region) in written.tensors.iter().zip(&header.tensors) {
            prop_assert_eq!(tensor.entry.info(), region.info.clone());
            prop_assert_eq!((tensor.offset, tensor.length), (region.offset, region.length));
            let bytes = &actual[tensor.offset as usize..][..tensor.length as usize];
            prop_assert_eq!(tensor.entry.digest, Some(blake3::hash(bytes)));
        }
    }
}

/// Enough for several waves, with tensors of every awkward size.
fn sizes() -> Vec<usize> {
    let block = BLOCK_ELEMENTS;
    vec![0, 1, 255, 256, 257, block - 1, block, block + 1, WAVE_BYTES / 4, 3 * WAVE_BYTES / 4 + 13, 7]
}

fn write_mixed(threads: usize) -> (Vec<u8>, Written, u64) {
    let inputs: Vec<Vec<f32>> = sizes().into_iter().enumerate().map(|(i, n)| values(n, i)).collect();
    let outputs: Vec<OutputTensor> = inputs
        .iter()
        .enumerate()
        .map(|(i, x)| {
            let codes = |bits| {
                let bits = Bits::new(bits).unwrap();
                Payload::Codes(Encoding::affine(bits, min_max(x)).unwrap())
            };
            let payload = match i % 4 {
                0 => codes(3),
                1 => Payload::Values(DType::F32),
                2 => Payload::Values(DType::BF16),
                _ => Payload::Values(DType::F16),
            };
            OutputTensor { name: format!("tensor {i}"), shape: vec![x.len()], payload }
        })
        .collect();
    let fill = |tensor: usize, range: Range<usize>, block: Block<'_>, _: &mut Scratch| {
        let Block::Values(out) = block else { panic!("values were announced") };
        out.copy_from_slice(&inputs[tensor][range]);
        Ok(())
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        assert_eq!(rayon::current_num_threads(), threads);
        let progress = Cell::new(0);
        let count = |bytes| progress.set(progress.get() + bytes);
        let options = WriteOptions { progress: &count, ..WriteOptions::default() };
        let mut out = Vec::new();
        let written = write_tensors(&mut out, &outputs, fill, &options).unwrap();
        (out, written, progress.get())
    })
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads_and_decode_to_the_input() {
    let (bytes, written, progress) = write_mixed(1);
    assert_eq!(progress, bytes.len() as u64);
    assert_eq!(write_mixed(2), (bytes.clone(), written.clone(), progress));
    assert_eq!(write_mixed(8), (bytes.clone(), written.clone(), progress));
    safetensors::SafeTensors::deserialize(&bytes).unwrap();

    let mut store = Store::default();
    let file = store.add_file(bytes);
    let manifest = written.into_manifest(Content::TaskVectors, file).unwrap();
    let source = store.open(&manifest).unwrap();
    for (i, n) in sizes().into_iter().enumerate() {
        let expected = values(n, i);
        let mut actual = vec![0.0; n];
        let tensor = source.index_of(&format!("tensor {i}")).unwrap();
        source.read_f32(tensor, 0..n, &mut actual, &mut Scratch::new()).unwrap();
        let range = min_max(&expected);
        // 3 bits: one step; halves: half a unit in the last place of the largest value
        let bound = match i % 4 {
            0 => (range.max - range.min) / 7.0 * 1.001,
            1 => 0.0,
            2 => 6.5 / 256.0,
            _ => 6.5 / 2048.0,
        };
        assert!(expected.iter().zip(&actual).all(|(x, y)| (x - y).abs() <= bound), "tensor {i}");
    }
}

fn write_values(values: &[f32], dtype: DType, options: &WriteOptions<'_>) -> Result<Written> {
    let fill = |_: usize, range: Range<usize>, out: &mut [f32], _: &mut Scratch| {
        out.copy_from_slice(&values[range]);
        Ok(())
    };
    write_f32_tensors(&mut Vec::new(), &[("w".to_owned(), vec![values.len()])], dtype, fill, options)
}

#[test]
fn values_that_cannot_be_stored_are_named() {
    let mut x = values(BLOCK_ELEMENTS + 10, 1);
    x[BLOCK_ELEMENTS + 3] = f32::NAN;
    let message = write_values(&x, DType::F32, &WriteOptions::default()).unwrap_err().to_string();
    assert_eq!(message, format!("tensor `w` is not finite: element {} is NaN", BLOCK_ELEMENTS + 3));
    let allow = WriteOptions { allow_non_finite: true, ..WriteOptions::default() };
    write_values(&x, DType::F32, &allow).unwrap();
    write_values(&[f32::INFINITY, 1.0], DType::F16, &allow).unwrap();

    for (dtype, fits, too_large) in
        [(DType::F16, 65519.0, 65520.0), (DType::BF16, f32::from_bits(0x7F7F_7FFF), f32::MAX)]
    {
        write_values(&[1.0, fits], dtype, &WriteOptions::default()).unwrap();
        for options in [&WriteOptions::default(), &allow] {
            let message = write_values(&[1.0, -too_large], dtype, options).unwrap_err().to_string();
            assert_eq!(message, format!("tensor `w` does not fit {dtype}: element 1 is -{too_large}"));
        }
    }
    let message = write_values(&[1.0], DType::F64, &WriteOptions::default()).unwrap_err().to_string();
    assert!(message.contains("stored as F32, F16 or BF16, not as F64"), "{message}");
}

/// A full disk.
struct Full;

impl Write for Full {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::StorageFull.into())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn cancelling_stops_and_failures_of_the_destination_are_passed_on() {
    let options = WriteOptions { cancelled: &|| true, ..WriteOptions::default() };
    assert!(matches!(write_values(&values(10, 1), DType::F32, &options), Err(Error::Cancelled)));

    let tensors = [("w".to_owned(), vec![3])];
    let fill = |_: usize, _: Range<usize>, _: &mut [f32], _: &mut Scratch| Ok(());
    let error = write_f32_tensors(&mut Full, &tensors, DType::F32, fill, &WriteOptions::default());
    assert!(matches!(error, Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::StorageFull));
}

#[test]
fn bad_lists_of_tensors_are_refused_before_anything_is_written() {
    let check = |tensors: &[(&str, Vec<usize>)], expected: &str| {
        let tensors: Vec<_> =
            tensors.iter().map(|(name, shape)| ((*name).to_owned(), shape.clone())).collect();
        let mut out = Vec::new();
        let fill = |_: usize, _: Range<usize>, _: &mut [f32], _: &mut Scratch| Ok(());
        let error = write_f32_tensors(&mut out, &tensors, DType::F32, fill, &WriteOptions::default());
        assert_eq!(error.unwrap_err().to_string(), expected);
        assert!(out.is_empty());
    };
    check(
        &[("a", vec![1]), ("b", vec![1]), ("a", vec![2])],
        "tensor `a` cannot be written: the name appears twice",
    );
    check(
        &[("__metadata__", vec![1])],
        "tensor `__metadata__` cannot be written: the name is reserved by the file format",
    );
    let huge = usize::MAX;
    let expected = format!(
        "tensor `a` cannot be written: its shape [{huge}, 2] has more elements than can be addressed"
    );
    check(&[("a", vec![huge, 2])], &expected);
}

#[test]
fn plain_outputs_become_regions() {
    let written = write_values(&[1.0, 2.0], DType::F32, &WriteOptions::default()).unwrap();
    let file = FileRef { digest: blake3::hash(b""), size: written.size, kind: FileKind::Blob };
    let manifest = written.into_manifest(Content::Checkpoint, file).unwrap();
    assert!(matches!(manifest.layout(), crate::manifest::Layout::Regions { .. }));
    assert!(manifest.tensors()[0].digest.is_some());
}
