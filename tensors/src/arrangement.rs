//! How elements lie in a file when they do not simply follow one another: strides, and the order of the bytes of a number.
//!
//! PyTorch stores a transposed or sliced tensor as a view of a storage, NumPy stores Fortran order, and both may have been
//! written on a big-endian machine. Such tensors stay where they are: [`Arrangement::read`] collects the elements of a block
//! in row-major order and turns their bytes around. It costs memory for one block and reads the file in ascending order,
//! in few pieces: neighbours whose distance is small are read together with what lies between them.
//!
//! An arrangement is never plain: [`Arrangement::new`] returns none for row-major little-endian elements, so that equal
//! tensors have equal descriptions. Strides are not negative.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::DType;
use crate::dtype::byte_size;
use crate::error::Result;

/// Dimensions that a tensor with strides may have, as in PyTorch and NumPy.
const MAX_RANK: usize = 64;

/// Bytes that a tensor may take when its elements share bytes of the file (a stride is 0, say) and it is larger than what it is
/// read from. Without a limit, a file of some bytes could describe a computation without end.
const MAX_EXPANDED_BYTES: u64 = 64 << 20;

/// Elements that are collected at once.
const CHUNK: usize = 1 << 16;

/// Most bytes between two wanted elements that are read rather than skipped: about what a system call costs.
const MAX_GAP: usize = 4 << 10;

/// Most bytes that are read at once when there are gaps in them.
const MAX_WINDOW: usize = 256 << 10;

/// What is unusual about the elements of a region.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arrangement {
    /// Distance between neighbours along every dimension, in elements. Absent: row-major, without gaps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    strides: Option<Vec<usize>>,
    /// Whether the most significant byte of a number comes first.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    big_endian: bool,
}

impl Arrangement {
    /// Returns what is unusual about a tensor, if anything is. `strides` has one entry per dimension.
    pub fn new(dtype: DType, shape: &[usize], strides: Option<Vec<usize>>, big_endian: bool) -> Option<Self> {
        let strides = strides.filter(|strides| !is_row_major(shape, strides));
        let big_endian = big_endian && dtype.size_bytes() > 1;
        (strides.is_some() || big_endian).then_some(Self { strides, big_endian })
    }

    /// Returns the strides of Fortran order.
    pub fn column_major(shape: &[usize]) -> Vec<usize> {
        let mut next = 1usize;
        let step = |&extent: &usize| {
            let stride = next;
            next = next.saturating_mul(extent.max(1));
            stride
        };
        shape.iter().map(step).collect()
    }

    pub fn strides(&self) -> Option<&[usize]> {
        self.strides.as_deref()
    }

    pub fn is_big_endian(&self) -> bool {
        self.big_endian
    }

    /// Bytes from the first element to the end of the last one, or why there is no such number.
    pub(crate) fn span(&self, dtype: DType, shape: &[usize]) -> Result<u64, String> {
        let bytes = byte_size(dtype, shape).ok_or("its size overflows")?;
        let Some(strides) = &self.strides else { return Ok(bytes) };
        if strides.len() != shape.len() || shape.len() > MAX_RANK {
            return Err(format!("{} strides for {} dimensions", strides.len(), shape.len()));
        }
        let span = span_bytes(dtype, shape, strides).ok_or("its strides overflow")?;
        if bytes > span && bytes > MAX_EXPANDED_BYTES {
            return Err(format!(
                "its {bytes} bytes are made of {span}, the limit for such a tensor is {MAX_EXPANDED_BYTES}"
            ));
        }
        Ok(span)
    }

    /// Writes elements `range` to `out`, row-major and little-endian. `read` fills a buffer from an offset in the region on.
    pub(crate) fn read(
        &self,
        dtype: DType,
        shape: &[usize],
        range: &Range<usize>,
        out: &mut [u8],
        mut read: impl FnMut(&mut [u8], u64) -> Result<()>,
    ) -> Result<()> {
        let size = dtype.size_bytes();
        match &self.strides {
            None => read(out, (range.start * size) as u64)?,
            Some(strides) => {
                let dimensions = collapse(shape, strides);
                let (mut runs, mut window) = (Vec::new(), Vec::new());
                for (i, out) in out.chunks_mut(CHUNK * size).enumerate() {
                    let start = range.start + i * CHUNK;
                    find_runs(&dimensions, start..start + out.len() / size, &mut runs);
                    collect(&mut runs, size, out, &mut window, &mut read)?;
                }
            }
        }
        if self.big_endian {
            // a complex number is two
            let width = if dtype == DType::C64 { 4 } else { size };
            out.chunks_exact_mut(width).for_each(<[u8]>::reverse);
        }
        Ok(())
    }
}

/// Bytes from the first element to the end of the last one, unless they overflow.
pub(crate) fn span_bytes(dtype: DType, shape: &[usize], strides: &[usize]) -> Option<u64> {
    if shape.contains(&0) {
        return Some(0);
    }
    let last = shape
        .iter()
        .zip(strides)
        .try_fold(0usize, |last, (extent, stride)| last.checked_add((extent - 1).checked_mul(*stride)?))?;
    byte_size(dtype, &[last.checked_add(1)?])
}

fn is_row_major(shape: &[usize], strides: &[usize]) -> bool {
    if shape.contains(&0) {
        return true;
    }
    let mut expected = 1usize;
    shape.iter().zip(strides).rev().all(|(&extent, &stride)| {
        let fits = extent == 1 || stride == expected;
        expected = expected.saturating_mul(extent);
        fits
    })
}

/// Elements that lie one after the other in the file, and where the first of them goes.
struct Run {
    from: usize,
    to: usize,
    length: usize,
}

/// Extents and strides without dimensions of one element, and with neighbours that behave like one dimension put together.
fn collapse(shape: &[usize], strides: &[usize]) -> Vec<(usize, usize)> {
    let mut dimensions: Vec<(usize, usize)> = Vec::with_capacity(shape.len());
    for (&extent, &stride) in shape.iter().zip(strides).filter(|(extent, _)| **extent != 1) {
        match dimensions.last_mut() {
            Some((outer, step)) if Some(*step) == extent.checked_mul(stride) => {
                (*outer, *step) = (*outer * extent, stride);
            }
            _ => dimensions.push((extent, stride)),
        }
    }
    if dimensions.is_empty() {
        dimensions.push((1, 1));
    }
    dimensions
}

fn find_runs(dimensions: &[(usize, usize)], range: Range<usize>, runs: &mut Vec<Run>) {
    let ((extent, stride), outer) = dimensions.split_last().expect("at least one dimension");
    runs.clear();
    let mut element = range.start;
    while element < range.end {
        let (mut row, column) = (element / extent, element % extent);
        let mut from = column * stride;
        for (extent, stride) in outer.iter().rev() {
            from += row % extent * stride;
            row /= extent;
        }
        let length = (extent - column).min(range.end - element);
        let to = element - range.start;
        if *stride == 1 {
            runs.push(Run { from, to, length });
        } else {
            runs.extend((0..length).map(|i| Run { from: from + i * stride, to: to + i, length: 1 }));
        }
        element += length;
    }
}

/// Reads all runs, in the order of the file.
fn collect(
    runs: &mut [Run],
    size: usize,
    out: &mut [u8],
    window: &mut Vec<u8>,
    read: &mut impl FnMut(&mut [u8], u64) -> Result<()>,
) -> Result<()> {
    if !runs.is_sorted_by_key(|run| run.from) {
        runs.sort_unstable_by_key(|run| (run.from, run.to));
    }
    let mut rest = &*runs;
    while let Some(first) = rest.first() {
        let mut end = first.from + first.length;
        let mut n = 1;
        for run in &rest[1..] {
            let new_end = end.max(run.from + run.length);
            if run.from.saturating_sub(end) * size > MAX_GAP || (new_end - first.from) * size > MAX_WINDOW {
                break;
            }
            (end, n) = (new_end, n + 1);
        }
        let (together, others) = rest.split_at(n);
        if n == 1 {
            read(&mut out[first.to * size..][..first.length * size], (first.from * size) as u64)?;
        } else {
            window.resize((end - first.from) * size, 0);
            read(window, (first.from * size) as u64)?;
            for run in together {
                let bytes = &window[(run.from - first.from) * size..][..run.length * size];
                out[run.to * size..][..bytes.len()].copy_from_slice(bytes);
            }
        }
        rest = others;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Row-major values of a strided view, element by element.
    fn reference(bytes: &[u8], size: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
        let n: usize = shape.iter().product();
        let mut values = Vec::new();
        for mut element in 0..n {
            let mut offset = 0;
            for (extent, stride) in shape.iter().zip(strides).rev() {
                offset += element % extent * stride;
                element /= extent;
            }
            values.extend_from_slice(&bytes[offset * size..][..size]);
        }
        values
    }

    fn check(dtype: DType, shape: &[usize], strides: &[usize], big_endian: bool, range: Range<usize>) {
        let size = dtype.size_bytes();
        let span = span_bytes(dtype, shape, strides).unwrap() as usize;
        let bytes: Vec<u8> = (0..span).map(|i| (i * 31 + i / 256) as u8).collect();
        let mut expected =
            reference(&bytes, size, shape, strides)[range.start * size..range.end * size].to_vec();
        let Some(arrangement) = Arrangement::new(dtype, shape, Some(strides.to_vec()), big_endian) else {
            assert_eq!(expected, bytes[range.start * size..range.end * size]);
            return;
        };
        if big_endian && dtype.size_bytes() > 1 {
            expected.chunks_exact_mut(if dtype == DType::C64 { 4 } else { size }).for_each(<[u8]>::reverse);
        }
        assert_eq!(arrangement.span(dtype, shape).unwrap(), span as u64);
        let mut out = vec![0xAA; range.len() * size];
        let read = |buffer: &mut [u8], offset: u64| {
            buffer.copy_from_slice(&bytes[offset as usize..][..buffer.len()]);
            Ok(())
        };
        arrangement.read(dtype, shape, &range, &mut out, read).unwrap();
        assert!(out == expected, "{dtype} {shape:?} {strides:?} {range:?}");
    }

    #[test]
    fn transposed_matrices_larger_than_a_chunk_are_read_in_order() {
        check(DType::F32, &[300, 500], &[1, 300], false, 0..150_000);
        check(DType::F16, &[300, 500], &[1, 300], true, 70_001..140_003);
        check(DType::U8, &[500, 300], &[4096 * 3, 2], false, 100..66_000);
    }

    #[test]
    fn plain_elements_have_no_arrangement() {
        assert_eq!(Arrangement::new(DType::F32, &[2, 3], Some(vec![3, 1]), false), None);
        assert_eq!(Arrangement::new(DType::F32, &[1, 3], Some(vec![77, 1]), false), None);
        assert_eq!(Arrangement::new(DType::F32, &[0, 3], Some(vec![9, 9]), false), None);
        assert_eq!(Arrangement::new(DType::U8, &[3], None, true), None);
        assert!(Arrangement::new(DType::F32, &[2, 3], Some(vec![1, 2]), false).is_some());
    }

    #[test]
    fn endless_tensors_are_refused() {
        let expanded = Arrangement::new(DType::F32, &[1 << 40, 2], Some(vec![0, 1]), false).unwrap();
        let reason = expanded.span(DType::F32, &[1 << 40, 2]).unwrap_err();
        assert!(reason.contains("are made of 8"), "{reason}");
        let small = Arrangement::new(DType::F32, &[1000, 2], Some(vec![0, 1]), false).unwrap();
        assert_eq!(small.span(DType::F32, &[1000, 2]), Ok(8));
    }

    fn dimension() -> impl Strategy<Value = (usize, usize)> {
        (1..7usize, prop_oneof![0..4usize, 0..40usize])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn any_strides_read_like_the_definition(
            dimensions in prop::collection::vec(dimension(), 0..5),
            dtype in prop::sample::select(DType::ALL.to_vec()),
            big_endian in any::<bool>(),
            a in any::<prop::sample::Index>(),
            b in any::<prop::sample::Index>(),
        ) {
            let (shape, strides): (Vec<usize>, Vec<usize>) = dimensions.into_iter().unzip();
            let n: usize = shape.iter().product();
            let (a, b) = (a.index(n + 1), b.index(n + 1));
            check(dtype, &shape, &strides, big_endian, a.min(b)..a.max(b));
        }
    }
}
