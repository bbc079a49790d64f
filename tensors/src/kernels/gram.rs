//! Inner products of several vectors with each other, `G[s, t] = Σ_i x_s[i]·x_t[i]`, in `f64`.
//!
//! Products of two `f32` are exact in `f64`. Elements are taken in tiles of `TILE` elements, which are widened once; within a tile, element `i`
//! of a pair goes to accumulator `i mod 4`, the accumulators are added in a fixed tree, and tiles are added in order. No fused
//! multiply-add: the same bits on every machine.

/// Elements per tile: eight widened vectors of it fit in a core's L1 cache.
const TILE: usize = 512;

const LANES: usize = 4;

/// Vectors that a row is multiplied with at once, so that its elements are loaded once for all of them.
const COLUMNS: usize = 3;

/// Working memory of [`add_chunk`].
#[derive(Default)]
pub struct GramScratch(Vec<f64>);

/// Adds the inner products of `vectors`, all of the same length, to the lower triangle of `gram` (row-major, one row per vector).
pub fn add_chunk(vectors: &[&[f32]], gram: &mut [f64], scratch: &mut GramScratch) {
    let n = vectors.len();
    assert_eq!(gram.len(), n * n, "one row and one column per vector");
    let length = vectors.first().map_or(0, |vector| vector.len());
    let wide = &mut scratch.0;
    wide.resize(n * TILE, 0.0);
    for start in (0..length).step_by(TILE) {
        let end = length.min(start + TILE);
        let used = (end - start).next_multiple_of(LANES);
        for (wide, vector) in wide.chunks_exact_mut(TILE).zip(vectors) {
            for (wide, x) in wide.iter_mut().zip(&vector[start..end]) {
                *wide = f64::from(*x);
            }
            // what an earlier, longer tile left behind counts as zero
            wide[end - start..used].fill(0.0);
        }
        let row = |t: usize| &wide[t * TILE..t * TILE + used];
        for t in 0..n {
            let mut s = 0;
            while s + COLUMNS <= t + 1 {
                let columns: [&[f64]; COLUMNS] = std::array::from_fn(|i| row(s + i));
                let sums = dots(row(t), columns);
                for (i, sum) in sums.into_iter().enumerate() {
                    gram[t * n + s + i] += sum;
                }
                s += COLUMNS;
            }
            for s in s..=t {
                gram[t * n + s] += dots(row(t), [row(s)])[0];
            }
        }
    }
}

/// Copies the lower triangle to the upper one.
pub fn mirror(gram: &mut [f64], n: usize) {
    for t in 0..n {
        for s in 0..t {
            gram[s * n + t] = gram[t * n + s];
        }
    }
}

/// Inner products of `x` with several vectors of its length, a multiple of [`LANES`].
#[inline]
fn dots<const N: usize>(x: &[f64], others: [&[f64]; N]) -> [f64; N] {
    let mut lanes = [[0f64; LANES]; N];
    let (x, _) = x.as_chunks::<LANES>();
    let others = others.map(|other| &other.as_chunks::<LANES>().0[..x.len()]);
    for (i, x) in x.iter().enumerate() {
        for (lanes, other) in lanes.iter_mut().zip(&others) {
            let other = &other[i];
            for lane in 0..LANES {
                lanes[lane] += x[lane] * other[lane];
            }
        }
    }
    lanes.map(|lanes| (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn matches_a_naive_reference(n in 1usize..10, length in prop_oneof![0usize..40, 500usize..530, 1020usize..1100], seed in 0u64..1000) {
            let vectors: Vec<Vec<f32>> = (0..n)
                .map(|t| (0..length).map(|i| ((i * 7919 + t * 104_729 + seed as usize) % 10_007) as f32 / 5003.0 - 1.0).collect())
                .collect();
            let slices: Vec<&[f32]> = vectors.iter().map(Vec::as_slice).collect();
            let mut gram = vec![0.0; n * n];
            let mut scratch = GramScratch::default();
            // in two chunks, to see that a chunk adds
            let cut = length / 3;
            add_chunk(&slices.iter().map(|x| &x[..cut]).collect::<Vec<_>>(), &mut gram, &mut scratch);
            add_chunk(&slices.iter().map(|x| &x[cut..]).collect::<Vec<_>>(), &mut gram, &mut scratch);
            mirror(&mut gram, n);
            for s in 0..n {
                for t in 0..n {
                    let expected: f64 =
                        vectors[s].iter().zip(&vectors[t]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    prop_assert!((gram[s * n + t] - expected).abs() <= 1e-12 * length as f64);
                    prop_assert_eq!(gram[s * n + t].to_bits(), gram[t * n + s].to_bits());
                }
            }
        }
    }
}
