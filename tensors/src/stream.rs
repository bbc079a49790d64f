//! Passes over whole tensors in parallel blocks, with bounded memory and results in a fixed order.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::error::Result;
use crate::kernels::pack::GROUP;
use crate::kernels::reduce::{self, MinMax};
use crate::scratch::Scratch;
use crate::source::{TensorSource, check_finite};

/// Elements per block: 256 KiB of `f32`, so that a few operands fit in a core's L2 cache. The chunk of
/// reductions, and a whole number of packing groups.
pub const BLOCK_ELEMENTS: usize = reduce::CHUNK;

const _: () = assert!(BLOCK_ELEMENTS.is_multiple_of(GROUP), "packed tensors are cut at whole groups");

/// What one pass over a tensor tells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    pub range: MinMax,
    pub sum: f64,
    pub sum_of_squares: f64,
    pub sum_of_magnitudes: f64,
    pub n_zeros: u64,
}

/// Returns the blocks of a tensor of `n` elements.
pub fn blocks(n: usize) -> impl ExactSizeIterator<Item = Range<usize>> {
    (0..n.div_ceil(BLOCK_ELEMENTS)).map(move |i| {
        let start = i * BLOCK_ELEMENTS;
        start..n.min(start + BLOCK_ELEMENTS)
    })
}

/// Calls `work` with every block of a tensor, in parallel; returns its results in the order of the blocks. When
/// several blocks fail, the error of the first one is returned.
pub fn map_blocks<T: Send>(
    source: &dyn TensorSource,
    tensor: usize,
    work: impl Fn(Range<usize>, &[f32]) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    map_blocks_with(&Workers::new(), source, tensor, work)
}

/// Calls `work` with every block of several tensors of the given sizes, in parallel, with the working memory of its thread. Returns
/// the results of each tensor in the order of its blocks; of several errors, that of the first block.
pub fn over_blocks<W: Default + Send, T: Send>(
    sizes: &[usize],
    work: impl Fn(usize, Range<usize>, &mut Scratch, &mut W) -> Result<T> + Sync,
) -> Result<Vec<Vec<T>>> {
    let jobs: Vec<(usize, Range<usize>)> = sizes
        .iter()
        .enumerate()
        .flat_map(|(tensor, n)| blocks(*n).map(move |range| (tensor, range)))
        .collect();
    let idle: Mutex<Vec<(Scratch, W)>> = Mutex::default();
    let results: Vec<(usize, Result<T>)> = jobs
        .into_par_iter()
        .map(|(tensor, range)| {
            // The lock is never held while working.
            let own = idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let (mut scratch, mut memory) = own.unwrap_or_default();
            let result = work(tensor, range, &mut scratch, &mut memory);
            idle.lock().unwrap_or_else(PoisonError::into_inner).push((scratch, memory));
            (tensor, result)
        })
        .collect();
    let mut grouped: Vec<Vec<T>> = sizes.iter().map(|n| Vec::with_capacity(blocks(*n).len())).collect();
    for (tensor, result) in results {
        grouped[tensor].push(result?);
    }
    Ok(grouped)
}

/// Returns range and sums of every tensor in `tensors`, in that order. NaN and infinity are errors. The result does not depend
/// on the number of threads.
pub fn summarize(source: &dyn TensorSource, tensors: &[usize]) -> Result<Vec<Summary>> {
    fold_blocks(source, tensors, Summary::of_block, Summary::EMPTY, Summary::merge)
}

/// Returns the smallest and largest value of every tensor in `tensors`, in that order: the part of [`summarize`] that
/// costs no sums. NaN and infinity are errors.
pub fn ranges(source: &dyn TensorSource, tensors: &[usize]) -> Result<Vec<MinMax>> {
    fold_blocks(source, tensors, reduce::chunk_min_max, MinMax::EMPTY, MinMax::merge)
}

/// Reduces finite tensors: blocks in parallel, their results in order.
fn fold_blocks<T: Copy + Send + Sync>(
    source: &dyn TensorSource,
    tensors: &[usize],
    of_block: impl Fn(&[f32]) -> T + Sync,
    empty: T,
    merge: impl Fn(T, T) -> T + Sync,
) -> Result<Vec<T>> {
    let workers = Workers::new();
    let results: Vec<Result<T>> = tensors
        .par_iter()
        .map(|&tensor| {
            let name = &source.tensors()[tensor].name;
            let blocks = map_blocks_with(&workers, source, tensor, |range, values| {
                check_finite(name, range.start, values)?;
                Ok(of_block(values))
            })?;
            Ok(blocks.into_iter().fold(empty, &merge))
        })
        .collect();
    results.into_iter().collect()
}

/// [`map_blocks`] with working memory that outlives the tensor.
fn map_blocks_with<T: Send>(
    workers: &Workers,
    source: &dyn TensorSource,
    tensor: usize,
    work: impl Fn(Range<usize>, &[f32]) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let ranges: Vec<_> = blocks(source.tensors()[tensor].n_elements()).collect();
    let results: Vec<Result<T>> = ranges
        .into_par_iter()
        .map(|range| {
            workers.with(|worker| {
                worker.values.resize(range.len(), 0.0);
                source.read_f32(tensor, range.clone(), &mut worker.values, &mut worker.scratch)?;
                work(range, &worker.values)
            })
        })
        .collect();
    results.into_iter().collect()
}

impl Summary {
    const EMPTY: Self =
        Self { range: MinMax::EMPTY, sum: 0.0, sum_of_squares: 0.0, sum_of_magnitudes: 0.0, n_zeros: 0 };

    /// Summary of at most one block.
    pub fn of_block(values: &[f32]) -> Self {
        Self {
            range: reduce::chunk_min_max(values),
            sum: reduce::chunk_sum(values),
            sum_of_squares: reduce::chunk_sum_of_squares(values),
            sum_of_magnitudes: reduce::chunk_sum_of_magnitudes(values),
            n_zeros: values.iter().map(|x| u32::from(*x == 0.0)).sum::<u32>().into(),
        }
    }

    /// Adds the next block. Call it in the order of the blocks.
    #[must_use]
    pub fn merge(self, next: Self) -> Self {
        Self {
            range: self.range.merge(next.range),
            sum: self.sum + next.sum,
            sum_of_squares: self.sum_of_squares + next.sum_of_squares,
            sum_of_magnitudes: self.sum_of_magnitudes + next.sum_of_magnitudes,
            n_zeros: self.n_zeros + next.n_zeros,
        }
    }
}

/// Working memory that is handed to whichever thread needs some: as many as threads ever worked at once.
#[derive(Default)]
pub(crate) struct Workers(Mutex<Vec<Worker>>);

#[derive(Default)]
pub(crate) struct Worker {
    pub(crate) scratch: Scratch,
    pub(crate) values: Vec<f32>,
}

impl Workers {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut Worker) -> T) -> T {
        // The lock is never held while working, so a panic elsewhere leaves the list intact.
        let idle = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut worker = idle.unwrap_or_default();
        let result = work(&mut worker);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(worker);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Store, values};

    #[test]
    fn blocks_cover_a_tensor_at_boundary_sizes() {
        for n in [0, 1, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1] {
            let ranges: Vec<_> = blocks(n).collect();
            assert_eq!(ranges.iter().map(ExactSizeIterator::len).sum::<usize>(), n);
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert_eq!(ranges.len(), n.div_ceil(BLOCK_ELEMENTS));
        }
    }

    #[test]
    fn summaries_match_reductions_of_the_whole_for_any_number_of_threads() {
        let x = values(2 * BLOCK_ELEMENTS + 99, 1);
        let mut store = Store::default();
        let artifact = store.one("w", &x);
        let source = store.open(&store_manifest(&store, artifact)).unwrap();
        for threads in [1, 2, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let summary = pool.install(|| summarize(&*source, &[0])).unwrap()[0];
            assert_eq!(summary.sum.to_bits(), reduce::sum(&x).to_bits());
            assert_eq!(summary.sum_of_squares.to_bits(), reduce::sum_of_squares(&x).to_bits());
            assert_eq!(summary.sum_of_magnitudes.to_bits(), reduce::sum_of_magnitudes(&x).to_bits());
            assert_eq!(summary.range, reduce::min_max(&x));
            assert_eq!(pool.install(|| ranges(&*source, &[0])).unwrap(), [summary.range]);
            assert_eq!(summary.n_zeros, x.iter().filter(|x| **x == 0.0).count() as u64);
        }
    }

    #[test]
    fn the_first_bad_element_is_reported() {
        let mut x = values(3 * BLOCK_ELEMENTS, 1);
        x[BLOCK_ELEMENTS + 5] = f32::NAN;
        x[2 * BLOCK_ELEMENTS] = f32::INFINITY;
        let mut store = Store::default();
        let artifact = store.one("w", &x);
        let source = store.open(&store_manifest(&store, artifact)).unwrap();
        for error in [summarize(&*source, &[0]).unwrap_err(), ranges(&*source, &[0]).unwrap_err()] {
            let expected = format!("tensor `w` is not finite: element {} is NaN", BLOCK_ELEMENTS + 5);
            assert_eq!(error.to_string(), expected);
        }
    }

    fn store_manifest(store: &Store, artifact: blake3::Hash) -> crate::Manifest {
        crate::Resolver::manifest(store, &artifact).unwrap()
    }
}
