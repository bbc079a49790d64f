//! How large tensors are, what in them is not finite, and how far two of them are apart.
//!
//! Unlike [`stream::summarize`](crate::stream::summarize), which computations start from, nothing is refused here: NaN and infinity are
//! counted and left out of norms. Values are widened to `f64` exactly, `f64` tensors included; sums follow the rules of
//! [`kernels::reduce`](crate::kernels::reduce), so that no result depends on the number of threads.

use std::ops::Range;

use rayon::prelude::*;

use crate::DType;
use crate::error::Result;
use crate::kernels::reduce::{self, Distance, Norms};
use crate::source::TensorSource;
use crate::stream::{Worker, Workers, blocks};

/// How two tensors of one shape differ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// Elements whose values differ. Zeros of either sign are equal, and so are two NaN.
    pub n_different: u64,
    /// Of floats only: the distance, and the norms of the first tensor.
    pub distance: Option<(Distance, Norms)>,
}

impl Difference {
    /// `‖b − a‖ / ‖a‖`: 0 when they are equal, infinite when only the first is zero.
    pub fn relative_l2(&self) -> Option<f64> {
        let (distance, first) = self.distance?;
        Some(if distance.sum_of_squares == 0.0 { 0.0 } else { distance.l2() / first.l2() })
    }
}

/// Returns the norms of every tensor in `tensors`, in that order; `None` for those that hold no floats.
pub fn norms(source: &dyn TensorSource, tensors: &[usize]) -> Result<Vec<Option<Norms>>> {
    let workers = Workers::new();
    let of_tensor = |&tensor: &usize| {
        let info = &source.tensors()[tensor];
        if !info.dtype.is_float() {
            return Ok(None);
        }
        let of_block = |range, worker: &mut Worker| {
            if info.dtype == DType::F64 {
                Ok(reduce::chunk_norms(&read_f64(source, tensor, range, worker)?))
            } else {
                read_f32(source, tensor, range, worker)?;
                Ok(reduce::chunk_norms(&worker.values))
            }
        };
        let of_blocks = in_blocks(&workers, info.n_elements(), of_block)?;
        Ok(Some(of_blocks.into_iter().fold(Norms::default(), Norms::merge)))
    };
    first_error(tensors.par_iter().map(of_tensor).collect())
}

/// Compares pairs of tensors, of the first source and of the second; the tensors of a pair have the same shape. `None` when one holds floats
/// and the other does not, or when they hold different types of anything else.
pub fn differences(
    first: &dyn TensorSource,
    second: &dyn TensorSource,
    pairs: &[(usize, usize)],
) -> Result<Vec<Option<Difference>>> {
    let workers = Workers::new();
    let of_pair = |&(a, b): &(usize, usize)| {
        let (left, right) = (&first.tensors()[a], &second.tensors()[b]);
        assert_eq!(left.shape, right.shape, "compared tensors have the same shape");
        if left.dtype.is_float() && right.dtype.is_float() {
            let wide = left.dtype == DType::F64 || right.dtype == DType::F64;
            let of_block = |range: Range<usize>, worker: &mut Worker| {
                if wide {
                    let x = read_f64(first, a, range.clone(), worker)?;
                    let y = read_f64(second, b, range, worker)?;
                    return Ok((reduce::chunk_distance(&x, &y), reduce::chunk_norms(&x)));
                }
                read_f32(first, a, range.clone(), worker)?;
                let x = worker.scratch.take(range.len());
                let x = std::mem::replace(&mut worker.values, x);
                let read = read_f32(second, b, range, worker);
                let result = (reduce::chunk_distance(&x, &worker.values), reduce::chunk_norms(&x));
                worker.scratch.give_back(x);
                read.map(|()| result)
            };
            let of_blocks = in_blocks(&workers, left.n_elements(), of_block)?;
            let start = (Distance::default(), Norms::default());
            let merge = |so_far: (Distance, Norms), next: (Distance, Norms)| {
                (so_far.0.merge(next.0), so_far.1.merge(next.1))
            };
            let (distance, norms) = of_blocks.into_iter().fold(start, merge);
            return Ok(Some(Difference {
                n_different: distance.n_different,
                distance: Some((distance, norms)),
            }));
        }
        if left.dtype != right.dtype {
            return Ok(None);
        }
        let size = left.dtype.size_bytes();
        let of_blocks = in_blocks(&workers, left.n_elements(), |range, worker| {
            let x = read_bytes(first, a, size, &range, worker)?;
            let y = read_bytes(second, b, size, &range, worker)?;
            let pairs = x.chunks_exact(size).zip(y.chunks_exact(size));
            Ok(pairs.filter(|(x, y)| x != y).count() as u64)
        })?;
        Ok(Some(Difference { n_different: of_blocks.into_iter().sum(), distance: None }))
    };
    first_error(pairs.par_iter().map(of_pair).collect())
}

fn first_error<T>(results: Vec<Result<T>>) -> Result<Vec<T>> {
    results.into_iter().collect()
}

/// Results of all blocks of `n` elements, in order.
fn in_blocks<T: Send>(
    workers: &Workers,
    n: usize,
    work: impl Fn(Range<usize>, &mut Worker) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let ranges: Vec<Range<usize>> = blocks(n).collect();
    first_error(ranges.into_par_iter().map(|range| workers.with(|worker| work(range, worker))).collect())
}

/// Reads a block into the worker's values.
fn read_f32(
    source: &dyn TensorSource,
    tensor: usize,
    range: Range<usize>,
    worker: &mut Worker,
) -> Result<()> {
    worker.values.resize(range.len(), 0.0);
    source.read_f32(tensor, range, &mut worker.values, &mut worker.scratch)
}

fn read_f64(
    source: &dyn TensorSource,
    tensor: usize,
    range: Range<usize>,
    worker: &mut Worker,
) -> Result<Vec<f64>> {
    if source.tensors()[tensor].dtype == DType::F64 {
        let bytes = read_bytes(source, tensor, 8, &range, worker)?;
        let (values, _) = bytes.as_chunks::<8>();
        return Ok(values.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect());
    }
    read_f32(source, tensor, range, worker)?;
    Ok(worker.values.iter().copied().map(f64::from).collect())
}

fn read_bytes(
    source: &dyn TensorSource,
    tensor: usize,
    size: usize,
    range: &Range<usize>,
    worker: &mut Worker,
) -> Result<Vec<u8>> {
    let mut bytes = vec![0; range.len() * size];
    let range = (range.start * size) as u64..(range.end * size) as u64;
    source.read_bytes(tensor, range, &mut bytes, &mut worker.scratch)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Store, values};

    fn source(x: &[f32]) -> std::sync::Arc<dyn TensorSource> {
        let mut store = Store::default();
        let artifact = store.one("w", x);
        store.open(&crate::Resolver::manifest(&store, &artifact).unwrap()).unwrap()
    }

    #[test]
    fn norms_match_a_naive_reference_and_do_not_depend_on_threads() {
        for n in [0, 1, 17, reduce::CHUNK - 1, reduce::CHUNK, reduce::CHUNK + 1, 3 * reduce::CHUNK + 5] {
            let mut x = values(n, 3);
            let expected: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
            let source_of_finite = source(&x);
            let results = [1, 2, 7].map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| norms(&*source_of_finite, &[0])).unwrap()[0].unwrap()
            });
            assert!(results.iter().all(|result| *result == results[0]));
            assert!((results[0].sum_of_squares - expected).abs() <= expected * 1e-12);
            let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            assert_eq!((results[0].max_abs, results[0].n_non_finite), (f64::from(largest), 0));
            if n > 1 {
                (x[0], x[n - 1]) = (f32::NAN, f32::NEG_INFINITY);
                let rest: f64 = x[1..n - 1].iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
                let with_holes = norms(&*source(&x), &[0]).unwrap()[0].unwrap();
                assert_eq!(with_holes.n_non_finite, 2);
                assert!((with_holes.sum_of_squares - rest).abs() <= rest * 1e-12);
            }
        }
    }

    #[test]
    fn differences_match_a_naive_reference() {
        let n = reduce::CHUNK + 99;
        let (x, mut y) = (values(n, 1), values(n, 1));
        let difference = |y: &[f32]| differences(&*source(&x), &*source(y), &[(0, 0)]).unwrap()[0].unwrap();
        let same = difference(&y);
        assert_eq!((same.n_different, same.relative_l2()), (0, Some(0.0)));
        (y[3], y[reduce::CHUNK]) = (y[3] + 2.0, y[reduce::CHUNK] - 0.5);
        let found = difference(&y);
        let (distance, first) = found.distance.unwrap();
        let pairs = || x.iter().zip(&y).map(|(x, y)| f64::from(*y) - f64::from(*x));
        let expected: f64 = pairs().map(|d| d * d).sum();
        assert_eq!((found.n_different, distance.sum_of_squares), (2, expected));
        assert_eq!(distance.max_abs, pairs().fold(0f64, |largest, d| largest.max(d.abs())));
        assert_eq!(Some(distance.l2() / first.l2()), found.relative_l2());
        (y[5], y[6]) = (f32::NAN, f32::INFINITY);
        let found = difference(&y);
        assert_eq!((found.n_different, found.distance.unwrap().0.sum_of_squares), (4, expected));
    }

    #[test]
    fn what_is_not_finite_or_signed_compares_by_value() {
        let compare = |x: &[f32], y: &[f32]| {
            differences(&*source(x), &*source(y), &[(0, 0)]).unwrap()[0].unwrap().n_different
        };
        assert_eq!(compare(&[f32::NAN, f32::INFINITY, 0.0], &[-f32::NAN, f32::INFINITY, -0.0]), 0);
        assert_eq!(compare(&[f32::NAN, f32::INFINITY, 0.0], &[0.0, f32::NEG_INFINITY, f32::NAN]), 3);
    }
}
